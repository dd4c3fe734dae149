#include "kinml.h"

#include <exception>
#include <string>
#include <vector>

#include "potential.h"

struct kinml_potential {
  kinml::md::Potential potential;
};

namespace {

std::string& last_error() {
  thread_local std::string text;
  return text;
}

template <class Result, class Function>
Result guarded(Result failed, const Function& function) {
  try {
    return function();
  } catch (const std::exception& error) {
    last_error() = error.what();
  }
  return failed;
}

}  // namespace

extern "C" {

kinml_potential* kinml_open(const char* path, kinml_precision precision) {
  return guarded<kinml_potential*>(
      nullptr, [&] { return new kinml_potential{kinml::md::Potential(path, precision)}; });
}
void kinml_close(kinml_potential* p) {
  delete p;
}

int64_t kinml_n_members(const kinml_potential* p) {
  return p->potential.model().n_members;
}
int64_t kinml_n_elements(const kinml_potential* p) {
  return p->potential.model().n_species();
}
const char* kinml_element(const kinml_potential* p, int64_t species) {
  return p->potential.model().elements.at(species).c_str();
}
int64_t kinml_species(const kinml_potential* p, const char* element) {
  return p->potential.species(element);
}
double kinml_cutoff(const kinml_potential* p) {
  return p->potential.model().cutoff();
}
kinml_precision kinml_precision_of(const kinml_potential* p) {
  return p->potential.single() ? KINML_SINGLE : KINML_DOUBLE;
}
int kinml_is_difference(const kinml_potential* p) {
  return p->potential.model().baseline.has_value() ? 1 : 0;
}

double kinml_energy_factor(const kinml_potential* p) {
  return p->potential.model().energy_factor;
}
double kinml_forces_factor(const kinml_potential* p, int64_t species) {
  const std::vector<double>& factors = p->potential.model().forces_factors;
  return factors.empty() ? 1.0 : factors.at(species);
}

int kinml_has_grades(const kinml_potential* p) {
  return p->potential.model().grade.empty() ? 0 : 1;
}

int kinml_compute(kinml_potential* p, const kinml_atoms* atoms, const kinml_results* results,
                  int n_threads) {
  return guarded(1, [&] {
    p->potential.compute(*atoms, *results, n_threads);
    return 0;
  });
}

const char* kinml_error(void) {
  return last_error().c_str();
}

}  // extern "C"

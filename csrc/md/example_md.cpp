// example_md MODEL [STEPS] [FEMTOSECONDS] [KELVIN] < in.xyz: molecular dynamics without torch.
//
// Reads atoms from an XYZ file, integrates Newton's equations with velocity Verlet at constant
// energy (NVE), and prints energies ten times. An extended XYZ file with a Lattice is a periodic
// system. The model is a file of `kinml-fast export --format plain`.
#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "example_system.h"
#include "kinml.h"

namespace {

// Means over the members of an ensemble, [n_members, size].
std::vector<double> mean(const std::vector<double>& of_members, std::size_t n_members) {
  std::vector<double> result(of_members.size() / n_members);
  for (std::size_t i = 0; i < of_members.size(); ++i)
    result[i % result.size()] += of_members[i] / static_cast<double>(n_members);
  return result;
}

void run(int n_arguments, char** arguments) {
  if (n_arguments < 2)
    throw std::invalid_argument("example_md MODEL [STEPS] [FEMTOSECONDS] [KELVIN] < in.xyz");
  const std::unique_ptr<kinml_potential, decltype(&kinml_close)> potential(
      kinml_open(arguments[1], KINML_AS_TRAINED), &kinml_close);
  if (!potential) throw std::runtime_error(kinml_error());
  const example::Options options(n_arguments, arguments, 2);
  example::System system = example::read_xyz(std::cin);
  std::vector<std::int64_t> species;
  for (const std::string& element : system.elements) {
    species.push_back(kinml_species(potential.get(), element.c_str()));
    if (species.back() < 0)
      throw std::invalid_argument("the model does not know the element " + element);
  }
  const std::int64_t n = system.n(), n_members = kinml_n_members(potential.get());
  std::vector<double> energies(n_members), of_members(3 * n_members * n);
  const kinml_results results = {energies.data(), of_members.data(), nullptr, nullptr, nullptr};
  example::run_nve(system, options,
                   [&](const std::vector<double>& positions, std::vector<double>& forces) {
                     const kinml_atoms atoms = {n,
                                                n,
                                                positions.data(),
                                                species.data(),
                                                system.periodic_cell(),
                                                system.periodic.data(),
                                                nullptr,
                                                nullptr};
                     if (kinml_compute(potential.get(), &atoms, &results, options.threads) != 0)
                       throw std::runtime_error(kinml_error());
                     forces = mean(of_members, n_members);
                     return mean(energies, n_members)[0];
                   });
}

}  // namespace

int main(int n_arguments, char** arguments) {
  try {
    run(n_arguments, arguments);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}

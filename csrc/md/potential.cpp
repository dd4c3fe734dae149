#include "potential.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "../core/lattice.h"
#include "../core/outputs.h"
#include "../core/system.h"
#include "../cpu/aev_cpu.h"
#include "../cpu/force_step_cpu.h"
#include "../cpu/hessian_cpu.h"
#include "../cpu/parallel.h"

namespace kinml::md {

struct Potential::Engine {
  explicit Engine(PlainModel&& read) : model(std::move(read)) {}
  virtual ~Engine() = default;
  virtual bool single() const = 0;
  virtual void compute(const kinml_atoms& atoms, const kinml_results& results, int n_threads) = 0;

  PlainModel model;
};

namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument(what);
}

void check_cell(const kinml_atoms& atoms) {
  const Lattice lattice(atoms.cell, atoms.periodic);
  for (int k = 0; lattice.any() && k < 3; ++k)
    if (!(lattice.heights[k] >= kLowestCell))
      refuse("the cell has no volume: opposite faces must be at least 0.1 angstrom apart");
  if (lattice.volume < 0) refuse("the cell is left-handed: exchange two of its vectors");
}

void check(const kinml_atoms& atoms, std::int64_t n_species) {
  if (atoms.n_centres < 0 || atoms.n_centres > atoms.n)
    refuse(std::to_string(atoms.n_centres) + " atoms with energies of " + std::to_string(atoms.n));
  for (std::int64_t i = 0; i < atoms.n; ++i) {
    if (atoms.species[i] < 0 || atoms.species[i] >= n_species)
      refuse("atom " + std::to_string(i) + " has the species " + std::to_string(atoms.species[i]) +
             ", the model knows " + std::to_string(n_species));
    for (int d = 0; d < 3; ++d)
      if (!std::isfinite(atoms.positions[3 * i + d]))
        refuse("the position of atom " + std::to_string(i) + " is no number: the run has blown up");
  }
  if (atoms.cell != nullptr && atoms.periodic != nullptr) check_cell(atoms);
  if (atoms.pair_starts == nullptr) return;
  std::int64_t before = 0;
  for (std::int64_t i = 0; i <= atoms.n; before = atoms.pair_starts[i], ++i)
    if (atoms.pair_starts[i] < before) refuse("pair_starts go back at atom " + std::to_string(i));
  for (std::int64_t p = 0; p < before; ++p)
    if (atoms.neighbours[p] < 0 || atoms.neighbours[p] >= atoms.n)
      refuse("pair " + std::to_string(p) + " has the neighbour " +
             std::to_string(atoms.neighbours[p]) + " of " + std::to_string(atoms.n) + " atoms");
}

template <class T>
std::vector<T> as(const std::vector<double>& numbers) {
  return {numbers.begin(), numbers.end()};
}

}  // namespace

template <class T>
struct Potential::EngineOf final : Potential::Engine {
  explicit EngineOf(PlainModel&& read)
      : Engine(std::move(read)),
        sae(model.highest_sae()),
        weights(as<T>(model.weights)),
        prepared({model.aev, model.chain(), weights.data(), model.n_members, sae.data()}, 1) {
    std::vector<T>().swap(weights);
  }

  bool single() const override { return std::is_same_v<T, float>; }

  void compute(const kinml_atoms& atoms, const kinml_results& results, int n_threads) override {
    check(atoms, model.n_species());
    const std::int64_t numbers = model.n_members * atoms.n, offsets[] = {0, atoms.n};
    place(atoms.positions, atoms.n);
    System<T> system;
    system.n_atoms = atoms.n;
    system.n_structures = 1;
    system.species = atoms.species;
    system.offsets = offsets;
    system.coordinates = positions.data();
    system.cells = atoms.cell;
    system.periodic = atoms.periodic;
    system.centres = &atoms.n_centres;
    system.pair_starts = atoms.pair_starts;
    system.neighbours = atoms.neighbours;

    Outputs<T> outputs{results.energies, in_type(forces, results.forces, 3 * numbers)};
    outputs.atomic_energies = results.atomic_energies;
    if (results.virials != nullptr)
      outputs.atomic_virials = in_type(virials, results.virials, 9 * numbers);
    prepared.energy_forces(system, model.n_levels() - 1, outputs, n_threads);
    in_double(outputs.forces, results.forces, 3 * numbers);
    if (results.virials != nullptr) in_double(outputs.atomic_virials, results.virials, 9 * numbers);
    if (results.hessians != nullptr) second_derivatives(system, results.hessians, n_threads);
    if (results.grades != nullptr) grade(system, atoms.n_centres, results.grades, n_threads);
  }

 private:
  void second_derivatives(const System<T>& system, double* wanted, int n_threads) {
    if (model.n_levels() > cpu::kMostHessianLevels ||
        static_cast<std::int64_t>(model.activations.size()) > cpu::kMostHessianLayers)
      refuse(model.path + " has more levels or layers than second derivatives are made for");
    const std::int64_t columns = 3 * system.n_atoms, numbers = model.n_members * columns * columns;
    const std::vector<T> own = as<T>(model.weights);
    std::vector<T> memory;
    T* const out = in_type(memory, wanted, numbers);
    cpu::energy_hessians<T>({model.aev, model.chain(), own.data(), model.n_members, nullptr},
                            system, model.n_levels() - 1, nullptr, system.n_atoms, columns, out,
                            n_threads);
    in_double(out, wanted, numbers);
  }
  // a^T M a of each centre's descriptor.
  void grade(const System<T>& system, std::int64_t n_centres, double* grades, int n_threads) {
    if (model.grade.empty())
      refuse(model.path + " has no extrapolation grades: export it with --training-data");
    const std::int64_t length = model.aev.length();
    features.resize(system.n_atoms * length);
    cpu::aev_forward(model.aev, system, features.data(), n_threads);
    std::fill_n(grades, system.n_atoms, 0.0);
    cpu::parallel_for(n_centres, n_threads, [&](std::int64_t i) {
      const T* const a = features.data() + i * length;
      const double* row = model.grade.data() + system.species[i] * length * length;
      for (std::int64_t k = 0; k < length; ++k, row += length) {
        double sum = 0;
        for (std::int64_t l = 0; l < length; ++l) sum += row[l] * static_cast<double>(a[l]);
        grades[i] += sum * static_cast<double>(a[k]);
      }
    });
  }

  // Positions in type T, from the middle of the system: far from the origin float has too few digits
  // for their differences.
  void place(const double* wanted, std::int64_t count) {
    positions.assign(wanted, wanted + 3 * count);
    if constexpr (std::is_same_v<T, double>) return;
    for (int d = 0; d < 3 && count > 0; ++d) {
      double low = wanted[d], high = low;
      for (std::int64_t i = d; i < 3 * count; i += 3) {
        low = std::min(low, wanted[i]);
        high = std::max(high, wanted[i]);
      }
      const double middle = (low + high) / 2;
      for (std::int64_t i = d; i < 3 * count; i += 3)
        positions[i] = static_cast<T>(wanted[i] - middle);
    }
  }

  // Where numbers of type T are written that the caller wants in double.
  static T* in_type(std::vector<T>& own, double* wanted, std::int64_t count) {
    if constexpr (std::is_same_v<T, double>) return wanted;
    own.resize(count);
    return own.data();
  }
  static void in_double(const T* from, double* wanted, std::int64_t count) {
    if constexpr (!std::is_same_v<T, double>) std::copy_n(from, count, wanted);
  }

  std::vector<double> sae;
  std::vector<T> weights;
  cpu::PreparedModel<T> prepared;
  std::vector<T> positions, forces, virials, features;
};

Potential::Potential(const std::string& path, kinml_precision precision) {
  PlainModel model = read_plain_model(path);
  if (precision == KINML_SINGLE || (precision == KINML_AS_TRAINED && model.single))
    engine_ = std::make_unique<EngineOf<float>>(std::move(model));
  else
    engine_ = std::make_unique<EngineOf<double>>(std::move(model));
}
Potential::~Potential() = default;

const PlainModel& Potential::model() const {
  return engine_->model;
}
bool Potential::single() const {
  return engine_->single();
}

std::int64_t Potential::species(const std::string& element) const {
  const auto& elements = model().elements;
  const auto found = std::find(elements.begin(), elements.end(), element);
  return found == elements.end() ? -1 : found - elements.begin();
}

void Potential::compute(const kinml_atoms& atoms, const kinml_results& results, int n_threads) {
  engine_->compute(atoms, results, n_threads);
}

}  // namespace kinml::md

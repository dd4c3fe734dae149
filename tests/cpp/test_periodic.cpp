// Crystals, ghosts and given pairs on the CPU: descriptors against the definition in long double on
// clusters of images that are made by hand, energies, forces and virials against the same, against
// finite strains and among all ways to name the neighbours, the loss's stress term against its
// parts.
//
// The instruction set is the one of the processor or of KINML_CPU_ISA (ctest runs each).
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <vector>

#include "../../csrc/core/lattice.h"
#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/force_step_cpu.h"
#include "check.h"
#include "models.h"
#include "molecules.h"

namespace {

using namespace molecules;
using namespace models;
using kinml::Outputs;

// A batch of structures in cells.
struct Crystals : Batch {
  std::vector<double> cells;    // [n_structures, 3, 3]
  std::vector<Index> periodic;  // [n_structures, 3]

  // Skewed cells with vectors of about these lengths; atoms at random in them, and some outside.
  void add(Index n, Index n_species, double shortest, double longest, const Index* along) {
    std::array<double, 9> cell;
    for (int k = 0; k < 3; ++k) {
      const double length = uniform(shortest, longest);
      for (int d = 0; d < 3; ++d)
        cell[3 * k + d] = static_cast<float>(length * ((k == d) + uniform(-0.25, 0.25)));
    }
    cells.insert(cells.end(), cell.begin(), cell.end());
    periodic.insert(periodic.end(), along, along + 3);
    for (Index i = 0; i < n; ++i) {
      double x[3] = {};
      for (int k = 0; k < 3; ++k) {
        const double f = uniform(along[k] != 0 ? -1.2 : 0, along[k] != 0 ? 1.3 : 1);
        for (int d = 0; d < 3; ++d) x[d] += f * cell[3 * k + d];
      }
      add_atom(x[0], x[1], x[2], random_index(0, n_species - 1));
    }
    finish_structure();
  }

  template <class T>
  System<T> view(const std::vector<T>& x) const {
    System<T> v{n_atoms(), n_structures(), species.data(), offsets.data()};
    v.coordinates = x.data();
    v.cells = cells.data();
    v.periodic = periodic.data();
    return v;
  }
};

// The neighbours of a structure's atoms, made by hand: images within the cutoff of any atom.
struct Images {
  std::vector<double> x;      // [n_all, 3], the atoms first
  std::vector<Index> atom;    // [n_all] of which they are images
  std::vector<Index> shifts;  // [n_all, 3]

  Images(const Crystals& batch, Index s, double cutoff) {
    const double* const own = batch.coordinates.data() + 3 * batch.offsets[s];
    const double* const cell = batch.cells.data() + 9 * s;
    const Index n = batch.size(s);
    x.assign(own, own + 3 * n);
    for (Index i = 0; i < n; ++i) atom.push_back(i);
    shifts.assign(3 * n, 0);
    Index most[3];
    for (int k = 0; k < 3; ++k) most[k] = batch.periodic[3 * s + k] != 0 ? 9 : 0;
    for (Index a = -most[0]; a <= most[0]; ++a)
      for (Index b = -most[1]; b <= most[1]; ++b)
        for (Index c = -most[2]; c <= most[2]; ++c)
          for (Index j = 0; (a != 0 || b != 0 || c != 0) && j < n; ++j) {
            double y[3];
            for (int d = 0; d < 3; ++d)
              y[d] = own[3 * j + d] + a * cell[d] + b * cell[3 + d] + c * cell[6 + d];
            bool near = false;
            for (Index i = 0; i < n && !near; ++i)
              near = std::hypot(y[0] - own[3 * i], y[1] - own[3 * i + 1], y[2] - own[3 * i + 2]) <=
                     cutoff;
            if (!near) continue;
            x.insert(x.end(), y, y + 3);
            atom.push_back(j);
            shifts.insert(shifts.end(), {a, b, c});
          }
  }
  Index size() const { return static_cast<Index>(atom.size()); }
};

template <class T>
struct Found {
  std::vector<double> energies, atomic, virials;
  std::vector<T> forces, atomic_virials;

  Found(Index levels, Index count, Index n_atoms)
      : energies(levels * count, kNaN),
        atomic(levels * n_atoms, kNaN),
        virials(levels * count * 9, kNaN),
        forces(levels * n_atoms * 3, std::numeric_limits<T>::quiet_NaN()),
        atomic_virials(levels * n_atoms * 9, std::numeric_limits<T>::quiet_NaN()) {}
  Outputs<T> outputs() {
    return {energies.data(), forces.data(), atomic.data(), atomic_virials.data(), virials.data()};
  }
  static constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
};

template <class T>
Found<T> evaluate(const Model& model, const std::vector<T>& weights, const System<T>& system,
                  int n_threads) {
  const std::vector<double> sae(model.aev.n_species, 0.25);
  Found<T> found(1, system.count(), system.n_atoms);
  kinml::cpu::energy_forces(model.view(weights, 1, sae.data()), system, model.n_levels - 1,
                            found.outputs(), n_threads);
  return found;
}

template <class T>
constexpr Real kTight = sizeof(T) == 8 ? 1e-11L : 3e-4L;

const Index kAlong[8][3] = {{1, 1, 1}, {1, 1, 0}, {1, 0, 1}, {0, 1, 1},
                            {1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {0, 0, 0}};

Crystals some_crystals(Index n_species) {
  Crystals batch;
  for (const auto& along : kAlong) batch.add(random_index(1, 6), n_species, 3.2, 5.5, along);
  batch.add(0, n_species, 4, 5, kAlong[0]);
  batch.add(1, n_species, 1.6, 2.2, kAlong[0]);  // its neighbours are its own images
  return batch;
}

// Descriptors of all kinds of periodicity, as the definition says on a cluster.
template <class T>
void test_descriptors() {
  check::section("descriptors of crystals");
  for (const auto& [name, p] : parameter_sets()) {
    check::section(name);
    const Crystals batch = some_crystals(p.n_species);
    const std::vector<T> x = as<T>(batch.coordinates);
    std::vector<T> aev(batch.n_atoms() * p.length());
    kinml::cpu::aev_forward(p, batch.view(x), aev.data(), 2);
    for (Index s = 0; s < batch.n_structures(); ++s) {
      const Images images(batch, s, std::max(p.radial_cutoff, p.angular_cutoff));
      std::vector<Index> species;
      for (const Index i : images.atom) species.push_back(batch.species[batch.offsets[s] + i]);
      std::vector<Real> expected = reference(p, std::vector<Real>(images.x.begin(), images.x.end()),
                                             species.data(), images.size());
      expected.resize(batch.size(s) * p.length());
      // An atom's own images lie on one line with it, where an angle that counts as it is (beta 1)
      // magnifies rounding.
      const Real tolerance = p.beta == 1 ? std::max<Real>(kTight<T>, 1e-8L) : kTight<T>;
      const auto first = aev.begin() + batch.offsets[s] * p.length();
      check_close(std::vector<T>(first, first + batch.size(s) * p.length()), expected, tolerance,
                  tolerance * (1 + largest(expected)));
    }
  }
}

// Energies, forces, virials: found neighbours, given pairs, and ghosts whose forces come home.
template <class T>
void test_neighbours(Index n_levels) {
  check::section("the ways to name neighbours");
  const AevParameters p = aevmod(2, 4, 2, 3, 4.2, 3.1, 0.95);
  const Model model(p, {6, 4}, {1, 2, 0}, true, n_levels);
  const std::vector<T> weights = as<T>(model.weights);
  const Crystals batch = some_crystals(p.n_species);
  const std::vector<T> x = as<T>(batch.coordinates);
  const System<T> system = batch.view(x);
  const Found<T> found = evaluate(model, weights, system, 2);
  CHECK(all_finite(found.energies) && all_finite(found.forces) && all_finite(found.virials));
  const Real tolerance = kTight<T> * (1 + largest(found.forces));

  // Given pairs, those of a centre in any order, and some beyond the cutoff.
  std::vector<Index> starts = {0}, neighbours, shifts;
  for (Index s = 0; s < batch.n_structures(); ++s) {
    const Images images(batch, s, 1.2 * p.radial_cutoff);
    for (Index i = 0; i < batch.size(s); ++i) {
      for (Index q = images.size() - 1; q >= 0; --q) {
        if (q == i) continue;
        neighbours.push_back(batch.offsets[s] + images.atom[q]);
        shifts.insert(shifts.end(), &images.shifts[3 * q], &images.shifts[3 * q] + 3);
      }
      starts.push_back(static_cast<Index>(neighbours.size()));
    }
  }
  System<T> with_pairs = system;
  with_pairs.pair_starts = starts.data();
  with_pairs.neighbours = neighbours.data();
  with_pairs.shifts = shifts.data();
  with_pairs.n_pairs = static_cast<Index>(neighbours.size());
  const Found<T> given = evaluate(model, weights, with_pairs, 3);
  check_close(given.energies, std::vector<Real>(found.energies.begin(), found.energies.end()),
              kTight<T>, kTight<T>);
  check_close(given.forces, std::vector<Real>(found.forces.begin(), found.forces.end()), 0,
              tolerance);
  check_close(given.virials, std::vector<Real>(found.virials.begin(), found.virials.end()), 0,
              20 * tolerance);

  // Ghosts: a molecule of the atoms and their images.
  for (Index s = 0; s < batch.n_structures(); ++s) {
    const Images images(batch, s, p.radial_cutoff);
    const Index n = batch.size(s), first = batch.offsets[s];
    std::vector<Index> species;
    for (const Index i : images.atom) species.push_back(batch.species[first + i]);
    const std::vector<Index> offsets = {0, images.size()};
    const std::vector<T> all = as<T>(images.x);
    System<T> cluster{images.size(), 1, species.data(), offsets.data()};
    cluster.coordinates = all.data();
    cluster.centres = &n;
    const Found<T> of_cluster = evaluate(model, weights, cluster, 1);
    CHECK_CLOSE(of_cluster.energies[0], found.energies[s], kTight<T>, kTight<T>);
    std::vector<Real> home(3 * n);
    for (Index q = 0; q < images.size(); ++q)
      for (int d = 0; d < 3; ++d) home[3 * images.atom[q] + d] += of_cluster.forces[3 * q + d];
    check_close(
        std::vector<T>(found.forces.begin() + 3 * first, found.forces.begin() + 3 * (first + n)),
        home, 0, tolerance);
    for (int c = 0; c < 9; ++c)
      CHECK_CLOSE(of_cluster.virials[c], found.virials[9 * s + c], 0, 20 * tolerance);
    Real sum = 0;
    for (Index i = 0; i < n; ++i) sum += found.atomic[first + i];
    CHECK_CLOSE(sum, found.energies[s], kTight<T>, kTight<T>);
  }
}

// The virial is the derivative of the energy by a strain of the places and of the cell.
void test_strains() {
  check::section("virials and finite strains");
  const AevParameters p = aevmod(2, 4, 2, 3, 4.2, 3.1, 0.95);
  const Model model(p, {6, 4}, {1, 2, 0}, true);
  Crystals batch;
  for (int i = 0; i < 3; ++i) batch.add(4, 2, 3.5, 5.0, kAlong[0]);
  const Found<double> found = evaluate(model, model.weights, batch.view(batch.coordinates), 1);
  const double h = 1e-5;
  for (int k = 0; k < 3; ++k)
    for (int l = 0; l < 3; ++l) {
      std::vector<double> slopes(batch.n_structures());
      for (const double sign : {-1.0, 1.0}) {
        Crystals strained = batch;  // x_k += h x_l
        for (auto* rows : {&strained.coordinates, &strained.cells})
          for (std::size_t r = 0; r < rows->size(); r += 3)
            (*rows)[r + k] += sign * h * (*rows)[r + l];
        const Found<double> moved =
            evaluate(model, model.weights, strained.view(strained.coordinates), 1);
        for (Index s = 0; s < batch.n_structures(); ++s)
          slopes[s] += sign * moved.energies[s] / (2 * h);
      }
      for (Index s = 0; s < batch.n_structures(); ++s)
        CHECK_CLOSE(found.virials[9 * s + 3 * k + l], slopes[s], 1e-7, 1e-7);
    }
}

// One structure that is cut into tiles, by any number of threads and with prepared weights.
template <class T>
void test_same_bits() {
  check::section("one large crystal, any threads");
  const AevParameters p = aevmod(2, 4, 2, 3, 4.2, 3.1, 0.95);
  const Model model(p, {6, 4}, {1, 2, 0}, true);
  const std::vector<T> weights = as<T>(model.weights);
  for (const Index n : {47, 48, 49, 130}) {
    Crystals batch;
    batch.add(n, 2, 7.5, 9.5, kAlong[n % 2]);
    const std::vector<T> x = as<T>(batch.coordinates);
    const Found<T> one = evaluate(model, weights, batch.view(x), 1);
    const std::vector<double> sae(2, 0.25);
    const kinml::cpu::PreparedModel<T> prepared(model.view(weights, 1, sae.data()), 2);
    for (const int n_threads : {1, 2, 5}) {
      const Found<T> other = evaluate(model, weights, batch.view(x), n_threads);
      Found<T> again(1, 1, n);
      prepared.energy_forces(batch.view(x), 0, again.outputs(), n_threads);
      for (const Found<T>* found : {&other, static_cast<const Found<T>*>(&again)})
        CHECK(same_bits(found->energies, one.energies) && same_bits(found->forces, one.forces) &&
              same_bits(found->virials, one.virials) && same_bits(found->atomic, one.atomic) &&
              same_bits(found->atomic_virials, one.atomic_virials));
    }
  }
}

// The gradient of a loss with a stress term is that of its derivatives by energies, forces, virials.
template <class T>
void test_stress_term(Index n_levels) {
  check::section("stress in the loss");
  const AevParameters p = aevmod(2, 4, 2, 3, 4.2, 3.1, 0.95);
  const Model model(p, {6, 4}, {1, 2, 0}, true, n_levels);
  const std::vector<T> weights = as<T>(model.weights);
  Crystals batch;
  for (Index s = 0; s < 9; ++s)
    batch.add(random_index(1, 5), 2, 3.5, 5.0, kAlong[s % 3 == 2 ? 7 : 0]);
  const Index count = batch.n_structures(), n_atoms = batch.n_atoms();
  const std::vector<T> x = as<T>(batch.coordinates);
  const System<T> system = batch.view(x);
  const Task task(batch, n_levels);
  std::vector<double> stresses = random_numbers(n_levels * 9 * count);
  std::vector<double> stress_weights;
  for (Index k = 0; k < n_levels; ++k)
    for (Index s = 0; s < count; ++s)
      stress_weights.push_back(s % 3 == 2 || (s + k) % 4 == 1 ? 0 : uniform(0.2, 2));
  std::vector<Index> all(count);
  for (Index s = 0; s < count; ++s) all[s] = s;
  BatchLoss loss(task, all);
  loss.scales.push_back(0.4);
  for (Index k = 0; k < n_levels; ++k) {
    double n = 0;
    for (Index s = 0; s < count; ++s) n += stress_weights[k * count + s] != 0;
    loss.counts.push_back(std::max(n, 1.0));
  }
  loss.view.scales = loss.scales.data();
  loss.view.counts = loss.counts.data();
  loss.view.stresses = stresses.data();
  loss.view.stress_weights = stress_weights.data();

  std::vector<double> losses(3), residuals(n_levels * count), errors(n_levels * count * 6);
  std::vector<T> gradient(weights.size());
  std::vector<std::vector<T>> of_threads;
  for (const int n_threads : {1, 3}) {
    kinml::cpu::force_step(model.view(weights), system, loss.view, losses.data(), gradient.data(),
                           residuals.data(), errors.data(), n_threads);
    of_threads.push_back(gradient);
  }
  CHECK(same_bits(of_threads[0], of_threads[1]));

  Found<T> found(n_levels, count, n_atoms);
  const std::vector<double> sae(n_levels * 2, 0.0);
  kinml::cpu::energy_forces(model.view(weights, 1, sae.data()), system, 0, found.outputs(), 2);
  std::vector<double> e(n_levels * count), w(n_levels * count * 9);
  std::vector<T> r(n_levels * n_atoms * 3);
  std::array<Real, 3> expected = {};
  for (Index k = 0; k < n_levels; ++k)
    for (Index s = 0; s < count; ++s) {
      const Index at = k * count + s;
      if (const double weight = task.energy_weights[at]; weight != 0) {
        const double difference = found.energies[at] - task.energies[at];
        expected[0] += weight * difference * difference / loss.counts[k];
        e[at] = 2 * loss.scales[0] * weight * difference / loss.counts[k];
      }
      if (const double weight = task.force_weights[at]; weight != 0) {
        const double share = weight / (3 * batch.size(s) * loss.counts[n_levels + k]);
        for (Index c = 3 * batch.offsets[s]; c < 3 * batch.offsets[s + 1]; ++c) {
          const double difference =
              found.forces[k * 3 * n_atoms + c] - task.forces[k * 3 * n_atoms + c];
          expected[1] += share * difference * difference;
          r[k * 3 * n_atoms + c] = static_cast<T>(2 * loss.scales[1] * share * difference);
        }
      }
      if (const double weight = stress_weights[at]; weight != 0) {
        const double volume = kinml::cell_volume(batch.cells.data() + 9 * s);
        const double share = weight / (9 * loss.counts[2 * n_levels + k]);
        for (int c = 0; c < 9; ++c) {
          const double difference = found.virials[9 * at + c] / volume - stresses[9 * at + c];
          expected[2] += share * difference * difference;
          w[9 * at + c] = 2 * loss.scales[2] * share * difference / volume;
        }
      }
    }
  for (int term = 0; term < 3; ++term)
    CHECK_CLOSE(losses[term], expected[term], kTight<T> * 10, kTight<T>);
  std::vector<T> composed(weights.size());
  kinml::cpu::energy_forces_backward(model.view(weights), system, 0, e.data(), r.data(), w.data(),
                                     composed.data(), 2);
  check_close(gradient, std::vector<Real>(composed.begin(), composed.end()), 0,
              kTight<T> * 10 * (1 + largest(composed)));
}

template <class T>
void test_type() {
  test_descriptors<T>();
  for (const Index n_levels : {1, 2}) {
    test_neighbours<T>(n_levels);
    test_stress_term<T>(n_levels);
  }
  test_same_bits<T>();
}

}  // namespace

int main() {
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  test_type<double>();
  test_type<float>();
  test_strains();
  return check::finish();
}

// Energies, forces and weight gradients on the CPU against the definition in plain long double:
// energies by loops over layers, forces and the derivative of forces by differences.
//
//   test_force_step          everything (seconds)
//   test_force_step small    fewer and smaller molecules, for valgrind and the sanitizers
//
// The instruction set is the one of the processor or of KINML_CPU_ISA: run it once for each of
// baseline, avx2, avx512 (ctest does).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/force_step_cpu.h"
#include "activations.h"
#include "check.h"
#include "models.h"
#include "molecules.h"

namespace {

using namespace molecules;
using kinml::NetworkShape;
using namespace models;

bool small_run = false;

// ---- the reference ----------------------------------------------------------------------------

// The energy of structure s at a level, displaced by step * direction [n_atoms, 3]; unless null,
// its gradient with respect to the weights times `factor` is added to `gradient`.
Real plain_energy(const Model& model, const Batch& batch, Index level, Index s,
                  const double* direction, Real step, Real factor, std::vector<Real>* gradient) {
  const Index first = batch.offsets[s], n = batch.size(s);
  std::vector<Real> x(3 * n);
  for (Index c = 0; c < 3 * n; ++c)
    x[c] = batch.coordinates[3 * first + c] + step * direction[3 * first + c];
  const std::vector<Real> aev = reference(model.aev, x, batch.species.data() + first, n);
  const Index length = model.aev.length(), L = static_cast<Index>(model.activations.size());
  Real energy = 0;
  for (Index i = 0; i < n; ++i) {
    const Index kind = batch.species[first + i];
    std::vector<std::vector<std::vector<Real>>> z(level + 1), h(level + 1);
    std::vector<std::vector<Index>> begins(level + 1);
    Index at = 0;
    Real own = 0;  // energy of the atom
    for (Index k = 0; k <= level; ++k) {
      const NetworkShape shape = model.shape(k);
      for (Index other = 0; other < kind; ++other) at += shape.parameters_of(other);
      h[k].emplace_back(aev.begin() + i * length, aev.begin() + (i + 1) * length);
      if (k > 0) h[k][0].push_back(own);
      for (Index l = 0; l < L; ++l) {
        const Index in = shape.size(kind, l), out = shape.size(kind, l + 1);
        begins[k].push_back(at);
        z[k].emplace_back();
        h[k].emplace_back();
        for (Index j = 0; j < out; ++j) {
          Real sum = shape.biases ? model.weights[at + in * out + j] : 0;
          for (Index c = 0; c < in; ++c) sum += model.weights[at + j * in + c] * h[k][l][c];
          z[k][l].push_back(sum);
          h[k][l + 1].push_back(activations::value(static_cast<int>(shape.activations[l]), sum));
        }
        at += out * (in + (shape.biases ? 1 : 0));
      }
      for (Index other = kind + 1; other < shape.n_species; ++other)
        at += shape.parameters_of(other);
      own += h[k][L][0];
    }
    energy += own;
    Real seed = factor;
    for (Index k = level; gradient != nullptr && k >= 0; --k) {
      const NetworkShape shape = model.shape(k);
      std::vector<Real> delta(1, seed);
      for (Index l = L - 1; l >= 0; --l) {
        const Index in = shape.size(kind, l), out = shape.size(kind, l + 1);
        std::vector<Real> before(in);
        for (Index j = 0; j < out; ++j) {
          delta[j] *= activations::slope(static_cast<int>(shape.activations[l]), z[k][l][j]);
          for (Index c = 0; c < in; ++c) {
            (*gradient)[begins[k][l] + j * in + c] += delta[j] * h[k][l][c];
            before[c] += delta[j] * model.weights[begins[k][l] + j * in + c];
          }
          if (shape.biases) (*gradient)[begins[k][l] + in * out + j] += delta[j];
        }
        delta = before;
      }
      seed += delta.back();  // the energy of the level below is the last input
    }
  }
  return energy;
}

// First derivatives as differences of fourth order.
constexpr Real kStep = 2e-5L;
constexpr Real kDifference[4][2] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};

// F . direction of structure s at a level.
Real plain_force(const Model& model, const Batch& batch, Index level, Index s,
                 const std::vector<double>& direction) {
  Real slope = 0;
  for (const auto& [steps, weight] : kDifference)
    slope +=
        weight * plain_energy(model, batch, level, s, direction.data(), steps * kStep, 0, nullptr);
  return -slope / (12 * kStep);
}

// The gradient with respect to the weights of sum e E + sum r F over structures and levels, with
// e [n_levels, n_structures] and r [n_levels, n_atoms, 3]. Since r F is minus the derivative of E
// along r, that of r F is minus the difference of gradients of E.
std::vector<Real> plain_gradient(const Model& model, const Batch& batch,
                                 const std::vector<double>& e, const std::vector<double>& r) {
  std::vector<Real> gradient(model.weights.size());
  for (Index k = 0; k < model.n_levels; ++k)
    for (Index s = 0; s < batch.n_structures(); ++s) {
      const double* const along = r.data() + k * 3 * batch.n_atoms();
      plain_energy(model, batch, k, s, along, 0, e[k * batch.n_structures() + s], &gradient);
      for (const auto& [steps, weight] : kDifference)
        plain_energy(model, batch, k, s, along, steps * kStep, -weight / (12 * kStep), &gradient);
    }
  return gradient;
}

// ---- the library ------------------------------------------------------------------------------

// The entries of the library.
template <class T>
struct Library : Data<T> {
  using Data<T>::model, Data<T>::batch, Data<T>::weights, Data<T>::view;
  int threads;

  Library(const Model& m, const Batch& b, bool stored, int n_threads = 1)
      : Data<T>(m, b, stored), threads(n_threads) {}

  // Outputs begin as NaN: what is not written shows.
  template <class Number>
  static std::vector<Number> room(Index n) {
    return std::vector<Number>(n, std::numeric_limits<Number>::quiet_NaN());
  }
  void evaluate(const double* sae, std::vector<double>& energies, std::vector<T>& forces,
                const std::vector<Index>* chosen = nullptr) const {
    energies = room<double>(model.n_levels * view(chosen).count());
    forces = room<T>(model.n_levels * 3 * batch.n_atoms());
    kinml::cpu::energy_forces<T>(model.view(weights, 1, sae), view(chosen), 0,
                                 {energies.data(), forces.data()}, threads);
  }
  std::vector<T> gradient(const std::vector<double>& e, const std::vector<T>& r,
                          const std::vector<Index>* chosen = nullptr) const {
    std::vector<T> result = room<T>(weights.size());
    kinml::cpu::energy_forces_backward<T>(model.view(weights), view(chosen), 0, e.data(), r.data(),
                                          nullptr, result.data(), threads);
    return result;
  }
  Step<T> step(const Task& task, const std::vector<Index>& chosen) const {
    const models::BatchLoss loss(task, chosen);
    const Index n = static_cast<Index>(chosen.size()) * model.n_levels;
    Step<T> r{room<double>(2), room<double>(n), room<double>(3 * n), room<T>(weights.size())};
    kinml::cpu::force_step<T>(model.view(weights), view(&chosen), loss.view, r.losses.data(),
                              r.gradient.data(), r.residuals.data(), r.errors.data(), threads);
    return r;
  }
};

// Tolerances by type: values, first derivatives, and absolute ones for numbers of size 1.
template <class T>
constexpr bool is_double = sizeof(T) == 8;
template <class T>
constexpr Real kValue = is_double<T> ? 1e-12L : 5e-5L;
template <class T>
constexpr Real kGradient = is_double<T> ? 1e-10L : 5e-4L;
template <class T>
constexpr Real kFloor = is_double<T> ? 1e-13L : 2e-5L;

// ---- tests ------------------------------------------------------------------------------------

// Energies, forces (each component of molecules of few atoms, else along some directions) and the
// gradient of both, from coordinates and from stored Jacobians.
template <class T>
void check_plain(const Model& model, const Batch& batch, bool with_stored = true) {
  const Index n_atoms = batch.n_atoms(), n_structures = batch.n_structures();
  const Index n_levels = model.n_levels;
  const std::vector<double> sae = random_numbers(n_levels * model.aev.n_species);
  std::vector<Real> expected;
  for (Index k = 0; k < n_levels; ++k)
    for (Index s = 0; s < n_structures; ++s) {
      Real shift = 0;
      for (Index a = batch.offsets[s]; a < batch.offsets[s + 1]; ++a)
        shift += sae[k * model.aev.n_species + batch.species[a]];
      const std::vector<double> nowhere(3 * n_atoms);
      expected.push_back(plain_energy(model, batch, k, s, nowhere.data(), 0, 0, nullptr) + shift);
    }
  // Along these directions, for each structure.
  std::vector<std::vector<double>> directions;
  Index most = 0;
  for (Index s = 0; s < n_structures; ++s) most = std::max(most, 3 * batch.size(s));
  if (most <= (small_run ? 9 : 15)) {
    for (Index c = 0; c < most; ++c) {
      directions.emplace_back(3 * n_atoms);
      for (Index s = 0; s < n_structures; ++s)
        if (c < 3 * batch.size(s)) directions.back()[3 * batch.offsets[s] + c] = 1;
    }
  } else {
    for (int i = 0; i < 2; ++i) directions.push_back(random_numbers(3 * n_atoms));
  }
  std::vector<Real> slopes;
  for (const auto& direction : directions)
    for (Index k = 0; k < n_levels; ++k)
      for (Index s = 0; s < n_structures; ++s)
        slopes.push_back(plain_force(model, batch, k, s, direction));
  const std::vector<double> e = random_numbers(n_levels * n_structures),
                            r = random_numbers(n_levels * 3 * n_atoms);
  const std::vector<Real> gradient = plain_gradient(model, batch, e, r);

  for (const bool stored : {false, true}) {
    if (stored && !with_stored) continue;
    const Library<T> library(model, batch, stored);
    std::vector<double> energies;
    std::vector<T> forces;
    library.evaluate(sae.data(), energies, forces);
    const Real atoms = std::max<Real>(most / 3, 1);
    check_close(energies, expected, kValue<T>, kFloor<T> * atoms);
    const Real push = std::max<Real>(1, largest(forces));
    std::size_t at = 0;
    for (const auto& direction : directions)
      for (Index k = 0; k < n_levels; ++k)
        for (Index s = 0; s < n_structures; ++s) {
          Real along = 0;
          for (Index c = 3 * batch.offsets[s]; c < 3 * batch.offsets[s + 1]; ++c)
            along += static_cast<Real>(forces[k * 3 * n_atoms + c]) * direction[c];
          CHECK_CLOSE(along, slopes[at++], kGradient<T>,
                      10 * kFloor<T> * push * std::sqrt(3 * atoms));
        }
    check_close(library.gradient(e, as<T>(r)), gradient, kGradient<T>,
                10 * kFloor<T> * std::max<Real>(1, largest(gradient)));
  }
}

template <class T>
void test_activations() {
  check::section("every activation");
  const AevParameters p = aevmod(2, 4, 2, 3, 5.2, 3.8, 0.95);
  for (Index code = 0; code < 7; ++code) {
    const Model model(p, {7, 4}, {code, code, code}, code % 2 == 0);
    Batch batch;
    for (const Index n : {3, 1, 0, 5}) batch.add_molecule(n, p);
    check_plain<T>(model, batch);
  }
}

// Chains of networks, and what is asked of their highest level alone.
template <class T>
void test_levels() {
  const AevParameters p = aevmod(2, 4, 2, 3, 5.2, 3.8, 0.95);
  for (const Index n_levels : {2, 3}) {
    check::section("several levels");
    for (const Index code : {1, 4}) {
      const Model model(p, {7, 4}, {code, code, 0}, code == 1, n_levels);
      Batch batch;
      for (const Index n : {3, 1, 0, 5}) batch.add_molecule(n, p);
      check_plain<T>(model, batch);
    }
    const Model single(p, {}, {1}, true, n_levels);  // without a hidden layer
    Batch batch;
    for (const Index n : {4, 2}) batch.add_molecule(n, p);
    check_plain<T>(single, batch);

    check::section("highest level");
    const Model model(p, {7, 4}, {2, 2, 0}, true, n_levels);
    for (const Index n : {9, 60, 3, 33}) batch.add_molecule(n, p);
    const Index count = batch.n_structures(), n_atoms = batch.n_atoms();
    for (const bool stored : {false, true}) {
      const Library<T> library(model, batch, stored);
      std::vector<double> all_energies, energies(count);
      std::vector<T> all_forces, forces(3 * n_atoms), gradient(model.weights.size());
      library.evaluate(nullptr, all_energies, all_forces);
      kinml::cpu::energy_forces<T>(model.view(library.weights), library.view(), n_levels - 1,
                                   {energies.data(), forces.data()}, 1);
      CHECK(same_bits(energies, {all_energies.end() - count, all_energies.end()}));
      CHECK(same_bits(forces, {all_forces.end() - 3 * n_atoms, all_forces.end()}));
      std::vector<double> e(n_levels * count);
      std::vector<T> r(n_levels * 3 * n_atoms);
      for (Index i = 0; i < count; ++i) e[(n_levels - 1) * count + i] = uniform(-1, 1);
      for (Index c = 0; c < 3 * n_atoms; ++c)
        r[(n_levels - 1) * 3 * n_atoms + c] = static_cast<T>(uniform(-1, 1));
      kinml::cpu::energy_forces_backward<T>(model.view(library.weights), library.view(),
                                            n_levels - 1, e.data() + (n_levels - 1) * count,
                                            r.data() + (n_levels - 1) * 3 * n_atoms, nullptr,
                                            gradient.data(), 1);
      const std::vector<T> expected = library.gradient(e, r);
      for (std::size_t i = 0; i < expected.size(); ++i)
        CHECK_CLOSE(gradient[i], expected[i], kValue<T>, kFloor<T>);
    }
  }
}

// The members of an ensemble are what they are alone; a large structure takes another way.
// Energies of the members are those of a single model, forces but for rounding; how many threads
// there are and where in the ensemble a member stands does not matter.
template <class T>
void test_ensemble(Index n_members, Index n_levels, bool large) {
  const AevParameters p =
      small_run ? aevmod(2, 2, 1, 1, 2.5, 2.0, 0.95) : aevmod(2, 4, 2, 3, 3.6, 2.6, 0.95);
  std::vector<Model> members;
  std::vector<T> weights;
  for (Index m = 0; m < n_members; ++m) {
    members.emplace_back(p, std::vector<Index>{5}, std::vector<Index>{1, 0}, true, n_levels);
    for (const double w : members.back().weights) weights.push_back(static_cast<T>(w));
  }
  Batch batch;
  for (const Index n : {4, 0, 30, 9}) batch.add_molecule(n, p);
  if (large) {
    batch.add_random(530, 2, 19, 19, 19, p);
    batch.finish_structure();
  } else {
    for (int i = 0; i < (small_run ? 3 : 20); ++i) batch.add_molecule(random_index(1, 25), p);
  }
  const Index count = batch.n_structures(), n_atoms = batch.n_atoms();
  const Index e = n_levels * count, f = n_levels * 3 * n_atoms;
  std::vector<double> sae = random_numbers(n_members * n_levels * 2);
  std::vector<double> energies;
  std::vector<T> forces;
  const auto evaluate = [&](int threads) {
    const Library<T> library(members[0], batch, false, threads);
    energies = Library<T>::template room<double>(n_members * e);
    forces = Library<T>::template room<T>(n_members * f);
    kinml::cpu::energy_forces<T>(members[0].view(weights, n_members, sae.data()), library.view(), 0,
                                 {energies.data(), forces.data()}, threads);
  };
  evaluate(1);
  for (Index m = 0; m < n_members; ++m) {
    std::vector<double> own_energies;
    std::vector<T> own_forces;
    Library<T>(members[m], batch, false, 1)
        .evaluate(sae.data() + m * n_levels * 2, own_energies, own_forces);
    CHECK(same_bits(own_energies, {energies.begin() + m * e, energies.begin() + (m + 1) * e}));
    const Real scale = largest(own_forces);
    for (Index c = 0; c < f; ++c)
      CHECK_CLOSE(forces[m * f + c], own_forces[c], 0, (is_double<T> ? 1e-12L : 2e-5L) * scale);
  }
  const std::vector<double> first_energies = energies;
  const std::vector<T> first_forces = forces;
  for (const int threads : {2, 3}) {
    evaluate(threads);
    CHECK(same_bits(energies, first_energies) && same_bits(forces, first_forces));
  }
  const Index turn = random_index(1, n_members - 1), per_member = members[0].weights.size();
  std::rotate(weights.begin(), weights.begin() + turn * per_member, weights.end());
  std::rotate(sae.begin(), sae.begin() + turn * n_levels * 2, sae.end());
  evaluate(2);
  std::rotate(energies.begin(), energies.end() - turn * e, energies.end());
  std::rotate(forces.begin(), forces.end() - turn * f, forces.end());
  CHECK(same_bits(energies, first_energies) && same_bits(forces, first_forces));

  // A coordinate that is not a number spoils its own structure.
  constexpr Index kSpoiled = 2;
  batch.coordinates[3 * batch.offsets[kSpoiled] + 1] = std::numeric_limits<double>::quiet_NaN();
  evaluate(1);
  std::rotate(energies.begin(), energies.end() - turn * e, energies.end());
  std::rotate(forces.begin(), forces.end() - turn * f, forces.end());
  for (Index row = 0; row < n_members * n_levels; ++row) {
    const auto own = [&](const std::vector<T>& list, Index from, Index to) {
      const auto begin = list.begin() + row * 3 * n_atoms;
      return std::vector<T>(begin + 3 * from, begin + 3 * to);
    };
    const Index from = batch.offsets[kSpoiled], to = batch.offsets[kSpoiled + 1];
    CHECK(std::isnan(energies[row * count + kSpoiled]));
    CHECK(std::isnan(own(forces, from, from + 1)[1]));
    CHECK(same_bits(own(forces, 0, from), own(first_forces, 0, from)));
    CHECK(same_bits(own(forces, to, n_atoms), own(first_forces, to, n_atoms)));
  }
}

template <class T>
void test_ensembles() {
  check::section("ensembles");
  for (const Index n_levels : {1, 2})
    for (const Index n_members : {2, 3, 5, 8, 9, 20})
      test_ensemble<T>(n_members, n_levels, n_members == 3);
}

// Descriptors without Jacobians: energies and their gradient.
template <class T>
void test_energies_alone() {
  check::section("energies alone");
  const AevParameters p = aevmod(2, 4, 2, 3, 5.2, 3.8, 0.95);
  for (const Index n_levels : {1, 2, 3}) {
    const Model model(p, {7, 4}, {1, 1, 0}, true, n_levels);
    Batch batch;
    for (const Index n : {3, 1, 0, 5, 70, 12}) batch.add_molecule(n, p);
    const Index count = batch.n_structures();
    const Library<T> library(model, batch, true);
    System<T> view = library.view();
    view.jacobian = nullptr;
    std::vector<double> expected, energies(n_levels * count);
    std::vector<T> forces;
    library.evaluate(nullptr, expected, forces);
    kinml::cpu::energy_forces<T>(model.view(library.weights), view, 0, {energies.data(), nullptr},
                                 1);
    CHECK(same_bits(energies, expected));
    const std::vector<double> e = random_numbers(n_levels * count);
    std::vector<T> gradient(model.weights.size());
    kinml::cpu::energy_forces_backward<T>(model.view(library.weights), view, 0, e.data(), nullptr,
                                          nullptr, gradient.data(), 1);
    const std::vector<T> with_zero =
        library.gradient(e, std::vector<T>(n_levels * 3 * batch.n_atoms()));
    const Real size = std::max<Real>(1, largest(with_zero));
    for (std::size_t i = 0; i < gradient.size(); ++i)
      CHECK_CLOSE(gradient[i], with_zero[i], kGradient<T>, 10 * kFloor<T> * size);
  }
}

template <class T>
void test_descriptors() {
  for (const NamedParameters& set : parameter_sets()) {
    check::section(set.name);
    // Wide enough that the products with the weights go over more than one block.
    const Model model(set.parameters, small_run ? std::vector<Index>{5} : std::vector<Index>{17, 5},
                      small_run ? std::vector<Index>{1, 0} : std::vector<Index>{1, 4, 0}, true);
    Batch batch;
    for (int s = 0; s < (small_run ? 2 : 4); ++s)
      batch.add_molecule(random_index(1, small_run ? 7 : 14), set.parameters);
    check_plain<T>(model, batch);
  }
}

// Every number of neighbours around the ends of registers, for one to four species.
template <class T>
void test_neighbours() {
  check::section("any number of neighbours");
  for (Index n_species = 1; n_species <= 4; ++n_species) {
    const AevParameters p = aevmod(n_species, 5, n_species == 2 ? 8 : 3, 4, 4.2, 3.8, 0.95);
    const Model model(p, {6}, {1, 0}, true);
    Batch batch;
    for (const Index near : {0, 1, 2, 7, 8, 9, 15, 16, 17, 33})
      if (near <= (small_run ? 9 : 33) && (near < 33 || n_species == 2))
        batch.add_cluster(near + 1, p);
    check_plain<T>(model, batch, false);
  }
}

// A structure that all threads work on at once, in a batch with others.
template <class T>
void test_large() {
  check::section("large structure");
  const AevParameters p =
      small_run ? aevmod(2, 2, 1, 1, 2.5, 2.0, 0.95) : aevmod(2, 4, 2, 3, 3.6, 2.6, 0.95);
  const Model model(p, {5}, {1, 0}, true);
  Batch batch;
  batch.add_molecule(4, p);
  batch.add_random(530, 2, 19, 19, 19, p);
  batch.finish_structure();
  batch.add_random(small_run ? 20 : 100, 2, 11, 11, 11, p);
  check_plain<T>(model, batch, false);
}

// A training step against the loss of what energy_forces gives and its gradient.
template <class T>
void check_step(const Model& model, const Batch& batch, const Task& task,
                const std::vector<Index>& chosen, bool stored) {
  const Library<T> library(model, batch, stored);
  std::vector<double> energies;
  std::vector<T> forces;
  library.evaluate(nullptr, energies, forces);
  Real losses[2] = {0, 0};
  // dL/dE, dL/dF, of each structure as often as it is chosen.
  const Index n_structures = batch.n_structures(), n_atoms = batch.n_atoms();
  std::vector<double> e(model.n_levels * n_structures);
  std::vector<double> r(model.n_levels * 3 * n_atoms);
  std::vector<Real> residuals, errors;
  for (Index k = 0; k < model.n_levels; ++k) {
    Index n_energies = 0, n_forces = 0;
    for (const Index s : chosen) {
      n_energies += task.energy_weights[k * n_structures + s] != 0;
      n_forces += task.force_weights[k * n_structures + s] != 0;
    }
    for (const Index s : chosen) {
      const Index at = k * n_structures + s;
      const Real residual = static_cast<Real>(energies[at]) - task.energies[at];
      residuals.push_back(residual);
      if (task.energy_weights[at] != 0) {
        losses[0] += task.energy_weights[at] * residual * residual / n_energies;
        e[at] += static_cast<double>(2 * task.energy_scale * task.energy_weights[at] * residual /
                                     n_energies);
      }
      Real sum = 0, squares = 0, worst = 0;
      const Index begin = 3 * (k * n_atoms + batch.offsets[s]), n = 3 * batch.size(s);
      if (task.force_weights[at] != 0)
        for (Index c = begin; c < begin + n; ++c) {
          const Real difference = static_cast<Real>(forces[c]) - task.forces[c];
          sum += std::fabs(difference);
          squares += difference * difference;
          worst = std::max(worst, std::fabs(difference));
          r[c] += static_cast<double>(2 * task.force_scale * task.force_weights[at] * difference /
                                      n / n_forces);
        }
      errors.insert(errors.end(), {sum, squares, worst});
      if (n > 0) losses[1] += task.force_weights[at] * squares / n / std::max<Index>(n_forces, 1);
    }
  }
  const std::vector<T> expected = library.gradient(e, as<T>(r));
  const Step<T> step = library.step(task, chosen);
  check_close(step.residuals, residuals, kValue<T>, 100 * kFloor<T>);
  check_close(step.errors, errors, kValue<T>, 100 * kFloor<T>);
  for (int i = 0; i < 2; ++i) CHECK_CLOSE(step.losses[i], losses[i], kValue<T>, kFloor<T>);
  const Real size = std::max<Real>(1, largest(expected));
  CHECK(step.gradient.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i)
    CHECK_CLOSE(step.gradient[i], expected[i], kGradient<T>, 10 * kFloor<T> * size);
}

template <class T>
void test_steps(Index n_levels) {
  check::section(n_levels > 1 ? "steps of several levels" : "steps");
  const AevParameters p = aevmod(3, 5, 3, 4, 4.6, 3.4, 0.95);
  const Model model(p, {9, 6}, {1, 2, 0}, true, n_levels);
  Batch batch;
  for (int s = 0; s < (small_run ? 9 : 60); ++s) {
    if (s % 6 == 1)
      batch.finish_structure();
    else
      batch.add_molecule(random_index(1, small_run ? 6 : 30), p);
  }
  Task task(batch, n_levels);
  std::vector<Index> all(batch.n_structures());
  std::iota(all.begin(), all.end(), Index(0));
  std::vector<Index> some = {4, 0, 0, 7, 1, 4, 8, 1};  // in any order, twice, without atoms
  for (const bool stored : {false, true}) {
    check_step<T>(model, batch, task, all, stored);
    check_step<T>(model, batch, task, some, stored);
    check_step<T>(model, batch, task, {}, stored);
    check_step<T>(model, batch, task, {1}, stored);
    check_step<T>(model, batch, task, {2}, stored);  // without forces
    check_step<T>(model, batch, task, {3}, stored);  // without its energy
    // One of the tasks only.
    Task one = task;
    one.energy_weights.assign(n_levels * all.size(), 0);
    check_step<T>(model, batch, one, all, stored);
    one = task;
    one.force_weights.assign(n_levels * all.size(), 0);
    std::fill(one.forces.begin(), one.forces.end(), std::numeric_limits<double>::quiet_NaN());
    check_step<T>(model, batch, one, all, stored);
    one.energy_weights.assign(n_levels * all.size(), 0);
    const Library<T> library(model, batch, stored);
    for (const T g : library.step(one, all).gradient) CHECK(g == 0);
  }
}

template <class T>
void test_same_bits(Index n_levels) {
  const AevParameters p = aevmod(3, 4, 2, 3, 4.0, 2.8, 0.95);
  const Model model(p, {8, 5}, {1, 4, 0}, true, n_levels);
  for (const Index count : {1, 2, 3, 40, 700}) {
    if (small_run && count > 40) continue;
    if (n_levels > 1 && count > 40) continue;
    Batch batch;
    for (Index s = 0; s < count; ++s) batch.add_molecule(random_index(0, 14), p);
    const Task task(batch, n_levels);
    std::vector<Index> order(count);
    std::iota(order.begin(), order.end(), Index(0));
    std::shuffle(order.begin(), order.end(), random_bits);
    const std::vector<double> e = random_numbers(n_levels * count);
    const auto r = as<T>(random_numbers(n_levels * 3 * batch.n_atoms()));
    for (const bool stored : {false, true}) {
      check::section(stored ? "same bits, stored" : "same bits");
      if (stored && count > 40) continue;
      const Library<T> one(model, batch, stored, 1);
      std::vector<double> energies;
      std::vector<T> forces;
      one.evaluate(nullptr, energies, forces);
      const std::vector<T> gradient = one.gradient(e, r);
      const Step<T> step = one.step(task, order);
      CHECK(all_finite(energies) && all_finite(forces) && all_finite(gradient));
      CHECK(all_finite(step.gradient) && all_finite(step.errors));
      for (const int threads : {1, 2, 3, 7, 16}) {
        const Library<T> other(model, batch, stored, threads);
        std::vector<double> energies_again;
        std::vector<T> forces_again;
        other.evaluate(nullptr, energies_again, forces_again);
        CHECK(same_bits(energies, energies_again) && same_bits(forces, forces_again));
        CHECK(same_bits(gradient, other.gradient(e, r)));
        const Step<T> again = other.step(task, order);
        CHECK(same_bits(step.losses, again.losses) && same_bits(step.gradient, again.gradient));
        CHECK(same_bits(step.residuals, again.residuals) && same_bits(step.errors, again.errors));
      }
    }
  }
}

// Several threads call the library at once, as a program with its own threads does.
void test_callers() {
  check::section("several callers");
  const AevParameters p = aevmod(2, 8, 4, 4, 5.2, 3.8, 0.95);
  const Model model(p, {10}, {1, 0}, true);
  Batch batch;
  for (int s = 0; s < 12; ++s) batch.add_molecule(random_index(1, 15), p);
  const Task task(batch);
  std::vector<Index> all(batch.n_structures());
  std::iota(all.begin(), all.end(), Index(0));
  const Step<double> expected = Library<double>(model, batch, false).step(task, all);
  std::vector<Step<double>> results(4);
  std::vector<std::thread> callers;
  for (std::size_t i = 0; i < results.size(); ++i)
    callers.emplace_back(
        [&, i] { results[i] = Library<double>(model, batch, false, 1 + i % 2).step(task, all); });
  for (std::thread& caller : callers) caller.join();
  for (const Step<double>& result : results) CHECK(same_bits(result.gradient, expected.gradient));
}

// A structure whose coordinates are not numbers, in the middle of a tile.
template <class T>
void test_nan() {
  check::section("NaN stays with its structure");
  const AevParameters p = aevmod(2, 6, 4, 4, 5.2, 3.8, 0.95);
  const Model model(p, {9, 4}, {1, 1, 0}, true);
  Batch batch;
  for (const Index n : {5, 9, 80, 7, 3}) batch.add_molecule(n, p);
  std::vector<double> good_energies, energies;
  std::vector<T> good_forces, forces;
  Library<T>(model, batch, false).evaluate(nullptr, good_energies, good_forces);
  for (const Index bad : {1, 2, 3}) {
    for (const Index atom : {Index(0), batch.size(bad) - 1}) {
      Batch broken = batch;
      broken.coordinates[3 * (batch.offsets[bad] + atom) + 1] =
          std::numeric_limits<double>::quiet_NaN();
      Library<T>(model, broken, false).evaluate(nullptr, energies, forces);
      for (Index s = 0; s < batch.n_structures(); ++s) {
        CHECK(s == bad ? std::isnan(energies[s]) : energies[s] == good_energies[s]);
        for (Index c = 3 * batch.offsets[s]; c < 3 * batch.offsets[s + 1] && s != bad; ++c)
          CHECK(forces[c] == good_forces[c]);
      }
      bool any = false;
      for (Index c = 3 * batch.offsets[bad]; c < 3 * batch.offsets[bad + 1]; ++c)
        any = any || std::isnan(forces[c]);
      CHECK(any);
    }
  }
}

template <class T>
void test_empty() {
  check::section("nothing");
  const AevParameters p = aevmod(2, 4, 2, 3, 5.2, 3.8, 0.95);
  const Model model(p, {4}, {1, 0}, true);
  Batch batch;
  for (int structures = 0; structures < 3; ++structures) {
    for (const bool stored : {false, true}) {
      const Library<T> library(model, batch, stored, 2);
      std::vector<double> energies;
      std::vector<T> forces;
      library.evaluate(nullptr, energies, forces);
      CHECK(energies == std::vector<double>(structures) && forces.empty());
      CHECK(library.gradient(std::vector<double>(structures, 1), {}) ==
            std::vector<T>(model.weights.size()));
    }
    batch.finish_structure();
  }
}

template <class T>
void test_type() {
  test_activations<T>();
  test_descriptors<T>();
  test_neighbours<T>();
  test_large<T>();
  test_levels<T>();
  test_ensembles<T>();
  test_energies_alone<T>();
  for (const Index n_levels : {1, 2}) {
    test_steps<T>(n_levels);
    test_same_bits<T>(n_levels);
  }
  test_nan<T>();
  test_empty<T>();
}

}  // namespace

int main(int n_arguments, char** arguments) {
  small_run = n_arguments > 1 && std::string(arguments[1]) == "small";
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  test_type<double>();
  test_type<float>();
  test_callers();
  return check::finish();
}

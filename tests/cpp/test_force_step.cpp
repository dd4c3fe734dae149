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
#include "molecules.h"

namespace {

using namespace molecules;
using kinml::cpu::ForceBatch;
using kinml::cpu::NetworkShape;

bool small_run = false;

// ---- models -----------------------------------------------------------------------------------

// A descriptor and networks on top of it. Weights are representable in float.
struct Model {
  AevParameters aev;
  std::vector<Index> activations;  // one per layer
  std::vector<Index> sizes;        // [n_species, n_layers + 1]
  bool biases;
  std::vector<double> weights;

  // Hidden layers of the given widths, each a number wider for each further species.
  Model(const AevParameters& parameters, const std::vector<Index>& hidden,
        const std::vector<Index>& codes, bool with_biases)
      : aev(parameters), activations(codes), biases(with_biases) {
    for (Index s = 0; s < aev.n_species; ++s) {
      sizes.push_back(aev.length());
      for (const Index width : hidden) sizes.push_back(width + s);
      sizes.push_back(1);
    }
    for (Index s = 0; s < aev.n_species; ++s)
      for (Index l = 0; l < shape().n_layers; ++l) {
        const Index in = shape().size(s, l), out = shape().size(s, l + 1);
        for (Index k = 0; k < out * (in + (biases ? 1 : 0)); ++k)
          weights.push_back(
              static_cast<float>(uniform(-2, 2) / std::sqrt(static_cast<double>(in))));
      }
  }
  NetworkShape shape() const {
    return {aev.n_species, static_cast<Index>(activations.size()), sizes.data(), activations.data(),
            biases};
  }
};

// ---- the reference ----------------------------------------------------------------------------

// The energy of structure s displaced by step * direction [n_atoms, 3]; unless null, its gradient
// with respect to the weights times `factor` is added to `gradient`.
Real plain_energy(const Model& model, const Batch& batch, Index s,
                  const std::vector<double>& direction, Real step, Real factor,
                  std::vector<Real>* gradient) {
  const NetworkShape shape = model.shape();
  const Index first = batch.offsets[s], n = batch.size(s), L = shape.n_layers;
  std::vector<Real> x(3 * n);
  for (Index c = 0; c < 3 * n; ++c)
    x[c] = batch.coordinates[3 * first + c] + step * direction[3 * first + c];
  const std::vector<Real> aev = reference(model.aev, x, batch.species.data() + first, n);
  Real energy = 0;
  for (Index i = 0; i < n; ++i) {
    const Index kind = batch.species[first + i];
    Index at = 0;
    for (Index other = 0; other < kind; ++other) at += shape.parameters_of(other);
    std::vector<std::vector<Real>> z(L), h(L + 1);
    std::vector<Index> begins(L);
    h[0].assign(aev.begin() + i * shape.size(kind, 0), aev.begin() + (i + 1) * shape.size(kind, 0));
    for (Index l = 0; l < L; ++l) {
      const Index in = shape.size(kind, l), out = shape.size(kind, l + 1);
      begins[l] = at;
      for (Index j = 0; j < out; ++j) {
        Real sum = shape.biases ? model.weights[at + in * out + j] : 0;
        for (Index k = 0; k < in; ++k) sum += model.weights[at + j * in + k] * h[l][k];
        z[l].push_back(sum);
        h[l + 1].push_back(activations::value(static_cast<int>(shape.activations[l]), sum));
      }
      at += out * (in + (shape.biases ? 1 : 0));
    }
    energy += h[L][0];
    if (gradient == nullptr) continue;
    std::vector<Real> delta(1, factor);
    for (Index l = L - 1; l >= 0; --l) {
      const Index in = shape.size(kind, l), out = shape.size(kind, l + 1);
      std::vector<Real> before(in);
      for (Index j = 0; j < out; ++j) {
        delta[j] *= activations::slope(static_cast<int>(shape.activations[l]), z[l][j]);
        for (Index k = 0; k < in; ++k) {
          (*gradient)[begins[l] + j * in + k] += delta[j] * h[l][k];
          before[k] += delta[j] * model.weights[begins[l] + j * in + k];
        }
        if (shape.biases) (*gradient)[begins[l] + in * out + j] += delta[j];
      }
      delta = before;
    }
  }
  return energy;
}

// First derivatives as differences of fourth order.
constexpr Real kStep = 2e-5L;
constexpr Real kDifference[4][2] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};

// F . direction of structure s.
Real plain_force(const Model& model, const Batch& batch, Index s,
                 const std::vector<double>& direction) {
  Real slope = 0;
  for (const auto& [steps, weight] : kDifference)
    slope += weight * plain_energy(model, batch, s, direction, steps * kStep, 0, nullptr);
  return -slope / (12 * kStep);
}

// The gradient with respect to the weights of sum_s e_s E_s + sum r F. Since r F is minus the
// derivative of E along r, that of r F is minus the difference of gradients of E.
std::vector<Real> plain_gradient(const Model& model, const Batch& batch,
                                 const std::vector<double>& e, const std::vector<double>& r) {
  std::vector<Real> gradient(model.weights.size());
  for (Index s = 0; s < batch.n_structures(); ++s) {
    plain_energy(model, batch, s, r, 0, e[s], &gradient);
    for (const auto& [steps, weight] : kDifference)
      plain_energy(model, batch, s, r, steps * kStep, -weight / (12 * kStep), &gradient);
  }
  return gradient;
}

// ---- the library ------------------------------------------------------------------------------

// What a training batch gives.
template <class T>
struct Step {
  std::vector<double> losses, residuals, errors;
  std::vector<T> gradient;
};

// Data in the type of the computation, as coordinates or stored. Padding of the Jacobian is NaN.
template <class T>
struct Library {
  const Model& model;
  const Batch& batch;
  int threads;
  std::vector<T> weights, x, features, jacobian;
  Index columns = 0;

  Library(const Model& m, const Batch& b, bool stored, int n_threads = 1)
      : model(m), batch(b), threads(n_threads), weights(as<T>(m.weights)), x(as<T>(b.coordinates)) {
    if (!stored) return;
    const Index length = m.aev.length();
    Index most = 0;
    for (Index s = 0; s < b.n_structures(); ++s) most = std::max(most, b.size(s));
    columns = 3 * most + 2;
    features.resize(b.n_atoms() * length);
    jacobian.resize(b.n_atoms() * length * columns);
    const kinml::cpu::AevBatch<T> view{b.n_structures(), x.data(), b.species.data(),
                                       b.offsets.data()};
    kinml::cpu::aev_forward<T>(m.aev, view, features.data(), 1);
    kinml::cpu::aev_jacobian<T>(m.aev, view, columns, jacobian.data(), 1);
    for (Index s = 0; s < b.n_structures(); ++s)
      for (Index row = b.offsets[s] * length; row < b.offsets[s + 1] * length; ++row)
        std::fill(jacobian.begin() + row * columns + 3 * b.size(s),
                  jacobian.begin() + (row + 1) * columns, std::numeric_limits<T>::quiet_NaN());
  }

  // The structures named by `chosen`, or all of them.
  ForceBatch<T> view(const std::vector<Index>* chosen = nullptr) const {
    ForceBatch<T> v{batch.species.data(), batch.offsets.data(),
                    chosen == nullptr ? nullptr : chosen->data(),
                    chosen == nullptr ? batch.n_structures() : static_cast<Index>(chosen->size())};
    if (columns > 0) {
      v.features = features.data();
      v.jacobian = jacobian.data();
      v.length = model.aev.length();
      v.columns = columns;
    } else {
      v.parameters = &model.aev;
      v.coordinates = x.data();
    }
    return v;
  }

  // Outputs begin as NaN: what is not written shows.
  template <class Number>
  static std::vector<Number> room(Index n) {
    return std::vector<Number>(n, std::numeric_limits<Number>::quiet_NaN());
  }
  void evaluate(const double* sae, std::vector<double>& energies, std::vector<T>& forces,
                const std::vector<Index>* chosen = nullptr) const {
    energies = room<double>(view(chosen).count);
    forces = room<T>(3 * batch.n_atoms());
    kinml::cpu::energy_forces<T>(model.shape(), weights.data(), view(chosen), sae, energies.data(),
                                 forces.data(), threads);
  }
  std::vector<T> gradient(const std::vector<double>& e, const std::vector<T>& r,
                          const std::vector<Index>* chosen = nullptr) const {
    std::vector<T> result = room<T>(weights.size());
    kinml::cpu::energy_forces_backward<T>(model.shape(), weights.data(), view(chosen), e.data(),
                                          r.data(), result.data(), threads);
    return result;
  }
  Step<T> step(const kinml::cpu::ForceLoss& loss, const std::vector<Index>& chosen) const {
    const Index n = static_cast<Index>(chosen.size());
    Step<T> r{room<double>(2), room<double>(n), room<double>(3 * n), room<T>(weights.size())};
    kinml::cpu::force_step<T>(model.shape(), weights.data(), view(&chosen), loss, r.losses.data(),
                              r.gradient.data(), r.residuals.data(), r.errors.data(), threads);
    return r;
  }
};

// Targets and weights of a data set.
struct Task {
  std::vector<double> energies, forces, energy_weights, force_weights;
  double energy_scale = 0.3, force_scale = 0.7;

  explicit Task(const Batch& batch)
      : energies(random_numbers(batch.n_structures())),
        forces(random_numbers(3 * batch.n_atoms())) {
    for (Index s = 0; s < batch.n_structures(); ++s) {
      energy_weights.push_back(s % 5 == 3 ? 0 : uniform(0.2, 2));
      force_weights.push_back(s % 4 == 2 ? 0 : uniform(0.2, 2));
      // Forces that are not there are never read.
      if (force_weights[s] == 0)
        std::fill(forces.begin() + 3 * batch.offsets[s], forces.begin() + 3 * batch.offsets[s + 1],
                  std::numeric_limits<double>::quiet_NaN());
      if (energy_weights[s] == 0) energies[s] = 1e6;
    }
  }
  kinml::cpu::ForceLoss loss() const {
    return {energies.data(),      forces.data(), energy_weights.data(),
            force_weights.data(), energy_scale,  force_scale};
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
  const std::vector<double> sae = random_numbers(model.aev.n_species);
  std::vector<Real> expected;
  for (Index s = 0; s < n_structures; ++s) {
    Real shift = 0;
    for (Index a = batch.offsets[s]; a < batch.offsets[s + 1]; ++a) shift += sae[batch.species[a]];
    const std::vector<double> nowhere(3 * n_atoms);
    expected.push_back(plain_energy(model, batch, s, nowhere, 0, 0, nullptr) + shift);
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
    for (Index s = 0; s < n_structures; ++s)
      slopes.push_back(plain_force(model, batch, s, direction));
  const std::vector<double> e = random_numbers(n_structures), r = random_numbers(3 * n_atoms);
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
      for (Index s = 0; s < n_structures; ++s) {
        Real along = 0;
        for (Index c = 3 * batch.offsets[s]; c < 3 * batch.offsets[s + 1]; ++c)
          along += static_cast<Real>(forces[c]) * direction[c];
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
  Index n_energies = 0, n_forces = 0;
  for (const Index s : chosen) {
    n_energies += task.energy_weights[s] != 0;
    n_forces += task.force_weights[s] != 0;
  }
  Real losses[2] = {0, 0};
  // dL/dE, dL/dF, of each structure as often as it is chosen.
  std::vector<double> e(batch.n_structures());
  std::vector<double> r(3 * batch.n_atoms());
  std::vector<Real> residuals, errors;
  for (const Index s : chosen) {
    const Real residual = static_cast<Real>(energies[s]) - task.energies[s];
    residuals.push_back(residual);
    if (task.energy_weights[s] != 0) {
      losses[0] += task.energy_weights[s] * residual * residual / n_energies;
      e[s] += static_cast<double>(2 * task.energy_scale * task.energy_weights[s] * residual /
                                  n_energies);
    }
    Real sum = 0, squares = 0, worst = 0;
    const Index begin = 3 * batch.offsets[s], n = 3 * batch.size(s);
    if (task.force_weights[s] != 0)
      for (Index c = begin; c < begin + n; ++c) {
        const Real difference = static_cast<Real>(forces[c]) - task.forces[c];
        sum += std::fabs(difference);
        squares += difference * difference;
        worst = std::max(worst, std::fabs(difference));
        r[c] += static_cast<double>(2 * task.force_scale * task.force_weights[s] * difference / n /
                                    n_forces);
      }
    errors.insert(errors.end(), {sum, squares, worst});
    if (n > 0) losses[1] += task.force_weights[s] * squares / n / std::max<Index>(n_forces, 1);
  }
  const std::vector<T> expected = library.gradient(e, as<T>(r));
  const Step<T> step = library.step(task.loss(), chosen);
  check_close(step.residuals, residuals, kValue<T>, 100 * kFloor<T>);
  check_close(step.errors, errors, kValue<T>, 100 * kFloor<T>);
  for (int i = 0; i < 2; ++i) CHECK_CLOSE(step.losses[i], losses[i], kValue<T>, kFloor<T>);
  const Real size = std::max<Real>(1, largest(expected));
  CHECK(step.gradient.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i)
    CHECK_CLOSE(step.gradient[i], expected[i], kGradient<T>, 10 * kFloor<T> * size);
}

template <class T>
void test_steps() {
  check::section("steps");
  const AevParameters p = aevmod(3, 5, 3, 4, 4.6, 3.4, 0.95);
  const Model model(p, {9, 6}, {1, 2, 0}, true);
  Batch batch;
  for (int s = 0; s < (small_run ? 9 : 60); ++s) {
    if (s % 6 == 1)
      batch.finish_structure();
    else
      batch.add_molecule(random_index(1, small_run ? 6 : 30), p);
  }
  Task task(batch);
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
    one.energy_weights.assign(all.size(), 0);
    check_step<T>(model, batch, one, all, stored);
    one = task;
    one.force_weights.assign(all.size(), 0);
    std::fill(one.forces.begin(), one.forces.end(), std::numeric_limits<double>::quiet_NaN());
    check_step<T>(model, batch, one, all, stored);
    one.energy_weights.assign(all.size(), 0);
    const Library<T> library(model, batch, stored);
    for (const T g : library.step(one.loss(), all).gradient) CHECK(g == 0);
  }
}

template <class T>
void test_same_bits() {
  const AevParameters p = aevmod(3, 4, 2, 3, 4.0, 2.8, 0.95);
  const Model model(p, {8, 5}, {1, 4, 0}, true);
  for (const Index count : {1, 2, 3, 40, 700}) {
    if (small_run && count > 40) continue;
    Batch batch;
    for (Index s = 0; s < count; ++s) batch.add_molecule(random_index(0, 14), p);
    const Task task(batch);
    std::vector<Index> order(count);
    std::iota(order.begin(), order.end(), Index(0));
    std::shuffle(order.begin(), order.end(), random_bits);
    const std::vector<double> e = random_numbers(count);
    const auto r = as<T>(random_numbers(3 * batch.n_atoms()));
    for (const bool stored : {false, true}) {
      check::section(stored ? "same bits, stored" : "same bits");
      if (stored && count > 40) continue;
      const Library<T> one(model, batch, stored, 1);
      std::vector<double> energies;
      std::vector<T> forces;
      one.evaluate(nullptr, energies, forces);
      const std::vector<T> gradient = one.gradient(e, r);
      const Step<T> step = one.step(task.loss(), order);
      CHECK(all_finite(energies) && all_finite(forces) && all_finite(gradient));
      CHECK(all_finite(step.gradient) && all_finite(step.errors));
      for (const int threads : {1, 2, 3, 7, 16}) {
        const Library<T> other(model, batch, stored, threads);
        std::vector<double> energies_again;
        std::vector<T> forces_again;
        other.evaluate(nullptr, energies_again, forces_again);
        CHECK(same_bits(energies, energies_again) && same_bits(forces, forces_again));
        CHECK(same_bits(gradient, other.gradient(e, r)));
        const Step<T> again = other.step(task.loss(), order);
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
  const Step<double> expected = Library<double>(model, batch, false).step(task.loss(), all);
  std::vector<Step<double>> results(4);
  std::vector<std::thread> callers;
  for (std::size_t i = 0; i < results.size(); ++i)
    callers.emplace_back([&, i] {
      results[i] = Library<double>(model, batch, false, 1 + i % 2).step(task.loss(), all);
    });
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
  test_steps<T>();
  test_same_bits<T>();
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

// Random models on molecules, their data, and tasks: what the tests of the fused step are run on.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../../csrc/core/loss.h"
#include "../../csrc/core/model.h"
#include "../../csrc/core/system.h"
#include "../../csrc/cpu/aev_cpu.h"
#include "molecules.h"

namespace models {

using namespace molecules;
using kinml::NetworkChain;
using kinml::NetworkShape;
using kinml::System;

// ---- models -----------------------------------------------------------------------------------

// A descriptor and networks of one or several levels on top of it. Weights are representable in
// float.
struct Model {
  AevParameters aev;
  std::vector<Index> activations;  // one per layer
  std::vector<Index> sizes;        // [n_levels, n_species, n_layers + 1]
  bool biases;
  Index n_levels;
  std::vector<double> weights;

  // Hidden layers of the given widths, each a number wider for each further species or level.
  Model(const AevParameters& parameters, const std::vector<Index>& hidden,
        const std::vector<Index>& codes, bool with_biases, Index levels = 1)
      : aev(parameters), activations(codes), biases(with_biases), n_levels(levels) {
    for (Index k = 0; k < n_levels; ++k)
      for (Index s = 0; s < aev.n_species; ++s) {
        sizes.push_back(aev.length() + (k > 0 ? 1 : 0));
        for (const Index width : hidden) sizes.push_back(width + s + k);
        sizes.push_back(1);
      }
    for (Index k = 0; k < n_levels; ++k)
      for (Index s = 0; s < aev.n_species; ++s)
        for (Index l = 0; l < shape(k).n_layers; ++l) {
          const Index in = shape(k).size(s, l), out = shape(k).size(s, l + 1);
          for (Index i = 0; i < out * (in + (biases ? 1 : 0)); ++i)
            weights.push_back(
                static_cast<float>(uniform(-2, 2) / std::sqrt(static_cast<double>(in))));
        }
  }
  NetworkShape shape(Index level) const {
    const Index n_layers = static_cast<Index>(activations.size());
    return {aev.n_species, n_layers, sizes.data() + level * aev.n_species * (n_layers + 1),
            activations.data(), biases};
  }
  NetworkChain chain() const {
    NetworkChain chain;
    for (Index k = 0; k < n_levels; ++k) chain.shapes.push_back(shape(k));
    return chain;
  }
  // As the library takes it, with these weights.
  template <class T>
  kinml::Model<T> view(const std::vector<T>& of_members, Index n_members = 1,
                       const double* sae = nullptr) const {
    return {aev, chain(), of_members.data(), n_members, sae};
  }
};

// What a training batch gives.
template <class T>
struct Step {
  std::vector<double> losses, residuals, errors;
  std::vector<T> gradient;
};

// Data in the type of the computation, as coordinates or stored. Padding of the Jacobian is NaN.
template <class T>
struct Data {
  const Model& model;
  const Batch& batch;
  std::vector<T> weights, x, features, jacobian;
  Index columns = 0;

  Data(const Model& m, const Batch& b, bool stored)
      : model(m), batch(b), weights(as<T>(m.weights)), x(as<T>(b.coordinates)) {
    if (!stored) return;
    const Index length = m.aev.length();
    Index most = 0;
    for (Index s = 0; s < b.n_structures(); ++s) most = std::max(most, b.size(s));
    columns = 3 * most + 2;
    features.resize(b.n_atoms() * length);
    jacobian.resize(b.n_atoms() * length * columns);
    const System<T> coordinates{b.n_atoms(), b.n_structures(), b.species.data(), b.offsets.data(),
                                x.data()};
    kinml::cpu::aev_forward<T>(m.aev, coordinates, features.data(), 1);
    kinml::cpu::aev_jacobian<T>(m.aev, coordinates, columns, jacobian.data(), 1);
    for (Index s = 0; s < b.n_structures(); ++s)
      for (Index row = b.offsets[s] * length; row < b.offsets[s + 1] * length; ++row)
        std::fill(jacobian.begin() + row * columns + 3 * b.size(s),
                  jacobian.begin() + (row + 1) * columns, std::numeric_limits<T>::quiet_NaN());
  }

  // The structures named by `chosen`, or all of them.
  System<T> view(const std::vector<Index>* chosen = nullptr) const {
    System<T> v{batch.n_atoms(), batch.n_structures(), batch.species.data(), batch.offsets.data()};
    if (columns > 0) {
      v.features = features.data();
      v.jacobian = jacobian.data();
      v.columns = columns;
    } else {
      v.coordinates = x.data();
    }
    if (chosen != nullptr) {
      static constexpr Index none = 0;  // an empty choice is not all
      v.chosen = chosen->empty() ? &none : chosen->data();
      v.n_chosen = static_cast<Index>(chosen->size());
    }
    return v;
  }
};

// Targets and weights of a data set, level after level.
struct Task {
  Index n_levels, n_structures, n_atoms;
  std::vector<double> energies, forces, energy_weights, force_weights;
  double energy_scale = 0.3, force_scale = 0.7;

  explicit Task(const Batch& batch, Index levels = 1)
      : n_levels(levels),
        n_structures(batch.n_structures()),
        n_atoms(batch.n_atoms()),
        energies(random_numbers(n_levels * batch.n_structures())),
        forces(random_numbers(n_levels * 3 * batch.n_atoms())) {
    for (Index k = 0; k < n_levels; ++k)
      for (Index s = 0; s < batch.n_structures(); ++s) {
        energy_weights.push_back((s + k) % 5 == 3 ? 0 : uniform(0.2, 2));
        force_weights.push_back((s + k) % 4 == 2 ? 0 : uniform(0.2, 2));
        // Forces that are not there are never read.
        const auto own = forces.begin() + k * 3 * batch.n_atoms();
        if (force_weights.back() == 0)
          std::fill(own + 3 * batch.offsets[s], own + 3 * batch.offsets[s + 1],
                    std::numeric_limits<double>::quiet_NaN());
        if (energy_weights.back() == 0) energies[energy_weights.size() - 1] = 1e6;
      }
  }
};

// A task as the loss of a batch of chosen structures; must not outlive the task.
struct BatchLoss {
  std::vector<double> scales, counts;
  kinml::Loss view;

  BatchLoss(const Task& task, const std::vector<Index>& chosen, bool forces = true)
      : scales{task.energy_scale, task.force_scale},
        view{task.n_levels,
             task.n_structures,
             task.n_atoms,
             task.energies.data(),
             task.energy_weights.data(),
             forces ? task.forces.data() : nullptr,
             forces ? task.force_weights.data() : nullptr,
             scales.data(),
             nullptr,
             nullptr,
             nullptr} {
    for (const auto* weights : {&task.energy_weights, &task.force_weights})
      for (Index k = 0; k < task.n_levels; ++k) {
        double n = 0;
        for (const Index s : chosen) n += (*weights)[k * task.n_structures + s] != 0;
        counts.push_back(std::max(n, 1.0));
      }
    view.counts = counts.data();
  }
  BatchLoss(const BatchLoss&) = delete;
  BatchLoss& operator=(const BatchLoss&) = delete;
};

}  // namespace models

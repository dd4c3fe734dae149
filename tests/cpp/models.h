// Random models on molecules, their data, and tasks: what the tests of the fused step are run on.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../../csrc/core/batches.h"
#include "../../csrc/core/network_shape.h"
#include "../../csrc/cpu/aev_cpu.h"
#include "molecules.h"

namespace models {

using namespace molecules;
using kinml::ForceBatch;
using kinml::NetworkLevels;
using kinml::NetworkShape;

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
  NetworkLevels levels() const {
    NetworkLevels chain;
    for (Index k = 0; k < n_levels; ++k) chain.shapes.push_back(shape(k));
    return chain;
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
    const kinml::AevBatch<T> view{b.n_structures(), x.data(), b.species.data(), b.offsets.data()};
    kinml::cpu::aev_forward<T>(m.aev, view, features.data(), 1);
    kinml::cpu::aev_jacobian<T>(m.aev, view, columns, jacobian.data(), 1);
    for (Index s = 0; s < b.n_structures(); ++s)
      for (Index row = b.offsets[s] * length; row < b.offsets[s + 1] * length; ++row)
        std::fill(jacobian.begin() + row * columns + 3 * b.size(s),
                  jacobian.begin() + (row + 1) * columns, std::numeric_limits<T>::quiet_NaN());
  }

  // The structures named by `chosen`, or all of them.
  ForceBatch<T> view(const std::vector<Index>* chosen = nullptr) const {
    ForceBatch<T> v{batch.species.data(),
                    batch.offsets.data(),
                    chosen == nullptr ? nullptr : chosen->data(),
                    chosen == nullptr ? batch.n_structures() : static_cast<Index>(chosen->size()),
                    batch.n_structures(),
                    batch.n_atoms()};
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
};

// Targets and weights of a data set, level after level.
struct Task {
  std::vector<double> energies, forces, energy_weights, force_weights;
  double energy_scale = 0.3, force_scale = 0.7;

  explicit Task(const Batch& batch, Index n_levels = 1)
      : energies(random_numbers(n_levels * batch.n_structures())),
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

}  // namespace models

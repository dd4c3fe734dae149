// Passes of a tile through a chain of networks; force_step_cpu.h has the formulas. Each pass needs
// what the one before gives:
//
//   TileArrays -> ascend -> Ascent (energies, g_k) -> descend -> Descent (U_k, T_k in place of g_k)
//   -> add_weight_gradients
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "../core/model.h"
#include "../core/network_shape.h"
#include "aev_kernels.h"
#include "networks_cpu.h"
#include "scratch.h"
#include "tile.h"

namespace kinml::cpu {

// ---- formulas of the chain, for one atom --------------------------------------------------------

// eps_k = eps_{k-1} + f_k
template <class T>
T chain_energy(std::int64_t level, T below, T output) {
  return (level > 0 ? below : T(0)) + output;
}
// g_k = p_k + (1 + c_k) g_{k-1} and U_k = v_k + (1 + c_{k+1}) U_{k+1}: the neighbour in the chain
// is added to a row.
template <class T>
void chain_add(T* row, const T* neighbour, T slope, std::int64_t length) {
  const T factor = 1 + slope;
  for (std::int64_t d = 0; d < length; ++d) row[d] += factor * neighbour[d];
}
// T_k = g_{k-1} . U_k, in eight sums, so that they fit into registers
template <class T>
T chain_tangent(const T* g, const T* u, std::int64_t length) {
  T sums[8] = {};
  std::int64_t d = 0;
  for (; d + 8 <= length; d += 8)
    for (std::int64_t j = 0; j < 8; ++j) sums[j] += g[d + j] * u[d + j];
  for (; d < length; ++d) sums[0] += g[d] * u[d];
  T sum = 0;
  for (const T s : sums) sum += s;
  return sum;
}

// ---- weights ------------------------------------------------------------------------------------

// The networks of a chain, with the weights in the order of the passes.
template <class T>
class PackedChain {
 public:
  // The chain must outlive the object, the weights need not.
  // with_gradients: whether any pass gives derivatives with respect to the descriptors.
  PackedChain(const NetworkChain& chain, const T* weights, bool with_gradients, int n_threads)
      : chain_(chain) {
    const bool of_features = with_gradients || chain.n_levels() > 1;
    for (std::int64_t k = 0; k < chain.n_levels(); ++k) {
      levels_.push_back(std::make_unique<const PackedNetworks<T>>(chain.shapes[k], weights,
                                                                  n_threads, of_features));
      weights += chain.parameters_of(k);
    }
  }
  // Of what PackedNetworks::pack wrote, level after level; it must outlive the object.
  PackedChain(const NetworkChain& chain, const T* packed) : chain_(chain) {
    for (const NetworkShape& shape : chain.shapes) {
      levels_.push_back(std::make_unique<const PackedNetworks<T>>(shape, packed));
      packed += PackedNetworks<T>::packed_numbers(shape);
    }
  }
  const NetworkChain& chain() const { return chain_; }
  const PackedNetworks<T>& operator[](std::int64_t k) const { return *levels_[k]; }
  // Numbers that any of the networks needs for a tile; widths of levels may differ.
  std::int64_t tile_memory(std::int64_t n_atoms) const {
    std::int64_t most = 0;
    for (const auto& level : levels_) most = std::max(most, padded(level->tile_memory(n_atoms)));
    return most;
  }

 private:
  const NetworkChain& chain_;
  std::vector<std::unique_ptr<const PackedNetworks<T>>> levels_;
};

// The networks of the members of an ensemble, laid out for one call; the model must outlive them.
template <class T>
std::vector<PackedChain<T>> packed_members(const Model<T>& model, bool with_gradients,
                                           int n_threads) {
  std::vector<PackedChain<T>> members;
  for (std::int64_t m = 0; m < model.n_members; ++m)
    members.emplace_back(model.networks, model.weights + m * model.networks.parameters(),
                         with_gradients, n_threads);
  return members;
}

// ---- memory -------------------------------------------------------------------------------------

// What the networks read of the atoms: of that at place p, features + rows[p] * stride.
template <class T>
struct TileInputs {
  const T* features;
  std::int64_t stride;
  const std::int64_t* rows;
};

// What the passes keep of a tile, in the thread's memory: one at a time.
template <class T>
class TileArrays {
 public:
  std::int64_t n_levels, length, stride;  // K, D, and from row to row of a matrix
  T* features;                            // [n, stride] a, and eps of the level below
  TileInputs<T> inputs;                   // these, or stored ones where nothing else has such rows
  std::vector<T*> gradients;              // [K] matrices [n, stride] for g_k
  std::vector<T*> outputs;                // as many further matrices as were asked for
  T* atomic;                              // [n] by place, like those that follow
  T* seeds;                               // [n]

  TileArrays(const NetworkChain& chain, const Tile<T>& tile, std::int64_t network_memory,
             std::int64_t n_outputs = 0)
      : n_levels(chain.n_levels()),
        length(chain.length()),
        stride(row_stride(chain)),
        network_memory_(network_memory),
        n_(padded(tile.n_rows())),
        room_(padded(3 * tile.most_atoms() + kMaxLanes)) {
    const std::int64_t matrix = padded(tile.n_rows() * stride);
    next_ = thread_memory().template get<T>((1 + n_levels + n_outputs) * matrix +
                                            n_levels * network_memory_ + (2 + 3 * n_levels) * n_ +
                                            n_levels * (2 * room_ + kStrain) + 3 * room_);
    features = take(matrix);
    inputs = {features, stride, tile.order().rows.data()};
    for (std::int64_t k = 0; k < n_levels; ++k) gradients.push_back(take(matrix));
    for (std::int64_t j = 0; j < n_outputs; ++j) outputs.push_back(take(matrix));
    networks_ = take(n_levels * network_memory_);
    atomic = take(n_);
    seeds = take(n_);
    network_outputs_ = take(n_levels * n_);
    energies_ = take(n_levels * n_);
    slopes_ = take(n_levels * n_);
    forces_ = take(n_levels * room_);
    force_slopes_ = take(n_levels * room_);
    strains_ = take(n_levels * kStrain);
    atomic_virials_ = take(3 * room_);
  }

  T* network_outputs(std::int64_t k) const { return network_outputs_ + k * n_; }  // f_k
  T* below(std::int64_t k) const { return energies_ + (k - 1) * n_; }  // eps_{k-1}, k > 0
  T* slopes(std::int64_t k) const { return slopes_ + k * n_; }         // c_k
  T* network_memory(std::int64_t k) const { return networks_ + k * network_memory_; }
  // Forces of one structure and dL/dF: [K, room], room >= 3 atoms.
  T* forces(std::int64_t k) const { return forces_ + k * room_; }
  T* force_slopes(std::int64_t k) const { return force_slopes_ + k * room_; }
  // Its dL/dvirial: [3, 3].
  T* atomic_virials() const { return atomic_virials_; }  // [atoms, 3, 3] of one structure
  T* virial_slopes(std::int64_t k) const { return strains_ + k * kStrain; }

 private:
  static std::int64_t row_stride(const NetworkChain& chain) {
    const std::int64_t stride = padded(chain.length() + (chain.n_levels() > 1 ? 1 : 0));
    // Rows that begin in the same lines of the cache would drive one another out.
    return stride * sizeof(T) % 1024 == 0 ? stride + kMaxLanes : stride;
  }
  static Scratch& thread_memory() {
    thread_local Scratch memory;
    return memory;
  }
  T* take(std::int64_t numbers) {
    T* const taken = next_;
    next_ += numbers;
    return taken;
  }

  static constexpr std::int64_t kStrain = 16;
  std::int64_t network_memory_, n_, room_;
  T* next_;
  T *networks_, *network_outputs_, *energies_, *slopes_, *forces_, *force_slopes_, *strains_,
      *atomic_virials_;
};

// ---- passes -------------------------------------------------------------------------------------

// How far up a tile goes: energies; also what tangents and gradients need; also g_k.
enum class Height { energies, slopes, gradients };

// What the way up gave.
template <class T>
struct Ascent {
  const Tile<T>& tile;
  const PackedChain<T>& chain;
  TileArrays<T>& arrays;
  bool second;                   // whether second derivatives can follow
  std::vector<double> energies;  // [count, K]
  std::vector<T*> gradients;     // [K] g_k, if they were asked for
};

template <class T>
NetworkTile<T> network_tile(const Tile<T>& tile, const TileArrays<T>& arrays, std::int64_t k,
                            bool second) {
  return {arrays.inputs.features,
          arrays.inputs.stride,
          arrays.inputs.rows,
          tile.order().starts.data(),
          arrays.network_memory(k),
          nullptr,
          0,
          second};
}

// The number behind the descriptor's, in each row, from values by place.
template <class T>
void set_last(const Tile<T>& tile, const TileArrays<T>& arrays, const T* values) {
  for (std::int64_t p = 0; p < tile.n_rows(); ++p)
    arrays.features[tile.order().rows[p] * arrays.stride + arrays.length] = values[p];
}

// Energies of all levels and, as far as `height` says, the gradients g_k, which are written to
// `gradients` [K]. The descriptors are in arrays.features.
template <class T>
Ascent<T> ascend(const Tile<T>& tile, const PackedChain<T>& chain, TileArrays<T>& arrays,
                 Height height, bool second, std::vector<T*> gradients) {
  const std::int64_t K = arrays.n_levels, n = tile.n_rows();
  std::vector<double> energies(tile.count() * K);
  for (std::int64_t k = 0; k < K; ++k) {
    if (k > 0) set_last(tile, arrays, arrays.below(k));
    const NetworkTile<T> of_tile = network_tile(tile, arrays, k, second);
    T* const outputs = arrays.network_outputs(k);
    chain[k].forward(of_tile, outputs);
    // In species order, whatever the threads.
    for (std::int64_t j = k; j < K; ++j)
      for (std::int64_t p = 0; p < n; ++p)
        energies[tile.owner(p) * K + j] += static_cast<double>(outputs[p]);
    if (k + 1 < K)
      for (std::int64_t p = 0; p < n; ++p)
        arrays.below(k + 1)[p] = chain_energy(k, k > 0 ? arrays.below(k)[p] : T(0), outputs[p]);
    if (height == Height::energies) continue;
    const bool with_gradients = height == Height::gradients;
    chain[k].backward(of_tile, nullptr, with_gradients ? gradients[k] : nullptr, arrays.stride);
    if (k == 0) continue;
    for (std::int64_t p = 0; p < n; ++p) {
      const std::int64_t row = tile.order().rows[p] * arrays.stride;
      T* const g = gradients[k] + row;
      arrays.slopes(k)[p] = g[arrays.length];
      chain_add(g, gradients[k - 1] + row, g[arrays.length], arrays.length);
    }
  }
  return {tile, chain, arrays, second, std::move(energies), std::move(gradients)};
}

// What a loss says of one structure.
struct StructureSlopes {
  std::vector<double> energies;  // [K] dL/dE
  std::vector<char> on_forces;   // [K] whether dL/dF is in TileArrays::force_slopes; else it is 0
  std::vector<char> on_virials;  // [K] the same of dL/dvirial, only where on_forces
  std::vector<double> virials;   // [K, 9] what is judged, if the loss asks for it

  explicit StructureSlopes(std::int64_t n_levels)
      : energies(n_levels), on_forces(n_levels), on_virials(n_levels), virials(9 * n_levels) {}
};

// What the weight gradients are made of: (U_k, T_k) in place of g_k.
template <class T>
struct Descent {
  Ascent<T> from;
  std::vector<double> energy_slopes;  // [count, K] dL/dE
};

// `judge(ascent, i, slopes)` sets the slopes of structure i. With descriptors the loss depends on
// forces: then the way up was to the gradients, or for one level to the slopes.
template <class T, class Descriptors, class Judge>
Descent<T> descend(Ascent<T>&& ascent, const Descriptors* descriptors, const Judge& judge) {
  const Tile<T>& tile = ascent.tile;
  const TileArrays<T>& arrays = ascent.arrays;
  const std::int64_t K = arrays.n_levels, length = arrays.length, stride = arrays.stride;
  std::vector<double> energy_slopes(tile.count() * K);
  StructureSlopes slopes(K);
  for (std::int64_t i = 0; i < tile.count(); ++i) {
    judge(std::as_const(ascent), i, slopes);
    std::copy(slopes.energies.begin(), slopes.energies.end(), energy_slopes.begin() + i * K);
    if (descriptors == nullptr) continue;
    const std::int64_t begin = tile.first_row(i), end = tile.first_row(i + 1);
    for (std::int64_t k = K - 1; k >= 0; --k) {
      T* const of_level = ascent.gradients[k];
      if (slopes.on_forces[k])
        descriptors->directions(i, arrays.force_slopes(k), of_level,
                                slopes.on_virials[k] ? arrays.virial_slopes(k) : nullptr);
      else
        for (std::int64_t row = begin; row < end; ++row)
          std::fill_n(of_level + row * stride, length, T(0));
      for (std::int64_t row = begin; K > 1 && row < end; ++row) {
        T* const u = of_level + row * stride;
        if (k + 1 < K)
          chain_add(u, ascent.gradients[k + 1] + row * stride,
                    arrays.slopes(k + 1)[tile.place(row)], length);
        if (k > 0) u[length] = chain_tangent(ascent.gradients[k - 1] + row * stride, u, length);
      }
    }
  }
  return {std::move(ascent), std::move(energy_slopes)};
}

// Weight gradients of all levels, written to `gradient` or added to it.
template <class T>
void weight_gradients(const Descent<T>& descent, T* gradient, bool add) {
  const Tile<T>& tile = descent.from.tile;
  const TileArrays<T>& arrays = descent.from.arrays;
  const NetworkChain& chain = descent.from.chain.chain();
  const std::int64_t K = arrays.n_levels, n = tile.n_rows();
  std::fill_n(arrays.seeds, n, T(0));  // q_k
  T* of_level = gradient + chain.parameters();
  for (std::int64_t k = K - 1; k >= 0; --k) {
    const PackedNetworks<T>& networks = descent.from.chain[k];
    NetworkTile<T> of_tile = network_tile(tile, arrays, k, descent.from.second);
    T* const last = k > 0 ? arrays.atomic : nullptr;  // m_k
    for (std::int64_t p = 0; p < n; ++p)
      arrays.seeds[p] += static_cast<T>(descent.energy_slopes[tile.owner(p) * K + k]);
    if (k > 0) set_last(tile, arrays, arrays.below(k));
    if (descent.from.second) {
      of_tile.tangents = descent.from.gradients[k];
      of_tile.tangent_stride = arrays.stride;
      networks.tangent(of_tile, nullptr);
      networks.second_backward(of_tile, arrays.seeds, nullptr, 0, last);
    } else {
      networks.backward(of_tile, arrays.seeds, nullptr, 0, last);
    }
    of_level -= chain.parameters_of(k);
    networks.weight_gradients(of_tile, of_level, add);
    for (std::int64_t p = 0; last != nullptr && p < n; ++p) arrays.seeds[p] += last[p];
  }
}

}  // namespace kinml::cpu

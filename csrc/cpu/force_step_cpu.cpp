#include "force_step_cpu.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "aev_cpu.h"
#include "chain.h"
#include "descriptors.h"
#include "force_step_kernels.h"
#include "guarded.h"
#include "shares.h"

namespace kinml::cpu {

namespace {

using Index = std::int64_t;

// ---- evaluation ---------------------------------------------------------------------------------

// Where the outputs of energy_forces begin.
template <class T>
struct Outputs {
  double* energies;
  T* forces;
  Index first_level, n_levels;  // R, levels of the outputs
  Index count, n_atoms;

  double& energy(Index member, Index level, Index chosen) const {
    return energies[place(member, level) * count + chosen];
  }
  // From an atom of the system on.
  T* force(Index member, Index level, Index atom) const {
    return forces + 3 * (place(member, level) * n_atoms + atom);
  }
  Index place(Index member, Index level) const { return member * n_levels + level - first_level; }
};

// Energies and forces of a tile for the members of an ensemble.
template <class T>
void evaluate_tile(const std::vector<PackedChain<T>>& members, const Tile<T>& tile,
                   TileEnvironments<T>& environments, const Outputs<T>& out) {
  const NetworkChain& chain = members[0].chain();
  const bool with_forces = tile.system().has_forces();
  const Index n_members = static_cast<Index>(members.size()), K = chain.n_levels();
  // The forces of all outputs are computed together where that is faster.
  const Index n_outputs = n_members * out.n_levels;
  const bool together = with_forces && !environments.stored() && n_members > 1 &&
                        n_outputs >= TileDescriptors<T>::kMany;
  TileArrays<T> arrays(chain, tile, members[0].tile_memory(tile.n_atoms()),
                       together ? n_outputs : 0);
  const bool in_place = environments.stored() && K == 1 && !with_forces;
  if (in_place) arrays.inputs = {tile.system().features, arrays.length, tile.placed_atoms()};
  const TileDescriptors<T> descriptors(tile, environments, arrays.length, arrays.stride,
                                       in_place ? nullptr : arrays.features);
  for (Index m = 0; m < n_members; ++m) {
    std::vector<T*> gradients = arrays.gradients;
    for (Index k = out.first_level; together && k < K; ++k)
      gradients[k] = arrays.outputs[out.place(m, k)];
    const Ascent<T> ascent =
        ascend(tile, members[m], arrays, with_forces ? Height::gradients : Height::energies, false,
               std::move(gradients));
    for (Index i = 0; i < tile.count(); ++i)
      for (Index k = out.first_level; k < K; ++k) {
        out.energy(m, k, tile.chosen(i)) = ascent.energies[i * K + k];
        if (with_forces && !together)
          descriptors.forces(i, ascent.gradients[k], out.force(m, k, tile.first_atom(i)));
      }
  }
  if (!together) return;
  const std::vector<const T*> gradients(arrays.outputs.begin(), arrays.outputs.end());
  for (Index i = 0; i < tile.count(); ++i) {
    descriptors.forces_of_many(i, gradients, arrays.output_forces);
    for (Index j = 0; j < n_outputs; ++j)
      std::copy_n(arrays.output_forces[j], 3 * tile.atoms(i),
                  out.forces + 3 * (j * out.n_atoms + tile.first_atom(i)));
  }
}

template <class T>
void evaluate_tiles(const Model<T>& model, const System<T>& system, const Outputs<T>& out,
                    int n_threads) {
  const NetworkChain& chain = model.networks;
  const DescriptorSource<T> source(model.aev, system);
  std::vector<PackedChain<T>> members;
  for (Index m = 0; m < model.n_members; ++m)
    members.emplace_back(chain, model.weights + m * chain.parameters(), system.has_forces(),
                         n_threads);
  const std::vector<Range> tiles = tiles_of(system, {0, system.count()});
  guarded_parallel_for(static_cast<Index>(tiles.size()), n_threads, [&](Index tile) {
    TileEnvironments<T> environments(source);
    evaluate_tile(members, Tile<T>(system, tiles[tile], chain.n_species()), environments, out);
  });
}

// One structure of coordinates, with all threads.
template <class T>
void evaluate_large(const Model<T>& model, const System<T>& system, Index chosen,
                    const Outputs<T>& out, int n_threads) {
  const NetworkChain& chain = model.networks;
  const Index length = chain.length(), K = chain.n_levels(), stride = length + (K > 1 ? 1 : 0);
  const Index begin = system.offsets[system.structure(chosen)];
  const Index n = count_atoms(system, {chosen, chosen + 1}), offsets[] = {0, n};
  const System<T> one{n, 1, system.species + begin, offsets, system.coordinates + 3 * begin};
  const SpeciesOrder order(chain.n_species(), n, [&](Index a) { return one.species[a]; });
  std::vector<T> aevs(n * length), features(n * stride), below(n * stride), gradients(n * stride);
  std::vector<T> g(n * length), atomic(n), eps(n), saved;
  const std::vector<T> seeds(n, T(1));
  aev_forward<T>(model.aev, one, aevs.data(), n_threads);
  for (Index a = 0; a < n; ++a)
    std::copy_n(aevs.data() + a * length, length, features.data() + a * stride);
  for (Index m = 0; m < model.n_members; ++m) {
    const T* weights = model.weights + m * chain.parameters();
    double energy = 0;
    for (Index k = 0; k < K; weights += chain.parameters_of(k), ++k) {
      const NetworkShape& shape = chain.shapes[k];
      saved.resize(n * shape.saved_per_atom());
      for (Index p = 0; k > 0 && p < n; ++p) features[order.rows[p] * stride + length] = eps[p];
      networks_forward<T>(shape, weights, features.data(), stride, order.rows.data(),
                          order.starts.data(), saved.data(), atomic.data(), n_threads);
      std::swap(below, gradients);
      networks_backward<T>(shape, weights, features.data(), stride, order.rows.data(),
                           order.starts.data(), saved.data(), seeds.data(), gradients.data(),
                           nullptr, n_threads);
      for (Index p = 0; p < n; ++p) {
        eps[p] = chain_energy(k, eps[p], atomic[p]);
        energy += static_cast<double>(atomic[p]);
      }
      for (Index a = 0; k > 0 && a < n; ++a) {
        T* const row = gradients.data() + a * stride;
        chain_add(row, below.data() + a * stride, row[length], length);
      }
      if (k < out.first_level) continue;
      for (Index a = 0; a < n; ++a)
        std::copy_n(gradients.data() + a * stride, length, g.data() + a * length);
      T* const forces = out.force(m, k, begin);
      aev_vjp<T>(model.aev, one, g.data(), forces, n_threads);
      for (Index c = 0; c < 3 * n; ++c) forces[c] = T(0) - forces[c];
      out.energy(m, k, chosen) = energy;
    }
  }
}

template <class T>
void add_single_atom_energies(const Model<T>& model, const System<T>& system,
                              const Outputs<T>& out) {
  const Index n_species = model.networks.n_species();
  for (Index row = 0; row < model.n_members * out.n_levels; ++row)
    for (Index i = 0; i < out.count; ++i) {
      const Index s = system.structure(i);
      for (Index a = system.offsets[s]; a < system.offsets[s + 1]; ++a)
        out.energies[row * out.count + i] += model.sae[row * n_species + system.species[a]];
    }
}

// ---- gradients ----------------------------------------------------------------------------------

// A loss, as `differentiate` asks for it:
//   kForces                             whether `judge` has to know the forces
//   on_forces(i)                        whether it depends on the forces of chosen structure i
//   judge(energies, i, arrays, slopes)  from its energies [K] and, if known, arrays.forces, sets
//                                       the slopes and arrays.force_slopes

// Gradients [n_weights] of the loss's share of each of some parts of a batch.
template <class T, class LossOf>
void differentiate(const Model<T>& model, const System<T>& system, const LossOf& loss,
                   const std::vector<Range>& parts, const std::vector<T*>& gradients,
                   int n_threads) {
  const NetworkChain& chain = model.networks;
  const Index K = chain.n_levels();
  const DescriptorSource<T> source(model.aev, system);
  const PackedChain<T> packed(chain, model.weights, system.has_forces(), n_threads);
  guarded_parallel_for(static_cast<Index>(parts.size()), n_threads, [&](Index part) {
    TileEnvironments<T> environments(source);
    bool add = false;
    for (const Range range : tiles_of(system, parts[part])) {
      bool on_forces = false;
      for (Index i = range.first; i < range.last; ++i) on_forces = on_forces || loss.on_forces(i);
      const Tile<T> tile(system, range, chain.n_species());
      TileArrays<T> arrays(chain, tile, packed.tile_memory(tile.n_atoms()));
      const bool in_place = environments.stored() && K == 1 && !on_forces;
      if (in_place) arrays.inputs = {system.features, arrays.length, tile.placed_atoms()};
      const TileDescriptors<T> descriptors(tile, environments, arrays.length, arrays.stride,
                                           in_place ? nullptr : arrays.features);
      const bool forces = on_forces && LossOf::kForces;
      const Height height = !on_forces        ? Height::energies
                            : forces || K > 1 ? Height::gradients
                                              : Height::slopes;
      const auto judge = [&](const Ascent<T>& ascent, Index i, StructureSlopes& slopes) {
        for (Index k = 0; forces && k < K; ++k)
          descriptors.forces(i, ascent.gradients[k], arrays.forces(k));
        loss.judge(ascent.energies.data() + i * K, tile.chosen(i), arrays, slopes);
      };
      const Descent<T> descent =
          descend(ascend(tile, packed, arrays, height, on_forces, arrays.gradients),
                  on_forces ? &descriptors : nullptr, judge);
      weight_gradients(descent, gradients[part], add);
      add = true;
    }
  });
}

// gradient = sum of nodes of the tree (core/shares.h), which together are one: node r holds the parts
// firsts[r] .. firsts[r + 1]
template <class T>
void sum_nodes(const std::vector<const T*>& nodes, const std::vector<Index>& firsts,
               Index n_weights, T* gradient, int n_threads) {
  const Index block = 2048, n_nodes = static_cast<Index>(nodes.size());
  parallel_for((n_weights + block - 1) / block, n_threads, [&](Index item) {
    const Index begin = item * block, count = std::min(block, n_weights - begin);
    std::vector<const T*> rows(nodes);
    for (const T*& row : rows) row += begin;
    KINML_CALL_KERNEL(sum_tree, rows.data(), firsts.data(), n_nodes, count, gradient + begin);
  });
}

// Gradients [n_weights] of nodes that hold these parts, which are numbered from firsts[0] on.
template <class T, class LossOf>
void differentiate(const Model<T>& model, const System<T>& system, const LossOf& loss,
                   const std::vector<Range>& parts, const std::vector<Index>& firsts,
                   const std::vector<T*>& nodes, int n_threads) {
  const Index n_weights = model.networks.parameters(), room = padded(n_weights);
  thread_local Scratch memory;
  T* const numbers = memory.get<T>(parts.size() * room);
  std::vector<T*> gradients;
  const auto size = [&](std::size_t node) { return firsts[node + 1] - firsts[node]; };
  for (std::size_t node = 0; node < nodes.size(); ++node)
    for (Index part = 0; part < size(node); ++part)
      gradients.push_back(size(node) == 1 ? nodes[node] : numbers + gradients.size() * room);
  differentiate(model, system, loss, parts, gradients, n_threads);
  for (std::size_t node = 0; node < nodes.size(); ++node) {
    if (size(node) == 1) continue;
    const auto first = gradients.begin() + (firsts[node] - firsts[0]);
    std::vector<Index> leaves(size(node) + 1);
    std::iota(leaves.begin(), leaves.end(), Index(0));
    sum_nodes<T>({first, first + size(node)}, leaves, n_weights, nodes[node], n_threads);
  }
}

// gradient = that of the loss
template <class T, class LossOf>
void differentiate(const Model<T>& model, const System<T>& system, const LossOf& loss, T* gradient,
                   int n_threads) {
  const std::vector<Range> parts = parts_of(system);
  if (parts.empty())
    std::fill_n(gradient, model.networks.parameters(), T(0));
  else
    differentiate(model, system, loss, parts, {0, static_cast<Index>(parts.size())}, {gradient},
                  n_threads);
}

// sum e E + sum r F, of outputs from first_level on.
template <class T>
struct GivenSlopes {
  static constexpr bool kForces = false;
  const System<T>& system;
  Index first_level;
  const double* e;  // [R, count]
  const T* r;       // [R, n_atoms, 3]

  bool on_forces(Index) const { return system.has_forces(); }
  void judge(const double*, Index i, const TileArrays<T>& arrays, StructureSlopes& slopes) const {
    const Index s = system.structure(i), begin = system.offsets[s], end = system.offsets[s + 1];
    for (Index k = 0; k < arrays.n_levels; ++k) {
      const bool is_output = k >= first_level;
      slopes.energies[k] = is_output ? e[(k - first_level) * system.count() + i] : 0.0;
      slopes.on_forces[k] = is_output && system.has_forces();
      if (!slopes.on_forces[k]) continue;
      const T* const of_level = r + (k - first_level) * 3 * system.n_atoms;
      std::copy(of_level + 3 * begin, of_level + 3 * end, arrays.force_slopes(k));
    }
  }
};

// The loss of a training batch, and what is reported of it.
template <class T>
struct BatchLoss {
  static constexpr bool kForces = true;
  const System<T>& system;
  const Loss& loss;
  double* residuals;  // [K, count]
  double* errors;     // [K, count, 3]

  Index components(Index i) const { return 3 * count_atoms(system, {i, i + 1}); }
  // A structure without atoms counts, but has nothing to add.
  bool on_forces(Index k, Index i) const {
    return loss.force_weight(k, system.structure(i)) != 0 && components(i) > 0;
  }
  bool on_forces(Index i) const {
    for (Index k = 0; k < loss.n_levels; ++k)
      if (on_forces(k, i)) return true;
    return false;
  }
  void judge(const double* energies, Index i, const TileArrays<T>& arrays,
             StructureSlopes& slopes) const {
    const Index s = system.structure(i), n = components(i);
    for (Index k = 0; k < loss.n_levels; ++k) {
      double& residual = residuals[k * system.count() + i];
      residual = loss.energy_residual(k, s, energies[k]);
      slopes.energies[k] = loss.energy_slope(k, s, residual);
      ForceErrors found;
      slopes.on_forces[k] = on_forces(k, i);
      if (slopes.on_forces[k]) {
        const double slope = loss.force_slope(k, s, n);
        const T* const forces = arrays.forces(k);
        const double* const targets = loss.force_targets(k, system.offsets[s]);
        T* const r = arrays.force_slopes(k);
        for (Index c = 0; c < n; ++c) {
          const double difference = static_cast<double>(forces[c]) - targets[c];
          found.add(difference);
          r[c] = static_cast<T>(slope * difference);
        }
      }
      found.write(errors + 3 * (k * system.count() + i));
    }
  }
  // L_E and L_F, when every structure has been judged.
  void sum(double* losses) const {
    losses[0] = losses[1] = 0;
    for (Index k = 0; k < loss.n_levels; ++k) {
      double of_energies = 0, of_forces = 0;
      for (Index i = 0; i < system.count(); ++i) {
        const Index s = system.structure(i), place = k * system.count() + i;
        of_energies += loss.energy_term(k, s, residuals[place]);
        of_forces += loss.force_term(k, s, errors[3 * place + 1], components(i));
      }
      losses[0] += loss.energy_mean(k, of_energies);
      losses[1] += loss.force_mean(k, of_forces);
    }
  }
};

}  // namespace

template <class T>
void energy_forces(const Model<T>& model, const System<T>& system, std::int64_t first_level,
                   double* energies, T* forces, int n_threads) {
  if (model.n_members == 0) return;
  const Outputs<T> out{energies,       forces,
                       first_level,    model.networks.n_levels() - first_level,
                       system.count(), system.n_atoms};
  Index largest = 0;
  for (Index i = 0; i < system.count(); ++i)
    largest = std::max(largest, count_atoms(system, {i, i + 1}));
  if (largest > kLargeStructure && !system.stored())
    for (Index i = 0; i < system.count(); ++i) evaluate_large(model, system, i, out, n_threads);
  else
    evaluate_tiles(model, system, out, n_threads);
  if (model.sae != nullptr) add_single_atom_energies(model, system, out);
}

template <class T>
void energy_forces_backward(const Model<T>& model, const System<T>& system,
                            std::int64_t first_level, const double* e, const T* r, T* gradient,
                            int n_threads) {
  differentiate(model, system, GivenSlopes<T>{system, first_level, e, r}, gradient, n_threads);
}

template <class T>
void force_step(const Model<T>& model, const System<T>& system, const Loss& loss, double* losses,
                T* gradient, double* residuals, double* errors, int n_threads) {
  const BatchLoss<T> batch{system, loss, residuals, errors};
  differentiate(model, system, batch, gradient, n_threads);
  batch.sum(losses);
}

template <class T>
std::int64_t message_bytes(const System<T>& system, std::int64_t n_levels, std::int64_t n_weights,
                           std::int64_t n_ranks) {
  return message_of<T>(shares_of(parts_of(system), n_ranks), n_levels, n_weights).bytes;
}

template <class T>
void force_step_share(const Model<T>& model, const System<T>& system, const Loss& loss,
                      std::int64_t rank, std::int64_t n_ranks, std::byte* message, int n_threads) {
  const std::vector<Range> parts = parts_of(system);
  const std::vector<BatchShare> shares = shares_of(parts, n_ranks);
  const Message layout =
      message_of<T>(shares, model.networks.n_levels(), model.networks.parameters());
  const auto& [own, structures, firsts] = shares[rank];
  if (own.count() == 0) return;
  System<T> some = system;
  some.chosen = system.chosen + structures.first;
  some.n_chosen = structures.last - structures.first;
  std::vector<Range> of_some;
  for (Index p = own.first; p < own.last; ++p)
    of_some.push_back({parts[p].first - structures.first, parts[p].last - structures.first});
  std::vector<T*> nodes;
  for (std::size_t node = 0; node + 1 < firsts.size(); ++node)
    nodes.push_back(layout.gradient<T>(message, node));
  const BatchLoss<T> batch{some, loss, layout.energy_residuals(message),
                           layout.force_errors(message)};
  differentiate(model, some, batch, of_some, firsts, nodes, n_threads);
}

template <class T>
void force_step_join(const System<T>& system, const Loss& loss, const std::byte* messages,
                     std::int64_t n_ranks, std::int64_t n_weights, double* losses, T* gradient,
                     double* residuals, double* errors, int n_threads) {
  const std::vector<BatchShare> shares = shares_of(parts_of(system), n_ranks);
  const Message layout = message_of<T>(shares, loss.n_levels, n_weights);
  std::vector<const T*> nodes;
  std::vector<Index> firsts{0};
  for (Index rank = 0; rank < n_ranks; ++rank) {
    const auto& [parts, structures, of_rank] = shares[rank];
    const std::byte* const message = messages + rank * layout.bytes;
    for (std::size_t node = 0; node + 1 < of_rank.size(); ++node) {
      nodes.push_back(layout.gradient<T>(message, node));
      firsts.push_back(of_rank[node + 1]);
    }
    const Index n = structures.last - structures.first;
    for (Index k = 0; k < loss.n_levels; ++k) {
      const Index to = k * system.count() + structures.first;
      std::copy_n(layout.energy_residuals(message) + k * n, n, residuals + to);
      std::copy_n(layout.force_errors(message) + 3 * k * n, 3 * n, errors + 3 * to);
    }
  }
  if (nodes.empty())
    std::fill_n(gradient, n_weights, T(0));
  else
    sum_nodes(nodes, firsts, n_weights, gradient, n_threads);
  BatchLoss<T>{system, loss, residuals, errors}.sum(losses);
}

#define KINML_INSTANTIATE(T)                                                                      \
  template void energy_forces<T>(const Model<T>&, const System<T>&, std::int64_t, double*, T*,    \
                                 int);                                                            \
  template void energy_forces_backward<T>(const Model<T>&, const System<T>&, std::int64_t,        \
                                          const double*, const T*, T*, int);                      \
  template void force_step<T>(const Model<T>&, const System<T>&, const Loss&, double*, T*,        \
                              double*, double*, int);                                             \
  template std::int64_t message_bytes<T>(const System<T>&, std::int64_t, std::int64_t,            \
                                         std::int64_t);                                           \
  template void force_step_share<T>(const Model<T>&, const System<T>&, const Loss&, std::int64_t, \
                                    std::int64_t, std::byte*, int);                               \
  template void force_step_join<T>(const System<T>&, const Loss&, const std::byte*, std::int64_t, \
                                   std::int64_t, double*, T*, double*, double*, int);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cpu

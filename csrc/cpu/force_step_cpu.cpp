#include "force_step_cpu.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "../core/lattice.h"
#include "aev_cpu.h"
#include "chain.h"
#include "descriptors.h"
#include "force_step_kernels.h"
#include "guarded.h"
#include "prepared_weights.h"
#include "shares.h"

namespace kinml::cpu {

namespace {

using Index = std::int64_t;

// ---- evaluation ---------------------------------------------------------------------------------

// A structure with more centres is cut into tiles of its own, so that all threads take part in it
// (but for stored descriptors).
constexpr Index kWhole = 48;
// Its gradients are summed in at most this many parts, each in the order of its centres, which are
// then added in order.
constexpr Index kForceParts = 32;

// Where the outputs begin.
template <class T>
struct OutputRows {
  Outputs<T> all;
  Index first_level, n_levels;  // R, levels of the outputs
  Index n_members, count, n_atoms;

  Index rows() const { return n_members * n_levels; }
  Index row(Index member, Index level) const { return member * n_levels + level - first_level; }
  double& energy(Index row, Index chosen) const { return all.energies[row * count + chosen]; }
  // From an atom of the system on.
  T* force(Index row, Index atom) const { return all.forces + 3 * (row * n_atoms + atom); }
  T* virial(Index row, Index atom) const {
    return all.atomic_virials == nullptr ? nullptr
                                         : all.atomic_virials + 9 * (row * n_atoms + atom);
  }
};

// Energies of the atoms of a tile at level k, after the way up.
template <class T>
void write_atomic_energies(const Ascent<T>& ascent, Index k, double* out) {
  const Tile<T>& tile = ascent.tile;
  const TileArrays<T>& arrays = ascent.arrays;
  for (Index p = 0; p < tile.n_rows(); ++p) {
    const T below = k > 0 ? arrays.below(k)[p] : T(0);
    out[tile.placed_atoms()[p]] = static_cast<double>(
        k + 1 < arrays.n_levels ? arrays.below(k + 1)[p]
                                : chain_energy(k, below, arrays.network_outputs(k)[p]));
  }
}

// A tile for the members of an ensemble, and the gradients of all outputs: with_energies(m, ascent),
// with_gradients(descriptors, i, first, g) for the matrices g of the outputs from row `first` on, of
// one or of all.
template <class T, class Energies, class Gradients>
void evaluate_tile(const std::vector<PackedChain<T>>& members, const Tile<T>& tile,
                   TileEnvironments<T>& environments, const OutputRows<T>& out,
                   const Energies& with_energies, const Gradients& with_gradients) {
  const NetworkChain& chain = members[0].chain();
  const bool with_forces = tile.system().has_forces();
  const Index K = chain.n_levels();
  // The forces of all outputs are computed together where that is faster.
  const Index n_outputs = out.rows();
  const bool together = with_forces && !environments.stored() && out.n_members > 1 &&
                        n_outputs >= TileDescriptors<T>::kMany;
  TileArrays<T> arrays(chain, tile, members[0].tile_memory(tile.n_rows()),
                       together ? n_outputs : 0);
  const bool in_place = environments.stored() && K == 1 && !with_forces;
  if (in_place) arrays.inputs = {tile.system().features, arrays.length, tile.placed_atoms()};
  const TileDescriptors<T> descriptors(tile, environments, arrays.length, arrays.stride,
                                       in_place ? nullptr : arrays.features);
  for (Index m = 0; m < out.n_members; ++m) {
    std::vector<T*> gradients = arrays.gradients;
    for (Index k = out.first_level; together && k < K; ++k)
      gradients[k] = arrays.outputs[out.row(m, k)];
    const Ascent<T> ascent =
        ascend(tile, members[m], arrays, with_forces ? Height::gradients : Height::energies, false,
               std::move(gradients));
    with_energies(m, ascent);
    for (Index k = out.first_level; k < K; ++k) {
      const Index row = out.row(m, k);
      if (out.all.atomic_energies != nullptr)
        write_atomic_energies(ascent, k, out.all.atomic_energies + row * out.n_atoms);
      for (Index i = 0; with_forces && !together && i < tile.count(); ++i)
        with_gradients(descriptors, i, row, {ascent.gradients[k]});
    }
  }
  if (!together) return;
  const std::vector<const T*> gradients(arrays.outputs.begin(), arrays.outputs.end());
  for (Index i = 0; i < tile.count(); ++i) with_gradients(descriptors, i, 0, gradients);
}

// Of some whole structures.
template <class T>
void evaluate_whole(const std::vector<PackedChain<T>>& members, const Tile<T>& tile,
                    TileEnvironments<T>& environments, const OutputRows<T>& out) {
  const auto with_energies = [&](Index m, const Ascent<T>& ascent) {
    const Index K = ascent.arrays.n_levels;
    for (Index i = 0; i < tile.count(); ++i)
      for (Index k = out.first_level; k < K; ++k)
        out.energy(out.row(m, k), tile.chosen(i)) = ascent.energies[i * K + k];
  };
  const auto with_gradients = [&](const TileDescriptors<T>& descriptors, Index i, Index first,
                                  const std::vector<const T*>& g) {
    const Index atom = tile.first_atom(i);
    if (g.size() == 1)
      return descriptors.forces(i, g[0], out.force(first, atom), out.virial(first, atom));
    std::vector<T*> forces, virials;
    for (Index row = 0; row < out.rows(); ++row) {
      forces.push_back(out.force(row, atom));
      if (out.all.atomic_virials != nullptr) virials.push_back(out.virial(row, atom));
    }
    descriptors.forces_of_many(i, g, forces, virials);
  };
  evaluate_tile(members, tile, environments, out, with_energies, with_gradients);
}

// A structure that is cut: what its parts give. Its energies are summed as those of a whole one.
template <class T>
class CutStructure {
 public:
  CutStructure(const AevTables<T>& tables, const System<T>& system, Index chosen,
               const NetworkChain& chain, const OutputRows<T>& out)
      : system_(system),
        chosen_(chosen),
        chain_(chain),
        out_(out),
        environments_(tables),
        n_(system.rows(structure())) {
    environments_.set_structure(system, structure());
    n_parts_ = std::min(kForceParts, (n_ + kWhole - 1) / kWhole);
    network_outputs_.resize(out.n_members * chain.n_levels() * n_);
    gradients_.resize(n_parts_ * out.rows() * numbers());
  }
  Index n_parts() const { return n_parts_; }

  void evaluate(const std::vector<PackedChain<T>>& members, const DescriptorSource<T>& source,
                Index part) {
    TileEnvironments<T> environments(source);
    environments.share(environments_);
    const Index begin = part * n_ / n_parts_, end = (part + 1) * n_ / n_parts_;
    const Index n_tiles = (end - begin + kWhole - 1) / kWhole;
    for (Index t = 0; t < n_tiles; ++t) {
      const Range centres{begin + t * (end - begin) / n_tiles,
                          begin + (t + 1) * (end - begin) / n_tiles};
      const Tile<T> tile(system_, {chosen_, chosen_ + 1}, chain_.n_species(), centres);
      evaluate_tile(
          members, tile, environments, out_,
          [&](Index m, const Ascent<T>& ascent) {
            for (Index k = 0; k < chain_.n_levels(); ++k)
              for (Index p = 0; p < tile.n_rows(); ++p)
                network_outputs(m, k)[tile.placed_atoms()[p] - first_atom()] =
                    ascent.arrays.network_outputs(k)[p];
          },
          [&](const TileDescriptors<T>& descriptors, Index i, Index first,
              const std::vector<const T*>& g) {
            if (g.size() == 1)
              return descriptors.add_gradient(i, g[0], gradient(part, first),
                                              out_.virial(first, first_atom()));
            std::vector<T*> gradients, virials;
            for (Index row = 0; row < out_.rows(); ++row) {
              gradients.push_back(gradient(part, row));
              if (out_.all.atomic_virials != nullptr)
                virials.push_back(out_.virial(row, first_atom()));
            }
            descriptors.add_gradients(i, g, gradients, virials);
          });
    }
  }
  void add(int n_threads) const {
    const Index block = 4096, blocks = (numbers() + block - 1) / block;
    const T* const outputs = network_outputs_.data();
    const SpeciesOrder order(chain_.n_species(), n_,
                             [&](Index c) { return system_.species[first_atom() + c]; });
    for (Index m = 0; m < out_.n_members; ++m) {
      double energy = 0;
      for (Index k = 0; k < chain_.n_levels(); ++k) {
        const T* const of_level = outputs + (m * chain_.n_levels() + k) * n_;
        for (const Index row : order.rows) energy += static_cast<double>(of_level[row]);
        if (k >= out_.first_level) out_.energy(out_.row(m, k), chosen_) = energy;
      }
    }
    parallel_for(out_.rows() * blocks, n_threads, [&](Index item) {
      const Index row = item / blocks, begin = item % blocks * block;
      T* const forces = out_.force(row, first_atom());
      for (Index x = begin; x < std::min(numbers(), begin + block); ++x) {
        T sum = 0;
        for (Index part = 0; part < n_parts_; ++part) sum += gradient(part, row)[x];
        forces[x] = T(0) - sum;  // no negative zero
      }
    });
  }

 private:
  Index structure() const { return system_.structure(chosen_); }
  Index first_atom() const { return system_.offsets[structure()]; }
  Index numbers() const { return 3 * system_.atoms(structure()); }
  T* network_outputs(Index member, Index level) {
    return network_outputs_.data() + (member * chain_.n_levels() + level) * n_;
  }
  const T* gradient(Index part, Index row) const {
    return gradients_.data() + (part * out_.rows() + row) * numbers();
  }
  T* gradient(Index part, Index row) {
    return gradients_.data() + (part * out_.rows() + row) * numbers();
  }

  const System<T>& system_;
  Index chosen_;
  const NetworkChain& chain_;
  const OutputRows<T>& out_;
  Environments<T> environments_;
  Index n_, n_parts_;               // centres
  std::vector<T> network_outputs_;  // [members, K, n] f_k
  std::vector<T> gradients_;        // [parts, rows, numbers]
};

// What a thread takes at a time: structures in a tile, or a part of one.
struct Piece {
  Range structures;
  Index cut = -1, part = 0;  // which of the cut ones
};

template <class T>
void evaluate(const std::vector<PackedChain<T>>& members, const DescriptorSource<T>& source,
              const System<T>& system, const OutputRows<T>& out, int n_threads) {
  const NetworkChain& chain = members[0].chain();
  std::vector<Piece> pieces;
  std::vector<std::unique_ptr<CutStructure<T>>> cuts;
  const auto add_whole = [&](Range range) {
    if (range.first == range.last) return;
    for (const Range tile : tiles_of(system, range, system.has_forces())) pieces.push_back({tile});
  };
  Index begin = 0;
  for (Index i = 0; i < system.count() && !system.stored(); ++i) {
    if (count_rows(system, {i, i + 1}) <= kWhole) continue;
    add_whole({begin, i});
    begin = i + 1;
    cuts.push_back(std::make_unique<CutStructure<T>>(*source.tables(), system, i, chain, out));
    for (Index part = 0; part < cuts.back()->n_parts(); ++part)
      pieces.push_back({{i, i + 1}, static_cast<Index>(cuts.size()) - 1, part});
  }
  add_whole({begin, system.count()});
  guarded_parallel_for(static_cast<Index>(pieces.size()), n_threads, [&](Index p) {
    const Piece& piece = pieces[p];
    if (piece.cut >= 0) return cuts[piece.cut]->evaluate(members, source, piece.part);
    TileEnvironments<T> environments(source);
    evaluate_whole(members, Tile<T>(system, piece.structures, chain.n_species()), environments,
                   out);
  });
  for (const auto& cut : cuts) cut->add(n_threads);
}

template <class T>
void add_single_atom_energies(const Model<T>& model, const System<T>& system,
                              const OutputRows<T>& out) {
  const Index n_species = model.networks.n_species();
  for (Index row = 0; row < out.rows(); ++row)
    for (Index i = 0; i < out.count; ++i) {
      const Index s = system.structure(i), begin = system.offsets[s];
      for (Index a = begin; a < begin + system.rows(s); ++a) {
        const double single = model.sae[row * n_species + system.species[a]];
        out.energy(row, i) += single;
        if (out.all.atomic_energies != nullptr)
          out.all.atomic_energies[row * out.n_atoms + a] += single;
      }
    }
}

// The repulsion is the same for all members and levels.
template <class T>
void add_repulsion(const Model<T>& model, const System<T>& system, const OutputRows<T>& out,
                   int n_threads) {
  const AevParameters parameters = model.aev.of_repulsion();
  const bool with_virials = out.all.atomic_virials != nullptr;
  const std::vector<T> ones(system.n_atoms, T(1));
  std::vector<T> energies(system.n_atoms), gradient(3 * system.n_atoms),
      virials(with_virials ? 9 * system.n_atoms : 0);
  aev_forward(parameters, system, energies.data(), n_threads);
  aev_vjp(parameters, system, ones.data(), gradient.data(), n_threads,
          with_virials ? virials.data() : nullptr);
  for (Index row = 0; row < out.rows(); ++row)
    for (Index i = 0; i < out.count; ++i) {
      const Index s = system.structure(i), begin = system.offsets[s], end = system.offsets[s + 1];
      T* const forces = out.all.forces + 3 * row * out.n_atoms;
      double sum = 0;
      for (Index a = begin; a < begin + system.rows(s); ++a) {
        sum += static_cast<double>(energies[a]);
        if (out.all.atomic_energies != nullptr)
          out.all.atomic_energies[row * out.n_atoms + a] += static_cast<double>(energies[a]);
        for (Index x = 0; with_virials && x < 9; ++x) out.virial(row, a)[x] += virials[9 * a + x];
      }
      out.energy(row, i) += sum;
      for (Index x = 3 * begin; x < 3 * end; ++x) forces[x] -= gradient[x];
    }
}

template <class T>
void sum_virials(const System<T>& system, const OutputRows<T>& out) {
  for (Index row = 0; row < out.rows(); ++row)
    for (Index i = 0; i < out.count; ++i) {
      const Index s = system.structure(i), begin = system.offsets[s];
      double* const sum = out.all.virials + 9 * (row * out.count + i);
      std::fill_n(sum, 9, 0.0);
      for (Index a = begin; a < begin + system.rows(s); ++a)
        for (Index x = 0; x < 9; ++x) sum[x] += static_cast<double>(out.virial(row, a)[x]);
    }
}

// ---- gradients ----------------------------------------------------------------------------------

// A loss, as `differentiate` asks for it:
//   kForces                             whether `judge` has to know the forces
//   with_forces()                       whether it is a loss of forces, too
//   on_forces(i)                        whether it depends on the forces of chosen structure i
//   on_virials(k, i)                    whether `judge` has to know its virial at level k
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
    for (const Range range : tiles_of(system, parts[part], loss.with_forces())) {
      bool on_forces = false;
      for (Index i = range.first; i < range.last; ++i) on_forces = on_forces || loss.on_forces(i);
      const Tile<T> tile(system, range, chain.n_species());
      TileArrays<T> arrays(chain, tile, packed.tile_memory(tile.n_rows()));
      const bool in_place = environments.stored() && K == 1 && !on_forces;
      if (in_place) arrays.inputs = {system.features, arrays.length, tile.placed_atoms()};
      const TileDescriptors<T> descriptors(tile, environments, arrays.length, arrays.stride,
                                           in_place ? nullptr : arrays.features);
      const bool forces = on_forces && LossOf::kForces;
      const Height height = !on_forces        ? Height::energies
                            : forces || K > 1 ? Height::gradients
                                              : Height::slopes;
      const auto judge = [&](const Ascent<T>& ascent, Index i, StructureSlopes& slopes) {
        for (Index k = 0; forces && k < K; ++k) {
          T* const virials = loss.on_virials(k, tile.chosen(i)) ? arrays.atomic_virials() : nullptr;
          descriptors.forces(i, ascent.gradients[k], arrays.forces(k), virials);
          double* const sum = slopes.virials.data() + 9 * k;
          std::fill_n(sum, 9, 0.0);
          for (Index c = 0; virials != nullptr && c < tile.rows(i); ++c)
            for (Index x = 0; x < 9; ++x) sum[x] += static_cast<double>(virials[9 * c + x]);
        }
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
  const std::vector<Range> parts = parts_of(system, loss.with_forces());
  if (parts.empty())
    std::fill_n(gradient, model.networks.parameters(), T(0));
  else
    differentiate(model, system, loss, parts, {0, static_cast<Index>(parts.size())}, {gradient},
                  n_threads);
}

// sum e E + sum r F + sum w W, of outputs from first_level on.
template <class T>
struct GivenSlopes {
  static constexpr bool kForces = false;
  const System<T>& system;
  Index first_level;
  const double* e;  // [R, count]
  const T* r;       // [R, n_atoms, 3]
  const double* w;  // [R, count, 3, 3] or null

  bool with_forces() const { return system.has_forces(); }
  bool on_forces(Index) const { return with_forces(); }
  bool on_virials(Index, Index) const { return false; }
  void judge(const double*, Index i, const TileArrays<T>& arrays, StructureSlopes& slopes) const {
    const Index s = system.structure(i), begin = system.offsets[s], end = system.offsets[s + 1];
    for (Index k = 0; k < arrays.n_levels; ++k) {
      const bool is_output = k >= first_level;
      slopes.energies[k] = is_output ? e[(k - first_level) * system.count() + i] : 0.0;
      slopes.on_forces[k] = is_output && system.has_forces();
      if (!slopes.on_forces[k]) continue;
      const T* const of_level = r + (k - first_level) * 3 * system.n_atoms;
      std::copy(of_level + 3 * begin, of_level + 3 * end, arrays.force_slopes(k));
      slopes.on_virials[k] = w != nullptr;
      if (w == nullptr) continue;
      const double* const of_structure = w + 9 * ((k - first_level) * system.count() + i);
      for (Index x = 0; x < 9; ++x) arrays.virial_slopes(k)[x] = static_cast<T>(of_structure[x]);
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
  double* errors;     // [K, count, loss.error_numbers()]

  bool with_forces() const { return loss.with_forces(); }
  Index components(Index i) const { return 3 * system.atoms(system.structure(i)); }
  // A structure without atoms counts, but has nothing to add.
  bool on_forces(Index k, Index i) const {
    const Index s = system.structure(i);
    return (loss.force_weight(k, s) != 0 || loss.stress_weight(k, s) != 0) && components(i) > 0;
  }
  bool on_virials(Index k, Index i) const {
    return loss.stress_weight(k, system.structure(i)) != 0 && components(i) > 0;
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
      ComponentErrors found, of_stress;
      slopes.on_forces[k] = on_forces(k, i);
      slopes.on_virials[k] = on_virials(k, i);
      if (slopes.on_forces[k] && loss.force_weight(k, s) == 0) {
        std::fill_n(arrays.force_slopes(k), n, T(0));
      } else if (slopes.on_forces[k]) {
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
      if (slopes.on_virials[k]) {
        const double volume = cell_volume(system.cells + 9 * s);
        const double slope = loss.stress_slope(k, s, volume);
        for (int x = 0; x < 9; ++x) {
          const double difference =
              loss.stress_difference(k, s, x, slopes.virials[9 * k + x], volume);
          of_stress.add(difference);
          arrays.virial_slopes(k)[x] = static_cast<T>(slope * difference);
        }
      }
      double* const to = errors + loss.error_numbers() * (k * system.count() + i);
      found.write(to);
      if (loss.with_stresses()) of_stress.write(to + 3);
    }
  }
  // L_E, L_F and, with stresses, L_S, when every structure has been judged.
  void sum(double* losses) const {
    std::fill_n(losses, loss.n_terms(), 0.0);
    for (Index k = 0; k < loss.n_levels; ++k) {
      double of_energies = 0, of_forces = 0, of_stresses = 0;
      for (Index i = 0; i < system.count(); ++i) {
        const Index s = system.structure(i), place = k * system.count() + i;
        of_energies += loss.energy_term(k, s, residuals[place]);
        const double* const own = errors + loss.error_numbers() * place;
        of_forces += loss.force_term(k, s, own[1], components(i));
        if (loss.with_stresses()) of_stresses += loss.stress_term(k, s, own[4]);
      }
      losses[0] += loss.energy_mean(k, of_energies);
      losses[1] += loss.force_mean(k, of_forces);
      if (loss.with_stresses()) losses[2] += loss.stress_mean(k, of_stresses);
    }
  }
};

}  // namespace

namespace {

template <class T>
void evaluate_members(const Model<T>& model, const std::vector<PackedChain<T>>& members,
                      const DescriptorSource<T>& source, const System<T>& system,
                      std::int64_t first_level, const Outputs<T>& outputs, int n_threads) {
  if (members.empty()) return;
  const OutputRows<T> out{outputs,         first_level,    model.networks.n_levels() - first_level,
                          model.n_members, system.count(), system.n_atoms};
  evaluate(members, source, system, out, n_threads);
  if (model.sae != nullptr) add_single_atom_energies(model, system, out);
  if (model.aev.repulsion.any()) add_repulsion(model, system, out, n_threads);
  if (outputs.virials != nullptr) sum_virials(system, out);
}

}  // namespace

template <class T>
void energy_forces(const Model<T>& model, const System<T>& system, std::int64_t first_level,
                   const Outputs<T>& outputs, int n_threads, const std::byte* prepared) {
  evaluate_members(model,
                   prepared != nullptr ? prepared_members(model, prepared)
                                       : packed_members(model, system.has_forces(), n_threads),
                   DescriptorSource<T>(model.aev, system), system, first_level, outputs, n_threads);
}

template <class T>
struct PreparedModel<T>::State {
  State(const Model<T>& of, int n_threads)
      : model(of), source(of.aev, System<T>()), members(packed_members(model, true, n_threads)) {}

  Model<T> model;
  DescriptorSource<T> source;
  std::vector<PackedChain<T>> members;  // of `model`, which stays where it is
};

template <class T>
PreparedModel<T>::PreparedModel(const Model<T>& model, int n_threads)
    : state_(new State(model, n_threads)) {}
template <class T>
PreparedModel<T>::~PreparedModel() = default;

template <class T>
void PreparedModel<T>::energy_forces(const System<T>& system, std::int64_t first_level,
                                     const Outputs<T>& outputs, int n_threads) const {
  evaluate_members(state_->model, state_->members, state_->source, system, first_level, outputs,
                   n_threads);
}

template <class T>
void energy_forces_backward(const Model<T>& model, const System<T>& system,
                            std::int64_t first_level, const double* e, const T* r, const double* w,
                            T* gradient, int n_threads) {
  differentiate(model, system, GivenSlopes<T>{system, first_level, e, r, w}, gradient, n_threads);
}

template <class T>
void force_step(const Model<T>& model, const System<T>& system, const Loss& loss, double* losses,
                T* gradient, double* residuals, double* errors, int n_threads) {
  const BatchLoss<T> batch{system, loss, residuals, errors};
  differentiate(model, system, batch, gradient, n_threads);
  batch.sum(losses);
}

template <class T>
std::int64_t message_bytes(const System<T>& system, const Loss& loss, std::int64_t n_weights,
                           std::int64_t n_ranks) {
  const std::vector<Range> parts = parts_of(system, loss.with_forces());
  return message_of<T>(shares_of(parts, n_ranks), loss.n_levels, n_weights, loss.error_numbers())
      .bytes;
}

template <class T>
void force_step_share(const Model<T>& model, const System<T>& system, const Loss& loss,
                      std::int64_t rank, std::int64_t n_ranks, std::byte* message, int n_threads) {
  const std::vector<Range> parts = parts_of(system, loss.with_forces());
  const std::vector<BatchShare> shares = shares_of(parts, n_ranks);
  const Message layout = message_of<T>(shares, model.networks.n_levels(),
                                       model.networks.parameters(), loss.error_numbers());
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
                           layout.component_errors(message)};
  differentiate(model, some, batch, of_some, firsts, nodes, n_threads);
}

template <class T>
void force_step_join(const System<T>& system, const Loss& loss, const std::byte* messages,
                     std::int64_t n_ranks, std::int64_t n_weights, double* losses, T* gradient,
                     double* residuals, double* errors, int n_threads) {
  const std::vector<BatchShare> shares = shares_of(parts_of(system, loss.with_forces()), n_ranks);
  const int numbers = loss.error_numbers();
  const Message layout = message_of<T>(shares, loss.n_levels, n_weights, numbers);
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
      std::copy_n(layout.component_errors(message) + numbers * k * n, numbers * n,
                  errors + numbers * to);
    }
  }
  if (nodes.empty())
    std::fill_n(gradient, n_weights, T(0));
  else
    sum_nodes(nodes, firsts, n_weights, gradient, n_threads);
  BatchLoss<T>{system, loss, residuals, errors}.sum(losses);
}

#define KINML_INSTANTIATE(T)                                                                      \
  template class PreparedModel<T>;                                                                \
  template void energy_forces<T>(const Model<T>&, const System<T>&, std::int64_t,                 \
                                 const Outputs<T>&, int, const std::byte*);                       \
  template void energy_forces_backward<T>(const Model<T>&, const System<T>&, std::int64_t,        \
                                          const double*, const T*, const double*, T*, int);       \
  template void force_step<T>(const Model<T>&, const System<T>&, const Loss&, double*, T*,        \
                              double*, double*, int);                                             \
  template std::int64_t message_bytes<T>(const System<T>&, const Loss&, std::int64_t,             \
                                         std::int64_t);                                           \
                                                                                                  \
  template void force_step_share<T>(const Model<T>&, const System<T>&, const Loss&, std::int64_t, \
                                    std::int64_t, std::byte*, int);                               \
  template void force_step_join<T>(const System<T>&, const Loss&, const std::byte*, std::int64_t, \
                                   std::int64_t, double*, T*, double*, double*, int);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cpu

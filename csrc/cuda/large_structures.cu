#include "large_structures.h"

#include "aev_cuda.h"
#include "chain_group.h"
#include "network_group.h"
#include "networks_cuda.h"
#include "pairs.h"
#include "sort.h"

namespace kinml::cuda {

namespace {

using Index = std::int64_t;

constexpr int kThreads = 256;

// Atoms sorted by species; those without a valid one are behind all others.
struct Order {
  Index *species, *sorted, *atoms;  // [n_atoms] keys; sorted; which atoms these are
  Index* starts;                    // [n_species + 1]
};

// What the passes share.
template <class T>
struct Passes {
  ChainPlan plan;
  System<T> system;
  Order order;
  T* descriptors;  // [n_atoms, D]
  T* packed;       // [n_members, plan.packed]
  T* eps;          // [n_atoms] of the level that is at work, as are the gradients
  T* gradients;    // [n_atoms, D] g

  KINML_HD int length() const { return plan.layers[0].in; }
};

// Keys of the order. An atom without a valid species has no energy.
template <class T>
struct SpeciesKernel {
  static constexpr int kThreads = cuda::kThreads;
  Passes<T> passes;

  KINML_DEVICE void operator()(const Block& block) const {
    each_in_grid(block, passes.system.n_atoms, [&](Index i) {
      const Index kind = passes.system.species[i];
      const bool valid = kind >= 0 && kind < passes.plan.n_species, ghost = is_ghost(i);
      passes.order.species[i] = valid && !ghost ? kind : passes.plan.n_species;
      if (!valid) passes.eps[i] = aev_detail::kNan<T>;
    });
  }
  KINML_DEVICE bool is_ghost(Index i) const {
    const System<T>& system = passes.system;
    if (system.centres == nullptr) return false;
    const Index s = structure_of(system.offsets, system.n_structures, i);
    return s >= 0 && s < system.n_structures && i >= system.offsets[s] + system.centres[s];
  }
};

template <class T>
struct StartsKernel {
  static constexpr int kThreads = 32;
  Passes<T> passes;

  KINML_DEVICE void operator()(const Block& block) const {
    block.each(passes.plan.n_species + 1, [&](int s) {
      passes.order.starts[s] = lower_bound(passes.order.sorted, passes.system.n_atoms, s);
    });
  }
};

// One level of one member for all atoms: from eps and g of the level below to those of its own.
template <class T>
struct LevelKernel {
  static constexpr int kThreads = cuda::kThreads;
  Passes<T> passes;
  int level;
  Index member;
  Index n_tiles, n_blocks;

  struct Memory {
    TileRows rows;
    T *features, *eps, *slopes, *parts;
    HiddenArrays<T> hidden;

    KINML_HD void take(Pieces& pieces, const ChainPlan& plan) {
      rows.take(pieces, kNetworkRows, plan.n_species);
      features = pieces.take<T>(Index(kNetworkRows) * plan.features);
      eps = pieces.take<T>(kNetworkRows);
      slopes = pieces.take<T>(kNetworkRows);
      parts = pieces.take<T>(Index(kMostParts) * kNetworkRows * plan.widest);
      hidden.take(pieces, kNetworkRows, plan.hidden, false);
    }
    KINML_HD static Index bytes(const ChainPlan& plan) {
      Pieces pieces(nullptr);
      Memory memory;
      memory.take(pieces, plan);
      return pieces.taken();
    }
  };

  KINML_DEVICE void operator()(const Block& block) const {
    Pieces pieces(block.memory());
    Memory memory;
    memory.take(pieces, passes.plan);
    for (Index tile = block.index(); tile < n_tiles; tile += n_blocks) {
      const NetworkTileSpan span = network_tile(passes.order.starts, passes.plan.n_species, tile);
      if (span.count > 0) run_tile(block, memory, span);
    }
  }

  KINML_DEVICE void run_tile(const Block& block, Memory& memory,
                             const NetworkTileSpan& span) const {
    const ChainPlan& plan = passes.plan;
    const int length = passes.length(), stride = plan.features;
    const Index* const atoms = passes.order.atoms + span.first;
    const TileNetwork<T> network{&plan, level, passes.packed + member * plan.packed, memory.hidden,
                                 memory.parts};
    const ChainRows<T> chain{span.count, stride, length};
    block.each(plan.n_species + 1,
               [&](int s) { memory.rows.starts[s] = s <= span.species ? 0 : span.count; });
    memory.rows.cut(block, plan.n_species);
    block.each(span.count * stride, [&](int item) {
      const int p = item / stride, d = item % stride;
      memory.features[item] = d < length ? passes.descriptors[atoms[p] * length + d] : T(0);
    });
    if (level > 0) {
      block.each(span.count, [&](int p) { memory.eps[p] = passes.eps[atoms[p]]; });
      chain.set_input(block, memory.eps, memory.features);
    }
    network.forward(block, memory.rows, memory.features, stride, false);
    chain.add_energies(
        block, level > 0 ? memory.eps : nullptr,
        [&](int p) {
          return memory.hidden.values[network.place(p, span.species, network.last(), 0)];
        },
        memory.eps);
    network.backward(block, memory.rows, [](int) { return T(1); }, false);
    T* const g = memory.features;
    network.feature_gradients(block, memory.rows, memory.hidden.deltas, g, stride);
    if (level > 0)
      chain.add_gradients(
          block, [&](int p, int d) { return passes.gradients[atoms[p] * length + d]; }, g,
          memory.slopes);
    block.each(span.count, [&](int p) { passes.eps[atoms[p]] = memory.eps[p]; });
    block.each(span.count * length, [&](int item) {
      const int p = item / length, d = item % length;
      passes.gradients[atoms[p] * length + d] = g[p * stride + d];
    });
  }
};

// Sums eps and single-atom energies over the atoms of each structure.
template <class T>
struct EnergyKernel {
  static constexpr int kThreads = cuda::kThreads;
  Passes<T> passes;
  const double* sae;  // [n_species]; or null
  double* energies;   // [n_structures]
  double* atomic;     // [n_atoms]; or null

  KINML_DEVICE void operator()(const Block& block) const {
    const System<T>& system = passes.system;
    const Index s = block.index();
    const AtomRange range = atoms_of(system, s);
    if (range.begin < 0) {
      block.each(1, [&](int) { energies[s] = aev_detail::kNan<double>; });
      return;
    }
    const auto term = [&](Index row) {
      const Index i = range.begin + row, kind = passes.order.species[i];
      const double shift = sae != nullptr && kind < passes.plan.n_species ? sae[kind] : 0.0;
      const double energy = static_cast<double>(passes.eps[i]) + shift;
      if (atomic != nullptr) atomic[i] = energy;
      return energy;
    };
    sum_in_block(block, system.rows(s), term, reinterpret_cast<double*>(block.memory()),
                 energies[s]);
  }
};

template <class T>
struct NegateKernel {
  static constexpr int kThreads = cuda::kThreads;
  T* numbers;  // [n]
  Index n;

  KINML_DEVICE void operator()(const Block& block) const {
    each_in_grid(block, n, [&](Index i) { numbers[i] = -numbers[i]; });
  }
};

// Cuts a workspace, or counts what it takes.
template <class T>
struct Workspace {
  Passes<T> passes;
  char *cells, *sort, *aev;
  BlockMemory tile;
  Index n_tiles, n_blocks, bytes;

  Workspace(const ChainPlan& plan, const Model<T>& model, const System<T>& system, char* begin)
      : passes{plan, system, {}, nullptr, nullptr, nullptr, nullptr} {
    const Index n = system.n_atoms;
    n_tiles = most_network_tiles(n, plan.n_species);
    n_blocks = n_tiles < kNetworkBlocks ? n_tiles : kNetworkBlocks;
    tile.bytes = LevelKernel<T>::Memory::bytes(plan);
    Pieces pieces(begin);
    for (Index** numbers : {&passes.order.species, &passes.order.sorted, &passes.order.atoms})
      *numbers = pieces.take<Index>(n);
    passes.order.starts = pieces.take<Index>(plan.n_species + 1);
    passes.descriptors = pieces.take<T>(n * passes.length());
    passes.packed = pieces.take<T>(model.n_members * plan.packed);
    passes.eps = pieces.take<T>(n);
    passes.gradients = pieces.take<T>(n * passes.length());
    cells = pieces.take<char>(aev_cells_bytes(n));
    sort = pieces.take<char>(sort_workspace(n));
    const Index forward = aev_workspace(model.aev, AevProduct::forward, system);
    const Index transposed = aev_workspace(model.aev, AevProduct::vjp, system);
    aev = pieces.take<char>(forward > transposed ? forward : transposed);
    const bool fits = tile.bytes <= current_device().block_memory;
    if (!fits) tile.global = pieces.take<char>(n_blocks * tile.bytes);
    bytes = pieces.taken();
  }
};

}  // namespace

template <class T>
std::int64_t large_structures_workspace(const ChainPlan& plan, const Model<T>& model,
                                        const System<T>& system) {
  return Workspace<T>(plan, model, system, nullptr).bytes;
}

template <class T>
void large_energy_forces(const ChainPlan& plan, const Model<T>& model, const System<T>& system,
                         std::int64_t first_level, const Outputs<T>& outputs, char* workspace,
                         Stream stream) {
  const Workspace<T> space(plan, model, system, workspace);
  const Passes<T>& passes = space.passes;
  const Index n = system.n_atoms, n_outputs = plan.n_levels - first_level;
  Cells found;
  if (system.distinct()) found = aev_cells(model.aev, system, space.cells, stream);
  const Cells* const cells = system.distinct() ? &found : nullptr;
  aev_forward(model.aev, system, passes.descriptors, space.aev, stream, cells);
  launch(SpeciesKernel<T>{passes}, blocks_for(n, kThreads), stream);
  sort_keys(passes.order.species, n, passes.order.sorted, passes.order.atoms, space.sort, stream);
  launch(StartsKernel<T>{passes}, 1, stream);
  pack_networks(plan, model.weights, model.n_members, passes.packed, stream);
  for (Index member = 0; member < model.n_members; ++member)
    for (int k = 0; k < plan.n_levels; ++k) {
      launch(LevelKernel<T>{passes, k, member, space.n_tiles, space.n_blocks}, space.n_blocks,
             stream, space.tile);
      if (k < first_level) continue;
      const Index output = member * n_outputs + k - first_level;
      const double* const sae =
          model.sae == nullptr ? nullptr : model.sae + output * plan.n_species;
      double* const atomic =
          outputs.atomic_energies == nullptr ? nullptr : outputs.atomic_energies + output * n;
      launch(EnergyKernel<T>{passes, sae, outputs.energies + output * system.n_structures, atomic},
             system.n_structures, stream, {kThreads * Index(sizeof(double))});
      T* const out = outputs.forces + output * 3 * n;
      T* const virials =
          outputs.atomic_virials == nullptr ? nullptr : outputs.atomic_virials + 9 * output * n;
      aev_vjp(model.aev, system, static_cast<const T*>(passes.gradients), out, space.aev, stream,
              cells, virials);
      launch(NegateKernel<T>{out, 3 * n}, blocks_for(3 * n, kThreads), stream);
    }
}

#define KINML_INSTANTIATE(T)                                                                       \
  template Index large_structures_workspace<T>(const ChainPlan&, const Model<T>&,                  \
                                               const System<T>&);                                  \
  template void large_energy_forces<T>(const ChainPlan&, const Model<T>&, const System<T>&, Index, \
                                       const Outputs<T>&, char*, Stream);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cuda

#include "force_step_cuda.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../core/shares.h"
#include "aev_cuda.h"
#include "aev_group.h"
#include "chain_group.h"
#include "large_structures.h"
#include "network_group.h"
#include "networks_cuda.h"
#include "pairs.h"
#include "repulsion_cuda.h"

namespace kinml::cuda {

namespace {

using Index = std::int64_t;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kForceRows = 32;  // atoms of a tile,
constexpr int kFewRows = 8;  // or down to so many, so that one of small molecules fits on the chip
constexpr int kForceBlocks = 256;  // parts of a batch (core/shares.h), at most
// Neighbours of an atom for which warps may have memory on the chip: of liquids and crystals the
// first of them, of molecules at least as many as they have atoms.
constexpr int kNeighbours[] = {96, 48, 32, 16};
constexpr int kLeastNeighbours = 48;   // in a list of a warp in the workspace,
constexpr int kMostNeighbours = 1024;  // or up to
// Those of a crowd, for which one block at a time has lists; more give NaN.
constexpr int kMostOfCrowd = 32768;
constexpr int kLanes = 8;  // in which the errors of a structure's forces are summed

// Forces of a tile's structures, and virials of their centres: of each output one after the other.
// Forces of the loss are of a place in the batch, not of a structure: it may be named twice.
template <class T>
struct Room {
  T* forces;    // [outputs, atoms, 3]
  T* virials;   // [outputs, atoms, 3, 3] or null
  Index atoms;  // for which there is room

  KINML_HD T* forces_of(Index output) const { return forces + 3 * output * atoms; }
  KINML_HD T* virials_of(Index output) const {
    return virials == nullptr ? nullptr : virials + 9 * output * atoms;
  }
};

// What a tile keeps, in the memory of the block or a piece of the workspace.
template <class T>
struct TileMemory {
  TileRows rows;
  int* firsts;    // [capacity + 1] rows of the structures, in their order
  Index* begins;  // [capacity] first atoms of the structures; -1: do not exist
  int* sizes;     // [capacity] their atoms, with ghosts
  Index* shifts;  // [capacity] from their atoms to places in a room
  int* kinds;     // [capacity] species of the rows of a piece, in the order of the atoms
  int* places;    // [capacity] where they stand in the order of the species
  Index* atoms;   // [capacity] in the order of the species, like all that follows
  int* owners;    // [capacity] structure within the tile
  T* features;    // [capacity, plan.features] a, and eps of the level below
  T* gradients;   // [K, capacity, plan.features] g_k, later (U_k, T_k)
  HiddenArrays<T> hidden;
  T* parts;                 // [kMostParts, capacity, plan.widest], or [kThreads] at least
  T* below;                 // [K, capacity] eps_{k-1}
  T* slopes;                // [K, capacity] c_k
  T* seeds;                 // [capacity]
  double* energies;         // [capacity, K]; later dL/dE
  int* any;                 // [capacity, K] whether the loss depends on the forces
  ComponentErrors* errors;  // [capacity, K, kLanes]
  int* counts;              // [kWarps] neighbours
  int* lists;          // [capacity] where there is room for the neighbours of a row: kOnChip ..
  T* forces;           // [K, capacity, 3] of its own room, for a gradient
  T* virials;          // [K, capacity, 3, 3] likewise; null without cells
  Room<T> room;        // where its forces are
  bool crowd = false;  // whether the lists are those of a crowd

  KINML_HD void take(Pieces& pieces, const ChainPlan& plan, int capacity, bool gradient,
                     bool cells) {
    const int K = plan.n_levels;
    const Index matrix = Index(capacity) * plan.features;
    rows.take(pieces, capacity, plan.n_species);
    firsts = pieces.take<int>(capacity + 1);
    begins = pieces.take<Index>(capacity);
    sizes = pieces.take<int>(capacity);
    shifts = pieces.take<Index>(capacity);
    kinds = pieces.take<int>(capacity);
    places = pieces.take<int>(capacity);
    atoms = pieces.take<Index>(capacity);
    owners = pieces.take<int>(capacity);
    features = pieces.take<T>(matrix);
    gradients = pieces.take<T>(K * matrix);
    hidden.take(pieces, capacity, plan.hidden, gradient, gradient ? K : 1);
    below = pieces.take<T>(K * capacity);
    slopes = pieces.take<T>(K * capacity);
    seeds = pieces.take<T>(capacity);
    energies = pieces.take<double>(capacity * K);
    any = pieces.take<int>(capacity * K);
    errors = pieces.take<ComponentErrors>(gradient ? capacity * K * kLanes : 0);
    counts = pieces.take<int>(kWarps);
    lists = pieces.take<int>(capacity);
    forces = pieces.take<T>(gradient ? 3 * K * capacity : 0);
    virials = gradient && cells ? pieces.take<T>(9 * K * capacity) : nullptr;
  }
  // Behind the tables: where warps on the chip have their memory at other times.
  KINML_HD void take_parts(Pieces& pieces, const ChainPlan& plan, int capacity) {
    const int numbers = kMostParts * capacity * plan.widest;
    parts = pieces.take<T>(numbers > kThreads ? numbers : kThreads);
  }
};

// Memory of one warp for environments of numbers N.
template <class T, class N>
struct WarpMemory {
  Neighbours<N> neighbours;
  TripleScratch<N> triples;
  N* forces;  // [capacity, 3]

  KINML_HD void take(Pieces& pieces, const AevArguments<T>& aev, int capacity, bool distinct) {
    // Dual numbers are for rows alone.
    constexpr bool transposed = std::is_same_v<T, N>;
    neighbours = take_neighbours<N>(pieces, aev.n_species, capacity, distinct, transposed);
    triples = take_triple_scratch<N>(pieces, aev, transposed);
    forces = pieces.take<N>(transposed ? 3 * Index(capacity) : 0);
  }
};
template <class T>
KINML_HD Index warp_bytes(const AevArguments<T>& aev, int capacity, bool distinct, bool gradient) {
  Pieces plain(nullptr), dual(nullptr);
  WarpMemory<T, T> of_plain;
  of_plain.take(plain, aev, capacity, distinct);
  if (!gradient) return plain.taken();
  WarpMemory<T, Dual<T>> of_dual;
  of_dual.take(dual, aev, capacity, distinct);
  return plain.taken() > dual.taken() ? plain.taken() : dual.taken();
}

// Where the memory of blocks and warps is: on the chip from block.memory() on, or in the workspace.
struct Memory {
  int capacity = kForceRows;  // atoms of a tile
  int few = 0;                // neighbours for which warps have memory on the chip
  Index tile_bytes = 0, warp_bytes = 0, list_bytes = 0;
  char* tiles = nullptr;  // of the blocks, if they are not on the chip
  Index chip_warps = 0;   // where warps have theirs: where the parts begin of a tile on the chip
  char* lists = nullptr;  // of the warps, with room for most_neighbours
  int most_neighbours = 0;
  char* crowd = nullptr;  // [kWarps, crowd_bytes] lists of who holds the lock; or null
  Index crowd_bytes = 0;
  int most_of_crowd = 0;
  int* lock = nullptr;  // of those, and of Differentiation::rooms[1]
};
// Where a warp has room for all neighbours of a row.
enum List : int { kOnChip, kInWorkspace, kNowhere };

// How a batch is cut into parts: by its number of structures alone. Part p is that of block
// p - first; structures are counted from the first one of these blocks on.
struct BatchParts {
  Index count = 0;    // structures of the whole batch
  Index n_parts = 0;  // of the whole batch
  Parts of_blocks{};  // those that are computed

  static BatchParts of(Index count) {
    const Index n_parts = count < kForceBlocks ? count : kForceBlocks;
    return {count, n_parts, {0, n_parts}};
  }
  static BatchParts of(Index count, Index rank, Index n_ranks) {
    BatchParts parts = of(count);
    parts.of_blocks = parts_of_rank(parts.n_parts, rank, n_ranks);
    return parts;
  }
  // The first structure of a part of the batch.
  KINML_HD Index begin(Index part) const { return n_parts == 0 ? 0 : count * part / n_parts; }
  KINML_HD Index n_blocks() const { return of_blocks.count(); }
  KINML_HD Index structures() const { return begin(of_blocks.last) - begin(of_blocks.first); }
  // Of the structures that are computed, the first one of a block.
  KINML_HD Index begin_of_block(Index block) const {
    return begin(of_blocks.first + block) - begin(of_blocks.first);
  }
};

// Structures of a batch that a tile holds: so many from `first` on, of n centres together and so
// many atoms.
struct TileStructures {
  Index first;
  int count, n, atoms;
};

// What energy_forces is asked for.
template <class T>
struct Evaluation {
  Index n_members = 1;
  const double* sae = nullptr;  // [n_members, R, n_species]; or null
  Outputs<T> outputs{};
};
// What a gradient is that of; either e and r are given, or the loss.
template <class T>
struct Differentiation {
  const double* e = nullptr;  // [R, count]; null: there is a loss
  const T* r = nullptr;       // [R, n_atoms, 3]
  // [R, count, 3, 3] dL/dvirial or null; of the loss written here
  const double* w = nullptr;
  double* virial_slopes = nullptr;  // the same memory, with stresses in the loss
  Loss loss{};
  double *residuals = nullptr, *errors = nullptr;
  // For structures larger than a tile, forces and then -dL/dF. The second room is for those that
  // the batch has named before: of one block at a time, which holds the lock.
  Room<T> rooms[2] = {};
  T* parts = nullptr;  // [n_blocks, plan.parameters] of the gradient

  KINML_HD bool given() const { return e != nullptr; }
};

template <class T>
struct ForceArguments {
  ChainPlan plan;
  AevArguments<T> aev;
  System<T> system;
  const T* packed;          // [n_members, plan.packed]
  const ImageCell* images;  // [n_structures] of the data set, or null
  Memory memory;
  BatchParts parts;
  int first_level = 0;  // of the outputs, and of e and r
  Evaluation<T> evaluation{};
  Differentiation<T> differentiation{};
};

// What is on the chip the compiler must know to be there, or it is read by slower instructions for
// any address, and its address is computed in 64 bits. So a tile that is on the chip has a kernel of
// its own, warps have their memory there or in a call aside, and everything else is one function.
template <class T, bool kGradient, bool kTileOnChip>
struct ForceKernel : ForceArguments<T> {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  static constexpr double kNoEnergy = std::numeric_limits<double>::quiet_NaN();

  using Arguments = ForceArguments<T>;
  using Arguments::evaluation, Arguments::differentiation;
  using Arguments::memory, Arguments::parts, Arguments::first_level;
  using Arguments::plan, Arguments::aev, Arguments::system, Arguments::packed, Arguments::images;

  using Tile = TileMemory<T>;

  // Of a structure of the batch its first atom, -1 if it does not exist; its rows; its atoms.
  struct Span {
    Index first;
    int n, size;
  };
  KINML_DEVICE Span span(Index i) const {
    const Index s = system.structure(i);
    const AtomRange range = atoms_of(system, s);
    const Index size = range.end - range.begin;
    const Index n = system.centres == nullptr || range.begin < 0 ? size : system.centres[s];
    // Nor does one that has not enough columns of the Jacobian.
    if (system.jacobian != nullptr && 3 * size > system.columns) return {-1, 0, 0};
    if (n < 0 || n > size) return {-1, 0, 0};
    return {range.begin, static_cast<int>(n), static_cast<int>(size)};
  }
  // f(atom, its place in the room) for all atoms of a tile.
  template <class F>
  KINML_DEVICE void each_atom(const Block& block, const Tile& tile,
                              const TileStructures& structures, const F& f) const {
    if (system.centres == nullptr) {
      block.each(structures.n, [&](int row) {
        const Index atom = atom_of(tile, row);
        f(atom, atom + tile.shifts[owner_of(tile, row)]);
      });
      return;
    }
    for (int j = 0; j < structures.count; ++j)
      block.each(tile.sizes[j], [&](int i) {
        const Index atom = tile.begins[j] + i;
        f(atom, atom + tile.shifts[j]);
      });
  }
  KINML_DEVICE int capacity() const { return memory.capacity; }
  KINML_DEVICE int length() const { return plan.layers[0].in; }
  KINML_DEVICE int n_levels() const { return plan.n_levels; }
  KINML_DEVICE int stride() const { return plan.features; }
  KINML_DEVICE ChainRows<T> chain(const Tile& tile) const {
    return {tile.rows.n, stride(), length()};
  }
  KINML_DEVICE Index n_members() const { return kGradient ? 1 : evaluation.n_members; }

  KINML_DEVICE void operator()(const Block& block) const {
    Pieces pieces(tile_memory(block));
    Tile tile;
    tile.take(pieces, plan, capacity(), kGradient, system.cells != nullptr);
    const AevTables<T> tables = aev_tables(block, aev, pieces);
    tile.take_parts(pieces, plan, capacity());
    T* const gradient =
        kGradient ? differentiation.parts + block.index() * Index(plan.parameters) : nullptr;
    if (kGradient) block.each(plan.parameters, [&](int i) { gradient[i] = 0; });
    const Index last = parts.begin_of_block(block.index() + 1);
    bool missing = false;
    Index i = parts.begin_of_block(block.index());
    while (i < last) {
      // As many structures as have room together, or one.
      TileStructures structures{i, 0, 0, 0};
      while (i + structures.count < last && structures.count < capacity()) {
        const Span more = span(i + structures.count);
        if (structures.count > 0 && structures.atoms + more.size > capacity()) break;
        structures.n += more.n;
        structures.atoms += more.size;
        missing = missing || more.first < 0;
        ++structures.count;
      }
      bool locked = set_room(block, tile, structures);
      if (locked) block.enter(memory.lock);
      tile.crowd = false;
      while (!run_tile(block, tile, tables, structures, gradient)) {
        if (!locked) block.enter(memory.lock);
        locked = tile.crowd = true;
      }
      if (locked) block.leave(memory.lock);
      i += structures.count;
    }
    // An optimizer must not step on what is left of a batch.
    if (kGradient && missing) block.each(plan.parameters, [&](int k) { gradient[k] = kNan; });
  }

  KINML_DEVICE char* tile_memory(const Block& block) const {
    if constexpr (kTileOnChip)
      return block.memory();
    else
      return memory.tiles + block.index() * memory.tile_bytes;
  }

  // Says where the forces of a tile are; whether that is the room for which there is a lock.
  KINML_DEVICE bool set_room(const Block& block, Tile& tile,
                             const TileStructures& structures) const {
    if constexpr (!kGradient) {
      tile.room = {evaluation.outputs.forces, evaluation.outputs.atomic_virials, system.n_atoms};
      return false;
    } else {
      const bool large = structures.atoms > capacity();
      const bool again = large && named_before(block, tile, structures.first);
      tile.room =
          large ? differentiation.rooms[again] : Room<T>{tile.forces, tile.virials, capacity()};
      if (differentiation.virial_slopes == nullptr) tile.room.virials = nullptr;
      return again;
    }
  }
  // Whether the structure of a place of the batch is that of an earlier place as well.
  KINML_DEVICE bool named_before(const Block& block, const Tile& tile, Index place) const {
    if (system.chosen == nullptr) return false;
    int* const found = reinterpret_cast<int*>(tile.parts);  // [kThreads]
    const Index s = system.structure(place);
    block.each(kThreads, [&](int item) {
      found[item] = 0;
      for (Index i = item; i < place; i += kThreads) found[item] |= system.structure(i) == s;
    });
    bool any = false;
    for (int item = 0; item < kThreads; ++item) any = any || found[item] != 0;
    return any;
  }

  // False: the tile is a crowd and must be run anew as one; nothing is left of it.
  KINML_DEVICE bool run_tile(const Block& block, Tile& tile, const AevTables<T>& tables,
                             const TileStructures& structures, T* gradient) const {
    const bool on_forces = begin_tile(block, tile, structures);
    const bool given = kGradient && differentiation.given();
    const int n = structures.n, pieces = n == 0 ? 1 : (n + capacity() - 1) / capacity();
    for (int pass = 0; pass < (kGradient ? 2 : 1); ++pass) {
      for (int piece = 0; piece < pieces; ++piece) {
        const bool anew = pass == 0 || pieces > 1;
        if (anew) stage(block, tile, tables, structures, piece * capacity());
        if (pass == 0 && is_crowd(tile)) return false;
        for (Index member = 0; member < n_members(); ++member) {
          if (anew)
            ascend(block, tile, structures, member,
                   {on_forces, on_forces && (!given || n_levels() > 1), pass == 0});
          if (pass > 0 || !on_forces || given) continue;
          for (int k = first_output(); k < n_levels(); ++k)
            add_forces(block, tile, tables, structures, piece * capacity(),
                       tile.gradients + k * matrix(), output(member, k));
        }
        if constexpr (kGradient)
          if (pass > 0) differentiate(block, tile, tables, structures, on_forces, gradient);
      }
      if constexpr (kGradient) {
        if (pass > 0) continue;
        if (given)
          take_given(block, tile, structures, on_forces);
        else
          judge(block, tile, structures);
      }
    }
    if constexpr (!kGradient) finish_energies(block, tile, structures);
    return true;
  }
  KINML_DEVICE bool is_crowd(const Tile& tile) const {
    if (memory.crowd == nullptr || tile.crowd) return false;
    for (int p = 0; p < tile.rows.n; ++p)
      if (tile.lists[p] == kNowhere) return true;
    return false;
  }

  // Where the structures of a tile stand and which of their forces are wanted; energies and forces
  // of zero, to add to. Returns whether any forces are wanted.
  KINML_DEVICE bool begin_tile(const Block& block, Tile& tile,
                               const TileStructures& structures) const {
    const int K = n_levels(), count = structures.count;
    block.each(count + 1, [&](int j) {
      int row = 0;
      for (int i = 0; i < j; ++i) row += span(structures.first + i).n;
      tile.firsts[j] = row;
      if (j == count) return;
      const Span own = span(structures.first + j);
      tile.begins[j] = own.first;
      tile.sizes[j] = own.size;
      int before = 0;
      for (int i = 0; i < j; ++i) before += span(structures.first + i).size;
      tile.shifts[j] = kGradient && structures.atoms <= capacity() ? before - own.first : 0;
    });
    block.each(count * K, [&](int item) {
      const int j = item / K, k = item % K;
      tile.energies[item] = 0;
      tile.any[item] = wanted_forces(structures.first + j, k, tile.sizes[j]);
    });
    bool on_forces = false;
    for (int item = 0; item < count * K; ++item) on_forces = on_forces || tile.any[item] != 0;
    if constexpr (!kGradient)
      block.each(static_cast<int>(n_outputs()) * count,
                 [&](int item) { energy_of(item / count, structures, item % count) = 0; });
    // Forces are added to, piece by piece.
    if (on_forces)
      each_atom(block, tile, structures, [&](Index, Index place) {
        for (Index output = 0; output < n_outputs(); ++output)
          for (int d = 0; d < 3; ++d) tile.room.forces_of(output)[3 * place + d] = 0;
      });
    return on_forces;
  }

  KINML_DEVICE Index matrix() const { return Index(capacity()) * plan.features; }
  // Energies and forces are those of the levels from this on.
  KINML_DEVICE int first_output() const { return kGradient ? 0 : first_level; }
  KINML_DEVICE Index output(Index member, int k) const {
    return member * (n_levels() - first_output()) + k - first_output();
  }
  KINML_DEVICE Index n_outputs() const { return n_members() * (n_levels() - first_output()); }
  KINML_DEVICE double& energy_of(Index output, const TileStructures& structures, int j) const {
    return evaluation.outputs.energies[output * system.count() + structures.first + j];
  }
  KINML_DEVICE int wanted_forces(Index i, int k, int n) const {
    if (!system.has_forces() || n == 0) return 0;
    if constexpr (!kGradient) return 1;
    if (differentiation.given()) return k >= first_level;
    const Index s = system.structure(i);
    return differentiation.loss.force_weight(k, s) != 0 ||
           differentiation.loss.stress_weight(k, s) != 0;
  }
  KINML_DEVICE static int owner_of(const Tile& tile, int row) {
    int j = 0;
    while (row >= tile.firsts[j + 1]) ++j;
    return j;
  }
  // The atom of a row of the tile, in the order of the atoms.
  KINML_DEVICE static Index atom_of(const Tile& tile, int row) {
    const int j = owner_of(tile, row);
    return tile.begins[j] + row - tile.firsts[j];
  }

  // Rows [begin, begin + capacity) of the tile's n atoms: sorted by species, with descriptors.
  KINML_DEVICE void stage(const Block& block, Tile& tile, const AevTables<T>& tables,
                          const TileStructures& structures, int begin) const {
    const int n = structures.n, count = n - begin < capacity() ? n - begin : capacity(),
              S = plan.n_species;
    block.each(count, [&](int row) {
      const Index kind = system.species[atom_of(tile, begin + row)];
      tile.kinds[row] = kind >= 0 && kind < S ? static_cast<int>(kind) : 0;
    });
    block.each(S + 1, [&](int s) {
      int before = 0;
      for (int row = 0; row < count; ++row) before += tile.kinds[row] < s;
      tile.rows.starts[s] = before;
    });
    block.each(count, [&](int row) {
      int place = tile.rows.starts[tile.kinds[row]];
      for (int other = 0; other < row; ++other) place += tile.kinds[other] == tile.kinds[row];
      tile.places[row] = place;
      tile.atoms[place] = atom_of(tile, begin + row);
      tile.owners[place] = owner_of(tile, begin + row);
    });
    tile.rows.cut(block, S);
    if (!system.stored())
      block.each_warp([&](const Warp& warp, int w) {
        for (int p = w; p < count; p += kWarps) {
          const Centre centre = centre_of(tile, structures, p);
          T* const row = tile.features + p * stride();
          // Whether there was no room for the neighbours; then the row is NaN.
          const auto describe = [=, this](WarpMemory<T, T> own) {
            find(warp, tables, centre, static_cast<const T*>(nullptr), nullptr, own.neighbours);
            aev_row(warp, tables, own.neighbours, own.triples, row);
            return own.neighbours.overflown;
          };
          const bool on_chip = memory.few > 0 && !tile.crowd;
          List list = kOnChip;
          if (!on_chip || describe(memory_on_chip<T>(block, w)))
            list = aside(describe, memory_of_list<T>(block, w, tile)) ? kNowhere : kInWorkspace;
          warp.each(1, [&](int) { tile.lists[p] = list; });
        }
      });
    block.each(count * stride(), [&](int item) {
      const int p = item / stride(), d = item % stride();
      T& to = tile.features[item];
      if (d >= length()) {
        to = 0;
      } else if (system.stored()) {
        const Index kind = system.species[tile.atoms[p]];
        to = kind >= 0 && kind < S ? system.features[tile.atoms[p] * length() + d] : kNan;
      }
    });
  }

  // The memory of warp w for the environment of a row.
  template <class N>
  KINML_DEVICE WarpMemory<T, N> warp_memory(char* begin, int room) const {
    Pieces pieces(begin);
    WarpMemory<T, N> result;
    result.take(pieces, aev, room, system.distinct());
    return result;
  }
  template <class N>
  KINML_DEVICE WarpMemory<T, N> memory_on_chip(const Block& block, int w) const {
    return warp_memory<N>(block.memory() + memory.chip_warps + w * memory.warp_bytes, memory.few);
  }
  template <class N>
  KINML_DEVICE WarpMemory<T, N> memory_of_list(const Block& block, int w, const Tile& tile) const {
    const Index place = Index(block.index()) * kWarps + w;
    return tile.crowd
               ? warp_memory<N>(memory.crowd + w * memory.crowd_bytes, memory.most_of_crowd)
               : warp_memory<N>(memory.lists + place * memory.list_bytes, memory.most_neighbours);
  }
  // f(memory of warp w), where there is room for the neighbours of row p.
  template <class N, class F>
  KINML_DEVICE auto with_memory(const Block& block, int w, const Tile& tile, int p,
                                const F& f) const {
    return tile.lists[p] == kOnChip ? f(memory_on_chip<N>(block, w))
                                    : aside(f, memory_of_list<N>(block, w, tile));
  }

  // An atom of a tile, and where its neighbours are looked for.
  struct Centre {
    Index atom, structure;
    AtomRange range;
  };
  KINML_DEVICE Centre centre_of(const Tile& tile, const TileStructures& structures, int p) const {
    const int j = tile.owners[p];
    return {tile.atoms[p], structures.first + j, {tile.begins[j], tile.begins[j] + tile.sizes[j]}};
  }
  // Those of a crystal are found aside: molecules need little of that code.
  template <class N>
  KINML_DEVICE void find(const Warp& warp, const AevTables<T>& tables, const Centre& centre,
                         const T* direction, const double* strain,
                         Neighbours<N>& neighbours) const {
    const Atoms<T> atoms{system.coordinates, direction, system.species, strain};
    if (system.distinct()) {
      find_neighbours(warp, tables, atoms, AtomCandidates{centre.range.begin, centre.range.end},
                      centre.atom, neighbours);
      return;
    }
    const auto find_any = [=, this](Neighbours<N> own) {
      const Candidates candidates = candidates_of(
          system, images, system.structure(centre.structure), centre.range, centre.atom);
      find_neighbours(warp, tables, atoms, candidates, centre.atom, own);
      return own;
    };
    const Neighbours<N> found = aside(find_any, neighbours);
    neighbours.count = found.count;
    neighbours.spoiled = found.spoiled;
    neighbours.overflown = found.overflown;
  }

  KINML_DEVICE TileNetwork<T> network(const Tile& tile, Index member, int k) const {
    return {&plan, k, packed + member * plan.packed, tile.hidden.of(kGradient ? k : 0), tile.parts};
  }

  struct Ascent {
    bool slopes;     // what tangents need
    bool gradients;  // g_k
    bool energies;   // added to those of the tile or the outputs
  };
  // The rows of a piece through the chain of networks, from the lowest level on.
  KINML_DEVICE void ascend(const Block& block, Tile& tile, const TileStructures& structures,
                           Index member, const Ascent& wanted) const {
    const int K = n_levels();
    const ChainRows<T> rows = chain(tile);
    for (int k = 0; k < K; ++k) {
      const TileNetwork<T> net = network(tile, member, k);
      T* const below = tile.below + k * capacity();
      if (k > 0) rows.set_input(block, below, tile.features);
      net.forward(block, tile.rows, tile.features, stride(), kGradient && wanted.slopes);
      const auto value = [&](int p) {
        return net.hidden.values[net.place(p, tile.rows.species_of(p), net.last(), 0)];
      };
      if (wanted.energies)
        // In species order.
        block.each(structures.count, [&](int j) {
          double sum = 0;
          for (int p = 0; p < rows.n; ++p)
            if (tile.owners[p] == j) sum += static_cast<double>(value(p));
          for (int level = k; level < K; ++level) {
            if constexpr (kGradient)
              tile.energies[j * K + level] += sum;
            else if (level >= first_level)
              energy_of(output(member, level), structures, j) += sum;
          }
        });
      if constexpr (!kGradient) {
        double* const atomic = evaluation.outputs.atomic_energies;
        if (atomic != nullptr && wanted.energies && k >= first_level)
          block.each(rows.n, [&](int p) {
            const Index row = output(member, k), kind = tile.rows.species_of(p);
            const T energy = (k > 0 ? below[p] : T(0)) + value(p);
            const double shift =
                evaluation.sae == nullptr ? 0.0 : evaluation.sae[row * plan.n_species + kind];
            atomic[row * system.n_atoms + tile.atoms[p]] = static_cast<double>(energy) + shift;
          });
      }
      if (k + 1 < K) rows.add_energies(block, k > 0 ? below : nullptr, value, below + capacity());
      if (!wanted.slopes) continue;
      net.backward(block, tile.rows, [](int) { return T(1); }, kGradient);
      if (!wanted.gradients) continue;
      T* const g = tile.gradients + k * matrix();
      net.feature_gradients(block, tile.rows, net.hidden.deltas, g, stride());
      if (k > 0)
        rows.add_gradients(
            block, [&](int p, int d) { return (g - matrix())[p * stride() + d]; }, g,
            tile.slopes + k * capacity());
    }
  }

  // Forces of an output -= J^T g of the atoms of a piece of the tile, which begins at row `begin`;
  // virials of the centres are written, from coordinates.
  // g  // [capacity, stride]
  KINML_DEVICE void add_forces(const Block& block, Tile& tile, const AevTables<T>& tables,
                               const TileStructures& structures, int begin, const T* g,
                               Index output) const {
    T* const out = tile.room.forces_of(output);
    T* const virials = tile.room.virials_of(output);
    if (system.stored()) {
      add_stored_forces(block, tile, structures, begin, g, out);
      return;
    }
    const int count = tile.rows.n;
    for (int base = 0; base < count; base += kWarps) {
      block.each_warp([&](const Warp& warp, int w) {
        const int p = base + w;
        if (p >= count) return;
        const Centre centre = centre_of(tile, structures, p);
        const T* const row = g + p * stride();
        T* const virial = virials == nullptr
                              ? nullptr
                              : virials + 9 * (tile.atoms[p] + tile.shifts[tile.owners[p]]);
        const int found = with_memory<T>(block, w, tile, p, [=, this](WarpMemory<T, T> own) {
          find(warp, tables, centre, static_cast<const T*>(nullptr), nullptr, own.neighbours);
          aev_row_transposed(warp, tables, own.neighbours, own.triples, row, own.forces);
          if (virial != nullptr) centre_virial(warp, own.neighbours, own.forces, virial);
          return own.neighbours.count;
        });
        warp.each(1, [&](int) { tile.counts[w] = found; });
      });
      for (int w = 0; w < kWarps && base + w < count; ++w) {
        const int p = base + w;
        const auto add = [&](const WarpMemory<T, T>& own) {
          add_products(block, tile.atoms[p], tile.counts[w], own.neighbours.index, own.forces,
                       T(-1), system.distinct(), out + 3 * tile.shifts[tile.owners[p]]);
        };
        if (tile.lists[p] == kOnChip)
          add(memory_on_chip<T>(block, w));
        else
          add(memory_of_list<T>(block, w, tile));
      }
    }
  }

  // The same from stored Jacobians. The descriptor is divided among the threads.
  // out  // [room.atoms, 3]
  KINML_DEVICE void add_stored_forces(const Block& block, Tile& tile,
                                      const TileStructures& structures, int begin, const T* g,
                                      T* out) const {
    const int room = kMostParts * capacity() * plan.widest, D = length();
    for (int j = 0; j < structures.count; ++j) {
      const int columns = 3 * (tile.firsts[j + 1] - tile.firsts[j]);
      const int low = tile.firsts[j] > begin ? tile.firsts[j] : begin;
      int high = begin + capacity() < structures.n ? begin + capacity() : structures.n;
      high = tile.firsts[j + 1] < high ? tile.firsts[j + 1] : high;
      if (low >= high) continue;
      for (int left = 0; left < columns; left += room) {
        const int width = columns - left < room ? columns - left : room;
        int n_parts = kThreads / width < room / width ? kThreads / width : room / width;
        n_parts = n_parts < 1 ? 1 : n_parts;
        block.each(n_parts * width, [&](int item) {
          const int part = item / width, c = left + item % width;
          T sum = 0;
          for (int row = low; row < high; ++row) {
            const int p = tile.places[row - begin];
            const T* const jacobian = system.jacobian + tile.atoms[p] * D * system.columns + c;
            for (int d = D * part / n_parts; d < D * (part + 1) / n_parts; ++d)
              sum += jacobian[d * system.columns] * g[p * stride() + d];
          }
          tile.parts[item] = sum;
        });
        block.each(width, [&](int item) {
          T sum = 0;
          for (int part = 0; part < n_parts; ++part) sum += tile.parts[part * width + item];
          out[3 * (tile.begins[j] + tile.shifts[j]) + left + item] -= sum;
        });
      }
    }
  }

  KINML_DEVICE void finish_energies(const Block& block, const Tile& tile,
                                    const TileStructures& structures) const {
    const int S = plan.n_species;
    block.each(static_cast<int>(n_outputs()) * structures.count, [&](int item) {
      const int output = item / structures.count, j = item % structures.count;
      const double* const sae = evaluation.sae;
      double& energy = energy_of(output, structures, j);
      if (tile.begins[j] < 0) energy = kNoEnergy;
      for (int row = tile.firsts[j]; sae != nullptr && row < tile.firsts[j + 1]; ++row) {
        const Index kind = system.species[tile.begins[j] + row - tile.firsts[j]];
        if (kind >= 0 && kind < S) energy += sae[output * S + kind];
      }
    });
  }

  // dL/dE in the place of the energies, and -dL/dF in that of the forces: as they are given.
  KINML_DEVICE void take_given(const Block& block, Tile& tile, const TileStructures& structures,
                               bool on_forces) const {
    const int K = n_levels();
    block.each(structures.count * K, [&](int item) {
      const int j = item / K, k = item % K;
      tile.energies[item] =
          k < first_level
              ? 0.0
              : differentiation.e[(k - first_level) * system.count() + structures.first + j];
    });
    if (!on_forces) return;
    each_atom(block, tile, structures, [&](Index atom, Index place) {
      for (int k = first_level; k < K; ++k)
        for (int d = 0; d < 3; ++d)
          tile.room.forces_of(k)[3 * place + d] =
              -differentiation.r[3 * ((k - first_level) * system.n_atoms + atom) + d];
    });
  }

  // The same from the loss; residuals and errors.
  KINML_DEVICE void judge(const Block& block, Tile& tile, const TileStructures& structures) const {
    const int K = n_levels();
    const Loss& loss = differentiation.loss;
    block.each(structures.count * K * kLanes, [&](int item) {
      const int lane = item % kLanes, k = item / kLanes % K, j = item / kLanes / K;
      ComponentErrors errors;
      const Index s = system.structure(structures.first + j);
      if (tile.any[j * K + k] != 0 && loss.force_weight(k, s) == 0) {
        T* const forces = tile.room.forces_of(k) + 3 * (tile.begins[j] + tile.shifts[j]);
        for (int c = lane; c < 3 * tile.sizes[j]; c += kLanes) forces[c] = 0;
      } else if (tile.any[j * K + k] != 0) {
        const int components = 3 * tile.sizes[j];
        const double slope = loss.force_slope(k, s, components);
        T* const forces = tile.room.forces_of(k) + 3 * (tile.begins[j] + tile.shifts[j]);
        const double* const targets = loss.force_targets(k, tile.begins[j]);
        for (int c = lane; c < components; c += kLanes) {
          const double difference = static_cast<double>(forces[c]) - targets[c];
          errors.add(difference);
          forces[c] = static_cast<T>(-(slope * difference));
        }
      }
      tile.errors[item] = errors;
    });
    block.each(structures.count * K, [&](int item) {
      const int j = item / K, k = item % K;
      const Index s = system.structure(structures.first + j);
      const Index i = k * system.count() + structures.first + j;
      ComponentErrors errors;
      for (int lane = 0; lane < kLanes; ++lane) errors.add(tile.errors[item * kLanes + lane]);
      double* const to = differentiation.errors + loss.error_numbers() * i;
      errors.write(to);
      if (loss.with_stresses()) judge_stress(tile, structures, j, k).write(to + 3);
      double& residual = differentiation.residuals[i];
      if (tile.begins[j] < 0) {
        residual = tile.energies[item] = kNoEnergy;
        return;
      }
      residual = loss.energy_residual(k, s, tile.energies[item]);
      tile.energies[item] = loss.energy_slope(k, s, residual);
    });
  }

  // Errors of the stress of a structure of the tile, and dL/dvirial.
  KINML_DEVICE ComponentErrors judge_stress(const Tile& tile, const TileStructures& structures,
                                            int j, int k) const {
    const Loss& loss = differentiation.loss;
    const Index i = structures.first + j, s = system.structure(i);
    double* const slopes = differentiation.virial_slopes + 9 * (k * system.count() + i);
    ComponentErrors errors;
    const bool wanted = tile.begins[j] >= 0 && tile.sizes[j] > 0 && loss.stress_weight(k, s) != 0;
    const double volume = wanted ? cell_volume(system.cells + 9 * s) : 1.0;
    const double slope = wanted ? loss.stress_slope(k, s, volume) : 0.0;
    for (int x = 0; x < 9; ++x) {
      slopes[x] = 0;
      if (!wanted) continue;
      const T* const atomic = tile.room.virials_of(k) + 9 * (tile.begins[j] + tile.shifts[j]);
      double virial = 0;
      for (int row = 0; row < tile.firsts[j + 1] - tile.firsts[j]; ++row)
        virial += static_cast<double>(atomic[9 * row + x]);
      const double difference = loss.stress_difference(k, s, x, virial, volume);
      errors.add(difference);
      slopes[x] = slope * difference;
    }
    return errors;
  }

  // Adds the gradient of the atoms of a piece.
  KINML_DEVICE void differentiate(const Block& block, Tile& tile, const AevTables<T>& tables,
                                  const TileStructures& structures, bool on_forces,
                                  T* gradient) const {
    const int K = n_levels(), count = tile.rows.n;
    const ChainRows<T> rows = chain(tile);
    for (int k = K - 1; on_forces && k >= 0; --k) {
      T* const u = tile.gradients + k * matrix();
      multiply(block, tile, tables, structures, k, u);
      const bool highest = k + 1 == K;
      rows.add_directions(block, highest ? nullptr : u + matrix(),
                          highest ? nullptr : tile.slopes + (k + 1) * capacity(), u);
      if (k > 0) rows.set_direction_of_input(block, u - matrix(), u);
    }
    block.each(count, [&](int p) { tile.seeds[p] = 0; });
    for (int k = K - 1; k >= 0; --k) {
      const TileNetwork<T> net = network(tile, 0, k);
      block.each(count, [&](int p) {
        tile.seeds[p] += static_cast<T>(tile.energies[tile.owners[p] * K + k]);
      });
      if (k > 0) rows.set_input(block, tile.below + k * capacity(), tile.features);
      const auto seed = [&](int p) { return tile.seeds[p]; };
      const T* const v = on_forces ? tile.gradients + k * matrix() : nullptr;
      if (on_forces) {
        net.tangent(block, tile.rows, v, stride());
        net.second_backward(block, tile.rows, seed);
      } else {
        net.backward(block, tile.rows, seed, false);
      }
      net.weight_gradients(block, tile.rows, tile.features, stride(), v, stride(), gradient);
      if (k > 0)
        net.add_input_gradient(block, tile.rows, on_forces ? net.hidden.bends : net.hidden.deltas,
                               length(), tile.seeds);
    }
  }

  // v_k = -J r_k of the atoms of a piece.
  // v  // [capacity, stride]
  KINML_DEVICE void multiply(const Block& block, Tile& tile, const AevTables<T>& tables,
                             const TileStructures& structures, int k, T* v) const {
    const int K = n_levels(), count = tile.rows.n, D = length();
    const T* const direction = tile.room.forces_of(k);
    if (system.stored()) {
      block.each(count * D, [&](int item) {
        const int p = item / D, d = item % D, j = tile.owners[p];
        T sum = 0;
        if (tile.any[j * K + k] != 0) {
          const T* const row = system.jacobian + (tile.atoms[p] * D + d) * system.columns;
          const T* const of_structure = direction + 3 * (tile.begins[j] + tile.shifts[j]);
          for (int c = 0; c < 3 * (tile.firsts[j + 1] - tile.firsts[j]); ++c)
            sum += row[c] * of_structure[c];
        }
        v[p * stride() + d] = sum;
      });
      return;
    }
    block.each_warp([&](const Warp& warp, int w) {
      for (int p = w; p < count; p += kWarps) {
        if (tile.any[tile.owners[p] * K + k] == 0) {
          warp.each(D, [&](int d) { v[p * stride() + d] = 0; });
          continue;
        }
        const Index i = structures.first + tile.owners[p];
        const double* const strains = differentiation.w;
        const double* const strain =
            strains == nullptr ? nullptr : strains + 9 * ((k - first_level) * system.count() + i);
        const T* const along = direction + 3 * tile.shifts[tile.owners[p]];
        const Centre centre = centre_of(tile, structures, p);
        T* const row = v + p * stride();
        with_memory<Dual<T>>(block, w, tile, p, [=, this](WarpMemory<T, Dual<T>> own) {
          find(warp, tables, centre, along, strain, own.neighbours);
          aev_row(warp, tables, own.neighbours, own.triples, row);
        });
      }
    });
  }
};

struct Add {
  template <class T>
  KINML_HD T operator()(T left, T right, int) const {
    return left + right;
  }
};

// The nodes of a process's parts, from the parts: numbers [nodes, n_weights] of its message.
template <class T>
struct NodesKernel {
  static constexpr int kThreads = cuda::kThreads;
  const T* parts;  // [own.count(), n_weights]
  Parts own;
  Index n_parts, n_weights;
  T* nodes;

  KINML_DEVICE void operator()(const Block& block) const {
    block.each(kThreads, [&](int item) {
      const Index i = Index(block.index()) * kThreads + item;
      if (i >= n_weights) return;
      T* to = nodes + i;
      for (Index first = own.first; first < own.last; to += n_weights) {
        const Index end = node_end(first, own, n_parts);
        TreeSum<T> tree;
        for (; first < end; ++first)
          tree.push(parts[(first - own.first) * n_weights + i], 1, Add());
        *to = tree.total(Add());
      }
    });
  }
};

// Residuals and errors of the whole batch, from the messages of all processes.
struct GatherKernel {
  static constexpr int kThreads = cuda::kThreads;
  const std::byte* messages;
  Message layout;
  BatchParts parts;
  Index n_ranks, n_levels;
  int numbers;  // of a row of errors
  double *residuals, *errors;

  KINML_DEVICE void operator()(const Block& block) const {
    block.each(kThreads, [&](int item) {
      const Index i = Index(block.index()) * kThreads + item;  // a structure of the batch
      if (i >= parts.count) return;
      Index rank = 0, first = 0, end = 0;
      for (; rank < n_ranks; ++rank) {
        const Parts own = parts_of_rank(parts.n_parts, rank, n_ranks);
        first = parts.begin(own.first);
        end = parts.begin(own.last);
        if (i < end) break;
      }
      const std::byte* const message = messages + rank * layout.bytes;
      for (Index k = 0; k < n_levels; ++k) {
        const Index from = k * (end - first) + i - first, to = k * parts.count + i;
        residuals[to] = layout.energy_residuals(message)[from];
        for (int e = 0; e < numbers; ++e)
          errors[numbers * to + e] = layout.component_errors(message)[numbers * from + e];
      }
    });
  }
};

// Adds the parts of the gradient, or the nodes that processes sent, and, in the last block, the
// losses of residuals and errors.
template <class T>
struct FinishKernel {
  static constexpr int kThreads = cuda::kThreads;
  const T* parts;             // [n_parts, n_parameters]; null: there are messages
  const std::byte* messages;  // of n_ranks processes
  Message layout;
  Index n_ranks;
  Index n_parts, n_parameters;
  T* gradient;
  System<T> system;
  Loss loss;
  const double *residuals, *errors;
  double* losses;  // [loss.n_terms()]

  KINML_HD Index pieces() const { return blocks_for(n_parameters, kThreads); }

  KINML_DEVICE void operator()(const Block& block) const {
    if (block.index() >= pieces()) {
      sum_losses(block);
      return;
    }
    block.each(kThreads, [&](int item) {
      const Index i = Index(block.index()) * kThreads + item;
      if (i < n_parameters) gradient[i] = n_parts == 0 ? T(0) : sum(i);
    });
  }
  KINML_DEVICE T sum(Index i) const {
    TreeSum<T> tree;
    for (Index part = 0; parts != nullptr && part < n_parts; ++part)
      tree.push(parts[part * n_parameters + i], 1, Add());
    for (Index rank = 0; parts == nullptr && rank < n_ranks; ++rank) {
      const Parts own = parts_of_rank(n_parts, rank, n_ranks);
      Index node = 0;
      for (Index first = own.first; first < own.last; ++node) {
        const Index end = node_end(first, own, n_parts);
        const T* const numbers = layout.gradient<T>(messages + rank * layout.bytes, node);
        tree.push(numbers[i], end - first, Add());
        first = end;
      }
    }
    return tree.total(Add());
  }
  KINML_DEVICE void sum_losses(const Block& block) const {
    double* const partial = reinterpret_cast<double*>(block.memory());  // [3, kThreads]
    block.each(kThreads, [&](int lane) {
      double of_energies = 0, of_forces = 0, of_stresses = 0;
      for (Index k = 0; k < loss.n_levels; ++k) {
        double energies = 0, forces = 0, stresses = 0;
        for (Index i = lane; i < system.count(); i += kThreads) {
          const Index s = system.structure(i);
          const double residual = residuals[k * system.count() + i];
          if (s < 0 || s >= system.n_structures) {
            energies += residual;  // NaN
            continue;
          }
          energies += loss.energy_term(k, s, residual);
          const Index components = 3 * system.atoms(s);
          const double* const own = errors + loss.error_numbers() * (k * system.count() + i);
          if (system.has_forces()) forces += loss.force_term(k, s, own[1], components);
          if (loss.with_stresses()) stresses += loss.stress_term(k, s, own[4]);
        }
        of_energies += loss.energy_mean(k, energies);
        of_forces += loss.force_mean(k, forces);
        if (loss.with_stresses()) of_stresses += loss.stress_mean(k, stresses);
      }
      partial[lane] = of_energies;
      partial[kThreads + lane] = of_forces;
      partial[2 * kThreads + lane] = of_stresses;
    });
    block.each(loss.n_terms(), [&](int which) {
      double sum = 0;
      for (int lane = 0; lane < kThreads; ++lane) sum += partial[which * kThreads + lane];
      losses[which] = sum;
    });
  }
  KINML_HD static Index memory() { return 3 * kThreads * Index(sizeof(double)); }
};

// ---- memory ------------------------------------------------------------------------------------

template <class T>
AevArguments<T> arguments_of(const Model<T>& model, const System<T>& system) {
  return system.stored() ? AevArguments<T>{} : aev_arguments<T>(model.aev);
}

// Cuts a workspace, or counts what it takes.
template <class T>
struct Workspace {
  T* packed;
  T* parts = nullptr;
  Room<T> rooms[2] = {};
  // For stresses in the loss, of which the step finds out here; likewise the rooms' virials.
  double* virial_slopes = nullptr;
  Memory memory;
  std::int64_t on_chip = 0;  // bytes of a block
  bool tile_on_chip = false;
  BatchParts batch;
  ImageCell* images = nullptr;  // [n_structures] if there are any
  std::int64_t bytes;

  Workspace(const ChainPlan& plan, const Model<T>& model, const System<T>& system, bool gradient,
            char* begin)
      : Workspace(plan, model, system, BatchParts::of(system.count()), gradient, begin) {}

  Workspace(const ChainPlan& plan, const Model<T>& model, const System<T>& system,
            const BatchParts& of_batch, bool gradient, char* begin)
      : batch(of_batch) {
    const AevArguments<T> aev = arguments_of(model, system);
    const Index n_blocks = batch.n_blocks();
    Pieces pieces(begin);
    packed = pieces.take<T>(model.n_members * plan.packed);
    if (gradient) {
      parts = pieces.take<T>(n_blocks * plan.parameters);
      const Index atoms = plan.n_levels * system.n_atoms;
      for (Room<T>& room : rooms) {
        if (&room == &rooms[1] && system.chosen == nullptr) break;
        room = {pieces.take<T>(3 * atoms), nullptr, system.n_atoms};
        if (system.cells != nullptr) room.virials = pieces.take<T>(9 * atoms);
      }
      if (system.cells != nullptr)
        virial_slopes = pieces.take<double>(plan.n_levels * 9 * system.count());
    }
    if (!system.stored()) {
      memory.most_neighbours =
          static_cast<int>(!system.distinct() ? kMostNeighbours
                                              : std::clamp<Index>(system.n_atoms, kLeastNeighbours,
                                                                  kMostNeighbours));
      memory.list_bytes = warp_bytes(aev, memory.most_neighbours, system.distinct(), gradient);
    }
    choose_sizes(plan, aev, system, gradient);
    if (!tile_on_chip) memory.tiles = pieces.take<char>(n_blocks * memory.tile_bytes);
    // Lists of many neighbours are for structures of many atoms, or images.
    if (system.n_atoms > memory.few || (!system.stored() && !system.distinct()))
      memory.lists = pieces.take<char>(n_blocks * kWarps * memory.list_bytes);
    memory.lock = pieces.take<int>(1);
    if (!system.stored() && (!system.distinct() || system.n_atoms > kMostNeighbours)) {
      memory.most_of_crowd = system.distinct() && system.n_atoms < kMostOfCrowd
                                 ? static_cast<int>(system.n_atoms)
                                 : kMostOfCrowd;
      memory.crowd_bytes = warp_bytes(aev, memory.most_of_crowd, system.distinct(), gradient);
      memory.crowd = pieces.take<char>(kWarps * memory.crowd_bytes);
    }
    if (has_images(system)) images = pieces.take<ImageCell>(system.n_structures);
    bytes = pieces.taken();
  }

 private:
  // Atoms of a tile and neighbours of a warp: the first that fits on the chip, or those of which at
  // least the warps' memory does. By the data set, so that all processes have the same.
  void choose_sizes(const ChainPlan& plan, const AevArguments<T>& aev, const System<T>& system,
                    bool gradient) {
    const auto larger_than = [&](Index atoms) {
      return system.n_atoms > atoms * system.n_structures;
    };
    const bool many = !system.distinct() || larger_than(kNeighbours[1] + 1);
    for (const bool with_tile : {true, false})
      for (int rows = kForceRows; rows >= (with_tile ? kFewRows : kForceRows); rows -= kVector) {
        // Structures that are cut into pieces are computed twice.
        if (rows < kForceRows && larger_than(rows)) break;
        for (const int few : kNeighbours) {
          const bool most = few == kNeighbours[0];
          if (most ? !many : with_tile && (many || larger_than(few + 1))) continue;
          if (fits(plan, aev, system, gradient, with_tile, rows, few)) return;
        }
      }
    fits(plan, aev, system, gradient, false, kForceRows, 0);
  }
  // Notes what is where with these sizes.
  bool fits(const ChainPlan& plan, const AevArguments<T>& aev, const System<T>& system,
            bool gradient, bool with_tile, int rows, int few) {
    Pieces pieces(nullptr);
    TileMemory<T> tile;
    tile.take(pieces, plan, rows, gradient, system.cells != nullptr);
    take_aev_tables(pieces, aev);
    const Index before_parts = pieces.taken();
    tile.take_parts(pieces, plan, rows);
    memory.capacity = rows;
    memory.few = few;
    memory.tile_bytes = pieces.taken();
    memory.warp_bytes =
        system.stored() || few == 0 ? 0 : warp_bytes(aev, few, system.distinct(), gradient);
    memory.chip_warps = with_tile ? before_parts : 0;
    const Index warps = memory.chip_warps + kWarps * memory.warp_bytes;
    tile_on_chip = with_tile;
    on_chip = with_tile ? std::max(memory.tile_bytes, warps) : warps;
    return on_chip <= current_device().block_memory;
  }
};

template <class T>
ForceArguments<T> force_arguments(const ChainPlan& plan, const Model<T>& model,
                                  const System<T>& system, const Workspace<T>& space) {
  ForceArguments<T> arguments{
      plan,       arguments_of(model, system), system, space.packed, space.images, space.memory,
      space.batch};
  for (int i = 0; i < 2; ++i) arguments.differentiation.rooms[i] = space.rooms[i];
  arguments.differentiation.parts = space.parts;
  return arguments;
}

template <class T>
void set_loss(ForceArguments<T>& arguments, const Workspace<T>& space, const Loss& loss) {
  arguments.differentiation.loss = loss;
  if (!loss.with_stresses()) return;
  arguments.differentiation.w = arguments.differentiation.virial_slopes = space.virial_slopes;
}

// The kernel, behind what it needs of others.
template <bool kGradient, class T>
void launch_force_kernel(const ForceArguments<T>& arguments, const Model<T>& model,
                         const Workspace<T>& space, Stream stream) {
  pack_networks(arguments.plan, model.weights, kGradient ? 1 : model.n_members, space.packed,
                stream, space.memory.lock);
  if (space.images != nullptr) prepare_images(model.aev, arguments.system, space.images, stream);
  if (space.tile_on_chip)
    launch(ForceKernel<T, kGradient, true>{arguments}, space.batch.n_blocks(), stream,
           space.on_chip);
  else
    launch(ForceKernel<T, kGradient, false>{arguments}, space.batch.n_blocks(), stream,
           space.on_chip);
}

template <class T>
Message message_of(Index count, Index n_levels, Index n_weights, Index n_ranks, int error_numbers) {
  Index nodes = 0, structures = 0;
  for (Index rank = 0; rank < n_ranks; ++rank) {
    const BatchParts parts = BatchParts::of(count, rank, n_ranks);
    const Index own = count_nodes(parts.of_blocks, parts.n_parts);
    nodes = own > nodes ? own : nodes;
    structures = parts.structures() > structures ? parts.structures() : structures;
  }
  return Message::of(nodes, structures, n_levels, n_weights, sizeof(T), error_numbers);
}

// The structures of a batch that are one process's.
template <class T>
System<T> of_share(const System<T>& system, const BatchParts& parts) {
  System<T> some = system;
  some.chosen = system.chosen + parts.begin(parts.of_blocks.first);
  some.n_chosen = parts.structures();
  return some;
}

}  // namespace

namespace {

// What energy_forces takes beside the repulsion, a multiple of 16 bytes.
template <class T>
Index networks_workspace(const ChainPlan& plan, const Model<T>& model, const System<T>& system) {
  const Index bytes = structures_are_large(system)
                          ? large_structures_workspace(plan, model, system)
                          : Workspace<T>(plan, model, system, false, nullptr).bytes;
  return (bytes + 15) / 16 * 16;
}

}  // namespace

template <class T>
std::int64_t energy_forces_workspace(const Model<T>& model, const System<T>& system) {
  const Index bytes = networks_workspace(plan_chain(model.networks), model, system);
  return bytes + (model.aev.repulsion.any() ? repulsion_workspace(model.aev, system) : 0);
}
template <class T>
std::int64_t force_step_workspace(const Model<T>& model, const System<T>& system) {
  return Workspace<T>(plan_chain(model.networks), model, system, true, nullptr).bytes;
}
template <class T>
std::int64_t force_step_share_workspace(const Model<T>& model, const System<T>& system,
                                        std::int64_t rank, std::int64_t n_ranks) {
  const BatchParts parts = BatchParts::of(system.count(), rank, n_ranks);
  const ChainPlan plan = plan_chain(model.networks);
  return Workspace<T>(plan, model, of_share(system, parts), parts, true, nullptr).bytes;
}

template <class T>
void energy_forces(const Model<T>& model, const System<T>& system, std::int64_t first_level,
                   const Outputs<T>& outputs, char* workspace, Stream stream) {
  const ChainPlan plan = plan_chain(model.networks);
  const auto sum = [&] {
    if (model.aev.repulsion.any())
      add_repulsion(model.aev, system, model.n_members * (plan.n_levels - first_level), outputs,
                    workspace + networks_workspace(plan, model, system), stream);
    if (outputs.virials != nullptr)
      sum_virials(system, model.n_members * (plan.n_levels - first_level),
                  static_cast<const T*>(outputs.atomic_virials), outputs.virials, stream);
  };
  if (structures_are_large(system)) {
    large_energy_forces(plan, model, system, first_level, outputs, workspace, stream);
    return sum();
  }
  const Workspace<T> space(plan, model, system, false, workspace);
  ForceArguments<T> arguments = force_arguments(plan, model, system, space);
  arguments.first_level = static_cast<int>(first_level);
  arguments.evaluation = {model.n_members, model.sae, outputs};
  launch_force_kernel<false>(arguments, model, space, stream);
  sum();
}

template <class T>
void energy_forces_backward(const Model<T>& model, const System<T>& system,
                            std::int64_t first_level, const double* e, const T* r, const double* w,
                            T* gradient, char* workspace, Stream stream) {
  const ChainPlan plan = plan_chain(model.networks);
  const Workspace<T> space(plan, model, system, true, workspace);
  ForceArguments<T> arguments = force_arguments(plan, model, system, space);
  arguments.first_level = static_cast<int>(first_level);
  arguments.differentiation.e = e;
  arguments.differentiation.r = r;
  arguments.differentiation.w = w;
  launch_force_kernel<true>(arguments, model, space, stream);
  sum_parts(static_cast<const T*>(space.parts), space.batch.n_blocks(), Index(plan.parameters),
            gradient, stream);
}

template <class T>
void force_step(const Model<T>& model, const System<T>& system, const Loss& loss, double* losses,
                T* gradient, double* residuals, double* errors, char* workspace, Stream stream) {
  const ChainPlan plan = plan_chain(model.networks);
  const Workspace<T> space(plan, model, system, true, workspace);
  ForceArguments<T> arguments = force_arguments(plan, model, system, space);
  set_loss(arguments, space, loss);
  arguments.differentiation.residuals = residuals;
  arguments.differentiation.errors = errors;
  launch_force_kernel<true>(arguments, model, space, stream);
  const FinishKernel<T> finish{.parts = space.parts,
                               .messages = nullptr,
                               .layout = {},
                               .n_ranks = 1,
                               .n_parts = space.batch.n_parts,
                               .n_parameters = plan.parameters,
                               .gradient = gradient,
                               .system = system,
                               .loss = loss,
                               .residuals = residuals,
                               .errors = errors,
                               .losses = losses};
  launch(finish, finish.pieces() + 1, stream, finish.memory());
}

template <class T>
std::int64_t message_bytes(const System<T>& system, const Loss& loss, std::int64_t n_weights,
                           std::int64_t n_ranks) {
  return message_of<T>(system.count(), loss.n_levels, n_weights, n_ranks, loss.error_numbers())
      .bytes;
}

template <class T>
void force_step_share(const Model<T>& model, const System<T>& system, const Loss& loss,
                      std::int64_t rank, std::int64_t n_ranks, std::byte* message, char* workspace,
                      Stream stream) {
  const BatchParts parts = BatchParts::of(system.count(), rank, n_ranks);
  if (parts.n_blocks() == 0) return;
  const ChainPlan plan = plan_chain(model.networks);
  const Message layout =
      message_of<T>(system.count(), plan.n_levels, plan.parameters, n_ranks, loss.error_numbers());
  const System<T> some = of_share(system, parts);
  const Workspace<T> space(plan, model, some, parts, true, workspace);
  ForceArguments<T> arguments = force_arguments(plan, model, some, space);
  set_loss(arguments, space, loss);
  arguments.differentiation.residuals = layout.energy_residuals(message);
  arguments.differentiation.errors = layout.component_errors(message);
  launch_force_kernel<true>(arguments, model, space, stream);
  launch(NodesKernel<T>{space.parts, parts.of_blocks, parts.n_parts, plan.parameters,
                        layout.gradient<T>(message, 0)},
         blocks_for(plan.parameters, kThreads), stream);
}

template <class T>
void force_step_join(const System<T>& system, const Loss& loss, const std::byte* messages,
                     std::int64_t n_ranks, std::int64_t n_weights, double* losses, T* gradient,
                     double* residuals, double* errors, Stream stream) {
  const BatchParts parts = BatchParts::of(system.count());
  const Message layout =
      message_of<T>(system.count(), loss.n_levels, n_weights, n_ranks, loss.error_numbers());
  if (parts.count > 0)
    launch(GatherKernel{messages, layout, parts, n_ranks, loss.n_levels, loss.error_numbers(),
                        residuals, errors},
           blocks_for(parts.count, kThreads), stream);
  const FinishKernel<T> finish{.parts = nullptr,
                               .messages = messages,
                               .layout = layout,
                               .n_ranks = n_ranks,
                               .n_parts = parts.n_parts,
                               .n_parameters = n_weights,
                               .gradient = gradient,
                               .system = system,
                               .loss = loss,
                               .residuals = residuals,
                               .errors = errors,
                               .losses = losses};
  launch(finish, finish.pieces() + 1, stream, finish.memory());
}

#define KINML_INSTANTIATE(T)                                                                       \
  template Index energy_forces_workspace<T>(const Model<T>&, const System<T>&);                    \
  template Index force_step_workspace<T>(const Model<T>&, const System<T>&);                       \
  template void energy_forces<T>(const Model<T>&, const System<T>&, Index, const Outputs<T>&,      \
                                 char*, Stream);                                                   \
  template void energy_forces_backward<T>(const Model<T>&, const System<T>&, Index, const double*, \
                                          const T*, const double*, T*, char*, Stream);             \
  template void force_step<T>(const Model<T>&, const System<T>&, const Loss&, double*, T*,         \
                              double*, double*, char*, Stream);                                    \
  template Index message_bytes<T>(const System<T>&, const Loss&, Index, Index);                    \
  template Index force_step_share_workspace<T>(const Model<T>&, const System<T>&, Index, Index);   \
  template void force_step_share<T>(const Model<T>&, const System<T>&, const Loss&, Index, Index,  \
                                    std::byte*, char*, Stream);                                    \
  template void force_step_join<T>(const System<T>&, const Loss&, const std::byte*, Index, Index,  \
                                   double*, T*, double*, double*, Stream);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cuda

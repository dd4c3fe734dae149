#include "force_step_cuda.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "aev_group.h"
#include "network_group.h"

namespace kinml::cuda {

namespace {

using Index = std::int64_t;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kForceRows = 32;         // atoms of a tile
constexpr int kForceStructures = 32;   // structures of a tile, at most
constexpr int kForceBlocks = 256;      // at most: their weight gradients are summed in order
constexpr int kFewNeighbours = 48;     // for which there is memory on the chip
constexpr int kMostNeighbours = 1024;  // within the cutoff of an atom; more give NaN
constexpr int kLanes = 8;              // in which the errors of a structure's forces are summed

// What a tile keeps, in the memory of the block or a piece of the workspace.
template <class T>
struct TileMemory {
  TileRows rows;
  int* firsts;    // [kForceStructures + 1] rows of the structures, in their order
  Index* begins;  // [kForceStructures] first atoms of the structures; -1: not there
  int* kinds;     // [kForceRows] species of the rows of a piece, in the order of the atoms
  int* places;    // [kForceRows] where they stand in the order of the species
  Index* atoms;   // [kForceRows] in the order of the species, like all that follows
  int* owners;    // [kForceRows] structure within the tile
  T* features;    // [kForceRows, plan.features] a, and eps of the level below
  T* gradients;   // [K, kForceRows, plan.features] g_k, later (U_k, T_k)
  HiddenArrays<T> hidden;
  T* parts;          // [kMostParts, kForceRows, plan.widest]
  T* below;          // [K, kForceRows] eps_{k-1}
  T* slopes;         // [K, kForceRows] c_k
  T* seeds;          // [kForceRows]
  double* energies;  // [kForceStructures, K]; later dL/dE
  int* any;          // [kForceStructures, K] whether the loss depends on the forces
  double* errors;    // [kForceStructures, K, kLanes, 3]
  int* counts;       // [kWarps] neighbours

  KINML_HD void take(Pieces& pieces, const ChainPlan& plan, bool gradient) {
    const int K = plan.n_levels;
    const Index matrix = Index(kForceRows) * plan.features;
    rows.take(pieces, kForceRows, plan.n_species);
    firsts = pieces.take<int>(kForceStructures + 1);
    begins = pieces.take<Index>(kForceStructures);
    kinds = pieces.take<int>(kForceRows);
    places = pieces.take<int>(kForceRows);
    atoms = pieces.take<Index>(kForceRows);
    owners = pieces.take<int>(kForceRows);
    features = pieces.take<T>(matrix);
    gradients = pieces.take<T>(K * matrix);
    hidden.take(pieces, kForceRows, plan.hidden, gradient, gradient ? K : 1);
    parts = pieces.take<T>(Index(kMostParts) * kForceRows * plan.widest);
    below = pieces.take<T>(K * kForceRows);
    slopes = pieces.take<T>(K * kForceRows);
    seeds = pieces.take<T>(kForceRows);
    energies = pieces.take<double>(kForceStructures * K);
    any = pieces.take<int>(kForceStructures * K);
    errors = pieces.take<double>(gradient ? kForceStructures * K * kLanes * 3 : 0);
    counts = pieces.take<int>(kWarps);
  }
};

// Memory of one warp for environments of numbers N.
template <class T, class N>
struct WarpMemory {
  Neighbours<N> neighbours;
  TripleScratch<N> triples;
  N* forces;  // [capacity, 3]

  KINML_HD void take(Pieces& pieces, const AevArguments<T>& aev, int capacity) {
    // Dual numbers are for rows alone.
    constexpr bool transposed = std::is_same_v<T, N>;
    neighbours = take_neighbours<N>(pieces, aev.n_species, capacity, transposed);
    triples = take_triple_scratch<N>(pieces, aev, transposed);
    forces = pieces.take<N>(transposed ? 3 * Index(capacity) : 0);
  }
};
template <class T>
KINML_HD Index warp_bytes(const AevArguments<T>& aev, int capacity, bool gradient) {
  Pieces plain(nullptr), dual(nullptr);
  WarpMemory<T, T> of_plain;
  of_plain.take(plain, aev, capacity);
  if (!gradient) return plain.taken();
  WarpMemory<T, Dual<T>> of_dual;
  of_dual.take(dual, aev, capacity);
  return plain.taken() > dual.taken() ? plain.taken() : dual.taken();
}

// Where the memory of blocks and warps is: on the chip from block.memory() on, or in the workspace.
struct Memory {
  Index tile_bytes = 0, warp_bytes = 0, list_bytes = 0;
  char* tiles = nullptr;  // of the blocks; null: on the chip
  char* warps = nullptr;  // of the warps; null: on the chip, behind the tile if that is there
  char* lists = nullptr;  // of the warps, with room for kMostNeighbours
  int most_neighbours = 0;
};

template <class T, bool kGradient>
struct ForceKernel {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  static constexpr double kNoEnergy = std::numeric_limits<double>::quiet_NaN();
  ChainPlan plan;
  AevArguments<T> aev;
  ForceBatch<T> batch;
  const T* packed;  // [n_members, plan.packed]
  Memory memory;
  Index n_blocks = 0;
  int first_level = 0;  // of the outputs of energy_forces
  // energy_forces
  Index n_members = 1;
  const double* sae = nullptr;
  double* energies = nullptr;
  T* forces = nullptr;
  // The gradient; either e and r are given ...
  const double* e = nullptr;
  const T* r = nullptr;
  // ... or the loss, with the numbers of structures [2, K] that count in it.
  ForceLoss loss{};
  const double* counts = nullptr;
  T* minus_r = nullptr;  // [K, n_atoms, 3] forces, then -dL/dF
  T* parts = nullptr;    // [n_blocks, plan.parameters]
  double *residuals = nullptr, *errors = nullptr;

  using Tile = TileMemory<T>;

  // Atoms of a structure of the batch; first = -1: it is not there.
  struct Span {
    Index first;
    int n;
  };
  KINML_DEVICE Index structure(Index i) const {
    return batch.structures == nullptr ? i : batch.structures[i];
  }
  KINML_DEVICE Span span(Index i) const {
    const AtomRange range =
        atoms_of(batch.offsets, batch.n_structures, batch.n_atoms, structure(i));
    const Index n = range.end - range.begin;
    // Nor is one that has not enough columns of the Jacobian.
    if (batch.jacobian != nullptr && 3 * n > batch.columns) return {-1, 0};
    return {range.begin, static_cast<int>(n)};
  }
  KINML_DEVICE bool has_forces() const {
    return batch.features == nullptr || batch.jacobian != nullptr;
  }
  KINML_DEVICE int length() const { return plan.layers[0].in; }
  KINML_DEVICE int n_levels() const { return plan.n_levels; }
  KINML_DEVICE int stride() const { return plan.features; }

  KINML_DEVICE void operator()(const Block& block) const {
    Pieces pieces(memory.tiles == nullptr ? block.memory()
                                          : memory.tiles + block.index() * memory.tile_bytes);
    Tile tile;
    tile.take(pieces, plan, kGradient);
    const AevTables<T> tables = aev_tables(block, aev, pieces);
    T* const gradient = kGradient ? parts + block.index() * Index(plan.parameters) : nullptr;
    if (kGradient) block.each(plan.parameters, [&](int i) { gradient[i] = 0; });
    const Index last = batch.count * (block.index() + 1) / n_blocks;
    Index i = batch.count * block.index() / n_blocks;
    while (i < last) {
      // As many structures as have room together, or one.
      int taken = 0, n = 0;
      while (i + taken < last && taken < kForceStructures) {
        const int more = span(i + taken).n;
        if (taken > 0 && n + more > kForceRows) break;
        n += more;
        ++taken;
      }
      run_tile(block, tile, tables, i, taken, n, gradient);
      i += taken;
    }
  }

  KINML_DEVICE void run_tile(const Block& block, Tile& tile, const AevTables<T>& tables,
                             Index first, int taken, int n, T* gradient) const {
    const int K = n_levels(), pieces = n == 0 ? 1 : (n + kForceRows - 1) / kForceRows;
    block.each(taken + 1, [&](int j) {
      int row = 0;
      for (int i = 0; i < j; ++i) row += span(first + i).n;
      tile.firsts[j] = row;
      if (j < taken) tile.begins[j] = span(first + j).first;
    });
    block.each(taken * K, [&](int item) {
      const int j = item / K, k = item % K;
      tile.energies[item] = 0;
      tile.any[item] = wanted_forces(first + j, k, tile.firsts[j + 1] - tile.firsts[j]);
    });
    bool on_forces = false;
    for (int item = 0; item < taken * K; ++item) on_forces = on_forces || tile.any[item] != 0;
    if constexpr (!kGradient) {
      const int outputs = K - first_level;
      block.each(static_cast<int>(n_members) * outputs * taken, [&](int item) {
        energies[(item / taken) * batch.count + first + item % taken] = 0;
      });
    }
    // Forces are added to, piece by piece.
    if (on_forces)
      block.each(n, [&](int row) {
        const int j = owner_of(tile, row);
        const Index atom = tile.begins[j] + row - tile.firsts[j];
        for (Index output = 0; output < n_outputs(); ++output)
          for (int d = 0; d < 3; ++d) forces_of(output)[3 * atom + d] = 0;
      });
    const bool given = kGradient && e != nullptr;
    for (int pass = 0; pass < (kGradient ? 2 : 1); ++pass) {
      for (int piece = 0; piece < pieces; ++piece) {
        const bool anew = pass == 0 || pieces > 1;
        if (anew) stage(block, tile, tables, piece * kForceRows, n);
        const int count = tile.rows.n;
        for (Index member = 0; member < n_members; ++member) {
          if (anew)
            ascend(block, tile, member, first, taken, on_forces, on_forces && (!given || K > 1),
                   pass == 0);
          if (pass > 0 || !on_forces || given) continue;
          for (int k = kGradient ? 0 : first_level; k < K; ++k)
            add_forces(block, tile, tables, count, taken, piece * kForceRows, n,
                       tile.gradients + k * matrix(),
                       forces_of(kGradient ? k : member * (K - first_level) + k - first_level));
        }
        if constexpr (kGradient)
          if (pass > 0) differentiate(block, tile, tables, first, on_forces, gradient);
      }
      if constexpr (kGradient)
        if (pass == 0) judge(block, tile, first, taken, n, on_forces);
    }
    if constexpr (!kGradient) finish_energies(block, tile, first, taken);
  }

  KINML_DEVICE Index matrix() const { return Index(kForceRows) * plan.features; }
  KINML_DEVICE Index n_outputs() const {
    return kGradient ? n_levels() : n_members * (n_levels() - first_level);
  }
  KINML_DEVICE T* forces_of(Index output) const {
    return (kGradient ? minus_r : forces) + output * 3 * batch.n_atoms;
  }
  KINML_DEVICE int wanted_forces(Index i, int k, int n) const {
    if (!has_forces() || n == 0) return 0;
    if constexpr (!kGradient) return forces != nullptr;
    if (e != nullptr) return k >= first_level;
    return loss.force_weights[k * batch.n_structures + structure(i)] != 0;
  }
  KINML_DEVICE static int owner_of(const Tile& tile, int row) {
    int j = 0;
    while (row >= tile.firsts[j + 1]) ++j;
    return j;
  }

  // Rows [begin, begin + kForceRows) of the tile's n atoms: sorted by species, with descriptors.
  KINML_PHASE void stage(const Block& block, Tile& tile, const AevTables<T>& tables, int begin,
                         int n) const {
    const int count = n - begin < kForceRows ? n - begin : kForceRows, S = plan.n_species;
    const auto atom_of = [&](int row) {
      const int j = owner_of(tile, begin + row);
      return tile.begins[j] + begin + row - tile.firsts[j];
    };
    block.each(count, [&](int row) {
      const Index kind = batch.species[atom_of(row)];
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
      tile.atoms[place] = atom_of(row);
      tile.owners[place] = owner_of(tile, begin + row);
    });
    tile.rows.cut(block, S);
    if (batch.features == nullptr) {
      block.each_warp([&](const Warp& warp, int w) {
        for (int p = w; p < count; p += kWarps) {
          WarpMemory<T, T> own = warp_memory<T>(block, w, tile, p);
          find(warp, tables, tile, p, static_cast<const T*>(nullptr), own.neighbours);
          aev_row(warp, tables, own.neighbours, own.triples, tile.features + p * stride());
        }
      });
    }
    block.each(count * stride(), [&](int item) {
      const int p = item / stride(), d = item % stride();
      T& to = tile.features[item];
      if (d >= length()) {
        to = 0;
      } else if (batch.features != nullptr) {
        const Index kind = batch.species[tile.atoms[p]];
        to = kind >= 0 && kind < S ? batch.features[tile.atoms[p] * length() + d] : kNan;
      }
    });
  }

  // The memory of warp w for the environment of row p.
  template <class N>
  KINML_DEVICE WarpMemory<T, N> warp_memory(const Block& block, int w, const Tile& tile,
                                            int p) const {
    const int j = tile.owners[p];
    const bool few = tile.firsts[j + 1] - tile.firsts[j] <= kFewNeighbours + 1;
    const Index own = Index(block.index()) * kWarps + w;
    char* begin;
    if (!few)
      begin = memory.lists + own * memory.list_bytes;
    else if (memory.warps != nullptr)
      begin = memory.warps + own * memory.warp_bytes;
    else
      begin = block.memory() + (memory.tiles == nullptr ? memory.tile_bytes : 0) +
              w * memory.warp_bytes;
    Pieces pieces(begin);
    WarpMemory<T, N> result;
    result.take(pieces, aev, few ? kFewNeighbours : memory.most_neighbours);
    return result;
  }
  template <class N>
  KINML_DEVICE void find(const Warp& warp, const AevTables<T>& tables, const Tile& tile, int p,
                         const T* direction, Neighbours<N>& neighbours) const {
    const int j = tile.owners[p];
    const Index begin = tile.begins[j], end = begin + tile.firsts[j + 1] - tile.firsts[j];
    find_neighbours(warp, tables, batch.coordinates, direction, batch.species,
                    Candidates::structure(begin, end), tile.atoms[p], neighbours);
  }

  KINML_DEVICE TileNetwork<T> network(const Tile& tile, Index member, int k) const {
    return {&plan, k, packed + member * plan.packed, tile.hidden.of(kGradient ? k : 0), tile.parts};
  }

  // Energies of all levels, added to those of the tile or the outputs if `add`; with
  // `slopes` also what tangents need, and with `gradients` g_k.
  KINML_PHASE void ascend(const Block& block, Tile& tile, Index member, Index first, int taken,
                          bool slopes, bool gradients, bool add) const {
    const int K = n_levels(), count = tile.rows.n;
    for (int k = 0; k < K; ++k) {
      const TileNetwork<T> net = network(tile, member, k);
      T* const below = tile.below + k * kForceRows;
      if (k > 0)
        block.each(count, [&](int p) { tile.features[p * stride() + length()] = below[p]; });
      net.forward(block, tile.rows, tile.features, stride(), kGradient && slopes);
      const auto value = [&](int p) {
        return net.hidden.values[net.place(p, species_of(tile, p), net.last(), 0)];
      };
      // In species order.
      block.each(add ? taken : 0, [&](int j) {
        double sum = 0;
        for (int p = 0; p < count; ++p)
          if (tile.owners[p] == j) sum += static_cast<double>(value(p));
        for (int level = k; level < K; ++level) {
          if constexpr (kGradient)
            tile.energies[j * K + level] += sum;
          else if (level >= first_level)
            energies[(member * (K - first_level) + level - first_level) * batch.count + first +
                     j] += sum;
        }
      });
      if (k + 1 < K)
        block.each(count,
                   [&](int p) { below[kForceRows + p] = (k > 0 ? below[p] : T(0)) + value(p); });
      if (!slopes) continue;
      net.backward(block, tile.rows, [](int) { return T(1); }, kGradient);
      if (!gradients) continue;
      T* const g = tile.gradients + k * matrix();
      net.feature_gradients(block, tile.rows, net.hidden.deltas, g, stride());
      if (k == 0) continue;
      T* const slope = tile.slopes + k * kForceRows;
      block.each(count, [&](int p) { slope[p] = g[p * stride() + length()]; });
      block.each(count * length(), [&](int item) {
        const int p = item / length(), at = p * stride() + item % length();
        g[at] += (1 + slope[p]) * (g - matrix())[at];
      });
    }
  }
  KINML_DEVICE static int species_of(const Tile& tile, int p) {
    int s = 0;
    while (p >= tile.rows.starts[s + 1]) ++s;
    return s;
  }

  // out -= J^T g of the atoms of a piece of the tile.
  // g    // [kForceRows, stride]
  // out  // [n_atoms, 3]
  KINML_PHASE void add_forces(const Block& block, Tile& tile, const AevTables<T>& tables, int count,
                              int taken, int begin, int n, const T* g, T* out) const {
    if (batch.features != nullptr) {
      add_stored_forces(block, tile, taken, begin, n, g, out);
      return;
    }
    for (int base = 0; base < count; base += kWarps) {
      block.each_warp([&](const Warp& warp, int w) {
        const int p = base + w;
        if (p >= count) return;
        WarpMemory<T, T> own = warp_memory<T>(block, w, tile, p);
        find(warp, tables, tile, p, static_cast<const T*>(nullptr), own.neighbours);
        aev_row_transposed(warp, tables, own.neighbours, own.triples, g + p * stride(), own.forces);
        warp.each(1, [&](int) { tile.counts[w] = own.neighbours.count; });
      });
      // Neighbours of one atom differ from one another and from it; those of two atoms may not.
      for (int w = 0; w < kWarps && base + w < count; ++w) {
        const WarpMemory<T, T> own = warp_memory<T>(block, w, tile, base + w);
        const int found = tile.counts[w];
        block.each(3 * found + 3, [&](int item) {
          const int q = item / 3, d = item % 3;
          if (q < found) {
            out[3 * Index(own.neighbours.index[q]) + d] -= own.forces[item];
            return;
          }
          T sum = 0;
          for (int other = 0; other < found; ++other) sum += own.forces[3 * other + d];
          out[3 * tile.atoms[base + w] + d] += sum;
        });
      }
    }
  }

  // The same from stored Jacobians. The descriptor is divided among the threads.
  KINML_PHASE void add_stored_forces(const Block& block, Tile& tile, int taken, int begin, int n,
                                     const T* g, T* out) const {
    const int room = kMostParts * kForceRows * plan.widest, D = length();
    for (int j = 0; j < taken; ++j) {
      const int columns = 3 * (tile.firsts[j + 1] - tile.firsts[j]);
      const int low = tile.firsts[j] > begin ? tile.firsts[j] : begin;
      int high = begin + kForceRows < n ? begin + kForceRows : n;
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
            const T* const jacobian = batch.jacobian + tile.atoms[p] * D * batch.columns + c;
            for (int d = D * part / n_parts; d < D * (part + 1) / n_parts; ++d)
              sum += jacobian[d * batch.columns] * g[p * stride() + d];
          }
          tile.parts[item] = sum;
        });
        block.each(width, [&](int item) {
          T sum = 0;
          for (int part = 0; part < n_parts; ++part) sum += tile.parts[part * width + item];
          out[3 * tile.begins[j] + left + item] -= sum;
        });
      }
    }
  }

  KINML_DEVICE void finish_energies(const Block& block, const Tile& tile, Index first,
                                    int taken) const {
    const int S = plan.n_species, outputs = n_levels() - first_level;
    block.each(static_cast<int>(n_members) * outputs * taken, [&](int item) {
      const int output = item / taken, j = item % taken;
      double& energy = energies[output * batch.count + first + j];
      if (tile.begins[j] < 0) energy = kNoEnergy;
      for (int row = tile.firsts[j]; sae != nullptr && row < tile.firsts[j + 1]; ++row) {
        const Index kind = batch.species[tile.begins[j] + row - tile.firsts[j]];
        if (kind >= 0 && kind < S) energy += sae[output * S + kind];
      }
    });
  }

  // From energies and forces to dL/dE, in their place, and -dL/dF; residuals and errors.
  KINML_PHASE void judge(const Block& block, Tile& tile, Index first, int taken, int n,
                         bool on_forces) const {
    const int K = n_levels();
    if (e != nullptr) {
      block.each(taken * K, [&](int item) {
        const int j = item / K, k = item % K;
        tile.energies[item] =
            k < first_level ? 0.0 : e[(k - first_level) * batch.count + first + j];
      });
      if (on_forces)
        block.each(n, [&](int row) {
          const int j = owner_of(tile, row);
          const Index at = 3 * (tile.begins[j] + row - tile.firsts[j]);
          for (int k = first_level; k < K; ++k)
            for (int d = 0; d < 3; ++d)
              forces_of(k)[at + d] = -r[(k - first_level) * 3 * batch.n_atoms + at + d];
        });
      return;
    }
    const auto larger = [](double size, double largest) {
      return size > largest || size != size ? size : largest;
    };
    block.each(taken * K * kLanes, [&](int item) {
      const int lane = item % kLanes, k = item / kLanes % K, j = item / kLanes / K;
      double sum = 0, squares = 0, largest = 0;
      if (tile.any[j * K + k] != 0) {
        const int components = 3 * (tile.firsts[j + 1] - tile.firsts[j]);
        const double weight = loss.force_weights[k * batch.n_structures + structure(first + j)];
        const double factor = 2 * loss.scales[1] / counts[K + k] * weight / components;
        T* const own = forces_of(k) + 3 * tile.begins[j];
        const double* const targets = loss.forces + k * 3 * batch.n_atoms + 3 * tile.begins[j];
        for (int c = lane; c < components; c += kLanes) {
          const double difference = static_cast<double>(own[c]) - targets[c];
          const double size = std::abs(difference);
          sum += size;
          squares += difference * difference;
          largest = larger(size, largest);
          own[c] = static_cast<T>(-(factor * difference));
        }
      }
      double* const to = tile.errors + 3 * item;
      to[0] = sum;
      to[1] = squares;
      to[2] = largest;
    });
    block.each(taken * K, [&](int item) {
      const int j = item / K, k = item % K;
      const Index s = structure(first + j), i = k * batch.count + first + j;
      double* const error = errors + 3 * i;
      error[0] = error[1] = error[2] = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        const double* const from = tile.errors + 3 * (item * kLanes + lane);
        error[0] += from[0];
        error[1] += from[1];
        error[2] = larger(from[2], error[2]);
      }
      if (tile.begins[j] < 0) {
        residuals[i] = tile.energies[item] = kNoEnergy;
        return;
      }
      residuals[i] = tile.energies[item] - loss.energies[k * batch.n_structures + s];
      // A structure without weight may have no target (NaN).
      const double weight = loss.energy_weights[k * batch.n_structures + s];
      tile.energies[item] =
          weight == 0 ? 0.0 : 2 * loss.scales[0] / counts[k] * weight * residuals[i];
    });
  }

  // Adds the gradient of the atoms of a piece.
  KINML_PHASE void differentiate(const Block& block, Tile& tile, const AevTables<T>& tables, Index,
                                 bool on_forces, T* gradient) const {
    const int K = n_levels(), count = tile.rows.n;
    for (int k = K - 1; on_forces && k >= 0; --k) {
      T* const u = tile.gradients + k * matrix();
      multiply(block, tile, tables, k, u);
      const T* const slope = tile.slopes + (k + 1) * kForceRows;
      block.each(count * stride(), [&](int item) {
        const int p = item / stride(), d = item % stride();
        if (d >= length())
          u[item] = 0;
        else if (k + 1 < K)
          u[item] += (1 + slope[p]) * (u + matrix())[item];
      });
      if (k > 0)
        block.each(count, [&](int p) {
          T sum = 0;
          for (int d = 0; d < length(); ++d)
            sum += (u - matrix())[p * stride() + d] * u[p * stride() + d];
          u[p * stride() + length()] = sum;
        });
    }
    block.each(count, [&](int p) { tile.seeds[p] = 0; });
    for (int k = K - 1; k >= 0; --k) {
      const TileNetwork<T> net = network(tile, 0, k);
      block.each(count, [&](int p) {
        tile.seeds[p] += static_cast<T>(tile.energies[tile.owners[p] * K + k]);
        if (k > 0) tile.features[p * stride() + length()] = tile.below[k * kForceRows + p];
      });
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
  // v  // [kForceRows, stride]
  KINML_PHASE void multiply(const Block& block, Tile& tile, const AevTables<T>& tables, int k,
                            T* v) const {
    const int K = n_levels(), count = tile.rows.n, D = length();
    const T* const direction = forces_of(k);
    if (batch.features != nullptr) {
      block.each(count * D, [&](int item) {
        const int p = item / D, d = item % D, j = tile.owners[p];
        T sum = 0;
        if (tile.any[j * K + k] != 0) {
          const T* const row = batch.jacobian + (tile.atoms[p] * D + d) * batch.columns;
          const T* const own = direction + 3 * tile.begins[j];
          for (int c = 0; c < 3 * (tile.firsts[j + 1] - tile.firsts[j]); ++c)
            sum += row[c] * own[c];
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
        WarpMemory<T, Dual<T>> own = warp_memory<Dual<T>>(block, w, tile, p);
        find(warp, tables, tile, p, direction, own.neighbours);
        aev_row(warp, tables, own.neighbours, own.triples, v + p * stride());
      }
    });
  }
};

// Packs the weights, and counts the structures [2, K] whose energies and forces have a weight.
template <class T>
struct PrepareKernel {
  static constexpr int kThreads = cuda::kThreads;
  ChainPlan plan;
  ForceBatch<T> batch;
  const T* weights;
  T* packed;
  Index n_members;
  ForceLoss loss{};
  bool has_forces = false;
  double* counts = nullptr;  // [2, K]; null: nothing is counted

  KINML_HD Index blocks_of_member() const { return (plan.packed + kThreads - 1) / kThreads; }
  KINML_HD Index counting() const { return counts == nullptr ? 0 : 2 * plan.n_levels; }
  KINML_HD Index n_blocks() const { return counting() + n_members * blocks_of_member(); }

  KINML_DEVICE void operator()(const Block& block) const {
    if (block.index() >= counting()) {
      const Index piece = block.index() - counting(), member = piece / blocks_of_member();
      pack_piece(block, plan, weights + member * plan.parameters, packed + member * plan.packed,
                 piece % blocks_of_member() * kThreads, kThreads);
      return;
    }
    const int k = block.index() % plan.n_levels;
    const bool of_forces = block.index() >= plan.n_levels;
    const double* const own =
        (of_forces ? loss.force_weights : loss.energy_weights) + k * batch.n_structures;
    Index* const partial = reinterpret_cast<Index*>(block.memory());
    block.each(kThreads, [&](int lane) {
      Index found = 0;
      for (Index i = lane; i < batch.count; i += kThreads) {
        const Index s = batch.structures == nullptr ? i : batch.structures[i];
        if (s < 0 || s >= batch.n_structures) continue;
        if (!of_forces || has_forces) found += own[s] != 0;
      }
      partial[lane] = found;
    });
    block.each(1, [&](int) {
      Index found = 0;
      for (int lane = 0; lane < kThreads; ++lane) found += partial[lane];
      counts[block.index()] = static_cast<double>(found > 0 ? found : 1);
    });
  }
};

// Adds the parts of the gradient and, in the first block, the losses.
template <class T>
struct FinishKernel {
  static constexpr int kThreads = cuda::kThreads;
  const T* parts;
  Index n_parts, n_parameters;
  T* gradient;
  // The losses; null: none.
  double* losses = nullptr;
  ForceBatch<T> batch{};
  int n_levels = 0;
  ForceLoss loss{};
  const double *counts = nullptr, *residuals = nullptr, *errors = nullptr;
  bool has_forces = false;

  KINML_HD Index n_blocks() const {
    return (losses != nullptr) + (n_parameters + kThreads - 1) / kThreads;
  }

  KINML_DEVICE void operator()(const Block& block) const {
    const Index piece = block.index() - (losses != nullptr);
    if (piece >= 0) {
      sum_piece(block, parts, n_parts, n_parameters, piece * kThreads, kThreads, gradient);
      return;
    }
    double* const partial = reinterpret_cast<double*>(block.memory());  // [2, kThreads]
    block.each(kThreads, [&](int lane) {
      double of_energies = 0, of_forces = 0;
      for (int k = 0; k < n_levels; ++k) {
        double energies = 0, forces = 0;
        for (Index i = lane; i < batch.count; i += kThreads) {
          const Index s = batch.structures == nullptr ? i : batch.structures[i];
          const double residual = residuals[k * batch.count + i];
          if (s < 0 || s >= batch.n_structures) {
            energies += residual;  // NaN
            continue;
          }
          const double weight = loss.energy_weights[k * batch.n_structures + s];
          if (weight != 0) energies += weight * residual * residual;
          const Index n = 3 * (batch.offsets[s + 1] - batch.offsets[s]);
          if (!has_forces || n == 0) continue;
          const double own = loss.force_weights[k * batch.n_structures + s];
          if (own != 0)
            forces += own * errors[3 * (k * batch.count + i) + 1] / static_cast<double>(n);
        }
        of_energies += energies / counts[k];
        of_forces += forces / counts[n_levels + k];
      }
      partial[lane] = of_energies;
      partial[kThreads + lane] = of_forces;
    });
    block.each(2, [&](int which) {
      double sum = 0;
      for (int lane = 0; lane < kThreads; ++lane) sum += partial[which * kThreads + lane];
      losses[which] = sum;
    });
  }
};

// ---- memory ------------------------------------------------------------------------------------

template <class T>
AevArguments<T> arguments_of(const ForceBatch<T>& batch) {
  return batch.parameters == nullptr ? AevArguments<T>{} : aev_arguments<T>(*batch.parameters);
}

// Cuts a workspace, or counts what it takes.
template <class T>
struct Workspace {
  T* packed;
  T* parts = nullptr;
  T* minus_r = nullptr;
  double* counts = nullptr;
  Memory memory;
  std::int64_t on_chip = 0;  // bytes of a block
  Index n_blocks;
  std::int64_t bytes;

  Workspace(const ChainPlan& plan, Index n_members, const ForceBatch<T>& batch, bool gradient,
            char* begin) {
    const AevArguments<T> aev = arguments_of(batch);
    n_blocks = batch.count < kForceBlocks ? batch.count : kForceBlocks;
    Pieces pieces(begin), tile_pieces(nullptr);
    packed = pieces.take<T>(n_members * plan.packed);
    if (gradient) {
      parts = pieces.take<T>(n_blocks * plan.parameters);
      minus_r = pieces.take<T>(plan.n_levels * 3 * batch.n_atoms);
      counts = pieces.take<double>(2 * plan.n_levels);
    }
    TileMemory<T> tile;
    tile.take(tile_pieces, plan, gradient);
    memory.tile_bytes = tile_pieces.taken() + aev_tables_bytes(aev);
    if (batch.parameters != nullptr) {
      memory.most_neighbours =
          static_cast<int>(batch.n_atoms < kFewNeighbours    ? kFewNeighbours
                           : batch.n_atoms < kMostNeighbours ? batch.n_atoms
                                                             : kMostNeighbours);
      memory.warp_bytes = warp_bytes(aev, kFewNeighbours, gradient);
      memory.list_bytes = warp_bytes(aev, memory.most_neighbours, gradient);
    }
    const Index warps = kWarps * memory.warp_bytes, limit = current_device().block_memory;
    const bool tile_fits = memory.tile_bytes <= limit;
    const bool warps_fit = (tile_fits ? memory.tile_bytes : 0) + warps <= limit;
    on_chip = (tile_fits ? memory.tile_bytes : 0) + (warps_fit ? warps : 0);
    if (!tile_fits) memory.tiles = pieces.take<char>(n_blocks * memory.tile_bytes);
    if (!warps_fit) memory.warps = pieces.take<char>(n_blocks * warps);
    // Lists of many neighbours are for structures of many atoms.
    if (batch.n_atoms > kFewNeighbours)
      memory.lists = pieces.take<char>(n_blocks * kWarps * memory.list_bytes);
    bytes = pieces.taken();
  }
};

template <class T>
void differentiate(const ChainPlan& plan, const T* weights, const ForceBatch<T>& batch,
                   const Workspace<T>& space, ForceKernel<T, true> kernel, const ForceLoss* loss,
                   double* losses, T* gradient, Stream stream) {
  const bool has_forces = batch.features == nullptr || batch.jacobian != nullptr;
  PrepareKernel<T> prepare{plan, batch, weights, space.packed, 1};
  FinishKernel<T> finish{space.parts, space.n_blocks, plan.parameters, gradient};
  if (loss != nullptr) {
    prepare.loss = kernel.loss = finish.loss = *loss;
    prepare.has_forces = finish.has_forces = has_forces;
    prepare.counts = space.counts;
    kernel.counts = finish.counts = space.counts;
    finish.losses = losses;
    finish.batch = batch;
    finish.n_levels = plan.n_levels;
    finish.residuals = kernel.residuals;
    finish.errors = kernel.errors;
  }
  launch(prepare, prepare.n_blocks(), stream, {kThreads * Index(sizeof(Index))});
  kernel.memory = space.memory;
  kernel.n_blocks = space.n_blocks;
  kernel.minus_r = space.minus_r;
  kernel.parts = space.parts;
  launch(kernel, space.n_blocks, stream, {space.on_chip});
  launch(finish, finish.n_blocks(), stream, {2 * kThreads * Index(sizeof(double))});
}

}  // namespace

template <class T>
std::int64_t energy_forces_workspace(const ChainPlan& plan, std::int64_t n_members,
                                     const ForceBatch<T>& batch) {
  return Workspace<T>(plan, n_members, batch, false, nullptr).bytes;
}
template <class T>
std::int64_t force_step_workspace(const ChainPlan& plan, const ForceBatch<T>& batch) {
  return Workspace<T>(plan, 1, batch, true, nullptr).bytes;
}

template <class T>
void energy_forces(const ChainPlan& plan, const T* weights, std::int64_t n_members,
                   const ForceBatch<T>& batch, const double* sae, Levels levels, double* energies,
                   T* forces, char* workspace, Stream stream) {
  const Workspace<T> space(plan, n_members, batch, false, workspace);
  const PrepareKernel<T> prepare{plan, batch, weights, space.packed, n_members};
  launch(prepare, prepare.n_blocks(), stream);
  ForceKernel<T, false> kernel{plan, arguments_of(batch), batch, space.packed, space.memory};
  kernel.n_blocks = space.n_blocks;
  kernel.first_level = levels == Levels::all ? 0 : plan.n_levels - 1;
  kernel.n_members = n_members;
  kernel.sae = sae;
  kernel.energies = energies;
  kernel.forces = forces;
  launch(kernel, space.n_blocks, stream, {space.on_chip});
}

template <class T>
void energy_forces_backward(const ChainPlan& plan, const T* weights, const ForceBatch<T>& batch,
                            Levels levels, const double* e, const T* r, T* gradient,
                            char* workspace, Stream stream) {
  const Workspace<T> space(plan, 1, batch, true, workspace);
  ForceKernel<T, true> kernel{plan, arguments_of(batch), batch, space.packed, space.memory};
  kernel.first_level = levels == Levels::all ? 0 : plan.n_levels - 1;
  kernel.e = e;
  kernel.r = r;
  differentiate<T>(plan, weights, batch, space, kernel, nullptr, nullptr, gradient, stream);
}

template <class T>
void force_step(const ChainPlan& plan, const T* weights, const ForceBatch<T>& batch,
                const ForceLoss& loss, double* losses, T* gradient, double* residuals,
                double* errors, char* workspace, Stream stream) {
  const Workspace<T> space(plan, 1, batch, true, workspace);
  ForceKernel<T, true> kernel{plan, arguments_of(batch), batch, space.packed, space.memory};
  kernel.residuals = residuals;
  kernel.errors = errors;
  differentiate<T>(plan, weights, batch, space, kernel, &loss, losses, gradient, stream);
}

#define KINML_INSTANTIATE(T)                                                                      \
  template Index energy_forces_workspace<T>(const ChainPlan&, Index, const ForceBatch<T>&);       \
  template Index force_step_workspace<T>(const ChainPlan&, const ForceBatch<T>&);                 \
  template void energy_forces<T>(const ChainPlan&, const T*, Index, const ForceBatch<T>&,         \
                                 const double*, Levels, double*, T*, char*, Stream);              \
  template void energy_forces_backward<T>(const ChainPlan&, const T*, const ForceBatch<T>&,       \
                                          Levels, const double*, const T*, T*, char*, Stream);    \
  template void force_step<T>(const ChainPlan&, const T*, const ForceBatch<T>&, const ForceLoss&, \
                              double*, T*, double*, double*, char*, Stream);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cuda

#include "aev_cuda.h"

#include <type_traits>

#include "aev_group.h"
#include "pairs.h"
#include "repulsion_group.h"
#include "sort.h"

namespace kinml::cuda {

namespace {

using Index = std::int64_t;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kFewNeighbours = 48;               // for which there is memory on the chip
constexpr Index kMostBlocks = 1024;              // of a kernel
constexpr Index kListMemory = Index(256) << 20;  // bytes for lists of many neighbours, about
constexpr Index kCrowdMemory = kListMemory / 2;  // of crowds
constexpr Index kKeptMemory = Index(512) << 20;  // for kept products of more than kLeastKept
constexpr int kCrowd = -2;                       // their number, of a centre that has more
constexpr Index kChipMemory = Index(96) << 10;   // bytes that a block has on any GPU
constexpr Index kStep = Index(1) << 20;          // items of one step, at most

// The memory of a warp for centres with up to `capacity` neighbours: on the chip, or in the
// workspace for those that have more of them, where there is only what depends on their number.
template <class N>
struct WarpMemory {
  int* found;  // [1] for `next`; the first in the memory on the chip
  Neighbours<N> neighbours;
  N* p;  // [capacity, 3]
  TripleScratch<N> triples;
  Index* bounds;  // [2, kCellRanges]

  template <class T>
  KINML_HD void take(Pieces& pieces, const AevArguments<T>& aev, int capacity, bool distinct,
                     bool transposed, bool on_chip) {
    if (on_chip) found = pieces.take<int>(1);
    neighbours = take_neighbours<N>(pieces, aev.n_species, capacity, distinct, transposed);
    p = pieces.take<N>(transposed ? 3 * Index(capacity) : 0);
    if (!on_chip) return;
    triples = take_triple_scratch<N>(pieces, aev, transposed);
    bounds = pieces.take<Index>(2 * kCellRanges);
  }
};

struct Centre {
  Index structure, atom;
};

// What all kernels are told.
template <class T>
struct EnvironmentArguments {
  AevArguments<T> aev;
  System<T> system;
  Cells cells;
  const ImageCell* images = nullptr;  // [n_structures], or null
  const T* tangent = nullptr;         // [n_atoms, 3]; null unless N = Dual<T>
  Index blocks = 0;                   // of the grid
  Index tables_bytes = 0, warp_bytes = 0, list_bytes = 0;
  char* lists = nullptr;  // [blocks, kWarps, list_bytes]
  int few = 0, most = 0;  // neighbours for which a warp has memory on the chip and in its list
  // Marks of those with a centre that has more: of centres [n_atoms], where a block goes over
  // structures of these; null if none can have more.
  int* crowded = nullptr;
  bool crowds = false;  // whether the marked ones are meant alone, instead of being marked
};

// Of those that warp w of a block takes.
KINML_DEVICE Index first_centre(const Block& block, int w) {
  return Index(block.index()) * kWarps + w;
}

// How kernels find environments, with candidates of type C: those for atoms alone need fewer
// registers.
template <class T, class C>
struct Environments : EnvironmentArguments<T> {
  using EnvironmentArguments<T>::aev, EnvironmentArguments<T>::system,
      EnvironmentArguments<T>::cells, EnvironmentArguments<T>::images,
      EnvironmentArguments<T>::tangent, EnvironmentArguments<T>::tables_bytes,
      EnvironmentArguments<T>::warp_bytes, EnvironmentArguments<T>::list_bytes,
      EnvironmentArguments<T>::lists, EnvironmentArguments<T>::few, EnvironmentArguments<T>::most,
      EnvironmentArguments<T>::blocks, EnvironmentArguments<T>::crowded,
      EnvironmentArguments<T>::crowds;
  static constexpr bool kDistinct = std::is_same_v<C, AtomCandidates>;

  KINML_DEVICE Centre centre(Index atom) const {
    return {structure_of(system.offsets, system.n_structures, atom), atom};
  }
  KINML_DEVICE bool is_ghost(const Centre& centre) const {
    return system.centres != nullptr && centre.structure >= 0 &&
           centre.structure < system.n_structures &&
           centre.atom >= system.offsets[centre.structure] + system.centres[centre.structure];
  }
  // The first k, from this one on, of the items first + k stride < n that is meant; any beyond them
  // if there is none.
  // found  // [1]
  KINML_DEVICE int next(const Warp& warp, Index n, Index first, Index stride, int k,
                        int* found) const {
    if (!crowds) return k;
    for (; first + k * stride < n; k += 32) {
      const Index left = (n - first - k * stride + stride - 1) / stride;
      const int there = warp.select(
          left < 32 ? static_cast<int>(left) : 32,
          [&](int more) { return crowded[first + (k + more) * stride] != 0; },
          [&](int more, int place) {
            if (place == 0) *found = more;
          });
      if (there > 0) return k + *found;
    }
    return k;
  }
  // f(centre), which says whether it is a crowd, for those that a warp takes.
  template <class F>
  KINML_DEVICE void each_centre(const Block& block, const Warp& warp, int w, const F& f) const {
    int* const found = reinterpret_cast<int*>(block.memory() + tables_bytes + w * warp_bytes);
    for (int k = 0;; ++k) {
      k = next(warp, system.n_atoms, first_centre(block, w), blocks * kWarps, k, found);
      const Index i = first_centre(block, w) + k * blocks * kWarps;
      if (i >= system.n_atoms) return;
      mark(warp, i, f(centre(i)));
    }
  }
  // A centre or structure.
  template <class Group>
  KINML_DEVICE void mark(const Group& group, Index item, bool crowd) const {
    if (crowded != nullptr && !crowds) group.each(1, [&](int) { crowded[item] = crowd; });
  }
  KINML_DEVICE Atoms<T> atoms() const { return {system.coordinates, tangent, system.species}; }
  KINML_DEVICE AevTables<T> tables(const Block& block) const {
    Pieces pieces(block.memory());
    return aev_tables(block, aev, pieces);
  }
  template <class N>
  KINML_DEVICE WarpMemory<N> memory(const Block& block, int w, bool transposed) const {
    WarpMemory<N> memory;
    Pieces pieces(block.memory() + tables_bytes + w * warp_bytes);
    memory.take(pieces, aev, few, kDistinct, transposed, true);
    return memory;
  }
  // Uses the warp's list instead of its memory on the chip.
  template <class N>
  KINML_DEVICE void use_list(const Block& block, int w, bool transposed,
                             WarpMemory<N>& memory) const {
    Pieces pieces(lists + (Index(block.index()) * kWarps + w) * list_bytes);
    memory.take(pieces, aev, most, kDistinct, transposed, false);
  }
  KINML_DEVICE C candidates_in(const Warp& warp, const AtomRange& range, const Centre& centre,
                               Index* bounds) const {
    if constexpr (kDistinct) {
      if (cells.keys == nullptr) return {range.begin, range.end};
      return cell_candidates(warp, cells, system.n_atoms, centre.structure,
                             place_of(system.coordinates, centre.atom), bounds);
    } else {
      return candidates_of(system, images, centre.structure, range, centre.atom);
    }
  }
  // Sorted neighbours of a centre, in memory that may change to the list; find(candidates,
  // neighbours) makes them. Returns whether it did change.
  template <class N, class Find>
  KINML_DEVICE bool find(const Block& block, const Warp& warp, int w, bool transposed,
                         const Centre& centre, WarpMemory<N>& memory, const Find& find) const {
    const AtomRange range = atoms_of(system, centre.structure);
    const C candidates = candidates_in(warp, range, centre, memory.bounds);
    for (bool in_list = false;; in_list = true) {
      if (in_list) use_list(block, w, transposed, memory);
      find(candidates, memory.neighbours);
      if (range.begin < 0) memory.neighbours.spoiled = true;
      if (in_list || !memory.neighbours.overflown || list_bytes == 0) return in_list;
    }
  }
  template <class N>
  KINML_DEVICE bool find(const Block& block, const Warp& warp, const AevTables<T>& tables, int w,
                         bool transposed, const Centre& centre, WarpMemory<N>& memory) const {
    return find(block, warp, w, transposed, centre, memory,
                [&](const C& candidates, Neighbours<N>& neighbours) {
                  find_neighbours(warp, tables, atoms(), candidates, centre.atom, neighbours);
                });
  }
};

// What kernels compute of an environment: vectors, or the repulsion (repulsion_group.h).
struct VectorTerms {
  template <class T>
  KINML_DEVICE int length(const AevTables<T>& tables) const {
    return tables.layout().length();
  }
  template <class T, class N>
  KINML_DEVICE void row(const Warp& warp, const AevTables<T>& tables, const Neighbours<N>& nb,
                        const TripleScratch<N>& triples, const Index*, Index, T* out,
                        Index stride = 1) const {
    aev_row(warp, tables, nb, triples, out, stride);
  }
  template <class T, class N>
  KINML_DEVICE void transposed(const Warp& warp, const AevTables<T>& tables,
                               const Neighbours<N>& nb, const TripleScratch<N>& triples,
                               const Index*, Index, const T* g, N* p) const {
    aev_row_transposed(warp, tables, nb, triples, g, p);
  }
};
template <class S>
struct RepulsionTerms : RepulsionArguments<S> {
  template <class T>
  KINML_DEVICE int length(const AevTables<T>&) const {
    return 1;
  }
  template <class T, class N>
  KINML_DEVICE void row(const Warp& warp, const AevTables<T>&, const Neighbours<N>& nb,
                        const TripleScratch<N>&, const Index* species, Index centre, T* out,
                        Index = 1) const {
    repulsion_row(warp, *this, nb, species, centre, out);
  }
  template <class T, class N>
  KINML_DEVICE void transposed(const Warp& warp, const AevTables<T>&, const Neighbours<N>& nb,
                               const TripleScratch<N>&, const Index* species, Index centre,
                               const T* g, N* p) const {
    repulsion_transposed(warp, *this, nb, species, centre, g, p);
  }
};

// a_i, or J_i v for N = Dual<T>.
template <class T, class N, class C, class Terms>
struct RowKernel {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = Environments<T, C>::kDistinct ? 4 : 3;
  Environments<T, C> e;
  Terms terms;
  T* out;  // [n_atoms, D]

  KINML_DEVICE void operator()(const Block& block) const {
    const AevTables<T> tables = e.tables(block);
    const Index length = terms.length(tables);
    block.each_warp([&](const Warp& warp, int w) {
      e.each_centre(block, warp, w, [&](const Centre& centre) {
        T* const row = out + centre.atom * length;
        if (e.is_ghost(centre)) {
          warp.each(static_cast<int>(length), [&](int d) { row[d] = T(0); });
          return false;
        }
        WarpMemory<N> memory = e.template memory<N>(block, w, false);
        e.find(block, warp, tables, w, false, centre, memory);
        terms.row(warp, tables, memory.neighbours, memory.triples, e.system.species, centre.atom,
                  row);
        return memory.neighbours.overflown;
      });
    });
  }
};

// J_i, column after column: J_i v for unit vectors v that move one neighbour.
template <class T, class C, class Terms>
struct JacobianKernel {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = Environments<T, C>::kDistinct ? 3 : 2;
  using N = Dual<T>;
  Environments<T, C> e;
  Terms terms;
  Index columns;
  T* out;  // [n_atoms, D, columns]

  KINML_DEVICE void operator()(const Block& block) const {
    const AevTables<T> tables = e.tables(block);
    block.each_warp([&](const Warp& warp, int w) {
      e.each_centre(block, warp, w, [&](const Centre& centre) {
        return run_centre(block, warp, tables, w, centre);
      });
    });
  }
  // Whether the centre is a crowd, whose rows are NaN.
  KINML_DEVICE bool run_centre(const Block& block, const Warp& warp, const AevTables<T>& tables,
                               int w, const Centre& centre) const {
    const int length = terms.length(tables);
    const AtomRange range = atoms_of(e.system, centre.structure);
    T* const rows = out + centre.atom * length * columns;
    WarpMemory<N> memory = e.template memory<N>(block, w, false);
    const bool ghost = e.is_ghost(centre);
    C found{};
    if (!ghost)
      e.find(block, warp, w, false, centre, memory,
             [&](const C& candidates, Neighbours<N>& neighbours) {
               found = candidates;
               list_neighbours(warp, tables, e.atoms(), candidates, centre.atom, neighbours);
             });
    const Neighbours<N>& nb = memory.neighbours;
    // A structure that has not enough columns is NaN.
    const bool fits = range.begin >= 0 && 3 * (range.end - range.begin) <= columns;
    const Index used = fits ? 3 * (range.end - range.begin) : columns;
    for (Index begin = 0; begin < length * columns; begin += kStep) {
      const Index left = length * columns - begin;
      warp.each(static_cast<int>(left < kStep ? left : kStep), [&](int item) {
        const bool spoiled = (nb.spoiled || !fits) && (begin + item) % columns < used;
        rows[begin + item] = spoiled ? aev_detail::kNan<T> : T(0);
      });
    }
    if (nb.spoiled || !fits || ghost) return !ghost && nb.overflown;
    T* const of_centre = rows + 3 * (centre.atom - range.begin);
    for (int moved = 0; moved < nb.count; ++moved) {
      // All images of an atom move with it, and the centre's own with the centre: at the first one.
      bool first = e.kDistinct || nb.index[moved] != centre.atom;
      for (int k = 0; !e.kDistinct && k < moved; ++k)
        first = first && nb.index[k] != nb.index[moved];
      for (int d = 0; first && d < 3; ++d) {
        measure_moved(warp, tables, nb, found, centre.atom, moved, d);
        T* const column = rows + 3 * (nb.index[moved] - range.begin) + d;
        terms.row(warp, tables, nb, memory.triples, e.system.species, centre.atom, column, columns);
        warp.each(length, [&](int row) { of_centre[row * columns + d] -= column[row * columns]; });
      }
    }
    return false;
  }
  // The neighbours, and how they change when one moves along axis d.
  KINML_DEVICE void measure_moved(const Warp& warp, const AevTables<T>& tables,
                                  const Neighbours<N>& nb, const C& candidates, Index centre,
                                  int moved, int d) const {
    measure_neighbours(warp, tables, nb, [&](int k) {
      const Displacement<T> to = pairs_detail::displacement_as(
          e.atoms(), candidates, centre, nb.number[k], static_cast<const T*>(nullptr));
      const auto moves = [&](int axis) {
        return T(nb.index[k] == nb.index[moved] && d == axis ? 1 : 0);
      };
      return Displacement<N>{N(to.x, moves(0)), N(to.y, moves(1)), N(to.z, moves(2))};
    });
  }
};

// d/dx sum_i g_i . a_i, or its derivative along v for N = Dual<T>: structure after structure.
template <class T, class N, class C, class Terms>
struct StructureKernel {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = sizeof(N) > sizeof(T) ? 2 : Environments<T, C>::kDistinct ? 4 : 3;
  Environments<T, C> e;
  Terms terms;
  const T* gradient;  // [n_atoms, D]
  T* out;             // [n_atoms, 3]
  T* virials;         // [n_atoms, 3, 3] of the centres for N = T; or null

  // What the block has to know of the centres that its warps are at.
  struct Round {
    int* counts;   // [kWarps] neighbours
    int* in_list;  // [kWarps] whether they are in the warp's list
    int* spoiled;  // [kWarps] kSpoiled, kSpoiled + kCrowded or 0
    int* found;    // [1] which structure is next

    KINML_HD void take(Pieces& pieces) {
      counts = pieces.take<int>(kWarps);
      in_list = pieces.take<int>(kWarps);
      spoiled = pieces.take<int>(kWarps);
      found = pieces.take<int>(1);
    }
  };
  static constexpr int kSpoiled = 1, kCrowded = 2;

  KINML_DEVICE void operator()(const Block& block) const {
    const AevTables<T> tables = e.tables(block);
    Pieces pieces(block.memory() + e.tables_bytes + kWarps * e.warp_bytes);
    Round round;
    round.take(pieces);
    for (int k = 0;; ++k) {
      k = next(block, round, k);
      const Index s = block.index() + k * e.blocks;
      if (s >= e.system.n_structures) return;
      e.mark(block, s, run_structure(block, tables, round, s));
    }
  }
  // As of a warp, whose own number is where the counts will be.
  KINML_DEVICE int next(const Block& block, const Round& round, int k) const {
    if (!e.crowds) return k;
    block.each_warp([&](const Warp& warp, int w) {
      if (w > 0) return;
      const int found =
          e.next(warp, e.system.n_structures, block.index(), e.blocks, k, round.counts);
      warp.each(1, [&](int) { *round.found = found; });
    });
    return *round.found;
  }
  // Whether there is a crowd among its centres, which makes the result NaN.
  KINML_DEVICE bool run_structure(const Block& block, const AevTables<T>& tables,
                                  const Round& round, Index s) const {
    const auto [first, end] = atoms_of(e.system, s);
    const Index length = terms.length(tables);
    const Index last = e.system.centres == nullptr || first < 0 ? end : first + e.system.centres[s];
    int spoiled = last > end ? kSpoiled : 0;
    block.each(static_cast<int>(3 * (end - first)), [&](int i) { out[3 * first + i] = 0; });
    for (Index base = first; base < last; base += kWarps) {
      block.each_warp([&](const Warp& warp, int w) {
        const Index i = base + w;
        if (i >= last) return;
        WarpMemory<N> memory = e.template memory<N>(block, w, true);
        const bool in_list = e.find(block, warp, tables, w, true, {s, i}, memory);
        terms.transposed(warp, tables, memory.neighbours, memory.triples, e.system.species, i,
                         gradient + i * length, memory.p);
        if constexpr (std::is_same_v<T, N>)
          if (virials != nullptr) centre_virial(warp, memory.neighbours, memory.p, virials + 9 * i);
        warp.each(1, [&](int) {
          round.counts[w] = memory.neighbours.count;
          round.in_list[w] = in_list;
          round.spoiled[w] = memory.neighbours.overflown ? kSpoiled + kCrowded
                             : memory.neighbours.spoiled ? kSpoiled
                                                         : 0;
        });
      });
      for (int w = 0; w < kWarps && base + w < last; ++w) {
        WarpMemory<N> memory = e.template memory<N>(block, w, true);
        if (round.in_list[w] != 0) e.use_list(block, w, true, memory);
        spoiled |= round.spoiled[w];
        add_products(block, base + w, round.counts[w], memory.neighbours.index, memory.p, T(1),
                     e.kDistinct, out);
      }
    }
    // Whom a list without room for all would have named is not known.
    if (spoiled != 0)
      block.each(static_cast<int>(3 * (end - first)),
                 [&](int i) { out[3 * first + i] = aev_detail::kNan<T>; });
    return (spoiled & kCrowded) != 0;
  }
};

// The products of all centres of large structures.
template <class T>
struct Kept {
  int* counts;  // [n_atoms] neighbours; negative: the results are NaN; kCrowd
  int* index;   // [n_atoms, room]
  T* p;         // [n_atoms, room, 3]
  int room;

  KINML_HD void take(Pieces& pieces, Index n_atoms, int capacity) {
    room = capacity;
    counts = pieces.take<int>(n_atoms);
    index = pieces.take<int>(n_atoms * room);
    p = pieces.take<T>(3 * n_atoms * room);
  }
};
template <class T, class N, class C, class Terms>
struct KeepKernel {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = sizeof(N) > sizeof(T) ? 2 : Environments<T, C>::kDistinct ? 4 : 3;
  Environments<T, C> e;
  Terms terms;
  const T* gradient;  // [n_atoms, D]
  Kept<T> kept;
  T* virials;  // as of StructureKernel

  KINML_DEVICE void operator()(const Block& block) const {
    const AevTables<T> tables = e.tables(block);
    const Index length = terms.length(tables);
    block.each_warp([&](const Warp& warp, int w) {
      for (Index i = first_centre(block, w); i < e.system.n_atoms; i += e.blocks * kWarps) {
        WarpMemory<N> memory = e.template memory<N>(block, w, true);
        e.find(block, warp, tables, w, true, e.centre(i), memory);
        const Neighbours<N>& nb = memory.neighbours;
        warp.each(1, [&](int) {
          kept.counts[i] = nb.overflown ? kCrowd : nb.spoiled ? -1 : nb.count;
        });
        if (nb.spoiled) {
          if (virials != nullptr)
            warp.each(9, [&](int x) { virials[9 * i + x] = aev_detail::kNan<T>; });
          continue;
        }
        terms.transposed(warp, tables, nb, memory.triples, e.system.species, i,
                         gradient + i * length, memory.p);
        if constexpr (std::is_same_v<T, N>)
          if (virials != nullptr) centre_virial(warp, nb, memory.p, virials + 9 * i);
        warp.each(nb.count, [&](int k) { kept.index[i * kept.room + k] = nb.index[k]; });
        warp.each(3 * nb.count, [&](int item) {
          kept.p[3 * i * kept.room + item] = aev_detail::result(memory.p[item]);
        });
      }
    });
  }
};
// Sums for each atom what the centres that it is a neighbour of have kept for it. These are its own
// neighbours, in their order: an atom that has another one several times in its list is as often in
// that one's, and the terms of its images are taken in the order of either list.
template <class T>
struct GatherKernel {
  static constexpr int kThreads = cuda::kThreads;
  Index n_atoms, blocks;
  bool distinct;
  Kept<T> kept;
  T* out;  // [n_atoms, 3]

  KINML_DEVICE void operator()(const Block& block) const {
    block.each_warp([&](const Warp& warp, int w) {
      Pieces pieces(block.memory() + w * warp_bytes());
      T* const terms = pieces.take<T>(3 * Index(kept.room));
      for (Index i = first_centre(block, w); i < n_atoms; i += blocks * kWarps) {
        const int count = kept.counts[i];
        warp.each(count < 0 ? 0 : count, [&](int k) {
          const Index j = kept.index[i * kept.room + k], row = j * kept.room;
          const int others = kept.counts[j];
          int before = 0, place = 0;  // the images of j that stand before this one in the list of i
          for (int image = 0; !distinct && image < k; ++image)
            before += kept.index[i * kept.room + image] == j;
          for (;; ++place) {
            while (place < others && kept.index[row + place] != i) ++place;
            if (before == 0 || place >= others) break;
            --before;
          }
          for (int d = 0; d < 3; ++d)
            terms[3 * k + d] =
                place < others ? kept.p[3 * (row + place) + d] - kept.p[3 * (i * kept.room + k) + d]
                               : aev_detail::kNan<T>;
        });
        warp.each(3, [&](int d) {
          T sum = count < 0 ? aev_detail::kNan<T> : T(0);
          for (int k = 0; k < count; ++k) sum += terms[3 * k + d];
          out[3 * i + d] = sum;
        });
      }
    });
  }
  KINML_HD Index warp_bytes() const {
    Pieces pieces(nullptr);
    pieces.take<T>(3 * Index(kept.room));
    return pieces.taken();
  }
};

// Marks the structures with a centre whose products are not kept.
template <class T>
struct MarkKernel {
  static constexpr int kThreads = 256;
  System<T> system;
  const int* counts;  // [n_atoms] as kept
  int* crowded;       // [n_structures]

  KINML_DEVICE void operator()(const Block& block) const {
    const AtomRange range = atoms_of(system, block.index());
    int* const any = reinterpret_cast<int*>(block.memory());  // [kThreads]
    block.each(kThreads, [&](int lane) {
      any[lane] = 0;
      for (Index i = range.begin + lane; i < range.end; i += kThreads)
        if (counts[i] == kCrowd) any[lane] = 1;
    });
    block.each(1, [&](int) {
      int found = 0;
      for (int lane = 0; lane < kThreads; ++lane) found |= any[lane];
      crowded[block.index()] = found;
    });
  }
};

// Sums of the virials of centres over each structure.
template <class T>
struct VirialKernel {
  static constexpr int kLanes = 32;
  static constexpr int kThreads = 9 * kLanes;
  System<T> system;
  const T* atomic;  // [n, n_atoms, 3, 3]
  double* sums;     // [n, count, 3, 3]

  KINML_DEVICE void operator()(const Block& block) const {
    const Index row = block.index() / system.count(), i = block.index() % system.count();
    const Index s = system.structure(i);
    const AtomRange range = atoms_of(system, s);
    const Index n = range.begin < 0 ? 0 : system.rows(s);
    const T* const from = atomic + 9 * (row * system.n_atoms + range.begin);
    double* const partial = reinterpret_cast<double*>(block.memory());  // [9, kLanes]
    block.each(kThreads, [&](int item) {
      double sum = range.begin < 0 ? aev_detail::kNan<double> : 0.0;
      for (Index a = item % kLanes; a < n; a += kLanes)
        sum += static_cast<double>(from[9 * a + item / kLanes]);
      partial[item] = sum;
    });
    block.each(9, [&](int x) {
      double sum = 0;
      for (int lane = 0; lane < kLanes; ++lane) sum += partial[x * kLanes + lane];
      sums[9 * (row * system.count() + i) + x] = sum;
    });
  }
};

template <class T>
struct KeyKernel {
  static constexpr int kThreads = 256;
  System<T> system;
  double size;
  Index* keys;  // [n_atoms]

  KINML_DEVICE void operator()(const Block& block) const {
    each_in_grid(block, system.n_atoms, [&](Index i) {
      const Displacement<T> place = place_of(system.coordinates, i);
      keys[i] = cell_key(structure_of(system.offsets, system.n_structures, i),
                         cell_of(place.x, size), cell_of(place.y, size), cell_of(place.z, size));
    });
  }
};

// ---- launches -----------------------------------------------------------------------------------

Index at_most(Index a, Index b) {
  return a < b ? a : b;
}

struct CellMemory {
  Index *unsorted, *keys, *atoms;  // [n_atoms]
  char* sort;

  CellMemory(Pieces& pieces, Index n_atoms)
      : unsorted(pieces.take<Index>(n_atoms)),
        keys(pieces.take<Index>(n_atoms)),
        atoms(pieces.take<Index>(n_atoms)),
        sort(pieces.take<char>(sort_workspace(n_atoms))) {}
};

// How a product is computed: sizes, and the pieces of its workspace. With a workspace the cells are
// found, if they are not given.
template <class T>
struct Plan {
  EnvironmentArguments<T> e;
  EnvironmentArguments<T> crowd;  // the same for those with more neighbours than fit into lists
  BlockMemory memory;
  bool keeps = false;
  Kept<T> kept{};
  Index bytes;

  Plan(const AevParameters& parameters, AevProduct product, const System<T>& system)
      : Plan(parameters, product, system, nullptr, nullptr, nullptr) {}
  Plan(const AevParameters& parameters, AevProduct product, const System<T>& system,
       char* workspace, Stream stream, const Cells* cells)
      : e{aev_arguments<T>(parameters), system, {}}, crowd(e) {
    const Index n_atoms = system.n_atoms;
    const bool transposed = product == AevProduct::vjp || product == AevProduct::hvp;
    const bool plain = product == AevProduct::forward || product == AevProduct::vjp;
    const bool large = aev_structures_are_large(system.n_structures, n_atoms);
    keeps = transposed && large;
    // With ghosts or given pairs an atom may be a neighbour of centres that are none of its own.
    keeps = keeps && system.centres == nullptr && system.pair_starts == nullptr;
    // A centre among others has one neighbour less; of images there may be any number.
    const Index others = n_atoms == 0        ? 0
                         : system.distinct() ? at_most(n_atoms - 1, kMostOfCrowd)
                                             : kMostOfCrowd;
    const Index of_kept = Index(sizeof(int)) + 3 * Index(sizeof(T));
    const Index room = !keeps ? kMostNeighbours : kKeptMemory / (n_atoms * of_kept);
    e.few = static_cast<int>(at_most(others, kFewNeighbours));
    e.most = static_cast<int>(
        at_most(others, at_most(room > kLeastKept ? room : kLeastKept, kMostNeighbours)));
    e.tables_bytes = aev_tables_bytes(e.aev);
    e.warp_bytes = warp_bytes(e.few, transposed, plain, true);
    if (others > kFewNeighbours) e.list_bytes = warp_bytes(e.most, transposed, plain, false);

    const Index rounds = blocks_for(n_atoms, kWarps),
                items = transposed ? system.n_structures : rounds;
    e.blocks = at_most(keeps ? rounds : items, kMostBlocks);
    if (e.list_bytes > 0) e.blocks = at_most(e.blocks, kListMemory / (kWarps * e.list_bytes) + 1);
    Pieces round(nullptr);
    typename StructureKernel<T, T, AtomCandidates, VectorTerms>::Round{}.take(round);
    memory.bytes = e.tables_bytes + kWarps * e.warp_bytes + round.taken();
    crowd = e;
    if (others > e.most) {
      crowd.crowds = true;
      crowd.most = static_cast<int>(others);
      crowd.list_bytes = warp_bytes(crowd.most, transposed, plain, false);
      crowd.blocks = at_most(items, kMostBlocks);
      crowd.blocks = at_most(crowd.blocks, kCrowdMemory / (kWarps * crowd.list_bytes) + 1);
    }

    Pieces pieces(workspace);
    const auto of_lists = [](const auto& some) { return some.blocks * kWarps * some.list_bytes; };
    const Index most_blocks = e.blocks > crowd.blocks ? e.blocks : crowd.blocks;
    e.lists = pieces.take<char>(of_lists(e) > of_lists(crowd) ? of_lists(e) : of_lists(crowd));
    if (memory.bytes > kChipMemory) memory.global = pieces.take<char>(most_blocks * memory.bytes);
    if (keeps) kept.take(pieces, n_atoms, e.most);
    if (crowd.crowds) e.crowded = pieces.take<int>(transposed ? system.n_structures : n_atoms);
    const bool by_cells = large && system.distinct();
    char* const of_cells = pieces.take<char>(by_cells ? aev_cells_bytes(n_atoms) : 0);
    ImageCell* const images = pieces.take<ImageCell>(has_images(system) ? system.n_structures : 0);
    bytes = pieces.taken();
    if (has_images(system)) e.images = images;
    if (workspace == nullptr) return;
    if (has_images(system)) prepare_images(parameters, system, images, stream);
    if (cells != nullptr)
      e.cells = *cells;
    else if (by_cells)
      e.cells = aev_cells(parameters, system, of_cells, stream);
    crowd.images = e.images;
    crowd.cells = e.cells;
    crowd.lists = e.lists;
    crowd.crowded = e.crowded;
  }
  void set_tangent(const T* tangent) { e.tangent = crowd.tangent = tangent; }

 private:
  Index warp_bytes(int capacity, bool transposed, bool plain, bool on_chip) const {
    Pieces pieces(nullptr);
    if (plain)
      WarpMemory<T>{}.take(pieces, e.aev, capacity, e.system.distinct(), transposed, on_chip);
    else
      WarpMemory<Dual<T>>{}.take(pieces, e.aev, capacity, e.system.distinct(), transposed, on_chip);
    return pieces.taken();
  }
};

// launch_with(e), e with the candidates that the system of a plan needs.
template <class T, class F>
void with_candidates(const Plan<T>& plan, const F& launch_with) {
  if (plan.e.system.distinct())
    launch_with(Environments<T, AtomCandidates>{plan.e});
  else
    launch_with(Environments<T, Candidates>{plan.e});
}

// launch_with(e, terms), as well with what is computed.
template <class T, class F>
void with_terms(const AevParameters& parameters, const Plan<T>& plan, const F& launch_with) {
  with_candidates(plan, [&](const auto& e) {
    if (parameters.is_repulsion())
      launch_with(e, RepulsionTerms<T>{repulsion_arguments<T>(parameters.repulsion)});
    else
      launch_with(e, VectorTerms());
  });
}

// Launches kernel_with(e) and, if there may be crowds, kernel_with(theirs).
template <class T, class C, class F>
void launch_all(const Plan<T>& plan, const Environments<T, C>& e, const F& kernel_with,
                Stream stream) {
  launch(kernel_with(e), e.blocks, stream, plan.memory);
  if (!plan.crowd.crowds) return;
  launch(kernel_with(Environments<T, C>{plan.crowd}), plan.crowd.blocks, stream, plan.memory);
}

template <class N, class T>
void rows(const AevParameters& parameters, const Plan<T>& plan, T* out, Stream stream) {
  with_terms(parameters, plan,
             [&]<class C, class Terms>(const Environments<T, C>& e, const Terms& terms) {
               const auto kernel_with = [&](const Environments<T, C>& some) {
                 return RowKernel<T, N, C, Terms>{some, terms, out};
               };
               launch_all(plan, e, kernel_with, stream);
             });
}

template <class N, class T>
void transposed(const AevParameters& parameters, const Plan<T>& plan, const T* gradient, T* out,
                T* virials, Stream stream) {
  with_terms(
      parameters, plan, [&]<class C, class Terms>(const Environments<T, C>& e, const Terms& terms) {
        const auto kernel_with = [&](const Environments<T, C>& some) {
          return StructureKernel<T, N, C, Terms>{some, terms, gradient, out, virials};
        };
        if (!plan.keeps) return launch_all(plan, e, kernel_with, stream);
        launch(KeepKernel<T, N, C, Terms>{e, terms, gradient, plan.kept, virials}, e.blocks, stream,
               plan.memory);
        const Index n_atoms = e.system.n_atoms, rounds = blocks_for(n_atoms, kWarps);
        const GatherKernel<T> gather{n_atoms, at_most(rounds, 4 * kMostBlocks), e.kDistinct,
                                     plan.kept, out};
        launch(gather, gather.blocks, stream, {kWarps * gather.warp_bytes()});
        if (!plan.crowd.crowds) return;
        const MarkKernel<T> mark{e.system, plan.kept.counts, e.crowded};
        launch(mark, e.system.n_structures, stream, {mark.kThreads * Index(sizeof(int))});
        launch(kernel_with(Environments<T, C>{plan.crowd}), plan.crowd.blocks, stream, plan.memory);
      });
}

}  // namespace

template <class T>
void prepare_images(const AevParameters& parameters, const System<T>& system, ImageCell* cells,
                    Stream stream) {
  // As long as the kernels' own cutoffs, which are rounded.
  const T radial = static_cast<T>(parameters.radial_cutoff);
  const T angular = static_cast<T>(parameters.angular_cutoff);
  const ImageKernel<T> kernel{system, radial > angular ? radial : angular, cells};
  launch(kernel, blocks_for(system.n_structures, kernel.kThreads), stream);
}

template <class T>
void sum_virials(const System<T>& system, std::int64_t n, const T* atomic, double* sums,
                 Stream stream) {
  const VirialKernel<T> kernel{system, atomic, sums};
  launch(kernel, n * system.count(), stream, {kernel.kThreads * Index(sizeof(double))});
}

std::int64_t aev_cells_bytes(std::int64_t n_atoms) {
  Pieces pieces(nullptr);
  const CellMemory counted(pieces, n_atoms);
  return pieces.taken();
}

template <class T>
Cells aev_cells(const AevParameters& parameters, const System<T>& system, char* memory,
                Stream stream) {
  Pieces pieces(memory);
  const CellMemory cells(pieces, system.n_atoms);
  const T radial = static_cast<T>(parameters.radial_cutoff);
  const T angular = static_cast<T>(parameters.angular_cutoff);
  const double size = cell_size(radial > angular ? radial : angular);
  const KeyKernel<T> kernel{system, size, cells.unsorted};
  launch(kernel, blocks_for(system.n_atoms, kernel.kThreads), stream);
  sort_keys(cells.unsorted, system.n_atoms, cells.keys, cells.atoms, cells.sort, stream);
  return {cells.keys, cells.atoms, size};
}

template <class T>
std::int64_t aev_workspace(const AevParameters& parameters, AevProduct product,
                           const System<T>& system) {
  return Plan<T>(parameters, product, system).bytes;
}

template <class T>
void aev_forward(const AevParameters& parameters, const System<T>& system, T* aev, char* workspace,
                 Stream stream, const Cells* cells) {
  const Plan<T> plan(parameters, AevProduct::forward, system, workspace, stream, cells);
  rows<T>(parameters, plan, aev, stream);
}
template <class T>
void aev_jvp(const AevParameters& parameters, const System<T>& system, const T* tangent, T* out,
             char* workspace, Stream stream, const Cells* cells) {
  Plan<T> plan(parameters, AevProduct::jvp, system, workspace, stream, cells);
  plan.set_tangent(tangent);
  rows<Dual<T>>(parameters, plan, out, stream);
}
template <class T>
void aev_vjp(const AevParameters& parameters, const System<T>& system, const T* gradient, T* out,
             char* workspace, Stream stream, const Cells* cells, T* virials) {
  const Plan<T> plan(parameters, AevProduct::vjp, system, workspace, stream, cells);
  transposed<T>(parameters, plan, gradient, out, virials, stream);
}
template <class T>
void aev_hvp(const AevParameters& parameters, const System<T>& system, const T* gradient,
             const T* tangent, T* out, char* workspace, Stream stream, const Cells* cells) {
  Plan<T> plan(parameters, AevProduct::hvp, system, workspace, stream, cells);
  plan.set_tangent(tangent);
  transposed<Dual<T>>(parameters, plan, gradient, out, static_cast<T*>(nullptr), stream);
}
template <class T>
void aev_jacobian(const AevParameters& parameters, const System<T>& system, std::int64_t columns,
                  T* out, char* workspace, Stream stream, const Cells* cells) {
  const Plan<T> plan(parameters, AevProduct::jacobian, system, workspace, stream, cells);
  with_terms(parameters, plan,
             [&]<class C, class Terms>(const Environments<T, C>& e, const Terms& terms) {
               const auto kernel_with = [&](const Environments<T, C>& some) {
                 return JacobianKernel<T, C, Terms>{some, terms, columns, out};
               };
               launch_all(plan, e, kernel_with, stream);
             });
}

#define KINML_INSTANTIATE(T)                                                                      \
  template void prepare_images<T>(const AevParameters&, const System<T>&, ImageCell*, Stream);    \
  template Cells aev_cells<T>(const AevParameters&, const System<T>&, char*, Stream);             \
  template Index aev_workspace<T>(const AevParameters&, AevProduct, const System<T>&);            \
  template void aev_forward<T>(const AevParameters&, const System<T>&, T*, char*, Stream,         \
                               const Cells*);                                                     \
  template void aev_jvp<T>(const AevParameters&, const System<T>&, const T*, T*, char*, Stream,   \
                           const Cells*);                                                         \
  template void aev_vjp<T>(const AevParameters&, const System<T>&, const T*, T*, char*, Stream,   \
                           const Cells*, T*);                                                     \
  template void sum_virials<T>(const System<T>&, Index, const T*, double*, Stream);               \
  template void aev_hvp<T>(const AevParameters&, const System<T>&, const T*, const T*, T*, char*, \
                           Stream, const Cells*);                                                 \
  template void aev_jacobian<T>(const AevParameters&, const System<T>&, Index, T*, char*, Stream, \
                                const Cells*);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cuda

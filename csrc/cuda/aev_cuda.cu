#include "aev_cuda.h"

#include "aev_group.h"

namespace kinml::cuda {

namespace {

using Index = std::int64_t;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kFewNeighbours = 48;               // for which there is memory on the chip
constexpr Index kMostBlocks = 1024;              // of a kernel
constexpr Index kListMemory = Index(256) << 20;  // bytes for lists of many neighbours, about
constexpr Index kChipMemory = Index(96) << 10;   // bytes that a block has on any GPU
constexpr Index kStep = Index(1) << 20;          // items of one step, at most

// The memory of a warp for centres with up to `capacity` neighbours: on the chip, or in the
// workspace for those that have more of them, where there is only what depends on their number.
template <class N>
struct WarpMemory {
  Neighbours<N> neighbours;
  N* p;  // [capacity, 3]
  TripleScratch<N> triples;
  Index* bounds;  // [2, kCellRanges]

  template <class T>
  KINML_HD void take(Pieces& pieces, const AevArguments<T>& aev, int capacity, bool transposed,
                     bool on_chip) {
    neighbours = take_neighbours<N>(pieces, aev.n_species, capacity, transposed);
    p = pieces.take<N>(transposed ? 3 * Index(capacity) : 0);
    if (!on_chip) return;
    triples = take_triple_scratch<N>(pieces, aev, transposed);
    bounds = pieces.take<Index>(2 * kCellRanges);
  }
};

// What all kernels are told.
template <class T>
struct Environments {
  AevArguments<T> aev;
  AevBatch<T> batch;
  Index n_atoms;
  AevCells cells;
  const T* tangent = nullptr;  // [n_atoms, 3]; null unless N = Dual<T>
  Index blocks = 0;            // of the grid
  Index tables_bytes = 0, warp_bytes = 0, list_bytes = 0;
  char* lists = nullptr;  // [blocks, kWarps, list_bytes]
  int few = 0, most = 0;  // neighbours for which a warp has memory on the chip and in its list

  KINML_HD double size() const {
    return cell_size(aev.radial_cutoff > aev.angular_cutoff ? aev.radial_cutoff
                                                            : aev.angular_cutoff);
  }
  KINML_DEVICE Index structure(Index atom) const {
    return structure_of(batch.offsets, batch.n_structures, atom);
  }
  KINML_DEVICE AtomRange atoms(Index structure) const {
    return atoms_of(batch.offsets, batch.n_structures, n_atoms, structure);
  }
  KINML_DEVICE AevTables<T> tables(const Block& block) const {
    Pieces pieces(block.memory());
    return aev_tables(block, aev, pieces);
  }
  template <class N>
  KINML_DEVICE WarpMemory<N> memory(const Block& block, int w, bool transposed) const {
    WarpMemory<N> own;
    Pieces pieces(block.memory() + tables_bytes + w * warp_bytes);
    own.take(pieces, aev, few, transposed, true);
    return own;
  }
  // Uses the warp's list instead of its memory on the chip.
  template <class N>
  KINML_DEVICE void use_list(const Block& block, int w, bool transposed, WarpMemory<N>& own) const {
    Pieces pieces(lists + (Index(block.index()) * kWarps + w) * list_bytes);
    own.take(pieces, aev, most, transposed, false);
  }
  // Sorted neighbours of a centre, in memory that may change to the list; find(neighbours) makes
  // them from the candidates. Returns whether it did change.
  template <class N, class Find>
  KINML_DEVICE bool find(const Block& block, const Warp& warp, int w, bool transposed,
                         Index structure, Index centre, WarpMemory<N>& own,
                         const Find& find) const {
    const AtomRange range = atoms(structure);
    const Candidates candidates =
        cells.keys == nullptr ? Candidates::structure(range.begin, range.end)
                              : cell_candidates(warp, cells.keys, cells.atoms, n_atoms, structure,
                                                batch.coordinates + 3 * centre, size(), own.bounds);
    for (bool in_list = false;; in_list = true) {
      if (in_list) use_list(block, w, transposed, own);
      find(candidates, own.neighbours);
      if (range.begin < 0) own.neighbours.spoiled = true;
      if (in_list || !own.neighbours.overflown || list_bytes == 0) return in_list;
    }
  }
  template <class N>
  KINML_DEVICE bool find(const Block& block, const Warp& warp, const AevTables<T>& tables, int w,
                         bool transposed, Index structure, Index centre, WarpMemory<N>& own) const {
    return find(block, warp, w, transposed, structure, centre, own,
                [&](const Candidates& candidates, Neighbours<N>& neighbours) {
                  find_neighbours(warp, tables, batch.coordinates, tangent, batch.species,
                                  candidates, centre, neighbours);
                });
  }
};

// a_i, or J_i v for N = Dual<T>.
template <class T, class N>
struct RowKernel {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = 4;
  Environments<T> e;
  T* out;  // [n_atoms, D]

  KINML_DEVICE void operator()(const Block& block) const {
    const AevTables<T> tables = e.tables(block);
    const Index length = tables.layout().length();
    block.each_warp([&](const Warp& warp, int w) {
      for (Index i = Index(block.index()) * kWarps + w; i < e.n_atoms; i += e.blocks * kWarps) {
        WarpMemory<N> own = e.template memory<N>(block, w, false);
        e.find(block, warp, tables, w, false, e.structure(i), i, own);
        aev_row(warp, tables, own.neighbours, own.triples, out + i * length);
      }
    });
  }
};

// J_i, column after column: J_i v for unit vectors v that move one neighbour.
template <class T>
struct JacobianKernel {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = 3;
  using N = Dual<T>;
  Environments<T> e;
  Index columns;
  T* out;  // [n_atoms, D, columns]

  KINML_DEVICE void operator()(const Block& block) const {
    const AevTables<T> tables = e.tables(block);
    block.each_warp([&](const Warp& warp, int w) {
      for (Index i = Index(block.index()) * kWarps + w; i < e.n_atoms; i += e.blocks * kWarps)
        run_centre(block, warp, tables, w, i);
    });
  }
  KINML_DEVICE void run_centre(const Block& block, const Warp& warp, const AevTables<T>& tables,
                               int w, Index centre) const {
    const int length = tables.layout().length();
    const Index s = e.structure(centre);
    const AtomRange range = e.atoms(s);
    const Index first = range.begin;
    T* const own_out = out + centre * length * columns;
    WarpMemory<N> own = e.template memory<N>(block, w, false);
    e.find(block, warp, w, false, s, centre, own,
           [&](const Candidates& candidates, Neighbours<N>& neighbours) {
             aev_detail::list_neighbours(warp, tables, e.batch.coordinates, e.batch.species,
                                         candidates, centre, neighbours);
           });
    const Neighbours<N>& nb = own.neighbours;
    // A structure that has not enough columns is NaN.
    const bool fits = first >= 0 && 3 * (range.end - first) <= columns;
    const Index own_columns = fits ? 3 * (range.end - first) : columns;
    for (Index begin = 0; begin < length * columns; begin += kStep) {
      const Index left = length * columns - begin;
      warp.each(static_cast<int>(left < kStep ? left : kStep), [&](int item) {
        const bool spoiled = (nb.spoiled || !fits) && (begin + item) % columns < own_columns;
        own_out[begin + item] = spoiled ? aev_detail::kNan<T> : T(0);
      });
    }
    if (nb.spoiled || !fits) return;
    const T* const x = e.batch.coordinates;
    for (int moved = 0; moved < nb.count; ++moved)
      for (int d = 0; d < 3; ++d) {
        aev_detail::measure_neighbours(warp, tables, nb, [&](int k) {
          const T *const to = x + 3 * Index(nb.index[k]), *const from = x + 3 * centre;
          const auto component = [&](int c) {
            return N(to[c] - from[c], T(k == moved && c == d ? 1 : 0));
          };
          return Displacement<N>{component(0), component(1), component(2)};
        });
        T* const column = own_out + 3 * (nb.index[moved] - first) + d;
        T* const of_centre = own_out + 3 * (centre - first) + d;
        aev_row(warp, tables, nb, own.triples, column, columns);
        warp.each(length, [&](int row) { of_centre[row * columns] -= column[row * columns]; });
      }
  }
};

// d/dx sum_i g_i . a_i, or its derivative along v for N = Dual<T>: structure after structure.
template <class T, class N>
struct StructureKernel {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = sizeof(N) > sizeof(T) ? 2 : 4;
  Environments<T> e;
  const T* gradient;  // [n_atoms, D]
  T* out;             // [n_atoms, 3]

  // What the block has to know of the centres that its warps are at.
  struct Round {
    int* counts;   // [kWarps] neighbours
    int* in_list;  // [kWarps] whether they are in the warp's list
    int* spoiled;  // [kWarps]

    KINML_HD void take(Pieces& pieces) {
      counts = pieces.take<int>(kWarps);
      in_list = pieces.take<int>(kWarps);
      spoiled = pieces.take<int>(kWarps);
    }
  };

  KINML_DEVICE void operator()(const Block& block) const {
    const AevTables<T> tables = e.tables(block);
    Pieces pieces(block.memory() + e.tables_bytes + kWarps * e.warp_bytes);
    Round round;
    round.take(pieces);
    for (Index s = block.index(); s < e.batch.n_structures; s += e.blocks)
      run_structure(block, tables, round, s);
  }
  KINML_DEVICE void run_structure(const Block& block, const AevTables<T>& tables,
                                  const Round& round, Index s) const {
    const AtomRange range = e.atoms(s);
    const Index first = range.begin, end = range.end;
    const Index length = tables.layout().length();
    bool spoiled = false;
    block.each(static_cast<int>(3 * (end - first)), [&](int i) { out[3 * first + i] = 0; });
    for (Index base = first; base < end; base += kWarps) {
      block.each_warp([&](const Warp& warp, int w) {
        const Index i = base + w;
        if (i >= end) return;
        WarpMemory<N> own = e.template memory<N>(block, w, true);
        const bool in_list = e.find(block, warp, tables, w, true, s, i, own);
        aev_row_transposed(warp, tables, own.neighbours, own.triples, gradient + i * length, own.p);
        warp.each(1, [&](int) {
          round.counts[w] = own.neighbours.count;
          round.in_list[w] = in_list;
          round.spoiled[w] = own.neighbours.spoiled;
        });
      });
      // Neighbours of one centre differ from one another and from it; those of two may not.
      for (int w = 0; w < kWarps && base + w < end; ++w) {
        WarpMemory<N> own = e.template memory<N>(block, w, true);
        if (round.in_list[w] != 0) e.use_list(block, w, true, own);
        const int count = round.counts[w];
        spoiled = spoiled || round.spoiled[w] != 0;
        block.each(3 * count + 3, [&](int item) {
          const int k = item / 3, d = item - 3 * k;
          if (k < count) {
            out[3 * Index(own.neighbours.index[k]) + d] += aev_detail::result(own.p[item]);
            return;
          }
          T sum(0);
          for (int j = 0; j < count; ++j) sum += aev_detail::result(own.p[3 * j + d]);
          out[3 * (base + w) + d] -= sum;
        });
      }
    }
    // Whom a list without room for all would have named is not known.
    if (spoiled)
      block.each(static_cast<int>(3 * (end - first)),
                 [&](int i) { out[3 * first + i] = aev_detail::kNan<T>; });
  }
};

// The products of all centres of large structures.
template <class T>
struct Kept {
  int* counts;  // [n_atoms] neighbours; -1: the results are NaN
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
template <class T, class N>
struct KeepKernel {
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = sizeof(N) > sizeof(T) ? 2 : 4;
  Environments<T> e;
  const T* gradient;  // [n_atoms, D]
  Kept<T> kept;

  KINML_DEVICE void operator()(const Block& block) const {
    const AevTables<T> tables = e.tables(block);
    const Index length = tables.layout().length();
    block.each_warp([&](const Warp& warp, int w) {
      for (Index i = Index(block.index()) * kWarps + w; i < e.n_atoms; i += e.blocks * kWarps) {
        WarpMemory<N> own = e.template memory<N>(block, w, true);
        e.find(block, warp, tables, w, true, e.structure(i), i, own);
        const Neighbours<N>& nb = own.neighbours;
        warp.each(1, [&](int) { kept.counts[i] = nb.spoiled ? -1 : nb.count; });
        if (nb.spoiled) continue;
        aev_row_transposed(warp, tables, nb, own.triples, gradient + i * length, own.p);
        warp.each(nb.count, [&](int k) { kept.index[i * kept.room + k] = nb.index[k]; });
        warp.each(3 * nb.count, [&](int item) {
          kept.p[3 * i * kept.room + item] = aev_detail::result(own.p[item]);
        });
      }
    });
  }
};
// Sums for each atom what the centres that it is a neighbour of have kept for it. These are its own
// neighbours, in their order.
template <class T>
struct GatherKernel {
  static constexpr int kThreads = cuda::kThreads;
  Index n_atoms, blocks;
  Kept<T> kept;
  T* out;  // [n_atoms, 3]

  KINML_DEVICE void operator()(const Block& block) const {
    block.each_warp([&](const Warp& warp, int w) {
      Pieces pieces(block.memory() + w * warp_bytes());
      T* const terms = pieces.take<T>(3 * Index(kept.room));
      for (Index i = Index(block.index()) * kWarps + w; i < n_atoms; i += blocks * kWarps) {
        const int count = kept.counts[i];
        warp.each(count < 0 ? 0 : count, [&](int k) {
          const Index j = kept.index[i * kept.room + k], row = j * kept.room;
          const int others = kept.counts[j];
          int place = 0;
          while (place < others && kept.index[row + place] != i) ++place;
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

template <class T>
struct KeyKernel {
  static constexpr int kThreads = 256;
  AevBatch<T> batch;
  Index n_atoms;
  double size;
  Index* keys;  // [n_atoms]

  KINML_DEVICE void operator()(const Block& block) const {
    const Index first = Index(block.index()) * kThreads, left = n_atoms - first;
    block.each(static_cast<int>(left < kThreads ? left : kThreads), [&](int item) {
      const Index i = first + item;
      const T* const x = batch.coordinates + 3 * i;
      keys[i] = cell_key(structure_of(batch.offsets, batch.n_structures, i), cell_of(x[0], size),
                         cell_of(x[1], size), cell_of(x[2], size));
    });
  }
};

// ---- launches -----------------------------------------------------------------------------------

Index at_most(Index a, Index b) {
  return a < b ? a : b;
}

// How a product is computed: sizes, and the pieces of its workspace.
template <class T>
struct Plan {
  Environments<T> e;
  BlockMemory memory;
  bool keeps = false;
  Kept<T> kept{};
  Index bytes;

  Plan(const AevParameters& parameters, AevProduct product, const AevBatch<T>& batch, Index n_atoms,
       const AevCells& cells, char* workspace)
      : e{aev_arguments<T>(parameters), batch, n_atoms, cells} {
    const bool transposed = product == AevProduct::vjp || product == AevProduct::hvp;
    const bool plain = product == AevProduct::forward || product == AevProduct::vjp;
    keeps = transposed && aev_structures_are_large(batch.n_structures, n_atoms);
    // A centre among others has one neighbour less.
    const Index others = n_atoms > 0 ? n_atoms - 1 : 0;
    e.few = static_cast<int>(at_most(others, kFewNeighbours));
    e.most = static_cast<int>(at_most(others, keeps ? kMostKept : kMostNeighbours));
    e.tables_bytes = aev_tables_bytes(e.aev);
    e.warp_bytes = warp_bytes(e.few, transposed, plain, true);
    if (others > kFewNeighbours) e.list_bytes = warp_bytes(e.most, transposed, plain, false);

    const Index rounds = (n_atoms + kWarps - 1) / kWarps;
    e.blocks = transposed && !keeps ? batch.n_structures : rounds;
    e.blocks = at_most(e.blocks, kMostBlocks);
    if (e.list_bytes > 0) e.blocks = at_most(e.blocks, kListMemory / (kWarps * e.list_bytes) + 1);
    Pieces round(nullptr);
    typename StructureKernel<T, T>::Round{}.take(round);
    memory.bytes = e.tables_bytes + kWarps * e.warp_bytes + round.taken();

    Pieces pieces(workspace);
    e.lists = pieces.take<char>(e.blocks * kWarps * e.list_bytes);
    if (memory.bytes > kChipMemory) memory.global = pieces.take<char>(e.blocks * memory.bytes);
    if (keeps) kept.take(pieces, n_atoms, e.most);
    bytes = pieces.taken();
  }

 private:
  Index warp_bytes(int capacity, bool transposed, bool plain, bool on_chip) const {
    Pieces pieces(nullptr);
    if (plain)
      WarpMemory<T>{}.take(pieces, e.aev, capacity, transposed, on_chip);
    else
      WarpMemory<Dual<T>>{}.take(pieces, e.aev, capacity, transposed, on_chip);
    return pieces.taken();
  }
};

template <class N, class T>
void rows(Plan<T>& plan, T* out, Stream stream) {
  launch(RowKernel<T, N>{plan.e, out}, plan.e.blocks, stream, plan.memory);
}

template <class N, class T>
void transposed(Plan<T>& plan, const T* gradient, T* out, Stream stream) {
  if (!plan.keeps) {
    launch(StructureKernel<T, N>{plan.e, gradient, out}, plan.e.blocks, stream, plan.memory);
    return;
  }
  launch(KeepKernel<T, N>{plan.e, gradient, plan.kept}, plan.e.blocks, stream, plan.memory);
  const Index rounds = (plan.e.n_atoms + kWarps - 1) / kWarps;
  const GatherKernel<T> gather{plan.e.n_atoms, at_most(rounds, 4 * kMostBlocks), plan.kept, out};
  launch(gather, gather.blocks, stream, {kWarps * gather.warp_bytes()});
}

}  // namespace

template <class T>
void aev_cell_keys(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
                   std::int64_t* keys, Stream stream) {
  Environments<T> e{};
  e.aev = aev_arguments<T>(parameters);
  const KeyKernel<T> kernel{batch, n_atoms, e.size(), keys};
  launch(kernel, (n_atoms + kernel.kThreads - 1) / kernel.kThreads, stream);
}

template <class T>
std::int64_t aev_workspace(const AevParameters& parameters, AevProduct product,
                           std::int64_t n_structures, std::int64_t n_atoms) {
  const AevBatch<T> batch{n_structures, nullptr, nullptr, nullptr};
  return Plan<T>(parameters, product, batch, n_atoms, {}, nullptr).bytes;
}

template <class T>
void aev_forward(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
                 const AevCells& cells, T* aev, char* workspace, Stream stream) {
  Plan<T> plan(parameters, AevProduct::forward, batch, n_atoms, cells, workspace);
  rows<T>(plan, aev, stream);
}
template <class T>
void aev_jvp(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
             const AevCells& cells, const T* tangent, T* out, char* workspace, Stream stream) {
  Plan<T> plan(parameters, AevProduct::jvp, batch, n_atoms, cells, workspace);
  plan.e.tangent = tangent;
  rows<Dual<T>>(plan, out, stream);
}
template <class T>
void aev_vjp(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
             const AevCells& cells, const T* gradient, T* out, char* workspace, Stream stream) {
  Plan<T> plan(parameters, AevProduct::vjp, batch, n_atoms, cells, workspace);
  transposed<T>(plan, gradient, out, stream);
}
template <class T>
void aev_hvp(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
             const AevCells& cells, const T* gradient, const T* tangent, T* out, char* workspace,
             Stream stream) {
  Plan<T> plan(parameters, AevProduct::hvp, batch, n_atoms, cells, workspace);
  plan.e.tangent = tangent;
  transposed<Dual<T>>(plan, gradient, out, stream);
}
template <class T>
void aev_jacobian(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t n_atoms,
                  const AevCells& cells, std::int64_t columns, T* out, char* workspace,
                  Stream stream) {
  Plan<T> plan(parameters, AevProduct::jacobian, batch, n_atoms, cells, workspace);
  launch(JacobianKernel<T>{plan.e, columns, out}, plan.e.blocks, stream, plan.memory);
}

#define KINML_INSTANTIATE(T)                                                                       \
  template void aev_cell_keys<T>(const AevParameters&, const AevBatch<T>&, Index, Index*, Stream); \
  template Index aev_workspace<T>(const AevParameters&, AevProduct, Index, Index);                 \
  template void aev_forward<T>(const AevParameters&, const AevBatch<T>&, Index, const AevCells&,   \
                               T*, char*, Stream);                                                 \
  template void aev_jvp<T>(const AevParameters&, const AevBatch<T>&, Index, const AevCells&,       \
                           const T*, T*, char*, Stream);                                           \
  template void aev_vjp<T>(const AevParameters&, const AevBatch<T>&, Index, const AevCells&,       \
                           const T*, T*, char*, Stream);                                           \
  template void aev_hvp<T>(const AevParameters&, const AevBatch<T>&, Index, const AevCells&,       \
                           const T*, const T*, T*, char*, Stream);                                 \
  template void aev_jacobian<T>(const AevParameters&, const AevBatch<T>&, Index, const AevCells&,  \
                                Index, T*, char*, Stream);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cuda

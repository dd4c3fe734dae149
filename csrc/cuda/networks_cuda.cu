#include "networks_cuda.h"

#include <cmath>
#include <limits>

#include "network_group.h"

namespace kinml::cuda {

namespace {

using Index = std::int64_t;

constexpr int kThreads = 256;

template <class T>
struct PackKernel {
  static constexpr int kThreads = cuda::kThreads;
  ChainPlan plan;
  const T* parameters;
  T* packed;
  int* cleared;

  // One block for a piece of one member's packed form.
  KINML_DEVICE void operator()(const Block& block) const {
    const Index blocks = blocks_for(plan.packed, kThreads);
    const Index member = block.index() / blocks, begin = block.index() % blocks * kThreads;
    pack_piece(block, plan, parameters + member * plan.parameters, packed + member * plan.packed,
               begin, kThreads);
    if (cleared != nullptr && block.index() == 0) block.each(1, [&](int) { *cleared = 0; });
  }
};

enum class Pass { forward, backward, second };

template <class T>
struct NetworkKernel {
  static constexpr int kThreads = cuda::kThreads;
  ChainPlan plan;
  NetworkBatch<T> batch;
  Pass pass;
  int length = 0;          // D
  SavedLayers<T> saved{};  // written by the forward pass and read by the backward pass
  const T* tangents = nullptr;
  const double* grad_energies = nullptr;
  T* atomic = nullptr;
  NetworkGradients<T> gradients{};
  T* parts = nullptr;  // [n_blocks, plan.parameters]
  Index n_blocks = 0, n_tiles = 0;

  struct Memory {
    TileRows rows;
    T *features, *directions, *seeds, *parts;
    HiddenArrays<T> hidden;

    KINML_HD void take(Pieces& pieces, const ChainPlan& plan, bool second) {
      const Index matrix = Index(kNetworkRows) * plan.features;
      rows.take(pieces, kNetworkRows, plan.n_species);
      features = pieces.take<T>(matrix);
      directions = second ? pieces.take<T>(matrix) : nullptr;
      seeds = pieces.take<T>(kNetworkRows);
      parts = pieces.take<T>(Index(kMostParts) * kNetworkRows * plan.widest);
      hidden.take(pieces, kNetworkRows, plan.hidden, second);
    }
  };

  KINML_DEVICE void operator()(const Block& block) const {
    Pieces pieces(block.memory());
    Memory memory;
    memory.take(pieces, plan, pass == Pass::second);
    T* const gradient = parts == nullptr ? nullptr : parts + block.index() * Index(plan.parameters);
    if (gradient != nullptr) block.each(plan.parameters, [&](int i) { gradient[i] = 0; });
    for (Index tile = block.index(); tile < n_tiles; tile += n_blocks) {
      const NetworkTileSpan span = network_tile(batch.starts, plan.n_species, tile);
      if (span.count > 0) run_tile(block, memory, span, gradient);
    }
  }

  KINML_DEVICE void run_tile(const Block& block, Memory& memory, const NetworkTileSpan& span,
                             T* gradient) const {
    TileRows& rows = memory.rows;
    block.each(plan.n_species + 1,
               [&](int s) { rows.starts[s] = s <= span.species ? 0 : span.count; });
    rows.cut(block, plan.n_species);
    stage(block, span, batch.features, batch.stride, memory.features);
    const TileNetwork<T> network{&plan, 0, batch.packed, memory.hidden, memory.parts};
    switch (pass) {
      case Pass::forward:
        forward(block, memory, span, network);
        break;
      case Pass::backward:
        backward(block, memory, span, network, gradient);
        break;
      case Pass::second:
        second_backward(block, memory, span, network, gradient);
        break;
    }
  }

  // Number i of what is kept of the rows of a tile: h, and f'(z) half a row behind it.
  KINML_DEVICE T* kept(const NetworkTileSpan& span, int i) const {
    return saved.numbers + (span.first + i / plan.hidden) * saved.stride + i % plan.hidden;
  }
  KINML_DEVICE void forward(const Block& block, const Memory& memory, const NetworkTileSpan& span,
                            const TileNetwork<T>& network) const {
    network.forward(block, memory.rows, memory.features, plan.features, false);
    if (saved.numbers != nullptr)
      block.each(span.count * plan.hidden, [&](int i) {
        kept(span, i)[0] = memory.hidden.values[i];
        kept(span, i)[saved.stride / 2] = memory.hidden.slopes[i];
      });
    block.each(span.count, [&](int row) {
      atomic[span.first + row] =
          memory.hidden.values[network.place(row, span.species, network.last(), 0)];
    });
  }
  KINML_DEVICE void backward(const Block& block, const Memory& memory, const NetworkTileSpan& span,
                             const TileNetwork<T>& network, T* gradient) const {
    set_seeds(block, memory, span);
    block.each(span.count * plan.hidden, [&](int i) {
      memory.hidden.values[i] = kept(span, i)[0];
      memory.hidden.slopes[i] = kept(span, i)[saved.stride / 2];
    });
    network.backward(block, memory.rows, [&](int row) { return memory.seeds[row]; }, false);
    if (gradient != nullptr)
      network.weight_gradients(block, memory.rows, memory.features, plan.features, nullptr, 0,
                               gradient);
    write_atoms(block, memory, span, network, memory.hidden.deltas);
  }
  KINML_DEVICE void second_backward(const Block& block, const Memory& memory,
                                    const NetworkTileSpan& span, const TileNetwork<T>& network,
                                    T* gradient) const {
    const int stride = plan.features;
    stage(block, span, tangents, length, memory.directions);
    set_seeds(block, memory, span);
    network.forward(block, memory.rows, memory.features, stride, true);
    network.backward(block, memory.rows, [&](int row) { return memory.seeds[row]; }, true);
    network.tangent(block, memory.rows, memory.directions, stride);
    if (gradients.derivatives != nullptr)
      block.each(span.count, [&](int row) {
        gradients.derivatives[span.first + row] =
            memory.hidden.tangents[network.place(row, span.species, network.last(), 0)];
      });
    network.second_backward(block, memory.rows, [](int) { return T(0); });
    if (gradient != nullptr)
      network.weight_gradients(block, memory.rows, memory.features, stride, memory.directions,
                               stride, gradient);
    write_atoms(block, memory, span, network, memory.hidden.bends);
  }

  KINML_DEVICE void set_seeds(const Block& block, const Memory& memory,
                              const NetworkTileSpan& span) const {
    block.each(span.count, [&](int row) {
      const Index owner = batch.owners[span.first + row];
      const bool valid = owner >= 0 && owner < batch.n_structures;
      memory.seeds[row] = valid ? static_cast<T>(grad_energies[owner]) : kNan;
    });
  }
  // The gradients by the features, if wanted: rows of all features of a tile at first, since
  // products fill whole rooms.
  KINML_DEVICE void write_atoms(const Block& block, const Memory& memory,
                                const NetworkTileSpan& span, const TileNetwork<T>& network,
                                const T* outputs) const {
    if (gradients.atoms == nullptr) return;
    T* const by_features = memory.features;
    network.feature_gradients(block, memory.rows, outputs, by_features, plan.features);
    block.each(span.count * length, [&](int i) {
      gradients.atoms[span.first * length + i] =
          by_features[i / length * plan.features + i % length];
    });
  }

  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

  // Rows of a matrix [n_features, pitch] into [kNetworkRows, plan.features], 0 behind.
  KINML_DEVICE void stage(const Block& block, const NetworkTileSpan& span, const T* from,
                          Index pitch, T* to) const {
    const int stride = plan.features;
    block.each(span.count * stride, [&](int i) {
      const int row = i / stride, column = i % stride;
      const Index source = batch.rows[span.first + row];
      const bool valid = source >= 0 && source < batch.n_features;
      to[i] = column >= length ? T(0) : valid ? from[source * pitch + column] : kNan;
    });
  }
};

template <class T>
struct SumByStructureKernel {
  static constexpr int kThreads = cuda::kThreads;
  const T* values;
  StructureAtoms atoms;
  const Index* starts;
  int n_species;
  const double* shifts;
  double* sums;

  KINML_DEVICE void operator()(const Block& block) const {
    const Index structure = block.index(), first = atoms.firsts[structure];
    const auto term = [&](Index i) {
      const Index atom = atoms.order[first + i];
      double shift = 0;
      if (shifts != nullptr) {
        int s = 0;
        while (s + 1 < n_species && atom >= starts[s + 1]) ++s;
        shift = shifts[s];
      }
      return static_cast<double>(values[atom]) + shift;
    };
    sum_in_block(block, atoms.firsts[structure + 1] - first, term,
                 reinterpret_cast<double*>(block.memory()), sums[structure]);
  }
};

template <class T>
struct SumPartsKernel {
  static constexpr int kThreads = cuda::kThreads;
  const T* parts;
  Index n_parts, n;
  T* sums;

  KINML_DEVICE void operator()(const Block& block) const {
    sum_piece(block, parts, n_parts, n, Index(block.index()) * kThreads, kThreads, sums);
  }
};

Index round_up(Index bytes) {
  return (bytes + 15) / 16 * 16;
}

template <class T>
Index tile_bytes(const ChainPlan& plan, bool second) {
  Pieces count(nullptr);
  typename NetworkKernel<T>::Memory memory;
  memory.take(count, plan, second);
  return count.taken();
}
Index blocks_of(const ChainPlan& plan, Index n) {
  const Index tiles = most_network_tiles(n, plan.n_species);
  return tiles < kNetworkBlocks ? tiles : kNetworkBlocks;
}
template <class T>
Index parts_bytes(const ChainPlan& plan, Index n, bool gradients) {
  return gradients ? round_up(blocks_of(plan, n) * plan.parameters * Index(sizeof(T))) : 0;
}

// Runs a pass with the memory of its tiles on the chip where that is large enough.
template <class T>
void run_pass(NetworkKernel<T> kernel, char* workspace, Stream stream) {
  const ChainPlan& plan = kernel.plan;
  const Index n = kernel.batch.n;
  kernel.length = plan.layers[0].in;
  kernel.n_tiles = most_network_tiles(n, plan.n_species);
  kernel.n_blocks = blocks_of(plan, n);
  const bool gradients = kernel.gradients.parameters != nullptr;
  kernel.parts = gradients ? reinterpret_cast<T*>(workspace) : nullptr;
  const Index bytes = tile_bytes<T>(plan, kernel.pass == Pass::second);
  const bool fits = bytes <= current_device().block_memory;
  char* const memory = fits ? nullptr : workspace + parts_bytes<T>(plan, n, gradients);
  launch(kernel, kernel.n_blocks, stream, {bytes, memory});
  if (gradients)
    sum_parts(kernel.parts, kernel.n_blocks, Index(plan.parameters), kernel.gradients.parameters,
              stream);
}

}  // namespace

template <class T>
void pack_networks(const ChainPlan& plan, const T* parameters, std::int64_t n_members, T* packed,
                   Stream stream, int* cleared) {
  launch(PackKernel<T>{plan, parameters, packed, cleared},
         n_members * blocks_for(plan.packed, kThreads), stream);
}

template <class T>
std::int64_t networks_workspace(const ChainPlan& plan, std::int64_t n, bool second,
                                bool gradients) {
  const Index bytes = tile_bytes<T>(plan, second);
  const bool fits = bytes <= current_device().block_memory;
  return parts_bytes<T>(plan, n, gradients) + (fits ? 0 : blocks_of(plan, n) * bytes);
}

template <class T>
void networks_forward(const ChainPlan& plan, const NetworkBatch<T>& batch,
                      const SavedLayers<T>& saved, T* atomic, char* workspace, Stream stream) {
  NetworkKernel<T> kernel{plan, batch, Pass::forward};
  kernel.saved = saved;
  kernel.atomic = atomic;
  run_pass<T>(kernel, workspace, stream);
}

template <class T>
void networks_backward(const ChainPlan& plan, const NetworkBatch<T>& batch,
                       const SavedLayers<T>& saved, const double* grad_energies,
                       const NetworkGradients<T>& gradients, char* workspace, Stream stream) {
  NetworkKernel<T> kernel{plan, batch, Pass::backward};
  kernel.saved = saved;
  kernel.grad_energies = grad_energies;
  kernel.gradients = gradients;
  run_pass(kernel, workspace, stream);
}

template <class T>
void networks_second_backward(const ChainPlan& plan, const NetworkBatch<T>& batch,
                              const T* tangents, const double* grad_energies,
                              const NetworkGradients<T>& gradients, char* workspace,
                              Stream stream) {
  NetworkKernel<T> kernel{plan, batch, Pass::second};
  kernel.tangents = tangents;
  kernel.grad_energies = grad_energies;
  kernel.gradients = gradients;
  run_pass(kernel, workspace, stream);
}

template <class T>
void sum_by_structure(const T* values, const StructureAtoms& atoms, const std::int64_t* starts,
                      int n_species, const double* shifts, double* sums, Stream stream) {
  launch(SumByStructureKernel<T>{values, atoms, starts, n_species, shifts, sums},
         atoms.n_structures, stream, {kThreads * Index(sizeof(double))});
}

template <class T>
void sum_parts(const T* parts, std::int64_t n_parts, std::int64_t n, T* sums, Stream stream) {
  launch(SumPartsKernel<T>{parts, n_parts, n, sums}, blocks_for(n, kThreads), stream);
}

#define KINML_INSTANTIATE(T)                                                                    \
  template void pack_networks<T>(const ChainPlan&, const T*, Index, T*, Stream, int*);          \
  template Index networks_workspace<T>(const ChainPlan&, Index, bool, bool);                    \
  template void networks_forward<T>(const ChainPlan&, const NetworkBatch<T>&,                   \
                                    const SavedLayers<T>&, T*, char*, Stream);                  \
  template void networks_backward<T>(const ChainPlan&, const NetworkBatch<T>&,                  \
                                     const SavedLayers<T>&, const double*,                      \
                                     const NetworkGradients<T>&, char*, Stream);                \
  template void networks_second_backward<T>(const ChainPlan&, const NetworkBatch<T>&, const T*, \
                                            const double*, const NetworkGradients<T>&, char*,   \
                                            Stream);                                            \
  template void sum_by_structure<T>(const T*, const StructureAtoms&, const Index*, int,         \
                                    const double*, double*, Stream);                            \
  template void sum_parts<T>(const T*, Index, Index, T*, Stream);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cuda

#include "networks_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "networks_plan.h"
#include "parallel.h"
#include "scratch.h"

namespace kinml {

using Index = std::int64_t;
using cpu::NetworkPiece;
using cpu::NetworkPlan;
using cpu::NetworkSegment;
using cpu::NetworkTile;

#define KINML_DECLARE_NETWORKS(T)                                                                  \
  KINML_DECLARE_KERNEL(void, networks_pack, const NetworkPlan&, const T*, T*, int)                 \
  KINML_DECLARE_KERNEL(void, networks_forward_pieces, const NetworkPlan&, const NetworkPiece*,     \
                       Index, const T*, const T*, Index, const Index*, T*, T*, T*, int)            \
  KINML_DECLARE_KERNEL(void, networks_backward_pieces, const NetworkPlan&, const NetworkPiece*,    \
                       Index, const T*, const T*, const T*, T*, T*, Index, const Index*, int)      \
  KINML_DECLARE_KERNEL(void, networks_weight_gradients, const NetworkPlan&, const NetworkSegment*, \
                       Index, const T*, Index, const Index*, const T*, const T*, T*, int)          \
  KINML_DECLARE_KERNEL(void, networks_tile_forward, const NetworkPlan&, const T*,                  \
                       const NetworkTile<T>&, T*)                                                  \
  KINML_DECLARE_KERNEL(void, networks_tile_backward, const NetworkPlan&, const T*,                 \
                       const NetworkTile<T>&, const T*, T*, Index, T*)                             \
  KINML_DECLARE_KERNEL(void, networks_tile_tangent, const NetworkPlan&, const T*,                  \
                       const NetworkTile<T>&, T*)                                                  \
  KINML_DECLARE_KERNEL(void, networks_tile_second_backward, const NetworkPlan&, const T*,          \
                       const NetworkTile<T>&, const T*, T*, Index, T*)                             \
  KINML_DECLARE_KERNEL(void, networks_tile_weight_gradients, const NetworkPlan&,                   \
                       const NetworkTile<T>&, T*, bool)
KINML_DECLARE_NETWORKS(double)
KINML_DECLARE_NETWORKS(float)
#undef KINML_DECLARE_NETWORKS

namespace cpu {

namespace {

// Atoms whose deltas are in memory at one time, for each thread: about what its cache holds.
constexpr Index kAtomsPerThread = 1024;
// Second derivatives: atoms of a tile, and groups of tiles that sum weight gradients.
constexpr Index kTileAtoms = 128;
constexpr Index kTileGroups = 16;
// A thread keeps its buffer between calls up to this size, because new memory costs page faults.
constexpr std::size_t kKeptBytes = std::size_t(64) << 20;

// Memory that grows and is used again by the next call of the same thread.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // At least n numbers, aligned to 64 bytes; what stood there before is lost.
  template <class T>
  T* get(Index n) {
    const std::size_t bytes = (static_cast<std::size_t>(n) * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_ || (kExactMemory && bytes != bytes_)) {
      clear();
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<T*>(data_);
  }
  void trim() {
    if (bytes_ > kKeptBytes) clear();
  }
  std::size_t size() const { return bytes_; }
  void swap(Buffer& other) {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }

 private:
  void clear() {
    std::free(data_);
    data_ = nullptr;
    bytes_ = 0;
  }
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

Index padded(Index n) {
  return (n + 15) / 16 * 16;
}

// Whole registers: z = W h with biases, and W^T delta.
Index forward_numbers(Index in, Index out) {
  return (in + 1) * padded(out);
}
Index backward_numbers(Index in, Index out) {
  return padded(in) * out;
}

// Offsets of everything, and the sizes of the packed matrices.
class Layout {
 public:
  enum Packed { for_forward = 1, for_backward = 2, for_grad_features = 4, for_grad_last = 8 };

  // packed: what to pack the weights for; starts: atoms of each species, or null.
  Layout(const NetworkShape& shape, const Index* starts, int packed) {
    layers_.reserve(shape.n_species * shape.n_layers);
    Index parameter = 0;
    for (Index s = 0; s < shape.n_species; ++s) {
      Index column = 0;
      for (Index l = 1; l <= shape.n_layers; ++l) {
        NetworkLayer layer;
        layer.in = shape.size(s, l - 1);
        layer.out = shape.size(s, l);
        layer.stride = shape.stride(s, l);
        layer.column = column;
        column += layer.stride;
        layer.weights = parameter;
        parameter += layer.in * layer.out;
        layer.biases = shape.biases ? parameter : -1;
        if (shape.biases) parameter += layer.out;
        layer.packed = packed & for_forward ? room(forward_numbers(layer.in, layer.out)) : -1;
        layer.transposed = packed & (l > 1 ? for_backward : for_grad_features)
                               ? room(backward_numbers(layer.in, layer.out))
                               : -1;
        layer.last = l == 1 && packed & for_grad_last ? room(padded(layer.out)) : -1;
        layers_.push_back(layer);
      }
    }
    plan_ = {shape.n_species,   shape.n_layers, layers_.data(),
             shape.activations, starts,         shape.per_atom()};
  }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;

  const NetworkPlan& plan() const { return plan_; }
  Index packed() const { return packed_; }

 private:
  Index room(Index n) {
    const Index begin = packed_;
    packed_ += n;
    return begin;
  }
  std::vector<NetworkLayer> layers_;
  Index packed_ = 0;
  NetworkPlan plan_;
};

// Fewer atoms a piece if there are not enough pieces for the threads.
Index piece_atoms(Index n_atoms, int n_threads) {
  return n_atoms < 2 * kPieceAtoms * n_threads ? kSmallPieceAtoms : kPieceAtoms;
}

// Zero gradients for the species without atoms.
template <class T>
void clear_missing(const NetworkPlan& plan, const Index* starts, T* grad_parameters) {
  for (Index s = 0; s < plan.n_species; ++s) {
    if (starts[s] != starts[s + 1]) continue;
    for (const NetworkLayer* layer = plan.of(s); layer != plan.of(s + 1); ++layer) {
      std::fill_n(grad_parameters + layer->weights, layer->in * layer->out, T(0));
      if (layer->biases >= 0) std::fill_n(grad_parameters + layer->biases, layer->out, T(0));
    }
  }
}

void add_pieces(const NetworkSegment& segment, Index atoms, std::vector<NetworkPiece>& pieces) {
  for (Index first = 0; first < segment.count; first += atoms)
    pieces.push_back(
        {&segment, first, segment.count - first < atoms ? segment.count - first : atoms});
}

}  // namespace

template <class T>
void networks_forward(const NetworkShape& shape, const T* parameters, const T* features,
                      Index feature_stride, const Index* rows, const Index* starts, T* saved,
                      T* atomic, int n_threads) {
  const Index n_atoms = starts[shape.n_species];
  if (n_atoms == 0) return;
  const Layout layout(shape, starts, Layout::for_forward);
  const NetworkPlan& plan = layout.plan();

  std::vector<NetworkSegment> segments;
  std::vector<NetworkPiece> pieces;
  segments.reserve(shape.n_species);
  const Index atoms = piece_atoms(n_atoms, n_threads);
  for (Index s = 0; s < shape.n_species; ++s) {
    segments.push_back({s, starts[s], starts[s + 1] - starts[s], 0});
    add_pieces(segments.back(), atoms, pieces);
  }

  // Inside somebody else's parallel region parallel_for is serial, but the index stays theirs.
  const int slots = (n_threads > 1 ? n_threads : 1) + thread_index();
  const Index scratch = saved ? 0 : slots * kPieceAtoms * plan.scratch_per_atom;
  static thread_local Buffer buffer;
  T* const packed = buffer.get<T>(layout.packed() + scratch + kSlack);
  KINML_CALL_KERNEL(networks_pack, plan, parameters, packed, n_threads);
  KINML_CALL_KERNEL(networks_forward_pieces, plan, pieces.data(), static_cast<Index>(pieces.size()),
                    packed, features, feature_stride, rows, saved, packed + layout.packed(), atomic,
                    n_threads);
  buffer.trim();
}

template <class T>
void networks_backward(const NetworkShape& shape, const T* parameters, const T* features,
                       Index feature_stride, const Index* rows, const Index* starts, const T* saved,
                       const T* grad_atomic, T* grad_features, T* grad_parameters, int n_threads) {
  const Layout layout(shape, starts,
                      Layout::for_backward | (grad_features ? Layout::for_grad_features : 0));
  const NetworkPlan& plan = layout.plan();
  if (grad_parameters != nullptr) clear_missing(plan, starts, grad_parameters);
  const Index n_atoms = starts[shape.n_species];
  if (n_atoms == 0) return;

  // Deltas of so many atoms at a time; whole blocks of kSumAtoms, so that every weight's sum is
  // formed in the same way for any number of threads.
  Index limit = kAtomsPerThread * (n_threads > 1 ? n_threads : 1);
  if (limit > n_atoms) limit = n_atoms + kSumAtoms;
  static thread_local Buffer buffer;
  T* const packed = buffer.get<T>(layout.packed() + limit * plan.scratch_per_atom + kSlack);
  T* const deltas = packed + layout.packed();
  KINML_CALL_KERNEL(networks_pack, plan, parameters, packed, n_threads);

  std::vector<NetworkSegment> segments;
  std::vector<NetworkPiece> pieces;
  segments.reserve(shape.n_species);
  const Index atoms = piece_atoms(n_atoms, n_threads);
  Index species = 0, first = starts[0];
  while (species < shape.n_species) {
    segments.clear();
    pieces.clear();
    Index room = limit;
    while (species < shape.n_species) {
      const Index left = starts[species + 1] - first;
      Index count = left;
      if (left > room) count = room / kSumAtoms * kSumAtoms;
      if (count > 0) {
        segments.push_back({species, first, count, limit - room});
        room -= count;
        first += count;
      }
      if (count < left) break;
      ++species;
      if (species < shape.n_species) first = starts[species];
    }
    for (const NetworkSegment& segment : segments) add_pieces(segment, atoms, pieces);
    KINML_CALL_KERNEL(networks_backward_pieces, plan, pieces.data(),
                      static_cast<Index>(pieces.size()), packed, saved, grad_atomic, deltas,
                      grad_features, feature_stride, rows, n_threads);
    if (grad_parameters != nullptr)
      KINML_CALL_KERNEL(networks_weight_gradients, plan, segments.data(),
                        static_cast<Index>(segments.size()), features, feature_stride, rows, saved,
                        deltas, grad_parameters, n_threads);
  }
  buffer.trim();
}

// ---- tiles --------------------------------------------------------------------------------------

template <class T>
struct PackedNetworks<T>::State {
  State(const NetworkShape& shape, bool of_features)
      : layout(shape, nullptr,
               Layout::for_forward | Layout::for_backward |
                   (of_features ? Layout::for_grad_features | Layout::for_grad_last : 0)) {}
  State(const NetworkShape& shape, const T* given) : State(shape, true) { packed = given; }
  State(const NetworkShape& shape, const T* parameters, int n_threads, bool of_features)
      : State(shape, of_features) {
    buffer.swap(kept());
    T* const own = buffer.template get<T>(layout.packed());
    pack(parameters, own, n_threads);
    packed = own;
  }
  ~State() {
    buffer.trim();
    if (buffer.size() > kept().size()) buffer.swap(kept());
  }
  void pack(const T* parameters, T* to, int n_threads) const {
    KINML_CALL_KERNEL(networks_pack, plan(), parameters, to, n_threads);
  }
  const NetworkPlan& plan() const { return layout.plan(); }

  // What the next object of this thread takes over.
  static Buffer& kept() {
    static thread_local Buffer buffer;
    return buffer;
  }

  Layout layout;
  Buffer buffer;
  const T* packed = nullptr;
};

template <class T>
PackedNetworks<T>::PackedNetworks(const NetworkShape& shape, const T* parameters, int n_threads,
                                  bool of_features)
    : state_(new State(shape, parameters, n_threads, of_features)) {}
template <class T>
PackedNetworks<T>::PackedNetworks(const NetworkShape& shape, const T* packed)
    : state_(new State(shape, packed)) {}
template <class T>
PackedNetworks<T>::~PackedNetworks() = default;

template <class T>
Index PackedNetworks<T>::packed_numbers(const NetworkShape& shape) {
  Index numbers = 0;
  for (Index s = 0; s < shape.n_species; ++s)
    for (Index l = 1; l <= shape.n_layers; ++l) {
      const Index in = shape.size(s, l - 1), out = shape.size(s, l);
      numbers += forward_numbers(in, out) + backward_numbers(in, out) + (l == 1 ? padded(out) : 0);
    }
  return numbers;
}
template <class T>
void PackedNetworks<T>::pack(const NetworkShape& shape, const T* parameters, T* packed,
                             int n_threads) {
  State(shape, true).pack(parameters, packed, n_threads);
}

template <class T>
Index PackedNetworks<T>::tile_memory(Index n_atoms) const {
  return n_atoms * kTileValues * state_->plan().scratch_per_atom + kSlack;
}
template <class T>
void PackedNetworks<T>::forward(const NetworkTile<T>& tile, T* atomic) const {
  KINML_CALL_KERNEL(networks_tile_forward, state_->plan(), state_->packed, tile, atomic);
}
template <class T>
void PackedNetworks<T>::backward(const NetworkTile<T>& tile, const T* seeds, T* grad_features,
                                 Index stride, T* grad_last) const {
  KINML_CALL_KERNEL(networks_tile_backward, state_->plan(), state_->packed, tile, seeds,
                    grad_features, stride, grad_last);
}
template <class T>
void PackedNetworks<T>::tangent(const NetworkTile<T>& tile, T* derivatives) const {
  KINML_CALL_KERNEL(networks_tile_tangent, state_->plan(), state_->packed, tile, derivatives);
}
template <class T>
void PackedNetworks<T>::second_backward(const NetworkTile<T>& tile, const T* seeds,
                                        T* grad_features, Index stride, T* grad_last) const {
  KINML_CALL_KERNEL(networks_tile_second_backward, state_->plan(), state_->packed, tile, seeds,
                    grad_features, stride, grad_last);
}
template <class T>
void PackedNetworks<T>::weight_gradients(const NetworkTile<T>& tile, T* grad_parameters,
                                         bool add) const {
  const NetworkPlan& plan = state_->plan();
  if (!add) clear_missing(plan, tile.starts, grad_parameters);
  KINML_CALL_KERNEL(networks_tile_weight_gradients, plan, tile, grad_parameters, add);
}

// ---- second derivatives -------------------------------------------------------------------------

template <class T>
void networks_second_backward(const NetworkShape& shape, const T* parameters, const T* features,
                              Index feature_stride, const Index* rows, const Index* starts,
                              const T* grad_atomic, const T* tangents, T* derivatives,
                              T* grad_features, T* grad_parameters, int n_threads) {
  const PackedNetworks<T> networks(shape, parameters, n_threads);
  const Index n_species = shape.n_species;
  const Index n_atoms = starts[n_species];
  const Index n_tiles = (n_atoms + kTileAtoms - 1) / kTileAtoms;
  // Groups of tiles sum their weight gradients on their own; their number depends on nothing but
  // the batch, and they are added in their order: the same bits for any number of threads.
  const Index n_groups = n_tiles < kTileGroups ? n_tiles : kTileGroups;
  Index n_parameters = 0;
  for (Index s = 0; s < n_species; ++s) n_parameters += shape.parameters_of(s);
  const Index room = padded(n_parameters);
  const int slots = (n_threads > 1 ? n_threads : 1) + thread_index();
  const Index tile_numbers = padded(networks.tile_memory(kTileAtoms));
  static thread_local Buffer buffer, indices;
  T* const sums = buffer.get<T>((grad_parameters ? n_groups * room : 0) + slots * tile_numbers);
  T* const memory = sums + (grad_parameters ? n_groups * room : 0);
  Index* const tile_starts = indices.get<Index>(slots * (n_species + 1));

  parallel_for(n_groups, n_threads, [&](Index group) {
    const Index begin = n_tiles * group / n_groups, end = n_tiles * (group + 1) / n_groups;
    for (Index t = begin; t < end; ++t) {
      const Index first = t * kTileAtoms;
      const Index count = std::min(kTileAtoms, n_atoms - first);
      Index* const own_starts = tile_starts + thread_index() * (n_species + 1);
      for (Index s = 0; s <= n_species; ++s)
        own_starts[s] = std::clamp<Index>(starts[s] - first, 0, count);
      const NetworkTile<T> tile = {features,
                                   feature_stride,
                                   rows + first,
                                   own_starts,
                                   memory + thread_index() * tile_numbers,
                                   tangents,
                                   feature_stride};
      networks.forward(tile, nullptr);
      networks.backward(tile, grad_atomic + first, nullptr, 0);
      networks.tangent(tile, derivatives ? derivatives + first : nullptr);
      if (grad_features == nullptr && grad_parameters == nullptr) continue;
      networks.second_backward(tile, nullptr, grad_features, feature_stride);
      if (grad_parameters != nullptr)
        networks.weight_gradients(tile, sums + group * room, t > begin);
    }
  });
  if (grad_parameters != nullptr) {
    constexpr Index chunk = 4096;
    parallel_for((n_parameters + chunk - 1) / chunk, n_threads, [&](Index item) {
      const Index end = std::min(n_parameters, (item + 1) * chunk);
      for (Index i = item * chunk; i < end; ++i) {
        T sum = T(0);
        for (Index group = 0; group < n_groups; ++group) sum += sums[group * room + i];
        grad_parameters[i] = sum;
      }
    });
  }
  buffer.trim();
}

#define KINML_INSTANTIATE_NETWORKS(T)                                                              \
  template void networks_forward<T>(const NetworkShape&, const T*, const T*, Index, const Index*,  \
                                    const Index*, T*, T*, int);                                    \
  template void networks_backward<T>(const NetworkShape&, const T*, const T*, Index, const Index*, \
                                     const Index*, const T*, const T*, T*, T*, int);               \
  template void networks_second_backward<T>(const NetworkShape&, const T*, const T*, Index,        \
                                            const Index*, const Index*, const T*, const T*, T*,    \
                                            T*, T*, int);                                          \
  template class PackedNetworks<T>;
KINML_INSTANTIATE_NETWORKS(double)
KINML_INSTANTIATE_NETWORKS(float)
#undef KINML_INSTANTIATE_NETWORKS

}  // namespace cpu
}  // namespace kinml

#include "networks_cpu.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "dispatch.h"
#include "networks_plan.h"
#include "parallel.h"

namespace kinml {

using Index = std::int64_t;
using cpu::NetworkPlan;
using cpu::NetworkSegment;
using cpu::NetworkTile;

#define KINML_DECLARE_NETWORKS(T)                                                                  \
  KINML_DECLARE_KERNEL(void, networks_pack_forward, const NetworkPlan&, const T*, T*, int)         \
  KINML_DECLARE_KERNEL(void, networks_pack_backward, const NetworkPlan&, const T*, T*, int)        \
  KINML_DECLARE_KERNEL(void, networks_forward_tiles, const NetworkPlan&, const NetworkTile*,       \
                       Index, const T*, const T*, Index, const Index*, T*, T*, T*, int)            \
  KINML_DECLARE_KERNEL(void, networks_backward_tiles, const NetworkPlan&, const NetworkTile*,      \
                       Index, const T*, const T*, const T*, T*, T*, Index, const Index*, int)      \
  KINML_DECLARE_KERNEL(void, networks_weight_gradients, const NetworkPlan&, const NetworkSegment*, \
                       Index, const T*, Index, const Index*, const T*, const T*, T*, int)
KINML_DECLARE_NETWORKS(double)
KINML_DECLARE_NETWORKS(float)
#undef KINML_DECLARE_NETWORKS

namespace cpu {

namespace {

// Atoms whose deltas are in memory at one time, for each thread: about what its cache holds.
constexpr Index kAtomsPerThread = 1024;
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
    if (bytes > bytes_) {
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

// Offsets of everything, and the sizes of the packed matrices.
class Layout {
 public:
  Layout(const NetworkShape& shape, const Index* starts, bool backward, bool first_layer) {
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
        layer.packed = packed_;
        layer.transposed = -1;
        if (!backward) {
          packed_ += (layer.in + 1) * padded(layer.out);
        } else if (l > 1 || first_layer) {
          layer.transposed = packed_;
          packed_ += padded(layer.in) * layer.out;
        }
        packed_ = padded(packed_);
        layers_.push_back(layer);
      }
      if (padded(column) > per_atom_) per_atom_ = padded(column);
    }
    plan_ = {shape.n_species, shape.n_layers,         layers_.data(), shape.activations,
             starts,          shape.saved_per_atom(), per_atom_};
  }

  const NetworkPlan& plan() const { return plan_; }
  Index packed() const { return packed_; }

 private:
  std::vector<NetworkLayer> layers_;
  Index packed_ = 0;
  Index per_atom_ = 0;
  NetworkPlan plan_;
};

// Fewer atoms a tile if there are not enough tiles for the threads.
Index tile_atoms(Index n_atoms, int n_threads) {
  return n_atoms < 2 * kTileAtoms * n_threads ? kTileAtoms / 2 : kTileAtoms;
}

void add_tiles(const NetworkSegment& segment, Index atoms, std::vector<NetworkTile>& tiles) {
  for (Index first = 0; first < segment.count; first += atoms)
    tiles.push_back(
        {&segment, first, segment.count - first < atoms ? segment.count - first : atoms});
}

}  // namespace

template <class T>
void networks_forward(const NetworkShape& shape, const T* parameters, const T* features,
                      Index feature_stride, const Index* rows, const Index* starts, T* saved,
                      T* atomic, int n_threads) {
  const Index n_atoms = starts[shape.n_species];
  if (n_atoms == 0) return;
  const Layout layout(shape, starts, false, false);
  const NetworkPlan& plan = layout.plan();

  std::vector<NetworkSegment> segments;
  std::vector<NetworkTile> tiles;
  segments.reserve(shape.n_species);
  const Index atoms = tile_atoms(n_atoms, n_threads);
  for (Index s = 0; s < shape.n_species; ++s) {
    segments.push_back({s, starts[s], starts[s + 1] - starts[s], 0});
    add_tiles(segments.back(), atoms, tiles);
  }

  // Inside somebody else's parallel region parallel_for is serial, but the index stays theirs.
  const int slots = (n_threads > 1 ? n_threads : 1) + thread_index();
  const Index scratch = saved ? 0 : slots * kTileAtoms * plan.scratch_per_atom;
  static thread_local Buffer buffer;
  T* const packed = buffer.get<T>(layout.packed() + scratch + kSlack);
  KINML_CALL_KERNEL(networks_pack_forward, plan, parameters, packed, n_threads);
  KINML_CALL_KERNEL(networks_forward_tiles, plan, tiles.data(), static_cast<Index>(tiles.size()),
                    packed, features, feature_stride, rows, saved, packed + layout.packed(), atomic,
                    n_threads);
  buffer.trim();
}

template <class T>
void networks_backward(const NetworkShape& shape, const T* parameters, const T* features,
                       Index feature_stride, const Index* rows, const Index* starts, const T* saved,
                       const T* grad_atomic, T* grad_features, T* grad_parameters, int n_threads) {
  const Layout layout(shape, starts, true, grad_features != nullptr);
  const NetworkPlan& plan = layout.plan();
  if (grad_parameters != nullptr) {
    Index offset = 0;
    for (Index s = 0; s < shape.n_species; ++s) {
      const Index n = shape.parameters_of(s);
      if (starts[s] == starts[s + 1]) std::memset(grad_parameters + offset, 0, n * sizeof(T));
      offset += n;
    }
  }
  const Index n_atoms = starts[shape.n_species];
  if (n_atoms == 0) return;

  // Deltas of so many atoms at a time; whole blocks of kSumAtoms, so that every weight's sum is
  // formed in the same way for any number of threads.
  Index limit = kAtomsPerThread * (n_threads > 1 ? n_threads : 1);
  if (limit > n_atoms) limit = n_atoms + kSumAtoms;
  static thread_local Buffer buffer;
  T* const packed = buffer.get<T>(layout.packed() + limit * plan.scratch_per_atom + kSlack);
  T* const deltas = packed + layout.packed();
  KINML_CALL_KERNEL(networks_pack_backward, plan, parameters, packed, n_threads);

  std::vector<NetworkSegment> segments;
  std::vector<NetworkTile> tiles;
  segments.reserve(shape.n_species);
  const Index atoms = tile_atoms(n_atoms, n_threads);
  Index species = 0, first = starts[0];
  while (species < shape.n_species) {
    segments.clear();
    tiles.clear();
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
    for (const NetworkSegment& segment : segments) add_tiles(segment, atoms, tiles);
    KINML_CALL_KERNEL(networks_backward_tiles, plan, tiles.data(), static_cast<Index>(tiles.size()),
                      packed, saved, grad_atomic, deltas, grad_features, feature_stride, rows,
                      n_threads);
    if (grad_parameters != nullptr)
      KINML_CALL_KERNEL(networks_weight_gradients, plan, segments.data(),
                        static_cast<Index>(segments.size()), features, feature_stride, rows, saved,
                        deltas, grad_parameters, n_threads);
  }
  buffer.trim();
}

#define KINML_INSTANTIATE_NETWORKS(T)                                                              \
  template void networks_forward<T>(const NetworkShape&, const T*, const T*, Index, const Index*,  \
                                    const Index*, T*, T*, int);                                    \
  template void networks_backward<T>(const NetworkShape&, const T*, const T*, Index, const Index*, \
                                     const Index*, const T*, const T*, T*, T*, int);
KINML_INSTANTIATE_NETWORKS(double)
KINML_INSTANTIATE_NETWORKS(float)
#undef KINML_INSTANTIATE_NETWORKS

}  // namespace cpu
}  // namespace kinml

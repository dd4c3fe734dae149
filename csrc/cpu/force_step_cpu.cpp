#include "force_step_cpu.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "aev_cpu.h"
#include "aev_environments.h"
#include "force_step_kernels.h"
#include "guarded.h"
#include "jacobian_kernels.h"
#include "networks_cpu.h"

namespace kinml::cpu {

namespace {

using Index = std::int64_t;

// Atoms of a tile, about; more make the products with the weights a little faster and leave the
// cache sooner.
constexpr Index kTileAtoms = 64;
// For fewer gradients aev_transposed is faster, one after the other, than aev_transposed_many.
constexpr Index kTogether = 3;
// Weight gradients are summed in at most so many parts, each by one thread at a time.
constexpr Index kParts = 32;

// Structures [first, last) of a batch.
struct Range {
  Index first, last;
};

// Cuts a range into pieces of nearly equal numbers of atoms, at most so many, none empty.
template <class T>
std::vector<Range> cut(const System<T>& batch, Range range, Index pieces) {
  const auto atoms = [&](Index i) {
    const Index s = batch.structure(i);
    return batch.offsets[s + 1] - batch.offsets[s];
  };
  Index total = 0;
  for (Index i = range.first; i < range.last; ++i) total += atoms(i);
  std::vector<Range> result;
  Index done = 0, begin = range.first;
  for (Index i = range.first; i < range.last; ++i) {
    done += atoms(i);
    const Index next = static_cast<Index>(result.size()) + 1;
    if (i + 1 == range.last || done * pieces >= next * total) {
      result.push_back({begin, i + 1});
      begin = i + 1;
    }
  }
  return result;
}
template <class T>
Index count_atoms(const System<T>& batch, Range range) {
  Index total = 0;
  for (Index i = range.first; i < range.last; ++i) {
    const Index s = batch.structure(i);
    total += batch.offsets[s + 1] - batch.offsets[s];
  }
  return total;
}
template <class T>
std::vector<Range> tiles_of(const System<T>& batch, Range range) {
  return cut(batch, range, (count_atoms(batch, range) + kTileAtoms - 1) / kTileAtoms);
}

// A chain of networks, with the weights in the order of the passes.
template <class T>
using PackedLevels = std::vector<std::unique_ptr<const PackedNetworks<T>>>;

template <class T>
PackedLevels<T> packed_levels(const NetworkChain& networks, const T* weights, int n_threads) {
  PackedLevels<T> levels;
  for (Index k = 0; k < networks.n_levels(); ++k) {
    levels.push_back(
        std::make_unique<const PackedNetworks<T>>(networks.shapes[k], weights, n_threads));
    weights += networks.parameters_of(k);
  }
  return levels;
}

// One structure of a tile, of whose energies a loss is made.
template <class T>
struct TileStructure {
  Index number;            // within the batch
  const double* energies;  // [K]
  const T* forces;         // [K, room] those of level k begin at forces + k * room; or null
  Index room;
  double* e;  // [K] receives dL/dE
  T* r;       // [K, room] receives dL/dF, for the levels for which ...
  bool* any;  // [K] ... this is set; it is zero otherwise
};

// Where the outputs of energy_forces begin.
template <class T>
struct Outputs {
  double* energies;
  T* forces;
  Index rows;  // levels of the outputs
  Index count, n_atoms;

  double* energy(Index member, Index row) const { return energies + (member * rows + row) * count; }
  T* force(Index member, Index row) const { return forces + (member * rows + row) * 3 * n_atoms; }
};

// One thread's work on tiles.
template <class T>
class Worker {
 public:
  Worker(const NetworkChain& networks, const System<T>& batch, const AevTables<T>* tables)
      : shapes_(networks),
        n_levels_(networks.n_levels()),
        batch_(batch),
        length_(networks.length()),
        stride_(padded(length_ + (n_levels_ > 1 ? 1 : 0))),
        tables_(tables) {
    // Rows that begin in the same lines of the cache would drive one another out.
    if (stride_ * sizeof(T) % 1024 == 0) stride_ += kMaxLanes;
    if (tables != nullptr) environments_.emplace(*tables);
    e_.resize(n_levels_);
    rows_g_.resize(n_levels_);
    any_ = std::make_unique<bool[]>(n_levels_);
  }

  // Energies and forces of the members of an ensemble.
  void evaluate(Range range, const std::vector<PackedLevels<T>>& members, const Outputs<T>& out) {
    const bool forces = batch_.has_forces();
    const Index n_members = static_cast<Index>(members.size()), first = n_levels_ - out.rows;
    // The forces of all outputs are computed together where that is faster.
    const bool together =
        forces && environments_ && n_members > 1 && n_members * out.rows >= kTogether;
    const Index n_kept = together ? n_members * out.rows : 0;
    begin(range, members[0], n_kept);
    second_ = false;
    std::vector<const T*> g(n_kept);
    for (Index m = 0; m < n_members; ++m) {
      for (Index row = 0; together && row < out.rows; ++row) {
        rows_g_[first + row] = kept_g_ + (m * out.rows + row) * matrix_;
        g[m * out.rows + row] = rows_g_[first + row];
      }
      ascend(members[m], forces, forces);
      for (Index i = 0; i < count_; ++i)
        for (Index row = 0; row < out.rows; ++row) {
          out.energy(m, row)[first_ + i] = energies_[i * n_levels_ + first + row];
          if (!forces || together) continue;
          multiply_transposed(i, first + row);
          std::copy_n(forces_ + (first + row) * room_, 3 * atoms(i),
                      out.force(m, row) + 3 * atom(i));
        }
    }
    for (Index i = 0; together && i < count_; ++i) multiply_transposed(i, g, out);
  }

  // The gradient of the loss, written to `gradient` or added to it. wanted(TileStructure) gives the
  // derivatives of the loss; there are forces in it only `on_forces`, and it has to know them only
  // if `forces`.
  template <class Function>
  void differentiate(Range range, const PackedLevels<T>& levels, bool on_forces, bool forces,
                     const Function& wanted, T* gradient, bool add) {
    begin(range, levels);
    second_ = on_forces;
    ascend(levels, on_forces, forces || n_levels_ > 1);
    for (Index i = 0; i < count_; ++i) {
      for (Index k = 0; forces && on_forces && k < n_levels_; ++k) multiply_transposed(i, k);
      double* const energies = energies_.data() + i * n_levels_;
      wanted(TileStructure<T>{first_ + i, energies, forces && on_forces ? forces_ : nullptr, room_,
                              e_.data(), r_, any_.get()});
      std::copy(e_.begin(), e_.end(), energies);
      if (on_forces) descend(i);
    }
    std::fill_n(seeds_, n_, T(0));
    T* own = gradient + shapes_.parameters();
    for (Index k = n_levels_ - 1; k >= 0; --k) {
      const PackedNetworks<T>& networks = *levels[k];
      NetworkTile<T> tile = tile_of(k);
      T* const last = k > 0 ? atomic_ : nullptr;
      for (Index a = 0; a < n_; ++a)
        seeds_[a] += static_cast<T>(energies_[owners_[a] * n_levels_ + k]);
      if (k > 0) set_last(rows_a_, below(k));
      if (on_forces) {
        tile.tangents = rows_of(k);
        tile.tangent_stride = stride_;
        networks.tangent(tile, nullptr);
        networks.second_backward(tile, seeds_, nullptr, 0, last);
      } else {
        networks.backward(tile, seeds_, nullptr, 0, last);
      }
      own -= shapes_.parameters_of(k);
      networks.weight_gradients(tile, own, add);
      for (Index a = 0; last != nullptr && a < n_; ++a) seeds_[a] += last[a];
    }
  }

 private:
  // Sorts the atoms of a tile by species, and computes their descriptors.
  // There is room for so many more gradients g and forces, at kept_g_ and kept_forces_.
  void begin(Range range, const PackedLevels<T>& levels, Index n_kept = 0) {
    first_ = range.first;
    count_ = range.last - range.first;
    n_ = count_atoms(batch_, range);
    firsts_.resize(count_ + 1);
    starts_.assign(shapes_.n_species() + 1, 0);
    rows_.resize(n_);
    owners_.resize(n_);
    places_.resize(n_);
    energies_.resize(count_ * n_levels_);
    Index largest = 0, row = 0;
    for (Index i = 0; i < count_; ++i) {
      const Index s = batch_.structure(first_ + i);
      firsts_[i] = row;
      for (Index a = batch_.offsets[s]; a < batch_.offsets[s + 1]; ++a)
        ++starts_[batch_.species[a] + 1];
      const Index atoms = batch_.offsets[s + 1] - batch_.offsets[s];
      largest = std::max(largest, atoms);
      row += atoms;
    }
    firsts_[count_] = row;
    for (Index s = 0; s < shapes_.n_species(); ++s) starts_[s + 1] += starts_[s];
    next_.assign(starts_.begin(), starts_.end() - 1);
    for (Index i = 0; i < count_; ++i) {
      const Index begin = batch_.offsets[batch_.structure(first_ + i)] - firsts_[i];
      for (Index r = firsts_[i]; r < firsts_[i + 1]; ++r) {
        const Index place = next_[batch_.species[begin + r]]++;
        rows_[place] = r;
        owners_[place] = i;
        places_[r] = place;
      }
    }

    // Levels may have layers of different widths.
    memory_ = 0;
    for (const auto& level : levels) memory_ = std::max(memory_, padded(level->tile_memory(n_)));
    matrix_ = padded(n_ * stride_);
    room_ = padded(3 * largest + kMaxLanes);
    T* next = thread_scratch().template get<T>(
        (1 + n_levels_ + n_kept) * matrix_ + n_levels_ * memory_ +
        2 * (1 + n_levels_) * padded(n_) + (2 * n_levels_ + n_kept) * room_);
    const auto take = [&](Index numbers) {
      T* p = next;
      next += numbers;
      return p;
    };
    rows_a_ = take(matrix_);
    for (T*& rows : rows_g_) rows = take(matrix_);
    kept_g_ = take(n_kept * matrix_);
    kept_forces_ = take(n_kept * room_);
    network_memory_ = take(n_levels_ * memory_);
    atomic_ = take(padded(n_));
    seeds_ = take(padded(n_));
    eps_ = take(n_levels_ * padded(n_));
    slopes_ = take(n_levels_ * padded(n_));
    forces_ = take(n_levels_ * room_);
    r_ = take(n_levels_ * room_);

    if (environments_) {
      environments_->clear();
      kept_.resize(count_);
      for (Index i = 0; i < count_; ++i) {
        if (atoms(i) == 0) continue;
        environments_->set_structure(atoms(i), batch_.coordinates + 3 * atom(i),
                                     batch_.species + atom(i));
        kept_[i] = environments_->make(0, atoms(i));
        KINML_CALL_KERNEL(aev_rows, *tables_, kept_[i], rows_a_ + firsts_[i] * stride_, stride_);
      }
    } else {
      for (Index i = 0; i < count_; ++i)
        for (Index a = 0; a < atoms(i); ++a)
          std::copy_n(batch_.features + (atom(i) + a) * length_, length_,
                      rows_a_ + (firsts_[i] + a) * stride_);
    }
  }

  Index atom(Index i) const { return batch_.offsets[batch_.structure(first_ + i)]; }
  Index atoms(Index i) const { return firsts_[i + 1] - firsts_[i]; }
  StoredJacobian<T> stored(Index i) const {
    return {batch_.jacobian + atom(i) * length_ * batch_.columns, atoms(i), length_,
            batch_.columns};
  }

  // Of level k: gradients g_k, later directions U_k, in the order of the rows.
  T* rows_of(Index k) const { return rows_g_[k]; }
  // In species order: eps_{k-1}, and c_k.
  T* below(Index k) const { return eps_ + (k - 1) * padded(n_); }
  T* slopes(Index k) const { return slopes_ + k * padded(n_); }
  NetworkTile<T> tile_of(Index k) const {
    return {rows_a_, stride_, rows_.data(), starts_.data(), network_memory_ + k * memory_,
            nullptr, 0,       second_};
  }
  // The number behind the descriptor's, in each row; values in species order.
  void set_last(T* rows, const T* values) const {
    for (Index a = 0; a < n_; ++a) rows[rows_[a] * stride_ + length_] = values[a];
  }

  // Energies of all levels; with `slopes` also what tangents need, and with `gradients` g_k.
  void ascend(const PackedLevels<T>& levels, bool slopes_too, bool gradients) {
    std::fill(energies_.begin(), energies_.end(), 0.0);
    for (Index k = 0; k < n_levels_; ++k) {
      if (k > 0) set_last(rows_a_, below(k));
      levels[k]->forward(tile_of(k), atomic_);
      // In species order, whatever the threads.
      for (Index j = k; j < n_levels_; ++j)
        for (Index a = 0; a < n_; ++a)
          energies_[owners_[a] * n_levels_ + j] += static_cast<double>(atomic_[a]);
      if (k + 1 < n_levels_)
        for (Index a = 0; a < n_; ++a) below(k + 1)[a] = (k > 0 ? below(k)[a] : T(0)) + atomic_[a];
      if (!slopes_too) continue;
      levels[k]->backward(tile_of(k), nullptr, gradients ? rows_of(k) : nullptr, stride_);
      if (k == 0) continue;
      for (Index a = 0; a < n_; ++a) {
        T* const g = rows_of(k) + rows_[a] * stride_;
        const T* const lower = rows_of(k - 1) + rows_[a] * stride_;
        const T slope = g[length_], factor = 1 + slope;
        slopes(k)[a] = slope;
        for (Index d = 0; d < length_; ++d) g[d] += factor * lower[d];
      }
    }
  }

  // forces_ of level k = -J^T g_k of structure i
  void multiply_transposed(Index i, Index k) {
    const Index n = 3 * atoms(i);
    if (n == 0) return;
    const T* const g = rows_of(k) + firsts_[i] * stride_;
    T* const out = forces_ + k * room_;
    if (environments_) {
      std::fill_n(out, n, T(0));
      KINML_CALL_KERNEL(aev_transposed, *tables_, kept_[i], g, stride_, out,
                        environments_->scratch(kept_[i]));
    } else {
      KINML_CALL_KERNEL(jacobian_transpose_product, stored(i), g, stride_, out);
    }
    for (Index c = 0; c < n; ++c) out[c] = T(0) - out[c];  // no negative zero
  }

  // The forces of structure i for all outputs: output j has the gradients g[j].
  void multiply_transposed(Index i, const std::vector<const T*>& g, const Outputs<T>& out) {
    const Index n = 3 * atoms(i), count = static_cast<Index>(g.size());
    if (n == 0) return;
    from_.resize(count);
    to_.resize(count);
    for (Index j = 0; j < count; ++j) {
      from_[j] = g[j] + firsts_[i] * stride_;
      to_[j] = kept_forces_ + j * room_;
      std::fill_n(to_[j], n, T(0));
    }
    KINML_CALL_KERNEL(aev_transposed_many, *tables_, kept_[i], from_.data(), count, stride_,
                      to_.data(), environments_->many_scratch(kept_[i]));
    for (Index j = 0; j < count; ++j) {
      T* const forces = out.force(j / out.rows, j % out.rows) + 3 * atom(i);
      for (Index c = 0; c < n; ++c) forces[c] = T(0) - to_[j][c];
    }
  }

  // (U_k, T_k) of structure i for all levels, from r_k and any_[k], in place of g_k.
  void descend(Index i) {
    const Index begin = firsts_[i], end = firsts_[i + 1];
    for (Index k = n_levels_ - 1; k >= 0; --k) {
      multiply(i, k);
      for (Index row = begin; row < end; ++row) {
        T* const u = rows_of(k) + row * stride_;
        if (k + 1 < n_levels_) {
          const T* const above = rows_of(k + 1) + row * stride_;
          const T factor = 1 + slopes(k + 1)[places_[row]];
          for (Index d = 0; d < length_; ++d) u[d] += factor * above[d];
        }
        if (k > 0) u[length_] = dot(rows_of(k - 1) + row * stride_, u);
      }
    }
  }
  // Eight sums, so that they fit into registers.
  T dot(const T* x, const T* y) const {
    T sums[8] = {};
    Index d = 0;
    for (; d + 8 <= length_; d += 8)
      for (Index j = 0; j < 8; ++j) sums[j] += x[d + j] * y[d + j];
    for (; d < length_; ++d) sums[0] += x[d] * y[d];
    T sum = 0;
    for (const T s : sums) sum += s;
    return sum;
  }

  // v_k = -J r_k into the rows of structure i, or zero
  void multiply(Index i, Index k) {
    const Index n = 3 * atoms(i);
    if (n == 0) return;
    T* const v = rows_of(k) + firsts_[i] * stride_;
    if (!any_[k]) {
      for (Index a = 0; a < atoms(i); ++a) std::fill_n(v + a * stride_, length_, T(0));
      return;
    }
    T* const r = r_ + k * room_;
    for (Index c = 0; c < n; ++c) r[c] = -r[c];
    if (environments_)
      KINML_CALL_KERNEL(aev_tangent_rows, *tables_, kept_[i], r, v, stride_,
                        environments_->scratch(kept_[i]));
    else
      KINML_CALL_KERNEL(jacobian_product, stored(i), r, v, stride_);
  }

  static Scratch& thread_scratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  const NetworkChain& shapes_;
  const Index n_levels_;
  const System<T>& batch_;
  Index length_, stride_;
  const AevTables<T>* tables_;
  std::optional<Environments<T>> environments_;

  // The tile.
  bool second_ = true;  // whether second derivatives follow
  Index first_ = 0, count_ = 0, n_ = 0;
  std::vector<Index> firsts_, starts_, next_, rows_, owners_, places_;
  std::vector<double> energies_;  // [count_, K]; later dL/dE
  std::vector<double> e_;
  std::unique_ptr<bool[]> any_;
  std::vector<Environment<T>> kept_;
  std::vector<const T*> from_;  // of aev_transposed_many
  std::vector<T*> to_;
  Index matrix_ = 0, memory_ = 0, room_ = 0;
  std::vector<T*> rows_g_;
  T *rows_a_ = nullptr, *kept_g_ = nullptr, *kept_forces_ = nullptr, *network_memory_ = nullptr,
    *atomic_ = nullptr, *seeds_ = nullptr, *eps_ = nullptr, *slopes_ = nullptr, *forces_ = nullptr,
    *r_ = nullptr;
};

template <class T>
std::optional<AevTableStorage<T>> tables_of(const Model<T>& model, const System<T>& batch) {
  if (batch.stored()) return std::nullopt;
  return std::optional<AevTableStorage<T>>(std::in_place, model.aev);
}

// gradient = that of the loss, in parts. on_forces(i): whether the loss depends on the forces of
// structure i; forces: whether `wanted` has to know them.
template <class T, class OnForces, class Function>
void differentiate(const Model<T>& model, const System<T>& batch, const OnForces& on_forces,
                   bool forces, const Function& wanted, T* gradient, int n_threads) {
  const NetworkChain& networks = model.networks;
  const T* const weights = model.weights;
  const Index n_weights = networks.parameters();
  const auto tables = tables_of(model, batch);
  const PackedLevels<T> levels = packed_levels(networks, weights, n_threads);
  const Range all{0, batch.count()};
  const Index wished = (count_atoms(batch, all) + kTileAtoms - 1) / kTileAtoms;
  const std::vector<Range> parts = cut(batch, all, std::clamp<Index>(wished, 1, kParts));
  const Index n_parts = static_cast<Index>(parts.size());
  const Index room = padded(n_weights);
  thread_local Scratch memory;
  T* const sums = memory.get<T>(n_parts * room);
  guarded_parallel_for(n_parts, n_threads, [&](Index part) {
    Worker<T> worker(networks, batch, tables ? &*tables : nullptr);
    bool add = false;
    for (const Range tile : tiles_of(batch, parts[part])) {
      bool any = false;
      for (Index i = tile.first; i < tile.last; ++i) any = any || on_forces(i);
      worker.differentiate(tile, levels, any, forces, wanted, sums + part * room, add);
      add = true;
    }
  });
  const Index block = 2048;
  parallel_for((n_weights + block - 1) / block, n_threads, [&](Index item) {
    const Index begin = item * block, end = std::min(n_weights, begin + block);
    if (n_parts == 0)
      std::fill(gradient + begin, gradient + end, T(0));
    else
      KINML_CALL_KERNEL(sum_parts, sums + begin, n_parts, room, end - begin, gradient + begin);
  });
}

template <class T>
void evaluate_tiles(const Model<T>& model, const System<T>& batch, const Outputs<T>& out,
                    int n_threads) {
  const NetworkChain& networks = model.networks;
  const T* const weights = model.weights;
  const Index n_members = model.n_members;
  const auto tables = tables_of(model, batch);
  std::vector<PackedLevels<T>> members;
  for (Index m = 0; m < n_members; ++m)
    members.push_back(packed_levels(networks, weights + m * networks.parameters(), n_threads));
  const std::vector<Range> tiles = tiles_of(batch, {0, batch.count()});
  guarded_parallel_for(static_cast<Index>(tiles.size()), n_threads, [&](Index tile) {
    Worker<T> worker(networks, batch, tables ? &*tables : nullptr);
    worker.evaluate(tiles[tile], members, out);
  });
}

// Energies and forces with all threads on one structure after another.
template <class T>
void evaluate_large(const Model<T>& model, const System<T>& batch, const Outputs<T>& out,
                    int n_threads) {
  const NetworkChain& networks = model.networks;
  const T* const weights = model.weights;
  const Index n_members = model.n_members, length = networks.length(),
              n_levels = networks.n_levels();
  const Index stride = length + (n_levels > 1 ? 1 : 0), n_species = networks.n_species();
  const Index first_row = n_levels - out.rows;
  for (Index i = 0; i < batch.count(); ++i) {
    const Index s = batch.structure(i), begin = batch.offsets[s];
    const Index n = batch.offsets[s + 1] - begin;
    const Index offsets[] = {0, n};
    const System<T> one{n, 1, batch.species + begin, offsets, batch.coordinates + 3 * begin};
    std::vector<Index> starts(n_species + 1), rows(n);
    for (Index a = 0; a < n; ++a) ++starts[one.species[a] + 1];
    for (Index z = 0; z < n_species; ++z) starts[z + 1] += starts[z];
    std::vector<Index> next(starts.begin(), starts.end() - 1);
    for (Index a = 0; a < n; ++a) rows[next[one.species[a]]++] = a;
    std::vector<T> aevs(n * length), features(n * stride), slopes(n * stride), g(n * length);
    std::vector<T> atomic(n), eps(n), seeds(n, T(1)), saved;
    aev_forward<T>(model.aev, one, aevs.data(), n_threads);
    for (Index a = 0; a < n; ++a)
      std::copy_n(aevs.data() + a * length, length, features.data() + a * stride);
    for (Index m = 0; m < n_members; ++m) {
      const T* own = weights + m * networks.parameters();
      double energy = 0;
      for (Index k = 0; k < n_levels; own += networks.parameters_of(k), ++k) {
        const NetworkShape& shape = networks.shapes[k];
        saved.resize(n * shape.saved_per_atom());
        for (Index a = 0; k > 0 && a < n; ++a) features[rows[a] * stride + length] = eps[a];
        networks_forward<T>(shape, own, features.data(), stride, rows.data(), starts.data(),
                            saved.data(), atomic.data(), n_threads);
        networks_backward<T>(shape, own, features.data(), stride, rows.data(), starts.data(),
                             saved.data(), seeds.data(), slopes.data(), nullptr, n_threads);
        for (Index a = 0; a < n; ++a) {
          eps[a] = (k > 0 ? eps[a] : T(0)) + atomic[a];
          energy += static_cast<double>(atomic[a]);
          const T* const slope = slopes.data() + a * stride;
          const T factor = k > 0 ? 1 + slope[length] : T(0);
          T* const total = g.data() + a * length;
          for (Index d = 0; d < length; ++d)
            total[d] = slope[d] + (k > 0 ? factor * total[d] : T(0));
        }
        if (k < first_row) continue;
        T* const forces = out.force(m, k - first_row) + 3 * begin;
        aev_vjp<T>(model.aev, one, g.data(), forces, n_threads);
        for (Index c = 0; c < 3 * n; ++c) forces[c] = T(0) - forces[c];
        out.energy(m, k - first_row)[i] = energy;
      }
    }
  }
}

}  // namespace

template <class T>
void energy_forces(const Model<T>& model, const System<T>& batch, std::int64_t first_level,
                   double* energies, T* forces, int n_threads) {
  if (model.n_members == 0) return;
  const Index rows = model.networks.n_levels() - first_level,
              n_species = model.networks.n_species();
  const Outputs<T> out{energies, forces, rows, batch.count(), batch.n_atoms};
  Index largest = 0;
  for (Index i = 0; i < batch.count(); ++i)
    largest = std::max(largest, count_atoms(batch, {i, i + 1}));
  if (largest > kLargeStructure && !batch.stored())
    evaluate_large(model, batch, out, n_threads);
  else
    evaluate_tiles(model, batch, out, n_threads);
  if (model.sae == nullptr) return;
  for (Index row = 0; row < model.n_members * rows; ++row)
    for (Index i = 0; i < batch.count(); ++i) {
      const Index s = batch.structure(i);
      for (Index a = batch.offsets[s]; a < batch.offsets[s + 1]; ++a)
        energies[row * batch.count() + i] += model.sae[row * n_species + batch.species[a]];
    }
}

template <class T>
void energy_forces_backward(const Model<T>& model, const System<T>& batch, std::int64_t first_level,
                            const double* e, const T* r, T* gradient, int n_threads) {
  const Index n_levels = model.networks.n_levels();
  const bool on_forces = batch.has_forces();
  const auto given = [&](const TileStructure<T>& structure) {
    const Index s = batch.structure(structure.number);
    for (Index k = 0; k < n_levels; ++k) {
      const bool is_output = k >= first_level;
      structure.e[k] = is_output ? e[(k - first_level) * batch.count() + structure.number] : 0.0;
      structure.any[k] = is_output && on_forces;
      if (!structure.any[k]) continue;
      const T* const of_level = r + (k - first_level) * 3 * batch.n_atoms;
      std::copy(of_level + 3 * batch.offsets[s], of_level + 3 * batch.offsets[s + 1],
                structure.r + k * structure.room);
    }
  };
  differentiate(model, batch, [&](Index) { return on_forces; }, false, given, gradient, n_threads);
}

template <class T>
void force_step(const Model<T>& model, const System<T>& batch, const Loss& loss, double* losses,
                T* gradient, double* residuals, double* errors, int n_threads) {
  const Index n_levels = model.networks.n_levels();
  const auto atoms = [&](Index i) { return count_atoms(batch, {i, i + 1}); };
  // A structure without atoms counts, but has nothing to add.
  const auto adds_forces = [&](Index k, Index i) {
    return loss.force_weight(k, batch.structure(i)) != 0 && atoms(i) > 0;
  };
  const auto wanted = [&](const TileStructure<T>& structure) {
    const Index i = structure.number, s = batch.structure(i), n = 3 * atoms(i);
    for (Index k = 0; k < n_levels; ++k) {
      double& residual = residuals[k * batch.count() + i];
      residual = loss.energy_residual(k, s, structure.energies[k]);
      structure.e[k] = loss.energy_slope(k, s, residual);
      ForceErrors found;
      structure.any[k] = adds_forces(k, i);
      if (structure.any[k]) {
        const double slope = loss.force_slope(k, s, n);
        const T* const forces = structure.forces + k * structure.room;
        const double* const targets = loss.force_targets(k, batch.offsets[s]);
        T* const r = structure.r + k * structure.room;
        for (Index c = 0; c < n; ++c) {
          const double difference = static_cast<double>(forces[c]) - targets[c];
          found.add(difference);
          r[c] = static_cast<T>(slope * difference);
        }
      }
      found.write(errors + 3 * (k * batch.count() + i));
    }
  };
  const auto on_forces = [&](Index i) {
    for (Index k = 0; k < n_levels; ++k)
      if (adds_forces(k, i)) return true;
    return false;
  };
  differentiate(model, batch, on_forces, true, wanted, gradient, n_threads);
  losses[0] = losses[1] = 0;
  for (Index k = 0; k < n_levels; ++k) {
    double of_energies = 0, of_forces = 0;
    for (Index i = 0; i < batch.count(); ++i) {
      const Index s = batch.structure(i), place = k * batch.count() + i;
      of_energies += loss.energy_term(k, s, residuals[place]);
      of_forces += loss.force_term(k, s, errors[3 * place + 1], 3 * atoms(i));
    }
    losses[0] += of_energies / loss.counts[k];
    losses[1] += of_forces / loss.counts[n_levels + k];
  }
}

#define KINML_INSTANTIATE(T)                                                                   \
  template void energy_forces<T>(const Model<T>&, const System<T>&, std::int64_t, double*, T*, \
                                 int);                                                         \
  template void energy_forces_backward<T>(const Model<T>&, const System<T>&, std::int64_t,     \
                                          const double*, const T*, T*, int);                   \
  template void force_step<T>(const Model<T>&, const System<T>&, const Loss&, double*, T*,     \
                              double*, double*, int);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cpu

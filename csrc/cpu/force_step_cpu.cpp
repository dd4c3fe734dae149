#include "force_step_cpu.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "aev_environments.h"
#include "force_step_kernels.h"
#include "guarded.h"
#include "jacobian_kernels.h"

namespace kinml::cpu {

namespace {

using Index = std::int64_t;

// Atoms of a tile, about; more make the products with the weights a little faster and leave the
// cache sooner.
constexpr Index kTileAtoms = 64;
// Weight gradients are summed in at most so many parts, each by one thread at a time.
constexpr Index kParts = 32;

// Structures [first, last) of a batch.
struct Range {
  Index first, last;
};

// Cuts a range into pieces of nearly equal numbers of atoms, at most so many, none empty.
template <class T>
std::vector<Range> cut(const ForceBatch<T>& batch, Range range, Index pieces) {
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
Index count_atoms(const ForceBatch<T>& batch, Range range) {
  Index total = 0;
  for (Index i = range.first; i < range.last; ++i) {
    const Index s = batch.structure(i);
    total += batch.offsets[s + 1] - batch.offsets[s];
  }
  return total;
}
template <class T>
std::vector<Range> tiles_of(const ForceBatch<T>& batch, Range range) {
  return cut(batch, range, (count_atoms(batch, range) + kTileAtoms - 1) / kTileAtoms);
}

// What is wanted of a structure once its energy and forces are known.
struct Wanted {
  double energy;  // e = dL/dE
  bool forces;    // whether dL/dF was written; it is zero otherwise
};

// One thread's work on tiles.
template <class T>
class Worker {
 public:
  Worker(const NetworkShape& shape, const PackedNetworks<T>& networks, const ForceBatch<T>& batch,
         const AevTables<T>* tables)
      : shape_(shape),
        networks_(networks),
        batch_(batch),
        length_(tables == nullptr ? batch.length : batch.parameters->length()),
        stride_(padded(length_)) {
    // Rows that begin in the same lines of the cache would drive one another out.
    if (stride_ * sizeof(T) % 1024 == 0) stride_ += kMaxLanes;
    if (tables != nullptr) environments_.emplace(*tables);
    tables_ = tables;
  }

  // Energies and, if wanted, forces: result(i, E_i, F_i [3 n]) for the structures of the tile.
  template <class Result>
  void evaluate(Range range, const Result& result) {
    begin(range);
    networks_.forward(tile_, atomic_);
    networks_.backward(tile_, nullptr, rows_g_, stride_);
    sum_energies();
    for (Index i = 0; i < count_; ++i) {
      multiply_transposed(i);
      result(range.first + i, energies_[i], forces_);
    }
  }

  // The gradient of the loss, written to `gradient` or added to it. wanted(i, E_i, F_i, r) returns
  // dL/dE; with `on_forces` it also writes r = dL/dF [3 n] and says by its return value whether r
  // is zero throughout. F_i is null unless `forces`.
  template <class Function>
  void differentiate(Range range, bool on_forces, bool forces, const Function& wanted, T* gradient,
                     bool add) {
    begin(range);
    networks_.forward(tile_, atomic_);
    sum_energies();
    if (on_forces) networks_.backward(tile_, nullptr, forces ? rows_g_ : nullptr, stride_);
    for (Index i = 0; i < count_; ++i) {
      if (forces && on_forces) multiply_transposed(i);
      const Wanted w =
          wanted(first_ + i, energies_[i], forces && on_forces ? forces_ : nullptr, r_);
      energies_[i] = w.energy;
      if (on_forces) multiply(i, w.forces);
    }
    for (Index a = 0; a < n_; ++a) seeds_[a] = static_cast<T>(energies_[owners_[a]]);
    if (on_forces) {
      tile_.tangents = rows_g_;
      tile_.tangent_stride = stride_;
      networks_.tangent(tile_, nullptr);
      networks_.second_backward(tile_, seeds_, nullptr, 0);
    } else {
      networks_.backward(tile_, seeds_, nullptr, 0);
    }
    networks_.weight_gradients(tile_, gradient, add);
  }

 private:
  // Sorts the atoms of a tile by species, and computes their descriptors.
  void begin(Range range) {
    first_ = range.first;
    count_ = range.last - range.first;
    n_ = count_atoms(batch_, range);
    firsts_.resize(count_ + 1);
    starts_.assign(shape_.n_species + 1, 0);
    rows_.resize(n_);
    owners_.resize(n_);
    energies_.resize(count_);
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
    for (Index s = 0; s < shape_.n_species; ++s) starts_[s + 1] += starts_[s];
    next_.assign(starts_.begin(), starts_.end() - 1);
    for (Index i = 0; i < count_; ++i) {
      const Index begin = batch_.offsets[batch_.structure(first_ + i)] - firsts_[i];
      for (Index r = firsts_[i]; r < firsts_[i + 1]; ++r) {
        const Index place = next_[batch_.species[begin + r]]++;
        rows_[place] = r;
        owners_[place] = i;
      }
    }

    const Index matrix = padded(n_ * stride_), memory = padded(networks_.tile_memory(n_));
    T* next = thread_scratch().template get<T>(2 * matrix + memory + 2 * padded(n_) +
                                               2 * padded(3 * largest + kMaxLanes));
    const auto take = [&](Index numbers) {
      T* p = next;
      next += numbers;
      return p;
    };
    T* const rows_a = take(matrix);
    rows_g_ = take(matrix);
    tile_ = {rows_a, stride_, rows_.data(), starts_.data(), take(memory)};
    atomic_ = take(padded(n_));
    seeds_ = take(padded(n_));
    forces_ = take(padded(3 * largest + kMaxLanes));
    r_ = take(padded(3 * largest + kMaxLanes));

    if (environments_) {
      environments_->clear();
      kept_.resize(count_);
      for (Index i = 0; i < count_; ++i) {
        if (atoms(i) == 0) continue;
        environments_->set_structure(atoms(i), batch_.coordinates + 3 * atom(i),
                                     batch_.species + atom(i));
        kept_[i] = environments_->make(0, atoms(i));
        KINML_CALL_KERNEL(aev_rows, *tables_, kept_[i], rows_a + firsts_[i] * stride_, stride_);
      }
    } else {
      for (Index i = 0; i < count_; ++i)
        for (Index a = 0; a < atoms(i); ++a)
          std::copy_n(batch_.features + (atom(i) + a) * length_, length_,
                      rows_a + (firsts_[i] + a) * stride_);
    }
  }

  Index atom(Index i) const { return batch_.offsets[batch_.structure(first_ + i)]; }
  Index atoms(Index i) const { return firsts_[i + 1] - firsts_[i]; }
  StoredJacobian<T> stored(Index i) const {
    return {batch_.jacobian + atom(i) * length_ * batch_.columns, atoms(i), length_,
            batch_.columns};
  }

  // Of network outputs; in species order, whatever the threads.
  void sum_energies() {
    std::fill(energies_.begin(), energies_.end(), 0.0);
    for (Index a = 0; a < n_; ++a) energies_[owners_[a]] += static_cast<double>(atomic_[a]);
  }

  // forces_ = -J^T g of structure i
  void multiply_transposed(Index i) {
    const Index n = 3 * atoms(i);
    if (n == 0) return;
    const T* const g = rows_g_ + firsts_[i] * stride_;
    if (environments_) {
      std::fill_n(forces_, n, T(0));
      KINML_CALL_KERNEL(aev_transposed, *tables_, kept_[i], g, stride_, forces_,
                        environments_->scratch(kept_[i]));
    } else {
      KINML_CALL_KERNEL(jacobian_transpose_product, stored(i), g, stride_, forces_);
    }
    for (Index c = 0; c < n; ++c) forces_[c] = T(0) - forces_[c];  // no negative zero
  }

  // v = -J r into the rows of structure i, or zero
  void multiply(Index i, bool any) {
    const Index n = 3 * atoms(i);
    if (n == 0) return;
    T* const v = rows_g_ + firsts_[i] * stride_;
    if (!any) {
      for (Index a = 0; a < atoms(i); ++a) std::fill_n(v + a * stride_, length_, T(0));
      return;
    }
    for (Index c = 0; c < n; ++c) r_[c] = -r_[c];
    if (environments_)
      KINML_CALL_KERNEL(aev_tangent_rows, *tables_, kept_[i], r_, v, stride_,
                        environments_->scratch(kept_[i]));
    else
      KINML_CALL_KERNEL(jacobian_product, stored(i), r_, v, stride_);
  }

  static Scratch& thread_scratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  const NetworkShape& shape_;
  const PackedNetworks<T>& networks_;
  const ForceBatch<T>& batch_;
  const AevTables<T>* tables_;
  Index length_, stride_;
  std::optional<Environments<T>> environments_;

  // The tile.
  Index first_ = 0, count_ = 0, n_ = 0;
  std::vector<Index> firsts_, starts_, next_, rows_, owners_;
  std::vector<double> energies_;
  std::vector<Environment<T>> kept_;
  NetworkTile<T> tile_{};
  T *rows_g_ = nullptr, *atomic_ = nullptr, *seeds_ = nullptr, *forces_ = nullptr, *r_ = nullptr;
};

template <class T>
std::optional<AevTableStorage<T>> tables_of(const ForceBatch<T>& batch) {
  if (batch.parameters == nullptr) return std::nullopt;
  return std::optional<AevTableStorage<T>>(std::in_place, *batch.parameters);
}

// gradient = that of the loss, in parts. on_forces(i): whether the loss depends on the forces of
// structure i; forces: whether `wanted` has to know them.
template <class T, class OnForces, class Function>
void differentiate(const NetworkShape& shape, const T* weights, const ForceBatch<T>& batch,
                   const OnForces& on_forces, bool forces, const Function& wanted, T* gradient,
                   int n_threads) {
  Index n_weights = 0;
  for (Index s = 0; s < shape.n_species; ++s) n_weights += shape.parameters_of(s);
  const auto tables = tables_of(batch);
  const PackedNetworks<T> networks(shape, weights, n_threads);
  const Range all{0, batch.count};
  const Index wished = (count_atoms(batch, all) + kTileAtoms - 1) / kTileAtoms;
  const std::vector<Range> parts = cut(batch, all, std::clamp<Index>(wished, 1, kParts));
  const Index n_parts = static_cast<Index>(parts.size());
  const Index room = padded(n_weights);
  thread_local Scratch memory;
  T* const sums = memory.get<T>(n_parts * room);
  guarded_parallel_for(n_parts, n_threads, [&](Index part) {
    Worker<T> worker(shape, networks, batch, tables ? &*tables : nullptr);
    bool add = false;
    for (const Range tile : tiles_of(batch, parts[part])) {
      bool any = false;
      for (Index i = tile.first; i < tile.last; ++i) any = any || on_forces(i);
      worker.differentiate(tile, any, forces, wanted, sums + part * room, add);
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
void evaluate_tiles(const NetworkShape& shape, const T* weights, const ForceBatch<T>& batch,
                    double* energies, T* forces, int n_threads) {
  const auto tables = tables_of(batch);
  const PackedNetworks<T> networks(shape, weights, n_threads);
  const std::vector<Range> tiles = tiles_of(batch, {0, batch.count});
  guarded_parallel_for(static_cast<Index>(tiles.size()), n_threads, [&](Index tile) {
    Worker<T> worker(shape, networks, batch, tables ? &*tables : nullptr);
    worker.evaluate(tiles[tile], [&](Index i, double energy, const T* of_structure) {
      const Index s = batch.structure(i), begin = batch.offsets[s], end = batch.offsets[s + 1];
      energies[i] = energy;
      std::copy(of_structure, of_structure + 3 * (end - begin), forces + 3 * begin);
    });
  });
}

// Energies and forces with all threads on one structure after another.
template <class T>
void evaluate_large(const NetworkShape& shape, const T* weights, const ForceBatch<T>& batch,
                    double* energies, T* forces, int n_threads) {
  const Index length = batch.parameters->length();
  for (Index i = 0; i < batch.count; ++i) {
    const Index s = batch.structure(i), begin = batch.offsets[s];
    const Index n = batch.offsets[s + 1] - begin;
    const Index offsets[] = {0, n};
    const AevBatch<T> one{1, batch.coordinates + 3 * begin, batch.species + begin, offsets};
    std::vector<Index> starts(shape.n_species + 1), rows(n);
    for (Index a = 0; a < n; ++a) ++starts[one.species[a] + 1];
    for (Index z = 0; z < shape.n_species; ++z) starts[z + 1] += starts[z];
    std::vector<Index> next(starts.begin(), starts.end() - 1);
    for (Index a = 0; a < n; ++a) rows[next[one.species[a]]++] = a;
    std::vector<T> features(n * length), gradient(n * length), atomic(n), seeds(n, T(1));
    std::vector<T> saved(n * shape.saved_per_atom());
    aev_forward<T>(*batch.parameters, one, features.data(), n_threads);
    networks_forward<T>(shape, weights, features.data(), length, rows.data(), starts.data(),
                        saved.data(), atomic.data(), n_threads);
    networks_backward<T>(shape, weights, features.data(), length, rows.data(), starts.data(),
                         saved.data(), seeds.data(), gradient.data(), nullptr, n_threads);
    T* const out = forces + 3 * begin;
    aev_vjp<T>(*batch.parameters, one, gradient.data(), out, n_threads);
    for (Index c = 0; c < 3 * n; ++c) out[c] = T(0) - out[c];
    energies[i] = 0;
    for (Index a = 0; a < n; ++a) energies[i] += static_cast<double>(atomic[a]);
  }
}

}  // namespace

template <class T>
void energy_forces(const NetworkShape& shape, const T* weights, const ForceBatch<T>& batch,
                   const double* sae, double* energies, T* forces, int n_threads) {
  Index largest = 0;
  for (Index i = 0; i < batch.count; ++i)
    largest = std::max(largest, count_atoms(batch, {i, i + 1}));
  if (largest > kLargeStructure && batch.parameters != nullptr)
    evaluate_large(shape, weights, batch, energies, forces, n_threads);
  else
    evaluate_tiles(shape, weights, batch, energies, forces, n_threads);
  if (sae == nullptr) return;
  for (Index i = 0; i < batch.count; ++i) {
    const Index s = batch.structure(i);
    for (Index a = batch.offsets[s]; a < batch.offsets[s + 1]; ++a)
      energies[i] += sae[batch.species[a]];
  }
}

template <class T>
void energy_forces_backward(const NetworkShape& shape, const T* weights, const ForceBatch<T>& batch,
                            const double* e, const T* r, T* gradient, int n_threads) {
  const auto given = [&](Index i, double, const T*, T* to) -> Wanted {
    const Index s = batch.structure(i);
    std::copy(r + 3 * batch.offsets[s], r + 3 * batch.offsets[s + 1], to);
    return {e[i], true};
  };
  differentiate(
      shape, weights, batch, [](Index) { return true; }, false, given, gradient, n_threads);
}

template <class T>
void force_step(const NetworkShape& shape, const T* weights, const ForceBatch<T>& batch,
                const ForceLoss& loss, double* losses, T* gradient, double* residuals,
                double* errors, int n_threads) {
  Index n_energies = 0, n_forces = 0;
  for (Index i = 0; i < batch.count; ++i) {
    n_energies += loss.energy_weights[batch.structure(i)] != 0;
    n_forces += loss.force_weights[batch.structure(i)] != 0;
  }
  const double energy_factor = 2 * loss.energy_scale / std::max<Index>(n_energies, 1);
  const double force_factor = 2 * loss.force_scale / std::max<Index>(n_forces, 1);
  const auto wanted = [&](Index i, double energy, const T* forces, T* r) -> Wanted {
    const Index s = batch.structure(i), begin = 3 * batch.offsets[s];
    const Index n = 3 * batch.offsets[s + 1] - begin;
    residuals[i] = energy - loss.energies[s];
    double sum = 0, squares = 0, largest = 0;
    const double weight = n == 0 ? 0.0 : loss.force_weights[s];
    if (weight != 0) {
      const double factor = force_factor * weight / static_cast<double>(n);
      for (Index c = 0; c < n; ++c) {
        const double difference = static_cast<double>(forces[c]) - loss.forces[begin + c];
        const double size = std::abs(difference);
        sum += size;
        squares += difference * difference;
        largest = size > largest || std::isnan(size) ? size : largest;
        r[c] = static_cast<T>(factor * difference);
      }
    }
    errors[3 * i] = sum;
    errors[3 * i + 1] = squares;
    errors[3 * i + 2] = largest;
    const double own = loss.energy_weights[s];
    return {own == 0 ? 0.0 : energy_factor * own * residuals[i], weight != 0};
  };
  const auto on_forces = [&](Index i) { return loss.force_weights[batch.structure(i)] != 0; };
  differentiate(shape, weights, batch, on_forces, true, wanted, gradient, n_threads);
  losses[0] = losses[1] = 0;
  for (Index i = 0; i < batch.count; ++i) {
    const Index s = batch.structure(i), n = 3 * (batch.offsets[s + 1] - batch.offsets[s]);
    if (loss.energy_weights[s] != 0)
      losses[0] += loss.energy_weights[s] * residuals[i] * residuals[i];
    if (loss.force_weights[s] != 0 && n > 0)
      losses[1] += loss.force_weights[s] * errors[3 * i + 1] / static_cast<double>(n);
  }
  losses[0] /= static_cast<double>(std::max<Index>(n_energies, 1));
  losses[1] /= static_cast<double>(std::max<Index>(n_forces, 1));
}

#define KINML_INSTANTIATE(T)                                                                   \
  template void energy_forces<T>(const NetworkShape&, const T*, const ForceBatch<T>&,          \
                                 const double*, double*, T*, int);                             \
  template void energy_forces_backward<T>(const NetworkShape&, const T*, const ForceBatch<T>&, \
                                          const double*, const T*, T*, int);                   \
  template void force_step<T>(const NetworkShape&, const T*, const ForceBatch<T>&,             \
                              const ForceLoss&, double*, T*, double*, double*, int);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cpu

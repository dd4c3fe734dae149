// Descriptors of the structures of a tile, and products with their Jacobians: from coordinates,
// with environments that are computed once and read by all products, or from stored ones.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../core/model.h"
#include "aev_environments.h"
#include "jacobian_kernels.h"
#include "tile.h"

namespace kinml::cpu {

// What descriptors of a system are computed with: tables, or nothing for stored ones. Shared by
// all threads.
template <class T>
class DescriptorSource {
 public:
  DescriptorSource(const AevParameters& parameters, const System<T>& system) {
    if (!system.stored()) tables_.emplace(parameters);
  }
  const AevTables<T>* tables() const { return tables_ ? &*tables_ : nullptr; }

 private:
  std::optional<AevTableStorage<T>> tables_;
};

// One thread's environments, for one tile after another; nothing for stored descriptors.
template <class T>
class TileEnvironments {
 public:
  explicit TileEnvironments(const DescriptorSource<T>& source) : tables_(source.tables()) {
    if (tables_ != nullptr) made_.emplace(*tables_);
  }
  const AevTables<T>& tables() const { return *tables_; }
  bool stored() const { return tables_ == nullptr; }
  Environments<T>& made() { return *made_; }
  // For tiles of centres of one structure, which others were set to.
  void share(const Environments<T>& others) {
    made_->share_structure(others);
    shared_ = true;
  }
  void set_structure(const System<T>& system, std::int64_t s) {
    if (!shared_) made_->set_structure(system, s);
  }

 private:
  const AevTables<T>* tables_;
  std::optional<Environments<T>> made_;
  bool shared_ = false;
};

template <class T>
class TileDescriptors {
 public:
  // Writes the descriptors: [n_rows, D] in rows `stride` numbers apart, like all matrices here;
  // not to null, for stored ones that are read where they are. Environments of a tile before are
  // lost.
  TileDescriptors(const Tile<T>& tile, TileEnvironments<T>& environments, std::int64_t length,
                  std::int64_t stride, T* rows)
      : tile_(tile), environments_(environments), length_(length), stride_(stride) {
    if (!environments_.stored())
      compute(rows);
    else if (rows != nullptr)
      copy(rows);
  }

  // out [3 atoms(i)] = -J^T g of structure i; g: the tile's matrix; virials [atoms(i), 3, 3] of the
  // centres (aev_kernels.h), from coordinates, or null
  void forces(std::int64_t i, const T* g, T* out, T* virials = nullptr) const {
    const std::int64_t n = 3 * tile_.atoms(i);
    if (environments_.stored()) {
      if (n > 0) KINML_CALL_KERNEL(jacobian_transpose_product, stored(i), of(i, g), stride_, out);
    } else {
      std::fill_n(out, n, T(0));
      add_gradient(i, g, out, virials);
    }
    negate(out, n);
  }
  // out += J^T g, from coordinates
  void add_gradient(std::int64_t i, const T* g, T* out, T* virials) const {
    if (tile_.rows(i) == 0) return;
    KINML_CALL_KERNEL(aev_transposed, environments_.tables(), kept_[i], of(i, g), stride_, out,
                      virials, environments_.made().scratch(kept_[i]));
  }

  // For fewer gradients `forces` is faster, one after the other, than `forces_of_many`.
  static constexpr std::int64_t kMany = 3;

  // The same for several matrices g, from coordinates: outs[j] = -J^T g[j]; no virials: empty.
  void forces_of_many(std::int64_t i, const std::vector<const T*>& g, const std::vector<T*>& outs,
                      const std::vector<T*>& virials) const {
    const std::int64_t n = 3 * tile_.atoms(i);
    for (T* const out : outs) std::fill_n(out, n, T(0));
    add_gradients(i, g, outs, virials);
    for (T* const out : outs) negate(out, n);
  }
  void add_gradients(std::int64_t i, const std::vector<const T*>& g, const std::vector<T*>& outs,
                     const std::vector<T*>& virials) const {
    if (tile_.rows(i) == 0) return;
    std::vector<const T*> from;
    for (const T* const matrix : g) from.push_back(of(i, matrix));
    KINML_CALL_KERNEL(aev_transposed_many, environments_.tables(), kept_[i], from.data(),
                      static_cast<std::int64_t>(from.size()), stride_, outs.data(),
                      virials.empty() ? nullptr : virials.data(),
                      environments_.made().many_scratch(kept_[i]));
  }

  // v = -J r into the rows of structure i; r [3 atoms(i)] is negated. From coordinates, `strain`
  // [3, 3], or null, adds strain . d to what r says of the displacement d of a pair.
  void directions(std::int64_t i, T* r, T* v, const T* strain = nullptr) const {
    const std::int64_t n = 3 * tile_.atoms(i);
    if (tile_.rows(i) == 0) return;
    for (std::int64_t c = 0; c < n; ++c) r[c] = -r[c];
    if (environments_.stored())
      KINML_CALL_KERNEL(jacobian_product, stored(i), r, of(i, v), stride_);
    else
      KINML_CALL_KERNEL(aev_tangent_rows, environments_.tables(), kept_[i], r, strain, of(i, v),
                        stride_, environments_.made().scratch(kept_[i]));
  }

 private:
  void compute(T* rows) {
    environments_.made().clear();
    kept_.resize(tile_.count());
    for (std::int64_t i = 0; i < tile_.count(); ++i) {
      if (tile_.rows(i) == 0) continue;
      environments_.set_structure(tile_.system(), tile_.structure(i));
      const std::int64_t first = tile_.first_centre();
      kept_[i] = environments_.made().make(first, first + tile_.rows(i));
      KINML_CALL_KERNEL(aev_rows, environments_.tables(), kept_[i], of(i, rows), stride_);
    }
  }
  void copy(T* rows) const {
    const std::int64_t begin = tile_.first_centre();
    for (std::int64_t i = 0; i < tile_.count(); ++i)
      for (std::int64_t a = begin; a < begin + tile_.rows(i); ++a)
        std::copy_n(tile_.system().features + (tile_.first_atom(i) + a) * length_, length_,
                    of(i, rows) + a * stride_);
  }
  StoredJacobian<T> stored(std::int64_t i) const {
    const System<T>& system = tile_.system();
    return {system.jacobian + tile_.first_atom(i) * length_ * system.columns, tile_.atoms(i),
            length_, system.columns};
  }
  // Where the row of the first atom of structure i is, or would be.
  template <class Number>
  Number* of(std::int64_t i, Number* matrix) const {
    return matrix + (tile_.first_row(i) - tile_.first_centre()) * stride_;
  }
  static void negate(T* out, std::int64_t n) {
    for (std::int64_t c = 0; c < n; ++c) out[c] = T(0) - out[c];  // no negative zero
  }

  const Tile<T>& tile_;
  TileEnvironments<T>& environments_;
  std::int64_t length_, stride_;
  std::vector<Environment<T>> kept_;
};

}  // namespace kinml::cpu

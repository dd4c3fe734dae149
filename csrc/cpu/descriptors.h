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

 private:
  const AevTables<T>* tables_;
  std::optional<Environments<T>> made_;
};

template <class T>
class TileDescriptors {
 public:
  // Writes the descriptors: [n_atoms, D] in rows `stride` numbers apart, like all matrices here;
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

  // out [3 atoms(i)] = -J^T g of structure i; g: the tile's matrix
  void forces(std::int64_t i, const T* g, T* out) const {
    const std::int64_t n = 3 * tile_.atoms(i);
    if (n == 0) return;
    if (environments_.stored()) {
      KINML_CALL_KERNEL(jacobian_transpose_product, stored(i), of(i, g), stride_, out);
    } else {
      std::fill_n(out, n, T(0));
      KINML_CALL_KERNEL(aev_transposed, environments_.tables(), kept_[i], of(i, g), stride_, out,
                        environments_.made().scratch(kept_[i]));
    }
    negate(out, n);
  }

  // For fewer gradients `forces` is faster, one after the other, than `forces_of_many`.
  static constexpr std::int64_t kMany = 3;

  // The same for several matrices g, from coordinates: outs[j] = -J^T g[j].
  void forces_of_many(std::int64_t i, const std::vector<const T*>& g,
                      const std::vector<T*>& outs) const {
    const std::int64_t n = 3 * tile_.atoms(i), count = static_cast<std::int64_t>(g.size());
    if (n == 0) return;
    std::vector<const T*> from(count);
    for (std::int64_t j = 0; j < count; ++j) {
      from[j] = of(i, g[j]);
      std::fill_n(outs[j], n, T(0));
    }
    KINML_CALL_KERNEL(aev_transposed_many, environments_.tables(), kept_[i], from.data(), count,
                      stride_, outs.data(), environments_.made().many_scratch(kept_[i]));
    for (T* const out : outs) negate(out, n);
  }

  // v = -J r into the rows of structure i; r [3 atoms(i)] is negated.
  void directions(std::int64_t i, T* r, T* v) const {
    const std::int64_t n = 3 * tile_.atoms(i);
    if (n == 0) return;
    for (std::int64_t c = 0; c < n; ++c) r[c] = -r[c];
    if (environments_.stored())
      KINML_CALL_KERNEL(jacobian_product, stored(i), r, of(i, v), stride_);
    else
      KINML_CALL_KERNEL(aev_tangent_rows, environments_.tables(), kept_[i], r, of(i, v), stride_,
                        environments_.made().scratch(kept_[i]));
  }

 private:
  void compute(T* rows) {
    const System<T>& system = tile_.system();
    environments_.made().clear();
    kept_.resize(tile_.count());
    for (std::int64_t i = 0; i < tile_.count(); ++i) {
      const std::int64_t n = tile_.atoms(i), first = tile_.first_atom(i);
      if (n == 0) continue;
      environments_.made().set_structure(n, system.coordinates + 3 * first, system.species + first);
      kept_[i] = environments_.made().make(0, n);
      KINML_CALL_KERNEL(aev_rows, environments_.tables(), kept_[i], of(i, rows), stride_);
    }
  }
  void copy(T* rows) const {
    for (std::int64_t i = 0; i < tile_.count(); ++i)
      for (std::int64_t a = 0; a < tile_.atoms(i); ++a)
        std::copy_n(tile_.system().features + (tile_.first_atom(i) + a) * length_, length_,
                    of(i, rows) + a * stride_);
  }
  StoredJacobian<T> stored(std::int64_t i) const {
    const System<T>& system = tile_.system();
    return {system.jacobian + tile_.first_atom(i) * length_ * system.columns, tile_.atoms(i),
            length_, system.columns};
  }
  template <class Number>
  Number* of(std::int64_t i, Number* matrix) const {
    return matrix + tile_.first_row(i) * stride_;
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

// Atomic environment vectors of a batch on the GPU, with torch sorting the atoms of large
// structures into cells.
#pragma once

#include <limits>

#include "../cuda/aev_cuda.h"
#include "checks.h"
#include "gpu.h"

namespace kinml::ops {

class GpuAev {
 public:
  // All but the parameters on the device of `gpu`; the shapes have been checked. Both must outlive
  // the object.
  GpuAev(const at::Tensor& coordinates, const at::Tensor& species, const at::Tensor& offsets,
         const AevParameters& parameters, const Gpu& gpu)
      : coordinates_(coordinates.contiguous()),
        species_(species.contiguous()),
        offsets_(offsets.contiguous()),
        parameters_(parameters),
        gpu_(gpu) {
    if (!cuda::aev_structures_are_large(n_structures(), n_atoms())) return;
    const at::Tensor keys = at::empty_like(species_);
    with_type(coordinates_, [&](auto zero) {
      using T = decltype(zero);
      cuda::aev_cell_keys<T>(parameters_, batch<T>(), n_atoms(), keys.mutable_data_ptr<int64_t>(),
                             gpu_.stream);
    });
    std::tie(keys_, atoms_) = at::sort(keys, /*stable=*/true, 0, false);
  }

  int64_t length() const { return parameters_.length(); }
  // a [n_atoms, D]
  at::Tensor forward() const {
    return run(cuda::AevProduct::forward, {n_atoms(), parameters_.length()},
               [&]<class T>(T* out, char* space) {
                 cuda::aev_forward<T>(parameters_, batch<T>(), n_atoms(), cells(), out, space,
                                      gpu_.stream);
               });
  }
  // J v of v [n_atoms, 3]
  at::Tensor jvp(const at::Tensor& v) const {
    return run(cuda::AevProduct::jvp, {n_atoms(), parameters_.length()},
               [&]<class T>(T* out, char* space) {
                 cuda::aev_jvp<T>(parameters_, batch<T>(), n_atoms(), cells(),
                                  v.const_data_ptr<T>(), out, space, gpu_.stream);
               });
  }
  // J^T g of g [n_atoms, D]
  at::Tensor vjp(const at::Tensor& g) const {
    return run(cuda::AevProduct::vjp, {n_atoms(), 3}, [&]<class T>(T* out, char* space) {
      cuda::aev_vjp<T>(parameters_, batch<T>(), n_atoms(), cells(), g.const_data_ptr<T>(), out,
                       space, gpu_.stream);
    });
  }
  // d/dx (g . J v)
  at::Tensor hvp(const at::Tensor& g, const at::Tensor& v) const {
    return run(cuda::AevProduct::hvp, {n_atoms(), 3}, [&]<class T>(T* out, char* space) {
      cuda::aev_hvp<T>(parameters_, batch<T>(), n_atoms(), cells(), g.const_data_ptr<T>(),
                       v.const_data_ptr<T>(), out, space, gpu_.stream);
    });
  }
  // J [n_atoms, D, columns]
  at::Tensor jacobian(int64_t columns) const {
    return run(cuda::AevProduct::jacobian, {n_atoms(), parameters_.length(), columns},
               [&]<class T>(T* out, char* space) {
                 cuda::aev_jacobian<T>(parameters_, batch<T>(), n_atoms(), cells(), columns, out,
                                       space, gpu_.stream);
               });
  }

 private:
  int64_t n_atoms() const { return coordinates_.size(0); }
  int64_t n_structures() const { return offsets_.size(0) - 1; }
  template <class T>
  AevBatch<T> batch() const {
    return {n_structures(), coordinates_.const_data_ptr<T>(), species_.const_data_ptr<int64_t>(),
            offsets_.const_data_ptr<int64_t>()};
  }
  cuda::AevCells cells() const {
    if (!keys_.defined()) return {};
    return {keys_.const_data_ptr<int64_t>(), atoms_.const_data_ptr<int64_t>()};
  }
  template <class Function>
  at::Tensor run(cuda::AevProduct product, at::IntArrayRef shape, const Function& function) const {
    // An atom that no structure has stays NaN.
    at::Tensor out =
        at::full(shape, std::numeric_limits<double>::quiet_NaN(), coordinates_.options());
    with_type(coordinates_, [&](auto zero) {
      using T = decltype(zero);
      const at::Tensor space =
          gpu_.workspace(cuda::aev_workspace<T>(parameters_, product, n_structures(), n_atoms()));
      function(out.mutable_data_ptr<T>(), bytes_of(space));
    });
    return out;
  }

  at::Tensor coordinates_, species_, offsets_;
  const AevParameters& parameters_;
  const Gpu& gpu_;
  at::Tensor keys_, atoms_;
};

}  // namespace kinml::ops

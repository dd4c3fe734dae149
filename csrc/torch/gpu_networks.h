// Pieces of the networks' ops on the GPU that the evaluation of large structures uses as well.
#pragma once

#include <tuple>

#include "../cuda/networks_cuda.h"
#include "checks.h"
#include "gpu.h"

namespace kinml::ops {

// Atoms sorted by species; see the schema.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> gpu_species_order(const at::Tensor& species,
                                                                        const at::Tensor& offsets,
                                                                        int64_t n_species) {
  check_order_arguments(species, offsets, n_species);
  check_device(offsets, "offsets", species, "species");
  const auto [sorted, rows] = at::sort(species.contiguous(), /*stable=*/true, 0, false);
  const at::Tensor starts = at::searchsorted(sorted, at::arange(n_species + 1, species.options()));
  const at::Tensor owners =
      at::searchsorted(offsets.slice(0, 1).contiguous(), rows, /*out_int32=*/false, /*right=*/true);
  return {rows, owners, starts};
}

// Sums in float64 over structures: see cuda::sum_by_structure. All contiguous; shift may be
// undefined.
inline at::Tensor sum_by_structure(const at::Tensor& values, const at::Tensor& order,
                                   const at::Tensor& firsts, const at::Tensor& starts,
                                   int n_species, const at::Tensor& shift, const Gpu& gpu) {
  at::Tensor sums = at::empty({firsts.size(0) - 1}, values.options().dtype(at::kDouble));
  with_type(values, [&](auto zero) {
    using T = decltype(zero);
    cuda::sum_by_structure<T>(values.const_data_ptr<T>(), order.const_data_ptr<int64_t>(),
                              firsts.const_data_ptr<int64_t>(), sums.size(0),
                              starts.const_data_ptr<int64_t>(), n_species,
                              shift.defined() ? shift.const_data_ptr<double>() : nullptr,
                              sums.mutable_data_ptr<double>(), gpu.stream);
  });
  return sums;
}

}  // namespace kinml::ops

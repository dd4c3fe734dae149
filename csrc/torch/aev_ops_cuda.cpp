// The ops of atomic environment vectors on the GPU.
#include <torch/library.h>

#include "gpu_aev.h"

namespace kinml::ops {
namespace {

using at::Tensor;
using Doubles = at::ArrayRef<double>;

// Calls function(GpuAev) of a batch with the right shapes.
template <class Function>
Tensor with_aev(const Tensor& coordinates, const Tensor& species, const Tensor& offsets,
                Doubles descriptor, const Function& function) {
  check_batch_shapes(coordinates, species, offsets);
  check_device(species, "species", coordinates, "coordinates");
  check_device(offsets, "offsets", coordinates, "coordinates");
  const AevParameters parameters = unpack_descriptor(descriptor);
  return translated(offsets.size(0) - 1, [&] {
    const Gpu gpu(coordinates);
    return function(GpuAev(coordinates, species, offsets, parameters, gpu));
  });
}
// A factor of a product: [n_atoms, columns].
Tensor checked(const Tensor& t, const char* name, const Tensor& coordinates, int64_t columns) {
  check_same_type(t, name, coordinates, "coordinates");
  check_matrix(t, name, coordinates.size(0), columns);
  check_device(t, name, coordinates, "coordinates");
  return t.contiguous();
}

Tensor aev(const Tensor& coordinates, const Tensor& species, const Tensor& offsets,
           Doubles descriptor) {
  return with_aev(coordinates, species, offsets, descriptor,
                  [](const GpuAev& aev) { return aev.forward(); });
}
Tensor aev_vjp(const Tensor& coordinates, const Tensor& species, const Tensor& offsets,
               const Tensor& gradient, Doubles descriptor) {
  return with_aev(coordinates, species, offsets, descriptor, [&](const GpuAev& aev) {
    return aev.vjp(checked(gradient, "gradient", coordinates, aev.length()));
  });
}
Tensor aev_jvp(const Tensor& coordinates, const Tensor& species, const Tensor& offsets,
               const Tensor& tangent, Doubles descriptor) {
  return with_aev(coordinates, species, offsets, descriptor, [&](const GpuAev& aev) {
    return aev.jvp(checked(tangent, "tangent", coordinates, 3));
  });
}
Tensor aev_hvp(const Tensor& coordinates, const Tensor& species, const Tensor& offsets,
               const Tensor& gradient, const Tensor& tangent, Doubles descriptor) {
  return with_aev(coordinates, species, offsets, descriptor, [&](const GpuAev& aev) {
    return aev.hvp(checked(gradient, "gradient", coordinates, aev.length()),
                   checked(tangent, "tangent", coordinates, 3));
  });
}
Tensor aev_jacobian(const Tensor& coordinates, const Tensor& species, const Tensor& offsets,
                    int64_t max_atoms, Doubles descriptor) {
  return with_aev(coordinates, species, offsets, descriptor,
                  [&](const GpuAev& aev) { return aev.jacobian(3 * max_atoms); });
}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, KINML_GPU_KEY, m) {
  m.impl("aev", aev);
  m.impl("aev_vjp", aev_vjp);
  m.impl("aev_jvp", aev_jvp);
  m.impl("aev_hvp", aev_hvp);
  m.impl("aev_jacobian", aev_jacobian);
}

}  // namespace kinml::ops

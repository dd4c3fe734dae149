// The ops of atomic environment vectors on the GPU.
#include <torch/library.h>

#include <limits>
#include <vector>

#include "../cuda/aev_cuda.h"
#include "arguments.h"
#include "gpu.h"

namespace kinml::ops {
namespace {

using at::Tensor;
using cuda::AevProduct;

// A checked system with coordinates, and what its AEVs are made of.
struct AevCall {
  SystemArguments system;
  AevParameters parameters;

  AevCall(const OptionalTensors& system_, at::ArrayRef<double> descriptor)
      : system(system_), parameters(unpack_descriptor(descriptor)) {
    coordinates_of(system_);
  }
  // product(parameters, system, pointer, workspace, stream), of a result [n_atoms, ...].
  template <class Function>
  Tensor run(AevProduct product, at::IntArrayRef rest, const Function& function) const {
    return translated(system.count(), [&] {
      const Gpu gpu(system.coordinates);
      std::vector<int64_t> shape{system.n_atoms()};
      shape.insert(shape.end(), rest.begin(), rest.end());
      // An atom that no structure has stays NaN.
      Tensor out = at::full(shape, std::numeric_limits<double>::quiet_NaN(), gpu.options);
      with_type(out, [&](auto zero) {
        using T = decltype(zero);
        const System<T> view = system.view<T>();
        const Tensor space = gpu.workspace(cuda::aev_workspace<T>(parameters, product, view));
        function(parameters, view, out.mutable_data_ptr<T>(), bytes_of(space), gpu.stream);
      });
      return out;
    });
  }
};

Tensor aev(const OptionalTensors& system, at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  return call.run(
      AevProduct::forward, {call.parameters.length()},
      []<class T>(const auto& p, const System<T>& s, T* out, char* space, cuda::Stream stream) {
        cuda::aev_forward<T>(p, s, out, space, stream);
      });
}
Tensor aev_vjp(const OptionalTensors& system, const Tensor& gradient,
               at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  const Tensor g = call.system.checked_rows(gradient, "gradient", call.parameters.length());
  return call.run(
      AevProduct::vjp, {3},
      [&]<class T>(const auto& p, const System<T>& s, T* out, char* space, cuda::Stream stream) {
        cuda::aev_vjp<T>(p, s, g.const_data_ptr<T>(), out, space, stream);
      });
}
Tensor aev_virials(const OptionalTensors& system, const Tensor& gradient,
                   at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  const Tensor g = call.system.checked_rows(gradient, "gradient", call.parameters.length());
  const auto options = call.system.coordinates.options();
  Tensor virials = at::zeros({call.system.n_atoms(), 3, 3}, options);
  Tensor sums = at::empty({call.system.n_structures(), 3, 3}, options.dtype(at::kDouble));
  call.run(
      AevProduct::vjp, {3},
      [&]<class T>(const auto& p, const System<T>& s, T* out, char* space, cuda::Stream stream) {
        T* const atomic = virials.mutable_data_ptr<T>();
        cuda::aev_vjp<T>(p, s, g.const_data_ptr<T>(), out, space, stream, nullptr, atomic);
        cuda::sum_virials<T>(s, 1, atomic, sums.mutable_data_ptr<double>(), stream);
      });
  return sums;
}
Tensor aev_jvp(const OptionalTensors& system, const Tensor& tangent,
               at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  const Tensor v = call.system.checked_rows(tangent, "tangent", 3);
  return call.run(
      AevProduct::jvp, {call.parameters.length()},
      [&]<class T>(const auto& p, const System<T>& s, T* out, char* space, cuda::Stream stream) {
        cuda::aev_jvp<T>(p, s, v.const_data_ptr<T>(), out, space, stream);
      });
}
Tensor aev_hvp(const OptionalTensors& system, const Tensor& gradient, const Tensor& tangent,
               at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  const Tensor g = call.system.checked_rows(gradient, "gradient", call.parameters.length());
  const Tensor v = call.system.checked_rows(tangent, "tangent", 3);
  return call.run(
      AevProduct::hvp, {3},
      [&]<class T>(const auto& p, const System<T>& s, T* out, char* space, cuda::Stream stream) {
        cuda::aev_hvp<T>(p, s, g.const_data_ptr<T>(), v.const_data_ptr<T>(), out, space, stream);
      });
}
Tensor aev_jacobian(const OptionalTensors& system, int64_t max_atoms,
                    at::ArrayRef<double> descriptor) {
  const AevCall call(system, descriptor);
  return call.run(
      AevProduct::jacobian, {call.parameters.length(), 3 * max_atoms},
      [&]<class T>(const auto& p, const System<T>& s, T* out, char* space, cuda::Stream stream) {
        cuda::aev_jacobian<T>(p, s, 3 * max_atoms, out, space, stream);
      });
}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, KINML_GPU_KEY, m) {
  m.impl("aev", aev);
  m.impl("aev_vjp", aev_vjp);
  m.impl("aev_virials", aev_virials);
  m.impl("aev_jvp", aev_jvp);
  m.impl("aev_hvp", aev_hvp);
  m.impl("aev_jacobian", aev_jacobian);
}

}  // namespace kinml::ops

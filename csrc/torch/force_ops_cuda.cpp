// The ops for energies and forces together on the GPU.
#include "../cuda/force_step_cuda.h"

#include "force_ops.h"
#include "gpu.h"

namespace kinml::ops {
namespace {

struct CudaBackend {
  static constexpr bool kLooksAtValues = false;
  // To look at the values of indices would wait for the GPU: what does not exist gives NaN.
  static void check_values(const SystemArguments&, int64_t) {}
  static void check_loss(const SystemArguments&, const Loss&) {}

  template <class T>
  static void energy_forces(const Model<T>& model, const System<T>& system, int64_t first_level,
                            const Outputs<T>& outputs, const at::Tensor& /*prepared*/,
                            const at::Tensor& like) {
    translated(system.count(), [&] {
      const Gpu gpu(like);
      const at::Tensor space = gpu.workspace(cuda::energy_forces_workspace(model, system));
      cuda::energy_forces(model, system, first_level, outputs, bytes_of(space), gpu.stream);
    });
  }
  template <class T>
  static void energy_forces_backward(const Model<T>& model, const System<T>& system,
                                     int64_t first_level, const double* e, const T* r,
                                     const double* w, T* gradient, const at::Tensor& like) {
    translated(system.count(), [&] {
      const Gpu gpu(like);
      const at::Tensor space = gpu.workspace(cuda::force_step_workspace(model, system));
      cuda::energy_forces_backward(model, system, first_level, e, r, w, gradient, bytes_of(space),
                                   gpu.stream);
    });
  }
  template <class T>
  static void force_step(const Model<T>& model, const System<T>& system, const Loss& loss,
                         double* losses, T* gradient, double* residuals, double* errors,
                         const at::Tensor& like) {
    translated(system.count(), [&] {
      const Gpu gpu(like);
      const at::Tensor space = gpu.workspace(cuda::force_step_workspace(model, system));
      cuda::force_step(model, system, loss, losses, gradient, residuals, errors, bytes_of(space),
                       gpu.stream);
    });
  }
  template <class T>
  static int64_t message_bytes(const System<T>& system, const Loss& loss, int64_t n_weights,
                               int64_t n_ranks) {
    return cuda::message_bytes<T>(system, loss, n_weights, n_ranks);
  }
  template <class T>
  static void force_step_share(const Model<T>& model, const System<T>& system, const Loss& loss,
                               int64_t rank, int64_t n_ranks, std::byte* message,
                               const at::Tensor& like) {
    translated(system.count(), [&] {
      const Gpu gpu(like);
      const at::Tensor space =
          gpu.workspace(cuda::force_step_share_workspace(model, system, rank, n_ranks));
      cuda::force_step_share(model, system, loss, rank, n_ranks, message, bytes_of(space),
                             gpu.stream);
    });
  }
  template <class T>
  static void force_step_join(const System<T>& system, const Loss& loss, const std::byte* messages,
                              int64_t n_ranks, int64_t n_weights, double* losses, T* gradient,
                              double* residuals, double* errors, const at::Tensor& like) {
    translated(system.count(), [&] {
      const Gpu gpu(like);
      cuda::force_step_join(system, loss, messages, n_ranks, n_weights, losses, gradient, residuals,
                            errors, gpu.stream);
    });
  }
};

at::Tensor prepare_weights(const at::Tensor& parameters, at::IntArrayRef) {
  return at::empty({0}, parameters.options().dtype(at::kByte));
}

#ifndef KINML_TWIN
// By the processor: second derivatives are asked for once in a while, of a molecule.
OptionalTensors on_cpu(const OptionalTensors& system) {
  OptionalTensors there;
  for (const std::optional<at::Tensor>& t : system.vec())
    there.push_back(t.has_value() ? std::optional(t->cpu()) : std::nullopt);
  return there;
}
template <class Schema>
c10::TypedOperatorHandle<Schema> named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

at::Tensor energy_hessians(const OptionalTensors& system, const at::Tensor& parameters,
                           at::ArrayRef<double> descriptor, at::IntArrayRef networks,
                           int64_t first_level, int64_t max_atoms,
                           const std::optional<at::Tensor>& atoms) {
  static const auto op =
      named<at::Tensor(const OptionalTensors&, const at::Tensor&, at::ArrayRef<double>,
                       at::IntArrayRef, int64_t, c10::SymInt, const std::optional<at::Tensor>&)>(
          "kinml_fast::energy_hessians");
  return op
      .call(on_cpu(system), parameters.cpu(), descriptor, networks, first_level, max_atoms,
            atoms.has_value() ? std::optional(atoms->cpu()) : std::nullopt)
      .to(parameters.device());
}
at::Tensor hessian_products(const OptionalTensors& system, const at::Tensor& parameters,
                            const at::Tensor& v, at::ArrayRef<double> descriptor,
                            at::IntArrayRef networks, int64_t first_level,
                            const std::optional<at::Tensor>&) {
  static const auto op = named<at::Tensor(
      const OptionalTensors&, const at::Tensor&, const at::Tensor&, at::ArrayRef<double>,
      at::IntArrayRef, int64_t, const std::optional<at::Tensor>&)>("kinml_fast::hessian_products");
  return op
      .call(on_cpu(system), parameters.cpu(), v.cpu(), descriptor, networks, first_level,
            std::nullopt)
      .to(parameters.device());
}
#endif

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, KINML_GPU_KEY, m) {
  m.impl("prepare_weights", prepare_weights);
#ifndef KINML_TWIN
  m.impl("energy_hessians", energy_hessians);
  m.impl("hessian_products", hessian_products);
#endif
  ForceOps<CudaBackend>::implement(m);
}

}  // namespace kinml::ops

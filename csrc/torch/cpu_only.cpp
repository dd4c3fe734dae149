// What a build without CUDA says to tensors on a GPU. Compiled only into such builds.
#include <torch/library.h>

namespace kinml::ops {
namespace {

void no_cuda(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(false, op.schema().name(),
              " got tensors on a GPU, but this build of kinml_fast has no CUDA kernels: reinstall "
              "it with KINML_CUDA=1 (it needs nvcc), or move the tensors to the CPU.");
}

}  // namespace

TORCH_LIBRARY_IMPL(kinml_fast, CUDA, m) {
  // Every op of schema.cpp; a test compares.
  for (const char* name : {"aev",
                           "aev_vjp",
                           "aev_virials",
                           "aev_jvp",
                           "aev_hvp",
                           "aev_jacobian",
                           "species_order",
                           "networks",
                           "networks_forward",
                           "networks_backward",
                           "networks_second_backward",
                           "energy_forces",
                           "energy_forces_virials",
                           "energy_forces_backward",
                           "energy_hessians",
                           "hessian_products",
                           "prepare_weights",
                           "force_step",
                           "message_bytes",
                           "force_step_share",
                           "force_step_join",
                           "adam_step"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&no_cuda>());
}

}  // namespace kinml::ops

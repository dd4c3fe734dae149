// A scripted model in a process without Python: energies and their gradient.
//
//   load_model <ops library> <model> <tensors>
//
// tensors: a tuple (coordinates, species, offsets) written by torch.save. Prints the energies, one
// a line, then the gradient of their sum, three numbers a line, with all digits.
#include <dlfcn.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s <ops library> <model> <tensors>\n", argv[0]);
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    torch::jit::Module model = torch::jit::load(argv[2]);
    std::ifstream file(argv[3], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    const std::vector<c10::IValue> inputs =
        torch::jit::pickle_load(bytes).toTuple()->elements().vec();
    at::Tensor coordinates = inputs[0].toTensor().set_requires_grad(true);

    const at::Tensor energies =
        model.forward({coordinates, inputs[1].toTensor(), inputs[2].toTensor()}).toTensor();
    const at::Tensor gradient =
        torch::autograd::grad({energies.sum()}, {coordinates})[0].to(at::kDouble);
    for (int64_t s = 0; s < energies.size(0); ++s)
      std::printf("%.17g\n", energies[s].item<double>());
    for (int64_t i = 0; i < gradient.size(0); ++i)
      std::printf("%.17g %.17g %.17g\n", gradient[i][0].item<double>(),
                  gradient[i][1].item<double>(), gradient[i][2].item<double>());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}

// example_md_torch MODEL LIBRARY [STEPS] [FEMTOSECONDS] [KELVIN] < in.xyz: example_md with libtorch.
//
// The model is a file of `kinml-fast export --format torchscript` or `aoti` (MODEL.pt2), the library
// is libkinml_ops.so:
// python -I -c "from kinml_fast._library import library_path; print(library_path())"
#include <ATen/Parallel.h>
#include <caffe2/serialize/inline_container.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "example_system.h"

namespace {

// What the file says of its model: the list of elements, and whether it computes in float.
struct Description {
  std::map<std::string, std::int64_t> species;
  torch::Dtype type = torch::kFloat64;

  explicit Description(const std::string& path) {
    caffe2::serialize::PyTorchStreamReader archive(path);
    const auto [bytes, size] = archive.getRecord("extra/kinml_fast.json");
    const std::string json(static_cast<const char*>(bytes.get()), size);
    const std::string list = between(json, "\"elements\": [", "]");
    for (std::size_t at = list.find('"'); at != list.npos;) {
      const std::size_t end = list.find('"', at + 1);
      species.emplace(list.substr(at + 1, end - at - 1), static_cast<std::int64_t>(species.size()));
      at = list.find('"', end + 1);
    }
    if (between(json, "\"dtype\": \"", "\"") == "float32") type = torch::kFloat32;
  }

 private:
  static std::string between(const std::string& text, const std::string& before,
                             const std::string& after) {
    const std::size_t begin = text.rfind(before);
    if (begin == text.npos)
      throw std::invalid_argument("the model is none that `kinml-fast export` has written");
    const std::size_t first = begin + before.size();
    return text.substr(first, text.find(after, first) - first);
  }
};

// One structure, but for its coordinates.
struct System {
  torch::Tensor species, offsets, cells, periodic;
};
// Coordinates -> energy and forces.
using Evaluate = std::function<std::pair<torch::Tensor, torch::Tensor>(const torch::Tensor&)>;

Evaluate scripted(const std::string& path, const System& system) {
  const torch::jit::Module model = torch::jit::load(path, torch::kCPU);
  c10::List<std::optional<torch::Tensor>> around({system.cells, system.periodic});
  for (int i = 0; i < 4; ++i) around.push_back(std::nullopt);
  return [=](const torch::Tensor& coordinates) {
    const auto found = model.get_method("energies_and_forces")(
        {coordinates, system.species, system.offsets, around});
    const auto& parts = found.toTuple()->elements();
    return std::pair(parts[0].toTensor(), parts[1].toTensor());
  };
}

Evaluate compiled(const std::string& path, const System& system) {
  const auto model = std::make_shared<torch::inductor::AOTIModelPackageLoader>(path);
  return [=](const torch::Tensor& coordinates) {
    const auto parts =
        model->run({coordinates, system.species, system.offsets, system.cells, system.periodic});
    return std::pair(parts[0], parts[1]);
  };
}

void run(int n_arguments, char** arguments) {
  if (n_arguments < 3)
    throw std::invalid_argument(
        "example_md_torch MODEL LIBRARY [STEPS] [FEMTOSECONDS] [KELVIN] < in.xyz");
  if (dlopen(arguments[2], RTLD_NOW) == nullptr)
    throw std::runtime_error(std::string("the library of the ops does not load: ") + dlerror());
  const std::string path = arguments[1];
  const Description about(path);
  const example::Options options(n_arguments, arguments, 3);
  at::set_num_threads(options.threads);
  example::System system = example::read_xyz(std::cin);

  std::vector<std::int64_t> species;
  for (const std::string& element : system.elements) {
    if (!about.species.contains(element))
      throw std::invalid_argument("the model does not know the element " + element);
    species.push_back(about.species.at(element));
  }
  const std::int64_t n = system.n();
  const System of_torch = {
      torch::tensor(species, torch::kInt64), torch::tensor({std::int64_t(0), n}, torch::kInt64),
      system.cell.empty() ? torch::eye(3, torch::kFloat64).unsqueeze(0)
                          : torch::tensor(system.cell, torch::kFloat64).reshape({1, 3, 3}),
      torch::tensor(system.periodic, torch::kInt64).reshape({1, 3})};
  const Evaluate evaluate =
      path.ends_with(".pt2") ? compiled(path, of_torch) : scripted(path, of_torch);
  c10::InferenceMode inference;
  example::run_nve(
      system, options, [&](const std::vector<double>& positions, std::vector<double>& forces) {
        const auto [energy, on_atoms] =
            evaluate(torch::tensor(positions, torch::kFloat64).reshape({n, 3}).to(about.type));
        const torch::Tensor f = on_atoms.to(torch::kFloat64).contiguous();
        forces.assign(f.data_ptr<double>(), f.data_ptr<double>() + 3 * n);
        return energy.item<double>();
      });
}

}  // namespace

int main(int n_arguments, char** arguments) {
  try {
    run(n_arguments, arguments);
    return 0;
  } catch (const std::exception& error) {
    std::string text = error.what();
    std::fprintf(stderr, "%s\n", text.substr(0, text.find('\n')).c_str());
    return 2;
  }
}

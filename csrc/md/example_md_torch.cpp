// example_md_torch MODEL LIBRARY [STEPS] [FEMTOSECONDS] [KELVIN] < in.xyz: example_md with libtorch.
//
// The model is a file of `kinml-fast export --format torchscript`, the library is libkinml_ops.so:
// python -c "from kinml_fast._library import library_path; print(library_path())"
#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <torch/script.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "example_system.h"

namespace {

// The list of elements in the description that the file carries, and whether it computes in float.
struct Description {
  std::map<std::string, std::int64_t> species;
  torch::Dtype type = torch::kFloat64;

  explicit Description(const std::string& json) {
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

void run(int n_arguments, char** arguments) {
  if (n_arguments < 3)
    throw std::invalid_argument(
        "example_md_torch MODEL LIBRARY [STEPS] [FEMTOSECONDS] [KELVIN] < in.xyz");
  if (dlopen(arguments[2], RTLD_NOW) == nullptr)
    throw std::runtime_error(std::string("the library of the ops does not load: ") + dlerror());
  torch::jit::ExtraFilesMap extra = {{"kinml_fast.json", ""}};
  torch::jit::Module model = torch::jit::load(arguments[1], torch::kCPU, extra);
  const Description about(extra["kinml_fast.json"]);
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
  const torch::Tensor codes = torch::tensor(species, torch::kInt64),
                      offsets = torch::tensor({std::int64_t(0), n}, torch::kInt64);
  c10::List<std::optional<torch::Tensor>> around;
  if (!system.cell.empty()) {
    around.push_back(torch::tensor(system.cell, torch::kFloat64).reshape({1, 3, 3}));
    around.push_back(torch::tensor(system.periodic, torch::kInt64).reshape({1, 3}));
    for (int i = 0; i < 4; ++i) around.push_back(std::nullopt);
  }
  c10::InferenceMode inference;
  example::run_nve(
      system, options, [&](const std::vector<double>& positions, std::vector<double>& forces) {
        const torch::Tensor coordinates =
            torch::tensor(positions, torch::kFloat64).reshape({n, 3}).to(about.type);
        std::vector<c10::IValue> inputs = {coordinates, codes, offsets};
        inputs.push_back(around.empty() ? c10::IValue() : c10::IValue(around));
        const auto found = model.get_method("energies_and_forces")(inputs).toTuple();
        const torch::Tensor on_atoms =
            found->elements()[1].toTensor().to(torch::kFloat64).contiguous();
        forces.assign(on_atoms.data_ptr<double>(), on_atoms.data_ptr<double>() + 3 * n);
        return found->elements()[0].toTensor().item<double>();
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

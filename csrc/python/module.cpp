// Python module _C: how this installation was built. The ops are in another library, which has no
// Python in it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "../cpu/dispatch.h"

namespace {

std::map<std::string, std::string> build_info() {
  return {
      {"version", KINML_VERSION},   {"torch", KINML_TORCH_VERSION},
      {"compiler", KINML_COMPILER}, {"instruction sets", KINML_ISAS},
      {"cuda", KINML_CUDA},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of kinml_fast.";
  m.def("build_info", &build_info, "What this installation was built with, as a dict of strings.");
  m.def("cpu_isa", &kinml::cpu::isa_name,
        "The instruction set in use on this processor: baseline, avx2 or avx512.");
}

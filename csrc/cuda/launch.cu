#include "launch.h"

#include <mutex>
#include <vector>

namespace kinml::cuda {
namespace {

bool pretending = false;
Device pretended{};

}  // namespace

void pretend_device(const Device* device) {
  pretending = device != nullptr;
  if (pretending) pretended = *device;
}

#if defined(__CUDACC__)

namespace {

// Found only where the library holds code for the device.
__global__ void probe() {}

std::string version_text(int version) {  // 13000: 13.0
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string driver_text() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return "The NVIDIA driver supports CUDA up to " + version_text(driver) +
         ", but kinml_fast was built with CUDA " + version_text(runtime) +
         ": install a newer driver, or rebuild kinml_fast with an older CUDA toolkit.";
}

std::string architecture_text() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
    return "kinml_fast holds no code for this GPU: rebuild it with KINML_CUDA_ARCHS naming it.";
  const std::string version = std::to_string(major) + "." + std::to_string(minor);
  const std::string code = std::to_string(major) + std::to_string(minor);
  return "kinml_fast holds no code for this GPU, whose compute capability is " + version +
         ": rebuild it with KINML_CUDA_ARCHS=" + code + ".";
}

std::string memory_text() {
  std::size_t free = 0, all = 0;
  std::string text = "The GPU is out of memory";
  if (cudaMemGetInfo(&free, &all) == cudaSuccess)
    text += " (" + std::to_string(free >> 20) + " of " + std::to_string(all >> 20) + " MiB free)";
  return text + ": take smaller batches, or end other programs on it.";
}

std::string text_of(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver: {
      int driver = 0;
      if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0)
        return "There is no NVIDIA driver on this machine (or it does not answer): kinml_fast "
               "cannot use a GPU.";
      return driver_text();
    }
    case cudaErrorNoDevice:
      return "CUDA finds no GPU: see nvidia-smi, and the environment variable "
             "CUDA_VISIBLE_DEVICES.";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      return architecture_text();
    case cudaErrorMemoryAllocation:
      return memory_text();
    default:
      return std::string("CUDA reports an error: ") + cudaGetErrorString(error) + " (" +
             cudaGetErrorName(error) + ").";
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw_launch_error(static_cast<int>(error));
}

}  // namespace

void throw_launch_error(int code) {
  const std::string text = text_of(static_cast<cudaError_t>(code));
  (void)cudaGetLastError();  // the next launch must not find this error again
  throw Error(text);
}

Device current_device() {
  if (pretending) return pretended;
  static std::mutex mutex;
  static std::vector<Device> known;  // by the number of the device; no multiprocessors: not yet
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto place = static_cast<std::size_t>(device);
  if (place >= known.size()) known.resize(place + 1, Device{0, 0});
  if (known[place].multiprocessors == 0) {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, probe));
    int memory = 0, multiprocessors = 0;
    check(cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    known[place] = {memory, multiprocessors};
  }
  return known[place];
}

#else

// An H100.
Device current_device() {
  return pretending ? pretended : Device{232448, 132};
}

#endif

}  // namespace kinml::cuda

#include "launch.cuh"

#include <array>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <vector>

namespace subquad::cuda {
namespace {

constexpr int kMostDevices = 128;

thread_local cudaStream_t stream_of_call = nullptr;

std::vector<void (*)()>& preparations() {
  static std::vector<void (*)()> all;
  return all;
}

int current_device() {
  int device = 0;
  detail::check(cudaGetDevice(&device), "asking for the current device");
  return device;
}

// Loads every kernel into the context of the current device.
void prepare_current(int device) {
  static std::array<std::atomic<bool>, kMostDevices> prepared{};
  static std::mutex turn;
  if (device < kMostDevices && prepared[static_cast<std::size_t>(device)].load()) return;
  const std::lock_guard<std::mutex> lock(turn);
  // Loading must not end a capture that some stream of this thread is in.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  detail::check(cudaThreadExchangeStreamCaptureMode(&mode), "preparing a device");
  try {
    for (void (*prepare_kernel)() : preparations()) prepare_kernel();
  } catch (...) {
    cudaThreadExchangeStreamCaptureMode(&mode);
    throw;
  }
  detail::check(cudaThreadExchangeStreamCaptureMode(&mode), "preparing a device");
  if (device < kMostDevices) prepared[static_cast<std::size_t>(device)].store(true);
}

}  // namespace

namespace detail {

cudaStream_t current_stream() noexcept { return stream_of_call; }

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  // The error is told here: the next call must not find it again.
  cudaGetLastError();
  const std::string text = std::string("CUDA, ") + what + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")";
  if (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice) {
    throw device_error(text + "; expected a driver for CUDA " +
                       std::to_string(CUDART_VERSION / 1000) + " or newer and a device");
  }
  if (status == cudaErrorNoKernelImageForDevice) {
    throw type_error(text + "; expected a device of compute capability 8.0 or higher");
  }
  if (status == cudaErrorMemoryAllocation) throw out_of_memory(text.c_str());
  throw device_error(text);
}

bool add_preparation(void (*prepare_kernel)()) {
  preparations().push_back(prepare_kernel);
  return true;
}

}  // namespace detail

call_scope::call_scope(int device_id, void* stream)
    : device_before_(-1), stream_before_(stream_of_call) {
  int count = 0;
  if (device_id < 0) {
    throw device_error("device: expected an index of at least 0, got " + std::to_string(device_id));
  }
  const int current = current_device();
  if (current != device_id) {
    detail::check(cudaGetDeviceCount(&count), "counting devices");
    if (device_id >= count) {
      throw device_error("device: expected an index below " + std::to_string(count) +
                         ", the number of CUDA devices, got " + std::to_string(device_id));
    }
    detail::check(cudaSetDevice(device_id), "choosing a device");
    device_before_ = current;
  }
  try {
    prepare_current(device_id);
  } catch (...) {
    if (device_before_ >= 0) cudaSetDevice(device_before_);
    throw;
  }
  stream_of_call = static_cast<cudaStream_t>(stream);
}

call_scope::~call_scope() {
  stream_of_call = static_cast<cudaStream_t>(stream_before_);
  if (device_before_ >= 0) cudaSetDevice(device_before_);
}

device_report query() {
  device_report found{CUDART_VERSION, 0, 0, ""};
  detail::check(cudaDriverGetVersion(&found.driver_version), "asking for the driver");
  if (found.driver_version == 0) {
    found.problem = "there is no CUDA driver; expected one for CUDA " +
                    std::to_string(CUDART_VERSION / 1000) + " or newer";
    return found;
  }
  const cudaError_t status = cudaGetDeviceCount(&found.device_count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    found.device_count = 0;
    found.problem = cudaGetErrorString(status);
  } else if (found.device_count == 0) {
    found.problem = "there is no CUDA device";
  }
  return found;
}

void prepare(int device_id) { const call_scope scope(device_id, nullptr); }

}  // namespace subquad::cuda

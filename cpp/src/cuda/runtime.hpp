// The device and the stream of a call, and what there is of CUDA.
#ifndef SUBQUAD_CUDA_RUNTIME_HPP
#define SUBQUAD_CUDA_RUNTIME_HPP

#include <string>

namespace subquad::cuda {

// Makes device and stream those of the calling thread's launches; restores the device at the end.
// Throws device_error where there is no such device, or its driver does not serve this library.
class call_scope {
 public:
  call_scope(int device_id, void* stream);
  ~call_scope();
  call_scope(const call_scope&) = delete;
  call_scope& operator=(const call_scope&) = delete;

 private:
  int device_before_;
  void* stream_before_;
};

// Loads every kernel into the device's context: a module that loads at its first launch would break
// the capture of a graph.
void prepare(int device_id);

// What there is of CUDA. `problem` is empty where kernels can run.
struct device_report {
  int runtime_version;
  int driver_version;
  int device_count;
  std::string problem;
};
device_report query();

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_RUNTIME_HPP

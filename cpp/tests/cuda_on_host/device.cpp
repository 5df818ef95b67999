// What launch.cuh asks of a device, for the host executor: one device, without streams.
#include <string>

#include "cuda/runtime.hpp"
#include "subquad/errors.hpp"

namespace subquad::cuda {

call_scope::call_scope(int device_id, void* stream) : device_before_(0), stream_before_(stream) {
  if (device_id != 0) {
    throw device_error("device: expected 0, the only device of the host executor, got " +
                       std::to_string(device_id));
  }
}
call_scope::~call_scope() { static_cast<void>(device_before_), static_cast<void>(stream_before_); }

device_report query() { return {0, 0, 1, ""}; }

void prepare(int device_id) { const call_scope scope(device_id, nullptr); }

}  // namespace subquad::cuda

// The functions of the C ABI that tell of the CUDA library and its devices.
#include <cstdio>

#include "c_api_call.hpp"
#include "subquad/c_api.h"

using subquad::c_api::guarded;

subquad_status subquad_cuda_query(subquad_cuda_info* info, subquad_error* error) {
  return guarded(error, [&] {
    if (info == nullptr) throw subquad::invalid_argument("info: expected an address, got NULL");
    *info = {};
    std::snprintf(info->architectures, sizeof(info->architectures), "%s",
                  SUBQUAD_CUDA_ARCHITECTURES);
    const subquad::cuda::device_report found = subquad::cuda::query();
    info->runtime_version = found.runtime_version;
    info->driver_version = found.driver_version;
    info->device_count = found.device_count;
    std::snprintf(info->problem, sizeof(info->problem), "%s", found.problem.c_str());
  });
}

subquad_status subquad_cuda_prepare(int32_t device_id, subquad_error* error) {
  return guarded(error, [&] { subquad::cuda::prepare(device_id); });
}

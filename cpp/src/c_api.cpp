// The functions of the library itself. Those of a concept stand in c_api_<concept>.cpp.
#include "subquad/c_api.h"

#include <cstdio>
#include <string>

#include "c_api_call.hpp"
#include "cuda_library.hpp"
#include "isa.hpp"
#include "parallel.hpp"
#include "subquad/errors.hpp"

using subquad::c_api::guarded;

int32_t subquad_get_num_threads(void) { return subquad::available_threads(); }

subquad_status subquad_set_num_threads(int32_t n_threads, subquad_error* error) {
  return guarded(error, [&] { subquad::request_num_threads(n_threads); });
}

const char* subquad_get_isa(void) { return subquad::isa_name(subquad::current_isa()); }

subquad_status subquad_set_isa(const char* level, subquad_error* error) {
  return guarded(error, [&] { subquad::select_isa(level == nullptr ? "" : level); });
}

int32_t subquad_isa_level_count(void) { return subquad::isa_level_count(); }

const char* subquad_isa_level(int32_t index) {
  if (index < 0 || index >= subquad::isa_level_count()) return nullptr;
  return subquad::isa_name(subquad::isa_level_at(index));
}

subquad_status subquad_cuda_query(subquad_cuda_info* info, subquad_error* error) {
  decltype(&subquad_cuda_query) served = nullptr;
  const subquad_status found = guarded(error, [&] {
    if (info == nullptr) throw subquad::invalid_argument("info: expected an address, got NULL");
    *info = {};
    const std::string& problem = subquad::cuda_library_problem();
    std::snprintf(info->problem, sizeof(info->problem), "%s", problem.c_str());
    if (!problem.empty()) return;
    served = subquad::c_api::served_by_cuda(SUBQUAD_SYMBOL(subquad_cuda_query));
  });
  return served == nullptr ? found : served(info, error);
}

subquad_status subquad_cuda_prepare(int32_t device_id, subquad_error* error) {
  decltype(&subquad_cuda_prepare) served = nullptr;
  const subquad_status found = guarded(error, [&] {
    served = subquad::c_api::served_by_cuda(SUBQUAD_SYMBOL(subquad_cuda_prepare));
  });
  return served == nullptr ? found : served(device_id, error);
}

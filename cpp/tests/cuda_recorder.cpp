// A CUDA library without kernels: what is asked of it through the C ABI it writes down, for
// tests/_cuda_double.py, which compiles it with the boundary's own sources.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "cuda/launch.cuh"
#include "normalizers_core.hpp"
#include "subquad/c_api.h"

using subquad::array_view;

struct seen_array {
  std::int32_t present, dtype, device, device_id, ndim;
  std::int64_t shape[4];
  void* data;
};
struct seen_call {
  char function[64];
  void* stream;
  std::int32_t device_id, n_arrays;
  seen_array arrays[16];
};

// Read and set by the tests.
extern "C" {
SUBQUAD_API std::int32_t recorder_n_calls = 0;
SUBQUAD_API seen_call recorder_calls[256];
SUBQUAD_API std::int32_t recorder_prepared[16];
SUBQUAD_API std::int32_t recorder_n_prepared = 0;
SUBQUAD_API std::int32_t recorder_status = 0;
SUBQUAD_API std::int32_t recorder_prepare_status = 0;
SUBQUAD_API char recorder_message[512];
SUBQUAD_API subquad_cuda_info recorder_info = {13000, 13010, 2, "sm_90 compute_120", ""};

const char* subquad_version(void) { return RECORDER_VERSION; }

subquad_status subquad_cuda_query(subquad_cuda_info* info, subquad_error*) {
  *info = recorder_info;
  return SUBQUAD_SUCCESS;
}

subquad_status subquad_cuda_prepare(std::int32_t device_id, subquad_error* error) {
  recorder_prepared[recorder_n_prepared++] = device_id;
  if (error) std::snprintf(error->message, sizeof(error->message), "%s", recorder_message);
  return static_cast<subquad_status>(recorder_prepare_status);
}
}

namespace {

void* stream_now;
int device_now = -1;

}  // namespace

namespace subquad::cuda {
call_scope::call_scope(int device_id, void* stream)
    : device_before_(device_now), stream_before_(stream_now) {
  if (device_id >= 2) throw device_error("CUDA device 2: invalid device ordinal");
  device_now = device_id;
  stream_now = stream;
}
call_scope::~call_scope() {
  device_now = device_before_;
  stream_now = stream_before_;
}
}  // namespace subquad::cuda

namespace {

void put(const array_view* out) {
  std::int64_t count = 1;
  for (int i = 0; i < out->ndim; ++i) count *= out->shape[i];
  for (std::int64_t i = 0; i < count; ++i) {
    if (out->type == subquad::dtype::float32) static_cast<float*>(out->data)[i] = 7;
    if (out->type == subquad::dtype::float64) static_cast<double*>(out->data)[i] = 7;
    if (out->type == subquad::dtype::int64) static_cast<std::int64_t*>(out->data)[i] = 0;
  }
}

void record(const char* function, std::initializer_list<const array_view*> inputs,
            std::initializer_list<const array_view*> outputs, const array_view& workspace) {
  seen_call& call = recorder_calls[recorder_n_calls++ % 256];
  std::snprintf(call.function, sizeof(call.function), "%s", function);
  call.stream = stream_now;
  call.device_id = device_now;
  call.n_arrays = 0;
  const auto add = [&](const array_view* view) {
    seen_array& seen = call.arrays[call.n_arrays++];
    seen = {};
    if (view == nullptr) return;
    seen.present = 1;
    seen.dtype = static_cast<int>(view->type);
    seen.device = static_cast<int>(view->device);
    seen.device_id = view->device_id;
    seen.ndim = view->ndim;
    for (int i = 0; i < view->ndim && i < 4; ++i) seen.shape[i] = view->shape[i];
    seen.data = view->data;
  };
  for (const array_view* view : inputs) add(view);
  for (const array_view* view : outputs) add(view);
  add(&workspace);
  switch (recorder_status) {
    case SUBQUAD_DEVICE_ERROR:
      throw subquad::device_error(recorder_message);
    case SUBQUAD_OUT_OF_MEMORY:
      throw subquad::out_of_memory(recorder_message);
    case SUBQUAD_TYPE_ERROR:
      throw subquad::type_error(recorder_message);
    case SUBQUAD_INVALID_ARGUMENT:
      throw subquad::invalid_argument(recorder_message);
    case SUBQUAD_INTERNAL_ERROR:
      throw subquad::error(recorder_message);
    default:
      break;
  }
  for (const array_view* view : outputs) {
    if (view != nullptr) put(view);
  }
}

}  // namespace

namespace subquad::core {

using i64 = std::int64_t;
using view = const array_view&;
using maybe = const array_view*;

std::size_t log_normalizer_workspace(i64 batch, i64 n, i64 m, i64 d, i64 itemsize) {
  return static_cast<std::size_t>(batch * 1000000 + n * 10000 + m * 100 + d * 10 + itemsize);
}
void log_normalizer(view x, view y, maybe w, maybe e, view out, view workspace) {
  record("log_normalizer", {&x, &y, w, e}, {&out}, workspace);
}
std::size_t log_normalizer_vjp_workspace(i64, i64, i64, i64, i64) { return 11; }
void log_normalizer_vjp(view g, view x, view y, maybe w, maybe e, view z, maybe gx, maybe gy,
                        maybe gw, view workspace) {
  record("log_normalizer_vjp", {&g, &x, &y, w, e, &z}, {gx, gy, gw}, workspace);
}
std::size_t gaussian_log_normalizer_workspace(i64, i64, i64, i64, i64, i64) { return 12; }
void gaussian_log_normalizer(view x, view c, view m, view f, maybe g, maybe o, maybe w, bool,
                             view out, view workspace) {
  record("gaussian_log_normalizer", {&x, &c, &m, &f, g, o, w}, {&out}, workspace);
}
std::size_t gaussian_log_normalizer_vjp_workspace(i64, i64, i64, i64, i64, i64) { return 13; }
void gaussian_log_normalizer_vjp(view g, view x, view c, view m, view f, maybe s, view z, maybe gx,
                                 maybe gc, maybe gm, maybe gf, maybe gs, view workspace) {
  record("gaussian_log_normalizer_vjp", {&g, &x, &c, &m, &f, s, &z}, {gx, gc, gm, gf, gs},
         workspace);
}
std::size_t gaussian_score_moments_workspace(i64, i64, i64, i64, i64) { return 14; }
void gaussian_score_moments(view x, view m, view f, maybe g, view mean, view variance,
                            view workspace) {
  record("gaussian_score_moments", {&x, &m, &f, g}, {&mean, &variance}, workspace);
}
std::size_t nearest_centroids_workspace(i64, i64, i64, i64) { return 15; }
void nearest_centroids(view x, view c, view o, view labels, view score, view workspace) {
  record("nearest_centroids", {&x, &c, &o}, {&labels, &score}, workspace);
}
std::size_t component_sums_workspace(i64, i64, i64, i64) { return 16; }
void component_sums(view y, view l, maybe w, view counts, view sums, view workspace) {
  record("component_sums", {&y, &l, w}, {&counts, &sums}, workspace);
}
std::size_t component_scatter_workspace(i64, i64, i64, i64, bool diagonal) {
  return diagonal ? 17 : 18;
}
void component_scatter(view y, view l, maybe w, view m, view scatter, view radii, view workspace) {
  record("component_scatter", {&y, &l, w, &m}, {&scatter, &radii}, workspace);
}
std::size_t sample_residuals_workspace(i64, i64, i64 largest, i64) {
  return static_cast<std::size_t>(largest);
}
void sample_residuals(view x, view d, view w, view o, view v, view s, maybe t, maybe e, bool,
                      view f, view r, view h, view workspace) {
  record("sample_residuals", {&x, &d, &w, &o, &v, &s, t, e}, {&f, &r, &h}, workspace);
}

}  // namespace subquad::core

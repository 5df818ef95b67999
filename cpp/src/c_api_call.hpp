// How a function of the C ABI runs: statuses for exceptions, arguments unwrapped and checked, and
// which library serves it.
//
// The functions of the concepts are compiled into two libraries. SUBQUAD_FOR_CUDA is defined in
// that of CUDA, which takes arrays on CUDA alone; the other takes arrays in memory of the CPU, and
// hands calls with arrays on CUDA to the function of the same name there.
#ifndef SUBQUAD_C_API_CALL_HPP
#define SUBQUAD_C_API_CALL_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <tuple>

#include "array_check.hpp"
#include "subquad/array_view.hpp"
#include "subquad/c_api.h"
#include "subquad/errors.hpp"

#if defined(SUBQUAD_FOR_CUDA)
#include "cuda/runtime.hpp"
#else
#include "cuda_library.hpp"
#include "isa.hpp"
#include "parallel.hpp"
#endif

namespace subquad::c_api {

static_assert(sizeof(subquad_array) == sizeof(array_view));
static_assert(offsetof(subquad_array, data) == offsetof(array_view, data));
static_assert(offsetof(subquad_array, shape) == offsetof(array_view, shape));
static_assert(offsetof(subquad_array, strides) == offsetof(array_view, strides));
static_assert(offsetof(subquad_array, ndim) == offsetof(array_view, ndim));
static_assert(offsetof(subquad_array, dtype) == offsetof(array_view, type));
static_assert(offsetof(subquad_array, device) == offsetof(array_view, device));
static_assert(offsetof(subquad_array, device_id) == offsetof(array_view, device_id));

inline subquad_status report(subquad_error* error, subquad_status status,
                             const char* message) noexcept {
  if (error != nullptr) std::snprintf(error->message, sizeof(error->message), "%s", message);
  return status;
}

// No exception passes a C frame.
template <class F>
subquad_status guarded(subquad_error* error, F&& body) noexcept {
  try {
#if !defined(SUBQUAD_FOR_CUDA)
    check_environment();
#endif
    body();
    if (error != nullptr) error->message[0] = '\0';
    return SUBQUAD_SUCCESS;
  } catch (const invalid_argument& e) {
    return report(error, SUBQUAD_INVALID_ARGUMENT, e.what());
  } catch (const type_error& e) {
    return report(error, SUBQUAD_TYPE_ERROR, e.what());
  } catch (const device_error& e) {
    return report(error, SUBQUAD_DEVICE_ERROR, e.what());
  } catch (const out_of_memory& e) {
    return report(error, SUBQUAD_OUT_OF_MEMORY, e.what());
  } catch (const std::bad_alloc&) {
    return report(error, SUBQUAD_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return report(error, SUBQUAD_INTERNAL_ERROR, e.what());
  } catch (...) {
    return report(error, SUBQUAD_INTERNAL_ERROR, "unknown exception");
  }
}

// Where the arrays of a call must lie: where its first one does.
struct common_place {
  const char* first;
  place where;
};

// An argument, checked and with its strides written out.
class argument {
 public:
  argument(const subquad_array* array, const char* name, const common_place& common)
      : present_(array != nullptr) {
    if (!present_) return;
    if (array->ndim < 0 || array->ndim > kMaxDimensions) {
      throw invalid_argument(std::string(name) + ": expected from 0 to " +
                             std::to_string(kMaxDimensions) + " dimensions, got " +
                             std::to_string(array->ndim));
    }
    if (array->ndim > 0 && array->shape == nullptr) {
      throw invalid_argument(std::string(name) + ": expected a shape, got NULL");
    }
    if (array->dtype < SUBQUAD_FLOAT32 || array->dtype > SUBQUAD_INT32) {
      throw type_error(std::string(name) + ": unknown dtype " + std::to_string(array->dtype));
    }
    view_ = {array->data,
             array->shape,
             array->strides,
             array->ndim,
             static_cast<dtype>(array->dtype),
             static_cast<device_type>(array->device),
             array->device_id};
    check_place(view_, name, common.where, common.first);
    check_array(view_, name);
    if (view_.strides == nullptr) {
      contiguous_strides(view_.shape, view_.ndim, strides_);
      view_.strides = strides_;
    }
  }

  argument(const argument&) = delete;
  argument& operator=(const argument&) = delete;

 protected:
  bool present_;
  array_view view_{};
  std::int64_t strides_[kMaxDimensions];
};

class optional_argument : public argument {
 public:
  using argument::argument;
  const array_view* get() const noexcept { return present_ ? &view_ : nullptr; }
};

class required_argument : public argument {
 public:
  required_argument(const subquad_array* array, const char* name, const common_place& common)
      : argument(array, name, common) {
    if (!present_) throw invalid_argument(std::string(name) + ": expected an array, got NULL");
  }
  const array_view& get() const noexcept { return view_; }
};

// A function of the C ABI, to find its namesake in the other library.
template <class F>
struct symbol {
  const char* name;
};
#define SUBQUAD_SYMBOL(function) \
  subquad::c_api::symbol<decltype(&(function))> { #function }

#if defined(SUBQUAD_FOR_CUDA)
inline constexpr place kHome{device_type::cuda, 0};
#else
inline constexpr place kHome{device_type::cpu, 0};

// The namesake in the CUDA library. Throws type_error, in the name of `argument`, where there is no
// such library.
template <class F>
F served_by_cuda(symbol<F> function, const std::string& argument = "") {
  const std::string& problem = cuda_library_problem();
  if (!problem.empty()) throw type_error(argument.empty() ? problem : argument + ": " + problem);
  return reinterpret_cast<F>(cuda_library_function(function.name));
}
#endif

// Runs a call: body(common_place) unwraps the arguments and computes. `arguments` are those of the
// C function in their order, after its first one `leading`: an array named `first` that the call
// cannot be without.
template <class F, class Body, class... Arguments>
subquad_status run(symbol<F> function, const char* first, Body&& body, const subquad_array* leading,
                   Arguments... arguments) noexcept {
  static_assert(sizeof...(arguments) >= 2);
  const auto rest = std::make_tuple(arguments...);
  const subquad_context* context = std::get<sizeof...(arguments) - 2>(rest);
  subquad_error* error = std::get<sizeof...(arguments) - 1>(rest);
  common_place common{nullptr, kHome};
  if (leading != nullptr && leading->device == static_cast<std::int32_t>(kHome.device)) {
    common = {first, {kHome.device, leading->device_id}};
  }
#if defined(SUBQUAD_FOR_CUDA)
  static_cast<void>(function);
  return guarded(error, [&] {
    const cuda::call_scope scope(common.where.device_id,
                                 context == nullptr ? nullptr : context->stream);
    body(common);
  });
#else
  if (leading != nullptr && leading->device == SUBQUAD_CUDA) {
    F served = nullptr;
    const subquad_status found = guarded(error, [&] { served = served_by_cuda(function, first); });
    return served == nullptr ? found : served(leading, arguments...);
  }
  return guarded(error, [&] {
    const int n_threads = context == nullptr ? 0 : context->n_threads;
    if (n_threads < 0) {
      throw invalid_argument("context: expected n_threads of at least 0, got " +
                             std::to_string(n_threads));
    }
    const scoped_thread_limit limit(n_threads);
    const scoped_isa isa(current_isa());
    body(common);
  });
#endif
}

// Bytes that `count` finds for this library's device, or its namesake for that of the other one; 0
// for a device that is not served.
template <class F, class Count, class... Sizes>
std::size_t workspace_size(symbol<F> function, Count&& count, std::int32_t device,
                           Sizes... sizes) noexcept {
#if defined(SUBQUAD_FOR_CUDA)
  static_cast<void>(function);
  return device == static_cast<std::int32_t>(kHome.device) ? count(sizes...) : 0;
#else
  if (device == static_cast<std::int32_t>(kHome.device)) {
    // The call may run at another level than the one selected now: what JAX has compiled outlives
    // a change of it.
    std::size_t most = 0;
    for (int i = 0; i < isa_level_count(); ++i) {
      const scoped_isa isa(isa_level_at(i));
      most = std::max<std::size_t>(most, count(sizes...));
    }
    return most;
  }
  if (device != SUBQUAD_CUDA) return 0;
  F served = nullptr;
  guarded(nullptr, [&] { served = served_by_cuda(function); });
  return served == nullptr ? 0 : served(sizes..., device);
#endif
}

}  // namespace subquad::c_api

#endif  // SUBQUAD_C_API_CALL_HPP

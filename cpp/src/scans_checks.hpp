// What the scans ask of their arrays, on every device, and how they look at them.
#ifndef SUBQUAD_SCANS_CHECKS_HPP
#define SUBQUAD_SCANS_CHECKS_HPP

#include <cstdint>
#include <string>

#include "arguments.hpp"

namespace subquad {

// An array with the axis of the scan moved to the end, read backwards where the scan is: kernels
// know no other axis and direction.
class scan_view {
 public:
  scan_view(const array_view& array, std::int32_t axis, bool reverse) : view_(array) {
    std::int32_t to = 0;
    for (std::int32_t from = 0; from < array.ndim; ++from) {
      if (from == axis) continue;
      shape_[to] = array.shape[from];
      strides_[to++] = array.strides[from];
    }
    shape_[to] = array.shape[axis];
    strides_[to] = array.strides[axis];
    if (reverse && shape_[to] > 0) {
      view_.data =
          static_cast<char*>(array.data) +
          (shape_[to] - 1) * strides_[to] * static_cast<std::int64_t>(item_size(array.type));
      strides_[to] = -strides_[to];
    }
    view_.shape = shape_;
    view_.strides = strides_;
  }

  scan_view(const scan_view&) = delete;
  scan_view& operator=(const scan_view&) = delete;

  const array_view& get() const noexcept { return view_; }

 private:
  array_view view_;
  std::int64_t shape_[kMaxDimensions];
  std::int64_t strides_[kMaxDimensions];
};

// An optional array of the same kind.
class optional_scan_view {
 public:
  optional_scan_view(const array_view* array, std::int32_t axis, bool reverse)
      : present_(array != nullptr),
        view_(present_ ? *array : kScalar, axis_of(array, axis), reverse) {}
  const array_view* get() const noexcept { return present_ ? &view_.get() : nullptr; }

 private:
  static constexpr std::int64_t kOne[1] = {1};
  static constexpr array_view kScalar{nullptr, kOne, kOne, 1, dtype::uint8, device_type::cpu, 0};
  static std::int32_t axis_of(const array_view* array, std::int32_t axis) {
    return array != nullptr ? axis : 0;
  }

  bool present_;
  scan_view view_;
};

inline void require_axis(const array_view& array, std::int32_t axis, const char* name) {
  if (array.ndim < 1 || axis < 0 || axis >= array.ndim) {
    throw invalid_argument("axis: expected one of the " + std::to_string(array.ndim) +
                           " dimensions of " + name + ", got " + std::to_string(axis));
  }
}

// The shape of `like` without its axis.
inline void require_lanes(const array_view* array, const array_view& like, std::int32_t axis,
                          const char* name) {
  if (array == nullptr) return;
  require_dtype(*array, like.type, name);
  std::int64_t shape[kMaxDimensions];
  std::int32_t rank = 0;
  for (std::int32_t i = 0; i < like.ndim; ++i) {
    if (i != axis) shape[rank++] = like.shape[i];
  }
  bool same = array->ndim == rank;
  for (std::int32_t i = 0; same && i < rank; ++i) same = array->shape[i] == shape[i];
  if (!same) {
    throw invalid_argument(std::string(name) + ": expected shape " + shape_text(shape, rank) +
                           ", got " + shape_text(array->shape, array->ndim));
  }
}

inline void require_like(const array_view* array, const array_view& like, const char* name,
                         const char* like_name) {
  if (array == nullptr) return;
  require_dtype(*array, like.type, name);
  require_same_shape(*array, like, name, like_name);
}

// Element type, axis, and what a scan with a state has in common.
inline void check_scan(const array_view& x, const char* name, const array_view* segments,
                       std::int32_t axis) {
  require_real(x, name);
  require_axis(x, axis, name);
  require_segments(segments, x.shape[axis]);
}

inline void check_logcumsumexp_state(const array_view& x, const array_view* log_sum,
                                     const array_view* remainder, std::int32_t axis) {
  require_lanes(log_sum, x, axis, "log_sum");
  require_lanes(remainder, x, axis, "remainder");
  if (remainder != nullptr && log_sum == nullptr) {
    throw invalid_argument("remainder: expected log_sum with it, got none");
  }
}

inline void check_logcumsumexp(const array_view& x, const array_view* log_sum,
                               const array_view* remainder, const array_view* segments,
                               std::int32_t axis, const array_view& out,
                               const array_view* final_log_sum, const array_view* final_remainder) {
  check_scan(x, "x", segments, axis);
  check_logcumsumexp_state(x, log_sum, remainder, axis);
  require_like(&out, x, "out", "x");
  require_lanes(final_log_sum, x, axis, "final_log_sum");
  require_lanes(final_remainder, x, axis, "final_remainder");
}

inline void check_logcumsumexp_vjp(const array_view& x, const array_view* log_sum,
                                   const array_view* remainder, const array_view* segments,
                                   std::int32_t axis, const array_view* grad,
                                   const array_view* grad_final, const array_view* grad_x,
                                   const array_view* grad_log_sum) {
  check_scan(x, "x", segments, axis);
  check_logcumsumexp_state(x, log_sum, remainder, axis);
  require_like(grad, x, "grad", "x");
  require_lanes(grad_final, x, axis, "grad_final");
  require_like(grad_x, x, "grad_x", "x");
  require_lanes(grad_log_sum, x, axis, "grad_log_sum");
}

inline void check_signed_logcumsumexp(const array_view& x, const array_view& sign,
                                      std::int32_t axis, const array_view& out,
                                      const array_view& out_sign) {
  check_scan(x, "x", nullptr, axis);
  require_like(&sign, x, "sign", "x");
  require_like(&out, x, "out", "x");
  require_like(&out_sign, x, "out_sign", "x");
}

inline void check_signed_logcumsumexp_vjp(const array_view& x, const array_view& sign,
                                          std::int32_t axis, const array_view& grad,
                                          const array_view* grad_x, const array_view* grad_sign) {
  check_scan(x, "x", nullptr, axis);
  require_like(&sign, x, "sign", "x");
  require_like(&grad, x, "grad", "x");
  require_like(grad_x, x, "grad_x", "x");
  require_like(grad_sign, x, "grad_sign", "x");
}

inline void check_log_linear_recurrence(const array_view& log_a, const array_view& log_b,
                                        const array_view* state, const array_view* segments,
                                        std::int32_t axis, const array_view& out) {
  check_scan(log_a, "log_a", segments, axis);
  require_like(&log_b, log_a, "log_b", "log_a");
  require_lanes(state, log_a, axis, "state");
  require_like(&out, log_a, "out", "log_a");
}

inline void check_log_linear_recurrence_vjp(const array_view& log_a, const array_view& log_b,
                                            const array_view* state, const array_view* segments,
                                            std::int32_t axis, const array_view& grad,
                                            const array_view* grad_log_a,
                                            const array_view* grad_log_b,
                                            const array_view* grad_state) {
  check_scan(log_a, "log_a", segments, axis);
  require_like(&log_b, log_a, "log_b", "log_a");
  require_lanes(state, log_a, axis, "state");
  require_like(&grad, log_a, "grad", "log_a");
  require_like(grad_log_a, log_a, "grad_log_a", "log_a");
  require_like(grad_log_b, log_a, "grad_log_b", "log_a");
  require_lanes(grad_state, log_a, axis, "grad_state");
}

}  // namespace subquad

#endif  // SUBQUAD_SCANS_CHECKS_HPP

// What logcumsumexp and its reverse share: the sums that go into their steps.
#ifndef SUBQUAD_CUDA_LOGCUMSUMEXP_CUH
#define SUBQUAD_CUDA_LOGCUMSUMEXP_CUH

#include "scan.cuh"
#include "scan_sums.cuh"

namespace subquad::cuda {

template <class T, int kArrays, int kStepsOfThread>
struct log_sums {
  using element = T;
  using state = of_runs<scaled_sum<T>>;
  static constexpr int kSteps = kStepsOfThread;

  scanned<const T> x;
  const T* log_sum;    // optional
  const T* remainder;  // optional
  vector_view<const std::int64_t> segments;
  batches<kArrays> batch;
  int which_log_sum;  // of the arrays of the batch
  int which_remainder;
  bool exclusive;

  void set(const array_view& x_view, const array_view* log_sum_view,
           const array_view* remainder_view, const array_view* segments_view, bool is_exclusive,
           const batches<kArrays>& lanes, int which_x, int which_sum, int which_rest) {
    x = scanned_of<const T>(&x_view, lanes, which_x);
    log_sum = data_of<const T>(log_sum_view);
    remainder = data_of<const T>(remainder_view);
    segments = segments_view ? vector_at<const std::int64_t>(*segments_view, 0)
                             : vector_view<const std::int64_t>{};
    batch = lanes;
    which_log_sum = which_sum;
    which_remainder = which_rest;
    exclusive = is_exclusive;
  }

  SUBQUAD_DEVICE state initial(const scan_place& place) const {
    state found = state::nothing();
    if (log_sum == nullptr || !place.has_lane) return found;
    const T large = log_sum[lane_offset(batch, which_log_sum, place.lane)];
    const T small = remainder ? remainder[lane_offset(batch, which_remainder, place.lane)] : T(0);
    if (large == -infinity<T>() || small == -infinity<T>()) return found;
    if (large + small == infinity<T>()) {
      found.state = {infinity<double>(), 1.0};
    } else {
      if (large == large) found.state.reference = static_cast<double>(large);
      found.state.sum = exp(static_cast<double>(small)) + static_cast<double>(large - large);
    }
    return found;
  }

  static SUBQUAD_DEVICE state summary(const T (&x)[kSteps], std::uint32_t borders) {
    running_sum<T> running;
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      if (borders >> j & 1) running.clear();
      running.add(x[j]);
    }
    return {{static_cast<double>(running.reference), static_cast<double>(running.sum)},
            borders != 0};
  }
};

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_LOGCUMSUMEXP_CUH

// Logarithms of cumulative sums of exponentials.
#include "logcumsumexp.cuh"

#include "scans_core.hpp"

namespace subquad::cuda {
namespace {

enum { kX, kOut, kLogSum, kRemainder, kFinalLogSum, kFinalRemainder, kArrays };

// out_i = log(e^(log_sum + remainder) + sum_{j <= i} e^x_j), or j < i, over the run of i, the state
// in the first run alone; final_log_sum + final_remainder the logarithm of the whole last sum.
// Nothing aliases. Where one element makes a sum, out is that element.
//
// A power is within 2 ulp, a sum over the steps of a thread in order; the twenty or so merges of
// threads, tiles and groups of tiles err by 5e-8 each in float32, by 2 ulp in float64.
template <class T>
struct logcumsumexp_task : log_sums<T, kArrays, kScanSteps<T>> {
  using base = log_sums<T, kArrays, kScanSteps<T>>;
  using base::kSteps;
  using typename base::state;
  static constexpr int kInputs = 1;
  static constexpr int kBlocks = 2;
  struct steps {
    T x[kSteps];  // then out
    std::uint32_t borders;
  };

  scanned<T> out;
  T* final_log_sum;    // optional
  T* final_remainder;  // optional

  template <class Io, bool kForSummary, class Stages>
  SUBQUAD_DEVICE void load(const scan_place& place, Stages& stages, steps& to) const {
    const std::int64_t offset = lane_offset(this->batch, kX, place.lane);
    Io::start_reading(this->x, offset, place, stages[0]);
    to.borders = borders_at<kSteps>(this->segments, place);
    Io::wait_for_reads();
    Io::finish_reading(this->x, offset, place, stages[0], -infinity<T>(), to.x);
  }
  template <class Io, class Stages>
  SUBQUAD_DEVICE void store(const scan_place& place, Stages& stages, const steps& from) const {
    Io::write(out, lane_offset(this->batch, kOut, place.lane), place, stages[0], from.x);
  }

  SUBQUAD_DEVICE state summary(const steps& each) const {
    return base::summary(each.x, each.borders);
  }
  SUBQUAD_DEVICE void apply(steps& each, const state& before) const {
    running_sum<T> running(before.state);
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      if (each.borders >> j & 1) running.clear();
      running_sum<T> counted = running;
      running.add(each.x[j]);
      if (!this->exclusive) counted = running;
      each.x[j] = counted.reference + log(counted.sum);
    }
  }
  SUBQUAD_DEVICE void finish(const scan_place& place, const state& total) const {
    const double large = total.state.reference;
    const double small = log(total.state.sum);
    // What rounding takes from their sum, and then from its element.
    const double sum = large + small;
    const double of_small = sum - large;
    const double lost = (large - (sum - of_small)) + (small - of_small);
    const T rounded = static_cast<T>(sum);
    if (final_log_sum) {
      final_log_sum[lane_offset(this->batch, kFinalLogSum, place.lane)] = rounded;
    }
    if (final_remainder) {
      const bool is_finite = fabs(rounded) < infinity<T>();
      final_remainder[lane_offset(this->batch, kFinalRemainder, place.lane)] =
          is_finite ? static_cast<T>((sum - static_cast<double>(rounded)) + lost) : T(0);
    }
  }
};

template <class T>
using layout = scan_layout<logcumsumexp_task<T>>;

template <class T>
void logcumsumexp_as(const array_view& x, const array_view* log_sum, const array_view* remainder,
                     const array_view* segments, bool exclusive, const array_view& out,
                     const array_view* final_log_sum, const array_view* final_remainder,
                     const array_view& workspace) {
  batch_shape shape;
  shape.include(x, 1, "x");
  const auto batch = batches_of<kArrays>(
      shape,
      {{&x, 1}, {&out, 1}, {log_sum, 0}, {remainder, 0}, {final_log_sum, 0}, {final_remainder, 0}});
  workspace_layout pieces(workspace);
  const layout<T> planned(pieces, shape.count(), x.shape[x.ndim - 1],
                          lanes_lie_closer(batch, kX, x));
  logcumsumexp_task<T> task;
  task.set(x, log_sum, remainder, segments, exclusive, batch, kX, kLogSum, kRemainder);
  task.out = scanned_of<T>(&out, batch, kOut);
  task.final_log_sum = data_of<T>(final_log_sum);
  task.final_remainder = data_of<T>(final_remainder);
  planned.run(task);
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t logcumsumexp_workspace(std::int64_t lanes, std::int64_t n, std::int64_t itemsize) {
  return itemsize == 8 ? cuda::scan_workspace<cuda::layout<double>>(lanes, n)
                       : cuda::scan_workspace<cuda::layout<float>>(lanes, n);
}

void logcumsumexp(const array_view& x, const array_view* log_sum, const array_view* remainder,
                  const array_view* segments, std::int32_t axis, bool reverse, bool exclusive,
                  const array_view& out, const array_view* final_log_sum,
                  const array_view* final_remainder, const array_view& workspace) {
  check_logcumsumexp(x, log_sum, remainder, segments, axis, out, final_log_sum, final_remainder);
  const scan_view x_view(x, axis, reverse);
  const scan_view out_view(out, axis, reverse);
  const optional_scan_view segments_view(segments, 0, reverse);
  cuda::for_scanned_type(x.type, [&](auto element) {
    cuda::logcumsumexp_as<decltype(element)>(x_view.get(), log_sum, remainder, segments_view.get(),
                                             exclusive, out_view.get(), final_log_sum,
                                             final_remainder, workspace);
  });
}

}  // namespace subquad::core

// Reverse of the logarithms of cumulative sums of exponentials.
#include "logcumsumexp.cuh"
#include "scans_core.hpp"

namespace subquad::cuda {
namespace {

enum { kX, kGrad, kGradX, kLogSum, kRemainder, kGradFinal, kGradLogSum, kArrays };

// grad_x_j = e^x_j sum_i grad_i / s_i over the sums s_i that hold j, of which grad_final is one
// more; grad_log_sum likewise for the state. Both kinds of sums, s_i forwards and the shares
// grad_i / s_i backwards, over references that are elements: nothing overflows, and a gradient does
// not see by how much all elements are shifted. Nothing aliases.
template <class T>
struct logcumsumexp_vjp_task : log_sums<T, kArrays, kFewScanSteps<T>> {
  using base = log_sums<T, kArrays, kFewScanSteps<T>>;
  using base::kSteps;
  using typename base::state;
  using adjoint = of_runs<scaled_sum<T>>;
  static constexpr int kInputs = 2;
  static constexpr int kBlocks = 2;
  static constexpr T kAbsent = -1;  // the power of an element that is -inf
  struct steps {
    T x[kSteps];      // then e^(x - reference), then grad_x
    T share[kSteps];  // grad, then grad / s
    T reference[kSteps];
    T before;  // the reference before the steps
    std::uint32_t borders;
  };

  scanned<const T> grad;  // optional
  const T* grad_final;    // optional
  scanned<T> grad_x;      // optional
  T* grad_log_sum;        // optional

  template <class Io, bool kForSummary, class Stages>
  SUBQUAD_DEVICE void load(const scan_place& place, Stages& stages, steps& to) const {
    const std::int64_t x_offset = lane_offset(this->batch, kX, place.lane);
    const std::int64_t grad_offset = lane_offset(this->batch, kGrad, place.lane);
    Io::start_reading(this->x, x_offset, place, stages[0]);
    if (!kForSummary && grad) Io::start_reading(grad, grad_offset, place, stages[1]);
    to.borders = borders_at<kSteps>(this->segments, place);
    Io::wait_for_reads();
    Io::finish_reading(this->x, x_offset, place, stages[0], -infinity<T>(), to.x);
    if (kForSummary) return;
    if (grad) {
      Io::finish_reading(grad, grad_offset, place, stages[1], T(0), to.share);
    } else {
      SUBQUAD_UNROLL
      for (int j = 0; j < kSteps; ++j) to.share[j] = 0;
    }
  }
  template <class Io, class Stages>
  SUBQUAD_DEVICE void store(const scan_place& place, Stages& stages, const steps& from) const {
    if (!grad_x) return;
    Io::write(grad_x, lane_offset(this->batch, kGradX, place.lane), place, stages[0], from.x);
  }

  SUBQUAD_DEVICE state summary(const steps& each) const {
    return base::summary(each.x, each.borders);
  }
  SUBQUAD_DEVICE void relate(steps& each, const state& before, const state&, const state&) const {
    running_sum<T> running(before.state);
    each.before = running.reference;
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      if (each.borders >> j & 1) running.clear();
      running_sum<T> counted = running;
      const T e = running.add(each.x[j]);
      if (!this->exclusive) counted = running;
      each.x[j] = each.x[j] == -infinity<T>() ? kAbsent : e;
      each.share[j] = counted.share(each.share[j]);
      each.reference[j] = running.reference;
    }
  }

  // Goes back over the steps, with `use(j, shares of the sums that hold j)`.
  template <class F>
  SUBQUAD_DEVICE void go_back(const steps& each, running_adjoint<T>& running, F&& use) const {
    running.move(each.reference[kSteps - 1]);
    SUBQUAD_UNROLL
    for (int j = kSteps - 1; j >= 0; --j) {
      if (!this->exclusive) running.sum += each.share[j];
      use(j, running.sum);
      if (each.borders >> j & 1) running.clear();
      running.move(j > 0 ? each.reference[j - 1] : each.before);
      if (this->exclusive) running.sum += each.share[j];
    }
  }
  SUBQUAD_DEVICE adjoint adjoint_summary(const steps& each) const {
    running_adjoint<T> running(scaled_sum<T>::nothing());
    go_back(each, running, [](int, T) {});
    return {running.template state<T>(), each.borders != 0};
  }
  SUBQUAD_DEVICE void adjoint_apply(steps& each, const adjoint& after) const {
    running_adjoint<T> running(after.state);
    go_back(each, running, [&](int j, T shares) {
      each.x[j] = each.x[j] == kAbsent || shares == 0 ? T(0) : each.x[j] * shares;
    });
  }

  SUBQUAD_DEVICE adjoint adjoint_initial(const scan_place& place, const state& total) const {
    if (grad_final == nullptr || !place.has_lane) return adjoint::nothing();
    const T of_final = grad_final[lane_offset(this->batch, kGradFinal, place.lane)];
    return {share_of(total.state, static_cast<double>(of_final)), 0};
  }
  SUBQUAD_DEVICE void adjoint_finish(const scan_place& place, const adjoint& total) const {
    if (!grad_log_sum) return;
    grad_log_sum[lane_offset(this->batch, kGradLogSum, place.lane)] =
        static_cast<T>(gradient_of(this->initial(place).state, total.state));
  }
};

template <class T>
using layout = reverse_scan_layout<logcumsumexp_vjp_task<T>>;

template <class T>
void logcumsumexp_vjp_as(const array_view& x, const array_view* log_sum,
                         const array_view* remainder, const array_view* segments, bool exclusive,
                         const array_view* grad, const array_view* grad_final,
                         const array_view* grad_x, const array_view* grad_log_sum,
                         const array_view& workspace) {
  batch_shape shape;
  shape.include(x, 1, "x");
  const auto batch = batches_of<kArrays>(shape, {{&x, 1},
                                                 {grad, 1},
                                                 {grad_x, 1},
                                                 {log_sum, 0},
                                                 {remainder, 0},
                                                 {grad_final, 0},
                                                 {grad_log_sum, 0}});
  workspace_layout pieces(workspace);
  const layout<T> planned(pieces, shape.count(), x.shape[x.ndim - 1],
                          lanes_lie_closer(batch, kX, x));
  logcumsumexp_vjp_task<T> task;
  task.set(x, log_sum, remainder, segments, exclusive, batch, kX, kLogSum, kRemainder);
  task.grad = scanned_of<const T>(grad, batch, kGrad);
  task.grad_final = data_of<const T>(grad_final);
  task.grad_x = scanned_of<T>(grad_x, batch, kGradX);
  task.grad_log_sum = data_of<T>(grad_log_sum);
  planned.run(task);
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t logcumsumexp_vjp_workspace(std::int64_t lanes, std::int64_t n, std::int64_t itemsize) {
  return itemsize == 8 ? cuda::scan_workspace<cuda::layout<double>>(lanes, n)
                       : cuda::scan_workspace<cuda::layout<float>>(lanes, n);
}

void logcumsumexp_vjp(const array_view& x, const array_view* log_sum, const array_view* remainder,
                      const array_view* segments, std::int32_t axis, bool reverse, bool exclusive,
                      const array_view* grad, const array_view* grad_final,
                      const array_view* grad_x, const array_view* grad_log_sum,
                      const array_view& workspace) {
  check_logcumsumexp_vjp(x, log_sum, remainder, segments, axis, grad, grad_final, grad_x,
                         grad_log_sum);
  const scan_view x_view(x, axis, reverse);
  const optional_scan_view segments_view(segments, 0, reverse);
  const optional_scan_view grad_view(grad, axis, reverse);
  const optional_scan_view grad_x_view(grad_x, axis, reverse);
  cuda::for_scanned_type(x.type, [&](auto element) {
    cuda::logcumsumexp_vjp_as<decltype(element)>(
        x_view.get(), log_sum, remainder, segments_view.get(), exclusive, grad_view.get(),
        grad_final, grad_x_view.get(), grad_log_sum, workspace);
  });
}

}  // namespace subquad::core

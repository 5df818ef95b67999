// Linear recurrences in logarithms, and their reverse.
#include "scan.cuh"
#include "scan_sums.cuh"
#include "scans_core.hpp"

namespace subquad::cuda {
namespace {

// h -> e^decay h + e^reference sum. A decay of -inf empties what comes before, whatever it is.
template <class T>
struct decayed_sum {
  double decay;
  double reference;
  double sum;

  static SUBQUAD_DEVICE decayed_sum nothing() { return {0.0, kLowest<double>, 0.0}; }
  static SUBQUAD_DEVICE decayed_sum merged(const decayed_sum& first, const decayed_sum& second) {
    const double minus_infinity = -infinity<double>();
    if (second.decay == minus_infinity) return second;
    const double decay =
        first.decay == minus_infinity ? minus_infinity : first.decay + second.decay;
    double earlier = first.reference + second.decay;
    if (earlier < kLowest<double>) earlier = kLowest<double>;
    const bool swaps = second.reference > earlier;
    const double high = swaps ? second.reference : earlier;
    const double low = swaps ? earlier : second.reference;
    const double factor = exp_between<T>(low == high ? 0.0 : low - high);
    return {decay, high, swaps ? second.sum + first.sum * factor : first.sum + second.sum * factor};
  }
  template <class F>
  SUBQUAD_DEVICE decayed_sum exchanged(F&& f) const {
    return {f(decay), f(reference), f(sum)};
  }
};

// Within a thread: the reference in float64, for decays add to it.
template <class T>
struct running_recurrence {
  double reference = kLowest<double>;
  T sum = 0;

  SUBQUAD_DEVICE running_recurrence() {}
  SUBQUAD_DEVICE explicit running_recurrence(const decayed_sum<T>& from)
      : reference(from.reference), sum(static_cast<T>(from.sum)) {}

  // What makes the new sum: what is kept of the one before, and what is added.
  struct terms {
    T kept;
    T added;
  };
  SUBQUAD_DEVICE terms step(T log_a, T log_b) {
    if (log_a == -infinity<T>()) {
      *this = running_recurrence();
    } else {
      reference += static_cast<double>(log_a);
      if (reference < kLowest<double>) reference = kLowest<double>;
    }
    const auto b = static_cast<double>(log_b);
    const T d = b == reference ? T(0) : static_cast<T>(b - reference);
    const bool moves = d > T(kScanThreshold);
    const T e = exp_within(moves ? -d : d);
    const terms made{moves ? sum * e : sum, moves ? T(1) : e};
    sum = made.kept + made.added;
    if (moves) reference = b;
    return made;
  }
};

template <class T, int kArrays, int kStepsOfThread>
struct recurrence {
  using element = T;
  using state = decayed_sum<T>;
  static constexpr int kSteps = kStepsOfThread;

  scanned<const T> log_a;
  scanned<const T> log_b;
  const T* log_start;  // optional
  vector_view<const std::int64_t> segments;
  batches<kArrays> batch;
  int which_start;  // of the arrays of the batch

  SUBQUAD_DEVICE state initial(const scan_place& place) const {
    state found = state::nothing();
    if (log_start == nullptr || !place.has_lane) return found;
    const T start = log_start[lane_offset(batch, which_start, place.lane)];
    if (start == -infinity<T>()) return found;
    if (!std::isnan(start)) found.reference = static_cast<double>(start);
    found.sum = std::isnan(start) ? static_cast<double>(start) : 1.0;
    return found;
  }

  // Factors that nothing passes: at borders, and at the first step where there is no state.
  SUBQUAD_DEVICE void cut(const scan_place& place, T (&a)[kSteps]) const {
    std::uint32_t borders = borders_at<kSteps>(segments, place);
    if (log_start == nullptr && place.first == 0) borders |= 1;
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      if (borders >> j & 1) a[j] = -infinity<T>();
    }
  }

  static SUBQUAD_DEVICE state summary(const T (&a)[kSteps], const T (&b)[kSteps]) {
    running_recurrence<T> running;
    double decay = 0;
    bool is_cut = false;
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      is_cut |= a[j] == -infinity<T>();
      decay += static_cast<double>(a[j]);
      running.step(a[j], b[j]);
    }
    return {is_cut ? -infinity<double>() : decay, running.reference,
            static_cast<double>(running.sum)};
  }
};

// out_t = log h_t, h_t = e^(log_a_t) h_{t-1} + e^(log_b_t). Nothing aliases. Decays and references
// add up in float64; powers and merges err as those of logcumsumexp.
template <class T>
struct recurrence_task : recurrence<T, 4, kFewScanSteps<T>> {
  enum { kA, kB, kOut, kState, kArrays };
  using base = recurrence<T, kArrays, kFewScanSteps<T>>;
  using base::kSteps;
  using typename base::state;
  static constexpr int kInputs = 2;
  static constexpr int kBlocks = 2;
  struct steps {
    T a[kSteps];  // then out
    T b[kSteps];
  };

  scanned<T> out;

  template <class Io, bool kForSummary, class Stages>
  SUBQUAD_DEVICE void load(const scan_place& place, Stages& stages, steps& to) const {
    const std::int64_t a_offset = lane_offset(this->batch, kA, place.lane);
    const std::int64_t b_offset = lane_offset(this->batch, kB, place.lane);
    Io::start_reading(this->log_a, a_offset, place, stages[0]);
    Io::start_reading(this->log_b, b_offset, place, stages[1]);
    Io::wait_for_reads();
    Io::finish_reading(this->log_a, a_offset, place, stages[0], T(0), to.a);
    Io::finish_reading(this->log_b, b_offset, place, stages[1], -infinity<T>(), to.b);
    this->cut(place, to.a);
  }
  template <class Io, class Stages>
  SUBQUAD_DEVICE void store(const scan_place& place, Stages& stages, const steps& from) const {
    Io::write(out, lane_offset(this->batch, kOut, place.lane), place, stages[0], from.a);
  }
  SUBQUAD_DEVICE state summary(const steps& each) const { return base::summary(each.a, each.b); }
  SUBQUAD_DEVICE void apply(steps& each, const state& before) const {
    running_recurrence<T> running(before);
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      running.step(each.a[j], each.b[j]);
      each.a[j] = static_cast<T>(running.reference + static_cast<double>(log(running.sum)));
    }
  }
  SUBQUAD_DEVICE void finish(const scan_place&, const state&) const {}
};

// G -> factor G + value.
struct affine {
  double factor;
  double value;

  static SUBQUAD_DEVICE affine nothing() { return {1.0, 0.0}; }
  static SUBQUAD_DEVICE affine merged(const affine& first, const affine& second) {
    const bool passes = first.factor != 0 && second.factor != 0;
    return {passes ? not_nothing(first.factor * second.factor) : 0.0,
            second.value + weighted(second.factor, first.value)};
  }
  // What is 0 by rounding alone lets NaN pass.
  static SUBQUAD_DEVICE double not_nothing(double product) {
    return product == 0 ? std::numeric_limits<double>::min() : product;
  }
  template <class F>
  SUBQUAD_DEVICE affine exchanged(F&& f) const {
    return {f(factor), f(value)};
  }
};

// With the shares p_t of h_{t-1} and q_t of e^(log_b_t) in h_t, and G_t = grad_t + p_{t+1} G_{t+1}:
// grad_log_a_t = p_t G_t, grad_log_b_t = q_t G_t, grad_state = p_1 G_1. Nothing aliases.
//
// The factor of all steps of a thread is the ratio of the states before and after them, and not the
// product of its p: rounding does not add up over the length of a lane.
template <class T>
struct recurrence_vjp_task : recurrence<T, 7, 4> {
  enum { kA, kB, kGrad, kGradA, kGradB, kState, kGradState, kArrays };
  using base = recurrence<T, kArrays, 4>;
  using base::kSteps;
  using typename base::state;
  using adjoint = affine;
  static constexpr int kInputs = 3;
  static constexpr int kBlocks = 2;
  struct steps {
    T a[kSteps];  // then p, then grad_log_a
    T b[kSteps];  // then q, then grad_log_b
    T grad[kSteps];
    double factor;
  };

  scanned<const T> grad;
  scanned<T> grad_a;  // each optional
  scanned<T> grad_b;
  T* grad_state;

  template <class Io, bool kForSummary, class Stages>
  SUBQUAD_DEVICE void load(const scan_place& place, Stages& stages, steps& to) const {
    const std::int64_t a_offset = lane_offset(this->batch, kA, place.lane);
    const std::int64_t b_offset = lane_offset(this->batch, kB, place.lane);
    const std::int64_t grad_offset = lane_offset(this->batch, kGrad, place.lane);
    Io::start_reading(this->log_a, a_offset, place, stages[0]);
    Io::start_reading(this->log_b, b_offset, place, stages[1]);
    if (!kForSummary) Io::start_reading(grad, grad_offset, place, stages[2]);
    Io::wait_for_reads();
    Io::finish_reading(this->log_a, a_offset, place, stages[0], T(0), to.a);
    Io::finish_reading(this->log_b, b_offset, place, stages[1], -infinity<T>(), to.b);
    this->cut(place, to.a);
    if (!kForSummary) Io::finish_reading(grad, grad_offset, place, stages[2], T(0), to.grad);
  }
  template <class Io, class Stages>
  SUBQUAD_DEVICE void store(const scan_place& place, Stages& stages, const steps& from) const {
    if (grad_a) {
      Io::write(grad_a, lane_offset(this->batch, kGradA, place.lane), place, stages[0], from.a);
    }
    if (grad_b) {
      Io::write(grad_b, lane_offset(this->batch, kGradB, place.lane), place, stages[1], from.b);
    }
  }
  SUBQUAD_DEVICE state summary(const steps& each) const { return base::summary(each.a, each.b); }

  SUBQUAD_DEVICE void relate(steps& each, const state& before, const state& own,
                             const state& after) const {
    const double gap = before.reference + own.decay - after.reference;
    const double factor = before.sum / after.sum * exp_between<T>(gap);
    bool passes = true;
    running_recurrence<T> running(before);
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      const T b = each.b[j];
      const auto made = running.step(each.a[j], b);
      // Of what is not finite the shares are not known, but for those of nothing.
      const T inverse = fabs(running.reference) < infinity<double>()
                            ? T(1) / running.sum
                            : std::numeric_limits<T>::quiet_NaN();
      each.a[j] = made.kept == 0 ? T(0) : made.kept * inverse;
      each.b[j] = b == -infinity<T>() ? T(0) : made.added * inverse;
      passes &= each.a[j] != 0;
    }
    each.factor = passes ? affine::not_nothing(factor) : 0.0;
  }

  SUBQUAD_DEVICE adjoint adjoint_summary(const steps& each) const {
    T running = 0;
    SUBQUAD_UNROLL
    for (int j = kSteps - 1; j >= 0; --j) running = weighted(each.a[j], running + each.grad[j]);
    return {each.factor, static_cast<double>(running)};
  }
  SUBQUAD_DEVICE void adjoint_apply(steps& each, const adjoint& after) const {
    T running = static_cast<T>(after.value);
    SUBQUAD_UNROLL
    for (int j = kSteps - 1; j >= 0; --j) {
      const T total = running + each.grad[j];
      running = weighted(each.a[j], total);
      each.a[j] = running;
      each.b[j] = weighted(each.b[j], total);
    }
  }
  SUBQUAD_DEVICE adjoint adjoint_initial(const scan_place&, const state&) const {
    return adjoint::nothing();
  }
  SUBQUAD_DEVICE void adjoint_finish(const scan_place& place, const adjoint& total) const {
    if (grad_state) {
      grad_state[lane_offset(this->batch, kGradState, place.lane)] = static_cast<T>(total.value);
    }
  }
};

template <class T>
using layout = scan_layout<recurrence_task<T>>;
template <class T>
using vjp_layout = reverse_scan_layout<recurrence_vjp_task<T>>;

template <class T, class Task>
void set_recurrence(Task& task, const array_view& log_a, const array_view& log_b,
                    const array_view* state, const array_view* segments) {
  task.log_a = scanned_of<const T>(&log_a, task.batch, Task::kA);
  task.log_b = scanned_of<const T>(&log_b, task.batch, Task::kB);
  task.log_start = data_of<const T>(state);
  task.segments =
      segments ? vector_at<const std::int64_t>(*segments, 0) : vector_view<const std::int64_t>{};
  task.which_start = Task::kState;
}

template <class T>
void recurrence_as(const array_view& log_a, const array_view& log_b, const array_view* state,
                   const array_view* segments, const array_view& out, const array_view& workspace) {
  using task_type = recurrence_task<T>;
  batch_shape shape;
  shape.include(log_a, 1, "log_a");
  task_type task;
  task.batch =
      batches_of<task_type::kArrays>(shape, {{&log_a, 1}, {&log_b, 1}, {&out, 1}, {state, 0}});
  set_recurrence<T>(task, log_a, log_b, state, segments);
  task.out = scanned_of<T>(&out, task.batch, task_type::kOut);
  workspace_layout pieces(workspace);
  layout<T>(pieces, shape.count(), log_a.shape[log_a.ndim - 1],
            lanes_lie_closer(task.batch, task_type::kA, log_a))
      .run(task);
}

template <class T>
void recurrence_vjp_as(const array_view& log_a, const array_view& log_b, const array_view* state,
                       const array_view* segments, const array_view& grad,
                       const array_view* grad_log_a, const array_view* grad_log_b,
                       const array_view* grad_state, const array_view& workspace) {
  using task_type = recurrence_vjp_task<T>;
  batch_shape shape;
  shape.include(log_a, 1, "log_a");
  task_type task;
  task.batch = batches_of<task_type::kArrays>(shape, {{&log_a, 1},
                                                      {&log_b, 1},
                                                      {&grad, 1},
                                                      {grad_log_a, 1},
                                                      {grad_log_b, 1},
                                                      {state, 0},
                                                      {grad_state, 0}});
  set_recurrence<T>(task, log_a, log_b, state, segments);
  task.grad = scanned_of<const T>(&grad, task.batch, task_type::kGrad);
  task.grad_a = scanned_of<T>(grad_log_a, task.batch, task_type::kGradA);
  task.grad_b = scanned_of<T>(grad_log_b, task.batch, task_type::kGradB);
  task.grad_state = data_of<T>(grad_state);
  workspace_layout pieces(workspace);
  vjp_layout<T>(pieces, shape.count(), log_a.shape[log_a.ndim - 1],
                lanes_lie_closer(task.batch, task_type::kA, log_a))
      .run(task);
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t log_linear_recurrence_workspace(std::int64_t lanes, std::int64_t n,
                                            std::int64_t itemsize) {
  return itemsize == 8 ? cuda::scan_workspace<cuda::layout<double>>(lanes, n)
                       : cuda::scan_workspace<cuda::layout<float>>(lanes, n);
}

void log_linear_recurrence(const array_view& log_a, const array_view& log_b,
                           const array_view* state, const array_view* segments, std::int32_t axis,
                           bool reverse, const array_view& out, const array_view& workspace) {
  check_log_linear_recurrence(log_a, log_b, state, segments, axis, out);
  const scan_view a_view(log_a, axis, reverse);
  const scan_view b_view(log_b, axis, reverse);
  const scan_view out_view(out, axis, reverse);
  const optional_scan_view segments_view(segments, 0, reverse);
  cuda::for_scanned_type(log_a.type, [&](auto element) {
    cuda::recurrence_as<decltype(element)>(a_view.get(), b_view.get(), state, segments_view.get(),
                                           out_view.get(), workspace);
  });
}

std::size_t log_linear_recurrence_vjp_workspace(std::int64_t lanes, std::int64_t n,
                                                std::int64_t itemsize) {
  return itemsize == 8 ? cuda::scan_workspace<cuda::vjp_layout<double>>(lanes, n)
                       : cuda::scan_workspace<cuda::vjp_layout<float>>(lanes, n);
}

void log_linear_recurrence_vjp(const array_view& log_a, const array_view& log_b,
                               const array_view* state, const array_view* segments,
                               std::int32_t axis, bool reverse, const array_view& grad,
                               const array_view* grad_log_a, const array_view* grad_log_b,
                               const array_view* grad_state, const array_view& workspace) {
  check_log_linear_recurrence_vjp(log_a, log_b, state, segments, axis, grad, grad_log_a, grad_log_b,
                                  grad_state);
  const scan_view a_view(log_a, axis, reverse);
  const scan_view b_view(log_b, axis, reverse);
  const scan_view grad_view(grad, axis, reverse);
  const optional_scan_view grad_a_view(grad_log_a, axis, reverse);
  const optional_scan_view grad_b_view(grad_log_b, axis, reverse);
  const optional_scan_view segments_view(segments, 0, reverse);
  cuda::for_scanned_type(log_a.type, [&](auto element) {
    cuda::recurrence_vjp_as<decltype(element)>(
        a_view.get(), b_view.get(), state, segments_view.get(), grad_view.get(), grad_a_view.get(),
        grad_b_view.get(), grad_state, workspace);
  });
}

}  // namespace subquad::core

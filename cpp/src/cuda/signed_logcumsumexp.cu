// Logarithms of cumulative sums of weighted exponentials, with their signs, and their reverse.
#include "scan.cuh"
#include "scan_sums.cuh"
#include "scans_core.hpp"

namespace subquad::cuda {
namespace {

// Sums may cancel: they, and the powers in them, are in float64 for elements of both types.
using signed_sum = scaled_sum<double>;

struct running_signed_sum : running_sum<double> {
  using running_sum::running_sum;

  // weight e^x; a weight of 0 removes what is there, and infinities of both signs give NaN.
  SUBQUAD_DEVICE void add_weighted(double x, double weight) {
    if (weight == 0 || x == -infinity<double>()) return;
    const bool is_infinite = x == infinity<double>() || fabs(weight) == infinity<double>();
    add(is_infinite ? infinity<double>() : x, is_infinite ? weight * infinity<double>() : weight);
    // What cancels leaves no reference behind: smaller terms may follow.
    if (sum == 0) reference = kLowest<double>;
  }
};

// log |sum|; of the smallest and of what is not finite too.
template <class T>
SUBQUAD_DEVICE double log_of_size(double sum) {
  const double size = fabs(sum);
  constexpr double kSmallest = std::numeric_limits<double>::min();
  if (sizeof(T) == 8 || !(size >= kSmallest && size < infinity<double>())) return log(size);
  // A logarithm in float32 of what is left beside a power of 2.
  const long long bits = __double_as_longlong(size);
  const auto exponent = static_cast<int>(bits >> 52) - 1023;
  constexpr long long kFraction = (1LL << 52) - 1;
  const double rest = __longlong_as_double((bits & kFraction) | (1023LL << 52));
  return exponent * kLn2<double> + static_cast<double>(log(static_cast<float>(rest)));
}

template <class T, int kArrays, int kStepsOfThread>
struct signed_sums {
  using element = T;
  using state = signed_sum;
  static constexpr int kSteps = kStepsOfThread;
  static constexpr int kBlocks = 2;

  scanned<const T> x;
  scanned<const T> sign;
  batches<kArrays> batch;
  bool exclusive;

  SUBQUAD_DEVICE state initial(const scan_place&) const { return state::nothing(); }

  static SUBQUAD_DEVICE state summary(const T (&x)[kSteps], const T (&sign)[kSteps]) {
    running_signed_sum running;
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      running.add_weighted(static_cast<double>(x[j]), static_cast<double>(sign[j]));
    }
    return {running.reference, running.sum};
  }
};

// out_i = log |s_i| and out_sign_i the sign of s_i, s_i = sum_{j <= i} sign_j e^x_j, or j < i.
// Nothing aliases. Sums err by a few units of float64 of the largest prefix of a tile.
template <class T>
struct signed_task : signed_sums<T, 4, 8> {
  enum { kX, kSign, kOut, kOutSign, kArrays };
  using base = signed_sums<T, kArrays, 8>;
  using base::kSteps;
  using typename base::state;
  static constexpr int kInputs = 2;
  struct steps {
    T x[kSteps];     // then out
    T sign[kSteps];  // then out_sign
  };

  scanned<T> out;
  scanned<T> out_sign;

  template <class Io, bool kForSummary, class Stages>
  SUBQUAD_DEVICE void load(const scan_place& place, Stages& stages, steps& to) const {
    const std::int64_t x_offset = lane_offset(this->batch, kX, place.lane);
    const std::int64_t sign_offset = lane_offset(this->batch, kSign, place.lane);
    Io::start_reading(this->x, x_offset, place, stages[0]);
    Io::start_reading(this->sign, sign_offset, place, stages[1]);
    Io::wait_for_reads();
    Io::finish_reading(this->x, x_offset, place, stages[0], -infinity<T>(), to.x);
    Io::finish_reading(this->sign, sign_offset, place, stages[1], T(0), to.sign);
  }
  template <class Io, class Stages>
  SUBQUAD_DEVICE void store(const scan_place& place, Stages& stages, const steps& from) const {
    Io::write(out, lane_offset(this->batch, kOut, place.lane), place, stages[0], from.x);
    Io::write(out_sign, lane_offset(this->batch, kOutSign, place.lane), place, stages[1],
              from.sign);
  }
  SUBQUAD_DEVICE state summary(const steps& each) const { return base::summary(each.x, each.sign); }
  SUBQUAD_DEVICE void apply(steps& each, const state& before) const {
    running_signed_sum running(before);
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      running_signed_sum counted = running;
      running.add_weighted(static_cast<double>(each.x[j]), static_cast<double>(each.sign[j]));
      if (!this->exclusive) counted = running;
      const double sum = counted.sum;
      each.x[j] = static_cast<T>(counted.reference + log_of_size<T>(sum));
      each.sign[j] = sum > 0 ? T(1) : sum < 0 ? T(-1) : static_cast<T>(sum);
    }
  }
  SUBQUAD_DEVICE void finish(const scan_place&, const state&) const {}
};

// With G_j = e^x_j sum_i grad_i / s_i over the sums s_i that hold j and are not 0:
// grad_x_j = sign_j G_j, grad_sign_j = G_j. NaN where such a sum is not finite, unless its gradient
// is 0. Nothing aliases.
template <class T>
struct signed_vjp_task : signed_sums<T, 5, 4> {
  enum { kX, kSign, kGrad, kGradX, kGradSign, kArrays };
  using base = signed_sums<T, kArrays, 4>;
  using base::kSteps;
  using typename base::state;
  using adjoint = signed_sum;
  static constexpr int kInputs = 3;
  struct steps {
    T x[kSteps];     // then grad_x
    T sign[kSteps];  // then grad_sign
    T grad[kSteps];
    double share[kSteps];
    T reference[kSteps];  // an element, or -inf for an empty sum
    T before;             // the reference before the steps
  };

  scanned<const T> grad;
  scanned<T> grad_x;  // each optional
  scanned<T> grad_sign;

  template <class Io, bool kForSummary, class Stages>
  SUBQUAD_DEVICE void load(const scan_place& place, Stages& stages, steps& to) const {
    const std::int64_t x_offset = lane_offset(this->batch, kX, place.lane);
    const std::int64_t sign_offset = lane_offset(this->batch, kSign, place.lane);
    const std::int64_t grad_offset = lane_offset(this->batch, kGrad, place.lane);
    Io::start_reading(this->x, x_offset, place, stages[0]);
    Io::start_reading(this->sign, sign_offset, place, stages[1]);
    if (!kForSummary) Io::start_reading(grad, grad_offset, place, stages[2]);
    Io::wait_for_reads();
    Io::finish_reading(this->x, x_offset, place, stages[0], -infinity<T>(), to.x);
    Io::finish_reading(this->sign, sign_offset, place, stages[1], T(0), to.sign);
    if (!kForSummary) Io::finish_reading(grad, grad_offset, place, stages[2], T(0), to.grad);
  }
  template <class Io, class Stages>
  SUBQUAD_DEVICE void store(const scan_place& place, Stages& stages, const steps& from) const {
    if (grad_x) {
      Io::write(grad_x, lane_offset(this->batch, kGradX, place.lane), place, stages[0], from.x);
    }
    if (grad_sign) {
      Io::write(grad_sign, lane_offset(this->batch, kGradSign, place.lane), place, stages[1],
                from.sign);
    }
  }
  SUBQUAD_DEVICE state summary(const steps& each) const { return base::summary(each.x, each.sign); }

  SUBQUAD_DEVICE void relate(steps& each, const state& before, const state&, const state&) const {
    running_signed_sum running(before);
    each.before = held(running.reference);
    SUBQUAD_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      running_signed_sum counted = running;
      running.add_weighted(static_cast<double>(each.x[j]), static_cast<double>(each.sign[j]));
      if (!this->exclusive) counted = running;
      each.share[j] = counted.share(static_cast<double>(each.grad[j]));
      each.reference[j] = held(running.reference);
    }
  }

  static SUBQUAD_DEVICE T held(double reference) {
    return reference == kLowest<double> ? -infinity<T>() : static_cast<T>(reference);
  }
  static SUBQUAD_DEVICE double reference_of(T element) {
    return element == -infinity<T>() ? kLowest<double> : static_cast<double>(element);
  }

  // Goes back over the steps, with `use(j, shares of the sums that hold j)`.
  template <class F>
  SUBQUAD_DEVICE void go_back(const steps& each, running_adjoint<double>& running, F&& use) const {
    running.move(reference_of(each.reference[kSteps - 1]));
    SUBQUAD_UNROLL
    for (int j = kSteps - 1; j >= 0; --j) {
      if (!this->exclusive) running.sum += each.share[j];
      use(j);
      running.move(reference_of(j > 0 ? each.reference[j - 1] : each.before));
      if (this->exclusive) running.sum += each.share[j];
    }
  }
  SUBQUAD_DEVICE adjoint adjoint_summary(const steps& each) const {
    running_adjoint<double> running(adjoint::nothing());
    go_back(each, running, [](int) {});
    return running.template state<double>();
  }
  SUBQUAD_DEVICE void adjoint_apply(steps& each, const adjoint& after) const {
    running_adjoint<double> running(after);
    go_back(each, running, [&](int j) {
      double gradient = 0;
      if (running.sum != 0 && each.x[j] != -infinity<T>()) {
        gradient = running.sum * exp(static_cast<double>(each.x[j]) - running.reference);
      }
      const auto weight = static_cast<double>(each.sign[j]);
      each.x[j] = weight == 0 ? T(0) : static_cast<T>(weight * gradient);
      each.sign[j] = static_cast<T>(gradient);
    });
  }
  SUBQUAD_DEVICE adjoint adjoint_initial(const scan_place&, const state&) const {
    return adjoint::nothing();
  }
  SUBQUAD_DEVICE void adjoint_finish(const scan_place&, const adjoint&) const {}
};

template <class T>
using layout = scan_layout<signed_task<T>>;
template <class T>
using vjp_layout = reverse_scan_layout<signed_vjp_task<T>>;

template <class T>
void signed_as(const array_view& x, const array_view& sign, bool exclusive, const array_view& out,
               const array_view& out_sign, const array_view& workspace) {
  using task_type = signed_task<T>;
  batch_shape shape;
  shape.include(x, 1, "x");
  task_type task;
  task.batch =
      batches_of<task_type::kArrays>(shape, {{&x, 1}, {&sign, 1}, {&out, 1}, {&out_sign, 1}});
  task.x = scanned_of<const T>(&x, task.batch, task_type::kX);
  task.sign = scanned_of<const T>(&sign, task.batch, task_type::kSign);
  task.exclusive = exclusive;
  task.out = scanned_of<T>(&out, task.batch, task_type::kOut);
  task.out_sign = scanned_of<T>(&out_sign, task.batch, task_type::kOutSign);
  workspace_layout pieces(workspace);
  layout<T>(pieces, shape.count(), x.shape[x.ndim - 1],
            lanes_lie_closer(task.batch, task_type::kX, x))
      .run(task);
}

template <class T>
void signed_vjp_as(const array_view& x, const array_view& sign, bool exclusive,
                   const array_view& grad, const array_view* grad_x, const array_view* grad_sign,
                   const array_view& workspace) {
  using task_type = signed_vjp_task<T>;
  batch_shape shape;
  shape.include(x, 1, "x");
  task_type task;
  task.batch = batches_of<task_type::kArrays>(
      shape, {{&x, 1}, {&sign, 1}, {&grad, 1}, {grad_x, 1}, {grad_sign, 1}});
  task.x = scanned_of<const T>(&x, task.batch, task_type::kX);
  task.sign = scanned_of<const T>(&sign, task.batch, task_type::kSign);
  task.exclusive = exclusive;
  task.grad = scanned_of<const T>(&grad, task.batch, task_type::kGrad);
  task.grad_x = scanned_of<T>(grad_x, task.batch, task_type::kGradX);
  task.grad_sign = scanned_of<T>(grad_sign, task.batch, task_type::kGradSign);
  workspace_layout pieces(workspace);
  vjp_layout<T>(pieces, shape.count(), x.shape[x.ndim - 1],
                lanes_lie_closer(task.batch, task_type::kX, x))
      .run(task);
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t signed_logcumsumexp_workspace(std::int64_t lanes, std::int64_t n,
                                          std::int64_t itemsize) {
  return itemsize == 8 ? cuda::scan_workspace<cuda::layout<double>>(lanes, n)
                       : cuda::scan_workspace<cuda::layout<float>>(lanes, n);
}

void signed_logcumsumexp(const array_view& x, const array_view& sign, std::int32_t axis,
                         bool reverse, bool exclusive, const array_view& out,
                         const array_view& out_sign, const array_view& workspace) {
  check_signed_logcumsumexp(x, sign, axis, out, out_sign);
  const scan_view x_view(x, axis, reverse);
  const scan_view sign_view(sign, axis, reverse);
  const scan_view out_view(out, axis, reverse);
  const scan_view out_sign_view(out_sign, axis, reverse);
  cuda::for_scanned_type(x.type, [&](auto element) {
    cuda::signed_as<decltype(element)>(x_view.get(), sign_view.get(), exclusive, out_view.get(),
                                       out_sign_view.get(), workspace);
  });
}

std::size_t signed_logcumsumexp_vjp_workspace(std::int64_t lanes, std::int64_t n,
                                              std::int64_t itemsize) {
  return itemsize == 8 ? cuda::scan_workspace<cuda::vjp_layout<double>>(lanes, n)
                       : cuda::scan_workspace<cuda::vjp_layout<float>>(lanes, n);
}

void signed_logcumsumexp_vjp(const array_view& x, const array_view& sign, std::int32_t axis,
                             bool reverse, bool exclusive, const array_view& grad,
                             const array_view* grad_x, const array_view* grad_sign,
                             const array_view& workspace) {
  check_signed_logcumsumexp_vjp(x, sign, axis, grad, grad_x, grad_sign);
  const scan_view x_view(x, axis, reverse);
  const scan_view sign_view(sign, axis, reverse);
  const scan_view grad_view(grad, axis, reverse);
  const optional_scan_view grad_x_view(grad_x, axis, reverse);
  const optional_scan_view grad_sign_view(grad_sign, axis, reverse);
  cuda::for_scanned_type(x.type, [&](auto element) {
    cuda::signed_vjp_as<decltype(element)>(x_view.get(), sign_view.get(), exclusive,
                                           grad_view.get(), grad_x_view.get(), grad_sign_view.get(),
                                           workspace);
  });
}

}  // namespace subquad::core

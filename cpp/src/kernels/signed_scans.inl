// Contracts stand in signed_scans_kernels.hpp.
#include "signed_scans_kernels.hpp"

#include "lane_scan.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

struct vector_sum {
  wide reference;
  wide sum;
  wide remainder;
};

SUBQUAD_INLINE vector_sum load_sum(const signed_state& from, int lane) {
  return {load(from.reference + lane), load(from.sum + lane), load(from.remainder + lane)};
}

SUBQUAD_INLINE void store_sum(signed_state& to, int lane, const vector_sum& s) {
  store<double>(to.reference + lane, s.reference);
  store<double>(to.sum + lane, s.sum);
  store<double>(to.remainder + lane, s.remainder);
}

// e^(a - b), or e^(b - a) where `swapped`; a difference of float32 needs no second part.
template <class T>
SUBQUAD_INLINE wide exp_difference(wide a, wide b, wide_mask swapped) {
  const wide d = a - b;
  const wide e = exp<double>(swapped ? -d : d);
  if constexpr (sizeof(T) == 4) {
    return e;
  } else {
    const wide lost = lost_in_sum(a, -b, d);
    const wide exact = e + e * (swapped ? -lost : lost);
    return magnitude(d) < 700.0 ? exact : e;  // beyond, e is 0 or infinite
  }
}

// Adds sign e^x and returns e^(x - reference), of the reference after it. What is absent - a sign
// of 0, an x of -inf, a finite x after an infinite sum - leaves the state alone. The reference of
// an empty state is the lowest number and not -inf, so that -inf - -inf does not arise.
template <class T>
SUBQUAD_INLINE wide add_term(vector_sum& s, wide x, wide sign) {
  const wide total = s.sum + s.remainder;
  const wide_mask infinite = magnitude(total) == kUnbounded;
  const wide_mask present = (sign != 0.0) & (x != -kUnbounded) & ~(infinite & (x < kUnbounded));
  const wide_mask nothing = total == 0.0;
  const wide d = x - s.reference;
  const wide_mask moves =
      present & (x != kUnbounded) & ((d > kSignedThreshold) | (nothing & (d < -kSignedThreshold)));
  const wide e = exp_difference<T>(x, s.reference, moves);
  const wide weight = moves ? broadcast(1.0) : e;
  const wide term = present ? sign * weight : wide{};
  const wide factor = moves ? e : broadcast(1.0);
  const wide kept = nothing ? wide{} : s.sum * factor;
  const wide kept_remainder = nothing ? wide{} : s.remainder * factor;
  s.sum = kept + term;
  s.remainder = is_finite(s.sum) ? kept_remainder + lost_in_sum(kept, term, s.sum) : wide{};
  s.reference = moves ? x : s.reference;
  return weight;
}

// grad / s over e^-reference; 0 where s is, and undefined where it is not finite.
SUBQUAD_INLINE wide share_of(wide grad, wide total) {
  const wide share = is_finite(total) ? grad / total : broadcast(kUndefined);
  return ((total == 0.0) | (grad == 0.0)) ? wide{} : share;
}

constexpr std::int64_t kBlock = kBlockSteps * kTileLanes;

template <class T>
struct signed_buffers {
  double* reference;  // of every step of a block
  double* total;
  double* weight;
  T* x;
  T* sign;
  T* grad;
  T* out_x;     // out, or grad_x
  T* out_sign;  // out_sign, or grad_sign

  static constexpr std::size_t kBytes = kBlock * (3 * sizeof(double) + 5 * sizeof(T));

  explicit signed_buffers(void* scratch)
      : reference(static_cast<double*>(scratch)),
        total(reference + kBlock),
        weight(total + kBlock),
        x(reinterpret_cast<T*>(weight + kBlock)),
        sign(x + kBlock),
        grad(sign + kBlock),
        out_x(grad + kBlock),
        out_sign(out_x + kBlock) {}
};

enum class pass { scan, scan_exclusive, summarise, save, save_and_sum };

template <class T>
SUBQUAD_INLINE void write_log(const vector_sum& s, T* out, T* out_sign) {
  const wide total = s.sum + s.remainder;
  store_wide(out, s.reference + log<double>(magnitude(total)));
  const wide positive = total > 0.0 ? broadcast(1.0) : total;
  store_wide(out_sign, total < 0.0 ? broadcast(-1.0) : positive);
}

struct vector_carry {
  wide reference;
  wide sum;
};

// Adds a share of a later state: references rise along a row, but for a sum that cancels.
SUBQUAD_INLINE void add_later_share(vector_carry& carry, wide share, wide reference) {
  if (any(reference != carry.reference)) {
    const wide_mask moves = (share != 0.0) & ((carry.sum == 0.0) | (reference < carry.reference));
    carry.sum = moves ? weighted(carry.sum, exp<double>(reference - carry.reference)) : carry.sum;
    carry.reference = moves ? reference : carry.reference;
    share = reference == carry.reference
                ? share
                : weighted(share, exp<double>(carry.reference - reference));
  }
  carry.sum += share;
}

template <class T, pass kPass>
void run_forward(const signed_scan_task<T>& task) {
  constexpr bool kScans = kPass == pass::scan || kPass == pass::scan_exclusive;
  const signed_buffers<T> buffers(task.scratch);
  signed_state& state = *task.state;
  if constexpr (kPass == pass::save_and_sum) {
    for (int c = 0; c < kTileLanes; ++c) {
      task.carry->reference[c] = -kHighest;
      task.carry->sum[c] = 0;
    }
  }
  for (std::int64_t first = 0; first < task.tile.steps; first += kBlockSteps) {
    if constexpr (kPass == pass::save || kPass == pass::save_and_sum) {
      task.saved[first / kBlockSteps] = state;
    }
    const std::int64_t steps =
        task.tile.steps - first < kBlockSteps ? task.tile.steps - first : kBlockSteps;
    if (kPass == pass::save && first + steps == task.tile.steps) break;
    const lane_block<const T> x =
        read_block<T>(task.x, task.tile, first, steps, -static_cast<T>(kUnbounded), buffers.x);
    const lane_block<const T> sign =
        read_block<T>(task.sign, task.tile, first, steps, T(0), buffers.sign);
    lane_block<const T> grad{x.data, 0};
    if constexpr (kPass == pass::save_and_sum) {
      grad = read_block<T>(task.grad, task.tile, first, steps, T(0), buffers.grad, false,
                           task.exclusive);
    }
    lane_block<T> out{buffers.out_x, 0};
    lane_block<T> out_sign{buffers.out_sign, 0};
    if constexpr (kScans) {
      out = open_block<T>(task.out, task.tile, first, steps, buffers.out_x);
      out_sign = open_block<T>(task.out_sign, task.tile, first, steps, buffers.out_sign);
    }
    for (int base = 0; base < kTileLanes; base += kGroupLanes) {
      vector_sum sums[kGroup];
      vector_carry carries[kGroup] = {};
      for (int v = 0; v < kGroup; ++v) {
        const int lane = base + v * kWideLanes;
        sums[v] = load_sum(state, lane);
        if constexpr (kPass == pass::save_and_sum) {
          carries[v] = {load(task.carry->reference + lane), load(task.carry->sum + lane)};
        }
      }
      for (std::int64_t t = 0; t < steps; ++t) {
        SUBQUAD_UNROLL_GROUP
        for (int v = 0; v < kGroup; ++v) {
          const int lane = base + v * kWideLanes;
          T* out_at = out.data + t * out.stride + lane;
          T* out_sign_at = out_sign.data + t * out_sign.stride + lane;
          if constexpr (kPass == pass::scan_exclusive) write_log<T>(sums[v], out_at, out_sign_at);
          add_term<T>(sums[v], load_wide(x.data + t * x.stride + lane),
                      load_wide(sign.data + t * sign.stride + lane));
          if constexpr (kPass == pass::scan) write_log<T>(sums[v], out_at, out_sign_at);
          if constexpr (kPass == pass::save_and_sum) {
            const wide share = share_of(load_wide(grad.data + t * grad.stride + lane),
                                        sums[v].sum + sums[v].remainder);
            add_later_share(carries[v], share, sums[v].reference);
          }
        }
      }
      for (int v = 0; v < kGroup; ++v) {
        const int lane = base + v * kWideLanes;
        store_sum(state, lane, sums[v]);
        if constexpr (kPass == pass::save_and_sum) {
          store<double>(task.carry->reference + lane, carries[v].reference);
          store<double>(task.carry->sum + lane, carries[v].sum);
        }
      }
    }
    if constexpr (kScans) {
      write_block<T>(task.out, task.tile, first, steps, buffers.out_x, out);
      write_block<T>(task.out_sign, task.tile, first, steps, buffers.out_sign, out_sign);
    }
  }
}

template <class T>
void scan(const signed_scan_task<T>& task) {
  if (task.exclusive) {
    run_forward<T, pass::scan_exclusive>(task);
  } else {
    run_forward<T, pass::scan>(task);
  }
}

template <class T>
void prepare(const signed_scan_task<T>& task) {
  if (task.grad.data) {
    run_forward<T, pass::save_and_sum>(task);
  } else {
    run_forward<T, pass::save>(task);
  }
}

template <class T>
void reverse(const signed_scan_task<T>& task) {
  const signed_buffers<T> buffers(task.scratch);
  const std::int64_t blocks = (task.tile.steps + kBlockSteps - 1) / kBlockSteps;
  for (std::int64_t block = blocks - 1; block >= 0; --block) {
    const std::int64_t first = block * kBlockSteps;
    const std::int64_t steps =
        task.tile.steps - first < kBlockSteps ? task.tile.steps - first : kBlockSteps;
    const lane_block<const T> x =
        read_block<T>(task.x, task.tile, first, steps, -static_cast<T>(kUnbounded), buffers.x);
    const lane_block<const T> sign =
        read_block<T>(task.sign, task.tile, first, steps, T(0), buffers.sign);
    const lane_block<const T> grad = read_block<T>(task.grad, task.tile, first, steps, T(0),
                                                   buffers.grad, false, task.exclusive);
    lane_block<T> grad_x{buffers.out_x, kTileLanes};
    lane_block<T> grad_sign{buffers.out_sign, kTileLanes};
    if (task.grad_x.data) {
      grad_x = open_block<T>(task.grad_x, task.tile, first, steps, buffers.out_x);
    }
    if (task.grad_sign.data) {
      grad_sign = open_block<T>(task.grad_sign, task.tile, first, steps, buffers.out_sign);
    }
    for (int base = 0; base < kTileLanes; base += kGroupLanes) {
      vector_sum sums[kGroup];
      vector_carry carries[kGroup];
      for (int v = 0; v < kGroup; ++v) {
        const int lane = base + v * kWideLanes;
        sums[v] = load_sum(task.saved[block], lane);
        carries[v] = {load(task.carry->reference + lane), load(task.carry->sum + lane)};
      }
      for (std::int64_t t = 0; t < steps; ++t) {
        SUBQUAD_UNROLL_GROUP
        for (int v = 0; v < kGroup; ++v) {
          const int lane = base + v * kWideLanes;
          const std::int64_t at = t * kTileLanes + lane;
          store<double>(buffers.weight + at,
                        add_term<T>(sums[v], load_wide(x.data + t * x.stride + lane),
                                    load_wide(sign.data + t * sign.stride + lane)));
          store<double>(buffers.reference + at, sums[v].reference);
          store<double>(buffers.total + at, sums[v].sum + sums[v].remainder);
        }
      }
      for (std::int64_t t = steps - 1; t >= 0; --t) {
        SUBQUAD_UNROLL_GROUP
        for (int v = 0; v < kGroup; ++v) {
          const int lane = base + v * kWideLanes;
          const std::int64_t at = t * kTileLanes + lane;
          vector_carry& carry = carries[v];
          const wide reference = load(buffers.reference + at);
          const wide share =
              share_of(load_wide(grad.data + t * grad.stride + lane), load(buffers.total + at));
          wide weight = load(buffers.weight + at);
          // A step without a share of its own may be far above the states that hold it, or have no
          // reference: it is weighed against that of the shares.
          if (any(reference != carry.reference)) {
            const wide_mask moves = share != 0.0;
            carry.sum =
                moves ? weighted(carry.sum, exp<double>(reference - carry.reference)) : carry.sum;
            carry.reference = moves ? reference : carry.reference;
            weight = reference == carry.reference
                         ? weight
                         : exp<double>(load_wide(x.data + t * x.stride + lane) - carry.reference);
          }
          carry.sum += share;
          const wide slope = weighted(weight, carry.sum);
          store_wide(grad_sign.data + t * grad_sign.stride + lane, slope);
          store_wide(grad_x.data + t * grad_x.stride + lane,
                     weighted(load_wide(sign.data + t * sign.stride + lane), slope));
        }
      }
      for (int v = 0; v < kGroup; ++v) {
        const int lane = base + v * kWideLanes;
        store<double>(task.carry->reference + lane, carries[v].reference);
        store<double>(task.carry->sum + lane, carries[v].sum);
      }
    }
    if (task.grad_x.data) {
      write_block<T>(task.grad_x, task.tile, first, steps, buffers.out_x, grad_x);
    }
    if (task.grad_sign.data) {
      write_block<T>(task.grad_sign, task.tile, first, steps, buffers.out_sign, grad_sign);
    }
  }
}

template <class T>
constexpr signed_scans_functions<T> functions = {
    signed_buffers<T>::kBytes, scan<T>, run_forward<T, pass::summarise>, prepare<T>, reverse<T>};

}  // namespace

extern const signed_scans_kernels kernels_signed_scans;
const signed_scans_kernels kernels_signed_scans = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad

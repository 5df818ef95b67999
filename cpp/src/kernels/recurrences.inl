// Contracts stand in recurrences_kernels.hpp.
#include "recurrences_kernels.hpp"

#include "lane_scan.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// Only float64 sees what rounding takes from a reference, and pays for keeping it.
template <class T>
constexpr bool kKeepsRemainder = sizeof(T) == 8;

struct vector_state {
  wide reference;
  wide remainder;
  wide sum;
};

SUBQUAD_INLINE vector_state load_state(const recurrence_state& from, int lane) {
  return {load(from.reference + lane), load(from.remainder + lane), load(from.sum + lane)};
}

SUBQUAD_INLINE void store_state(recurrence_state& to, int lane, const vector_state& state) {
  store<double>(to.reference + lane, state.reference);
  store<double>(to.remainder + lane, state.remainder);
  store<double>(to.sum + lane, state.sum);
}

// Adds to reference + remainder; a remainder of what is not finite is 0.
template <class T>
SUBQUAD_INLINE void add_log(wide& reference, wide& remainder, wide log_a) {
  const wide sum = reference + log_a;
  if constexpr (kKeepsRemainder<T>) {
    const wide lost = remainder + lost_in_sum(reference, log_a, sum);
    remainder = is_finite(sum) ? lost : wide{};
  }
  reference = sum;
}

// e^d for d <= kRecurrenceThreshold: relative error 4.0e-11 and |d| ulp for float32, which is far
// below what it sees, else 1 ulp.
template <class T>
SUBQUAD_INLINE wide exp_difference(wide d) {
  if constexpr (sizeof(T) == 8) {
    return exp<double>(d);
  } else {
    constexpr double kBiasedRounder = kRounder<double> + float_format<double>::kBias;
    const wide power = max<double>(broadcast(-1023.0), d * log2_constants<double>::kLog2E);
    const wide rounded = power + kBiasedRounder;
    const wide f = power - (rounded - kBiasedRounder);
    wide p = broadcast(0x1.fe177704c65cep-17);
    p = p * f + 0x1.446a1fa8c1e96p-13;
    p = p * f + 0x1.5d8a7092b7022p-10;
    p = p * f + 0x1.3b29dc412337dp-7;
    p = p * f + 0x1.c6b08aaf26319p-5;
    p = p * f + 0x1.ebfbe0a4be162p-3;
    p = p * f + 0x1.62e42ff1162bcp-1;
    p = p * f + 0x1.ffffffffabbd2p-1;
    return p * from_bits<double>(bits_of<double>(rounded) << 52);
  }
}

// log(sum) for a sum of at least 1, which may be NaN; -inf for 0. For float32 without the division
// of log(), at a relative error of 7.2e-10 of its part beside the power of two.
template <class T>
SUBQUAD_INLINE wide log_of_sum(wide sum) {
  const decomposed<double> parts = decompose<double>(sum);
  wide value;
  if constexpr (sizeof(T) == 8) {
    value = log_sum<double>(parts.exponent, parts.fraction, wide{});
  } else {
    const wide f = parts.fraction;
    wide p = broadcast(0x1.13759ee185f62p-4);
    p = p * f - 0x1.de4056574f1eap-4;
    p = p * f + 0x1.e7767adb7fa3ep-4;
    p = p * f - 0x1.fc3459bd16be3p-4;
    p = p * f + 0x1.232d995de4de2p-3;
    p = p * f - 0x1.555ab1b0c71e0p-3;
    p = p * f + 0x1.99a53d2d3a995p-3;
    p = p * f - 0x1.0000113ee5619p-2;
    p = p * f + 0x1.555546383e096p-2;
    p = p * f - 0x1.ffffffd5a89b6p-2;
    value = parts.exponent * 0x1.62e42fefa39efp-1 + (p * (f * f) + f);
  }
  return sum >= 1.0 ? value : sum - kUnbounded;
}

// The new sum is kept + added: h_{t-1} exp(log_a) and exp(log_b), over e^reference. earlier is 0
// where nothing is kept, and not where it is too small to see.
struct step_terms {
  wide earlier;
  wide kept;
  wide added;
};

// One step. An empty state has the lowest reference and not -inf, so that -inf - -inf does not
// arise; a reference of +inf is bounded where log_b = +inf is held against it, for the same reason.
template <class T>
SUBQUAD_INLINE step_terms advance(vector_state& state, wide log_a, wide log_b) {
  add_log<T>(state.reference, state.remainder, log_a);
  const auto reset = (log_a == -kUnbounded) | (state.reference == -kUnbounded);
  const wide sum = reset ? wide{} : state.sum;
  state.reference = reset ? broadcast(-kHighest) : state.reference;
  wide d = log_b - min<double>(broadcast(kHighest), state.reference);  // NaN stays
  if constexpr (kKeepsRemainder<T>) {
    state.remainder = reset ? wide{} : state.remainder;
    d -= state.remainder;
  }
  const auto moves = d > kRecurrenceThreshold;
  const wide e = exp_difference<T>(moves ? -d : d);
  const step_terms terms{sum, moves ? sum * e : sum, moves ? broadcast(1.0) : e};
  state.sum = terms.kept + terms.added;
  state.reference = moves ? log_b : state.reference;
  if constexpr (kKeepsRemainder<T>) state.remainder = moves ? wide{} : state.remainder;
  return terms;
}

// p and q of h_t: the parts of it that come from h_{t-1} and from log_b. Undefined where log h is
// +inf or NaN, but for entries that are logarithms of zero.
struct step_parts {
  wide before;
  wide now;
};

SUBQUAD_INLINE step_parts parts_of(const vector_state& state, const step_terms& terms, wide log_b) {
  const wide inverse = is_finite(state.reference) ? 1.0 / state.sum : broadcast(kUndefined);
  return {terms.earlier == 0.0 ? wide{} : terms.kept * inverse,
          log_b == -kUnbounded ? wide{} : terms.added * inverse};
}

// log_a of a block, -inf where a state must not pass.
template <class T>
lane_block<const T> read_log_a(const recurrence_task<T>& task, std::int64_t first,
                               std::int64_t steps, T* buffer) {
  const lane_tile& tile = task.tile;
  bool begins = false;
  bool together = true;
  for (int c = 0; c < tile.count; ++c) {
    begins = begins || tile.positions[c] + first == 0;
    together = together && tile.positions[c] == tile.positions[0];
  }
  const auto is_border = [&](std::int64_t position) {
    if (position == 0) return task.fresh;
    return task.segments && position < tile.row_length &&
           task.segments[position] != task.segments[position - 1];
  };
  bool changed = task.segments && !together;
  for (std::int64_t t = 0; !changed && t < steps; ++t) {
    changed = is_border(tile.positions[0] + first + t);
    if (!task.segments) break;
  }
  changed = changed || (begins && task.fresh);
  const lane_block<const T> block =
      read_block<T>(task.log_a, tile, first, steps, T(0), buffer, changed);
  if (!changed) return block;
  for (int c = 0; c < tile.count; ++c) {
    for (std::int64_t t = 0; t < steps; ++t) {
      if (is_border(tile.positions[c] + first + t)) {
        buffer[t * kTileLanes + c] = -static_cast<T>(kUnbounded);
      }
      if (!task.segments) break;
    }
  }
  return block;
}

constexpr std::int64_t kBlock = kBlockSteps * kTileLanes;

template <class T>
struct recurrence_buffers {
  double* before;  // p of a block
  double* now;     // q of a block
  T* log_a;
  T* log_b;
  T* grad;
  T* out_a;  // out, or grad_log_a
  T* out_b;  // grad_log_b

  static constexpr std::size_t kBytes = kBlock * (2 * sizeof(double) + 5 * sizeof(T));

  explicit recurrence_buffers(void* scratch)
      : before(static_cast<double*>(scratch)),
        now(before + kBlock),
        log_a(reinterpret_cast<T*>(now + kBlock)),
        log_b(log_a + kBlock),
        grad(log_b + kBlock),
        out_a(grad + kBlock),
        out_b(out_a + kBlock) {}
};

enum class pass { scan, summarise, save, save_and_link };

// What a group of lanes carries from step to step.
struct group_state {
  vector_state state[kGroup];
  wide first[kGroup];   // log_scale, or constant
  wide second[kGroup];  // remainder, or product
};

template <class T, pass kPass>
SUBQUAD_INLINE void step_forward(group_state& group, int v, const T* log_a, const T* log_b,
                                 const T* grad, T* out) {
  const int at = v * kWideLanes;
  const wide a = load_wide(log_a + at);
  const wide b = load_wide(log_b + at);
  vector_state& state = group.state[v];
  const step_terms terms = advance<T>(state, a, b);
  if constexpr (kPass == pass::scan) {
    store_wide(out + at, state.reference + (state.remainder + log_of_sum<T>(state.sum)));
  } else if constexpr (kPass == pass::summarise) {
    const auto reset = (a == -kUnbounded) | (group.first[v] == -kUnbounded);
    add_log<T>(group.first[v], group.second[v], a);
    group.first[v] = reset ? broadcast(-kUnbounded) : group.first[v];
    group.second[v] = reset ? wide{} : group.second[v];
  } else if constexpr (kPass == pass::save_and_link) {
    group.second[v] = weighted(group.second[v], parts_of(state, terms, b).before);
    group.first[v] += weighted(group.second[v], load_wide(grad + at));
  }
}

template <class T, pass kPass>
void run_forward(const recurrence_task<T>& task) {
  const recurrence_buffers<T> buffers(task.scratch);
  recurrence_state& state = *task.state;
  double* first_numbers = nullptr;
  double* second_numbers = nullptr;
  if constexpr (kPass == pass::summarise) {
    first_numbers = task.scale->log_scale;
    second_numbers = task.scale->remainder;
  } else if constexpr (kPass == pass::save_and_link) {
    first_numbers = task.link->constant;
    second_numbers = task.link->product;
  }
  for (int c = 0; c < kTileLanes; ++c) {
    if constexpr (kPass == pass::summarise) {
      state.reference[c] = -kHighest;
      state.remainder[c] = state.sum[c] = 0;
    }
    if (!first_numbers) continue;
    first_numbers[c] = 0;
    second_numbers[c] = kPass == pass::save_and_link ? 1 : 0;
  }
  for (std::int64_t first = 0; first < task.tile.steps; first += kBlockSteps) {
    if constexpr (kPass == pass::save || kPass == pass::save_and_link) {
      task.saved[first / kBlockSteps] = state;
    }
    const std::int64_t steps =
        task.tile.steps - first < kBlockSteps ? task.tile.steps - first : kBlockSteps;
    if (kPass == pass::save && first + steps == task.tile.steps) break;
    const lane_block<const T> log_a = read_log_a<T>(task, first, steps, buffers.log_a);
    const lane_block<const T> log_b = read_block<T>(task.log_b, task.tile, first, steps,
                                                    -static_cast<T>(kUnbounded), buffers.log_b);
    lane_block<const T> grad{log_b.data, 0};
    if constexpr (kPass == pass::save_and_link) {
      grad = read_block<T>(task.grad, task.tile, first, steps, T(0), buffers.grad);
    }
    lane_block<T> out{buffers.out_a, 0};
    if constexpr (kPass == pass::scan) {
      out = open_block<T>(task.out, task.tile, first, steps, buffers.out_a);
    }
    for (int base = 0; base < kTileLanes; base += kGroupLanes) {
      group_state group = {};
      for (int v = 0; v < kGroup; ++v) {
        const int lane = base + v * kWideLanes;
        group.state[v] = load_state(state, lane);
        if (!first_numbers) continue;
        group.first[v] = load(first_numbers + lane);
        group.second[v] = load(second_numbers + lane);
      }
      for (std::int64_t t = 0; t < steps; ++t) {
        SUBQUAD_UNROLL_GROUP
        for (int v = 0; v < kGroup; ++v) {
          step_forward<T, kPass>(
              group, v, log_a.data + t * log_a.stride + base, log_b.data + t * log_b.stride + base,
              grad.data + t * grad.stride + base, out.data + t * out.stride + base);
        }
      }
      for (int v = 0; v < kGroup; ++v) {
        const int lane = base + v * kWideLanes;
        store_state(state, lane, group.state[v]);
        if (!first_numbers) continue;
        store<double>(first_numbers + lane, group.first[v]);
        store<double>(second_numbers + lane, group.second[v]);
      }
    }
    if constexpr (kPass == pass::scan) {
      write_block<T>(task.out, task.tile, first, steps, buffers.out_a, out);
    }
  }
}

template <class T>
void prepare(const recurrence_task<T>& task) {
  if (task.grad.data) {
    run_forward<T, pass::save_and_link>(task);
  } else {
    run_forward<T, pass::save>(task);
  }
}

template <class T>
void reverse(const recurrence_task<T>& task) {
  const recurrence_buffers<T> buffers(task.scratch);
  const std::int64_t blocks = (task.tile.steps + kBlockSteps - 1) / kBlockSteps;
  for (std::int64_t block = blocks - 1; block >= 0; --block) {
    const std::int64_t first = block * kBlockSteps;
    const std::int64_t steps =
        task.tile.steps - first < kBlockSteps ? task.tile.steps - first : kBlockSteps;
    const lane_block<const T> log_a = read_log_a<T>(task, first, steps, buffers.log_a);
    const lane_block<const T> log_b = read_block<T>(task.log_b, task.tile, first, steps,
                                                    -static_cast<T>(kUnbounded), buffers.log_b);
    const lane_block<const T> grad =
        read_block<T>(task.grad, task.tile, first, steps, T(0), buffers.grad);
    lane_block<T> grad_a{buffers.out_a, kTileLanes};
    lane_block<T> grad_b{buffers.out_b, kTileLanes};
    if (task.grad_log_a.data) {
      grad_a = open_block<T>(task.grad_log_a, task.tile, first, steps, buffers.out_a);
    }
    if (task.grad_log_b.data) {
      grad_b = open_block<T>(task.grad_log_b, task.tile, first, steps, buffers.out_b);
    }
    for (int base = 0; base < kTileLanes; base += kGroupLanes) {
      vector_state state[kGroup];
      wide carry[kGroup];
      for (int v = 0; v < kGroup; ++v) {
        state[v] = load_state(task.saved[block], base + v * kWideLanes);
        carry[v] = load(task.carry + base + v * kWideLanes);
      }
      for (std::int64_t t = 0; t < steps; ++t) {
        SUBQUAD_UNROLL_GROUP
        for (int v = 0; v < kGroup; ++v) {
          const int lane = base + v * kWideLanes;
          const wide b = load_wide(log_b.data + t * log_b.stride + lane);
          const step_terms terms =
              advance<T>(state[v], load_wide(log_a.data + t * log_a.stride + lane), b);
          const step_parts parts = parts_of(state[v], terms, b);
          store<double>(buffers.before + t * kTileLanes + lane, parts.before);
          store<double>(buffers.now + t * kTileLanes + lane, parts.now);
        }
      }
      for (std::int64_t t = steps - 1; t >= 0; --t) {
        SUBQUAD_UNROLL_GROUP
        for (int v = 0; v < kGroup; ++v) {
          const int lane = base + v * kWideLanes;
          const wide total = carry[v] + load_wide(grad.data + t * grad.stride + lane);
          carry[v] = weighted(load(buffers.before + t * kTileLanes + lane), total);
          store_wide(grad_a.data + t * grad_a.stride + lane, carry[v]);
          store_wide(grad_b.data + t * grad_b.stride + lane,
                     weighted(load(buffers.now + t * kTileLanes + lane), total));
        }
      }
      for (int v = 0; v < kGroup; ++v) {
        store<double>(task.carry + base + v * kWideLanes, carry[v]);
      }
    }
    if (task.grad_log_a.data) {
      write_block<T>(task.grad_log_a, task.tile, first, steps, buffers.out_a, grad_a);
    }
    if (task.grad_log_b.data) {
      write_block<T>(task.grad_log_b, task.tile, first, steps, buffers.out_b, grad_b);
    }
  }
}

template <class T>
constexpr recurrences_functions<T> functions = {
    recurrence_buffers<T>::kBytes, run_forward<T, pass::scan>, run_forward<T, pass::summarise>,
    prepare<T>, reverse<T>};

}  // namespace

extern const recurrences_kernels kernels_recurrences;
const recurrences_kernels kernels_recurrences = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad

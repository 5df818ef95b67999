// Linear attention with values in logarithms, of any range and sign, and its reverse.
#include "attention_checks.hpp"
#include "attention_core.hpp"
#include "batches.cuh"
#include "device.cuh"
#include "extended.cuh"
#include "launch.cuh"

namespace subquad::cuda {
namespace {

enum : int {
  kLogK,
  kLogV,
  kSignV,
  kLogQ,
  kLogDecay,
  kKeyMask,
  kLogNumerator,
  kSignNumerator,
  kLogDenominator,
  kInputs
};

// Threads of a block are 32 columns, the lanes of its warps, times 8 warps of 8 features. The first
// column is that of the denominator, whose values are 1; the others are 31 of the values.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 8;
constexpr int kFeatures = kWarps * kRows;
constexpr int kValues = kWarp - 1;

std::int64_t value_blocks_of(std::int64_t d_v) {
  return std::max<std::int64_t>(1, divide_up(d_v, kValues));
}
std::int64_t feature_blocks_of(std::int64_t d_k) {
  return std::max<std::int64_t>(1, divide_up(d_k, kFeatures));
}

// The inputs of a call.
template <class T>
struct log_attention_inputs {
  batches<kInputs> where;
  matrix_view<const T> log_k, log_v, sign_v, log_q, log_decay;
  vector_view<const std::uint8_t> key_mask;
  vector_view<const std::int64_t> segments;
  matrix_view<const T> log_numerator, sign_numerator;
  vector_view<const T> log_denominator;
  std::int64_t batch, n_q, n, d_k, d_v, value_blocks;
  bool has_queries;
  bool causal;

  // The place of column `column` of value block `block` for row t, in what is kept for each row.
  SUBQUAD_DEVICE std::int64_t kept(std::int64_t b, std::int64_t t, std::int64_t block,
                                   int column) const {
    return ((b * n_q + t) * value_blocks + block) * kWarp + column;
  }
};

template <class V>
SUBQUAD_DEVICE V moved(V view, std::int64_t offset) {
  if (view.data) view.data += offset;
  return view;
}

// What a block reads: the inputs of its batch member, and which features and values are its own.
template <class T>
struct log_attention_part {
  matrix_view<const T> log_k, log_v, sign_v, log_q, log_decay;
  vector_view<const std::uint8_t> key_mask;
  matrix_view<const T> log_numerator, sign_numerator;
  vector_view<const T> log_denominator;
  std::int64_t b;
  std::int64_t block;
};

// The passes over a sequence: a state of one feature and column for each thread and row of it, and
// how tokens change it.
template <class T>
struct log_attention_pass {
  log_attention_inputs<T> in;
  std::int64_t first_feature;

  SUBQUAD_DEVICE static int thread() { return static_cast<int>(threadIdx.x); }
  SUBQUAD_DEVICE static int warp() { return thread() / kWarp; }
  SUBQUAD_DEVICE static int lane() { return thread() % kWarp; }

  SUBQUAD_DEVICE void locate(log_attention_part<T>& part) const {
    const std::int64_t b = static_cast<std::int64_t>(blockIdx.x) / in.value_blocks;
    part.b = b;
    part.block = static_cast<std::int64_t>(blockIdx.x) % in.value_blocks;
    part.log_k = moved(in.log_k, in.where.offset(kLogK, b));
    part.log_v = moved(in.log_v, in.where.offset(kLogV, b));
    part.sign_v = moved(in.sign_v, in.where.offset(kSignV, b));
    part.log_q = moved(in.log_q, in.where.offset(kLogQ, b));
    part.log_decay = moved(in.log_decay, in.where.offset(kLogDecay, b));
    part.key_mask = moved(in.key_mask, in.where.offset(kKeyMask, b));
    part.log_numerator = moved(in.log_numerator, in.where.offset(kLogNumerator, b));
    part.sign_numerator = moved(in.sign_numerator, in.where.offset(kSignNumerator, b));
    part.log_denominator = moved(in.log_denominator, in.where.offset(kLogDenominator, b));
  }

  SUBQUAD_DEVICE std::int64_t feature(int row) const {
    return first_feature + warp() * kRows + row;
  }
  // Of the values; -1 for the denominator.
  SUBQUAD_DEVICE static std::int64_t value_of(const log_attention_part<T>& part) {
    return lane() == 0 ? -1 : part.block * kValues + lane() - 1;
  }
  SUBQUAD_DEVICE bool has_column(const log_attention_part<T>& part) const {
    return value_of(part) < in.d_v;
  }

  // e^x of the warp's features of a row, in the lanes of that number.
  SUBQUAD_DEVICE extended features(matrix_view<const T> rows, std::int64_t t) const {
    const std::int64_t r = feature(lane());
    if (lane() >= kRows || r >= in.d_k) return extended::zero();
    return extended::exp(static_cast<double>(rows(t, r)));
  }
  SUBQUAD_DEVICE static extended from_lane(const extended& x, int lane) {
    return {__shfl_sync(0xffffffffu, x.value, lane), __shfl_sync(0xffffffffu, x.exponent, lane)};
  }

  SUBQUAD_DEVICE extended key_features(const log_attention_part<T>& part, std::int64_t t) const {
    if (part.key_mask && part.key_mask[t] == 0) return extended::zero();
    return features(part.log_k, t);
  }

  SUBQUAD_DEVICE extended value(const log_attention_part<T>& part, std::int64_t t) const {
    if (lane() == 0) return {1.0, 0};
    if (!has_column(part)) return extended::zero();
    const std::int64_t v = value_of(part);
    return extended::exp(static_cast<double>(part.log_v(t, v)),
                         part.sign_v ? static_cast<double>(part.sign_v(t, v)) : 1.0);
  }

  SUBQUAD_DEVICE static void clear(extended (&state)[kRows]) {
    for (int i = 0; i < kRows; ++i) state[i] = extended::zero();
  }

  // The state that goes in.
  SUBQUAD_DEVICE void begin(const log_attention_part<T>& part, extended (&state)[kRows]) const {
    clear(state);
    if (!part.log_denominator || !has_column(part)) return;
    const std::int64_t v = value_of(part);
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t r = feature(i);
      if (r >= in.d_k) continue;
      if (v < 0) {
        state[i] = extended::exp(static_cast<double>(part.log_denominator[r]));
      } else {
        state[i] = extended::exp(
            static_cast<double>(part.log_numerator(r, v)),
            part.sign_numerator ? static_cast<double>(part.sign_numerator(r, v)) : 1.0);
      }
    }
  }

  // state_r *= e^(log_decay_tr). What is forgotten counts for nothing, whatever it was.
  SUBQUAD_DEVICE void decay(const log_attention_part<T>& part, std::int64_t t,
                            extended (&state)[kRows]) const {
    if (!part.log_decay) return;
    const extended factors = features(part.log_decay, t);
    for (int i = 0; i < kRows; ++i) {
      const extended factor = from_lane(factors, i);
      state[i] = factor.value == 0 ? extended::zero() : state[i] * factor;
    }
  }

  // state_r += weights_r value. Without weight a value counts for nothing, whatever it is.
  SUBQUAD_DEVICE static void add(const extended& weights, const extended& value,
                                 extended (&state)[kRows]) {
    for (int i = 0; i < kRows; ++i) {
      const extended weight = from_lane(weights, i);
      if (weight.value != 0) state[i] = state[i] + weight * value;
    }
  }

  SUBQUAD_DEVICE std::int64_t run_end(std::int64_t start) const {
    if (!in.segments) return in.n;
    std::int64_t end = start + 1;
    while (end < in.n && in.segments[end] == in.segments[start]) ++end;
    return end < in.n ? end : in.n;
  }
  SUBQUAD_DEVICE std::int64_t run_start(std::int64_t end) const {
    if (!in.segments || end == 0) return 0;
    std::int64_t start = end - 1;
    while (start > 0 && in.segments[start - 1] == in.segments[end - 1]) --start;
    return start;
  }

  // Calls row(t, state) for every query, with the state that it attends.
  template <class Row>
  SUBQUAD_DEVICE void forward(const log_attention_part<T>& part, extended (&state)[kRows],
                              Row&& row) const {
    begin(part, state);
    std::int64_t start = 0;
    for (;;) {
      const std::int64_t end = run_end(start);
      for (std::int64_t t = start; t < end; ++t) {
        if (in.causal) decay(part, t, state);
        add(key_features(part, t), value(part, t), state);
        if (in.causal && in.has_queries) row(t, state);
      }
      if (!in.causal && in.has_queries) {
        const std::int64_t last = in.segments ? end : in.n_q;
        for (std::int64_t t = start; t < last; ++t) row(t, state);
      }
      if (end >= in.n) break;
      clear(state);
      start = end;
    }
  }
};

// With S the state that row t attends, kept(t, column) (+)= sum_r e^(log_q_tr) S_r for the features
// from first_feature on; and the state after the last token, in logarithms, or as it is.
//
// Nothing aliases. Sums and products in extended numbers, each rounded as a double is, in the order
// of the tokens.
template <class T>
struct numerator_kernel : log_attention_pass<T> {
  using pass = log_attention_pass<T>;
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = 1;
  struct shared_memory {
    log_attention_part<T> part;
    extended parts[kWarps][kWarps][kWarp];  // [row of the group][warp][column]
  };

  extended* sums;   // null where there are no queries
  extended* final;  // (batch, value blocks, d_k, 32); null where it is not asked for

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (pass::thread() == 0) this->locate(shared.part);
    __syncthreads();
    const log_attention_part<T>& part = shared.part;
    const int warp = pass::warp();
    const int lane = pass::lane();
    extended state[kRows];
    this->forward(part, state, [&](std::int64_t t, const extended(&attended)[kRows]) {
      const extended weights = this->features(part.log_q, t);
      extended sum = extended::zero();
      for (int i = 0; i < kRows; ++i) {
        const extended weight = pass::from_lane(weights, i);
        if (weight.value != 0) sum = sum + weight * attended[i];
      }
      const int place = static_cast<int>(t % kWarps);
      shared.parts[place][warp][lane] = sum;
      if (place + 1 < kWarps && t + 1 < this->in.n_q) return;
      // A group of rows is there: each warp adds one up.
      __syncthreads();
      if (warp <= place) {
        extended total = extended::zero();
        for (int w = 0; w < kWarps; ++w) total = total + shared.parts[warp][w][lane];
        extended& kept = sums[this->in.kept(part.b, t - place + warp, part.block, lane)];
        kept = this->first_feature == 0 ? total : kept + total;
      }
      __syncthreads();
    });
    if (!final) return;
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t r = this->feature(i);
      if (r >= this->in.d_k) continue;
      final[((part.b * this->in.value_blocks + part.block) * this->in.d_k + r) * kWarp + lane] =
          state[i];
    }
  }
};

// The results of rows from their sums: log |numerator / denominator|, its sign, log denominator.
template <class T>
struct result_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 2;
  struct shared_memory {};
  enum : int { kLogY, kSignY, kLogZ, kResults };

  log_attention_inputs<T> in;
  batches<kResults> where;
  matrix_view<T> log_y, sign_y;  // each optional
  vector_view<T> log_z;
  const extended* sums;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t columns = in.d_v + 1;
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= in.batch * in.n_q * columns) return;
    const std::int64_t v = at % columns - 1;
    const std::int64_t t = at / columns % in.n_q;
    const std::int64_t b = at / columns / in.n_q;
    const std::int64_t block = v < 0 ? 0 : v / kValues;
    const extended denominator = sums[in.kept(b, t, block, 0)];
    if (v < 0) {
      if (log_z) {
        moved(log_z, where.offset(kLogZ, b))[t] =
            static_cast<T>(denominator.value == 0 ? -infinity<double>() : denominator.log());
      }
      return;
    }
    const extended numerator = sums[in.kept(b, t, block, static_cast<int>(v % kValues) + 1)];
    const bool is_zero = denominator.value == 0 || numerator.value == 0;
    if (log_y) {
      moved(log_y, where.offset(kLogY, b))(t, v) = static_cast<T>(
          is_zero ? -infinity<double>() : extended::log_ratio(numerator, denominator));
    }
    if (sign_y) {
      // A denominator that is no number makes the sign none.
      const double sign =
          numerator.sign() * (std::isnan(denominator.value) ? denominator.value : 1.0);
      moved(sign_y, where.offset(kSignY, b))(t, v) = static_cast<T>(is_zero ? 0.0 : sign);
    }
  }
};

// The final state in logarithms.
template <class T>
struct final_state_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 2;
  struct shared_memory {};
  enum : int { kLogNumeratorOut, kSignOut, kLogDenominatorOut, kFinals };

  log_attention_inputs<T> in;
  batches<kFinals> where;
  matrix_view<T> log_numerator, sign_numerator;  // each optional
  vector_view<T> log_denominator;
  const extended* final;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t columns = in.d_v + 1;
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= in.batch * in.d_k * columns) return;
    const std::int64_t v = at % columns - 1;
    const std::int64_t r = at / columns % in.d_k;
    const std::int64_t b = at / columns / in.d_k;
    const std::int64_t block = v < 0 ? 0 : v / kValues;
    const std::int64_t column = v < 0 ? 0 : v % kValues + 1;
    const extended state = final[((b * in.value_blocks + block) * in.d_k + r) * kWarp + column];
    const auto log = static_cast<T>(state.log());
    if (v < 0) {
      if (log_denominator) moved(log_denominator, where.offset(kLogDenominatorOut, b))[r] = log;
      return;
    }
    if (log_numerator) moved(log_numerator, where.offset(kLogNumeratorOut, b))(r, v) = log;
    if (sign_numerator) {
      moved(sign_numerator, where.offset(kSignOut, b))(r, v) = static_cast<T>(state.sign());
    }
  }
};

enum : int { kGradLogY, kGradLogZ, kGradFinalNumerator, kGradFinalDenominator, kGradients };

template <class T>
struct log_attention_gradients {
  batches<kGradients> where;
  matrix_view<const T> log_y;  // each optional
  vector_view<const T> log_z;
  matrix_view<const T> final_numerator;
  vector_view<const T> final_denominator;
};

// In place of the sums of a row, the derivative of the call in them: gradient / numerator, and for
// the denominator (gradient of log_z - sum of the gradients) / denominator, in the first block of
// values alone. 0 where a sum is 0 or its gradient is, NaN where a sum is infinite. One warp for
// each row.
template <class T>
struct derivative_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 2;
  struct shared_memory {};

  log_attention_inputs<T> in;
  log_attention_gradients<T> grad;
  extended* sums;

  SUBQUAD_DEVICE static extended quotient(double g, const extended& sum) {
    if (g == 0) return extended::zero();
    if (std::fabs(sum.value) == infinity<double>()) {
      return {std::numeric_limits<double>::quiet_NaN(), extended::kHighest};
    }
    return extended{g, 0}.normalised() * sum.inverse();
  }

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t row =
        static_cast<std::int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
    if (row >= in.batch * in.n_q) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const std::int64_t b = row / in.n_q;
    const std::int64_t t = row % in.n_q;
    const extended denominator = sums[in.kept(b, t, 0, 0)];
    const matrix_view<const T> log_y = moved(grad.log_y, grad.where.offset(kGradLogY, b));
    double total = 0;
    for (std::int64_t block = 0; block < in.value_blocks; ++block) {
      const std::int64_t v = block * kValues + lane - 1;
      if (lane == 0) continue;
      extended& kept = sums[in.kept(b, t, block, lane)];
      const bool counts = log_y && v < in.d_v && denominator.value != 0 && kept.value != 0;
      const double g = counts ? static_cast<double>(log_y(t, v)) : 0.0;
      kept = quotient(g, kept);
      total += g;
    }
    SUBQUAD_UNROLL
    for (int flip = 1; flip < kWarp; flip *= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, flip);
    }
    if (lane != 0) return;
    double g = -total;
    if (grad.log_z && denominator.value != 0) {
      g += static_cast<double>(moved(grad.log_z, grad.where.offset(kGradLogZ, b))[t]);
    }
    for (std::int64_t block = 0; block < in.value_blocks; ++block) {
      sums[in.kept(b, t, block, 0)] = block > 0 || g == 0
                                          ? extended::zero()
                                          : extended{g, 0}.normalised() * denominator.inverse();
    }
  }
};

// With S the state that row t attends and D the derivatives of the row,
// out[block](b, t, r) = e^(log_q_tr) sum over the block's columns of S_r D, as doubles.
template <class T>
struct query_gradient_kernel : log_attention_pass<T> {
  using pass = log_attention_pass<T>;
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = 1;
  struct shared_memory {
    log_attention_part<T> part;
  };

  const extended* derivatives;
  double* out;  // (value blocks, batch, n_q, d_k)

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (pass::thread() == 0) this->locate(shared.part);
    __syncthreads();
    const log_attention_part<T>& part = shared.part;
    extended state[kRows];
    this->forward(part, state, [&](std::int64_t t, const extended(&attended)[kRows]) {
      const extended weights = this->features(part.log_q, t);
      const extended derivative = derivatives[this->in.kept(part.b, t, part.block, pass::lane())];
      double* row =
          out + ((part.block * this->in.batch + part.b) * this->in.n_q + t) * this->in.d_k;
      for (int i = 0; i < kRows; ++i) {
        const extended weight = pass::from_lane(weights, i);
        double term = 0;
        if (weight.value != 0 && derivative.value != 0) {
          term = (weight * (attended[i] * derivative)).rounded();
        }
        SUBQUAD_UNROLL
        for (int flip = 1; flip < kWarp; flip *= 2) {
          term += __shfl_xor_sync(0xffffffffu, term, flip);
        }
        const std::int64_t r = this->feature(i);
        if (pass::lane() == 0 && r < this->in.d_k) row[r] = term;
      }
    });
  }
};

// With R_r = sum over the rows t that attend key j of e^(log_q_tr) D_t, decayed to j, and R from
// the final state:
//   keys[block](b, j, r) = e^(log_k_jr) sum over the block's columns of R_r value_j
//   values[features](b, j, v) = value_jv sum over the features of e^(log_k_jr) R_r
// and the gradients of the state that went in, all as doubles.
template <class T>
struct key_gradient_kernel : log_attention_pass<T> {
  using pass = log_attention_pass<T>;
  static constexpr int kThreads = cuda::kThreads;
  static constexpr int kBlocks = 1;
  enum : int { kGradNumerator, kGradDenominator, kStateGradients };
  struct shared_memory {
    log_attention_part<T> part;
    double parts[kWarps][kWarps][kWarp];  // [key of the group][warp][column]
  };

  const extended* derivatives;  // null where there are no queries
  const extended* final;        // the final state, null where it has no gradient
  log_attention_gradients<T> grad;
  double* keys;    // (value blocks, batch, n, d_k)
  double* values;  // (batch, n, d_v), of these features
  batches<kStateGradients> state_where;
  matrix_view<T> grad_numerator;  // each optional
  vector_view<T> grad_denominator;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (pass::thread() == 0) this->locate(shared.part);
    __syncthreads();
    const log_attention_part<T>& part = shared.part;
    extended state[kRows];
    pass::clear(state);
    if (final) begin_reverse(part, state);
    std::int64_t end = this->in.n;
    for (;;) {
      const std::int64_t start = this->run_start(end);
      if (!this->in.causal && derivatives) {
        const std::int64_t last = this->in.segments ? end : this->in.n_q;
        for (std::int64_t t = start; t < last; ++t) add_row(part, t, state);
      }
      for (std::int64_t j = end - 1; j >= start; --j) {
        if (this->in.causal && derivatives) add_row(part, j, state);
        emit(part, j, state, shared);
        if (this->in.causal) this->decay(part, j, state);
      }
      if (start == 0) break;
      pass::clear(state);
      end = start;
    }
    finish(part, state);
  }

  // R from the gradients of the final state's logarithms.
  SUBQUAD_DEVICE void begin_reverse(const log_attention_part<T>& part,
                                    extended (&state)[kRows]) const {
    if (!this->has_column(part)) return;
    const std::int64_t v = pass::value_of(part);
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t r = this->feature(i);
      if (r >= this->in.d_k) continue;
      double g = 0;
      if (v >= 0 && grad.final_numerator) {
        g = moved(grad.final_numerator, grad.where.offset(kGradFinalNumerator, part.b))(r, v);
      } else if (v < 0 && part.block == 0 && grad.final_denominator) {
        g = moved(grad.final_denominator, grad.where.offset(kGradFinalDenominator, part.b))[r];
      }
      const extended& sum =
          final[((part.b * this->in.value_blocks + part.block) * this->in.d_k + r) * kWarp +
                pass::lane()];
      if (g != 0 && sum.value != 0) state[i] = extended{g, 0}.normalised() * sum.inverse();
    }
  }

  SUBQUAD_DEVICE void add_row(const log_attention_part<T>& part, std::int64_t t,
                              extended (&state)[kRows]) const {
    const extended weights = this->features(part.log_q, t);
    const extended derivative = derivatives[this->in.kept(part.b, t, part.block, pass::lane())];
    for (int i = 0; i < kRows; ++i) {
      const extended weight = pass::from_lane(weights, i);
      if (weight.value != 0 && derivative.value != 0) state[i] = state[i] + weight * derivative;
    }
  }

  SUBQUAD_DEVICE void emit(const log_attention_part<T>& part, std::int64_t j,
                           const extended (&state)[kRows], shared_memory& shared) const {
    const extended weights = this->key_features(part, j);
    const extended value = this->value(part, j);
    const int lane = pass::lane();
    double* row = keys + ((part.block * this->in.batch + part.b) * this->in.n + j) * this->in.d_k;
    double column = 0;
    for (int i = 0; i < kRows; ++i) {
      const extended weight = pass::from_lane(weights, i);
      double term = 0;
      if (weight.value != 0 && value.value != 0 && state[i].value != 0) {
        term = (weight * state[i] * value).rounded();
      }
      column += term;
      SUBQUAD_UNROLL
      for (int flip = 1; flip < kWarp; flip *= 2) {
        term += __shfl_xor_sync(0xffffffffu, term, flip);
      }
      const std::int64_t r = this->feature(i);
      if (lane == 0 && r < this->in.d_k) row[r] = term;
    }
    const int place = static_cast<int>(j % kWarps);
    const int warp = pass::warp();
    shared.parts[place][warp][lane] = column;
    if (place > 0) return;
    // Keys come from the last: a group of eight is there with its first. Each warp adds one up.
    __syncthreads();
    const std::int64_t v = pass::value_of(part);
    if (j + warp < this->in.n && v >= 0 && v < this->in.d_v) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += shared.parts[warp][w][lane];
      values[(part.b * this->in.n + j + warp) * this->in.d_v + v] = total;
    }
    __syncthreads();
  }

  SUBQUAD_DEVICE void finish(const log_attention_part<T>& part,
                             const extended (&state)[kRows]) const {
    if (!part.log_denominator || !this->has_column(part)) return;
    extended entry[kRows];
    this->begin(part, entry);
    const std::int64_t v = pass::value_of(part);
    for (int i = 0; i < kRows; ++i) {
      const std::int64_t r = this->feature(i);
      if (r >= this->in.d_k) continue;
      const bool counts = entry[i].value != 0 && state[i].value != 0;
      const auto g = static_cast<T>(counts ? (entry[i] * state[i]).rounded() : 0.0);
      if (v >= 0) {
        if (grad_numerator) {
          moved(grad_numerator, state_where.offset(kGradNumerator, part.b))(r, v) = g;
        }
      } else if (part.block == 0 && grad_denominator) {
        moved(grad_denominator, state_where.offset(kGradDenominator, part.b))[r] = g;
      }
    }
  }
};

// out(b, i, c) = sum over parts of parts[part](b, i, c).
template <class T>
struct part_sum_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 2;
  struct shared_memory {};

  batches<1> where;
  matrix_view<T> out;
  const double* parts;
  std::int64_t count, batch, rows, columns;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t size = batch * rows * columns;
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= size) return;
    double sum = 0;
    for (std::int64_t part = 0; part < count; ++part) sum += parts[part * size + at];
    const std::int64_t b = at / columns / rows;
    moved(out, where.offset(0, b))(at / columns % rows, at % columns) = static_cast<T>(sum);
  }
};

// grad_log_decay_tr = sum_{s >= t} (grad_log_q_sr - grad_log_k_sr) over the run of t, and what the
// final state adds: 0 where nothing came before t. One thread for each feature.
template <class T>
struct decay_gradient_kernel {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 2;
  struct shared_memory {};

  log_attention_inputs<T> in;
  log_attention_gradients<T> grad;
  batches<1> where;
  matrix_view<T> out;
  const double* queries;  // null where there are none
  const double* keys;

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= in.batch * in.d_k) return;
    const std::int64_t b = at / in.d_k;
    const std::int64_t r = at % in.d_k;
    const matrix_view<const T> log_decay = moved(in.log_decay, in.where.offset(kLogDecay, b));
    const matrix_view<T> to = moved(out, where.offset(0, b));
    double sum = 0;
    if (grad.final_numerator) {
      const auto numerator = moved(grad.final_numerator, grad.where.offset(kGradFinalNumerator, b));
      for (std::int64_t v = 0; v < in.d_v; ++v) sum += static_cast<double>(numerator(r, v));
    }
    if (grad.final_denominator) {
      sum += static_cast<double>(
          moved(grad.final_denominator, grad.where.offset(kGradFinalDenominator, b))[r]);
    }
    const std::int64_t size = in.batch * in.n * in.d_k;
    for (std::int64_t t = in.n - 1; t >= 0; --t) {
      const std::int64_t place = (b * in.n + t) * in.d_k + r;
      for (std::int64_t block = 0; block < in.value_blocks; ++block) {
        if (queries) sum += queries[block * size + place];
        sum -= keys[block * size + place];
      }
      const bool is_first =
          t == 0 ? !in.log_denominator : in.segments && in.segments[t] != in.segments[t - 1];
      const bool forgets = log_decay(t, r) == -infinity<T>();
      to(t, r) = is_first || forgets ? T(0) : static_cast<T>(sum);
      if (is_first || forgets) sum = 0;
    }
  }
};

template <class Kernel>
void launch_each(std::int64_t count, const Kernel& kernel) {
  launch(divide_up(count, Kernel::kThreads), kernel);
}

// What the kernels leave for each other.
struct log_attention_layout {
  extended* sums;   // (batch, n_q, value blocks, 32)
  extended* final;  // (batch, value blocks, d_k, 32)
  double* queries;  // (value blocks, batch, n_q, d_k)
  double* keys;     // (value blocks, batch, n, d_k)
  double* values;   // (feature blocks, batch, n, d_v)

  log_attention_layout(workspace_layout& workspace, std::int64_t batch, std::int64_t n_q,
                       std::int64_t n, std::int64_t d_k, std::int64_t d_v, bool is_reverse) {
    const std::int64_t blocks = value_blocks_of(d_v);
    sums = workspace.take<extended>(batch * n_q * blocks * kWarp);
    final = workspace.take<extended>(batch * blocks * d_k * kWarp);
    queries = workspace.take<double>(is_reverse ? blocks * batch * n_q * d_k : 0);
    keys = workspace.take<double>(is_reverse ? blocks * batch * n * d_k : 0);
    values = workspace.take<double>(is_reverse ? feature_blocks_of(d_k) * batch * n * d_v : 0);
  }
};

template <class T>
matrix_view<T> matrix_or_none(const array_view* array) {
  return array ? matrix_at<T>(*array, 0) : matrix_view<T>{};
}
template <class T>
vector_view<T> vector_or_none(const array_view* array) {
  return array ? vector_at<T>(*array, 0) : vector_view<T>{};
}

// Every input array of both directions.
struct log_attention_arrays {
  const array_view* log_k;
  const array_view* log_v;
  const array_view* sign_v;
  const array_view* log_q;
  const array_view* log_decay;
  const array_view* key_mask;
  const array_view* segments;
  const array_view* log_numerator;
  const array_view* sign_numerator;
  const array_view* log_denominator;
  bool causal;

  template <class T>
  log_attention_inputs<T> inputs(const attention_shape& shape) const {
    log_attention_inputs<T> in{};
    in.where = batches_of<kInputs>(shape.batch, {{log_k, 2},
                                                 {log_v, 2},
                                                 {sign_v, 2},
                                                 {log_q, 2},
                                                 {log_decay, 2},
                                                 {key_mask, 1},
                                                 {log_numerator, 2},
                                                 {sign_numerator, 2},
                                                 {log_denominator, 1}});
    in.log_k = matrix_or_none<const T>(log_k);
    in.log_v = matrix_or_none<const T>(log_v);
    in.sign_v = matrix_or_none<const T>(sign_v);
    in.log_q = matrix_or_none<const T>(log_q);
    in.log_decay = matrix_or_none<const T>(log_decay);
    in.key_mask = vector_or_none<const std::uint8_t>(key_mask);
    in.segments = vector_or_none<const std::int64_t>(segments);
    in.log_numerator = matrix_or_none<const T>(log_numerator);
    in.sign_numerator = matrix_or_none<const T>(sign_numerator);
    in.log_denominator = vector_or_none<const T>(log_denominator);
    in.batch = shape.batch.count();
    in.n_q = shape.n_q;
    in.n = shape.n;
    in.d_k = shape.d_k;
    in.d_v = shape.d_v;
    in.value_blocks = value_blocks_of(shape.d_v);
    in.has_queries = log_q != nullptr;
    in.causal = causal;
    return in;
  }
};

template <class T>
void launch_numerators(const log_attention_inputs<T>& in, const log_attention_layout& layout,
                       bool with_final) {
  for (std::int64_t block = 0; block < feature_blocks_of(in.d_k); ++block) {
    numerator_kernel<T> kernel{};
    kernel.in = in;
    kernel.first_feature = block * kFeatures;
    kernel.sums = in.has_queries ? layout.sums : nullptr;
    kernel.final = with_final ? layout.final : nullptr;
    launch(in.batch * in.value_blocks, kernel);
  }
}

struct log_attention_results {
  const array_view* log_y;
  const array_view* sign_y;
  const array_view* log_z;
  const array_view* final_log_numerator;
  const array_view* final_sign_numerator;
  const array_view* final_log_denominator;
};

template <class T>
void log_linear_attention_as(const attention_shape& shape, const log_attention_arrays& arrays,
                             const log_attention_results& out, const array_view& workspace) {
  const log_attention_inputs<T> in = arrays.inputs<T>(shape);
  workspace_layout pieces(workspace);
  const log_attention_layout layout(pieces, in.batch, in.n_q, in.n, in.d_k, in.d_v, false);
  const bool with_final =
      out.final_log_numerator || out.final_sign_numerator || out.final_log_denominator;
  launch_numerators(in, layout, with_final);
  if (in.has_queries) {
    result_kernel<T> kernel{};
    kernel.in = in;
    kernel.where = batches_of<result_kernel<T>::kResults>(
        shape.batch, {{out.log_y, 2}, {out.sign_y, 2}, {out.log_z, 1}});
    kernel.log_y = matrix_or_none<T>(out.log_y);
    kernel.sign_y = matrix_or_none<T>(out.sign_y);
    kernel.log_z = vector_or_none<T>(out.log_z);
    kernel.sums = layout.sums;
    launch_each(in.batch * in.n_q * (in.d_v + 1), kernel);
  }
  if (with_final) {
    final_state_kernel<T> kernel{};
    kernel.in = in;
    kernel.where =
        batches_of<final_state_kernel<T>::kFinals>(shape.batch, {{out.final_log_numerator, 2},
                                                                 {out.final_sign_numerator, 2},
                                                                 {out.final_log_denominator, 1}});
    kernel.log_numerator = matrix_or_none<T>(out.final_log_numerator);
    kernel.sign_numerator = matrix_or_none<T>(out.final_sign_numerator);
    kernel.log_denominator = vector_or_none<T>(out.final_log_denominator);
    kernel.final = layout.final;
    launch_each(in.batch * in.d_k * (in.d_v + 1), kernel);
  }
}

struct log_attention_reverse {
  const array_view* grad_log_y;
  const array_view* grad_log_z;
  const array_view* grad_final_log_numerator;
  const array_view* grad_final_log_denominator;
  const array_view* grad_log_k;
  const array_view* grad_log_v;
  const array_view* grad_log_q;
  const array_view* grad_log_decay;
  const array_view* grad_log_numerator;
  const array_view* grad_log_denominator;
};

template <class T>
void log_linear_attention_vjp_as(const attention_shape& shape, const log_attention_arrays& arrays,
                                 const log_attention_reverse& of, const array_view& workspace) {
  const log_attention_inputs<T> in = arrays.inputs<T>(shape);
  workspace_layout pieces(workspace);
  const log_attention_layout layout(pieces, in.batch, in.n_q, in.n, in.d_k, in.d_v, true);
  log_attention_gradients<T> grad{};
  grad.where = batches_of<kGradients>(shape.batch, {{of.grad_log_y, 2},
                                                    {of.grad_log_z, 1},
                                                    {of.grad_final_log_numerator, 2},
                                                    {of.grad_final_log_denominator, 1}});
  grad.log_y = matrix_or_none<const T>(of.grad_log_y);
  grad.log_z = vector_or_none<const T>(of.grad_log_z);
  grad.final_numerator = matrix_or_none<const T>(of.grad_final_log_numerator);
  grad.final_denominator = vector_or_none<const T>(of.grad_final_log_denominator);
  const bool with_final = grad.final_numerator || grad.final_denominator;
  const bool with_rows = in.has_queries && in.n_q > 0 && (grad.log_y || grad.log_z);

  launch_numerators(in, layout, with_final);
  if (with_rows) {
    derivative_kernel<T> kernel{};
    kernel.in = in;
    kernel.grad = grad;
    kernel.sums = layout.sums;
    launch(divide_up(in.batch * in.n_q, derivative_kernel<T>::kThreads / kWarp), kernel);
  }
  for (std::int64_t block = 0; block < feature_blocks_of(in.d_k); ++block) {
    if (with_rows && (of.grad_log_q || of.grad_log_decay)) {
      query_gradient_kernel<T> kernel{};
      kernel.in = in;
      kernel.first_feature = block * kFeatures;
      kernel.derivatives = layout.sums;
      kernel.out = layout.queries;
      launch(in.batch * in.value_blocks, kernel);
    }
    key_gradient_kernel<T> kernel{};
    kernel.in = in;
    kernel.first_feature = block * kFeatures;
    kernel.derivatives = with_rows ? layout.sums : nullptr;
    kernel.final = with_final ? layout.final : nullptr;
    kernel.grad = grad;
    kernel.keys = layout.keys;
    kernel.values = layout.values + block * in.batch * in.n * in.d_v;
    kernel.state_where = batches_of<key_gradient_kernel<T>::kStateGradients>(
        shape.batch, {{of.grad_log_numerator, 2}, {of.grad_log_denominator, 1}});
    kernel.grad_numerator = matrix_or_none<T>(of.grad_log_numerator);
    kernel.grad_denominator = vector_or_none<T>(of.grad_log_denominator);
    launch(in.batch * in.value_blocks, kernel);
  }
  const auto sum_parts = [&](const array_view* out, const double* parts, std::int64_t count,
                             std::int64_t rows, std::int64_t columns) {
    if (!out) return;
    part_sum_kernel<T> kernel{};
    kernel.where = batches_of<1>(shape.batch, {{out, 2}});
    kernel.out = matrix_at<T>(*out, 0);
    kernel.parts = parts;
    kernel.count = count;
    kernel.batch = in.batch;
    kernel.rows = rows;
    kernel.columns = columns;
    launch_each(in.batch * rows * columns, kernel);
  };
  sum_parts(of.grad_log_q, layout.queries, with_rows ? in.value_blocks : 0, in.n_q, in.d_k);
  sum_parts(of.grad_log_k, layout.keys, in.value_blocks, in.n, in.d_k);
  sum_parts(of.grad_log_v, layout.values, feature_blocks_of(in.d_k), in.n, in.d_v);
  if (of.grad_log_decay) {
    decay_gradient_kernel<T> kernel{};
    kernel.in = in;
    kernel.grad = grad;
    kernel.where = batches_of<1>(shape.batch, {{of.grad_log_decay, 2}});
    kernel.out = matrix_at<T>(*of.grad_log_decay, 0);
    kernel.queries = with_rows ? layout.queries : nullptr;
    kernel.keys = layout.keys;
    launch_each(in.batch * in.d_k, kernel);
  }
}

std::size_t log_attention_bytes(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                std::int64_t d_k, std::int64_t d_v, bool is_reverse) {
  workspace_layout workspace;
  const log_attention_layout layout(workspace, batch, n_q, n, d_k, d_v, is_reverse);
  return workspace.size();
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t log_linear_attention_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                           std::int64_t d_k, std::int64_t d_v, std::int64_t, bool) {
  return cuda::log_attention_bytes(batch, n_q, n, d_k, d_v, false);
}

void log_linear_attention(const array_view& log_k, const array_view& log_v,
                          const array_view* sign_v, const array_view* log_q,
                          const array_view* log_decay, const array_view* key_mask,
                          const array_view* segments, const array_view* log_numerator,
                          const array_view* sign_numerator, const array_view* log_denominator,
                          bool causal, const array_view* log_y, const array_view* sign_y,
                          const array_view* log_z, const array_view* final_log_numerator,
                          const array_view* final_sign_numerator,
                          const array_view* final_log_denominator, const array_view& workspace) {
  const attention_shape shape = check_log_linear_attention(
      log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, log_numerator, sign_numerator,
      log_denominator, causal, log_y, sign_y, log_z, final_log_numerator, final_sign_numerator,
      final_log_denominator);
  const cuda::log_attention_arrays arrays{&log_k,         &log_v,          sign_v,   log_q,
                                          log_decay,      key_mask,        segments, log_numerator,
                                          sign_numerator, log_denominator, causal};
  const cuda::log_attention_results out{
      log_y, sign_y, log_z, final_log_numerator, final_sign_numerator, final_log_denominator};
  (shape.type == dtype::float32
       ? cuda::log_linear_attention_as<float>
       : cuda::log_linear_attention_as<double>)(shape, arrays, out, workspace);
}

std::size_t log_linear_attention_vjp_workspace(std::int64_t batch, std::int64_t n_q, std::int64_t n,
                                               std::int64_t d_k, std::int64_t d_v, std::int64_t,
                                               bool) {
  return cuda::log_attention_bytes(batch, n_q, n, d_k, d_v, true);
}

void log_linear_attention_vjp(
    const array_view& log_k, const array_view& log_v, const array_view* sign_v,
    const array_view* log_q, const array_view* log_decay, const array_view* key_mask,
    const array_view* segments, const array_view* log_numerator, const array_view* sign_numerator,
    const array_view* log_denominator, bool causal, const array_view* grad_log_y,
    const array_view* grad_log_z, const array_view* grad_final_log_numerator,
    const array_view* grad_final_log_denominator, const array_view* grad_log_k,
    const array_view* grad_log_v, const array_view* grad_log_q, const array_view* grad_log_decay,
    const array_view* grad_log_numerator, const array_view* grad_log_denominator,
    const array_view& workspace) {
  const attention_shape shape = check_log_linear_attention_vjp(
      log_k, log_v, sign_v, log_q, log_decay, key_mask, segments, log_numerator, sign_numerator,
      log_denominator, causal, grad_log_y, grad_log_z, grad_final_log_numerator,
      grad_final_log_denominator, grad_log_k, grad_log_v, grad_log_q, grad_log_decay,
      grad_log_numerator, grad_log_denominator);
  const cuda::log_attention_arrays arrays{&log_k,         &log_v,          sign_v,   log_q,
                                          log_decay,      key_mask,        segments, log_numerator,
                                          sign_numerator, log_denominator, causal};
  const cuda::log_attention_reverse of{grad_log_y,
                                       grad_log_z,
                                       grad_final_log_numerator,
                                       grad_final_log_denominator,
                                       grad_log_k,
                                       grad_log_v,
                                       grad_log_q,
                                       grad_log_decay,
                                       grad_log_numerator,
                                       grad_log_denominator};
  (shape.type == dtype::float32
       ? cuda::log_linear_attention_vjp_as<float>
       : cuda::log_linear_attention_vjp_as<double>)(shape, arrays, of, workspace);
}

}  // namespace subquad::core

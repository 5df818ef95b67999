// One more token of causal linear attention, for a batch of states.
#include "attention_checks.hpp"
#include "attention_core.hpp"
#include "batches.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace subquad::cuda {
namespace {

enum : int { kLogK, kV, kLogQ, kLogDecay, kY, kLogZ, kStepArrays };

// (value, rest) takes on `more`; what rounding takes from the sum goes to rest.
template <class T>
SUBQUAD_DEVICE void add_compensated(T& value, T& rest, T more) {
  const T addend = more + rest;
  const T sum = value + addend;
  const T back = sum - value;
  const T error = (value - (sum - back)) + (addend - back);
  rest = std::isfinite(sum) ? error : T(0);
  value = sum;
}

// (value, rest) times a factor.
template <class T>
SUBQUAD_DEVICE void scale_compensated(T& value, T& rest, double factor) {
  if constexpr (sizeof(T) == 4) {
    const double whole = (static_cast<double>(value) + static_cast<double>(rest)) * factor;
    value = static_cast<T>(whole);
    rest = std::isfinite(value) ? static_cast<T>(whole - static_cast<double>(value)) : T(0);
  } else {
    value *= factor;
    rest *= factor;
  }
}

// A token is added to a state and the state is read, as subquad_attention_step says; one block for
// each state. With c = max_r (log_q_r + M_r), weights_r = e^(log_q_r + M_r - c) and the whole sums
// S and Z in the scale M, y = sum_r weights_r S_r / sum_r weights_r Z_r.
//
// The states' arrays are contiguous; nothing aliases. Differences of logarithms in double, products
// in T; S and Z keep what folding a token rounds away. Sums over features in a fixed order.
template <class T>
struct attention_step_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 2;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kLaneColumns = 4;
  static constexpr int kColumns = kLaneColumns * kWarp;
  static constexpr int kTokens = 32;
  static constexpr double kMostRise = sizeof(T) == 4 ? 30 : 300;

  struct shared_memory {
    T parts[kWarps][kColumns];
    double sums[kWarps];
    int flags[kWarps];
    T token_weights[kTokens];
    std::int64_t offsets[kStepArrays];
    std::int64_t count;
  };

  batches<kStepArrays> where;
  vector_view<const T> all_log_k, all_v, all_log_q, all_log_decay;  // decay optional
  vector_view<T> all_y;
  T* log_z;  // optional
  T* all_key_sums;
  T* all_value_sums;
  T* all_recent_keys;
  T* all_recent_values;
  std::int64_t* all_recent_count;
  T* all_weights;  // (batch, d_k): scratch
  std::int64_t d_k;
  std::int64_t d_v;
  std::int64_t room;
  bool empty_is_nan;

  SUBQUAD_DEVICE static int thread() { return static_cast<int>(threadIdx.x); }
  SUBQUAD_DEVICE static int warp() { return thread() / kWarp; }
  SUBQUAD_DEVICE static int lane() { return thread() % kWarp; }
  SUBQUAD_DEVICE static bool is_lowest(T x) { return x == -infinity<T>(); }

  SUBQUAD_DEVICE T* scale() const { return all_key_sums + block() * 5 * d_k; }
  SUBQUAD_DEVICE T* scale_rest() const { return scale() + d_k; }
  SUBQUAD_DEVICE T* sum() const { return scale() + 2 * d_k; }
  SUBQUAD_DEVICE T* sum_rest() const { return scale() + 3 * d_k; }
  SUBQUAD_DEVICE T* decay_sum() const { return scale() + 4 * d_k; }
  SUBQUAD_DEVICE T* values() const { return all_value_sums + block() * 2 * d_k * d_v; }
  SUBQUAD_DEVICE T* values_rest() const { return values() + d_k * d_v; }
  SUBQUAD_DEVICE T* recent_keys() const { return all_recent_keys + block() * room * d_k; }
  SUBQUAD_DEVICE T* recent_values() const { return all_recent_values + block() * room * d_v; }
  SUBQUAD_DEVICE T* weights() const { return all_weights + block() * d_k; }
  template <class V>
  SUBQUAD_DEVICE static V at(V view, std::int64_t offset) {
    return {view.data + offset, view.stride};
  }
  SUBQUAD_DEVICE static std::int64_t block() { return static_cast<std::int64_t>(blockIdx.x); }

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (thread() < kStepArrays) shared.offsets[thread()] = where.offset(thread(), block());
    if (thread() == 0) shared.count = all_recent_count[block()];
    __syncthreads();
    const vector_view<const T> log_k = at(all_log_k, shared.offsets[kLogK]);
    const vector_view<const T> log_q = at(all_log_q, shared.offsets[kLogQ]);
    if (all_log_decay) decay(at(all_log_decay, shared.offsets[kLogDecay]), shared);
    append(log_k, shared);
    read(log_q, shared);
  }

  // Whether any thread of the block says so.
  SUBQUAD_DEVICE bool any(bool mine, shared_memory& shared) const {
    const unsigned votes = __ballot_sync(0xffffffffu, mine);
    if (lane() == 0) shared.flags[warp()] = votes != 0;
    __syncthreads();
    bool found = false;
    for (int w = 0; w < kWarps; ++w) found = found || shared.flags[w] != 0;
    __syncthreads();
    return found;
  }

  SUBQUAD_DEVICE void decay(vector_view<const T> log_decay, const shared_memory& shared) const {
    for (std::int64_t r = thread(); r < d_k; r += kThreads) {
      const T by = log_decay[r];
      decay_sum()[r] += by;
      if (is_lowest(by)) {
        scale()[r] = -infinity<T>();
        scale_rest()[r] = sum()[r] = sum_rest()[r] = T(0);
        for (std::int64_t j = 0; j < shared.count; ++j) recent_keys()[j * d_k + r] = T(0);
      } else if (!is_lowest(scale()[r])) {
        const double total = static_cast<double>(scale()[r]) +
                             static_cast<double>(scale_rest()[r]) + static_cast<double>(by);
        scale()[r] = static_cast<T>(total);
        scale_rest()[r] = static_cast<T>(total - static_cast<double>(scale()[r]));
      }
    }
    for (std::int64_t i = thread(); i < d_k * d_v; i += kThreads) {
      if (is_lowest(log_decay[i / d_v])) values()[i] = values_rest()[i] = T(0);
    }
    __syncthreads();
  }

  SUBQUAD_DEVICE double rise_of(T key, std::int64_t r) const {
    return (static_cast<double>(key) - static_cast<double>(scale()[r])) -
           static_cast<double>(scale_rest()[r]);
  }
  SUBQUAD_DEVICE bool rises(T key, std::int64_t r) const {
    return !is_lowest(key) && rise_of(key, r) > kMostRise;
  }

  // The token joins the recent ones, in the scale of the state, which is raised where the key
  // stands too high.
  SUBQUAD_DEVICE void append(vector_view<const T> log_k, shared_memory& shared) const {
    bool is_present = false;
    bool is_high = false;
    for (std::int64_t r = thread(); r < d_k; r += kThreads) {
      is_present = is_present || !is_lowest(log_k[r]);
      is_high = is_high || rises(log_k[r], r);
    }
    if (!any(is_present, shared)) return;
    is_high = any(is_high, shared);
    if (is_high || shared.count >= room) {
      fold(shared);
      __syncthreads();
      if (thread() == 0) shared.count = 0;
    }
    if (is_high) {
      raise(log_k);
      __syncthreads();
    }
    __syncthreads();
    const std::int64_t place = shared.count;
    for (std::int64_t r = thread(); r < d_k; r += kThreads) {
      const T key = log_k[r];
      recent_keys()[place * d_k + r] =
          is_lowest(key) ? T(0) : exp_of(static_cast<T>(rise_of(key, r)));
    }
    const vector_view<const T> v = at(all_v, shared.offsets[kV]);
    for (std::int64_t c = thread(); c < d_v; c += kThreads) recent_values()[place * d_v + c] = v[c];
    __syncthreads();
    if (thread() == 0) {
      shared.count = place + 1;
      all_recent_count[block()] = place + 1;
    }
    __syncthreads();
  }

  SUBQUAD_DEVICE static T exp_of(T x) { return static_cast<T>(std::exp(x)); }

  SUBQUAD_DEVICE void fold(const shared_memory& shared) const {
    const std::int64_t count = shared.count;
    for (std::int64_t r = thread(); r < d_k; r += kThreads) {
      T more = T(0);
      for (std::int64_t j = 0; j < count; ++j) more += recent_keys()[j * d_k + r];
      add_compensated(sum()[r], sum_rest()[r], more);
    }
    for (std::int64_t i = thread(); i < d_k * d_v; i += kThreads) {
      const T* key = recent_keys() + i / d_v;
      const T* value = recent_values() + i % d_v;
      T more = T(0);
      for (std::int64_t j = 0; j < count; ++j) more += key[j * d_k] * value[j * d_v];
      add_compensated(values()[i], values_rest()[i], more);
    }
  }

  // Features below the key go to its scale; what lies there already may be nothing.
  SUBQUAD_DEVICE void raise(vector_view<const T> log_k) const {
    const auto factor_of = [&](std::int64_t r) {
      return is_lowest(scale()[r]) ? 0.0 : std::exp(-rise_of(log_k[r], r));
    };
    for (std::int64_t i = thread(); i < d_k * d_v; i += kThreads) {
      const std::int64_t r = i / d_v;
      if (rises(log_k[r], r)) scale_compensated(values()[i], values_rest()[i], factor_of(r));
    }
    __syncthreads();
    for (std::int64_t r = thread(); r < d_k; r += kThreads) {
      if (!rises(log_k[r], r)) continue;
      scale_compensated(sum()[r], sum_rest()[r], factor_of(r));
      scale()[r] = log_k[r];
      scale_rest()[r] = T(0);
    }
  }

  // NaN is not below anything, and stays.
  SUBQUAD_DEVICE static double larger(double a, double b) { return b <= a || a != a ? a : b; }

  // The sum over the block, in a fixed order, for all threads.
  SUBQUAD_DEVICE double block_sum(double mine, shared_memory& shared) const {
    SUBQUAD_UNROLL
    for (int flip = 1; flip < kWarp; flip *= 2) mine += __shfl_xor_sync(0xffffffffu, mine, flip);
    if (lane() == 0) shared.sums[warp()] = mine;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared.sums[w];
    __syncthreads();
    return total;
  }

  // What the recent tokens from `first` on weigh, kTokens at most; one warp takes a token.
  SUBQUAD_DEVICE void weigh_tokens(std::int64_t first, shared_memory& shared) const {
    for (int j = warp(); j < kTokens && first + j < shared.count; j += kWarps) {
      const T* key = recent_keys() + (first + j) * d_k;
      T weight = T(0);
      for (std::int64_t r = lane(); r < d_k; r += kWarp) weight += weights()[r] * key[r];
      SUBQUAD_UNROLL
      for (int flip = 1; flip < kWarp; flip *= 2) {
        weight += __shfl_xor_sync(0xffffffffu, weight, flip);
      }
      if (lane() == 0) shared.token_weights[j] = weight;
    }
    __syncthreads();
  }

  // sums[i] += the warp's share of the rows, weights[row] rows(row, first_column + lane + 32 i).
  template <bool kSkipsZero>
  SUBQUAD_DEVICE void add_rows(const T* row_weights, const T* rows, std::int64_t count,
                               std::int64_t first_column, T (&sums)[kLaneColumns]) const {
    for (std::int64_t row = warp(); row < count; row += kWarps) {
      const T weight = row_weights[row];
      if (kSkipsZero && weight == T(0)) continue;
      SUBQUAD_UNROLL
      for (int i = 0; i < kLaneColumns; ++i) {
        const std::int64_t column = first_column + lane() + i * kWarp;
        if (column < d_v) sums[i] += weight * rows[row * d_v + column];
      }
    }
  }

  SUBQUAD_DEVICE void read(vector_view<const T> log_q, shared_memory& shared) const {
    const auto is_empty = [&](std::int64_t r) {
      return is_lowest(scale()[r]) || is_lowest(log_q[r]);
    };
    double largest = -infinity<double>();
    for (std::int64_t r = thread(); r < d_k; r += kThreads) {
      const double total = static_cast<double>(log_q[r]) + static_cast<double>(scale()[r]);
      if (!is_empty(r)) largest = larger(largest, total);
    }
    SUBQUAD_UNROLL
    for (int flip = 1; flip < kWarp; flip *= 2) {
      largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, flip));
    }
    if (lane() == 0) shared.sums[warp()] = largest;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) largest = larger(largest, shared.sums[w]);
    __syncthreads();

    double denominator = 0;
    for (std::int64_t r = thread(); r < d_k; r += kThreads) {
      T weight = T(0);
      if (!is_empty(r)) {
        // The sum and what rounding takes from it: float64 logarithms may be large as well.
        const auto q = static_cast<double>(log_q[r]);
        const auto m = static_cast<double>(scale()[r]);
        const double total = q + m;
        const double back = total - q;
        const double error = (q - (total - back)) + (m - back);
        weight = exp_of(
            static_cast<T>((total - largest) + (error + static_cast<double>(scale_rest()[r]))));
        denominator += static_cast<double>(weight) * static_cast<double>(sum()[r]);
      }
      weights()[r] = weight;
    }
    denominator = block_sum(denominator, shared);
    for (std::int64_t first = 0; first < shared.count; first += kTokens) {
      weigh_tokens(first, shared);
      for (int j = 0; j < kTokens && first + j < shared.count; ++j) {
        denominator += static_cast<double>(shared.token_weights[j]);
      }
      __syncthreads();
    }
    const bool is_nothing = largest == -infinity<double>() || denominator == 0;
    const vector_view<T> y = at(all_y, shared.offsets[kY]);
    for (std::int64_t first_column = 0; first_column < d_v; first_column += kColumns) {
      T sums[kLaneColumns] = {};
      add_rows<false>(weights(), values(), d_k, first_column, sums);
      for (std::int64_t first = 0; first < shared.count; first += kTokens) {
        // The weights of the only tokens are there already.
        if (shared.count > kTokens) weigh_tokens(first, shared);
        const std::int64_t count = shared.count - first < kTokens ? shared.count - first : kTokens;
        // Without weight a value counts for nothing, whatever it is.
        add_rows<true>(shared.token_weights, recent_values() + first * d_v, count, first_column,
                       sums);
        if (shared.count > kTokens) __syncthreads();
      }
      SUBQUAD_UNROLL
      for (int i = 0; i < kLaneColumns; ++i) shared.parts[warp()][lane() + i * kWarp] = sums[i];
      __syncthreads();
      for (int c = thread(); c < kColumns && first_column + c < d_v; c += kThreads) {
        T total = T(0);
        for (int w = 0; w < kWarps; ++w) total += shared.parts[w][c];
        const T nothing = empty_is_nan ? std::numeric_limits<T>::quiet_NaN() : T(0);
        y[first_column + c] = is_nothing ? nothing : total / static_cast<T>(denominator);
      }
      __syncthreads();
    }
    if (log_z && thread() == 0) {
      log_z[shared.offsets[kLogZ]] =
          is_nothing ? -infinity<T>() : static_cast<T>(largest + std::log(denominator));
    }
  }
};

template <class T>
struct attention_step_layout {
  T* weights;  // (batch, d_k)

  attention_step_layout(workspace_layout& workspace, std::int64_t batch, std::int64_t d_k) {
    weights = workspace.take<T>(batch * d_k);
  }
};

template <class T>
void attention_step_as(const attention_shape& shape, const array_view& log_k, const array_view& v,
                       const array_view& log_q, const array_view* log_decay,
                       const array_view& key_sums, const array_view& value_sums,
                       const array_view& recent_keys, const array_view& recent_values,
                       const array_view& recent_count, bool empty_is_nan, const array_view& y,
                       const array_view* log_z, const array_view& workspace) {
  const std::int64_t batch = shape.batch.count();
  workspace_layout pieces(workspace);
  const attention_step_layout<T> layout(pieces, batch, shape.d_k);
  attention_step_kernel<T> kernel{};
  kernel.where = batches_of<kStepArrays>(
      shape.batch, {{&log_k, 1}, {&v, 1}, {&log_q, 1}, {log_decay, 1}, {&y, 1}, {log_z, 0}});
  kernel.all_log_k = vector_at<const T>(log_k, 0);
  kernel.all_v = vector_at<const T>(v, 0);
  kernel.all_log_q = vector_at<const T>(log_q, 0);
  if (log_decay) kernel.all_log_decay = vector_at<const T>(*log_decay, 0);
  kernel.all_y = vector_at<T>(y, 0);
  if (log_z) kernel.log_z = static_cast<T*>(log_z->data);
  kernel.all_key_sums = static_cast<T*>(key_sums.data);
  kernel.all_value_sums = static_cast<T*>(value_sums.data);
  kernel.all_recent_keys = static_cast<T*>(recent_keys.data);
  kernel.all_recent_values = static_cast<T*>(recent_values.data);
  kernel.all_recent_count = static_cast<std::int64_t*>(recent_count.data);
  kernel.all_weights = layout.weights;
  kernel.d_k = shape.d_k;
  kernel.d_v = shape.d_v;
  kernel.room = length_from_end(recent_keys, 2);
  kernel.empty_is_nan = empty_is_nan;
  launch(batch, kernel);
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t attention_step_workspace(std::int64_t batch, std::int64_t d_k, std::int64_t,
                                     std::int64_t itemsize) {
  workspace_layout workspace;
  if (itemsize == 8) {
    const cuda::attention_step_layout<double> layout(workspace, batch, d_k);
  } else {
    const cuda::attention_step_layout<float> layout(workspace, batch, d_k);
  }
  return workspace.size();
}

void attention_step(const array_view& log_k, const array_view& v, const array_view& log_q,
                    const array_view* log_decay, const array_view& key_sums,
                    const array_view& value_sums, const array_view& recent_keys,
                    const array_view& recent_values, const array_view& recent_count,
                    bool empty_is_nan, const array_view& y, const array_view* log_z,
                    const array_view& workspace) {
  const attention_shape shape =
      check_attention_step(log_k, v, log_q, log_decay, key_sums, value_sums, recent_keys,
                           recent_values, recent_count, y, log_z);
  const auto run = [&](auto element) {
    cuda::attention_step_as<decltype(element)>(shape, log_k, v, log_q, log_decay, key_sums,
                                               value_sums, recent_keys, recent_values, recent_count,
                                               empty_is_nan, y, log_z, workspace);
  };
  if (shape.type == dtype::float64) {
    run(double{});
  } else {
    run(float{});
  }
}

}  // namespace subquad::core

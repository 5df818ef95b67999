// The states of linear attention at the borders of chunks: sums over each chunk, and their merge
// over chunks in order.
#ifndef SUBQUAD_CUDA_ATTENTION_STATES_CUH
#define SUBQUAD_CUDA_ATTENTION_STATES_CUH

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention_chunk.cuh"

namespace subquad::cuda {

// What the merge needs to know of a chunk's runs.
inline constexpr int kChunkBegins = 1;     // its first token starts a run
inline constexpr int kChunkHasBorder = 2;  // another token does

// Arrays by batch and slot; slot `chunks` is what comes out at the end. First of each chunk alone,
// and after the merge of all that comes before the chunk (or, merged backwards, after it).
template <class T>
struct chunk_states {
  std::int64_t chunks;
  int d_k;
  int d_v;
  T* sums;         // (d_k, d_v): of weights and values
  T* column;       // (d_k): of weights
  double* scales;  // (d_k): the logarithm that weights are relative to, -inf for none
  double* decays;  // (d_k), where there are any: of a chunk
  // (d_k), of a chunk: what the sums before it and its own are multiplied by when they are added
  T* left;
  T* left_low;
  T* right;
  int* borders;  // of a chunk, of any batch

  SUBQUAD_HOST_DEVICE std::int64_t slot(std::int64_t batch, std::int64_t chunk) const {
    return batch * (chunks + 1) + chunk;
  }
  SUBQUAD_DEVICE T* sums_at(std::int64_t batch, std::int64_t chunk) const {
    return sums + slot(batch, chunk) * d_k * d_v;
  }
  template <class U>
  SUBQUAD_DEVICE U* row_at(U* rows, std::int64_t batch, std::int64_t chunk) const {
    return rows + slot(batch, chunk) * d_k;
  }

  void take(workspace_layout& workspace, std::int64_t batch, std::int64_t chunks_,
            std::int64_t d_k_, std::int64_t d_v_, bool has_decay) {
    chunks = chunks_;
    d_k = static_cast<int>(d_k_);
    d_v = static_cast<int>(d_v_);
    const std::int64_t slots = batch * (chunks + 1);
    sums = workspace.take<T>(slots * d_k_ * d_v_);
    column = workspace.take<T>(slots * d_k_);
    scales = workspace.take<double>(slots * d_k_);
    decays = has_decay ? workspace.take<double>(slots * d_k_) : nullptr;
    left = workspace.take<T>(slots * d_k_);
    left_low = sizeof(T) == 4 ? workspace.take<T>(slots * d_k_) : nullptr;
    right = workspace.take<T>(slots * d_k_);
    borders = workspace.take<int>(chunks + 1);
  }
  // Sums alone, of other tokens than those of `of`, whose scales and factors are theirs.
  void take_beside(const chunk_states& of, workspace_layout& workspace, std::int64_t batch,
                   std::int64_t chunks_) {
    *this = of;
    chunks = chunks_;
    const std::int64_t slots = batch * (chunks + 1);
    sums = workspace.take<T>(slots * d_k * d_v);
    column = workspace.take<T>(slots * d_k);
  }
};

// out(feature + i, value + k) = sum_t weights(t, i) values(t, k), t < tokens, of tiles of 64 x 64
// elements in rows of kColumnStride, where (feature + i, value + k) is below (d_k, d_v). Sums that
// are not finite are those of plain arithmetic: there a weight of 0 keeps out what its value holds.
// All threads call it.
template <class T>
SUBQUAD_DEVICE void write_chunk_product(const T* weights, const T* values, int tokens, T* out,
                                        int feature, int value, int d_k, int d_v) {
  using tile = square_tile<T>;
  constexpr int kStride = kColumnStride<T>;
  typename tile::accumulators sums;
  tile::clear(sums);
  add_product<T>(sums, {weights, 1, kStride}, {values, 1, kStride}, product_depth(tokens, kTokens));
  bool all_finite = true;
  each_sum<T>(
      [&](int r, int c, int, int) { all_finite = all_finite && fabs(sums(r, c)) < infinity<T>(); });
  if (__syncthreads_or(!all_finite)) {
    each_sum<T>([&](int r, int c, int row, int column) {
      T sum = 0;
      for (int token = 0; token < tokens; ++token) {
        const T weight = weights[token * kStride + row];
        if (weight != T(0)) sum = fma(weight, values[token * kStride + column], sum);
      }
      sums(r, c) = sum;
    });
  }
  each_sum<T>([&](int r, int c, int row, int column) {
    if (feature + row < d_k && value + column < d_v) {
      out[static_cast<std::int64_t>(feature + row) * d_v + value + column] = sums(r, c);
    }
  });
}

// Of the keys of each chunk that belong to the run of its last token (or of its first), decayed to
// the last token:
//   scale_r = max_j log_k_jr;  w_jr = exp(log_k_jr - scale_r);  sums = w^T v;  column = w^T 1
// One block computes 64 x 64 elements of the sums of a chunk, w in shared memory.
//
// Nothing aliases. With u = 2^-24 a weight is within 5 u (+ u |log_k - scale|) of itself, sums are
// within those of tile_product at depth 64; in float64 likewise with 2^-53. A chunk whose sums are
// not finite is summed in plain arithmetic: there a weight of 0 keeps out what its value holds.
template <class T>
struct key_sums_kernel {
  static constexpr int kThreads = kAttentionThreads;
  static constexpr int kBlocks = 2;
  using walk = feature_walk<64>;
  static constexpr int kStride = kColumnStride<T>;

  struct shared_memory {
    alignas(16) T weights[kTokens * kStride];  // [key][feature]
    T values[kTokens * kStride];               // [key][value]
    walk::table table;
    T totals[walk::kGroups][walk::kFeatures];
    chunk_tokens<T> tokens;
  };

  attention_inputs<T> in;
  chunk_states<T> to;
  bool of_head;     // the run of the first token
  const T* center;  // [batch][d_v], optional: less the values
  int feature_blocks;
  int value_blocks;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    std::int64_t index = blockIdx.x;
    const int value = static_cast<int>(index % value_blocks) * kValues;
    index /= value_blocks;
    const int feature = static_cast<int>(index % feature_blocks) * walk::kFeatures;
    index /= feature_blocks;
    const std::int64_t chunk = index % to.chunks;
    const std::int64_t batch = index / to.chunks;
    locate_chunk(in, batch, chunk, shared.tokens);
    const chunk_tokens<T>& tokens = shared.tokens;
    if (batch == 0 && feature == 0 && value == 0 && block_thread() == 0) {
      to.borders[chunk] =
          (tokens.begins ? kChunkBegins : 0) | (tokens.tail_begin > 0 ? kChunkHasBorder : 0);
    }
    stage_columns<kTokens>(shared.values, kStride, tokens.v, tokens.keys, value, in.d_v,
                           center ? center + batch * in.d_v : nullptr,
                           [&](int key) { return tokens.counts(key); });
    weigh(feature, value == 0, shared);
    __syncthreads();
    if (in.d_v == 0) return;
    write_chunk_product(shared.weights, shared.values, tokens.keys, to.sums_at(batch, chunk),
                        feature, value, in.d_k, in.d_v);
  }

  // Weights of the features from `first` on; writes what else there is of them.
  SUBQUAD_DEVICE void weigh(int first, bool writes, shared_memory& shared) const {
    const chunk_tokens<T>& tokens = shared.tokens;
    const int feature = first + walk::feature();
    const int begin = of_head ? 0 : tokens.tail_begin;
    const int end = of_head ? tokens.head_end : kTokens;
    const auto decay_at = [&](int row) {
      return row >= begin ? walk::decay_at(tokens, row, feature, in.d_k) : 0.0;
    };
    double after = 0;  // the decay from a key to the end
    if (tokens.log_decay) {
      double sum = 0;
      for (int i = walk::kRows - 1; i >= 0; --i) sum = decayed(sum, decay_at(walk::row(i)));
      shared.table[walk::group()][walk::feature()] = sum;
      __syncthreads();
      for (int g = walk::kGroups - 1; g > walk::group(); --g) {
        after = decayed(after, shared.table[g][walk::feature()]);
      }
      if (to.decays && writes && walk::group() == 0 && feature < in.d_k) {
        to.row_at(to.decays, tokens.batch, tokens.chunk)[feature] = decayed(after, sum);
      }
      __syncthreads();
    }
    double keys[walk::kRows];
    double largest = -infinity<double>();
    SUBQUAD_UNROLL
    for (int i = walk::kRows - 1; i >= 0; --i) {
      const int row = walk::row(i);
      keys[i] = row >= begin && row < end ? decayed(key_at(tokens, row, feature, in.d_k), after)
                                          : -infinity<double>();
      largest = larger(largest, keys[i]);
      after = decayed(after, decay_at(row));
    }
    shared.table[walk::group()][walk::feature()] = largest;
    __syncthreads();
    double scale = -infinity<double>();
    for (int g = 0; g < walk::kGroups; ++g) {
      scale = larger(scale, shared.table[g][walk::feature()]);
    }
    T total = 0;
    SUBQUAD_UNROLL
    for (int i = 0; i < walk::kRows; ++i) {
      const T weight = keys[i] == -infinity<double>() ? T(0) : weight_of<T>(keys[i] - scale);
      shared.weights[walk::row(i) * kStride + walk::feature()] = weight;
      total += weight;
    }
    if (!writes) return;
    shared.totals[walk::group()][walk::feature()] = total;
    __syncthreads();
    if (walk::group() > 0 || feature >= in.d_k) return;
    for (int g = 1; g < walk::kGroups; ++g) total += shared.totals[g][walk::feature()];
    to.row_at(to.scales, tokens.batch, tokens.chunk)[feature] = scale;
    to.row_at(to.column, tokens.batch, tokens.chunk)[feature] = total;
  }
};

// Where a state goes, and its part of the batch.
template <class T>
struct state_outputs {
  matrix_view<T> key_sums;  // optional, with value_sums
  stack_view<T> value_sums;
  batches<2> batch;
};
enum { kFinalKeySums, kFinalValueSums };

// x + y and what rounding takes from it.
template <class T>
SUBQUAD_DEVICE void two_sum(T x, T y, T& sum, T& error) {
  sum = x + y;
  const T of_y = sum - x;
  error = (x - (sum - of_y)) + (y - of_y);
}

// A number as the sum of two of T.
template <class T>
struct pair_of {
  T high;
  T low;

  // What is not finite has no low part.
  SUBQUAD_DEVICE void normalise() {
    if (!(fabs(low) < infinity<T>())) low = 0;
    const T sum = high + low;
    low = fabs(sum) < infinity<T>() ? low - (sum - high) : T(0);
    high = sum;
  }
  // this * factor + added * (1, or what `added_factor` says); nothing of a number whose factor is
  // 0.
  SUBQUAD_DEVICE void merge(T factor, T factor_low, T added, T added_factor) {
    pair_of scaled{0, 0};
    if (factor != T(0)) {
      scaled.high = high * factor;
      scaled.low = fma(high, factor, -scaled.high) + fma(high, factor_low, low * factor);
    }
    pair_of own{0, 0};
    if (added_factor != T(0)) {
      own.high = added * added_factor;
      own.low = fma(added, added_factor, -own.high);
    }
    T error;
    two_sum(scaled.high, own.high, high, error);
    low = error + (scaled.low + own.low);
    normalise();
  }
};

// Scales of the merged states, and the factors that their sums are merged with; a thread for each
// feature, whose exponentials other threads compute. The scale before chunk c goes to slot c, that
// after the last to slot `chunks`.
//
//   scale_after = max(scale_before + decay_c, scale_c)
//   left_c = exp(scale_before + decay_c - scale_after);  right_c = exp(scale_c - scale_after)
// in twice the precision of float64; a factor is 0 where there is nothing, and nowhere else.
template <class T>
struct scan_scales_kernel {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  static constexpr int kSteps = kThreads / kWarp;

  struct shared_memory {
    double scales[kSteps][kWarp];
    double decays[kSteps][kWarp];
    double left[kSteps][kWarp];
    double right[kSteps][kWarp];
    int borders[kSteps + 1];
  };

  attention_inputs<T> in;
  chunk_states<T> states;
  bool forward;
  state_outputs<T> out;
  int feature_blocks;

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    const std::int64_t batch = block_index() / feature_blocks;
    const int lane = block_lane();
    const int step = block_thread() / kWarp;
    const int feature = static_cast<int>(block_index() % feature_blocks) * kWarp + lane;
    const bool exists = feature < states.d_k;
    pair_of<double> scale{-infinity<double>(), 0};
    double decay = 0;
    if (forward && in.key_sums && exists) {
      const matrix_view<const T> given{in.key_sums.data + in.batch.offset(kKeySums, batch),
                                       in.key_sums.row_stride, in.key_sums.column_stride};
      scale = {static_cast<double>(given(0, feature)), static_cast<double>(given(1, feature))};
      if (scale.high == -infinity<double>()) scale.low = 0;
      scale.normalise();
      decay = static_cast<double>(given(4, feature));
    }
    for (std::int64_t first = 0; first < states.chunks; first += kSteps) {
      const std::int64_t at = first + step;
      const std::int64_t chunk = forward ? at : states.chunks - 1 - at;
      const bool is_there = exists && at < states.chunks;
      shared.scales[step][lane] =
          is_there ? states.row_at(states.scales, batch, chunk)[feature] : -infinity<double>();
      shared.decays[step][lane] =
          is_there && states.decays ? states.row_at(states.decays, batch, chunk)[feature] : 0.0;
      if (lane == 0 && at < states.chunks) {
        int borders = states.borders[chunk] & kChunkHasBorder;
        const std::int64_t border = forward ? chunk : chunk + 1;
        if (border < states.chunks) borders |= states.borders[border] & kChunkBegins;
        shared.borders[step] = borders;
      }
      __syncthreads();
      if (step == 0) {
        for (int i = 0; i < kSteps && first + i < states.chunks; ++i) {
          advance(i, shared, scale, decay);
        }
      }
      __syncthreads();
      if (is_there) {
        states.row_at(states.scales, batch, chunk)[feature] = shared.scales[step][lane];
        const double left = factor(shared.left[step][lane]);
        const T rounded = static_cast<T>(left);
        states.row_at(states.left, batch, chunk)[feature] = rounded;
        if (states.left_low) {
          states.row_at(states.left_low, batch, chunk)[feature] =
              static_cast<T>(left - static_cast<double>(rounded));
        }
        states.row_at(states.right, batch, chunk)[feature] =
            static_cast<T>(factor(shared.right[step][lane]));
      }
      __syncthreads();
    }
    if (step > 0 || !exists || !forward) return;
    states.row_at(states.scales, batch, states.chunks)[feature] = scale.high;
    if (!out.key_sums) return;
    const std::int64_t place = out.batch.offset(kFinalKeySums, batch);
    const auto write = [&](int row, double value) {
      out.key_sums
          .data[place + row * out.key_sums.row_stride + feature * out.key_sums.column_stride] =
          static_cast<T>(value);
    };
    const auto value = static_cast<double>(static_cast<T>(scale.high));
    const bool is_finite = fabs(scale.high) < infinity<double>();
    write(0, scale.high);
    write(1, is_finite ? scale.high - value + scale.low : 0.0);
    write(4, decay);
  }

  static SUBQUAD_DEVICE double factor(double x) {
    if (x == -infinity<double>()) return 0;
    const double power = exp(x);
    constexpr double kLeast = std::numeric_limits<T>::min();
    return power < kLeast ? kLeast : power;
  }

  static SUBQUAD_DEVICE void advance(int i, shared_memory& shared, pair_of<double>& scale,
                                     double& decay) {
    const int lane = block_lane();
    if (shared.borders[i] & kChunkBegins) {
      scale = {-infinity<double>(), 0};
      decay = 0;
    }
    const double own = shared.scales[i][lane];
    const double own_decay = shared.decays[i][lane];
    shared.scales[i][lane] = scale.high;
    const bool has_border = shared.borders[i] & kChunkHasBorder;
    decay = has_border ? own_decay : decayed(decay, own_decay);
    pair_of<double> before{-infinity<double>(), 0};
    if (!has_border && scale.high != -infinity<double>() && own_decay != -infinity<double>()) {
      double error;
      two_sum(scale.high, own_decay, before.high, error);
      before.low = scale.low + error;
      before.normalise();
    }
    scale = before.high > own || isnan(before.high) ? before : pair_of<double>{own, 0};
    shared.left[i][lane] = before.high == -infinity<double>()
                               ? before.high
                               : (before.high - scale.high) + (before.low - scale.low);
    shared.right[i][lane] = own == -infinity<double>() ? own : (own - scale.high) - scale.low;
  }
};

// Merges the sums of chunks, in order: what comes before chunk c goes to slot c, in place of its
// own sums; what comes out at the end to slot `chunks`. A thread for each element, in numbers of
// two parts: each chunk adds 2^-45 (float64: 2^-103) of the sums of sizes, and what its factors
// were rounded by.
//
// Ends: pair_of<T> first(states, batch, feature, value), the sum at the start, and
// last(states, batch, feature, value, sum); `value` is d_v for the sum of weights.
template <class T, class Ends>
struct scan_sums_kernel {
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 1;
  static constexpr int kAhead = 8;
  struct shared_memory {};

  chunk_states<T> states;
  bool forward;
  bool keeps_all;  // else only the end
  bool is_scaled;  // else chunks are in the units of what they are added to
  bool has_left;   // else the sum before is multiplied by 1
  std::int64_t size;
  Ends ends;

  std::int64_t blocks() const { return divide_up(elements(), kThreads) * size; }
  SUBQUAD_HOST_DEVICE std::int64_t elements() const {
    return static_cast<std::int64_t>(states.d_k) * (states.d_v + 1);
  }

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t of_batch = (elements() + kThreads - 1) / kThreads;
    const std::int64_t batch = block_index() / of_batch;
    const std::int64_t element = blockIdx.x % of_batch * kThreads + threadIdx.x;
    if (element >= elements()) return;
    const std::int64_t of_sums = static_cast<std::int64_t>(states.d_k) * states.d_v;
    const bool is_sum = element < of_sums;
    const int feature = static_cast<int>(is_sum ? element / states.d_v : element - of_sums);
    const int value = is_sum ? static_cast<int>(element % states.d_v) : states.d_v;
    const std::int64_t step = is_sum ? of_sums : states.d_k;
    T* at = is_sum ? states.sums + states.slot(batch, 0) * of_sums + element
                   : states.column + states.slot(batch, 0) * states.d_k + feature;
    const std::int64_t factors = states.slot(batch, 0) * states.d_k + feature;
    pair_of<T> sum = ends.first(states, batch, feature, value);
    for (std::int64_t first = 0; first < states.chunks; first += kAhead) {
      T own[kAhead];
      T left[kAhead];
      T left_low[kAhead];
      T right[kAhead];
      SUBQUAD_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= states.chunks) continue;
        const std::int64_t chunk = chunk_at(first + i);
        own[i] = at[chunk * step];
        left[i] = has_left ? states.left[factors + chunk * states.d_k] : T(1);
        left_low[i] =
            has_left && states.left_low ? states.left_low[factors + chunk * states.d_k] : T(0);
        right[i] = is_scaled ? states.right[factors + chunk * states.d_k] : T(1);
      }
      SUBQUAD_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        if (first + i >= states.chunks) continue;
        if (keeps_all) at[chunk_at(first + i) * step] = sum.high;
        sum.merge(left[i], left_low[i], own[i], right[i]);
      }
    }
    at[states.chunks * step] = sum.high;
    ends.last(states, batch, feature, value, sum);
  }

  SUBQUAD_DEVICE std::int64_t chunk_at(std::int64_t at) const {
    return forward ? at : states.chunks - 1 - at;
  }
};

// From the state that goes in, to the state that comes out.
template <class T>
struct state_ends {
  attention_inputs<T> in;
  const T* center;  // [batch][d_v], optional: less the values
  state_outputs<T> out;

  SUBQUAD_DEVICE pair_of<T> first(const chunk_states<T>& states, std::int64_t batch, int feature,
                                  int value) const {
    if (!in.key_sums) return {0, 0};
    const matrix_view<const T> keys{in.key_sums.data + in.batch.offset(kKeySums, batch),
                                    in.key_sums.row_stride, in.key_sums.column_stride};
    if (keys(0, feature) == -infinity<T>()) return {0, 0};
    pair_of<T> sum{keys(2, feature), keys(3, feature)};
    if (value < states.d_v) {
      const T* at = in.value_sums.data + in.batch.offset(kValueSums, batch) +
                    feature * in.value_sums.row_stride + value * in.value_sums.column_stride;
      // Of weights times the centre, which is 0 where there is none.
      sum.merge(center ? -center[batch * states.d_v + value] : T(0), T(0), at[0], T(1));
      sum.low += at[in.value_sums.stride];
    }
    sum.normalise();
    return sum;
  }
  SUBQUAD_DEVICE void last(const chunk_states<T>& states, std::int64_t batch, int feature,
                           int value, const pair_of<T>& sum) const {
    if (!out.key_sums) return;
    if (value < states.d_v) {
      T* at = out.value_sums.data + out.batch.offset(kFinalValueSums, batch) +
              feature * out.value_sums.row_stride + value * out.value_sums.column_stride;
      at[0] = sum.high;
      at[out.value_sums.stride] = sum.low;
      return;
    }
    T* at = out.key_sums.data + out.batch.offset(kFinalKeySums, batch) +
            feature * out.key_sums.column_stride;
    at[2 * out.key_sums.row_stride] = sum.high;
    at[3 * out.key_sums.row_stride] = sum.low;
  }
};

// The states of a call: `earlier` holds for each chunk what comes before it in the run of its first
// token, and at the end the state after all; `later` what comes after it in the run of its last,
// where rows attend that.
template <class T>
struct attention_states {
  chunk_states<T> earlier;
  chunk_states<T> later;

  void take(workspace_layout& workspace, std::int64_t batch, std::int64_t n, std::int64_t d_k,
            std::int64_t d_v, bool has_decay, bool has_later) {
    const std::int64_t chunks = divide_up(n, kTokens);
    earlier.take(workspace, batch, chunks, d_k, d_v, has_decay);
    later = {};
    if (has_later) later.take(workspace, batch, chunks, d_k, d_v, false);
  }

  void find(const attention_inputs<T>& in, const T* center, const state_outputs<T>& out) const {
    find(in, center, out, earlier, true);
    if (in.attended == reach::run && in.log_q) find(in, center, {}, later, false);
  }

 private:
  static void find(const attention_inputs<T>& in, const T* center, const state_outputs<T>& out,
                   chunk_states<T> states, bool forward) {
    if (!in.log_decay) states.decays = nullptr;
    const auto feature_blocks = static_cast<int>(divide_up(in.d_k, kTokens));
    const auto value_blocks = std::max(1, static_cast<int>(divide_up(in.d_v, kValues)));
    launch(in.size * states.chunks * feature_blocks * value_blocks,
           key_sums_kernel<T>{in, states, !forward, center, feature_blocks, value_blocks});
    const auto blocks = static_cast<int>(divide_up(in.d_k, kWarp));
    launch(in.size * blocks, scan_scales_kernel<T>{in, states, forward, out, blocks});
    attention_inputs<T> given = in;
    if (!forward) given.key_sums = {};
    const scan_sums_kernel<T, state_ends<T>> scan{states, forward, in.attended != reach::all, true,
                                                  true,   in.size, {given, center, out}};
    launch(scan.blocks(), scan);
  }
};

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_ATTENTION_STATES_CUH

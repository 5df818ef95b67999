// What the kernels of linear attention share: which tokens a block sees, products of tiles in
// shared memory, and the weights of pairs within a chunk.
#ifndef SUBQUAD_CUDA_ATTENTION_CHUNK_CUH
#define SUBQUAD_CUDA_ATTENTION_CHUNK_CUH

#include <cstdint>
#include <limits>

#include "attention_checks.hpp"
#include "batches.cuh"
#include "device.cuh"
#include "kernels/matrix_view.hpp"
#include "launch.cuh"
#include "tile_product.cuh"

namespace subquad::cuda {

inline constexpr int kTokens = 64;  // of a chunk
inline constexpr int kValues = 64;  // columns of values that a block sees at once
inline constexpr int kAttentionThreads = 256;
// Rows of a tile whose fragments are read along rows, and down columns, from different banks.
inline constexpr int kRowStride = kTokens + 4;
template <class T>
inline constexpr int kColumnStride = kTokens + (sizeof(T) == 8 ? 4 : 8);

// How far the maximum of a feature may rise, within a chunk, above what every row of its run
// attends: weights of such a chunk are products of exponentials of keys and queries, with sums of
// at least exp(-kMostRise). And the sums of decays up to which their differences keep the accuracy
// of T.
template <class T>
inline constexpr double kMostRise = sizeof(T) == 8 ? 300 : 30;
template <class T>
inline constexpr double kMostDecay = sizeof(T) == 8 ? 0x1p9 : 0x1p20;

// What a row attends: the tokens up to itself of its run; its run; all keys.
enum class reach { causal, run, all };

enum attention_member { kLogK, kV, kLogQ, kLogDecay, kKeyMask, kKeySums, kValueSums, kInputs };

template <class T>
struct attention_inputs {
  matrix_view<const T> log_k;
  matrix_view<const T> v;
  matrix_view<const T> log_q;                // optional
  matrix_view<const T> log_decay;            // optional
  vector_view<const std::uint8_t> key_mask;  // optional
  vector_view<const std::int64_t> segments;  // optional
  matrix_view<const T> key_sums;             // optional, with value_sums
  stack_view<const T> value_sums;
  batches<kInputs> batch;
  std::int64_t size;  // of the batch
  std::int64_t n;
  std::int64_t n_q;
  int d_k;
  int d_v;
  reach attended;

  std::int64_t key_chunks() const { return divide_up(n, kTokens); }
  std::int64_t query_chunks() const { return log_q ? divide_up(n_q, kTokens) : 0; }

  attention_inputs(const attention_shape& shape, const array_view& log_k_, const array_view& v_,
                   const array_view* log_q_, const array_view* log_decay_,
                   const array_view* key_mask_, const array_view* segments_,
                   const array_view* key_sums_, const array_view* value_sums_, bool causal)
      : log_k(matrix_at<const T>(log_k_, 0)),
        v(matrix_at<const T>(v_, 0)),
        log_q{},
        log_decay{},
        key_mask{},
        segments{},
        key_sums{},
        value_sums{},
        batch(batches_of<kInputs>(shape.batch, {{&log_k_, 2},
                                                {&v_, 2},
                                                {log_q_, 2},
                                                {log_decay_, 2},
                                                {key_mask_, 1},
                                                {key_sums_, 2},
                                                {value_sums_, 3}})),
        size(shape.batch.count()),
        n(shape.n),
        n_q(shape.n_q),
        d_k(static_cast<int>(shape.d_k)),
        d_v(static_cast<int>(shape.d_v)),
        attended(causal      ? reach::causal
                 : segments_ ? reach::run
                             : reach::all) {
    if (log_q_) log_q = matrix_at<const T>(*log_q_, 0);
    if (log_decay_) log_decay = matrix_at<const T>(*log_decay_, 0);
    if (key_mask_) key_mask = vector_at<const std::uint8_t>(*key_mask_, 0);
    if (segments_) segments = vector_at<const std::int64_t>(*segments_, 0);
    if (key_sums_) key_sums = matrix_at<const T>(*key_sums_, 0);
    if (value_sums_) value_sums = stack_at<const T>(*value_sums_, 0);
  }
};

// Calls body(T{}) with the type of the arrays.
template <class F>
void for_real_type(dtype type, F&& body) {
  return type == dtype::float64 ? body(double{}) : body(float{});
}

// The tokens of a chunk, in shared memory. Rows and keys of one index are one token, but where all
// keys are attended.
template <class T>
struct chunk_tokens {
  matrix_view<const T> log_k;
  matrix_view<const T> v;
  matrix_view<const T> log_q;
  matrix_view<const T> log_decay;
  vector_view<const std::uint8_t> key_mask;
  std::int64_t batch;
  std::int64_t chunk;
  int keys;
  int rows;
  std::uint32_t counted[2];  // a bit for each key that is there and not removed
  std::uint32_t borders[2];  // ... token after the first that starts a run
  std::uint32_t firsts[2];   // ... key that is the first of its run to count
  int head_end;              // of the run of the first token
  int tail_begin;            // of the run of the last
  bool begins;               // the first token starts a run
  bool ends;                 // the token after the last does
  int run[kTokens];

  SUBQUAD_DEVICE static bool bit(const std::uint32_t (&words)[2], int token) {
    return words[token / 32] >> token % 32 & 1;
  }
  SUBQUAD_DEVICE bool counts(int token) const { return bit(counted, token); }
  SUBQUAD_DEVICE bool is_border(int token) const { return bit(borders, token); }
  SUBQUAD_DEVICE bool has_border(int first, int count) const {
    bool has = false;
    for (int token = first; token < first + count; ++token) has = has || is_border(token);
    return has;
  }
};

SUBQUAD_DEVICE int block_thread() { return static_cast<int>(threadIdx.x); }
SUBQUAD_DEVICE std::int64_t block_index() { return static_cast<std::int64_t>(blockIdx.x); }
SUBQUAD_DEVICE int block_lane() { return block_thread() % kWarp; }

// All threads of the block call it, and see the result.
template <class T>
SUBQUAD_DEVICE void locate_chunk(const attention_inputs<T>& in, std::int64_t batch,
                                 std::int64_t chunk, chunk_tokens<T>& to) {
  const std::int64_t first = chunk * kTokens;
  if (block_thread() == 0) {
    to.batch = batch;
    to.chunk = chunk;
    const std::int64_t keys = in.n - first;
    const std::int64_t rows = in.log_q ? in.n_q - first : 0;
    to.keys = keys < 0 ? 0 : keys < kTokens ? static_cast<int>(keys) : kTokens;
    to.rows = rows < 0 ? 0 : rows < kTokens ? static_cast<int>(rows) : kTokens;
    const auto at = [&](const matrix_view<const T>& matrix, int which) {
      return matrix_view<const T>{
          matrix.data ? matrix.data + in.batch.offset(which, batch) + first * matrix.row_stride
                      : nullptr,
          matrix.row_stride, matrix.column_stride};
    };
    to.log_k = at(in.log_k, kLogK);
    to.v = at(in.v, kV);
    to.log_q = at(in.log_q, kLogQ);
    to.log_decay = at(in.log_decay, kLogDecay);
    to.key_mask = in.key_mask;
    if (in.key_mask) {
      to.key_mask.data += in.batch.offset(kKeyMask, batch) + first * in.key_mask.stride;
    }
    const std::int64_t after = first + kTokens;
    to.begins =
        first > 0 && first < in.n && in.segments && in.segments[first] != in.segments[first - 1];
    to.ends = after < in.n && in.segments && in.segments[after] != in.segments[after - 1];
  }
  __syncthreads();
  if (block_thread() < kTokens) {
    const int token = block_thread();
    const bool exists = token < to.keys;
    const bool counts = exists && (!to.key_mask || to.key_mask[token] != 0);
    const bool is_border = exists && token > 0 && in.segments &&
                           in.segments[first + token] != in.segments[first + token - 1];
    const std::uint32_t counted = __ballot_sync(0xffffffffu, counts);
    const std::uint32_t borders = __ballot_sync(0xffffffffu, is_border);
    if (block_lane() == 0) {
      to.counted[token / 32] = counted;
      to.borders[token / 32] = borders;
    }
  }
  __syncthreads();
  if (block_thread() < kTokens) {
    const int token = block_thread();
    const std::uint32_t upto = 0xffffffffu >> (31 - token % 32);
    to.run[token] = token < 32 ? __popc(to.borders[0] & upto)
                               : __popc(to.borders[0]) + __popc(to.borders[1] & upto);
  }
  if (block_thread() == 0) {
    to.head_end = kTokens;
    to.tail_begin = 0;
    to.firsts[0] = to.firsts[1] = 0;
    bool is_pending = true;
    for (int token = 0; token < kTokens; ++token) {
      if (to.is_border(token)) {
        if (to.head_end == kTokens) to.head_end = token;
        to.tail_begin = token;
        is_pending = true;
      }
      if (is_pending && to.counts(token)) {
        to.firsts[token / 32] |= 1u << token % 32;
        is_pending = false;
      }
    }
  }
  __syncthreads();
}

// e^x within 4 ulp where it is a normal number, else 0, in float; that of exp in double.
SUBQUAD_DEVICE float exponential(float x) {
  constexpr float kLow = 1.92596299e-8f;  // log2(e) less its nearest float
  const float high = x * kLog2E<float>;
  const float low = fma(x, kLog2E<float>, -high) + x * kLow;
  const float power = power_of_2(high);
  return power > 0 && power < infinity<float>() ? fma(power, low * kLn2<float>, power) : power;
}
SUBQUAD_DEVICE double exponential(double x) { return exp(x); }

// e^x, 0 for -inf alone: what weighs next to nothing is there, and a NaN that it meets stays.
template <class T>
SUBQUAD_DEVICE T weight_of(double x) {
  if (x == -infinity<double>()) return 0;
  const T weight = exponential(static_cast<T>(x));
  return weight < std::numeric_limits<T>::min() ? std::numeric_limits<T>::min() : weight;
}

// A logarithm after a decay, or two decays one after the other: -inf is nothing, or forgets
// everything, whatever the other is.
SUBQUAD_DEVICE double decayed(double logarithm, double decay) {
  if (decay == -infinity<double>() || logarithm == -infinity<double>()) return -infinity<double>();
  return logarithm + decay;
}

// NaN if either is.
SUBQUAD_DEVICE double larger(double a, double b) { return a > b || isnan(a) ? a : b; }

struct larger_of {
  SUBQUAD_DEVICE double operator()(double a, double b) const { return larger(a, b); }
};

// Combines values[row] over the lanes of a warp; each lane gets the result of row
// lane * kRows / kWarp.
template <int kRows, int kFlip = kWarp / 2, class T, int kSize, class Combine>
SUBQUAD_DEVICE T reduce_rows(T (&values)[kSize], Combine&& combine) {
  if constexpr (kRows > 1) {
    constexpr int kHalf = kRows / 2;
    const bool is_upper = block_lane() & kFlip;
    SUBQUAD_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const T kept = is_upper ? values[i + kHalf] : values[i];
      const T given = is_upper ? values[i] : values[i + kHalf];
      values[i] = combine(kept, __shfl_xor_sync(0xffffffffu, given, kFlip));
    }
    return reduce_rows<kHalf, kFlip / 2>(values, combine);
  } else if constexpr (kFlip > 0) {
    values[0] = combine(values[0], __shfl_xor_sync(0xffffffffu, values[0], kFlip));
    return reduce_rows<1, kFlip / 2>(values, combine);
  } else {
    return values[0];
  }
}

// Element (i, k) of an operand of a product is data[i * step + k * depth_step].
template <class T>
struct tile_operand {
  const T* data;
  int step;
  int depth_step;
};

// Products of 64 x 64 elements by a block, with sums in registers as tile_product has them.
template <class T>
using square_tile = tile_product<T, kTokens, kTokens, 4, 2>;
static_assert(square_tile<float>::kThreads == kAttentionThreads);

// sums(i, j) += sum_k a(i, k) b(j, k), within the bounds of tile_product.
template <class T>
SUBQUAD_DEVICE void add_product(typename square_tile<T>::accumulators& sums,
                                const tile_operand<T>& a, const tile_operand<T>& b, int depth) {
  using tile = square_tile<T>;
  using warp = warp_product<T>;
  const int row = block_lane() / 4;
  const int k_of_lane = block_lane() % 4;
  const T* rows = a.data + (tile::row(0) * a.step) + k_of_lane * a.depth_step;
  const T* columns =
      b.data + (tile::warp_across() * (kTokens / 2) + row) * b.step + k_of_lane * b.depth_step;
  SUBQUAD_NO_UNROLL
  for (int k = 0; k < depth; k += warp::kDepth) {
    typename warp::left left[tile::kTilesDown];
    SUBQUAD_UNROLL
    for (int i = 0; i < tile::kTilesDown; ++i) {
      const T* at = rows + i * warp::kRows * a.step + k * a.depth_step;
      if constexpr (warp::kIsSplit) {
        warp::split(at[0], left[i].high[0], left[i].low[0]);
        warp::split(at[8 * a.step], left[i].high[1], left[i].low[1]);
        warp::split(at[4 * a.depth_step], left[i].high[2], left[i].low[2]);
        warp::split(at[8 * a.step + 4 * a.depth_step], left[i].high[3], left[i].low[3]);
      } else {
        left[i] = at[0];
      }
    }
    SUBQUAD_UNROLL
    for (int j = 0; j < tile::kTilesAcross; ++j) {
      const T* at = columns + j * 8 * b.step + k * b.depth_step;
      typename warp::right right;
      if constexpr (warp::kIsSplit) {
        warp::split(at[0], right.high[0], right.low[0]);
        warp::split(at[4 * b.depth_step], right.high[1], right.low[1]);
      } else {
        right = at[0];
      }
      SUBQUAD_UNROLL
      for (int i = 0; i < tile::kTilesDown; ++i) {
        warp::multiply(sums.values[i][j], left[i], right);
      }
    }
  }
}

// The depth of a product over `left` elements, at most `most` of which are in the tile, and zeros
// after them: a multiple of what the tensor cores multiply at once.
SUBQUAD_DEVICE int product_depth(int left, int most) {
  return left < most ? (left + 7) / 8 * 8 : most;
}

// Calls body(r, c, row, column) for the thread's sums.
template <class T, class Body>
SUBQUAD_DEVICE void each_sum(Body&& body) {
  using tile = square_tile<T>;
  SUBQUAD_UNROLL
  for (int r = 0; r < tile::kThreadRows; ++r) {
    SUBQUAD_UNROLL
    for (int c = 0; c < tile::kThreadColumns; ++c) body(r, c, tile::row(r), tile::column(c));
  }
}

// Copies `rows` x 64 elements of a matrix from (0, column) on, less `center` where there is one,
// zeros where there are none or where `counts` says so.
template <int kRows, class T, class Counts>
SUBQUAD_DEVICE void stage_columns(T* to, int stride, const matrix_view<const T>& from, int rows,
                                  int column, int columns, const T* center, Counts&& counts) {
  const int across = column + block_thread() % kTokens;
  const bool exists = across < columns;
  const T middle = center && exists ? center[across] : T(0);
  SUBQUAD_UNROLL
  for (int each = 0; each < kRows * kTokens / kAttentionThreads; ++each) {
    const int row = block_thread() / kTokens + each * (kAttentionThreads / kTokens);
    T value = 0;
    if (exists && row < rows && counts(row)) value = from(row, across) - middle;
    to[row * stride + block_thread() % kTokens] = value;
  }
}

// Starts copies of the features from `first` on of 64 tokens, zeros where there are none, to rows
// of kStride elements.
template <int kFeatures, int kStride, class T>
SUBQUAD_DEVICE void stage_features(T* to, const matrix_view<const T>& from, int tokens, int first,
                                   int d_k) {
  stage_rows<T, kTokens, kFeatures, kStride, kAttentionThreads>(to, {from, tokens, d_k}, 0, first);
}
// Ends copies that were started; what all threads copied is there for all.
SUBQUAD_DEVICE void finish_copies() {
  commit_copies();
  wait_copies<0>();
  __syncthreads();
}

// Tokens and features as threads walk them: each thread one feature, and a group of tokens in
// order.
template <int kFeatures_>
struct feature_walk {
  static constexpr int kFeatures = kFeatures_;
  static constexpr int kGroups = kAttentionThreads / kFeatures;
  static constexpr int kRows = kTokens / kGroups;
  static constexpr int kWarpsOfRow = kFeatures / kWarp;

  static SUBQUAD_DEVICE int feature() { return block_thread() % kFeatures; }
  static SUBQUAD_DEVICE int group() { return block_thread() / kFeatures; }
  static SUBQUAD_DEVICE int row(int i) { return group() * kRows + i; }
  static SUBQUAD_DEVICE int warp_of_row() { return feature() / kWarp; }
  // The row whose result this lane has from reduce_rows, and whether it is the one to write it.
  static SUBQUAD_DEVICE int row_of_lane() { return row(block_lane() * kRows / kWarp); }
  static SUBQUAD_DEVICE bool is_writer() { return block_lane() % (kWarp / kRows) == 0; }

  using table = double[kGroups][kFeatures];

  // The sum of decays from the start of the run, or the chunk, to the last token before the
  // thread's group. All threads call it; `totals` is free after the next barrier.
  template <class T>
  static SUBQUAD_DEVICE double decay_before(const chunk_tokens<T>& tokens, int feature_index,
                                            int d_k, table& totals) {
    if (!tokens.log_decay) return 0;
    double sum = 0;
    for (int i = 0; i < kRows; ++i) {
      if (tokens.is_border(row(i))) sum = 0;
      sum = decayed(sum, decay_at(tokens, row(i), feature_index, d_k));
    }
    totals[group()][feature()] = sum;
    __syncthreads();
    double before = 0;
    for (int g = 0; g < group(); ++g) {
      if (tokens.has_border(g * kRows, kRows)) before = 0;
      before = decayed(before, totals[g][feature()]);
    }
    return before;
  }

  template <class T>
  static SUBQUAD_DEVICE double decay_at(const chunk_tokens<T>& tokens, int token, int feature_index,
                                        int d_k) {
    return tokens.log_decay && token < tokens.keys && feature_index < d_k
               ? static_cast<double>(tokens.log_decay(token, feature_index))
               : 0.0;
  }
};

// log_k of a key, -inf where it counts for nothing.
template <class T>
SUBQUAD_DEVICE double key_at(const chunk_tokens<T>& tokens, int token, int feature, int d_k) {
  return tokens.counts(token) && feature < d_k ? static_cast<double>(tokens.log_k(token, feature))
                                               : -infinity<double>();
}
template <class T>
SUBQUAD_DEVICE double query_at(const chunk_tokens<T>& tokens, int row, int feature, int d_k) {
  return row < tokens.rows && feature < d_k ? static_cast<double>(tokens.log_q(row, feature))
                                            : -infinity<double>();
}

// Whether, within the chunk, a row attends a key.
template <class T>
SUBQUAD_DEVICE bool attends(const chunk_tokens<T>& tokens, reach attended, int row, int key) {
  if (attended == reach::all) return false;
  return tokens.run[row] == tokens.run[key] && (attended == reach::run || key <= row);
}

// Features of pairs that threads see at once.
inline constexpr int kPairFeatures = 64;
inline constexpr int kPairLanes = kAttentionThreads / kTokens;  // threads that share a key

// Calls body(row, keys) for all rows of the chunk, in order and with all threads at once: `keys`
// are log_k of key thread / kPairLanes, decayed to the row, of the features
// first + thread % kPairLanes + i kPairLanes, -inf where the row does not attend them.
template <class T, class Body>
SUBQUAD_DEVICE void each_pair(const chunk_tokens<T>& tokens, reach attended, int d_k, int first,
                              Body&& body) {
  constexpr int kEach = kPairFeatures / kPairLanes;
  const int key = block_thread() / kPairLanes;
  const int feature = first + block_thread() % kPairLanes;
  double keys[kEach];
  SUBQUAD_UNROLL
  for (int i = 0; i < kEach; ++i) keys[i] = key_at(tokens, key, feature + i * kPairLanes, d_k);
  SUBQUAD_NO_UNROLL
  for (int row = 0; row < tokens.rows; ++row) {
    const bool is_attended = attends(tokens, attended, row, key);
    if (is_attended && row > key && tokens.log_decay) {
      SUBQUAD_UNROLL
      for (int i = 0; i < kEach; ++i) {
        const int f = feature + i * kPairLanes;
        if (f < d_k) keys[i] = decayed(keys[i], static_cast<double>(tokens.log_decay(row, f)));
      }
    }
    body(row, key, is_attended, feature, keys);
  }
}

// weights[row][key] += sum of exp(log_q + log_k - row_scale) over the features from `first` on, in
// plain arithmetic, for pairs of any range and any decay. All threads call it.
template <class T>
SUBQUAD_DEVICE void add_pair_weights(const chunk_tokens<T>& tokens, reach attended, int d_k,
                                     int first, const double* row_scale, T* weights) {
  constexpr int kEach = kPairFeatures / kPairLanes;
  each_pair(tokens, attended, d_k, first,
            [&](int row, int key, bool is_attended, int feature, const double (&keys)[kEach]) {
              T sum = 0;
              if (is_attended) {
                const double scale = row_scale[row];
                SUBQUAD_UNROLL
                for (int i = 0; i < kEach; ++i) {
                  const double logarithm =
                      decayed(query_at(tokens, row, feature + i * kPairLanes, d_k), keys[i]);
                  if (logarithm != -infinity<double>()) sum += weight_of<T>(logarithm - scale);
                }
              }
              sum += __shfl_xor_sync(0xffffffffu, sum, 1);
              sum += __shfl_xor_sync(0xffffffffu, sum, 2);
              if (block_lane() % kPairLanes == 0) weights[row * kRowStride + key] += sum;
            });
}

// The largest log_q + log_k of each row's pairs, over the features from `first` on, to
// maxima[warp][row]. All threads call it.
template <class T>
SUBQUAD_DEVICE void add_pair_maxima(const chunk_tokens<T>& tokens, reach attended, int d_k,
                                    int first, double (*maxima)[kTokens]) {
  constexpr int kEach = kPairFeatures / kPairLanes;
  each_pair(tokens, attended, d_k, first,
            [&](int row, int, bool is_attended, int feature, const double (&keys)[kEach]) {
              double largest = -infinity<double>();
              if (is_attended) {
                SUBQUAD_UNROLL
                for (int i = 0; i < kEach; ++i) {
                  largest = larger(
                      largest,
                      decayed(query_at(tokens, row, feature + i * kPairLanes, d_k), keys[i]));
                }
              }
              SUBQUAD_UNROLL
              for (int flip = kWarp / 2; flip > 0; flip /= 2) {
                largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, flip));
              }
              double& of_warp = maxima[block_thread() / kWarp][row];
              if (block_lane() == 0) of_warp = larger(of_warp, largest);
            });
}

// sums[i] += sum_k weights(row, k) elements(k, column), k < depth, in plain arithmetic, for the row
// thread / 64 * 16 + i and the column thread % 64. What has weight 0 counts for nothing, whatever
// it is.
inline constexpr int kPlainRows = kTokens / (kAttentionThreads / kTokens);
template <class T, class Weights, class Elements>
SUBQUAD_DEVICE void add_plain(T (&sums)[kPlainRows], int depth, Weights&& weights,
                              Elements&& elements) {
  const int first = block_thread() / kTokens * kPlainRows;
  SUBQUAD_NO_UNROLL
  for (int k = 0; k < depth; ++k) {
    const T element = elements(k, block_thread() % kTokens);
    SUBQUAD_UNROLL
    for (int i = 0; i < kPlainRows; ++i) {
      const T weight = weights(first + i, k);
      if (weight != T(0)) sums[i] = fma(weight, element, sums[i]);
    }
  }
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_ATTENTION_CHUNK_CUH

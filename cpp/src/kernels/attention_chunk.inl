// Pieces of linear attention over log-features that its forward and its reverse share.
//
// Tokens are worked on a chunk at a time, and a chunk in sub-chunks that begin_sub_chunk cuts. In a
// sub-chunk all logarithms of keys are taken against one scale per feature,
//   M'_r = max(M_r, max_j K'_jr),   K'_j = log_k_j - A_j,   A_t = sum of log_decay over the tokens
//   after the sub-chunk's first up to t
// where M is the scale of the sums over earlier keys, decayed to the first token. Then
//   K^_j = exp(K'_j - M')   and   Q^_t = exp(log_q_t + A_t + M' - c_t),  c_t the largest exponent,
// lie in [0, 1], up to rounding, and rows t of the sub-chunk weigh keys j <= t of it by
// <Q^_t, K^_j> e^{c_t}, earlier ones by <Q^_t, exp(M - M') ...> e^{c_t}. At the end M becomes
// M' + A_last.
//
// What the cuts guarantee: a feature of finite M' has a key of weight e^-T (kMaxRise) or more in
// every row of the sub-chunk, so that a row's sum is either e^-T at least or empty; log_decay is
// finite but at the first token; NaN, +inf and values that are not finite come at the first token
// only, so that a product with weights masked to 0 spreads nothing to rows before them. A chunk
// without any of that is one sub-chunk.
//
// Scales, and what is added to logarithms, are pairs high + low of T, the low part what rounding
// took. Arrays of features are padded (attention_padded) with keys of -inf, whose K^ are 0.
#ifndef SUBQUAD_KERNELS_ATTENTION_CHUNK_INL
#define SUBQUAD_KERNELS_ATTENTION_CHUNK_INL

#include "attention_kernels.hpp"
#include "log_sum_exp.inl"
#include "tile_product.inl"
#include "vector_math.inl"

namespace subquad {
namespace SUBQUAD_ISA {

namespace {

constexpr std::int64_t kChunk = kAttentionChunk;

// How far a feature's maximum may rise in a sub-chunk. e^-T is far from underflow, and what keys of
// that weight alone make of a row is as good as their exponents, which round at T / 2 units.
template <class T>
constexpr T kMaxRise = T(30);

// Rows of a register block: they divide the chunk and common sizes, and 16 (8) accumulators are as
// many as a fused multiply-add needs to hide its latency.
#if SUBQUAD_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kBlockRows = 8;
#else
constexpr int kBlockRows = 4;
#endif

#define SUBQUAD_UNROLL_BLOCK _Pragma("GCC unroll 8")

template <class T, int Vectors>
using block = vec<T>[kBlockRows][Vectors];

template <class T, int Vectors>
SUBQUAD_INLINE void block_zero(block<T, Vectors>& acc) {
  SUBQUAD_UNROLL_BLOCK
  for (int r = 0; r < kBlockRows; ++r) {
    SUBQUAD_UNROLL_VECTORS
    for (int v = 0; v < Vectors; ++v) acc[r][v] = vec<T>{};
  }
}

// acc[r][v] += sum_k left[k * left_stride + r] * right[k * right_stride + v * lanes + lane]
template <class T, int Vectors>
SUBQUAD_INLINE void block_product(std::int64_t depth, const T* left, std::int64_t left_stride,
                                  const T* right, std::int64_t right_stride,
                                  block<T, Vectors>& acc) {
  for (std::int64_t k = 0; k < depth; ++k) {
    vec<T> columns[Vectors];
    SUBQUAD_UNROLL_VECTORS
    for (int v = 0; v < Vectors; ++v) columns[v] = load(right + v * lanes<T>);
    SUBQUAD_UNROLL_BLOCK
    for (int r = 0; r < kBlockRows; ++r) {
      const vec<T> value = broadcast(left[r]);
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < Vectors; ++v) acc[r][v] += value * columns[v];
    }
    left += left_stride;
    right += right_stride;
  }
}

// Whether any lane of a comparison holds.
template <class T>
SUBQUAD_INLINE bool any(ivec<T> mask) {
  typename vector_of<T>::scalar_int found = 0;
  for (int i = 0; i < lanes<T>; ++i) found |= mask[i];
  return found != 0;
}

// e^t for t <= 80 (float), 600 (double), t a difference of logarithms: 1 ulp; 0 where the result
// would not be a normal number, -inf included; NaN for NaN and +inf; 1 for 0.
template <class T>
SUBQUAD_INLINE vec<T> exp_difference(vec<T> t) {
  using format = float_format<T>;
  constexpr T kBiasedRounder = kRounder<T> + static_cast<T>(format::kBias);
  constexpr T kZeroFrom = sizeof(T) == 4 ? T(-88.2) : T(-709.2);
  t = max<T>(broadcast(kZeroFrom), t);  // in this order NaN stays
  const vec<T> rounded = t * kLog2E<T> + kBiasedRounder;
  const vec<T> n = rounded - kBiasedRounder;
  vec<T> fraction;
  if constexpr (kFusedMultiplyAdd) {
    constexpr T kLog2ELow =
        sizeof(T) == 4 ? static_cast<T>(0x1.4ae0cp-26) : static_cast<T>(0x1.777d0ffda0d24p-56);
    fraction = t * kLog2ELow + (t * kLog2E<T> - n);
  } else {
    using constants = log2_constants<T>;
    fraction = ((t - n * constants::kLog2High) - n * constants::kLog2Low) * kLog2E<T>;
  }
  return exp2_fraction(fraction) * from_bits<T>(bits_of<T>(rounded) << format::kFractionBits);
}

template <class T>
SUBQUAD_INLINE vec<T> zero_if_nan(vec<T> x) {
  return x == x ? x : vec<T>{};
}

// a + b - sum for sum = a + b rounded; 0 where that has no value.
template <class T>
SUBQUAD_INLINE vec<T> sum_error(vec<T> a, vec<T> b, vec<T> sum) {
  const vec<T> b_in_sum = sum - a;
  return zero_if_nan<T>((a - (sum - b_in_sum)) + (b - b_in_sum));
}

template <class T>
struct two_float {
  vec<T> high;
  vec<T> low;
};

template <class T>
SUBQUAD_INLINE two_float<T> add(two_float<T> a, two_float<T> b) {
  const vec<T> sum = a.high + b.high;
  const vec<T> error = sum_error<T>(a.high, b.high, sum) + (a.low + b.low);
  const vec<T> high = sum + error;
  return {high, zero_if_nan<T>(error - (high - sum))};
}

template <class T>
SUBQUAD_INLINE two_float<T> load_pair(const attention_scale<T>& pair, std::int64_t i) {
  return {load(pair.high + i), load(pair.low + i)};
}

template <class T>
SUBQUAD_INLINE void store_pair(const attention_scale<T>& pair, std::int64_t i, two_float<T> value) {
  store<T>(pair.high + i, value.high);
  store<T>(pair.low + i, value.low);
}

// What a key counts as for the scale: NaN and +inf as the lowest number, so that a feature which
// they have reached is not taken for an empty one.
template <class T>
SUBQUAD_INLINE vec<T> as_maximum(vec<T> key) {
  return key < kInfinity<T> ? key : broadcast(kLowest<T>);
}

// ---- a chunk of tokens --------------------------------------------------------------------------

template <class T>
struct key_chunk {
  std::int64_t begin;          // in the sequence
  std::int64_t count;          // kChunk at most
  std::int64_t features;       // padded
  std::int64_t columns;        // padded
  bool plain;                  // no token but the first asks for a cut by itself
  T* keys;                     // [kChunk][features], -inf where removed or past d_k
  T* values;                   // [kChunk][columns], 0 where the key counts for nothing or past d_v
  T* decays;                   // [kChunk][features], 0 past d_k; null where there are none
  attention_scale<T> sums;     // A, [kChunk][features], of the current sub-chunk; with decays only
  attention_scale<T> decayed;  // K', the same
};

// Scratch in elements of T, every piece of it aligned to 64 bytes if the start is.
template <class T>
std::int64_t key_chunk_size(std::int64_t d_k, std::int64_t d_v) {
  return kChunk * (6 * attention_padded<T>(d_k) + attention_padded<T>(d_v));
}

template <class T>
T* place_key_chunk(T* scratch, const attention_tokens<T>& tokens, key_chunk<T>& chunk) {
  chunk.features = attention_padded<T>(tokens.d_k);
  chunk.columns = attention_padded<T>(tokens.d_v);
  const std::int64_t size = kChunk * chunk.features;
  chunk.keys = scratch;
  chunk.values = chunk.keys + size;
  chunk.decays = tokens.log_decay ? chunk.values + kChunk * chunk.columns : nullptr;
  T* const pairs = chunk.values + kChunk * chunk.columns + size;
  chunk.sums = {pairs, pairs + size};
  chunk.decayed = {pairs + 2 * size, pairs + 3 * size};
  return pairs + 4 * size;
}

template <class T>
SUBQUAD_INLINE void copy_row(const T* from, std::int64_t stride, std::int64_t count,
                             std::int64_t padded, T fill, T* to) {
  std::int64_t i = 0;
  if (stride == 1) {
    for (; i + lanes<T> <= count; i += lanes<T>) store<T>(to + i, load(from + i));
  }
  for (; i < count; ++i) to[i] = from[i * stride];
  for (; i < padded; ++i) to[i] = fill;
}

template <class T>
SUBQUAD_INLINE void fill_row(T* to, std::int64_t padded, T value) {
  for (std::int64_t i = 0; i < padded; ++i) to[i] = value;
}

// Whether no element is NaN or +inf.
template <class T>
SUBQUAD_INLINE bool below_infinity(const T* row, std::int64_t padded) {
  ivec<T> bad{};
  for (std::int64_t i = 0; i < padded; i += lanes<T>) {
    bad |= ~(ivec<T>)(load(row + i) < kInfinity<T>);
  }
  return !any<T>(bad);
}

template <class T>
SUBQUAD_INLINE bool finite(const T* row, std::int64_t padded) {
  ivec<T> bad{};
  for (std::int64_t i = 0; i < padded; i += lanes<T>) {
    const vec<T> x = load(row + i);
    bad |= ~(ivec<T>)(x - x == T(0));
  }
  return !any<T>(bad);
}

template <class T>
SUBQUAD_INLINE bool run_starts(const attention_tokens<T>& tokens, std::int64_t t) {
  return tokens.segments && t > 0 && tokens.segments[t] != tokens.segments[t - 1];
}

// Copies the tokens [begin, begin + count), count <= kChunk.
template <class T>
void load_chunk(const attention_tokens<T>& tokens, std::int64_t begin, std::int64_t count,
                key_chunk<T>& chunk) {
  const std::int64_t features = chunk.features;
  const std::int64_t columns = chunk.columns;
  chunk.begin = begin;
  chunk.count = count;
  for (std::int64_t j = 0; j < count; ++j) {
    const std::int64_t t = begin + j;
    T* const key = chunk.keys + j * features;
    T* const value = chunk.values + j * columns;
    if (tokens.key_mask && tokens.key_mask[t] == 0) {
      fill_row<T>(key, features, -kInfinity<T>);
      fill_row<T>(value, columns, T(0));
    } else {
      copy_row<T>(tokens.log_k.data + t * tokens.log_k.row_stride, tokens.log_k.column_stride,
                  tokens.d_k, features, -kInfinity<T>, key);
      copy_row<T>(tokens.v.data + t * tokens.v.row_stride, tokens.v.column_stride, tokens.d_v,
                  columns, T(0), value);
    }
    if (chunk.decays) {
      copy_row<T>(tokens.log_decay.data + t * tokens.log_decay.row_stride,
                  tokens.log_decay.column_stride, tokens.d_k, features, T(0),
                  chunk.decays + j * features);
    }
  }
  bool plain = true;
  if (!finite<T>(chunk.values, count * columns)) {
    for (std::int64_t j = 0; j < count; ++j) {
      if (finite<T>(chunk.values + j * columns, columns)) continue;
      ivec<T> counts{};
      for (std::int64_t i = 0; i < features; i += lanes<T>) {
        counts |= (ivec<T>)(load(chunk.keys + j * features + i) != -kInfinity<T>);
      }
      if (any<T>(counts)) {
        plain = false;
      } else {
        fill_row<T>(chunk.values + j * columns, columns, T(0));
      }
    }
  }
  plain = plain && below_infinity<T>(chunk.keys, count * features);
  if (chunk.decays) plain = plain && finite<T>(chunk.decays, count * features);
  for (std::int64_t j = 1; j < count && plain; ++j) plain = !run_starts(tokens, begin + j);
  chunk.plain = plain;
}

// ---- a sub-chunk --------------------------------------------------------------------------------

template <class T>
struct sub_chunk {
  std::int64_t first;  // in the chunk
  std::int64_t count;
  bool fresh;                 // a run starts here: what came before is dropped
  attention_scale<T> before;  // M decayed to the first token; -inf where empty
  attention_scale<T> top;     // M'
  attention_scale<T> keys;    // K', [count][features]; low is null without decays
  attention_scale<T> sums;    // A, [count][features]; null without decays
};

template <class T>
std::int64_t sub_chunk_size(std::int64_t d_k) {
  return 4 * attention_padded<T>(d_k);
}

template <class T>
T* place_sub_chunk(T* scratch, std::int64_t d_k, sub_chunk<T>& sub) {
  const std::int64_t features = attention_padded<T>(d_k);
  sub.before = {scratch, scratch + features};
  sub.top = {scratch + 2 * features, scratch + 3 * features};
  return scratch + 4 * features;
}

// M decayed by one token of a run; -inf, whatever it was, where that forgets the feature, and
// everywhere where the run is fresh. `to` may be `scale`.
template <class T>
void decay_scale(const attention_scale<T>& scale, const T* decay, bool fresh, std::int64_t features,
                 const attention_scale<T>& to) {
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    two_float<T> value = load_pair(scale, i);
    if (decay) {
      const vec<T> by = load(decay + i);
      value = add<T>(value, {by, vec<T>{}});
      value.high = by == -kInfinity<T> ? by : value.high;
    }
    if (fresh) value = {broadcast(-kInfinity<T>), vec<T>{}};
    store_pair<T>(to, i, value);
  }
}

// Cuts the sub-chunk that starts at token `first` of a loaded chunk, from the scale of what came
// before. Sets everything in `sub`; what it points to stays valid until the next call.
template <class T>
void begin_sub_chunk(const attention_tokens<T>& tokens, const key_chunk<T>& chunk,
                     std::int64_t first, const attention_scale<T>& scale, sub_chunk<T>& sub) {
  const std::int64_t features = chunk.features;
  const std::int64_t columns = chunk.columns;
  const T* const decays = chunk.decays ? chunk.decays + first * features : nullptr;
  std::int64_t count = chunk.count - first;
  sub.first = first;
  sub.fresh = run_starts(tokens, chunk.begin + first);
  decay_scale<T>(scale, decays, sub.fresh, features, sub.before);
  if (!chunk.plain) {
    std::int64_t r = 1;
    while (r < count && !run_starts(tokens, chunk.begin + first + r) &&
           below_infinity<T>(chunk.keys + (first + r) * features, features) &&
           finite<T>(chunk.values + (first + r) * columns, columns) &&
           (!decays || finite<T>(decays + r * features, features))) {
      ++r;
    }
    count = r;
  }
  if (decays) {
    for (std::int64_t i = 0; i < features; i += lanes<T>) {
      two_float<T> sum{};
      for (std::int64_t r = 0; r < count; ++r) {
        if (r > 0) sum = add<T>(sum, {load(decays + r * features + i), vec<T>{}});
        const two_float<T> key{load(chunk.keys + (first + r) * features + i), vec<T>{}};
        store_pair<T>(chunk.sums, r * features + i, sum);
        store_pair<T>(chunk.decayed, r * features + i, add<T>(key, {-sum.high, -sum.low}));
      }
    }
    sub.sums = chunk.sums;
    sub.keys = chunk.decayed;
  } else {
    sub.sums = {nullptr, nullptr};
    sub.keys = {chunk.keys + first * features, nullptr};
  }
  const auto start = [&](std::int64_t i) {
    return max<T>(load(sub.before.high + i), as_maximum<T>(load(sub.keys.high + i)));
  };
  ivec<T> rises{};
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    vec<T> top = start(i);
    const vec<T> limit = top;
    for (std::int64_t r = 1; r < count; ++r) {
      top = max<T>(load(sub.keys.high + r * features + i), top);
    }
    rises |= (ivec<T>)(top - limit > kMaxRise<T>);
    store<T>(sub.top.high + i, top);
  }
  if (any<T>(rises)) {
    for (std::int64_t i = 0; i < features; i += lanes<T>) store<T>(sub.top.high + i, start(i));
    std::int64_t r = 1;
    for (; r < count; ++r) {
      ivec<T> rises_here{};
      for (std::int64_t i = 0; i < features; i += lanes<T>) {
        const vec<T> rise = load(sub.keys.high + r * features + i) - start(i);
        rises_here |= (ivec<T>)(rise > kMaxRise<T>);
      }
      if (any<T>(rises_here)) break;
      for (std::int64_t i = 0; i < features; i += lanes<T>) {
        store<T>(sub.top.high + i,
                 max<T>(load(sub.keys.high + r * features + i), load(sub.top.high + i)));
      }
    }
    count = r;
  }
  sub.count = count;
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    const two_float<T> before = load_pair(sub.before, i);
    store<T>(sub.top.low + i, load(sub.top.high + i) == before.high ? before.low : vec<T>{});
  }
}

// base + A at the last token of the sub-chunk: of M' it makes the next M. `to` may be `base`.
template <class T>
void decay_to_last(const sub_chunk<T>& sub, const attention_scale<T>& base, std::int64_t features,
                   const attention_scale<T>& to) {
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    two_float<T> value = load_pair(base, i);
    if (sub.sums.high) value = add<T>(value, load_pair(sub.sums, (sub.count - 1) * features + i));
    store_pair<T>(to, i, value);
  }
}

// exp(from - to), below 0 (and not to be multiplied with: the sums are dropped) where `from` is
// empty; 1 exactly where they are equal.
template <class T>
void scale_factors(const attention_scale<T>& from, const attention_scale<T>& to,
                   std::int64_t features, T* factors) {
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    const two_float<T> a = load_pair(from, i);
    const two_float<T> b = load_pair(to, i);
    const vec<T> factor = exp_difference<T>((a.high - b.high) + (a.low - b.low));
    store<T>(factors + i, a.high == -kInfinity<T> ? broadcast(T(-1)) : factor);
  }
}

// K^ in rows of keys, [count][features], and where not null in rows of features, [d_k][kChunk], of
// which columns past `count` hold anything. 0 where M' is -inf.
template <class T>
void key_exponentials(const sub_chunk<T>& sub, std::int64_t d_k, T* rows, T* columns) {
  const std::int64_t features = attention_padded<T>(d_k);
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    const two_float<T> top = load_pair(sub.top, i);
    const vec<T> high = top.high == -kInfinity<T> ? vec<T>{} : top.high;
    for (std::int64_t r = 0; r < sub.count; ++r) {
      vec<T> t = (load(sub.keys.high + r * features + i) - high) - top.low;
      if (sub.keys.low) t += load(sub.keys.low + r * features + i);
      store<T>(rows + r * features + i, exp_difference<T>(t));
    }
  }
  if (columns) {
    pack_rows<kChunk, T>({rows, features, 1}, kChunk, d_k, columns);
  }
}

// Queries of a chunk in rows of features, [d_k][kChunk]; low is null without decays.
//
// Without decays: those of `count` <= kChunk rows.
template <class T>
void load_queries(matrix_view<const T> log_q, std::int64_t count, std::int64_t d_k, T* high) {
  pack_rows<kChunk, T>(log_q, count, d_k, high);
}

// With decays: log_q + A of the sub-chunk's rows, which start at log_q. `rows` is scratch for
// 2 kChunk padded features.
template <class T>
void load_decayed_queries(const sub_chunk<T>& sub, matrix_view<const T> log_q, std::int64_t d_k,
                          T* rows, const attention_scale<T>& to) {
  const std::int64_t features = attention_padded<T>(d_k);
  const attention_scale<T> sum = {rows, rows + kChunk * features};
  for (std::int64_t r = 0; r < sub.count; ++r) {
    copy_row<T>(log_q.data + r * log_q.row_stride, log_q.column_stride, d_k, features, T(0),
                sum.high + r * features);
    for (std::int64_t i = r * features; i < (r + 1) * features; i += lanes<T>) {
      store_pair<T>(sum, i, add<T>({load(sum.high + i), vec<T>{}}, load_pair(sub.sums, i)));
    }
  }
  pack_rows<kChunk, T>({sum.high, features, 1}, sub.count, d_k, to.high);
  pack_rows<kChunk, T>({sum.low, features, 1}, sub.count, d_k, to.low);
}

// Q^ and c of `count` rows against the scale `top`. `queries` points to the first row's column in
// rows of features of kChunk elements (low null: 0) and may be read one vector past a row's end;
// `to` has rows of kChunk, of which columns past `count` hold anything. c is finite where any
// exponent is, and -inf, with every Q^ of the row 0, where none is above -inf.
template <class T>
void query_exponentials(const attention_scale<T>& queries, std::int64_t count, std::int64_t d_k,
                        const attention_scale<T>& top, T* to, T* c) {
  for (std::int64_t t = 0; t < count; t += lanes<T>) {
    vec<T> largest = broadcast(-kInfinity<T>);
    for (std::int64_t k = 0; k < d_k; ++k) {
      largest = max<T>(load(queries.high + k * kChunk + t) + top.high[k], largest);
    }
    store<T>(c + t, largest);
    largest = largest == -kInfinity<T> ? vec<T>{} : largest;
    for (std::int64_t k = 0; k < d_k; ++k) {
      const vec<T> query = load(queries.high + k * kChunk + t);
      const vec<T> scale = broadcast(top.high[k]);
      const vec<T> sum = query + scale;
      vec<T> low = sum_error<T>(query, scale, sum) + top.low[k];
      if (queries.low) low += load(queries.low + k * kChunk + t);
      store<T>(to + k * kChunk + t, exp_difference<T>((sum - largest) + low));
    }
  }
}

// The sums over earlier keys in the scale M': to = factor * sums, rows of padded values; a factor
// below 0 drops the feature. A second pair, where given, is added to it.
template <class T>
void rescale_sums(const T* sums, const T* factor, const T* more_sums, const T* more_factor,
                  std::int64_t d_k, std::int64_t d_v, T* to) {
  const std::int64_t features = attention_padded<T>(d_k);
  const std::int64_t columns = attention_padded<T>(d_v);
  const auto scaled = [](const T* from, vec<T> by, std::int64_t i) {
    return by < T(0) ? vec<T>{} : by * load(from + i);
  };
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    vec<T> sum = scaled(sums, load(factor + i), i);
    if (more_sums) sum += scaled(more_sums, load(more_factor + i), i);
    store<T>(to + i, sum);
  }
  for (std::int64_t k = 0; k < d_k; ++k) {
    const std::int64_t row = features + k * columns;
    const T a = factor[k];
    const T b = more_sums ? more_factor[k] : T(-1);
    if (a < T(0) && b < T(0)) {
      for (std::int64_t i = row; i < row + columns; i += lanes<T>) store<T>(to + i, vec<T>{});
    } else if (b < T(0)) {
      for (std::int64_t i = row; i < row + columns; i += lanes<T>) {
        store<T>(to + i, a * load(sums + i));
      }
    } else if (a < T(0)) {
      for (std::int64_t i = row; i < row + columns; i += lanes<T>) {
        store<T>(to + i, b * load(more_sums + i));
      }
    } else {
      for (std::int64_t i = row; i < row + columns; i += lanes<T>) {
        store<T>(to + i, a * load(sums + i) + b * load(more_sums + i));
      }
    }
  }
}

template <class T, int Vectors>
SUBQUAD_INLINE void add_key_columns(const T* keys, const T* values, std::int64_t count,
                                    const T* factor, std::int64_t d_k, std::int64_t key_stride,
                                    std::int64_t stride, T* sums) {
  for (std::int64_t k = 0; k < d_k; k += kBlockRows) {
    block<T, Vectors> acc;
    block_zero<T, Vectors>(acc);
    block_product<T, Vectors>(count, keys + k, key_stride, values, stride, acc);
    SUBQUAD_UNROLL_BLOCK
    for (int r = 0; r < kBlockRows; ++r) {
      T* const row = sums + (k + r) * stride;
      const T by = factor[k + r];
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < Vectors; ++v) {
        const vec<T> held = by < T(0) ? vec<T>{} : by * load(row + v * lanes<T>);
        store<T>(row + v * lanes<T>, held + acc[r][v]);
      }
    }
  }
}

// sums = factor * sums + (sum_j K^_j, sum_j K^_j v_j) over the sub-chunk, in T: keys in rows of
// padded features, values in rows of padded values; a factor below 0 drops the feature.
template <class T>
void add_keys(const T* keys, const T* values, std::int64_t count, const T* factor, std::int64_t d_k,
              std::int64_t d_v, T* sums) {
  const std::int64_t features = attention_padded<T>(d_k);
  const std::int64_t columns = attention_padded<T>(d_v);
  for (std::int64_t i = 0; i < features; i += lanes<T>) {
    vec<T> sum{};
    for (std::int64_t j = 0; j < count; ++j) sum += load(keys + j * features + i);
    const vec<T> by = load(factor + i);
    store<T>(sums + i, by < T(0) ? sum : by * load(sums + i) + sum);
  }
  for (std::int64_t v = 0; v < d_v; v += kTileColumns<T>) {
    if (d_v - v > lanes<T>) {
      add_key_columns<T, 2>(keys, values + v, count, factor, d_k, features, columns,
                            sums + features + v);
    } else {
      add_key_columns<T, 1>(keys, values + v, count, factor, d_k, features, columns,
                            sums + features + v);
    }
  }
}

// One register block of weights: rows of keys from j, Vectors vectors of queries from t.
template <class T, int Vectors>
SUBQUAD_INLINE void weight_block(const T* queries, const T* keys, std::int64_t d_k, std::int64_t j,
                                 std::int64_t t, T* weights, vec<T>* sums) {
  block<T, Vectors> acc;
  block_zero<T, Vectors>(acc);
  block_product<T, Vectors>(d_k, keys + j, kChunk, queries + t, kChunk, acc);
  ivec<T> lane;
  for (int i = 0; i < lanes<T>; ++i) lane[i] = static_cast<typename vector_of<T>::scalar_int>(i);
  SUBQUAD_UNROLL_BLOCK
  for (int r = 0; r < kBlockRows; ++r) {
    SUBQUAD_UNROLL_VECTORS
    for (int v = 0; v < Vectors; ++v) {
      const auto past = static_cast<typename vector_of<T>::scalar_int>(j + r - t - v * lanes<T>);
      const vec<T> weight = lane < past ? vec<T>{} : acc[r][v];
      store<T>(weights + (j + r) * kChunk + t + v * lanes<T>, weight);
      sums[v] += weight;
    }
  }
}

// Weights of the keys of a sub-chunk in its rows, keys in rows and queries in columns,
//   weights[j][t] = <Q^_t, K^_j> for j <= t, 0 above,   [kChunk][kChunk],
// and den[t] = <Q^_t, z> + sum_j weights[j][t]. Q^ and K^ in rows of features; z not looked at
// where null. Weights of key j are written from the register block of query j on, and columns past
// `count` hold anything.
template <class T>
void weigh_keys(const T* queries, const T* keys, const T* z, std::int64_t count, std::int64_t d_k,
                T* weights, T* den) {
  for (std::int64_t t = 0; t < count; t += kTileColumns<T>) {
    vec<T> sums[kTileVectors] = {};
    for (std::int64_t k = 0; z && k < d_k; ++k) {
      const vec<T> by = broadcast(z[k]);
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kTileVectors; ++v) {
        sums[v] += by * load(queries + k * kChunk + t + v * lanes<T>);
      }
    }
    const bool second = t + lanes<T> < count;
    for (std::int64_t j = 0; j < count && j < t + kTileColumns<T>; j += kBlockRows) {
      if (j >= t + lanes<T>) {
        weight_block<T, 1>(queries, keys, d_k, j, t + lanes<T>, weights, sums + 1);
      } else if (second) {
        weight_block<T, 2>(queries, keys, d_k, j, t, weights, sums);
      } else {
        weight_block<T, 1>(queries, keys, d_k, j, t, weights, sums);
      }
    }
    SUBQUAD_UNROLL_VECTORS
    for (int v = 0; v < kTileVectors; ++v) store<T>(den + t + v * lanes<T>, sums[v]);
  }
}

}  // namespace
}  // namespace SUBQUAD_ISA
}  // namespace subquad

#endif  // SUBQUAD_KERNELS_ATTENTION_CHUNK_INL

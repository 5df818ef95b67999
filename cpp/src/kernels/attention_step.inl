#include "attention_step_kernels.hpp"
#include "tile_product.inl"
#include "vector_math.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// How far a key may rise above the scale before the sums take it on.
template <class T>
constexpr double kMostRise = sizeof(T) == 4 ? 30 : 300;

template <class T>
SUBQUAD_INLINE std::int64_t padded(std::int64_t length) {
  return divide_up(length, lanes<T>) * lanes<T>;
}

template <class T>
std::size_t step_scratch(std::int64_t d_k, std::int64_t d_v) {
  return static_cast<std::size_t>(4 * padded<T>(d_k) + padded<T>(d_v)) * sizeof(T);
}

template <class T>
SUBQUAD_INLINE bool is_lowest(T x) {
  return x == -static_cast<T>(__builtin_inf());
}

// values[i] = e^values[i] up to a whole vector: at most 1 ulp.
template <class T>
SUBQUAD_INLINE void exponentials(T* values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; i += lanes<T>) store(values + i, exp<T>(load(values + i)));
}

// As many elements as a vector of doubles holds.
template <class T>
struct narrow_vector {
  typedef T type
      __attribute__((vector_size(sizeof(T) * lanes<double>), aligned(alignof(T)), may_alias));
};

template <class T>
SUBQUAD_INLINE vec<double> load_double(const T* p) {
  return __builtin_convertvector(*reinterpret_cast<const typename narrow_vector<T>::type*>(p),
                                 vec<double>);
}

template <class T>
SUBQUAD_INLINE void store_double(T* p, vec<double> v) {
  *reinterpret_cast<typename narrow_vector<T>::type*>(p) =
      __builtin_convertvector(v, typename narrow_vector<T>::type);
}

template <class T>
SUBQUAD_INLINE void copy_padded(vector_view<const T> from, std::int64_t count, T fill, T* to) {
  if (from.stride == 1) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = from.data[i];
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
  for (std::int64_t i = count; i < padded<T>(count); ++i) to[i] = fill;
}

// (value, rest) takes on `more`; what rounding takes from the sum goes to rest.
template <class V>
SUBQUAD_INLINE void add_compensated(V& value, V& rest, V more) {
  const V addend = more + rest;
  const V sum = value + addend;
  const V back = sum - value;
  const V error = (value - (sum - back)) + (addend - back);
  rest = sum - sum == V{} ? error : V{};
  value = sum;
}

// (value, rest) times a factor.
SUBQUAD_INLINE void scale_compensated(float& value, float& rest, double factor) {
  const double whole = (static_cast<double>(value) + static_cast<double>(rest)) * factor;
  value = static_cast<float>(whole);
  rest = value - value == 0 ? static_cast<float>(whole - static_cast<double>(value)) : 0.0F;
}
SUBQUAD_INLINE void scale_compensated(double& value, double& rest, double factor) {
  value *= factor;
  rest *= factor;
}

template <class T>
struct step_state {
  T* scale;
  T* scale_rest;
  T* sum;
  T* sum_rest;
  T* decay;
  T* values;
  T* values_rest;

  SUBQUAD_ALWAYS_INLINE static step_state of(const attention_step_task<T>& task) {
    T* keys = task.key_sums;
    const std::int64_t d_k = task.d_k;
    return {keys,
            keys + d_k,
            keys + 2 * d_k,
            keys + 3 * d_k,
            keys + 4 * d_k,
            task.value_sums,
            task.value_sums + d_k * task.d_v};
  }
  SUBQUAD_ALWAYS_INLINE double whole_scale(std::int64_t r) const {
    return static_cast<double>(scale[r]) + static_cast<double>(scale_rest[r]);
  }
};

// kRows rows of S in kVectors vectors of columns take on the recent tokens.
template <int kRows, int kVectors, class T>
SUBQUAD_INLINE void fold_tile(const attention_step_task<T>& task, const step_state<T>& state,
                              std::int64_t count, std::int64_t r, std::int64_t c) {
  const std::int64_t d_k = task.d_k;
  const std::int64_t d_v = task.d_v;
  vec<T> sums[kRows][kVectors] = {};
  const T* keys = task.recent_keys + r;
  const T* values = task.recent_values + c;
  for (std::int64_t j = 0; j < count; ++j, keys += d_k, values += d_v) {
    vec<T> value[kVectors];
    SUBQUAD_UNROLL_VECTORS
    for (int i = 0; i < kVectors; ++i) value[i] = load(values + i * lanes<T>);
    SUBQUAD_UNROLL_ROWS
    for (int row = 0; row < kRows; ++row) {
      const vec<T> key = broadcast(keys[row]);
      SUBQUAD_UNROLL_VECTORS
      for (int i = 0; i < kVectors; ++i) sums[row][i] += key * value[i];
    }
  }
  SUBQUAD_UNROLL_ROWS
  for (int row = 0; row < kRows; ++row) {
    SUBQUAD_UNROLL_VECTORS
    for (int i = 0; i < kVectors; ++i) {
      const std::int64_t at = (r + row) * d_v + c + i * lanes<T>;
      vec<T> value = load(state.values + at);
      vec<T> rest = load(state.values_rest + at);
      add_compensated(value, rest, sums[row][i]);
      store(state.values + at, value);
      store(state.values_rest + at, rest);
    }
  }
}

// The same in all columns.
template <int kRows, class T>
SUBQUAD_INLINE void fold_rows(const attention_step_task<T>& task, const step_state<T>& state,
                              std::int64_t count, std::int64_t r) {
  const std::int64_t d_v = task.d_v;
  std::int64_t c = 0;
  for (; c + 2 * lanes<T> <= d_v; c += 2 * lanes<T>) fold_tile<kRows, 2>(task, state, count, r, c);
  for (; c + lanes<T> <= d_v; c += lanes<T>) fold_tile<kRows, 1>(task, state, count, r, c);
  for (; c < d_v; ++c) {
    for (int row = 0; row < kRows; ++row) {
      T sum = 0;
      for (std::int64_t j = 0; j < count; ++j) {
        sum += task.recent_keys[j * task.d_k + r + row] * task.recent_values[j * d_v + c];
      }
      const std::int64_t at = (r + row) * d_v + c;
      add_compensated(state.values[at], state.values_rest[at], sum);
    }
  }
}

// The recent tokens go into the sums.
template <class T>
void fold(const attention_step_task<T>& task, const step_state<T>& state) {
  const std::int64_t d_k = task.d_k;
  const std::int64_t count = *task.recent_count;
  std::int64_t first = 0;
  for (; first + lanes<T> <= d_k; first += lanes<T>) {
    vec<T> sums = {};
    for (std::int64_t j = 0; j < count; ++j) sums += load(task.recent_keys + j * d_k + first);
    vec<T> value = load(state.sum + first);
    vec<T> rest = load(state.sum_rest + first);
    add_compensated(value, rest, sums);
    store(state.sum + first, value);
    store(state.sum_rest + first, rest);
  }
  for (; first < d_k; ++first) {
    T sum = 0;
    for (std::int64_t j = 0; j < count; ++j) sum += task.recent_keys[j * d_k + first];
    add_compensated(state.sum[first], state.sum_rest[first], sum);
  }
  constexpr int kRows = kTileRows == 12 ? 8 : 4;
  std::int64_t r = 0;
  for (; r + kRows <= d_k; r += kRows) fold_rows<kRows>(task, state, count, r);
  for (; r < d_k; ++r) fold_rows<1>(task, state, count, r);
  *task.recent_count = 0;
}

// Feature r to the scale of a key; what lies there already may be nothing.
template <class T>
void raise(const attention_step_task<T>& task, const step_state<T>& state, std::int64_t r,
           T log_k) {
  const double difference = state.whole_scale(r) - static_cast<double>(log_k);
  const double factor = is_lowest(state.scale[r]) ? 0.0 : exp<double>(broadcast(difference))[0];
  state.scale[r] = log_k;
  state.scale_rest[r] = 0;
  scale_compensated(state.sum[r], state.sum_rest[r], factor);
  for (std::int64_t c = r * task.d_v; c < (r + 1) * task.d_v; ++c) {
    scale_compensated(state.values[c], state.values_rest[c], factor);
  }
}

template <class T>
void forget(const attention_step_task<T>& task, const step_state<T>& state, std::int64_t r) {
  state.scale[r] = -static_cast<T>(__builtin_inf());
  state.scale_rest[r] = 0;
  state.sum[r] = 0;
  state.sum_rest[r] = 0;
  for (std::int64_t c = r * task.d_v; c < (r + 1) * task.d_v; ++c) {
    state.values[c] = 0;
    state.values_rest[c] = 0;
  }
  for (std::int64_t j = 0; j < *task.recent_count; ++j) task.recent_keys[j * task.d_k + r] = 0;
}

template <class T>
SUBQUAD_INLINE void decay(const attention_step_task<T>& task, const step_state<T>& state) {
  for (std::int64_t r = 0; r < task.d_k; ++r) {
    const T by = task.log_decay[r];
    state.decay[r] += by;
    if (is_lowest(by)) {
      forget(task, state, r);
    } else if (!is_lowest(state.scale[r])) {
      const double scale = state.whole_scale(r) + static_cast<double>(by);
      state.scale[r] = static_cast<T>(scale);
      state.scale_rest[r] = static_cast<T>(scale - static_cast<double>(state.scale[r]));
    }
  }
}

// What a step works on, padded to whole vectors: features past d_k are empty.
template <class T>
struct step_scratch_rows {
  T* key;
  T* query;
  T* scale;
  T* scale_rest;
  T* sums;
};

// The token's key in the scale of the state, which is raised where the key stands too high.
template <class T>
SUBQUAD_INLINE void append(const attention_step_task<T>& task, const step_state<T>& state,
                           const step_scratch_rows<T>& rows) {
  constexpr double kInfinity = __builtin_inf();
  const std::int64_t d_k = task.d_k;
  ivec<double> counts = {};
  ivec<double> rises = {};
  for (std::int64_t r = 0; r < d_k; r += lanes<double>) {
    const vec<double> key = load_double(rows.key + r);
    const vec<double> rise = (key - load_double(rows.scale + r)) - load_double(rows.scale_rest + r);
    const ivec<double> is_present = key != broadcast(-kInfinity);
    counts |= is_present;
    rises |= is_present & (rise > broadcast(kMostRise<T>));
    store_double(rows.key + r, is_present ? rise : key);
  }
  bool is_removed = true;
  bool rises_at_all = false;
  for (int i = 0; i < lanes<double>; ++i) {
    is_removed = is_removed && counts[i] == 0;
    rises_at_all = rises_at_all || rises[i] != 0;
  }
  if (is_removed) return;
  if (rises_at_all || *task.recent_count >= task.room) fold(task, state);
  if (rises_at_all) {
    for (std::int64_t r = 0; r < d_k; ++r) {
      if (rows.key[r] > static_cast<T>(kMostRise<T>)) {
        raise(task, state, r, task.log_k[r]);
        rows.key[r] = task.log_k[r] - task.log_k[r];
        rows.scale[r] = state.scale[r];
        rows.scale_rest[r] = 0;
      }
    }
  }
  exponentials(rows.key, d_k);
  T* keys = task.recent_keys + *task.recent_count * d_k;
  T* values = task.recent_values + *task.recent_count * task.d_v;
  for (std::int64_t r = 0; r < d_k; ++r) keys[r] = rows.key[r];
  if (task.v.stride == 1) {
    for (std::int64_t c = 0; c < task.d_v; ++c) values[c] = task.v.data[c];
  } else {
    for (std::int64_t c = 0; c < task.d_v; ++c) values[c] = task.v[c];
  }
  ++*task.recent_count;
}

// to[c] += sum_r weights[r] rows(r, c), in the columns [column, column + kVectors lanes).
template <int kVectors, class T>
SUBQUAD_INLINE void add_rows(const T* weights, const T* rows, std::int64_t count, std::int64_t d_v,
                             T* to) {
  vec<T> even[kVectors];
  vec<T> odd[kVectors] = {};
  for (int i = 0; i < kVectors; ++i) even[i] = load(to + i * lanes<T>);
  std::int64_t r = 0;
  for (; r + 2 <= count; r += 2, rows += 2 * d_v) {
    for (int i = 0; i < kVectors; ++i) {
      even[i] += broadcast(weights[r]) * load(rows + i * lanes<T>);
      odd[i] += broadcast(weights[r + 1]) * load(rows + d_v + i * lanes<T>);
    }
  }
  if (r < count) {
    for (int i = 0; i < kVectors; ++i) {
      even[i] += broadcast(weights[r]) * load(rows + i * lanes<T>);
    }
  }
  for (int i = 0; i < kVectors; ++i) store(to + i * lanes<T>, even[i] + odd[i]);
}

template <class T>
SUBQUAD_INLINE void add_all_rows(const T* weights, const T* rows, std::int64_t count,
                                 std::int64_t d_v, T* to) {
  constexpr int kVectors = 4;
  std::int64_t c = 0;
  for (; c + kVectors * lanes<T> <= d_v; c += kVectors * lanes<T>) {
    add_rows<kVectors>(weights, rows + c, count, d_v, to + c);
  }
  for (; c + lanes<T> <= d_v; c += lanes<T>) add_rows<1>(weights, rows + c, count, d_v, to + c);
  for (; c < d_v; ++c) {
    T sum = to[c];
    for (std::int64_t r = 0; r < count; ++r) sum += weights[r] * rows[r * d_v + c];
    to[c] = sum;
  }
}

// The sum over the lanes, halves added to halves. The indices come from memory: as constants the
// compiler would make them lane by lane, anew for each sum.
template <class T>
constexpr typename vector_of<T>::scalar_int kIndices[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                            8, 9, 10, 11, 12, 13, 14, 15};

template <class T>
SUBQUAD_INLINE T sum_of_lanes(vec<T> v) {
  ivec<T> indices;
  __builtin_memcpy(&indices, kIndices<T>, sizeof(indices));
  for (typename vector_of<T>::scalar_int step = lanes<T> / 2; step > 0; step /= 2) {
    v += __builtin_shuffle(v, indices ^ step);
  }
  return v[0];
}

template <class T>
SUBQUAD_INLINE T dot(const T* a, const T* b, std::int64_t count) {
  vec<T> sums = {};
  std::int64_t r = 0;
  for (; r + lanes<T> <= count; r += lanes<T>) sums += load(a + r) * load(b + r);
  T sum = sum_of_lanes<T>(sums);
  for (; r < count; ++r) sum += a[r] * b[r];
  return sum;
}

template <class T>
SUBQUAD_INLINE void read(const attention_step_task<T>& task, const step_state<T>& state,
                         const step_scratch_rows<T>& rows) {
  constexpr double kInfinity = __builtin_inf();
  const std::int64_t d_k = task.d_k;
  const std::int64_t d_v = task.d_v;
  T* weights = rows.query;
  T* sums = rows.sums;
  // NaN is not below anything, and stays.
  vec<double> largest_in_lane = broadcast(-kInfinity);
  for (std::int64_t r = 0; r < d_k; r += lanes<double>) {
    const vec<double> query = load_double(weights + r);
    const vec<double> scale = load_double(rows.scale + r);
    const ivec<double> is_empty =
        (scale == broadcast(-kInfinity)) | (query == broadcast(-kInfinity));
    const vec<double> sum = query + scale;
    largest_in_lane = (is_empty | (sum <= largest_in_lane)) ? largest_in_lane : sum;
  }
  double largest = -kInfinity;
  for (int i = 0; i < lanes<double>; ++i) {
    largest = largest_in_lane[i] <= largest ? largest : largest_in_lane[i];
  }
  *task.scale = largest;
  *task.denominator = 0;
  if (largest == -kInfinity) return;
  for (std::int64_t r = 0; r < d_k; r += lanes<double>) {
    const vec<double> query = load_double(weights + r);
    const vec<double> scale = load_double(rows.scale + r);
    const ivec<double> is_empty =
        (scale == broadcast(-kInfinity)) | (query == broadcast(-kInfinity));
    // The sum and what rounding takes from it: float64 logarithms may be large as well.
    const vec<double> sum = query + scale;
    const vec<double> back = sum - query;
    const vec<double> error = (query - (sum - back)) + (scale - back);
    const vec<double> shifted =
        (sum - broadcast(largest)) + (error + load_double(rows.scale_rest + r));
    store_double(weights + r, is_empty ? broadcast(-kInfinity) : shifted);
  }
  exponentials(weights, d_k);
  for (std::int64_t c = 0; c < d_v; ++c) sums[c] = 0;
  add_all_rows(weights, state.values, d_k, d_v, sums);
  double denominator = static_cast<double>(dot(weights, state.sum, d_k));
  constexpr std::int64_t kTokens = 16;
  for (std::int64_t first = 0; first < *task.recent_count; first += kTokens) {
    const std::int64_t count = smaller(kTokens, *task.recent_count - first);
    const T* values = task.recent_values + first * d_v;
    T token_weights[kTokens];
    bool all_count = true;
    for (std::int64_t j = 0; j < count; ++j) {
      token_weights[j] = dot(weights, task.recent_keys + (first + j) * d_k, d_k);
      denominator += static_cast<double>(token_weights[j]);
      all_count = all_count && token_weights[j] != T(0);
    }
    if (all_count) {
      add_all_rows(token_weights, values, count, d_v, sums);
      continue;
    }
    // Without weight a value counts for nothing, whatever it is.
    for (std::int64_t j = 0; j < count; ++j) {
      if (token_weights[j] != T(0)) add_all_rows(token_weights + j, values + j * d_v, 1, d_v, sums);
    }
  }
  *task.denominator = denominator;
  const T divisor = static_cast<T>(denominator);
  for (std::int64_t c = 0; c < d_v; ++c) task.y[c] = sums[c] / divisor;
}

template <class T>
void step(const attention_step_task<T>& task) {
  constexpr T kLowest = -static_cast<T>(__builtin_inf());
  const std::int64_t width = padded<T>(task.d_k);
  T* scratch = static_cast<T*>(task.scratch);
  const step_scratch_rows<T> rows = {scratch, scratch + width, scratch + 2 * width,
                                     scratch + 3 * width, scratch + 4 * width};
  const step_state<T> state = step_state<T>::of(task);
  if (task.log_decay) decay(task, state);
  copy_padded(task.log_k, task.d_k, kLowest, rows.key);
  copy_padded(task.log_q, task.d_k, kLowest, rows.query);
  copy_padded<T>({state.scale, 1}, task.d_k, kLowest, rows.scale);
  copy_padded<T>({state.scale_rest, 1}, task.d_k, T(0), rows.scale_rest);
  append(task, state, rows);
  read(task, state, rows);
}

template <class T>
constexpr attention_step_functions<T> functions = {step_scratch<T>, step<T>};

}  // namespace

extern const attention_step_kernels kernels_attention_step;
const attention_step_kernels kernels_attention_step = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad

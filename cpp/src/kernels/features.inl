// Contracts stand in features_kernels.hpp. Rows are broadcast and features lie in lanes, so that a
// tile of features leaves the accumulators for contiguous rows of the output. The reverse has the
// dimensions of a row in its lanes, for the same reason.
#include "features_kernels.hpp"

#include "tile_product.inl"
#include "vector_math.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

// A panel of rows holds kTileRows numbers per dimension. Every kPeriod vectors begin at row 0
// again, and each of these has the same rows in its lanes throughout: what belongs to a dimension
// is repeated for the rows, and panels end where a period does.
template <class T>
constexpr int period_of() {
  int vectors = 1;
  while (vectors * lanes<T> % kTileRows != 0) ++vectors;
  return vectors;
}
template <class T>
constexpr int kPeriod = period_of<T>();

#define SUBQUAD_UNROLL_PERIOD _Pragma("GCC unroll 6")

template <class T>
SUBQUAD_INLINE std::int64_t panel_size(std::int64_t depth) {
  return divide_up(depth * kTileRows, kPeriod<T> * lanes<T>) * kPeriod<T> * lanes<T>;
}

// What pack leaves, and features reads.
template <class T>
struct packed_layout {
  T* projection;  // [feature panel][depth][columns]
  T* bias;        // [feature panel][columns]
  T* factor;      // [factor panel][depth][columns]
  T* shift;       // as a panel of rows that are all alike, 0 where there is none
  T* linear;
  T* diagonal;          // times -1/2
  std::int64_t* begin;  // per factor panel: first and one past the last column that is not zero
  std::int64_t* end;
  std::int64_t factor_panels;
  std::size_t bytes;

  packed_layout(void* packed, std::int64_t m, std::int64_t depth, std::int64_t rank) {
    constexpr int kColumns = kTileColumns<T>;
    const std::int64_t m_padded = divide_up(m, kColumns) * kColumns;
    factor_panels = divide_up(rank, kColumns);
    begin = static_cast<std::int64_t*>(packed);
    end = begin + factor_panels;
    projection = reinterpret_cast<T*>(end + factor_panels);
    bias = projection + m_padded * depth;
    factor = bias + m_padded;
    shift = factor + factor_panels * kColumns * depth;
    linear = shift + panel_size<T>(depth);
    diagonal = linear + panel_size<T>(depth);
    bytes = static_cast<std::size_t>(2 * factor_panels) * sizeof(std::int64_t) +
            sizeof(T) *
                static_cast<std::size_t>(m_padded * (depth + 1) + factor_panels * kColumns * depth +
                                         3 * panel_size<T>(depth));
  }
};

template <class T>
std::size_t packed_map(std::int64_t m, std::int64_t depth, std::int64_t rank) {
  return packed_layout<T>(nullptr, m, depth, rank).bytes;
}

template <class T>
void repeat_vector(vector_view<const T> from, std::int64_t depth, T scale, T* to) {
  const std::int64_t size = panel_size<T>(depth);
  for (std::int64_t i = 0; i < size; ++i) {
    to[i] = from && i < depth * kTileRows ? scale * from[i / kTileRows] : T(0);
  }
}

template <class T>
void pack(const feature_map_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = task.depth;
  const packed_layout<T> layout(task.packed, task.m, depth, task.rank);
  pack_rows<kColumns, T>(task.projection, task.m, depth, layout.projection);
  for (std::int64_t j = 0; j < divide_up(task.m, kColumns) * kColumns; ++j) {
    layout.bias[j] = j < task.m ? task.bias[j] : T(0);
  }
  repeat_vector<T>(task.shift, depth, T(1), layout.shift);
  repeat_vector<T>(task.linear, depth, T(1), layout.linear);
  repeat_vector<T>(task.diagonal, depth, T(-0.5), layout.diagonal);
  if (task.rank == 0) return;
  pack_rows<kColumns, T>(task.factor, task.rank, depth, layout.factor);
  for (std::int64_t p = 0; p < layout.factor_panels; ++p) {
    const T* panel = layout.factor + p * kColumns * depth;
    const auto is_zero = [panel](std::int64_t k) {
      for (int c = 0; c < kColumns; ++c) {
        if (panel[k * kColumns + c] != T(0)) return false;
      }
      return true;
    };
    std::int64_t begin = 0;
    std::int64_t end = depth;
    while (begin < end && is_zero(begin)) ++begin;
    while (end > begin && is_zero(end - 1)) --end;
    layout.begin[p] = begin;
    layout.end[p] = end;
  }
}

// Rows in one panel, z[k * kTileRows + r] = x(r, k), 0 past count and to the panel's end. Four rows
// (two) at a time: the addresses of all would not fit the registers.
template <class T>
SUBQUAD_INLINE void pack_panel_rows(matrix_view<const T> x, std::int64_t count, std::int64_t depth,
                                    T* z) {
  constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  for (std::int64_t i = depth * kTileRows; i < panel_size<T>(depth); ++i) z[i] = T(0);
  if (count < kTileRows || x.column_stride != 1) {
    pack_rows<kTileRows, T>(x, smaller<std::int64_t>(count, kTileRows), depth, z);
    return;
  }
  const std::int64_t whole = depth / kSide * kSide;
  int r = 0;
  for (; r + kSide <= kTileRows; r += kSide) {
    const T* rows[kSide];
    for (int i = 0; i < kSide; ++i) rows[i] = x.data + (r + i) * x.row_stride;
    for (std::int64_t k = 0; k < whole; k += kSide) {
      const T* from[kSide];
      for (int i = 0; i < kSide; ++i) from[i] = rows[i] + k;
      transpose_square(from, z + k * kTileRows + r, kTileRows);
    }
  }
  for (; r < kTileRows; ++r) {
    for (std::int64_t k = 0; k < whole; ++k) z[k * kTileRows + r] = x(r, k);
  }
  for (std::int64_t k = whole; k < depth; ++k) {
    for (r = 0; r < kTileRows; ++r) z[k * kTileRows + r] = x(r, k);
  }
}

// The sum of all lanes.
template <class T>
SUBQUAD_INLINE T sum_lanes(vec<T> values) {
  constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  typedef T side __attribute__((vector_size(16)));
  T memory[lanes<T>];
  store(memory, values);
  side sum = {};
  for (int c = 0; c < lanes<T>; c += kSide) {
    side next;
    __builtin_memcpy(&next, memory + c, sizeof next);
    sum += next;
  }
  T total = sum[0];
  for (int c = 1; c < kSide; ++c) total += sum[c];
  return total;
}

// Sums per row from those per lane of a period.
template <class T>
SUBQUAD_INLINE void sum_periods(const vec<T> (&sums)[kPeriod<T>], T* q) {
  T memory[kPeriod<T> * lanes<T>];
  for (int v = 0; v < kPeriod<T>; ++v) store(memory + v * lanes<T>, sums[v]);
  for (int r = 0; r < kTileRows; ++r) {
    T sum = memory[r];
    for (int i = r + kTileRows; i < kPeriod<T> * lanes<T>; i += kTileRows) sum += memory[i];
    q[r] = sum;
  }
}

// Subtracts the shift from a panel and adds up term(z, index in the panel) for each row.
template <class T, class Term>
SUBQUAD_INLINE void shift_and_sum(const packed_layout<T>& layout, std::int64_t size, T* z, T* q,
                                  Term&& term) {
  vec<T> sums[kPeriod<T>] = {};
  for (std::int64_t i = 0; i < size; i += kPeriod<T> * lanes<T>) {
    SUBQUAD_UNROLL_PERIOD
    for (int v = 0; v < kPeriod<T>; ++v) {
      const std::int64_t at = i + v * lanes<T>;
      const vec<T> row = load(z + at) - load(layout.shift + at);
      store(z + at, row);
      sums[v] += term(row, at);
    }
  }
  sum_periods<T>(sums, q);
}

// A panel of rows as packed becomes z, and q its rows' terms: what is absent must not meet the
// infinities of a row.
template <class T>
SUBQUAD_INLINE void shift_rows(const feature_map_task<T>& map, const packed_layout<T>& layout, T* z,
                               T* q) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = map.depth;
  const std::int64_t size = panel_size<T>(depth);
  const T* linear = layout.linear;
  const T* diagonal = layout.diagonal;
  if (map.linear && map.diagonal) {
    shift_and_sum<T>(layout, size, z, q, [=](vec<T> row, std::int64_t at) {
      return (load(linear + at) + load(diagonal + at) * row) * row;
    });
  } else if (map.linear) {
    shift_and_sum<T>(layout, size, z, q,
                     [=](vec<T> row, std::int64_t at) { return load(linear + at) * row; });
  } else if (map.diagonal) {
    shift_and_sum<T>(layout, size, z, q,
                     [=](vec<T> row, std::int64_t at) { return load(diagonal + at) * row * row; });
  } else {
    shift_and_sum<T>(layout, size, z, q, [](vec<T>, std::int64_t) { return vec<T>{}; });
  }
  if (layout.factor_panels == 0) return;
  vec<T> squares[kTileRows] = {};
  for (std::int64_t p = 0; p < layout.factor_panels; ++p) {
    const std::int64_t begin = layout.begin[p];
    tile<T> acc;
    tile_zero<T>(acc);
    tile_product<T>(layout.end[p] - begin, z + begin * kTileRows,
                    layout.factor + (p * depth + begin) * kColumns, acc);
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kTileRows; ++r) {
      squares[r] += acc[r][0] * acc[r][0] + acc[r][1] * acc[r][1];
    }
  }
  for (int r = 0; r < kTileRows; ++r) q[r] -= T(0.5) * sum_lanes<T>(squares[r]);
}

// Past the caches where the level has such a store; `to` is aligned to the vector.
template <class T>
SUBQUAD_INLINE void stream(T* to, vec<T> values) {
#if SUBQUAD_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)values);
#elif SUBQUAD_VECTOR_BYTES == 32 && defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)values);
#elif SUBQUAD_VECTOR_BYTES == 16 && defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)values);
#else
  store(to, values);
#endif
}

// Streamed stores of this thread come before whatever it stores next.
SUBQUAD_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Copies past the caches, but for the lines of which it has a part.
template <class T>
SUBQUAD_INLINE void stream_copy(const T* from, std::int64_t count, T* to) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  const auto address = reinterpret_cast<std::uintptr_t>(to) / sizeof(T);
  const std::int64_t head =
      smaller(count, static_cast<std::int64_t>(-address & static_cast<std::uintptr_t>(kLine - 1)));
  std::int64_t i = 0;
  for (; i < head; ++i) to[i] = from[i];
  for (; i + kLine <= count; i += kLine) {
    for (std::int64_t c = 0; c < kLine; c += lanes<T>) stream<T>(to + i + c, load(from + i + c));
  }
  for (; i < count; ++i) to[i] = from[i];
}

// Where the features of one panel of rows are put, [kTileRows][stride] from column `first` on.
template <class T>
struct panel_target {
  T* data;
  std::int64_t stride;

  SUBQUAD_ALWAYS_INLINE T* at(int r, int v) const { return data + r * stride + v * lanes<T>; }
};

// Brings what sin_cos_bounded does not take into [-pi, pi], within an ulp of pi.
template <class T>
SUBQUAD_INLINE void reduce_large(T (&waves)[kTileRows * kTileColumns<T>]) {
  vec<T> largest = {};
  for (int i = 0; i < kTileRows * kTileColumns<T>; i += lanes<T>) {
    const vec<T> wave = load(waves + i);
    largest = max<T>(max<T>(wave, -wave), largest);
  }
  bool large = false;
  for (int c = 0; c < lanes<T>; ++c) large = large || largest[c] > kSinCosBound<T>;
  if (!large) return;
  for (T& wave : waves) {
    if (!(wave > kSinCosBound<T> || wave < -kSinCosBound<T>)) continue;
    const auto t = static_cast<double>(wave);
    wave = static_cast<T>(__builtin_atan2(__builtin_sin(t), __builtin_cos(t)));
  }
}

// One tile of features from its inner products and the rows' terms.
template <class T, feature_values kValues, bool kPairs>
SUBQUAD_INLINE void put_tile(const tile<T>& t, const T* bias, const T* terms, bool has_terms,
                             panel_target<T> first, panel_target<T> second) {
  const vec<T> biases[kTileVectors] = {load(bias), load(bias + lanes<T>)};
  if constexpr (kValues == feature_values::logarithms) {
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kTileRows; ++r) {
      const vec<T> term = broadcast(terms[r]);
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kTileVectors; ++v) {
        const vec<T> offset = biases[v] + term;
        store(first.at(r, v), offset + t[r][v]);
        if constexpr (kPairs) store(second.at(r, v), offset - t[r][v]);
      }
    }
  } else {
    // Through memory: what follows takes more registers than the accumulators leave.
    T waves[kTileRows * kTileColumns<T>];
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kTileRows; ++r) {
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kTileVectors; ++v) {
        store(waves + r * kTileColumns<T> + v * lanes<T>, t[r][v]);
      }
    }
    vec<T> sizes[kTileVectors] = {};  // where rows have no terms, the same for all of them
    if constexpr (kValues == feature_values::waves) {
      reduce_large<T>(waves);
      for (int v = 0; v < kTileVectors; ++v) sizes[v] = exp<T>(biases[v]);
    }
    for (int r = 0; r < kTileRows; ++r) {
      const vec<T> term = broadcast(terms[r]);
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kTileVectors; ++v) {
        const vec<T> wave = load(waves + r * kTileColumns<T> + v * lanes<T>);
        const vec<T> offset = biases[v] + term;
        if constexpr (kValues == feature_values::exponentials) {
          store(first.at(r, v), exp<T>(offset + wave));
          if constexpr (kPairs) store(second.at(r, v), exp<T>(offset - wave));
        } else {
          const vec<T> size = has_terms ? exp<T>(offset) : sizes[v];
          vec<T> sine;
          vec<T> cosine;
          sin_cos_bounded(wave, sine, cosine);
          store(first.at(r, v), size * cosine);
          store(second.at(r, v), size * sine);
        }
      }
    }
  }
}

// Features of which the packed projection takes half of a 512 KiB second-level cache.
template <class T>
std::int64_t feature_block(std::int64_t depth) {
  const std::int64_t block = (256 << 10) / static_cast<std::int64_t>(sizeof(T)) / (depth + 1);
  return (block < kTileColumns<T> ? 1 : block / kTileColumns<T>)*kTileColumns<T>;
}

// One part of the features of a panel of rows, kept beside the output until it is copied there.
template <class T>
struct staged_panel {
  T* data;              // [kTileRows][half of pairs][width]
  std::int64_t width;   // a multiple of kTileColumns
  matrix_view<T> out;   // of the panel's first row
  std::int64_t rows;    // 0: nothing is kept
  std::int64_t column;  // of the output, the first
  std::int64_t columns;
  std::int64_t halves;
  std::int64_t half_step;  // columns of the output from one half to the other

  SUBQUAD_ALWAYS_INLINE panel_target<T> target(std::int64_t half, std::int64_t j) const {
    return {data + half * width + j, halves * width};
  }

  // The most elements, at most `count`, after which a line of the output begins, or 0.
  SUBQUAD_ALWAYS_INLINE std::int64_t whole_lines(std::int64_t count) const {
    constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
    const auto address = reinterpret_cast<std::uintptr_t>(out.data + count) / sizeof(T);
    const auto past = static_cast<std::int64_t>(address % static_cast<std::uintptr_t>(kLine));
    return past < count ? count - past : 0;
  }
};

// Copies rows [begin, end) to the output, past the caches where `streams`; calls follow each other
// from row 0 to `rows`. A function of its own, as loading a panel is: each kind of features inlines
// its products alone.
template <class T>
__attribute__((noinline)) void drain(const staged_panel<T>& panel, bool streams, std::int64_t begin,
                                     std::int64_t end) {
  end = smaller(end, panel.rows);
  if (begin >= end) return;
  const matrix_view<T>& out = panel.out;
  const std::int64_t row_length = panel.halves * panel.width;
  if (streams && panel.columns == panel.width && panel.half_step == panel.width &&
      out.row_stride == row_length) {
    // Memory without gaps: lines that two rows share are left to the next call.
    const std::int64_t from = begin == 0 ? 0 : panel.whole_lines(begin * row_length);
    const std::int64_t to =
        end == panel.rows ? panel.rows * row_length : panel.whole_lines(end * row_length);
    stream_copy<T>(panel.data + from, to - from, out.data + from);
    return;
  }
  for (std::int64_t r = begin; r < end; ++r) {
    for (std::int64_t half = 0; half < panel.halves; ++half) {
      const T* from = panel.data + (r * panel.halves + half) * panel.width;
      const std::int64_t first = panel.column + half * panel.half_step;
      if (streams) {
        stream_copy<T>(from, panel.columns, &out(r, first));
      } else {
        for (std::int64_t j = 0; j < panel.columns; ++j) out(r, first + j) = from[j];
      }
    }
  }
}

template <class T>
struct features_layout {
  T* panels;  // [row panel][panel size]
  T* terms;   // [row panel][kTileRows]
  T* staged;  // [2][kTileRows][half of pairs][width]
  std::int64_t width;
  std::size_t bytes;

  features_layout(void* scratch, std::int64_t n, std::int64_t m, std::int64_t depth) {
    const std::int64_t n_panels = divide_up(n, kTileRows);
    width = smaller(feature_block<T>(depth), packed_size<kTileColumns<T>>(m, 1));
    panels = static_cast<T*>(scratch);
    terms = panels + n_panels * panel_size<T>(depth);
    staged = terms + n_panels * kTileRows;
    bytes = sizeof(T) * static_cast<std::size_t>(n_panels * (panel_size<T>(depth) + kTileRows) +
                                                 4 * kTileRows * width);
  }
};

template <class T>
std::size_t features_scratch(std::int64_t n, std::int64_t m, std::int64_t depth) {
  return features_layout<T>(nullptr, n, m, depth).bytes;
}

// Asks for every `step`th row from r on of a panel that is packed next.
template <class T>
SUBQUAD_INLINE void prefetch_rows(matrix_view<const T> x, std::int64_t r, std::int64_t count,
                                  std::int64_t step, std::int64_t depth) {
  constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
  if (x.column_stride != 1) return;
  for (; r < smaller<std::int64_t>(count, kTileRows); r += step) {
    for (std::int64_t k = 0; k < depth; k += kLine) __builtin_prefetch(&x(r, k));
  }
}

// Rows of x become a panel of z and their terms.
template <class T>
__attribute__((noinline)) void load_panel(const feature_map_task<T>& map,
                                          const packed_layout<T>& packed, matrix_view<const T> x,
                                          std::int64_t rows, T* z, T* terms) {
  pack_panel_rows<T>(x, rows, map.depth, z);
  shift_rows<T>(map, packed, z, terms);
}

// kStage: the output is written a panel of rows at a time, the panel before the one in the making,
// some of its rows after each tile, so that memory is written while products are computed.
template <class T, feature_values kValues, bool kPairs, bool kStage>
void put_features(const features_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const feature_map_task<T>& map = task.map;
  const std::int64_t depth = map.depth;
  const packed_layout<T> packed(map.packed, map.m, depth, map.rank);
  const features_layout<T> layout(task.scratch, task.n, map.m, depth);
  const bool has_terms = map.linear || map.diagonal || map.rank > 0;
  [[maybe_unused]] const bool streams = task.out.column_stride == 1 && task.beyond_caches;
  staged_panel<T> before{};
  for (std::int64_t first = 0; first < map.m; first += layout.width) {
    const std::int64_t columns = smaller(layout.width, map.m - first);
    const std::int64_t tiles = divide_up(columns, kColumns);
    const std::int64_t rows_per_tile = divide_up(kTileRows, tiles);
    T* staged = layout.staged;
    for (std::int64_t row = 0; row < task.n; row += kTileRows) {
      T* z = layout.panels + row / kTileRows * panel_size<T>(depth);
      T* terms = layout.terms + row;
      const matrix_view<const T> x = task.x.from(row);
      const std::int64_t rows = task.n - row;
      if (first == 0) load_panel<T>(map, packed, x, rows, z, terms);
      const matrix_view<T> out = task.out.from(row);
      const staged_panel<T> now{
          staged,  layout.width,   out,  smaller<std::int64_t>(rows, kTileRows), first,
          columns, kPairs ? 2 : 1, map.m};
      const bool whole = rows >= kTileRows;
      for (std::int64_t i = 0; i < tiles; ++i) {
        const std::int64_t j = i * kColumns;
        panel_target<T> one = now.target(0, j);
        panel_target<T> other = now.target(kPairs ? 1 : 0, j);
        const bool direct = !kStage && whole && j + kColumns <= columns;
        if (direct) {
          one = {&out(0, first + j), out.row_stride};
          other = {&out(0, first + j + (kPairs ? map.m : 0)), out.row_stride};
        }
        if (first == 0) {
          prefetch_rows<T>(x.from(kTileRows), i, rows - kTileRows, tiles, depth);
        }
        tile<T> t;
        tile_zero<T>(t);
        const T* projection = packed.projection + (first + j) * depth;
        const std::int64_t half = kStage ? depth / 2 : depth;
        tile_product<T>(half, z, projection, t);
        if constexpr (kStage) {
          drain<T>(before, streams, i * rows_per_tile, (i + 1) * rows_per_tile);
          tile_product<T>(depth - half, z + half * kTileRows, projection + half * kColumns, t);
        }
        put_tile<T, kValues, kPairs>(t, packed.bias + first + j, terms, has_terms, one, other);
      }
      if constexpr (kStage) {
        before = now;
        staged = staged == layout.staged ? staged + 2 * kTileRows * layout.width : layout.staged;
      } else if (!whole) {
        drain<T>(now, false, 0, kTileRows);
      } else if (columns % kColumns != 0) {
        staged_panel<T> last = now;
        last.data += columns / kColumns * kColumns;
        last.column += columns / kColumns * kColumns;
        last.columns = columns % kColumns;
        drain<T>(last, false, 0, kTileRows);
      }
    }
  }
  if constexpr (kStage) {
    drain<T>(before, streams, 0, kTileRows);
    if (streams) finish_streams();
  }
}

template <class T, feature_values kValues, bool kPairs>
void put_features(const features_task<T>& task) {
  if (task.out.column_stride != 1 || task.beyond_caches) {
    put_features<T, kValues, kPairs, true>(task);
  } else {
    put_features<T, kValues, kPairs, false>(task);
  }
}

template <class T>
void features(const features_task<T>& task) {
  if (task.values == feature_values::waves) {
    put_features<T, feature_values::waves, true>(task);
  } else if (task.values == feature_values::exponentials) {
    if (task.pairs) {
      put_features<T, feature_values::exponentials, true>(task);
    } else {
      put_features<T, feature_values::exponentials, false>(task);
    }
  } else if (task.pairs) {
    put_features<T, feature_values::logarithms, true>(task);
  } else {
    put_features<T, feature_values::logarithms, false>(task);
  }
}

// What pack_reverse leaves, and reverse reads. `sums` is the right operand of the sums over
// features, projection, and with a factor of those that follow, factor^T factor + diagonal.
template <class T>
struct reverse_layout {
  T* sums;      // [dimension panel][m + square][columns]
  T* shift;     // as a panel of rows that are all alike
  T* linear;    // [dimension panel][columns], as the two that follow
  T* diagonal;  // where it is not in the square
  T* offset;    // the shift
  T* scratch;   // of pack_reverse: the factor's columns in panels of rows and of columns
  std::int64_t square;
  std::int64_t length;  // m + square
  std::size_t bytes;

  reverse_layout(void* packed, std::int64_t m, std::int64_t depth, std::int64_t rank) {
    constexpr int kColumns = kTileColumns<T>;
    const std::int64_t padded = divide_up(depth, kColumns) * kColumns;
    square = rank > 0 ? depth : 0;
    length = m + square;
    sums = static_cast<T*>(packed);
    shift = sums + padded * length;
    linear = shift + panel_size<T>(depth);
    diagonal = linear + padded;
    offset = diagonal + padded;
    scratch = offset + padded;
    bytes =
        sizeof(T) * static_cast<std::size_t>(padded * (length + 3) + panel_size<T>(depth) +
                                             (packed_size<kTileRows>(depth, rank) + padded * rank));
  }
};

template <class T>
std::size_t packed_reverse(std::int64_t m, std::int64_t depth, std::int64_t rank) {
  return reverse_layout<T>(nullptr, m, depth, rank).bytes;
}

// Columns of a matrix of `count` rows in panels, at the given row of each panel of `length` rows.
template <class T>
void pack_columns(matrix_view<const T> from, std::int64_t count, std::int64_t depth,
                  std::int64_t at, std::int64_t length, T* to) {
  constexpr int kColumns = kTileColumns<T>;
  for (std::int64_t k = 0; k < depth; k += kColumns, to += kColumns * length) {
    const std::int64_t width = smaller<std::int64_t>(kColumns, depth - k);
    for (std::int64_t j = 0; j < count; ++j) {
      T* row = to + (at + j) * kColumns;
      const T* values = &from(j, k);
      if (width == kColumns && from.column_stride == 1) {
        store(row, load(values));
        store(row + lanes<T>, load(values + lanes<T>));
      } else {
        for (std::int64_t c = 0; c < kColumns; ++c) {
          row[c] = c < width ? values[c * from.column_stride] : T(0);
        }
      }
    }
  }
}

template <class T>
void pack_reverse(const feature_map_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t depth = task.depth;
  const std::int64_t rank = task.rank;
  const reverse_layout<T> layout(task.packed, task.m, depth, rank);
  const std::int64_t padded = divide_up(depth, kColumns) * kColumns;
  pack_columns<T>(task.projection, task.m, depth, 0, layout.length, layout.sums);
  repeat_vector<T>(task.shift, depth, T(1), layout.shift);
  for (std::int64_t k = 0; k < padded; ++k) {
    const bool inside = k < depth;
    layout.linear[k] = inside && task.linear ? task.linear[k] : T(0);
    layout.diagonal[k] = inside && task.diagonal && rank == 0 ? task.diagonal[k] : T(0);
    layout.offset[k] = inside && task.shift ? task.shift[k] : T(0);
  }
  if (rank == 0) return;
  T* left = layout.scratch;
  T* right = left + packed_size<kTileRows>(depth, rank);
  pack_rows<kTileRows, T>({task.factor.data, task.factor.column_stride, task.factor.row_stride},
                          depth, rank, left);
  pack_columns<T>(task.factor, rank, depth, 0, rank, right);
  for (std::int64_t k = 0; k < depth; k += kColumns) {
    T* panel = layout.sums + (k * layout.length + task.m * kColumns);
    for (std::int64_t i = 0; i < depth; i += kTileRows) {
      tile<T> acc;
      tile_zero<T>(acc);
      tile_product<T>(rank, left + i * rank, right + k * rank, acc);
      T values[kTileRows * kColumns];
      SUBQUAD_UNROLL_ROWS
      for (int r = 0; r < kTileRows; ++r) {
        store(values + r * kColumns, acc[r][0]);
        store(values + r * kColumns + lanes<T>, acc[r][1]);
      }
      for (std::int64_t r = 0; r < smaller<std::int64_t>(kTileRows, depth - i); ++r) {
        T* row = panel + (i + r) * kColumns;
        for (std::int64_t c = 0; c < kColumns; ++c) row[c] = values[r * kColumns + c];
        const std::int64_t c = i + r - k;
        if (task.diagonal && c >= 0 && c < kColumns) row[c] += task.diagonal[i + r];
      }
    }
  }
}

// Features between two visits to the sums of a row.
constexpr std::int64_t kReverseBlock = 256;

template <class T>
struct reverse_scratch_layout {
  T* sums;      // [row panel][dimension panel][kTileRows][columns]
  T* totals;    // [row panel][kTileRows]
  T* gradient;  // a panel of rows of grad, or of -g z
  T* other;     // of the other half of pairs
  T* x;         // [kTileRows][columns], where it does not lie as vectors
  std::size_t bytes;

  reverse_scratch_layout(void* scratch, std::int64_t n, std::int64_t m, std::int64_t depth) {
    constexpr int kColumns = kTileColumns<T>;
    const std::int64_t n_padded = divide_up(n, kTileRows) * kTileRows;
    const std::int64_t padded = divide_up(depth, kColumns) * kColumns;
    const std::int64_t block = smaller(kReverseBlock, m);
    const std::int64_t largest = block > depth ? block : depth;
    sums = static_cast<T*>(scratch);
    totals = sums + n_padded * padded;
    gradient = totals + n_padded;
    other = gradient + panel_size<T>(largest);
    x = other + panel_size<T>(block);
    bytes = sizeof(T) * static_cast<std::size_t>(n_padded * (padded + 1) + panel_size<T>(largest) +
                                                 panel_size<T>(block) + kTileRows * kColumns);
  }
};

template <class T>
std::size_t reverse_scratch(std::int64_t n, std::int64_t m, std::int64_t depth) {
  return reverse_scratch_layout<T>(nullptr, n, m, depth).bytes;
}

// Features between two calls of `between`.
constexpr std::int64_t kProductPart = 32;

// Adds to the sums of a panel of rows what the next `count` rows of the right operand make of it;
// between(i, parts) is called for each i in [0, parts) along the way.
template <class T, class Between>
SUBQUAD_INLINE void add_products(const T* left, std::int64_t count, const T* right,
                                 std::int64_t length, std::int64_t depth, bool first, T* sums,
                                 Between&& between) {
  constexpr int kColumns = kTileColumns<T>;
  const std::int64_t parts = divide_up(count, kProductPart);
  for (std::int64_t k = 0; k < depth; k += kColumns) {
    tile<T> acc;
    tile_zero<T>(acc);
    for (std::int64_t i = 0; i < parts; ++i) {
      const std::int64_t at = i * kProductPart;
      between(k / kColumns * parts + i, divide_up(depth, kColumns) * parts);
      tile_product<T>(smaller(kProductPart, count - at), left + at * kTileRows,
                      right + at * kColumns, acc);
    }
    SUBQUAD_UNROLL_ROWS
    for (int r = 0; r < kTileRows; ++r) {
      SUBQUAD_UNROLL_VECTORS
      for (int v = 0; v < kTileVectors; ++v) {
        T* to = sums + r * kColumns + v * lanes<T>;
        store(to, first ? acc[r][v] : load(to) + acc[r][v]);
      }
    }
    right += length * kColumns;
    sums += kTileRows * kColumns;
  }
}

// Sums of a panel over its rows' elements, with the other half of pairs, whose difference the panel
// then holds.
template <class T, bool kPairs>
SUBQUAD_INLINE void sum_and_pair(std::int64_t count, T* panel, const T* other, T* totals,
                                 bool first) {
  vec<T> sums[kPeriod<T>] = {};
  for (std::int64_t i = 0; i < panel_size<T>(count); i += kPeriod<T> * lanes<T>) {
    SUBQUAD_UNROLL_PERIOD
    for (int v = 0; v < kPeriod<T>; ++v) {
      const std::int64_t at = i + v * lanes<T>;
      const vec<T> value = load(panel + at);
      sums[v] += value;
      if constexpr (kPairs) {
        const vec<T> paired = load(other + at);
        sums[v] += paired;
        store(panel + at, value - paired);
      }
    }
  }
  T q[kTileRows];
  sum_periods<T>(sums, q);
  for (int r = 0; r < kTileRows; ++r) totals[r] = first ? q[r] : totals[r] + q[r];
}

template <class T>
void reverse(const features_reverse_task<T>& task) {
  constexpr int kColumns = kTileColumns<T>;
  const feature_map_task<T>& map = task.map;
  const std::int64_t depth = map.depth;
  const std::int64_t padded = divide_up(depth, kColumns) * kColumns;
  const reverse_layout<T> packed(map.packed, map.m, depth, map.rank);
  const reverse_scratch_layout<T> layout(task.scratch, task.n, map.m, depth);
  const matrix_view<const T> other_half{task.grad.data + map.m * task.grad.column_stride,
                                        task.grad.row_stride, task.grad.column_stride};
  for (std::int64_t j = 0; j < (map.m > 0 ? map.m : 1); j += kReverseBlock) {
    const std::int64_t count = smaller(kReverseBlock, map.m - j);
    const auto part = [j](matrix_view<const T> grad, std::int64_t row) {
      return matrix_view<const T>{grad.data + row * grad.row_stride + j * grad.column_stride,
                                  grad.row_stride, grad.column_stride};
    };
    for (std::int64_t row = 0; row < task.n; row += kTileRows) {
      pack_panel_rows<T>(part(task.grad, row), task.n - row, count, layout.gradient);
      if (task.pairs) {
        pack_panel_rows<T>(part(other_half, row), task.n - row, count, layout.other);
        sum_and_pair<T, true>(count, layout.gradient, layout.other, layout.totals + row, j == 0);
      } else {
        sum_and_pair<T, false>(count, layout.gradient, nullptr, layout.totals + row, j == 0);
      }
      const std::int64_t next = row + kTileRows;
      add_products<T>(layout.gradient, count, packed.sums + j * kColumns, packed.length, depth,
                      j == 0, layout.sums + row * padded,
                      [&](std::int64_t i, std::int64_t parts) SUBQUAD_ALWAYS_INLINE {
                        prefetch_rows<T>(part(task.grad, next), i, task.n - next, parts, count);
                        if (!task.pairs) return;
                        prefetch_rows<T>(part(other_half, next), i, task.n - next, parts, count);
                      });
    }
  }
  const bool elementwise = map.linear || (map.diagonal && map.rank == 0);
  for (std::int64_t row = 0; row < task.n; row += kTileRows) {
    const std::int64_t rows = smaller<std::int64_t>(kTileRows, task.n - row);
    const matrix_view<const T> x = task.x.from(row);
    const T* totals = layout.totals + row;
    T* sums = layout.sums + row * padded;
    if (map.rank > 0) {
      T* z = layout.gradient;
      pack_panel_rows<T>(x, rows, depth, z);
      for (std::int64_t k = 0; k < depth; ++k) {
        for (int r = 0; r < kTileRows; ++r) {
          T* element = z + k * kTileRows + r;
          *element = -totals[r] * (*element - packed.shift[k * kTileRows + r]);
        }
      }
      add_products<T>(z, depth, packed.sums + map.m * kColumns, packed.length, depth, false, sums,
                      [](std::int64_t, std::int64_t) {});
    }
    for (std::int64_t k = 0; k < depth; k += kColumns, sums += kTileRows * kColumns) {
      const std::int64_t width = smaller<std::int64_t>(kColumns, depth - k);
      if (elementwise) {
        const bool direct = width == kColumns && x.column_stride == 1;
        for (std::int64_t r = 0; r < rows; ++r) {
          const T* values = &x(r, k);
          if (!direct) {
            for (std::int64_t c = 0; c < width; ++c) layout.x[c] = x(r, k + c);
            for (std::int64_t c = width; c < kColumns; ++c) layout.x[c] = T(0);
            values = layout.x;
          }
          const vec<T> total = broadcast(totals[r]);
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kTileVectors; ++v) {
            const std::int64_t at = v * lanes<T>;
            vec<T> slope = load(packed.linear + k + at);
            if (map.diagonal && map.rank == 0) {
              slope -= load(packed.diagonal + k + at) *
                       (load(values + at) - load(packed.offset + k + at));
            }
            T* to = sums + r * kColumns + at;
            store(to, load(to) + total * slope);
          }
        }
      }
      const matrix_view<T> out = task.out.from(row);
      if (width == kColumns && out.column_stride == 1) {
        for (std::int64_t r = 0; r < rows; ++r) {
          SUBQUAD_UNROLL_VECTORS
          for (int v = 0; v < kTileVectors; ++v) {
            store(&out(r, k + v * lanes<T>), load(sums + r * kColumns + v * lanes<T>));
          }
        }
      } else {
        for (std::int64_t r = 0; r < rows; ++r) {
          for (std::int64_t c = 0; c < width; ++c) out(r, k + c) = sums[r * kColumns + c];
        }
      }
    }
  }
}

template <class T>
constexpr features_functions<T> functions = {
    packed_map<T>,     pack<T>,         features_scratch<T>, features<T>,
    packed_reverse<T>, pack_reverse<T>, reverse_scratch<T>,  reverse<T>};

}  // namespace

extern const features_kernels kernels_features;
const features_kernels kernels_features = {functions<float>, functions<double>};

}  // namespace SUBQUAD_ISA
}  // namespace subquad

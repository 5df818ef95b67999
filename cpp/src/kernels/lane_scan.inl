// What the scans that carry their states in double share: blocks of 16 lanes, and how they come out
// of memory and go back.
#ifndef SUBQUAD_KERNELS_LANE_SCAN_INL
#define SUBQUAD_KERNELS_LANE_SCAN_INL

#include "lane_tile.hpp"
#include "vector_math.inl"

namespace subquad {
namespace SUBQUAD_ISA {
namespace {

using wide = vec<double>;
using wide_mask = ivec<double>;

constexpr double kHighest = __DBL_MAX__;
constexpr double kUnbounded = __builtin_inf();
constexpr double kUndefined = __builtin_nan("");

// Vectors of lanes that take each step together: their sums are independent, which hides part of
// the latency of a step.
constexpr int kGroup = 2;
constexpr int kWideLanes = lanes<double>;
constexpr int kGroupLanes = kGroup * kWideLanes;

#if defined(__clang__)
#define SUBQUAD_UNROLL_GROUP _Pragma("unroll")
#else
#define SUBQUAD_UNROLL_GROUP _Pragma("GCC unroll 2")
#endif

template <class T>
struct narrow_of;
template <>
struct narrow_of<float> {
  typedef float type __attribute__((vector_size(SUBQUAD_VECTOR_BYTES / 2)));
  typedef float unaligned_type
      __attribute__((vector_size(SUBQUAD_VECTOR_BYTES / 2), aligned(4), may_alias));
};
template <>
struct narrow_of<double> {
  using type = vector_of<double>::type;
  using unaligned_type = vector_of<double>::unaligned_type;
};

// As many elements of T as a vector has doubles.
template <class T>
SUBQUAD_INLINE wide load_wide(const T* p) {
  const typename narrow_of<T>::type values =
      *reinterpret_cast<const typename narrow_of<T>::unaligned_type*>(p);
  return __builtin_convertvector(values, wide);
}

template <class T>
SUBQUAD_INLINE void store_wide(T* p, wide v) {
  *reinterpret_cast<typename narrow_of<T>::unaligned_type*>(p) =
      __builtin_convertvector(v, typename narrow_of<T>::type);
}

SUBQUAD_INLINE bool any(wide_mask mask) {
#if SUBQUAD_VECTOR_BYTES == 64 && defined(__AVX512DQ__)
  return _mm512_movepi64_mask((__m512i)mask) != 0;
#elif SUBQUAD_VECTOR_BYTES == 32 && defined(__AVX__)
  return _mm256_movemask_pd((__m256d)mask) != 0;
#elif SUBQUAD_VECTOR_BYTES == 16 && defined(__SSE2__)
  return _mm_movemask_pd((__m128d)mask) != 0;
#else
  for (int c = 0; c < kWideLanes; ++c) {
    if (mask[c]) return true;
  }
  return false;
#endif
}

SUBQUAD_INLINE wide magnitude(wide v) {
  return from_bits<double>(bits_of<double>(v) & ~bits_of<double>(broadcast(-0.0)));
}

SUBQUAD_INLINE wide_mask is_finite(wide v) { return magnitude(v) <= kHighest; }

// a * b, but 0 where either is, whatever the other may be: a weight of 0 keeps what is not finite
// away, and a gradient of 0 asks for nothing.
SUBQUAD_INLINE wide weighted(wide a, wide b) { return ((a == 0.0) | (b == 0.0)) ? wide{} : a * b; }

// What rounding took from sum = a + b.
SUBQUAD_INLINE wide lost_in_sum(wide a, wide b, wide sum) {
  const wide b_in_sum = sum - a;
  return (a - (sum - b_in_sum)) + (b - b_in_sum);
}

// Steps of a lane that an array has `shift` steps on: at the end of a row there are fewer.
SUBQUAD_INLINE std::int64_t steps_in_reach(const lane_tile& tile, int lane, std::int64_t shift) {
  const std::int64_t reach = tile.row_length - shift - tile.positions[lane];
  return reach < tile.lengths[lane] ? reach : tile.lengths[lane];
}

// Step t of lane c is data[t * stride + c].
template <class T>
struct lane_block {
  T* data;
  std::int64_t stride;
};

// Whether all lanes lie side by side and have their steps before `end`.
template <class T>
bool lies_ready(const lane_view<T>& view, const lane_tile& tile, std::int64_t end,
                std::int64_t shift) {
  for (int c = 0; c < kTileLanes; ++c) {
    if (view.offsets[c] != view.offsets[0] + c) return false;
    if (steps_in_reach(tile, c, shift) < end) return false;
  }
  return true;
}

// As many rows of 16 bytes as a row has elements.
template <class T>
struct square {
  static constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  typedef T type __attribute__((vector_size(16)));
  typedef T unaligned_type __attribute__((vector_size(16), aligned(sizeof(T)), may_alias));
  type row[kSide];
};

SUBQUAD_INLINE square<float> transposed(const square<float>& s) {
  typedef std::int32_t indices __attribute__((vector_size(16)));
  const auto low_01 = __builtin_shuffle(s.row[0], s.row[1], indices{0, 4, 1, 5});
  const auto low_23 = __builtin_shuffle(s.row[2], s.row[3], indices{0, 4, 1, 5});
  const auto high_01 = __builtin_shuffle(s.row[0], s.row[1], indices{2, 6, 3, 7});
  const auto high_23 = __builtin_shuffle(s.row[2], s.row[3], indices{2, 6, 3, 7});
  return {{__builtin_shuffle(low_01, low_23, indices{0, 1, 4, 5}),
           __builtin_shuffle(low_01, low_23, indices{2, 3, 6, 7}),
           __builtin_shuffle(high_01, high_23, indices{0, 1, 4, 5}),
           __builtin_shuffle(high_01, high_23, indices{2, 3, 6, 7})}};
}

SUBQUAD_INLINE square<double> transposed(const square<double>& s) {
  typedef std::int64_t indices __attribute__((vector_size(16)));
  return {{__builtin_shuffle(s.row[0], s.row[1], indices{0, 2}),
           __builtin_shuffle(s.row[0], s.row[1], indices{1, 3})}};
}

// kSide lanes of a view, of which some may be shorter.
template <class T>
struct lane_strip {
  static constexpr int kSide = 16 / static_cast<int>(sizeof(T));
  T* step[kSide];               // the first of the block
  std::int64_t present[kSide];  // steps of the block that there are
  std::int64_t squares;         // steps that can be transposed
};

template <class T>
lane_strip<T> strip_of(const lane_view<T>& view, const lane_tile& tile, int lane,
                       std::int64_t first, std::int64_t steps, std::int64_t shift) {
  constexpr int kSide = lane_strip<T>::kSide;
  lane_strip<T> strip;
  strip.squares = view.stride == 1 || view.stride == -1 ? steps : 0;
  for (int i = 0; i < kSide; ++i) {
    strip.step[i] = view.data + view.offsets[lane + i] + (first + shift) * view.stride;
    strip.present[i] = steps_in_reach(tile, lane + i, shift) - first;
    if (strip.present[i] > steps) strip.present[i] = steps;
    if (strip.present[i] < strip.squares) strip.squares = strip.present[i];
  }
  strip.squares = strip.squares < 0 ? 0 : strip.squares / kSide * kSide;
  return strip;
}

// The block of `steps` steps from `first` on, where it lies or, if it does not lie ready or is to
// be changed, as a copy in `buffer`; `padding` where the array has no such step.
template <class T>
lane_block<const T> read_block(const lane_view<const T>& view, const lane_tile& tile,
                               std::int64_t first, std::int64_t steps, T padding, T* buffer,
                               bool copied = false, std::int64_t shift = 0) {
  if (!copied && lies_ready(view, tile, first + steps, shift)) {
    return {view.data + view.offsets[0] + (first + shift) * view.stride, view.stride};
  }
  constexpr int kSide = square<T>::kSide;
  // Where steps lie backwards, so do the rows of a square.
  const int flip = view.stride < 0 ? kSide - 1 : 0;
  for (int c = 0; c < kTileLanes; c += kSide) {
    const lane_strip<const T> strip = strip_of(view, tile, c, first, steps, shift);
    for (std::int64_t t = 0; t < strip.squares; t += kSide) {
      square<T> rows;
      for (int i = 0; i < kSide; ++i) {
        rows.row[i] = *reinterpret_cast<const typename square<T>::unaligned_type*>(
            strip.step[i] + t * view.stride - flip);
      }
      rows = transposed(rows);
      for (int i = 0; i < kSide; ++i) {
        *reinterpret_cast<typename square<T>::unaligned_type*>(
            buffer + (t + (flip ? flip - i : i)) * kTileLanes + c) = rows.row[i];
      }
    }
    for (int i = 0; i < kSide; ++i) {
      T* to = buffer + c + i;
      std::int64_t t = strip.squares;
      for (; t < strip.present[i]; ++t) to[t * kTileLanes] = strip.step[i][t * view.stride];
      for (; t < steps; ++t) to[t * kTileLanes] = padding;
    }
  }
  return {buffer, kTileLanes};
}

// Where a block of an output is to be written: where it belongs, or in `buffer`, from where
// write_block takes it.
template <class T>
lane_block<T> open_block(const lane_view<T>& view, const lane_tile& tile, std::int64_t first,
                         std::int64_t steps, T* buffer) {
  if (lies_ready(view, tile, first + steps, 0)) {
    return {view.data + view.offsets[0] + first * view.stride, view.stride};
  }
  return {buffer, kTileLanes};
}

template <class T>
void write_block(const lane_view<T>& view, const lane_tile& tile, std::int64_t first,
                 std::int64_t steps, const T* buffer, lane_block<T> block) {
  if (block.data != buffer) return;
  constexpr int kSide = square<T>::kSide;
  const int flip = view.stride < 0 ? kSide - 1 : 0;
  for (int c = 0; c < kTileLanes; c += kSide) {
    const lane_strip<T> strip = strip_of(view, tile, c, first, steps, 0);
    for (std::int64_t t = 0; t < strip.squares; t += kSide) {
      square<T> rows;
      for (int i = 0; i < kSide; ++i) {
        rows.row[i] = *reinterpret_cast<const typename square<T>::unaligned_type*>(
            buffer + (t + (flip ? flip - i : i)) * kTileLanes + c);
      }
      rows = transposed(rows);
      for (int i = 0; i < kSide; ++i) {
        *reinterpret_cast<typename square<T>::unaligned_type*>(strip.step[i] + t * view.stride -
                                                               flip) = rows.row[i];
      }
    }
    for (int i = 0; i < kSide; ++i) {
      const T* from = buffer + c + i;
      for (std::int64_t t = strip.squares; t < strip.present[i]; ++t) {
        strip.step[i][t * view.stride] = from[t * kTileLanes];
      }
    }
  }
}

}  // namespace
}  // namespace SUBQUAD_ISA
}  // namespace subquad

#endif  // SUBQUAD_KERNELS_LANE_SCAN_INL

// The moments of the scores of Gaussian mixtures: what evaluation and reverse are made of.
#ifndef SUBQUAD_CUDA_GAUSSIAN_MOMENTS_CUH
#define SUBQUAD_CUDA_GAUSSIAN_MOMENTS_CUH

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "arguments.hpp"
#include "batches.cuh"
#include "gaussian_normalizers_checks.hpp"
#include "kernels/matrix_view.hpp"

namespace subquad::cuda {

template <class T>
struct mixture_arrays {
  enum { kX, kLogCounts, kMeans, kFactors, kDiagonal, kArrays };

  matrix_view<const T> x;
  vector_view<const T> log_counts;  // optional: where it is absent, no component is empty
  matrix_view<const T> means;
  stack_view<const T> factors;
  matrix_view<const T> diagonal;  // optional
  batches<kArrays> batch;
  std::int64_t n;
  std::int64_t k;
  std::int64_t depth;
  std::int64_t rank;

  explicit mixture_arrays(const mixture& m)
      : x(matrix_at<const T>(m.x, 0)),
        log_counts(m.log_counts ? vector_at<const T>(*m.log_counts, 0) : vector_view<const T>{}),
        means(matrix_at<const T>(m.means, 0)),
        factors(stack_at<const T>(m.factors, 0)),
        diagonal(m.diagonal ? matrix_at<const T>(*m.diagonal, 0) : matrix_view<const T>{}),
        batch(batches_of<kArrays>(
            m.shape,
            {{&m.x, 2}, {m.log_counts, 1}, {&m.means, 2}, {&m.factors, 3}, {m.diagonal, 2}})),
        n(m.size.n),
        k(m.size.k),
        depth(m.size.d),
        rank(m.size.r) {}

  // Of batch entry b. An empty component counts for nothing, whatever its statistics are.
  SUBQUAD_DEVICE T log_count(std::int64_t b, std::int64_t a) const {
    return log_counts.data[batch.offset(kLogCounts, b) + a * log_counts.stride];
  }
  SUBQUAD_DEVICE bool is_empty(std::int64_t b, std::int64_t a) const {
    return log_counts && log_count(b, a) == -infinity<T>();
  }
  // Factor a of batch entry b.
  SUBQUAD_DEVICE matrix_view<const T> factor(std::int64_t b, std::int64_t a) const {
    matrix_view<const T> found = factors[a];
    found.data += batch.offset(kFactors, b);
    return found;
  }
};

// Rows [first_row, first_row + rows) of the batch entries [first_batch, first_batch + size): what
// one round of launches computes.
struct mixture_slab {
  std::int64_t first_batch;
  std::int64_t size;
  std::int64_t first_row;
  std::int64_t rows;
};

inline constexpr std::int64_t kSlabBytes = std::int64_t{64} << 20;
inline constexpr std::int64_t kMomentRows = 128;  // of a block

// How a call is cut into slabs: a function of the shapes alone.
struct slab_cut {
  std::int64_t size;
  std::int64_t rows;
  // Elements between the columns of packed factors, 0 where they are used as they are: packing pays
  // from a few tiles of rows on, and where one entry's factors fit.
  std::int64_t packed_stride = 0;
  std::int64_t packed = 0;  // elements in all

  // Slabs of whole rows, `planes` numbers for each row and component in kSlabBytes unless a single
  // row takes more.
  slab_cut(const mixture_sizes& s, std::int64_t itemsize, std::int64_t planes)
      : size(1), rows(std::max<std::int64_t>(1, s.n)) {
    const std::int64_t row_bytes = std::max<std::int64_t>(1, planes * itemsize * s.k);
    const std::int64_t fit = std::max<std::int64_t>(1, kSlabBytes / row_bytes);
    if (fit < rows) {
      rows = fit < kMomentRows ? fit : fit / kMomentRows * kMomentRows;
    } else {
      size = std::clamp<std::int64_t>(fit / rows, 1, std::max<std::int64_t>(1, s.batch));
    }
    const std::int64_t vector = 16 / itemsize;
    const std::int64_t stride = divide_up(s.d, vector) * vector;
    const std::int64_t of_entry = s.k * s.r * stride;
    if (s.n < 4 * kMomentRows || of_entry == 0 || of_entry * itemsize > kSlabBytes) return;
    packed_stride = stride;
    size = std::min(size, kSlabBytes / (of_entry * itemsize));
    packed = size * of_entry;
  }

  // All rows of one batch entry at a time.
  static slab_cut of_entries(const mixture_sizes& s, std::int64_t itemsize) {
    slab_cut cut({1, s.n, s.k, s.d, s.r}, itemsize, 0);
    return cut;
  }

  template <class F>
  void for_each(const mixture_sizes& s, F&& body) const {
    for (std::int64_t b = 0; b < s.batch; b += size) {
      for (std::int64_t i = 0; i < s.n; i += rows) {
        body(mixture_slab{b, std::min(size, s.batch - b), i, std::min(rows, s.n - i)});
      }
    }
  }
};

// Moments of a slab: those of row i and component a of its entry b are b strides after (i, a).
template <class T>
struct moment_planes {
  matrix_view<T> mean;
  std::int64_t mean_stride;
  matrix_view<T> variance;
  std::int64_t variance_stride;
};

// mean_ia = x_i . means_a and variance_ia = |factors_a^T x_i|^2 + sum_t x_it^2 diagonal_at for the
// rows of a slab. `packed` holds cut.packed elements. The slabs of a batch entry come in the order
// of slab_cut::for_each: packed factors are used by all of them. Of an empty component, the
// variance is anything.
//
// mean: within d u sum_t |x_it| |means_at|, with u = 2^-24 or 2^-53. variance: with p_c and its
// error e_c as tile_product states them for the columns c of the factor (float64: d u sum |x| |f|),
// within sum_c (2 |p_c| e_c + e_c^2) + (ceil(r / 64) + d + 13) u variance.
template <class T>
void score_moments(const mixture_arrays<T>& mixture, const slab_cut& cut, const mixture_slab& slab,
                   T* packed, const moment_planes<T>& planes);
extern template void score_moments(const mixture_arrays<float>&, const slab_cut&,
                                   const mixture_slab&, float*, const moment_planes<float>&);
extern template void score_moments(const mixture_arrays<double>&, const slab_cut&,
                                   const mixture_slab&, double*, const moment_planes<double>&);

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_GAUSSIAN_MOMENTS_CUH

// The nearest centroid of each row.
#include "clusters_checks.hpp"
#include "column_split.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "normalizers_core.hpp"
#include "tile_product.cuh"

namespace subquad::cuda {
namespace {

// The best of the scores seen so far, and the index of the first that reached it.
template <class T>
struct best_score {
  T score;
  int index;

  static SUBQUAD_DEVICE best_score nothing() { return {-infinity<T>(), 0}; }

  SUBQUAD_DEVICE void merge(const best_score& other) {
    if (other.score > score || (other.score == score && other.index < index)) *this = other;
  }
};

template <class T>
struct nearest_arguments {
  matrix_view<const T> x;
  matrix_view<const T> centroids;
  vector_view<const T> offsets;
  vector_view<std::int64_t> labels;
  vector_view<T> score;
  std::int64_t n;
  std::int64_t k;
  std::int64_t depth;

  // The best over centroids of which the first is `first`.
  SUBQUAD_DEVICE void write(std::int64_t i, std::int64_t first, const best_score<T>& best) const {
    labels[i] = first + best.index;
    score[i] = best.score;
  }
};

// labels_i = argmax_c x_i . centroids_c + offsets_c and its score, the lowest index among equals,
// -inf and label 0 where no score is above -inf; or, where centroids are cut into parts, the best
// of each part, in states[part][n]. One block computes a tile of rows against one part.
//
// Nothing aliases. A score is within tile_product's bound and one rounding of the exact one, and no
// exact score is above that of the label by more than the bounds of both. NaN is no score.
template <class T>
struct nearest_kernel {
  using tile = default_tile_t<T>;
  static constexpr int kThreads = tile::kThreads;
  static constexpr int kBlocks = sizeof(T) == 8 ? 1 : 2;  // 64 accumulators, twice as wide
  struct shared_memory {
    typename tile::shared_memory product;
    // Of the threads' rows, of which each thread touches its own.
    best_score<T> best[tile::kThreadRows][kThreads];
    T offsets[2][tile::kColumns];  // of a tile's columns, -inf for none
    vector_view<const T> all_offsets;
    std::int64_t part;
    std::int64_t first_row;
  };

  nearest_arguments<T> arguments;
  std::int64_t columns;  // of a part
  std::int64_t parts;
  best_score<T>* states;  // null where there is one part

  SUBQUAD_DEVICE void operator()(shared_memory& shared) const {
    if (threadIdx.x == 0) locate(shared);
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      shared.best[r][threadIdx.x] = best_score<T>::nothing();
    }
    __syncthreads();
    tile::run(
        shared.product, [&](int first_column) { prepare(first_column, shared); },
        [&](int first_column, typename tile::accumulators& scores) {
          select(first_column, scores, shared);
        });

    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      best_score<T> best = shared.best[r][threadIdx.x];
      SUBQUAD_UNROLL
      for (int flip = 1; flip < 4; flip *= 2) {
        best.merge({__shfl_xor_sync(0xffffffffu, best.score, flip),
                    __shfl_xor_sync(0xffffffffu, best.index, flip)});
      }
      shared.best[r][threadIdx.x] = best;
    }
    __syncthreads();
    const int n_rows = shared.product.x.count;
    for (int row = static_cast<int>(threadIdx.x); row < n_rows; row += kThreads) {
      best_score<T> best = best_score<T>::nothing();
      for (int across = 0; across < tile::kWarpsOfRow; ++across) {
        int thread;
        int r;
        tile::holder(row, across, thread, r);
        best.merge(shared.best[r][thread]);
      }
      const std::int64_t i = shared.first_row + row;
      if (states) {
        states[shared.part * arguments.n + i] = best;
      } else {
        arguments.write(i, 0, best);
      }
    }
  }

  // What the block computes, and where its operands lie.
  SUBQUAD_DEVICE void locate(shared_memory& shared) const {
    const nearest_arguments<T>& a = arguments;
    shared.part = static_cast<std::int64_t>(blockIdx.x) % parts;
    shared.first_row = static_cast<std::int64_t>(blockIdx.x) / parts * tile::kRows;
    const std::int64_t first = shared.part * columns;
    const std::int64_t end_row = shared.first_row + tile::kRows;
    const std::int64_t end = first + columns;
    shared.product.x =
        rows_between(a.x, 0, shared.first_row, end_row < a.n ? end_row : a.n, a.depth);
    shared.product.y = rows_between(a.centroids, 0, first, end < a.k ? end : a.k, a.depth);
    shared.all_offsets = a.offsets.from(first);
  }

  SUBQUAD_DEVICE void prepare(int first_column, shared_memory& shared) const {
    for (int c = static_cast<int>(threadIdx.x); c < tile::kColumns; c += kThreads) {
      const int j = first_column + c;
      shared.offsets[tile::parity(first_column)][c] =
          j < shared.product.y.count ? shared.all_offsets[j] : -infinity<T>();
    }
  }

  // Takes the best of a tile of scores into those of the thread's rows.
  SUBQUAD_DEVICE void select(int first_column, typename tile::accumulators& scores,
                             shared_memory& shared) const {
    const T* offsets = shared.offsets[tile::parity(first_column)];
    bool is_nan = false;
    SUBQUAD_UNROLL
    for (int c = 0; c < tile::kThreadColumns; ++c) {
      const T offset = offsets[tile::column(c)];
      const bool counts = offset > -infinity<T>();  // else no score can be above
      SUBQUAD_UNROLL
      for (int r = 0; r < tile::kThreadRows; ++r) {
        T& score = scores(r, c);
        score = counts ? score + offset : -infinity<T>();
        is_nan = is_nan || isnan(score);
      }
    }
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      best_score<T> best = shared.best[r][threadIdx.x];
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        if (scores(r, c) > best.score) best = {scores(r, c), first_column + tile::column(c)};
      }
      shared.best[r][threadIdx.x] = best;
    }
    if constexpr (tile::warp::kIsSplit) {
      if (is_nan) settle(first_column, scores, shared);
    }
  }

  // Scores that are NaN, from plain arithmetic: one that the split made NaN may be infinite, or
  // finite.
  SUBQUAD_DEVICE void settle(int first_column, typename tile::accumulators& scores,
                             shared_memory& shared) const {
    SUBQUAD_UNROLL
    for (int r = 0; r < tile::kThreadRows; ++r) {
      unsigned left = 0;
      SUBQUAD_UNROLL
      for (int c = 0; c < tile::kThreadColumns; ++c) {
        left |= isnan(scores(r, c)) ? 1u << c : 0;
      }
      const int row = tile::row(r);
      if (row >= shared.product.x.count) continue;
      SUBQUAD_NO_UNROLL
      for (int c = 0; left != 0; ++c, left >>= 1) {
        if ((left & 1) == 0) continue;
        const int column = tile::column(c);
        const T score =
            plain_product(shared.product.x, row, shared.product.y, first_column + column) +
            shared.offsets[tile::parity(first_column)][column];
        shared.best[r][threadIdx.x].merge({score, first_column + column});
      }
    }
  }
};

// labels_i and score_i from the best of each part.
template <class T>
struct nearest_finish {
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 1;
  struct shared_memory {};

  nearest_arguments<T> arguments;
  std::int64_t columns;
  std::int64_t parts;
  const best_score<T>* states;  // [part][n]

  SUBQUAD_DEVICE void operator()(shared_memory&) const {
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= arguments.n) return;
    best_score<T> best = states[i];
    std::int64_t first = 0;  // a part with nothing above -inf is not better than the first
    for (std::int64_t part = 1; part < parts; ++part) {
      const best_score<T> other = states[part * arguments.n + i];
      if (!(other.score > best.score)) continue;
      best = other;
      first = part * columns;
    }
    arguments.write(i, first, best);
  }
};

template <class T>
column_split split_of(std::int64_t n, std::int64_t k) {
  using tile = default_tile_t<T>;
  return column_split(1, n, k, tile::kRows, tile::kColumns);
}

template <class T>
best_score<T>* take_states(workspace_layout& workspace, const column_split& cut, std::int64_t n) {
  return workspace.take<best_score<T>>(cut.parts > 1 ? cut.parts * n : 0);
}

template <class T>
void nearest_centroids_as(const array_view& x, const array_view& centroids,
                          const array_view& offsets, const array_view& labels,
                          const array_view& score, const array_view& workspace) {
  nearest_arguments<T> arguments{};
  arguments.x = matrix_at<const T>(x, 0);
  arguments.centroids = matrix_at<const T>(centroids, 0);
  arguments.offsets = vector_at<const T>(offsets, 0);
  arguments.labels = vector_at<std::int64_t>(labels, 0);
  arguments.score = vector_at<T>(score, 0);
  arguments.n = x.shape[0];
  arguments.k = centroids.shape[0];
  arguments.depth = x.shape[1];
  const column_split cut = split_of<T>(arguments.n, arguments.k);
  workspace_layout pieces(workspace);
  best_score<T>* states = take_states<T>(pieces, cut, arguments.n);
  launch(cut.row_tiles * cut.parts,
         nearest_kernel<T>{arguments, cut.columns, cut.parts, cut.parts > 1 ? states : nullptr});
  if (cut.parts == 1) return;
  using finish = nearest_finish<T>;
  launch(divide_up(arguments.n, finish::kThreads),
         finish{arguments, cut.columns, cut.parts, states});
}

template <class T>
std::size_t workspace_as(std::int64_t n, std::int64_t k) {
  workspace_layout workspace;
  take_states<T>(workspace, split_of<T>(n, k), n);
  return workspace.size();
}

}  // namespace
}  // namespace subquad::cuda

namespace subquad::core {

std::size_t nearest_centroids_workspace(std::int64_t n, std::int64_t k, std::int64_t,
                                        std::int64_t itemsize) {
  return itemsize == 8 ? cuda::workspace_as<double>(n, k) : cuda::workspace_as<float>(n, k);
}

void nearest_centroids(const array_view& x, const array_view& centroids, const array_view& offsets,
                       const array_view& labels, const array_view& score,
                       const array_view& workspace) {
  check_nearest_centroids(x, centroids, offsets, labels, score);
  if (x.shape[0] == 0) return;
  (x.type == dtype::float32
       ? cuda::nearest_centroids_as<float>
       : cuda::nearest_centroids_as<double>)(x, centroids, offsets, labels, score, workspace);
}

}  // namespace subquad::core

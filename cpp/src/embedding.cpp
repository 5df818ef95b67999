#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>

#include "arguments.hpp"
#include "csr_parts.hpp"
#include "embedding_checks.hpp"
#include "embedding_core.hpp"
#include "isa.hpp"
#include "kernels/embedding_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(embedding)

namespace subquad::core {
namespace {

template <class T>
const embedding_functions<T>& functions() {
  if constexpr (sizeof(T) == 4) {
    return embedding_table().f32;
  } else {
    return embedding_table().f64;
  }
}

// Rows whose pulls are made at once, a multiple of the rows side by side at every level.
constexpr std::int64_t kRows = 64;

// Multiply-adds by dimension, counted as in csr_parts.hpp: of an entry, and of a row beside its
// products with matrices, which is passed over a dozen times.
constexpr std::int64_t kEntryWeight = 4;
constexpr std::int64_t kRowWeight = 24;

std::int64_t weight_of_row(const embedding_sizes& size) {
  return kRowWeight + size.d * (size.k + size.c);
}

// The rows cut into parts of about equal work, of 20 us where the rows of the matrix come from the
// caches, wherever the threads are. `entries(row)`: those of the matrix before a row.
template <class F>
class row_cut {
 public:
  row_cut(const embedding_sizes& size, F entries)
      : entries_(entries),
        n_(size.n),
        row_weight_(weight_of_row(size)),
        weight_(std::max<std::int64_t>(1, (1 << 20) / std::max<std::int64_t>(size.d, 1))) {}

  std::int64_t count() const { return divide_up(weight_before(n_), weight_); }

  // Where a part begins.
  std::int64_t begin(std::int64_t part) const {
    if (part >= count()) return n_;
    std::int64_t row = 0;
    for (std::int64_t above = n_; above > row;) {
      const std::int64_t middle = row + (above - row) / 2;
      if (weight_before(middle) < part * weight_) {
        row = middle + 1;
      } else {
        above = middle;
      }
    }
    return row / kRows * kRows;
  }

 private:
  std::int64_t weight_before(std::int64_t row) const {
    return kEntryWeight * entries_(row) + row_weight_ * row;
  }

  F entries_;
  std::int64_t n_;
  std::int64_t row_weight_;
  std::int64_t weight_;
};
template <class F>
row_cut(const embedding_sizes&, F) -> row_cut<F>;

template <class T>
struct step_pieces {
  T* covariances;
  T* slopes;
  std::size_t pull_bytes;
  workspace_layout::slots slots;

  step_pieces(workspace_layout& workspace, const embedding_sizes& size)
      : covariances(workspace.take<T>(size.k * size.d * size.d)),
        slopes(workspace.take<T>(size.c * size.d * size.d)),
        pull_bytes(static_cast<std::size_t>(size.d * kRows) * sizeof(T)),
        slots(workspace.take_slots(
            pull_bytes + functions<T>().scratch(size.d, size.k + size.c),
            row_cut(size, [&](std::int64_t row) { return row < size.n ? 0 : size.nnz; }).count())) {
  }
};

template <class T>
void pack_all(const array_view& matrices, std::int64_t d, T* packed) {
  const auto from = stack_at<const T>(matrices, 0);
  const std::int64_t count = matrices.shape[0];
  const double work = static_cast<double>(count) * static_cast<double>(d) * static_cast<double>(d);
  parallel_for(count, threads_for(work, available_threads()),
               [&](std::int64_t a, int) { functions<T>().pack(from[a], d, packed + a * d * d); });
}

void require_labels(const array_view& labels, std::int64_t c) {
  const auto values = vector_at<const std::int64_t>(labels, 0);
  const std::int64_t n = labels.shape[0];
  for (std::int64_t i = 0; i < n; ++i) {
    if (values[i] >= 0 && values[i] < c) continue;
    throw invalid_argument("labels: expected at least 0 and less than the " + std::to_string(c) +
                           " rows of shifts, got " + std::to_string(values[i]) + " at position " +
                           std::to_string(i));
  }
}

template <class T, class I>
void step_as(const embedding_sizes& size, const array_view& x, const array_view& rows,
             const embedding_terms& terms, double step, const array_view* out,
             const array_view* attraction, const array_view* log_z, const array_view& workspace) {
  workspace_layout layout(workspace);
  const step_pieces<T> pieces(layout, size);
  if (terms.labels) require_labels(*terms.labels, size.c);

  embedding_step_task<T> whole{};
  whole.x = matrix_at<const T>(x, 0);
  whole.d = size.d;
  whole.scale = static_cast<T>(terms.scale);
  whole.k = size.k;
  if (terms.log_counts) {
    pack_all<T>(*terms.covariances, size.d, pieces.covariances);
    whole.log_counts = vector_at<const T>(*terms.log_counts, 0);
    whole.means = matrix_at<const T>(*terms.means, 0);
    whole.covariances = pieces.covariances;
  }
  if (terms.labels) {
    pack_all<T>(*terms.slopes, size.d, pieces.slopes);
    whole.labels = vector_at<const std::int64_t>(*terms.labels, 0);
    whole.shifts = matrix_at<const T>(*terms.shifts, 0);
    whole.slopes = pieces.slopes;
  }
  if (terms.null) {
    whole.null_weights = vector_at<const T>(*terms.null_weights, 0);
    whole.null = vector_at<const T>(*terms.null, 0);
  }
  whole.cosine = static_cast<T>(std::sqrt((1 - step) * (1 + step)));
  whole.step = static_cast<T>(step);
  if (out) whole.out = matrix_at<T>(*out, 0);
  if (attraction) whole.attraction = vector_at<T>(*attraction, 0);
  if (log_z) whole.log_z = vector_at<T>(*log_z, 0);

  const auto run = [&](const auto& cut, double entries, const auto& pull) {
    const double work = entries * work_of_entry<T>(size.m, size.d) +
                        static_cast<double>(size.n) * static_cast<double>(size.d) *
                            static_cast<double>(weight_of_row(size));
    parallel_for(cut.count(), threads_for(work, pieces.slots.count),
                 [&](std::int64_t part, int slot) {
                   embedding_step_task<T> task = whole;
                   T* const pulls = static_cast<T*>(pieces.slots[slot]);
                   task.scratch = static_cast<char*>(pieces.slots[slot]) + pieces.pull_bytes;
                   const std::int64_t end = cut.begin(part + 1);
                   for (std::int64_t row = cut.begin(part); row < end; row += task.n) {
                     task.n = std::min(kRows, end - row);
                     if (!pull(row, pulls, task)) return;
                     task.x = whole.x.from(row);
                     task.labels = whole.labels.from(row);
                     task.null_weights = whole.null_weights.from(row);
                     if (out) task.out = whole.out.from(row);
                     task.attraction = whole.attraction.from(row);
                     task.log_z = whole.log_z.from(row);
                     functions<T>().step(task);
                   }
                 });
  };
  const matrix_view<const T> from = matrix_at<const T>(rows, 0);
  if (!terms.data) {
    run(row_cut(size, [](std::int64_t) { return std::int64_t{0}; }), 0.0,
        [&](std::int64_t row, T*, embedding_step_task<T>& task) {
          task.pull = from.from(row);
          return true;
        });
    return;
  }
  const csr_matrix<I> matrix(*terms.indices, *terms.indptr, size.m, size.nnz);
  std::atomic<bool> valid{true};
  run(row_cut(size, [&](std::int64_t row) { return matrix.at(row) - matrix.first_entry(); }),
      static_cast<double>(size.nnz), [&](std::int64_t row, T* pulls, embedding_step_task<T>& task) {
        csr_product_task<T, I> product{};
        product.part = matrix.rows_from(row, task.n);
        product.data = vector_at<const T>(*terms.data, 0);
        product.x = from;
        product.out = {pulls, size.d, 1};
        product.d = size.d;
        product.scale = T(1);
        product.is_far = is_far<T>(size.m, size.d);
        task.pull = {pulls, size.d, 1};
        const bool is_valid = csr_functions_of<T, I>().product(product);
        if (!is_valid) valid.store(false, std::memory_order_relaxed);
        return is_valid;
      });
  if (!valid.load()) matrix.reject_index("rows");
}

}  // namespace

std::size_t embedding_step_workspace(std::int64_t n, std::int64_t m, std::int64_t nnz,
                                     std::int64_t d, std::int64_t k, std::int64_t c,
                                     std::int64_t itemsize) {
  const embedding_sizes size{n, m, nnz, d, k, c};
  workspace_layout workspace;
  if (itemsize == 4) {
    step_pieces<float>(workspace, size);
  } else {
    step_pieces<double>(workspace, size);
  }
  return workspace.size();
}

void embedding_step(const array_view& x, const array_view& rows, const embedding_terms& terms,
                    double step, const array_view* out, const array_view* attraction,
                    const array_view* log_z, const array_view& workspace) {
  const embedding_sizes size = check_embedding_step(x, rows, terms, step, out, attraction, log_z);
  const bool wide = terms.indices && terms.indices->type == dtype::int64;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    (wide ? step_as<T, std::int64_t> : step_as<T, std::int32_t>)(size, x, rows, terms, step, out,
                                                                 attraction, log_z, workspace);
  };
  if (x.type == dtype::float32) {
    run(float{});
  } else {
    run(double{});
  }
}

}  // namespace subquad::core

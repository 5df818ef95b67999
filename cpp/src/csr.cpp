#include <algorithm>
#include <atomic>

#include "arguments.hpp"
#include "factors_checks.hpp"
#include "factors_core.hpp"
#include "isa.hpp"
#include "kernels/csr_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(csr)

namespace subquad::core {
namespace {

template <class T>
const csr_functions<T>& functions();
template <>
const csr_functions<float>& functions() {
  return csr_table().f32;
}
template <>
const csr_functions<double>& functions() {
  return csr_table().f64;
}

template <class T, class I>
const csr_directions<T, I>& directions() {
  if constexpr (sizeof(I) == 4) {
    return functions<T>().int32;
  } else {
    return functions<T>().int64;
  }
}

// Bytes of x that stay in the caches: past them, asking ahead for rows gains a tenth or more of the
// time, below it costs up to a tenth.
constexpr double kCaches = 16 << 20;

// Non-zeros and rows of a task, from the sizes alone: about 20 us of work where x lies in the
// caches, or so many that there are 4096 tasks, for each of which the workspace holds a row.
std::int64_t weight_of_task(const csr_sizes& size) {
  return std::max({std::int64_t{256}, (1 << 18) / std::max<std::int64_t>(size.d, 1),
                   (size.rows + size.nnz) / 4096});
}

template <class T>
bool is_far(const csr_sizes& size) {
  return static_cast<double>(size.columns) * static_cast<double>(size.d) * sizeof(T) > kCaches;
}

// In multiply-adds on what the first-level cache holds: rows from the caches beyond it take four
// times as long, and from memory sixteen times.
template <class T>
double work_of(const csr_sizes& size) {
  return (is_far<T>(size) ? 16.0 : 4.0) * static_cast<double>(size.batch) *
         static_cast<double>(size.rows + size.nnz) * static_cast<double>(size.d + 8);
}

// A matrix cut into parts of about equal numbers of rows and non-zeros, wherever the threads are.
// Parts begin where rows do, but within rows that are longer than a part.
template <class I>
class csr_cut {
 public:
  csr_cut(const array_view& indices, const array_view& indptr, const csr_sizes& size)
      : indices_(vector_at<const I>(indices, 0)),
        indptr_(vector_at<const I>(indptr, 0)),
        columns_(size.columns),
        rows_(size.rows),
        weight_(weight_of_task(size)) {
    require_indptr(size.nnz);
    first_ = at(0);
    count_ = divide_up(at(rows_) - first_ + rows_, weight_);
  }

  std::int64_t count() const { return count_; }
  std::int64_t first_entry() const { return first_; }
  std::int64_t last_entry() const { return at(rows_); }

  csr_part<I> operator[](std::int64_t part) const {
    return {indices_, indptr_, columns_, begin(part), begin(part + 1)};
  }

  // Where a part begins.
  csr_position begin(std::int64_t part) const {
    if (part >= count_) return {rows_, at(rows_)};
    const std::int64_t target = part * weight_;
    std::int64_t row = 0;
    for (std::int64_t above = rows_; above - row > 1;) {
      const std::int64_t middle = row + (above - row) / 2;
      (weight_before(middle) <= target ? row : above) = middle;
    }
    if (at(row + 1) - at(row) <= weight_) return {row, at(row)};
    const std::int64_t entry = at(row) + target - weight_before(row);
    return entry < at(row + 1) ? csr_position{row, entry} : csr_position{row + 1, entry};
  }

  bool begins_within_row(const csr_position& position) const {
    return position.entry > at(position.row);
  }

  // Throws for the first index that is out of range.
  [[noreturn]] void reject_index() const {
    std::int64_t e = first_entry();
    const auto index = [&] { return static_cast<std::int64_t>(indices_[e]); };
    while (e + 1 < last_entry() && index() >= 0 && index() < columns_) ++e;
    throw invalid_argument("indices: expected at least 0 and less than the " +
                           std::to_string(columns_) + " rows of x, got " + std::to_string(index()) +
                           " at position " + std::to_string(e));
  }

 private:
  std::int64_t at(std::int64_t row) const { return static_cast<std::int64_t>(indptr_[row]); }

  std::int64_t weight_before(std::int64_t row) const { return at(row) - first_ + row; }

  void require_indptr(std::int64_t nnz) const {
    constexpr std::int64_t kRows = 1 << 16;
    std::atomic<bool> rising{at(0) >= 0 && at(rows_) <= nnz};
    parallel_for(divide_up(rows_, kRows),
                 threads_for(static_cast<double>(rows_), available_threads()),
                 [&](std::int64_t task, int) {
                   const std::int64_t end = std::min((task + 1) * kRows, rows_);
                   bool good = true;
                   for (std::int64_t row = task * kRows; row < end; ++row) {
                     good = good & (indptr_[row] <= indptr_[row + 1]);
                   }
                   if (!good) rising.store(false, std::memory_order_relaxed);
                 });
    if (rising.load()) return;
    std::int64_t row = 0;
    std::int64_t least = 0;
    for (; row < rows_ && at(row) >= least && at(row) <= nnz; ++row) least = at(row);
    throw invalid_argument(
        "indptr: expected numbers that do not decrease, from at least 0 to at "
        "most nnz = " +
        std::to_string(nnz) + ", got " + std::to_string(at(row)) + " at position " +
        std::to_string(row));
  }

  vector_view<const I> indices_;
  vector_view<const I> indptr_;
  std::int64_t columns_;
  std::int64_t rows_;
  std::int64_t weight_;
  std::int64_t first_ = 0;
  std::int64_t count_ = 0;
};

// What the continued part of a row that is longer than a part adds up to, for every part and index
// of the batch.
template <class T>
T* take_carries(workspace_layout& workspace, const csr_sizes& size, std::int64_t parts) {
  return workspace.take<T>(size.batch * parts * size.d);
}

template <class T, class I>
void product_as(const csr_call& call, const array_view& data, const array_view& indices,
                const array_view& indptr, const array_view& x, const array_view* addend,
                double scale, const array_view& out, const array_view& workspace) {
  const csr_sizes& size = call.size;
  const csr_cut<I> cut(indices, indptr, size);
  const std::int64_t parts = cut.count();
  workspace_layout pieces(workspace);
  T* carries = take_carries<T>(pieces, size, parts);
  std::atomic<bool> valid{true};
  std::atomic<bool> carried{false};
  parallel_for(size.batch * parts, threads_for(work_of<T>(size), available_threads()),
               [&](std::int64_t index, int) {
                 const std::int64_t b = index / parts;
                 csr_product_task<T, I> task{};
                 task.part = cut[index % parts];
                 task.data = vector_at<const T>(data, 0);
                 task.x = matrix_at<const T>(x, call.shape.offset(x, 2, b));
                 if (addend) {
                   task.addend = matrix_at<const T>(*addend, call.shape.offset(*addend, 2, b));
                 }
                 task.out = matrix_at<T>(out, call.shape.offset(out, 2, b));
                 task.d = size.d;
                 task.scale = static_cast<T>(scale);
                 task.carry = carries + index * size.d;
                 task.is_far = is_far<T>(size);
                 if (cut.begins_within_row(task.part.begin)) {
                   carried.store(true, std::memory_order_relaxed);
                 }
                 if (!directions<T, I>().product(task)) {
                   valid.store(false, std::memory_order_relaxed);
                 }
               });
  if (!valid.load()) cut.reject_index();
  if (!carried.load()) return;
  for (std::int64_t part = 0; part < parts; ++part) {
    const csr_position begin = cut.begin(part);
    if (!cut.begins_within_row(begin)) continue;
    for (std::int64_t b = 0; b < size.batch; ++b) {
      const T* carry = carries + (b * parts + part) * size.d;
      const matrix_view<T> to = matrix_at<T>(out, call.shape.offset(out, 2, b));
      for (std::int64_t k = 0; k < size.d; ++k) {
        to(begin.row, k) += static_cast<T>(scale) * carry[k];
      }
    }
  }
}

template <class T, class I>
void reverse_as(const csr_call& call, const array_view& grad, const array_view& indices,
                const array_view& indptr, const array_view& x, const array_view& grad_data) {
  const csr_sizes& size = call.size;
  const csr_cut<I> cut(indices, indptr, size);
  const vector_view<T> to = vector_at<T>(grad_data, 0);
  const bool none = size.batch * size.d == 0;
  for (std::int64_t e = 0; e < (none ? size.nnz : cut.first_entry()); ++e) to[e] = T(0);
  for (std::int64_t e = none ? size.nnz : cut.last_entry(); e < size.nnz; ++e) to[e] = T(0);
  std::atomic<bool> valid{true};
  parallel_for(cut.count(), threads_for(work_of<T>(size), available_threads()),
               [&](std::int64_t part, int) {
                 csr_reverse_task<T, I> task{};
                 task.part = cut[part];
                 task.grad_data = to;
                 task.d = size.d;
                 task.is_far = is_far<T>(size);
                 for (std::int64_t b = 0; b < size.batch; ++b) {
                   task.grad = matrix_at<const T>(grad, call.shape.offset(grad, 2, b));
                   task.x = matrix_at<const T>(x, call.shape.offset(x, 2, b));
                   task.accumulate = b > 0;
                   if (!directions<T, I>().reverse(task)) {
                     valid.store(false, std::memory_order_relaxed);
                   }
                 }
               });
  if (!valid.load()) cut.reject_index();
}

}  // namespace

std::size_t csr_product_workspace(std::int64_t batch, std::int64_t rows, std::int64_t columns,
                                  std::int64_t nnz, std::int64_t d, std::int64_t itemsize) {
  const csr_sizes size{batch, rows, columns, nnz, d};
  const std::int64_t parts = divide_up(rows + nnz, weight_of_task(size));
  workspace_layout workspace;
  if (itemsize == 4) {
    take_carries<float>(workspace, size, parts);
  } else {
    take_carries<double>(workspace, size, parts);
  }
  return workspace.size();
}

void csr_product(const array_view& data, const array_view& indices, const array_view& indptr,
                 const array_view& x, const array_view* addend, double scale, const array_view& out,
                 const array_view& workspace) {
  const csr_call call = check_csr_product(data, indices, indptr, x, addend, out);
  const bool narrow = indices.type == dtype::int32;
  if (data.type == dtype::float32) {
    (narrow ? product_as<float, std::int32_t>
            : product_as<float, std::int64_t>)(call, data, indices, indptr, x, addend, scale, out,
                                               workspace);
  } else {
    (narrow ? product_as<double, std::int32_t>
            : product_as<double, std::int64_t>)(call, data, indices, indptr, x, addend, scale, out,
                                                workspace);
  }
}

std::size_t csr_product_vjp_workspace(std::int64_t /*batch*/, std::int64_t /*rows*/,
                                      std::int64_t /*columns*/, std::int64_t /*nnz*/,
                                      std::int64_t /*d*/, std::int64_t /*itemsize*/) {
  return workspace_layout().size();
}

void csr_product_vjp(const array_view& grad, const array_view& indices, const array_view& indptr,
                     const array_view& x, const array_view& grad_data,
                     const array_view& /*workspace*/) {
  const csr_call call = check_csr_product_vjp(grad, indices, indptr, x, grad_data);
  const bool narrow = indices.type == dtype::int32;
  if (grad_data.type == dtype::float32) {
    (narrow ? reverse_as<float, std::int32_t>
            : reverse_as<float, std::int64_t>)(call, grad, indices, indptr, x, grad_data);
  } else {
    (narrow ? reverse_as<double, std::int32_t>
            : reverse_as<double, std::int64_t>)(call, grad, indices, indptr, x, grad_data);
  }
}

}  // namespace subquad::core

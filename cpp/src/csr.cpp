#include <algorithm>
#include <atomic>

#include "csr_parts.hpp"
#include "factors_checks.hpp"
#include "factors_core.hpp"

namespace subquad::core {
namespace {

// Non-zeros and rows of a task, from the sizes alone: about 20 us of work where x lies in the
// caches, or so many that there are 4096 tasks, for each of which the workspace holds a row.
std::int64_t weight_of_task(const csr_sizes& size) {
  return std::max({std::int64_t{256}, (1 << 18) / std::max<std::int64_t>(size.d, 1),
                   (size.rows + size.nnz) / 4096});
}

template <class T>
double work_of(const csr_sizes& size) {
  return static_cast<double>(size.batch) * static_cast<double>(size.rows + size.nnz) *
         work_of_entry<T>(size.columns, size.d);
}

// A matrix cut into parts of about equal numbers of rows and non-zeros, wherever the threads are.
// Parts begin where rows do, but within rows that are longer than a part.
template <class I>
class csr_cut : public csr_matrix<I> {
 public:
  csr_cut(const array_view& indices, const array_view& indptr, const csr_sizes& size)
      : csr_matrix<I>(indices, indptr, size.columns, size.nnz),
        weight_(weight_of_task(size)),
        count_(divide_up(last_entry() - first_entry() + rows(), weight_)) {}

  using csr_matrix<I>::at;
  using csr_matrix<I>::first_entry;
  using csr_matrix<I>::last_entry;
  using csr_matrix<I>::rows;

  std::int64_t count() const { return count_; }

  csr_part<I> operator[](std::int64_t part) const {
    return csr_matrix<I>::part(begin(part), begin(part + 1));
  }

  // Where a part begins.
  csr_position begin(std::int64_t part) const {
    if (part >= count_) return {rows(), last_entry()};
    const std::int64_t target = part * weight_;
    std::int64_t row = 0;
    for (std::int64_t above = rows(); above - row > 1;) {
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

 private:
  std::int64_t weight_before(std::int64_t row) const { return at(row) - first_entry() + row; }

  std::int64_t weight_;
  std::int64_t count_;
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
                 task.is_far = is_far<T>(size.columns, size.d);
                 if (cut.begins_within_row(task.part.begin)) {
                   carried.store(true, std::memory_order_relaxed);
                 }
                 if (!csr_functions_of<T, I>().product(task)) {
                   valid.store(false, std::memory_order_relaxed);
                 }
               });
  if (!valid.load()) cut.reject_index("x");
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
                 task.is_far = is_far<T>(size.columns, size.d);
                 for (std::int64_t b = 0; b < size.batch; ++b) {
                   task.grad = matrix_at<const T>(grad, call.shape.offset(grad, 2, b));
                   task.x = matrix_at<const T>(x, call.shape.offset(x, 2, b));
                   task.accumulate = b > 0;
                   if (!csr_functions_of<T, I>().reverse(task)) {
                     valid.store(false, std::memory_order_relaxed);
                   }
                 }
               });
  if (!valid.load()) cut.reject_index("x");
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

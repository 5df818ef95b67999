// What the products with matrices in compressed rows share: the matrix as the tasks see it, and
// what its entries cost.
#ifndef SUBQUAD_CSR_PARTS_HPP
#define SUBQUAD_CSR_PARTS_HPP

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

#include "arguments.hpp"
#include "isa.hpp"
#include "kernels/csr_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(csr)

namespace subquad::core {

template <class T, class I>
const csr_directions<T, I>& csr_functions_of() {
  const auto& functions = [&]() -> const csr_functions<T>& {
    if constexpr (sizeof(T) == 4) {
      return csr_table().f32;
    } else {
      return csr_table().f64;
    }
  }();
  if constexpr (sizeof(I) == 4) {
    return functions.int32;
  } else {
    return functions.int64;
  }
}

// Bytes of x that stay in the caches: past them, asking ahead for rows gains a tenth or more of the
// time, below it costs up to a tenth.
constexpr double kCaches = 16 << 20;

template <class T>
bool is_far(std::int64_t columns, std::int64_t d) {
  return static_cast<double>(columns) * static_cast<double>(d) * sizeof(T) > kCaches;
}

// Of an entry, in multiply-adds on what the first-level cache holds: rows from the caches beyond it
// take four times as long, and from memory sixteen times.
template <class T>
double work_of_entry(std::int64_t columns, std::int64_t d) {
  return (is_far<T>(columns, d) ? 16.0 : 4.0) * static_cast<double>(d + 8);
}

// Throws where indptr is no row borders of `nnz` entries; indices are looked at by the tasks.
template <class I>
class csr_matrix {
 public:
  csr_matrix(const array_view& indices, const array_view& indptr, std::int64_t columns,
             std::int64_t nnz)
      : indices_(vector_at<const I>(indices, 0)),
        indptr_(vector_at<const I>(indptr, 0)),
        columns_(columns),
        rows_(indptr.shape[0] - 1) {
    require_indptr(nnz);
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t first_entry() const { return at(0); }
  std::int64_t last_entry() const { return at(rows_); }

  // Where the entries of a row begin.
  std::int64_t at(std::int64_t row) const { return static_cast<std::int64_t>(indptr_[row]); }

  csr_part<I> part(const csr_position& begin, const csr_position& end) const {
    return {indices_, indptr_, columns_, begin, end};
  }

  // Whole rows, counted from `begin` on.
  csr_part<I> rows_from(std::int64_t begin, std::int64_t count) const {
    return {indices_, indptr_.from(begin), columns_, {0, at(begin)}, {count, at(begin + count)}};
  }

  // Throws for the first index that is out of range; `name` has the rows that they point to.
  [[noreturn]] void reject_index(const char* name) const {
    std::int64_t e = first_entry();
    const auto index = [&] { return static_cast<std::int64_t>(indices_[e]); };
    while (e + 1 < last_entry() && index() >= 0 && index() < columns_) ++e;
    throw invalid_argument("indices: expected at least 0 and less than the " +
                           std::to_string(columns_) + " rows of " + name + ", got " +
                           std::to_string(index()) + " at position " + std::to_string(e));
  }

 private:
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
};

}  // namespace subquad::core

#endif  // SUBQUAD_CSR_PARTS_HPP

// The function of the concept `embedding`, as the C ABI and the Python module call it.
//
// Formula and shapes stand in subquad/c_api.h. Optional arrays are pointers, null where absent.
// Outputs are written in full. `workspace` is uint8, 1-D, contiguous and at least as long as
// embedding_step_workspace says, with nnz = 0, k = 0, c = 0 for what is absent; it needs no
// alignment.
// Throws invalid_argument for a wrong shape or value and type_error for a wrong element type,
// naming the argument.
#ifndef SUBQUAD_EMBEDDING_CORE_HPP
#define SUBQUAD_EMBEDDING_CORE_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"

namespace subquad {

// What a step reads besides x and rows.
struct embedding_terms {
  const array_view* data;
  const array_view* indices;
  const array_view* indptr;
  double scale;
  const array_view* log_counts;
  const array_view* means;
  const array_view* covariances;
  const array_view* labels;
  const array_view* shifts;
  const array_view* slopes;
  const array_view* null_weights;
  const array_view* null;
};

}  // namespace subquad

namespace subquad::core {

std::size_t embedding_step_workspace(std::int64_t n, std::int64_t m, std::int64_t nnz,
                                     std::int64_t d, std::int64_t k, std::int64_t c,
                                     std::int64_t itemsize);
void embedding_step(const array_view& x, const array_view& rows, const embedding_terms& terms,
                    double step, const array_view* out, const array_view* attraction,
                    const array_view* log_z, const array_view& workspace);

}  // namespace subquad::core

#endif  // SUBQUAD_EMBEDDING_CORE_HPP

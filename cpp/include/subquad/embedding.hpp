// Embeddings on the sphere (EDRep): one epoch of one side.
//
// Formula and shapes stand in subquad/c_api.h under the same name. Optional arrays are pointers,
// null where absent; the workspace is for the device where the arrays lie.
// Throws invalid_argument (a value, rank or size), type_error (an element type or a device),
// device_error (reported by CUDA), out_of_memory or error.
#ifndef SUBQUAD_EMBEDDING_HPP
#define SUBQUAD_EMBEDDING_HPP

#include <cstddef>
#include <cstdint>

#include "subquad/array_view.hpp"
#include "subquad/c_api.h"
#include "subquad/call.hpp"

namespace subquad {

inline std::size_t embedding_step_workspace(std::int64_t n, std::int64_t m, std::int64_t nnz,
                                            std::int64_t d, std::int64_t k, std::int64_t c,
                                            std::int64_t itemsize,
                                            device_type device = device_type::cpu) {
  return subquad_embedding_step_workspace(n, m, nnz, d, k, c, itemsize,
                                          static_cast<std::int32_t>(device));
}

inline void embedding_step(const array_view& x, const array_view* data, const array_view* indices,
                           const array_view* indptr, const array_view& rows, double scale,
                           const array_view* log_counts, const array_view* means,
                           const array_view* covariances, const array_view* labels,
                           const array_view* shifts, const array_view* slopes,
                           const array_view* null_weights, const array_view* null, double step,
                           const array_view* out, const array_view* attraction,
                           const array_view* log_z, const array_view& workspace,
                           const context& how = {}) {
  using detail::as_c;
  detail::call(subquad_embedding_step, as_c(x), as_c(data), as_c(indices), as_c(indptr), as_c(rows),
               scale, as_c(log_counts), as_c(means), as_c(covariances), as_c(labels), as_c(shifts),
               as_c(slopes), as_c(null_weights), as_c(null), step, as_c(out), as_c(attraction),
               as_c(log_z), as_c(workspace), &how);
}

}  // namespace subquad

#endif  // SUBQUAD_EMBEDDING_HPP

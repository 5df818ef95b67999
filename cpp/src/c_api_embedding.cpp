// The function of the concept `embedding`, in both libraries: see c_api_call.hpp.
#include <cstddef>
#include <cstdint>

#include "c_api_call.hpp"
#include "embedding_core.hpp"
#include "subquad/c_api.h"

namespace core = subquad::core;
using subquad::c_api::common_place;
using subquad::c_api::optional_argument;
using subquad::c_api::required_argument;
using subquad::c_api::run;
using subquad::c_api::workspace_size;

size_t subquad_embedding_step_workspace(int64_t n, int64_t m, int64_t nnz, int64_t d, int64_t k,
                                        int64_t c, int64_t itemsize, int32_t device) {
  return workspace_size(SUBQUAD_SYMBOL(subquad_embedding_step_workspace),
                        core::embedding_step_workspace, device, n, m, nnz, d, k, c, itemsize);
}

subquad_status subquad_embedding_step(
    const subquad_array* x, const subquad_array* data, const subquad_array* indices,
    const subquad_array* indptr, const subquad_array* rows, double scale,
    const subquad_array* log_counts, const subquad_array* means, const subquad_array* covariances,
    const subquad_array* labels, const subquad_array* shifts, const subquad_array* slopes,
    const subquad_array* null_weights, const subquad_array* null, double step,
    const subquad_array* out, const subquad_array* attraction, const subquad_array* log_z,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error) {
  return run(
      SUBQUAD_SYMBOL(subquad_embedding_step), "x",
      [&](const common_place& at) {
        const optional_argument data_argument(data, "data", at);
        const optional_argument indices_argument(indices, "indices", at);
        const optional_argument indptr_argument(indptr, "indptr", at);
        const optional_argument log_counts_argument(log_counts, "log_counts", at);
        const optional_argument means_argument(means, "means", at);
        const optional_argument covariances_argument(covariances, "covariances", at);
        const optional_argument labels_argument(labels, "labels", at);
        const optional_argument shifts_argument(shifts, "shifts", at);
        const optional_argument slopes_argument(slopes, "slopes", at);
        const optional_argument null_weights_argument(null_weights, "null_weights", at);
        const optional_argument null_argument(null, "null", at);
        const subquad::embedding_terms terms{data_argument.get(),         indices_argument.get(),
                                             indptr_argument.get(),       scale,
                                             log_counts_argument.get(),   means_argument.get(),
                                             covariances_argument.get(),  labels_argument.get(),
                                             shifts_argument.get(),       slopes_argument.get(),
                                             null_weights_argument.get(), null_argument.get()};
        core::embedding_step(required_argument(x, "x", at).get(),
                             required_argument(rows, "rows", at).get(), terms, step,
                             optional_argument(out, "out", at).get(),
                             optional_argument(attraction, "attraction", at).get(),
                             optional_argument(log_z, "log_z", at).get(),
                             required_argument(workspace, "workspace", at).get());
      },
      x, data, indices, indptr, rows, scale, log_counts, means, covariances, labels, shifts, slopes,
      null_weights, null, step, out, attraction, log_z, workspace, context, error);
}

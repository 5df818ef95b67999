#include "arguments.hpp"
#include "embedding_checks.hpp"
#include "embedding_core.hpp"
#include "isa.hpp"
#include "kernels/embedding_kernels.hpp"

SUBQUAD_DEFINE_KERNEL_TABLE(embedding)

namespace subquad::core {

std::size_t embedding_step_workspace(std::int64_t /*n*/, std::int64_t /*m*/, std::int64_t /*nnz*/,
                                     std::int64_t /*d*/, std::int64_t /*k*/, std::int64_t /*c*/,
                                     std::int64_t /*itemsize*/) {
  return workspace_layout().size();
}

void embedding_step(const array_view& x, const array_view& rows, const embedding_terms& terms,
                    double step, const array_view* out, const array_view* attraction,
                    const array_view* log_z, const array_view& /*workspace*/) {
  check_embedding_step(x, rows, terms, step, out, attraction, log_z);
}

}  // namespace subquad::core

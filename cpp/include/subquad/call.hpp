// What the C++ functions of every concept share: how one call runs, and views as C sees them.
#ifndef SUBQUAD_CALL_HPP
#define SUBQUAD_CALL_HPP

#include "subquad/array_view.hpp"
#include "subquad/c_api.h"
#include "subquad/errors.hpp"

namespace subquad {

// How one call runs; n_threads = 0: get_num_threads(); stream: the cudaStream_t of a call on CUDA.
using context = subquad_context;

namespace detail {

static_assert(sizeof(array_view) == sizeof(subquad_array), "one layout for C and C++");

inline const subquad_array* as_c(const array_view* view) noexcept {
  return reinterpret_cast<const subquad_array*>(view);
}
inline const subquad_array* as_c(const array_view& view) noexcept { return as_c(&view); }

}  // namespace detail
}  // namespace subquad

#endif  // SUBQUAD_CALL_HPP

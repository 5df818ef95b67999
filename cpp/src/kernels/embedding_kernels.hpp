// A step of an embedding on the sphere: what one task computes.
#ifndef SUBQUAD_KERNELS_EMBEDDING_KERNELS_HPP
#define SUBQUAD_KERNELS_EMBEDDING_KERNELS_HPP

#include <cstdint>

#include "matrix_view.hpp"

namespace subquad {

template <class T>
struct embedding_functions {
  std::int64_t tile_columns;
};

struct embedding_kernels {
  embedding_functions<float> f32;
  embedding_functions<double> f64;
};

}  // namespace subquad

#endif  // SUBQUAD_KERNELS_EMBEDDING_KERNELS_HPP

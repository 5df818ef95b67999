// From the element type of an array to the type that kernels are made for.
#ifndef SUBQUAD_CUDA_STORAGE_HPP
#define SUBQUAD_CUDA_STORAGE_HPP

#include "device.cuh"
#include "subquad/array_view.hpp"

namespace subquad::cuda {

// Calls body(S{}) with the storage type of a floating array.
template <class F>
void for_storage(dtype type, F&& body) {
  switch (type) {
    case dtype::float64:
      return body(double{});
    case dtype::float16:
      return body(float16{});
    case dtype::bfloat16:
      return body(bfloat16{});
    default:
      return body(float{});
  }
}

}  // namespace subquad::cuda

#endif  // SUBQUAD_CUDA_STORAGE_HPP

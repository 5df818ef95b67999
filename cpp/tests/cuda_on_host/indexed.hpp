// Vectors and matrices of any layout, with plain indices.
#ifndef SUBQUAD_CUDA_ON_HOST_INDEXED_HPP
#define SUBQUAD_CUDA_ON_HOST_INDEXED_HPP

#include <cstdint>

#include "strided.hpp"

namespace subquad::cuda::on_host {

inline constexpr layout kLayouts[] = {layout::contiguous, layout::transposed, layout::spread,
                                      layout::reversed,   layout::unaligned,  layout::repeated};
// For outputs, whose elements are not one and the same.
constexpr layout for_outputs(layout how) {
  return how == layout::repeated ? layout::contiguous : how;
}

template <class T>
class indexed_array : public strided_array<T> {
 public:
  using strided_array<T>::strided_array;

  T& operator()(std::int64_t i) const {
    const array_view view = this->view();
    return static_cast<T*>(view.data)[i * view.strides[0]];
  }
  T& operator()(std::int64_t i, std::int64_t j) const {
    const array_view view = this->view();
    return static_cast<T*>(view.data)[i * view.strides[0] + j * view.strides[1]];
  }
};

}  // namespace subquad::cuda::on_host

#endif  // SUBQUAD_CUDA_ON_HOST_INDEXED_HPP

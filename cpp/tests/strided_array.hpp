// Arrays of the tests of scans: (outer, n, inner) or any order of these, in memory of any layout.
#ifndef SUBQUAD_TESTS_STRIDED_ARRAY_HPP
#define SUBQUAD_TESTS_STRIDED_ARRAY_HPP

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "subquad/array_view.hpp"

namespace checks {

enum class layout { contiguous, transposed, flipped, spaced };

// What stands wherever an array has no element.
constexpr int kUntouched = -77;

template <class T>
class strided_array {
 public:
  // One dimension may be of stride 0, in an array that is read only.
  explicit strided_array(std::vector<std::int64_t> shape, layout how = layout::contiguous,
                         std::int32_t broadcast = -1)
      : shape_(std::move(shape)), strides_(shape_.size()) {
    const auto rank = static_cast<std::int32_t>(shape_.size());
    std::int64_t stride = how == layout::spaced ? 3 : 1;
    for (std::int32_t i = 0; i < rank; ++i) {
      const auto axis = static_cast<std::size_t>(how == layout::transposed ? i : rank - 1 - i);
      strides_[axis] = static_cast<std::int32_t>(axis) == broadcast ? 0 : stride;
      stride *= static_cast<std::int32_t>(axis) == broadcast ? 1 : shape_[axis];
      if (how == layout::spaced) stride += 2;
    }
    data_.assign(static_cast<std::size_t>(stride + 1), T(kUntouched));
    if (how != layout::flipped) return;
    for (std::size_t axis = 0; axis < shape_.size(); ++axis) {
      if (shape_[axis] > 0) origin_ += (shape_[axis] - 1) * strides_[axis];
      strides_[axis] = -strides_[axis];
    }
  }

  subquad::array_view view() const {
    return {const_cast<T*>(data_.data() + origin_),
            shape_.data(),
            strides_.data(),
            static_cast<std::int32_t>(shape_.size()),
            subquad::detail::dtype_of<T>::kValue,
            subquad::device_type::cpu,
            0};
  }

  template <class... I>
  T& at(I... index) {
    return data_[position(index...)];
  }
  template <class... I>
  const T& at(I... index) const {
    return data_[position(index...)];
  }

  // Elements that an array of these lengths does not have, where something was written.
  std::int64_t touched_gaps() const {
    std::vector<bool> owned(data_.size());
    std::vector<std::int64_t> index(shape_.size());
    std::int64_t count = 1;
    for (const std::int64_t length : shape_) count *= length;
    for (std::int64_t i = 0; i < count; ++i) {
      std::int64_t rest = i;
      std::int64_t offset = origin_;
      for (std::size_t axis = 0; axis < shape_.size(); ++axis) {
        offset += rest % shape_[axis] * strides_[axis];
        rest /= shape_[axis];
      }
      owned[static_cast<std::size_t>(offset)] = true;
    }
    std::int64_t touched = 0;
    for (std::size_t i = 0; i < data_.size(); ++i)
      touched += !owned[i] && data_[i] != T(kUntouched);
    return touched;
  }

  const std::vector<T>& data() const { return data_; }

 private:
  template <class... I>
  std::size_t position(I... index) const {
    std::int64_t offset = origin_;
    std::size_t axis = 0;
    ((offset += static_cast<std::int64_t>(index) * strides_[axis++]), ...);
    return static_cast<std::size_t>(offset);
  }

  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;
  std::vector<T> data_;
  std::int64_t origin_ = 0;
};

}  // namespace checks

#endif  // SUBQUAD_TESTS_STRIDED_ARRAY_HPP

// Arrays of any layout for kernels under test, and their elements as numbers.
#ifndef SUBQUAD_CUDA_ON_HOST_STRIDED_HPP
#define SUBQUAD_CUDA_ON_HOST_STRIDED_HPP

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/device.cuh"
#include "guarded.hpp"

namespace subquad::cuda::on_host {

using shape_list = std::vector<std::int64_t>;

inline shape_list joined(shape_list first, const shape_list& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

inline std::int64_t product(const shape_list& lengths) {
  std::int64_t product = 1;
  for (const std::int64_t length : lengths) product *= length;
  return product;
}

// Calls body(index) for all indices below `lengths`, in C order.
template <class F>
void each_index(const shape_list& lengths, F&& body) {
  shape_list index(lengths.size(), 0);
  for (std::int64_t left = product(lengths); left > 0; --left) {
    body(index);
    for (std::size_t axis = index.size(); axis-- > 0;) {
      if (++index[axis] < lengths[axis]) break;
      index[axis] = 0;
    }
  }
}

// Everything with blocks and threads in shuffled order, some of it in the other two.
template <class All, class Some>
void in_every_order(All&& all, Some&& some) {
  set_order(order::shuffled);
  all();
  for (const order how : {order::ascending, order::descending}) {
    set_order(how);
    some();
  }
}

inline double number(float value) { return static_cast<double>(value); }
inline double number(double value) { return value; }
inline double number(float16 value) { return static_cast<double>(from_float16(value.bits)); }
inline double number(bfloat16 value) { return static_cast<double>(widen(value)); }

// The element of type T that is nearest to x.
template <class T>
T rounded(double x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    auto bits = bits_as<std::uint32_t>(static_cast<float>(x));
    if (!std::isnan(x)) bits += 0x7fffu + (bits >> 16 & 1);
    return {static_cast<std::uint16_t>(bits >> 16)};
  } else if constexpr (std::is_same_v<T, float16>) {
    const std::uint32_t sign = std::signbit(x) ? 0x8000u : 0;
    std::uint32_t bits = 0;
    if (std::isnan(x)) {
      bits = 0x7e00;
    } else if (x != 0) {
      const int exponent = std::isinf(x) ? 16 : std::max(-14, std::ilogb(x));
      bits = exponent > 15 ? 0x7c00u
                           : static_cast<std::uint32_t>((exponent + 14) * 1024) +
                                 static_cast<std::uint32_t>(
                                     std::nearbyint(std::ldexp(std::abs(x), 10 - exponent)));
    }
    return {static_cast<std::uint16_t>(bits | sign)};
  } else {
    return static_cast<T>(x);
  }
}

template <class T>
constexpr dtype storage_type() {
  if constexpr (std::is_same_v<T, float16>) {
    return dtype::float16;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return dtype::bfloat16;
  } else {
    return detail::dtype_of<T>::kValue;
  }
}

enum class layout {
  contiguous,
  transposed,  // the last two axes change places
  spread,      // gaps between elements, and between rows
  reversed,    // negative strides
  unaligned,   // one element off, rows of one element more
  repeated     // the first axis is one and the same
};

// An array whose bits are all set at first, flush against a page that cannot be touched.
template <class T>
class strided_array {
 public:
  explicit strided_array(std::vector<std::int64_t> shape, layout how = layout::contiguous)
      : shape_(std::move(shape)), strides_(shape_.size()) {
    std::vector<std::size_t> axes;  // from the one whose elements lie closest
    for (std::size_t axis = shape_.size(); axis-- > 0;) axes.push_back(axis);
    if (how == layout::transposed && axes.size() > 1) std::swap(axes[0], axes[1]);
    std::int64_t stride = how == layout::spread ? 3 : 1;
    for (const std::size_t axis : axes) {
      strides_[axis] = how == layout::reversed ? -stride : stride;
      if (how == layout::repeated && axis == 0) {
        strides_[axis] = 0;
        continue;
      }
      stride *= shape_[axis] > 0 ? shape_[axis] : 1;
      if (how == layout::spread || how == layout::unaligned) ++stride;
    }
    std::int64_t lowest = 0;
    std::int64_t highest = 0;
    for (std::size_t axis = 0; axis < shape_.size(); ++axis) {
      const std::int64_t reach = strides_[axis] * (shape_[axis] > 0 ? shape_[axis] - 1 : 0);
      (reach < 0 ? lowest : highest) += reach;
    }
    const std::int64_t shift = how == layout::unaligned ? 1 : 0;
    size_ = count() == 0 ? 0 : static_cast<std::size_t>(highest - lowest + 1 + shift);
    memory_ = std::make_unique<guarded_memory>(size_ * sizeof(T));
    std::memset(memory_->begin(), 0xff, memory_->size());
    // Reversed arrays lie against the lower page.
    begin_ = reinterpret_cast<T*>(how == layout::reversed
                                      ? memory_->begin()
                                      : memory_->end() - (size_ * sizeof(T) + 15) / 16 * 16);
    if (how != layout::reversed && how != layout::contiguous) {
      begin_ = reinterpret_cast<T*>(memory_->end()) - size_;
    }
    data_ = begin_ + shift - lowest;
  }

  std::int64_t count() const {
    std::int64_t product = 1;
    for (const std::int64_t length : shape_) product *= length;
    return product;
  }

  // The element at `index` of an array that this one is broadcast to: leading axes that it does not
  // have are dropped, axes of length 1 repeated.
  T& operator()(const std::vector<std::int64_t>& index) const {
    std::int64_t offset = 0;
    const std::size_t dropped = index.size() - shape_.size();
    for (std::size_t axis = 0; axis < shape_.size(); ++axis) {
      if (shape_[axis] != 1) offset += index[axis + dropped] * strides_[axis];
    }
    return data_[offset];
  }

  // Calls body(element, index) for all elements.
  template <class F>
  void each(F&& body) const {
    each_index(shape_, [&](const shape_list& index) { body((*this)(index), index); });
  }

  // Whether memory between the elements is as it was.
  bool gaps_untouched() const {
    std::vector<bool> is_element(size_, false);
    each([&](T& element, const auto&) {
      is_element[static_cast<std::size_t>(&element - begin_)] = true;
    });
    for (std::size_t i = 0; i < size_; ++i) {
      const auto* bytes = reinterpret_cast<const unsigned char*>(begin_ + i);
      for (std::size_t b = 0; b < sizeof(T); ++b) {
        if (!is_element[i] && bytes[b] != 0xff) return false;
      }
    }
    return true;
  }

  array_view view() const {
    return {data_,
            shape_.data(),
            strides_.data(),
            static_cast<std::int32_t>(shape_.size()),
            storage_type<T>(),
            device_type::cuda,
            0};
  }

 private:
  std::vector<std::int64_t> shape_;
  std::vector<std::int64_t> strides_;
  std::size_t size_ = 0;
  std::unique_ptr<guarded_memory> memory_;
  T* begin_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace subquad::cuda::on_host

#endif  // SUBQUAD_CUDA_ON_HOST_STRIDED_HPP

// A view of an array that somebody else owns.
#ifndef SUBQUAD_ARRAY_VIEW_HPP
#define SUBQUAD_ARRAY_VIEW_HPP

#include <cstdint>

namespace subquad {

enum class dtype : std::int32_t {
  float32 = 0,
  float64 = 1,
  int64 = 2,
  uint8 = 3,
  float16 = 4,
  bfloat16 = 5,
  int32 = 6
};

enum class device_type : std::int32_t { cpu = 0, cuda = 1 };

// Bytes of one element.
constexpr std::int64_t item_size(dtype type) noexcept {
  switch (type) {
    case dtype::uint8:
      return 1;
    case dtype::float16:
    case dtype::bfloat16:
      return 2;
    case dtype::float32:
    case dtype::int32:
      return 4;
    case dtype::float64:
    case dtype::int64:
      break;
  }
  return 8;
}

// Laid out as the C `subquad_array`. Strides count elements and may be zero or negative; `data` is
// the address of the element whose indices are all zero, aligned to the size of an element.
struct array_view {
  void* data;
  const std::int64_t* shape;    // ndim lengths
  const std::int64_t* strides;  // ndim strides, in elements; in the C ABI, NULL means C-contiguous
  std::int32_t ndim;
  dtype type;
  device_type device;
  std::int32_t device_id;  // of CUDA: its index; otherwise 0
};

namespace detail {
template <class T>
struct dtype_of;
template <>
struct dtype_of<float> {
  static constexpr dtype kValue = dtype::float32;
};
template <>
struct dtype_of<double> {
  static constexpr dtype kValue = dtype::float64;
};
template <>
struct dtype_of<std::int32_t> {
  static constexpr dtype kValue = dtype::int32;
};
template <>
struct dtype_of<std::int64_t> {
  static constexpr dtype kValue = dtype::int64;
};
template <>
struct dtype_of<std::uint8_t> {
  static constexpr dtype kValue = dtype::uint8;
};
}  // namespace detail

// A C-contiguous array in memory of the CPU, for the functions of this interface; `shape` must
// outlive the view.
template <class T>
array_view contiguous_view(const T* data, const std::int64_t* shape, std::int32_t ndim) noexcept {
  return {const_cast<T*>(data), shape, nullptr, ndim, detail::dtype_of<T>::kValue,
          device_type::cpu,     0};
}

}  // namespace subquad

#endif  // SUBQUAD_ARRAY_VIEW_HPP

// What holds for every array that enters the library, whichever door it takes.
#ifndef SUBQUAD_ARRAY_CHECK_HPP
#define SUBQUAD_ARRAY_CHECK_HPP

#include <cstdint>
#include <string>

#include "subquad/array_view.hpp"
#include "subquad/errors.hpp"

namespace subquad {

inline constexpr std::int32_t kMaxDimensions = 32;

// Device, number of elements, address. `name` is the argument's.
inline void check_array(const array_view& view, const char* name) {
  const std::string argument(name);
  if (view.device != device_type::cpu) {
    throw type_error(argument + ": expected an array in memory of the CPU, got one of device " +
                     std::to_string(view.device_id) + " of type " +
                     std::to_string(static_cast<int>(view.device)));
  }
  bool empty = false;
  for (std::int32_t axis = 0; axis < view.ndim; ++axis) {
    if (view.shape[axis] < 0) {
      throw invalid_argument(argument + ": expected lengths of at least 0, got " +
                             std::to_string(view.shape[axis]) + " on axis " + std::to_string(axis));
    }
    empty = empty || view.shape[axis] == 0;
  }
  if (empty) return;
  if (view.data == nullptr) {
    throw invalid_argument(argument + ": expected the address of the elements, got none");
  }
  const auto size = static_cast<std::uintptr_t>(item_size(view.type));
  if (reinterpret_cast<std::uintptr_t>(view.data) % size != 0) {
    throw invalid_argument(argument + ": expected elements aligned to their size of " +
                           std::to_string(size) + " bytes, got an unaligned address");
  }
}

// Strides of a C-contiguous array, in elements.
inline void contiguous_strides(const std::int64_t* shape, std::int32_t ndim,
                               std::int64_t* strides) noexcept {
  std::int64_t stride = 1;
  for (std::int32_t axis = ndim - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= shape[axis] > 0 ? shape[axis] : 1;
  }
}

}  // namespace subquad

#endif  // SUBQUAD_ARRAY_CHECK_HPP

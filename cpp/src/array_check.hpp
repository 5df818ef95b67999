// What holds for every array that enters the library, whichever door it takes.
#ifndef SUBQUAD_ARRAY_CHECK_HPP
#define SUBQUAD_ARRAY_CHECK_HPP

#include <cstdint>
#include <string>

#include "subquad/array_view.hpp"
#include "subquad/errors.hpp"

namespace subquad {

inline constexpr std::int32_t kMaxDimensions = 32;

// Memory of the CPU or of one CUDA device: where the arrays of a call lie.
struct place {
  device_type device;
  std::int32_t device_id;  // not looked at for the CPU

  friend bool operator==(const place& a, const place& b) noexcept {
    return a.device == b.device && (a.device == device_type::cpu || a.device_id == b.device_id);
  }
  friend bool operator!=(const place& a, const place& b) noexcept { return !(a == b); }
};

inline place place_of(const array_view& view) noexcept { return {view.device, view.device_id}; }

inline std::string place_text(const place& where) {
  switch (where.device) {
    case device_type::cpu:
      return "in memory of the CPU";
    case device_type::cuda:
      return "on CUDA device " + std::to_string(where.device_id);
  }
  return "on a device of unknown type " + std::to_string(static_cast<int>(where.device));
}

// `first` is the argument that lies at `expected`, null where that is the only place served.
inline void check_place(const array_view& view, const char* name, const place& expected,
                        const char* first = nullptr) {
  if (place_of(view) == expected) return;
  throw type_error(std::string(name) + ": expected an array " + place_text(expected) +
                   (first != nullptr ? std::string(", where ") + first + " is" : "") +
                   ", got one " + place_text(place_of(view)));
}

// Element type on this device, number of elements, address. `name` is the argument's.
inline void check_array(const array_view& view, const char* name) {
  if (view.device == device_type::cpu && item_size(view.type) == 2) {
    throw type_error(std::string(name) + ": expected float32 or float64, got " +
                     (view.type == dtype::float16 ? "float16" : "bfloat16") +
                     ", which only CUDA computes with");
  }
  bool empty = false;
  for (std::int32_t axis = 0; axis < view.ndim; ++axis) {
    if (view.shape[axis] < 0) {
      throw invalid_argument(std::string(name) + ": expected lengths of at least 0, got " +
                             std::to_string(view.shape[axis]) + " on axis " + std::to_string(axis));
    }
    empty = empty || view.shape[axis] == 0;
  }
  if (empty) return;
  if (view.data == nullptr) {
    throw invalid_argument(std::string(name) + ": expected the address of the elements, got none");
  }
  const auto size = static_cast<std::uintptr_t>(item_size(view.type));
  if (reinterpret_cast<std::uintptr_t>(view.data) % size != 0) {
    throw invalid_argument(std::string(name) + ": expected elements aligned to their size of " +
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

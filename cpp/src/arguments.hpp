// What the functions of the core share: checks of ranks and sizes, broadcast batches, workspaces.
#ifndef SUBQUAD_ARGUMENTS_HPP
#define SUBQUAD_ARGUMENTS_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "array_check.hpp"
#include "kernels/matrix_view.hpp"
#include "parallel.hpp"
#include "subquad/array_view.hpp"
#include "subquad/errors.hpp"

namespace subquad {

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline const char* dtype_name(dtype type) {
  switch (type) {
    case dtype::float32:
      return "float32";
    case dtype::float64:
      return "float64";
    case dtype::int64:
      return "int64";
    case dtype::uint8:
      return "uint8";
    case dtype::float16:
      return "float16";
    case dtype::bfloat16:
      return "bfloat16";
    case dtype::int32:
      return "int32";
  }
  return "unknown";
}

inline std::string shape_text(const std::int64_t* shape, std::int32_t ndim) {
  std::string text = "(";
  for (std::int32_t i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + (ndim == 1 ? ",)" : ")");
}

// Leading dimensions of one call, broadcast over its arrays.
class batch_shape {
 public:
  // Takes the dimensions of `array` before its last `core` ones.
  void include(const array_view& array, std::int32_t core, const char* name) {
    const std::int32_t rank = array.ndim - core;
    for (std::int32_t i = 0; i < rank; ++i) {
      const std::int64_t length = array.shape[rank - 1 - i];
      if (i >= rank_) {
        lengths_[i] = length;
      } else if (lengths_[i] == 1) {
        lengths_[i] = length;
      } else if (length != 1 && length != lengths_[i]) {
        throw invalid_argument(std::string(name) +
                               ": expected batch dimensions that broadcast with " + text() +
                               ", got shape " + shape_text(array.shape, array.ndim));
      }
    }
    rank_ = std::max(rank_, rank);
  }

  // The dimensions of an output before its last `core` ones must be exactly these.
  void require(const array_view& array, std::int32_t core, const char* name) const {
    bool same = array.ndim - core == rank_;
    for (std::int32_t i = 0; same && i < rank_; ++i) {
      same = array.shape[rank_ - 1 - i] == lengths_[i];
    }
    if (!same) {
      throw invalid_argument(std::string(name) + ": expected batch dimensions " + text() +
                             ", got shape " + shape_text(array.shape, array.ndim));
    }
  }

  std::int64_t count() const {
    std::int64_t count = 1;
    for (std::int32_t i = 0; i < rank_; ++i) count *= lengths_[i];
    return count;
  }

  std::int32_t rank() const { return rank_; }

  // Dimension i from the end, and the elements of `array` between neighbours along it.
  std::int64_t length(std::int32_t i) const { return lengths_[i]; }
  std::int64_t stride(const array_view& array, std::int32_t core, std::int32_t i) const {
    const std::int32_t axis = array.ndim - core - 1 - i;
    return axis >= 0 && array.shape[axis] != 1 ? array.strides[axis] : 0;
  }

  // Elements from the start of `array` to its part for batch `index` (C order).
  std::int64_t offset(const array_view& array, std::int32_t core, std::int64_t index) const {
    std::int64_t offset = 0;
    for (std::int32_t i = 0; i < rank_ && index > 0; ++i) {
      offset += index % lengths_[i] * stride(array, core, i);
      index /= lengths_[i];
    }
    return offset;
  }

 private:
  std::string text() const {
    std::int64_t shape[kMaxDimensions];
    for (std::int32_t i = 0; i < rank_; ++i) shape[i] = lengths_[rank_ - 1 - i];
    return shape_text(shape, rank_);
  }

  std::int64_t lengths_[kMaxDimensions] = {};  // last dimension first
  std::int32_t rank_ = 0;
};

inline void require_rank(const array_view& array, std::int32_t core, const char* name,
                         const char* expected) {
  if (array.ndim < core || array.ndim > kMaxDimensions) {
    throw invalid_argument(std::string(name) + ": expected shape " + expected + ", got " +
                           shape_text(array.shape, array.ndim));
  }
}

// Length of axis -position.
inline std::int64_t length_from_end(const array_view& array, std::int32_t position) {
  return array.shape[array.ndim - position];
}

inline void require_length(const array_view& array, std::int32_t position, std::int64_t length,
                           const char* name, const char* expected) {
  if (length_from_end(array, position) != length) {
    throw invalid_argument(std::string(name) + ": expected shape " + expected + " with length " +
                           std::to_string(length) + " on axis -" + std::to_string(position) +
                           ", got " + shape_text(array.shape, array.ndim));
  }
}

inline void require_dtype(const array_view& array, dtype type, const char* name) {
  if (array.type != type) {
    throw type_error(std::string(name) + ": expected " + dtype_name(type) + ", got " +
                     dtype_name(array.type));
  }
}

// What elements of this type are added and exponentiated in.
inline dtype arithmetic_type(dtype type) { return type == dtype::float64 ? type : dtype::float32; }

// 16-bit types come on CUDA only: array_check.hpp.
inline void require_floating(const array_view& array, const char* name) {
  if (array.type != dtype::float32 && array.type != dtype::float64 &&
      array.type != dtype::float16 && array.type != dtype::bfloat16) {
    throw type_error(std::string(name) + ": expected float32, float64, float16 or bfloat16, got " +
                     dtype_name(array.type));
  }
}

inline void require_real(const array_view& array, const char* name) {
  if (array.type != dtype::float32 && array.type != dtype::float64) {
    throw type_error(std::string(name) + ": expected float32 or float64, got " +
                     dtype_name(array.type));
  }
}

// Every length, of an array without batch dimensions.
inline void require_shape(const array_view& array, const char* name, const char* expected,
                          std::initializer_list<std::int64_t> lengths) {
  bool same = array.ndim == static_cast<std::int32_t>(lengths.size());
  std::int32_t axis = 0;
  for (const std::int64_t length : lengths) same = same && array.shape[axis++] == length;
  if (!same) {
    std::string text;
    for (const std::int64_t length : lengths) {
      text += (text.empty() ? "" : ", ") + std::to_string(length);
    }
    throw invalid_argument(std::string(name) + ": expected shape " + expected + " = (" + text +
                           "), got " + shape_text(array.shape, array.ndim));
  }
}

// The shape of another array, element for element.
inline void require_same_shape(const array_view& array, const array_view& like, const char* name,
                               const char* like_name) {
  bool same = array.ndim == like.ndim;
  for (std::int32_t i = 0; same && i < like.ndim; ++i) same = array.shape[i] == like.shape[i];
  if (!same) {
    throw invalid_argument(std::string(name) + ": expected the shape of " + like_name + ", " +
                           shape_text(like.shape, like.ndim) + ", got " +
                           shape_text(array.shape, array.ndim));
  }
}

inline void require_segments(const array_view* segments, std::int64_t n) {
  if (segments == nullptr) return;
  require_dtype(*segments, dtype::int64, "segments");
  require_shape(*segments, "segments", "(n,)", {n});
}

template <class T>
vector_view<T> vector_at(const array_view& array, std::int64_t offset) {
  return {static_cast<T*>(array.data) + offset, array.strides[array.ndim - 1]};
}

template <class T>
matrix_view<T> matrix_at(const array_view& array, std::int64_t offset) {
  return {static_cast<T*>(array.data) + offset, array.strides[array.ndim - 2],
          array.strides[array.ndim - 1]};
}

template <class T>
stack_view<T> stack_at(const array_view& array, std::int64_t offset) {
  return {static_cast<T*>(array.data) + offset, array.strides[array.ndim - 3],
          array.strides[array.ndim - 2], array.strides[array.ndim - 1]};
}

// Cuts a workspace into aligned pieces; with no memory behind it, counts what the pieces take.
class workspace_layout {
 public:
  static constexpr std::size_t kAlignment = 64;

  workspace_layout() = default;
  explicit workspace_layout(const array_view& workspace)
      : begin_(static_cast<char*>(workspace.data)),
        size_(workspace.ndim == 1 ? static_cast<std::size_t>(workspace.shape[0]) : 0) {
    require_dtype(workspace, dtype::uint8, "workspace");
    const auto address = reinterpret_cast<std::uintptr_t>(begin_);
    used_ = begin_ ? (kAlignment - address % kAlignment) % kAlignment : 0;
  }

  template <class T>
  T* take(std::int64_t count) {
    char* piece = begin_ ? begin_ + used_ : nullptr;
    used_ += round_up(static_cast<std::size_t>(count) * sizeof(T));
    if (begin_ && used_ > size_) fail();
    return reinterpret_cast<T*>(piece);
  }

  // Scratch of `bytes` for each of the slots that a region of `tasks` may use: as many as the
  // calling thread may use now, or as fit into what is left.
  struct slots {
    char* data;
    std::size_t bytes;
    int count;

    void* operator[](int slot) const { return data + bytes * static_cast<std::size_t>(slot); }
  };
  slots take_slots(std::size_t bytes, std::int64_t tasks) {
    bytes = round_up(bytes);
    auto count = static_cast<std::size_t>(
        std::max<std::int64_t>(1, std::min<std::int64_t>(available_threads(), tasks)));
    if (begin_) count = std::min(count, bytes ? (size_ - std::min(size_, used_)) / bytes : count);
    if (count == 0) fail();
    char* data = begin_ ? begin_ + used_ : nullptr;
    used_ += count * bytes;
    return {data, bytes, static_cast<int>(count)};
  }

  // Bytes to ask for: the pieces, and what aligning the first may cost.
  std::size_t size() const { return used_ + kAlignment; }

 private:
  static std::size_t round_up(std::size_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  [[noreturn]] void fail() const {
    throw invalid_argument(
        "workspace: expected at least as many bytes as the function's "
        "workspace size, got " +
        std::to_string(size_));
  }

  char* begin_ = nullptr;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
};

// Threads worth waking for `work` multiply-adds. Opening a region costs about 5 us on idle cores
// and milliseconds on busy ones; one core needs 40 us for the 2^21 that each thread must bring.
inline int threads_for(double work, int slots) {
  return static_cast<int>(std::min<double>(slots, 1 + work / (1 << 21)));
}

}  // namespace subquad

#endif  // SUBQUAD_ARGUMENTS_HPP

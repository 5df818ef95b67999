// The part of the DLPack ABI (dmlc.github.io/dlpack, major version 1) that is exchanged here.
#ifndef SUBQUAD_PYTHON_DLPACK_ABI_HPP
#define SUBQUAD_PYTHON_DLPACK_ABI_HPP

#include <cstdint>

namespace subquad::python::dlpack {

inline constexpr std::uint32_t kMajorVersion = 1;

inline constexpr std::int32_t kCpu = 1;
inline constexpr std::int32_t kCuda = 2;
inline constexpr std::int32_t kCudaHost = 3;
inline constexpr std::int32_t kCudaManaged = 13;

inline constexpr std::uint8_t kInt = 0;
inline constexpr std::uint8_t kUint = 1;
inline constexpr std::uint8_t kFloat = 2;
inline constexpr std::uint8_t kBfloat = 4;

inline constexpr std::uint64_t kFlagReadOnly = 1;

struct version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct device {
  std::int32_t type;
  std::int32_t id;
};

struct data_type {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct tensor {
  void* data;
  dlpack::device device;
  std::int32_t ndim;
  data_type dtype;
  std::int64_t* shape;
  std::int64_t* strides;  // in elements; null: C-contiguous
  std::uint64_t byte_offset;
};

// In a capsule named "dltensor".
struct managed_tensor {
  dlpack::tensor tensor;
  void* context;
  void (*deleter)(managed_tensor* self);
};

// In a capsule named "dltensor_versioned".
struct managed_tensor_versioned {
  dlpack::version version;
  void* context;
  void (*deleter)(managed_tensor_versioned* self);
  std::uint64_t flags;
  dlpack::tensor tensor;
};

// The table that type(x).__dlpack_c_exchange_api__ holds, in a capsule named "dlpack_exchange_api".
// It lives as long as the process. Functions return 0, or -1 with a Python error set.
struct exchange_api {
  dlpack::version version;
  exchange_api* previous;
  int (*allocate)(tensor* prototype, managed_tensor_versioned** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  int (*from_object)(void* object, managed_tensor_versioned** out);
  int (*to_object)(managed_tensor_versioned* managed, void** out_object);
  int (*borrow_from_object)(void* object, tensor* out);
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out_stream);
};

}  // namespace subquad::python::dlpack

#endif  // SUBQUAD_PYTHON_DLPACK_ABI_HPP

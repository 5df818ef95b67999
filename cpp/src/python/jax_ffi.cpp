// JAX arrays: handlers of XLA's foreign function interface that pass its buffers on to the C ABI.
//
// Against XLA's C structs alone, of which those used here are in every version of the interface.
//
// A handler takes the arrays of its C function in their order, inputs as operands and outputs as
// results, and the workspace as the last result. Its attributes are `present`, whose bit i tells
// whether the i-th array is passed (else it is an optional one left out), `numbers`, those that
// some functions take: the first in the lowest 16 bits, the next in those above; and where the C
// function takes them `offsets`, an array of int64, and `scale`, a float64.
#include <pybind11/pybind11.h>
#include <xla/ffi/api/c_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "c_functions.hpp"

namespace subquad::python {
namespace {

namespace py = pybind11;

const c_functions* core = nullptr;

// 1000 major + minor of the interface that XLA has; 0 before it has called a handler.
std::atomic<int> runtime_version{0};

constexpr int version_number(int major, int minor) { return 1000 * major + minor; }

// ---- what XLA tells and is told -----------------------------------------------------------------

XLA_FFI_Error* failure(const XLA_FFI_CallFrame& frame, XLA_FFI_Error_Code code,
                       const char* message) {
  XLA_FFI_Error_Create_Args arguments{};
  arguments.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
  arguments.message = message;
  arguments.errc = code;
  return frame.api->XLA_FFI_Error_Create(&arguments);
}

XLA_FFI_Error* outcome(const XLA_FFI_CallFrame& frame, subquad_status status,
                       const subquad_error& error) {
  switch (status) {
    case SUBQUAD_SUCCESS:
      return nullptr;
    case SUBQUAD_INVALID_ARGUMENT:
    case SUBQUAD_TYPE_ERROR:
      return failure(frame, XLA_FFI_Error_Code_INVALID_ARGUMENT, error.message);
    case SUBQUAD_OUT_OF_MEMORY:
      return failure(frame, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, error.message);
    case SUBQUAD_DEVICE_ERROR:
      return failure(frame, XLA_FFI_Error_Code_UNAVAILABLE, error.message);
    case SUBQUAD_INTERNAL_ERROR:
      break;
  }
  return failure(frame, XLA_FFI_Error_Code_INTERNAL, error.message);
}

// XLA asks what a handler is by calling it. Returns whether that is so.
bool tell_metadata(const XLA_FFI_CallFrame& frame, XLA_FFI_Handler_Traits traits) {
  for (auto* extension = frame.extension_start; extension; extension = extension->next) {
    if (extension->type != XLA_FFI_Extension_Metadata) continue;
    const XLA_FFI_Api_Version& version = frame.api->api_version;
    runtime_version = version_number(version.major_version, version.minor_version);
    XLA_FFI_Metadata* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = traits;
    return true;
  }
  return false;
}

XLA_FFI_Error* find_device(const XLA_FFI_CallFrame& frame, std::int32_t& device_id) {
  XLA_FFI_DeviceOrdinal_Get_Args arguments{};
  arguments.struct_size = XLA_FFI_DeviceOrdinal_Get_Args_STRUCT_SIZE;
  arguments.ctx = frame.ctx;
  XLA_FFI_Error* error = frame.api->XLA_FFI_DeviceOrdinal_Get(&arguments);
  device_id = arguments.device_ordinal;
  return error;
}

XLA_FFI_Error* find_stream(const XLA_FFI_CallFrame& frame, void*& stream) {
  XLA_FFI_Stream_Get_Args arguments{};
  arguments.struct_size = XLA_FFI_Stream_Get_Args_STRUCT_SIZE;
  arguments.ctx = frame.ctx;
  XLA_FFI_Error* error = frame.api->XLA_FFI_Stream_Get(&arguments);
  stream = arguments.stream;
  return error;
}

// The attribute of that name and kind, or null.
const void* find_attribute(const XLA_FFI_CallFrame& frame, const char* name,
                           XLA_FFI_AttrType kind) {
  const XLA_FFI_Attrs& attributes = frame.attrs;
  for (std::int64_t i = 0; i < attributes.size; ++i) {
    const XLA_FFI_ByteSpan& found = *attributes.names[i];
    if (found.len != std::strlen(name) || std::memcmp(found.ptr, name, found.len) != 0) continue;
    return attributes.types[i] == kind ? attributes.attrs[i] : nullptr;
  }
  return nullptr;
}

// The number of that name and type, or 0.
template <class T>
T number_attribute(const XLA_FFI_CallFrame& frame, const char* name, XLA_FFI_DataType type) {
  const auto* scalar =
      static_cast<const XLA_FFI_Scalar*>(find_attribute(frame, name, XLA_FFI_AttrType_SCALAR));
  return scalar != nullptr && scalar->dtype == type ? *static_cast<const T*>(scalar->value) : T{};
}

std::uint64_t bits_attribute(const XLA_FFI_CallFrame& frame, const char* name) {
  return static_cast<std::uint64_t>(
      number_attribute<std::int64_t>(frame, name, XLA_FFI_DataType_S64));
}

// The numbers of that name, or null: an array of type int64.
const std::int64_t* numbers_attribute(const XLA_FFI_CallFrame& frame, const char* name) {
  const auto* array =
      static_cast<const XLA_FFI_Array*>(find_attribute(frame, name, XLA_FFI_AttrType_ARRAY));
  const bool found = array != nullptr && array->dtype == XLA_FFI_DataType_S64;
  return found ? static_cast<const std::int64_t*>(array->data) : nullptr;
}

std::int32_t dtype_of(XLA_FFI_DataType type) {
  switch (type) {
    case XLA_FFI_DataType_F32:
      return SUBQUAD_FLOAT32;
    case XLA_FFI_DataType_F64:
      return SUBQUAD_FLOAT64;
    case XLA_FFI_DataType_S32:
      return SUBQUAD_INT32;
    case XLA_FFI_DataType_S64:
      return SUBQUAD_INT64;
    case XLA_FFI_DataType_U8:
      return SUBQUAD_UINT8;
    case XLA_FFI_DataType_F16:
      return SUBQUAD_FLOAT16;
    case XLA_FFI_DataType_BF16:
      return SUBQUAD_BFLOAT16;
    default:
      return -1;  // the C ABI says which argument it is
  }
}

// ---- one call -----------------------------------------------------------------------------------

template <class T>
struct tag {};

// The arguments of a C function, one after the other.
template <std::size_t Arrays>
class arguments {
 public:
  // False where the buffers are not as many as `present` tells.
  bool gather(const XLA_FFI_CallFrame& frame, std::int32_t device, std::int32_t device_id) {
    const std::uint64_t present = bits_attribute(frame, "present");
    const std::int64_t count = frame.args.size + frame.rets.size;
    std::int64_t next = 0;
    for (std::size_t i = 0; i < Arrays; ++i) {
      if ((present >> i & 1) == 0) continue;
      if (next == count) return false;
      const void* buffer =
          next < frame.args.size ? frame.args.args[next] : frame.rets.rets[next - frame.args.size];
      const auto& found = *static_cast<const XLA_FFI_Buffer*>(buffer);
      arrays_[i] = {found.data,
                    found.dims,
                    nullptr,
                    static_cast<std::int32_t>(found.rank),
                    dtype_of(found.dtype),
                    device,
                    device_id};
      given_[i] = &arrays_[i];
      ++next;
    }
    numbers_ = bits_attribute(frame, "numbers");
    offsets_ = numbers_attribute(frame, "offsets");
    scale_ = number_attribute<double>(frame, "scale", XLA_FFI_DataType_F64);
    return next == count;
  }

  const subquad_array* next(tag<const subquad_array*>) { return given_[next_++]; }
  std::int32_t next(tag<std::int32_t>) {
    const std::uint64_t number = numbers_ & 0xffff;
    numbers_ >>= 16;
    return static_cast<std::int32_t>(number);
  }
  const std::int64_t* next(tag<const std::int64_t*>) { return offsets_; }
  double next(tag<double>) { return scale_; }
  const subquad_context* next(tag<const subquad_context*>) { return &context; }
  subquad_error* next(tag<subquad_error*>) { return &error; }

  subquad_context context{};
  subquad_error error{};

 private:
  subquad_array arrays_[Arrays];
  const subquad_array* given_[Arrays] = {};
  std::size_t next_ = 0;
  std::uint64_t numbers_ = 0;
  const std::int64_t* offsets_ = nullptr;
  double scale_ = 0;
};

template <class... Parameters>
XLA_FFI_Error* call(subquad_status (*function)(Parameters...), const XLA_FFI_CallFrame& frame,
                    std::int32_t device) {
  constexpr std::size_t kArrays =
      (static_cast<std::size_t>(std::is_same_v<Parameters, const subquad_array*>) + ...);
  arguments<kArrays> given;
  std::int32_t device_id = 0;
  if (device == SUBQUAD_CUDA) {
    if (XLA_FFI_Error* error = find_device(frame, device_id)) return error;
    if (XLA_FFI_Error* error = find_stream(frame, given.context.stream)) return error;
  }
  if (!given.gather(frame, device, device_id)) {
    return failure(frame, XLA_FFI_Error_Code_INTERNAL,
                   "subquad: expected the buffers that the attribute `present` tells of");
  }
  // Braces keep the order.
  const std::tuple<Parameters...> values{given.next(tag<Parameters>{})...};
  const subquad_status status = std::apply(function, values);
  return outcome(frame, status, given.error);
}

template <auto Member>
XLA_FFI_Error* execute_on_cpu(XLA_FFI_CallFrame* frame) {
  if (tell_metadata(*frame, 0)) return nullptr;
  return call(core->*Member, *frame, SUBQUAD_CPU);
}

// The launches of a call depend on shapes alone: they can be captured and replayed.
constexpr XLA_FFI_Handler_Traits kCaptured = XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE;

template <auto Member>
XLA_FFI_Error* execute_on_cuda(XLA_FFI_CallFrame* frame) {
  if (tell_metadata(*frame, kCaptured)) return nullptr;
  return call(core->*Member, *frame, SUBQUAD_CUDA);
}

// Kernels are loaded before a capture begins: loading is no launch.
XLA_FFI_Error* prepare_cuda(XLA_FFI_CallFrame* frame) {
  if (tell_metadata(*frame, kCaptured)) return nullptr;
  std::int32_t device_id = 0;
  if (XLA_FFI_Error* error = find_device(*frame, device_id)) return error;
  subquad_error error{};
  return outcome(*frame, core->cuda_prepare(device_id, &error), error);
}

// ---- the module ---------------------------------------------------------------------------------

py::capsule capsule(XLA_FFI_Handler* handler) {
  return py::capsule(reinterpret_cast<void*>(handler));
}

template <auto Member>
void add(py::dict& handlers, const char* name) {
  py::dict on_cpu, on_cuda, platforms;
  on_cpu["execute"] = capsule(&execute_on_cpu<Member>);
  on_cuda["initialize"] = capsule(&prepare_cuda);
  on_cuda["execute"] = capsule(&execute_on_cuda<Member>);
  platforms["cpu"] = on_cpu;
  platforms["CUDA"] = on_cuda;
  handlers[name] = platforms;
}

py::dict make_handlers() {
  py::dict handlers;
  add<&c_functions::log_normalizer>(handlers, "log_normalizer");
  add<&c_functions::log_normalizer_vjp>(handlers, "log_normalizer_vjp");
  add<&c_functions::gaussian_log_normalizer>(handlers, "gaussian_log_normalizer");
  add<&c_functions::gaussian_log_normalizer_vjp>(handlers, "gaussian_log_normalizer_vjp");
  add<&c_functions::gaussian_score_moments>(handlers, "gaussian_score_moments");
  add<&c_functions::nearest_centroids>(handlers, "nearest_centroids");
  add<&c_functions::component_sums>(handlers, "component_sums");
  add<&c_functions::component_scatter>(handlers, "component_scatter");
  add<&c_functions::sample_residuals>(handlers, "sample_residuals");
  add<&c_functions::log_features>(handlers, "log_features");
  add<&c_functions::log_features_vjp>(handlers, "log_features_vjp");
  add<&c_functions::trigonometric_features>(handlers, "trigonometric_features");
  add<&c_functions::hadamard_transform>(handlers, "hadamard_transform");
  add<&c_functions::sparse_factor_product>(handlers, "sparse_factor_product");
  add<&c_functions::sparse_factor_product_vjp>(handlers, "sparse_factor_product_vjp");
  add<&c_functions::factor_values>(handlers, "factor_values");
  add<&c_functions::factor_values_vjp>(handlers, "factor_values_vjp");
  add<&c_functions::csr_product>(handlers, "csr_product");
  add<&c_functions::csr_product_vjp>(handlers, "csr_product_vjp");
  add<&c_functions::logcumsumexp>(handlers, "logcumsumexp");
  add<&c_functions::logcumsumexp_vjp>(handlers, "logcumsumexp_vjp");
  add<&c_functions::signed_logcumsumexp>(handlers, "signed_logcumsumexp");
  add<&c_functions::signed_logcumsumexp_vjp>(handlers, "signed_logcumsumexp_vjp");
  add<&c_functions::log_linear_recurrence>(handlers, "log_linear_recurrence");
  add<&c_functions::log_linear_recurrence_vjp>(handlers, "log_linear_recurrence_vjp");
  add<&c_functions::linear_attention>(handlers, "linear_attention");
  add<&c_functions::linear_attention_vjp>(handlers, "linear_attention_vjp");
  add<&c_functions::log_linear_attention>(handlers, "log_linear_attention");
  add<&c_functions::log_linear_attention_vjp>(handlers, "log_linear_attention_vjp");
  return handlers;
}

const c_functions* functions_of_core() {
  const py::object found = py::module_::import("subquad._core").attr(kCFunctionsAttribute);
  const auto* functions =
      static_cast<const c_functions*>(PyCapsule_GetPointer(found.ptr(), kCFunctionsCapsule));
  if (functions == nullptr) throw py::error_already_set();
  if (functions->size != sizeof(c_functions)) {
    throw py::import_error("subquad._jax and subquad._core are of different versions");
  }
  return functions;
}

}  // namespace
}  // namespace subquad::python

PYBIND11_MODULE(_jax, module, pybind11::mod_gil_not_used()) {
  namespace sq = subquad::python;
  module.doc() = "Handlers of XLA's foreign function interface over the kernels of subquad._core.";
  sq::core = sq::functions_of_core();
  module.attr("VERSION") = sq::version_number(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.def("handlers", &sq::make_handlers);
  module.def("runtime_version", [] { return sq::runtime_version.load(); });
}

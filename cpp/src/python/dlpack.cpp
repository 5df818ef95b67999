#include "dlpack.hpp"

#include <array>
#include <atomic>
#include <cstddef>
#include <initializer_list>
#include <utility>

#include "array_check.hpp"

namespace subquad::python {
namespace {

PyObject* interned(const char* text) {
  PyObject* name = PyUnicode_InternFromString(text);
  if (name == nullptr) throw py::error_already_set();
  return name;
}

// Made once and kept for the life of the process, like the names of attributes in the interpreter.
struct constants {
  PyObject* dlpack = interned("__dlpack__");
  PyObject* device = interned("__dlpack_device__");
  PyObject* exchange = interned("__dlpack_c_exchange_api__");
  PyObject* keywords = py::make_tuple("max_version", "stream").release().ptr();
  PyObject* version_keyword = py::make_tuple("max_version").release().ptr();
  PyObject* stream_keyword = py::make_tuple("stream").release().ptr();
  PyObject* max_version = py::make_tuple(1, 0).release().ptr();
  PyObject* no_wait = py::int_(-1).release().ptr();
  PyObject* ndarray = py::object(py::module_::import("numpy").attr("ndarray")).release().ptr();
};

const constants& names() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<constants> storage;
  return storage.call_once_and_store_result([] { return constants{}; }).get_stored();
}

std::string type_name(py::handle object) { return Py_TYPE(object.ptr())->tp_name; }

py::object dictionary_of(PyTypeObject* type) {
#if PY_VERSION_HEX >= 0x030C0000
  return py::reinterpret_steal<py::object>(PyType_GetDict(type));
#else
  return py::reinterpret_borrow<py::object>(type->tp_dict);
#endif
}

const dlpack::exchange_api* read_exchange_api(PyTypeObject* type) {
  const py::object dictionary = dictionary_of(type);
  if (!dictionary) return nullptr;
  PyObject* capsule = PyDict_GetItemWithError(dictionary.ptr(), names().exchange);
  if (capsule == nullptr) {
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    return nullptr;
  }
  if (PyCapsule_IsValid(capsule, "dlpack_exchange_api") == 0) return nullptr;
  const auto* api = static_cast<const dlpack::exchange_api*>(
      PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
  return api != nullptr && api->from_object != nullptr ? api : nullptr;
}

// Types that publish a table live as long as it does, so their addresses are never used again.
const dlpack::exchange_api* find_exchange_api(PyTypeObject* type) {
  struct entry {
    std::atomic<PyTypeObject*> type{nullptr};
    std::atomic<const dlpack::exchange_api*> api{nullptr};
  };
  static std::array<entry, 4> cache;
  for (entry& known : cache) {
    PyTypeObject* owner = known.type.load(std::memory_order_acquire);
    if (owner == type) {
      const dlpack::exchange_api* api = known.api.load(std::memory_order_acquire);
      if (api != nullptr) return api;
    }
    if (owner == nullptr) break;
  }
  const dlpack::exchange_api* api = read_exchange_api(type);
  if (api == nullptr) return nullptr;
  for (entry& free : cache) {
    PyTypeObject* expected = nullptr;
    if (free.type.compare_exchange_strong(expected, type, std::memory_order_acq_rel)) {
      free.api.store(api, std::memory_order_release);
      break;
    }
    if (expected == type) break;
  }
  return api;
}

bool is_cuda(std::int32_t device_type) {
  return device_type == dlpack::kCuda || device_type == dlpack::kCudaManaged;
}

// Whether the producer says that its memory is CUDA's. One that says nothing is of the CPU.
bool exports_cuda(py::handle object) {
  if (PyObject_TypeCheck(object.ptr(), reinterpret_cast<PyTypeObject*>(names().ndarray)) != 0) {
    return false;
  }
  PyObject* device = PyObject_CallMethodNoArgs(object.ptr(), names().device);
  if (device == nullptr) {
    if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw py::error_already_set();
    PyErr_Clear();
    return false;
  }
  const auto pair = py::reinterpret_steal<py::object>(device);
  return is_cuda(pair[py::int_(0)].cast<std::int32_t>());
}

PyObject* call_method(PyObject* const* arguments, PyObject* keywords) {
  return PyObject_VectorcallMethod(names().dlpack, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                                   keywords);
}

// The capsule of object.__dlpack__, versioned where the producer knows how. A producer of CUDA is
// told not to order its stream before another (-1): kernels run on the caller's current one.
py::object call_dlpack(py::handle object, const char* name) {
  const bool has_stream = exports_cuda(object);
  PyObject* arguments[] = {nullptr, object.ptr(), names().max_version, names().no_wait};
  PyObject* capsule =
      call_method(arguments + 1, has_stream ? names().keywords : names().version_keyword);
  if (capsule == nullptr && PyErr_ExceptionMatches(PyExc_TypeError) != 0) {
    // Producers older than DLPack 1.0 do not know the version.
    PyErr_Clear();
    arguments[2] = names().no_wait;
    capsule = call_method(arguments + 1, has_stream ? names().stream_keyword : nullptr);
  }
  if (capsule != nullptr) return py::reinterpret_steal<py::object>(capsule);
  py::error_already_set cause;
  const std::string argument(name);
  if (cause.matches(PyExc_AttributeError)) {
    throw py::type_error(argument + ": expected an array that supports DLPack, got " +
                         type_name(object));
  }
  if (cause.matches(PyExc_BufferError)) {
    py::raise_from(cause, PyExc_TypeError,
                   (argument + ": DLPack does not export this " + type_name(object)).c_str());
    throw py::error_already_set();
  }
  throw std::move(cause);
}

dtype element_type(const dlpack::data_type& type, const char* name) {
  if (type.lanes == 1) {
    if (type.code == dlpack::kFloat && type.bits == 32) return dtype::float32;
    if (type.code == dlpack::kFloat && type.bits == 64) return dtype::float64;
    if (type.code == dlpack::kFloat && type.bits == 16) return dtype::float16;
    if (type.code == dlpack::kBfloat && type.bits == 16) return dtype::bfloat16;
    if (type.code == dlpack::kInt && type.bits == 32) return dtype::int32;
    if (type.code == dlpack::kInt && type.bits == 64) return dtype::int64;
    if (type.code == dlpack::kUint && type.bits == 8) return dtype::uint8;
  }
  throw py::type_error(
      std::string(name) +
      ": expected elements of type float32, float64, int32, int64, uint8, float16 or "
      "bfloat16, got DLPack type code " +
      std::to_string(type.code) + " of " + std::to_string(type.bits) + " bits and " +
      std::to_string(type.lanes) + " lanes");
}

}  // namespace

borrowed_tensor::borrowed_tensor(py::handle object, const char* name, access mode)
    : borrowed_tensor() {
  acquire(object, name, mode);
}

borrowed_tensor::~borrowed_tensor() { release(); }

void borrowed_tensor::release() noexcept {
  if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
  if (legacy_ != nullptr && legacy_->deleter != nullptr) legacy_->deleter(legacy_);
  versioned_ = nullptr;
  legacy_ = nullptr;
}

void borrowed_tensor::acquire(py::handle object, const char* name, access mode) {
  import_object(object, name);
  fill_view(name, mode);
}

void borrowed_tensor::import_object(py::handle object, const char* name) {
  if (const dlpack::exchange_api* api = find_exchange_api(Py_TYPE(object.ptr()))) {
    if (api->from_object(object.ptr(), &versioned_) == 0) return;
    versioned_ = nullptr;
    // What the table does not export, __dlpack__ may, or it says better why not.
    if (PyErr_ExceptionMatches(PyExc_BufferError) == 0) throw py::error_already_set();
    PyErr_Clear();
  }
  import_capsule(call_dlpack(object, name), name);
}

void borrowed_tensor::import_capsule(py::handle capsule, const char* name) {
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned") != 0) {
    versioned_ = static_cast<dlpack::managed_tensor_versioned*>(
        PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor") != 0) {
    legacy_ = static_cast<dlpack::managed_tensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
  } else {
    throw py::type_error(std::string(name) +
                         ": expected __dlpack__ to return an unused DLPack "
                         "capsule, got " +
                         type_name(capsule));
  }
}

void borrowed_tensor::fill_view(const char* name, access mode) {
  if (versioned_ != nullptr && versioned_->version.major != dlpack::kMajorVersion) {
    throw py::type_error(std::string(name) + ": expected DLPack of major version " +
                         std::to_string(dlpack::kMajorVersion) + ", got " +
                         std::to_string(versioned_->version.major));
  }
  if (mode == access::write && versioned_ != nullptr &&
      (versioned_->flags & dlpack::kFlagReadOnly) != 0) {
    throw py::value_error(std::string(name) + ": expected a writable array, got a read-only one");
  }
  const dlpack::tensor& tensor = versioned_ != nullptr ? versioned_->tensor : legacy_->tensor;
  const bool on_cuda = is_cuda(tensor.device.type);
  if (!on_cuda && tensor.device.type != dlpack::kCpu && tensor.device.type != dlpack::kCudaHost) {
    throw py::type_error(std::string(name) +
                         ": expected an array in memory of the CPU or on CUDA, got one on DLPack "
                         "device type " +
                         std::to_string(tensor.device.type));
  }
  if (tensor.ndim < 0 || tensor.ndim > kMaxDimensions) {
    throw py::value_error(std::string(name) + ": expected at most " +
                          std::to_string(kMaxDimensions) + " dimensions, got " +
                          std::to_string(tensor.ndim));
  }
  // The producer may change its own copies once other threads run.
  for (std::int32_t axis = 0; axis < tensor.ndim; ++axis) {
    shape_[axis] = tensor.shape[axis];
    if (tensor.strides != nullptr) strides_[axis] = tensor.strides[axis];
  }
  if (tensor.strides == nullptr) contiguous_strides(shape_, tensor.ndim, strides_);
  view_.type = element_type(tensor.dtype, name);
  view_.data =
      tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
  view_.shape = shape_;
  view_.strides = strides_;
  view_.ndim = tensor.ndim;
  view_.device = on_cuda ? device_type::cuda : device_type::cpu;
  view_.device_id = on_cuda ? tensor.device.id : 0;
}

py::dict dlpack_layout() {
  const auto entry = [](std::size_t size, std::initializer_list<std::size_t> offsets) {
    py::list list;
    for (const std::size_t offset : offsets) list.append(offset);
    return py::make_tuple(size, py::tuple(list));
  };
  using dlpack::exchange_api;
  using dlpack::managed_tensor;
  using dlpack::managed_tensor_versioned;
  using dlpack::tensor;
  py::dict layout;
  layout["tensor"] = entry(
      sizeof(tensor), {offsetof(tensor, data), offsetof(tensor, device), offsetof(tensor, ndim),
                       offsetof(tensor, dtype), offsetof(tensor, shape), offsetof(tensor, strides),
                       offsetof(tensor, byte_offset)});
  layout["managed_tensor"] = entry(
      sizeof(managed_tensor), {offsetof(managed_tensor, tensor), offsetof(managed_tensor, context),
                               offsetof(managed_tensor, deleter)});
  layout["managed_tensor_versioned"] = entry(
      sizeof(managed_tensor_versioned),
      {offsetof(managed_tensor_versioned, version), offsetof(managed_tensor_versioned, context),
       offsetof(managed_tensor_versioned, deleter), offsetof(managed_tensor_versioned, flags),
       offsetof(managed_tensor_versioned, tensor)});
  layout["exchange_api"] =
      entry(sizeof(exchange_api),
            {offsetof(exchange_api, version), offsetof(exchange_api, previous),
             offsetof(exchange_api, allocate), offsetof(exchange_api, from_object),
             offsetof(exchange_api, to_object), offsetof(exchange_api, borrow_from_object),
             offsetof(exchange_api, current_stream)});
  return layout;
}

}  // namespace subquad::python

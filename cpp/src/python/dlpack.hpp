// Arrays of any library as views, through DLPack.
#ifndef SUBQUAD_PYTHON_DLPACK_HPP
#define SUBQUAD_PYTHON_DLPACK_HPP

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "array_check.hpp"
#include "dlpack_abi.hpp"
#include "subquad/array_view.hpp"

namespace subquad::python {

namespace py = pybind11;

enum class access { read, write };

// Holds on to an array while a function of the C ABI works on it. Made and destroyed with the GIL
// held; in between the view is valid without it. Raises TypeError (no DLPack, element type, device)
// or ValueError (read-only output, number of dimensions), naming the argument; lengths and address
// are for the C ABI to check.
//
// Where type(x) itself, not a base of it, publishes DLPack's C exchange table, that is used: for
// torch tensors it costs a hundredth of __dlpack__. It does not look at autograd, at function
// transforms or at the negative bit; whoever passes such a tensor must have resolved these.
class borrowed_tensor {
 public:
  borrowed_tensor(py::handle object, const char* name, access mode);
  ~borrowed_tensor();
  borrowed_tensor(const borrowed_tensor&) = delete;
  borrowed_tensor& operator=(const borrowed_tensor&) = delete;

  const array_view& view() const noexcept { return view_; }

 protected:
  borrowed_tensor() = default;
  void acquire(py::handle object, const char* name, access mode);

 private:
  void import_object(py::handle object, const char* name);
  void import_capsule(py::handle capsule, const char* name);
  void fill_view(const char* name, access mode);
  void release() noexcept;

  dlpack::managed_tensor* legacy_ = nullptr;
  dlpack::managed_tensor_versioned* versioned_ = nullptr;
  array_view view_{};
  std::int64_t shape_[kMaxDimensions];
  std::int64_t strides_[kMaxDimensions];
};

class input : public borrowed_tensor {
 public:
  input(py::handle object, const char* name) : borrowed_tensor(object, name, access::read) {}
};

class output : public borrowed_tensor {
 public:
  output(py::handle object, const char* name) : borrowed_tensor(object, name, access::write) {}
};

// An argument that may be None.
class optional_tensor : public borrowed_tensor {
 public:
  const array_view* get() const noexcept { return present_ ? &view() : nullptr; }

 protected:
  optional_tensor(py::handle object, const char* name, access mode) : present_(!object.is_none()) {
    if (present_) acquire(object, name, mode);
  }

 private:
  bool present_;
};

class optional_input : public optional_tensor {
 public:
  optional_input(py::handle object, const char* name)
      : optional_tensor(object, name, access::read) {}
};

class optional_output : public optional_tensor {
 public:
  optional_output(py::handle object, const char* name)
      : optional_tensor(object, name, access::write) {}
};

// Sizes and offsets of the structures exchanged, for the test that compares them.
py::dict dlpack_layout();

}  // namespace subquad::python

#endif  // SUBQUAD_PYTHON_DLPACK_HPP

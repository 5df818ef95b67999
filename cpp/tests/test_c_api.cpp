// The C ABI: statuses, messages, contexts, and the C++ functions that throw.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "subquad/normalizers.hpp"
#include "subquad/threads.hpp"

namespace {

// An argument with its shape beside it.
template <class T>
struct array {
  array(std::vector<std::int64_t> lengths, T fill)
      : shape(std::move(lengths)), data(count(shape), fill) {}

  subquad::array_view view() const {
    return subquad::contiguous_view(data.data(), shape.data(),
                                    static_cast<std::int32_t>(shape.size()));
  }

  static std::size_t count(const std::vector<std::int64_t>& lengths) {
    std::int64_t product = 1;
    for (const std::int64_t length : lengths) product *= length;
    return static_cast<std::size_t>(product);
  }

  std::vector<std::int64_t> shape;
  std::vector<T> data;
};

const subquad_array* as_c(const subquad::array_view& view) { return subquad::detail::as_c(view); }

struct arguments {
  array<double> x{{4, 3}, 0.0};
  array<double> y{{5, 3}, 0.0};
  array<double> out{{4}, std::nan("")};
  array<std::uint8_t> workspace{
      {static_cast<std::int64_t>(subquad_log_normalizer_workspace(1, 4, 5, 3, 8, SUBQUAD_CPU))}, 0};
};

subquad_status call(const subquad::array_view& x, const arguments& a, subquad_error* error,
                    const subquad_context* context = nullptr) {
  const auto y = a.y.view();
  const auto out = a.out.view();
  const auto workspace = a.workspace.view();
  return subquad_log_normalizer(as_c(x), as_c(y), nullptr, nullptr, as_c(out), as_c(workspace),
                                context, error);
}

void results_and_contexts() {
  arguments a;
  subquad_error error;
  std::strcpy(error.message, "of another call");
  SUBQUAD_CHECK(call(a.x.view(), a, &error) == SUBQUAD_SUCCESS);
  SUBQUAD_CHECK(error.message[0] == '\0');
  for (const double value : a.out.data) SUBQUAD_CHECK(std::abs(value - std::log(5.0)) < 1e-15);
  SUBQUAD_CHECK(call(a.x.view(), a, nullptr) == SUBQUAD_SUCCESS);
  const subquad_context one{1, nullptr};
  SUBQUAD_CHECK(call(a.x.view(), a, &error, &one) == SUBQUAD_SUCCESS);
  const subquad_context negative{-1, nullptr};
  SUBQUAD_CHECK(call(a.x.view(), a, &error, &negative) == SUBQUAD_INVALID_ARGUMENT);
  SUBQUAD_CHECK(std::string(error.message).find("context: ") == 0);
}

void expect(subquad_status status, const char* part, const subquad::array_view& x) {
  const arguments a;
  subquad_error error;
  SUBQUAD_CHECK(call(x, a, &error) == status);
  const bool named = std::string(error.message).find(part) != std::string::npos;
  if (!named) std::printf("expected '%s' in '%s'\n", part, error.message);
  SUBQUAD_CHECK(named);
  SUBQUAD_CHECK(call(x, a, nullptr) == status);
}

void refused_arguments() {
  const arguments a;
  subquad::array_view x = a.x.view();
  x.device = static_cast<subquad::device_type>(7);
  expect(SUBQUAD_TYPE_ERROR,
         "x: expected an array in memory of the CPU, got one on a device of unknown type 7", x);

  x = a.x.view();
  x.type = static_cast<subquad::dtype>(9);
  expect(SUBQUAD_TYPE_ERROR, "x: unknown dtype 9", x);
  x.type = static_cast<subquad::dtype>(-1);
  expect(SUBQUAD_TYPE_ERROR, "x: unknown dtype -1", x);
  x.type = subquad::dtype::int64;
  expect(SUBQUAD_TYPE_ERROR, "x", x);
  x.type = subquad::dtype::float16;
  expect(SUBQUAD_TYPE_ERROR, "x: expected float32 or float64, got float16, which only CUDA", x);
  x.type = subquad::dtype::bfloat16;
  expect(SUBQUAD_TYPE_ERROR, "x: expected float32 or float64, got bfloat16, which only CUDA", x);

  x = a.x.view();
  x.ndim = 33;
  expect(SUBQUAD_INVALID_ARGUMENT, "x: expected from 0 to 32 dimensions, got 33", x);
  x.ndim = -1;
  expect(SUBQUAD_INVALID_ARGUMENT, "x: expected from 0 to 32 dimensions, got -1", x);
  x.ndim = 1;
  expect(SUBQUAD_INVALID_ARGUMENT, "x", x);

  x = a.x.view();
  x.shape = nullptr;
  expect(SUBQUAD_INVALID_ARGUMENT, "x: expected a shape, got NULL", x);
  const std::int64_t negative[]{4, -3};
  x.shape = negative;
  expect(SUBQUAD_INVALID_ARGUMENT, "x: expected lengths of at least 0, got -3 on axis 1", x);

  x = a.x.view();
  x.data = nullptr;
  expect(SUBQUAD_INVALID_ARGUMENT, "x: expected the address of the elements, got none", x);
  x.data = static_cast<char*>(a.x.view().data) + 1;
  expect(SUBQUAD_INVALID_ARGUMENT, "x: expected elements aligned to their size of 8 bytes", x);

  subquad_error error;
  const auto y = a.y.view();
  const auto out = a.out.view();
  const auto workspace = a.workspace.view();
  SUBQUAD_CHECK(subquad_log_normalizer(nullptr, as_c(y), nullptr, nullptr, as_c(out),
                                       as_c(workspace), nullptr,
                                       &error) == SUBQUAD_INVALID_ARGUMENT);
  SUBQUAD_CHECK(std::string(error.message) == "x: expected an array, got NULL");
}

// main() names a CUDA library that does not exist.
void without_a_cuda_library() {
  const arguments a;
  subquad::array_view x = a.x.view();
  x.device = subquad::device_type::cuda;
  expect(SUBQUAD_TYPE_ERROR,
         "x: this build of subquad has no CUDA library (/nowhere/libsubquad_cuda.so: no such file)",
         x);
  // An array in another place than the first is that array's fault.
  subquad::array_view y = a.y.view();
  y.device = subquad::device_type::cuda;
  y.device_id = 1;
  const auto host = a.x.view();
  const auto out = a.out.view();
  const auto workspace = a.workspace.view();
  subquad_error error;
  SUBQUAD_CHECK(subquad_log_normalizer(as_c(host), as_c(y), nullptr, nullptr, as_c(out),
                                       as_c(workspace), nullptr, &error) == SUBQUAD_TYPE_ERROR);
  SUBQUAD_CHECK(std::string(error.message) ==
                "y: expected an array in memory of the CPU, where x is, got one on CUDA device 1");

  SUBQUAD_CHECK(subquad_log_normalizer_workspace(1, 4, 5, 3, 8, SUBQUAD_CPU) > 0);
  SUBQUAD_CHECK(subquad_log_normalizer_workspace(1, 4, 5, 3, 8, SUBQUAD_CUDA) == 0);
  SUBQUAD_CHECK(subquad_log_normalizer_workspace(1, 4, 5, 3, 8, 7) == 0);

  subquad_cuda_info info;
  std::memset(&info, -1, sizeof(info));
  SUBQUAD_CHECK(subquad_cuda_query(&info, &error) == SUBQUAD_SUCCESS);
  SUBQUAD_CHECK(info.runtime_version == 0 && info.driver_version == 0 && info.device_count == 0);
  SUBQUAD_CHECK(info.architectures[0] == '\0');
  SUBQUAD_CHECK(std::string(info.problem).find("no CUDA library (/nowhere/") != std::string::npos);
  SUBQUAD_CHECK(subquad_cuda_query(nullptr, &error) == SUBQUAD_INVALID_ARGUMENT);
  SUBQUAD_CHECK(subquad_cuda_prepare(0, &error) == SUBQUAD_TYPE_ERROR);
  SUBQUAD_CHECK(std::string(error.message).find("this build of subquad has no CUDA library") == 0);
}

// Every status becomes its own exception, which keeps the message.
subquad_status reported(subquad_status status, subquad_error* error) {
  std::strcpy(error->message, "the message");
  return status;
}

void statuses_as_exceptions() {
  using subquad::detail::call;
  call(reported, SUBQUAD_SUCCESS);
  const auto thrown = [](subquad_status status) {
    try {
      call(reported, status);
    } catch (const subquad::invalid_argument&) {
      return SUBQUAD_INVALID_ARGUMENT;
    } catch (const subquad::type_error&) {
      return SUBQUAD_TYPE_ERROR;
    } catch (const subquad::device_error&) {
      return SUBQUAD_DEVICE_ERROR;
    } catch (const std::bad_alloc& e) {
      SUBQUAD_CHECK(std::string(e.what()) == "the message");
      return SUBQUAD_OUT_OF_MEMORY;
    } catch (const subquad::error& e) {
      SUBQUAD_CHECK(std::string(e.what()) == "the message");
      return SUBQUAD_INTERNAL_ERROR;
    }
    return SUBQUAD_SUCCESS;
  };
  for (const auto status : {SUBQUAD_INVALID_ARGUMENT, SUBQUAD_TYPE_ERROR, SUBQUAD_OUT_OF_MEMORY,
                            SUBQUAD_INTERNAL_ERROR, SUBQUAD_DEVICE_ERROR}) {
    SUBQUAD_CHECK(thrown(status) == status);
  }
}

void a_workspace_too_small() {
  arguments a;
  a.workspace.shape[0] = 1;
  subquad_error error;
  SUBQUAD_CHECK(call(a.x.view(), a, &error) == SUBQUAD_INVALID_ARGUMENT);
  SUBQUAD_CHECK(std::string(error.message).find("workspace") == 0);
}

void strides_of_views() {
  arguments a;
  for (std::size_t i = 0; i < a.x.data.size(); ++i) a.x.data[i] = static_cast<double>(i) - 5.0;
  for (std::size_t i = 0; i < a.y.data.size(); ++i) a.y.data[i] = 0.1 * static_cast<double>(i);
  SUBQUAD_CHECK(call(a.x.view(), a, nullptr) == SUBQUAD_SUCCESS);
  const std::vector<double> expected = a.out.data;
  subquad::array_view reversed = a.x.view();
  const std::int64_t strides[]{-3, 1};
  reversed.strides = strides;
  reversed.data = a.x.data.data() + 9;
  SUBQUAD_CHECK(call(reversed, a, nullptr) == SUBQUAD_SUCCESS);
  for (std::size_t i = 0; i < 4; ++i) SUBQUAD_CHECK(a.out.data[i] == expected[3 - i]);
}

void runtime_functions() {
  SUBQUAD_CHECK(std::string(subquad_version()) == SUBQUAD_EXPECTED_VERSION);
  const int threads = subquad::get_num_threads();
  subquad::set_num_threads(1);
  SUBQUAD_CHECK(subquad::get_num_threads() == 1);
  subquad::set_num_threads(threads);
  SUBQUAD_CHECK(subquad::get_num_threads() == threads);
  SUBQUAD_CHECK(checks::throws<subquad::invalid_argument>([] { subquad::set_num_threads(-1); },
                                                          "n_threads: "));
  const std::string level = subquad::get_isa();
  for (const std::string& other : subquad::isa_levels()) {
    subquad::set_isa(other);
    SUBQUAD_CHECK(subquad::get_isa() == other);
  }
  subquad::set_isa(level);
  SUBQUAD_CHECK(
      checks::throws<subquad::invalid_argument>([] { subquad::set_isa("v9"); }, "got 'v9'"));
  SUBQUAD_CHECK(subquad_set_isa(nullptr, nullptr) == SUBQUAD_INVALID_ARGUMENT);
  SUBQUAD_CHECK(subquad_isa_level(-1) == nullptr);
  SUBQUAD_CHECK(subquad_isa_level(subquad_isa_level_count()) == nullptr);
}

}  // namespace

int main() {
  setenv("SUBQUAD_CUDA_LIBRARY", "/nowhere/libsubquad_cuda.so", 1);
  results_and_contexts();
  refused_arguments();
  without_a_cuda_library();
  statuses_as_exceptions();
  a_workspace_too_small();
  strides_of_views();
  runtime_functions();
  return checks::status();
}

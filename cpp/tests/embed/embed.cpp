// Log-normalizers of two rows over three keys, from C++. Prints them; 0 where they are right.
#include <subquad/normalizers.hpp>
#include <subquad/threads.hpp>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

int main() {
  const std::vector<double> x{1.0, 2.0, -0.5, 0.25};
  const std::vector<double> y{0.5, 1.0, 1.0, -1.0, 2.0, 0.0};
  std::vector<double> out(2);
  const std::int64_t x_shape[]{2, 2};
  const std::int64_t y_shape[]{3, 2};
  const std::int64_t out_shape[]{2};
  std::vector<std::uint8_t> bytes(subquad::log_normalizer_workspace(1, 2, 3, 2, sizeof(double)));
  const std::int64_t workspace_shape[]{static_cast<std::int64_t>(bytes.size())};

  const auto x_view = subquad::contiguous_view(x.data(), x_shape, 2);
  const auto y_view = subquad::contiguous_view(y.data(), y_shape, 2);
  const auto out_view = subquad::contiguous_view(out.data(), out_shape, 1);
  const auto workspace = subquad::contiguous_view(bytes.data(), workspace_shape, 1);

  subquad::set_num_threads(1);
  int failures = subquad::get_num_threads() == 1 ? 0 : 1;
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    subquad::log_normalizer(x_view, y_view, nullptr, nullptr, out_view, workspace);
    for (std::size_t i = 0; i < 2; ++i) {
      double sum = 0.0;
      for (std::size_t j = 0; j < 3; ++j) {
        sum += std::exp(x[2 * i] * y[2 * j] + x[2 * i + 1] * y[2 * j + 1]);
      }
      std::printf("%s %.17g\n", level.c_str(), out[i]);
      if (!(std::abs(out[i] - std::log(sum)) <= 1e-14)) ++failures;
    }
  }

  try {
    subquad::log_normalizer(x_view, out_view, nullptr, nullptr, out_view, workspace);
    ++failures;
  } catch (const subquad::invalid_argument& e) {
    std::printf("refused as it should be: %s\n", e.what());
  }
  try {
    auto elsewhere = y_view;
    elsewhere.device = subquad::device_type::cuda;
    subquad::log_normalizer(x_view, elsewhere, nullptr, nullptr, out_view, workspace);
    ++failures;
  } catch (const subquad::type_error& e) {
    std::printf("refused as it should be: %s\n", e.what());
  }
  try {
    const std::vector<float> single(6);
    const auto narrow = subquad::contiguous_view(single.data(), y_shape, 2);
    subquad::log_normalizer(x_view, narrow, nullptr, nullptr, out_view, workspace);
    ++failures;
  } catch (const subquad::type_error& e) {
    std::printf("refused as it should be: %s\n", e.what());
  }
  return failures;
}

// Linear attention with values in logarithms and its reverse by the kernels of CUDA.
#include "check.hpp"
#include "log_attention_cases.hpp"
#include "strided.hpp"

namespace {

using namespace log_attention_cases;

template <class T>
void some() {
  keys_that_are_absent<T>();
  what_is_not_finite<T>();
  zeros<T>();
  empty_sizes<T>();
  strides_alike<T>();
}

}  // namespace

int main() {
  subquad::cuda::on_host::in_every_order(
      [] {
        every_part<float>();
        far_apart<float>();
        decays<float>();
        split_sequences<float>();
        some<float>();
        some<double>();
        every_part<double>();
      },
      [] { some<float>(); });
  return checks::status();
}

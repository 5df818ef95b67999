// Linear attention with values in logarithms and its reverse on the CPU, at every instruction set.
#include "log_attention_cases.hpp"

#include <cstdio>
#include <string>

#include "check.hpp"
#include "subquad/threads.hpp"

namespace {

using namespace log_attention_cases;

// A batch in several threads gives the same bits.
template <class T>
void threads_alike() {
  for (const int parts : {kCausal | kSigned | kMask | kDecay, kSegments | kState}) {
    const auto p = problem<T>(64, 64, 40, 40, parts, 6).fill(17, 2, 2);
    const upstream<T> g(p, 19, true);
    subquad::set_num_threads(1);
    const results<T> one = forward(p);
    const gradients<T> one_gradients = reverse(p, g);
    for (const int threads : {2, 3}) {
      subquad::set_num_threads(threads);
      SUBQUAD_CHECK(same(one, forward(p)));
      SUBQUAD_CHECK(same(one_gradients, reverse(p, g)));
    }
    subquad::set_num_threads(2);
  }
}

template <class T>
void everything() {
  every_part<T>();
  far_apart<T>();
  decays<T>();
  keys_that_are_absent<T>();
  what_is_not_finite<T>();
  zeros<T>();
  split_sequences<T>();
  empty_sizes<T>();
  strides_alike<T>();
  threads_alike<T>();
}

}  // namespace

int main() {
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    const int before = checks::failures();
    everything<float>();
    everything<double>();
    accuracy();
    long_sequence<float>(0);
    long_sequence<float>(-1e-4);
    long_sequence<double>(0);
    long_sequence<double>(-1e-4);
    if (checks::failures() != before) std::printf("at level %s\n", level.c_str());
  }
  return checks::status();
}

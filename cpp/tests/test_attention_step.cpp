// Streaming linear attention on the CPU.
#include <random>
#include <string>
#include <vector>

#include "attention_stream.hpp"
#include "check.hpp"
#include "subquad/threads.hpp"

namespace {

using attention_stream::array;
using attention_stream::stream;

// The same bits for every number of threads.
void check_threads() {
  std::vector<float> results[2];
  for (const int threads : {1, 2}) {
    subquad::set_num_threads(threads);
    stream<float> states(64, 64, 64, 16);
    array<float> k({64, 64}), v({64, 64}), q({64, 64});
    std::mt19937_64 random(9);
    std::normal_distribution<float> normal;
    for (int t = 0; t < 20; ++t) {
      for (auto* a : {&k, &v, &q}) {
        for (float& value : a->values) value = normal(random);
      }
      states.step(k, v, q);
    }
    results[threads - 1] = states.y.values;
  }
  SUBQUAD_CHECK(results[0] == results[1]);
}

}  // namespace

int main() {
  for (const std::string& level : subquad::isa_levels()) {
    subquad::set_isa(level);
    attention_stream::check_streams<float>();
    attention_stream::check_streams<double>();
    attention_stream::check_long_stream(40000);
    attention_stream::check_edges();
  }
  check_threads();
  return checks::status();
}

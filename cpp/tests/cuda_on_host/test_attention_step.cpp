// Streaming linear attention by the kernel of CUDA.
#include "attention_stream.hpp"
#include "check.hpp"
#include "strided.hpp"

int main() {
  subquad::cuda::on_host::in_every_order(
      [] {
        attention_stream::check_streams<float>();
        attention_stream::check_streams<double>();
        attention_stream::check_long_stream(4000);
        attention_stream::check_edges();
      },
      [] {
        attention_stream::check_some_streams<float>();
        attention_stream::check_edges();
      });
  return checks::status();
}

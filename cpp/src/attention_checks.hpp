// What linear attention, its states and its reverse ask of their arrays, on every device.
#ifndef SUBQUAD_ATTENTION_CHECKS_HPP
#define SUBQUAD_ATTENTION_CHECKS_HPP

#include <cstdint>
#include <initializer_list>
#include <string>

#include "arguments.hpp"

namespace subquad {

// The sizes of a call, and its broadcast batch.
struct attention_shape {
  batch_shape batch;
  std::int64_t n_q = 0;
  std::int64_t n = 0;
  std::int64_t d_k = 0;
  std::int64_t d_v = 0;
  dtype type = dtype::float32;

  // An input: joins the batch. `lengths` are those after the batch dimensions.
  void input(const array_view* array, const char* name, const char* expected,
             std::initializer_list<std::int64_t> lengths) {
    if (array == nullptr) return;
    require_dtype(*array, type, name);
    check_lengths(*array, name, expected, lengths);
    batch.include(*array, static_cast<std::int32_t>(lengths.size()), name);
  }

  // An output: has the batch that the inputs make.
  void output(const array_view* array, const char* name, const char* expected,
              std::initializer_list<std::int64_t> lengths) const {
    if (array == nullptr) return;
    require_dtype(*array, type, name);
    check_lengths(*array, name, expected, lengths);
    batch.require(*array, static_cast<std::int32_t>(lengths.size()), name);
  }

  static void check_lengths(const array_view& array, const char* name, const char* expected,
                            std::initializer_list<std::int64_t> lengths) {
    require_rank(array, static_cast<std::int32_t>(lengths.size()), name, expected);
    auto position = static_cast<std::int32_t>(lengths.size());
    for (const std::int64_t length : lengths) {
      require_length(array, position--, length, name, expected);
    }
  }
};

inline void require_both(const array_view* a, const array_view* b, const char* name,
                         const char* other) {
  if (a == nullptr && b != nullptr) {
    throw invalid_argument(std::string(other) + ": expected " + name + " with it, got none");
  }
  if (a != nullptr && b == nullptr) {
    throw invalid_argument(std::string(name) + ": expected " + other + " with it, got none");
  }
}

inline void require_causal(const array_view* grad_log_decay, bool causal) {
  if (grad_log_decay != nullptr && !causal) {
    throw invalid_argument("grad_log_decay: expected a causal call, got one that is not");
  }
}

// Keys, values and what all forms of a call have in common, but for the state.
inline attention_shape check_attention(const array_view& log_k, const array_view& v,
                                       const char* v_name, const array_view* log_q,
                                       const array_view* log_decay, const array_view* key_mask,
                                       const array_view* segments, bool causal) {
  require_real(log_k, "log_k");
  require_rank(log_k, 2, "log_k", "(..., n, d_k)");
  require_rank(v, 2, v_name, "(..., n, d_v)");
  attention_shape shape;
  shape.type = log_k.type;
  shape.n = length_from_end(log_k, 2);
  shape.d_k = length_from_end(log_k, 1);
  shape.d_v = length_from_end(v, 1);
  shape.input(&log_k, "log_k", "(..., n, d_k)", {shape.n, shape.d_k});
  shape.input(&v, v_name, "(..., n, d_v)", {shape.n, shape.d_v});
  if (log_q != nullptr) {
    require_rank(*log_q, 2, "log_q", "(..., n_q, d_k)");
    shape.n_q = length_from_end(*log_q, 2);
    if ((causal || segments != nullptr) && shape.n_q != shape.n) {
      throw invalid_argument(std::string("log_q: expected as many rows as log_k, ") +
                             std::to_string(shape.n) + ", where " +
                             (causal ? "causal" : "segments are given") + ", got shape " +
                             shape_text(log_q->shape, log_q->ndim));
    }
    shape.input(log_q, "log_q", "(..., n_q, d_k)", {shape.n_q, shape.d_k});
  }
  if (log_decay != nullptr && !causal) {
    throw invalid_argument("log_decay: expected a causal call, got one that is not");
  }
  shape.input(log_decay, "log_decay", "(..., n, d_k)", {shape.n, shape.d_k});
  if (key_mask != nullptr) {
    require_dtype(*key_mask, dtype::uint8, "key_mask");
    shape.check_lengths(*key_mask, "key_mask", "(..., n)", {shape.n});
    shape.batch.include(*key_mask, 1, "key_mask");
  }
  if (segments != nullptr) {
    require_dtype(*segments, dtype::int64, "segments");
    require_shape(*segments, "segments", "(n,)", {shape.n});
  }
  return shape;
}

// ... with a state of sums.
inline attention_shape check_linear_attention_inputs(
    const array_view& log_k, const array_view& v, const array_view* log_q,
    const array_view* log_decay, const array_view* key_mask, const array_view* segments,
    const array_view* key_sums, const array_view* value_sums, bool causal) {
  attention_shape shape =
      check_attention(log_k, v, "v", log_q, log_decay, key_mask, segments, causal);
  require_both(key_sums, value_sums, "key_sums", "value_sums");
  shape.input(key_sums, "key_sums", "(..., 5, d_k)", {5, shape.d_k});
  shape.input(value_sums, "value_sums", "(..., 2, d_k, d_v)", {2, shape.d_k, shape.d_v});
  return shape;
}

inline attention_shape check_linear_attention(
    const array_view& log_k, const array_view& v, const array_view* log_q,
    const array_view* log_decay, const array_view* key_mask, const array_view* segments,
    const array_view* key_sums, const array_view* value_sums, bool causal, const array_view* y,
    const array_view* log_z, const array_view* final_key_sums, const array_view* final_value_sums) {
  const attention_shape shape = check_linear_attention_inputs(
      log_k, v, log_q, log_decay, key_mask, segments, key_sums, value_sums, causal);
  require_both(final_key_sums, final_value_sums, "final_key_sums", "final_value_sums");
  shape.output(y, "y", "(..., n_q, d_v)", {shape.n_q, shape.d_v});
  shape.output(log_z, "log_z", "(..., n_q)", {shape.n_q});
  shape.output(final_key_sums, "final_key_sums", "(..., 5, d_k)", {5, shape.d_k});
  shape.output(final_value_sums, "final_value_sums", "(..., 2, d_k, d_v)",
               {2, shape.d_k, shape.d_v});
  return shape;
}

inline attention_shape check_linear_attention_vjp(
    const array_view& log_k, const array_view& v, const array_view* log_q,
    const array_view* log_decay, const array_view* key_mask, const array_view* segments,
    const array_view* key_sums, const array_view* value_sums, bool causal, const array_view* y,
    const array_view* grad_y, const array_view* grad_log_z, const array_view* grad_final_key_sums,
    const array_view* grad_final_value_sums, const array_view* grad_log_k, const array_view* grad_v,
    const array_view* grad_log_q, const array_view* grad_log_decay, const array_view* grad_key_sums,
    const array_view* grad_value_sums) {
  attention_shape shape = check_linear_attention_inputs(log_k, v, log_q, log_decay, key_mask,
                                                        segments, key_sums, value_sums, causal);
  require_both(y, grad_y, "y", "grad_y");
  shape.input(y, "y", "(..., n_q, d_v)", {shape.n_q, shape.d_v});
  shape.input(grad_y, "grad_y", "(..., n_q, d_v)", {shape.n_q, shape.d_v});
  shape.input(grad_log_z, "grad_log_z", "(..., n_q)", {shape.n_q});
  shape.input(grad_final_key_sums, "grad_final_key_sums", "(..., 5, d_k)", {5, shape.d_k});
  shape.input(grad_final_value_sums, "grad_final_value_sums", "(..., 2, d_k, d_v)",
              {2, shape.d_k, shape.d_v});
  shape.output(grad_log_k, "grad_log_k", "(..., n, d_k)", {shape.n, shape.d_k});
  shape.output(grad_v, "grad_v", "(..., n, d_v)", {shape.n, shape.d_v});
  require_causal(grad_log_decay, causal);
  shape.output(grad_log_q, "grad_log_q", "(..., n_q, d_k)", {shape.n_q, shape.d_k});
  shape.output(grad_log_decay, "grad_log_decay", "(..., n, d_k)", {shape.n, shape.d_k});
  shape.output(grad_key_sums, "grad_key_sums", "(..., 5, d_k)", {5, shape.d_k});
  shape.output(grad_value_sums, "grad_value_sums", "(..., 2, d_k, d_v)", {2, shape.d_k, shape.d_v});
  return shape;
}

// ... with a state in logarithms.
inline attention_shape check_log_linear_attention_inputs(
    const array_view& log_k, const array_view& log_v, const array_view* sign_v,
    const array_view* log_q, const array_view* log_decay, const array_view* key_mask,
    const array_view* segments, const array_view* log_numerator, const array_view* sign_numerator,
    const array_view* log_denominator, bool causal) {
  attention_shape shape =
      check_attention(log_k, log_v, "log_v", log_q, log_decay, key_mask, segments, causal);
  shape.input(sign_v, "sign_v", "(..., n, d_v)", {shape.n, shape.d_v});
  require_both(log_numerator, log_denominator, "log_numerator", "log_denominator");
  if (sign_numerator != nullptr && log_numerator == nullptr) {
    throw invalid_argument("sign_numerator: expected log_numerator with it, got none");
  }
  shape.input(log_numerator, "log_numerator", "(..., d_k, d_v)", {shape.d_k, shape.d_v});
  shape.input(sign_numerator, "sign_numerator", "(..., d_k, d_v)", {shape.d_k, shape.d_v});
  shape.input(log_denominator, "log_denominator", "(..., d_k)", {shape.d_k});
  return shape;
}

inline attention_shape check_log_linear_attention(
    const array_view& log_k, const array_view& log_v, const array_view* sign_v,
    const array_view* log_q, const array_view* log_decay, const array_view* key_mask,
    const array_view* segments, const array_view* log_numerator, const array_view* sign_numerator,
    const array_view* log_denominator, bool causal, const array_view* log_y,
    const array_view* sign_y, const array_view* log_z, const array_view* final_log_numerator,
    const array_view* final_sign_numerator, const array_view* final_log_denominator) {
  const attention_shape shape =
      check_log_linear_attention_inputs(log_k, log_v, sign_v, log_q, log_decay, key_mask, segments,
                                        log_numerator, sign_numerator, log_denominator, causal);
  shape.output(log_y, "log_y", "(..., n_q, d_v)", {shape.n_q, shape.d_v});
  shape.output(sign_y, "sign_y", "(..., n_q, d_v)", {shape.n_q, shape.d_v});
  shape.output(log_z, "log_z", "(..., n_q)", {shape.n_q});
  shape.output(final_log_numerator, "final_log_numerator", "(..., d_k, d_v)",
               {shape.d_k, shape.d_v});
  shape.output(final_sign_numerator, "final_sign_numerator", "(..., d_k, d_v)",
               {shape.d_k, shape.d_v});
  shape.output(final_log_denominator, "final_log_denominator", "(..., d_k)", {shape.d_k});
  return shape;
}

inline attention_shape check_log_linear_attention_vjp(
    const array_view& log_k, const array_view& log_v, const array_view* sign_v,
    const array_view* log_q, const array_view* log_decay, const array_view* key_mask,
    const array_view* segments, const array_view* log_numerator, const array_view* sign_numerator,
    const array_view* log_denominator, bool causal, const array_view* grad_log_y,
    const array_view* grad_log_z, const array_view* grad_final_log_numerator,
    const array_view* grad_final_log_denominator, const array_view* grad_log_k,
    const array_view* grad_log_v, const array_view* grad_log_q, const array_view* grad_log_decay,
    const array_view* grad_log_numerator, const array_view* grad_log_denominator) {
  attention_shape shape =
      check_log_linear_attention_inputs(log_k, log_v, sign_v, log_q, log_decay, key_mask, segments,
                                        log_numerator, sign_numerator, log_denominator, causal);
  shape.input(grad_log_y, "grad_log_y", "(..., n_q, d_v)", {shape.n_q, shape.d_v});
  shape.input(grad_log_z, "grad_log_z", "(..., n_q)", {shape.n_q});
  shape.input(grad_final_log_numerator, "grad_final_log_numerator", "(..., d_k, d_v)",
              {shape.d_k, shape.d_v});
  shape.input(grad_final_log_denominator, "grad_final_log_denominator", "(..., d_k)", {shape.d_k});
  shape.output(grad_log_k, "grad_log_k", "(..., n, d_k)", {shape.n, shape.d_k});
  shape.output(grad_log_v, "grad_log_v", "(..., n, d_v)", {shape.n, shape.d_v});
  require_causal(grad_log_decay, causal);
  shape.output(grad_log_q, "grad_log_q", "(..., n_q, d_k)", {shape.n_q, shape.d_k});
  shape.output(grad_log_decay, "grad_log_decay", "(..., n, d_k)", {shape.n, shape.d_k});
  shape.output(grad_log_numerator, "grad_log_numerator", "(..., d_k, d_v)", {shape.d_k, shape.d_v});
  shape.output(grad_log_denominator, "grad_log_denominator", "(..., d_k)", {shape.d_k});
  return shape;
}

// The states are in and out at once: contiguous, and with the batch of the call.
inline attention_shape check_attention_step(
    const array_view& log_k, const array_view& v, const array_view& log_q,
    const array_view* log_decay, const array_view& key_sums, const array_view& value_sums,
    const array_view& recent_keys, const array_view& recent_values, const array_view& recent_count,
    const array_view& y, const array_view* log_z) {
  require_real(log_k, "log_k");
  require_rank(log_k, 1, "log_k", "(..., d_k)");
  require_rank(v, 1, "v", "(..., d_v)");
  attention_shape shape;
  shape.type = log_k.type;
  shape.n = 1;
  shape.n_q = 1;
  shape.d_k = length_from_end(log_k, 1);
  shape.d_v = length_from_end(v, 1);
  shape.input(&log_k, "log_k", "(..., d_k)", {shape.d_k});
  shape.input(&v, "v", "(..., d_v)", {shape.d_v});
  shape.input(&log_q, "log_q", "(..., d_k)", {shape.d_k});
  shape.input(log_decay, "log_decay", "(..., d_k)", {shape.d_k});
  require_rank(recent_keys, 2, "recent_keys", "(..., R, d_k)");
  const std::int64_t recent = length_from_end(recent_keys, 2);
  if (recent < 1) {
    throw invalid_argument("recent_keys: expected room for a token at least, got shape " +
                           shape_text(recent_keys.shape, recent_keys.ndim));
  }
  const auto check_state = [](const array_view& array, const char* name) {
    std::int64_t stride = 1;
    for (std::int32_t axis = array.ndim - 1; axis >= 0; --axis) {
      if (array.shape[axis] > 1 && array.strides[axis] != stride) {
        throw invalid_argument(std::string(name) + ": expected a C-contiguous array, got strides");
      }
      stride *= array.shape[axis];
    }
  };
  shape.output(&key_sums, "key_sums", "(..., 5, d_k)", {5, shape.d_k});
  shape.output(&value_sums, "value_sums", "(..., 2, d_k, d_v)", {2, shape.d_k, shape.d_v});
  shape.output(&recent_keys, "recent_keys", "(..., R, d_k)", {recent, shape.d_k});
  shape.output(&recent_values, "recent_values", "(..., R, d_v)", {recent, shape.d_v});
  require_dtype(recent_count, dtype::int64, "recent_count");
  shape.batch.require(recent_count, 0, "recent_count");
  check_state(key_sums, "key_sums");
  check_state(value_sums, "value_sums");
  check_state(recent_keys, "recent_keys");
  check_state(recent_values, "recent_values");
  check_state(recent_count, "recent_count");
  shape.output(&y, "y", "(..., d_v)", {shape.d_v});
  shape.output(log_z, "log_z", "(...)", {});
  return shape;
}

}  // namespace subquad

#endif  // SUBQUAD_ATTENTION_CHECKS_HPP

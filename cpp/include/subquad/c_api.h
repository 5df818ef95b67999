/* The C ABI of subquad: what every other interface is thin over.
 *
 * Arrays are views of memory that the caller owns. Inputs may have any strides (zero and negative
 * included) and are not written. Outputs and the workspace must not overlap anything else. Every
 * array of a call has the same element type, float32 or float64, unless its description says
 * otherwise. "B..." stands for leading batch dimensions, of which there may be none; those of the
 * arrays of one call are equal or broadcast as NumPy's do, and outputs have the broadcast ones.
 *
 * Nothing is allocated for results: the caller passes outputs, and a workspace as a 1-D contiguous
 * uint8 array of at least the bytes that the matching *_workspace function returns, where `batch`
 * is the product of the broadcast batch dimensions, `itemsize` the bytes of one element of x (or y,
 * where there is no x) and `device` where the arrays lie. The size is 0 where nothing serves that
 * device: subquad_cuda_query tells why.
 *
 * Arrays lie in memory of the CPU or, all of a call, on one CUDA device. CUDA needs a library of
 * its own, libsubquad_cuda.so, which is loaded when a call first needs it: from the path in the
 * environment variable SUBQUAD_CUDA_LIBRARY, else from beside the object that holds this code.
 * There
 *   - kernels run on context.stream, a cudaStream_t of the arrays' device (NULL: its legacy default
 *     stream), whatever device is current. Nothing waits for them: a call returns once they are
 *     queued, and the arrays must stay until they have run. Streams alone put calls in order;
 *   - nothing is allocated on the device and no value is read back, so that a call may be captured
 *     in a CUDA graph once subquad_cuda_prepare has loaded the device's kernels;
 *   - indices, labels and offsets are not looked at before the kernels run: out of their range they
 *     go unreported, and results are undefined;
 *   - x and y of subquad_log_normalizer and subquad_log_normalizer_vjp may be float16 or bfloat16,
 *     both of the one type, and so may x of subquad_log_features, subquad_log_features_vjp and
 *     subquad_trigonometric_features; all other arrays of that call, outputs and gradients too, are
 *     then float32, and so is arithmetic;
 *   - context.n_threads has no meaning.
 *
 * Functions return a status, never throw and never print. `context` may be NULL (defaults); `error`
 * may be NULL, else it receives the message where the status is not SUBQUAD_SUCCESS. Arrays said to
 * be optional may be NULL. All functions may be called from several threads at once.
 */
#ifndef SUBQUAD_C_API_H
#define SUBQUAD_C_API_H

#include <stddef.h>
#include <stdint.h>

#if defined(SUBQUAD_STATIC)
#define SUBQUAD_API
#else
#define SUBQUAD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- types ----------------------------------------------------------------------------------- */

typedef enum subquad_status {
  SUBQUAD_SUCCESS = 0,
  SUBQUAD_INVALID_ARGUMENT = 1, /* a value, rank or size */
  SUBQUAD_TYPE_ERROR = 2,       /* an element type or a device */
  SUBQUAD_OUT_OF_MEMORY = 3,
  SUBQUAD_INTERNAL_ERROR = 4,
  SUBQUAD_DEVICE_ERROR = 5 /* reported by CUDA: no driver or too old a one, a failed launch */
} subquad_status;

/* Values of subquad_array.dtype. The 16-bit types are for CUDA alone. */
enum {
  SUBQUAD_FLOAT32 = 0,
  SUBQUAD_FLOAT64 = 1,
  SUBQUAD_INT64 = 2,
  SUBQUAD_UINT8 = 3,
  SUBQUAD_FLOAT16 = 4,
  SUBQUAD_BFLOAT16 = 5,
  SUBQUAD_INT32 = 6
};

/* Values of subquad_array.device, and of `device`. */
enum { SUBQUAD_CPU = 0, SUBQUAD_CUDA = 1 };

/* `data` is the address of the element whose indices are all zero, aligned to the size of an
 * element. `strides` counts elements; NULL means C-contiguous. */
typedef struct subquad_array {
  void* data;
  const int64_t* shape;
  const int64_t* strides;
  int32_t ndim;
  int32_t dtype;
  int32_t device;
  int32_t device_id; /* the index of a CUDA device; not looked at for the CPU */
} subquad_array;

typedef struct subquad_error {
  char message[512]; /* ends in a NUL; empty after a success */
} subquad_error;

/* How one call runs. */
typedef struct subquad_context {
  int32_t n_threads; /* threads of this call at most; 0: subquad_get_num_threads() */
  void* stream;      /* the cudaStream_t of a call on CUDA; not looked at for the CPU */
} subquad_context;

/* What there is of CUDA. Versions as CUDA writes them: 1000 major + 10 minor. */
typedef struct subquad_cuda_info {
  int32_t runtime_version; /* that the CUDA library is built with; 0: there is no such library */
  int32_t driver_version;  /* the newest runtime that the driver serves; 0: no driver */
  int32_t device_count;
  char architectures[64]; /* that the CUDA library holds kernels for: "sm_80 sm_90 compute_120" */
  char problem[256];      /* why arrays on CUDA cannot be computed with; empty: they can */
} subquad_cuda_info;

/* ---- library --------------------------------------------------------------------------------- */

/* "major.minor.patch" */
SUBQUAD_API const char* subquad_version(void);

/* Threads that a call may use. The number last set, else the environment variable
 * SUBQUAD_NUM_THREADS, else OMP_NUM_THREADS, else the processors that the process may run on, and
 * never more than those. 1 inside a parallel region and in a forked child. */
SUBQUAD_API int32_t subquad_get_num_threads(void);

/* n_threads >= 1, for the whole process. */
SUBQUAD_API subquad_status subquad_set_num_threads(int32_t n_threads, subquad_error* error);

/* The instruction set in use: "v2", "v3", "v4" (the x86-64 levels) or "neon". At first the best
 * that the processor runs, capped by the environment variable SUBQUAD_ISA. */
SUBQUAD_API const char* subquad_get_isa(void);
SUBQUAD_API subquad_status subquad_set_isa(const char* level, subquad_error* error);

/* The instruction sets that the processor runs, narrowest first; NULL out of range. */
SUBQUAD_API int32_t subquad_isa_level_count(void);
SUBQUAD_API const char* subquad_isa_level(int32_t index);

/* ---- CUDA ------------------------------------------------------------------------------------ */

/* What there is of CUDA. That there is none, or none that works, is a success with a problem. */
SUBQUAD_API subquad_status subquad_cuda_query(subquad_cuda_info* info, subquad_error* error);

/* Loads the kernels of a device, which its first call would do otherwise: calls may be captured in
 * a CUDA graph thereafter. SUBQUAD_TYPE_ERROR: there is no CUDA library, or it holds no kernels for
 * this device; SUBQUAD_DEVICE_ERROR: there is no such device, or it refuses them. */
SUBQUAD_API subquad_status subquad_cuda_prepare(int32_t device_id, subquad_error* error);

/* ---- normalizers ----------------------------------------------------------------------------- */

/* out_i = log sum_{j != excluded_i} exp(x_i . y_j + log_weights_j)
 *
 * x (B..., n, d); y (B..., m, d); log_weights (B..., m), optional; excluded (n), int64, optional:
 * the key that row i leaves out, -1 for none; out (B..., n).
 * A sum over nothing is -inf. log_weights_j = -inf removes key j whatever its row holds, and an
 * excluded key is removed likewise for its row. NaN reaches exactly the rows that depend on it. */
SUBQUAD_API size_t subquad_log_normalizer_workspace(int64_t batch, int64_t n, int64_t m, int64_t d,
                                                    int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_log_normalizer(
    const subquad_array* x, const subquad_array* y, const subquad_array* log_weights,
    const subquad_array* excluded, const subquad_array* out, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* Reverse of subquad_log_normalizer. With P_ij = exp(x_i . y_j + log_weights_j - log_z_i), which is
 * 0 where log_z_i = -inf or j = excluded_i:
 *   grad_x_i = grad_i sum_j P_ij y_j
 *   grad_y_j = sum_i grad_i P_ij x_i
 *   grad_log_weights_j = sum_i grad_i P_ij
 *
 * grad, log_z (B..., n), log_z the result of the forward function; the other inputs as there. Each
 * output optional: grad_x (B..., n, d), grad_y (B..., m, d), grad_log_weights (B..., m), all with
 * the broadcast batch dimensions. */
SUBQUAD_API size_t subquad_log_normalizer_vjp_workspace(int64_t batch, int64_t n, int64_t m,
                                                        int64_t d, int64_t itemsize,
                                                        int32_t device);
SUBQUAD_API subquad_status subquad_log_normalizer_vjp(
    const subquad_array* grad, const subquad_array* x, const subquad_array* y,
    const subquad_array* log_weights, const subquad_array* excluded, const subquad_array* log_z,
    const subquad_array* grad_x, const subquad_array* grad_y, const subquad_array* grad_log_weights,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* out_i = log sum_a exp(log_counts_a + m_ia + v_ia / 2), where
 *   m_ia = x_i . means_a
 *   v_ia = |factors_a^T x_i|^2 + sum_t x_it^2 diagonal_at
 *
 * x (B..., n, d); log_counts (B..., k); means (B..., k, d); factors (B..., k, d, r), r may be 0;
 * diagonal (B..., k, d), optional; out (B..., n). log_counts_a = -inf: an empty component.
 *
 * own_component (n), int64, and own_log_weight (n), both or neither: row i is itself a key, of
 * weight w = exp(own_log_weight_i), in component a = own_component_i (-1: it is not). Its component
 * is then used without it: with s = |x_i|^2 and W = exp(log_counts_a),
 *   W' = W - w, m' = (W m - w s) / W', v' = max(0, W / W' (v - w (s - m)^2 / W')),
 * empty where W' <= 4 eps W (eps of the element type). With include_own != 0, one more term
 * own_log_weight_i + s is added to the sum. */
SUBQUAD_API size_t subquad_gaussian_log_normalizer_workspace(int64_t batch, int64_t n, int64_t k,
                                                             int64_t d, int64_t r, int64_t itemsize,
                                                             int32_t device);
SUBQUAD_API subquad_status subquad_gaussian_log_normalizer(
    const subquad_array* x, const subquad_array* log_counts, const subquad_array* means,
    const subquad_array* factors, const subquad_array* diagonal, const subquad_array* own_component,
    const subquad_array* own_log_weight, int32_t include_own, const subquad_array* out,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* Reverse of subquad_gaussian_log_normalizer without own rows. With
 * R_ia = grad_i exp(log_counts_a + m_ia + v_ia / 2 - log_z_i), which is 0 where log_z_i = -inf:
 *   grad_x_i = sum_a R_ia (means_a + factors_a factors_a^T x_i + diagonal_a x_i)
 *   grad_log_counts_a = sum_i R_ia
 *   grad_means_a = sum_i R_ia x_i
 *   grad_factors_a = (sum_i R_ia x_i x_i^T) factors_a
 *   grad_diagonal_at = sum_i R_ia x_it^2 / 2
 *
 * grad, log_z (B..., n); the other inputs as in the forward function. Each output optional, in the
 * shape of its input with the broadcast batch dimensions. */
SUBQUAD_API size_t subquad_gaussian_log_normalizer_vjp_workspace(int64_t batch, int64_t n,
                                                                 int64_t k, int64_t d, int64_t r,
                                                                 int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_gaussian_log_normalizer_vjp(
    const subquad_array* grad, const subquad_array* x, const subquad_array* log_counts,
    const subquad_array* means, const subquad_array* factors, const subquad_array* diagonal,
    const subquad_array* log_z, const subquad_array* grad_x, const subquad_array* grad_log_counts,
    const subquad_array* grad_means, const subquad_array* grad_factors,
    const subquad_array* grad_diagonal, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* The moments m_ia and v_ia of subquad_gaussian_log_normalizer.
 *
 * x (n, d); means (k, d); factors (k, d, r); diagonal (k, d), optional; mean, variance (n, k). */
SUBQUAD_API size_t subquad_gaussian_score_moments_workspace(int64_t n, int64_t k, int64_t d,
                                                            int64_t r, int64_t itemsize,
                                                            int32_t device);
SUBQUAD_API subquad_status subquad_gaussian_score_moments(
    const subquad_array* x, const subquad_array* means, const subquad_array* factors,
    const subquad_array* diagonal, const subquad_array* mean, const subquad_array* variance,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* labels_i = argmax_c (x_i . centroids_c + offsets_c), the lowest index among equals, and score_i
 * the maximum.
 *
 * x (n, d); centroids (k, d); offsets (k); labels (n), int64; score (n). */
SUBQUAD_API size_t subquad_nearest_centroids_workspace(int64_t n, int64_t k, int64_t d,
                                                       int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_nearest_centroids(
    const subquad_array* x, const subquad_array* centroids, const subquad_array* offsets,
    const subquad_array* labels, const subquad_array* score, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* counts_a = sum of weights_j and sums_a = sum of weights_j y_j over the rows j of component a.
 *
 * y (n, d); labels (n), int64, in [0, k); weights (n), optional (1); counts (k), float64; sums (k,
 * d), float64. */
SUBQUAD_API size_t subquad_component_sums_workspace(int64_t n, int64_t k, int64_t d,
                                                    int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_component_sums(
    const subquad_array* y, const subquad_array* labels, const subquad_array* weights,
    const subquad_array* counts, const subquad_array* sums, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* scatter_a = sum of weights_j (y_j - means_a)(y_j - means_a)^T over the rows j of component a, or
 * its diagonal, and radii_a = max |y_j - means_a| over those whose weight is not 0 (0 for none).
 *
 * y (n, d); labels (n), int64, in [0, k); weights (n), optional (1); means (k, d), float64; scatter
 * (k, d, d), or (k, d) for the diagonal, float64; radii (k), float64. In the size of the workspace,
 * diagonal != 0 says which. */
SUBQUAD_API size_t subquad_component_scatter_workspace(int64_t n, int64_t k, int64_t d,
                                                       int64_t itemsize, int32_t diagonal,
                                                       int32_t device);
SUBQUAD_API subquad_status subquad_component_scatter(
    const subquad_array* y, const subquad_array* labels, const subquad_array* weights,
    const subquad_array* means, const subquad_array* scatter, const subquad_array* radii,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* What samples of each component say of its Gaussian value. For row i and component a, over its
 * samples j in [offsets_a, offsets_a+1) without excluded_i, with t = x_i . deviations_j + shift_ia,
 * v = variance_ia, q(t) = 1 + t (- v/2 + t^2/2 where quadratic != 0) and r_j = weights_j (e^(t -
 * v/2) - q(t)):
 *   log_factor = log(1 + scale_ia mean r), NaN where that is not positive
 *   log_error = log(scale_ia sd(r) / sqrt(number of samples)), -inf for fewer than two
 *   third = sum of weights_j t^3 / sum of weights_j
 * and 0, -inf, 0 for a component without samples.
 *
 * x (n, d); deviations (s, d), samples less the mean of their component, grouped by component;
 * weights (s); offsets (k + 1), int64, ascending in [0, s]; variance, scale (n, k); shift (n, k),
 * optional (0); excluded (n), int64, optional; log_factor, log_error, third (n, k). `largest` is
 * the number of samples of a component, at most. */
SUBQUAD_API size_t subquad_sample_residuals_workspace(int64_t n, int64_t d, int64_t largest,
                                                      int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_sample_residuals(
    const subquad_array* x, const subquad_array* deviations, const subquad_array* weights,
    const subquad_array* offsets, const subquad_array* variance, const subquad_array* scale,
    const subquad_array* shift, const subquad_array* excluded, int32_t quadratic,
    const subquad_array* log_factor, const subquad_array* log_error, const subquad_array* third,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* ---- scans ----------------------------------------------------------------------------------- */

/* Scans run along dimension `axis`, 0 <= axis < ndim, of arrays of one shape; n is its length and
 * `lanes` the product of the other lengths. "(lanes...)" is that shape without the axis. An entry
 * -inf is the logarithm of zero and counts for nothing; what follows +inf is +inf; NaN reaches what
 * follows it, and nothing before. segments (n), int64, optional: runs of equal numbers are
 * sequences of their own, and nothing crosses a border. With reverse != 0 the scan runs from the
 * last entry to the first, and "before" means after. */

/* out_i = log sum_{j <= i} exp(x_j), or j < i with exclusive != 0; -inf where the sum is empty.
 *
 * x, out of one shape. A state: log_sum (lanes...) counts as one more entry before the first, and
 * with remainder (lanes...), optional, as log_sum + remainder. final_log_sum, final_remainder
 * (lanes...), optional: the logarithm of the sum over all entries of the last run, the state
 * included, rounded to an element, and what rounding took from it (0 where that is not finite).
 * Within 2 ulp of max(|out|, 16). */
SUBQUAD_API size_t subquad_logcumsumexp_workspace(int64_t lanes, int64_t n, int64_t itemsize,
                                                  int32_t device);
SUBQUAD_API subquad_status subquad_logcumsumexp(
    const subquad_array* x, const subquad_array* log_sum, const subquad_array* remainder,
    const subquad_array* segments, int32_t axis, int32_t reverse, int32_t exclusive,
    const subquad_array* out, const subquad_array* final_log_sum,
    const subquad_array* final_remainder, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* Reverse of subquad_logcumsumexp: grad_x_j = sum_i grad_i exp(x_j - out_i) over the i whose sum
 * holds j, with grad_final as the gradient of final_log_sum. 0 where x_j = -inf; NaN where the
 * sums that hold j are not finite, unless their gradients are all 0.
 *
 * grad of x's shape and grad_final (lanes...), each optional (0). Each output optional: grad_x of
 * x's shape, grad_log_sum (lanes...), which is the gradient of log_sum and of remainder alike. */
SUBQUAD_API size_t subquad_logcumsumexp_vjp_workspace(int64_t lanes, int64_t n, int64_t itemsize,
                                                      int32_t device);
SUBQUAD_API subquad_status subquad_logcumsumexp_vjp(
    const subquad_array* x, const subquad_array* log_sum, const subquad_array* remainder,
    const subquad_array* segments, int32_t axis, int32_t reverse, int32_t exclusive,
    const subquad_array* grad, const subquad_array* grad_final, const subquad_array* grad_x,
    const subquad_array* grad_log_sum, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* out_i = log |s_i| and out_sign_i = the sign of s_i (-1, 0 or 1), s_i = sum_{j <= i} sign_j
 * exp(x_j), or j < i with exclusive != 0. out is -inf and out_sign 0 where the sum is empty or
 * cancels.
 *
 * x, sign, out, out_sign of one shape. sign may be any real number and acts as a weight; 0 removes
 * its entry, whatever x holds. The sums are carried in float64. */
SUBQUAD_API size_t subquad_signed_logcumsumexp_workspace(int64_t lanes, int64_t n, int64_t itemsize,
                                                         int32_t device);
SUBQUAD_API subquad_status subquad_signed_logcumsumexp(
    const subquad_array* x, const subquad_array* sign, int32_t axis, int32_t reverse,
    int32_t exclusive, const subquad_array* out, const subquad_array* out_sign,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* Reverse of subquad_signed_logcumsumexp, for a gradient of its out:
 *   grad_x_j = sign_j exp(x_j) sum_i grad_i / s_i
 *   grad_sign_j = exp(x_j) sum_i grad_i / s_i
 * over the i whose sum holds j and where s_i is not 0.
 *
 * All arrays of one shape; each output optional. */
SUBQUAD_API size_t subquad_signed_logcumsumexp_vjp_workspace(int64_t lanes, int64_t n,
                                                             int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_signed_logcumsumexp_vjp(
    const subquad_array* x, const subquad_array* sign, int32_t axis, int32_t reverse,
    int32_t exclusive, const subquad_array* grad, const subquad_array* grad_x,
    const subquad_array* grad_sign, const subquad_array* workspace, const subquad_context* context,
    subquad_error* error);

/* out_t = log h_t, h_t = exp(log_a_t) h_{t-1} + exp(log_b_t), by states that are renormalised as
 * they go, never by a cumulative sum of log_a.
 *
 * log_a, log_b, out of one shape; state (lanes...), optional: log h before the first entry (-inf).
 * log_a_t = -inf makes h_t = exp(log_b_t), whatever came before; so does the first entry of a run,
 * but for the first run where there is a state. */
SUBQUAD_API size_t subquad_log_linear_recurrence_workspace(int64_t lanes, int64_t n,
                                                           int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_log_linear_recurrence(
    const subquad_array* log_a, const subquad_array* log_b, const subquad_array* state,
    const subquad_array* segments, int32_t axis, int32_t reverse, const subquad_array* out,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* Reverse of subquad_log_linear_recurrence. With p_t = exp(log_a_t + out_{t-1} - out_t) and
 * G_t = grad_t + p_{t+1} G_{t+1}:
 *   grad_log_a_t = p_t G_t, grad_log_b_t = exp(log_b_t - out_t) G_t, grad_state = p_1 G_1
 * and 0 where out_t = -inf.
 *
 * grad of the shape of log_a; each output optional, in the shape of its input. */
SUBQUAD_API size_t subquad_log_linear_recurrence_vjp_workspace(int64_t lanes, int64_t n,
                                                               int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_log_linear_recurrence_vjp(
    const subquad_array* log_a, const subquad_array* log_b, const subquad_array* state,
    const subquad_array* segments, int32_t axis, int32_t reverse, const subquad_array* grad,
    const subquad_array* grad_log_a, const subquad_array* grad_log_b,
    const subquad_array* grad_state, const subquad_array* workspace, const subquad_context* context,
    subquad_error* error);

/* ---- attention ------------------------------------------------------------------------------- */

/* Linear attention over log-features. With w_tj = sum_r exp(log_q_tr + log_k_jr),
 *   y_t = sum_j w_tj v_j / sum_j w_tj    and    log_z_t = log sum_j w_tj
 * over all keys j, or with causal != 0 over j <= t. With a decay, which needs causal != 0,
 * w_tj = sum_r exp(log_q_tr + log_k_jr + log_decay_{j+1,r} + ... + log_decay_tr).
 *
 * log_q (B..., n_q, d_k), optional: without it a call computes the final state alone. log_k
 * (B..., n, d_k); v (B..., n, d_v); log_decay (B..., n, d_k), optional (0). Causal calls have
 * n_q = n. key_mask (B..., n), uint8, optional: 0 removes a key. segments (n), int64, optional:
 * runs of equal numbers attend within themselves only (n_q = n). In every function causal != 0 and
 * the sizes say how much workspace is needed.
 *
 * A key that is removed, or whose log_k are all -inf, counts for nothing, whatever its v holds. A
 * row whose sum is empty gives y = 0, or NaN where empty_is_nan != 0, and log_z = -inf; its
 * gradients are 0. log_decay = -inf forgets a feature, whatever it held. NaN and infinities reach
 * the rows that attend them. Valid at any finite log_q and log_k: differences are formed before
 * they are rounded.
 *
 * A state is a sum over keys that came before, of one run (with segments, the first):
 *   key_sums (B..., 5, d_k): the logarithm M of the scale, what rounding took from M; Z = sum_j
 *     exp(log_k_j - M), what rounding took from Z; the sum of log_decay since the state was empty
 *   value_sums (B..., 2, d_k, d_v): S = sum_j exp(log_k_j - M) v_j, and what rounding took from S
 * with log_k_j decayed to the last token. M is -inf, and the sums 0, for a feature that no key has.
 * key_sums and value_sums come together or not at all, and so do final_key_sums and
 * final_value_sums, the state after the last token (of the last run), which holds the state that
 * went in. */

/* y (B..., n_q, d_v) and log_z (B..., n_q), each optional. No array of n d_k d_v is made: the
 * workspace is O(threads) and, for one long sequence, O(n / 64 (d_k + L) d_v) at most. */
SUBQUAD_API size_t subquad_linear_attention_workspace(int64_t batch, int64_t n_q, int64_t n,
                                                      int64_t d_k, int64_t d_v, int64_t itemsize,
                                                      int32_t causal, int32_t device);
SUBQUAD_API subquad_status subquad_linear_attention(
    const subquad_array* log_k, const subquad_array* v, const subquad_array* log_q,
    const subquad_array* log_decay, const subquad_array* key_mask, const subquad_array* segments,
    const subquad_array* key_sums, const subquad_array* value_sums, int32_t causal,
    int32_t empty_is_nan, const subquad_array* y, const subquad_array* log_z,
    const subquad_array* final_key_sums, const subquad_array* final_value_sums,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* Reverse of subquad_linear_attention. grad_y, y (B..., n_q, d_v), together; grad_log_z (B...,
 * n_q); grad_final_key_sums (B..., 5, d_k), of which the parts of Z and of the sum of log_decay are
 * looked at; grad_final_value_sums (B..., 2, d_k, d_v), of which the part of S is: each optional
 * (0). M is a constant.
 *
 * Each output optional, in the shape of its input with the broadcast batch dimensions.
 * grad_key_sums is 0 but for Z and what rounding took from it, which are alike, and the sum of
 * log_decay; both parts of grad_value_sums are alike. */
SUBQUAD_API size_t subquad_linear_attention_vjp_workspace(int64_t batch, int64_t n_q, int64_t n,
                                                          int64_t d_k, int64_t d_v,
                                                          int64_t itemsize, int32_t causal,
                                                          int32_t device);
SUBQUAD_API subquad_status subquad_linear_attention_vjp(
    const subquad_array* log_k, const subquad_array* v, const subquad_array* log_q,
    const subquad_array* log_decay, const subquad_array* key_mask, const subquad_array* segments,
    const subquad_array* key_sums, const subquad_array* value_sums, int32_t causal,
    const subquad_array* y, const subquad_array* grad_y, const subquad_array* grad_log_z,
    const subquad_array* grad_final_key_sums, const subquad_array* grad_final_value_sums,
    const subquad_array* grad_log_k, const subquad_array* grad_v, const subquad_array* grad_log_q,
    const subquad_array* grad_log_decay, const subquad_array* grad_key_sums,
    const subquad_array* grad_value_sums, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* The same for values in logarithms, v = sign_v exp(log_v) of any range: log_y = log |y| and sign_y
 * its sign (-1, 0 or 1). An empty row, and a value whose sum is computed as 0, is -inf with sign 0.
 * Finite logarithms beyond 1.16e7 in size (float64: 7.8e14) count as that size, on CUDA those
 * beyond 1.07e9 as infinite.
 *
 * log_v, sign_v (B..., n, d_v); without sign_v values are positive. log_y, sign_y (B..., n_q, d_v),
 * log_z (B..., n_q), each optional. The state is in logarithms as well: log_numerator (B..., d_k,
 * d_v), sign_numerator of the same shape, optional (1), and log_denominator (B..., d_k), with their
 * final_ counterparts; log_numerator and log_denominator come together. */
SUBQUAD_API size_t subquad_log_linear_attention_workspace(int64_t batch, int64_t n_q, int64_t n,
                                                          int64_t d_k, int64_t d_v,
                                                          int64_t itemsize, int32_t causal,
                                                          int32_t device);
SUBQUAD_API subquad_status subquad_log_linear_attention(
    const subquad_array* log_k, const subquad_array* log_v, const subquad_array* sign_v,
    const subquad_array* log_q, const subquad_array* log_decay, const subquad_array* key_mask,
    const subquad_array* segments, const subquad_array* log_numerator,
    const subquad_array* sign_numerator, const subquad_array* log_denominator, int32_t causal,
    const subquad_array* log_y, const subquad_array* sign_y, const subquad_array* log_z,
    const subquad_array* final_log_numerator, const subquad_array* final_sign_numerator,
    const subquad_array* final_log_denominator, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* Reverse of subquad_log_linear_attention, for gradients of log_y, log_z, final_log_numerator and
 * final_log_denominator, each optional (0). Each output optional, in the shape of its input with
 * the broadcast batch dimensions. Entries whose logarithm is -inf have gradient 0. */
SUBQUAD_API size_t subquad_log_linear_attention_vjp_workspace(int64_t batch, int64_t n_q, int64_t n,
                                                              int64_t d_k, int64_t d_v,
                                                              int64_t itemsize, int32_t causal,
                                                              int32_t device);
SUBQUAD_API subquad_status subquad_log_linear_attention_vjp(
    const subquad_array* log_k, const subquad_array* log_v, const subquad_array* sign_v,
    const subquad_array* log_q, const subquad_array* log_decay, const subquad_array* key_mask,
    const subquad_array* segments, const subquad_array* log_numerator,
    const subquad_array* sign_numerator, const subquad_array* log_denominator, int32_t causal,
    const subquad_array* grad_log_y, const subquad_array* grad_log_z,
    const subquad_array* grad_final_log_numerator, const subquad_array* grad_final_log_denominator,
    const subquad_array* grad_log_k, const subquad_array* grad_log_v,
    const subquad_array* grad_log_q, const subquad_array* grad_log_decay,
    const subquad_array* grad_log_numerator, const subquad_array* grad_log_denominator,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* One more token of the causal form, for a batch of states that are changed in place.
 *
 * log_k, log_q (B..., d_k); v (B..., d_v); log_decay (B..., d_k), optional; y (B..., d_v); log_z
 * (B...), optional. The states are C-contiguous and have the batch dimensions of y: key_sums and
 * value_sums as above, and the tokens that they do not hold yet, R of them at most: recent_keys
 * (B..., R, d_k), exp(log_k_j - M); recent_values (B..., R, d_v); recent_count (B...), int64, how
 * many there are. M and the sum of log_decay follow every token, so that the whole state is the
 * sums S + sum_j recent_keys_j recent_values_j^T and Z + sum_j recent_keys_j in the scale M. They
 * are folded into S and Z when there are R, or when a key would exceed e^30 (float64: e^300) in the
 * scale M; between that, S is only read. */
SUBQUAD_API size_t subquad_attention_step_workspace(int64_t batch, int64_t d_k, int64_t d_v,
                                                    int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_attention_step(
    const subquad_array* log_k, const subquad_array* v, const subquad_array* log_q,
    const subquad_array* log_decay, const subquad_array* key_sums, const subquad_array* value_sums,
    const subquad_array* recent_keys, const subquad_array* recent_values,
    const subquad_array* recent_count, int32_t empty_is_nan, const subquad_array* y,
    const subquad_array* log_z, const subquad_array* workspace, const subquad_context* context,
    subquad_error* error);

/* ---- features -------------------------------------------------------------------------------- */

/* Logarithms of positive random features. With z_i = x_i - shift and the row's term
 *   q_i = z_i . linear - (sum_t diagonal_t z_it^2 + |factor z_i|^2) / 2,
 *   out_im = z_i . projection_m + bias_m + q_i
 *
 * x (B..., n, d); projection (B..., m, d); bias (B..., m); diagonal (B..., d), factor (B..., r, d),
 * shift (B..., d) and linear (B..., d) each optional: 0 where absent; out (B..., n, m). With
 * antithetic != 0 every row of projection serves twice: out is (B..., n, 2 m), and
 *   out_i,m+j = -z_i . projection_j + bias_j + q_i.
 * With exponentiate != 0, out holds exp of these. */
SUBQUAD_API size_t subquad_log_features_workspace(int64_t batch, int64_t n, int64_t m, int64_t d,
                                                  int64_t r, int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_log_features(
    const subquad_array* x, const subquad_array* projection, const subquad_array* bias,
    const subquad_array* diagonal, const subquad_array* factor, const subquad_array* shift,
    const subquad_array* linear, int32_t antithetic, int32_t exponentiate, const subquad_array* out,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* Reverse of subquad_log_features without exponentiate, through x. With g_i the sum of row i of
 * grad, and h_im = grad_im, or grad_im - grad_i,m+j of a pair,
 *   grad_x_i = sum_m h_im projection_m + g_i (linear - diagonal z_i - factor^T factor z_i)
 *
 * grad as out, grad_x (B..., n, d), with the broadcast batch dimensions; the inputs as there. */
SUBQUAD_API size_t subquad_log_features_vjp_workspace(int64_t batch, int64_t n, int64_t m,
                                                      int64_t d, int64_t r, int64_t itemsize,
                                                      int32_t device);
SUBQUAD_API subquad_status subquad_log_features_vjp(
    const subquad_array* grad, const subquad_array* x, const subquad_array* projection,
    const subquad_array* diagonal, const subquad_array* factor, const subquad_array* shift,
    const subquad_array* linear, int32_t antithetic, const subquad_array* grad_x,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* Trigonometric random features. With z_i and q_i as above, t_im = z_i . projection_m and
 * s_im = exp(q_i + bias_m),
 *   out_im = s_im cos t_im, out_i,m+j = s_ij sin t_ij
 *
 * The arrays as there; out (B..., n, 2 m). The workspace is that of subquad_log_features. */
SUBQUAD_API subquad_status subquad_trigonometric_features(
    const subquad_array* x, const subquad_array* projection, const subquad_array* bias,
    const subquad_array* diagonal, const subquad_array* factor, const subquad_array* shift,
    const subquad_array* linear, const subquad_array* out, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* out_i = sum_j (-1)^popcount(i & j) x_j, the Walsh-Hadamard transform in its natural order.
 *
 * x, out (B..., d), of one shape, d a power of two. Applied twice it is d times the identity. */
SUBQUAD_API size_t subquad_hadamard_transform_workspace(int64_t batch, int64_t d, int64_t itemsize,
                                                        int32_t device);
SUBQUAD_API subquad_status subquad_hadamard_transform(const subquad_array* x,
                                                      const subquad_array* out,
                                                      const subquad_array* workspace,
                                                      const subquad_context* context,
                                                      subquad_error* error);

/* ---- factors --------------------------------------------------------------------------------- */

/* Values of `residual`: what is added to a factor's product. */
enum {
  SUBQUAD_RESIDUAL_NONE = 0,
  SUBQUAD_RESIDUAL_STEP = 1, /* what the factor was applied to */
  SUBQUAD_RESIDUAL_INPUT = 2 /* what the first factor was applied to */
};

/* Products of sparse factors. With row (i + o) mod n called o rows after row i,
 *   (W_m v)_i = sum_k values_mik v_j, j the row offsets_mk rows after i
 *   v_0 = x, v_m = W_m v_(m-1) + r_m, out = v_M
 * where r_m is 0, v_(m-1) or v_0, as `residual` says. Terms whose rows coincide add up.
 *
 * values (B..., M, n, K); x, out (B..., n, d). offsets: M K numbers in C order, any integers, in
 * memory of the CPU whatever the device, read before the call returns. segments (n), int64,
 * optional: runs of equal numbers are sequences of their own, each circular in itself. With
 * circular == 0 the sequences have ends, and terms whose row would lie past one are left out.
 *
 * intermediates (B..., max(M - 1, 0), n, d), optional, is an output: v_1 ... v_(M-1).
 * With transpose != 0, out is the transpose of the map from x to v_M, applied to x; there are no
 * intermediates then. Sums are taken in the order of k whatever the number of threads. */
SUBQUAD_API size_t subquad_sparse_factor_product_workspace(int64_t batch, int64_t n_factors,
                                                           int64_t n, int64_t k, int64_t d,
                                                           int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_sparse_factor_product(
    const subquad_array* values, const subquad_array* x, const subquad_array* segments,
    const int64_t* offsets, int32_t residual, int32_t circular, int32_t transpose,
    const subquad_array* out, const subquad_array* intermediates, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* Reverse of subquad_sparse_factor_product without transpose. With g_m the gradient of v_m,
 *   grad_values_mik = g_mi . v_(m-1)j, j the row offsets_mk rows after i
 *   grad_x = W_1^T ... W_M^T grad and what the residuals add.
 * The reverse of the transpose is this one with grad and x exchanged, as to values, and the product
 * without transpose, as to x.
 *
 * grad (B..., n, d); intermediates (B..., max(M - 1, 0), n, d), optional: computed anew where
 * absent, into the workspace, which has room for them with recompute != 0; grad_values
 * (B..., M, n, K) and grad_x (B..., n, d), each optional, with the broadcast batch dimensions. */
SUBQUAD_API size_t subquad_sparse_factor_product_vjp_workspace(int64_t batch, int64_t n_factors,
                                                               int64_t n, int64_t k, int64_t d,
                                                               int64_t itemsize, int32_t recompute,
                                                               int32_t device);
SUBQUAD_API subquad_status subquad_sparse_factor_product_vjp(
    const subquad_array* grad, const subquad_array* values, const subquad_array* x,
    const subquad_array* segments, const subquad_array* intermediates, const int64_t* offsets,
    int32_t residual, int32_t circular, const subquad_array* grad_values,
    const subquad_array* grad_x, const subquad_array* workspace, const subquad_context* context,
    subquad_error* error);

/* The values of sparse factors, of one two-layer network for each:
 *   out_mi = weight_out_m gelu(weight_in_m x_i + bias_in_m) + bias_out_m,
 *   gelu(z) = z (1 + erf(z / sqrt(2))) / 2
 *
 * x (B..., n, d); weight_in (B..., M, h, d), bias_in (B..., M, h); weight_out (B..., M, K, h),
 * bias_out (B..., M, K); out (B..., M, n, K). No array of n h numbers is made. */
SUBQUAD_API size_t subquad_factor_values_workspace(int64_t batch, int64_t n_factors, int64_t n,
                                                   int64_t d, int64_t h, int64_t k,
                                                   int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_factor_values(
    const subquad_array* x, const subquad_array* weight_in, const subquad_array* bias_in,
    const subquad_array* weight_out, const subquad_array* bias_out, const subquad_array* out,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* Reverse of subquad_factor_values; what lies between the layers is computed anew.
 *
 * grad as out. Each gradient is optional. grad_x (B..., n, d) has the broadcast batch dimensions;
 * those of weights and biases have the shapes of their arrays, summed over the batches that share
 * these. */
SUBQUAD_API size_t subquad_factor_values_vjp_workspace(int64_t batch, int64_t n_factors, int64_t n,
                                                       int64_t d, int64_t h, int64_t k,
                                                       int64_t itemsize, int32_t device);
SUBQUAD_API subquad_status subquad_factor_values_vjp(
    const subquad_array* grad, const subquad_array* x, const subquad_array* weight_in,
    const subquad_array* bias_in, const subquad_array* weight_out, const subquad_array* grad_x,
    const subquad_array* grad_weight_in, const subquad_array* grad_bias_in,
    const subquad_array* grad_weight_out, const subquad_array* grad_bias_out,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* Product of a sparse matrix in compressed rows with a dense one: out = scale A x + addend, with
 *   (A x)_i = sum over e from indptr_i to indptr_(i+1) - 1 of data_e x_(indices_e)
 *
 * data (nnz); indices (nnz) and indptr (rows + 1), both int32 or both int64; x (B..., columns, d);
 * addend, optional, and out (B..., rows, d). A row's columns may be in any order and repeat: they
 * add up. On the CPU, indices out of range are SUBQUAD_INVALID_ARGUMENT. */
SUBQUAD_API size_t subquad_csr_product_workspace(int64_t batch, int64_t rows, int64_t columns,
                                                 int64_t nnz, int64_t d, int64_t itemsize,
                                                 int32_t device);
SUBQUAD_API subquad_status subquad_csr_product(
    const subquad_array* data, const subquad_array* indices, const subquad_array* indptr,
    const subquad_array* x, const subquad_array* addend, double scale, const subquad_array* out,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

/* Reverse of subquad_csr_product with scale 1, through data:
 *   grad_data_e = sum over batches of grad_i . x_(indices_e), i the row of e
 *
 * grad (B..., rows, d), x (B..., columns, d), grad_data (nnz). Through x the reverse is the product
 * with the transposed matrix. */
SUBQUAD_API size_t subquad_csr_product_vjp_workspace(int64_t batch, int64_t rows, int64_t columns,
                                                     int64_t nnz, int64_t d, int64_t itemsize,
                                                     int32_t device);
SUBQUAD_API subquad_status subquad_csr_product_vjp(
    const subquad_array* grad, const subquad_array* indices, const subquad_array* indptr,
    const subquad_array* x, const subquad_array* grad_data, const subquad_array* workspace,
    const subquad_context* context, subquad_error* error);

/* ---- embedding ------------------------------------------------------------------------------- */

/* One epoch of EDRep for one side: each row x_i of unit norm turns by arcsin(step) on the sphere,
 * down the gradient of an objective that pulls it towards what it is linked to and pushes it away
 * from all keys, these told by the counts, means and covariances of k components:
 *   pull_i = scale sum_e data_e rows_(indices_e) over row i of a matrix in compressed rows, or
 *            scale rows_i where there is no matrix
 *   log_z_i = log sum_a exp(s_ia),  s_ia = log_counts_a + x_i . means_a + x_i' C_a x_i / 2
 *   g_i = -pull_i + sum_a exp(s_ia - log_z_i) (means_a + C_a x_i)
 *         + shifts_c + slopes_c x_i, c = labels_i  +  null_weights_i null
 *   g_i' = g_i - (g_i . x_i) x_i
 *   out_i = sqrt(1 - step^2) x_i - step g_i' / |g_i'|, scaled to unit norm; x_i where step = 0, and
 *           where g_i' = 0 or is the rounding of a g_i along x_i
 *   attraction_i = x_i . pull_i
 * The three groups of terms are optional, each as a whole.
 *
 * x, out (n, d); data (nnz), indices (nnz) and indptr (n + 1), both int32 or both int64, present
 * together; rows (m, d), or (n, d) without a matrix; log_counts (k), means (k, d), covariances
 * (k, d, d), symmetric, k at least 1; labels int64 (n), in [0, c), shifts (c, d), slopes (c, d, d),
 * symmetric; null_weights (n), null (d); 0 <= step <= 1; attraction, optional, and log_z, optional
 * where there are components, (n). out may be x itself unless x is also rows of a matrix; it is
 * optional, too, with step 0 alone. On the CPU, indices and labels out of range are
 * SUBQUAD_INVALID_ARGUMENT. */
SUBQUAD_API size_t subquad_embedding_step_workspace(int64_t n, int64_t m, int64_t nnz, int64_t d,
                                                    int64_t k, int64_t c, int64_t itemsize,
                                                    int32_t device);
SUBQUAD_API subquad_status subquad_embedding_step(
    const subquad_array* x, const subquad_array* data, const subquad_array* indices,
    const subquad_array* indptr, const subquad_array* rows, double scale,
    const subquad_array* log_counts, const subquad_array* means, const subquad_array* covariances,
    const subquad_array* labels, const subquad_array* shifts, const subquad_array* slopes,
    const subquad_array* null_weights, const subquad_array* null, double step,
    const subquad_array* out, const subquad_array* attraction, const subquad_array* log_z,
    const subquad_array* workspace, const subquad_context* context, subquad_error* error);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SUBQUAD_C_API_H */

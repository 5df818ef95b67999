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
 *     both of the one type; all other arrays of that call are then float32, and so is arithmetic;
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
  SUBQUAD_BFLOAT16 = 5
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

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SUBQUAD_C_API_H */

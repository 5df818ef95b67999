/* Log-normalizers of two rows over three keys, from C. Prints them; 0 where they are right. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <subquad/c_api.h>

enum { kRows = 2, kKeys = 3, kDepth = 2 };

static subquad_array dense(const void* data, int32_t dtype, const int64_t* shape, int32_t ndim) {
  subquad_array array = {(void*)data, shape, NULL, ndim, dtype, SUBQUAD_CPU, 0};
  return array;
}

int main(void) {
  const double x[kRows][kDepth] = {{1.0, 2.0}, {-0.5, 0.25}};
  const double y[kKeys][kDepth] = {{0.5, 1.0}, {1.0, -1.0}, {2.0, 0.0}};
  double out[kRows] = {0.0, 0.0};
  const int64_t x_shape[] = {kRows, kDepth};
  const int64_t y_shape[] = {kKeys, kDepth};
  const int64_t out_shape[] = {kRows};
  const int64_t workspace_shape[] = {(int64_t)subquad_log_normalizer_workspace(
      1, kRows, kKeys, kDepth, sizeof(double), SUBQUAD_CPU)};
  void* bytes = malloc((size_t)workspace_shape[0] + 1);

  const subquad_array x_array = dense(x, SUBQUAD_FLOAT64, x_shape, 2);
  const subquad_array y_array = dense(y, SUBQUAD_FLOAT64, y_shape, 2);
  const subquad_array out_array = dense(out, SUBQUAD_FLOAT64, out_shape, 1);
  const subquad_array workspace = dense(bytes, SUBQUAD_UINT8, workspace_shape, 1);
  const subquad_context context = {1, NULL};
  subquad_error error;
  int failures = 0;

  if (subquad_log_normalizer(&x_array, &y_array, NULL, NULL, &out_array, &workspace, &context,
                             &error) != SUBQUAD_SUCCESS) {
    printf("subquad_log_normalizer: %s\n", error.message);
    ++failures;
  }
  for (int i = 0; i < kRows; ++i) {
    double sum = 0.0;
    for (int j = 0; j < kKeys; ++j) sum += exp(x[i][0] * y[j][0] + x[i][1] * y[j][1]);
    printf("%.17g\n", out[i]);
    if (!(fabs(out[i] - log(sum)) <= 1e-14)) ++failures;
  }

  if (subquad_log_normalizer(&x_array, NULL, NULL, NULL, &out_array, &workspace, NULL, &error) !=
          SUBQUAD_INVALID_ARGUMENT ||
      strncmp(error.message, "y: ", 3) != 0) {
    printf("an absent argument is not reported: %s\n", error.message);
    ++failures;
  }

  subquad_cuda_info cuda;
  if (subquad_cuda_query(&cuda, &error) != SUBQUAD_SUCCESS) {
    printf("subquad_cuda_query: %s\n", error.message);
    ++failures;
  }
  printf("CUDA: %s\n", cuda.problem[0] == '\0' ? cuda.architectures : cuda.problem);
  free(bytes);
  return failures;
}

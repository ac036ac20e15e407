// What memory allows: the norm in one pass, AdamW in another, in place. 32 bytes a parameter.
// Blocks are handed out as threads come free: on a busy machine, none waits long for another.
#include <math.h>

enum { BLOCK = 1 << 15 };

double squares(long n, const float *g) {
  double total = 0;
#pragma omp parallel for schedule(dynamic) reduction(+ : total)
  for (long start = 0; start < n; start += BLOCK) {
    long end = start + BLOCK < n ? start + BLOCK : n;
    float sum = 0;
    for (long i = start; i < end; i++) sum += g[i] * g[i];
    total += sum;
  }
  return total;
}

void adamw(long n, float *restrict p, float *restrict m, float *restrict v,
           const float *restrict g, float scale, float b1, float b2, float step, float epsilon,
           float decay) {
#pragma omp parallel for schedule(dynamic)
  for (long start = 0; start < n; start += BLOCK) {
    long end = start + BLOCK < n ? start + BLOCK : n;
    for (long i = start; i < end; i++) {
      float x = scale * g[i];
      m[i] = b1 * m[i] + (1 - b1) * x;
      v[i] = b2 * v[i] + (1 - b2) * x * x;
      p[i] -= step * m[i] / (sqrtf(v[i]) + epsilon) + decay * p[i];
    }
  }
}

// What memory allows: the norm in one pass, AdamW in another, in place. 32 bytes a parameter.
#include <math.h>

double squares(long n, const float *g) {
  double total = 0;
#pragma omp parallel for reduction(+ : total)
  for (long block = 0; block < n; block += 4096) {
    long end = block + 4096 < n ? block + 4096 : n;
    float sum = 0;
    for (long i = block; i < end; i++) sum += g[i] * g[i];
    total += sum;
  }
  return total;
}

void adamw(long n, float *p, float *m, float *v, const float *g, float scale, float b1, float b2,
           float step, float epsilon, float decay) {
#pragma omp parallel for simd
  for (long i = 0; i < n; i++) {
    float x = scale * g[i];
    m[i] = b1 * m[i] + (1 - b1) * x;
    v[i] = b2 * v[i] + (1 - b2) * x * x;
    p[i] -= step * m[i] / (sqrtf(v[i]) + epsilon) + decay * p[i];
  }
}

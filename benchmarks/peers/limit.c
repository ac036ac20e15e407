// What memory allows: the norm in one pass, AdamW in another, in place. 32 bytes a parameter.
// Blocks are handed out as threads come free: on a busy machine, none waits long for another.
#include <math.h>

enum { BLOCK = 1 << 15 };

double squares(long leaves, const long *sizes, float *const *gs) {
  double total = 0;
#pragma omp parallel reduction(+ : total)
  for (long leaf = 0; leaf < leaves; leaf++) {
    const float *g = gs[leaf];
    long n = sizes[leaf];
#pragma omp for schedule(dynamic) nowait
    for (long start = 0; start < n; start += BLOCK) {
      long end = start + BLOCK < n ? start + BLOCK : n;
      float sum = 0;
      for (long i = start; i < end; i++) sum += g[i] * g[i];
      total += sum;
    }
  }
  return total;
}

static void block(long n, float *restrict p, float *restrict m, float *restrict v,
                  const float *restrict g, const float *k) {
  float scale = k[0], b1 = k[1], b2 = k[2], step = k[3], epsilon = k[4], decay = k[5];
  for (long i = 0; i < n; i++) {
    float x = scale * g[i];
    m[i] = b1 * m[i] + (1 - b1) * x;
    v[i] = b2 * v[i] + (1 - b2) * x * x;
    p[i] -= step * m[i] / (sqrtf(v[i]) + epsilon) + decay * p[i];
  }
}

void adamw(long leaves, const long *sizes, float *const *ps, float *const *ms, float *const *vs,
           float *const *gs, const float *k) {
#pragma omp parallel
  for (long leaf = 0; leaf < leaves; leaf++) {
    float *p = ps[leaf], *m = ms[leaf], *v = vs[leaf], *g = gs[leaf];
    long n = sizes[leaf];
#pragma omp for schedule(dynamic) nowait
    for (long start = 0; start < n; start += BLOCK)
      block(start + BLOCK < n ? BLOCK : n - start, p + start, m + start, v + start, g + start, k);
  }
}

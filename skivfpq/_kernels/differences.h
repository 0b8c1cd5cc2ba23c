/* |x - c|^2 by differences in float64, added in NumPy's order: eight accumulators up to 128 terms,
 * halves beyond. Compiled with -ffp-contract=off it has the bits of np.square(x - c).sum(). */
#ifndef SKIVFPQ_DIFFERENCES_H
#define SKIVFPQ_DIFFERENCES_H

#include <stdint.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef double terms4 __attribute__((vector_size(32), aligned(8)));
typedef float f32x4 __attribute__((vector_size(16), aligned(4)));

/* Four values as float64. GCC's own conversion reads vectors in halves. */
#ifdef __AVX2__
#define FOUR_F32(x) (terms4)_mm256_cvtps_pd(_mm_loadu_ps(x))
#else
#define FOUR_F32(x) __builtin_convertvector(*(const f32x4 *)(x), terms4)
#endif
#define FOUR_F64(x) *(const terms4 *)(x)
#define ONE(x) ((double)(x))

/* NAME: up to 128 terms; NAME_any: more. */
#define SQ_DISTANCE(NAME, REAL, FOUR, ONE)                                                               \
    static inline double NAME(const REAL *x, const double *c, int64_t n) {                           \
        int64_t j = 0;                                                                               \
        double sum = -0.0;                                                                           \
        terms4 low = {-0.0, -0.0, -0.0, -0.0}, high = low; /* the eight accumulators */              \
        for (; j < n - n % 8; j += 8) {                                                              \
            terms4 gap0 = FOUR(x + j) - FOUR_F64(c + j), gap1 = FOUR(x + j + 4) - FOUR_F64(c + j + 4); \
            low += gap0 * gap0, high += gap1 * gap1;                                                 \
        }                                                                                            \
        if (n >= 8) sum = ((low[0] + low[1]) + (low[2] + low[3])) + ((high[0] + high[1]) + (high[2] + high[3])); \
        for (; j < n; j++) sum += (ONE(x[j]) - c[j]) * (ONE(x[j]) - c[j]);                           \
        return sum;                                                                                  \
    }                                                                                                \
    static double NAME##_any(const REAL *x, const double *c, int64_t n) {                            \
        if (n <= 128) return NAME(x, c, n);                                                          \
        int64_t half = n / 2 - (n / 2) % 8;                                                          \
        return NAME##_any(x, c, half) + NAME##_any(x + half, c + half, n - half);                    \
    }
SQ_DISTANCE(sq_distance_f32, float, FOUR_F32, ONE)
SQ_DISTANCE(sq_distance_f64, double, FOUR_F64, ONE)

/* |X[row] - c|^2 for rows of either type. */
static inline double sq_distance(const void *X, int is_f64, int64_t row, const double *c, int64_t d) {
    const float *x32 = (const float *)X + row * d;
    const double *x64 = (const double *)X + row * d;
    if (d > 128) return is_f64 ? sq_distance_f64_any(x64, c, d) : sq_distance_f32_any(x32, c, d);
    return is_f64 ? sq_distance_f64(x64, c, d) : sq_distance_f32(x32, c, d);
}

#endif

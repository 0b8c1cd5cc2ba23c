/* |x - c|^2 by differences in float64, added in NumPy's order: eight accumulators up to 128 terms,
 * halves beyond. Compiled with -ffp-contract=off it has the bits of np.square(x - c).sum(). */
#ifndef SKIVFPQ_DIFFERENCES_H
#define SKIVFPQ_DIFFERENCES_H

#include <stdint.h>

typedef double terms8 __attribute__((vector_size(64), aligned(8)));
typedef float f32x8 __attribute__((vector_size(32), aligned(4)));
typedef double f64x8 __attribute__((vector_size(64), aligned(8)));

/* NAME: up to 128 terms; NAME_any: more. */
#define SQ_DISTANCE(NAME, REAL, REALx8)                                                              \
    static inline double NAME(const REAL *x, const double *c, int64_t n) {                           \
        int64_t j = 8;                                                                               \
        double sum = -0.0;                                                                           \
        if (n < 8) {                                                                                 \
            for (j = 0; j < n; j++) sum += ((double)x[j] - c[j]) * ((double)x[j] - c[j]);            \
            return sum;                                                                              \
        }                                                                                            \
        terms8 gap = __builtin_convertvector(*(const REALx8 *)x, terms8) - *(const terms8 *)c;       \
        terms8 part = gap * gap;                                                                     \
        for (; j < n - n % 8; j += 8) {                                                              \
            gap = __builtin_convertvector(*(const REALx8 *)(x + j), terms8) - *(const terms8 *)(c + j); \
            part += gap * gap;                                                                       \
        }                                                                                            \
        sum = ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7])); \
        for (; j < n; j++) sum += ((double)x[j] - c[j]) * ((double)x[j] - c[j]);                     \
        return sum;                                                                                  \
    }                                                                                                \
    static double NAME##_any(const REAL *x, const double *c, int64_t n) {                            \
        if (n <= 128) return NAME(x, c, n);                                                          \
        int64_t half = n / 2 - (n / 2) % 8;                                                          \
        return NAME##_any(x, c, half) + NAME##_any(x + half, c + half, n - half);                    \
    }
SQ_DISTANCE(sq_distance_f32, float, f32x8)
SQ_DISTANCE(sq_distance_f64, double, f64x8)

/* |X[row] - c|^2 for rows of either type. */
static inline double sq_distance(const void *X, int is_f64, int64_t row, const double *c, int64_t d) {
    if (is_f64) return sq_distance_f64_any((const double *)X + row * d, c, d);
    const float *x = (const float *)X + row * d;
    return d <= 128 ? sq_distance_f32(x, c, d) : sq_distance_f32_any(x, c, d);
}

#endif

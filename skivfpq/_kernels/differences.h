/* |x - c|^2 by differences in float64, added in NumPy's order: eight accumulators up to 128 terms,
 * halves beyond. Compiled with -ffp-contract=off it has the bits of np.square(x - c).sum(). */
#ifndef SKIVFPQ_DIFFERENCES_H
#define SKIVFPQ_DIFFERENCES_H

#include <stdint.h>

#define SQ_DISTANCE(NAME, REAL)                                                                      \
    static double NAME(const REAL *x, const double *c, int64_t n) {                                  \
        if (n > 128) {                                                                               \
            int64_t half = n / 2 - (n / 2) % 8;                                                      \
            return NAME(x, c, half) + NAME(x + half, c + half, n - half);                            \
        }                                                                                            \
        if (n < 8) {                                                                                 \
            double sum = -0.0;                                                                       \
            for (int64_t j = 0; j < n; j++) sum += ((double)x[j] - c[j]) * ((double)x[j] - c[j]);    \
            return sum;                                                                              \
        }                                                                                            \
        double part[8];                                                                              \
        int64_t j = 8;                                                                               \
        for (int i = 0; i < 8; i++) part[i] = ((double)x[i] - c[i]) * ((double)x[i] - c[i]);         \
        for (; j < n - n % 8; j += 8)                                                                \
            for (int i = 0; i < 8; i++)                                                              \
                part[i] += ((double)x[j + i] - c[j + i]) * ((double)x[j + i] - c[j + i]);            \
        double sum = ((part[0] + part[1]) + (part[2] + part[3])) +                                   \
                     ((part[4] + part[5]) + (part[6] + part[7]));                                    \
        for (; j < n; j++) sum += ((double)x[j] - c[j]) * ((double)x[j] - c[j]);                     \
        return sum;                                                                                  \
    }
SQ_DISTANCE(sq_distance_f32, float)
SQ_DISTANCE(sq_distance_f64, double)

/* |X[row] - c|^2 for rows of either type. */
static inline double sq_distance(const void *X, int is_f64, int64_t row, const double *c, int64_t d) {
    return is_f64 ? sq_distance_f64((const double *)X + row * d, c, d)
                  : sq_distance_f32((const float *)X + row * d, c, d);
}

#endif

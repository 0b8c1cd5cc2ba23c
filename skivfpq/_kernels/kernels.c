/* The kernels, compiled once for each instruction set (LEVEL names it).
 *
 * Nearest center, certified: float32 scores decide a row when the gap between its best and its second
 * best center exceeds what rounding can do; the rest gets float64 scores, and what even those cannot
 * separate gets exact differences. So labels are those of the differences, whatever the offset or
 * scale of the data. reference.py has the same functions in NumPy.
 *
 * Compiled with -ffp-contract=off: sums of squared differences then have the same bits on every
 * machine, and the same as NumPy's np.square(x - c).sum(). */
#include "kernels.h"
#include "differences.h"
#include "lanes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The centers as the lane kernels want them: minus their mean, times a power of two that brings the
 * largest coordinate to [1/2, 1), so that no square under- or overflows. Returns that power. */
static double shift_and_scale(const double *centers, int64_t k, int64_t d, /* IN (k, d) */
                              double *origin, double *shifted) {           /* OUT (d,), (k, d) */
    double largest = 0;
    int exponent = 0;
    for (int64_t j = 0; j < d; j++) origin[j] = 0;
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < d; j++) origin[j] += centers[i * d + j] / k;
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < d; j++) {
            shifted[i * d + j] = centers[i * d + j] - origin[j];
            largest = fmax(largest, fabs(shifted[i * d + j]));
        }
    frexp(largest, &exponent);
    double scale = ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
    for (int64_t i = 0; i < k * d; i++) shifted[i] *= scale;
    return scale;
}

/* Exact: all k differences. Only for rows that no score could decide. */
#define NEAREST_CENTERS(NAME, REAL, SQ_DISTANCE)                                                     \
    static int NAME(const REAL *X, int64_t n, int64_t d, const double *centers, int64_t k,           \
                    int32_t *labels, double *sq_distances) {                                         \
        double *origin = malloc(sizeof(double) * d), *shifted = malloc(sizeof(double) * k * d);      \
        int64_t *rows = malloc(sizeof(int64_t) * n);                                                 \
        int64_t left = -1; /* rows[0..left) are still undecided */                                   \
        if (origin && shifted && rows) {                                                             \
            double scale = shift_and_scale(centers, k, d, origin, shifted);                          \
            for (left = 0; left < n; left++) rows[left] = left;                                      \
            left = SCORE(f32)(X, sizeof(REAL) == 8, d, origin, scale, shifted, k, rows, left, labels); \
            left = SCORE(f64)(X, sizeof(REAL) == 8, d, origin, scale, shifted, k, rows, left, labels); \
        }                                                                                            \
        for (int64_t r = 0; r < left; r++) {                                                         \
            double best = INFINITY;                                                                  \
            for (int64_t i = 0; i < k; i++) {                                                        \
                double sq = SQ_DISTANCE(X + rows[r] * d, centers + i * d, d);                        \
                if (sq < best) best = sq, labels[rows[r]] = (int32_t)i;                              \
            }                                                                                        \
        }                                                                                            \
        for (int64_t i = 0; i < n && left >= 0; i++)                                                 \
            sq_distances[i] = SQ_DISTANCE(X + i * d, centers + labels[i] * d, d);                    \
        free(origin), free(shifted), free(rows);                                                     \
        return left < 0 ? -1 : 0;                                                                    \
    }
NEAREST_CENTERS(nearest_centers_f32, float, sq_distance_f32)
NEAREST_CENTERS(nearest_centers_f64, double, sq_distance_f64)

/* Rows of a cluster added in their order: the same bits however clusters are dealt to threads. */
#define CLUSTER_SUMS(NAME, REAL)                                                                     \
    static void NAME(const REAL *X, int64_t d, const double *weights, const int32_t *order,          \
                     const int32_t *bounds, const int64_t *clusters, int64_t n_clusters,             \
                     double *sums, double *counts) {                                                 \
        for (int64_t i = 0; i < n_clusters; i++) {                                                   \
            double *sum = sums + clusters[i] * d, count = 0;                                         \
            for (int64_t j = 0; j < d; j++) sum[j] = 0;                                              \
            for (int64_t r = bounds[clusters[i]]; r < bounds[clusters[i] + 1]; r++) {                \
                const REAL *x = X + (int64_t)order[r] * d;                                           \
                double weight = weights[order[r]];                                                   \
                for (int64_t j = 0; j < d; j++) sum[j] += weight * (double)x[j];                     \
                count += weight;                                                                     \
            }                                                                                        \
            counts[clusters[i]] = count;                                                             \
        }                                                                                            \
    }
CLUSTER_SUMS(cluster_sums_f32, float)
CLUSTER_SUMS(cluster_sums_f64, double)

/* Scrambled bits of a value; zeros of either sign give 0. */
static inline uint64_t mix(double value) {
    uint64_t bits;
    value += 0.0; /* -0.0 becomes 0.0 */
    memcpy(&bits, &value, sizeof bits);
    bits ^= bits >> 33;
    bits *= 0xFF51AFD7ED558CCDu;
    return bits ^ bits >> 29;
}

#define ROW_HASHES(NAME, REAL)                                                                       \
    static void NAME(const REAL *X, int64_t n, int64_t d, const uint64_t *factors, uint64_t *out) {  \
        for (int64_t i = 0; i < n; i++) {                                                            \
            uint64_t sum = 0;                                                                        \
            for (int64_t j = 0; j < d; j++) sum += mix((double)X[i * d + j]) * factors[j];           \
            out[i] = sum;                                                                            \
        }                                                                                            \
    }
ROW_HASHES(row_hashes_f32, float)
ROW_HASHES(row_hashes_f64, double)

/* ADC: one table lookup for each subspace, added in their order. */
#define ADC_SCAN(NAME, CODE)                                                                          \
    static void NAME(const double *tables, int64_t n_subspaces, int64_t n_codewords,                  \
                     const int64_t *queries, int64_t n_queries, const CODE *codes, int64_t n_codes,   \
                     double *out) {                                                                   \
        for (int64_t i = 0; i < n_queries; i++) {                                                     \
            const double *query_tables = tables + queries[i] * n_subspaces * n_codewords;             \
            for (int64_t j = 0; j < n_codes; j++) {                                                   \
                double sum = 0;                                                                       \
                for (int64_t m = 0; m < n_subspaces; m++)                                             \
                    sum += query_tables[m * n_codewords + codes[j * n_subspaces + m]];                \
                out[i * n_codes + j] = sum;                                                           \
            }                                                                                         \
        }                                                                                             \
    }
ADC_SCAN(adc_scan_u8, uint8_t)
ADC_SCAN(adc_scan_u16, uint16_t)

#define TABLE_(level) skivfpq_kernels_##level
#define TABLE(level) TABLE_(level)
const skivfpq_kernels TABLE(LEVEL) = {nearest_centers_f32, nearest_centers_f64, adc_scan_u8, adc_scan_u16,
                                      cluster_sums_f32, cluster_sums_f64, row_hashes_f32, row_hashes_f64, PROJECT,
                                      &SCAN_SHAPE, PACK_ROWS, PACK_COLUMNS, CERTIFIED_NEAREST,
                                      PACK_FINE_ROWS, PACK_FINE_COLUMNS, SET_CLOSEST, CLOSER_CANDIDATES};

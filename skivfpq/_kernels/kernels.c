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

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* What the lane kernels take off rows and centers, the mean of some centers in float32 where that holds it, and the
 * power of two that they multiply by, which brings the largest coordinate of the centers to [1/2, 1), so that no square
 * under- or overflows. Any origin and scale serve. */
#define MEANT 256 /* centers, or up to twice as many */

static inline terms4 larger(terms4 a, terms4 b) {
    typedef int64_t mask4 __attribute__((vector_size(32)));
    mask4 is_a = a > b;
    return (terms4)((is_a & (mask4)a) | (~is_a & (mask4)b));
}

static double origin_and_scale(const double *centers, int64_t k, int64_t d, /* IN (k, d) */
                               double *origin) {                           /* OUT (d,) */
    terms4 most[4] = {{0}};
    double largest = 0;
    int64_t stride = k / MEANT > 1 ? k / MEANT : 1, n_meant = (k + stride - 1) / stride;
    int exponent = 0;
    for (int64_t j = 0; j < d; j++) origin[j] = 0;
    for (int64_t i = 0; i < k; i += stride)
        for (int64_t j = 0; j < d; j++) origin[j] += centers[i * d + j] * (1.0 / n_meant);
    for (int64_t j = 0; j < d; j++)
        if (fabs(origin[j]) < FLT_MAX) origin[j] = (float)origin[j];
    for (int64_t i = 0; i < k; i++) {
        const double *center = centers + i * d;
        int64_t j = 0;
        for (; j + 16 <= d; j += 16)
            for (int v = 0; v < 4; v++) {
                terms4 size = FOUR_F64(center + j + 4 * v) - FOUR_F64(origin + j + 4 * v);
                most[v] = larger(larger(size, -size), most[v]);
            }
        for (; j < d; j++) largest = fmax(largest, fabs(center[j] - origin[j]));
    }
    for (int i = 0; i < 16; i++) largest = fmax(largest, most[i / 4][i % 4]);
    frexp(largest, &exponent);
    return ldexp(1.0, exponent < -1000 ? 1000 : -exponent);
}

/* The nearest center of a row by all k differences. */
static int32_t nearest_exactly(const void *X, int is_f64, int64_t row, int64_t d, const double *centers, int64_t k) {
    double best = INFINITY;
    int32_t label = 0;
    for (int64_t i = 0; i < k; i++) {
        double sq = sq_distance(X, is_f64, row, centers + i * d, d);
        if (sq < best) best = sq, label = (int32_t)i;
    }
    return label;
}

/* Labels of some rows, which may have been packed once: float32 scores, float64 scores for what they leave, then
 * all k differences. */
#define UNDECIDED_ROWS 3072 /* whole tiles */
#define FEW_ROWS 5          /* whose differences take less time than packing the centers */

static int nearest_packed(const void *X, int is_f64, int64_t d, const double *centers, int64_t k, const double *origin,
                          double scale, const float *tiles, const double *lengths, int64_t first, int64_t last,
                          int32_t *labels) {
    int64_t rows[UNDECIDED_ROWS], left = 0; /* rows[0..left) are still undecided */
    for (int64_t i = first; i < last && k == 1; i++) labels[i] = 0;
    for (int64_t start = first; start < last && k > 1 && left >= 0; start += UNDECIDED_ROWS) {
        int64_t n = last - start < UNDECIDED_ROWS ? last - start : UNDECIDED_ROWS;
        for (left = 0; left < n; left++) rows[left] = start + left;
        left = SCORE(f32)(X, is_f64, d, origin, scale, centers, k, tiles, lengths, rows, left, labels);
        left = SCORE(f64)(X, is_f64, d, origin, scale, centers, k, NULL, NULL, rows, left, labels);
        for (int64_t r = 0; r < left; r++) labels[rows[r]] = nearest_exactly(X, is_f64, rows[r], d, centers, k);
    }
    return left < 0 ? -1 : 0;
}

/* Squared distances of all rows to the centers of their labels. */
static void row_sq_distances(const void *X, int is_f64, int64_t n, int64_t d, const double *centers,
                             const int32_t *labels, double *out) {
    for (int64_t i = 0; i < n; i++) out[i] = sq_distance(X, is_f64, i, centers + labels[i] * d, d);
}

/* Labels of rows that are not packed, by centers that are packed here. */
static int pack_and_label(const void *X, int is_f64, int64_t n, int64_t d, const double *centers, int64_t k,
                          int32_t *labels) {
    double *origin = malloc(sizeof(double) * d);
    if (!origin) return -1;
    double scale = origin_and_scale(centers, k, d, origin);
    int status = nearest_packed(X, is_f64, d, centers, k, origin, scale, NULL, NULL, 0, n, labels);
    free(origin);
    return status;
}

static int nearest_centers(const void *X, int is_f64, int64_t n, int64_t d, const double *centers, int64_t k,
                           int32_t *labels, double *sq_distances) {
    int status = 0;
    if (n > FEW_ROWS) status = pack_and_label(X, is_f64, n, d, centers, k, labels);
    else for (int64_t i = 0; i < n; i++) labels[i] = nearest_exactly(X, is_f64, i, d, centers, k);
    if (status == 0 && sq_distances) row_sq_distances(X, is_f64, n, d, centers, labels, sq_distances);
    return status;
}

static int nearest_centers_f32(const float *X, int64_t n, int64_t d, const double *centers, int64_t k, int32_t *labels,
                               double *sq_distances) {
    return nearest_centers(X, 0, n, d, centers, k, labels, sq_distances);
}

static int nearest_centers_f64(const double *X, int64_t n, int64_t d, const double *centers, int64_t k,
                               int32_t *labels, double *sq_distances) {
    return nearest_centers(X, 1, n, d, centers, k, labels, sq_distances);
}

/* Codes of some rows: the nearest codeword in each subspace, whose columns are gathered first. */
#define ENCODED_ROWS 2048

static int encode(const void *X, int is_f64, int64_t n, int64_t d, int64_t n_subspaces, const int64_t *columns,
                  const double *codewords, const int64_t *first_codewords, int code_bytes, void *codes) {
    int64_t widest = 0, size = is_f64 ? sizeof(double) : sizeof(float);
    for (int64_t m = 0; m < n_subspaces; m++)
        widest = columns[m + 1] - columns[m] > widest ? columns[m + 1] - columns[m] : widest;
    char *part = malloc(ENCODED_ROWS * widest * size);
    int32_t *labels = malloc(sizeof(int32_t) * ENCODED_ROWS);
    int status = part && labels ? 0 : -1;
    for (int64_t first = 0; first < n; first += ENCODED_ROWS) {
        int64_t rows = n - first < ENCODED_ROWS ? n - first : ENCODED_ROWS;
        const double *book = codewords;
        for (int64_t m = 0; m < n_subspaces && status == 0; m++) {
            int64_t width = columns[m + 1] - columns[m], k = first_codewords[m + 1] - first_codewords[m];
            for (int64_t i = 0; i < rows; i++)
                memcpy(part + i * width * size, (const char *)X + ((first + i) * d + columns[m]) * size, width * size);
            status = nearest_centers(part, is_f64, rows, width, book, k, labels, NULL);
            for (int64_t i = 0; i < rows && status == 0; i++)
                if (code_bytes == 1) ((uint8_t *)codes)[(first + i) * n_subspaces + m] = (uint8_t)labels[i];
                else ((uint16_t *)codes)[(first + i) * n_subspaces + m] = (uint16_t)labels[i];
            book += k * width;
        }
    }
    free(part), free(labels);
    return status;
}

/* Row numbers sorted by label, and where each label starts (k + 1). */
static void order_by_label(const int32_t *labels, int64_t n, int64_t k, int32_t *order, int32_t *bounds) {
    for (int64_t c = 0; c <= k; c++) bounds[c] = 0;
    for (int64_t i = 0; i < n; i++) bounds[labels[i] + 1]++;
    for (int64_t c = 0; c < k; c++) bounds[c + 1] += bounds[c];
    for (int64_t i = 0; i < n; i++) order[bounds[labels[i]]++] = (int32_t)i;
    for (int64_t c = k; c > 0; c--) bounds[c] = bounds[c - 1];
    bounds[0] = 0;
}

/* Rows of a cluster added in their order: the same bits however clusters are dealt to threads. */
#define CLUSTER_SUMS(NAME, REAL)                                                                     \
    static void NAME(const REAL *X, int64_t d, const double *weights, const int32_t *order,          \
                     const int32_t *bounds, const int64_t *clusters, int64_t n_clusters,             \
                     double *sums, double *counts) {                                                 \
        for (int64_t i = 0; i < n_clusters; i++) {                                                   \
            double *restrict sum = sums + clusters[i] * d, count = 0;                                \
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

static void add_weights(const double *weights, const int32_t *labels, int64_t n, int64_t k, double *counts) {
    for (int64_t c = 0; c < k; c++) counts[c] = 0;
    for (int64_t i = 0; i < n; i++) counts[labels[i]] += weights[i];
}

/* The same sums for all clusters in one walk over the rows, of some columns. */
#define ADD_ROWS(NAME, REAL)                                                                         \
    static void NAME(const REAL *X, int64_t n, int64_t d, const double *weights, const int32_t *labels, \
                     int64_t k, int64_t first_column, int64_t last_column, double *sums, double *counts) { \
        for (int64_t c = 0; c < k; c++)                                                              \
            for (int64_t j = first_column; j < last_column; j++) sums[c * d + j] = 0;                \
        for (int64_t i = 0; i < n; i++) {                                                            \
            double *restrict sum = sums + labels[i] * d, weight = weights[i];                        \
            for (int64_t j = first_column; j < last_column; j++) sum[j] += weight * (double)X[i * d + j]; \
        }                                                                                            \
        if (first_column == 0) add_weights(weights, labels, n, k, counts);                           \
    }
ADD_ROWS(add_rows_f32, float)
ADD_ROWS(add_rows_f64, double)

/* Sums of some clusters without the rows that left and with those that came, in the order of events: event e is
 * about rows[e % n_moved], which leaves if e < n_moved. A cluster is given up, and to be added up anew, for a weighted
 * row beyond the limit: what is left of such a one, once it leaves, may be rounding only. */
#define MOVE_ROWS(NAME, REAL)                                                                        \
    static void NAME(const REAL *X, int64_t d, const double *weights, const int32_t *rows, int64_t n_moved, \
                     const int32_t *events, const int32_t *bounds, const int64_t *clusters, int64_t n_clusters, \
                     double limit, double *sums, uint8_t *given_up) {                                \
        for (int64_t i = 0; i < n_clusters; i++) {                                                   \
            double *restrict sum = sums + clusters[i] * d;                                           \
            given_up[clusters[i]] = 0;                                                               \
            for (int64_t e = bounds[clusters[i]]; e < bounds[clusters[i] + 1]; e++) {                \
                int64_t row = rows[events[e] % n_moved];                                             \
                const REAL *x = X + row * d;                                                         \
                double weight = events[e] < n_moved ? -weights[row] : weights[row];                  \
                REAL largest = 0;                                                                    \
                for (int64_t j = 0; j < d; j++) {                                                    \
                    REAL size = x[j] < 0 ? -x[j] : x[j];                                             \
                    largest = size > largest ? size : largest;                                       \
                    sum[j] += weight * (double)x[j];                                                 \
                }                                                                                    \
                given_up[clusters[i]] |= !(largest * weights[row] <= limit);                         \
            }                                                                                        \
        }                                                                                            \
    }
MOVE_ROWS(move_rows_f32, float)
MOVE_ROWS(move_rows_f64, double)

#define MOVE_FEW(NAME, REAL)                                                                         \
    static int NAME(const REAL *X, int64_t n, int64_t d, const double *weights, const int32_t *labels, \
                    const int32_t *before, double limit, double *sums) {                             \
        for (int64_t row = 0; row < n; row++) {                                                      \
            if (labels[row] == before[row]) continue;                                                \
            double *from = sums + before[row] * d, *to = sums + labels[row] * d;                     \
            REAL largest = 0;                                                                        \
            for (int64_t j = 0; j < d; j++) {                                                        \
                REAL x = X[row * d + j], size = x < 0 ? -x : x;                                      \
                largest = size > largest ? size : largest;                                           \
                from[j] -= weights[row] * (double)x, to[j] += weights[row] * (double)x;              \
            }                                                                                        \
            if (!(largest * weights[row] <= limit)) return 0;                                        \
        }                                                                                            \
        return 1;                                                                                    \
    }
MOVE_FEW(move_few_f32, float)
MOVE_FEW(move_few_f64, double)

/* The sums after labels have changed: by the rows that moved where those are few, else by all. */
#define FOLLOW_LABELS(NAME, REAL, MOVE, ADD)                                                         \
    static int64_t NAME(const REAL *X, int64_t n, int64_t d, const double *weights, const int32_t *labels, \
                        const int32_t *before, int64_t k, int64_t few, double limit, double *sums, double *counts) { \
        int64_t n_moved = 0;                                                                         \
        for (int64_t i = 0; i < n; i++) n_moved += labels[i] != before[i];                           \
        if (n_moved > few || !MOVE(X, n, d, weights, labels, before, limit, sums))                   \
            ADD(X, n, d, weights, labels, k, 0, d, sums, counts);                                    \
        else if (n_moved) add_weights(weights, labels, n, k, counts);                                \
        return n_moved;                                                                              \
    }
FOLLOW_LABELS(follow_labels_f32, float, move_few_f32, add_rows_f32)
FOLLOW_LABELS(follow_labels_f64, double, move_few_f64, add_rows_f64)

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
    static void NAME(const REAL *X, int64_t n, int64_t d, const uint64_t *factors, int single,       \
                     uint64_t *out) {                                                                \
        for (int64_t i = 0; i < n; i++) {                                                            \
            uint64_t sum = 0;                                                                        \
            const REAL *x = X + i * d;                                                               \
            if (single) for (int64_t j = 0; j < d; j++) sum += mix((double)(float)x[j]) * factors[j]; \
            else for (int64_t j = 0; j < d; j++) sum += mix((double)x[j]) * factors[j];              \
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

const skivfpq_kernels LEVELLED(kernels, LEVEL) = {
    nearest_centers_f32, nearest_centers_f64, adc_scan_u8, adc_scan_u16, cluster_sums_f32, cluster_sums_f64,
    row_hashes_f32, row_hashes_f64, MULTIPLY, ORTHONORMALIZE, nearest_packed, TILE(f32), PACK_TILES(f32),
    order_by_label, &SCAN_SHAPE, PACK_ROWS, PACK_COLUMNS, CERTIFIED_NEAREST, PROJECT, EMBED, PACK_FINE, SET_CLOSEST,
    CLOSER_CANDIDATES, add_rows_f32, add_rows_f64, encode, row_sq_distances, SCORE_CANDIDATES, PANEL_CENTERS,
    PACK_PLANE, move_rows_f32, move_rows_f64, follow_labels_f32, follow_labels_f64, SEARCH_LISTS, NEAREST_LISTS,
    QUERY_LEVELS, RANK_ROWS,
};

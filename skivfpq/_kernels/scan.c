/* The certified int8 scan: the nearest center of every row, most centers being excluded by a bound on
 * 8-bit products, the few others evaluated exactly.
 *
 * A row x and a center c are known by points y that are no farther apart than x and c are (planes.py),
 * and those by int8 multiples: y = s q + e with |e| <= E. So, by the triangle inequality, c can only be
 * as near as a distance u when |s_x q - s_c p| <= u + E_x + E_c, that is when
 *
 *     <q, p> - s_c |p|^2 / (2 s_x)  >=  (s_x^2 |q|^2 - (u + E_x + E_c)^2) / (2 s_x s_c).
 *
 * score_block computes the left side for 16 rows and some columns, u is at least the distance to the
 * center that a row had before. What survives is looked at twice more: first by all features as int16,
 * with a scale for each row and center; then by float64 differences, which decide, lowest index on
 * ties. Rows that the planes do not serve are left to the lane kernel. */
#include "scan.h"

#include "differences.h"
#include "fine_points.h"
#include "lanes.h"
#include "score_block.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define SUPERBLOCK 8      /* blocks that share a chunk of panels while it is in the cache */
#define CHUNK_BYTES 16384
#define GUESS_STRIDE 4    /* rows without a label start from the best of every so many panels */
#define AHEAD 2         /* rows whose points are fetched before they are needed */
#define LIST 32         /* survivors that a row can keep before they must be evaluated */
#define ROUNDING 1e-9   /* more than float64 sums of 1e6 squares are off by, relatively */

/* A longer column counts as this long: it may be looked at in vain, and no score overflows 32 bits, those of
 * absent rows least of all. Products are below 127^2 2^14 = 2.7e8, thresholds below 1.1e9. */
#define LONGEST 5e8

const skivfpq_scan_shape SCAN_SHAPE = {COLUMNS, LARGEST_COLUMN, UNITS_MULTIPLE, WRAPS};

/* levels = v / step rounded, what they leave, and their squared length; 8 lanes at a time. Levels beyond
 * 127, or not finite, become 0 and leave the value itself. */
typedef float lanes8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t ints8 __attribute__((vector_size(32), aligned(4)));
#define TO_INTEGER 12582912.0f /* 1.5 * 2^23: adding and subtracting it rounds to an integer */
#define LARGEST_SQUARE (127.0f * 127.0f)

typedef struct {
    float sq_error, largest; /* largest: of the levels */
    int32_t sq_norm, sum;
} quantized;

static quantized quantize(const float *v, int64_t n, float step, int8_t *levels) {
    quantized result = {0, 0, 0, 0};
    lanes8 sq_error = {0}, largest = {0};
    ints8 sq_norm = {0}, sum = {0};
    float inverse = step > 0 ? 1 / step : 0;
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        lanes8 value = *(const lanes8 *)(v + j), level = value * inverse + TO_INTEGER - TO_INTEGER;
        lanes8 size = level * level, kept = (lanes8)((size <= LARGEST_SQUARE) & (ints8)level);
        lanes8 rest = value - kept * step;
        ints8 q = __builtin_convertvector(kept, ints8), larger = size > largest;
        sq_error += rest * rest;
        largest = (lanes8)((larger & (ints8)size) | (~larger & (ints8)largest));
        sq_norm += q * q, sum += q;
        for (int l = 0; l < 8; l++) levels[j + l] = (int8_t)q[l];
    }
    for (int l = 0; l < 8; l++) {
        result.sq_error += sq_error[l], result.sq_norm += sq_norm[l], result.sum += sum[l];
        result.largest = fmaxf(result.largest, sqrtf(largest[l]));
    }
    for (; j < n; j++) {
        float level = v[j] * inverse + TO_INTEGER - TO_INTEGER, kept = level * level <= LARGEST_SQUARE ? level : 0;
        float rest = v[j] - kept * step;
        int32_t q = (int32_t)kept;
        result.sq_error += rest * rest, result.sq_norm += q * q, result.sum += q;
        result.largest = fmaxf(result.largest, fabsf(level));
        levels[j] = (int8_t)q;
    }
    return result;
}

/* |v - step levels|, at most: float sums of n <= 2^14 squares and the step's own rounding are right to
 * 1e-4 and 1e-6, and squares below 1e-36 may be lost. */
static double rounding_error(quantized q, int64_t n, float step) {
    return sqrt((double)q.sq_error) * 1.0001 + 1e-6 * (double)step * sqrt((double)q.sq_norm) + 1e-18 * sqrt((double)n);
}

void PACK_ROWS(const float *Y, int64_t n, int64_t width, double scale, const float *bounds, int64_t units,
               int64_t lanes, uint8_t *codes, int32_t *sq_norms, float *errors) {
    int8_t levels[width + 4]; /* the last unit is padded */
    for (int64_t i = 0; i < n; i++) {
        uint8_t *code = codes + i / lanes * units * lanes * 4 + i % lanes * 4;
        quantized q = quantize(Y + i * width, width, (float)scale, levels);
        int fits = q.largest <= 127;
        for (int l = 0; l < 4; l++) levels[width + l] = 0;
        for (int64_t u = 0; u < units; u++)
            for (int l = 0; l < 4; l++)
                code[u * lanes * 4 + l] = (uint8_t)((fits && 4 * u + l < width ? levels[4 * u + l] : 0) + 128);
        sq_norms[i] = fits ? q.sq_norm : 0;
        errors[i] = fits ? (float)(rounding_error(q, width, (float)scale) * (1 + 1e-6)) + bounds[i] : INFINITY;
    }
}

double PACK_COLUMNS(const float *Y, int64_t k, int64_t width, double scale, const float *bounds, double row_scale,
                    int64_t units, int8_t *panels, int32_t *starts) {
    int8_t levels[width];
    double error = 0;
    for (int64_t i = 0; i < k; i++) {
        int8_t *panel = panels + i / COLUMNS * units * COLUMNS * 4;
        quantized q = quantize(Y + i * width, width, (float)scale, levels);
        for (int64_t j = 0; j < width; j++) panel[PANEL_OFFSET(i % COLUMNS, j)] = levels[j];
        double half = floor(scale * q.sq_norm / (2 * row_scale)); /* h_c of score_block.h */
        if (!WRAPS) half = fmin(half, LONGEST);
        starts[i] = (int32_t)(-128 * q.sum - (int64_t)half);
        error = fmax(error, rounding_error(q, width, (float)scale) + bounds[i]);
    }
    return error;
}

/* Fine points: int16 with a scale for each row, so short that the product of two of them fits 32 bits. */
typedef int16_t shorts8 __attribute__((vector_size(16), aligned(2)));
#define FINE_LENGTH 46000.0f /* and what float sums and rounding of 2^14 levels add: its square is below 2^31 */
#define FINE_LARGEST 32767.0f
#define FINE_LEAST 1e-15f /* rows of less, whose squares could be lost, are zeros; so are those of squares too large */

void PACK_FINE(const void *X, int is_f64, int64_t n, int64_t d, const float *origin, int16_t *codes, float *scales,
               float *errors, int32_t *sq_norms) {
    float v[d + 8];
    for (int l = 0; l < 8; l++) v[d + l] = 0;
    for (int64_t i = 0; i < n; i++) {
        const float *x32 = (const float *)X + i * d;
        const double *x64 = (const double *)X + i * d;
        for (int64_t j = 0; j < d; j++) v[j] = is_f64 ? (float)(x64[j] - (double)origin[j]) : x32[j] - origin[j];
        lanes8 squares = {0}, sq_error = {0}, size, sizes = {0};
        float largest = 0, square = 0;
        for (int64_t j = 0; j < d; j += 8) {
            lanes8 value = *(lanes8 *)(v + j);
            size = (lanes8)((ints8)value & INT32_MAX), squares += value * value;
            ints8 larger = size > sizes;
            sizes = (lanes8)((larger & (ints8)size) | (~larger & (ints8)sizes));
        }
        for (int l = 0; l < 8; l++) square += squares[l], largest = fmaxf(largest, sizes[l]);
        float scale = 0;
        if (largest >= FINE_LEAST && square < INFINITY)
            scale = fmaxf(sqrtf(square) / FINE_LENGTH, largest / (FINE_LARGEST - 1));
        float inverse = scale > 0 ? 1 / scale : 0;
        ints8 sq_norm = {0};
        quantized q = {0, 0, 0, 0};
        for (int64_t j = 0; j < d; j += 8) {
            lanes8 value = *(lanes8 *)(v + j), level = value * inverse + TO_INTEGER - TO_INTEGER;
            size = level * level;
            level = (lanes8)((size <= FINE_LARGEST * FINE_LARGEST) & (ints8)level);
            lanes8 rest = value - level * scale;
            ints8 whole = __builtin_convertvector(level, ints8);
            sq_error += rest * rest, sq_norm += whole * whole;
            if (j + 8 <= d) *(shorts8 *)(codes + i * d + j) = __builtin_convertvector(whole, shorts8);
            else for (int l = 0; j + l < d; l++) codes[i * d + j + l] = (int16_t)whole[l];
        }
        for (int l = 0; l < 8; l++) q.sq_error += sq_error[l], q.sq_norm += sq_norm[l];
        scales[i] = scale, sq_norms[i] = q.sq_norm;
        errors[i] = (float)(rounding_error(q, d, scale) * (1 + 1e-6));
    }
}

/* Products of fine points with axes: some rows by some vectors of axes at a time, in registers. */
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define PROJECTED_ROWS 8
#define AXIS_VECTORS 3
#define AXES 16 /* of a vector */
typedef __m512i axes_vector;
/* asm: GCC copies the sums around the intrinsic. */
#define ADD_PAIR(sums, axes, pair) asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(axes), "m"(pair))
#elif defined(__AVX2__)
#define PROJECTED_ROWS 4
#define AXIS_VECTORS 2
#define AXES 8
typedef __m256i axes_vector;
#define ADD_PAIR(sums, axes, pair) sums = _mm256_add_epi32(sums, _mm256_madd_epi16(axes, _mm256_set1_epi32(pair)))
#else
#define PROJECTED_ROWS 4
#define AXIS_VECTORS 2
#define AXES 4
typedef int32_t axes_vector __attribute__((vector_size(16), aligned(4), may_alias));
#define ADD_PAIR(sums, axes, pair)                                                                   \
    sums += (axes << 16 >> 16) * (int32_t)(int16_t)(pair) + (axes >> 16) * (int32_t)((pair) >> 16)
#endif
typedef axes_vector loose_axes __attribute__((aligned(4), may_alias));

/* pairs IN (rows, n_pairs), axes IN (n_pairs, n_axes); out OUT: the first vectors * AXES columns of (rows, n_axes). */
static inline __attribute__((always_inline)) void project_axes(const int32_t *pairs, int64_t n_pairs,
                                                               const int32_t *axes, int64_t n_axes, const int rows,
                                                               const int vectors, int32_t *out) {
    axes_vector sums[PROJECTED_ROWS][AXIS_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = (axes_vector){0};
    for (int64_t j = 0; j < n_pairs; j++)
        for (int v = 0; v < vectors; v++) {
            axes_vector axis = *(const loose_axes *)(axes + j * n_axes + v * AXES);
            for (int r = 0; r < rows; r++) ADD_PAIR(sums[r][v], axis, pairs[r * n_pairs + j]);
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) *(loose_axes *)(out + r * n_axes + v * AXES) = sums[r][v];
}

/* out (PROJECTED_ROWS, n_axes) of up to so many rows; pairs: scratch (PROJECTED_ROWS, n_pairs). */
static void project_rows(const int16_t *codes, int64_t n_rows, int64_t d, const int16_t *axes, int64_t n_axes,
                         int32_t *pairs, int32_t *out) {
    int64_t n_pairs = (d + 1) / 2, h = 0;
    for (int64_t r = 0; r < PROJECTED_ROWS; r++) {
        pairs[(r + 1) * n_pairs - 1] = 0; /* where d is odd */
        memcpy(pairs + r * n_pairs, codes + (r < n_rows ? r : 0) * d, d * sizeof(int16_t));
    }
    const int32_t *axes_pairs = (const int32_t *)axes;
    for (; n_rows == 1 && h + AXIS_VECTORS * AXES <= n_axes; h += AXIS_VECTORS * AXES)
        project_axes(pairs, n_pairs, axes_pairs + h, n_axes, 1, AXIS_VECTORS, out + h);
    for (; h + AXIS_VECTORS * AXES <= n_axes; h += AXIS_VECTORS * AXES)
        project_axes(pairs, n_pairs, axes_pairs + h, n_axes, PROJECTED_ROWS, AXIS_VECTORS, out + h);
    for (; h < n_axes; h += AXES) project_axes(pairs, n_pairs, axes_pairs + h, n_axes, PROJECTED_ROWS, 1, out + h);
}

int PROJECT(const int16_t *codes, int64_t n, int64_t d, const int16_t *axes, int64_t n_axes, int32_t *out) {
    int32_t *pairs = malloc(sizeof(int32_t) * PROJECTED_ROWS * ((d + 1) / 2 + n_axes));
    if (!pairs) return -1;
    int32_t *products = pairs + PROJECTED_ROWS * ((d + 1) / 2);
    for (int64_t i = 0; i < n; i += PROJECTED_ROWS) {
        int64_t n_rows = n - i < PROJECTED_ROWS ? n - i : PROJECTED_ROWS;
        project_rows(codes + i * d, n_rows, d, axes, n_axes, pairs, products);
        memcpy(out + i * n_axes, products, sizeof(int32_t) * n_rows * n_axes);
    }
    free(pairs);
    return 0;
}

/* The point of a row from its products with the axes, its fine point's scale and length, and how far that may be from
 * the row; bound: of what float32 does besides. Rows without a fine point have none. */
static void set_point(const skivfpq_embedding *e, const int32_t *products, double scale, double length, float error,
                      float *y, float *bound) {
    const double unit = (e->n_axes + 8) * (double)(FLT_EPSILON / 2);
    float step = (float)(scale * e->axes_scale);
    lanes8 squares = {0};
    double sq_head = 0;
    int64_t h = 0;
    for (; h + 8 <= e->n_axes; h += 8) {
        lanes8 products8 = __builtin_convertvector(*(const ints8 *)(products + h), lanes8) * step;
        *(lanes8 *)(y + h) = products8, squares += products8 * products8;
    }
    for (; h < e->n_axes; h++) y[h] = (float)products[h] * step, sq_head += y[h] * y[h];
    for (int l = 0; l < 8; l++) sq_head += squares[l];
    double sq_tail = length * length - sq_head, tail = sq_tail > 0 ? sqrt(sq_tail) : 0;
    double square = 4 * unit, share = length > 0 ? tail / length : 0;
    *bound = (float)(error + length * (unit + square / fmax(share, sqrt(square))));
    for (; h < e->width; h++) y[h] = (float)((tail - e->tail_origin) / sqrt((double)(e->width - e->n_axes)));
    for (h = 0; h < e->width && !(*bound < INFINITY); h++) y[h] = INFINITY;
}

int EMBED_FINE(const skivfpq_fine_points *fine, int64_t n, int64_t d, const skivfpq_embedding *e, float *Y,
               float *bounds) {
    int64_t padded = (e->width + 15) / 16 * 16;
    int32_t *pairs = malloc(sizeof(int32_t) * PROJECTED_ROWS * ((d + 1) / 2 + padded));
    if (!pairs) return -1;
    int32_t *products = pairs + PROJECTED_ROWS * ((d + 1) / 2);
    for (int64_t i = 0; i < n; i += PROJECTED_ROWS) {
        int64_t n_rows = n - i < PROJECTED_ROWS ? n - i : PROJECTED_ROWS;
        project_rows(fine->codes + i * d, n_rows, d, e->axes, padded, pairs, products);
        for (int64_t r = 0; r < n_rows; r++)
            set_point(e, products + r * padded, fine->scales[i + r],
                      fine->scales[i + r] * sqrt((double)fine->sq_norms[i + r]), fine->errors[i + r],
                      Y + (i + r) * e->width, bounds + i + r);
    }
    free(pairs);
    return 0;
}

/* The rows less the origin. */
static void shift_rows(const void *X, int is_f64, int64_t n, int64_t d, const float *origin, float *Y, float *bounds) {
    for (int64_t i = 0; i < n; i++) {
        const float *x32 = (const float *)X + i * d;
        const double *x64 = (const double *)X + i * d;
        float *y = Y + i * d;
        lanes8 squares = {0};
        double square = 0;
        int64_t j = 0;
        for (int64_t l = 0; l < d; l++) y[l] = is_f64 ? (float)(x64[l] - (double)origin[l]) : x32[l] - origin[l];
        for (; j + 8 <= d; j += 8) squares += *(lanes8 *)(y + j) * *(lanes8 *)(y + j);
        for (; j < d; j++) square += y[j] * y[j];
        for (int l = 0; l < 8; l++) square += squares[l];
        bounds[i] = (float)(sqrt(square) * 4 * (FLT_EPSILON / 2));
    }
}

#define PACKED_ROWS 64 /* that stay in the first cache between the steps */

int EMBED(const void *X, int is_f64, int64_t n, int64_t d, const skivfpq_embedding *e, float *Y, float *bounds) {
    if (!e->axes) {
        shift_rows(X, is_f64, n, d, e->origin, Y, bounds);
        return 0;
    }
    float scales[PACKED_ROWS], errors[PACKED_ROWS];
    int32_t sq_norms[PACKED_ROWS];
    int16_t *codes = malloc(sizeof(int16_t) * PACKED_ROWS * d);
    skivfpq_fine_points fine = {codes, scales, errors, sq_norms};
    int status = codes ? 0 : -1;
    for (int64_t i = 0; i < n && status == 0; i += PACKED_ROWS) {
        int64_t n_rows = n - i < PACKED_ROWS ? n - i : PACKED_ROWS;
        const char *rows = (const char *)X + i * d * (is_f64 ? sizeof(double) : sizeof(float));
        PACK_FINE(rows, is_f64, n_rows, d, e->origin, codes, scales, errors, sq_norms);
        status = EMBED_FINE(&fine, n_rows, d, e, Y + i * e->width, bounds + i);
    }
    free(codes);
    return status;
}

int PACK_PLANE(const void *X, int is_f64, int64_t d, int64_t first, int64_t last, const skivfpq_embedding *e,
               double scale, int64_t units, int64_t lanes, uint8_t *codes, int32_t *sq_norms, float *errors,
               int with_fine, int16_t *fine_codes, float *fine_scales, float *fine_errors, int32_t *fine_sq_norms) {
    float *Y = malloc(sizeof(float) * PACKED_ROWS * e->width), bounds[PACKED_ROWS];
    int status = Y ? 0 : -1;
    for (int64_t i = first; i < last && status == 0; i += PACKED_ROWS) {
        int64_t n = last - i < PACKED_ROWS ? last - i : PACKED_ROWS;
        const char *rows = (const char *)X + i * d * (is_f64 ? sizeof(double) : sizeof(float));
        skivfpq_fine_points fine = {fine_codes + i * d, fine_scales + i, fine_errors + i, fine_sq_norms + i};
        if (with_fine)
            PACK_FINE(rows, is_f64, n, d, e->origin, fine_codes + i * d, fine_scales + i, fine_errors + i,
                      fine_sq_norms + i);
        if (e->axes) status = EMBED_FINE(&fine, n, d, e, Y, bounds);
        else shift_rows(rows, is_f64, n, d, e->origin, Y, bounds);
        if (status) break;
        PACK_ROWS(Y, n, e->width, scale, bounds, units, lanes, codes + i * units * 4, sq_norms + i, errors + i);
    }
    free(Y);
    return status;
}

typedef struct {
    int32_t column, score; /* score: out + threshold, of the time when it was found */
} survivor;

/* What is known of the 16 rows of a block. */
typedef struct {
    int64_t rows[BLOCK];     /* -1: none */
    double upper[BLOCK];     /* the center of the label so far is no farther than this */
    double low[BLOCK];       /* and no nearer than this */
    double exact[BLOCK];     /* its squared distance; -1 until it is needed */
    double second[BLOCK];    /* no other center that was evaluated is nearer than this */
    double sought[BLOCK];    /* centers farther than this do not matter */
    int32_t labels[BLOCK], n_survivors[BLOCK];
    int32_t thresholds[BLOCK], caps[BLOCK];
    survivor survivors[BLOCK][LIST];
    uint8_t *codes;          /* (units, 16, 4) */
} block_state;

/* Threshold and cap of a row for centers within a distance of it; 0 where they do not fit. */
static int set_threshold(const skivfpq_scan *s, int64_t row, double distance, int32_t *threshold, int32_t *cap) {
    double unit = 2 * s->row_scale * s->column_scale;
    double radius = distance * (1 + ROUNDING) + s->errors[row] + s->column_error;
    double low = floor((s->row_scale * s->row_scale * s->sq_norms[row] - radius * radius) / unit) - 1;
    double high = ceil(radius * radius / unit) + 3;
    if (!(fabs(low) < 1e9 && high < (WRAPS ? 65535.0 : 1e9))) return 0;
    *threshold = (int32_t)low, *cap = (int32_t)high;
    return 1;
}

/* What the scan of some rows works with. */
typedef struct {
    const skivfpq_scan *s;
    double margin;  /* the second nearest center is sought within the best distance plus this */
    int64_t budget; /* evaluations left before the lane kernel is the faster way */
    block_state blocks[SUPERBLOCK];
} workspace;

/* |x - c|^2 by their fine points, up to slack; the points' own errors add up to error. */
typedef struct {
    double square, slack, error;
} fine_square;

static inline fine_square fine_sq_distance(const skivfpq_scan *s, int64_t row, int64_t label, int32_t dot) {
    const skivfpq_fine_points *x = &s->fine_rows, *c = &s->fine_centers;
    double x_scale = x->scales[row], c_scale = c->scales[label];
    double sq_norms = x_scale * x_scale * x->sq_norms[row] + c_scale * c_scale * c->sq_norms[label];
    return (fine_square){sq_norms - 2 * x_scale * c_scale * dot, 1e-12 * sq_norms,
                         (double)x->errors[row] + c->errors[label]};
}

/* Whether |x - c| is more than a distance, without a root. */
static inline int is_beyond(fine_square fine, double distance) {
    double reach = (distance + fine.error) * (1 + 2 * ROUNDING);
    return fine.square - fine.slack > reach * reach;
}

/* Between what |x - c| lies. */
typedef struct {
    double low, high;
} interval;

static inline interval fine_distance(fine_square fine) {
    double low = fine.square - fine.slack, high = (fine.square > 0 ? fine.square : 0) + fine.slack;
    return (interval){(low > 0 ? sqrt(low) * (1 - ROUNDING) : 0) - fine.error,
                      sqrt(high) * (1 + ROUNDING) + fine.error};
}

static inline interval distance_to(const skivfpq_scan *s, int64_t row, int64_t label) {
    int32_t dot, number = (int32_t)label;
    products(s->fine_rows.codes + row * s->n_features, s->fine_centers.codes, &number, 1, s->n_features, &dot);
    return fine_distance(fine_sq_distance(s, row, label, dot));
}

static inline double exact_sq_distance(const skivfpq_scan *s, int64_t row, int64_t label) {
    return sq_distance(s->X, s->is_f64, row, s->centers + label * s->n_features, s->n_features);
}

/* The same from the squared distance. */
static inline interval exact_distance(double sq_distance) {
    return (interval){sqrt(sq_distance) * (1 - ROUNDING), sqrt(sq_distance) * (1 + ROUNDING)};
}

/* By the fine points or, where those are of no use, exactly. */
static inline interval finite_distance(const skivfpq_scan *s, int64_t row, int64_t label) {
    interval distance = distance_to(s, row, label);
    return distance.high < INFINITY ? distance : exact_distance(exact_sq_distance(s, row, label));
}

static inline void prefetch(const void *memory, int64_t size) {
    for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch((const char *)memory + byte);
}

/* The label of a row, its squared distance or -1, and what that lies between. */
static void set_label(block_state *b, int r, int64_t label, double exact, interval distance) {
    b->labels[r] = (int32_t)label, b->exact[r] = exact, b->low[r] = distance.low;
    b->upper[r] = distance.high < b->upper[r] ? distance.high : b->upper[r];
}

/* Seeks no farther than the second nearest, nor than margin beyond the nearest; where the threshold that follows
 * does not fit, the old one serves. */
static void seek(workspace *w, block_state *b, int r) {
    double sought = fmax(b->upper[r], fmin(b->second[r], b->upper[r] + w->margin));
    if (!(sought < b->sought[r])) return;
    b->sought[r] = sought;
    set_threshold(w->s, b->rows[r], sought, b->thresholds + r, b->caps + r);
}

/* Compares a row with a center of which it knows the product. */
static void compare(workspace *w, block_state *b, int r, int64_t label, int32_t dot) {
    const skivfpq_scan *s = w->s;
    int64_t row = b->rows[r];
    fine_square fine = fine_sq_distance(s, row, label, dot);
    w->budget--;
    if (label == b->labels[r] || is_beyond(fine, b->sought[r])) return;
    interval distance = fine_distance(fine);
    double farther = distance.low; /* of the two centers, at least */
    if (distance.high < b->low[r]) {
        farther = b->low[r];
        set_label(b, r, label, -1, distance);
    } else if (!(distance.low > b->upper[r])) {
        double exact = exact_sq_distance(s, row, label), before = b->exact[r];
        if (before < 0) before = exact_sq_distance(s, row, b->labels[r]);
        w->budget -= 3;
        int nearer = exact < before || (exact == before && label < b->labels[r]);
        farther = exact_distance(nearer ? before : exact).low;
        if (nearer) set_label(b, r, label, exact, exact_distance(exact));
        else set_label(b, r, b->labels[r], before, exact_distance(before));
    }
    b->second[r] = farther < b->second[r] ? farther : b->second[r];
    seek(w, b, r);
}

/* Brings the fine points of a row and of its first survivors nearer. */
static void fetch_points(const skivfpq_scan *s, const block_state *b, int r) {
    int64_t d = s->n_features, size = d * sizeof(int16_t);
    if (b->n_survivors[r] < 2) return; /* its own center is one */
    prefetch(s->fine_rows.codes + b->rows[r] * d, size);
    for (int i = 0; i < b->n_survivors[r] && i < TOGETHER; i++)
        prefetch(s->fine_centers.codes + s->ids[b->survivors[r][i].column] * d, size);
}

/* Evaluates the survivors of a row, some together, among the first the one of the best score; as long as they can
 * matter. */
static void evaluate(workspace *w, block_state *b, int r) {
    const skivfpq_scan *s = w->s;
    survivor *list = b->survivors[r];
    int n = b->n_survivors[r], best = 0;
    for (int i = 1; i < n; i++) best = list[i].score > list[best].score ? i : best;
    if (n) {
        survivor first = list[0];
        list[0] = list[best], list[best] = first;
    }
    for (int i = 0; i < n && w->budget >= 0;) {
        int32_t labels[TOGETHER] = {b->labels[r]}, dots[TOGETHER];
        int n_labels = 0;
        for (; i < n && n_labels < TOGETHER; i++) {
            int32_t label = s->ids[list[i].column];
            if (list[i].score >= b->thresholds[r] && label != b->labels[r]) labels[n_labels++] = label;
        }
        if (n_labels == 0) break;
        const int16_t *point = s->fine_rows.codes + b->rows[r] * s->n_features;
        if (n_labels == 1) products(point, s->fine_centers.codes, labels, 1, s->n_features, dots);
        else {
            for (int c = n_labels; c < TOGETHER; c++) labels[c] = labels[0];
            products(point, s->fine_centers.codes, labels, TOGETHER, s->n_features, dots);
        }
        for (int c = 0; c < n_labels; c++) compare(w, b, r, labels[c], dots[c]);
    }
    b->n_survivors[r] = 0;
}

static void add_survivor(workspace *w, block_state *b, int r, int32_t column, int32_t score) {
    if (b->n_survivors[r] == LIST) evaluate(w, b, r);
    b->survivors[r][b->n_survivors[r]++] = (survivor){column, score};
}

/* How many columns of a panel are in use. */
static inline int columns_of(const skivfpq_scan *s, int64_t panel) {
    return s->n_columns - panel * COLUMNS < COLUMNS ? (int)(s->n_columns - panel * COLUMNS) : COLUMNS;
}

/* Gives the rows of a block that have no label one of some near center: the best score of every so many panels.
 * Thresholds let all scores pass; those that wrap may be taken for better ones. */
static void guess_labels(const skivfpq_scan *s, block_state *b) {
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    int32_t thresholds[BLOCK], caps[BLOCK], best[BLOCK], columns[BLOCK];
    uint16_t hits[HITS];
    for (int r = 0; r < BLOCK; r++) {
        double sq_norm = b->rows[r] < 0 ? 0 : s->sq_norms[b->rows[r]];
        thresholds[r] = WRAPS ? (int32_t)(s->row_scale * sq_norm / (2 * s->column_scale)) - 65000 : -1000000000;
        caps[r] = 65000, best[r] = INT32_MIN, columns[r] = 0;
    }
    for (int64_t p = 0; p * COLUMNS < s->n_columns; p += GUESS_STRIDE) {
        int n_columns = columns_of(s, p);
        if (!score_block(b->codes, s->panels + p * s->units * COLUMNS * 4, s->starts + p * COLUMNS, s->units, n_columns,
                         thresholds, caps, out, hits))
            continue;
        for (int c = 0; c < n_columns; c++)
            for (int r = 0; r < BLOCK; r++)
                if (hits[c] >> r & 1 && out[c][r] > best[r])
                    best[r] = out[c][r], columns[r] = (int32_t)(p * COLUMNS + c);
    }
    for (int r = 0; r < BLOCK; r++)
        if (b->rows[r] >= 0 && b->labels[r] < 0) {
            b->labels[r] = s->ids[columns[r]];
            interval distance = finite_distance(s, b->rows[r], b->labels[r]);
            b->upper[r] = distance.high, b->low[r] = distance.low;
        }
}

/* Takes up to 16 rows into a block. */
static void start_block(workspace *w, block_state *b, const int32_t *rows, int64_t n_rows, const int32_t *labels,
                        const double *upper, const float *lows) {
    const skivfpq_scan *s = w->s;
    const int32_t *codes[BLOCK];
    int unlabelled = 0;
    for (int r = 0; r < BLOCK; r++) {
        codes[r] = (const int32_t *)(s->codes + rows[r < n_rows ? r : 0] * s->units * 4);
        b->n_survivors[r] = 0, b->thresholds[r] = INT32_MAX / 2, b->caps[r] = -1, b->rows[r] = -1;
        if (r >= n_rows) continue;
        b->rows[r] = rows[r], b->labels[r] = labels[rows[r]], b->upper[r] = upper[rows[r]];
        b->exact[r] = -1, b->low[r] = lows[rows[r]], b->second[r] = INFINITY;
        unlabelled |= b->labels[r] < 0;
    }
    interleave(codes, s->units, BLOCK, (int32_t *)b->codes);
    if (unlabelled) guess_labels(s, b);
    for (int r = 0; r < n_rows && r < BLOCK; r++) {
        double u = b->sought[r] = b->upper[r] + w->margin;
        if (!set_threshold(s, b->rows[r], u, b->thresholds + r, b->caps + r)) b->labels[r] = -1; /* not served */
        double length = s->row_scale * sqrt(s->sq_norms[b->rows[r]]) + s->errors[b->rows[r]]; /* of y, at most */
        for (int64_t f = 0; f < s->n_far && b->labels[r] >= 0; f++)
            if (s->far_lengths[f] - length <= u * (1 + ROUNDING))
                add_survivor(w, b, r, (int32_t)(s->n_columns + f), INT32_MAX);
    }
}

/* Scores a block against the panels first..last and notes what survives. */
static void scan_panels(workspace *w, block_state *b, int64_t first, int64_t last) {
    const skivfpq_scan *s = w->s;
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    uint16_t hits[HITS] = {0};
    for (int64_t p = first; p < last; p++) {
        int columns = columns_of(s, p);
        if (!score_block(b->codes, s->panels + p * s->units * COLUMNS * 4, s->starts + p * COLUMNS, s->units,
                         columns, b->thresholds, b->caps, out, hits))
            continue;
        for (int c = 0; c < columns; c += 4)
            for (uint64_t left = hits_of_four(hits + c, columns - c); left; left &= left - 1) {
                int hit = __builtin_ctzll(left), r = hit % BLOCK, column = c + hit / BLOCK;
                add_survivor(w, b, r, (int32_t)(p * COLUMNS + column), out[column][r] + b->thresholds[r]);
            }
    }
}

/* The first panels for some blocks, a chunk of panels at a time; then the survivors. */
static void scan_superblock(workspace *w, int n_blocks, int64_t n_panels) {
    int64_t chunk = CHUNK_BYTES / (w->s->units * COLUMNS * 4) + 1;
    for (int64_t p = 0; p < n_panels; p += chunk)
        for (int i = 0; i < n_blocks && w->budget >= 0; i++)
            scan_panels(w, w->blocks + i, p, p + chunk < n_panels ? p + chunk : n_panels);
    for (int i = 0; i < n_blocks && w->budget >= 0; i++)
        for (int r = 0; r < BLOCK; r++) {
            block_state *b = w->blocks + i;
            if (r + AHEAD < BLOCK) fetch_points(w->s, b, r + AHEAD);
            if (b->rows[r] >= 0 && b->labels[r] >= 0) evaluate(w, b, r);
        }
}

/* All centers but a row's own, within u, were at least lower away: those that have moved less than this are no
 * nearer than u. */
static double free_drift(double u, double lower) { return (lower - u) * (1 - ROUNDING) - ROUNDING * u; }

/* How many panels hold centers that have moved so much or more, by steps of drift: a few more than do. */
#define STEPS 1024

typedef struct {
    double step;
    int32_t panels[STEPS + 1];
} drift_table;

static void fill_table(const skivfpq_scan *s, int64_t n_panels, drift_table *table) {
    table->step = fmax(n_panels ? s->drifts[0] / STEPS * (1 + ROUNDING) : 0, 1e-300);
    for (int64_t i = STEPS, p = 0; i >= 0; i--) {
        while (p < n_panels && !(s->drifts[p * COLUMNS] < table->step * i)) p++;
        table->panels[i] = (int32_t)p;
    }
}

static int64_t panels_beyond(const drift_table *table, double drift) {
    double steps = drift / table->step;
    return table->panels[steps > 0 ? steps < STEPS ? (int)steps : STEPS : 0]; /* 0 if it is no number */
}

/* Sorts rows by the panels that they need, most first; returns how many need any. starts: zeros. Sets upper and
 * lows, between which the centers of the rows are. */
static int64_t sort_rows(const skivfpq_scan *s, int64_t first_row, int64_t last_row, int64_t n_panels,
                         const drift_table *table, const int32_t *labels, double *upper, const double *lower,
                         int64_t *starts, int32_t *needs, int32_t *rows, float *lows) {
    for (int64_t row = first_row; row < last_row; row++) {
        int32_t label = labels[row];
        double u = label < 0 ? INFINITY : upper[row] + s->moved[label];
        int64_t need = s->n_columns && s->drifts[0] < free_drift(u, lower[row]) ? 0 : n_panels;
        lows[row] = 0;
        if (need && label >= 0) {
            interval distance = finite_distance(s, row, label);
            u = distance.high < u ? distance.high : u;
            need = panels_beyond(table, free_drift(u, lower[row]));
            lows[row] = (float)(distance.low * (1 - 1e-7));
        }
        upper[row] = u;
        needs[row - first_row] = (int32_t)(need == 0 && s->n_far ? 1 : need);
        starts[n_panels - needs[row - first_row] + 1]++;
    }
    for (int64_t p = 0; p <= n_panels; p++) starts[p + 1] += starts[p];
    int64_t n_rows = starts[n_panels];
    for (int64_t row = first_row; row < last_row; row++)
        rows[starts[n_panels - needs[row - first_row]]++] = (int32_t)row;
    return n_rows;
}

/* Writes what a block found; returns how many rows it could not serve, added to unserved. */
static int64_t finish_block(workspace *w, block_state *b, double unscanned, int32_t *labels, double *upper,
                            double *lower, int64_t *unserved) {
    int64_t n_unserved = 0;
    for (int r = 0; r < BLOCK; r++) {
        int64_t row = b->rows[r];
        if (row < 0) continue;
        if (w->budget < 0 || b->labels[r] < 0) {
            unserved[n_unserved++] = row, lower[row] = 0;
            continue;
        }
        labels[row] = b->labels[r], upper[row] = b->upper[r];
        lower[row] = fmin(fmin(b->sought[r] * (1 - ROUNDING), b->second[r]), lower[row] - unscanned);
    }
    return n_unserved;
}

int64_t CERTIFIED_NEAREST(const skivfpq_scan *s, int64_t first_row, int64_t last_row, double margin,
                          int32_t *labels, double *upper, double *lower, int64_t *unserved) {
    int64_t n_panels = (s->n_columns + COLUMNS - 1) / COLUMNS, n_unserved = 0;
    int64_t d = s->n_features;
    int64_t allowed = s->n_columns * d / (700 + 4 * d) * SUPERBLOCK * BLOCK; /* half of the lane kernel's time */
    workspace *w = malloc(sizeof(workspace));
    int64_t *starts = calloc(n_panels + 2, sizeof(int64_t));
    int32_t *needs = malloc(sizeof(int32_t) * (last_row - first_row));
    int32_t *rows = malloc(sizeof(int32_t) * (last_row - first_row));
    uint8_t *memory = malloc((SUPERBLOCK + 1) * s->units * 64 + 64);
    float *lows = malloc(sizeof(float) * (last_row - first_row));
    drift_table table;
    fill_table(s, n_panels, &table);
    int failed = !w || !starts || !needs || !rows || !memory || !lows;
    int64_t n_rows = failed ? 0
                            : sort_rows(s, first_row, last_row, n_panels, &table, labels, upper, lower, starts, needs,
                                        rows, lows - first_row);
    if (!failed) {
        w->s = s, w->margin = margin, w->budget = 0;
        uint8_t *aligned = memory + (64 - (uintptr_t)memory % 64);
        for (int i = 0; i < SUPERBLOCK; i++) w->blocks[i].codes = aligned + i * s->units * 64;
        for (int64_t i = n_rows; i < last_row - first_row; i++) lower[rows[i]] -= s->drifts[0];
    }
    begin_scan();
    for (int64_t start = 0; start < n_rows; start += SUPERBLOCK * BLOCK) {
        int64_t left = n_rows - start, need = needs[rows[start] - first_row];
        int n_blocks = left >= SUPERBLOCK * BLOCK ? SUPERBLOCK : (int)((left + BLOCK - 1) / BLOCK);
        w->budget += w->budget < 0 ? 0 : allowed;
        for (int i = 0; i < n_blocks; i++)
            start_block(w, w->blocks + i, rows + start + i * BLOCK, left - i * BLOCK < BLOCK ? left - i * BLOCK : BLOCK,
                        labels, upper, lows - first_row);
        scan_superblock(w, n_blocks, need);
        double unscanned = need < n_panels ? s->drifts[need * COLUMNS] : -INFINITY;
        for (int i = 0; i < n_blocks; i++)
            n_unserved += finish_block(w, w->blocks + i, unscanned, labels, upper, lower, unserved + n_unserved);
    }
    end_scan();
    free(w), free(starts), free(needs), free(rows), free(memory), free(lows);
    return failed ? -1 : n_unserved;
}

void SET_CLOSEST(const skivfpq_scan *s, const int32_t *rows, int64_t n, const double *sq_distances,
                 double *closest, int32_t *thresholds, int32_t *caps, float *limits) {
    for (int64_t i = 0; i < n; i++) {
        int64_t row = rows[i];
        closest[row] = sq_distances[i];
        if (s->lanes.tiles)
            limits[row] = LIMIT(closest[row], s->lanes.lengths[row], s->n_features, s->lanes.scale);
        if (!s->codes) continue;
        if (!(s->errors[row] < INFINITY && set_threshold(s, row, sqrt(closest[row]), thresholds + row, caps + row)))
            thresholds[row] = INT32_MIN / 2, caps[row] = 65535; /* all candidates are looked at */
    }
}

/* Pairs of a row and a candidate that may be closer, evaluated some time after their rows were fetched. */
#define PENDING 64

typedef struct {
    int32_t row, candidate;
} pair;

typedef struct {
    const skivfpq_scan *s;
    const double *closest, *weights;
    int32_t *rows;
    double *sq_distances, *gains;
    int64_t capacity, *n_closer, n_evaluated;
    int n_pending;
    pair pending[PENDING];
} closer_search;

/* Evaluates a candidate for the rows first + i, for each bit i of hits: those that it may be closer to.
 * Without branches: what is not closer is overwritten by the next, and gains zero. */
static inline void evaluate_rows(closer_search *w, int64_t first, uint64_t hits, int64_t c) {
    const skivfpq_scan *s = w->s;
    const double *candidate = s->centers + c * s->n_features;
    int32_t *rows = w->rows + c * w->capacity;
    double *sq_distances = w->sq_distances + c * w->capacity, gain = w->gains[c];
    int64_t n = w->n_closer[c];
    for (; hits; hits &= hits - 1) {
        int64_t row = first + __builtin_ctzll(hits);
        double exact = sq_distance(s->X, s->is_f64, row, candidate, s->n_features), before = w->closest[row];
        rows[n] = (int32_t)row, sq_distances[n] = exact;
        n += exact < before;
        gain += w->weights[row] * (before - (exact < before ? exact : before));
    }
    w->n_closer[c] = n, w->gains[c] = gain;
}

static void evaluate_pending(closer_search *w) {
    const skivfpq_scan *s = w->s;
    int64_t d = s->n_features, size = s->is_f64 ? 8 : 4;
    int n = 0;
    w->n_evaluated += w->n_pending;
    for (int i = 0; i < w->n_pending; i++) {
        pair p = w->pending[i];
        if (distance_to(s, p.row, p.candidate).low > sqrt(w->closest[p.row]) * (1 + ROUNDING)) continue;
        prefetch((const char *)s->X + p.row * d * size, d * size);
        w->pending[n++] = p;
    }
    for (int i = 0; i < n; i++) evaluate_rows(w, w->pending[i].row, 1, w->pending[i].candidate);
    w->n_pending = 0;
}

static inline void add_pending(closer_search *w, int64_t row, int64_t candidate) {
    if (w->closest[row] == 0) return;
    if (w->n_pending == PENDING) evaluate_pending(w);
    prefetch(w->s->fine_rows.codes + row * w->s->n_features, w->s->n_features * sizeof(int16_t));
    w->pending[w->n_pending++] = (pair){(int32_t)row, (int32_t)candidate};
}

/* The candidates for the rows first..last, by the scan. */
static void search_closer(closer_search *w, const int32_t *thresholds, const int32_t *caps, int64_t first,
                          int64_t last) {
    const skivfpq_scan *s = w->s;
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    uint16_t hits[HITS] = {0};
    int64_t n_panels = (s->n_columns + COLUMNS - 1) / COLUMNS;
    for (int64_t i = first; i < last; i += BLOCK)
        for (int64_t p = 0; p < n_panels; p++) {
            int columns = columns_of(s, p);
            if (!score_block(s->codes + i * s->units * 4, s->panels + p * s->units * COLUMNS * 4,
                             s->starts + p * COLUMNS, s->units, columns, thresholds + i, caps + i, out, hits))
                continue;
            for (int c = 0; c < columns; c += 4)
                for (uint64_t left = hits_of_four(hits + c, columns - c); left; left &= left - 1) {
                    int hit = __builtin_ctzll(left);
                    int64_t row = i + hit % BLOCK;
                    if (row < last) add_pending(w, row, p * COLUMNS + c + hit / BLOCK);
                }
        }
    evaluate_pending(w);
}

/* The candidates that are wanted for the rows first..last, of which hits (by tile and candidate) may be closer. */
static void evaluate_hits(closer_search *w, const uint64_t *hits, int64_t width, const uint8_t *wanted, int64_t first,
                          int64_t last) {
    for (int64_t row = first, height = TILE(f32)(); row < last; row += height, hits += width) {
        uint64_t present = ((uint64_t)1 << (last - row < height ? last - row : height)) - 1;
        for (int64_t c = 0; c < w->s->n_columns; c++)
            if (wanted[c] && hits[c] & present) {
                evaluate_rows(w, row, hits[c] & present, c);
                w->n_evaluated += __builtin_popcountll(hits[c] & present);
            }
    }
}

int64_t CLOSER_CANDIDATES(const skivfpq_scan *s, const int32_t *thresholds, const int32_t *caps, const uint64_t *hits,
                          int64_t hits_width, const uint8_t *wanted, const double *closest, const double *weights,
                          int64_t n_rows, int64_t part_rows, int64_t first_part, int64_t last_part, int32_t *rows,
                          double *sq_distances, int64_t *n_closer, double *gains) {
    closer_search w = {.s = s, .closest = closest, .weights = weights, .capacity = n_rows};
    begin_scan();
    for (int64_t part = first_part; part < last_part; part++) {
        int64_t first = part * part_rows, last = first + part_rows < n_rows ? first + part_rows : n_rows;
        w.rows = rows + first, w.sq_distances = sq_distances + first;
        w.gains = gains + part * s->n_columns, w.n_closer = n_closer + part * s->n_columns;
        for (int64_t c = 0; c < s->n_columns; c++) w.n_closer[c] = 0, w.gains[c] = 0;
        if (s->codes) search_closer(&w, thresholds, caps, first, last);
        else evaluate_hits(&w, hits + first / TILE(f32)() * hits_width, hits_width, wanted, first, last);
    }
    end_scan();
    return w.n_evaluated;
}

int SCORE_CANDIDATES(const skivfpq_scan *s, const float *limits, const float *weights, int64_t n_rows,
                     int64_t part_rows, int64_t first_part, int64_t last_part, uint64_t *hits, double *gains) {
    int64_t d = s->n_features, k = s->n_columns, width = PANEL_CENTERS(), height = TILE(f32)();
    int64_t n_panels = (k + width - 1) / width, n_tiles = (n_rows + height - 1) / height;
    float *panels = malloc(sizeof(float) * n_panels * width * (d + 1)), *starts = panels + n_panels * width * d;
    int status = panels ? 0 : -1;
    if (status == 0) PACK_CANDIDATES(s->centers, k, d, s->lanes.origin, s->lanes.scale, panels, starts);
    for (int64_t part = first_part; part < last_part && status == 0; part++) {
        int64_t first = part * part_rows / height, last = first + part_rows / height;
        CLOSER_ROWS(s->lanes.tiles + first * height * d, (last < n_tiles ? last : n_tiles) - first, d,
                    limits + first * height, weights + first * height, panels, starts, k,
                    hits + first * n_panels * width, gains + part * n_panels * width);
    }
    free(panels);
    return status;
}

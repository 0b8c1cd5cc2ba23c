/* Queries against int8 points of rows: what a score says of a key.
 *
 * Rows and queries are known by int8 points, x = o + s a + e with |e| <= E and q = o + t b + f. By the triangle
 * inequality a row can only be as near as a distance u when |s a - t b| <= u + E + |f|, that is when its score
 *
 *     v = <a, b> - floor(s |a|^2 / 2 t)  >=  (t^2 |b|^2 - (u + E + |f|)^2) / (2 s t),
 *
 * and a row of score v is no farther than sqrt(t^2 |b|^2 - 2 s t (v - 1)) + E + |f|. For inner products (q then
 * without o) q.x = q.o + s t <a, b>, up to |s a||f| + |q| E. */
#ifndef SKIVFPQ_QUERIES_H
#define SKIVFPQ_QUERIES_H

#include "keys.h"

#define EXACT_SCORES
#include "score_block.h"

/* Sums of a quantized vector. */
typedef struct {
    double sq_error, sq_length;
    int64_t sum, sq_norm;
} query_sums;

/* How many levels of queries make one of rows; scores of many features must fit 32 bits. */
static int64_t query_levels(int64_t width) {
    int64_t levels = 16384 / width;
    return levels > MOST_LEVELS ? MOST_LEVELS : levels < 1 ? 1 : levels;
}

/* levels (units, 4) of values (4 units, zeros beyond the features), in units of scale; beyond +-127 of rows cut off. In
 * their order or, for panels, in that of UNIT_PLACE. */
static query_sums round_query(const double *values, int64_t units, double scale, int in_order, column_level *levels) {
    typedef int32_t ints4 __attribute__((vector_size(16)));
    typedef int64_t masks4 __attribute__((vector_size(32)));
    const terms4 to_integer = {0x1.8p52, 0x1.8p52, 0x1.8p52, 0x1.8p52}; /* adding and subtracting it rounds */
    const terms4 least = (terms4){0} - 128.0 * (double)query_levels(4 * units), most = -least - 1;
    terms4 sq_errors = {0}, sq_lengths = {0};
    ints4 sums = {0}, sq_norms = {0};
    for (int64_t j = 0; j < 4 * units; j += 4) {
        terms4 value = *(const terms4 *)(values + j), level = value * (1 / scale);
        masks4 above = level > most, below = level < least;
        level = (terms4)((above & (masks4)most) | (below & (masks4)least) | (~(above | below) & (masks4)level));
        level = level + to_integer - to_integer;
        terms4 rest = value - level * scale;
        ints4 whole = __builtin_convertvector(level, ints4);
        sq_errors += rest * rest, sq_lengths += value * value, sums += whole, sq_norms += whole * whole;
        for (int i = 0; i < 4; i++) levels[j + (in_order ? i : UNIT_PLACE(i))] = (column_level)whole[i];
    }
    query_sums all = {0, 0, 0, 0};
    for (int i = 0; i < 4; i++) {
        all.sq_error += sq_errors[i], all.sq_length += sq_lengths[i];
        all.sum += sums[i], all.sq_norm += sq_norms[i];
    }
    return all;
}

/* A point (4 units,) of coordinates (4 units,) of a query, which are off by bound at most, and what its scores mean.
 * Values beyond the scale are cut off: the bound knows. base, reach: the product with the origin, and that of sizes,
 * where the metric is one. */
static void set_point(const skivfpq_lists *l, const skivfpq_points *p, const double *values, double bound, double scale,
                      double base, double reach, column_level *point, query_point *q) {
    int is_product = l->metric == BY_PRODUCT;
    query_sums sums = round_query(values, p->units, scale, p == l->whole, point); /* see row_score */
    double length = sqrt(sums.sq_length) * (1 + ROUNDING) + TINY;
    double error = sqrt(sums.sq_error) * (1 + ROUNDING) + 1e-15 * length + bound + TINY;
    q->metric = l->metric, q->is_linear = is_product, q->sum = (int32_t)sums.sum;
    q->is_exact = l->odd && !p->embedding && l->metric == BY_DISTANCE && sums.sq_error == 0; /* if values are exact */
    if (is_product) {
        q->base = base, q->unit = p->scale * scale;
        q->slack = (p->longest * error + length * p->error) * (1 + ROUNDING);
        q->slack += LARGEST_SUM_ERROR * (reach + length * p->longest);
    } else {
        q->base = scale * scale * sums.sq_norm, q->unit = 2 * p->scale * scale;
        q->slack = (p->error + error) * (1 + ROUNDING);
    }
    double farthest = p->longest + scale * sqrt((double)sums.sq_norm);
    q->reach = (int32_t)fmin(farthest * farthest / q->unit + (is_product ? 4 : 4 - q->base / q->unit), LARGEST_SCORE);
    q->threshold = INT32_MIN;
}

static void set_query(const skivfpq_lists *l, const skivfpq_points *p, const double *query, column_level *point,
                      query_point *q) {
    double values[4 * p->units], scale = p->query_scale, largest = 0, base = 0, reach = 0;
    for (int64_t j = l->d; j < 4 * p->units; j++) values[j] = 0;
    if (l->metric == BY_PRODUCT) {
        for (int64_t j = 0; j < l->d; j++) {
            values[j] = query[j], largest = fmax(largest, fabs(query[j]));
            base += query[j] * p->origin[j], reach += fabs(query[j] * p->origin[j]);
        }
        scale = largest > TINY ? largest / (127 * query_levels(4 * p->units)) : 1; /* tiny ones are all error */
    } else for (int64_t j = 0; j < l->d; j++) values[j] = query[j] - p->origin[j];
    set_point(l, p, values, 0, scale, base, reach, point, q);
    for (int64_t j = 0; j < l->d && q->is_exact; j++) q->is_exact = values[j] + p->origin[j] == query[j];
}

/* The same of y, for points of an embedding; one that is not finite says nothing. */
static void set_head(const skivfpq_lists *l, const skivfpq_points *p, const float *y, float bound, column_level *point,
                     query_point *q) {
    double values[4 * p->units];
    for (int64_t j = 0; j < 4 * p->units; j++) values[j] = j < p->embedding->width && bound < INFINITY ? y[j] : 0;
    set_point(l, p, values, bound, p->query_scale, 0, 0, point, q);
}

/* Points (4 units,) of up to COLUMNS queries, side by side. */
static void fill_panel(const column_level *const *points, int n, int64_t units, column_level *panel) {
    int64_t u = 0;
#if COLUMNS == BLOCK
    const int32_t *codes[BLOCK];
    for (int c = 0; c < BLOCK; c++) codes[c] = (const int32_t *)points[c < n ? c : 0];
    interleave(codes, units, BLOCK, (int32_t *)panel), u = units;
#endif
    for (; u < units; u++)
        for (int c = 0; c < n; c++) memcpy(panel + PANEL_OFFSET(c, 4 * u), points[c] + 4 * u, 4 * sizeof *panel);
}

/* ---- all scores of some rows */

/* Scores of up to COLUMNS queries and the rows of some blocks, OUT (n_blocks * 16,) of each; -ABSENT where there is no
 * row. */
static void score_all(const skivfpq_lists *l, int64_t first_block, int64_t n_blocks, const query_point *const *points,
                      int n, const column_level *panel, int32_t *const *scores) {
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    int32_t starts[COLUMNS], lowest[COLUMNS];
    uint16_t hits[COLUMNS + 3];
    for (int c = 0; c < COLUMNS; c++) starts[c] = INT32_MIN / 2;
    for (int c = 0; c < n; c++) lowest[c] = -points[c]->reach - 1, starts[c] = -128 * points[c]->sum - lowest[c];
    for (int64_t b = 0; b < n_blocks; b++) {
        const int32_t *terms = l->points.terms + (first_block + b) * BLOCK;
        const uint8_t *codes = l->points.codes + (first_block + b) * l->points.units * 64;
        score_block(codes, panel, starts, l->points.units, n, terms, NULL, out, hits);
        for (int r = 0; r < BLOCK; r += LANES) {
            ints absent = *(const ints *)(terms + r) == ABSENT;
            for (int c = 0; c < n; c++) {
                ints score = *(const ints *)(out[c] + r) + lowest[c];
                *(ints *)(scores[c] + b * BLOCK + r) = (absent & -ABSENT) | (~absent & score);
            }
        }
    }
}

/* The score of a row of points that stand row by row; the query's are in their order. */
static inline int32_t row_score(const skivfpq_points *p, int64_t row, const column_level *point, int32_t sum) {
    const uint8_t *codes = p->codes + row * p->units * 4;
    int64_t width = 4 * p->units, j = 0;
    int32_t score = -128 * sum - p->terms[row];
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    __m512i sums = _mm512_setzero_si512();
    for (; j + 64 <= width; j += 64) /* asm: GCC copies the sums around the intrinsic. */
        asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(_mm512_loadu_si512(codes + j)), "m"(*(const __m512i_u *)(point + j)));
    __mmask64 rest = ((uint64_t)1 << (width - j)) - 1;
    if (j < width)
        sums = _mm512_dpbusd_epi32(sums, _mm512_maskz_loadu_epi8(rest, codes + j), _mm512_maskz_loadu_epi8(rest, point + j));
    return score + _mm512_reduce_add_epi32(sums);
#elif defined(__AVX2__) && MOST_LEVELS == 2
    __m256i sums = _mm256_setzero_si256();
    for (; j + 16 <= width; j += 16) {
        __m256i row16 = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i_u *)(codes + j)));
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(row16, *(const __m256i_u *)(point + j)));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E)), four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1));
    score += _mm_cvtsi128_si32(four);
#endif
    for (; j < width; j += 4)
        for (int i = 0; i < 4; i++) score += codes[j + i] * point[j + i];
    return score;
}

#endif

/* Keys of rows, which order neighbours: what is known of a query, the thresholds that follow, and exact keys. */
#ifndef SKIVFPQ_KEYS_H
#define SKIVFPQ_KEYS_H

#include "search.h"

#include "differences.h"

#include <math.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define ROUNDING 1e-9  /* more than float64 sums of 1e6 terms are off by, relatively */
#define TINY 1e-150    /* squares below its own may be lost; what is compared is a distance, or a product of lengths */
#define LARGEST_SCORE 4.1e8 /* of thresholds, and no score is lower: none overflows 32 bits, absent rows never hit */
#define LARGEST_SUM_ERROR 1e-11 /* of sums of 16384 products, relatively to those of their sizes */

/* The next bytes of some memory, at a line of the cache; only counted where there is none yet. */
static inline void *take(char *memory, int64_t *used, int64_t size) {
    char *start = memory ? memory + *used : NULL;
    *used += (size + 63) / 64 * 64;
    return start;
}

/* What is known of a query. */
typedef struct {
    int metric, is_linear;    /* is_linear: minus the key of a row of score v is base + unit v, up to slack */
    double base, unit, slack; /* otherwise the squared distance of the points is, see queries.h */
    int is_exact;             /* whether keys follow from scores: of integers, see key_of_score */
    int32_t sum, reach;       /* of the point; no score is below -reach */
    int32_t threshold;        /* rows of lower scores cannot win */
} query_point;

/* A query as float64. */
static void load_query(const skivfpq_queries *all, int64_t number, int64_t d, double *query) {
    const float *x32 = (const float *)all->values + number * d;
    if (all->is_f64) memcpy(query, (const double *)all->values + number * d, sizeof(double) * d);
    else for (int64_t j = 0; j < d; j++) query[j] = x32[j];
}

/* By the cosine all keys are 1 then. */
static int is_zero(const double *query, int64_t d) {
    for (int64_t j = 0; j < d; j++)
        if (query[j] != 0) return 0;
    return 1;
}

/* Rows of greater keys cannot win: raises the threshold. Returns 0 where that does not fit. */
static int set_threshold(query_point *q, double key) {
    double low;
    if (q->is_linear) low = (-key - q->slack - q->base) / q->unit;
    else {
        double distance = sqrt(q->metric == BY_COSINE ? 2 * key : key) * (1 + ROUNDING) + TINY;
        double radius = distance + q->slack;
        low = (q->base - radius * radius) / q->unit;
    }
    if (!(low < LARGEST_SCORE)) return 0;
    low = fmax(low, -LARGEST_SCORE); /* of a query so far off that every row is to be looked at */
    if ((int32_t)floor(low) - 1 > q->threshold) q->threshold = (int32_t)floor(low) - 1;
    return 1;
}

/* No row of this score has a greater key. */
static inline double highest_key(const query_point *q, int32_t score) {
    if (q->is_linear) return -(q->base + q->unit * score - q->slack);
    double distance = sqrt(fmax(q->base - q->unit * ((double)score - 1), 0)) * (1 + ROUNDING) + q->slack;
    return (q->metric == BY_COSINE ? distance * distance / 2 : distance * distance) * (1 + ROUNDING);
}

/* The key of a row of integers and a query of such, of their score: their squared distance, but for the half of |a|^2 that
 * an odd one loses in the term. All of it is exact in float64, and so is the sum of squared differences. */
static inline double key_of_score(const skivfpq_lists *l, const query_point *q, int32_t score, int64_t position) {
    return q->base - q->unit * score + (l->odd[position / 8] >> position % 8 & 1);
}

/* ---- selection among scores, LANES at a time: GCC takes wider vectors apart, to compare them one by one */

#if defined(__AVX512F__)
#define LANES 16
#define LESSER(a, b) ((ints)_mm512_min_epi32((__m512i)(a), (__m512i)(b)))
#define GREATER(a, b) ((ints)_mm512_max_epi32((__m512i)(a), (__m512i)(b)))
#elif defined(__AVX2__)
#define LANES 8
#define LESSER(a, b) ((ints)_mm256_min_epi32((__m256i)(a), (__m256i)(b)))
#define GREATER(a, b) ((ints)_mm256_max_epi32((__m256i)(a), (__m256i)(b)))
#else
#define LANES 4
#define LESSER(a, b) ((((a) < (b)) & (a)) | (((a) >= (b)) & (b)))
#define GREATER(a, b) ((((a) < (b)) & (b)) | (((a) >= (b)) & (a)))
#endif

typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Which of 16 scores are at least so high, a bit each. */
static inline uint32_t reaching(const int32_t *scores, int32_t least) {
#if defined(__AVX512F__)
    return _mm512_cmpge_epi32_mask(_mm512_loadu_si512(scores), _mm512_set1_epi32(least));
#elif defined(__AVX2__)
    const __m256i_u *halves = (const __m256i_u *)scores;
    __m256i limit = _mm256_set1_epi32(least);
    int low = _mm256_movemask_ps((__m256)_mm256_cmpgt_epi32(limit, halves[0]));
    return (uint32_t)~(low | _mm256_movemask_ps((__m256)_mm256_cmpgt_epi32(limit, halves[1])) << 8) & 0xFFFF;
#else
    uint32_t bits = 0;
    for (int i = 0; i < 16; i++) bits |= (uint32_t)(scores[i] >= least) << i;
    return bits;
#endif
}

/* The places, from first on, that 16 bits say, OUT (16,); returns how many. */
static inline int put_places(uint32_t hits, int32_t first, int32_t *places) {
#if defined(__AVX512F__) /* no branch that cannot be foretold; compressed in a register, since stores of that are slow */
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i own = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
    _mm512_storeu_si512(places, _mm512_maskz_compress_epi32((__mmask16)hits, own));
    return __builtin_popcount(hits);
#else
    int n = 0;
    for (; hits; hits &= hits - 1) places[n++] = first + __builtin_ctz(hits);
    return n;
#endif
}

/* The places of scores from least to below, OUT (n,); returns how many. n: a multiple of 16 */
static inline int64_t places_between(const int32_t *scores, int64_t n, int32_t least, int32_t below, int32_t *places) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += 16) {
        uint32_t hits = reaching(scores + i, least);
        if (hits && below < INT32_MAX) hits &= ~reaching(scores + i, below);
        found += put_places(hits, (int32_t)i, places + found);
    }
    return found;
}

/* n: a multiple of 16 */
static int64_t count_from(const int32_t *scores, int64_t n, int32_t least) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) count += __builtin_popcount(reaching(scores + i, least));
    return count;
}

#define GROUPS 256 /* of places, at most; where they are four times k, the k-th best of their best is close to that of all */

/* A score that k places reach, or up to so many more, the best possible but for those: by bisection. n: as above */
static int32_t kth_score(const int32_t *scores, int64_t n, int64_t k, int64_t more) {
    int64_t n_groups = n >= 4 * GROUPS ? GROUPS : GROUPS / 4; /* places g, n_groups + g, ... are one */
    ints lowest = (ints){0} + INT32_MAX, best[GROUPS / LANES];
    for (int g = 0; g < n_groups / LANES; g++) best[g] = (ints){0} + INT32_MIN;
    for (int64_t i = 0; i < n; i += LANES) {
        ints some = *(const ints *)(scores + i), absent = some == -ABSENT, *own = best + i % n_groups / LANES;
        *own = GREATER(*own, some), lowest = LESSER(lowest, (absent & INT32_MAX) | (~absent & some));
    }
    const int32_t *highest = (const int32_t *)best;
    int32_t low = lowest[0], high = highest[0];
    int64_t count = -1;
    for (int i = 1; i < LANES; i++) low = lowest[i] < low ? lowest[i] : low;
    for (int i = 1; i < n_groups; i++) high = highest[i] > high ? highest[i] : high;
    if (k <= n_groups / 4 && n >= 4 * n_groups) {
        int32_t bound = kth_score(highest, n_groups, k, 0);
        if (count_from(highest, n_groups, bound) >= k) low = bound, count = count_from(scores, n, low); /* not all ABSENT */
    }
    while (low < high && !(count >= k && count <= k + more)) { /* fewer than k reach high + 1 */
        int32_t middle = low + (int32_t)(((int64_t)high - low + 1) / 2);
        count = count_from(scores, n, middle);
        if (count >= k) low = middle;
        else high = middle - 1;
    }
    return low;
}

/* ---- exact keys */

static inline double half_to_double(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7FFF) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f; /* the exponents' biases: 127 - 15; exact, subnormal ones too */
    return half & 0x8000 ? -value : value;
}

#ifdef __F16C__
#define FOUR_F16(x) (terms4)_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i_u *)(x))))
#else
#define FOUR_F16(x) (terms4){half_to_double((x)[0]), half_to_double((x)[1]), half_to_double((x)[2]), half_to_double((x)[3])}
#endif
SQ_DISTANCE(sq_distance_f16, uint16_t, FOUR_F16, half_to_double)

static void load_halves(const uint16_t *halves, int64_t d, double *row) {
    int64_t j = 0;
    for (; j + 4 <= d; j += 4) *(terms4 *)(row + j) = FOUR_F16(halves + j);
    for (; j < d; j++) row[j] = half_to_double(halves[j]);
}

static int64_t list_of(const skivfpq_lists *l, int64_t position) {
    int64_t first = 0, last = l->n_lists - 1;
    while (first < last) { /* the last that starts at or before the position: empty ones come before it */
        int64_t middle = first + (last - first + 1) / 2;
        if (l->offsets[middle] <= position) first = middle;
        else last = middle - 1;
    }
    return first;
}

/* The codes (n_subspaces,) of a row. */
static void load_codes(const skivfpq_coded *c, int64_t place, int64_t stride, uint16_t *codes) {
    const uint8_t *bytes = (const uint8_t *)c->columns + place;
    const uint16_t *words = (const uint16_t *)c->columns + place;
    int64_t n = c->n_subspaces;
    if (c->n_codewords > 256) for (int64_t m = 0; m < n; m++) codes[m] = words[m * stride];
    else if (c->n_codewords > 16) for (int64_t m = 0; m < n; m++) codes[m] = bytes[m * stride];
    else for (int64_t m = 0; m < n; m++) codes[m] = bytes[m / 2 * stride] >> m % 2 * 4 & 15;
}

/* NAME: codewords side by side, as float64. */
#define LOAD_WORDS(NAME, REAL, FOUR)                                                                 \
    static void NAME(const skivfpq_coded *c, const uint16_t *codes, double *row) {                   \
        for (int64_t m = 0; m < c->n_subspaces; m++) {                                               \
            int64_t first = c->features[m], width = c->features[m + 1] - first, j = 0;               \
            const REAL *word = (const REAL *)c->codewords + c->starts[m] + width * codes[m];         \
            for (; j + 4 <= width; j += 4)                                                           \
                *(terms4 *)(row + first + j) = FOUR(word + j);                                       \
            for (; j < width; j++) row[first + j] = word[j];                                         \
        }                                                                                            \
    }
LOAD_WORDS(load_words_f32, float, FOUR_F32)
LOAD_WORDS(load_words_f64, double, FOUR_F64)

/* The codes of the row at a position of a list. */
static void codes_at(const skivfpq_lists *l, int64_t list, int64_t position, uint16_t *codes) {
    int64_t stride = (l->blocks[list + 1] - l->blocks[list]) * 16;
    load_codes(l->coded, l->blocks[list] * 16 * l->coded->n_columns + position - l->offsets[list], stride, codes);
}

/* A row from its codes: its codewords plus its anchor, rounded to the type of the codewords. */
static void decode_row(const skivfpq_lists *l, int64_t position, double *row) {
    const skivfpq_coded *c = l->coded;
    uint16_t codes[c->n_subspaces];
    int64_t list = list_of(l, position);
    const double *anchor = c->anchors ? c->anchors + list * l->d : NULL;
    codes_at(l, list, position, codes);
    if (c->is_f64) load_words_f64(c, codes, row);
    else load_words_f32(c, codes, row);
    if (anchor && c->is_f64) for (int64_t j = 0; j < l->d; j++) row[j] += anchor[j];
    else if (anchor) for (int64_t j = 0; j < l->d; j++) row[j] = (float)(row[j] + anchor[j]);
}

/* A row as float64. */
static void load_row(const skivfpq_lists *l, int64_t position, double *row) {
    int64_t first = position * l->d;
    switch (l->kind) {
    case FLOAT64: memcpy(row, (const double *)l->vectors + first, sizeof(double) * l->d); break;
    case FLOAT32: for (int64_t j = 0; j < l->d; j++) row[j] = ((const float *)l->vectors)[first + j]; break;
    case FLOAT16: load_halves((const uint16_t *)l->vectors + first, l->d, row); break;
    case INT8: for (int64_t j = 0; j < l->d; j++) row[j] = ((const int8_t *)l->vectors)[first + j]; break;
    case CODED: decode_row(l, position, row); break;
    default: for (int64_t j = 0; j < l->d; j++) row[j] = ((const uint8_t *)l->vectors)[first + j];
    }
}

/* The sum of n terms, in NumPy's order (differences.h). */
static double sum_in_order(const double *terms, int64_t n) {
    if (n > 128) {
        int64_t half = n / 2 - (n / 2) % 8;
        return sum_in_order(terms, half) + sum_in_order(terms + half, n - half);
    }
    double sums[8] = {-0.0, -0.0, -0.0, -0.0, -0.0, -0.0, -0.0, -0.0}, sum = -0.0;
    int64_t j = 0;
    for (; j < n - n % 8; j++) sums[j % 8] += terms[j];
    if (n >= 8) sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; j < n; j++) sum += terms[j];
    return sum;
}

static double product_key(const double *query, double *row, int64_t d) {
    for (int64_t j = 0; j < d; j++) row[j] *= query[j];
    return -sum_in_order(row, d);
}

/* Between a unit query and a row brought to length one, as reference.unit_rows does; 1 where either is zeros. */
static double cosine_key(const double *query, double *row, int64_t d) {
    double largest = 0, squares[d];
    int exponent;
    for (int64_t j = 0; j < d; j++) largest = fmax(largest, fabs(row[j]));
    if (largest == 0 || is_zero(query, d)) return 1;
    frexp(largest, &exponent);
    for (int64_t j = 0; j < d; j++) row[j] = ldexp(row[j], -exponent), squares[j] = row[j] * row[j];
    double norm = sqrt(sum_in_order(squares, d));
    for (int64_t j = 0; j < d; j++) row[j] /= norm;
    return sq_distance(row, 1, 0, query, d) / 2;
}

/* row: (d,) scratch */
static double exact_key(const skivfpq_lists *l, const double *query, int64_t position, double *row) {
    if (l->metric == BY_DISTANCE && l->kind <= FLOAT32)
        return sq_distance(l->vectors, l->kind == FLOAT64, position, query, l->d);
    if (l->metric == BY_DISTANCE && l->kind == FLOAT16)
        return sq_distance_f16_any((const uint16_t *)l->vectors + position * l->d, query, l->d);
    load_row(l, position, row);
    if (l->metric == BY_DISTANCE) return sq_distance(row, 1, 0, query, l->d);
    return l->metric == BY_COSINE ? cosine_key(query, row, l->d) : product_key(query, row, l->d);
}

static inline void fetch_row(const skivfpq_lists *l, int64_t position) {
    __builtin_prefetch(l->ids + position);
    if (l->kind == CODED) return; /* its codewords come from all over: fetching them takes as long as reading them */
    static const int sizes[] = {8, 4, 2, 1, 1};
    int64_t size = l->d * sizes[l->kind];
    const char *row = (const char *)l->vectors + position * size;
    for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch(row + byte);
}

#endif

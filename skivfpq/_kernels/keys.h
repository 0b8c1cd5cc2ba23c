/* Keys of rows, which order neighbours: what is known of a query, the thresholds that follow, and exact keys. */
#ifndef SKIVFPQ_KEYS_H
#define SKIVFPQ_KEYS_H

#include "search.h"

#include "differences.h"

#include <math.h>
#include <string.h>

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
static inline int is_zero(const double *query, int64_t d) {
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
    if (!(fabs(low) < LARGEST_SCORE)) return 0;
    if ((int32_t)floor(low) - 1 > q->threshold) q->threshold = (int32_t)floor(low) - 1;
    return 1;
}

/* No row of this score has a greater key. */
static double highest_key(const query_point *q, int32_t score) {
    if (q->is_linear) return -(q->base + q->unit * score - q->slack);
    double distance = sqrt(fmax(q->base - q->unit * ((double)score - 1), 0)) * (1 + ROUNDING) + q->slack;
    return (q->metric == BY_COSINE ? distance * distance / 2 : distance * distance) * (1 + ROUNDING);
}

/* ---- exact keys */

static double half_to_double(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7FFF) << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f; /* the exponents' biases: 127 - 15; exact, subnormal ones too */
    return half & 0x8000 ? -value : value;
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

/* The codes of a row in its column m. */
static inline int64_t code_at(const skivfpq_coded *c, int64_t place, int64_t m) {
    if (c->n_codewords > 256) return ((const uint16_t *)c->columns)[place];
    int code = ((const uint8_t *)c->columns)[place];
    return c->n_codewords > 16 ? code : m % 2 ? code >> 4 : code & 15;
}

/* A row from its codes: its codewords plus its anchor, rounded to the type of the codewords. */
static void decode_row(const skivfpq_lists *l, int64_t position, double *row) {
    const skivfpq_coded *c = l->coded;
    int64_t list = list_of(l, position), stride = (l->blocks[list + 1] - l->blocks[list]) * 16;
    int64_t place = l->blocks[list] * 16 * c->n_columns + position - l->offsets[list];
    int packed = c->n_codewords == 16;
    const double *anchor = c->anchors ? c->anchors + list * l->d : NULL;
    for (int64_t m = 0; m < c->n_subspaces; m++) {
        int64_t first = c->features[m], width = c->features[m + 1] - first;
        int64_t start = c->starts[m] + width * code_at(c, place + (packed ? m / 2 : m) * stride, m);
        for (int64_t j = 0; j < width; j++)
            row[first + j] = c->is_f64 ? ((const double *)c->codewords)[start + j] : ((const float *)c->codewords)[start + j];
    }
    if (anchor) for (int64_t j = 0; j < l->d; j++) row[j] += anchor[j];
    if (!c->is_f64) for (int64_t j = 0; j < l->d; j++) row[j] = (float)row[j];
}

/* A row as float64. */
static void load_row(const skivfpq_lists *l, int64_t position, double *row) {
    int64_t first = position * l->d;
    switch (l->kind) {
    case FLOAT64: memcpy(row, (const double *)l->vectors + first, sizeof(double) * l->d); break;
    case FLOAT32: for (int64_t j = 0; j < l->d; j++) row[j] = ((const float *)l->vectors)[first + j]; break;
    case FLOAT16: for (int64_t j = 0; j < l->d; j++) row[j] = half_to_double(((const uint16_t *)l->vectors)[first + j]); break;
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

/* Between a unit query and a row brought to length one, as reference.unit_rows does; 1 for a row of zeros. */
static double cosine_key(const double *query, double *row, int64_t d) {
    double largest = 0, squares[d];
    int exponent;
    for (int64_t j = 0; j < d; j++) largest = fmax(largest, fabs(row[j]));
    if (largest == 0) return 1;
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
    load_row(l, position, row);
    if (l->metric == BY_DISTANCE) return sq_distance(row, 1, 0, query, l->d);
    return l->metric == BY_COSINE ? cosine_key(query, row, l->d) : product_key(query, row, l->d);
}

static inline void fetch_row(const skivfpq_lists *l, int64_t position) {
    if (l->kind == CODED) return; /* lately scanned */
    static const int sizes[] = {8, 4, 2, 1, 1};
    int64_t size = l->d * sizes[l->kind];
    const char *row = (const char *)l->vectors + position * size;
    for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch(row + byte);
}

#endif

/* The certified int8 scan: the nearest center of every row, most centers being excluded by a bound on
 * 8-bit products, the few others evaluated exactly.
 *
 * A row x and a center c are known by points y that are no farther apart than x and c are (planes.py),
 * and those by int8 multiples: y = s q + e with |e| <= E. So, by the triangle inequality, c can only be
 * as near as a distance u when |s_x q - s_c p| <= u + E_x + E_c, that is when
 *
 *     <q, p> - s_c |p|^2 / (2 s_x)  >=  (s_x^2 |q|^2 - (u + E_x + E_c)^2) / (2 s_x s_c).
 *
 * score_block computes the left side for 16 rows and some columns, u is the exact distance to the
 * center that a row had before. What survives is looked at twice more: first by all features, the
 * rows as int8 with a scale each, the centers as int16; then by float64 differences, which decide,
 * lowest index on ties. Rows that the planes do not serve are left to the lane kernel. */
#include "scan.h"

#include "differences.h"
#include "score_block.h"

#include <math.h>
#include <stdlib.h>

#define SUPERBLOCK 8      /* blocks that share a chunk of panels while it is in the cache */
#define CHUNK_BYTES 16384
#define LIST 32         /* survivors that a row can keep before they must be evaluated */
#define ROUNDING 1e-9   /* more than float64 sums of 1e6 squares are off by, relatively */

const skivfpq_scan_shape SCAN_SHAPE = {COLUMNS, LARGEST_COLUMN, UNITS_MULTIPLE, WRAPS};

void PACK_ROWS(const float *Y, int64_t n, int64_t width, double scale, const float *bounds, /* IN (n, width), (n,) */
               int64_t units, uint8_t *codes, int32_t *sq_norms, float *errors) {
    for (int64_t i = 0; i < n; i++) {
        uint8_t *code = codes + i / BLOCK * units * 64 + i % BLOCK * 4;
        const float *y = Y + i * width;
        float inverse = (float)(1 / scale), step = (float)scale, sq_error = 0;
        int32_t sq_norm = 0, clipped = 0;
        for (int64_t j = 0; j < 4 * units; j++) {
            float value = j < width ? y[j] : 0;
            float q = rintf(value * inverse);
            clipped |= !(fabsf(q) <= 127);
            int32_t level = clipped ? 0 : (int32_t)q;
            float rest = value - step * (float)level;
            sq_error += rest * rest;
            sq_norm += level * level;
            code[j / 4 * 64 + j % 4] = (uint8_t)(level + 128);
        }
        sq_norms[i] = sq_norm;
        /* Float sums of squares and the step's own rounding: 1e-4 and 1e-6 relative are ample. */
        errors[i] = clipped ? INFINITY
                            : sqrtf(sq_error) * 1.0001f + 1e-6f * step * sqrtf((float)sq_norm) + bounds[i];
    }
}

double PACK_COLUMNS(const float *Y, int64_t k, int64_t width, double scale, const float *bounds, double row_scale,
                    int64_t units, int8_t *panels, int32_t *starts) {
    double error = 0;
    for (int64_t i = 0; i < k; i++) {
        int8_t *panel = panels + i / COLUMNS * units * COLUMNS * 4;
        float inverse = (float)(1 / scale), step = (float)scale, sq_error = 0;
        int64_t sq_norm = 0, sum = 0;
        for (int64_t j = 0; j < 4 * units; j++) {
            float value = j < width ? Y[i * width + j] : 0;
            int32_t level = (int32_t)rintf(value * inverse);
            float rest = value - step * (float)level;
            sq_error += rest * rest;
            sq_norm += (int64_t)level * level, sum += level;
            panel[PANEL_OFFSET(i % COLUMNS, j)] = (int8_t)level;
        }
        starts[i] = (int32_t)(-128 * sum - (int64_t)floor(scale * (double)sq_norm / (2 * row_scale)));
        error = fmax(error, sqrt(sq_error) * 1.0001 + 1e-6 * step * sqrt((double)sq_norm) + bounds[i]);
    }
    return error;
}

/* Fine points of rows: int8 with a scale for each row. */
void PACK_FINE_ROWS(const void *X, int is_f64, int64_t n, int64_t d, const float *origin,
                    int8_t *codes, float *scales, float *errors, int32_t *sq_norms) {
    for (int64_t i = 0; i < n; i++) {
        const float *x32 = (const float *)X + i * d;
        const double *x64 = (const double *)X + i * d;
        int8_t *code = codes + i * d;
        double largest = 0, sq_error = 0;
        int32_t sq_norm = 0;
        for (int64_t j = 0; j < d; j++)
            largest = fmax(largest, fabs((is_f64 ? x64[j] : (double)x32[j]) - origin[j]));
        scales[i] = (float)(largest / 127);
        double inverse = scales[i] > 0 ? 1 / (double)scales[i] : 0;
        for (int64_t j = 0; j < d; j++) {
            double value = (is_f64 ? x64[j] : (double)x32[j]) - origin[j];
            double level = rint(value * inverse);
            level = level > 127 ? 127 : level < -127 ? -127 : level;
            code[j] = (int8_t)level;
            sq_error += (value - scales[i] * level) * (value - scales[i] * level);
            sq_norm += (int32_t)level * (int32_t)level;
        }
        sq_norms[i] = sq_norm;
        errors[i] = (float)(sqrt(sq_error) * (1 + 1e-6)) ;
    }
}

/* Fine points of columns: int16 up to limit, so that no product overflows 32 bits. */
void PACK_FINE_COLUMNS(const double *centers, int64_t k, int64_t d, const float *origin, int32_t limit,
                       int16_t *codes, double *scales, double *errors, double *sq_lengths) {
    for (int64_t i = 0; i < k; i++) {
        const double *c = centers + i * d;
        double largest = 0, sq_error = 0, sq_norm = 0;
        for (int64_t j = 0; j < d; j++) largest = fmax(largest, fabs(c[j] - origin[j]));
        scales[i] = largest / limit;
        double inverse = scales[i] > 0 ? 1 / scales[i] : 0;
        for (int64_t j = 0; j < d; j++) {
            double value = c[j] - origin[j], level = rint(value * inverse), rest = value - scales[i] * level;
            codes[i * d + j] = (int16_t)level;
            sq_error += rest * rest, sq_norm += level * level;
        }
        sq_lengths[i] = scales[i] * scales[i] * sq_norm;
        errors[i] = sqrt(sq_error) * (1 + 1e-6);
    }
}

typedef struct {
    int32_t column, score; /* score: out + threshold, of the time when it was found */
} survivor;

/* What is known of the 16 rows of a block. */
typedef struct {
    int32_t thresholds[BLOCK], caps[BLOCK];
    double distances[BLOCK]; /* exact, squared, to the label so far */
    int32_t labels[BLOCK], n_survivors[BLOCK];
    survivor survivors[BLOCK][LIST];
} block_state;

/* Threshold and cap of a row for centers within sq_distance of it; 0 where they do not fit. */
static int set_threshold(const skivfpq_scan *s, int64_t row, double sq_distance, int32_t *threshold, int32_t *cap) {
    double unit = 2 * s->row_scale * s->column_scale;
    double radius = sqrt(sq_distance) * (1 + ROUNDING) + s->errors[row] + s->column_error;
    double low = floor((s->row_scale * s->row_scale * s->sq_norms[row] - radius * radius) / unit) - 1;
    double high = ceil(radius * radius / unit) + 3;
    if (!(fabs(low) < 1e9 && high < (WRAPS ? 65535.0 : 1e9))) return 0;
    *threshold = (int32_t)low, *cap = (int32_t)high;
    return 1;
}

/* What the scan of some rows works with. */
typedef struct {
    const skivfpq_scan *s;
    int64_t budget; /* evaluations left before the lane kernel is the faster way */
    block_state blocks[SUPERBLOCK];
} workspace;

/* <q, p> of int8 and int16. */
static inline int32_t product(const int8_t *q, const int16_t *p, int64_t d) {
    int32_t sum = 0;
    for (int64_t j = 0; j < d; j++) sum += (int32_t)(int16_t)q[j] * p[j];
    return sum;
}

/* Whether a row and a center are farther apart than u for certain: their fine points, less both errors. */
static inline int is_farther(const skivfpq_scan *s, int64_t row, int64_t label, double u) {
    const skivfpq_fine_rows *x = &s->fine_rows;
    const skivfpq_fine_columns *c = &s->fine_columns;
    int32_t dot = product(x->codes + row * s->n_features, c->codes + label * s->n_features, s->n_features);
    double sq_norms = (double)x->scales[row] * x->scales[row] * x->sq_norms[row] + c->sq_lengths[label];
    double sq_gap = sq_norms * (1 - 1e-12) - 2 * (double)x->scales[row] * c->scales[label] * dot;
    double reach = u * (1 + ROUNDING) + x->errors[row] + c->errors[label];
    return sq_gap > reach * reach;
}

static inline void prefetch(const void *memory, int64_t size) {
    for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch((const char *)memory + byte);
}

/* Evaluates the survivors of a row, best score first, as long as they can beat the best so far. */
static void evaluate(workspace *w, block_state *b, int r, int64_t row) {
    const skivfpq_scan *s = w->s;
    survivor *list = b->survivors[r];
    int64_t d = s->n_features;
    for (int i = 0; i < b->n_survivors[r] && i < 8; i++)
        prefetch(s->fine_columns.codes + s->ids[list[i].column] * d, d * sizeof(int16_t));
    for (int n = b->n_survivors[r]; n > 0 && w->budget >= 0;) {
        int best = 0;
        for (int i = 1; i < n; i++)
            if (list[i].score > list[best].score) best = i;
        survivor candidate = list[best];
        list[best] = list[--n];
        if (candidate.score < b->thresholds[r]) break;
        int64_t label = s->ids[candidate.column];
        if (label == b->labels[r]) continue;
        w->budget--;
        if (is_farther(s, row, label, sqrt(b->distances[r]))) continue;
        w->budget -= 2;
        double exact = sq_distance(s->X, s->is_f64, row, s->centers + label * d, d);
        if (exact < b->distances[r] || (exact == b->distances[r] && label < b->labels[r])) {
            b->distances[r] = exact, b->labels[r] = (int32_t)label;
            set_threshold(s, row, exact, b->thresholds + r, b->caps + r); /* tighter; where it does not fit the old one serves */
        }
    }
    b->n_survivors[r] = 0;
}

static void add_survivor(workspace *w, block_state *b, int r, int64_t row, int32_t column, int32_t score) {
    if (b->n_survivors[r] == LIST) evaluate(w, b, r, row);
    b->survivors[r][b->n_survivors[r]++] = (survivor){column, score};
}

/* The state of a block before the scan; rows that the planes do not serve get the label -1. */
static void start_block(workspace *w, block_state *b, int64_t block, int64_t last_row, const int32_t *labels) {
    const skivfpq_scan *s = w->s;
    for (int r = 0; r < BLOCK; r++) {
        int64_t row = block * BLOCK + r, d = s->n_features;
        b->n_survivors[r] = 0, b->labels[r] = -1, b->thresholds[r] = INT32_MAX / 2, b->caps[r] = -1;
        if (row >= last_row || !(s->errors[row] < INFINITY)) continue;
        b->distances[r] = sq_distance(s->X, s->is_f64, row, s->centers + labels[row] * d, d);
        if (!set_threshold(s, row, b->distances[r], b->thresholds + r, b->caps + r)) continue;
        b->labels[r] = labels[row];
        double length = s->row_scale * sqrt(s->sq_norms[row]) + s->errors[row]; /* of y, at most */
        for (int64_t f = 0; f < s->n_far; f++)
            if (s->far_lengths[f] - length <= sqrt(b->distances[r]) * (1 + ROUNDING))
                add_survivor(w, b, r, row, (int32_t)(s->n_columns + f), INT32_MAX);
    }
}

/* How many columns of a panel are in use. */
static inline int columns_of(const skivfpq_scan *s, int64_t panel) {
    return s->n_columns - panel * COLUMNS < COLUMNS ? (int)(s->n_columns - panel * COLUMNS) : COLUMNS;
}

/* Scores a block against the panels first..last and notes what survives. */
static void scan_panels(workspace *w, block_state *b, int64_t block, int64_t first, int64_t last) {
    const skivfpq_scan *s = w->s;
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    uint32_t hits[COLUMNS];
    for (int64_t p = first; p < last; p++) {
        int columns = columns_of(s, p);
        if (!score_block(s->codes + block * s->units * 64, s->panels + p * s->units * COLUMNS * 4,
                         s->starts + p * COLUMNS, s->units, columns, b->thresholds, b->caps, out, hits))
            continue;
        for (int c = 0; c < columns; c++)
            for (uint32_t left = hits[c]; left; left &= left - 1) {
                int r = __builtin_ctz(left);
                add_survivor(w, b, r, block * BLOCK + r, (int32_t)(p * COLUMNS + c), out[c][r] + b->thresholds[r]);
            }
    }
}

/* All panels for the blocks start..stop, a chunk of panels at a time; then the survivors. */
static void scan_superblock(workspace *w, int64_t start, int64_t stop) {
    const skivfpq_scan *s = w->s;
    int64_t n_panels = (s->n_columns + COLUMNS - 1) / COLUMNS, chunk = CHUNK_BYTES / (s->units * COLUMNS * 4) + 1;
    for (int64_t p = 0; p < n_panels; p += chunk)
        for (int64_t i = start; i < stop && w->budget >= 0; i++)
            scan_panels(w, w->blocks + i - start, i, p, p + chunk < n_panels ? p + chunk : n_panels);
    for (int64_t i = start; i < stop && w->budget >= 0; i++)
        for (int r = 0; r < BLOCK; r++) evaluate(w, w->blocks + i - start, r, i * BLOCK + r);
}

int64_t CERTIFIED_NEAREST(const skivfpq_scan *s, int64_t first_row, int64_t last_row, int32_t *labels,
                          double *sq_distances, int64_t *unserved) {
    int64_t last_block = (last_row + BLOCK - 1) / BLOCK, n_unserved = 0;
    int64_t allowed = s->n_columns / 16 * SUPERBLOCK * BLOCK; /* an evaluation costs some ten lane scores */
    workspace *w = malloc(sizeof(workspace));
    if (!w) return -1;
    w->s = s, w->budget = 0;
    for (int64_t start = first_row / BLOCK; start < last_block; start += SUPERBLOCK) {
        int64_t stop = start + SUPERBLOCK < last_block ? start + SUPERBLOCK : last_block;
        w->budget += w->budget < 0 ? 0 : allowed;
        for (int64_t i = start; i < stop && w->budget >= 0; i++)
            start_block(w, w->blocks + i - start, i, last_row, labels);
        scan_superblock(w, start, stop);
        for (int64_t row = start * BLOCK; row < stop * BLOCK && row < last_row; row++) {
            block_state *b = w->blocks + row / BLOCK - start;
            int r = (int)(row % BLOCK);
            if (w->budget >= 0 && b->labels[r] >= 0)
                labels[row] = b->labels[r], sq_distances[row] = b->distances[r];
            else
                unserved[n_unserved++] = row;
        }
    }
    free(w);
    return n_unserved;
}

void SET_CLOSEST(const skivfpq_scan *s, const int32_t *rows, int64_t n, const double *sq_distances,
                 double *closest, int32_t *thresholds, int32_t *caps) {
    for (int64_t i = 0; i < n; i++) {
        int64_t row = rows[i];
        closest[row] = sq_distances[i];
        if (!s->codes) continue;
        if (!(s->errors[row] < INFINITY && set_threshold(s, row, closest[row], thresholds + row, caps + row)))
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

static void evaluate_pending(closer_search *w) {
    const skivfpq_scan *s = w->s;
    int64_t d = s->n_features, size = s->is_f64 ? 8 : 4;
    int n = 0;
    w->n_evaluated += w->n_pending;
    for (int i = 0; i < w->n_pending; i++) {
        pair p = w->pending[i];
        if (s->codes && is_farther(s, p.row, p.candidate, sqrt(w->closest[p.row]))) continue;
        prefetch((const char *)s->X + p.row * d * size, d * size);
        w->pending[n++] = p;
    }
    for (int i = 0; i < n; i++) {
        int64_t row = w->pending[i].row, c = w->pending[i].candidate;
        double exact = sq_distance(s->X, s->is_f64, row, s->centers + c * d, d);
        if (exact >= w->closest[row]) continue;
        w->gains[c] += w->weights[row] * (w->closest[row] - exact);
        w->rows[c * w->capacity + w->n_closer[c]] = (int32_t)row;
        w->sq_distances[c * w->capacity + w->n_closer[c]++] = exact;
    }
    w->n_pending = 0;
}

static inline void add_pending(closer_search *w, int64_t row, int64_t candidate) {
    if (w->closest[row] == 0) return;
    if (w->n_pending == PENDING) evaluate_pending(w);
    if (w->s->codes) prefetch(w->s->fine_rows.codes + row * w->s->n_features, w->s->n_features);
    w->pending[w->n_pending++] = (pair){(int32_t)row, (int32_t)candidate};
}

/* The candidates for the rows first..last. */
static void search_closer(closer_search *w, const int32_t *thresholds, const int32_t *caps, int64_t first,
                          int64_t last) {
    const skivfpq_scan *s = w->s;
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    uint32_t hits[COLUMNS];
    int64_t n_panels = (s->n_columns + COLUMNS - 1) / COLUMNS;
    for (int64_t row = first; row < last && !s->codes; row++)
        for (int64_t c = 0; c < s->n_columns; c++) add_pending(w, row, c);
    for (int64_t i = first; i < last && s->codes; i += BLOCK)
        for (int64_t p = 0; p < n_panels; p++) {
            int columns = columns_of(s, p);
            if (!score_block(s->codes + i * s->units * 4, s->panels + p * s->units * COLUMNS * 4,
                             s->starts + p * COLUMNS, s->units, columns, thresholds + i, caps + i, out, hits))
                continue;
            for (int c = 0; c < columns; c++)
                for (uint32_t left = hits[c]; left; left &= left - 1) {
                    int64_t row = i + __builtin_ctz(left);
                    if (row < last) add_pending(w, row, p * COLUMNS + c);
                }
        }
    evaluate_pending(w);
}

int64_t CLOSER_CANDIDATES(const skivfpq_scan *s, const int32_t *thresholds, const int32_t *caps,
                          const double *closest, const double *weights, int64_t n_rows, int64_t part_rows,
                          int64_t first_part, int64_t last_part, int32_t *rows, double *sq_distances,
                          int64_t *n_closer, double *gains) {
    closer_search w = {.s = s, .closest = closest, .weights = weights, .capacity = n_rows};
    for (int64_t part = first_part; part < last_part; part++) {
        int64_t first = part * part_rows, last = first + part_rows < n_rows ? first + part_rows : n_rows;
        w.rows = rows + first, w.sq_distances = sq_distances + first;
        w.gains = gains + part * s->n_columns, w.n_closer = n_closer + part * s->n_columns;
        for (int64_t c = 0; c < s->n_columns; c++) w.n_closer[c] = 0, w.gains[c] = 0;
        search_closer(&w, thresholds, caps, first, last);
    }
    return w.n_evaluated;
}

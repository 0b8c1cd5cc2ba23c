/* Asymmetric distance computation (Jegou et al. 2011, section 3.1): the nearest rows by their codes.
 *
 * A row is x = a + y: its list's anchor, and its codewords y_1 .. y_M side by side. With an origin o
 *
 *     |q - x|^2 = |q - a|^2 + t - 2 (q - o).y,   t = |y|^2 + 2 (a - o).y,   and   q.x = q.a + q.y,
 *
 * so that one table of the products of the query's parts with all codewords serves every list, and t is one number
 * for each row. The table is cut down to 8 bits, T = floor((h_m - (q - o)_m.y_m) / step) with h_m the largest product
 * of a subspace: S, the sum of what the codes select, is a lower bound of the key, in units,
 *
 *     key >= unit (S + (|q - a|^2 - 2 h + t) / unit),   h the sum of h_m,  unit = 2 step,
 *
 * and by M units at most too low. Its negative is the row's score. The few rows that cannot be excluded so are decoded
 * and their keys computed by differences: what is found is what float64 finds. */
#include "search.h"

#include "adc_sums.h"
#include "candidates.h"

#include <float.h>

#define TOO_LONG 1e12 /* for queries, scaled */
#define SHRINK (1 - 0x1p-19f) /* more than entries of tables may be rounded up */

typedef struct {
    ranking rank;
    query_state state;
    float *query;        /* (d,) q - o, scaled */
    float *products;     /* (n_subspaces, n_codewords) */
    uint8_t *tables;     /* (n_subspaces, n_codewords) */
    float *highest_of;   /* (n_subspaces,) h_m */
    double sq_length, highest, step; /* |q - o|^2, h, step; scaled */
    adc_sums *sums;
} code_search;

typedef float floats16 __attribute__((vector_size(64), aligned(4)));

/* Products of a part of the query with n_vectors * 16 codewords. */
static inline __attribute__((always_inline)) void multiply_some(const float *part, int64_t width, const float *words,
                                                                int64_t n_codewords, float *out, const int n_vectors) {
    floats16 sums[4] = {{0}};
    for (int64_t j = 0; j < width; j++)
        for (int v = 0; v < n_vectors; v++) sums[v] += part[j] * ((const floats16 *)(words + j * n_codewords))[v];
    for (int v = 0; v < n_vectors; v++) ((floats16 *)out)[v] = sums[v];
}

/* All products of a subspace; returns the highest, and the range. */
static float multiply_words(const float *part, int64_t width, const float *words, int64_t n_codewords, float *out,
                            float *range) {
    float low[16], high[16];
    int64_t k = 0;
    for (; k + 64 <= n_codewords; k += 64) multiply_some(part, width, words + k, n_codewords, out + k, 4);
    for (; k < n_codewords; k += 16) multiply_some(part, width, words + k, n_codewords, out + k, 1);
    for (int i = 0; i < 16; i++) low[i] = high[i] = out[i];
    for (k = 16; k < n_codewords; k += 16)
        for (int i = 0; i < 16; i++) {
            low[i] = out[k + i] < low[i] ? out[k + i] : low[i];
            high[i] = out[k + i] > high[i] ? out[k + i] : high[i];
        }
    for (int i = 1; i < 16; i++) {
        low[0] = low[i] < low[0] ? low[i] : low[0];
        high[0] = high[i] > high[0] ? high[i] : high[0];
    }
    *range = high[0] - low[0];
    return high[0];
}

/* Tables of the query that is loaded, and what its scores mean; returns 0 where they cannot serve. */
static int set_tables(code_search *s) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    query_point *q = &s->state.point;
    int64_t n = c->n_subspaces;
    float range = 0, *highest = s->highest_of;
    s->sq_length = s->highest = 0;
    for (int64_t j = 0; j < l->d; j++) {
        double value = (s->rank.query[j] - c->origin[j]) / c->unit;
        s->query[j] = (float)value, s->sq_length += value * value;
    }
    double length = sqrt(s->sq_length), longest = length + c->longest_anchor + c->longest_word;
    if (!(length < TOO_LONG)) return 0;
    for (int64_t m = 0; m < n; m++) {
        float own;
        int64_t first = c->features[m];
        highest[m] = multiply_words(s->query + first, c->features[m + 1] - first, c->scaled + first * c->n_codewords,
                                    c->n_codewords, s->products + m * c->n_codewords, &own);
        range = own > range ? own : range, s->highest += highest[m];
    }
    s->step = fmax(range / (float)most_level(n, c->n_codewords), longest * longest * 1e-8 + 1e-30);
    float scale = (float)(1 / s->step) * SHRINK;
    for (int64_t m = 0; m < n; m++) {
        const float *products = s->products + m * c->n_codewords;
        for (int64_t k = 0; k < c->n_codewords; k++)
            s->tables[m * c->n_codewords + k] = (uint8_t)(int32_t)((highest[m] - products[k]) * scale);
    }
    int is_distance = l->metric == BY_DISTANCE;
    double key_unit = l->metric == BY_COSINE ? c->unit * c->largest_term : c->unit * c->unit; /* of scaled products */
    double floats = (double)(l->d + 32) * FLT_EPSILON * (is_distance ? longest * longest : length * longest);
    double span = 2 * length + c->longest_anchor + c->longest_word, reach = c->reach / c->unit;
    double decoded = c->rounding * (is_distance ? span * (span + reach) : length * reach);
    double loss = n * 1.001 + 1; /* S is less than this below the products, in steps */
    q->metric = l->metric, q->is_linear = 1, q->threshold = INT32_MIN;
    q->unit = key_unit * s->step * (is_distance ? 2 : 1);
    q->base = (l->metric == BY_COSINE ? -1 : 0) - q->unit * loss / 2; /* scores are rounded, by one at most */
    q->slack = q->unit * (loss / 2 + 1) + key_unit * (floats + decoded) + (l->metric == BY_COSINE ? c->rounding : 0);
    q->slack = q->slack * (1 + ROUNDING) + TINY * TINY;
    return 1;
}

/* What all rows of a list have in their keys, less the highest products, in units. */
static float list_term(const code_search *s, int64_t list) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    const float *anchor = c->scaled_anchors + list * l->d;
    floats16 sums = {0};
    float product = 0, total = 0;
    int64_t j = 0;
    int is_distance = l->metric == BY_DISTANCE;
    if (!c->scaled_anchors) return (float)((is_distance ? s->sq_length / 2 : 0) - s->highest) / (float)s->step;
    for (; j + 16 <= l->d; j += 16) {
        floats16 x = *(const floats16 *)(s->query + j), a = *(const floats16 *)(anchor + j), gap = x - a;
        sums += is_distance ? gap * gap : x * a;
    }
    for (; j < l->d; j++) {
        float gap = s->query[j] - anchor[j];
        total += is_distance ? gap * gap : s->query[j] * anchor[j];
    }
    for (int i = 0; i < 16; i++) total += sums[i];
    product = is_distance ? total / 2 : -total;
    return (float)((product - s->highest) / s->step);
}

/* Scores of up to 64 rows from their sums. */
static void score_rows(const code_search *s, const uint16_t *sums, const float *terms, float list, int32_t *scores) {
    const skivfpq_lists *l = s->rank.lists;
    float factor = (float)(l->metric == BY_DISTANCE ? 1 / (2 * s->step) : 1 / l->coded->largest_term);
    if (l->metric == BY_DISTANCE)
        for (int r = 0; r < CHUNK; r++) scores[r] = (int32_t)-(sums[r] + (terms[r] * factor + list));
    else if (l->metric == BY_COSINE)
        for (int r = 0; r < CHUNK; r++) scores[r] = (int32_t)-((sums[r] + list) * (terms[r] * factor));
    else
        for (int r = 0; r < CHUNK; r++) scores[r] = (int32_t)-(sums[r] + list);
}

static void scan_codes(code_search *s, int64_t list) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    query_state *q = &s->state;
    int64_t n = l->offsets[list + 1] - l->offsets[list], stride = (l->blocks[list + 1] - l->blocks[list]) * 16;
    const char *columns = (const char *)c->columns + l->blocks[list] * 16 * c->n_columns * code_bytes(c);
    float term = n ? list_term(s, list) : 0, padded[CHUNK] = {0};
    for (int64_t first = 0; first < n; first += CHUNK) {
        uint16_t sums[CHUNK] __attribute__((aligned(64)));
        int32_t scores[CHUNK] __attribute__((aligned(64)));
        int64_t position = l->offsets[list] + first, n_rows = n - first < CHUNK ? n - first : CHUNK;
        const float *terms = c->terms ? c->terms + position : NULL;
        if (terms && n_rows < CHUNK) memcpy(padded, terms, sizeof(float) * n_rows), terms = padded;
        s->sums(c, s->tables, columns + first * code_bytes(c), stride, sums);
        score_rows(s, sums, terms, term, scores);
        for (int64_t r = 0; r < n_rows; r += 16) {
            int any = 0;
            for (int i = 0; i < 16; i++) any |= scores[r + i] >= q->point.threshold;
            for (int64_t i = r; any && i < r + 16 && i < n_rows; i++)
                if (scores[i] >= q->point.threshold && (!c->allowed || c->allowed[position + i]))
                    add_waiting(&s->rank, q, scores[i], position + i);
        }
    }
}

int64_t SEARCH_CODES(const skivfpq_lists *lists, const skivfpq_queries *queries, const int32_t *probes,
                     int64_t n_probes, int64_t k, double *keys, int64_t *positions, uint8_t *unserved, char *scratch) {
    const skivfpq_coded *c = lists->coded;
    int64_t used = 0, capacity = 2 * k + EXTRA, n_entries = c->n_subspaces * c->n_codewords;
    code_search s = {.rank = {.lists = lists, .queries = queries, .k = k, .capacity = capacity}};
    waiting_row *waiting = take(scratch, &used, sizeof(waiting_row) * capacity);
    found_row *found = take(scratch, &used, sizeof(found_row) * k);
    s.query = take(scratch, &used, sizeof(float) * lists->d);
    s.products = take(scratch, &used, sizeof(float) * n_entries);
    s.tables = take(scratch, &used, n_entries);
    s.highest_of = take(scratch, &used, sizeof(float) * c->n_subspaces);
    s.rank.query = take(scratch, &used, sizeof(double) * lists->d);
    s.rank.row = take(scratch, &used, sizeof(double) * lists->d);
    if (!scratch) return used;
    s.sums = pick_sums(c);
    for (int64_t i = 0; i < queries->n; i++) {
        s.state = (query_state){.number = (int32_t)i, .waiting = waiting, .found = found};
        load_query(queries, i, lists->d, s.rank.query);
        unserved[i] = (lists->metric == BY_COSINE && is_zero(s.rank.query, lists->d)) || !set_tables(&s);
        for (int64_t p = 0; p < n_probes && probes[i * n_probes + p] >= 0 && !unserved[i]; p++)
            scan_codes(&s, probes[i * n_probes + p]);
        if (unserved[i]) continue;
        prepare(&s.rank, &s.state), settle(&s.rank, &s.state);
        unserved[i] = s.state.n_found < k;
        if (!unserved[i]) take_found(&s.rank, &s.state, keys + i * k, positions + i * k);
    }
    return 0;
}

int64_t RANK_ROWS(const skivfpq_lists *lists, const skivfpq_queries *queries, const int64_t *candidates,
                  int64_t n_candidates, int64_t k, double *keys, int64_t *positions, char *scratch) {
    int64_t used = 0;
    ranking rank = {.lists = lists, .queries = queries, .k = k};
    found_row *found = take(scratch, &used, sizeof(found_row) * k);
    rank.query = take(scratch, &used, sizeof(double) * lists->d);
    rank.row = take(scratch, &used, sizeof(double) * lists->d);
    if (!scratch) return used;
    for (int64_t i = 0; i < queries->n; i++, candidates += n_candidates) {
        query_state state = {.found = found, .point = {.threshold = INT32_MAX}};
        load_query(queries, i, lists->d, rank.query);
        for (int64_t j = 0; j < n_candidates && j < AHEAD; j++) fetch_row(lists, candidates[j]);
        for (int64_t j = 0; j < n_candidates; j++) {
            if (j + AHEAD < n_candidates) fetch_row(lists, candidates[j + AHEAD]);
            evaluate(&rank, &state, candidates[j]);
        }
        take_found(&rank, &state, keys + i * k, positions + i * k);
    }
    return 0;
}

/* Asymmetric distance computation (Jegou et al. 2011, section 3.1): the nearest rows by their codes.
 *
 * A row is x = a + y: its list's anchor, and its codewords y_1 .. y_M side by side. With an origin o
 *
 *     |q - x|^2 = |q - a|^2 + t - 2 (q - o).y,   t = |y|^2 + 2 (a - o).y,   and   q.x = q.a + q.y,
 *
 * so that one table of the products of the query's parts with all codewords serves every list, and t is one number
 * for each row. Products are those of 16-bit levels. The table is cut down to 8 bits, T = floor((h_m - p) / step), h_m
 * the largest product of a subspace: S, the sum of what the codes select, gives a lower bound of the key, in units,
 *
 *     key >= unit (S + (|q - a|^2 - 2 h + t) / unit),   h the sum of h_m,  unit = 2 step,
 *
 * whose negative is the row's score. Rows that it does not exclude are scored by the products themselves. The few that
 * are left are decoded and their keys computed by differences: what is found is what float64 finds. */
#include "search.h"

#include "adc_sums.h"
#include "candidates.h"

#include <float.h>

#define FIRST_ROWS 512 /* of the nearest list, whose scores give the first threshold */
#define FETCHED_BYTES (1 << 13) /* of the next list */
#define TOO_LONG 1e12 /* for queries, scaled */
#define LONGEST_PART 32000. /* levels of a part of the query */
#define SHRINK (1 - 0x1p-19f) /* more than entries of tables may be rounded up */

typedef struct {
    ranking rank;
    query_state state;
    float *query;        /* (d,) q - o, scaled */
    int16_t *levels;     /* (2 n_pairs,) of the query */
    int32_t *products;   /* (n_subspaces, n_codewords) of levels */
    int32_t *highest;    /* (n_subspaces,) h_m */
    uint8_t *tables;     /* (n_subspaces, n_codewords) */
    int64_t all_highest; /* h */
    double sq_length;    /* |q - o|^2, scaled */
    double step, ratio;  /* scaled; ratio: a product of levels in steps */
    adc_sums *sums;
    float padded[CHUNK]; /* terms of the last rows of a list */
} code_search;

typedef float floats16 __attribute__((vector_size(64), aligned(4)));
typedef uint8_t bytes16 __attribute__((vector_size(16), aligned(1)));

/* sums + products of 16 pairs of levels with one. */
#if defined(__AVX512VNNI__)
#define ADD_PRODUCTS(sums, pairs, pair)                                                              \
    sums = (ints16)_mm512_dpwssd_epi32((__m512i)sums, _mm512_loadu_si512(pairs), _mm512_set1_epi32(pair));
#elif defined(__AVX512BW__)
#define ADD_PRODUCTS(sums, pairs, pair)                                                              \
    sums += (ints16)_mm512_madd_epi16(_mm512_loadu_si512(pairs), _mm512_set1_epi32(pair));
#elif defined(__AVX2__)
#define ADD_PRODUCTS(sums, pairs, pair)                                                              \
    for (int half = 0; half < 2; half++)                                                             \
        ((__m256i *)&sums)[half] = _mm256_add_epi32(                                                 \
            ((__m256i *)&sums)[half],                                                                \
            _mm256_madd_epi16(_mm256_loadu_si256((const __m256i_u *)(pairs) + half), _mm256_set1_epi32(pair)));
#else
#define ADD_PRODUCTS(sums, pairs, pair)                                                              \
    {                                                                                                \
        ints16 both = *(const ints16 *)(pairs);                                                      \
        sums += (both << 16 >> 16) * ((pair) << 16 >> 16) + (both >> 16) * ((pair) >> 16);           \
    }
#endif

/* Products of a part of the query with 16 n_vectors codewords, and their range so far. */
static inline __attribute__((always_inline)) void multiply_some(const int16_t *part, int64_t n_pairs, const int16_t *words,
                                                                int64_t n_codewords, int32_t *out, const int n_vectors,
                                                                ints16 *low, ints16 *high) {
    ints16 sums[4] = {{0}};
    for (int64_t j = 0; j < n_pairs; j++, words += 2 * n_codewords) {
        int32_t pair;
        memcpy(&pair, part + 2 * j, sizeof pair);
        for (int v = 0; v < n_vectors; v++) ADD_PRODUCTS(sums[v], words + 32 * v, pair)
    }
    for (int v = 0; v < n_vectors; v++) {
        ((ints16 *)out)[v] = sums[v];
        *low = LESSER(sums[v], *low), *high = GREATER(sums[v], *high);
    }
}

/* All products of a subspace; returns the highest, and the range. */
static int32_t multiply_words(const int16_t *part, int64_t n_pairs, const int16_t *words, int64_t n_codewords,
                              int32_t *out, int64_t *range) {
    ints16 low = {0}, high = {0};
    int64_t k = 0;
    low += INT32_MAX, high += INT32_MIN;
    for (; k + 64 <= n_codewords; k += 64)
        multiply_some(part, n_pairs, words + 2 * k, n_codewords, out + k, 4, &low, &high);
    for (; k < n_codewords; k += 16)
        multiply_some(part, n_pairs, words + 2 * k, n_codewords, out + k, 1, &low, &high);
    int32_t lowest = low[0], highest = high[0];
    for (int i = 1; i < 16; i++) {
        lowest = low[i] < lowest ? low[i] : lowest;
        highest = high[i] > highest ? high[i] : highest;
    }
    *range = (int64_t)highest - lowest;
    return highest;
}

/* floor((highest - products) scale), at most. */
static void round_table(const int32_t *products, int64_t n_codewords, int32_t highest, float scale, uint8_t *table) {
    for (int64_t k = 0; k < n_codewords; k += 16) {
        floats16 gaps = __builtin_convertvector(highest - *(const ints16 *)(products + k), floats16);
        *(bytes16 *)(table + k) = __builtin_convertvector(__builtin_convertvector(gaps * scale, ints16), bytes16);
    }
}

/* The query that is loaded, scaled, and in levels; returns the scale of those. */
static double round_parts(code_search *s) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    double most = 0;
    s->sq_length = 0;
    for (int64_t j = 0; j < l->d; j++) s->query[j] = (float)((s->rank.query[j] - c->origin[j]) / c->unit);
    for (int64_t m = 0; m < c->n_subspaces; m++) {
        double sq_norm = 0;
        for (int64_t j = c->features[m]; j < c->features[m + 1]; j++) sq_norm += (double)s->query[j] * s->query[j];
        s->sq_length += sq_norm, most = fmax(most, sq_norm);
    }
    double level = sqrt(most) / LONGEST_PART;
    float factor = most > 0 ? (float)(1 / level) : 0;
    for (int64_t m = 0; m < c->n_subspaces; m++) {
        int64_t first = c->features[m], width = c->features[m + 1] - first;
        int16_t *levels = s->levels + 2 * c->pairs[m];
        for (int64_t j = 0; j < width; j++) levels[j] = (int16_t)rintf(s->query[first + j] * factor);
        if (width % 2) levels[width] = 0;
    }
    return level;
}

/* Tables of the query that is loaded, and what its scores mean; returns 0 where they cannot serve. */
static int set_tables(code_search *s) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    query_point *q = &s->state.point;
    int64_t n = c->n_subspaces, range = 0, widest = 0;
    double level = round_parts(s), length = sqrt(s->sq_length);
    double longest = length + c->longest_anchor + c->longest_word;
    if (!(length < TOO_LONG)) return 0;
    s->all_highest = 0;
    for (int64_t m = 0; m < n; m++) {
        int64_t own, width = c->features[m + 1] - c->features[m], first = c->pairs[m];
        s->highest[m] = multiply_words(s->levels + 2 * first, c->pairs[m + 1] - first, c->levels + 2 * first * c->n_codewords,
                                       c->n_codewords, s->products + m * c->n_codewords, &own);
        range = own > range ? own : range, widest = width > widest ? width : widest;
        s->all_highest += s->highest[m];
    }
    double product = level * c->level; /* of levels, scaled */
    s->step = fmax(range * product / (double)most_level(n, c->n_codewords), longest * longest * 1e-8 + 1e-30);
    s->ratio = product / s->step;
    for (int64_t m = 0; m < n; m++)
        round_table(s->products + m * c->n_codewords, c->n_codewords, s->highest[m], (float)s->ratio * SHRINK,
                    s->tables + m * c->n_codewords);
    int is_distance = l->metric == BY_DISTANCE;
    double key_unit = l->metric == BY_COSINE ? c->unit * c->largest_term : c->unit * c->unit; /* of scaled products */
    double levels = 0.51 * sqrt((double)(widest * n)) * (c->level * length + level * (c->longest_word + c->level * widest));
    double floats = (double)(l->d + 32) * FLT_EPSILON * (is_distance ? longest * longest : length * longest);
    double span = 2 * length + c->longest_anchor + c->longest_word, reach = c->reach / c->unit;
    double decoded = c->rounding * (is_distance ? span * (span + reach) : length * reach);
    q->metric = l->metric, q->is_linear = 1, q->threshold = INT32_MIN;
    q->unit = key_unit * s->step * (is_distance ? 2 : 1);
    q->base = l->metric == BY_COSINE ? -1 : 0;
    q->slack = q->unit + key_unit * ((is_distance ? 2 : 1) * levels + floats + decoded) - q->base * c->rounding;
    q->slack = q->slack * (1 + ROUNDING) + TINY * TINY;
    return 1;
}

/* A part of keys less the highest products, in steps. */
static float in_steps(const code_search *s, double part) {
    return (float)(part / s->step - s->all_highest * s->ratio);
}

/* What all rows of a list have in their keys, in steps. */
static float list_part(const code_search *s, int64_t list) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    const float *anchor = c->scaled_anchors + list * l->d;
    floats16 sums = {0};
    float total = 0;
    int64_t j = 0;
    int is_distance = l->metric == BY_DISTANCE;
    if (!c->scaled_anchors) return in_steps(s, is_distance ? s->sq_length / 2 : 0);
    for (; j + 16 <= l->d; j += 16) {
        floats16 x = *(const floats16 *)(s->query + j), a = *(const floats16 *)(anchor + j), gap = x - a;
        sums += is_distance ? gap * gap : x * a;
    }
    for (; j < l->d; j++) {
        float gap = s->query[j] - anchor[j];
        total += is_distance ? gap * gap : s->query[j] * anchor[j];
    }
    for (int i = 0; i < 16; i++) total += sums[i];
    return in_steps(s, is_distance ? total / 2 : -total);
}

/* What terms are to be multiplied with. */
static float term_factor(const code_search *s) {
    const skivfpq_lists *l = s->rank.lists;
    return (float)(l->metric == BY_DISTANCE ? 1 / (2 * s->step) : 1 / l->coded->largest_term);
}

/* The codes of a list, and what its rows have in their keys. */
typedef struct {
    int64_t n, position, stride; /* rows, and the first of them; from one column to the next */
    const char *columns;
    float part; /* of all rows, in steps */
} code_list;

static code_list codes_of(const code_search *s, int64_t list) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    int64_t first = l->offsets[list], n = l->offsets[list + 1] - first;
    return (code_list){
        .n = n, .position = first, .stride = (l->blocks[list + 1] - l->blocks[list]) * 16,
        .columns = (const char *)c->columns + l->blocks[list] * 16 * c->n_columns * code_bytes(c),
        .part = n ? list_part(s, list) : 0};
}

/* Scores OUT (CHUNK,) of the rows of a list from the first on; of those that are not there too. */
static void score_chunk(code_search *s, const code_list *codes, int64_t first, int32_t *scores) {
    const skivfpq_coded *c = s->rank.lists->coded;
    uint16_t sums[CHUNK] __attribute__((aligned(64)));
    float factor = term_factor(s), part = codes->part;
    const float *terms = c->terms ? c->terms + codes->position + first : NULL;
    int64_t n_rows = codes->n - first;
    if (terms && n_rows < CHUNK) memcpy(s->padded, terms, sizeof(float) * n_rows), terms = s->padded;
    s->sums(c, s->tables, codes->columns + first * code_bytes(c), codes->stride, sums);
    if (s->rank.lists->metric == BY_DISTANCE)
        for (int r = 0; r < CHUNK; r++) scores[r] = (int32_t)-(sums[r] + (terms[r] * factor + part));
    else if (s->rank.lists->metric == BY_COSINE)
        for (int r = 0; r < CHUNK; r++) scores[r] = (int32_t)-((sums[r] + part) * (terms[r] * factor));
    else
        for (int r = 0; r < CHUNK; r++) scores[r] = (int32_t)-(sums[r] + part);
}

/* The score of a row of a list by its products. */
static int32_t fine_score(const code_search *s, const code_list *codes, int64_t row) {
    const skivfpq_coded *c = s->rank.lists->coded;
    int64_t product = sum_products(c, s->products, codes->columns + row * code_bytes(c), codes->stride);
    double sum = (double)(s->all_highest - product) * s->ratio + codes->part;
    if (s->rank.lists->metric == BY_DISTANCE) sum += c->terms[codes->position + row] * term_factor(s);
    else if (s->rank.lists->metric == BY_COSINE) sum *= c->terms[codes->position + row] * term_factor(s);
    return (int32_t)-sum;
}

/* A threshold to begin with: by the k-th best score of the nearest list, or of the first of its rows. */
static void set_first_threshold(code_search *s, int64_t list) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    query_point *q = &s->state.point;
    int32_t scores[FIRST_ROWS + CHUNK] __attribute__((aligned(64)));
    int64_t n = l->offsets[list + 1] - l->offsets[list];
    n = n < FIRST_ROWS ? n : FIRST_ROWS;
    if (n < s->rank.k) return;
    code_list codes = codes_of(s, list);
    for (int64_t first = 0; first < n; first += CHUNK) score_chunk(s, &codes, first, scores + first);
    for (int64_t i = 0; c->allowed && i < n; i++) scores[i] = c->allowed[l->offsets[list] + i] ? scores[i] : -ABSENT;
    for (; n % 16; n++) scores[n] = -ABSENT;
    if (count_from(scores, n, 1 - ABSENT) < s->rank.k) return;
    int32_t kth = kth_score(scores, n, s->rank.k);
    set_threshold(q, highest_key(q, kth - c->n_subspaces - c->n_subspaces / 1000 - 3)); /* floors, and rounding */
}

static void fetch(const void *memory, int64_t size) {
    for (int64_t byte = 0; byte < size && byte < FETCHED_BYTES; byte += 64) __builtin_prefetch((const char *)memory + byte);
}

/* Brings what is read of a list nearer. */
static void fetch_list(const code_search *s, int64_t list) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    int64_t first = l->blocks[list] * 16, n = l->blocks[list + 1] * 16 - first, row_bytes = c->n_columns * code_bytes(c);
    fetch((const char *)c->columns + first * row_bytes, n * row_bytes);
    if (c->scaled_anchors) fetch(c->scaled_anchors + list * l->d, l->d * sizeof(float));
    if (c->terms) fetch(c->terms + l->offsets[list], n * sizeof(float));
}

static void scan_codes(code_search *s, int64_t list) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    query_state *q = &s->state;
    code_list codes = codes_of(s, list);
    for (int64_t first = 0; first < codes.n; first += CHUNK) {
        int32_t scores[CHUNK] __attribute__((aligned(64)));
        int64_t n_rows = codes.n - first < CHUNK ? codes.n - first : CHUNK;
        score_chunk(s, &codes, first, scores);
        for (int64_t r = 0; r < n_rows; r += 16)
            for (uint32_t hits = reaching(scores + r, q->point.threshold); hits; hits &= hits - 1) {
                int64_t i = r + __builtin_ctz(hits), position = codes.position + first + i;
                if (i >= n_rows || scores[i] < q->point.threshold || (c->allowed && !c->allowed[position])) continue;
                int32_t score = fine_score(s, &codes, first + i);
                if (score >= q->point.threshold) add_waiting(&s->rank, q, score, position);
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
    s.levels = take(scratch, &used, 2 * sizeof(int16_t) * c->pairs[c->n_subspaces]);
    s.products = take(scratch, &used, sizeof(int32_t) * n_entries);
    s.tables = take(scratch, &used, n_entries);
    s.highest = take(scratch, &used, sizeof(int32_t) * c->n_subspaces);
    s.rank.query = take(scratch, &used, sizeof(double) * lists->d);
    s.rank.row = take(scratch, &used, sizeof(double) * lists->d);
    if (!scratch) return used;
    s.sums = pick_sums(c);
    for (int64_t i = 0; i < queries->n; i++) {
        s.state = (query_state){.number = (int32_t)i, .waiting = waiting, .found = found};
        load_query(queries, i, lists->d, s.rank.query);
        unserved[i] = (lists->metric == BY_COSINE && is_zero(s.rank.query, lists->d)) || !set_tables(&s);
        if (unserved[i] || probes[i * n_probes] < 0) {
            unserved[i] = 1;
            continue;
        }
        set_first_threshold(&s, probes[i * n_probes]);
        for (int64_t p = 0; p < n_probes && probes[i * n_probes + p] >= 0; p++) {
            if (p + 1 < n_probes && probes[i * n_probes + p + 1] >= 0) fetch_list(&s, probes[i * n_probes + p + 1]);
            scan_codes(&s, probes[i * n_probes + p]);
        }
        make_room(&s.rank, &s.state), prepare(&s.rank, &s.state), settle(&s.rank, &s.state);
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

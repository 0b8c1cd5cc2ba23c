/* Asymmetric distance computation (Jegou et al. 2011, section 3.1): the nearest rows by their codes.
 *
 * A row is x = a + y: its list's anchor, and its codewords y_1 .. y_M side by side. With an origin o
 *
 *     |q - x|^2 = |q - a|^2 + t - 2 (q - o).y,   t = |y|^2 + 2 (a - o).y,   and   q.x = q.a + q.y,
 *
 * so that one table of the products of the query's parts with all codewords serves every list, and t is one number
 * for each row. Entries are cut down to whole steps, T = floor((h_m - (q - o)_m.y_m) / step), h_m the largest product
 * of a subspace: S, the sum of what the codes select, is a lower bound that lacks M steps at most,
 *
 *     |q - x|^2 >= |q - a|^2 - 2 h + t + 2 step S,   h the sum of h_m.
 *
 * Entries have up to three digits of 8 bits or fewer, each a table of its own: sums of the first digits
 * exclude most rows; those of the next ones are added where some are left. Minus the bound is the row's score. The few
 * rows that it does not exclude are decoded and their keys computed by differences: what is found is what float64
 * finds. */
#include "search.h"

#include "adc_sums.h"
#include "candidates.h"

#include <float.h>

#define FIRST_ROWS 512 /* of the nearest list, whose scores give the first threshold */
#define FETCHED_BYTES (1 << 13) /* of the next list */
#define TOO_LONG 1e12 /* for queries, scaled */
#define LONGEST_PART 32000. /* levels of a part of the query */
#define SHRINK (1 - 0x1p-22f) /* more than entries may be rounded up */
#define DIGITS 3
#define TOLERATED 0x1p-6 /* uncertainty of scores, of the squared distance to the nearest anchor; else they are finer */

typedef struct {
    ranking rank;
    query_state state;
    float *query;        /* (d,) q - o, scaled */
    int16_t *levels;     /* (2 n_pairs,) of the query */
    float *products;     /* (n_subspaces, n_codewords) scaled */
    float *highest;      /* (n_subspaces,) h_m, scaled */
    uint8_t *tables[DIGITS]; /* (n_subspaces, n_codewords) of entries, the first digits first */
    double *list_terms;  /* (n_probes,) |q - a|^2 / 2, or -q.a: what rows of a list have in their keys; scaled */
    double all_highest;  /* h, scaled */
    int n_digits, bits;  /* of entries, and of a digit */
    float per_step, per_term, per_product; /* scores in a step, in a row's term, in a scaled product */
    adc_sums *sums;
    float padded[CHUNK]; /* terms of the last rows of a list */
} code_search;

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4)));

/* sums + products of LANES pairs of levels with one; the lower and the higher of floats; 16 numbers as bytes. */
#if defined(__AVX512F__)
#if defined(__AVX512VNNI__)
#define ADD_PRODUCTS(sums, pairs, pair) (ints)_mm512_dpwssd_epi32((__m512i)(sums), (__m512i)(pairs), (__m512i)(pair))
#else
#define ADD_PRODUCTS(sums, pairs, pair) ((sums) + (ints)_mm512_madd_epi16((__m512i)(pairs), (__m512i)(pair)))
#endif
#define LOWER(a, b) ((floats)_mm512_min_ps((__m512)(a), (__m512)(b)))
#define HIGHER(a, b) ((floats)_mm512_max_ps((__m512)(a), (__m512)(b)))
static inline void store_bytes(const ints *numbers, uint8_t *bytes) {
    _mm_storeu_si128((__m128i *)bytes, _mm512_cvtepi32_epi8((__m512i)numbers[0]));
}
#elif defined(__AVX2__)
#define ADD_PRODUCTS(sums, pairs, pair) ((sums) + (ints)_mm256_madd_epi16((__m256i)(pairs), (__m256i)(pair)))
#define LOWER(a, b) ((floats)_mm256_min_ps((__m256)(a), (__m256)(b)))
#define HIGHER(a, b) ((floats)_mm256_max_ps((__m256)(a), (__m256)(b)))
static inline void store_bytes(const ints *numbers, uint8_t *bytes) {
    __m256i low = (__m256i)numbers[0], high = (__m256i)numbers[1];
    __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
    _mm_storeu_si128((__m128i *)bytes, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
#else
#define ADD_PRODUCTS(sums, pairs, pair)                                                              \
    ((sums) + ((pairs) << 16 >> 16) * ((pair) << 16 >> 16) + ((pairs) >> 16) * ((pair) >> 16))
#define LOWER(a, b) ((floats)((((a) < (b)) & (ints)(a)) | (((a) >= (b)) & (ints)(b))))
#define HIGHER(a, b) ((floats)((((a) < (b)) & (ints)(b)) | (((a) >= (b)) & (ints)(a))))
static inline void store_bytes(const ints *numbers, uint8_t *bytes) {
    for (int i = 0; i < 16; i++) bytes[i] = (uint8_t)numbers[i / LANES][i % LANES];
}
#endif

/* Products of a part of the query with LANES n_vectors codewords: of levels, or of floats. */
static inline __attribute__((always_inline)) void multiply_levels(const int16_t *part, int64_t n_pairs, const int16_t *words,
                                                                  int64_t n_codewords, float level, float *out,
                                                                  const int n_vectors) {
    ints sums[64 / LANES] = {{0}};
    for (int64_t j = 0; j < n_pairs; j++, words += 2 * n_codewords) {
        int32_t pair;
        memcpy(&pair, part + 2 * j, sizeof pair);
        for (int v = 0; v < n_vectors; v++)
            sums[v] = ADD_PRODUCTS(sums[v], ((const ints *)words)[v], (ints){0} + pair);
    }
    for (int v = 0; v < n_vectors; v++) ((floats *)out)[v] = __builtin_convertvector(sums[v], floats) * level;
}

static inline __attribute__((always_inline)) void multiply_floats(const float *part, int64_t width, const float *words,
                                                                  int64_t n_codewords, float *out, const int n_vectors) {
    floats sums[64 / LANES] = {{0}};
    for (int64_t j = 0; j < width; j++)
        for (int v = 0; v < n_vectors; v++) sums[v] += part[j] * ((const floats *)(words + j * n_codewords))[v];
    for (int v = 0; v < n_vectors; v++) ((floats *)out)[v] = sums[v];
}

/* The products of subspace m. level: of products of levels, or 0 for those of floats */
static void multiply_words(code_search *s, int64_t m, float level) {
    const skivfpq_coded *c = s->rank.lists->coded;
    int64_t first = c->features[m], width = c->features[m + 1] - first, n = c->n_codewords, k = 0;
    int64_t pair = c->pairs[m], n_pairs = c->pairs[m + 1] - pair;
    const int16_t *levels = c->levels + 2 * pair * n, *part = s->levels + 2 * pair;
    const float *words = c->scaled + first * n, *query = s->query + first;
    float *out = s->products + m * n;
    for (; level > 0 && k + 64 <= n; k += 64) multiply_levels(part, n_pairs, levels + 2 * k, n, level, out + k, 64 / LANES);
    for (; level > 0 && k < n; k += 16) multiply_levels(part, n_pairs, levels + 2 * k, n, level, out + k, 16 / LANES);
    for (; k + 64 <= n; k += 64) multiply_floats(query, width, words + k, n, out + k, 64 / LANES);
    for (; k < n; k += 16) multiply_floats(query, width, words + k, n, out + k, 16 / LANES);
}

/* The highest of some products, and how far below it the lowest is. n: a multiple of 16 */
static float find_range(const float *products, int64_t n, float *range) {
    floats low = *(const floats *)products, high = low;
    for (int64_t k = LANES; k < n; k += LANES) {
        floats some = *(const floats *)(products + k);
        low = LOWER(some, low), high = HIGHER(some, high);
    }
    float lowest = low[0], highest = high[0];
    for (int i = 1; i < LANES; i++) {
        lowest = low[i] < lowest ? low[i] : lowest;
        highest = high[i] > highest ? high[i] : highest;
    }
    *range = highest - lowest;
    return highest;
}

/* Entries of a table, floor((highest - products) scale) at most, digit by digit. */
static void round_table(const code_search *s, int64_t m, float scale) {
    int64_t n = s->rank.lists->coded->n_codewords;
    const float *products = s->products + m * n;
    for (int64_t k = 0; k < n; k += 16) {
        ints entries[16 / LANES], digits[16 / LANES];
        for (int v = 0; v < 16 / LANES; v++)
            entries[v] = __builtin_convertvector((s->highest[m] - ((const floats *)(products + k))[v]) * scale, ints);
        for (int digit = s->n_digits - 1; digit >= 0; digit--) {
            for (int v = 0; v < 16 / LANES; v++) digits[v] = entries[v] & ((1 << s->bits) - 1), entries[v] >>= s->bits;
            store_bytes(digits, s->tables[digit] + m * n + k);
        }
    }
}

/* The query that is loaded, scaled; returns its squared length, and that of its longest part. */
static double scale_query(code_search *s, double *longest_part) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    double sq_length = 0;
    *longest_part = 0;
    for (int64_t j = 0; j < l->d; j++) s->query[j] = (float)((s->rank.query[j] - c->origin[j]) / c->unit);
    for (int64_t m = 0; m < c->n_subspaces; m++) {
        double sq_part = 0;
        for (int64_t j = c->features[m]; j < c->features[m + 1]; j++) sq_part += (double)s->query[j] * s->query[j];
        sq_length += sq_part, *longest_part = fmax(*longest_part, sq_part);
    }
    *longest_part = sqrt(*longest_part);
    return sq_length;
}

/* The scaled query in levels. */
static void round_query(code_search *s, double level) {
    const skivfpq_coded *c = s->rank.lists->coded;
    float factor = (float)(1 / level);
    for (int64_t m = 0; m < c->n_subspaces; m++) {
        int64_t first = c->features[m], width = c->features[m + 1] - first;
        int16_t *levels = s->levels + 2 * c->pairs[m];
        for (int64_t j = 0; j < width; j++) levels[j] = (int16_t)rintf(s->query[first + j] * factor);
        if (width % 2) levels[width] = 0;
    }
}

static double dot(const double *x, const double *y, int64_t n) {
    terms4 sums = {0};
    double sum = 0;
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) sums += *(const terms4 *)(x + j) * *(const terms4 *)(y + j);
    for (; j < n; j++) sum += x[j] * y[j];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + sum;
}

/* What the rows of each list have in their keys; returns twice the least, and the most, of their sizes. */
static void set_list_terms(code_search *s, const int32_t *probes, int64_t n_probes, double *nearest, double *farthest) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    const double *query = s->rank.query;
    double scale = 1 / (c->unit * c->unit), term = l->metric == BY_DISTANCE ? dot(query, query, l->d) / 2 : 0;
    *nearest = INFINITY, *farthest = 0;
    for (int64_t p = 0; p < n_probes && probes[p] >= 0; p++) {
        if (c->anchors && l->metric == BY_DISTANCE) term = sq_distance(c->anchors, 1, probes[p], query, l->d) / 2;
        else if (c->anchors) term = -dot(c->anchors + probes[p] * l->d, query, l->d);
        s->list_terms[p] = term * scale;
        *nearest = fmin(*nearest, fabs(2 * term * scale)), *farthest = fmax(*farthest, fabs(2 * term * scale));
    }
}

/* Tables of the query that is loaded, and what its scores mean; returns 0 where they cannot serve. */
static int set_tables(code_search *s, const int32_t *probes, int64_t n_probes) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    query_point *q = &s->state.point;
    int64_t n = c->n_subspaces, widest = 0;
    int is_distance = l->metric == BY_DISTANCE;
    double longest_part, nearest, farthest, length = sqrt(scale_query(s, &longest_part));
    if (!(length < TOO_LONG)) return 0;
    set_list_terms(s, probes, n_probes, &nearest, &farthest);
    for (int64_t m = 0; m < n; m++) {
        int64_t width = c->features[m + 1] - c->features[m];
        widest = width > widest ? width : widest;
    }
    double level = fmax(longest_part / LONGEST_PART, 1e-30); /* products of levels, where they will do */
    double in_levels = 0.51 * sqrt((double)(widest * n)) * (c->level * length + level * (c->longest_word + c->level * widest));
    double coarse = 2. * n * longest_part * c->level * LONGEST_PART / (double)(255 * 256);
    int is_fine = is_distance && in_levels + coarse > TOLERATED * nearest;
    float range = 0, own;
    s->all_highest = 0;
    if (!is_fine) round_query(s, level);
    for (int64_t m = 0; m < n; m++) {
        multiply_words(s, m, is_fine ? 0 : (float)(level * c->level));
        s->highest[m] = find_range(s->products + m * c->n_codewords, c->n_codewords, &own);
        range = own > range ? own : range, s->all_highest += s->highest[m];
    }

    double reach = c->longest_word * (length + c->longest_anchor + c->longest_word), of_term = is_distance ? 2 : 1;
    s->bits = entry_bits(n, c->n_codewords), s->n_digits = is_fine ? 3 : 2;
    double step = fmax(range / (double)((1 << s->bits) - 1), 1e-8 * (reach + farthest) + 1e-30);
    double places = ldexp(1, s->bits * (s->n_digits - 1)); /* the last digit's in a step */
    for (int64_t m = 0; m < n; m++) round_table(s, m, (float)(places / step) * SHRINK);

    double score = fmax(step / places, 8 * (reach + farthest) / LARGEST_SCORE); /* of scaled products */
    double key = l->metric == BY_COSINE ? c->unit * c->largest_term : c->unit * c->unit; /* of scaled products */
    double floats = (reach + farthest) * 8 * FLT_EPSILON;
    floats += is_fine ? (widest + 2) * FLT_EPSILON * length * c->longest_word : in_levels;
    floats += n * step * (1.01 / places + 255 * 0x1p-21);
    double decoded = c->rounding * c->reach / c->unit;
    decoded *= is_distance ? sqrt(farthest) + c->longest_word + decoded : length;
    if (!is_distance) decoded += LARGEST_SUM_ERROR * length * c->reach / c->unit; /* of dot */
    s->per_step = (float)(step / score), s->per_product = (float)(1 / score);
    s->per_term = (float)(is_distance ? 0.5 / score : 1 / c->largest_term);
    q->metric = l->metric, q->is_linear = 1, q->threshold = INT32_MIN;
    q->unit = key * score * of_term, q->base = l->metric == BY_COSINE ? -1 : 0;
    q->slack = 2 * q->unit + key * (of_term * floats + decoded) - q->base * c->rounding;
    q->slack = q->slack * (1 + ROUNDING) + TINY * TINY;
    return 1;
}

/* The codes of a list. */
typedef struct {
    int64_t n, position, stride; /* rows, and the first of them; from one column to the next */
    const char *columns;
    float part; /* of all rows in their scores */
} code_list;

static code_list codes_of(const code_search *s, int64_t list, double list_term) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    int64_t first = l->offsets[list];
    return (code_list){
        .n = l->offsets[list + 1] - first, .position = first, .stride = (l->blocks[list + 1] - l->blocks[list]) * 16,
        .columns = (const char *)c->columns + l->blocks[list] * 16 * c->n_columns * code_bytes(c),
        .part = (float)((list_term - s->all_highest) * s->per_product)};
}

/* Scores OUT (CHUNK,) of the rows of a list from the first on, and of some behind the last: by all digits if one of
 * them, by the first ones, reaches the threshold. Returns whether any does. */
static int score_chunk(code_search *s, const code_list *codes, int64_t first, int32_t *scores) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_coded *c = l->coded;
    const float *terms = c->terms ? c->terms + codes->position + first : NULL;
    int64_t n_rows = codes->n - first;
    float sums[CHUNK] = {0}, place = s->per_step, part = codes->part, per_term = s->per_term;
    if (terms && n_rows < CHUNK) memcpy(s->padded, terms, sizeof(float) * n_rows), terms = s->padded;
    for (int digit = 0; digit < s->n_digits; digit++, place /= (float)(1 << s->bits)) {
        uint16_t digits[CHUNK] __attribute__((aligned(64)));
        uint32_t any = 0;
        s->sums(c, s->tables[digit], codes->columns + first * code_bytes(c), codes->stride, n_rows, digits);
        for (int64_t r = n_rows; r < CHUNK; r++) digits[r] = 0; /* those that are not there */
        for (int r = 0; r < CHUNK; r++) sums[r] += digits[r] * place;
        if (l->metric == BY_DISTANCE)
            for (int r = 0; r < CHUNK; r++) scores[r] = (int32_t)-(sums[r] + (terms[r] * per_term + part));
        else if (l->metric == BY_COSINE)
            for (int r = 0; r < CHUNK; r++) scores[r] = (int32_t)-((sums[r] + part) * (terms[r] * per_term));
        else
            for (int r = 0; r < CHUNK; r++) scores[r] = (int32_t)-(sums[r] + part);
        for (int r = 0; r < CHUNK && r < n_rows; r += 16) any |= reaching(scores + r, s->state.point.threshold);
        if (!any) return 0;
    }
    return 1;
}

/* Rows of some scores that may win, to wait. */
static void add_rows(code_search *s, const code_list *codes, int64_t first, int64_t n_rows, const int32_t *scores) {
    const uint8_t *allowed = s->rank.lists->coded->allowed;
    query_state *q = &s->state;
    for (int64_t r = 0; r < n_rows; r += 16)
        for (uint32_t hits = reaching(scores + r, q->point.threshold); hits; hits &= hits - 1) {
            int64_t i = r + __builtin_ctz(hits), position = codes->position + first + i;
            if (i < n_rows && scores[i] >= q->point.threshold && (!allowed || allowed[position]))
                add_waiting(&s->rank, q, scores[i], position);
        }
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
    if (c->terms) fetch(c->terms + l->offsets[list], n * sizeof(float));
}

/* Rows of a list from the first on. */
static void scan_codes(code_search *s, const code_list *codes, int64_t first) {
    int32_t scores[CHUNK] __attribute__((aligned(64)));
    for (; first < codes->n; first += CHUNK)
        if (score_chunk(s, codes, first, scores))
            add_rows(s, codes, first, codes->n - first < CHUNK ? codes->n - first : CHUNK, scores);
}

/* The nearest list, or the first of its rows: their k-th best score gives a threshold to begin with. Returns how many. */
static int64_t scan_first(code_search *s, const code_list *codes) {
    const skivfpq_coded *c = s->rank.lists->coded;
    query_point *q = &s->state.point;
    int32_t scores[FIRST_ROWS + CHUNK] __attribute__((aligned(64)));
    int64_t n_rows = codes->n < FIRST_ROWS ? codes->n : FIRST_ROWS, n = n_rows;
    for (int64_t first = 0; first < n; first += CHUNK) score_chunk(s, codes, first, scores + first);
    for (int64_t i = 0; c->allowed && i < n; i++) scores[i] = c->allowed[codes->position + i] ? scores[i] : -ABSENT;
    for (; n % 16; n++) scores[n] = -ABSENT;
    if (count_from(scores, n, 1 - ABSENT) >= s->rank.k) set_threshold(q, highest_key(q, kth_score(scores, n, s->rank.k, s->rank.k / 8)));
    add_rows(s, codes, 0, n_rows, scores);
    return n_rows;
}

/* All lists that a query probes, the nearest first. */
static void scan_lists(code_search *s, const int32_t *probes, int64_t n_probes) {
    const skivfpq_lists *l = s->rank.lists;
    for (int64_t p = 0; p < n_probes && probes[p] >= 0; p++) {
        code_list codes = codes_of(s, probes[p], s->list_terms[p]);
        if (p + 1 < n_probes && probes[p + 1] >= 0) fetch_list(s, probes[p + 1]);
        for (int64_t i = l->stray_offsets[probes[p]]; i < l->stray_offsets[probes[p] + 1]; i++)
            evaluate(&s->rank, &s->state, l->strays[i]);
        scan_codes(s, &codes, p == 0 ? scan_first(s, &codes) : 0);
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
    s.products = take(scratch, &used, sizeof(float) * n_entries);
    for (int digit = 0; digit < DIGITS; digit++) s.tables[digit] = take(scratch, &used, n_entries);
    s.highest = take(scratch, &used, sizeof(float) * c->n_subspaces);
    s.list_terms = take(scratch, &used, sizeof(double) * n_probes);
    s.rank.query = take(scratch, &used, sizeof(double) * lists->d);
    s.rank.row = take(scratch, &used, sizeof(double) * lists->d);
    s.rank.scores = take(scratch, &used, sizeof(int32_t) * (capacity + 16));
    s.rank.others = take(scratch, &used, sizeof(waiting_row) * capacity);
    if (!scratch) return used;
    s.sums = pick_sums(c);
    for (int64_t i = 0; i < queries->n; i++) {
        s.state = (query_state){.number = (int32_t)i, .waiting = waiting, .found = found};
        load_query(queries, i, lists->d, s.rank.query);
        const int32_t *own = probes + i * n_probes;
        unserved[i] = own[0] < 0 || (lists->metric == BY_COSINE && is_zero(s.rank.query, lists->d));
        if (unserved[i] || (unserved[i] = !set_tables(&s, own, n_probes))) continue;
        scan_lists(&s, own, n_probes);
        settle(&s.rank, &s.state);
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
        query_state state = {.found = found, .point = {.unit = 1, .threshold = INT32_MAX}};
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

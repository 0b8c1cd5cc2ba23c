/* The certified search: exact neighbours in the lists that queries probe, most rows being excluded by a bound
 * on 8-bit products (queries.h), the few others evaluated in float64.
 *
 * A query has two sets: rows that wait, known by their score, and up to k rows found, known exactly. The k-th best
 * of either bounds what can still win: the threshold. Where rows wait in vain for a better threshold, in dense or
 * duplicated regions, they are evaluated, which leaves k of them. */
#include "search.h"

#include "queries.h"

#include <stdlib.h>

#define EXTRA 64       /* rows that wait beyond 2 k */
#define AHEAD 4        /* rows fetched before they are needed */

typedef struct {
    int32_t score, position;
} waiting_row;

typedef struct {
    double key;
    int32_t id, position;
} found_row;

/* The two sets of a query. */
typedef struct {
    const double *query; /* (d,) */
    query_point point;
    int32_t n_waiting, n_found;
    waiting_row *waiting; /* (capacity,) */
    found_row *found;    /* (k,) a heap, the farthest on top */
} query_state;

typedef struct {
    const skivfpq_lists *lists;
    int64_t k, capacity;
    query_state *states;
    int8_t *points;      /* (n_queries, 4 units) b */
    int8_t *panel;       /* of COLUMNS queries */
    double *row;         /* (d,) scratch */
} search;

/* ---- rows found: a heap, the farthest on top */

static inline int is_farther(found_row a, found_row b) { return a.key > b.key || (a.key == b.key && a.id > b.id); }

/* Lets a row sink from a place of the heap. */
static void sink(found_row *heap, int64_t n, int64_t place, found_row row) {
    for (int64_t child = 2 * place + 1; child < n; child = 2 * place + 1) {
        if (child + 1 < n && is_farther(heap[child + 1], heap[child])) child++;
        if (!is_farther(heap[child], row)) break;
        heap[place] = heap[child], place = child;
    }
    heap[place] = row;
}

static void rise(found_row *heap, int64_t place, found_row row) {
    for (int64_t parent = (place - 1) / 2; place > 0 && is_farther(row, heap[parent]); parent = (place - 1) / 2)
        heap[place] = heap[parent], place = parent;
    heap[place] = row;
}

static void evaluate(search *s, query_state *q, int64_t position) {
    found_row row = {exact_key(s->lists, q->query, position, s->row), s->lists->ids[position], (int32_t)position};
    if (q->n_found < s->k) {
        rise(q->found, q->n_found, row);
        if (++q->n_found < s->k) return;
    } else if (is_farther(q->found[0], row)) sink(q->found, s->k, 0, row);
    else return;
    set_threshold(s->lists, &q->point, q->found[0].key);
}

/* ---- rows that wait */

/* Brings the n best scores to the front (Hoare's selection). */
static void select_best(waiting_row *rows, int64_t n_rows, int64_t n) {
    int64_t first = 0, last = n_rows - 1;
    while (first < last) {
        int32_t pivot = rows[first + (last - first) / 2].score;
        int64_t i = first, j = last;
        while (i <= j) {
            while (rows[i].score > pivot) i++;
            while (rows[j].score < pivot) j--;
            if (i <= j) {
                waiting_row row = rows[i];
                rows[i++] = rows[j], rows[j--] = row;
            }
        }
        if (n - 1 <= j) last = j;
        else if (n - 1 >= i) first = i;
        else return;
    }
}

/* Evaluates the rows from..to that may still win. */
static void evaluate_waiting(search *s, query_state *q, int64_t from, int64_t to) {
    for (int64_t i = from; i < to && i < from + AHEAD; i++) fetch_row(s->lists, q->waiting[i].position);
    for (int64_t i = from; i < to; i++) {
        if (i + AHEAD < to && q->waiting[i + AHEAD].score >= q->point.threshold)
            fetch_row(s->lists, q->waiting[i + AHEAD].position);
        if (q->waiting[i].score >= q->point.threshold) evaluate(s, q, q->waiting[i].position);
    }
}

/* Evaluates all that wait, the k best scores first. */
static void settle(search *s, query_state *q) {
    int64_t n_best = q->n_waiting < s->k ? q->n_waiting : s->k;
    select_best(q->waiting, q->n_waiting, n_best);
    evaluate_waiting(s, q, 0, n_best);
    evaluate_waiting(s, q, n_best, q->n_waiting);
    q->n_waiting = 0;
}

/* Drops rows that cannot win any more; evaluates all where those are too few. */
static void make_room(search *s, query_state *q) {
    if (q->n_waiting >= s->k) {
        int32_t kth = INT32_MAX;
        select_best(q->waiting, q->n_waiting, s->k);
        for (int64_t i = 0; i < s->k; i++) kth = q->waiting[i].score < kth ? q->waiting[i].score : kth;
        set_threshold(s->lists, &q->point, highest_key(s->lists, &q->point, kth));
    }
    int32_t n = 0;
    for (int64_t i = 0; i < q->n_waiting; i++)
        if (q->waiting[i].score >= q->point.threshold) q->waiting[n++] = q->waiting[i];
    q->n_waiting = n;
    if (n > s->capacity - EXTRA / 2) settle(s, q);
}

static inline void add_waiting(search *s, query_state *q, int32_t score, int64_t position) {
    if (q->n_waiting == s->capacity) {
        make_room(s, q);
        if (score < q->point.threshold) return;
    }
    q->waiting[q->n_waiting++] = (waiting_row){score, (int32_t)position};
}

/* The score of a row of a block, in 32 bits on all instruction sets. */
static int32_t plain_score(const skivfpq_lists *l, int64_t block, int r, const int8_t *point, int32_t sum) {
    const uint8_t *codes = l->codes + block * l->units * 64 + r * 4;
    int32_t score = -128 * sum - l->terms[block * BLOCK + r];
    for (int64_t u = 0; u < l->units; u++, codes += 64, point += 4)
        score += codes[0] * point[0] + codes[1] * point[1] + codes[2] * point[2] + codes[3] * point[3];
    return score;
}

/* A threshold to start with: the worst of the first k rows of the nearest lists. */
static int set_first_threshold(search *s, query_state *q, const int8_t *point, const int32_t *probes, int64_t n_probes) {
    const skivfpq_lists *l = s->lists;
    int32_t kth = INT32_MAX;
    int64_t n = 0;
    for (int64_t p = 0; p < n_probes && probes[p] >= 0 && n < s->k; p++)
        for (int64_t b = l->blocks[probes[p]]; b < l->blocks[probes[p] + 1]; b++)
            for (int r = 0; r < BLOCK && n < s->k; r++) {
                if (l->terms[b * BLOCK + r] == ABSENT) continue;
                int32_t score = plain_score(l, b, r, point, q->point.sum);
                kth = score < kth ? score : kth, n++;
            }
    return n == s->k && set_threshold(s->lists, &q->point, highest_key(s->lists, &q->point, kth));
}

/* Its keys are 1 whatever the rows' points are. */
static int is_zero(const double *query, int64_t d) {
    for (int64_t j = 0; j < d; j++)
        if (query[j] != 0) return 0;
    return 1;
}

/* ---- the scan */

/* Some queries of a list against all its rows; queries: their numbers. */
static void scan_panel(search *s, int64_t list, const int32_t *queries, int n) {
    const skivfpq_lists *l = s->lists;
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    int32_t starts[COLUMNS], thresholds[COLUMNS], caps[BLOCK], cap = 0;
    uint16_t hits[COLUMNS + 3] = {0};
    query_state *states[COLUMNS];
    const int8_t *points[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) starts[c] = INT32_MIN / 2;
    for (int c = 0; c < n; c++) {
        points[c] = s->points + queries[c] * l->units * 4;
        states[c] = s->states + queries[c];
        thresholds[c] = states[c]->point.threshold, starts[c] = -128 * states[c]->point.sum - thresholds[c];
        cap = states[c]->point.cap > cap ? states[c]->point.cap : cap;
    }
    fill_panel(points, n, l->units, s->panel);
    for (int r = 0; r < BLOCK; r++) caps[r] = cap;
    for (int64_t b = l->blocks[list]; b < l->blocks[list + 1]; b++) {
        const int32_t *terms = l->terms + b * BLOCK;
        if (!score_block(l->codes + b * l->units * 64, s->panel, starts, l->units, n, terms, caps, out, hits)) continue;
        int64_t first = l->offsets[list] + (b - l->blocks[list]) * BLOCK;
        for (int c = 0; c < n; c++) {
            query_state *q = states[c];
            int may_wrap = WRAPS && (double)cap + thresholds[c] + q->point.reach > SPAN;
            for (uint32_t left = hits[c]; left; left &= left - 1) {
                int r = __builtin_ctz(left);
                if (terms[r] == ABSENT) continue;
                int32_t score = may_wrap ? plain_score(l, b, r, points[c], q->point.sum) : out[c][r] + thresholds[c];
                if (score >= q->point.threshold) add_waiting(s, q, score, first + r);
            }
            if (q->point.threshold > thresholds[c])
                thresholds[c] = q->point.threshold, starts[c] = -128 * q->point.sum - thresholds[c];
        }
    }
}

static void scan_list(search *s, int64_t list, const int32_t *queries, int64_t n) {
    const skivfpq_lists *l = s->lists;
    for (int64_t i = 0; i < n; i += COLUMNS)
        scan_panel(s, list, queries + i, n - i < COLUMNS ? (int)(n - i) : COLUMNS);
    for (int64_t i = l->stray_offsets[list]; i < l->stray_offsets[list + 1]; i++)
        for (int64_t c = 0; c < n; c++) evaluate(s, s->states + queries[c], l->strays[i]);
}

/* Some columns of the probes, list by list. starts: (n_lists + 2,), order: (n_queries * (last - first),) scratch. */
static void scan_probes(search *s, const int32_t *probes, int64_t n, int64_t n_probes, int64_t first, int64_t last,
                        const uint8_t *unserved, int64_t *starts, int32_t *order) {
    int64_t n_lists = s->lists->n_lists;
    memset(starts, 0, sizeof(int64_t) * (n_lists + 2));
#define EACH_PAIR(DO)                                                                                \
    for (int64_t i = 0; i < n; i++)                                                                  \
        for (int64_t p = first; p < last && !unserved[i] && probes[i * n_probes + p] >= 0; p++) {    \
            int32_t list = probes[i * n_probes + p];                                                 \
            DO;                                                                                      \
        }
    EACH_PAIR(starts[list + 2]++)
    for (int64_t l = 0; l < n_lists; l++) starts[l + 2] += starts[l + 1];
    EACH_PAIR(order[starts[list + 1]++] = (int32_t)i)
    for (int64_t l = 0; l < n_lists; l++)
        if (starts[l + 1] > starts[l]) scan_list(s, l, order + starts[l], starts[l + 1] - starts[l]);
}

/* Takes the rows found, nearest first. */
static void take_found(search *s, query_state *q, double *keys, int64_t *positions) {
    for (int64_t n = s->k - 1; n >= 0; n--) {
        keys[n] = q->found[0].key, positions[n] = q->found[0].position;
        sink(q->found, n, 0, q->found[n]);
    }
}

int SEARCH_LISTS(const skivfpq_lists *lists, const double *queries, int64_t n, const int32_t *probes, int64_t n_probes,
                 int64_t k, double *keys, int64_t *positions, uint8_t *unserved) {
    int64_t capacity = 2 * k + EXTRA, width = lists->units * 4;
    search s = {.lists = lists, .k = k, .capacity = capacity};
    s.states = malloc(sizeof(query_state) * n);
    s.points = calloc(n, width);
    s.panel = calloc(COLUMNS, width);
    s.row = malloc(sizeof(double) * lists->d);
    waiting_row *waiting = malloc(sizeof(waiting_row) * n * capacity);
    found_row *found = malloc(sizeof(found_row) * n * k);
    int64_t *starts = malloc(sizeof(int64_t) * (lists->n_lists + 2));
    int32_t *order = malloc(sizeof(int32_t) * n * n_probes);
    int failed = !s.states || !s.points || !s.panel || !s.row || !waiting || !found || !starts || !order;
    begin_scan();
    for (int64_t i = 0; i < n && !failed; i++) {
        query_state *q = s.states + i;
        *q = (query_state){.query = queries + i * lists->d, .waiting = waiting + i * capacity, .found = found + i * k};
        set_query(lists, q->query, s.points + i * width, &q->point);
        unserved[i] = (lists->metric == BY_COSINE && is_zero(q->query, lists->d)) ||
                      !set_first_threshold(&s, q, s.points + i * width, probes + i * n_probes, n_probes);
    }
    if (!failed) {
        scan_probes(&s, probes, n, n_probes, 0, 1, unserved, starts, order);
        scan_probes(&s, probes, n, n_probes, 1, n_probes, unserved, starts, order);
    }
    for (int64_t i = 0; i < n && !failed; i++) {
        if (unserved[i]) continue;
        settle(&s, s.states + i);
        take_found(&s, s.states + i, keys + i * k, positions + i * k);
    }
    end_scan();
    free(s.states), free(s.points), free(s.panel), free(s.row), free(waiting), free(found), free(starts), free(order);
    return failed ? -1 : 0;
}

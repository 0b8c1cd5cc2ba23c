/* The certified search: exact neighbours in the lists that queries probe, most rows being excluded by a bound
 * on 8-bit products (queries.h), the few others evaluated in float64. */
#include "search.h"

#include "candidates.h"
#include "queries.h"

int64_t QUERY_LEVELS(int64_t width) { return query_levels(width); }

#define FIRST_BLOCKS 64 /* of the nearest list, whose scores give the first threshold */

typedef struct {
    ranking rank;
    query_state *states;
    waiting_row *waiting; /* (n_queries, capacity) */
    found_row *found;    /* (n_queries, k) */
    column_level *points; /* (n_queries, 4 units) b */
    column_level *panel; /* of COLUMNS queries */
    int32_t *scores;     /* (COLUMNS, places of FIRST_BLOCKS) */
    int32_t *places;     /* (places of FIRST_BLOCKS,) */
    int64_t *starts;     /* (n_lists + 2,) */
    int32_t *order;      /* (n_queries * n_probes,) */
    int32_t *nearest;    /* (n_queries,) those to be searched, by their nearest lists */
    int64_t n_nearest;
} search;

/* The score of a row of a block. */
static int32_t plain_score(const skivfpq_lists *l, int64_t block, int r, const column_level *point, int32_t sum) {
    const uint8_t *codes = l->codes + block * l->units * 64 + r * 4;
    int32_t score = -128 * sum - l->terms[block * BLOCK + r];
    for (int64_t u = 0; u < l->units; u++, codes += 64, point += 4)
        for (int i = 0; i < 4; i++) score += codes[i] * point[UNIT_PLACE(i)];
    return score;
}

/* Thresholds to start with: the k-th best of the nearest list, or of the first of its rows. Where those are all, they
 * wait at once, and the list has been seen. queries: their numbers. */
static void see_nearest(search *s, int64_t list, const int32_t *queries, int n) {
    const skivfpq_lists *l = s->rank.lists;
    int64_t first = l->blocks[list], all = l->blocks[list + 1] - first, n_blocks = all, places;
    const query_point *points[COLUMNS];
    n_blocks = n_blocks < FIRST_BLOCKS ? n_blocks : FIRST_BLOCKS, places = n_blocks * BLOCK;
    for (int c = 0; c < n; c++) points[c] = &s->states[queries[c]].point;
    score_all(l, first, n_blocks, points, n, s->panel, s->scores);
    for (int c = 0; c < n; c++) {
        query_state *q = s->states + queries[c];
        const int32_t *scores = s->scores + c * places;
        if (count_from(scores, places, 1 - ABSENT) < s->rank.k) continue;
        set_threshold(&q->point, highest_key(&q->point, kth_score(scores, places, s->rank.k, s->rank.k / 8)));
        if (q->point.threshold == INT32_MIN || n_blocks < all) continue;
        int64_t n_left = places_between(scores, places, q->point.threshold, INT32_MAX, s->places);
        for (int64_t i = 0; i < n_left; i++)
            add_waiting(&s->rank, q, scores[s->places[i]], l->offsets[list] + s->places[i]);
        q->seen = (int32_t)list;
    }
}

/* Where that list cannot tell: the worst of the first k rows of the nearest lists. */
static int set_any_threshold(search *s, int64_t query, const int32_t *probes, int64_t n_probes) {
    const skivfpq_lists *l = s->rank.lists;
    query_state *q = s->states + query;
    const column_level *point = s->points + query * l->units * 4;
    int32_t kth = INT32_MAX;
    int64_t n = 0;
    for (int64_t p = 0; p < n_probes && probes[p] >= 0 && n < s->rank.k; p++)
        for (int64_t b = l->blocks[probes[p]]; b < l->blocks[probes[p] + 1]; b++)
            for (int r = 0; r < BLOCK && n < s->rank.k; r++) {
                if (l->terms[b * BLOCK + r] == ABSENT) continue;
                int32_t score = plain_score(l, b, r, point, q->point.sum);
                kth = score < kth ? score : kth, n++;
            }
    return n == s->rank.k && set_threshold(&q->point, highest_key(&q->point, kth));
}

/* ---- the scan */

/* Some queries of a list, whose points are in the panel, against all its rows; queries: their numbers. */
static void scan_panel(search *s, int64_t list, const int32_t *queries, int n) {
    const skivfpq_lists *l = s->rank.lists;
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    int32_t starts[COLUMNS], thresholds[COLUMNS];
    uint16_t hits[HITS] = {0};
    query_state *states[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) starts[c] = INT32_MIN / 2;
    for (int c = 0; c < n; c++) {
        states[c] = s->states + queries[c];
        thresholds[c] = states[c]->point.threshold, starts[c] = -128 * states[c]->point.sum - thresholds[c];
    }
    for (int64_t b = l->blocks[list]; b < l->blocks[list + 1]; b++) {
        const int32_t *terms = l->terms + b * BLOCK;
        if (!score_block(l->codes + b * l->units * 64, s->panel, starts, l->units, n, terms, NULL, out, hits)) continue;
        int64_t first = l->offsets[list] + (b - l->blocks[list]) * BLOCK;
        for (int four = 0; four < n; four += 4)
            for (uint64_t left = hits_of_four(hits + four, n - four); left; left &= left - 1) {
                int hit = __builtin_ctzll(left), r = hit % BLOCK, c = four + hit / BLOCK;
                query_state *q = states[c];
                if (terms[r] == ABSENT) continue;
                int32_t score = out[c][r] + thresholds[c];
                if (score >= q->point.threshold) add_waiting(&s->rank, q, score, first + r);
            }
        for (int c = 0; c < n; c++)
            thresholds[c] = states[c]->point.threshold, starts[c] = -128 * states[c]->point.sum - thresholds[c];
    }
}

typedef void scan_function(search *, int64_t list, const int32_t *queries, int n);

/* Calls a function with each list and the queries that probe it and have not seen it, some at a time, their points in the
 * panel. */
static void each_panel(search *s, scan_function *scan) {
    const skivfpq_lists *l = s->rank.lists;
    const column_level *points[COLUMNS];
    int32_t queries[COLUMNS];
    for (int64_t list = 0; list < l->n_lists; list++)
        for (int64_t i = s->starts[list], stop = s->starts[list + 1]; i < stop;) {
            int n = 0;
            for (; i < stop && n < COLUMNS; i++)
                if (s->states[s->order[i]].seen != list)
                    points[n] = s->points + s->order[i] * l->units * 4, queries[n++] = s->order[i];
            if (n == 0) break;
            fill_panel(points, n, l->units, s->panel);
            scan(s, list, queries, n);
        }
}

static void evaluate_strays(search *s) {
    const skivfpq_lists *l = s->rank.lists;
    for (int64_t list = 0; list < l->n_lists; list++)
        for (int64_t i = l->stray_offsets[list]; i < l->stray_offsets[list + 1]; i++)
            for (int64_t j = s->starts[list]; j < s->starts[list + 1]; j++) {
                load_query(s->rank.queries, s->order[j], l->d, s->rank.query);
                evaluate(&s->rank, s->states + s->order[j], l->strays[i]);
            }
}

/* The first n_columns of the probes by list: the queries of a list are order[starts[list]..starts[list + 1]]. */
static void sort_probes(search *s, const int32_t *probes, int64_t n_probes, int64_t n_columns,
                        const uint8_t *unserved) {
    int64_t n_lists = s->rank.lists->n_lists, *starts = s->starts;
    memset(starts, 0, sizeof(int64_t) * (n_lists + 2));
#define EACH_PAIR(DO)                                                                                \
    for (int64_t i = 0; i < s->rank.queries->n; i++)                                                      \
        for (int64_t p = 0; p < n_columns && !unserved[i] && probes[i * n_probes + p] >= 0; p++) {   \
            int32_t list = probes[i * n_probes + p];                                                 \
            DO;                                                                                      \
        }
    EACH_PAIR(starts[list + 2]++)
    for (int64_t list = 0; list < n_lists; list++) starts[list + 2] += starts[list + 1];
    EACH_PAIR(s->order[starts[list + 1]++] = (int32_t)i)
}

/* One query, list by list as they come, the nearest first. */
static void search_one(search *s, const int32_t *probes, int64_t n_probes, uint8_t *unserved) {
    const skivfpq_lists *l = s->rank.lists;
    const int32_t query = 0;
    const column_level *point = s->points;
    s->nearest[0] = query, s->n_nearest = 1;
    fill_panel(&point, 1, l->units, s->panel);
    if (probes[0] >= 0 && !*unserved) see_nearest(s, probes[0], &query, 1);
    if (s->states->point.threshold == INT32_MIN) *unserved |= !set_any_threshold(s, 0, probes, n_probes);
    load_query(s->rank.queries, 0, l->d, s->rank.query);
    for (int64_t p = 0; p < n_probes && probes[p] >= 0 && !*unserved; p++) {
        for (int64_t i = l->stray_offsets[probes[p]]; i < l->stray_offsets[probes[p] + 1]; i++)
            evaluate(&s->rank, s->states, l->strays[i]);
        if (probes[p] != s->states->seen) scan_panel(s, probes[p], &query, 1);
    }
}

/* Many queries, all that probe a list together. */
static void search_many(search *s, const int32_t *probes, int64_t n_probes, uint8_t *unserved) {
    sort_probes(s, probes, n_probes, 1, unserved);
    s->n_nearest = s->starts[s->rank.lists->n_lists];
    memcpy(s->nearest, s->order, sizeof(int32_t) * s->n_nearest);
    each_panel(s, see_nearest);
    for (int64_t i = 0; i < s->rank.queries->n; i++)
        if (s->states[i].point.threshold == INT32_MIN)
            unserved[i] |= !set_any_threshold(s, i, probes + i * n_probes, n_probes);
    sort_probes(s, probes, n_probes, n_probes, unserved);
    evaluate_strays(s);
    each_panel(s, scan_panel);
}

/* Evaluates what still waits, and takes what was found: of queries of a list together, since they share rows. */
static void finish(search *s, uint8_t *unserved, double *keys, int64_t *positions) {
    for (int64_t i = 0; i <= s->n_nearest; i++) {
        if (i < s->n_nearest) prepare(&s->rank, s->states + s->nearest[i]);
        if (i == 0 || unserved[s->nearest[i - 1]]) continue;
        int32_t query = s->nearest[i - 1]; /* its rows have come while the next was prepared */
        settle(&s->rank, s->states + query);
        unserved[query] = s->states[query].n_found < s->rank.k;
        if (!unserved[query])
            take_found(&s->rank, s->states + query, keys + query * s->rank.k, positions + query * s->rank.k);
    }
}

int64_t SEARCH_LISTS(const skivfpq_lists *lists, const skivfpq_queries *queries, const int32_t *probes,
                     int64_t n_probes, int64_t k, double *keys, int64_t *positions, uint8_t *unserved, char *scratch) {
    if (lists->coded) return SEARCH_CODES(lists, queries, probes, n_probes, k, keys, positions, unserved, scratch);
    int64_t n = queries->n, width = lists->units * 4, used = 0, capacity = 2 * k + EXTRA;
    search s = {.rank = {.lists = lists, .queries = queries, .k = k, .capacity = capacity}};
    s.states = take(scratch, &used, sizeof(query_state) * n);
    s.waiting = take(scratch, &used, sizeof(waiting_row) * n * capacity);
    s.found = take(scratch, &used, sizeof(found_row) * n * k);
    s.points = take(scratch, &used, sizeof(column_level) * n * width);
    s.panel = take(scratch, &used, sizeof(column_level) * COLUMNS * width);
    s.scores = take(scratch, &used, sizeof(int32_t) * (n < COLUMNS ? n : COLUMNS) * FIRST_BLOCKS * BLOCK);
    s.places = take(scratch, &used, sizeof(int32_t) * FIRST_BLOCKS * BLOCK);
    s.starts = take(scratch, &used, sizeof(int64_t) * (lists->n_lists + 2));
    s.order = take(scratch, &used, sizeof(int32_t) * n * n_probes);
    s.nearest = take(scratch, &used, sizeof(int32_t) * n);
    s.rank.query = take(scratch, &used, sizeof(double) * lists->d);
    s.rank.row = take(scratch, &used, sizeof(double) * lists->d);
    if (!scratch) return used;
    memset(s.panel, 0, sizeof(column_level) * COLUMNS * width);
    begin_scan();
    for (int64_t i = 0; i < n; i++) {
        query_state *q = s.states + i;
        *q = (query_state){.number = (int32_t)i, .seen = -1, .waiting = s.waiting + i * capacity, .found = s.found + i * k};
        load_query(queries, i, lists->d, s.rank.query);
        set_query(lists, s.rank.query, s.points + i * width, &q->point);
        unserved[i] = lists->metric == BY_COSINE && is_zero(s.rank.query, lists->d);
    }
    if (n == 1) search_one(&s, probes, n_probes, unserved);
    else search_many(&s, probes, n_probes, unserved);
    finish(&s, unserved, keys, positions);
    end_scan();
    return 0;
}

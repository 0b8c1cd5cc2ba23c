/* The certified search: exact neighbours in the lists that queries probe, most rows being excluded by a bound
 * on 8-bit products (queries.h), the few others evaluated in float64. */
#include "search.h"

#include "candidates.h"
#include "queries.h"

int64_t QUERY_LEVELS(int64_t width) { return query_levels(width); }

#define FIRST_BLOCKS 64 /* of the nearest list, whose scores give the first threshold */
#define NEAR 128        /* rows that heads let pass, looked at together */
#define NEARER 8        /* of them, fetched before they are needed */
#define FEW_QUERIES 4   /* of a list, whose rows are not in the cache then */
#define EMBEDDED 64     /* queries at a time */
#define HEAD_COST 3200.0 /* of a query, for each feature, in features of rows that panels score */

typedef struct {
    ranking rank;
    query_state *states;
    waiting_row *waiting; /* (n_queries, capacity) */
    found_row *found;    /* (n_queries, k) */
    column_level *points; /* (n_queries, 4 units) b, which are scanned */
    column_level *wholes; /* (n_queries, 4 units of whole) the same by all features, in order; points where there are no heads */
    int by_rows;           /* whether rows that have heads are scanned by all features, row by row */
    uint8_t *last_rows;    /* (16, 4 units of whole) those where the array ends */
    const uint8_t *ahead, *ahead_stop; /* points of the list to come, those not fetched yet */
    float *heads, *bounds; /* (EMBEDDED, width of heads), (EMBEDDED,) */
    int32_t near_positions[NEAR], near_queries[NEAR]; /* of rows that heads let pass */
    int n_near;
    column_level *panel; /* of COLUMNS queries */
    int32_t *scores;     /* (COLUMNS, places of FIRST_BLOCKS) */
    int32_t *places;     /* (places of FIRST_BLOCKS,) */
    int64_t *starts;     /* (n_lists + 2,) */
    int32_t *order;      /* (n_queries * n_probes,) */
    int32_t *nearest;    /* (n_queries,) those to be searched, by their nearest lists */
    int64_t n_nearest;
} search;

/* The score of a row of a list, by all features. */
static int32_t plain_score(const search *s, int64_t list, int64_t number, int32_t query) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_points *p = &l->points;
    int32_t sum = s->states[query].point.sum, score;
    if (l->whole) return row_score(l->whole, l->offsets[list] + number, s->wholes + query * l->whole->units * 4, sum);
    int64_t place = l->blocks[list] * BLOCK + number;
    const uint8_t *codes = p->codes + place / BLOCK * p->units * 64 + place % BLOCK * 4;
    const column_level *point = s->points + query * p->units * 4;
    score = -128 * sum - p->terms[place];
    for (int64_t u = 0; u < p->units; u++, codes += 64, point += 4)
        for (int i = 0; i < 4; i++) score += codes[i] * point[UNIT_PLACE(i)];
    return score;
}

/* Points of a list are to be fetched while the one before is scanned, for one query: those of many share lists. */
static void fetch_list(search *s, int64_t list) {
    const skivfpq_lists *l = s->rank.lists;
    int64_t size = l->points.units * 4 * BLOCK;
    s->ahead = l->points.codes + l->blocks[list] * size, s->ahead_stop = l->points.codes + l->blocks[list + 1] * size;
}

/* So many of its bytes. */
static inline void fetch_ahead(search *s, int64_t n_bytes) {
    const uint8_t *stop = s->ahead_stop - s->ahead < n_bytes ? s->ahead_stop : s->ahead + n_bytes;
    for (; s->ahead < stop; s->ahead += 64) __builtin_prefetch(s->ahead, 0, 2);
}

/* A block of a list against the panel: out and hits by columns or, where rows are scored one by one, by rows. */
static int score_some(search *s, int64_t list, int64_t block, const int32_t *starts, int n, int32_t (*out)[BLOCK],
                      uint16_t *hits) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_points *p = &l->points;
#ifdef SCORES_ROWS
    if (s->by_rows) {
        int64_t size = l->whole->units * 4, first = l->offsets[list] + (block - l->blocks[list]) * BLOCK;
        int64_t left = l->offsets[list + 1] - first, n_rows = left < BLOCK ? left : BLOCK;
        const uint8_t *rows = l->whole->codes + first * size;
        int32_t terms[BLOCK] = {0};
        memcpy(terms, l->whole->terms + first, sizeof(int32_t) * n_rows);
        if (first + BLOCK > l->offsets[l->n_lists]) rows = memcpy(s->last_rows, rows, n_rows * size);
        return score_rows(rows, s->panel, starts, l->whole->units, (int)n_rows, terms, out, hits);
    }
#endif
    (void)list;
    return score_block(p->codes + block * p->units * 64, s->panel, starts, p->units, n, p->terms + block * BLOCK, NULL, out,
                       hits);
}

#ifdef SCORES_ROWS
/* Scores OUT (n, n_blocks * 16) of the first blocks of a list, row by row; -ABSENT where there is no row. */
static void score_all_rows(search *s, int64_t list, int64_t n_blocks, const query_point *const *points, int n) {
    const int32_t *terms = s->rank.lists->points.terms;
    int32_t out[BLOCK][COLUMNS] = {0}, starts[COLUMNS], lowest[COLUMNS];
    uint16_t hits[HITS];
    for (int c = 0; c < COLUMNS; c++) starts[c] = INT32_MIN / 2;
    for (int c = 0; c < n; c++) lowest[c] = -points[c]->reach - 1, starts[c] = -128 * points[c]->sum - lowest[c];
    for (int64_t b = 0; b < n_blocks; b++) {
        int64_t block = s->rank.lists->blocks[list] + b;
        score_some(s, list, block, starts, n, out, hits);
        for (int r = 0; r < BLOCK; r++)
            for (int c = 0; c < n; c++)
                s->scores[(c * n_blocks + b) * BLOCK + r] =
                    terms[block * BLOCK + r] == ABSENT ? -ABSENT : out[r][c] + lowest[c];
    }
}

#endif

/* The same, by all features however rows stand. */
static void score_nearest(search *s, int64_t list, int64_t n_blocks, const int32_t *queries, int n) {
    const skivfpq_lists *l = s->rank.lists;
    const int32_t *terms = l->points.terms + l->blocks[list] * BLOCK;
    const query_point *points[COLUMNS];
    int32_t *scores[COLUMNS];
    int64_t places = n_blocks * BLOCK;
    for (int c = 0; c < n; c++) points[c] = &s->states[queries[c]].point, scores[c] = s->scores + c * places;
    if (!l->whole) {
        score_all(l, l->blocks[list], n_blocks, points, n, s->panel, scores);
        return;
    }
#ifdef SCORES_ROWS
    if (s->by_rows) {
        score_all_rows(s, list, n_blocks, points, n);
        return;
    }
#endif
    for (int c = 0; c < n; c++)
        for (int64_t i = 0; i < places; i++)
            s->scores[c * places + i] = terms[i] == ABSENT ? -ABSENT : plain_score(s, list, i, queries[c]);
}

/* Thresholds to start with: the k-th best of the nearest list, or of the first of its rows. Where those are all, they
 * wait at once, and the list has been seen. queries: their numbers. */
static void see_nearest(search *s, int64_t list, const int32_t *queries, int n) {
    const skivfpq_lists *l = s->rank.lists;
    int64_t all = l->blocks[list + 1] - l->blocks[list], n_blocks = all < FIRST_BLOCKS ? all : FIRST_BLOCKS;
    int64_t places = n_blocks * BLOCK;
    score_nearest(s, list, n_blocks, queries, n);
    for (int c = 0; c < n; c++) {
        query_state *q = s->states + queries[c];
        const int32_t *scores = s->scores + c * places;
        if (count_from(scores, places, 1 - ABSENT) < s->rank.k) continue;
        raise_thresholds(&s->rank, q, highest_key(&q->point, kth_score(scores, places, s->rank.k, s->rank.k / 8)));
        if (q->point.threshold == INT32_MIN || n_blocks < all) continue;
        int64_t n_left = places_between(scores, places, q->point.threshold, INT32_MAX, s->places);
        for (int64_t i = 0; i < n_left; i++)
            add_waiting(&s->rank, q, scores[s->places[i]], l->offsets[list] + s->places[i]);
        q->seen = (int32_t)list;
    }
}

/* Where that list cannot tell: the worst of the first k rows of the nearest lists. */
static int set_any_threshold(search *s, int32_t query, const int32_t *probes, int64_t n_probes) {
    const skivfpq_lists *l = s->rank.lists;
    query_state *q = s->states + query;
    int32_t kth = INT32_MAX;
    int64_t n = 0;
    for (int64_t p = 0; p < n_probes && probes[p] >= 0 && n < s->rank.k; p++) {
        const int32_t *terms = l->points.terms + l->blocks[probes[p]] * BLOCK;
        for (int64_t i = 0; i < l->offsets[probes[p] + 1] - l->offsets[probes[p]] && n < s->rank.k; i++) {
            if (terms[i] == ABSENT) continue;
            int32_t score = plain_score(s, probes[p], i, query);
            kth = score < kth ? score : kth, n++;
        }
    }
    return n == s->rank.k && raise_thresholds(&s->rank, q, highest_key(&q->point, kth));
}

/* ---- the scan */

static inline void fetch_whole(const skivfpq_points *whole, int64_t row) {
    int64_t size = whole->units * 4;
    for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch(whole->codes + row * size + byte);
}

/* Rows whose heads let them pass, by all features. Without a branch until it is known which of them do again. */
static void look_closer(search *s, int is_far) {
    const skivfpq_points *whole = s->rank.lists->whole;
    int32_t scores[NEAR], passing[NEAR], n = 0;
    for (int i = 0; i < NEARER && i < s->n_near && is_far; i++) fetch_whole(whole, s->near_positions[i]);
    for (int i = 0; i < s->n_near; i++) {
        int32_t query = s->near_queries[i];
        const query_point *point = &s->states[query].point;
        if (is_far) fetch_whole(whole, s->near_positions[i + NEARER < s->n_near ? i + NEARER : i]);
        scores[n] = row_score(whole, s->near_positions[i], s->wholes + query * whole->units * 4, point->sum);
        passing[n] = i, n += scores[n] >= point->threshold;
    }
    for (int i = 0; i < n; i++)
        add_waiting(&s->rank, s->states + s->near_queries[passing[i]], scores[i], s->near_positions[passing[i]]);
    s->n_near = 0;
}

/* Rows of a block, from this position on, that hit a query; absent ones never do. */
static inline void add_near(search *s, int32_t query, int64_t first, uint32_t hits) {
    for (int i = 0; i < BLOCK; i++) s->near_queries[s->n_near + i] = query;
    s->n_near += put_places(hits, (int32_t)first, s->near_positions + s->n_near);
}

/* Rows of the heads' blocks of a list that pass, by all features. queries: those of the panel. */
static void scan_heads(search *s, int64_t list, const int32_t *queries, int n) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_points *p = &l->points;
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    int32_t starts[COLUMNS];
    uint16_t hits[HITS] = {0};
    const int is_far = s->rank.queries->n == 1 || s->starts[list + 1] - s->starts[list] <= FEW_QUERIES;
    for (int c = 0; c < COLUMNS; c++) {
        const query_point *head = &s->states[queries[c < n ? c : 0]].head;
        starts[c] = c < n ? -128 * head->sum - head->threshold : INT32_MIN / 2;
    }
    for (int64_t b = l->blocks[list]; b < l->blocks[list + 1]; b++) {
        fetch_ahead(s, p->units * 64);
        if (!score_block(p->codes + b * p->units * 64, s->panel, starts, p->units, n, p->terms + b * BLOCK, NULL, out, hits))
            continue;
        for (int c = 0; c < n; c++) {
            if (s->n_near + BLOCK > NEAR) look_closer(s, is_far);
            add_near(s, queries[c], l->offsets[list] + (b - l->blocks[list]) * BLOCK, hits[c]);
        }
    }
    look_closer(s, is_far);
}

/* Some queries of a list, whose points are in the panel, against all its rows; queries: their numbers. */
static void scan_panel(search *s, int64_t list, const int32_t *queries, int n) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_points *p = &l->points;
    int32_t out[COLUMNS][BLOCK] __attribute__((aligned(64)));
    int32_t starts[COLUMNS], thresholds[COLUMNS];
    uint16_t hits[HITS] = {0};
    const query_point *points[COLUMNS];
    const int by_rows = s->by_rows, n_hits = by_rows ? BLOCK : n;
    for (int c = 0; c < COLUMNS; c++) starts[c] = INT32_MIN / 2;
    for (int c = 0; c < n; c++) {
        points[c] = &s->states[queries[c]].point;
        thresholds[c] = points[c]->threshold, starts[c] = -128 * points[c]->sum - thresholds[c];
    }
    for (int64_t b = l->blocks[list]; b < l->blocks[list + 1]; b++) {
        fetch_ahead(s, p->units * 64);
        if (!score_some(s, list, b, starts, n, out, hits)) continue;
        const int32_t *terms = p->terms + b * BLOCK;
        int64_t first = l->offsets[list] + (b - l->blocks[list]) * BLOCK;
        for (int four = 0; four < n_hits; four += 4)
            for (uint64_t left = hits_of_four(hits + four, n_hits - four); left; left &= left - 1) {
                int hit = __builtin_ctzll(left), major = four + hit / BLOCK, minor = hit % BLOCK;
                int r = by_rows ? major : minor, c = by_rows ? minor : major;
                if ((by_rows && c >= n) || terms[r] == ABSENT) continue;
                int32_t score = out[major][minor] + thresholds[c];
                if (score >= points[c]->threshold) add_waiting(&s->rank, s->states + queries[c], score, first + r);
            }
        for (int c = 0; c < n; c++)
            thresholds[c] = points[c]->threshold, starts[c] = -128 * points[c]->sum - thresholds[c];
    }
}

typedef void scan_function(search *, int64_t list, const int32_t *queries, int n);

/* Calls a function with each list and the queries that probe it and have not seen it, some at a time, their points in the
 * panel. */
static void each_panel(search *s, scan_function *scan) {
    const skivfpq_lists *l = s->rank.lists;
    const column_level *all = s->by_rows ? s->wholes : s->points;
    int64_t units = s->by_rows ? l->whole->units : l->points.units;
    const column_level *points[COLUMNS];
    int32_t queries[COLUMNS];
    for (int64_t list = 0; list < l->n_lists; list++)
        for (int64_t i = s->starts[list], stop = s->starts[list + 1]; i < stop;) {
            int n = 0;
            for (; i < stop && n < COLUMNS; i++)
                if (s->states[s->order[i]].seen != list)
                    points[n] = all + s->order[i] * units * 4, queries[n++] = s->order[i];
            if (n == 0) break;
            fill_panel(points, n, units, s->panel);
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

/* Some columns of the probes by list: the queries of a list are order[starts[list]..starts[list + 1]]. */
static void sort_probes(search *s, const int32_t *probes, int64_t n_probes, int64_t first, int64_t last,
                        const uint8_t *unserved) {
    int64_t n_lists = s->rank.lists->n_lists, *starts = s->starts;
    memset(starts, 0, sizeof(int64_t) * (n_lists + 2));
#define EACH_PAIR(DO)                                                                                \
    for (int64_t i = 0; i < s->rank.queries->n; i++)                                                      \
        for (int64_t p = first; p < last && !unserved[i] && probes[i * n_probes + p] >= 0; p++) {    \
            int32_t list = probes[i * n_probes + p];                                                 \
            DO;                                                                                      \
        }
    EACH_PAIR(starts[list + 2]++)
    for (int64_t list = 0; list < n_lists; list++) starts[list + 2] += starts[list + 1];
    EACH_PAIR(s->order[starts[list + 1]++] = (int32_t)i)
}

/* The query at a place among those to be searched, or NULL. */
static query_state *query_at(const search *s, int64_t place, const uint8_t *unserved) {
    if (place < 0 || place >= s->n_nearest || unserved[s->nearest[place]]) return NULL;
    return s->states + s->nearest[place];
}

/* Evaluates what waits, of queries of a list together, since they share rows: first the k best of each, then those that may
 * still win, which come from memory while the k best of the next query are evaluated. Takes what was found if there are
 * keys to take. */
static void settle_all(search *s, uint8_t *unserved, double *keys, int64_t *positions) {
    const ranking *by = &s->rank;
    int64_t k = by->k;
    for (int64_t i = 0; i < s->n_nearest + 2; i++) {
        query_state *next = query_at(s, i, unserved), *now = query_at(s, i - 1, unserved), *last = query_at(s, i - 2, unserved);
        fetching best = {0}, others = {0};
        if (next) drop_hopeless(by, next), best = (fetching){next, 0, next->n_waiting < k ? next->n_waiting : k};
        if (now) evaluate_first(by, now, now->n_waiting < k ? now->n_waiting : k, &best);
        if (now) others = (fetching){now, 0, now->n_waiting};
        fetch_all(by, &best);
        if (last) evaluate_first(by, last, last->n_waiting, &others);
        fetch_all(by, &others);
        if (!last || !keys) continue;
        int32_t query = s->nearest[i - 2];
        unserved[query] = last->n_found < k;
        if (!unserved[query]) take_found(by, last, keys + query * k, positions + query * k);
    }
}

/* One query, list by list as they come, the nearest first. */
static void search_one(search *s, const int32_t *probes, int64_t n_probes, uint8_t *unserved) {
    const skivfpq_lists *l = s->rank.lists;
    const int32_t query = 0;
    const column_level *point = s->points;
    s->nearest[0] = query, s->n_nearest = 1;
    fill_panel(&point, 1, l->points.units, s->panel);
    if (probes[0] >= 0 && !*unserved) see_nearest(s, probes[0], &query, 1);
    if (s->states->point.threshold == INT32_MIN) *unserved |= !set_any_threshold(s, 0, probes, n_probes);
    load_query(s->rank.queries, 0, l->d, s->rank.query);
    for (int64_t p = 0; p < n_probes && probes[p] >= 0 && !*unserved; p++) {
        for (int64_t i = l->stray_offsets[probes[p]]; i < l->stray_offsets[probes[p] + 1]; i++)
            evaluate(&s->rank, s->states, l->strays[i]);
        if (p + 1 < n_probes && probes[p + 1] >= 0) fetch_list(s, probes[p + 1]);
        if (probes[p] != s->states->seen) (s->rank.by_heads ? scan_heads : scan_panel)(s, probes[p], &query, 1);
        if (p == SOONER - 1 && s->rank.by_heads) settle_all(s, unserved, NULL, NULL);
    }
}

/* All queries in the lists of some columns of the probes. */
static void search_columns(search *s, const int32_t *probes, int64_t n_probes, int64_t first, int64_t last,
                           const uint8_t *unserved) {
    sort_probes(s, probes, n_probes, first, last, unserved);
    evaluate_strays(s);
    each_panel(s, s->rank.by_heads ? scan_heads : scan_panel);
}

/* Many queries, all that probe a list together. */
static void search_many(search *s, const int32_t *probes, int64_t n_probes, uint8_t *unserved) {
    int64_t n_sooner = s->rank.by_heads && n_probes > SOONER ? SOONER : 0;
    sort_probes(s, probes, n_probes, 0, 1, unserved);
    s->n_nearest = s->starts[s->rank.lists->n_lists];
    memcpy(s->nearest, s->order, sizeof(int32_t) * s->n_nearest);
    each_panel(s, see_nearest);
    for (int64_t i = 0; i < s->rank.queries->n; i++)
        if (s->states[i].point.threshold == INT32_MIN)
            unserved[i] |= !set_any_threshold(s, (int32_t)i, probes + i * n_probes, n_probes);
    search_columns(s, probes, n_probes, 0, n_sooner, unserved);
    if (n_sooner > 0) settle_all(s, unserved, NULL, NULL);
    search_columns(s, probes, n_probes, n_sooner, n_probes, unserved);
}

/* Points of all queries. Returns 0 without memory. */
static int set_queries(search *s, uint8_t *unserved) {
    const skivfpq_lists *l = s->rank.lists;
    const skivfpq_points *all = l->whole ? l->whole : &l->points, *heads = &l->points;
    const skivfpq_queries *queries = s->rank.queries;
    int64_t size = l->d * (queries->is_f64 ? sizeof(double) : sizeof(float));
    for (int64_t i = 0; i < queries->n; i++) {
        query_state *q = s->states + i;
        load_query(queries, i, l->d, s->rank.query);
        set_query(l, all, s->rank.query, s->wholes + i * all->units * 4, &q->point);
        unserved[i] = l->metric == BY_COSINE && is_zero(s->rank.query, l->d);
    }
    for (int64_t first = 0; first < queries->n && s->rank.by_heads; first += EMBEDDED) {
        int64_t n = queries->n - first < EMBEDDED ? queries->n - first : EMBEDDED;
        const char *values = (const char *)queries->values + first * size;
        if (EMBED(values, queries->is_f64, n, l->d, heads->embedding, s->heads, s->bounds) != 0) return 0;
        for (int64_t i = 0; i < n; i++)
            set_head(l, heads, s->heads + i * heads->embedding->width, s->bounds[i],
                     s->points + (first + i) * heads->units * 4, &s->states[first + i].head);
    }
    return 1;
}

#ifdef SCORES_ROWS
/* How many lists the queries probe, all together. */
static int64_t count_probes(const int32_t *probes, int64_t n_queries, int64_t n_probes) {
    int64_t count = 0;
    for (int64_t i = 0; i < n_queries; i++)
        for (int64_t p = 0; p < n_probes && probes[i * n_probes + p] >= 0; p++) count++;
    return count;
}
#endif

/* Whether it is the heads that queries are to be searched by: what they save of the rows that a query probes is more than
 * its head and the rows cost that heads leave. Only some instruction sets can do without. */
static int heads_pay(const skivfpq_lists *l, const int32_t *probes, int64_t n_queries, int64_t n_probes) {
#ifdef SCORES_ROWS
    if (n_queries < COLUMNS) return 1;
    double n_scanned = (double)l->offsets[l->n_lists] / l->n_lists * count_probes(probes, n_queries, n_probes) / n_queries;
    return n_scanned * 4 * (l->whole->units - l->points.units) > HEAD_COST * l->d;
#else
    (void)l, (void)probes, (void)n_queries, (void)n_probes;
    return 1;
#endif
}

int64_t SEARCH_LISTS(const skivfpq_lists *lists, const skivfpq_queries *queries, const int32_t *probes,
                     int64_t n_probes, int64_t k, double *keys, int64_t *positions, uint8_t *unserved, char *scratch) {
    if (lists->coded) return SEARCH_CODES(lists, queries, probes, n_probes, k, keys, positions, unserved, scratch);
    int64_t n = queries->n, width = lists->points.units * 4, used = 0, capacity = 2 * k + EXTRA;
    int64_t embedded = n < EMBEDDED ? n : EMBEDDED, widest = lists->whole ? lists->whole->units * 4 : width;
    search s = {.rank = {.lists = lists, .queries = queries, .k = k, .capacity = capacity}};
    s.states = take(scratch, &used, sizeof(query_state) * n);
    s.waiting = take(scratch, &used, sizeof(waiting_row) * n * capacity);
    s.found = take(scratch, &used, sizeof(found_row) * n * k);
    s.points = take(scratch, &used, sizeof(column_level) * n * width);
    s.wholes = lists->whole ? take(scratch, &used, sizeof(column_level) * n * lists->whole->units * 4) : s.points;
    s.heads = take(scratch, &used, lists->whole ? sizeof(float) * embedded * lists->points.embedding->width : 0);
    s.bounds = take(scratch, &used, sizeof(float) * embedded);
    s.panel = take(scratch, &used, sizeof(column_level) * COLUMNS * widest);
    s.scores = take(scratch, &used, sizeof(int32_t) * (n < COLUMNS ? n : COLUMNS) * FIRST_BLOCKS * BLOCK);
    s.places = take(scratch, &used, sizeof(int32_t) * FIRST_BLOCKS * BLOCK);
    s.starts = take(scratch, &used, sizeof(int64_t) * (lists->n_lists + 2));
    s.order = take(scratch, &used, sizeof(int32_t) * n * n_probes);
    s.nearest = take(scratch, &used, sizeof(int32_t) * n);
    s.rank.query = take(scratch, &used, sizeof(double) * lists->d);
    s.rank.row = take(scratch, &used, sizeof(double) * lists->d);
    s.rank.scores = take(scratch, &used, sizeof(int32_t) * (capacity + 16));
    s.rank.others = take(scratch, &used, sizeof(waiting_row) * capacity);
    s.last_rows = take(scratch, &used, lists->whole ? BLOCK * lists->whole->units * 4 : 0);
    if (!scratch) return used;
    s.rank.by_heads = lists->whole && heads_pay(lists, probes, n, n_probes), s.by_rows = lists->whole && !s.rank.by_heads;
    memset(s.panel, 0, sizeof(column_level) * COLUMNS * widest);
    begin_scan();
    for (int64_t i = 0; i < n; i++)
        s.states[i] = (query_state){.number = (int32_t)i, .seen = -1, .waiting = s.waiting + i * capacity,
                                    .found = s.found + i * k};
    if (!set_queries(&s, unserved)) memset(unserved, 1, n);
    else if (n == 1) search_one(&s, probes, n_probes, unserved);
    else search_many(&s, probes, n_probes, unserved);
    settle_all(&s, unserved, keys, positions);
    end_scan();
    return 0;
}

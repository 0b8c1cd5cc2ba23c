/* The candidates of a query: rows that wait, known by their score, and up to k rows found, known exactly. The k-th best
 * of either bounds what can still win: the threshold. Where rows wait in vain for a better threshold, in dense or
 * duplicated regions, they are evaluated, which leaves k of them. */
#ifndef SKIVFPQ_CANDIDATES_H
#define SKIVFPQ_CANDIDATES_H

#include "keys.h"

#define EXTRA 64   /* rows that wait beyond 2 k */
#define AHEAD 8    /* rows fetched before they are needed */

typedef struct {
    int32_t score, position;
} waiting_row;

typedef struct {
    double key;
    int32_t id, position;
} found_row;

/* The two sets of a query. */
typedef struct {
    query_point point, head; /* point: whose scores wait; head: what is scanned first, see ranking */
    int32_t number, n_waiting, n_found, seen; /* seen: the list that has been scanned before others, or -1 */
    waiting_row *waiting; /* (capacity,) */
    found_row *found;    /* (k,) a heap, the farthest on top */
} query_state;

/* What rows are, and how many are to be found of them. */
typedef struct {
    const skivfpq_lists *lists;
    const skivfpq_queries *queries;
    int64_t k, capacity;
    int by_heads; /* whether queries have heads, which are scanned first */
    double *query, *row; /* (d,) of the query that rows are evaluated for */
    int32_t *scores;     /* (capacity + 16,) of rows that wait */
    waiting_row *others; /* (capacity,) */
} ranking;

/* Rows of greater keys cannot win: raises the thresholds. Returns 0 where that does not fit. */
static int raise_thresholds(const ranking *by, query_state *q, double key) {
    return (!by->by_heads || set_threshold(&q->head, key)) && set_threshold(&q->point, key);
}

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

static void add_found(const ranking *by, query_state *q, int64_t position, double key) {
    found_row row = {key, by->lists->ids[position], (int32_t)position};
    if (q->n_found < by->k) {
        rise(q->found, q->n_found, row);
        if (++q->n_found < by->k) return;
    } else if (is_farther(q->found[0], row)) sink(q->found, by->k, 0, row);
    else return;
    raise_thresholds(by, q, q->found[0].key);
}

static void evaluate(const ranking *by, query_state *q, int64_t position) {
    add_found(by, q, position, exact_key(by->lists, by->query, position, by->row));
}

/* ---- rows that wait */

/* Brings the k best that wait to the front, and drops rows that cannot win any more. */
static void drop_hopeless(const ranking *by, query_state *q) {
    int32_t kth = INT32_MAX, least = INT32_MAX, *scores = by->scores;
    int64_t n = q->n_waiting, n_best = 0, n_others = 0;
    if (n >= by->k) {
        for (int64_t i = 0; i < n; i++) scores[i] = q->waiting[i].score;
        for (int64_t i = n; i % 16; i++) scores[i] = -ABSENT;
        least = kth_score(scores, (n + 15) / 16 * 16, by->k, 0);
        for (int64_t i = 0; i < n; i++) kth = scores[i] >= least && scores[i] < kth ? scores[i] : kth;
        raise_thresholds(by, q, highest_key(&q->point, kth));
    }
    least = least > q->point.threshold ? least : q->point.threshold;
    for (int64_t i = 0; i < n; i++) { /* without a branch that cannot be foretold */
        waiting_row row = q->waiting[i];
        int is_best = row.score >= least, is_other = !is_best && row.score >= q->point.threshold;
        q->waiting[n_best] = row, n_best += is_best;
        by->others[n_others] = row, n_others += is_other;
    }
    memcpy(q->waiting + n_best, by->others, sizeof(waiting_row) * n_others);
    q->n_waiting = (int32_t)(n_best + n_others);
}

/* Some that wait, to be fetched one by one while others are evaluated: memory answers no more than so many at a time. */
typedef struct {
    const query_state *query;
    int64_t next, stop;
} fetching;

static inline void fetch_next(const ranking *by, fetching *rows) {
    if (rows->next == rows->stop) return;
    waiting_row row = rows->query->waiting[rows->next++];
    if (row.score < rows->query->point.threshold) return;
    if (rows->query->point.is_exact) __builtin_prefetch(by->lists->ids + row.position);
    else fetch_row(by->lists, row.position);
}

static void fetch_all(const ranking *by, fetching *rows) {
    while (rows->next < rows->stop) fetch_next(by, rows);
}

/* Evaluates those of the first n that wait which may still win, drops them and all that may not; fetches others. */
static void evaluate_first(const ranking *by, query_state *q, int64_t n, fetching *others) {
    int64_t left = 0;
    if (!q->point.is_exact && n > 0) load_query(by->queries, q->number, by->lists->d, by->query);
    for (int64_t i = 0; i < n; i++) {
        waiting_row row = q->waiting[i];
        fetch_next(by, others);
        if (row.score < q->point.threshold) continue;
        if (!q->point.is_exact) evaluate(by, q, row.position);
        else add_found(by, q, row.position, key_of_score(by->lists, &q->point, row.score, row.position));
    }
    fetch_all(by, others);
    for (int64_t i = n; i < q->n_waiting; i++)
        if (q->waiting[i].score >= q->point.threshold) q->waiting[left++] = q->waiting[i];
    q->n_waiting = left;
}

/* Evaluates all that may still win, the k best first. */
static void settle(const ranking *by, query_state *q) {
    drop_hopeless(by, q);
    fetching rows = {q, 0, q->n_waiting};
    for (int i = 0; i < AHEAD; i++) fetch_next(by, &rows);
    evaluate_first(by, q, q->n_waiting, &rows);
}

/* Drops rows that cannot win any more; evaluates all where those are too few. */
static void make_room(const ranking *by, query_state *q) {
    drop_hopeless(by, q);
    if (q->n_waiting > by->capacity - EXTRA / 2) settle(by, q);
}

static inline void add_waiting(const ranking *by, query_state *q, int32_t score, int64_t position) {
    if (q->n_waiting == by->capacity) {
        make_room(by, q);
        if (score < q->point.threshold) return;
    }
    q->waiting[q->n_waiting++] = (waiting_row){score, (int32_t)position};
}

/* Takes the rows found, nearest first. */
static void take_found(const ranking *by, query_state *q, double *keys, int64_t *positions) {
    for (int64_t n = by->k - 1; n >= 0; n--) {
        keys[n] = q->found[0].key, positions[n] = q->found[0].position;
        sink(q->found, n, 0, q->found[n]);
    }
}

#endif

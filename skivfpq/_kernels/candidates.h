/* The candidates of a query: rows that wait, known by their score, and up to k rows found, known exactly. The k-th best
 * of either bounds what can still win: the threshold. Where rows wait in vain for a better threshold, in dense or
 * duplicated regions, they are evaluated, which leaves k of them. */
#ifndef SKIVFPQ_CANDIDATES_H
#define SKIVFPQ_CANDIDATES_H

#include "keys.h"
#include "select.h"

#define EXTRA 64   /* rows that wait beyond 2 k */
#define AHEAD 4    /* rows fetched before they are needed */
#define FETCHED 32 /* at once */

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

#define IS_BETTER(a, b) ((a).score > (b).score)
SELECT(select_best, waiting_row, IS_BETTER)

/* Brings the k best that wait to the front, and drops rows that cannot win any more. */
static void drop_hopeless(const ranking *by, query_state *q) {
    int32_t kth = INT32_MAX, n = 0;
    if (q->n_waiting >= by->k) {
        select_best(q->waiting, q->n_waiting, by->k);
        for (int64_t i = 0; i < by->k; i++) kth = q->waiting[i].score < kth ? q->waiting[i].score : kth;
        raise_thresholds(by, q, highest_key(&q->point, kth));
    }
    for (int64_t i = 0; i < q->n_waiting; i++)
        if (q->waiting[i].score >= q->point.threshold) q->waiting[n++] = q->waiting[i];
    q->n_waiting = n;
}

static inline void fetch_waiting(const ranking *by, const query_state *q, int64_t i) {
    if (q->point.is_exact) __builtin_prefetch(by->lists->ids + q->waiting[i].position);
    else fetch_row(by->lists, q->waiting[i].position);
}

/* The same, and brings the other rows nearer. */
static void prepare(const ranking *by, query_state *q) {
    drop_hopeless(by, q);
    for (int64_t i = 0; i < q->n_waiting && i < FETCHED; i++) fetch_waiting(by, q, i);
}

/* Evaluates those that wait, prepared, and may still win: the k best first. */
static void settle(const ranking *by, query_state *q) {
    if (!q->point.is_exact) load_query(by->queries, q->number, by->lists->d, by->query);
    for (int64_t i = 0; i < q->n_waiting; i++) {
        waiting_row row = q->waiting[i];
        if (i + AHEAD < q->n_waiting && q->waiting[i + AHEAD].score >= q->point.threshold) fetch_waiting(by, q, i + AHEAD);
        if (row.score < q->point.threshold) continue;
        if (!q->point.is_exact) evaluate(by, q, row.position);
        else add_found(by, q, row.position, key_of_score(by->lists, &q->point, row.score, row.position));
    }
    q->n_waiting = 0;
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

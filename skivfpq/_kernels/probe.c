/* The coarse step: which lists each query probes, the nearest centers being chosen in three steps. Scores of int8
 * points leave those that may be among them; fine points (scan.h), 100 times as precise, order these; the few around
 * the last place that even they cannot tell apart are evaluated in float64. */
#include "scan.h"
#include "search.h"

#include "fine_points.h"
#include "queries.h"
#include "select.h"

typedef struct {
    double nearness; /* the distance by fine points, or minus the product */
    int32_t list;
} candidate;

typedef struct {
    const skivfpq_lists *centers;
    const skivfpq_fine_points *fine;
    int64_t n_probes;
    query_point points[COLUMNS];
    int32_t *scores;        /* (COLUMNS, places) */
    int32_t *near;          /* (places,) of them those that may be near */
    candidate *candidates;  /* (places,) */
    int16_t *fine_query;    /* (d,) */
    double *query, *row;    /* (d,) */
} probing;

static inline int is_nearer(candidate a, candidate b) {
    return a.nearness < b.nearness || (a.nearness == b.nearness && a.list < b.list);
}

SELECT(select_nearest, candidate, is_nearer)

/* Nearness of the lists of n candidates by fine points; returns how wrong any may be. */
static double measure(probing *p, int64_t n) {
    const double *query = p->query;
    const skivfpq_lists *l = p->centers;
    const skivfpq_fine_points *fine = p->fine;
    int is_product = l->metric == BY_PRODUCT;
    float origin[l->d], scale, error, most = 0;
    int32_t sq_norm, labels[TOGETHER], dots[TOGETHER];
    double base = 0, reach = 0, length = 0, longest = 0;
    for (int64_t j = 0; j < l->d; j++) {
        origin[j] = is_product ? 0 : l->origin[j];
        if (is_product) base += query[j] * l->origin[j], reach += fabs(query[j] * l->origin[j]);
    }
    PACK_FINE(query, 1, 1, l->d, origin, p->fine_query, &scale, &error, &sq_norm);
    length = scale * sqrt((double)sq_norm);
    for (int64_t i = 0; i < n; i += TOGETHER) {
        int together = n - i < TOGETHER ? (int)(n - i) : TOGETHER;
        for (int c = 0; c < TOGETHER; c++) labels[c] = p->candidates[c < together ? i + c : i].list;
        products(p->fine_query, fine->codes, labels, TOGETHER, l->d, dots);
        for (int c = 0; c < together; c++) {
            int32_t list = labels[c];
            double other = (double)fine->scales[list] * fine->scales[list] * fine->sq_norms[list];
            double product = (double)scale * fine->scales[list] * dots[c];
            p->candidates[i + c].nearness =
                is_product ? -base - product : sqrt(fmax(length * length - 2 * product + other, 0));
            most = fmaxf(most, fine->errors[list]), longest = fmax(longest, other);
        }
    }
    longest = sqrt(longest);
    double sum_error = LARGEST_SUM_ERROR * (reach + (length + error) * longest);
    if (is_product) return length * most + error * (longest + most) + sum_error + TINY;
    return (most + error) * (1 + ROUNDING) + 1e-6 * (length + longest) + TINY; /* roots of cancelled squares */
}

/* The n_probes nearest of n candidates to the front: exactly. */
static void choose(probing *p, int64_t n) {
    candidate *all = p->candidates;
    int64_t n_probes = p->n_probes, n_sure = 0, n_near = 0;
    double error = measure(p, n), last = 0;
    select_nearest(all, n, n_probes);
    for (int64_t i = 0; i < n_probes; i++) last = i == 0 || all[i].nearness > last ? all[i].nearness : last;
    double low = last - 2 * error, high = last + 2 * error;
    for (int64_t i = 0; i < n; i++) n_near += !(all[i].nearness > high);
    if (n_near == n_probes) return;
    for (int64_t i = 0, near = 0; i < n && near < n_near; i++) /* near ones to the front, surely nearest first */
        if (!(all[i].nearness > high)) {
            candidate found = all[i];
            all[i] = all[near], all[near] = found;
            if (found.nearness < low) all[near] = all[n_sure], all[n_sure++] = found;
            near++;
        }
    for (int64_t i = n_sure; i < n_near; i++) all[i].nearness = exact_key(p->centers, p->query, all[i].list, p->row);
    select_nearest(all + n_sure, n_near - n_sure, n_probes - n_sure);
    for (int64_t i = n_sure; i < n_probes; i++) all[i].nearness = last; /* as far as that goes, not squared */
}

/* Candidates by score; returns how many, or 0 where scores cannot serve. */
static int64_t gather(probing *p, int c, const int32_t *scores) {
    const skivfpq_lists *l = p->centers;
    int64_t n = 0, n_scored = l->offsets[1] - l->stray_offsets[1], places = l->blocks[1] * BLOCK;
    query_point *q = p->points + c;
    int32_t least = -ABSENT + 1;
    if (p->n_probes < n_scored) {
        q->threshold = INT32_MIN;
        if (!set_threshold(q, highest_key(q, kth_score(scores, places, p->n_probes)))) return 0;
        least = q->threshold > least ? q->threshold : least;
    }
    n = places_from(scores, places, least, p->near);
    for (int64_t i = 0; i < n; i++) p->candidates[i].list = p->near[i];
    for (int64_t i = 0; i < l->stray_offsets[1]; i++) p->candidates[n++].list = (int32_t)l->strays[i];
    return n;
}

/* The nearest of some lists first. */
static void take_probes(const candidate *all, int64_t n_probes, int32_t *probes) {
    int64_t nearest = 0;
    for (int64_t i = 0; i < n_probes; i++) {
        probes[i] = all[i].list;
        if (all[i].nearness < all[nearest].nearness) nearest = i;
    }
    int32_t first = probes[0];
    probes[0] = probes[nearest], probes[nearest] = first;
}

int64_t NEAREST_LISTS(const skivfpq_lists *centers, const skivfpq_fine_points *fine, const skivfpq_queries *queries,
                      int64_t n_probes, int32_t *probes, uint8_t *unserved, char *scratch) {
    int64_t n = queries->n, width = centers->units * 4, places = centers->blocks[1] * BLOCK, used = 0;
    const query_point *points[COLUMNS];
    const int8_t *levels[COLUMNS];
    probing p = {.centers = centers, .fine = fine, .n_probes = n_probes};
    int8_t *codes = take(scratch, &used, COLUMNS * width), *panel = take(scratch, &used, COLUMNS * width);
    p.scores = take(scratch, &used, sizeof(int32_t) * (n < COLUMNS ? n : COLUMNS) * places);
    p.near = take(scratch, &used, sizeof(int32_t) * places);
    p.candidates = take(scratch, &used, sizeof(candidate) * (places + centers->stray_offsets[1] + 1));
    p.fine_query = take(scratch, &used, sizeof(int16_t) * centers->d);
    p.query = take(scratch, &used, sizeof(double) * centers->d);
    p.row = take(scratch, &used, sizeof(double) * centers->d);
    if (!scratch) return used;
    memset(panel, 0, COLUMNS * width);
    begin_scan();
    for (int64_t first = 0; first < n; first += COLUMNS) {
        int n_queries = n - first < COLUMNS ? (int)(n - first) : COLUMNS;
        for (int c = 0; c < n_queries; c++) {
            load_query(queries, first + c, centers->d, p.query);
            set_query(centers, p.query, codes + c * width, p.points + c);
            points[c] = p.points + c, levels[c] = codes + c * width;
        }
        fill_panel(levels, n_queries, centers->units, panel);
        score_all(centers, 0, centers->blocks[1], points, n_queries, panel, p.scores);
        for (int c = 0; c < n_queries; c++) {
            int64_t n_candidates = gather(&p, c, p.scores + c * places);
            unserved[first + c] = n_candidates < n_probes;
            if (unserved[first + c]) continue;
            load_query(queries, first + c, centers->d, p.query);
            choose(&p, n_candidates);
            take_probes(p.candidates, n_probes, probes + (first + c) * n_probes);
        }
    }
    end_scan();
    return 0;
}

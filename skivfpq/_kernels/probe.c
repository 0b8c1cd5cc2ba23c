/* The coarse step: which lists each query probes, the nearest centers being chosen in three steps. Scores of int8
 * points leave those that may be among them; fine points (scan.h), 100 times as precise, order these; the few around
 * the last place that even they cannot tell apart are evaluated in float64. */
#include "scan.h"
#include "search.h"

#include "fine_points.h"
#include "queries.h"
#include "select.h"

#define RANKS 1e9 /* that nearness is told apart by */

typedef struct {
    double nearness;
    int32_t list;
} candidate;

typedef struct {
    const skivfpq_lists *centers;
    const skivfpq_fine_points *fine;
    int64_t n_probes;
    query_point points[COLUMNS];
    int32_t *scores;        /* (COLUMNS, places) */
    int32_t *near;          /* (places,) candidates, those that may be among the nearest */
    double *nearness;       /* (places,) theirs */
    int32_t *ranks;         /* (places,) theirs */
    candidate *open;        /* (places,) of them those that fine points cannot tell apart */
    int16_t *fine_query;    /* (d,) */
    double *query, *row;    /* (d,) */
} probing;

static inline int is_nearer(candidate a, candidate b) {
    return a.nearness < b.nearness || (a.nearness == b.nearness && a.list < b.list);
}

SELECT(select_nearest, candidate, is_nearer)

/* Nearness of n candidates by fine points: squared distances, or minus products; returns how wrong any distance, or
 * product, may be. */
static double measure(probing *p, int64_t n) {
    const double *query = p->query;
    const skivfpq_lists *l = p->centers;
    const skivfpq_fine_points *fine = p->fine;
    int is_product = l->metric == BY_PRODUCT;
    float origin[l->d], scale, error, most = 0;
    int32_t sq_norm, labels[TOGETHER], dots[TOGETHER];
    double base = 0, reach = 0, longest = 0;
    for (int64_t j = 0; j < l->d; j++) {
        origin[j] = is_product ? 0 : l->origin[j];
        if (is_product) base += query[j] * l->origin[j], reach += fabs(query[j] * l->origin[j]);
    }
    PACK_FINE(query, 1, 1, l->d, origin, p->fine_query, &scale, &error, &sq_norm);
    double sq_length = (double)scale * scale * sq_norm, length = sqrt(sq_length);
    for (int64_t i = 0; i < n; i += TOGETHER) {
        int together = n - i < TOGETHER ? (int)(n - i) : TOGETHER;
        for (int c = 0; c < TOGETHER; c++) labels[c] = p->near[c < together ? i + c : i];
        products(p->fine_query, fine->codes, labels, TOGETHER, l->d, dots);
        for (int c = 0; c < together; c++) {
            float own = fine->scales[labels[c]];
            double other = (double)own * own * fine->sq_norms[labels[c]], product = (double)scale * own * dots[c];
            p->nearness[i + c] = is_product ? -base - product : sq_length - 2 * product + other;
            most = fmaxf(most, fine->errors[labels[c]]), longest = fmax(longest, other);
        }
    }
    longest = sqrt(longest);
    double sum_error = LARGEST_SUM_ERROR * (reach + (length + error) * longest);
    if (is_product) return length * most + error * (longest + most) + sum_error + TINY;
    return (most + error) * (1 + ROUNDING) + 1e-6 * (length + longest) + TINY; /* roots of cancelled squares */
}

/* Nearness in whole numbers, the nearest the highest: OUT ranks (n,), and -ABSENT up to the next 16; in units of what
 * is returned, which starts from the lowest. */
static double rank_nearness(const double *nearness, int64_t n, double lowest, double highest, int32_t *ranks) {
    double unit = fmax((highest - lowest) / RANKS, fabs(highest) * 1e-15 + TINY * TINY), per_unit = 1 / unit;
    for (int64_t i = 0; i < n; i++) ranks[i] = (int32_t)((highest - nearness[i]) * per_unit);
    for (; n % 16; n++) ranks[n] = -ABSENT;
    return unit;
}

/* The n_probes nearest of n candidates, OUT probes, the nearest first: exactly. */
static void choose(probing *p, int64_t n, int32_t *probes) {
    const double *nearness = p->nearness;
    int32_t *ranks = p->ranks;
    double error = 2 * measure(p, n), lowest = nearness[0], highest = nearness[0], low, high;
    int64_t n_probes = p->n_probes, n_sure = 0, n_open = 0, first = 0;
    for (int64_t i = 1; i < n; i++)
        lowest = nearness[i] < lowest ? nearness[i] : lowest, highest = nearness[i] > highest ? nearness[i] : highest;
    double unit = rank_nearness(nearness, n, lowest, highest, ranks);
    double last = highest - unit * kth_score(ranks, (n + 15) / 16 * 16, n_probes, 0); /* the last's, if unit less */
    if (p->centers->metric == BY_PRODUCT) low = last - unit - error, high = last + error;
    else {
        double distance = sqrt(fmax(last, 0)) + error, below = sqrt(fmax(last - unit, 0)) - error;
        high = distance * distance, low = below > 0 ? below * below : -INFINITY;
    }
    for (int64_t i = 0; i < n; i++) {
        if (nearness[i] > high + unit) continue;
        if (nearness[i] < low - unit) {
            if (nearness[i] == lowest) first = n_sure;
            probes[n_sure++] = p->near[i];
        } else p->open[n_open++] = (candidate){nearness[i], p->near[i]};
    }
    if (n_open > n_probes - n_sure) {
        for (int64_t i = 0; i < n_open; i++)
            p->open[i].nearness = exact_key(p->centers, p->query, p->open[i].list, p->row);
        select_nearest(p->open, n_open, n_probes - n_sure);
    }
    for (int64_t i = 0; n_sure + i < n_probes; i++) probes[n_sure + i] = p->open[i].list;
    if (n_sure == 0)
        for (int64_t i = 1; i < n_probes; i++) first = is_nearer(p->open[i], p->open[first]) ? i : first;
    int32_t nearest = probes[first];
    probes[first] = probes[0], probes[0] = nearest;
}

/* Candidates by score; returns how many, or 0 where scores cannot serve. */
static int64_t gather(probing *p, int c, const int32_t *scores) {
    const skivfpq_lists *l = p->centers;
    int64_t n = 0, n_scored = l->offsets[1] - l->stray_offsets[1], places = l->blocks[1] * BLOCK;
    query_point *q = p->points + c;
    int32_t least = -ABSENT + 1;
    if (p->n_probes < n_scored) {
        q->threshold = INT32_MIN;
        if (!set_threshold(q, highest_key(q, kth_score(scores, places, p->n_probes, p->n_probes / 8)))) return 0;
        least = q->threshold > least ? q->threshold : least;
    }
    n = places_from(scores, places, least, p->near);
    for (int64_t i = 0; i < l->stray_offsets[1]; i++) p->near[n++] = (int32_t)l->strays[i];
    return n;
}

int64_t NEAREST_LISTS(const skivfpq_lists *centers, const skivfpq_fine_points *fine, const skivfpq_queries *queries,
                      int64_t n_probes, int32_t *probes, uint8_t *unserved, char *scratch) {
    int64_t n = queries->n, width = centers->units * 4, places = centers->blocks[1] * BLOCK, used = 0;
    int64_t n_places = places + centers->stray_offsets[1] + 16;
    const query_point *points[COLUMNS];
    const column_level *levels[COLUMNS];
    probing p = {.centers = centers, .fine = fine, .n_probes = n_probes};
    column_level *codes = take(scratch, &used, sizeof(column_level) * COLUMNS * width);
    column_level *panel = take(scratch, &used, sizeof(column_level) * COLUMNS * width);
    p.scores = take(scratch, &used, sizeof(int32_t) * (n < COLUMNS ? n : COLUMNS) * places);
    p.near = take(scratch, &used, sizeof(int32_t) * n_places);
    p.nearness = take(scratch, &used, sizeof(double) * n_places);
    p.ranks = take(scratch, &used, sizeof(int32_t) * n_places);
    p.open = take(scratch, &used, sizeof(candidate) * n_places);
    p.fine_query = take(scratch, &used, sizeof(int16_t) * centers->d);
    p.query = take(scratch, &used, sizeof(double) * centers->d);
    p.row = take(scratch, &used, sizeof(double) * centers->d);
    if (!scratch) return used;
    memset(panel, 0, sizeof(column_level) * COLUMNS * width);
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
            choose(&p, n_candidates, probes + (first + c) * n_probes);
        }
    }
    end_scan();
    return 0;
}

/* The coarse step: which lists each query probes. Scores of int8 points tell which centers may be the nearest: fine
 * points (scan.h), 100 times as precise, of those with the best scores bound how far the last list can be, and scores
 * exclude what is farther. The few around the last place that fine points cannot tell apart are evaluated in float64. */
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
    double bases[COLUMNS], reaches[COLUMNS]; /* products with the origin, and those of sizes */
    float fine_scales[COLUMNS], fine_errors[COLUMNS]; /* of the queries' fine points */
    int32_t fine_sq_norms[COLUMNS];
    int16_t *fine_codes;    /* (COLUMNS, d) */
    float *fine_origin;     /* (d,) */
    float *heads;           /* (COLUMNS, width) of a head */
    column_level *levels;   /* (COLUMNS, 4 units) the queries' points */
    int32_t *scores;        /* (COLUMNS, places) */
    int32_t *near;          /* (places,) candidates, those that may be among the nearest */
    double *nearness;       /* (places,) theirs */
    int32_t *ranks;         /* (places,) theirs */
    candidate *open;        /* (places,) of them those that fine points cannot tell apart */
    double *query, *row;    /* (d,) */
} probing;

static inline int is_nearer(candidate a, candidate b) {
    return a.nearness < b.nearness || (a.nearness == b.nearness && a.list < b.list);
}

SELECT(select_nearest, candidate, is_nearer)

/* The fine point of the query that is loaded, of column c. */
static void set_fine(probing *p, int c) {
    const skivfpq_lists *l = p->centers;
    p->bases[c] = p->reaches[c] = 0;
    for (int64_t j = 0; j < l->d && l->metric == BY_PRODUCT; j++)
        p->bases[c] += p->query[j] * l->points.origin[j], p->reaches[c] += fabs(p->query[j] * l->points.origin[j]);
    PACK_FINE(p->query, 1, 1, l->d, p->fine_origin, p->fine_codes + c * l->d, p->fine_scales + c, p->fine_errors + c,
              p->fine_sq_norms + c);
}

/* Points of n queries from the first on. Returns 0 without memory. */
static int set_queries(probing *p, const skivfpq_queries *queries, int64_t first, int n) {
    const skivfpq_lists *l = p->centers;
    const skivfpq_fine_points fine = {p->fine_codes, p->fine_scales, p->fine_errors, p->fine_sq_norms};
    float bounds[COLUMNS];
    for (int c = 0; c < n; c++) {
        load_query(queries, first + c, l->d, p->query);
        set_fine(p, c);
        if (!l->points.embedding) set_query(l, &l->points, p->query, p->levels + c * 4 * l->points.units, p->points + c);
    }
    if (!l->points.embedding) return 1;
    if (EMBED_FINE(&fine, n, l->d, l->points.embedding, p->heads, bounds) != 0) return 0;
    for (int c = 0; c < n; c++)
        set_head(l, &l->points, p->heads + c * l->points.embedding->width, bounds[c],
                 p->levels + c * 4 * l->points.units, p->points + c);
    return 1;
}

/* Nearness of the candidates from first to n by fine points: squared distances, or minus products; returns how wrong
 * any distance, or product, may be. */
static double measure(probing *p, int c, int64_t first, int64_t n) {
    const skivfpq_lists *l = p->centers;
    const skivfpq_fine_points *fine = p->fine;
    int is_product = l->metric == BY_PRODUCT;
    double scale = p->fine_scales[c], sq_length = scale * scale * p->fine_sq_norms[c], length = sqrt(sq_length);
    double query_error = p->fine_errors[c], longest = 0;
    int32_t labels[TOGETHER], dots[TOGETHER];
    float most = 0;
    for (int64_t i = first; i < n; i += TOGETHER) {
        int together = n - i < TOGETHER ? (int)(n - i) : TOGETHER;
        for (int t = 0; t < TOGETHER; t++) labels[t] = p->near[t < together ? i + t : i];
        products(p->fine_codes + c * l->d, fine->codes, labels, TOGETHER, l->d, dots);
        for (int t = 0; t < together; t++) {
            float own = fine->scales[labels[t]];
            double other = (double)own * own * fine->sq_norms[labels[t]], product = scale * own * dots[t];
            p->nearness[i + t] = is_product ? -p->bases[c] - product : sq_length - 2 * product + other;
            most = fmaxf(most, fine->errors[labels[t]]), longest = fmax(longest, other);
        }
    }
    longest = sqrt(longest);
    double sum_error = LARGEST_SUM_ERROR * (p->reaches[c] + (length + query_error) * longest);
    if (is_product) return length * most + query_error * (longest + most) + sum_error + TINY;
    return (most + query_error) * (1 + ROUNDING) + 1e-6 * (length + longest) + TINY; /* roots of cancelled squares */
}

/* No key of n candidates is greater. */
static double farthest_key(const probing *p, int64_t n, double error) {
    double farthest = p->nearness[0];
    for (int64_t i = 1; i < n; i++) farthest = p->nearness[i] > farthest ? p->nearness[i] : farthest;
    if (p->centers->metric == BY_PRODUCT) return farthest + error;
    double distance = sqrt(fmax(farthest, 0)) * (1 + ROUNDING) + error;
    return distance * distance;
}

/* Nearness in whole numbers, the nearest the highest: OUT ranks (n,), and -ABSENT up to the next 16; in units of what
 * is returned, which starts from the lowest. */
static double rank_nearness(const double *nearness, int64_t n, double lowest, double highest, int32_t *ranks) {
    double unit = fmax((highest - lowest) / RANKS, fabs(highest) * 1e-15 + TINY * TINY), per_unit = 1 / unit;
    for (int64_t i = 0; i < n; i++) ranks[i] = (int32_t)((highest - nearness[i]) * per_unit);
    for (; n % 16; n++) ranks[n] = -ABSENT;
    return unit;
}

/* The n_probes nearest of n candidates, OUT probes, the nearest first: exactly. error: of their distances, or products */
static void choose(probing *p, int64_t n, double error, int32_t *probes) {
    const double *nearness = p->nearness;
    int32_t *ranks = p->ranks;
    double lowest = nearness[0], highest = nearness[0], low, high;
    int64_t n_probes = p->n_probes, n_sure = 0, n_open = 0, first = 0, n_sooner = 0;
    for (int64_t i = 1; i < n; i++)
        lowest = nearness[i] < lowest ? nearness[i] : lowest, highest = nearness[i] > highest ? nearness[i] : highest;
    double unit = rank_nearness(nearness, n, lowest, highest, ranks);
    double last = highest - unit * kth_score(ranks, (n + 15) / 16 * 16, n_probes, 0); /* the last's, if unit less */
    int32_t sooner = n_probes > SOONER ? kth_score(ranks, (n + 15) / 16 * 16, SOONER, 0) : INT32_MAX;
    if (p->centers->metric == BY_PRODUCT) low = last - unit - 2 * error, high = last + 2 * error;
    else {
        double distance = sqrt(fmax(last, 0)) + 2 * error, below = sqrt(fmax(last - unit, 0)) - 2 * error;
        high = distance * distance, low = below > 0 ? below * below : -INFINITY;
    }
    for (int64_t i = 0; i < n; i++) {
        if (nearness[i] > high + unit) continue;
        if (nearness[i] < low - unit) {
            int64_t place = n_sure++;
            if (ranks[i] >= sooner && n_sooner < SOONER) probes[place] = probes[n_sooner], place = n_sooner++;
            if (nearness[i] == lowest) first = place;
            probes[place] = p->near[i];
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

/* The lists that the query of column c, which is loaded, probes; returns 0 where scores cannot serve. */
static int probe_lists(probing *p, int c, const int32_t *scores, int32_t *probes) {
    const skivfpq_lists *l = p->centers;
    int64_t n = 0, n_measured, n_scored = l->offsets[1] - l->stray_offsets[1], places = l->blocks[1] * BLOCK;
    query_point *q = p->points + c;
    int32_t best = INT32_MAX, least = 1 - ABSENT;
    double error = 0;
    if (p->n_probes < n_scored) {
        best = kth_score(scores, places, p->n_probes, p->n_probes / 8);
        n = places_between(scores, places, best, INT32_MAX, p->near);
        error = measure(p, c, 0, n);
        q->threshold = INT32_MIN;
        if (!set_threshold(q, farthest_key(p, n, error))) return 0;
        least = q->threshold > least ? q->threshold : least;
    }
    n_measured = n;
    if (least < best) n += places_between(scores, places, least, best, p->near + n);
    for (int64_t i = 0; i < l->stray_offsets[1]; i++) p->near[n++] = (int32_t)l->strays[i];
    error = fmax(error, measure(p, c, n_measured, n));
    if (n < p->n_probes) return 0;
    choose(p, n, error, probes);
    return 1;
}

int64_t NEAREST_LISTS(const skivfpq_lists *centers, const skivfpq_fine_points *fine, const skivfpq_queries *queries,
                      int64_t n_probes, int32_t *probes, uint8_t *unserved, char *scratch) {
    int64_t n = queries->n, width = centers->points.units * 4, places = centers->blocks[1] * BLOCK, used = 0;
    int64_t n_places = places + centers->stray_offsets[1] + 16;
    const query_point *points[COLUMNS];
    const column_level *levels[COLUMNS];
    probing p = {.centers = centers, .fine = fine, .n_probes = n_probes};
    column_level *panel = take(scratch, &used, sizeof(column_level) * COLUMNS * width);
    p.levels = take(scratch, &used, sizeof(column_level) * COLUMNS * width);
    p.heads = take(scratch, &used,
                   sizeof(float) * COLUMNS * (centers->points.embedding ? centers->points.embedding->width : 0));
    p.scores = take(scratch, &used, sizeof(int32_t) * (n < COLUMNS ? n : COLUMNS) * places);
    p.near = take(scratch, &used, sizeof(int32_t) * n_places);
    p.nearness = take(scratch, &used, sizeof(double) * n_places);
    p.ranks = take(scratch, &used, sizeof(int32_t) * n_places);
    p.open = take(scratch, &used, sizeof(candidate) * n_places);
    p.fine_codes = take(scratch, &used, sizeof(int16_t) * COLUMNS * centers->d);
    p.fine_origin = take(scratch, &used, sizeof(float) * centers->d);
    p.query = take(scratch, &used, sizeof(double) * centers->d);
    p.row = take(scratch, &used, sizeof(double) * centers->d);
    if (!scratch) return used;
    for (int64_t j = 0; j < centers->d; j++) p.fine_origin[j] = centers->metric == BY_PRODUCT ? 0 : centers->points.origin[j];
    for (int c = 0; c < COLUMNS; c++) points[c] = p.points + c, levels[c] = p.levels + c * width;
    memset(panel, 0, sizeof(column_level) * COLUMNS * width);
    memset(unserved, 1, n);
    begin_scan();
    for (int64_t first = 0; first < n; first += COLUMNS) {
        int n_queries = n - first < COLUMNS ? (int)(n - first) : COLUMNS;
        if (!set_queries(&p, queries, first, n_queries)) break;
        fill_panel(levels, n_queries, centers->points.units, panel);
        score_all(centers, 0, centers->blocks[1], points, n_queries, panel, p.scores);
        for (int c = 0; c < n_queries; c++) {
            load_query(queries, first + c, centers->d, p.query);
            unserved[first + c] = !probe_lists(&p, c, p.scores + c * places, probes + (first + c) * n_probes);
        }
    }
    end_scan();
    return 0;
}

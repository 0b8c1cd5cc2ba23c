/* The coarse step: which lists each query probes. Scores of int8 points tell which centers may be the nearest: fine
 * points (scan.h), 100 times as precise, of those with the best scores bound how far the last list can be, and scores
 * exclude what is farther. The few around the last place that fine points cannot tell apart are evaluated in float64.
 * How far the last list can be may also follow from the nearest few (limit_of). */
#include "scan.h"
#include "search.h"

#include "fine_points.h"
#include "queries.h"
#include "select.h"

#define RANKS 1e9 /* that nearness is told apart by */
#define FEW 4     /* nearest lists, whose mean is the base of a limit; probing.FEW */

typedef struct {
    double nearness;
    int32_t list;
} candidate;

typedef struct {
    const skivfpq_lists *centers;
    const skivfpq_fine_points *fine;
    int64_t n_probes;
    double reach;           /* of limits; INFINITY for none */
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
    double *nearness;       /* (places,) theirs, by fine points */
    int64_t n;              /* how many there are of a query */
    int32_t least;          /* all of such scores are */
    double error;           /* of their distances, or products */
    int32_t *ranks;         /* (places,) theirs */
    candidate *open;        /* (places,) of them those that fine points cannot tell apart */
    double *query, *row;    /* (d,) */
} probing;

static inline int is_nearer(candidate a, candidate b) {
    return a.nearness < b.nearness || (a.nearness == b.nearness && a.list < b.list);
}

SELECT(select_nearest, candidate, is_nearer)

/* Nearness, exactly, of the open candidates. */
static void evaluate_open(probing *p, int64_t n_open) {
    for (int64_t i = 0; i < n_open; i++)
        p->open[i].nearness = exact_key(p->centers, p->query, p->open[i].list, p->row);
}

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

/* Nearness of the candidates from the first to the last by fine points: squared distances, or minus products; error: how
 * wrong any distance, or product, may be. */
static void measure(probing *p, int c, int64_t first) {
    const skivfpq_lists *l = p->centers;
    const skivfpq_fine_points *fine = p->fine;
    int is_product = l->metric == BY_PRODUCT;
    double scale = p->fine_scales[c], sq_length = scale * scale * p->fine_sq_norms[c], length = sqrt(sq_length);
    double query_error = p->fine_errors[c], longest = 0;
    int64_t n = p->n;
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
    double sum_error = LARGEST_SUM_ERROR * (p->reaches[c] + (length + query_error) * longest), error;
    if (is_product) error = length * most + query_error * (longest + most) + sum_error + TINY;
    else error = (most + query_error) * (1 + ROUNDING) + 1e-6 * (length + longest) + TINY; /* roots of cancelled squares */
    p->error = fmax(p->error, error);
}

/* Nearness that differs by no more than an error of distances, or of products, from another: the greatest, the least. */
static double farther(const probing *p, double nearness, double error) {
    double distance = sqrt(fmax(nearness, 0)) * (1 + ROUNDING) + error;
    return p->centers->metric == BY_PRODUCT ? nearness + error : distance * distance;
}

static double nearer(const probing *p, double nearness, double error) {
    double distance = sqrt(fmax(nearness, 0)) * (1 - ROUNDING) - error;
    if (p->centers->metric == BY_PRODUCT) return nearness - error;
    return distance > 0 ? distance * distance : -INFINITY;
}

/* Nearness in whole numbers, the nearest the highest: OUT ranks (n,), and -ABSENT up to the next 16; in units of what
 * is returned, which starts from the lowest. */
static double rank_nearness(const double *nearness, int64_t n, double lowest, double highest, int32_t *ranks) {
    double unit = fmax((highest - lowest) / RANKS, fabs(highest) * 1e-15 + TINY * TINY), per_unit = 1 / unit;
    for (int64_t i = 0; i < n; i++) ranks[i] = (int32_t)((highest - nearness[i]) * per_unit);
    for (; n % 16; n++) ranks[n] = -ABSENT;
    return unit;
}

/* The n_probes nearest of the candidates, OUT probes, the nearest first: exactly. */
static void choose(probing *p, int64_t n_probes, int32_t *probes) {
    const double *nearness = p->nearness;
    int32_t *ranks = p->ranks;
    double lowest = nearness[0], highest = nearness[0];
    int64_t n = p->n, n_sure = 0, n_open = 0, first = 0, n_sooner = 0;
    for (int64_t i = 1; i < n; i++)
        lowest = nearness[i] < lowest ? nearness[i] : lowest, highest = nearness[i] > highest ? nearness[i] : highest;
    double unit = rank_nearness(nearness, n, lowest, highest, ranks);
    double last = highest - unit * kth_score(ranks, (n + 15) / 16 * 16, n_probes, 0); /* the last's, if unit less */
    int32_t sooner = n_probes > SOONER ? kth_score(ranks, (n + 15) / 16 * 16, SOONER, 0) : INT32_MAX;
    double high = farther(p, last, 2 * p->error), low = nearer(p, last - unit, 2 * p->error);
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
        evaluate_open(p, n_open);
        select_nearest(p->open, n_open, n_probes - n_sure);
    }
    for (int64_t i = 0; n_sure + i < n_probes; i++) probes[n_sure + i] = p->open[i].list;
    if (n_sure == 0)
        for (int64_t i = 1; i < n_probes; i++) first = is_nearer(p->open[i], p->open[first]) ? i : first;
    int32_t nearest = probes[first];
    probes[first] = probes[0], probes[0] = nearest;
}

/* More candidates of the query of column c: all whose scores are at least so high. */
static void extend(probing *p, int c, const int32_t *scores, int32_t least) {
    int64_t places = p->centers->blocks[1] * BLOCK, first = p->n;
    if (least >= p->least) return;
    p->n += places_between(scores, places, least, p->least, p->near + first), p->least = least;
    measure(p, c, first);
}

/* The least score of those that may be as near as a key; INT32_MIN where scores cannot tell. */
static int32_t least_score(query_point *q, double key) {
    q->threshold = INT32_MIN;
    if (!set_threshold(q, key)) return INT32_MIN;
    return q->threshold > 1 - ABSENT ? q->threshold : 1 - ABSENT;
}

/* More candidates: the k nearest up to a limit among them. Returns 0 where scores cannot tell. */
static int extend_to_nearest(probing *p, int c, const int32_t *scores, int64_t k, double limit) {
    int64_t n_strays = p->centers->stray_offsets[1], places = p->centers->blocks[1] * BLOCK;
    double farthest = -INFINITY;
    int32_t least = 1 - ABSENT;
    if (k < p->centers->offsets[1] - n_strays) {
        extend(p, c, scores, kth_score(scores, places, k, k / 8 + 1));
        for (int64_t i = n_strays; i < p->n; i++) farthest = p->nearness[i] > farthest ? p->nearness[i] : farthest;
        least = least_score(p->points + c, fmin(farther(p, farthest, p->error), limit));
    }
    if (least == INT32_MIN) return 0;
    extend(p, c, scores, least);
    return 1;
}

/* ---- adaptive probes */

/* Nearness of the FEW nearest of n open candidates, or all, OUT ascending; returns of how many. */
static int64_t nearest_few(const candidate *open, int64_t n, double *nearest) {
    int64_t few = 0;
    for (int64_t i = 0; i < FEW; i++) nearest[i] = INFINITY;
    for (int64_t i = 0; i < n; i++) {
        if (open[i].nearness >= nearest[FEW - 1]) continue;
        int64_t place = FEW - 1;
        for (; place > 0 && nearest[place - 1] > open[i].nearness; place--) nearest[place] = nearest[place - 1];
        nearest[place] = open[i].nearness;
    }
    while (few < FEW && nearest[few] < INFINITY) few++;
    return few;
}

/* The limit of what a query probes, by nearness of its FEW nearest lists, ascending: their mean, and reach times the size
 * of the nearest one's; not below that. */
static double limit_of(const probing *p, const double *nearest, int64_t few) {
    double sum = 0;
    for (int64_t i = 0; i < few; i++) sum += nearest[i];
    return fmax(sum / few + p->reach * fabs(nearest[0]), nearest[0]);
}

/* The same, at least and at most, as far as candidates tell by fine points, the FEW nearest lists among them. */
static void bound_limit(probing *p, double *low, double *high) {
    double nearest[FEW], lowest[FEW], highest[FEW], floor = p->centers->metric == BY_PRODUCT ? -INFINITY : 0;
    for (int64_t i = 0; i < p->n; i++) p->open[i] = (candidate){p->nearness[i], p->near[i]};
    int64_t few = nearest_few(p->open, p->n, nearest);
    for (int64_t i = 0; i < FEW; i++) {
        lowest[i] = fmax(nearer(p, nearest[i], p->error), floor);
        highest[i] = farther(p, nearest[i], p->error);
    }
    double slack = 2 * fabs(p->reach) * (highest[0] - lowest[0]); /* of the nearest one's size */
    *low = fmax(limit_of(p, lowest, few) - slack, lowest[0]), *high = limit_of(p, highest, few) + slack;
}

/* The same, exactly, of n open candidates, the FEW nearest lists among them. */
static double exact_limit(probing *p, int64_t n) {
    double nearest[FEW];
    int64_t few = nearest_few(p->open, n, nearest), n_open = 0;
    double last = farther(p, nearest[few - 1], 2 * p->error);
    for (int64_t i = 0; i < n; i++)
        if (p->open[i].nearness <= last) p->open[n_open++] = p->open[i];
    evaluate_open(p, n_open);
    nearest_few(p->open, n_open, nearest);
    return limit_of(p, nearest, few);
}

/* Keeps the candidates within the limit, which is between two bounds, exactly; the first n_first tell what it is. */
static void keep_within(probing *p, int64_t n_first, double low, double high) {
    double sure = nearer(p, low, p->error), never = farther(p, high, p->error), limit = 0;
    int64_t n = p->n, n_open = 0;
    for (int64_t i = 0; i < n; i++) n_open += p->nearness[i] >= sure && p->nearness[i] <= never;
    if (n_open > 0) limit = exact_limit(p, n_first);
    p->n = 0;
    for (int64_t i = 0; i < n; i++) {
        double nearness = p->nearness[i];
        int is_within = nearness < sure;
        if (!is_within && nearness <= never) is_within = exact_key(p->centers, p->query, p->near[i], p->row) <= limit;
        p->near[p->n] = p->near[i], p->nearness[p->n] = nearness, p->n += is_within;
    }
}

/* Candidates within the limit of the query of column c, up to n_probes of them the nearest; returns 0 where scores cannot
 * tell. */
static int find_within(probing *p, int c, const int32_t *scores) {
    int64_t n_lists = p->centers->offsets[1], places = p->centers->blocks[1] * BLOCK;
    double low, high;
    if (!extend_to_nearest(p, c, scores, n_lists < FEW ? n_lists : FEW, INFINITY)) return 0;
    int64_t n_first = p->n;
    bound_limit(p, &low, &high);
    int32_t least = least_score(p->points + c, high);
    if (least == INT32_MIN) return 0;
    if (count_from(scores, places, least) <= p->n_probes) extend(p, c, scores, least);
    else if (!extend_to_nearest(p, c, scores, p->n_probes, high)) return 0;
    keep_within(p, n_first, low, high);
    return 1;
}

/* The lists that the query of column c, which is loaded, probes; returns 0 where scores cannot serve. */
static int probe_lists(probing *p, int c, const int32_t *scores, int32_t *probes) {
    const skivfpq_lists *l = p->centers;
    p->n = l->stray_offsets[1], p->least = INT32_MAX, p->error = 0;
    for (int64_t i = 0; i < p->n; i++) p->near[i] = (int32_t)l->strays[i];
    measure(p, c, 0);
    if (!(p->reach < INFINITY ? find_within(p, c, scores) : extend_to_nearest(p, c, scores, p->n_probes, INFINITY))) return 0;
    int64_t n = p->n < p->n_probes ? p->n : p->n_probes;
    if (n < 1) return 0;
    choose(p, n, probes);
    for (; n < p->n_probes; n++) probes[n] = -1;
    return 1;
}

int64_t NEAREST_LISTS(const skivfpq_lists *centers, const skivfpq_fine_points *fine, const skivfpq_queries *queries,
                      int64_t n_probes, double reach, int32_t *probes, uint8_t *unserved, char *scratch) {
    int64_t n = queries->n, width = centers->points.units * 4, places = centers->blocks[1] * BLOCK, used = 0;
    int64_t n_places = places + centers->stray_offsets[1] + 16;
    const query_point *points[COLUMNS];
    const column_level *levels[COLUMNS];
    probing p = {.centers = centers, .fine = fine, .n_probes = n_probes, .reach = reach};
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

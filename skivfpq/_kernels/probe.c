/* The coarse step: which lists each query probes. Scores of int8 points tell which centers may be the nearest: fine
 * points (scan.h), 100 times as precise, of those with the best scores bound how far the last list can be, and scores
 * exclude what is farther. The few around the last place that fine points cannot tell apart are evaluated in float64.
 * How far the last list can be may also follow from the nearest few (limit_of).
 *
 * Centers may stand in groups, of which each query looks in some: queries that are next to the same ones are taken
 * together, and scored group by group. */
#include "scan.h"
#include "search.h"

#include "fine_points.h"
#include "queries.h"
#include "select.h"

#define RANKS 1e9 /* that nearness is told apart by */
#define FEW 4     /* nearest lists, whose mean is the base of a limit; probing.FEW */

typedef struct {
    double nearness;
    int32_t list, position; /* its number, and where it stands among the centers */
} candidate;

#define IN_GROUPS 64 /* queries that are taken together to look in groups; otherwise COLUMNS */
#define MOST_TOGETHER (COLUMNS > IN_GROUPS ? COLUMNS : IN_GROUPS) /* no more than bits of a mark */

typedef struct {
    const skivfpq_lists *centers;
    const skivfpq_fine_points *fine;
    const int32_t *groups;  /* (n, n_groups) that queries look in, -1 for none; NULL for all */
    int64_t n_groups, n_probes;
    double reach;           /* of limits; INFINITY for none */
    int32_t *order;         /* (n,) the queries, those that are next to the same group together */
    uint64_t *marks;        /* (n_lists of centers,) which of the queries at hand look in a group */
    int64_t *starts;        /* (n_lists of centers,) where queries of a group start in the order */
    query_point points[MOST_TOGETHER];
    double bases[MOST_TOGETHER], reaches[MOST_TOGETHER]; /* products with the origin, and those of sizes */
    float fine_scales[MOST_TOGETHER], fine_errors[MOST_TOGETHER]; /* of the queries' fine points */
    int32_t fine_sq_norms[MOST_TOGETHER];
    int16_t *fine_codes;    /* (MOST_TOGETHER, d) */
    float *fine_origin;     /* (d,) */
    float *heads;           /* (MOST_TOGETHER, width) of a head */
    column_level *levels;   /* (MOST_TOGETHER, 4 units) the queries' points */
    column_level *panel;    /* of COLUMNS of them */
    int32_t *scores;        /* of the queries at hand, one after the other: of the groups that each looks in */
    int64_t n_scores[MOST_TOGETHER]; /* of each */
    const int32_t *own_scores; /* (n_places,) of one */
    int32_t *own;           /* (n_own,) groups of that */
    int64_t n_own, n_centers, n_strays, n_places; /* centers, and those without a point, in them */
    int32_t *near;          /* (places,) candidates, those that may be among the nearest, where they stand */
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
        p->open[i].nearness = exact_key(p->centers, p->query, p->open[i].position, p->row);
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

/* Points of n queries of the order, from the first on. Returns 0 without memory. */
static int set_queries(probing *p, const skivfpq_queries *queries, int64_t first, int n) {
    const skivfpq_lists *l = p->centers;
    const skivfpq_fine_points fine = {p->fine_codes, p->fine_scales, p->fine_errors, p->fine_sq_norms};
    float bounds[MOST_TOGETHER];
    for (int c = 0; c < n; c++) {
        load_query(queries, p->order[first + c], l->d, p->query);
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
            probes[place] = p->centers->ids[p->near[i]];
        } else p->open[n_open++] = (candidate){nearness[i], p->centers->ids[p->near[i]], p->near[i]};
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
static void extend(probing *p, int c, int32_t least) {
    const skivfpq_lists *l = p->centers;
    const int32_t *scores = p->own_scores;
    int64_t first = p->n;
    if (least >= p->least) return;
    for (int64_t i = 0; i < p->n_own; i++) {
        int64_t group = p->own[i], places = (l->blocks[group + 1] - l->blocks[group]) * BLOCK;
        int64_t found = places_between(scores, places, least, p->least, p->near + p->n);
        for (int64_t j = 0; j < found; j++) p->near[p->n++] += (int32_t)l->offsets[group];
        scores += places;
    }
    p->least = least;
    measure(p, c, first);
}

/* The least score of those that may be as near as a key; INT32_MIN where scores cannot tell. */
static int32_t least_score(query_point *q, double key) {
    q->threshold = INT32_MIN;
    if (!set_threshold(q, key)) return INT32_MIN;
    return q->threshold > 1 - ABSENT ? q->threshold : 1 - ABSENT;
}

/* More candidates: the k nearest up to a limit among them. Returns 0 where scores cannot tell. */
static int extend_to_nearest(probing *p, int c, int64_t k, double limit) {
    double farthest = -INFINITY;
    int32_t least = 1 - ABSENT;
    if (k < p->n_centers - p->n_strays) {
        extend(p, c, kth_score(p->own_scores, p->n_places, k, k / 8 + 1));
        for (int64_t i = p->n_strays; i < p->n; i++) farthest = p->nearness[i] > farthest ? p->nearness[i] : farthest;
        least = least_score(p->points + c, fmin(farther(p, farthest, p->error), limit));
    }
    if (least == INT32_MIN) return 0;
    extend(p, c, least);
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
    for (int64_t i = 0; i < p->n; i++) p->open[i] = (candidate){p->nearness[i], 0, p->near[i]};
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
static int find_within(probing *p, int c) {
    double low, high;
    if (!extend_to_nearest(p, c, p->n_centers < FEW ? p->n_centers : FEW, INFINITY)) return 0;
    int64_t n_first = p->n;
    bound_limit(p, &low, &high);
    int32_t least = least_score(p->points + c, high);
    if (least == INT32_MIN) return 0;
    if (count_from(p->own_scores, p->n_places, least) <= p->n_probes) extend(p, c, least);
    else if (!extend_to_nearest(p, c, p->n_probes, high)) return 0;
    keep_within(p, n_first, low, high);
    return 1;
}

/* ---- groups */

/* The group that a query is next to; of those that look in none, and where all are looked in, the first. */
static int64_t group_of(const probing *p, int64_t number) {
    int32_t group = p->groups ? p->groups[number * p->n_groups] : 0;
    return group < 0 ? 0 : group;
}

/* The order of the queries. */
static void set_order(probing *p, int64_t n) {
    int64_t *next = p->starts, place = 0;
    memset(next, 0, sizeof(int64_t) * p->centers->n_lists);
    for (int64_t i = 0; i < n; i++) next[group_of(p, i)]++;
    for (int64_t g = 0; g < p->centers->n_lists; g++) {
        int64_t size = next[g];
        next[g] = place, place += size;
    }
    for (int64_t i = 0; i < n; i++) p->order[next[group_of(p, i)]++] = (int32_t)i;
}

/* Which of n queries of the order look in a group, and how many scores each has. */
static void mark_groups(probing *p, int64_t first, int n) {
    const skivfpq_lists *l = p->centers;
    for (int64_t g = 0; g < l->n_lists; g++) p->marks[g] = p->groups ? 0 : UINT64_MAX >> (64 - n);
    for (int c = 0; c < n; c++) {
        const int32_t *own = p->groups ? p->groups + p->order[first + c] * p->n_groups : NULL;
        p->n_scores[c] = own ? 0 : l->blocks[l->n_lists] * BLOCK;
        for (int64_t i = 0; i < p->n_groups && own; i++) {
            if (own[i] < 0) break;
            p->marks[own[i]] |= (uint64_t)1 << c;
            p->n_scores[c] += (l->blocks[own[i] + 1] - l->blocks[own[i]]) * BLOCK;
        }
    }
}

/* Their scores, group by group. */
static void score_groups(probing *p, int64_t first, int n) {
    const skivfpq_lists *l = p->centers;
    int32_t *ends[MOST_TOGETHER], *scores = p->scores, *outs[COLUMNS];
    const column_level *levels[COLUMNS];
    const query_point *points[COLUMNS];
    mark_groups(p, first, n);
    for (int c = 0; c < n; c++) ends[c] = scores, scores += p->n_scores[c];
    for (int64_t g = 0; g < l->n_lists; g++) {
        int64_t n_blocks = l->blocks[g + 1] - l->blocks[g];
        for (uint64_t left = p->marks[g]; left;) {
            int m = 0;
            for (; left && m < COLUMNS; left &= left - 1, m++) {
                int c = __builtin_ctzll(left);
                points[m] = p->points + c, levels[m] = p->levels + c * 4 * l->points.units;
                outs[m] = ends[c], ends[c] += n_blocks * BLOCK;
            }
            fill_panel(levels, m, l->points.units, p->panel);
            score_all(l, l->blocks[g], n_blocks, points, m, p->panel, outs);
        }
    }
}

/* What the query of column c looks at: its groups, and their strays. */
static void look(probing *p, int c) {
    const skivfpq_lists *l = p->centers;
    p->n = p->n_own = p->n_centers = 0, p->n_places = p->n_scores[c];
    for (int64_t g = 0; g < l->n_lists; g++) {
        if (!(p->marks[g] >> c & 1)) continue;
        for (int64_t i = l->stray_offsets[g]; i < l->stray_offsets[g + 1]; i++) p->near[p->n++] = (int32_t)l->strays[i];
        p->own[p->n_own++] = (int32_t)g, p->n_centers += l->offsets[g + 1] - l->offsets[g];
    }
    p->n_strays = p->n;
}

/* The lists that the query of column c, which is loaded and looks at some, probes; returns 0 where scores cannot serve. */
static int probe_lists(probing *p, int c, int32_t *probes) {
    p->least = INT32_MAX, p->error = 0;
    if (p->n_centers == 0) return 0;
    measure(p, c, 0);
    if (!(p->reach < INFINITY ? find_within(p, c) : extend_to_nearest(p, c, p->n_probes, INFINITY))) return 0;
    int64_t n = p->n < p->n_probes ? p->n : p->n_probes;
    if (n < 1) return 0;
    choose(p, n, probes);
    for (; n < p->n_probes; n++) probes[n] = -1;
    return 1;
}

/* Scratch memory of so many queries; returns its bytes. */
static int64_t lay_out(probing *p, int64_t n, char *scratch) {
    const skivfpq_lists *l = p->centers;
    int64_t width = l->points.units * 4, d = l->d, n_lists = l->n_lists, used = 0;
    int64_t places = l->blocks[n_lists] * BLOCK, n_places = places + l->stray_offsets[n_lists] + 16;
    int64_t n_together = n < MOST_TOGETHER ? n : MOST_TOGETHER, looked_at = places, largest = 0;
    for (int64_t g = 0; g < n_lists; g++)
        largest = l->blocks[g + 1] - l->blocks[g] > largest ? l->blocks[g + 1] - l->blocks[g] : largest;
    if (p->n_groups == 0) n_together = n < COLUMNS ? n : COLUMNS;
    else if (p->n_groups * largest * BLOCK < places) looked_at = p->n_groups * largest * BLOCK;
    p->panel = take(scratch, &used, sizeof(column_level) * COLUMNS * width);
    p->levels = take(scratch, &used, sizeof(column_level) * MOST_TOGETHER * width);
    p->heads = take(scratch, &used, sizeof(float) * MOST_TOGETHER * (l->points.embedding ? l->points.embedding->width : 0));
    p->scores = take(scratch, &used, sizeof(int32_t) * n_together * looked_at);
    p->order = take(scratch, &used, sizeof(int32_t) * n);
    p->marks = take(scratch, &used, sizeof(uint64_t) * n_lists);
    p->starts = take(scratch, &used, sizeof(int64_t) * n_lists);
    p->own = take(scratch, &used, sizeof(int32_t) * n_lists);
    p->near = take(scratch, &used, sizeof(int32_t) * n_places);
    p->nearness = take(scratch, &used, sizeof(double) * n_places);
    p->ranks = take(scratch, &used, sizeof(int32_t) * n_places);
    p->open = take(scratch, &used, sizeof(candidate) * n_places);
    p->fine_codes = take(scratch, &used, sizeof(int16_t) * MOST_TOGETHER * d);
    p->fine_origin = take(scratch, &used, sizeof(float) * d);
    p->query = take(scratch, &used, sizeof(double) * d);
    p->row = take(scratch, &used, sizeof(double) * d);
    return used;
}

int64_t NEAREST_LISTS(const skivfpq_lists *centers, const skivfpq_fine_points *fine, const skivfpq_queries *queries,
                      const int32_t *groups, int64_t n_groups, int64_t n_probes, double reach, int32_t *probes,
                      uint8_t *unserved, char *scratch) {
    int64_t n = queries->n, width = centers->points.units * 4, n_together = groups ? IN_GROUPS : COLUMNS;
    probing p = {.centers = centers, .fine = fine, .groups = groups, .n_groups = n_groups, .n_probes = n_probes,
                 .reach = reach};
    int64_t n_bytes = lay_out(&p, n, scratch);
    if (!scratch) return n_bytes;
    for (int64_t j = 0; j < centers->d; j++) p.fine_origin[j] = centers->metric == BY_PRODUCT ? 0 : centers->points.origin[j];
    memset(p.panel, 0, sizeof(column_level) * COLUMNS * width);
    memset(unserved, 1, n);
    set_order(&p, n);
    begin_scan();
    for (int64_t first = 0; first < n; first += n_together) {
        int n_queries = n - first < n_together ? (int)(n - first) : (int)n_together;
        if (!set_queries(&p, queries, first, n_queries)) break;
        score_groups(&p, first, n_queries);
        p.own_scores = p.scores;
        for (int c = 0; c < n_queries; c++, p.own_scores += p.n_places) {
            int64_t number = p.order[first + c];
            load_query(queries, number, centers->d, p.query);
            look(&p, c);
            unserved[number] = !probe_lists(&p, c, probes + number * n_probes);
        }
    }
    end_scan();
    return 0;
}

/* The certified search: the nearest rows of the lists that each query probes (search.c), and those lists (probe.c). */
#ifndef SKIVFPQ_SEARCH_H
#define SKIVFPQ_SEARCH_H

#include "levels.h"
#include "scan.h"

#include <stdint.h>

#define SEARCH_LISTS LEVELLED(search_lists, LEVEL)
#define SEARCH_CODES LEVELLED(search_codes, LEVEL)
#define QUERY_LEVELS LEVELLED(query_levels, LEVEL)
#define RANK_ROWS LEVELLED(rank_rows, LEVEL)
#define NEAREST_LISTS LEVELLED(nearest_lists, LEVEL)

/* What orders rows: the squared distance, half of it between rows brought to length one (1 - cosine), or minus
 * the inner product. */
enum { BY_DISTANCE, BY_COSINE, BY_PRODUCT };

/* How rows are kept; CODED ones as codes alone. */
enum { FLOAT64, FLOAT32, FLOAT16, INT8, UINT8, CODED };

/* Codes of the rows of lists, as adc.c has them. In its lists they stand subspace by subspace: column m of a list of n
 * rows starts m * ceil(n / 16) * 16 codes after the list's first, 64 bytes may be read behind the last. Everything is
 * IN, and what is said to be scaled is in terms of unit, a power of two. */
typedef struct {
    const void *columns;      /* uint8; uint16 where n_codewords > 256; two codes in a byte where n_codewords is 16 */
    int64_t n_subspaces, n_columns;
    int64_t n_codewords;      /* of a table: 16, 256 or more, a multiple of 16 */
    const int64_t *features;  /* (n_subspaces + 1,) the first of each subspace */
    const int64_t *starts;    /* (n_subspaces,) where the codewords of each begin */
    const void *codewords;    /* (k_m, width_m) one subspace after the other */
    int is_f64;               /* whether codewords are float64, and decoded rows */
    const float *scaled;      /* (d, n_codewords) features of codewords, scaled */
    const int16_t *levels;    /* (n_pairs, n_codewords, 2) pairs of features of codewords, of scale level */
    const int64_t *pairs;     /* (n_subspaces + 1,) the first pair of each subspace */
    const double *anchors;    /* (n_lists, d), or NULL for zeros */
    const double *origin;     /* (d,) */
    const float *terms;       /* (n,) |y|^2 + 2 (a - o).y, scaled; 1 / |a + y| for the cosine; NULL for products */
    double unit, level;       /* level: scaled; no part of a codeword is longer than 32000 of it */
    double longest_word, longest_anchor; /* at most |y| and |a - o|, scaled */
    double largest_term;
    double reach, rounding;   /* |a + y| at most; by how much of it rows of float64 may differ from decoded ones */
    const uint8_t *allowed;   /* (n,) whether a row may be found, or NULL */
} skivfpq_coded;

/* int8 points of rows: x - origin, or y(x) by an embedding, is scale a + e with |e| <= error. Everything is IN. */
typedef struct {
    const uint8_t *codes;      /* (n_blocks, units, 16, 4) a + 128; lists start with a new block. Row by row: (n, units, 4) */
    const int32_t *terms;      /* (n_blocks, 16) row terms; ABSENT where there is no row, or one not to be found so; (n,) */
    int64_t units;
    const float *origin;       /* (d,) */
    double scale, query_scale; /* of points of rows, and of queries */
    double error, longest;     /* longest: of scale a */
    const skivfpq_embedding *embedding; /* NULL: all features */
} skivfpq_points;

/* Rows list by list. Everything is IN. */
typedef struct {
    const void *vectors;       /* (n, d) as they are kept */
    int kind, metric;
    int64_t d;
    const int64_t *offsets;    /* (n_lists + 1,) where each list starts */
    int64_t n_lists;
    const int32_t *ids;        /* (n,) what orders rows of equal keys */
    const int64_t *blocks;     /* (n_lists + 1,) the first block of each list */
    skivfpq_points points;     /* which are scanned, block by block */
    const skivfpq_points *whole; /* the same rows by all features, row by row, where points are of their heads; or NULL */
    const int64_t *strays;     /* positions of rows without a point, list by list */
    const int64_t *stray_offsets; /* (n_lists + 1,) */
    const uint8_t *odd;        /* (n / 8,) a bit for each row of integers, whether |a|^2 s / t is odd; NULL: of no integers */
    const skivfpq_coded *coded; /* of CODED rows, instead of their points */
} skivfpq_lists;

#define ABSENT 1000000000
#define SOONER 4 /* of the lists that a query probes, about the nearest, which are searched before the others */

/* Queries (n, d), as the metric sees them. */
typedef struct {
    const void *values;
    int is_f64;
    int64_t n;
} skivfpq_queries;

/* Scratch memory starts at a line of the cache; without any (NULL) only the bytes that it must have are returned,
 * else 0. */
#define DECLARE_SEARCH                                                                               \
    /* scale / query_scale for points of so many features, units filled up. */                       \
    int64_t QUERY_LEVELS(int64_t width);                                                             \
    /* The k nearest rows of queries in the lists (n, n_probes) that they probe, nearest first, -1 for none: */ \
    /* keys and positions OUT (n, k), unserved OUT (n,): 1 where points cannot serve, or there are fewer rows. */ \
    int64_t SEARCH_LISTS(const skivfpq_lists *lists, const skivfpq_queries *queries, const int32_t *probes, \
                         int64_t n_probes, int64_t k, double *keys, int64_t *positions, uint8_t *unserved, \
                         char *scratch);                                                             \
    /* The same by codes. */                                                                         \
    int64_t SEARCH_CODES(const skivfpq_lists *lists, const skivfpq_queries *queries, const int32_t *probes, \
                         int64_t n_probes, int64_t k, double *keys, int64_t *positions, uint8_t *unserved, \
                         char *scratch);                                                             \
    /* The k nearest of the rows at candidates (n, n_candidates): keys and positions OUT (n, k). */  \
    int64_t RANK_ROWS(const skivfpq_lists *lists, const skivfpq_queries *queries, const int64_t *candidates, \
                      int64_t n_candidates, int64_t k, double *keys, int64_t *positions, char *scratch); \
    /* The n_probes nearest centers of queries, of those that stand in some groups, the lists of centers: groups */ \
    /* (n, n_groups), -1 in front for none, NULL for all. Centers have fine points (of x - origin), their ids are */ \
    /* their numbers. probes OUT (n, n_probes), the nearest first, then near ones (SOONER), then the others. Of them */ \
    /* only those as near as the mean of the four nearest and reach times the nearest, by squared distance or minus */ \
    /* the product; -1 for none; the nearest always. INFINITY: all. unserved OUT (n,) as above. */     \
    int64_t NEAREST_LISTS(const skivfpq_lists *centers, const skivfpq_fine_points *fine,             \
                          const skivfpq_queries *queries, const int32_t *groups, int64_t n_groups,   \
                          int64_t n_probes, double reach, int32_t *probes, uint8_t *unserved, char *scratch);
#ifdef LEVEL
DECLARE_SEARCH
#endif

#endif

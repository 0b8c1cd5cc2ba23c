/* The lane kernel: float32 or float64 scores of every center for some rows, in lanes.c. */
#ifndef SKIVFPQ_LANES_H
#define SKIVFPQ_LANES_H

#include "levels.h"

#include <stdint.h>

#define PASTE3_(a, b, c) a##_##b##_##c
#define PASTE3(a, b, c) PASTE3_(a, b, c)
#define SCORE(suffix) PASTE3(skivfpq_score_rows, suffix, LEVEL)
#define TILE(suffix) PASTE3(skivfpq_tile_rows, suffix, LEVEL)
#define PACK_TILES(suffix) PASTE3(skivfpq_pack_tiles, suffix, LEVEL)

/* Labels those of the rows whose best center is certain; keeps the others at the front of rows and
 * returns their number, or -1 when scratch memory is missing (n_rows < 0 is passed on). With tiles
 * that PACK_TILES made of all rows, rows must be consecutive ones from the start of a tile. */
#define SCORE_ARGUMENTS \
    const void *X, int is_f64, int64_t n_features, const double *origin, double scale, const double *centers, \
        int64_t n_clusters, const void *tiles, const double *lengths, int64_t *rows, int64_t n_rows, int32_t *labels
#define DECLARE_SCORE(suffix)                                                                        \
    int64_t SCORE(suffix)(const void *X, int is_f64, int64_t n_features,  /* IN (n, d) f32 or f64 */ \
                          const double *origin, double scale,             /* IN (d,) */              \
                          const double *centers, int64_t n_clusters,      /* IN (k, d) */            \
                          const void *tiles, const double *lengths,       /* IN or NULL */           \
                          int64_t *rows, int64_t n_rows,                  /* INOUT (n_rows,) */      \
                          int32_t *labels);                               /* OUT (n,) */             \
    /* Rows of a tile. */                                                                            \
    int64_t TILE(suffix)(void);                                                                      \
    /* Rows transposed into tiles (n_tiles, d, tile rows), shifted, scaled, negated; their lengths. The last row \
     * fills the last tile up. */                                                                    \
    void PACK_TILES(suffix)(const void *X, int is_f64, int64_t first_row, int64_t last_row,          \
                            int64_t n_features, const double *origin, double scale, void *tiles,     \
                            double *lengths)
DECLARE_SCORE(f32);
DECLARE_SCORE(f64);

/* Float scores of candidates for k-means++: what may be closer to them. */
#define LIMIT LEVELLED(limit, LEVEL)
#define PACK_CANDIDATES LEVELLED(pack_candidates, LEVEL)
#define CLOSER_ROWS LEVELLED(closer_rows, LEVEL)
#define PANEL_CENTERS LEVELLED(panel_centers, LEVEL)

/* The score at most of a candidate that is closer to a row, of this length in tiles, than sq_distance. */
float LIMIT(double sq_distance, double length, int64_t d, double scale);
/* Candidates of a panel. */
int PANEL_CENTERS(void);
void PACK_CANDIDATES(const double *candidates, int64_t k, int64_t d, /* IN (k, d) */
                     const double *origin, double scale,             /* IN (d,), of the tiles */
                     float *panels, float *starts); /* OUT (n_panels, d, PANEL_CENTERS), (n_panels, ..) */
/* Bit r of hits (n_tiles, n_panels * PANEL_CENTERS): whether row r of a tile may be closer to a candidate.
 * gains (n_panels * PANEL_CENTERS,): the weighted sum of how far below their limits scores are. */
void CLOSER_ROWS(const float *tiles, int64_t n_tiles, int64_t d, const float *limits, const float *weights, /* IN */
                 const float *panels, const float *starts, int64_t k,                                       /* IN */
                 uint64_t *hits, double *gains);                                                            /* OUT */

/* out = V axes. */
#define MULTIPLY LEVELLED(multiply, LEVEL)
void MULTIPLY(const float *V, int64_t n, int64_t d, const float *axes, int64_t width, /* IN (n, d), (d, width) */
              float *out);                                                            /* OUT (n, width) */

/* Rows (m, d) INOUT made orthonormal, in their order; zeros where those before leave nothing. */
#define ORTHONORMALIZE LEVELLED(orthonormalize, LEVEL)
void ORTHONORMALIZE(double *Q, int64_t m, int64_t d);

#endif

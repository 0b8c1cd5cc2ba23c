/* The certified int8 scan: planes of rows, panels of columns, and the nearest of them (scan.c). */
#ifndef SKIVFPQ_SCAN_H
#define SKIVFPQ_SCAN_H

#include "levels.h"

#include <stdint.h>

#define SCAN_SHAPE LEVELLED(scan_shape, LEVEL)
#define PACK_ROWS LEVELLED(pack_rows, LEVEL)
#define PACK_PLANE LEVELLED(pack_plane, LEVEL)
#define PACK_COLUMNS LEVELLED(pack_columns, LEVEL)
#define CERTIFIED_NEAREST LEVELLED(certified_nearest, LEVEL)
#define PACK_FINE LEVELLED(pack_fine, LEVEL)
#define PROJECT LEVELLED(project, LEVEL)
#define EMBED LEVELLED(embed, LEVEL)
#define EMBED_FINE LEVELLED(embed_fine, LEVEL)
#define SET_CLOSEST LEVELLED(set_closest, LEVEL)
#define SCORE_CANDIDATES LEVELLED(score_candidates, LEVEL)
#define CLOSER_CANDIDATES LEVELLED(closer_candidates, LEVEL)

/* What the instruction set asks of the packed arrays. */
typedef struct {
    int columns;        /* of a panel */
    int largest_column; /* bound of the int8 columns */
    int units_multiple; /* units (of four features) come in multiples of this */
    int wraps;          /* whether scores are known modulo 2^16 only */
} skivfpq_scan_shape;

/* x - origin = scale q + e of rows or centers, all features. */
typedef struct {
    const int16_t *codes;    /* (n, d) q */
    const float *scales;     /* (n,) */
    const float *errors;     /* (n,) |e| */
    const int32_t *sq_norms; /* (n,) |q|^2 */
} skivfpq_fine_points;

/* Points y of rows are x - origin or, with axes, its products with these, that is int16 levels times axes_scale,
 * and in the columns that they leave the length of what they leave less tail_origin, evenly. */
typedef struct {
    const float *origin;  /* (d,) */
    const int16_t *axes;  /* (pairs of features, axes, 2) or NULL; width and d rounded up to whole 16 and pairs */
    double axes_scale;    /* no product is longer than the row */
    int64_t n_axes, width;
    double tail_origin;
} skivfpq_embedding;

/* Rows as the lane kernel has them (lanes.h). */
typedef struct {
    const float *tiles;    /* (n_tiles, d, tile rows) */
    const double *lengths; /* (n,) */
    const double *origin;  /* (d,) */
    double scale;
} skivfpq_lane_rows;

/* Rows against centers. Everything is IN. */
typedef struct {
    const void *X;             /* (n, d) float32 or float64 */
    int is_f64;
    int64_t n_features;
    const double *centers;     /* (k, d) */
    skivfpq_fine_points fine_rows, fine_centers;
    skivfpq_lane_rows lanes;   /* of k-means++ */
    const uint8_t *codes;      /* (n_blocks, units, 16, 4) or (n, units, 4); NULL: the lanes serve */
    const int32_t *sq_norms;   /* (n,) of the rows' int8 points */
    const float *errors;       /* (n,) |y - s q|, inf for rows that are not to be scanned */
    double row_scale;
    int64_t units;
    const int8_t *panels;      /* (n_panels, units * columns * 4) */
    const int32_t *starts;     /* (n_panels * columns,) */
    double column_scale, column_error;
    const double *drifts;      /* (n_columns,) how far each center has moved at most, falling */
    const double *moved;       /* (k,) the same by center */
    const int32_t *ids;        /* (n_columns + n_far,) which centers */
    int64_t n_columns;
    const double *far_lengths; /* (n_far,) |y|, at least, of centers too long for the panels */
    int64_t n_far;
} skivfpq_scan;

#define DECLARE_SCAN                                                                                 \
    extern const skivfpq_scan_shape SCAN_SHAPE;                                                      \
    /* int8 points of rows y (n, width), padded with zeros to 4 * units features; codes are */       \
    /* (n / lanes, units, lanes, 4). */                                                              \
    void PACK_ROWS(const float *Y, int64_t n, int64_t width, double scale, const float *bounds,      \
                   int64_t units, int64_t lanes, uint8_t *codes, int32_t *sq_norms, float *errors);  \
    /* The same of columns, with their starts; returns the largest of their errors. */               \
    double PACK_COLUMNS(const float *Y, int64_t k, int64_t width, double scale, const float *bounds, \
                        double row_scale, int64_t units, int8_t *panels, int32_t *starts);           \
    /* out (n, axes) = codes (n, d) axes, exact for fine points and axes of their length. 0, or -1 without memory. */ \
    int PROJECT(const int16_t *codes, int64_t n, int64_t d, const int16_t *axes, int64_t n_axes, int32_t *out); \
    /* Points Y (n, width) and bounds (n,) of |Y - y|. 0, or -1 without memory. */                    \
    int EMBED(const void *X, int is_f64, int64_t n, int64_t d, const skivfpq_embedding *embedding,   \
              float *Y, float *bounds);                                                              \
    /* The same of rows known by fine points, of the embedding's origin and with axes. */             \
    int EMBED_FINE(const skivfpq_fine_points *fine, int64_t n, int64_t d, const skivfpq_embedding *embedding, \
                   float *Y, float *bounds);                                                         \
    /* PACK_FINE if with_fine, and PACK_ROWS of the points of the rows first..last, first a multiple of lanes; */ \
    /* outputs are those of all rows. 0, or -1 without memory. */                                     \
    int PACK_PLANE(const void *X, int is_f64, int64_t d, int64_t first, int64_t last,                \
                   const skivfpq_embedding *embedding, double scale, int64_t units, int64_t lanes,   \
                   uint8_t *codes, int32_t *sq_norms, float *errors, int with_fine, int16_t *fine_codes, \
                   float *fine_scales, float *fine_errors, int32_t *fine_sq_norms);                  \
    /* labels INOUT: any center of each row, or -1, then its nearest. upper INOUT: that center was no farther, */ \
    /* before the centers moved and after. lower INOUT: no other was nearer; centers within margin of the */ \
    /* nearest are found for that. Returns how many rows are left undone, their numbers in unserved, */ \
    /* or -1 without memory. */                                                                      \
    int64_t CERTIFIED_NEAREST(const skivfpq_scan *s, int64_t first_row, int64_t last_row,            \
                              double margin, int32_t *labels, double *upper, double *lower,          \
                              int64_t *unserved);                                                    \
    void PACK_FINE(const void *X, int is_f64, int64_t n, int64_t d, const float *origin,             \
                   int16_t *codes, float *scales, float *errors, int32_t *sq_norms);                 \
    /* closest[rows[i]] = sq_distances[i], and the thresholds and limits (n,) that follow. */        \
    void SET_CLOSEST(const skivfpq_scan *s, const int32_t *rows, int64_t n,                          \
                     const double *sq_distances, double *closest, int32_t *thresholds, int32_t *caps, \
                     float *limits);                                                                 \
    /* For each center and each part of the rows (part_rows of them, a multiple of 16), those that are */ \
    /* closer to it than closest (n,), in rows and sq_distances OUT (k, n) from the part's first row */ \
    /* on, n_closer OUT (n_parts, k) of them, and gains OUT (n_parts, k): the weighted sum of what */ \
    /* they win. By codes and thresholds or, without codes, by the hits (n_tiles, hits_width) of      */ \
    /* SCORE_CANDIDATES, for the centers that are wanted (k,). Returns the number of pairs evaluated. */ \
    int64_t CLOSER_CANDIDATES(const skivfpq_scan *s, const int32_t *thresholds, const int32_t *caps, \
                              const uint64_t *hits, int64_t hits_width, const uint8_t *wanted,       \
                              const double *closest, const double *weights, int64_t n_rows,          \
                              int64_t part_rows, int64_t first_part, int64_t last_part,              \
                              int32_t *rows, double *sq_distances, int64_t *n_closer, double *gains); \
    /* CLOSER_ROWS (lanes.h) for some parts, whole tiles each: hits OUT (n_tiles, n_panels *         \
     * PANEL_CENTERS), gains OUT (n_parts, the same). 0, or -1 without memory. */                     \
    int SCORE_CANDIDATES(const skivfpq_scan *s, const float *limits, const float *weights,           \
                         int64_t n_rows, int64_t part_rows, int64_t first_part, int64_t last_part,   \
                         uint64_t *hits, double *gains);
#ifdef LEVEL
DECLARE_SCAN
#endif

#endif

/* The native kernels: plain C on arrays, no Python, no allocation of outputs, no BLAS, no threads.
 * kernels.c is compiled once for each instruction set; dispatch.c picks one table at import. */
#ifndef SKIVFPQ_KERNELS_H
#define SKIVFPQ_KERNELS_H

#include "scan.h"
#include "search.h"

#include <stdint.h>

typedef struct {
    /* Nearest center of each row, lowest index on ties; 0, or -1 when scratch memory is missing. */
    int (*nearest_centers_f32)(const float *X, int64_t n_samples, int64_t n_features, /* IN (n, d) */
                               const double *centers, int64_t n_clusters,             /* IN (k, d) */
                               int32_t *labels, double *sq_distances);                /* OUT (n,) */
    int (*nearest_centers_f64)(const double *X, int64_t n_samples, int64_t n_features,
                               const double *centers, int64_t n_clusters,
                               int32_t *labels, double *sq_distances);
    /* out[i, j] = sum over m of tables[queries[i], m, codes[j, m]], added in the order of m. */
    void (*adc_scan_u8)(const double *tables, int64_t n_subspaces, int64_t n_codewords, /* IN (q, M, K) */
                        const int64_t *queries, int64_t n_queries,                      /* IN (n_queries,) */
                        const uint8_t *codes, int64_t n_codes,                          /* IN (n_codes, M) */
                        double *out);                                       /* OUT (n_queries, n_codes) */
    void (*adc_scan_u16)(const double *tables, int64_t n_subspaces, int64_t n_codewords,
                         const int64_t *queries, int64_t n_queries,
                         const uint16_t *codes, int64_t n_codes, double *out);
    /* Weighted sums and total weights of some clusters; rows of cluster i are order[bounds[i]..bounds[i + 1]). */
    void (*cluster_sums_f32)(const float *X, int64_t n_features, const double *weights, /* IN (n, d), (n,) */
                             const int32_t *order, const int32_t *bounds,               /* IN (n,), (k + 1,) */
                             const int64_t *clusters, int64_t n_clusters,               /* IN (n_clusters,) */
                             double *sums, double *counts);                             /* OUT (k, d), (k,) */
    void (*cluster_sums_f64)(const double *X, int64_t n_features, const double *weights, const int32_t *order,
                             const int32_t *bounds, const int64_t *clusters, int64_t n_clusters,
                             double *sums, double *counts);
    /* out[i] = sum over j of mix(X[i, j]) * factors[j], modulo 2^64; of values rounded to float if single. */
    void (*row_hashes_f32)(const float *X, int64_t n, int64_t d, const uint64_t *factors, int single,
                           uint64_t *out);
    void (*row_hashes_f64)(const double *X, int64_t n, int64_t d, const uint64_t *factors, int single,
                           uint64_t *out);
    /* Described in lanes.h. */
    void (*multiply)(const float *V, int64_t n, int64_t d, const float *axes, int64_t width, float *out);
    void (*orthonormalize)(double *Q, int64_t m, int64_t d);
    /* Nearest centers from rows that pack_tiles transposed once, first a multiple of tile_rows(), or NULL, NULL. */
    int (*nearest_packed)(const void *X, int is_f64, int64_t d, const double *centers, int64_t k, const double *origin,
                          double scale, const float *tiles, const double *lengths, int64_t first, int64_t last,
                          int32_t *labels);
    int64_t (*tile_rows)(void);
    void (*pack_tiles)(const void *X, int is_f64, int64_t first, int64_t last, int64_t d, const double *origin,
                       double scale, void *tiles, double *lengths);
    /* Row numbers sorted by label, and where each label starts: OUT (n,), (k + 1,). */
    void (*order_by_label)(const int32_t *labels, int64_t n, int64_t k, int32_t *order, int32_t *bounds);
    /* The certified scan, described in scan.h. */
    const skivfpq_scan_shape *scan_shape;
    void (*pack_rows)(const float *, int64_t, int64_t, double, const float *, int64_t, int64_t, uint8_t *, int32_t *,
                      float *);
    double (*pack_columns)(const float *, int64_t, int64_t, double, const float *, double, int64_t, int8_t *,
                           int32_t *);
    int64_t (*certified_nearest)(const skivfpq_scan *, int64_t, int64_t, double, int32_t *, double *, double *,
                                 int64_t *);
    int (*project)(const int16_t *, int64_t, int64_t, const int16_t *, int64_t, int32_t *);
    int (*embed)(const void *, int, int64_t, int64_t, const skivfpq_embedding *, float *, float *);
    void (*pack_fine)(const void *, int, int64_t, int64_t, const float *, int16_t *, float *, float *, int32_t *);
    void (*set_closest)(const skivfpq_scan *, const int32_t *, int64_t, const double *, double *, int32_t *,
                        int32_t *, float *);
    int64_t (*closer_candidates)(const skivfpq_scan *, const int32_t *, const int32_t *, const uint64_t *, int64_t,
                                 const uint8_t *, const double *, const double *, int64_t, int64_t, int64_t, int64_t,
                                 int32_t *, double *, int64_t *, double *);
    /* Weighted sums (k, d) of all clusters, some columns of them, and total weights (k,), with column 0 only;
     * the same bits as cluster_sums. */
    void (*add_rows_f32)(const float *X, int64_t n, int64_t d, const double *weights, const int32_t *labels, int64_t k,
                         int64_t first_column, int64_t last_column, double *sums, double *counts);
    void (*add_rows_f64)(const double *X, int64_t n, int64_t d, const double *weights, const int32_t *labels,
                         int64_t k, int64_t first_column, int64_t last_column, double *sums, double *counts);
    /* codes (n, n_subspaces): the nearest codeword, lowest on ties, in each range of columns[m]..columns[m + 1];
     * codewords: (k_m, width_m) one after the other, k_m = first_codewords[m + 1] - first_codewords[m]. 0, or -1
     * without memory. */
    int (*encode)(const void *X, int is_f64, int64_t n, int64_t d, int64_t n_subspaces, const int64_t *columns,
                  const double *codewords, const int64_t *first_codewords, int code_bytes, void *codes);
    /* out[i] = |X[i] - centers[labels[i]]|^2 */
    void (*row_sq_distances)(const void *X, int is_f64, int64_t n, int64_t d, const double *centers,
                             const int32_t *labels, double *out);
    int (*score_candidates)(const skivfpq_scan *, const float *, const float *, int64_t, int64_t, int64_t, int64_t,
                            uint64_t *, double *);
    int (*panel_centers)(void);
    int (*pack_plane)(const void *, int, int64_t, int64_t, int64_t, const skivfpq_embedding *, double, int64_t, int64_t,
                      uint8_t *, int32_t *, float *, int, int16_t *, float *, float *, int32_t *);
    /* Sums INOUT of some clusters, for rows (n_moved,) that left them or came; events (2 n_moved,) sorted by cluster:
     * rows[e % n_moved] leaves if e < n_moved. given_up (k,) OUT: whether to add the cluster up anew. */
    void (*move_rows_f32)(const float *X, int64_t d, const double *weights, const int32_t *rows, int64_t n_moved,
                          const int32_t *events, const int32_t *bounds, const int64_t *clusters, int64_t n_clusters,
                          double limit, double *sums, uint8_t *given_up);
    void (*move_rows_f64)(const double *X, int64_t d, const double *weights, const int32_t *rows, int64_t n_moved,
                          const int32_t *events, const int32_t *bounds, const int64_t *clusters, int64_t n_clusters,
                          double limit, double *sums, uint8_t *given_up);
    /* Sums (k, d) and total weights (k,) INOUT of all clusters, for labels that were before; by the rows that moved if
     * no more than few did and none is beyond the limit, else by all rows. Returns how many moved. */
    int64_t (*follow_labels_f32)(const float *X, int64_t n, int64_t d, const double *weights, const int32_t *labels,
                                 const int32_t *before, int64_t k, int64_t few, double limit, double *sums,
                                 double *counts);
    int64_t (*follow_labels_f64)(const double *X, int64_t n, int64_t d, const double *weights, const int32_t *labels,
                                 const int32_t *before, int64_t k, int64_t few, double limit, double *sums,
                                 double *counts);
    /* The certified search, described in search.h. */
    int64_t (*search_lists)(const skivfpq_lists *, const skivfpq_queries *, const int32_t *, int64_t, int64_t, double *,
                            int64_t *, uint8_t *, char *);
    int64_t (*nearest_lists)(const skivfpq_lists *, const skivfpq_fine_points *, const skivfpq_queries *, const int32_t *,
                             int64_t, int64_t, double, int32_t *, uint8_t *, char *);
    int64_t (*query_levels)(int64_t width);
    int64_t (*rank_rows)(const skivfpq_lists *, const skivfpq_queries *, const int64_t *, int64_t, int64_t, double *,
                         int64_t *, char *);
} skivfpq_kernels;

/* The table for the named instruction set, or for the best one of this CPU when name is NULL;
 * NULL when the name is unknown, was not compiled, or this CPU cannot run it. */
const skivfpq_kernels *skivfpq_pick(const char *name);
/* The i-th name that skivfpq_pick accepts here, best first; NULL behind the last. */
const char *skivfpq_runnable(int i);
/* The same of instruction sets emulated in plain C, so that their kernels are tested everywhere. */
const char *skivfpq_emulated(int i);

#endif

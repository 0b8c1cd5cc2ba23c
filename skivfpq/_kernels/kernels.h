/* The native kernels: plain C on arrays, no Python, no allocation of outputs, no BLAS, no threads.
 * kernels.c is compiled once for each instruction set; dispatch.c picks one table at import. */
#ifndef SKIVFPQ_KERNELS_H
#define SKIVFPQ_KERNELS_H

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
} skivfpq_kernels;

/* The table for the named instruction set, or for the best one of this CPU when name is NULL;
 * NULL when the name is unknown, was not compiled, or this CPU cannot run it. */
const skivfpq_kernels *skivfpq_pick(const char *name);
/* The i-th name that skivfpq_pick accepts here, best first; NULL behind the last. */
const char *skivfpq_runnable(int i);

#endif

# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""The compiled kernels: same names and signatures as in reference.py, the GIL released."""

import os

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t

cdef extern from "kernels.h":
    ctypedef struct skivfpq_kernels:
        int (*nearest_centers_f32)(const float *, int64_t, int64_t, const double *, int64_t,
                                   int32_t *, double *) noexcept nogil
        int (*nearest_centers_f64)(const double *, int64_t, int64_t, const double *, int64_t,
                                   int32_t *, double *) noexcept nogil
        void (*adc_scan_u8)(const double *, int64_t, int64_t, const int64_t *, int64_t,
                            const uint8_t *, int64_t, double *) noexcept nogil
        void (*adc_scan_u16)(const double *, int64_t, int64_t, const int64_t *, int64_t,
                             const uint16_t *, int64_t, double *) noexcept nogil
    const skivfpq_kernels *skivfpq_pick(const char *name)
    const char *skivfpq_runnable(int i)

ctypedef fused floating:
    float
    double

ctypedef fused code_type:
    uint8_t
    uint16_t

cdef const skivfpq_kernels *kernels


def runnable():
    """Names of the instruction sets that were compiled and that this CPU runs, best first."""
    names = []
    while skivfpq_runnable(len(names)) != NULL:
        names.append(skivfpq_runnable(len(names)).decode())
    return names


def use(str name):
    """Switch to the named instruction set (for tests; not while a kernel runs)."""
    global kernels, INSTRUCTION_SET
    if name not in runnable():
        raise ImportError(f"SKIVFPQ_SIMD must be one of {runnable()} on this machine, got {name!r}.")
    kernels = skivfpq_pick(name.encode())
    INSTRUCTION_SET = name


use(os.environ.get("SKIVFPQ_SIMD") or runnable()[0])


def nearest_centers(
    const floating[:, ::1] X,       # IN (n_samples, n_features)
    const double[:, ::1] centers,   # IN (n_clusters, n_features)
    int32_t[::1] labels,            # OUT (n_samples,)
    double[::1] sq_distances,       # OUT (n_samples,)
):
    """Label each row with its nearest center, lowest index on ties."""
    cdef int status
    if centers.shape[1] != X.shape[1] or labels.shape[0] != X.shape[0] or sq_distances.shape[0] != X.shape[0]:
        raise ValueError("nearest_centers: shapes of X, centers, labels and sq_distances do not fit together.")
    if X.shape[0] == 0 or centers.shape[0] == 0:
        return
    with nogil:
        if floating is float:
            status = kernels.nearest_centers_f32(
                &X[0, 0], X.shape[0], X.shape[1], &centers[0, 0], centers.shape[0], &labels[0], &sq_distances[0])
        else:
            status = kernels.nearest_centers_f64(
                &X[0, 0], X.shape[0], X.shape[1], &centers[0, 0], centers.shape[0], &labels[0], &sq_distances[0])
    if status != 0:
        raise MemoryError("nearest_centers: no memory for its scratch arrays.")


def adc_scan(
    const double[:, :, ::1] tables,  # IN (n_tables, n_subspaces, n_codewords)
    const int64_t[::1] queries,      # IN (n_queries,) which tables
    const code_type[:, ::1] codes,   # IN (n_codes, n_subspaces)
    double[:, ::1] out,              # OUT (n_queries, n_codes)
):
    """Sum the table entries that the codes select (asymmetric distance computation)."""
    if codes.shape[1] != tables.shape[1] or out.shape[0] != queries.shape[0] or out.shape[1] != codes.shape[0]:
        raise ValueError("adc_scan: shapes of tables, queries, codes and out do not fit together.")
    if queries.shape[0] == 0 or codes.shape[0] == 0:
        return
    with nogil:
        if code_type is uint8_t:
            kernels.adc_scan_u8(&tables[0, 0, 0], tables.shape[1], tables.shape[2], &queries[0],
                                queries.shape[0], &codes[0, 0], codes.shape[0], &out[0, 0])
        else:
            kernels.adc_scan_u16(&tables[0, 0, 0], tables.shape[1], tables.shape[2], &queries[0],
                                 queries.shape[0], &codes[0, 0], codes.shape[0], &out[0, 0])

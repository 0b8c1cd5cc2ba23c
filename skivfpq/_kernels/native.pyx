# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""The compiled kernels: same names and signatures as in reference.py, the GIL released."""

import os
import threading

import numpy as np

from libc.math cimport INFINITY, sqrt
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "scan.h":
    ctypedef struct skivfpq_scan_shape:
        int columns
        int largest_column
        int units_multiple
        int wraps
    ctypedef struct skivfpq_fine_points:
        const int16_t *codes
        const float *scales
        const float *errors
        const int32_t *sq_norms
    ctypedef struct skivfpq_embedding:
        const float *origin
        const int16_t *axes
        double axes_scale
        int64_t n_axes
        int64_t width
        double tail_origin
    ctypedef struct skivfpq_lane_rows:
        const float *tiles
        const double *lengths
        const double *origin
        double scale
    ctypedef struct skivfpq_scan:
        const void *X
        int is_f64
        int64_t n_features
        const double *centers
        skivfpq_fine_points fine_rows
        skivfpq_fine_points fine_centers
        skivfpq_lane_rows lanes
        const uint8_t *codes
        const int32_t *sq_norms
        const float *errors
        double row_scale
        int64_t units
        const int8_t *panels
        const int32_t *starts
        double column_scale
        double column_error
        const double *drifts
        const double *moved
        const int32_t *ids
        int64_t n_columns
        const double *far_lengths
        int64_t n_far

cdef extern from "search.h":
    ctypedef struct skivfpq_coded:
        const void *columns
        int64_t n_subspaces
        int64_t n_columns
        int64_t n_codewords
        const int64_t *features
        const int64_t *starts
        const void *codewords
        int is_f64
        const float *scaled
        const int16_t *levels
        const int64_t *pairs
        const double *anchors
        const double *origin
        const float *terms
        double unit
        double level
        double longest_word
        double longest_anchor
        double largest_term
        double reach
        double rounding
        const uint8_t *allowed
    ctypedef struct skivfpq_points:
        const uint8_t *codes
        const int32_t *terms
        int64_t units
        const float *origin
        double scale
        double query_scale
        double error
        double longest
        const skivfpq_embedding *embedding
    ctypedef struct skivfpq_lists:
        const void *vectors
        int kind
        int metric
        int64_t d
        const int64_t *offsets
        int64_t n_lists
        const int32_t *ids
        const int64_t *blocks
        skivfpq_points points
        const skivfpq_points *whole
        const int64_t *strays
        const int64_t *stray_offsets
        const uint8_t *odd
        const skivfpq_coded *coded
    ctypedef struct skivfpq_queries:
        const void *values
        int is_f64
        int64_t n

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
        void (*cluster_sums_f32)(const float *, int64_t, const double *, const int32_t *, const int32_t *,
                                 const int64_t *, int64_t, double *, double *) noexcept nogil
        void (*cluster_sums_f64)(const double *, int64_t, const double *, const int32_t *, const int32_t *,
                                 const int64_t *, int64_t, double *, double *) noexcept nogil
        void (*row_hashes_f32)(const float *, int64_t, int64_t, const uint64_t *, int, uint64_t *) noexcept nogil
        void (*row_hashes_f64)(const double *, int64_t, int64_t, const uint64_t *, int, uint64_t *) noexcept nogil
        void (*multiply)(const float *, int64_t, int64_t, const float *, int64_t, float *) noexcept nogil
        void (*orthonormalize)(double *, int64_t, int64_t) noexcept nogil
        int (*nearest_packed)(const void *, int, int64_t, const double *, int64_t, const double *, double,
                              const float *, const double *, int64_t, int64_t, int32_t *) noexcept nogil
        int64_t (*tile_rows)() noexcept nogil
        void (*pack_tiles)(const void *, int, int64_t, int64_t, int64_t, const double *, double, void *,
                           double *) noexcept nogil
        void (*order_by_label)(const int32_t *, int64_t, int64_t, int32_t *, int32_t *) noexcept nogil
        const skivfpq_scan_shape *scan_shape
        void (*pack_rows)(const float *, int64_t, int64_t, double, const float *, int64_t, int64_t,
                          uint8_t *, int32_t *, float *) noexcept nogil
        double (*pack_columns)(const float *, int64_t, int64_t, double, const float *, double, int64_t,
                               int8_t *, int32_t *) noexcept nogil
        int64_t (*certified_nearest)(const skivfpq_scan *, int64_t, int64_t, double, int32_t *, double *,
                                     double *, int64_t *) noexcept nogil
        int (*project)(const int16_t *, int64_t, int64_t, const int16_t *, int64_t, int32_t *) noexcept nogil
        int (*embed)(const void *, int, int64_t, int64_t, const skivfpq_embedding *, float *, float *) noexcept nogil
        void (*pack_fine)(const void *, int, int64_t, int64_t, const float *, int16_t *, float *, float *,
                          int32_t *) noexcept nogil
        void (*set_closest)(const skivfpq_scan *, const int32_t *, int64_t, const double *, double *,
                            int32_t *, int32_t *, float *) noexcept nogil
        int64_t (*closer_candidates)(const skivfpq_scan *, const int32_t *, const int32_t *, const uint64_t *,
                                     int64_t, const uint8_t *, const double *, const double *, int64_t, int64_t,
                                     int64_t, int64_t, int32_t *, double *, int64_t *, double *) noexcept nogil
        int (*score_candidates)(const skivfpq_scan *, const float *, const float *, int64_t, int64_t, int64_t,
                                int64_t, uint64_t *, double *) noexcept nogil
        int (*panel_centers)() noexcept nogil
        int (*pack_plane)(const void *, int, int64_t, int64_t, int64_t, const skivfpq_embedding *, double, int64_t,
                          int64_t, uint8_t *, int32_t *, float *, int, int16_t *, float *, float *,
                          int32_t *) noexcept nogil
        void (*add_rows_f32)(const float *, int64_t, int64_t, const double *, const int32_t *, int64_t,
                             int64_t, int64_t, double *, double *) noexcept nogil
        void (*add_rows_f64)(const double *, int64_t, int64_t, const double *, const int32_t *, int64_t,
                             int64_t, int64_t, double *, double *) noexcept nogil
        int (*encode)(const void *, int, int64_t, int64_t, int64_t, const int64_t *, const double *,
                      const int64_t *, int, void *) noexcept nogil
        void (*row_sq_distances)(const void *, int, int64_t, int64_t, const double *, const int32_t *,
                                 double *) noexcept nogil
        void (*move_rows_f32)(const float *, int64_t, const double *, const int32_t *, int64_t, const int32_t *,
                              const int32_t *, const int64_t *, int64_t, double, double *, uint8_t *) noexcept nogil
        void (*move_rows_f64)(const double *, int64_t, const double *, const int32_t *, int64_t, const int32_t *,
                              const int32_t *, const int64_t *, int64_t, double, double *, uint8_t *) noexcept nogil
        int64_t (*follow_labels_f32)(const float *, int64_t, int64_t, const double *, const int32_t *,
                                     const int32_t *, int64_t, int64_t, double, double *, double *) noexcept nogil
        int64_t (*follow_labels_f64)(const double *, int64_t, int64_t, const double *, const int32_t *,
                                     const int32_t *, int64_t, int64_t, double, double *, double *) noexcept nogil
        int64_t (*search_lists)(const skivfpq_lists *, const skivfpq_queries *, const int32_t *, int64_t, int64_t,
                                double *, int64_t *, uint8_t *, char *) noexcept nogil
        int64_t (*nearest_lists)(const skivfpq_lists *, const skivfpq_fine_points *, const skivfpq_queries *,
                                 const int32_t *, int64_t, int64_t, double, int32_t *, uint8_t *, char *) noexcept nogil
        int64_t (*query_levels)(int64_t) noexcept nogil
        int64_t (*rank_rows)(const skivfpq_lists *, const skivfpq_queries *, const int64_t *, int64_t, int64_t,
                             double *, int64_t *, char *) noexcept nogil
    const skivfpq_kernels *skivfpq_pick(const char *name)
    const char *skivfpq_runnable(int i)
    const char *skivfpq_emulated(int i)

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


def emulated():
    """Names of the instruction sets that are emulated in plain C, for tests: never picked by default."""
    names = []
    while skivfpq_emulated(len(names)) != NULL:
        names.append(skivfpq_emulated(len(names)).decode())
    return names


def use(str name):
    """Switch to the named instruction set (for tests; not while a kernel runs)."""
    global kernels, INSTRUCTION_SET
    if name not in runnable() + emulated():
        raise ImportError(f"SKIVFPQ_SIMD must be one of {runnable()} on this machine, got {name!r}.")
    kernels = skivfpq_pick(name.encode())
    INSTRUCTION_SET = name


use(os.environ.get("SKIVFPQ_SIMD") or runnable()[0])


def nearest_centers(
    const floating[:, ::1] X,       # IN (n_samples, n_features)
    const double[:, ::1] centers,   # IN (n_clusters, n_features)
    int32_t[::1] labels,            # OUT (n_samples,)
    double[::1] sq_distances,       # OUT (n_samples,), or None
):
    """Label each row with its nearest center, lowest index on ties."""
    cdef int status
    cdef double *out = NULL
    if (centers.shape[1] != X.shape[1] or labels.shape[0] != X.shape[0]
            or (sq_distances is not None and sq_distances.shape[0] != X.shape[0])):
        raise ValueError("nearest_centers: shapes of X, centers, labels and sq_distances do not fit together.")
    if X.shape[0] == 0 or centers.shape[0] == 0:
        return
    if sq_distances is not None:
        out = &sq_distances[0]
    with nogil:
        if floating is float:
            status = kernels.nearest_centers_f32(
                &X[0, 0], X.shape[0], X.shape[1], &centers[0, 0], centers.shape[0], &labels[0], out)
        else:
            status = kernels.nearest_centers_f64(
                &X[0, 0], X.shape[0], X.shape[1], &centers[0, 0], centers.shape[0], &labels[0], out)
    if status != 0:
        raise MemoryError("nearest_centers: no memory for its scratch arrays.")


def row_sq_distances(
    const floating[:, ::1] X,       # IN (n_samples, n_features)
    const double[:, ::1] centers,   # IN (n_clusters, n_features)
    const int32_t[::1] labels,      # IN (n_samples,)
    double[::1] out,                # OUT (n_samples,)
):
    """out[i] = |X[i] - centers[labels[i]]|^2 for every row."""
    if centers.shape[1] != X.shape[1] or labels.shape[0] != X.shape[0] or out.shape[0] != X.shape[0]:
        raise ValueError("row_sq_distances: shapes of X, centers, labels and out do not fit together.")
    if X.shape[0] == 0 or centers.shape[0] == 0:
        return
    with nogil:
        kernels.row_sq_distances(<const void *>&X[0, 0], floating is double, X.shape[0], X.shape[1],
                                 &centers[0, 0], &labels[0], &out[0])


def cluster_sums(
    const floating[:, ::1] X,        # IN (n_samples, n_features)
    const double[::1] weights,       # IN (n_samples,)
    const int32_t[::1] order,        # IN (n_samples,) rows by cluster
    const int32_t[::1] bounds,       # IN (n_clusters + 1,) where each cluster starts
    const int64_t[::1] clusters,     # IN which clusters
    double[:, ::1] sums,             # OUT (n_clusters, n_features)
    double[::1] counts,              # OUT (n_clusters,)
):
    """Weighted sum and total weight of the rows of some clusters, rows added in their order."""
    if (weights.shape[0] != X.shape[0] or sums.shape[1] != X.shape[1] or sums.shape[0] != counts.shape[0]
            or bounds.shape[0] != counts.shape[0] + 1):
        raise ValueError("cluster_sums: shapes of X, weights, bounds, sums and counts do not fit together.")
    if clusters.shape[0] == 0 or order.shape[0] == 0:
        return
    with nogil:
        if floating is float:
            kernels.cluster_sums_f32(&X[0, 0], X.shape[1], &weights[0], &order[0], &bounds[0], &clusters[0],
                                     clusters.shape[0], &sums[0, 0], &counts[0])
        else:
            kernels.cluster_sums_f64(&X[0, 0], X.shape[1], &weights[0], &order[0], &bounds[0], &clusters[0],
                                     clusters.shape[0], &sums[0, 0], &counts[0])


def add_rows(
    const floating[:, ::1] X,        # IN (n_samples, n_features)
    const double[::1] weights,       # IN (n_samples,)
    const int32_t[::1] labels,       # IN (n_samples,)
    double[:, ::1] sums,             # OUT (n_clusters, n_features)
    double[::1] counts,              # OUT (n_clusters,), with column 0
    int64_t first_column,
    int64_t last_column,
):
    """Weighted sum and total weight of the rows of each cluster, rows added in their order; some columns."""
    cdef int64_t n = X.shape[0]
    if (not 0 <= first_column < last_column <= X.shape[1] or weights.shape[0] != n or labels.shape[0] != n or sums.shape[1] != X.shape[1]
            or counts.shape[0] != sums.shape[0] or n == 0):
        raise ValueError("add_rows: shapes do not fit together.")
    with nogil:
        if floating is float:
            kernels.add_rows_f32(&X[0, 0], n, X.shape[1], &weights[0], &labels[0], sums.shape[0],
                                 first_column, last_column, &sums[0, 0], &counts[0])
        else:
            kernels.add_rows_f64(&X[0, 0], n, X.shape[1], &weights[0], &labels[0], sums.shape[0],
                                 first_column, last_column, &sums[0, 0], &counts[0])


def move_rows(
    const floating[:, ::1] X,        # IN (n_samples, n_features)
    const double[::1] weights,       # IN (n_samples,)
    const int32_t[::1] rows,         # IN (n_moved,)
    const int32_t[::1] events,       # IN (2 n_moved,) by cluster: rows[e % n_moved] leaves it if e < n_moved, else comes
    const int32_t[::1] bounds,       # IN (n_clusters + 1,) where each cluster starts
    const int64_t[::1] clusters,     # IN which clusters
    double limit,                    # IN of a weighted row's values
    double[:, ::1] sums,             # INOUT (n_clusters, n_features)
    uint8_t[::1] given_up,           # OUT (n_clusters,) those with a row beyond the limit, to be added up anew
):
    """Weighted sums of some clusters, after some rows have moved."""
    cdef int64_t n_moved = rows.shape[0]
    if (weights.shape[0] != X.shape[0] or sums.shape[1] != X.shape[1] or bounds.shape[0] != sums.shape[0] + 1
            or events.shape[0] != 2 * n_moved or given_up.shape[0] != sums.shape[0]):
        raise ValueError("move_rows: shapes of X, weights, rows, events, bounds and sums do not fit together.")
    if clusters.shape[0] == 0 or n_moved == 0:
        return
    with nogil:
        if floating is float:
            kernels.move_rows_f32(&X[0, 0], X.shape[1], &weights[0], &rows[0], n_moved, &events[0], &bounds[0],
                                  &clusters[0], clusters.shape[0], limit, &sums[0, 0], &given_up[0])
        else:
            kernels.move_rows_f64(&X[0, 0], X.shape[1], &weights[0], &rows[0], n_moved, &events[0], &bounds[0],
                                  &clusters[0], clusters.shape[0], limit, &sums[0, 0], &given_up[0])


def follow_labels(
    const floating[:, ::1] X,        # IN (n_samples, n_features)
    const double[::1] weights,       # IN (n_samples,)
    const int32_t[::1] labels,       # IN (n_samples,)
    const int32_t[::1] before,       # IN (n_samples,)
    int64_t few,                     # rows that moved, beyond which all are added up anew
    double limit,                    # IN of a weighted row's values, beyond which they are, too
    double[:, ::1] sums,             # INOUT (n_clusters, n_features), of the labels before
    double[::1] counts,              # INOUT (n_clusters,)
):
    """Weighted sums and total weights of all clusters after some labels have changed; returns how many have."""
    cdef int64_t n = X.shape[0], n_moved
    if (n == 0 or weights.shape[0] != n or labels.shape[0] != n or before.shape[0] != n
            or sums.shape[1] != X.shape[1] or counts.shape[0] != sums.shape[0]):
        raise ValueError("follow_labels: shapes of X, weights, labels, sums and counts do not fit together.")
    with nogil:
        if floating is float:
            n_moved = kernels.follow_labels_f32(&X[0, 0], n, X.shape[1], &weights[0], &labels[0], &before[0],
                                                sums.shape[0], few, limit, &sums[0, 0], &counts[0])
        else:
            n_moved = kernels.follow_labels_f64(&X[0, 0], n, X.shape[1], &weights[0], &labels[0], &before[0],
                                                sums.shape[0], few, limit, &sums[0, 0], &counts[0])
    return n_moved


def row_hashes(
    const floating[:, ::1] X,        # IN (n_samples, n_features)
    const uint64_t[::1] factors,     # IN (n_features,)
    bint single,                     # IN whether of the values rounded to float32
    uint64_t[::1] out,               # OUT (n_samples,)
):
    """A 64-bit hash of each row's values: equal for equal rows, -0.0 or 0.0."""
    if factors.shape[0] != X.shape[1] or out.shape[0] != X.shape[0]:
        raise ValueError("row_hashes: shapes of X, factors and out do not fit together.")
    if out.shape[0] == 0:
        return
    with nogil:
        if floating is float:
            kernels.row_hashes_f32(&X[0, 0], X.shape[0], X.shape[1], &factors[0], single, &out[0])
        else:
            kernels.row_hashes_f64(&X[0, 0], X.shape[0], X.shape[1], &factors[0], single, &out[0])


def tile_rows():
    """Rows of a tile of pack_tiles."""
    return kernels.tile_rows()


def pack_tiles(
    const floating[:, ::1] X,        # IN (n_samples, n_features)
    const double[::1] origin,        # IN (n_features,)
    double scale,                    # IN a power of two
    int64_t first_row,
    int64_t last_row,
    float[:, :, ::1] tiles,          # OUT (n_tiles, n_features, tile rows)
    double[::1] lengths,             # OUT (n_samples,)
):
    """Transpose some rows into tiles, minus the origin, times the scale, negated; and their lengths. The last of
    these rows fills its tile up."""
    if (not 0 <= first_row < last_row <= X.shape[0] or origin.shape[0] != X.shape[1]
            or tiles.shape[1] != X.shape[1] or tiles.shape[2] != kernels.tile_rows()
            or tiles.shape[0] * tiles.shape[2] < X.shape[0] or lengths.shape[0] != X.shape[0]):
        raise ValueError("pack_tiles: shapes of X, origin, tiles and lengths do not fit together.")
    with nogil:
        kernels.pack_tiles(<const void *>&X[0, 0], floating is double, first_row, last_row, X.shape[1], &origin[0],
                           scale, &tiles[0, 0, 0], &lengths[0])


def nearest_packed(
    const floating[:, ::1] X,        # IN (n_samples, n_features)
    const double[::1] origin,        # IN, as packed
    double scale,
    const float[:, :, ::1] tiles,
    const double[::1] lengths,
    const double[:, ::1] centers,    # IN (n_clusters, n_features)
    int64_t first_row,               # a multiple of tile_rows()
    int64_t last_row,
    int32_t[::1] labels,             # OUT (n_samples,)
):
    """Label some rows with their nearest centers, lowest index on ties, from rows packed once."""
    cdef int status
    if (not 0 <= first_row < last_row <= X.shape[0] or first_row % kernels.tile_rows()
            or origin.shape[0] != X.shape[1] or tiles.shape[1] != X.shape[1]
            or tiles.shape[2] != kernels.tile_rows() or tiles.shape[0] * tiles.shape[2] < X.shape[0]
            or lengths.shape[0] != X.shape[0] or centers.shape[1] != X.shape[1] or centers.shape[0] == 0
            or labels.shape[0] != X.shape[0]):
        raise ValueError("nearest_packed: shapes do not fit together.")
    with nogil:
        status = kernels.nearest_packed(
            <const void *>&X[0, 0], floating is double, X.shape[1], &centers[0, 0], centers.shape[0], &origin[0],
            scale, &tiles[0, 0, 0], &lengths[0], first_row, last_row, &labels[0])
    if status != 0:
        raise MemoryError("nearest_packed: no memory for its scratch arrays.")


def order_by_label(
    const int32_t[::1] labels,       # IN (n_samples,) from 0 to n_clusters - 1
    int32_t[::1] order,              # OUT (n_samples,)
    int32_t[::1] bounds,             # OUT (n_clusters + 1,)
):
    """Row numbers sorted by label, and where each label starts."""
    if order.shape[0] != labels.shape[0] or bounds.shape[0] < 1:
        raise ValueError("order_by_label: shapes of labels, order and bounds do not fit together.")
    if labels.shape[0] == 0:
        bounds[:] = 0
        return
    with nogil:
        kernels.order_by_label(&labels[0], labels.shape[0], bounds.shape[0] - 1, &order[0], &bounds[0])


def encode(
    const floating[:, ::1] X,          # IN (n_samples, n_features)
    const int64_t[::1] columns,        # IN (n_subspaces + 1,), where each subspace starts
    const double[::1] codewords,       # IN (k_m, width_m) of each subspace, one after the other
    const int64_t[::1] first_codewords,  # IN (n_subspaces + 1,), how many there are before each subspace
    code_type[:, ::1] codes,           # OUT (n_samples, n_subspaces)
):
    """Number of the nearest codeword of each subspace, lowest on ties."""
    cdef int64_t n_subspaces = columns.shape[0] - 1, size = 0, m, most = 256 if code_type is uint8_t else 65536
    cdef int status
    for m in range(n_subspaces):
        if (not 0 <= columns[m] < columns[m + 1] <= X.shape[1]
                or not 0 < first_codewords[m + 1] - first_codewords[m] <= most):
            raise ValueError("encode: subspaces and codewords do not fit together.")
        size += (columns[m + 1] - columns[m]) * (first_codewords[m + 1] - first_codewords[m])
    if (first_codewords.shape[0] != n_subspaces + 1 or codewords.shape[0] != size
            or codes.shape[0] != X.shape[0] or codes.shape[1] != n_subspaces):
        raise ValueError("encode: shapes do not fit together.")
    if X.shape[0] == 0:
        return
    with nogil:
        status = kernels.encode(&X[0, 0], floating is double, X.shape[0], X.shape[1], n_subspaces, &columns[0],
                                &codewords[0], &first_codewords[0], sizeof(code_type), &codes[0, 0])
    if status != 0:
        raise MemoryError("No memory for the rows of a subspace.")


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


def multiply(
    const float[:, ::1] V,          # IN (n_rows, n_features)
    const float[:, ::1] axes,       # IN (n_features, width)
    float[:, ::1] out,              # OUT (n_rows, width)
):
    """out = V axes in float32: no thread of a BLAS is woken, which would go on to spin for a while."""
    if axes.shape[0] != V.shape[1] or out.shape[0] != V.shape[0] or out.shape[1] != axes.shape[1]:
        raise ValueError("multiply: shapes of V, axes and out do not fit together.")
    if V.shape[0] == 0 or axes.shape[0] == 0 or axes.shape[1] == 0:
        return
    with nogil:
        kernels.multiply(&V[0, 0], V.shape[0], V.shape[1], &axes[0, 0], axes.shape[1], &out[0, 0])


def orthonormalize(
    double[:, ::1] Q,               # INOUT (n_rows, n_features)
):
    """Make rows orthonormal, in their order; zeros where the rows before leave nothing."""
    if Q.shape[0] == 0 or Q.shape[1] == 0:
        return
    with nogil:
        kernels.orthonormalize(&Q[0, 0], Q.shape[0], Q.shape[1])


cdef skivfpq_embedding embedding_of(embedding, int64_t n_features) except *:
    """An embedding of planes.py; the arrays behind its pointers are kept alive by it."""
    cdef skivfpq_embedding e
    cdef const float[::1] origin = embedding.origin
    cdef const int16_t[:, :, ::1] axes
    e.origin, e.axes, e.n_axes, e.width, e.tail_origin = &origin[0], NULL, 0, n_features, embedding.tail_origin
    e.axes_scale = embedding.axes_scale
    if embedding.packed_axes is not None:
        axes, e.n_axes, e.width = embedding.packed_axes, embedding.axes.shape[1], embedding.width
        e.axes = &axes[0, 0, 0]
        if (axes.shape[0] != (n_features + 1) // 2 or axes.shape[1] != (e.width + 15) // 16 * 16 or axes.shape[2] != 2
                or not 0 < e.n_axes < e.width):
            raise ValueError("embedding: shapes of X and axes do not fit together.")
    if origin.shape[0] != n_features:
        raise ValueError("embedding: shapes of X and origin do not fit together.")
    return e


def project(
    const int16_t[:, ::1] codes,    # IN (n_rows, n_features)
    const int16_t[:, :, ::1] axes,  # IN (pairs of features, n_axes, 2), n_axes a multiple of 16
    int32_t[:, ::1] out,            # OUT (n_rows, n_axes)
):
    """out = codes axes, modulo 2^32."""
    cdef int64_t n = codes.shape[0]
    cdef int status
    if (axes.shape[0] != (codes.shape[1] + 1) // 2 or axes.shape[1] % 16 or axes.shape[2] != 2 or out.shape[0] != n
            or out.shape[1] != axes.shape[1]):
        raise ValueError("project: shapes of codes, axes and out do not fit together.")
    if n == 0 or axes.shape[0] == 0 or axes.shape[1] == 0:
        return
    with nogil:
        status = kernels.project(&codes[0, 0], n, codes.shape[1], &axes[0, 0, 0], axes.shape[1], &out[0, 0])
    if status != 0:
        raise MemoryError("project: no memory for its scratch array.")


def embed(
    const floating[:, ::1] X,       # IN (n_rows, n_features)
    embedding,                      # IN planes.Embedding
    float[:, ::1] Y,                # OUT (n_rows, width)
    float[::1] bounds,              # OUT (n_rows,) of |Y - y|
):
    """Points y of rows in float32."""
    cdef int64_t n = X.shape[0]
    cdef int status
    cdef skivfpq_embedding e = embedding_of(embedding, X.shape[1])
    if Y.shape[0] != n or Y.shape[1] != e.width or bounds.shape[0] != n:
        raise ValueError("embed: shapes of X, Y and bounds do not fit together.")
    if n == 0:
        return
    with nogil:
        status = kernels.embed(&X[0, 0], floating is double, n, X.shape[1], &e, &Y[0, 0], &bounds[0])
    if status != 0:
        raise MemoryError("embed: no memory for its scratch array.")


def pack_plane(
    const floating[:, ::1] X,       # IN (n_rows, n_features)
    plane,                          # OUT planes.Plane, some rows of its arrays
    int64_t first_row,              # a multiple of its lanes
    int64_t last_row,
    bint with_fine,                 # IN whether to write the fine points, which are there if not
):
    """pack_fine, embed and pack_rows, in one pass over some rows."""
    cdef int64_t n = X.shape[0]
    cdef int status
    cdef skivfpq_embedding e = embedding_of(plane.embedding, X.shape[1])
    cdef uint8_t[:, :, :, ::1] codes = plane.codes
    cdef int32_t[::1] sq_norms = plane.sq_norms, fine_sq_norms
    cdef float[::1] errors = plane.errors, fine_scales, fine_errors
    cdef int16_t[:, ::1] fine_codes
    cdef double scale = plane.scale
    fine_codes, fine_scales, fine_errors, fine_sq_norms = plane.fine
    if (not 0 <= first_row < last_row <= n or first_row % codes.shape[2] or codes.shape[0] * codes.shape[2] < n
            or codes.shape[3] != 4 or 4 * codes.shape[1] < e.width or sq_norms.shape[0] != n or errors.shape[0] != n
            or fine_codes.shape[0] != n or fine_codes.shape[1] != X.shape[1] or fine_scales.shape[0] != n
            or fine_errors.shape[0] != n or fine_sq_norms.shape[0] != n):
        raise ValueError("pack_plane: shapes of X and plane do not fit together.")
    with nogil:
        status = kernels.pack_plane(
            &X[0, 0], floating is double, X.shape[1], first_row, last_row, &e, scale, codes.shape[1], codes.shape[2],
            &codes[0, 0, 0, 0], &sq_norms[0], &errors[0], with_fine, &fine_codes[0, 0], &fine_scales[0],
            &fine_errors[0], &fine_sq_norms[0])
    if status != 0:
        raise MemoryError("pack_plane: no memory for its scratch arrays.")


def scan_shape():
    """What the instruction set asks of packed arrays: columns of a panel, bound of the int8 columns,
    units come in multiples of, whether scores are known modulo 2^16 only."""
    cdef const skivfpq_scan_shape *shape = kernels.scan_shape
    return shape.columns, shape.largest_column, shape.units_multiple, bool(shape.wraps)


def query_levels(int64_t width):
    """Levels of queries for one of rows, of points of so many features."""
    return kernels.query_levels(width)


def pack_rows(
    const float[:, ::1] Y,          # IN (n_rows, width)
    double scale,
    const float[::1] bounds,        # IN (n_rows,) of |Y - y|
    uint8_t[:, :, :, ::1] codes,    # OUT (n_blocks, units, lanes, 4)
    int32_t[::1] sq_norms,          # OUT (n_rows,)
    float[::1] errors,              # OUT (n_rows,)
):
    """int8 points of rows, in blocks of so many lanes."""
    cdef int64_t n = Y.shape[0]
    if (codes.shape[0] * codes.shape[2] < n or codes.shape[3] != 4 or 4 * codes.shape[1] < Y.shape[1]
            or bounds.shape[0] != n or sq_norms.shape[0] != n or errors.shape[0] != n):
        raise ValueError("pack_rows: shapes of Y, bounds, codes, sq_norms and errors do not fit together.")
    if n == 0:
        return
    with nogil:
        kernels.pack_rows(&Y[0, 0], n, Y.shape[1], scale, &bounds[0], codes.shape[1], codes.shape[2], &codes[0, 0, 0, 0],
                          &sq_norms[0], &errors[0])


def pack_columns(
    const float[:, ::1] Y,          # IN (n_columns, width)
    double scale,
    const float[::1] bounds,        # IN (n_columns,)
    double row_scale,
    int8_t[:, ::1] panels,          # OUT (n_panels, 4 * units * columns), zeros
    int32_t[::1] starts,            # OUT (n_panels * columns,), zeros
):
    """int8 points of columns, in panels; returns the largest error of one."""
    cdef int64_t units = panels.shape[1] // (4 * kernels.scan_shape.columns)
    cdef double error
    if (panels.shape[0] * kernels.scan_shape.columns < Y.shape[0] or starts.shape[0] < Y.shape[0]
            or 4 * units < Y.shape[1] or bounds.shape[0] != Y.shape[0]):
        raise ValueError("pack_columns: shapes of Y, bounds, panels and starts do not fit together.")
    if Y.shape[0] == 0:
        return 0.0
    with nogil:
        error = kernels.pack_columns(&Y[0, 0], Y.shape[0], Y.shape[1], scale, &bounds[0], row_scale, units,
                                     &panels[0, 0], &starts[0])
    return error


def pack_fine(
    const floating[:, ::1] X,       # IN (n_rows, n_features), or centers
    const float[::1] origin,        # IN (n_features,)
    int16_t[:, ::1] codes,          # OUT (n_rows, n_features)
    float[::1] scales,              # OUT (n_rows,)
    float[::1] errors,              # OUT (n_rows,)
    int32_t[::1] sq_norms,          # OUT (n_rows,)
):
    """x - origin = scale q + e: int16 q with a scale for each row, and |e|; products of two q fit 32 bits."""
    cdef int64_t n = X.shape[0]
    if (codes.shape[0] != n or codes.shape[1] != X.shape[1] or origin.shape[0] != X.shape[1]
            or scales.shape[0] != n or errors.shape[0] != n or sq_norms.shape[0] != n):
        raise ValueError("pack_fine: shapes do not fit together.")
    if n == 0:
        return
    with nogil:
        kernels.pack_fine(<const void *>&X[0, 0], floating is double, n, X.shape[1], &origin[0], &codes[0, 0],
                          &scales[0], &errors[0], &sq_norms[0])


cdef skivfpq_fine_points fine_points_of(fine, int64_t n, int64_t n_features) except *:
    """The fine points of n rows; their arrays are kept alive by the caller."""
    cdef const int16_t[:, ::1] codes
    cdef const float[::1] scales, errors
    cdef const int32_t[::1] sq_norms
    codes, scales, errors, sq_norms = fine
    if (codes.shape[0] != n or codes.shape[1] != n_features or scales.shape[0] != n or errors.shape[0] != n
            or sq_norms.shape[0] != n):
        raise ValueError("scan: shapes of rows and fine points do not fit together.")
    return skivfpq_fine_points(&codes[0, 0], &scales[0], &errors[0], &sq_norms[0])


cdef skivfpq_scan scan_of_rows(const floating[:, ::1] X, plane, packed) except *:
    """The rows of a scan; the arrays behind its pointers are kept alive by X, plane and packed."""
    cdef skivfpq_scan scan
    cdef const uint8_t[:, :, :, ::1] codes
    cdef const int32_t[::1] sq_norms
    cdef const float[::1] errors
    cdef const float[:, :, ::1] tiles
    cdef const double[::1] lengths, origin
    scan.X, scan.is_f64, scan.n_features = <const void *>&X[0, 0], floating is double, X.shape[1]
    scan.codes, scan.lanes.tiles = NULL, NULL
    if packed is not None:
        tiles, lengths, origin = packed.tiles, packed.lengths, packed.origin
        if (tiles.shape[0] * tiles.shape[2] < X.shape[0] or tiles.shape[1] != X.shape[1]
                or tiles.shape[2] != kernels.tile_rows() or lengths.shape[0] != X.shape[0]
                or origin.shape[0] != X.shape[1]):
            raise ValueError("scan: shapes of X and packed do not fit together.")
        scan.lanes.tiles, scan.lanes.lengths, scan.lanes.origin = &tiles[0, 0, 0], &lengths[0], &origin[0]
        scan.lanes.scale = packed.scale
    if plane is None:
        return scan
    codes, sq_norms, errors = plane.codes, plane.sq_norms, plane.errors
    if (codes.shape[0] * codes.shape[2] < X.shape[0] or errors.shape[0] != X.shape[0]
            or sq_norms.shape[0] != X.shape[0]):
        raise ValueError("scan: shapes of X and plane do not fit together.")
    scan.fine_rows = fine_points_of(plane.fine, X.shape[0], X.shape[1])
    scan.codes, scan.sq_norms, scan.errors = &codes[0, 0, 0, 0], &sq_norms[0], &errors[0]
    scan.row_scale, scan.units = plane.scale, codes.shape[1]
    return scan


cdef skivfpq_scan scan_of(const floating[:, ::1] X, plane, panels) except *:
    """Rows and columns of a scan; the arrays behind its pointers are kept alive by the arguments."""
    cdef skivfpq_scan scan = scan_of_rows(X, plane, None)
    cdef const double[:, ::1] centers = panels.centers
    cdef const int8_t[:, ::1] codes
    cdef const int32_t[::1] starts, ids
    cdef const double[::1] far_lengths, drifts, moved
    if centers.shape[1] != X.shape[1]:
        raise ValueError("scan: shapes of X and centers do not fit together.")
    scan.centers = &centers[0, 0]
    scan.n_columns, scan.n_far, scan.drifts = centers.shape[0], 0, NULL
    if plane is None:
        return scan
    codes, starts, ids, far_lengths = panels.packed, panels.starts, panels.ids, panels.far_lengths
    if (codes.shape[1] != scan.units * 4 * kernels.scan_shape.columns
            or codes.shape[0] * kernels.scan_shape.columns < ids.shape[0] - far_lengths.shape[0]
            or starts.shape[0] != codes.shape[0] * kernels.scan_shape.columns):
        raise ValueError("scan: shapes of X, plane and panels do not fit together.")
    scan.fine_centers = fine_points_of(panels.fine, centers.shape[0], X.shape[1])
    scan.n_far = far_lengths.shape[0]
    scan.n_columns = ids.shape[0] - scan.n_far
    scan.panels = &codes[0, 0] if scan.n_columns else NULL
    scan.starts = &starts[0] if scan.n_columns else NULL
    scan.column_scale, scan.column_error = panels.scale, panels.error
    scan.ids = &ids[0]
    scan.far_lengths = &far_lengths[0] if scan.n_far else NULL
    if panels.drifts is not None:
        drifts, moved = panels.drifts, panels.moved
        if drifts.shape[0] != scan.n_columns or moved.shape[0] != centers.shape[0]:
            raise ValueError("scan: one drift for each column and each center is needed.")
        scan.drifts, scan.moved = &drifts[0], &moved[0]
    return scan


def certified_nearest(
    const floating[:, ::1] X,         # IN (n_samples, n_features)
    plane,                            # IN planes.Plane of all rows, one lane
    panels,                           # IN planes.Panels of the centers, with drifts
    int64_t first_row,
    int64_t last_row,
    double margin,                    # IN other centers within the nearest's distance plus this are found
    int32_t[::1] labels,              # INOUT (n_samples,) any center of each row, or -1, then its nearest
    double[::1] upper,                # INOUT (n_samples,) that center is no farther than this
    double[::1] lower,                # INOUT (n_samples,) no other center is nearer than this
):
    """Nearest center of the rows first_row to last_row, lowest index on ties; returns the rows left undone."""
    if not 0 <= first_row < last_row <= X.shape[0]:
        raise ValueError("certified_nearest: rows must lie in X.")
    if labels.shape[0] != X.shape[0] or upper.shape[0] != X.shape[0] or lower.shape[0] != X.shape[0]:
        raise ValueError("certified_nearest: shapes of X, labels, upper and lower do not fit together.")
    unserved = np.empty(last_row - first_row, dtype=np.int64)
    cdef int64_t[::1] left = unserved
    cdef int64_t n_left
    cdef skivfpq_scan scan = scan_of(X, plane, panels)
    if plane.codes.shape[2] != 1 or scan.drifts == NULL:
        raise ValueError("certified_nearest: the plane must have one lane, the panels drifts.")
    with nogil:
        n_left = kernels.certified_nearest(&scan, first_row, last_row, margin, &labels[0], &upper[0], &lower[0],
                                           &left[0])
    if n_left < 0:
        raise MemoryError("certified_nearest: no memory for its scratch arrays.")
    return unserved[:n_left]


def closer_candidates(
    const floating[:, ::1] X,         # IN (n_samples, n_features)
    plane,                            # IN planes.Plane of all rows, or None: hits of score_candidates then
    panels,                           # IN planes.Panels of the candidates
    const int32_t[::1] thresholds,    # IN (16 n_blocks,), of the plane
    const int32_t[::1] caps,          # IN (16 n_blocks,)
    const uint64_t[:, ::1] hits,      # IN (n_tiles, n_candidates or more)
    const uint8_t[::1] wanted,        # IN (n_candidates,), whether to use its hits
    const double[::1] closest,        # IN (n_samples,)
    const double[::1] weights,        # IN (n_samples,)
    int64_t part_rows,                # rows of a part, a multiple of 16 and of tile_rows()
    int64_t first_part,
    int64_t last_part,
    int32_t[:, ::1] rows,             # OUT (n_candidates, n_samples), those of a part from its first row on
    double[:, ::1] sq_distances,      # OUT (n_candidates, n_samples), the same
    int64_t[:, ::1] n_closer,         # OUT (n_parts, n_candidates), how many of them
    double[:, ::1] gains,             # OUT (n_parts, n_candidates)
):
    """Rows of some parts closer to each candidate than closest, and the weighted sum of what they win;
    returns the number of pairs evaluated."""
    cdef int64_t n_evaluated, n = X.shape[0]
    cdef skivfpq_scan scan = scan_of(X, plane, panels)
    if (not 0 <= first_part < last_part or part_rows % 16 or part_rows % kernels.tile_rows()
            or (last_part - 1) * part_rows >= n):
        raise ValueError("closer_candidates: parts must have whole blocks and tiles and lie in X.")
    if (closest.shape[0] != n or weights.shape[0] != n or scan.n_far
            or (plane is None and (hits.shape[0] * kernels.tile_rows() < n or hits.shape[1] < scan.n_columns
                                   or wanted.shape[0] != scan.n_columns))
            or (plane is not None and plane.codes.shape[2] != 16)
            or (plane is not None and (thresholds.shape[0] < n or thresholds.shape[0] % 16
                                       or caps.shape[0] != thresholds.shape[0]))
            or rows.shape[0] < scan.n_columns or rows.shape[1] != n
            or sq_distances.shape[0] != rows.shape[0] or sq_distances.shape[1] != n
            or n_closer.shape[0] < last_part or n_closer.shape[1] != scan.n_columns
            or gains.shape[0] < last_part or gains.shape[1] != scan.n_columns):
        raise ValueError("closer_candidates: shapes do not fit together.")
    with nogil:
        n_evaluated = kernels.closer_candidates(
            &scan, &thresholds[0] if scan.codes else NULL, &caps[0] if scan.codes else NULL,
            NULL if scan.codes else &hits[0, 0], 0 if scan.codes else hits.shape[1],
            NULL if scan.codes else &wanted[0], &closest[0], &weights[0], n, part_rows, first_part, last_part,
            &rows[0, 0], &sq_distances[0, 0], &n_closer[0, 0], &gains[0, 0])
    return n_evaluated


def panel_centers():
    """Centers of a panel of the lane kernel."""
    return kernels.panel_centers()


def score_candidates(
    const floating[:, ::1] X,         # IN (n_samples, n_features)
    packed,                           # IN blocks.PackedRows of X
    const double[:, ::1] candidates,  # IN (n_candidates, n_features)
    const float[::1] limits,          # IN (n_tiles * tile_rows(),)
    const float[::1] weights,         # IN (n_tiles * tile_rows(),)
    int64_t part_rows,                # rows of a part, a multiple of tile_rows()
    int64_t first_part,
    int64_t last_part,
    uint64_t[:, ::1] hits,            # OUT (n_tiles, n_panels * panel_centers())
    double[:, ::1] gains,             # OUT (n_parts, n_panels * panel_centers())
):
    """Rows of some parts that may be closer to a candidate, a bit each, by scores within the rows' limits;
    and the weighted sum of how far below the limits the scores are."""
    cdef int status
    cdef int64_t height = kernels.tile_rows(), width = kernels.panel_centers(), n = X.shape[0]
    cdef skivfpq_scan scan = scan_of_rows(X, None, packed)
    scan.centers, scan.n_columns = &candidates[0, 0], candidates.shape[0]
    if (not 0 <= first_part < last_part or part_rows % height or (last_part - 1) * part_rows >= n
            or scan.lanes.tiles == NULL or candidates.shape[1] != X.shape[1]
            or hits.shape[0] != (n + height - 1) // height or limits.shape[0] != hits.shape[0] * height
            or weights.shape[0] != limits.shape[0] or gains.shape[0] < last_part
            or hits.shape[1] != (scan.n_columns + width - 1) // width * width or gains.shape[1] != hits.shape[1]):
        raise ValueError("score_candidates: shapes do not fit together.")
    with nogil:
        status = kernels.score_candidates(&scan, &limits[0], &weights[0], n, part_rows, first_part, last_part,
                                          &hits[0, 0], &gains[0, 0])
    if status != 0:
        raise MemoryError("score_candidates: no memory for its scratch arrays.")


def join_parts(
    int32_t[::1] rows,                # INOUT (n_samples,), those of a part from its first row on
    double[::1] sq_distances,         # INOUT (n_samples,), the same
    const int64_t[:] n_closer,        # IN (n_parts,)
    int64_t part_rows,
):
    """Move what closer_candidates wrote of each part to the front; returns how much it is."""
    cdef int64_t n = 0, part, i
    if (rows.shape[0] != sq_distances.shape[0] or n_closer.shape[0] == 0
            or (n_closer.shape[0] - 1) * part_rows + n_closer[n_closer.shape[0] - 1] > rows.shape[0]):
        raise ValueError("join_parts: shapes do not fit together.")
    for part in range(n_closer.shape[0]):
        for i in range(part * part_rows, part * part_rows + n_closer[part]):
            rows[n], sq_distances[n] = rows[i], sq_distances[i]
            n += 1
    return n


def set_closest(
    const floating[:, ::1] X,         # IN (n_samples, n_features)
    plane,                            # IN planes.Plane of all rows, or None
    packed,                           # IN blocks.PackedRows of all rows, or None
    double column_scale,              # IN of all candidates
    double column_error,
    const int32_t[::1] rows,          # IN (n_rows,)
    const double[::1] sq_distances,   # IN (n_rows,)
    double[::1] closest,              # INOUT (n_samples,)
    int32_t[::1] thresholds,          # INOUT (16 n_blocks,), of the plane
    int32_t[::1] caps,                # INOUT (16 n_blocks,)
    float[::1] limits,                # INOUT (n_samples,) or more, of packed
):
    """closest[rows] = sq_distances, and the thresholds that follow."""
    cdef skivfpq_scan scan
    if rows.shape[0] == 0:
        return
    scan = scan_of_rows(X, plane, packed)
    scan.column_scale, scan.column_error = column_scale, column_error
    if (sq_distances.shape[0] != rows.shape[0] or closest.shape[0] != X.shape[0]
            or (packed is not None and limits.shape[0] < X.shape[0])
            or (plane is not None and (thresholds.shape[0] < X.shape[0] or caps.shape[0] < X.shape[0]))):
        raise ValueError("set_closest: shapes do not fit together.")
    with nogil:
        kernels.set_closest(&scan, &rows[0], rows.shape[0], &sq_distances[0], &closest[0],
                            &thresholds[0] if scan.codes else NULL, &caps[0] if scan.codes else NULL,
                            &limits[0] if scan.lanes.tiles else NULL)


def order_by_hash(
    const uint64_t[::1] hashes,       # IN (n_samples,)
    int64_t[::1] order,               # OUT (n_samples,)
):
    """Row numbers by rising hash, equal ones in their order."""
    cdef int64_t n = hashes.shape[0], i, j, moves = 0
    cdef int shift = 63
    cdef uint64_t value
    if order.shape[0] != n:
        raise ValueError("order_by_hash: shapes of hashes and order do not fit together.")
    while shift > 0 and (<uint64_t>1 << (64 - shift)) < <uint64_t>n:
        shift -= 1
    cdef int64_t[::1] starts = np.zeros((1 << (64 - shift)) + 1, dtype=np.int64)  # a bucket for each row or so
    cdef uint64_t[::1] values = np.empty(n, dtype=np.uint64)
    with nogil:
        for i in range(n):
            starts[(hashes[i] >> shift) + 1] += 1
        for i in range(starts.shape[0] - 1):
            starts[i + 1] += starts[i]
        for i in range(n):
            j = starts[hashes[i] >> shift]
            starts[hashes[i] >> shift] += 1
            order[j], values[j] = i, hashes[i]
        for i in range(1, n):  # and sorted by insertion, within the buckets
            value, j = values[i], i
            while j > 0 and values[j - 1] > value:
                j -= 1
            if j < i:
                put_before(values, order, i, j)
                moves += i - j
            if moves > 64 * n:
                break
    if moves > 64 * n:  # hashes made to fall into few buckets
        np.asarray(order)[:] = np.argsort(hashes, kind="stable")


cdef inline void put_before(uint64_t[::1] values, int64_t[::1] order, int64_t i, int64_t j) noexcept nogil:
    """Move entry i to j < i, those between up."""
    cdef uint64_t value = values[i]
    cdef int64_t row = order[i]
    while i > j:
        values[i], order[i] = values[i - 1], order[i - 1]
        i -= 1
    values[j], order[j] = value, row


def update_mass(
    const int32_t[::1] rows,          # IN (n_rows,)
    const double[::1] sq_distances,   # IN (n_rows,)
    const double[::1] weights,        # IN (n_samples,)
    const int64_t[::1] ranks,         # IN (n_samples,)
    double[:, ::1] blocks,            # INOUT (n_blocks, block rows, a multiple of 8)
    double[::1] sums,                 # INOUT (n_blocks,)
    double[::1] cumulated,            # OUT (n_blocks,)
):
    """Weighted squared distances of some rows at their ranks; sums of blocks, added eight by eight."""
    cdef int64_t height = blocks.shape[1], i, j, b
    cdef double total = 0
    cdef double[8] parts
    cdef double *block
    if (sq_distances.shape[0] != rows.shape[0] or ranks.shape[0] != weights.shape[0] or height % 8
            or ranks.shape[0] > blocks.shape[0] * height or sums.shape[0] != blocks.shape[0]
            or cumulated.shape[0] != blocks.shape[0]):
        raise ValueError("update_mass: shapes do not fit together.")
    cdef uint8_t[::1] touched = np.zeros(blocks.shape[0], dtype=np.uint8)
    with nogil:
        for i in range(rows.shape[0]):
            j = ranks[rows[i]]
            (&blocks[0, 0])[j] = weights[rows[i]] * sq_distances[i]
            touched[j // height] = 1
        for b in range(blocks.shape[0]):
            if touched[b]:
                block = &blocks[b, 0]
                for j in range(8):
                    parts[j] = block[j]
                for i in range(8, height, 8):
                    for j in range(8):
                        parts[j] += block[i + j]
                sums[b] = (((parts[0] + parts[1]) + (parts[2] + parts[3]))
                           + ((parts[4] + parts[5]) + (parts[6] + parts[7])))
            total += sums[b]
            cumulated[b] = total


def draw_mass(
    const double[:, ::1] blocks,      # IN (n_blocks, block rows)
    const double[::1] cumulated,      # IN (n_blocks,) of the blocks' sums
    const double[::1] uniforms,       # IN (n_draws,) in [0, 1)
    int64_t[::1] ranks,               # OUT (n_draws,)
):
    """Where the cumulated mass exceeds these shares of the total; never where it does not rise."""
    cdef int64_t height = blocks.shape[1], draw, i, b, last = 0
    cdef double total, place, within, rank_sum
    if cumulated.shape[0] != blocks.shape[0] or ranks.shape[0] != uniforms.shape[0] or cumulated.shape[0] == 0:
        raise ValueError("draw_mass: shapes do not fit together.")
    total = cumulated[cumulated.shape[0] - 1]
    with nogil:
        last = first_at_least(cumulated, total)  # the last block that adds any
        for draw in range(uniforms.shape[0]):
            place = uniforms[draw] * total
            b = first_above(cumulated, place)
            b = b if b < last else last
            if b > 0:
                place -= cumulated[b - 1]
            within, rank_sum = 0, -1
            for i in range(height):
                within += blocks[b, i]
                if within > rank_sum:  # a row that adds something: the last of them serves if none exceeds
                    ranks[draw], rank_sum = b * height + i, within
                if within > place:
                    break


cdef inline int64_t first_above(const double[::1] values, double limit) noexcept nogil:
    """Index of the first of rising values above the limit."""
    cdef int64_t low = 0, high = values.shape[0], middle
    while low < high:
        middle = (low + high) // 2
        if values[middle] > limit:
            high = middle
        else:
            low = middle + 1
    return low


cdef inline int64_t first_at_least(const double[::1] values, double limit) noexcept nogil:
    """Index of the first of rising values at least the limit."""
    cdef int64_t low = 0, high = values.shape[0], middle
    while low < high:
        middle = (low + high) // 2
        if values[middle] >= limit:
            high = middle
        else:
            low = middle + 1
    return low


METRICS = ("distance", "cosine", "product")
KINDS = ("float64", "float32", "float16", "int8", "uint8")  # and CODED
CODED = 5


cdef skivfpq_points points_of(points, int64_t n_features, int64_t lanes) except *:
    """Points of list_planes.py, in blocks of so many rows; the arrays behind its pointers are kept alive by them."""
    cdef skivfpq_points p
    cdef const uint8_t[:, :, :, ::1] codes = points.codes
    cdef const int32_t[:, ::1] terms = points.terms
    cdef const float[::1] origin = points.origin
    if (origin.shape[0] != n_features or 4 * codes.shape[1] < points.width or codes.shape[2] != lanes or codes.shape[3] != 4
            or codes.shape[1] % kernels.scan_shape.units_multiple or codes.shape[0] == 0
            or terms.shape[0] != codes.shape[0] or terms.shape[1] != lanes):
        raise ValueError("search: shapes of the points do not fit together.")
    p.codes, p.terms, p.units, p.origin = &codes[0, 0, 0, 0], &terms[0, 0], codes.shape[1], &origin[0]
    p.scale, p.query_scale, p.error, p.longest = points.scale, points.query_scale, points.error, points.longest
    p.embedding = NULL
    return p


cdef class PackedLists:
    """What the search kernels know of the rows of list_planes.ListPlanes: pointers, and the arrays behind them."""
    cdef skivfpq_lists lists
    cdef skivfpq_points whole
    cdef skivfpq_fine_points fine
    cdef skivfpq_embedding embedding
    cdef object arrays

    def __init__(self, planes):
        cdef skivfpq_lists *lists = &self.lists
        cdef const uint8_t[::1] vectors = planes.vectors.reshape(-1).view(np.uint8)
        cdef const int64_t[::1] offsets = planes.offsets, blocks = planes.blocks
        cdef const int64_t[::1] strays = planes.strays, stray_offsets = planes.stray_offsets
        cdef const int32_t[::1] ids = planes.ids
        cdef const uint8_t[::1] odd
        lists.d, lists.n_lists = planes.vectors.shape[1], blocks.shape[0] - 1
        lists.points = points_of(planes.points, lists.d, 16)
        if (planes.vectors.shape[0] != ids.shape[0] or ids.shape[0] == 0
                or offsets.shape[0] != blocks.shape[0] or stray_offsets.shape[0] != blocks.shape[0]
                or blocks[lists.n_lists] != planes.points.codes.shape[0]
                or offsets[lists.n_lists] != ids.shape[0] or stray_offsets[lists.n_lists] != strays.shape[0]):
            raise ValueError("search: shapes of the planes do not fit together.")
        self.arrays = (planes.vectors, offsets, blocks, strays, stray_offsets, ids, planes.points, planes.whole,
                       planes.fine, planes.odd)
        lists.vectors, lists.kind = &vectors[0], KINDS.index(planes.vectors.dtype.name)
        lists.metric = METRICS.index(planes.metric)
        lists.offsets, lists.blocks, lists.ids = &offsets[0], &blocks[0], &ids[0]
        lists.strays, lists.stray_offsets = &strays[0] if strays.shape[0] else NULL, &stray_offsets[0]
        if planes.points.head is not None:
            self.set_head(planes)
        if planes.odd is not None:
            odd = planes.odd
            lists.odd = &odd[0]
            whole = planes.whole or planes.points
            if 8 * odd.shape[0] < ids.shape[0] or whole.scale != 1 or whole.error != 0:
                raise ValueError("search: planes of integers must have a bit for each row, of scale 1 and without error.")
        if planes.fine is not None:
            self.fine = fine_points_of(planes.fine, ids.shape[0], lists.d)

    cdef int set_head(self, planes) except -1:
        """Of points by an embedding, and of the same by all features."""
        self.embedding = embedding_of(planes.points.head, self.lists.d)
        self.lists.points.embedding = &self.embedding
        if self.embedding.axes == NULL or planes.metric == "product":
            raise ValueError("search: a head must have axes, and the metric be a distance.")
        if planes.whole is not None:
            self.whole = points_of(planes.whole, self.lists.d, 1)
            self.lists.whole = &self.whole
            if (planes.whole.codes.shape[0] != planes.vectors.shape[0] or planes.whole.head is not None
                    or self.whole.units < self.lists.points.units):
                raise ValueError("search: points by all features must be as many as rows, and wider than heads.")
        return 0


cdef class PackedRows(PackedLists):
    """The same of vectors alone, to be ranked."""

    def __init__(self, metric, vectors, const int32_t[::1] ids):
        cdef const uint8_t[::1] values = vectors.reshape(-1).view(np.uint8)
        if vectors.shape[0] != ids.shape[0] or ids.shape[0] == 0:
            raise ValueError("search: there must be as many vectors as row numbers.")
        self.arrays = (vectors, ids)
        self.lists.vectors, self.lists.kind = &values[0], KINDS.index(vectors.dtype.name)
        self.lists.metric, self.lists.d, self.lists.ids = METRICS.index(metric), vectors.shape[1], &ids[0]


cdef class PackedCodes(PackedLists):
    """The same of list_codes.CodedLists."""
    cdef skivfpq_coded coded

    def __init__(self, rows):
        cdef skivfpq_lists *lists = &self.lists
        cdef skivfpq_coded *coded = &self.coded
        coding = rows.coding
        cdef const int64_t[::1] offsets = rows.offsets, blocks = rows.codes.blocks
        cdef const int32_t[::1] ids = rows.ids
        cdef const uint8_t[::1] columns = rows.codes.columns.view(np.uint8)
        cdef const int64_t[::1] features = coding.features, starts = coding.starts
        cdef const uint8_t[::1] codewords = coding.codewords.view(np.uint8)
        cdef const int16_t[:, :, ::1] levels = coding.levels
        cdef const int64_t[::1] pairs = coding.pairs
        cdef const float[:, ::1] scaled = coding.scaled
        cdef const double[:, ::1] anchors
        cdef const double[::1] origin = coding.turned_origin
        cdef const float[::1] terms
        cdef const uint8_t[::1] allowed
        cdef const int64_t[::1] strays = rows.strays, stray_offsets = rows.stray_offsets
        cdef int64_t n = ids.shape[0], n_lists = offsets.shape[0] - 1, itemsize = rows.codes.columns.itemsize
        lists.d, lists.n_lists = origin.shape[0], n_lists
        coded.n_subspaces, coded.n_columns = starts.shape[0], rows.codes.n_columns
        coded.n_codewords = levels.shape[1]
        if (n == 0 or blocks.shape[0] != n_lists + 1 or offsets[n_lists] != n or features.shape[0] != starts.shape[0] + 1
                or pairs.shape[0] != features.shape[0] or pairs[pairs.shape[0] - 1] != levels.shape[0]
                or levels.shape[2] != 2 or scaled.shape[0] != lists.d or scaled.shape[1] != coded.n_codewords
                or features[features.shape[0] - 1] != lists.d
                or coded.n_codewords % 16 or itemsize != (2 if coded.n_codewords > 256 else 1)
                or coded.n_columns != ((coded.n_subspaces + 1) // 2 if coded.n_codewords == 16 else coded.n_subspaces)
                or stray_offsets.shape[0] != n_lists + 1 or stray_offsets[n_lists] != strays.shape[0]
                or columns.shape[0] < (blocks[n_lists] * 16 * coded.n_columns + 64) * itemsize):
            raise ValueError("search: shapes of the codes do not fit together.")
        self.arrays = [offsets, blocks, ids, columns, features, starts, codewords, scaled, levels,
                       pairs, origin]
        lists.kind, lists.metric = CODED, METRICS.index(rows.metric)
        lists.offsets, lists.blocks, lists.ids, lists.coded = &offsets[0], &blocks[0], &ids[0], coded
        lists.strays, lists.stray_offsets = &strays[0] if strays.shape[0] else NULL, &stray_offsets[0]
        self.arrays += [strays, stray_offsets]
        coded.columns, coded.features, coded.starts = <const void *>&columns[0], &features[0], &starts[0]
        coded.codewords, coded.is_f64 = <const void *>&codewords[0], coding.codewords.dtype == np.float64
        coded.scaled = &scaled[0, 0]
        coded.levels, coded.pairs, coded.origin = &levels[0, 0, 0], &pairs[0], &origin[0]
        coded.anchors, coded.terms, coded.allowed = NULL, NULL, NULL
        if coding.is_residual:
            anchors = coding.turned_anchors
            if anchors.shape[0] != n_lists or anchors.shape[1] != lists.d:
                raise ValueError("search: shapes of the anchors do not fit together.")
            coded.anchors = &anchors[0, 0]
            self.arrays.append(anchors)
        if rows.terms is not None:
            terms = rows.scanned_terms
            coded.terms = &terms[0]
            self.arrays.append(terms)
        if rows.allowed is not None:
            allowed = rows.allowed
            coded.allowed = &allowed[0]
            self.arrays.append(allowed)
        if ((rows.terms is None) != (rows.metric == "product") or (rows.terms is not None and terms.shape[0] != n)
                or (rows.allowed is not None and allowed.shape[0] != n)):
            raise ValueError("search: shapes of terms and rows do not fit together.")
        coded.unit, coded.reach, coded.rounding = coding.unit, coding.reach, coding.rounding
        coded.level, coded.longest_word, coded.longest_anchor = coding.level, coding.longest_word, coding.longest_anchor
        coded.largest_term = rows.largest_term


cdef skivfpq_queries queries_of(const floating[:, ::1] queries, int64_t d) except *:
    cdef skivfpq_queries all
    if queries.shape[1] != d or queries.shape[0] == 0:
        raise ValueError("search: queries must have the rows' features.")
    all.values, all.is_f64, all.n = <const void *>&queries[0, 0], floating is double, queries.shape[0]
    return all


FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

cdef enum:
    FEW = 8  # list_planes.FEW_QUERIES

_memory = threading.local()  # scratch of each thread, kept: the first touch of new pages takes longer than a search
KEPT = 1 << 24  # bytes


cdef char *scratch_of(int64_t size, list keep) except NULL:
    """Memory that starts at a cache line; keep holds it."""
    cdef uint8_t[::1] memory
    kept = getattr(_memory, "scratch", None)
    if kept is None or len(kept) < size + 64:
        kept = np.empty(size + 64, dtype=np.uint8)
        if size <= KEPT:
            _memory.scratch = kept
    keep.append(kept)
    memory = kept
    return <char *>&memory[0] + (64 - <size_t>&memory[0] % 64)


cdef int64_t lines_of(int64_t n_bytes) noexcept nogil:
    """Whole lines of the cache that hold so many bytes, in bytes."""
    return (n_bytes + 63) // 64 * 64


cdef bint is_of_head(const skivfpq_lists *rows) noexcept:
    """Whether rows are known by heads alone, as centers may be."""
    return rows.points.embedding != NULL and rows.whole == NULL


def search_lists(
    PackedLists rows,
    const floating[:, ::1] queries,   # IN (n_queries, n_features), as the metric sees them
    const int32_t[:, ::1] probes,     # IN (n_queries, n_probes) lists, each once, nearest first, -1 for none
    double[:, ::1] keys,              # OUT (n_queries, k), ascending
    int64_t[:, ::1] positions,        # OUT (n_queries, k)
    uint8_t[::1] unserved,            # OUT (n_queries,) 1 where the search must be done otherwise
):
    """The k nearest rows of each query in the lists that it probes, ties by row number; returns how many unserved."""
    cdef int64_t i, n_unserved = 0, n = queries.shape[0], n_probes = probes.shape[1], k = keys.shape[1]
    cdef skivfpq_queries all = queries_of(queries, rows.lists.d)
    cdef list keep = []
    cdef char *scratch
    if (probes.shape[0] != n or keys.shape[0] != n or positions.shape[0] != n or unserved.shape[0] != n
            or positions.shape[1] != k or k == 0 or n_probes == 0 or is_of_head(&rows.lists)):
        raise ValueError("search_lists: shapes of queries, probes, keys and positions do not fit together.")
    scratch = scratch_of(kernels.search_lists(&rows.lists, &all, NULL, n_probes, k, NULL, NULL, NULL, NULL), keep)
    with nogil:
        kernels.search_lists(&rows.lists, &all, &probes[0, 0], n_probes, k, &keys[0, 0], &positions[0, 0], &unserved[0],
                             scratch)
        for i in range(n):
            n_unserved += unserved[i]
    return n_unserved


cdef struct coarse_step:
    # The lists to probe are the nearest of all or, where n_groups is not 0, of those in the nearest groups.
    const skivfpq_lists *groups
    const skivfpq_fine_points *fine_groups
    int64_t n_groups
    const skivfpq_lists *centers
    const skivfpq_fine_points *fine_centers
    int64_t n_probes
    double reach
    int64_t probes_bytes, groups_bytes  # of their numbers
    int64_t n_bytes                     # that it needs, these included


cdef coarse_step coarse_step_of(PackedLists centers, PackedLists groups, const skivfpq_queries *queries, int64_t n_probes,
                                double reach, int64_t n_groups) except *:
    """The step for such queries, of which probing.Probes says the last three."""
    cdef coarse_step s
    cdef const skivfpq_lists *lists = &centers.lists
    if centers.fine.codes == NULL or not 0 < n_probes <= lists.offsets[lists.n_lists]:
        raise ValueError("search: centers must have fine points, and be n_probes or more.")
    if n_groups != 0 and (groups is None or groups.fine.codes == NULL or groups.lists.n_lists != 1
                          or groups.lists.d != lists.d or groups.lists.offsets[1] != lists.n_lists
                          or not 0 < n_groups <= lists.n_lists):
        raise ValueError("search: groups must be one list with fine points, n_groups or more, and those of the centers.")
    s.centers, s.fine_centers, s.n_probes, s.reach = lists, &centers.fine, n_probes, reach
    s.groups, s.fine_groups, s.n_groups = NULL, NULL, n_groups
    s.probes_bytes, s.groups_bytes = lines_of(queries.n * n_probes * 4), lines_of(queries.n * n_groups * 4)
    s.n_bytes = kernels.nearest_lists(lists, s.fine_centers, queries, NULL, n_groups, n_probes, reach, NULL, NULL, NULL)
    if n_groups != 0:
        s.groups, s.fine_groups = &groups.lists, &groups.fine
        s.n_bytes = max(s.n_bytes, kernels.nearest_lists(s.groups, s.fine_groups, queries, NULL, 0, n_groups, INFINITY, NULL,
                                                         NULL, NULL))
    s.n_bytes += s.probes_bytes + s.groups_bytes
    return s


cdef void take_coarse_step(const coarse_step *s, const skivfpq_queries *queries, int32_t *probes, uint8_t *unserved,
                           char *scratch) noexcept nogil:
    """The lists that queries probe, -1 in front for those not served."""
    cdef int64_t i
    cdef int32_t *groups = NULL
    if s.n_groups:
        groups = <int32_t *>scratch
        kernels.nearest_lists(s.groups, s.fine_groups, queries, NULL, 0, s.n_groups, INFINITY, groups, unserved,
                              scratch + s.groups_bytes)
        for i in range(queries.n):
            if unserved[i]:
                groups[i * s.n_groups] = -1
    kernels.nearest_lists(s.centers, s.fine_centers, queries, groups, s.n_groups, s.n_probes, s.reach, probes, unserved,
                          scratch + s.groups_bytes)
    for i in range(queries.n):
        if unserved[i]:
            probes[i * s.n_probes] = -1


def nearest_lists(
    PackedLists centers,              # group by group, or one list, with their numbers and fine points
    const floating[:, ::1] queries,   # IN (n_queries, n_features), as the metric sees them
    int32_t[:, ::1] probes,           # OUT (n_queries, n_probes), the nearest first, near ones before others
    uint8_t[::1] unserved,            # OUT (n_queries,) 1 where it must be done otherwise
    double reach=INFINITY,            # of probing.Probes; where there are fewer centers within its limit, -1
    PackedLists groups=None,          # centers of the groups, one list
    int64_t n_groups=0,               # the nearest ones, that are looked in; 0 for all
):
    """The nearest centers of each query, ties by number."""
    cdef skivfpq_queries all = queries_of(queries, centers.lists.d)
    cdef coarse_step step = coarse_step_of(centers, groups, &all, probes.shape[1], reach, n_groups)
    cdef list keep = []
    cdef char *scratch
    if probes.shape[0] != all.n or unserved.shape[0] != all.n:
        raise ValueError("nearest_lists: shapes of queries, probes and unserved do not fit together.")
    scratch = scratch_of(step.n_bytes, keep)
    with nogil:
        take_coarse_step(&step, &all, &probes[0, 0], &unserved[0], scratch)


def search_index(
    PackedLists centers,              # as in nearest_lists
    PackedLists groups,               # the same
    PackedLists rows,                 # of their lists
    const floating[:, ::1] queries,   # IN (n_queries, n_features), as the metric sees them
    const double[:, ::1] turned_queries, # IN the same as codes have them, or None
    int64_t n_probes,
    double reach,                     # of probing.Probes
    int64_t n_groups,
    double[:, ::1] keys,              # OUT (n_queries, k), ascending
    int64_t[:, ::1] positions,        # OUT (n_queries, k)
    uint8_t[::1] unserved,            # OUT (n_queries,) 1 where the search must be done otherwise
):
    """The k nearest rows of each query in the n_probes nearest lists that are within reach, both steps in one call;
    returns the same."""
    cdef int64_t n_unserved, n = queries.shape[0], k = keys.shape[1]
    cdef skivfpq_queries all = queries_of(queries, rows.lists.d), turned = all
    cdef coarse_step step = coarse_step_of(centers, groups, &all, n_probes, reach, n_groups)
    cdef list keep = []
    cdef char *scratch
    if turned_queries is not None:
        turned = queries_of(turned_queries, rows.lists.d)
        if turned.n != n:
            raise ValueError("search_index: there must be as many turned queries as queries.")
    if (centers.lists.d != rows.lists.d or keys.shape[0] != n or positions.shape[0] != n or unserved.shape[0] != n
            or positions.shape[1] != k or k == 0 or step.centers.offsets[step.centers.n_lists] != rows.lists.n_lists
            or is_of_head(&rows.lists)):
        raise ValueError("search_index: shapes of queries, centers, rows, keys and positions do not fit together.")
    scratch = scratch_of(both_bytes(&step, &rows.lists, &turned, k), keep)
    with nogil:
        n_unserved = search_both(&step, &rows.lists, &all, &turned, k, &keys[0, 0], &positions[0, 0], &unserved[0], scratch)
    return n_unserved


cdef int64_t both_bytes(const coarse_step *step, const skivfpq_lists *rows, const skivfpq_queries *queries,
                        int64_t k) noexcept nogil:
    """What search_both needs."""
    cdef int64_t search = kernels.search_lists(rows, queries, NULL, step.n_probes, k, NULL, NULL, NULL, NULL)
    return max(step.n_bytes, step.probes_bytes + search)


cdef int64_t search_both(
    const coarse_step *step, const skivfpq_lists *rows, const skivfpq_queries *queries, const skivfpq_queries *turned,
    int64_t k, double *keys, int64_t *positions, uint8_t *unserved, char *scratch,
) noexcept nogil:
    """The coarse step and the search; returns how many queries are not served."""
    cdef int64_t i, n_unserved = 0
    cdef int32_t *probes = <int32_t *>scratch
    scratch += step.probes_bytes
    take_coarse_step(step, queries, probes, unserved, scratch)
    kernels.search_lists(rows, turned, probes, step.n_probes, k, keys, positions, unserved, scratch)
    for i in range(queries.n):
        n_unserved += unserved[i]
    return n_unserved


def search_few(
    PackedLists centers,              # as in nearest_lists
    PackedLists groups,               # the same
    PackedLists rows,                 # of their lists
    X,                                # what the user gave
    int64_t k,
    int64_t n_probes,
    double reach,                     # of probing.Probes
    int64_t n_groups,
    bint takes_roots,                 # of keys
    double largest,                   # value of float64 that is let pass
):
    """Distances and row numbers (n_queries, k) as ``search_index`` finds them; None for anything but a few plain
    rows of floats, and where ``search_index`` does not serve: those are to be checked, and searched, otherwise."""
    cdef const float[:, ::1] singles
    cdef const double[:, ::1] doubles
    cdef double[:, ::1] keys
    cdef int64_t[:, ::1] positions
    cdef skivfpq_queries all
    cdef list keep = []
    cdef char *scratch
    cdef int64_t i, j, n, n_left
    cdef coarse_step step
    cdef uint8_t[FEW] unserved
    if type(X) is not np.ndarray or X.ndim != 2 or not X.flags.c_contiguous or not X.flags.aligned:
        return None
    n = X.shape[0]
    if not 0 < n < FEW or X.shape[1] != rows.lists.d or not 0 < k <= rows.lists.offsets[rows.lists.n_lists]:
        return None
    if X.dtype == FLOAT32:
        singles = X
        if not finite_f32(&singles[0, 0], n * rows.lists.d):
            return None
        all = queries_of(singles, rows.lists.d)
    elif X.dtype == FLOAT64:
        doubles = X
        if not within(&doubles[0, 0], n * rows.lists.d, largest):
            return None
        all = queries_of(doubles, rows.lists.d)
    else:
        return None
    if centers.lists.d != rows.lists.d or centers.lists.offsets[centers.lists.n_lists] != rows.lists.n_lists:
        raise ValueError("search_few: centers must be those of the lists.")
    step = coarse_step_of(centers, groups, &all, n_probes, reach, n_groups)
    distances, indices = np.empty((n, k)), np.empty((n, k), dtype=np.int64)
    keys, positions = distances, indices
    scratch = scratch_of(both_bytes(&step, &rows.lists, &all, k), keep)
    with nogil:
        n_left = search_both(&step, &rows.lists, &all, &all, k, &keys[0, 0], &positions[0, 0], unserved, scratch)
        for i in range(n if n_left == 0 else 0):
            for j in range(k):
                positions[i, j] = rows.lists.ids[positions[i, j]]
                if takes_roots:
                    keys[i, j] = sqrt(keys[i, j])
    return None if n_left else (distances, indices)


cdef inline bint within(const double *values, int64_t n, double largest) noexcept nogil:
    """Whether none is larger, or no number."""
    cdef int64_t i, n_beyond = 0
    for i in range(n):
        n_beyond += not (-largest <= values[i] <= largest)
    return n_beyond == 0


cdef inline bint finite_f32(const float *values, int64_t n) noexcept nogil:
    """Whether none is infinite or no number: by their exponents."""
    cdef const uint32_t *bits = <const uint32_t *>values
    cdef uint32_t found = 0
    cdef int64_t i
    for i in range(n):
        found |= (bits[i] & 0x7F800000u) == 0x7F800000u
    return found == 0


def rank_rows(
    PackedLists rows,
    const floating[:, ::1] queries,   # IN (n_queries, n_features), as the metric sees them
    const int64_t[:, ::1] candidates, # IN (n_queries, n_candidates) positions
    double[:, ::1] keys,              # OUT (n_queries, k), ascending
    int64_t[:, ::1] positions,        # OUT (n_queries, k)
):
    """The k nearest of each query's candidates, ties by row number."""
    cdef int64_t n = queries.shape[0], k = keys.shape[1], n_candidates = candidates.shape[1]
    cdef skivfpq_queries all = queries_of(queries, rows.lists.d)
    cdef list keep = []
    cdef char *scratch
    if (candidates.shape[0] != n or keys.shape[0] != n or positions.shape[0] != n or positions.shape[1] != k
            or not 0 < k <= n_candidates):
        raise ValueError("rank_rows: shapes of queries, candidates, keys and positions do not fit together.")
    scratch = scratch_of(kernels.rank_rows(&rows.lists, &all, NULL, n_candidates, k, NULL, NULL, NULL), keep)
    with nogil:
        kernels.rank_rows(&rows.lists, &all, &candidates[0, 0], n_candidates, k, &keys[0, 0], &positions[0, 0], scratch)


def all_within(const floating[:, ::1] X, double largest):
    """Whether no value is larger, or no number; all finite values of float32 are taken for smaller."""
    cdef int64_t n = X.shape[0] * X.shape[1]
    cdef bint result
    if n == 0:
        return True
    with nogil:
        if floating is float:
            result = finite_f32(&X[0, 0], n)
        else:
            result = within(&X[0, 0], n, largest)
    return result

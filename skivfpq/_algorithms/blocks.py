"""Row blocks over threads: kernels release the GIL, so ranges of rows go to Python threads."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import joblib
import numpy as np
from joblib.parallel import get_active_backend

from skivfpq import _kernels

ROWS_PER_TASK = 2048  # a native call packs the centers anew: below 1/1000 of its work at this height


def effective_n_jobs(n_jobs):
    """Threads for ``n_jobs``: None is every core that this process may use.

    Affinity and cgroups count, and so does OMP_NUM_THREADS, which joblib's process pools set in
    their workers; inside joblib's thread pools None means one.
    """
    cores = joblib.cpu_count()
    if n_jobs is None:
        limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        if limit.isdigit() and int(limit) > 0:
            return min(cores, int(limit))
        nested = getattr(get_active_backend()[0], "nesting_level", 0)
        return 1 if nested else cores
    return max(1, cores + 1 + n_jobs) if n_jobs < 0 else n_jobs


def nearest_centers(X, centers, n_threads=1, labels=None, sq_distances=None):
    """Nearest center of every row: labels (n_samples,) int32 and sq_distances (n_samples,).

    The reference kernel runs in the caller's thread, since its matrix products bring their own.
    """
    centers = np.ascontiguousarray(centers, dtype=np.float64)
    labels = np.empty(X.shape[0], dtype=np.int32) if labels is None else labels
    sq_distances = np.empty(X.shape[0]) if sq_distances is None else sq_distances

    def assign(rows):
        _kernels.nearest_centers(X[rows], centers, labels[rows], sq_distances[rows])

    if isinstance(X, np.ndarray) and _kernels.NATIVE:
        map_rows(assign, X.shape[0], n_threads)
    else:
        assign(slice(0, X.shape[0]))
    return labels, sq_distances


def map_rows(function, n_rows, n_threads):
    """Call function(slice) for consecutive slices of the rows, on up to n_threads threads."""
    n_tasks = max(1, min(4 * n_threads, n_rows // ROWS_PER_TASK))
    bounds = np.linspace(0, n_rows, n_tasks + 1).astype(int)
    slices = [slice(start, stop) for start, stop in pairwise(bounds)]
    if n_threads == 1 or n_tasks == 1:
        for rows in slices:
            function(rows)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(function, slices))  # list: an exception of a task is raised here


def as_float_rows(X):
    """C-contiguous float32 or float64 rows of an array, the same array where it is that already.

    float16 and 8- or 16-bit integers fit float32, all others float64.
    """
    small = X.dtype.kind in "iu" and X.dtype.itemsize <= 2
    dtype = np.float32 if X.dtype in (np.float16, np.float32) or small else np.float64
    return np.ascontiguousarray(X, dtype=dtype)

"""Row blocks over threads: kernels release the GIL, so ranges of rows go to Python threads."""

import os
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import pairwise

import joblib
import numpy as np
from joblib.parallel import get_active_backend

from skivfpq import _kernels

CACHED = 1 << 18  # bytes that stay in the second cache
TILE_MULTIPLE = 48  # rows of a task start at a block of 16 rows and a tile of 8, 16 or 48
ROWS_PER_TASK = 2048  # a native call packs the centers anew: a fiftieth of its work at this height
FEWEST_PER_TASK = 256  # rather than that a thread has nothing to do
SAMPLE = 256  # rows whose mean stands for all rows'
MOVED = 0.8  # moves by rows of a cluster, beyond which it is added up anew
FEW = 0.25  # share of the rows, below which those that moved are read one by one
GATHERED = 0.4  # share of the rows, below which they are gathered by cluster
SHORT = 1 << 19  # values, added up in 0.1 ms
HANDING_NS = 4e5  # work that is done before threads have their tasks and are waited for


def effective_n_jobs(n_jobs):
    """Threads for ``n_jobs``: None is every core that this process may use.

    Affinity and cgroups count, and so does OMP_NUM_THREADS, which joblib's process pools set in
    their workers; inside joblib's thread pools None means one.
    """
    affinity = getattr(os, "sched_getaffinity", lambda _: ())(0)
    cores = _cpu_count(frozenset(affinity), os.environ.get("LOKY_MAX_CPU_COUNT"))
    if n_jobs is None:
        limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
        if limit.isdigit() and int(limit) > 0:
            return min(cores, int(limit))
        nested = getattr(get_active_backend()[0], "nesting_level", 0)
        return 1 if nested else cores
    return max(1, cores + 1 + n_jobs) if n_jobs < 0 else n_jobs


@lru_cache
def _cpu_count(affinity, limit):
    """What joblib reads from files, and makes of these two; asked once for each."""
    return joblib.cpu_count()


def nearest_centers(X, centers, n_threads=1, labels=None, sq_distances=None, measures=True):
    """Nearest center of every row: labels (n_samples,) int32, and sq_distances (n_samples,) if measured.

    The reference kernel runs in the caller's thread, since its matrix products bring their own.
    """
    centers = np.ascontiguousarray(centers, dtype=np.float64)
    labels = np.empty(X.shape[0], dtype=np.int32) if labels is None else labels
    sq_distances = np.empty(X.shape[0]) if sq_distances is None and measures else sq_distances

    def assign(rows):
        out = None if sq_distances is None else sq_distances[rows]
        _kernels.nearest_centers(X[rows], centers, labels[rows], out)

    map_rows(assign, X.shape[0], n_threads if runs_native(X) else 1, nearest_ns(centers))
    return labels, sq_distances


def nearest_ns(centers):
    """About what the lane kernel takes for a row, in nanoseconds."""
    return 10 + 0.03 * centers.size


def row_sq_distances(X, centers, labels, out, n_threads=1):
    """out[i] = |X[i] - centers[labels[i]]|^2, (n_samples,)."""
    centers = np.ascontiguousarray(centers, dtype=np.float64)

    def measure(rows):
        _kernels.row_sq_distances(X[rows], centers, labels[rows], out[rows])

    map_rows(measure, X.shape[0], n_threads if runs_native(X) else 1, 5 + X.shape[1] / 2)


def cluster_sums(X, weights, labels, changed, sums, counts, n_threads=1):
    """Weighted sums (n_clusters, n_features), total weights (n_clusters,), at least of the changed clusters.

    Rows of a cluster are added in their order: the same bits on every path.
    """
    clusters = np.flatnonzero(changed)
    if not clusters.size:
        return
    in_one_walk = runs_native(X) and sums.nbytes <= CACHED
    few = may_gather(X, sums) and counts[clusters].sum() < GATHERED * counts.sum()
    if in_one_walk and not few:
        add_rows(X, weights, labels, sums, counts, n_threads)
        return
    order, bounds = np.empty(len(labels), dtype=np.int32), np.empty(len(counts) + 1, dtype=np.int32)
    _kernels.order_by_label(labels, order, bounds)

    def add(part):
        _kernels.cluster_sums(X, weights, order, bounds, clusters[part], sums, counts)

    n_tasks = 4 * n_threads if runs_native(X) and n_threads > 1 and len(labels) > ROWS_PER_TASK else 1
    run_tasks(add, len(clusters), n_tasks, n_threads, multiple=1)


def update_sums(X, weights, labels, before, limit, sums, counts, n_threads=1):
    """The same after some labels have changed, from the sums before: only the rows that moved are read.

    Clusters of which many rows moved are added up anew, and so are those of a row beyond the limit, whose
    leaving would leave rounding. limit: for values times weights.
    """
    rows = np.flatnonzero(labels != before).astype(np.int32)
    moves = np.concatenate([before[rows], labels[rows]])
    events, bounds = np.empty(len(moves), dtype=np.int32), np.empty(len(counts) + 1, dtype=np.int32)
    _kernels.order_by_label(moves, events, bounds)
    n_events = np.diff(bounds)
    anew = n_events > MOVED * np.bincount(labels, minlength=len(counts))
    clusters = np.flatnonzero((n_events > 0) & ~anew)
    given_up = np.zeros(len(counts), dtype=bool)

    def move(part):
        _kernels.native.move_rows(
            X, weights, rows, events, bounds, clusters[part], limit, sums, given_up.view(np.uint8)
        )

    few = len(moves) * X.shape[1] / 4 < HANDING_NS
    run_tasks(move, len(clusters), 1 if few else 4 * n_threads, n_threads, multiple=1)
    cluster_sums(X, weights, labels, anew | given_up, sums, counts, n_threads)
    counts[:] = np.bincount(labels, weights, minlength=len(counts))


def walk_is_short(X, sums):
    """Whether one walk over the rows takes less time than to look for those that moved."""
    return runs_native(X) and X.size <= SHORT and sums.nbytes <= CACHED


def may_gather(X, sums):
    """Whether adding up few rows, gathered by cluster, can be faster than one walk over all."""
    return X.shape[1] >= 16 or sums.nbytes > CACHED or not runs_native(X)


def add_rows(X, weights, labels, sums, counts, n_threads):
    """Of all clusters in one walk over the rows, threads take columns."""
    n_tasks = n_threads if X.size / 2 >= HANDING_NS else 1

    def add(columns):
        _kernels.native.add_rows(X, weights, labels, sums, counts, columns.start, columns.stop)

    run_tasks(add, X.shape[1], n_tasks, n_threads, multiple=16)  # lines of the cache


class PackedRows:
    """Rows transposed once for the lane kernel, to be compared with centers again and again."""

    def __init__(self, X, n_threads):
        self.X, self.n_threads = X, n_threads
        height = _kernels.native.tile_rows()
        self.origin, self.scale = origin_and_scale(X)
        self.tiles = np.empty((-(-len(X) // height), X.shape[1], height), dtype=np.float32)
        self.lengths = np.empty(len(X))

        def pack(rows):
            _kernels.native.pack_tiles(
                X, self.origin, self.scale, rows.start, rows.stop, self.tiles, self.lengths
            )

        map_rows(pack, len(X), n_threads, 2 * X.shape[1])

    def nearest_centers(self, centers, labels):
        """Write the labels (n_samples,) int32 of all rows."""

        def assign(rows):
            _kernels.native.nearest_packed(
                self.X, self.origin, self.scale, self.tiles, self.lengths, centers, rows.start, rows.stop,
                labels,
            )  # fmt: skip

        map_rows(assign, len(self.X), self.n_threads, nearest_ns(centers))


def origin_and_scale(X):
    """Mean of some rows (n_features,), rounded as they are, and the power of two that scales the rest to 1.

    Any origin and scale serve; near the rows' own they leave the least to the kernel's later stages.
    """
    rows = X[evenly(len(X), SAMPLE)].astype(np.float64)
    origin = rows.mean(axis=0).astype(X.dtype).astype(np.float64)
    reach = np.abs(rows - origin).max()
    return origin, float(np.ldexp(1.0, min(1000, -int(np.frexp(reach)[1]))))


def evenly(n_rows, n_wanted):
    """A slice that takes n_wanted of the rows, or up to twice as many, at equal distances."""
    return slice(None, None, max(1, n_rows // n_wanted))


def runs_native(X):
    """Whether compiled kernels, which may run on several threads, serve these rows."""
    return isinstance(X, np.ndarray) and _kernels.NATIVE


def map_rows(function, n_rows, n_threads, row_ns):
    """Call function(slice) for consecutive slices of the rows, on up to n_threads threads.

    On one where rows, at about row_ns nanoseconds each, are done before others could be of use.
    """
    n_tasks = max(min(4 * n_threads, n_rows // ROWS_PER_TASK), min(n_threads, n_rows // FEWEST_PER_TASK))
    run_tasks(function, n_rows, n_tasks if n_rows * row_ns >= HANDING_NS else 1, n_threads)


def run_tasks(function, size, n_tasks, n_threads, multiple=TILE_MULTIPLE):
    """Call function(slice) for n_tasks consecutive slices of range(size), starting at such multiples."""
    n_tasks = min(n_tasks, -(-size // multiple))
    if n_threads == 1 or n_tasks <= 1:
        function(slice(0, size))
        return
    bounds = np.linspace(0, size, n_tasks + 1).astype(int)
    bounds[1:-1] -= bounds[1:-1] % multiple
    slices = iter([slice(start, stop) for start, stop in pairwise(bounds)])

    def work():
        for part in slices:  # which hands out each slice once, whoever asks
            function(part)

    helpers = [_threads(n_threads).submit(work) for _ in range(min(n_threads, n_tasks) - 1)]
    try:
        work()
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()  # raises what a task raised


_pools = {}


def _threads(n_threads):
    """A pool of so many threads, kept for the process; a forked child makes its own."""
    key = os.getpid(), n_threads
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(n_threads, thread_name_prefix="skivfpq")
    return _pools[key]


def as_float_rows(X):
    """C-contiguous float32 or float64 rows of an array, the same array where it is that already.

    float16 and 8- or 16-bit integers fit float32, all others float64.
    """
    small = X.dtype.kind in "iu" and X.dtype.itemsize <= 2
    dtype = np.float32 if X.dtype in (np.float16, np.float32) or small else np.float64
    return np.ascontiguousarray(X, dtype=dtype)

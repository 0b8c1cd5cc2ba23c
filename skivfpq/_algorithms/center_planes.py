"""int8 points of the centers of lists, for the coarse step (probe.c)."""

from dataclasses import replace

import numpy as np

from skivfpq import _kernels
from skivfpq._algorithms.blocks import run_tasks
from skivfpq._algorithms.list_planes import exact_rows, over_queries, pack_lists
from skivfpq._algorithms.planes import (
    LONG,
    TAIL_COPIES,
    all_features,
    empty_fine,
    multiply,
    principal_axes,
    turned_head,
)

LEAST_HEAD = 1 << 17  # values of centers, whose scores take longer than what a head costs
MOST_AXES = 1024  # features; the principal axes of more take longer to find
MEASURING = 24  # times the time of scoring a feature of a center
WORTHWHILE = 0.6  # of the work with all features
ROUNDED = 0.0225  # of their length: what int8 points of centers and queries are off by together
QUERIES = 64  # rows that stand for queries to come
ROWS_PER_TASK = 256  # at least, to find the nearest centers of


class CenterPlanes:
    """Centers of lists, to find the nearest of."""

    def __init__(self, nearness, centers, rows=None, n_threads=1):
        """nearness: Metric by which centers are near; centers (n_lists, n_features) float64.

        rows : (n, n_features) like the queries to come, to find out whether a head saves time; or None
        """
        n_lists = len(centers)
        self.nearness, self.centers = nearness, centers
        offsets, ids = np.array([0, n_lists]), np.arange(n_lists, dtype=np.int32)
        head = None if rows is None or nearness.is_product else head_of_centers(centers, rows, n_threads)
        self.planes = pack_lists(nearness, centers, offsets, ids, head=head, whole=False)
        if self.planes is not None:
            fine = empty_fine(centers.shape)
            _kernels.native.pack_fine(centers, self.planes.origin, *fine)
            self.planes = replace(self.planes, fine=fine, head=head)

    def search(self, rows, queries, k, n_probes, n_threads, turned=None):
        """The k nearest rows of each query in its n_probes nearest lists, as ``ListPlanes.search``.

        turned : (n_queries, n_features) float64, the queries as codes have them, or None for the same
        """

        def search(some, keys, positions, unserved):
            if self.planes is None:
                unserved[:] = 1
                return len(unserved)
            others = None if turned is None else turned[some]
            found = keys, positions, unserved
            return _kernels.native.search_index(
                self.planes.packed, rows.packed, queries[some], others, n_probes, *found
            )

        return over_queries(search, queries, k, n_threads, n_probes)

    def nearest(self, rows, n_threads):
        """The nearest center of each row, (n_rows,) int32, the lowest on ties; -1 where it cannot serve."""
        rows = np.ascontiguousarray(rows)
        labels, unserved = np.full((len(rows), 1), -1, dtype=np.int32), np.ones(len(rows), dtype=np.uint8)

        def find(some):
            _kernels.native.nearest_lists(self.planes.packed, rows[some], labels[some], unserved[some])

        if self.planes is not None and len(rows):
            run_tasks(find, len(rows), len(rows) // ROWS_PER_TASK, n_threads, multiple=1)
        labels[unserved != 0] = -1
        return labels[:, 0]

    def ranked(self, queries, n_threads):
        """All lists, nearest first, (n_queries, n_lists)."""
        return exact_rows(self.nearness, queries, self.centers, len(self.centers), n_threads)[1]


@np.errstate(over="ignore", invalid="ignore")
def head_of_centers(centers, rows, n_threads=1):
    """The head that leaves the coarse step the least to do for such rows, or None for all features.

    Scores of so many axes exclude most centers; those left are measured by all features, each of which costs
    MEASURING times as much.
    """
    n_lists, n_features = centers.shape
    is_large = n_lists * n_features >= LEAST_HEAD and 64 <= n_features <= min(MOST_AXES, n_lists)
    if not (_kernels.NATIVE and is_large):
        return None
    origin = all_features(centers).origin
    points, queries = np.float32(centers - origin), np.float32(rows - origin)
    sq_points, sq_queries = _sq_lengths(points), _sq_lengths(queries)
    if not 0 < sq_points.sum() + sq_queries.sum() < np.inf:
        return None
    usual = points[sq_points <= LONG**2 * np.median(sq_points)]
    axes, _ = principal_axes(usual, n_features // 2, n_threads)
    if not np.isfinite(axes).all():  # most centers are the same
        return None
    columns = np.ascontiguousarray(axes.T, dtype=np.float32)
    points_on, queries_on = multiply(points, columns, n_threads), multiply(queries, columns, n_threads)
    products = multiply(queries, np.ascontiguousarray(points.T), n_threads)
    sq_distances = sq_queries[:, None] + sq_points - 2 * products
    n_probed = max(1, int(np.sqrt(n_lists) / 2))
    last = np.sqrt(np.partition(sq_distances, n_probed - 1, axis=1)[:, n_probed - 1].clip(0))
    limits = np.square(last + ROUNDED * np.sqrt(np.median(sq_points)))[:, None]

    def cost(width, sq_distances):
        return width * n_lists + MEASURING * n_features * (sq_distances <= limits).sum(axis=1).mean()

    least, best = WORTHWHILE * cost(n_features, sq_distances), None
    step = max(16, 4 * _kernels.native.scan_shape()[2])  # of widths that leave no unit empty
    products = np.zeros_like(products)  # of what the axes so far hold
    n_axes = 0
    for width in range(step, len(axes) + TAIL_COPIES + 1, step):
        more, n_axes = slice(n_axes, width - TAIL_COPIES), width - TAIL_COPIES
        products += multiply(queries_on[:, more].copy(), points_on.T[more].copy(), n_threads)
        tails = _tails(queries_on[:, :n_axes], sq_queries)[:, None], _tails(points_on[:, :n_axes], sq_points)
        heads = sq_queries[:, None] - tails[0] ** 2 + sq_points - tails[1] ** 2 - 2 * products
        width_cost = cost(width, heads + np.square(tails[0] - tails[1]))
        if width_cost < least:
            least, best = width_cost, (n_axes, float(np.median(tails[1])))
    return None if best is None else turned_head(origin, axes[: best[0]], best[1], n_threads)


def _sq_lengths(V):
    return np.einsum("ij,ij->i", V, V)


def _tails(products, sq_lengths):
    """Lengths of what axes leave of vectors that have these products with them."""
    return np.sqrt((sq_lengths - _sq_lengths(products)).clip(0))

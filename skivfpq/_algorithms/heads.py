"""Heads of centers and of rows: the few principal axes whose scores exclude most of them."""

import numpy as np

from skivfpq import _kernels
from skivfpq._algorithms.blocks import evenly
from skivfpq._algorithms.planes import (
    LONG,
    SAMPLE,
    TAIL_COPIES,
    all_features,
    multiply,
    principal_axes,
    turned_head,
)

MOST_FEATURES = 1024  # the principal axes of more take longer to find
MOST_AXES = 252  # so do more of them

LEAST_HEAD = 1 << 17  # values of centers, whose scores take longer than what a head costs
MEASURING = 24  # times the time of scoring a feature of a center: by its fine point
WORTHWHILE = 0.6  # of the work with all features
ROUNDED = 0.0225  # of their length: what int8 points of centers and queries are off by together

LEAST_FEATURES = 256  # of rows; those of fewer are scanned before heads and queries' axes pay
LEAST_ROWS = 16384  # that are worth the search for axes
LOOKING = 4  # times the time of scanning a feature of a row: by its point of all features
ROWS_WORTHWHILE = 0.8  # of the work with all features
ROWS_ROUNDED = 0.06  # of their length, of rows and queries, while the nearest are not known yet
NEAREST = 10  # rows that are looked for
NEIGHBORHOODS, NEIGHBORS = 4, 1024  # rows that stand for those that queries probe
SOME = 16  # rows of each that stand for queries


@np.errstate(over="ignore", invalid="ignore")
def head_of_centers(centers, rows, n_threads=1):
    """The head that leaves the coarse step the least to do for such rows, or None for all features.

    Scores of so many axes exclude most centers; those left are measured by all features, each of which costs
    MEASURING times as much.
    """
    n_lists, n_features = centers.shape
    is_large = n_lists * n_features >= LEAST_HEAD and 64 <= n_features <= min(MOST_FEATURES, n_lists)
    if not (_kernels.NATIVE and is_large):
        return None
    n_probed = max(1, int(np.sqrt(n_lists) / 2))

    def cost(width, n_left):
        return width * n_lists + MEASURING * n_features * n_left

    return best_head(centers, centers, rows, n_probed, ROUNDED, cost, WORTHWHILE, n_threads)


@np.errstate(over="ignore", invalid="ignore")
def head_of_rows(metric, vectors, offsets, ids, centers, n_threads=1):
    """The same of rows list by list, of the search of the lists that queries probe.

    The rows of a query's nearest list, and those that heads leave, are scored by all features, and its own
    head takes products with the axes: each of these features costs LOOKING times as much as to scan one.
    """
    n_lists, n_features = centers.shape
    if metric.is_product or not (_kernels.NATIVE and LEAST_FEATURES <= n_features <= MOST_FEATURES):
        return None
    if _kernels.native.INSTRUCTION_SET.startswith("amx"):
        return None  # its tiles score batches in less time than heads cost (reckoned, not measured)
    live = np.flatnonzero(ids >= 0)
    if len(live) < LEAST_ROWS or n_lists < NEIGHBORHOODS:
        return None
    sample = np.float32(metric.rows(vectors[live[evenly(len(live), max(SAMPLE, 2 * n_features))]]))
    groups = [np.float32(metric.rows(vectors[rows])) for rows in neighborhoods(offsets, ids, centers)]
    points, queries = np.concatenate(groups), np.concatenate([group[:SOME] for group in groups])
    if len(points) <= NEAREST:
        return None
    in_list = len(live) / n_lists
    n_scanned = 4 * np.sqrt(n_lists) * in_list  # by those who ask for a high recall

    def cost(width, n_left):
        looked_at = n_left + in_list + width if width < n_features else 0
        return width * n_scanned + LOOKING * n_features * looked_at

    return best_head(sample, points, queries, NEAREST + 1, ROWS_ROUNDED, cost, ROWS_WORTHWHILE, n_threads)


def neighborhoods(offsets, ids, centers):
    """Positions of the rows in a few groups of lists that are near each other."""
    groups = []
    for center in centers[:: len(centers) // NEIGHBORHOODS][:NEIGHBORHOODS]:
        nearest = np.argsort(np.square(centers - center).sum(axis=1))
        n_lists = 1 + np.searchsorted(np.cumsum(np.diff(offsets)[nearest]), NEIGHBORS)
        rows = np.concatenate([np.arange(*offsets[number : number + 2]) for number in nearest[:n_lists]])
        groups.append(rows[ids[rows] >= 0][:NEIGHBORS])
    return groups


def best_head(sample, points, queries, n_nearest, rounded, cost, worthwhile, n_threads):
    """The head of the least cost (width, how many points it leaves of a query), or None for all features.

    Axes are those of a sample. Points are left that may be as near as the n_nearest-th; rounded: what int8
    points are off by, of their length.
    """
    origin = all_features(sample).origin
    points, queries = np.float32(points - origin), np.float32(queries - origin)
    sq_points, sq_queries = _sq_lengths(points), _sq_lengths(queries)
    if not 0 < sq_points.sum() + sq_queries.sum() < np.inf:
        return None
    sample = np.float32(sample - origin)
    sq_sample = _sq_lengths(sample)
    usual = sample[sq_sample <= LONG**2 * np.median(sq_sample)]
    n_features = points.shape[1]
    axes, _ = principal_axes(usual, min(n_features // 2, MOST_AXES), n_threads)
    if not np.isfinite(axes).all():  # most points are the same
        return None
    columns = np.ascontiguousarray(axes.T, dtype=np.float32)
    points_on, queries_on = multiply(points, columns, n_threads), multiply(queries, columns, n_threads)
    products = multiply(queries, np.ascontiguousarray(points.T), n_threads)
    sq_distances = sq_queries[:, None] + sq_points - 2 * products
    last = np.sqrt(np.partition(sq_distances, n_nearest - 1, axis=1)[:, n_nearest - 1].clip(0))
    limits = np.square(last + rounded * np.sqrt(np.median(sq_points)))[:, None]

    def cost_of(width, sq_distances):
        return cost(width, (sq_distances <= limits).sum(axis=1).mean())

    least, best = worthwhile * cost_of(n_features, sq_distances), None
    step = max(16, 4 * _kernels.native.scan_shape()[2])  # of widths that leave no unit empty
    products = np.zeros_like(products)  # of what the axes so far hold
    n_axes = 0
    for width in range(step, len(axes) + TAIL_COPIES + 1, step):
        more, n_axes = slice(n_axes, width - TAIL_COPIES), width - TAIL_COPIES
        products += multiply(queries_on[:, more].copy(), points_on.T[more].copy(), n_threads)
        tails = _tails(queries_on[:, :n_axes], sq_queries)[:, None], _tails(points_on[:, :n_axes], sq_points)
        heads = sq_queries[:, None] - tails[0] ** 2 + sq_points - tails[1] ** 2 - 2 * products
        width_cost = cost_of(width, heads + np.square(tails[0] - tails[1]))
        if width_cost < least:
            least, best = width_cost, (n_axes, float(np.median(tails[1])))
    return None if best is None else turned_head(origin, axes[: best[0]], best[1], n_threads)


def _sq_lengths(V):
    return np.einsum("ij,ij->i", V, V)


def _tails(products, sq_lengths):
    """Lengths of what axes leave of vectors that have these products with them."""
    return np.sqrt((sq_lengths - _sq_lengths(products)).clip(0))

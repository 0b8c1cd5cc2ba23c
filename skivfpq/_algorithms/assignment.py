"""The nearest centers of rows that are asked for once."""

from collections import Counter
from time import perf_counter

import numpy as np

from skivfpq._algorithms import blocks
from skivfpq._algorithms.center_planes import CenterPlanes
from skivfpq._algorithms.planes import WIDEST, NearestCenters, pays
from skivfpq._algorithms.search import Metric

PACKING_NS = 2.5e5, 6  # what packing the centers' points takes, and for each of their values
WORTHWHILE = 3  # times that, the lane kernel's time: if points turn out to exclude little, not much is lost
LEAST_NS = 1000  # of the lane kernel for a row, below which points are no faster
MOST_ROWS = 32768  # beyond, packing the rows' points pays,
FEWEST_CENTERS = 512  # for so many centers
JUDGED_ROWS = 64  # on which the points are seen to exclude enough
TILED_ROWS = 16  # of these, that tell what packing the centers takes the lane kernel

_vain = Counter()  # how often the points of centers of a shape were no faster; after twice they are not made


def nearest_centers(X, centers, n_threads=1):
    """Nearest center of every row: labels (n_samples,) int32 and sq_distances (n_samples,)."""
    labels, sq_distances = nearest_labels(X, centers, n_threads), np.empty(X.shape[0])
    blocks.row_sq_distances(X, centers, labels, sq_distances, n_threads)
    return labels, sq_distances


def nearest_labels(X, centers, n_threads=1, points=None):
    """The labels alone.

    By the points of the centers, by those of the rows as in k-means, or by the lane kernel: labels do not
    depend on it.

    points : CenterPlanes of the centers, if they are there already
    """
    labels = np.full(X.shape[0], -1, dtype=np.int32)
    if points is not None and len(X) <= MOST_ROWS:
        labels[:] = points.nearest(X, n_threads)
    elif _points_of_centers_pay(X, centers, n_threads):
        _by_points_of_centers(X, centers, n_threads, labels)
    elif pays(X, len(centers)) and len(X) > MOST_ROWS and len(centers) >= FEWEST_CENTERS:
        NearestCenters(X, len(centers), n_threads)(centers, labels, np.empty(X.shape[0]))
    left = np.flatnonzero(labels < 0)
    if len(left) == len(labels):
        blocks.nearest_centers(X, centers, n_threads, labels, measures=False)
    elif len(left):
        labels[left], _ = blocks.nearest_centers(X[left], centers, n_threads, measures=False)
    return labels


def _points_of_centers_pay(X, centers, n_threads):
    if not blocks.runs_native(X) or X.shape[1] > WIDEST or len(X) > MOST_ROWS:
        return False
    if _vain[centers.shape] == 2:
        return False
    lanes_ns = blocks.nearest_ns(centers)
    packing_ns = PACKING_NS[0] + PACKING_NS[1] * centers.size
    return lanes_ns >= LEAST_NS and len(X) / n_threads * lanes_ns >= WORTHWHILE * packing_ns


def _by_points_of_centers(X, centers, n_threads, labels):
    """Labels INOUT (n_samples,), of rows that the points serve; none if the lane kernel is faster."""
    points = CenterPlanes(Metric("sqeuclidean"), np.ascontiguousarray(centers, dtype=np.float64))
    seconds, judged = _timed(points.nearest, X[:JUDGED_ROWS], 1)
    if seconds < _seconds_of_lanes(X[:JUDGED_ROWS], points.centers):
        labels[:JUDGED_ROWS] = judged
        labels[JUDGED_ROWS:] = points.nearest(X[JUDGED_ROWS:], n_threads)
    else:
        _vain[centers.shape] += 1


def _seconds_of_lanes(X, centers):
    """What the lane kernel takes for more rows, as many as those of X."""
    few, _ = _timed(blocks.nearest_centers, X[:TILED_ROWS], centers)
    all_, _ = _timed(blocks.nearest_centers, X, centers)
    return (all_ - few) * len(X) / (len(X) - TILED_ROWS)


def _timed(function, *args):
    start = perf_counter()
    result = function(*args)
    return perf_counter() - start, result

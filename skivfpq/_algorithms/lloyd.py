"""Lloyd's algorithm, one loop for every kind of data.

The loop knows its data through ``step(centers) -> Moments`` alone. Moments of parts of the data add
up, so data in memory, beyond memory or on several machines differ in the step, not in the loop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from skivfpq._algorithms.blocks import cluster_sums
from skivfpq._algorithms.planes import NearestCenters
from skivfpq._algorithms.seeding import SAME, hash_rows
from skivfpq._kernels import dense_rows, row_blocks


@dataclass
class Moments:
    """What one assignment step tells the loop."""

    sums: np.ndarray  # (n_clusters, n_features) weighted sums of the rows of each cluster
    counts: np.ndarray  # (n_clusters,) their total weights
    inertia: float  # weighted sum of squared distances to the nearest centers
    n_changed: int  # rows whose label differs from the step before
    farthest: Callable  # farthest(n) -> rows (n, n_features), weights (n,), labels (n,)


class MemoryStep:
    """The step over rows in memory; keeps their labels and squared distances."""

    def __init__(self, X, weights, n_threads, n_clusters):
        self.X, self.weights, self.n_threads = X, weights, n_threads
        self.search = NearestCenters(X, n_clusters, n_threads)
        self.sums = np.empty((n_clusters, X.shape[1]))
        self.counts = np.empty(n_clusters)
        self._hashes = None
        self.start()

    def start(self, centers=None, labels=None, sq_distances=None):
        """Begin anew; with the labels and squared distances of the first centers where they are known."""
        self.labels = np.full(self.X.shape[0], -1, dtype=np.int32)
        self.sq_distances = np.empty(self.X.shape[0])
        self.previous = None  # labels that sums and counts are of
        self.search.forget()
        self.known = None if centers is None else (centers, labels, sq_distances)

    def __call__(self, centers):
        """Assign every row to its nearest center."""
        before = self.labels
        if self.known is not None and centers is self.known[0]:
            _, self.labels, self.sq_distances = self.known
        else:
            self.labels = before.copy()
            self.search(centers, self.labels, self.sq_distances)
        self._add_up()
        return Moments(
            self.sums[: len(centers)],
            self.counts[: len(centers)],
            inertia=float((self.weights * self.sq_distances).sum()),
            n_changed=np.count_nonzero(self.labels != before),
            farthest=self.farthest,
        )

    def _add_up(self):
        """Sums and counts, anew for the clusters that won or lost rows."""
        clusters = np.arange(len(self.counts))
        if self.previous is not None:
            moved = self.labels != self.previous
            clusters = np.unique(np.concatenate([self.labels[moved], self.previous[moved]])).astype(np.int64)
        cluster_sums(self.X, self.weights, self.labels, clusters, self.sums, self.counts, self.n_threads)
        self.previous = self.labels

    def farthest(self, n_rows):
        """Up to n_rows distinct rows farthest from their centers, copies' weights taken together."""
        if self._hashes is None:
            self._hashes = hash_rows(self.X)
        rows = np.flatnonzero((self.sq_distances > 0) & (self.weights > 0))
        mantissas, exponents = np.frexp(self.sq_distances[rows])  # to 2^-33: CSR rows tie as dense ones
        rows = rows[np.lexsort((self._hashes[rows], -np.rint(np.ldexp(mantissas, 33)), -exponents))]
        _, first, copies = np.unique(self._hashes[rows], return_index=True, return_inverse=True)
        weights = np.bincount(copies, self.weights[rows])
        chosen = np.argsort(first)[:n_rows]  # as they come: farthest first
        rows, weights = rows[first[chosen]], weights[chosen]
        # Three and more go to the empty clusters in the order that scikit-learn's selection gives, so
        # that labels agree with it, not only up to their numbering.
        selected = np.argpartition(self.sq_distances, -n_rows)[: -n_rows - 1 : -1]
        if n_rows > 2 and np.array_equal(np.sort(selected), np.sort(rows)):
            order = np.argsort(rows)[np.argsort(np.argsort(selected))]
            rows, weights = rows[order], weights[order]
        return dense_rows(self.X, rows), weights, self.labels[rows]


def lloyd(step, centers, *, max_iter, tol, spherical=False, report=lambda message: None):
    """Move centers to the means of their rows until nothing changes (Lloyd 1982).

    Stops when no label changes, when the squared movement of the centers is at most ``tol``, or after
    ``max_iter`` steps. The last step seen by ``step`` is always for the centers that are returned.

    Parameters
    ----------
    step : callable, centers (n_clusters, n_features) -> Moments
    spherical : bool, whether centers are brought to length one

    Returns
    -------
    centers : (n_clusters, n_features), dtype of the first ones
    inertia : float
    n_iter : int
    """
    for n_iter in range(1, max_iter + 1):
        moments = step(centers)
        moved = _means(moments, centers, spherical)
        shift = np.square(moved - centers, dtype=np.float64).sum()
        same = np.array_equal(moved, centers)
        centers = moved
        report(f"Iteration {n_iter}, inertia {moments.inertia:.6g}, {moments.n_changed} labels changed.")
        if moments.n_changed == 0:
            report(f"Converged at iteration {n_iter}: strict convergence.")
            break
        if shift <= tol:
            report(f"Converged at iteration {n_iter}: center shift {shift:.3g} within tolerance {tol:.3g}.")
            break
    inertia = moments.inertia if same else step(centers).inertia
    return centers, inertia, n_iter


def _means(moments, centers, spherical):
    """New centers (n_clusters, n_features): weighted means, empty clusters moved away."""
    sums, counts = moments.sums.copy(), moments.counts.copy()
    empty = np.flatnonzero(counts == 0)
    if empty.size:
        for cluster, row, weight, label in zip(empty, *moments.farthest(empty.size)):
            sums[label] -= row * weight
            counts[label] -= weight
            sums[cluster], counts[cluster] = row * weight, weight
        counts[counts <= SAME * moments.counts] = 0  # all rows left, but for rounding
    means = sums / np.where(counts > 0, counts, 1)[:, None]
    means[counts <= 0] = means[np.argmax(counts)]  # as scikit-learn: with the largest, never at the origin
    if spherical:
        lengths = np.sqrt(np.einsum("ij,ij->i", means, means))
        means = np.where((lengths > 0)[:, None], means / np.where(lengths > 0, lengths, 1)[:, None], centers)
    return means.astype(centers.dtype)


def scaled_tolerance(X, weights, tol):
    """The tolerance tol times the mean over features of their weighted variance."""
    if tol == 0:
        return 0.0
    total = weights.sum()
    mean = weights @ X / total  # (n_features,) float64
    square = np.zeros(X.shape[1])
    for block in row_blocks(X.shape[0], 16 * X.shape[1]):  # half a MB: differences stay in the cache
        square += _weighted_squares(X[block], weights[block], mean)
    return tol * float((square / total).mean())


def _weighted_squares(X, weights, mean):
    """Weighted sums of squared differences to the mean, (n_features,)."""
    if not sparse.issparse(X):
        return weights @ np.square(X - mean)
    value_weights = np.repeat(weights, np.diff(X.indptr))
    differences = np.square(X.data - mean[X.indices])
    at_values = np.bincount(X.indices, value_weights * differences, X.shape[1])
    at_zeros = weights.sum() - np.bincount(X.indices, value_weights, X.shape[1])
    return at_values + at_zeros * mean**2

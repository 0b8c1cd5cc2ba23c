"""Lloyd's algorithm, one loop for every kind of data.

The loop knows its data through ``step(centers) -> Moments`` alone. Moments of parts of the data add
up, so data in memory, beyond memory or on several machines differ in the step, not in the loop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from skivfpq import _kernels
from skivfpq._algorithms.blocks import (
    FEW,
    cluster_sums,
    evenly,
    may_gather,
    row_sq_distances,
    runs_native,
    update_sums,
    walk_is_short,
)
from skivfpq._algorithms.planes import NearestCenters
from skivfpq._algorithms.seeding import SAME, hash_rows
from skivfpq._kernels import dense_rows

# 9 steps for k-means of 60,000 x 8 or 16 then reach the error of 25 plain ones.
BEYOND, MOMENTUM = 0.9, 0.5
SAMPLE = 128  # rows whose values stand for all rows'
LIKE_MOST = 16.0  # times the median of a row's largest value


@dataclass
class Moments:
    """What one assignment step tells the loop."""

    sums: np.ndarray  # (n_clusters, n_features) weighted sums of the rows of each cluster
    counts: np.ndarray  # (n_clusters,) their total weights
    inertia: Callable  # inertia() -> weighted sum of squared distances to the nearest centers
    n_changed: int  # rows whose label differs from the step before
    farthest: Callable  # farthest(n) -> rows (n, n_features), weights (n,), labels (n,)


class MemoryStep:
    """The step over rows in memory; keeps their labels and squared distances."""

    def __init__(self, X, weights, n_threads, n_clusters):
        self.X, self.weights, self.n_threads = X, weights, n_threads
        self.search = NearestCenters(X, n_clusters, n_threads)
        self.sums = np.zeros((n_clusters, X.shape[1]))
        self.counts = np.zeros(n_clusters)
        self._hashes = self._like_most = None
        self.start()

    def start(self, centers=None, labels=None, sq_distances=None):
        """Begin anew; with the labels and squared distances of the first centers where they are known."""
        self.labels = np.full(self.X.shape[0], -1, dtype=np.int32)
        self._sq_distances = np.empty(self.X.shape[0])
        self._measured = False  # whether these are the distances to self.centers
        self._summed = False  # whether sums and counts are of self.labels
        self.search.forget()
        self.known = None if centers is None else (centers, labels, sq_distances)

    def __call__(self, centers):
        """Assign every row to its nearest center."""
        before = self.labels
        self.centers = centers
        if self.known is not None and centers is self.known[0]:
            _, self.labels, self._sq_distances = self.known
            self.known, self._measured = None, True
        else:
            self.labels = before.copy()
            self._measured = self.search(centers, self.labels, self._sq_distances)
        n_changed = self._follow(before)
        return Moments(
            self.sums[: len(centers)],
            self.counts[: len(centers)],
            inertia=self.inertia,
            n_changed=n_changed,
            farthest=self.farthest,
        )

    def _follow(self, before):
        """Bring sums and counts from the labels before to those of now; returns how many have changed."""
        if walk_is_short(self.X, self.sums):
            few = int(FEW * len(before)) if self._summed else -1
            n_changed = _kernels.native.follow_labels(
                self.X, self.weights, self.labels, before, few, self._limit(), self.sums, self.counts
            )
        else:
            moved = self.labels != before
            n_changed = np.count_nonzero(moved)
            if n_changed or not self._summed:
                self._add_up(moved, before)
        self._summed = True
        return n_changed

    def _add_up(self, moved, before):
        """Sums and counts, anew only for the clusters that won or lost rows."""
        arguments = self.sums, self.counts, self.n_threads
        if self._summed and may_gather(self.X, self.sums) and runs_native(self.X):
            update_sums(self.X, self.weights, self.labels, before, self._limit(), *arguments)
        else:
            some = self._summed and may_gather(self.X, self.sums)
            changed = np.full(len(self.counts), not some)
            if some:
                changed[self.labels[moved]] = changed[before[moved]] = True
            cluster_sums(self.X, self.weights, self.labels, changed, *arguments)

    def _limit(self):
        """Weighted values up to this are like most; a sum that they leave keeps its digits."""
        if self._like_most is None:
            rows = evenly(len(self.X), SAMPLE)
            largest = np.sort(np.abs(self.X[rows]).max(axis=1) * self.weights[rows])
            self._like_most = LIKE_MOST * float(largest[len(largest) // 2])
        return self._like_most

    def sq_distances(self):
        """Squared distances (n_samples,) to the nearest centers; computed when they are asked for."""
        if not self._measured:
            row_sq_distances(self.X, self.centers, self.labels, self._sq_distances, self.n_threads)
            self._measured = True
        return self._sq_distances

    def inertia(self):
        """Weighted sum of squared distances to the nearest centers."""
        return float((self.weights * self.sq_distances()).sum())

    def farthest(self, n_rows):
        """Up to n_rows distinct rows farthest from their centers, copies' weights taken together."""
        if self._hashes is None:
            self._hashes = hash_rows(self.X)
        sq_distances = self.sq_distances()
        rows = np.flatnonzero((sq_distances > 0) & (self.weights > 0))
        mantissas, exponents = np.frexp(sq_distances[rows])  # to 2^-33: CSR rows tie as dense ones
        rows = rows[np.lexsort((self._hashes[rows], -np.rint(np.ldexp(mantissas, 33)), -exponents))]
        _, first, copies = np.unique(self._hashes[rows], return_index=True, return_inverse=True)
        weights = np.bincount(copies, self.weights[rows])
        chosen = np.argsort(first)[:n_rows]  # as they come: farthest first
        rows, weights = rows[first[chosen]], weights[chosen]
        # Three and more go to the empty clusters in the order that scikit-learn's selection gives, so
        # that labels agree with it, not only up to their numbering.
        selected = np.argpartition(sq_distances, -n_rows)[: -n_rows - 1 : -1]
        if n_rows > 2 and np.array_equal(np.sort(selected), np.sort(rows)):
            order = np.argsort(rows)[np.argsort(np.argsort(selected))]
            rows, weights = rows[order], weights[order]
        return dense_rows(self.X, rows), weights, self.labels[rows]


class GrowingStep:
    """Steps over samples of the rows that grow, and over all of them at last."""

    def __init__(self, X, stages, order, n_threads, n_clusters):
        """stages: (rows, steps) each, the first so many of order (n_samples,)."""
        self.X, self.order, self.n_threads, self.n_clusters = X, order, n_threads, n_clusters
        self.stages, self.n_left = list(stages), 0

    def __call__(self, centers):
        """Assign every row of the sample to its nearest center."""
        if self.n_left == 0:
            n_rows, self.n_left = self.stages.pop(0)
            rows = self.X if n_rows == len(self.X) else self.X[np.sort(self.order[:n_rows])]
            self.step = MemoryStep(rows, np.ones(n_rows), self.n_threads, self.n_clusters)
        moments = self.step(centers)
        if self.stages:
            self.n_left = 0 if moments.n_changed == 0 else self.n_left - 1
            moments.n_changed = max(1, moments.n_changed)  # there are other rows
        return moments


def lloyd(step, centers, *, max_iter, tol, spherical=False, accelerated=False, report=None):
    """Move centers to the means of their rows until nothing changes (Lloyd 1982).

    Stops when no label changes, when the squared movement of the centers is at most ``tol``, or after
    ``max_iter`` steps.

    Parameters
    ----------
    step : callable, centers (n_clusters, n_features) -> Moments
    spherical : bool, whether centers are brought to length one
    accelerated : bool, whether centers move beyond the means, and on as they did before, at all steps but
        the last (over-relaxation, Salakhutdinov and Roweis 2003; heavy ball, Polyak 1964)
    report : callable, message -> None, or None

    Returns
    -------
    centers : (n_clusters, n_features), dtype of the first ones
    moments : Moments of these centers if they are those of the last step, else None
    n_iter : int
    """
    before = centers
    for n_iter in range(1, max_iter + 1):
        moments = step(centers)
        settled = moments.n_changed == 0 and not accelerated  # the centers were means of the same rows
        accelerated = accelerated and n_iter < max_iter and moments.n_changed > 0
        moved = _means(moments, centers, spherical)
        if accelerated:
            filled = moments.counts[:, None] > 0  # others have just been moved to where they stay
            further = BEYOND * (moved - centers) + MOMENTUM * (centers - before)
            moved = moved + filled * further
            before = np.where(filled, centers, moved)
        shift = np.square(moved - centers, dtype=np.float64).sum()
        same = shift == 0 and np.array_equal(moved, centers)
        centers = moved
        if report is not None:
            inertia = moments.inertia()
            report(f"Iteration {n_iter}, inertia {inertia:.6g}, {moments.n_changed} labels changed.")
        if settled or shift <= tol:
            break
    if report is not None and settled:
        report(f"Converged at iteration {n_iter}: strict convergence.")
    elif report is not None and shift <= tol:
        report(f"Converged at iteration {n_iter}: center shift {shift:.3g} within tolerance {tol:.3g}.")
    return centers, moments if same else None, n_iter


def _means(moments, centers, spherical):
    """New centers (n_clusters, n_features): weighted means, empty clusters moved away."""
    sums, counts = moments.sums, moments.counts
    if not counts.all():
        sums, counts = _fill_empty(moments)
    means = sums / counts[:, None]
    if spherical:
        lengths = np.sqrt(np.einsum("ij,ij->i", means, means))
        means = np.where((lengths > 0)[:, None], means / np.where(lengths > 0, lengths, 1)[:, None], centers)
    return means.astype(centers.dtype, copy=False)


def _fill_empty(moments):
    """Sums and counts after the farthest rows have moved to the empty clusters."""
    sums, counts = moments.sums.copy(), moments.counts.copy()
    empty = np.flatnonzero(counts == 0)
    for cluster, row, weight, label in zip(empty, *moments.farthest(empty.size)):
        sums[label] -= row * weight
        counts[label] -= weight
        sums[cluster], counts[cluster] = row * weight, weight
    left = counts > SAME * moments.counts  # else all rows left, but for rounding
    largest = np.argmax(np.where(left, counts, 0))  # as scikit-learn: with the largest, never at the origin
    sums[~left], counts[~left] = sums[largest], counts[largest]
    return sums, counts


def scaled_tolerance(X, weights, tol, n_threads=1):
    """The tolerance tol times the mean over features of their weighted variance."""
    if tol == 0:
        return 0.0
    labels, everything = np.zeros(X.shape[0], dtype=np.int32), np.ones(1, dtype=bool)
    total, weight = np.zeros((1, X.shape[1])), np.zeros(1)
    cluster_sums(X, weights, labels, everything, total, weight, n_threads)
    sq_distances = np.empty(X.shape[0])
    row_sq_distances(X, total / weight, labels, sq_distances, n_threads)
    return tol * float((weights * sq_distances).sum() / weight[0] / X.shape[1])

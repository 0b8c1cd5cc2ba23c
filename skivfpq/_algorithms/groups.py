"""Groups of lists: the lists that a query probes are looked for in the nearest groups alone.

Where lists are many, most of the coarse step is about lists far away. Their centers are clustered in their
turn, and a query scores the lists of the groups whose centers are nearest: of as many groups as hold nearly
all of the lists that it would probe, on average of queries like the rows.
"""

from dataclasses import dataclass

import numpy as np

from skivfpq._algorithms.blocks import run_tasks
from skivfpq._algorithms.lloyd import MemoryStep, lloyd
from skivfpq._algorithms.probing import Probes
from skivfpq._algorithms.search import scan_vectors
from skivfpq._algorithms.seeding import random_rows, too_few_distinct_rows

COVERED = 0.99  # of the lists that queries would probe
ITERATIONS = 25
LEVEL_ITERATIONS = 5  # of each level of training; 10 scan no fewer rows
PER_OCTAVE = 2  # numbers of lists for which groups are counted, others take the next one's


@dataclass(frozen=True, eq=False)
class Groups:
    """Which lists are near each other, and in how many groups of them queries look."""

    centers: np.ndarray  # (n_groups, n_features) float64
    labels: np.ndarray  # (n_lists,) int32, the group of each list
    counts: np.ndarray  # (n_lists,) groups to look in for 1, 2, ... lists

    @classmethod
    def of(cls, nearness, centers, n_groups, queries, rng, n_threads):
        """Groups of lists with such centers (n_lists, n_features).

        nearness : Metric by which queries, (n_queries, n_features) float64, find centers near
        """
        group_centers, labels = cluster(centers, n_groups, ITERATIONS, rng, n_threads)
        lists = _ranked(nearness, queries, centers)  # (n_queries, n_lists)
        needed = 1 + places_in(_ranked(nearness, queries, group_centers), labels[lists])
        return cls(group_centers, labels, _counts(needed, np.bincount(labels, minlength=len(group_centers))))

    @property
    def order(self):
        """The lists group by group, (n_lists,)."""
        return np.argsort(self.labels, kind="stable")

    @property
    def offsets(self):
        """Where each group starts in that order, (n_groups + 1,)."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.labels, minlength=len(self.centers)))])

    def within(self, probes):
        """The same probes, looked for in the nearest groups."""
        n_groups = int(self.counts[probes.most - 1])
        return Probes(probes.most, probes.reach, n_groups if n_groups < len(self.centers) else 0)


def cluster(X, n_clusters, max_iter, rng, n_threads):
    """k-means from random rows: centers (n_clusters, n_features) and labels (n_samples,).

    Fewer centers where fewer rows are distinct.
    """
    weights = np.ones(len(X))
    rows = too_few_distinct_rows(X, n_clusters, weights)
    rows = random_rows(X, n_clusters, weights, rng) if rows is None else rows
    step = MemoryStep(X, weights, n_threads, len(rows))
    centers, moments, _ = lloyd(step, X[rows], max_iter=max_iter, tol=0.0)
    if moments is None:
        step(centers)
    return centers, step.labels


def two_level_centers(X, n_clusters, n_groups, rng, n_threads):
    """Centers (n_clusters, n_features) of clusters of groups of the rows, in proportion to their sizes.

    Where a group has fewer distinct rows than it is to have clusters, other rows make up for them.
    """
    _, labels = cluster(X, n_groups, LEVEL_ITERATIONS, rng, n_threads)
    rows_of = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
    rows_of = [rows for rows in rows_of if len(rows)]
    shares = _shares(np.array([len(rows) for rows in rows_of]), n_clusters)
    seeds = rng.integers(2**32, size=len(rows_of))
    centers = [None] * len(rows_of)

    def train(groups):
        for g in range(groups.start, groups.stop):
            own = np.random.default_rng(seeds[g])
            centers[g] = cluster(X[rows_of[g]], shares[g], LEVEL_ITERATIONS, own, 1)[0]

    run_tasks(train, len(rows_of), len(rows_of), n_threads, multiple=1)
    n_missing = n_clusters - sum(map(len, centers))
    return np.concatenate([*centers, X[rng.choice(len(X), n_missing, replace=False)]])


def _shares(sizes, n):
    """Numbers (n_groups,) in proportion to sizes that add up to n, from one up to the size."""
    shares = np.clip(n * sizes // sizes.sum(), 1, sizes)
    rests = n * sizes / sizes.sum() - shares
    while (left := n - shares.sum()) != 0:
        may = np.flatnonzero(shares < sizes if left > 0 else shares > 1)
        some = may[np.argsort(-np.sign(left) * rests[may], kind="stable")[: abs(left)]]
        shares[some] += np.sign(left)
        rests[some] -= np.sign(left)
    return shares


def _ranked(nearness, queries, centers):
    """Centers by their distance or product, the nearest first, (n_queries, n_centers)."""
    return np.argsort(scan_vectors(nearness, queries, centers, centers.mean(axis=0), 0)[0], axis=1)


def places_in(order, numbers):
    """Where numbers (n_queries, n) stand in the order (n_queries, n_numbers) of each query."""
    return np.take_along_axis(np.argsort(order, axis=1), numbers, axis=1)


def _counts(needed, sizes):
    """Groups in which to look for 1, 2, ... lists, (n_lists,): that hold so many of them, for every query.

    needed : (n_queries, n_lists) groups to look in so that the nearest, second, ... list is in one of them
    sizes : (n_groups,) lists in each
    """
    n_lists, n_groups = needed.shape[1], len(sizes)
    counted = np.unique(np.geomspace(1, n_lists, 1 + int(PER_OCTAVE * np.log2(n_lists))).astype(int))
    covering = [np.quantile(needed[:, :n], COVERED, method="inverted_cdf") for n in counted[:-1]] + [n_groups]
    numbers = np.arange(1, n_lists + 1)
    holding = 1 + np.searchsorted(np.cumsum(np.sort(sizes)), numbers)  # the smallest groups
    covering = np.maximum.accumulate(covering)[np.searchsorted(counted, numbers)]
    return np.maximum(covering, holding).astype(np.int64)

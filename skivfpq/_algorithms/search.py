"""Exact search over lists of rows: probe -> tables -> scan -> merge -> refine.

A **key** orders neighbours: the squared distance, the cosine distance or minus the inner product. Scans
give keys by matrix products or table lookups together with a bound of their rounding error; the pool
keeps what that bound cannot exclude; the keys of those few are then computed by differences. So the
neighbours are those of the plain formula, ties going to the lowest row number.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from skivfpq._algorithms.probing import Probes
from skivfpq._kernels import (
    UNDERFLOW,
    is_zero_row,
    row_blocks,
    row_norms,
    sq_distance_matrix,
    unit_rows,
)

EPS = np.finfo(np.float64).eps
POOL_SIZE = 1 << 22  # most candidates that wait before the pool is thinned out, unless they tie


@dataclass(frozen=True)
class Metric:
    """How a metric's keys come from rows and queries, and its distances from keys."""

    name: str

    @property
    def is_cosine(self):
        return self.name == "cosine"

    @property
    def is_distance(self):
        return self.name in ("euclidean", "sqeuclidean")

    @property
    def is_product(self):
        return self.name == "inner_product"

    def inverse_norms(self, rows):
        """1 / |row|, 0 for rows of zeros, (n_rows,) float64."""
        norms = row_norms(rows)
        return np.divide(1, norms, out=np.zeros(len(rows)), where=norms > 0)

    def rows(self, rows):
        """The rows as the metric sees them: float64, of length one for the cosine."""
        return unit_rows(rows) if self.is_cosine else rows.astype(np.float64)

    def queries(self, rows):
        """The same for queries, but float32 ones stay."""
        if self.is_cosine or rows.dtype not in (np.float32, np.float64):
            return self.rows(rows)
        return np.ascontiguousarray(rows)

    def keys(self, queries, rows):
        """Keys of pairs of metric rows, (n_pairs,), by differences."""
        if self.is_product:
            return -(queries * rows).sum(axis=1)
        keys = np.square(rows - queries).sum(axis=1)
        if self.is_cosine:  # 1 - q.x = |q - x|^2 / 2 for unit vectors, and 1 where one of them is zero
            keys = np.where(is_zero_row(queries) | is_zero_row(rows), 1.0, keys / 2)
        return keys

    def distances(self, keys):
        """What the user sees."""
        return np.sqrt(keys) if self.name == "euclidean" else keys

    def key_of_radius(self, radius):
        """A key that no distance up to the radius exceeds."""
        return radius * abs(radius) * (1 + 4 * EPS) if self.name == "euclidean" else radius


def scan_vectors(metric, queries, rows, anchor, radius):
    """Keys (n_queries, n_rows) of metric rows near an anchor, and bounds (n_queries,) of their errors.

    queries, rows : (n, n_features) float64, as the metric sees them
    anchor : (n_features,) at most radius away from every row
    """
    slack = 4 * (len(anchor) + 8) * EPS
    offsets = rows - anchor
    if metric.is_product:
        keys = -(queries @ anchor)[:, None] - queries @ offsets.T
        return keys, slack * row_norms(queries) * (row_norms(anchor[None]) + radius) + UNDERFLOW
    shifted = queries - anchor
    sq_norms = np.einsum("ij,ij->i", shifted, shifted)
    keys = sq_norms[:, None] + np.einsum("ij,ij->i", offsets, offsets) - 2 * (shifted @ offsets.T)
    if metric.is_cosine:
        keys = np.where(is_zero_row(queries)[:, None] | is_zero_row(rows), 1.0, keys / 2)
    return keys, slack * (sq_norms + radius**2) + UNDERFLOW


class Pool:
    """The candidates of some queries: those whose key may be among the k smallest, or up to a threshold.

    exact_keys : function (query numbers, positions) -> keys by differences
    ids : (n_rows,) what orders positions whose keys tie
    k : int, or None for all up to the threshold
    """

    def __init__(self, n_queries, k, exact_keys, ids, threshold=np.inf):
        self.k, self.exact_keys, self.ids = k, exact_keys, ids
        self.threshold = np.full(n_queries, threshold, dtype=np.float64)  # no larger key can win
        self._parts = [(np.empty(0, np.intp), np.empty(0, np.intp), np.empty(0), np.empty(0))]
        self._size = 0
        self._limit = (
            np.inf if k is None else max(2 * k * n_queries, min(POOL_SIZE, 16 * k * n_queries + 4096))
        )

    def add(self, queries, positions, keys, errors):
        """Offer rows: keys (n_queries, n_positions) right to errors (n_queries,)."""
        errors = errors[:, None]
        if self.k is not None and keys.shape[1] >= self.k and np.isinf(self.threshold[queries]).any():
            kth = np.partition(keys, self.k - 1, axis=1)[:, self.k - 1] + errors[:, 0]
            self.threshold[queries] = np.minimum(self.threshold[queries], kth)
        i, j = np.nonzero(keys - errors <= self.threshold[queries][:, None])
        error = errors[i, 0]
        self._parts.append((queries[i], positions[j], keys[i, j] - error, keys[i, j] + error))
        self._size += len(i)
        if self._size > self._limit:
            self.thin()
        if self._size > self._limit:  # rows that tie: only exact keys, and ids, tell them apart
            self._settle()

    def thin(self):
        """Lower the thresholds to the k-th smallest key seen and drop what is above."""
        queries, positions, lower, upper = (np.concatenate(parts) for parts in zip(*self._parts))
        if self.k is not None:
            order = np.lexsort((upper, queries))
            starts = np.searchsorted(queries[order], np.arange(len(self.threshold) + 1))
            full = np.flatnonzero(np.diff(starts) >= self.k)
            kth = upper[order][starts[full] + self.k - 1]
            self.threshold[full] = np.minimum(self.threshold[full], kth)
        keep = lower <= self.threshold[queries]
        self._parts = [(queries[keep], positions[keep], lower[keep], upper[keep])]
        self._size = np.count_nonzero(keep)

    def _settle(self):
        """Keep only the first k of each query by exact key and id."""
        queries, positions, keys = self.ranked()
        place = np.arange(len(queries)) - np.searchsorted(queries, queries)
        first = place < self.k
        self._parts = [(queries[first], positions[first], keys[first], keys[first])]
        self._size = np.count_nonzero(first)
        self.thin()

    def ranked(self):
        """All candidates by (query, exact key, id): queries, positions and keys, each (n_candidates,)."""
        self.thin()
        queries, positions, _, _ = self._parts[0]
        keys = self.exact_keys(queries, positions)
        order = np.lexsort((self.ids[positions], keys, queries))
        return queries[order], positions[order], keys[order]

    def nearest(self):
        """The k nearest of each query: keys and positions, (n_queries, k)."""
        queries, positions, keys = self.ranked()
        starts = np.searchsorted(queries, np.arange(len(self.threshold)))
        places = starts[:, None] + np.arange(self.k)
        return keys[places], positions[places]


def pair_keys(metric, queries, rows_at):
    """A function (query numbers, positions) -> exact keys, in blocks of memory; rows_at gives metric rows."""

    def exact_keys(query_numbers, positions):
        keys = np.empty(len(positions))
        for block in row_blocks(len(positions), queries.shape[1]):
            keys[block] = metric.keys(queries[query_numbers[block]], rows_at(positions[block]))
        return keys

    return exact_keys


def nearest_rows(metric, queries, rows, k, ids=None):
    """The k nearest rows of each query by brute force: keys and row numbers, (n_queries, k).

    queries : (n_queries, n_features) float32 or float64, as the metric sees them
    rows : (n_rows, n_features) as they are
    ids : (n_rows,) what orders rows that tie, default their numbers
    """
    queries = queries.astype(np.float64, copy=False)
    ids = np.arange(len(rows)) if ids is None else ids
    center, radius = _ball_around(metric, rows)
    all_keys, all_rows = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.intp)
    for block in row_blocks(len(queries), max(4096, 4 * k)):  # 256 queries
        exact = pair_keys(metric, queries[block], lambda chosen: metric.rows(rows[chosen]))
        pool = Pool(block.stop - block.start, k, exact, ids)
        numbers = np.arange(block.stop - block.start)
        for part in row_blocks(len(rows), max(len(numbers), rows.shape[1])):
            keys, errors = scan_vectors(metric, queries[block], metric.rows(rows[part]), center, radius)
            pool.add(numbers, np.arange(part.start, part.stop), keys, errors)
        all_keys[block], all_rows[block] = pool.nearest()
    return all_keys, all_rows


def _ball_around(metric, rows):
    """A center (n_features,) and a radius that hold all rows, as the metric sees them."""
    parts = row_blocks(*rows.shape)
    center = sum(metric.rows(rows[part]).sum(axis=0) for part in parts) / len(rows)
    sq_radius = max(np.square(metric.rows(rows[part]) - center).sum(axis=1).max() for part in parts)
    return center, np.sqrt(sq_radius) * (1 + 1e-12)


def nearness(metric):
    """By what centers are near a query: by product for inner_product, else by distance."""
    return Metric("inner_product" if metric.is_product else "sqeuclidean")


def nearest_lists(metric, queries, centers, probes, groups=None):
    """The lists that may be probed, of all or of the nearest groups: keys and lists, (n_queries, most)."""
    by = nearness(metric)
    if groups is None or probes.n_groups == 0:
        return nearest_rows(by, queries, centers, probes.most)
    keys, lists = nearest_rows(by, queries, centers, len(centers))
    _, near = nearest_rows(by, queries, groups.centers, probes.n_groups)  # (n_queries, n_groups)
    is_near = np.zeros((len(queries), len(groups.centers)), dtype=bool)
    np.put_along_axis(is_near, near, True, axis=1)
    inside = np.take_along_axis(is_near, groups.labels[lists], axis=1)
    first = np.argsort(~inside, axis=1, kind="stable")[:, : probes.most]
    return np.take_along_axis(keys, first, 1), np.take_along_axis(lists, first, 1)


def probe(metric, queries, centers, probes, sizes, k, groups=None):
    """Lists to scan for each query: those that it probes, or the nearest ones that hold k rows.

    Parameters
    ----------
    probes : probing.Probes
    sizes : (n_lists,) rows in each list that may be returned
    k : int, at most ``sizes.sum()``
    groups : Groups of the lists, or None

    Returns
    -------
    queries, lists, is_seed : (n_pairs,)
        Pairs of a query and a list; seeds are the nearest lists of a query that hold k rows together.
    """
    keys, lists = nearest_lists(metric, queries, centers, probes, groups)  # (n_queries, most)
    within = probes.within(keys)
    held = np.where(within, sizes[lists], 0)
    cumulated = np.cumsum(held, axis=1)
    before = cumulated - held  # rows in the lists nearer than this one
    is_enough = (cumulated[:, -1] >= k) | (probes == Probes(len(centers)))
    numbers, places = np.nonzero(within & is_enough[:, None])
    pairs = numbers, lists[numbers, places], before[numbers, places] < k
    short = np.flatnonzero(~is_enough)
    if len(short) == 0:
        return pairs
    more = Probes(min(4 * probes.most, len(centers)))
    numbers, lists, is_seed = probe(metric, queries[short], centers, more, sizes, k)
    wider = short[numbers[is_seed]], lists[is_seed], is_seed[is_seed]
    return tuple(np.concatenate(parts) for parts in zip(pairs, wider))


def search_lists(scan, offsets, pairs, pool):
    """Scan every (query, list) pair, list by list, seeds first, so that thresholds are low early.

    scan : function (list number, its positions, query numbers) -> keys (n_queries, n), errors (n_queries,),
        positions (n,)
    offsets : (n_lists + 1,) where each list starts
    """
    queries, lists, is_seed = pairs
    for phase in (is_seed, ~is_seed):
        for number, numbers in _grouped(queries[phase], lists[phase]):
            for part in row_blocks(offsets[number + 1] - offsets[number], 64):  # 16,384 rows of a long list
                part = slice(part.start + offsets[number], part.stop + offsets[number])
                for block in row_blocks(len(numbers), part.stop - part.start):
                    keys, errors, positions = scan(number, part, numbers[block])
                    if len(positions):
                        pool.add(numbers[block], positions, keys, errors)
        pool.thin()


def _grouped(queries, lists):
    """Pairs of a list and the queries that probe it."""
    order = np.argsort(lists, kind="stable")
    queries, lists = queries[order], lists[order]
    starts = np.flatnonzero(np.diff(lists, prepend=-1))
    for start, stop in pairwise(np.append(starts, len(lists))):
        yield lists[start], queries[start:stop]


def lowest_keys(metric, queries, anchors, radii):
    """A lower bound (n_queries, n_lists) of the keys of rows within radii of the anchors."""
    products = queries @ anchors.T
    if metric.is_product or metric.is_cosine:
        lowest = -products - row_norms(queries)[:, None] * radii
        slack = UNDERFLOW + 1e-12 * row_norms(queries)[:, None] * (row_norms(anchors) + radii)
        return lowest - slack + metric.is_cosine
    sq_distances = np.empty(products.shape)
    sq_distance_matrix(queries, anchors, sq_distances)
    lowest = np.sqrt(np.maximum(sq_distances - UNDERFLOW, 0)) * (1 - 1e-9) - radii * (1 + 1e-9)
    return np.square(np.maximum(lowest, 0))

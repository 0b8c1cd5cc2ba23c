"""The inverted file: rows filed under their nearest center, searched list by list.

Immutable: adding and removing rows gives a new one that shares what did not change, so a search under
way is never disturbed.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from skivfpq._algorithms.codebooks import Codebooks
from skivfpq._algorithms.inverted_lists import InvertedLists
from skivfpq._algorithms.list_planes import CenterPlanes, exact_rows, instruction_set, pack_lists
from skivfpq._algorithms.planes import nearest_centers
from skivfpq._algorithms.search import (
    CodeScan,
    Metric,
    Pool,
    lowest_keys,
    nearness,
    pair_keys,
    probe,
    scan_vectors,
    search_lists,
)
from skivfpq._kernels import row_blocks, row_norms


@dataclass(frozen=True, eq=False)
class InvertedFile:
    """Lists of vectors, of codes, or of both, and how to search them."""

    metric: Metric
    centers: np.ndarray  # (n_lists, n_features) float64
    codebooks: Codebooks | None  # of what the anchors leave of the rows
    residual: bool  # whether anchors are the centers; else zeros
    vectors_dtype: np.dtype | None  # in which vectors are kept; None where only codes are
    lists: InvertedLists
    _packed: dict = field(default_factory=dict, init=False, repr=False)  # instruction set -> planes

    def __getstate__(self):
        return {**self.__dict__, "_packed": {}}  # packed anew from the vectors, for the machine at hand

    @property
    def keeps_vectors(self):
        """Whether vectors are kept, beside codes or alone."""
        return self.vectors_dtype is not None

    @property
    def anchors(self):
        """What kept rows are relative to, (n_lists, n_features)."""
        return self.centers if self.residual else np.zeros_like(self.centers)

    @property
    def origin(self):
        """What is taken off queries before their tables are made, (n_features,)."""
        shifts = self.residual and self.metric.is_distance
        return self.centers.mean(axis=0) if shifts else np.zeros(self.centers.shape[1])

    def nearest_list(self, metric_rows, n_threads):
        """The list of each row, (n_rows,) int32."""
        return nearest_centers(metric_rows, self.centers, n_threads)[0]

    # ---- filing

    def append(self, vectors, n_threads):
        """File new rows, given as they are kept."""
        labels, lengths = np.empty(len(vectors), dtype=np.int64), np.empty(len(vectors))
        kept = {"vectors": vectors} if self.keeps_vectors else {}
        for block in row_blocks(len(vectors), vectors.shape[1] // 4):
            labels[block], lengths[block], rows = self._file(vectors[block], n_threads)
            for name, array in rows.items():
                kept.setdefault(name, np.empty((len(vectors), *array.shape[1:]), array.dtype))[block] = array
        return replace(self, lists=self.lists.append(labels, kept, lengths))

    def _file(self, vectors, n_threads):
        """Labels of some rows, their distances to their anchors, and what else is kept of them."""
        rows = self.metric.rows(vectors)  # (n_rows, n_features) float64
        labels = self.nearest_list(rows, n_threads)
        anchors = self.anchors[labels]
        if self.codebooks is None:
            return labels, np.sqrt(np.square(rows - anchors).sum(axis=1)), {}
        codes = self.codebooks.encode((rows - anchors).astype(self.codebooks.dtype), n_threads)
        decoded = self.codebooks.decode(codes).astype(np.float64)
        sq_lengths = np.square(decoded).sum(axis=1)
        kept = {"codes": codes}
        if self.metric.is_cosine:
            kept["inverse_norms"] = self.metric.inverse_norms(
                (decoded + anchors).astype(self.codebooks.dtype)
            )
        elif self.metric.is_distance:
            kept["row_terms"] = sq_lengths + 2 * (decoded * (anchors - self.origin)).sum(axis=1)
        return labels, np.sqrt(sq_lengths), kept

    def remove(self, numbers):
        """The file without the rows of these numbers."""
        return replace(self, lists=self.lists.remove(numbers))

    def kept_rows(self, positions):
        """Rows as they are kept: vectors, or decoded codes as the metric sees them."""
        if self.keeps_vectors:
            return self.lists.rows["vectors"][positions]
        return self.metric.rows(self._decoded(positions)).astype(self.codebooks.dtype)

    def _decoded(self, positions):
        """Anchors plus decoded codes, in the dtype of the codebooks."""
        decoded = self.codebooks.decode(self.lists.rows["codes"][positions])
        return (decoded + self.anchors[self.lists.list_of(positions)]).astype(decoded.dtype)

    # ---- searching

    def planes(self, n_threads=1):
        """int8 points of the centers and, where vectors are searched, of the rows; packed once, here."""
        key = instruction_set()
        if key not in self._packed:
            rows = None
            if self.codebooks is None and len(self.lists.ids):
                vectors, offsets = self.lists.rows["vectors"], self.lists.offsets
                rows = pack_lists(self.metric, vectors, offsets, self.lists.ids, n_threads)
            self._packed[key] = CenterPlanes(nearness(self.metric), self.centers), rows
        return self._packed[key]

    @property
    def nbytes(self):
        """Bytes of everything that is kept for each row, int8 points included."""
        row_planes = self.planes()[1]
        return self.lists.nbytes + (0 if row_planes is None else row_planes.nbytes)

    def search(self, queries, k, n_probes, refine_factor=None, allowed=None, n_threads=1):
        """The k nearest rows of each query: keys and row numbers, (n_queries, k).

        queries : (n_queries, n_features) float32 or float64, as the metric sees them
        allowed : (n_rows,) mask over positions, or None for all; at least k of them
        """
        center_planes, row_planes = self.planes(n_threads)
        if row_planes is None:
            left = np.arange(len(queries))
            keys, positions = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
        else:
            planes = row_planes if allowed is None else row_planes.allowing(allowed)
            keys, positions, left = center_planes.search(planes, queries, k, n_probes, n_threads)
            if len(left):  # lists that hold few rows: more of them
                probes = self._wider_probes(queries[left], k, n_probes, allowed)
                keys[left], positions[left], still = planes.search(queries[left], probes, k, n_threads)
                left = left[still]
        for block in self._query_blocks(len(left), k) if len(left) else ():
            numbers = left[block]
            some = queries[numbers].astype(np.float64, copy=False)
            keys[numbers], positions[numbers] = self._search_block(some, k, n_probes, refine_factor, allowed)
        return keys, self.lists.ids[positions].astype(np.int64, copy=False)

    def _wider_probes(self, queries, k, n_probes, allowed):
        """Lists that hold k rows (n_queries, n) int32, the nearest first, -1 for none; of ``probe``."""
        sizes = self._allowed_sizes(allowed)
        numbers, lists, _ = probe(self.metric, queries, self.centers, n_probes, sizes, k)
        order = np.argsort(numbers, kind="stable")
        numbers, lists = numbers[order], lists[order]
        places = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
        probes = np.full((len(queries), places.max() + 1), -1, dtype=np.int32)
        probes[numbers, places] = lists
        return probes

    def _query_blocks(self, n_queries, k=0):
        """Blocks of queries whose tables, and distances to all centers, take about 32 MB."""
        codewords = 0 if self.codebooks is None else self.codebooks.n_codewords * len(self.codebooks.slices)
        return row_blocks(n_queries, (len(self.centers) + codewords) // 4 + 4 * k)

    def _search_block(self, queries, k, n_probes, refine_factor, allowed):
        sizes = self._allowed_sizes(allowed)
        n_candidates = k if refine_factor is None else int(min(np.ceil(refine_factor * k), sizes.sum()))
        pairs = probe(self.metric, queries, self.centers, n_probes, sizes, n_candidates)
        pool = Pool(len(queries), n_candidates, self._exact_keys(queries), self.lists.ids)
        search_lists(self._scan(queries, allowed), self.lists.offsets, pairs, pool)
        keys, positions = pool.nearest()
        return (keys, positions) if refine_factor is None else self._refine(queries, positions, k)

    def _allowed_sizes(self, allowed):
        """Rows in each list that may be returned, (n_lists,)."""
        if allowed is None:
            return self.lists.sizes
        return np.diff(np.concatenate([[0], np.cumsum(allowed)])[self.lists.offsets])

    def _scan(self, queries, allowed):
        """The function (list, part of it, query numbers) -> keys, errors, positions for ``search_lists``."""
        keys_of = self._vector_keys(queries) if self.codebooks is None else self._code_keys(queries)
        radii = self.lists.radii * (1 + 1e-9)

        def scan(number, part, query_numbers):
            positions = np.arange(part.start, part.stop)
            if allowed is not None:
                part = positions = positions[allowed[part]]
            if len(positions) == 0:
                return None, None, positions
            return *keys_of(number, query_numbers, part, radii[number]), positions

        return scan

    def _vector_keys(self, queries):
        def keys_of(number, query_numbers, part, radius):
            rows = self.metric.rows(self.lists.rows["vectors"][part])
            return scan_vectors(self.metric, queries[query_numbers], rows, self.centers[number], radius)

        return keys_of

    def _code_keys(self, queries):
        shifted = queries - self.origin
        tables = self.codebooks.product_tables(shifted)
        scan = CodeScan(self.metric, queries, tables, row_norms(shifted), self.codebooks.eps)
        reaches = row_norms(self.anchors) + self.lists.radii
        codes, anchors = self.lists.rows["codes"], self.anchors
        row_terms = self.lists.rows.get("row_terms", self.lists.rows.get("inverse_norms"))

        def keys_of(number, query_numbers, part, radius):
            terms = None if row_terms is None else row_terms[part]
            return scan.keys(query_numbers, anchors[number], codes[part], terms, radius, reaches[number])

        return keys_of

    def _exact_keys(self, queries):
        """The function (query numbers, positions) -> keys of vectors, or of decoded codes."""
        if self.codebooks is None:
            return self._exact_vector_keys(queries)
        return pair_keys(self.metric, queries, lambda positions: self.metric.rows(self._decoded(positions)))

    def _exact_vector_keys(self, queries):
        vectors = self.lists.rows["vectors"]
        return pair_keys(self.metric, queries, lambda positions: self.metric.rows(vectors[positions]))

    def _refine(self, queries, positions, k):
        """Re-rank candidates (n_queries, n_candidates) by the exact keys of their vectors."""
        numbers = np.repeat(np.arange(len(queries)), positions.shape[1])
        keys = self._exact_vector_keys(queries)(numbers, positions.ravel()).reshape(positions.shape)
        order = np.lexsort((self.lists.ids[positions], keys), axis=1)[:, :k]
        return np.take_along_axis(keys, order, 1), np.take_along_axis(positions, order, 1)

    def search_radius(self, queries, radius, allowed=None):
        """Distances and row numbers of all rows within a radius, a pair of arrays for each query."""
        for block in self._query_blocks(len(queries)):
            some = queries[block].astype(np.float64, copy=False)
            yield from self._search_radius_block(some, radius, allowed)

    def _search_radius_block(self, queries, radius, allowed):
        key = self.metric.key_of_radius(radius)
        if self.metric.is_cosine and self.codebooks is not None:  # decoded rows are renormalised
            lowest = np.full((len(queries), len(self.centers)), -np.inf)
        else:
            lowest = lowest_keys(self.metric, queries, self.anchors, self._reach())
        near, numbers = np.nonzero(lowest <= key)
        pool = Pool(len(queries), None, self._exact_keys(queries), self.lists.ids, threshold=key)
        pairs = near, numbers, np.ones(len(near), dtype=bool)
        search_lists(self._scan(queries, allowed), self.lists.offsets, pairs, pool)
        found, positions, keys = pool.ranked()
        distances = self.metric.distances(keys)
        inside = distances <= radius
        found, distances = found[inside], distances[inside]
        ids = self.lists.ids[positions[inside]].astype(np.int64)
        bounds = np.searchsorted(found, np.arange(len(queries) + 1))
        return [(distances[i:j], ids[i:j]) for i, j in pairwise(bounds)]

    def _reach(self):
        """Radii of the lists, more by what rounding does to decoded rows, (n_lists,)."""
        rounding = 0 if self.codebooks is None else 4 * self.codebooks.eps
        lengths = row_norms(self.anchors)
        return self.lists.radii * (1 + 1e-6) + rounding * (lengths + self.lists.radii)

    def exact(self, queries, k, n_threads=1):
        """Row numbers (n_queries, k) of the true neighbours: by vectors, or else by all the codes."""
        if self.codebooks is None or not self.keeps_vectors:
            return self.search(queries, k, len(self.centers), n_threads=n_threads)[1]
        vectors = self.lists.rows["vectors"]
        _, positions = exact_rows(self.metric, queries, vectors, k, n_threads, self.lists.ids)
        return self.lists.ids[positions]


def without_self(keys, indices, numbers):
    """Neighbours (n, k + 1) of rows less the row itself, or less the last where it was not found."""
    own = indices == numbers[:, None]
    own[~own.any(axis=1), -1] = True
    return keys[~own].reshape(len(keys), -1), indices[~own].reshape(len(keys), -1)

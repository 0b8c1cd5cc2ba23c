"""The inverted file: rows filed under their nearest center, searched list by list.

Immutable: adding and removing rows gives a new one that shares what did not change, so a search under
way is never disturbed.
"""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from skivfpq import _kernels
from skivfpq._algorithms.assignment import nearest_labels
from skivfpq._algorithms.blocks import as_float_rows, row_sq_distances
from skivfpq._algorithms.center_planes import QUERIES, CenterPlanes
from skivfpq._algorithms.codebooks import rotate
from skivfpq._algorithms.groups import Groups
from skivfpq._algorithms.heads import head_of_rows
from skivfpq._algorithms.inverted_lists import InvertedLists
from skivfpq._algorithms.list_codes import CodedLists, CodeScan, Coding, ListCodes
from skivfpq._algorithms.list_planes import (
    exact_rows,
    instruction_set,
    pack_lists,
    rank_rows,
)
from skivfpq._algorithms.probing import FixedProbes, GroupedProbes, Probes, Reaches
from skivfpq._algorithms.search import (
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

NEAREST_WITHIN = 32, 8192  # neighbours that are looked for within a radius: at first, and at most


@dataclass(frozen=True, eq=False)
class InvertedFile:
    """Lists of vectors, of codes, or of both, and how to search them."""

    metric: Metric
    centers: np.ndarray  # (n_lists, n_features) float64
    coding: Coding | None  # None for vectors alone
    vectors_dtype: np.dtype | None  # in which vectors are kept; None where only codes are
    lists: InvertedLists
    reaches: Reaches | None = None  # of adaptive probes
    groups: Groups | None = None  # of the lists
    _packed: dict = field(default_factory=dict, init=False, repr=False)  # what, instruction set -> planes

    def __getstate__(self):
        """Rows without places between them; planes are packed anew, for the machine at hand."""
        return {**self.__dict__, "lists": self.lists.compact(self._hold), "_packed": {}}

    @property
    def keeps_vectors(self):
        """Whether vectors are kept, beside codes or alone."""
        return self.vectors_dtype is not None

    @property
    def codebooks(self):
        """Codebooks of the coding, or None."""
        return None if self.coding is None else self.coding.codebooks

    @property
    def anchors(self):
        """What kept rows are relative to, (n_lists, n_features)."""
        return self.centers if self.coding is None else self.coding.anchors

    def nearest_list(self, metric_rows, n_threads):
        """The list of each row, (n_rows,) int32."""
        by_distance = not self.metric.is_product  # as rows are filed, whatever lists are probed by
        points = self._packed.get(("centers", instruction_set())) if by_distance else None
        return nearest_labels(metric_rows, self.centers, n_threads, points)

    # ---- filing

    def append(self, vectors, n_threads, labels=None):
        """File new rows, given as they are kept.

        labels : (n_rows,) int32, the lists of those rows whose list is known, -1 for others; or None
        """
        labels = np.full(len(vectors), -1, dtype=np.int32) if labels is None else labels.copy()
        lengths = np.empty(len(vectors))
        kept = {"vectors": vectors} if self.keeps_vectors else {}
        as_they_are = self.coding is None and not self.metric.is_cosine  # no float64 copies: larger blocks
        for block in row_blocks(len(vectors), vectors.shape[1] // (16 if as_they_are else 4)):
            rows = as_float_rows(vectors[block]) if as_they_are else self.metric.rows(vectors[block])
            self._find_lists(rows, labels[block], n_threads)
            lengths[block], coded = self._encode(rows, labels[block], n_threads)
            for name, array in coded.items():
                kept.setdefault(name, np.empty((len(vectors), *array.shape[1:]), array.dtype))[block] = array
        lists, places = self.lists.append(labels, kept, lengths, self._hold)
        change = None if places is None else lambda planes: planes.adding(self.metric, lists.ids, places)
        return self._with_lists(lists, change)

    def _hold(self, name, array, offsets):
        """What keeps such an array of rows at the places of lists; zeros at first."""
        if name == "codes":
            return ListCodes.empty(offsets, array.shape[1], self.codebooks.n_codewords)
        return np.zeros((offsets[-1], *array.shape[1:]), array.dtype)

    def _find_lists(self, rows, labels, n_threads):
        """Labels (n_rows,) INOUT of metric rows, where there is none yet."""
        unknown = np.flatnonzero(labels < 0)
        if len(unknown):
            labels[unknown] = self.nearest_list(
                rows if len(unknown) == len(rows) else rows[unknown], n_threads
            )

    def _encode(self, rows, labels, n_threads):
        """Distances of metric rows to their anchors, and what is kept of them beside vectors."""
        if self.coding is not None:
            kept, lengths = self.coding.encode(rows, labels, n_threads)
            return lengths, kept
        sq_lengths = np.empty(len(rows))
        row_sq_distances(rows, self.centers, labels, sq_lengths, n_threads)
        return np.sqrt(sq_lengths), {}

    def remove(self, numbers):
        """The file without the rows of these numbers."""
        lists, moved = self.lists.remove(numbers, self._hold)
        change = None if moved else lambda planes: planes.without(lists.ids, self.lists.positions[numbers])
        return self._with_lists(lists, change)

    def _with_lists(self, lists, change):
        """The file of such lists.

        change : function of planes of rows -> planes after it; None for both if all are to be packed anew
        """
        file = replace(self, lists=lists)
        key = instruction_set()
        if ("centers", key) in self._packed:
            file._packed["centers", key] = self._packed["centers", key]
        rows = self._packed.get(("rows", key))
        changed = None if rows is None or change is None or self.coding is not None else change(rows)
        if changed is not None:
            file._packed["rows", key] = changed
        return file

    def kept_rows(self, positions):
        """Rows as they are kept: vectors, or decoded codes as the metric sees them."""
        if self.keeps_vectors:
            return self.lists.rows["vectors"][positions]
        rotation = self.codebooks.rotation
        decoded = rotate(self._decoded(positions), None if rotation is None else rotation.T)
        return self.metric.rows(decoded).astype(self.codebooks.dtype)

    def _decoded(self, positions):
        """Anchors plus codewords, turned, in the dtype of the codebooks."""
        numbers = self.lists.list_of(positions)
        return self.coding.decode(self.lists.rows["codes"][positions], numbers)

    # ---- probing

    def adaptive(self, queries, n_threads=1):
        """The file whose probes are adaptive: so many lists on average, of queries like these."""
        queries, metric = queries.astype(np.float64, copy=False), nearness(self.metric)
        keys, _ = scan_vectors(metric, queries, self.centers, self.centers.mean(axis=0), 0)
        file = replace(self, reaches=Reaches(np.sort(keys, axis=1)))
        file._packed.update(self._packed)
        return file

    def probing(self, is_fixed=False, by_groups=True):
        """How queries probe: adaptively where that was measured, or as many for each; by groups if any."""
        every = FixedProbes(len(self.centers)) if is_fixed or self.reaches is None else self.reaches
        return GroupedProbes(every, self.groups) if by_groups and self.groups is not None else every

    # ---- searching

    def planes(self, n_threads=1):
        """int8 points of the centers, and rows as the kernels search them or None; packed once, here."""
        key = instruction_set()
        if ("rows", key) not in self._packed:
            self._packed["rows", key] = self._pack_rows(n_threads)
        if ("centers", key) not in self._packed:
            like = nearness(self.metric), self.centers, self._some_rows()
            self._packed["centers", key] = CenterPlanes(*like, n_threads, self.groups)
        return self._packed["centers", key], self._packed["rows", key]

    def _pack_rows(self, n_threads):
        lists = self.lists
        if self.coding is not None:
            return CodedLists.of(self.coding, lists)
        if lists.n_rows == 0:
            return None
        vectors = lists.rows["vectors"]
        head = head_of_rows(self.metric, vectors, lists.offsets, lists.ids, self.centers, n_threads)
        return pack_lists(self.metric, vectors, lists.offsets, lists.ids, n_threads, head)

    def _some_rows(self):
        """Rows (n, n_features) that are like queries, or None where there are none."""
        taken = self.lists.taken
        positions = taken[:: max(1, len(taken) // QUERIES)][:QUERIES]
        return self.metric.rows(self.kept_rows(positions)) if len(taken) else None

    @property
    def nbytes(self):
        """Bytes of everything that is kept for each row, int8 points included."""
        row_planes = self.planes()[1] if self.coding is None else None
        return self.lists.nbytes + (0 if row_planes is None else row_planes.nbytes)

    def search(self, queries, k, probes, refine_factor=None, allowed=None, n_threads=1):
        """The k nearest rows of each query: keys and row numbers, (n_queries, k).

        queries : (n_queries, n_features) float32 or float64, as the metric sees them
        probes : Probes
        allowed : (n_rows,) mask over positions, or None for all; at least k of them
        """
        if refine_factor is None:
            keys, positions = self._nearest(queries, k, probes, allowed, n_threads)
        else:
            keys, positions = self._refined(queries, k, probes, refine_factor, allowed, n_threads)
        return keys, self.lists.ids[positions].astype(np.int64, copy=False)

    def search_few(self, X, k, probes, largest):
        """Distances and row numbers (n_queries, k) for a few plain queries, as the user gave them; or None.

        None is the answer for everything that is to be checked or searched otherwise.

        largest : value that needs no further look
        """
        center_planes, rows = self.planes()
        if rows is None or not center_planes.serve(probes) or self.metric.is_cosine or k > self.lists.n_rows:
            return None
        if self.coding is not None and self.coding.codebooks.rotation is not None:
            return None
        takes_roots = self.metric.name == "euclidean"
        return _kernels.native.search_few(
            *center_planes.packed, rows.packed, X, k, *probes, takes_roots, largest
        )

    def _nearest(self, queries, k, probes, allowed, n_threads):
        """The k nearest rows by codes where there are, or by vectors: keys and positions, (n_queries, k)."""
        center_planes, rows = self.planes(n_threads)
        if rows is None:
            left = np.arange(len(queries))
            keys, positions = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
        else:
            rows = rows if allowed is None else rows.allowing(allowed)
            turned = None if self.coding is None else self.coding.turned_queries(queries)
            keys, positions, left = center_planes.search(rows, queries, k, probes, n_threads, turned)
            if len(left):  # lists that hold few rows: more of them
                wider = self._wider_probes(queries[left], k, probes, allowed)
                some = queries[left] if turned is None else turned[left]
                keys[left], positions[left], still = rows.search(some, wider, k, n_threads)
                left = left[still]
        for block in self._query_blocks(len(left), k) if len(left) else ():
            numbers = left[block]
            some = queries[numbers].astype(np.float64, copy=False)
            keys[numbers], positions[numbers] = self._search_block(some, k, probes, allowed)
        return keys, positions

    def _refined(self, queries, k, probes, refine_factor, allowed, n_threads):
        """The same by codes, the best refine_factor * k re-ranked by the exact keys of their vectors."""
        n_rows = self.lists.n_rows if allowed is None else np.count_nonzero(allowed)
        n_candidates = int(min(np.ceil(refine_factor * k), n_rows))
        keys, positions = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
        for block in row_blocks(len(queries), n_candidates):
            _, candidates = self._nearest(queries[block], n_candidates, probes, allowed, n_threads)
            keys[block], positions[block] = self._rank(queries[block], candidates, k, n_threads)
        return keys, positions

    def _rank(self, queries, candidates, k, n_threads):
        """The k nearest of candidates, positions (n_queries, n_candidates), by their vectors."""
        vectors, ids = self.lists.rows["vectors"], self.lists.ids
        found = rank_rows(self.metric, vectors, ids, queries, candidates, k, n_threads)
        if found is not None:
            return found
        numbers = np.repeat(np.arange(len(queries)), candidates.shape[1])
        exact_keys = self._exact_vector_keys(queries.astype(np.float64, copy=False))
        keys = exact_keys(numbers, candidates.ravel()).reshape(candidates.shape)
        order = np.lexsort((ids[candidates], keys), axis=1)[:, :k]
        return np.take_along_axis(keys, order, 1), np.take_along_axis(candidates, order, 1)

    def _wider_probes(self, queries, k, probes, allowed):
        """Lists that hold k rows (n_queries, n) int32, the nearest first, -1 for none; of ``probe``."""
        sizes = self._allowed_sizes(allowed)
        numbers, lists, _ = probe(self.metric, queries, self.centers, probes, sizes, k, self.groups)
        order = np.argsort(numbers, kind="stable")
        numbers, lists = numbers[order], lists[order]
        places = np.arange(len(numbers)) - np.searchsorted(numbers, numbers)
        wider = np.full((len(queries), places.max() + 1), -1, dtype=np.int32)
        wider[numbers, places] = lists
        return wider

    def _query_blocks(self, n_queries, k=0):
        """Blocks of queries whose tables, and distances to all centers, take about 32 MB."""
        codewords = 0 if self.codebooks is None else self.codebooks.n_codewords * len(self.codebooks.slices)
        return row_blocks(n_queries, (len(self.centers) + codewords) // 4 + 4 * k)

    def _search_block(self, queries, k, probes, allowed):
        sizes = self._allowed_sizes(allowed)
        pairs = probe(self.metric, queries, self.centers, probes, sizes, k, self.groups)
        pool = Pool(len(queries), k, self._exact_keys(queries), self.lists.ids)
        search_lists(self._scan(queries, allowed), self.lists.offsets, pairs, pool)
        return pool.nearest()

    def _allowed_sizes(self, allowed):
        """Rows in each list that may be returned, (n_lists,)."""
        if allowed is None:
            return self.lists.sizes
        return np.diff(np.concatenate([[0], np.cumsum(allowed)])[self.lists.offsets])

    def _scan(self, queries, allowed):
        """The function (list, part of it, query numbers) -> keys, errors, positions for ``search_lists``."""
        keys_of = self._vector_keys(queries) if self.coding is None else self._code_keys(queries)
        radii = self.lists.radii * (1 + 1e-9)
        allowed = self.lists.live if allowed is None else allowed

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
        coding, rows = self.coding, self.lists.rows
        scan = CodeScan(coding, queries)
        reaches = row_norms(coding.anchors) + self.lists.radii

        def keys_of(number, query_numbers, part, radius):
            codes = rows["codes"].of_list(number, part)
            terms = None if self.metric.is_product else rows["terms"][part]
            return scan.keys(query_numbers, coding.anchors[number], codes, terms, radius, reaches[number])

        return keys_of

    def _exact_keys(self, queries):
        """The function (query numbers, positions) -> keys of vectors, or of decoded codes."""
        if self.coding is None:
            return self._exact_vector_keys(queries)
        turned = self.coding.turned(queries)
        return pair_keys(self.metric, turned, lambda positions: self.metric.rows(self._decoded(positions)))

    def _exact_vector_keys(self, queries):
        vectors = self.lists.rows["vectors"]
        return pair_keys(self.metric, queries, lambda positions: self.metric.rows(vectors[positions]))

    def search_radius(self, queries, radius, allowed=None, n_threads=1):
        """Distances and row numbers of all rows within a radius, a pair of arrays for each query."""
        for block in self._query_blocks(len(queries)):
            yield from self._search_radius_block(queries[block], radius, allowed, n_threads)

    def _search_radius_block(self, queries, radius, allowed, n_threads):
        key = self.metric.key_of_radius(radius)
        doubles = queries.astype(np.float64, copy=False)
        lowest = self._lowest_keys(doubles)
        found = [(np.empty(0), np.empty(0, dtype=np.int64))] * len(queries)
        left = np.flatnonzero((lowest <= key).any(axis=1))
        for numbers, keys, positions in self._nearest_within(queries, left, lowest, key, allowed, n_threads):
            distances = self.metric.distances(keys)
            counts = (distances <= radius).sum(axis=1)  # they ascend
            ids = self.lists.ids[positions].astype(np.int64, copy=False)
            for number, row, own, count in zip(numbers, distances, ids, counts):
                found[number] = row[:count].copy(), own[:count].copy()
            left = np.setdiff1d(left, numbers, assume_unique=True)
        if len(left):
            others = self._all_within(doubles[left], lowest[left] <= key, radius, key, allowed)
            for number, pair in zip(left, others):
                found[number] = pair
        return found

    def _nearest_within(self, queries, numbers, lowest, key, allowed, n_threads):
        """Yield queries, with keys and positions (n, k) of all their rows up to a key, where k is enough.

        lowest : (n_queries, n_lists) keys of no rows of a list are lower
        """
        rows = self.planes(n_threads)[1]
        if rows is None or not len(numbers):
            return
        rows = rows if allowed is None else rows.allowing(allowed)
        turned = None if self.coding is None else self.coding.turned_queries(queries)
        queries = queries if turned is None else turned
        sizes = self._allowed_sizes(allowed)
        k = min(NEAREST_WITHIN[0], sizes.sum())
        while len(numbers) and k > 0:
            probes = _lists_that_hold(k, lowest[numbers], key, sizes)
            keys, positions, unserved = rows.search(queries[numbers], probes, k, n_threads)
            whole = (keys[:, -1] > key) | (k == sizes.sum())
            whole[unserved] = False
            yield numbers[whole], keys[whole], positions[whole]
            whole[unserved] = True  # no larger k will help
            if 4 * k > NEAREST_WITHIN[1]:
                return
            numbers, k = numbers[~whole], min(4 * k, sizes.sum())

    def _all_within(self, queries, near, radius, key, allowed):
        """The same as pairs of distances and row numbers, by looking at every list that is near, in NumPy."""
        pool = Pool(len(queries), None, self._exact_keys(queries), self.lists.ids, threshold=key)
        pairs = *np.nonzero(near), np.ones(np.count_nonzero(near), dtype=bool)
        search_lists(self._scan(queries, allowed), self.lists.offsets, pairs, pool)
        found, positions, keys = pool.ranked()
        distances = self.metric.distances(keys)
        inside = distances <= radius
        found, distances = found[inside], distances[inside]
        ids = self.lists.ids[positions[inside]].astype(np.int64)
        bounds = np.searchsorted(found, np.arange(len(queries) + 1))
        return [(distances[i:j], ids[i:j]) for i, j in pairwise(bounds)]

    def _lowest_keys(self, queries):
        """No row of a list has a lower key, (n_queries, n_lists)."""
        if self.metric.is_cosine and self.coding is not None:  # decoded rows are renormalised
            return np.full((len(queries), len(self.centers)), -np.inf)
        return lowest_keys(self.metric, queries, self.anchors, self._reach())

    def _reach(self):
        """Radii of the lists, more by what rounding does to decoded rows, (n_lists,)."""
        rounding = 0 if self.codebooks is None else 4 * self.codebooks.eps
        lengths = row_norms(self.anchors)
        return self.lists.radii * (1 + 1e-6) + rounding * (lengths + self.lists.radii)

    def exact(self, queries, k, n_threads=1):
        """Row numbers (n_queries, k) of the true neighbours: by vectors, or else by all the codes."""
        if self.coding is None or not self.keeps_vectors:
            return self.search(queries, k, Probes(len(self.centers)), n_threads=n_threads)[1]
        vectors, ids, live = self.lists.rows["vectors"], self.lists.ids, self.lists.live
        if live is not None:
            vectors, ids = vectors[live], ids[live]
        return ids[exact_rows(self.metric, queries, vectors, k, n_threads, ids)[1]]


def _lists_that_hold(k, lowest, key, sizes):
    """Lists that may hold rows with keys up to one, (n_queries, n), -1 for none; more until they hold k rows.

    lowest : (n_queries, n_lists)
    """
    order = np.argsort(lowest, axis=1, kind="stable")
    held = np.cumsum(sizes[order], axis=1)
    is_near = np.take_along_axis(lowest, order, 1) <= key
    wanted = is_near | (held - sizes[order] < k)
    widest = wanted.sum(axis=1).max()
    return np.where(wanted, order, -1)[:, :widest].astype(np.int32)


def without_self(keys, indices, numbers):
    """Neighbours (n, k + 1) of rows less the row itself, or less the last where it was not found."""
    own = indices == numbers[:, None]
    own[~own.any(axis=1), -1] = True
    return keys[~own].reshape(len(keys), -1), indices[~own].reshape(len(keys), -1)

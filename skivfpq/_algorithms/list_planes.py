"""int8 points of the rows of inverted lists, for the certified search (search.c)."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from skivfpq import _kernels
from skivfpq._algorithms import blocks
from skivfpq._algorithms.planes import LONG, SCALED, WIDEST, aligned, all_features, empty_fine
from skivfpq._algorithms.search import nearest_rows

BLOCK = 16  # rows
ABSENT = 1_000_000_000  # the term of places without a row, and of rows that are not to be found
PACKED_ROWS = 16384  # at a time
QUERIES_PER_TASK = 2048
FEW_QUERIES = 8  # for which rows are not packed, nor threads asked
NONE = np.empty(0, dtype=np.intp)


@dataclass(frozen=True, eq=False)
class ListPlanes:
    """Rows list by list, and their int8 points in blocks of 16; each list starts with a new block.

    A row is x = origin + scale a + e, |e| at most error, a its point; strays, which are too long or
    too large for that, are found by exact keys alone.
    """

    metric: str  # "distance", "cosine" or "product"
    vectors: np.ndarray  # (n_rows, n_features) as they are kept
    offsets: np.ndarray  # (n_lists + 1,) where each list starts
    ids: np.ndarray  # (n_rows,) int32, row numbers
    codes: np.ndarray  # (n_blocks, units, 16, 4) uint8
    blocks: np.ndarray  # (n_lists + 1,) the first block of each list
    terms: np.ndarray  # (n_blocks, 16) int32, half of |a|^2, in the unit of scores
    strays: np.ndarray  # positions
    stray_offsets: np.ndarray  # (n_lists + 1,)
    origin: np.ndarray  # (n_features,) float32
    scale: float
    query_scale: float
    error: float
    longest: float  # of scale a
    fine: tuple | None = None  # int16 points, of pack_fine

    @cached_property
    def packed(self):
        """What the kernels take."""
        return _kernels.native.PackedLists(self)

    def allowing(self, allowed):
        """The planes in which only allowed rows, a mask over positions, are found."""
        terms = self.terms.copy()
        terms.reshape(-1)[_places(self.offsets, self.blocks)[~allowed]] = ABSENT
        kept = allowed[self.strays]
        lists = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.stray_offsets))[kept]
        return replace(
            self,
            terms=terms,
            strays=self.strays[kept],
            stray_offsets=_bounds(lists, len(self.offsets) - 1),
        )

    def search(self, queries, probes, k, n_threads):
        """The k nearest rows of each query in the lists that it probes, (n_queries, n_probes), -1 for none.

        Returns keys and positions, (n_queries, k), and the numbers of the queries that it cannot serve.
        """
        probes = np.ascontiguousarray(probes, dtype=np.int32)
        keys = np.empty((len(queries), k))
        positions = np.empty((len(queries), k), dtype=np.int64)
        unserved = np.empty(len(queries), dtype=np.uint8)

        def search(rows):
            return _kernels.native.search_lists(
                self.packed, queries[rows], probes[rows], keys[rows], positions[rows], unserved[rows]
            )

        n_left = _over_queries(search, len(queries), n_threads)
        return keys, positions, np.flatnonzero(unserved) if n_left else NONE


class CenterPlanes:
    """Centers of lists, to find the nearest of."""

    def __init__(self, nearness, centers):
        """nearness: Metric by which centers are near; centers (n_lists, n_features) float64."""
        n_lists = len(centers)
        self.nearness, self.centers = nearness, centers
        self.planes = pack_lists(
            nearness, centers, np.array([0, n_lists]), np.arange(n_lists, dtype=np.int32)
        )
        if self.planes is not None:
            fine = empty_fine(centers.shape)
            _kernels.native.pack_fine(centers, self.planes.origin, *fine)
            self.planes = replace(self.planes, fine=fine)

    def search(self, row_planes, queries, k, n_probes, n_threads):
        """The k nearest rows of each query in its n_probes nearest lists, as ``ListPlanes.search``."""
        keys = np.empty((len(queries), k))
        positions = np.empty((len(queries), k), dtype=np.int64)
        unserved = np.empty(len(queries), dtype=np.uint8)
        if self.planes is None:
            return keys, positions, np.arange(len(queries))
        centers, packed = self.planes.packed, row_planes.packed

        def search(rows):
            return _kernels.native.search_index(
                centers, packed, queries[rows], n_probes, keys[rows], positions[rows], unserved[rows]
            )

        n_left = _over_queries(search, len(queries), n_threads)
        return keys, positions, np.flatnonzero(unserved) if n_left else NONE

    def ranked(self, queries, n_threads):
        """All lists, nearest first, (n_queries, n_lists)."""
        n_lists = len(self.centers)
        if self.planes is None:
            return nearest_rows(self.nearness, queries, self.centers, n_lists)[1]
        return _search_one_list(self.nearness, queries, self.planes, n_lists, n_threads)[1]


def _over_queries(search, n_queries, n_threads):
    """Call search(slice of the queries) over threads; the sum of what it returns."""
    if n_queries < FEW_QUERIES:
        return search(slice(0, n_queries))
    found = []
    n_tasks = max(n_threads, -(-n_queries // QUERIES_PER_TASK))
    blocks.run_tasks(lambda rows: found.append(search(rows)), n_queries, n_tasks, n_threads, multiple=1)
    return sum(found)


def instruction_set():
    """What planes are packed for."""
    return _kernels.native.INSTRUCTION_SET if _kernels.NATIVE else "reference"


def exact_rows(metric, queries, rows, k, n_threads=1, ids=None):
    """``nearest_rows`` by the certified search where that pays: keys and row numbers, (n_queries, k)."""
    ids = np.arange(len(rows), dtype=np.int32 if len(rows) < 1 << 31 else np.int64) if ids is None else ids
    planes = None
    if len(queries) >= FEW_QUERIES:
        planes = pack_lists(metric, rows, np.array([0, len(rows)]), ids, n_threads)
    if planes is None:
        return nearest_rows(metric, queries, rows, k, ids)
    return _search_one_list(metric, queries, planes, k, n_threads)


def _search_one_list(metric, queries, planes, k, n_threads):
    """The k nearest of the only list's rows: keys and positions, (n_queries, k)."""
    probes = np.zeros((len(queries), 1), dtype=np.int32)
    keys, positions, left = planes.search(queries, probes, k, n_threads)
    if len(left):
        keys[left], positions[left] = nearest_rows(metric, queries[left], planes.vectors, k, planes.ids)
    return keys, positions


@np.errstate(over="ignore", invalid="ignore")
def pack_lists(metric, vectors, offsets, ids, n_threads=1):
    """Planes of vectors (n_rows, n_features), list by list; None where int8 points cannot serve.

    metric : search.Metric
    """
    if not _can_serve(vectors, ids):
        return None
    _, largest_column, _, wraps = _kernels.native.scan_shape()
    sample = _rows(metric, vectors[blocks.evenly(len(vectors), SCALED)])
    embedding = all_features(sample)
    scale = _scale(embedding(sample, n_threads)[0], wraps)
    if not 1e-15 < scale < 1e15:
        return None
    first_blocks = np.concatenate([[0], np.cumsum(-(-np.diff(offsets) // BLOCK))])
    places = _places(offsets, first_blocks)
    codes, sq_norms, errors = _pack_points(
        metric, vectors, places, first_blocks[-1], embedding, scale, n_threads
    )

    is_stray = ~np.isfinite(errors)
    if metric.is_cosine:
        is_stray |= ~vectors.any(axis=1)  # their key is 1 whatever their point
    query_scale = scale * np.ceil(127 / largest_column)
    terms = np.full(len(codes) * BLOCK, ABSENT, dtype=np.int32)
    terms[places] = 0 if metric.is_product else np.floor(scale / query_scale * sq_norms / 2)
    terms[places[is_stray]] = ABSENT
    strays = np.flatnonzero(is_stray)
    return ListPlanes(
        "product" if metric.is_product else "cosine" if metric.is_cosine else "distance",
        vectors,
        offsets,
        ids,
        codes,
        first_blocks,
        terms.reshape(-1, BLOCK),
        strays,
        _bounds(np.searchsorted(offsets, strays, side="right") - 1, len(offsets) - 1),
        embedding.origin,
        scale,
        query_scale,
        float(errors[~is_stray].max(initial=0)),
        float(scale * np.sqrt(sq_norms[~is_stray].max(initial=0))) * (1 + 1e-9),
    )


def _pack_points(metric, vectors, places, n_blocks, embedding, scale, n_threads):
    """Codes (n_blocks, units, 16, 4), and of each row |a|^2 and |e|, (n_rows,)."""
    n_rows, n_features = vectors.shape
    multiple = _kernels.native.scan_shape()[2]
    codes = aligned((n_blocks, -(-n_features // (4 * multiple)) * multiple, BLOCK, 4))
    sq_norms, errors = np.empty(n_rows, dtype=np.int32), np.empty(n_rows, dtype=np.float32)

    def pack(part):
        first, last = part.start * BLOCK, part.stop * BLOCK
        rows = slice(*np.searchsorted(places, [first, last]))
        inside = places[rows] - first
        Y, bounds = np.zeros((last - first, n_features), np.float32), np.zeros(last - first, np.float32)
        Y[inside], bounds[inside] = embedding(_rows(metric, vectors[rows]))
        norms, lengths = np.empty(len(Y), dtype=np.int32), np.empty(len(Y), dtype=np.float32)
        _kernels.native.pack_rows(Y, scale, bounds, codes[part], norms, lengths)
        sq_norms[rows], errors[rows] = norms[inside], lengths[inside]

    n_tasks = max(n_threads, n_rows // PACKED_ROWS) if n_rows >= PACKED_ROWS else 1
    blocks.run_tasks(pack, n_blocks, n_tasks, n_threads, multiple=1)
    return codes, sq_norms, errors


def _can_serve(vectors, ids):
    return (
        _kernels.NATIVE
        and len(vectors) > 0
        and vectors.shape[1] <= WIDEST
        and ids.dtype == np.int32
        and vectors.flags.c_contiguous
        and vectors.dtype.isnative
    )


def _rows(metric, vectors):
    """Rows to embed, float32 or float64, as the metric sees them."""
    return metric.rows(vectors) if metric.is_cosine else blocks.as_float_rows(vectors)


def _scale(points, wraps):
    """The scale of points that leaves few rows out."""
    largest = np.abs(points).max(axis=1)
    if not largest.any():
        return 1.0  # rows are all the same
    typical = np.median(largest[largest > 0])
    scale = min(1.1 * float(largest.max()), LONG * float(typical)) / 127
    if wraps:  # scores of rows and queries up to 1.1 times as long as any span 2^16
        served = points[largest <= 127 * scale]
        scale = max(scale, 1.1 * np.sqrt(np.einsum("ij,ij->i", served, served).max(initial=0)) / 245)
    return scale


def _places(offsets, first_blocks):
    """Where each position stands in the blocks, (n_rows,), as a number of places."""
    shifts = BLOCK * first_blocks[:-1] - offsets[:-1]
    return np.arange(offsets[-1]) + np.repeat(shifts, np.diff(offsets))


def _bounds(lists, n_lists):
    """Where each list starts among sorted list numbers, (n_lists + 1,)."""
    return np.searchsorted(lists, np.arange(n_lists + 1)).astype(np.int64)

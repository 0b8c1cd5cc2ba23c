"""int8 points of the rows of inverted lists, for the certified search (search.c)."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from skivfpq import _kernels
from skivfpq._algorithms import blocks
from skivfpq._algorithms.inverted_lists import BLOCK, list_of
from skivfpq._algorithms.planes import LONG, SCALED, WIDEST, aligned, all_features, empty_fine
from skivfpq._algorithms.search import nearest_rows

ABSENT = 1_000_000_000  # the term of places without a row, and of rows that are not to be found
PACKED_ROWS = 16384  # at a time
QUERIES_PER_TASK = 8192
SCRATCH_BYTES = 1 << 25  # of a task, about
MOST_STRAYS = 0.01  # share of rows that may have become strays before all are packed anew
LEAST_RANGE = 64  # of integers whose unit is not too coarse for queries between them
FEW_QUERIES = 8  # for which rows are not packed, nor threads asked
NONE = np.empty(0, dtype=np.intp)


@dataclass(frozen=True, eq=False)
class Points:
    """int8 points a of rows x: x, or y(x) by an embedding, is origin + scale a + e, |e| at most error.

    In blocks of 16 rows, list by list, each list starting with a new block; or row by row.
    """

    quantizer: object  # Levels or Bytes, for rows to come
    codes: np.ndarray  # (n_blocks, units, lanes, 4) uint8
    terms: np.ndarray  # (n_blocks, lanes) int32, half of |a|^2, in the unit of scores
    query_scale: float
    error: float
    longest: float  # of scale a

    @property
    def origin(self):
        """(n_features,) float32."""
        return self.quantizer.origin

    @property
    def scale(self):
        """Of a."""
        return self.quantizer.scale

    @property
    def width(self):
        """Coordinates of a point."""
        return self.quantizer.width

    @property
    def head(self):
        """The embedding that points are by, or None for all features."""
        return self.quantizer.head

    @property
    def nbytes(self):
        """Bytes of the points and their terms."""
        return self.codes.nbytes + self.terms.nbytes

    def without(self, places):
        """Points of which those at some places are not found."""
        terms = self.terms.copy()
        terms.reshape(-1)[places] = ABSENT
        return replace(self, terms=terms)

    def adding(self, places, others):
        """Points with others at free places: their codes are written, their terms to a copy."""
        lanes, own = self.codes.shape[2], np.arange(len(places))
        self.codes[places // lanes, :, places % lanes] = others.codes[own // lanes, :, own % lanes]
        terms = self.terms.copy()
        terms.reshape(-1)[places] = others.terms.reshape(-1)[own]
        error, longest = max(self.error, others.error), max(self.longest, others.longest)
        return replace(self, terms=terms, error=error, longest=longest)


@dataclass(frozen=True, eq=False)
class ListPlanes:
    """Rows list by list, and their int8 points, which are scanned.

    Where a head of the rows excludes most of them, the points are of that, and the rows that they leave are
    known by points of all features. Strays, too long or too large for points, are found by exact keys alone.
    """

    metric: str  # "distance", "cosine" or "product"
    vectors: np.ndarray  # (n_places, n_features) as they are kept
    offsets: np.ndarray  # (n_lists + 1,) where each list starts
    ids: np.ndarray  # (n_places,) int32, row numbers, -1 where there is no row
    blocks: np.ndarray  # (n_lists + 1,) the first block of each list
    points: Points  # in blocks
    whole: Points | None  # row by row, all features of rows whose points are of a head
    strays: np.ndarray  # positions
    stray_offsets: np.ndarray  # (n_lists + 1,)
    odd: np.ndarray | None = None  # (n_places / 8,) uint8, of Bytes: a bit for each term that lost a half
    fine: tuple | None = None  # int16 points, of pack_fine
    n_first_strays: int = 0  # when all were packed

    @property
    def nbytes(self):
        """Bytes of the points and their terms."""
        whole = 0 if self.whole is None else self.whole.nbytes
        return self.points.nbytes + whole + (0 if self.odd is None else self.odd.nbytes)

    @cached_property
    def packed(self):
        """What the kernels take."""
        return _kernels.native.PackedLists(self)

    def allowing(self, allowed):
        """The planes in which only allowed rows, a mask over positions, are found."""
        absent = _places(self.offsets, self.blocks)[~allowed]
        return self._less(absent, self.strays[allowed[self.strays]])

    def adding(self, metric, ids, positions):
        """Planes with rows that were written to free positions; None if all are to be packed anew.

        ids : (n_places,) row numbers, those of the new ones included
        """
        own = np.array([0, len(positions)])
        quantizers = [points.quantizer for points in (self.points, self.whole) if points is not None]
        part = _pack(metric, self.vectors[positions], own, ids[positions], *quantizers)
        strays = np.sort(np.concatenate([self.strays, positions[part.strays]]))
        points = self.points.adding(self._places_of(positions), part.points)
        whole = None if self.whole is None else self.whole.adding(positions, part.whole)
        if len(strays) > self.n_first_strays + MOST_STRAYS * len(ids):
            return None  # the scale has become too small
        odd = None if self.odd is None else _bits(self)
        if odd is not None:
            odd[positions] = _bits(part)
            odd = np.packbits(odd, bitorder="little")
        return replace(self._with_strays(strays), ids=ids, points=points, whole=whole, odd=odd)

    def without(self, ids, positions):
        """Planes in which the rows at some positions are not found any more."""
        less = self._less(self._places_of(positions), np.setdiff1d(self.strays, positions))
        return replace(less, ids=ids)

    def _less(self, absent, strays):
        """Planes without the rows at some places of the blocks, of whose strays these are left."""
        return replace(self._with_strays(strays), points=self.points.without(absent))

    def _with_strays(self, strays):
        return replace(self, strays=strays, stray_offsets=np.searchsorted(strays, self.offsets))

    def _places_of(self, positions):
        """Where positions stand in the blocks, as numbers of places."""
        lists = list_of(self.offsets, positions)
        return BLOCK * self.blocks[lists] + positions - self.offsets[lists]

    def search(self, queries, probes, k, n_threads):
        """The k nearest rows of each query in the lists that it probes, (n_queries, n_probes), -1 for none.

        Returns keys and positions, (n_queries, k), and the numbers of the queries that it cannot serve.
        """
        return search_lists(self, queries, probes, k, n_threads)


def search_lists(rows, queries, probes, k, n_threads):
    """``ListPlanes.search`` of any rows that are packed."""
    probes = np.ascontiguousarray(probes, dtype=np.int32)

    def search(some, *out):
        return _kernels.native.search_lists(rows.packed, queries[some], probes[some], *out)

    return over_queries(search, queries, k, n_threads, probes.shape[1])


def rank_rows(metric, vectors, ids, queries, candidates, k, n_threads):
    """The k nearest of each query's candidates, (n_queries, n_candidates) positions; None if not served."""
    if not _can_serve(vectors, ids):
        return None
    rows = _kernels.native.PackedRows(kernel_name(metric), vectors, ids)

    def rank(some, keys, positions, unserved):
        _kernels.native.rank_rows(rows, queries[some], candidates[some], keys, positions)
        return 0

    return over_queries(rank, queries, k, n_threads)[:2]


def kernel_name(metric):
    """As the kernels call a metric."""
    return "product" if metric.is_product else "cosine" if metric.is_cosine else "distance"


def over_queries(search, queries, k, n_threads, n_probes=1):
    """Keys and positions (n_queries, k), and the numbers of queries not served, part by part over threads.

    search : function (slice of the queries, their keys, positions, unserved: OUT) -> how many not served
    """
    n_queries, n_features = queries.shape
    keys, positions = np.empty((n_queries, k)), np.empty((n_queries, k), dtype=np.int64)
    unserved, n_unserved = np.empty(n_queries, dtype=np.uint8), []

    def part(some):
        n_unserved.append(search(some, keys[some], positions[some], unserved[some]))

    # Of a query: 2 k rows wait and k are found; its probes, twice; its int8 point.
    scratch = 32 * k + 8 * n_probes + n_features + 1024
    most = max(1, min(QUERIES_PER_TASK, SCRATCH_BYTES // scratch))
    if n_threads == 1 or n_queries < FEW_QUERIES:
        for start in range(0, n_queries, most):
            part(slice(start, min(start + most, n_queries)))
    else:
        n_tasks = -(-n_queries // (most * n_threads)) * n_threads
        blocks.run_tasks(part, n_queries, n_tasks, n_threads, multiple=1)
    return keys, positions, np.flatnonzero(unserved) if sum(n_unserved) else NONE


def instruction_set():
    """What planes are packed for."""
    return _kernels.native.INSTRUCTION_SET if _kernels.NATIVE else "reference"


def exact_rows(metric, queries, rows, k, n_threads=1, ids=None):
    """``nearest_rows`` by the certified search where that pays: keys and positions, (n_queries, k)."""
    ids = np.arange(len(rows), dtype=np.int32 if len(rows) < 1 << 31 else np.int64) if ids is None else ids
    if len(queries) < FEW_QUERIES:  # packing takes longer than to look at every row
        candidates = np.tile(np.arange(len(rows)), (len(queries), 1))
        found = rank_rows(metric, rows, ids, queries, candidates, k, n_threads)
        return nearest_rows(metric, queries, rows, k, ids) if found is None else found
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
def pack_lists(metric, vectors, offsets, ids, n_threads=1, head=None, fine=False):
    """Planes of vectors (n_rows, n_features), list by list; None where int8 points cannot serve.

    metric : search.Metric
    ids : (n_places,) row numbers, -1 where there is no row
    head : Embedding by which rows are scanned, or None for all features
    fine : whether rows, float64, are centers: known by int16 points too, and not taken for integers
    """
    if not _can_serve(vectors, ids):
        return None
    live = np.flatnonzero(ids >= 0)
    some = blocks.evenly(len(live), SCALED)
    sample = _rows(metric, vectors[some if len(live) == len(ids) else live[some]])
    quantizers = [] if head is None else [Levels.of(sample, head)]
    if not (fine and head):
        quantizers.append((None if fine else Bytes.of(sample)) or Levels.of(sample))
    if not all(1e-15 < quantizer.scale < 1e15 for quantizer in quantizers):
        return None
    planes = _pack(metric, vectors, offsets, ids, *quantizers, n_threads=n_threads)
    if planes.whole is not None and len(planes.strays) > MOST_STRAYS * len(live):  # too long for their heads?
        planes = _pack(metric, vectors, offsets, ids, quantizers[-1], n_threads=n_threads)
    if fine:
        planes = replace(planes, fine=empty_fine(vectors.shape))
        _kernels.native.pack_fine(vectors, planes.points.origin, *planes.fine)
    return planes


def _pack(metric, vectors, offsets, ids, quantizer, whole=None, n_threads=1):
    """Planes of rows by a quantizer or, where that is of a head, by another of all features too."""
    first_blocks = first_blocks_of(offsets)
    places = _places(offsets, first_blocks)
    packed = _pack_points(metric, vectors, places, first_blocks[-1], BLOCK, quantizer, n_threads)
    packed_whole = whole and _pack_points(metric, vectors, np.arange(len(ids)), len(ids), 1, whole, n_threads)
    is_live = ids >= 0
    is_point = np.isfinite(packed[-1]) & (True if whole is None else np.isfinite(packed_whole[-1]))
    if metric.is_cosine:
        is_point &= vectors.any(axis=1)  # of the others the key is 1 whatever their point
    is_scored = is_live & is_point
    points, rests = _points(metric, quantizer, places, is_scored, *packed)
    if whole:
        whole, rests = _points(metric, whole, np.arange(len(ids)), is_scored, *packed_whole)
    integers = not metric.is_product and isinstance((whole or points).quantizer, Bytes)
    strays = np.flatnonzero(is_live & ~is_point)
    return ListPlanes(
        kernel_name(metric),
        vectors,
        offsets,
        ids,
        first_blocks,
        points,
        whole,
        strays,
        np.searchsorted(strays, offsets),
        odd=np.packbits(rests > 0, bitorder="little") if integers else None,
        n_first_strays=len(strays),
    )


def _points(metric, quantizer, places, is_scored, codes, sq_norms, errors):
    """Points of packed rows, of which some are scored, and what their terms have lost, (n_rows,)."""
    query_scale = quantizer.scale / _kernels.native.query_levels(4 * codes.shape[1])
    terms, rests = np.full(codes.shape[0] * codes.shape[2], ABSENT, dtype=np.int32), 0
    if metric.is_product:
        terms[places] = 0
    else:
        terms[places], rests = np.divmod(quantizer.scale / query_scale * sq_norms, 2)
    terms[places[~is_scored]] = ABSENT
    error = float(errors[is_scored].max(initial=0))
    longest = float(quantizer.scale * np.sqrt(sq_norms[is_scored].max(initial=0))) * (1 + 1e-9)
    return Points(quantizer, codes, terms.reshape(len(codes), -1), query_scale, error, longest), rests


def _bits(planes):
    """Which terms have lost a half, (n_places,) bool."""
    return np.unpackbits(planes.odd, count=len(planes.ids), bitorder="little").astype(bool)


def first_blocks_of(offsets):
    """The first block of each list, (n_lists + 1,)."""
    return np.concatenate([[0], np.cumsum(-(-np.diff(offsets) // BLOCK))])


def _pack_points(metric, vectors, places, n_blocks, lanes, quantizer, n_threads):
    """Codes (n_blocks, units, lanes, 4); |a|^2 and |e| of rows (n_rows,), inf where there is no point."""
    n_rows, multiple = len(vectors), _kernels.native.scan_shape()[2]
    codes = aligned((n_blocks, -(-quantizer.width // (4 * multiple)) * multiple, lanes, 4))
    sq_norms, errors = np.empty(n_rows, dtype=np.int32), np.empty(n_rows, dtype=np.float32)

    def pack(part):
        first, last = part.start * lanes, part.stop * lanes
        rows = slice(*np.searchsorted(places, [first, last]))
        inside = places[rows] - first
        sq_norms[rows], errors[rows] = quantizer.pack(_rows(metric, vectors[rows]), inside, codes[part])

    n_tasks = max(n_threads, n_rows // PACKED_ROWS) if n_rows >= PACKED_ROWS else 1
    blocks.run_tasks(pack, n_blocks, n_tasks, n_threads, multiple=1)
    return codes, sq_norms, errors


class Levels:
    """Rounds rows to int8 multiples of a scale, around their mean."""

    def __init__(self, embedding, scale):
        self.embedding, self.scale, self.origin = embedding, scale, embedding.origin
        self.width = embedding.width
        self.head = None if embedding.axes is None else embedding

    @classmethod
    def of(cls, sample, head=None):
        """For rows like these, of which it leaves few out."""
        embedding = head or all_features(sample)
        return cls(embedding, _scale(embedding(sample)[0]))

    def pack(self, rows, places, codes):
        """Write the codes (n_blocks, units, lanes, 4) of rows at some places; |a|^2 and |e| of each."""
        shape = len(codes) * codes.shape[2], self.embedding.width
        Y, bounds = np.zeros(shape, dtype=np.float32), np.zeros(shape[0], dtype=np.float32)
        Y[places], bounds[places] = self.embedding(rows)
        norms, errors = np.empty(shape[0], dtype=np.int32), np.empty(shape[0], dtype=np.float32)
        _kernels.native.pack_rows(Y, self.scale, bounds, codes, norms, errors)
        return norms[places], errors[places]


class Bytes:
    """The same of rows that hold integers within 256 of each other, of any dtype: without any error."""

    scale, head = 1.0, None

    def __init__(self, lowest, n_features):
        self.lowest, self.origin = lowest, np.full(n_features, lowest + 128, dtype=np.float32)
        self.width = n_features

    @classmethod
    def of(cls, sample):
        """For rows like these, or None where more than one in 100 holds other numbers."""
        lowest = float(np.quantile(sample.min(axis=1), 0.005, method="lower"))
        highest = float(np.quantile(sample.max(axis=1), 0.995, method="higher"))
        if not (LEAST_RANGE <= highest - lowest <= 255 and abs(lowest) <= 1 << 20):
            return None
        is_uint8 = lowest >= 0 and highest <= 255
        quantizer = cls(0.0 if is_uint8 else np.floor((lowest + highest) / 2) - 127, sample.shape[1])
        return quantizer if quantizer.serves(sample).mean() >= 0.99 else None

    def serves(self, rows):
        """Which rows hold nothing but its integers."""
        shifted = rows - rows.dtype.type(self.lowest)  # right for integers; others may round to one
        return ((shifted >= 0) & (shifted <= 255) & (rows == np.rint(rows))).all(axis=1)

    def pack(self, rows, places, codes):
        """As ``Levels.pack``."""
        shifted = np.clip(rows - rows.dtype.type(self.lowest), 0, 255)
        whole = shifted.astype(np.uint8)
        n_blocks, units, lanes, _ = codes.shape
        padded = np.full((n_blocks * lanes, 4 * units), 128, dtype=np.uint8)
        padded[places, : rows.shape[1]] = whole
        codes[:] = padded.reshape(n_blocks, lanes, units, 4).transpose(0, 2, 1, 3)
        centered = shifted - shifted.dtype.type(128)
        sq_norms = np.einsum("ij,ij->i", centered, centered, dtype=np.float64)  # whole, below 2^28
        return sq_norms, np.where(self.serves(rows), 0, np.inf)


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


def _scale(points):
    """The scale of points that leaves few rows out."""
    largest = np.abs(points).max(axis=1)
    if not largest.any():
        return 1.0  # rows are all the same
    typical = np.median(largest[largest > 0])
    return min(1.1 * float(largest.max()), LONG * float(typical)) / 127


def _places(offsets, first_blocks):
    """Where each position stands in the blocks, (n_rows,), as a number of places."""
    shifts = BLOCK * first_blocks[:-1] - offsets[:-1]
    return np.arange(offsets[-1]) + np.repeat(shifts, np.diff(offsets))

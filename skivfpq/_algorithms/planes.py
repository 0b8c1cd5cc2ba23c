"""int8 planes of rows and panels of centers, with their error bounds, for the certified scan.

Rows x and centers c are mapped to points y that are never farther apart: y(x) holds the coordinates of
x - origin along some axes (all of them, or the first principal ones) and, where axes are left out, the
length of what is left. Points are rounded to int8 multiples of a scale. So |x - c| is at least the
distance of the int8 points less their rounding errors: what the scan excludes cannot be nearest.
"""

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from skivfpq import _kernels
from skivfpq._algorithms import blocks

LONG = 2.5  # rows longer than this many times the median are left to the lane kernel
TAIL_COPIES = 4  # the tail's length is spread on so many coordinates, not to stretch the scale
HEAD_ENERGY = 0.84  # share of the variance that the principal axes of a head hold
SCAN_ROWS = 4096  # of a task
LEAST_WORK = 2e9  # products of a step, below which the lane kernel is done before planes are packed
WIDEST = 16384  # features; beyond, the lane kernel
SAMPLE = 4096  # rows whose mean and axes stand for all rows'
JUDGED_ROWS = 512  # on which the lane kernel's time is measured
GUESSED = 1024  # clusters from which rows without labels are scanned too
GUESS_STRIDE = 16  # rows without a label start from the nearest of every so many centers
EPS32 = 2.0**-24
MARGIN = 0.012  # of the typical distance to the nearest center


class Embedding:
    """The map x -> y; |y(x) - y(c)| <= |x - c|, up to the bounds that it returns.

    Parameters
    ----------
    origin : (n_features,)
    axes : (n_features, n_axes) with orthonormal columns, or None for all coordinates as they are
    """

    def __init__(self, origin, axes=None, tail_origin=0.0):
        self.origin = np.ascontiguousarray(origin, dtype=np.float32)  # x - origin then rounds once
        self.axes = axes
        self.tail_origin = tail_origin
        if axes is not None:
            self.axes32 = np.zeros((len(axes), self.width), dtype=np.float32)  # zeros for the tail's copies
            self.axes32[:, : axes.shape[1]] = axes

    @property
    def width(self):
        """Number of coordinates of y."""
        return len(self.origin) if self.axes is None else self.axes.shape[1] + TAIL_COPIES

    @np.errstate(over="ignore", invalid="ignore")  # points of values too large are not finite: not served
    def __call__(self, X):
        """Points Y (n_samples, width) float32 and bounds of |Y - y| (n_samples,) float32."""
        shifted = (X - self.origin).astype(np.float32, copy=False)  # (n_samples, n_features)
        lengths = np.sqrt(np.einsum("ij,ij->i", shifted, shifted))
        if self.axes is None:
            return shifted, lengths * np.float32(4 * EPS32)
        n_features, n_axes = self.axes.shape
        Y = np.empty((len(X), self.width), dtype=np.float32)
        _kernels.native.project(shifted, self.axes32, Y)
        head = np.einsum("ij,ij->i", Y[:, :n_axes], Y[:, :n_axes])
        tails = np.sqrt(np.maximum(lengths * lengths - head, 0))  # (n_samples,)
        Y[:, n_axes:] = ((tails - self.tail_origin) / np.sqrt(TAIL_COPIES))[:, None]
        # A float32 product of n_features terms, then what its error does to the tail's square.
        projection = (n_features + 8) * EPS32 * np.sqrt(n_axes)
        square = 2 * projection + 4 * (n_features + 8) * EPS32
        tail_bound = square * lengths / np.maximum(tails / np.maximum(lengths, 1e-30), np.sqrt(square))
        return Y, (projection * lengths + tail_bound).astype(np.float32)


@dataclass
class Plane:
    """int8 points of rows."""

    embedding: Embedding
    scale: float
    codes: np.ndarray  # (n_samples, units, 1, 4) or (n_blocks, units, 16, 4) uint8
    sq_norms: np.ndarray  # (n_samples,) int32, of the int8 points
    errors: np.ndarray  # (n_samples,) float32, |y - scale q|; inf for rows that are not to be scanned
    typical: float  # 99 % of the points are no longer
    fine: tuple  # of pack_fine_rows


@dataclass
class Panels:
    """int8 points of centers, beside the centers themselves."""

    centers: np.ndarray  # (n_clusters, n_features) float64
    fine: tuple  # of pack_fine_columns
    packed: np.ndarray  # (n_panels, 4 * units * columns) int8
    starts: np.ndarray  # (n_panels * columns,) int32
    scale: float
    error: float
    ids: np.ndarray  # (n_columns + n_far,) int32, which centers
    far_lengths: np.ndarray  # (n_far,) of the centers too long for the panels
    drifts: np.ndarray | None = None  # (n_columns,) how far each center has moved, falling


class NearestCenters:
    """Nearest centers of the same rows, for centers that move; packs the rows once.

    Called with the labels of the step before (-1 where there was none), which it replaces. Squared distances
    are written where they come at no cost; the call returns whether they were.
    """

    def __init__(self, X, n_clusters, n_threads):
        self.X, self.n_threads = X, n_threads
        self.scans = pays(X, n_clusters)
        self.has_head = self.scans and head_pays(X, n_clusters)
        self.plane = self.centers = self.packed = None
        self.n_failures = self.n_successes = 0
        self.is_head = False

    def forget(self):
        """Take the labels of the next call as given: the bounds are not of those."""
        self.centers = None

    def __call__(self, centers, labels, sq_distances):
        """Write the labels (n_samples,) int32 and, if True is returned, squared distances (n_samples,)."""
        centers = np.ascontiguousarray(centers, dtype=np.float64)
        if not self.scans and blocks.runs_native(self.X):
            self.centers = None
            self.pack().nearest_centers(centers, labels)
            return False
        labelled = labels[0] >= 0
        tried = self.scans and (labelled or len(centers) >= GUESSED)
        plane = self._plane(centers, labels) if tried else None
        drifts = self._drifts(centers, labelled)
        panels = None if plane is None else pack_centers(centers, plane, drifts)
        self.centers = None if panels is None else centers
        if panels is None:
            blocks.nearest_centers(self.X, centers, self.n_threads, labels, sq_distances)
            return True
        if not labelled:  # any center will do, a near one saves time
            some = slice(None, None, GUESS_STRIDE)
            blocks.nearest_centers(self.X, centers[some], self.n_threads, labels, sq_distances)
            labels *= GUESS_STRIDE
        margin = self._margin(drifts, float(np.sqrt(sq_distances.mean()))) if np.isfinite(drifts[0]) else 0.0

        def assign(rows):
            left = _kernels.native.certified_nearest(
                self.X, plane, panels, rows.start, rows.stop, margin, labels, sq_distances, self.lower
            )
            if len(left):
                labels[left], sq_distances[left] = blocks.nearest_centers(self.X[left], centers)

        start = perf_counter()
        blocks.run_tasks(assign, len(self.X), len(self.X) // SCAN_ROWS, self.n_threads)
        self._judge(perf_counter() - start, centers)
        return True

    def pack(self):
        """The rows packed for the lane kernel; kept where they are likely to come again."""
        if self.scans:
            return blocks.PackedRows(self.X, self.n_threads)
        if self.packed is None:
            self.packed = blocks.PackedRows(self.X, self.n_threads)
        return self.packed

    def _plain_seconds(self, rows, centers):
        """What the lane kernel would take for all rows, from its time for some."""
        start = perf_counter()
        blocks.nearest_centers(rows, centers)
        return (perf_counter() - start) * len(self.X) / len(rows) / self.n_threads

    def _judge(self, seconds, centers):
        """Keep to the scan, or give it up, when it was twice faster, or twice slower, than the lane kernel.

        Labels do not depend on it.
        """
        if self.n_successes == 2:
            return
        too_slow = seconds > 0.9 * self._plain_seconds(self.X[:JUDGED_ROWS], centers)
        self.n_failures += too_slow
        self.n_successes += not too_slow
        if self.n_failures == 2:
            self.scans, self.plane = False, None

    def _promises(self, embedding, centers, labels):
        """Whether the scan of some rows, as a trial before all are packed, is faster than the lane kernel."""
        chosen = blocks.evenly(len(self.X), JUDGED_ROWS)
        rows, labels = np.ascontiguousarray(self.X[chosen]), labels[chosen].copy()
        plane = pack_plane(rows, embedding)
        panels = None if plane is None else pack_centers(centers, plane, np.full(len(centers), np.inf))
        if panels is None:
            return False
        start = perf_counter()
        left = _kernels.native.certified_nearest(
            rows, plane, panels, 0, len(rows), 0.0, labels, np.empty(len(rows)), np.zeros(len(rows))
        )
        seconds = (perf_counter() - start) * len(self.X) / len(rows) / self.n_threads
        return len(left) < len(rows) / 2 and seconds < 0.8 * self._plain_seconds(rows, centers)

    def _drifts(self, centers, labelled):
        """How far each center has moved since the labels were found, (n_clusters,), at most."""
        if not labelled or self.centers is None or len(self.centers) != len(centers):
            self.lower = np.zeros(self.X.shape[0])
            return np.full(len(centers), np.inf)
        return np.sqrt(np.square(centers - self.centers).sum(axis=1)) * (1 + 1e-9)

    def _margin(self, drifts, typical):
        """How much beyond the nearest center others are worth finding, so that later steps may skip them.

        Pays as soon as many centers move less than what it costs little to look around.
        """
        margin = MARGIN * typical
        return margin if np.quantile(drifts, 0.3) <= margin else 0.0

    def _plane(self, centers, labels):
        """The plane to scan: all features at first, the head once centers are means, of short tails."""
        labelled = labels[0] >= 0
        embedding = None
        if labelled and self.has_head and not self.is_head:
            embedding = head_embedding(self.X, HEAD_ENERGY)
            self.has_head = self.is_head = embedding is not None
        if self.plane is None and embedding is None:
            embedding = all_features(self.X)
        if embedding is None:
            return self.plane
        fine = None if self.plane is None else self.plane.fine  # of the same origin
        promising = not labelled or self._promises(embedding, centers, labels)
        self.plane = pack_plane(self.X, embedding, self.n_threads, fine) if promising else None
        self.scans = self.plane is not None
        return self.plane


def nearest_centers(X, centers, n_threads=1):
    """Nearest center of every row: labels (n_samples,) int32 and sq_distances (n_samples,)."""
    if not pays(X, len(centers)) or len(centers) < GUESSED:
        return blocks.nearest_centers(X, centers, n_threads)
    labels, sq_distances = np.full(X.shape[0], -1, dtype=np.int32), np.empty(X.shape[0])
    if X.shape[0]:
        NearestCenters(X, len(centers), n_threads)(centers, labels, sq_distances)
    return labels, sq_distances


def pays(X, n_clusters):
    """Whether the scan can be faster than the lane kernel, its preparation included."""
    if not blocks.runs_native(X):
        return False
    n_samples, n_features = X.shape
    return (
        n_clusters >= 128 and 32 <= n_features <= WIDEST and n_samples * n_features * n_clusters >= LEAST_WORK
    )


def head_pays(X, n_clusters):
    """Whether finding principal axes and projecting the rows can be worth their time."""
    n_samples, n_features = X.shape
    return n_clusters >= 256 and n_features >= 64 and n_samples * n_clusters >= 40 * n_features**2


@np.errstate(over="ignore", invalid="ignore")
def head_embedding(X, energy):
    """Embedding on the first principal axes of X, turned at random among themselves, and the tail.

    None where the axes that hold most of the variance are too many to save anything.
    """
    rows = X[blocks.evenly(len(X), SAMPLE)]
    origin = all_features(X).origin
    shifted = (rows - origin).astype(np.float32)
    scatter = (shifted.T @ shifted).astype(np.float64)
    if not 0 < np.trace(scatter) < np.inf:
        return None
    variances, axes = np.linalg.eigh(scatter)
    shares = np.cumsum(variances[::-1]) / variances.sum()
    step = max(16, 4 * _kernels.native.scan_shape()[2])  # of widths that leave no unit empty
    n_axes = -(-(int(np.searchsorted(shares, energy)) + 1 + TAIL_COPIES) // step) * step - TAIL_COPIES
    if n_axes > 0.6 * X.shape[1]:
        return None
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((n_axes, n_axes)))
    tail = variances[:-n_axes].sum() / len(rows)  # mean square of the rows' tails
    return Embedding(origin, axes[:, -n_axes:] @ turn, float(np.sqrt(max(tail, 0.0))))


def all_features(X):
    """Embedding on all features as they are, the mean of rows that are not too long in the origin."""
    rows = X[blocks.evenly(len(X), SAMPLE)]
    largest = np.abs(rows).max(axis=1)
    return Embedding(rows[largest <= LONG * np.median(largest)].mean(axis=0, dtype=np.float64))


@np.errstate(over="ignore", invalid="ignore")
def pack_plane(X, embedding, n_threads=1, fine=None, lanes=1):
    """The plane of the rows of X; None for values that float32 squares cannot hold."""
    _, _, multiple, wraps = _kernels.native.scan_shape()
    units = -(-embedding.width // (4 * multiple)) * multiple
    n_samples = len(X)
    sample, _ = embedding(X[blocks.evenly(n_samples, SAMPLE)])
    largest = np.abs(sample).max(axis=1)
    lengths = np.sqrt(np.einsum("ij,ij->i", sample, sample))
    typical = float(np.quantile(lengths, 0.99))
    scale = min(float(largest.max()) * 1.1, LONG * float(np.median(largest))) / 127
    if wraps:  # twice the scales' product times 2^16 must span the squared distances
        scale = max(scale, np.sqrt(2.2 / 2**17) * typical)
    if not 1e-15 < scale < 1e15:
        return None
    plane = Plane(
        embedding,
        scale,
        _aligned((-(-n_samples // lanes), units, lanes, 4)),
        np.empty(n_samples, dtype=np.int32),
        np.empty(n_samples, dtype=np.float32),
        typical,
        _fine_rows(X, embedding.origin, n_threads) if fine is None else fine,
    )

    def pack(rows):
        for start in range(rows.start, rows.stop, 1024):
            part = slice(start, min(start + 1024, rows.stop))
            Y, bounds = embedding(X[part])
            codes = plane.codes[part.start // lanes : -(-part.stop // lanes)]
            _kernels.native.pack_rows(Y, scale, bounds, codes, plane.sq_norms[part], plane.errors[part])

    blocks.map_rows(pack, n_samples, n_threads, 4 * embedding.width)
    return plane


def _fine_rows(X, origin, n_threads):
    """Codes (n_samples, n_features) int8, scales, errors and squared norms, (n_samples,) each."""
    n = len(X)
    fine = np.empty(X.shape, np.int8), np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.int32)

    def pack(rows):
        _kernels.native.pack_fine_rows(X[rows], origin, *[part[rows] for part in fine])

    blocks.map_rows(pack, n, n_threads, 2 * X.shape[1])
    return fine


def _aligned(shape):
    """uint8 array that starts at a cache line: a unit of a block is one line."""
    memory = np.full(int(np.prod(shape)) + 64, 128, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + int(np.prod(shape))].reshape(shape)


@dataclass
class CandidateScale:
    """How rows of a plane are packed as columns: always alike, so that thresholds can be kept."""

    scale: float
    error: float

    @classmethod
    def of(cls, X, plane):
        """The scale for rows of X; error is that of most of them."""
        _, largest_column, _, wraps = _kernels.native.scan_shape()
        served = np.flatnonzero(np.isfinite(plane.errors))
        rows = X[served[blocks.evenly(len(served), 1024)]]
        largest = np.abs(plane.embedding(rows)[0]).max(initial=0)
        scale = min(1.1 * float(largest), 127.5 * plane.scale) / largest_column
        if wraps:
            scale = max(scale, 2.2 * plane.typical**2 / (2**17 * plane.scale))
        sample = pack_candidates(rows, plane, cls(scale, np.inf))
        return cls(scale, 1.02 * sample.error)


def pack_candidates(rows, plane, candidate_scale=None):
    """Panels of some rows; of infinite error where one of them is too long for the plane."""
    centers = np.ascontiguousarray(rows, dtype=np.float64)
    panels = Panels(centers, None, None, None, 0.0, np.inf, None, None)
    if plane is None:
        return panels
    with np.errstate(over="ignore", invalid="ignore"):
        Y, bounds = plane.embedding(centers)
    if not np.abs(Y).max(initial=0) <= _kernels.native.scan_shape()[1] * candidate_scale.scale:
        return panels
    return _pack(panels, plane, Y, bounds, candidate_scale.scale, np.arange(len(rows)), np.empty(0))


def _pack(panels, plane, Y, bounds, scale, ids, far_lengths, drifts=None):
    """Fill the panels: int8 points Y of some centers, fine points of all."""
    columns = _kernels.native.scan_shape()[0]
    units = plane.codes.shape[1]
    n_panels = -(-len(Y) // columns)
    panels.packed = np.zeros((n_panels, 4 * units * columns), dtype=np.int8)
    panels.starts = np.zeros(n_panels * columns, dtype=np.int32)
    panels.scale, panels.ids, panels.far_lengths = scale, ids.astype(np.int32), far_lengths
    panels.drifts = drifts
    panels.error = _kernels.native.pack_columns(Y, scale, bounds, plane.scale, panels.packed, panels.starts)
    k = len(panels.centers)
    panels.fine = np.empty(panels.centers.shape, dtype=np.int16), np.empty(k), np.empty(k), np.empty(k)
    _kernels.native.pack_fine_columns(panels.centers, plane.embedding.origin, *panels.fine)
    return panels


@np.errstate(over="ignore", invalid="ignore")
def pack_centers(centers, plane, drifts):
    """Panels of the centers for the scan of a plane; None where int8 points cannot serve."""
    _, largest_column, _, wraps = _kernels.native.scan_shape()
    Y, bounds = plane.embedding(centers)
    largest = np.abs(Y).max(axis=1)
    near = np.flatnonzero(largest <= 2 * LONG * np.median(largest))
    near = near[np.argsort(-drifts[near], kind="stable")]
    far = np.flatnonzero(largest > 2 * LONG * np.median(largest))
    lengths = np.sqrt(np.einsum("ij,ij->i", Y, Y, dtype=np.float64))
    scale = max(float(largest[near].max(initial=0)) / largest_column, plane.scale / 64)
    if wraps:
        typical = float(np.quantile(lengths[near], 0.99))
        reach = plane.typical**2 + typical**2 + 0.6 * plane.typical * typical
        scale = max(scale, reach / (2**17 * plane.scale))
    if not scale <= 64 * plane.scale or len(near) + len(far) < len(centers) or len(far) > 16:
        return None
    return _pack(
        Panels(centers, None, None, None, scale, np.inf, None, None),
        plane,
        np.ascontiguousarray(Y[near]),
        bounds[near],
        scale,
        np.concatenate([near, far]),
        (lengths[far] - bounds[far]) * (1 - 1e-6),
        drifts[near],
    )

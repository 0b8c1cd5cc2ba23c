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
HEAD_ENERGY = 0.86  # share of the variance that the principal axes of a head hold
SCAN_ROWS = 1024  # of a task; their points stay in the second cache
LEFT_ROWS = 16384  # that the scan leaves to the lane kernel, copied at a time
LEAST_WORK = 2e9  # products of a step, below which the lane kernel is done before planes are packed
WIDEST = 16384  # features; beyond, the lane kernel
FINE_LENGTH = 46000  # of an axis: its products with rows of int16 fit 32 bits (scan.c)
SAMPLE = 1024  # rows whose mean and axes stand for all rows'
SCALED = 4096  # rows whose largest values do
JUDGED_ROWS = 256  # on which the lane kernel's time is measured
PROMISING = 0.8  # of the lane kernel's time
REPACKED = 0.8  # of a scan's time, for which rows are packed anew
SLOWING = 2.5  # times as far as they are about to move, centers have just moved
MARGIN = 0.012  # of the typical distance to the nearest center


class Embedding:
    """The map x -> y; |y(x) - y(c)| <= |x - c|, up to the bounds that it returns.

    Parameters
    ----------
    origin : (n_features,)
    axes : (n_features, n_axes) with orthonormal columns, or None for all coordinates as they are; those that
        are used are multiples of int16, all a little too short
    """

    def __init__(self, origin, axes=None, tail_origin=0.0):
        self.origin = np.ascontiguousarray(origin, dtype=np.float32)  # x - origin then rounds once
        self.tail_origin = tail_origin
        self.axes = self.packed_axes = None
        self.axes_scale = 0.0
        if axes is not None:
            self._pack_axes(axes)

    def _pack_axes(self, axes):
        """Sets axes (n_features, n_axes), a contraction, and packed_axes, of the same values."""
        n_features, n_axes = axes.shape
        shape = n_features + n_features % 2, -(-(n_axes + TAIL_COPIES) // 16) * 16
        levels = np.zeros(shape, dtype=np.int16)
        levels[:n_features, :n_axes] = np.rint(axes * FINE_LENGTH)
        self.packed_axes = np.ascontiguousarray(levels.reshape(-1, 2, levels.shape[1]).transpose(0, 2, 1))
        columns = np.ascontiguousarray(levels[:n_features, :n_axes].T)
        products = np.empty((n_axes, levels.shape[1]), dtype=np.int32)
        _kernels.native.project(columns, self.packed_axes, products)
        row_sums = np.abs(products.astype(np.float64)).sum(axis=1)
        sq_norm = row_sums.max()  # of the matrix, at most (Gershgorin 1931)
        self.axes_scale = float((1 - 1e-12) / np.sqrt(max(sq_norm, 1)))
        self.axes = self.axes_scale * columns.T

    @property
    def width(self):
        """Number of coordinates of y."""
        return len(self.origin) if self.axes is None else self.axes.shape[1] + TAIL_COPIES

    def __call__(self, X, n_threads=1):
        """Points Y (n_samples, width) float32 and bounds of |Y - y| (n_samples,) float32.

        Points of values too large are not finite: not served.
        """
        X = np.ascontiguousarray(X)
        Y, bounds = np.empty((len(X), self.width), dtype=np.float32), np.empty(len(X), dtype=np.float32)
        blocks.map_rows(
            lambda rows: _kernels.native.embed(X[rows], self, Y[rows], bounds[rows]),
            len(X),
            n_threads,
            2 * self.width,
        )
        return Y, bounds


@dataclass
class Plane:
    """int8 points of rows."""

    embedding: Embedding
    scale: float
    codes: np.ndarray  # (n_samples, units, 1, 4) or (n_blocks, units, 16, 4) uint8
    sq_norms: np.ndarray  # (n_samples,) int32, of the int8 points
    errors: np.ndarray  # (n_samples,) float32, |y - scale q|; inf for rows that are not to be scanned
    typical: float  # 99 % of the points are no longer
    fine: tuple  # codes (n_samples, n_features) int16, scales, errors and squared norms, of pack_fine


@dataclass
class Panels:
    """int8 points of centers, beside the centers themselves."""

    centers: np.ndarray  # (n_clusters, n_features) float64
    fine: tuple  # the same of the centers
    packed: np.ndarray  # (n_panels, 4 * units * columns) int8
    starts: np.ndarray  # (n_panels * columns,) int32
    scale: float
    error: float
    ids: np.ndarray  # (n_columns + n_far,) int32, which centers
    far_lengths: np.ndarray  # (n_far,) of the centers too long for the panels
    drifts: np.ndarray | None = None  # (n_columns,) how far each center has moved, falling
    moved: np.ndarray | None = None  # (n_clusters,) the same by center


class NearestCenters:
    """Nearest centers of the same rows, for centers that move; packs the rows once.

    Called with the labels of the step before (-1 where there was none), which it replaces. Squared distances
    are written where they come at no cost; the call returns whether they were.
    """

    def __init__(self, X, n_clusters, n_threads):
        self.X, self.n_clusters, self.n_threads = X, n_clusters, n_threads
        self.scans = pays(X, n_clusters)
        self.embeddings, self.tries_again = None, False
        self.plane = self.centers = self.packed = self.plain_seconds = None
        self.n_failures = self.n_successes = 0

    def forget(self):
        """Take the labels of the next call as given: the bounds are not of those."""
        self.centers = None

    def __call__(self, centers, labels, sq_distances):
        """Write the labels (n_samples,) int32 and, if True is returned, squared distances (n_samples,)."""
        centers = np.ascontiguousarray(centers, dtype=np.float64)
        plane = self._plane(centers, labels) if self.scans else None
        drifts = self._drifts(centers, labels[0] >= 0) if self.scans else None
        panels = None if plane is None else pack_centers(centers, plane, drifts, self.n_threads)
        self.centers = None if panels is None else centers
        if panels is None and blocks.runs_native(self.X):
            self.pack().nearest_centers(centers, labels)
        elif panels is None:
            blocks.nearest_centers(self.X, centers, self.n_threads, labels, sq_distances)
            return True
        else:
            self._scan(panels, labels)
        return False

    def _scan(self, panels, labels):
        margin = self._margin(panels.moved)
        unserved = []

        def assign(rows):
            left = _kernels.native.certified_nearest(
                self.X, self.plane, panels, rows.start, rows.stop, margin, labels, self.upper, self.lower
            )
            unserved.append(left)

        start = perf_counter()
        blocks.run_tasks(assign, len(self.X), len(self.X) // SCAN_ROWS, self.n_threads)
        left = np.sort(np.concatenate(unserved))
        for first in range(0, len(left), LEFT_ROWS):
            rows = left[first : first + LEFT_ROWS]
            labels[rows], sq_distances = blocks.nearest_centers(self.X[rows], panels.centers, self.n_threads)
            self.upper[rows] = np.sqrt(sq_distances) * (1 + 1e-9)
        self._judge(perf_counter() - start, panels.centers)

    def pack(self):
        """The rows packed for the lane kernel; kept where they are likely to come again."""
        if self.scans:
            return blocks.PackedRows(self.X, self.n_threads)
        if self.packed is None:
            self.packed = blocks.PackedRows(self.X, self.n_threads)
        return self.packed

    def _seconds_of_lanes(self, centers):
        """What the lane kernel would take for all rows, from its time for some, measured once."""
        if self.plain_seconds is None:
            rows = np.ascontiguousarray(self.X[blocks.evenly(len(self.X), JUDGED_ROWS)])
            start = perf_counter()
            blocks.nearest_centers(rows, centers)
            self.plain_seconds = (perf_counter() - start) * len(self.X) / len(rows) / self.n_threads
        return self.plain_seconds

    def _judge(self, seconds, centers):
        """Keep to the scan, or give it up, when it was twice faster, or twice slower, than the lane kernel.

        Labels do not depend on it.
        """
        if self.n_successes == 2:
            return
        too_slow = seconds > 0.9 * self._seconds_of_lanes(centers)
        self.n_failures += too_slow
        self.n_successes += not too_slow
        if self.n_failures == 2:
            self.scans, self.plane = False, None

    def _trial(self, embedding, centers, labels):
        """Seconds that the scan of all rows may take, from that of some; inf if it leaves many undone."""
        chosen = blocks.evenly(len(self.X), JUDGED_ROWS)
        rows, labels = np.ascontiguousarray(self.X[chosen]), labels[chosen].copy()
        plane = pack_plane(rows, embedding)
        drifts = np.full(len(centers), np.inf)
        panels = None if plane is None else pack_centers(centers, plane, drifts, self.n_threads)
        if panels is None:
            return np.inf
        upper, lower = np.full(len(rows), np.inf), np.zeros(len(rows))
        start = perf_counter()
        left = _kernels.native.certified_nearest(rows, plane, panels, 0, len(rows), 0.0, labels, upper, lower)
        seconds = (perf_counter() - start) * len(self.X) / len(rows) / self.n_threads
        return seconds if len(left) < len(rows) / 2 else np.inf

    def _drifts(self, centers, labelled):
        """How far each center has moved since the labels were found, (n_clusters,), at most."""
        if not labelled or self.centers is None or len(self.centers) != len(centers):
            self.upper, self.lower = np.full(self.X.shape[0], np.inf), np.zeros(self.X.shape[0])
            return np.full(len(centers), np.inf)
        sq_drifts, ids = np.empty(len(centers)), np.arange(len(centers), dtype=np.int32)
        blocks.row_sq_distances(centers, self.centers, ids, sq_drifts)
        return np.sqrt(sq_drifts) * (1 + 1e-9)

    def _margin(self, drifts):
        """How much beyond the nearest center others are worth finding, so that later steps may skip them.

        Pays as soon as many centers are about to move less than what it costs little to look around.
        """
        if not np.isfinite(drifts).all():
            return 0.0
        margin = MARGIN * float(self.upper.mean())
        return margin if np.quantile(drifts, 0.3) <= SLOWING * margin < np.inf else 0.0

    def _plane(self, centers, labels):
        """The plane to scan, by the embedding with which the scan of some rows is the fastest.

        None where the lane kernel is faster. A head that loses with the first centers, which may be rows of
        long tails, is tried again with their means.
        """
        labelled = labels[0] >= 0
        if self.plane is not None and not (self.tries_again and labelled):
            return self.plane
        if self.embeddings is None:
            self.embeddings = self._find_embeddings()
        seconds = np.array([self._trial(embedding, centers, labels) for embedding in self.embeddings])
        if self.plane is not None:
            seconds[0] *= REPACKED
        fastest = int(seconds.argmin())
        self.tries_again = fastest < len(self.embeddings) - 1 and not labelled
        if self.plane is None and not seconds[fastest] < PROMISING * self._seconds_of_lanes(centers):
            self.scans = False
        elif self.plane is None or fastest > 0:
            fine = None if self.plane is None else self.plane.fine
            self.plane = pack_plane(self.X, self.embeddings[fastest], self.n_threads, fine)
            self.scans = self.plane is not None
        return self.plane

    def _find_embeddings(self):
        """Of all features and, where there is one and it may save any time, the head."""
        everything = all_features(self.X)
        if not head_pays(self.X, self.n_clusters):
            return [everything]
        head = head_embedding(self.X, everything.origin, HEAD_ENERGY, self.n_threads)
        return [everything] if head is None else [everything, head]


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
def head_embedding(X, origin, energy, n_threads=1):
    """Embedding on the first principal axes of X, turned at random among themselves, and the tail.

    None where the axes that hold most of the variance are too many to save anything.
    """
    n_features = X.shape[1]
    rows, _ = Embedding(origin)(X[blocks.evenly(len(X), max(SAMPLE, 5 * n_features))])
    total = np.einsum("ij,ij->", rows, rows, dtype=np.float64)
    if not 0 < total < np.inf:
        return None
    axes, variances = principal_axes(rows, n_features // 2, n_threads)
    shares = np.cumsum(variances) / total
    step = max(16, 4 * _kernels.native.scan_shape()[2])  # of widths that leave no unit empty
    n_axes = -(-(int(np.searchsorted(shares, energy)) + 1 + TAIL_COPIES) // step) * step - TAIL_COPIES
    if n_axes > len(axes):
        return None
    tail = (total - variances[:n_axes].sum()) / len(rows)  # mean square of the rows' tails
    return turned_head(origin, axes[:n_axes], float(np.sqrt(max(tail, 0.0))), n_threads)


def turned_head(origin, axes, tail, n_threads=1):
    """Embedding on axes (n_axes, n_features), turned at random among themselves; tail: the length left."""
    turn = np.random.default_rng(0).standard_normal((len(axes), len(axes)))
    _kernels.native.orthonormalize(turn)
    turned = multiply(turn.astype(np.float32), axes.astype(np.float32), n_threads).astype(np.float64)
    _kernels.native.orthonormalize(turned)
    return Embedding(origin, turned.T, tail)


def principal_axes(rows, n_axes, n_threads=1):
    """Nearly the principal axes (n_axes, n_features), by falling variance, and the squares that they hold.

    Orthogonal iteration with the square of the scatter matrix, twice: what the axes miss of the variance that
    the best ones would hold is below 1 % of all.
    """
    scatter = multiply(np.ascontiguousarray(rows.T), rows, n_threads)  # (n_features, n_features)
    unit = scatter / np.float32(np.abs(scatter).max())  # whose square does not overflow
    square = multiply(unit, unit, n_threads)
    axes = np.random.default_rng(0).standard_normal((n_axes, rows.shape[1]))
    for _ in range(2):
        axes = multiply(axes.astype(np.float32), square, n_threads).astype(np.float64)
        _kernels.native.orthonormalize(axes)
    held = np.einsum("ij,ij->i", axes, multiply(axes.astype(np.float32), scatter, n_threads))
    order = np.argsort(-held)
    return axes[order], held[order]


def multiply(V, W, n_threads):
    """V W in float32, without a BLAS, whose threads would spin for a while and take a core from ours."""
    out = np.empty((len(V), W.shape[1]), dtype=np.float32)

    def multiply(part):
        _kernels.native.multiply(V[part], W, out[part])

    few = V.size * W.shape[1] / 25 < blocks.HANDING_NS
    blocks.run_tasks(multiply, len(V), 1 if few else n_threads, n_threads, multiple=8)
    return out


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
    sample, _ = embedding(X[blocks.evenly(n_samples, SCALED)], n_threads)
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
        aligned((-(-n_samples // lanes), units, lanes, 4)),
        np.empty(n_samples, dtype=np.int32),
        np.empty(n_samples, dtype=np.float32),
        typical,
        empty_fine(X.shape) if fine is None else fine,
    )
    plane.codes[n_samples // lanes :] = 128  # zeros, where the last block is not filled

    def pack(rows):
        _kernels.native.pack_plane(X, plane, rows.start, rows.stop, fine is None)

    blocks.map_rows(pack, n_samples, n_threads, 4 * embedding.width)
    return plane


def empty_fine(shape):
    """Codes (n_samples, n_features) int16, scales, errors and squared norms, (n_samples,) each."""
    n = shape[0]
    return np.empty(shape, np.int16), np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.int32)


def aligned(shape):
    """uint8 array that starts at a cache line: a unit of a block is one line."""
    memory = np.empty(int(np.prod(shape)) + 64, dtype=np.uint8)
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
        rows = X[served[blocks.evenly(len(served), SCALED)]]
        points, _ = plane.embedding(rows)
        largest = max(points.max(initial=0), -points.min(initial=0))
        scale = min(1.1 * float(largest), 127.5 * plane.scale) / largest_column
        if wraps:
            scale = max(scale, 2.2 * plane.typical**2 / (2**17 * plane.scale))
        sample = pack_candidates(rows[blocks.evenly(len(rows), SAMPLE)], plane, cls(scale, np.inf))
        return cls(scale, 1.05 * sample.error)


def pack_candidates(rows, plane, candidate_scale=None):
    """Panels of some rows; of infinite error where one of them is too long for the plane."""
    centers = np.ascontiguousarray(rows, dtype=np.float64)
    panels = Panels(centers, None, None, None, 0.0, np.inf, None, None)
    if plane is None:
        return panels
    Y, bounds, fine = _points_of_centers(centers, plane.embedding)
    if not np.abs(Y).max(initial=0) <= _kernels.native.scan_shape()[1] * candidate_scale.scale:
        return panels
    packed, starts, error = _pack_columns(Y, bounds, plane, candidate_scale.scale)
    ids = np.arange(len(rows), dtype=np.int32)
    return Panels(centers, fine, packed, starts, candidate_scale.scale, error, ids, np.empty(0))


@np.errstate(over="ignore", invalid="ignore")
def pack_centers(centers, plane, drifts, n_threads=1):
    """Panels of the centers for the scan of a plane; None where int8 points cannot serve."""
    _, largest_column, _, wraps = _kernels.native.scan_shape()
    Y, bounds, fine = _points_of_centers(centers, plane.embedding, n_threads)
    largest = np.abs(Y).max(axis=1)
    is_near = largest <= 2 * LONG * np.median(largest)
    order = np.argsort(-drifts, kind="stable")
    near, far = order[is_near[order]], np.flatnonzero(largest > 2 * LONG * np.median(largest))
    lengths = np.sqrt(np.einsum("ij,ij->i", Y, Y, dtype=np.float64))
    scale = max(float(largest[near].max(initial=0)) / largest_column, plane.scale / 64)
    if wraps:
        typical = float(np.quantile(lengths[near], 0.99))
        reach = plane.typical**2 + typical**2 + 0.6 * plane.typical * typical
        scale = max(scale, reach / (2**17 * plane.scale))
    too_many = len(far) > 16 or not np.isfinite(lengths).all()
    if not scale <= 64 * plane.scale or len(near) + len(far) < len(centers) or too_many:
        return None
    packed, starts, error = _pack_columns(Y[near], bounds[near], plane, scale)
    return Panels(
        centers,
        fine,
        packed,
        starts,
        scale,
        error,
        np.concatenate([near, far]).astype(np.int32),
        (lengths[far] - bounds[far]) * (1 - 1e-6),
        drifts[near],
        drifts,
    )


def _points_of_centers(centers, embedding, n_threads=1):
    """Points Y (n_clusters, width), their bounds (n_clusters,), and the fine points."""
    k = len(centers)
    Y, bounds = np.empty((k, embedding.width), dtype=np.float32), np.empty(k, dtype=np.float32)
    fine = empty_fine(centers.shape)

    def pack(part):
        _kernels.native.embed(centers[part], embedding, Y[part], bounds[part])
        _kernels.native.pack_fine(centers[part], embedding.origin, *[array[part] for array in fine])

    few = centers.size * (1 + embedding.width / 64) < blocks.HANDING_NS
    blocks.run_tasks(pack, k, 1 if few else n_threads, n_threads, multiple=8)
    return Y, bounds, fine


def _pack_columns(Y, bounds, plane, scale):
    """int8 points of columns: panels (n_panels, 4 * units * columns), starts, and the largest error."""
    columns, units = _kernels.native.scan_shape()[0], plane.codes.shape[1]
    n_panels = -(-len(Y) // columns)
    packed = np.zeros((n_panels, 4 * units * columns), dtype=np.int8)
    starts = np.zeros(n_panels * columns, dtype=np.int32)
    return packed, starts, _kernels.native.pack_columns(Y, scale, bounds, plane.scale, packed, starts)

"""First centers of k-means: greedy k-means++ and distinct random rows."""

from functools import lru_cache

import numpy as np
from scipy import sparse

from skivfpq import _kernels
from skivfpq._algorithms.blocks import HANDING_NS, PackedRows, map_rows, run_tasks, runs_native
from skivfpq._algorithms.planes import WIDEST, CandidateScale, all_features, pack_candidates, pack_plane
from skivfpq._kernels import pair_sq_distances, row_hashes

# Potentials that agree this well differ by the order of their additions only.
SAME = 1e-10
MASS_BLOCK = 256
EARLY, FAILURE = 8, 0.2  # steps, and the share of pairs evaluated beyond which the scan is no help
PART_ROWS = 3072  # whole tiles of 8, 16 or 48; gains are added part by part, for any number of threads alike


def hash_rows(X, n_threads=1, single=False):
    """Hashes of the rows, (n_samples,) uint64; equal rows have equal hashes. Of float32 values if single."""
    factors = _factors(X.shape[1])
    hashes = np.empty(X.shape[0], dtype=np.uint64)
    map_rows(
        lambda rows: row_hashes(X[rows], factors, single, hashes[rows]),
        X.shape[0],
        n_threads if runs_native(X) else 1,
        X.shape[1],
    )
    return hashes


@lru_cache(maxsize=16)
def _factors(n_features):
    return np.random.default_rng(0).integers(1 << 63, size=n_features, dtype=np.uint64) * 2 + 1


def canonical_order(X, n_threads=1):
    """Row numbers in an order that depends on the rows' values only, (n_samples,).

    By the hashes of the values rounded to float32 first, so that float64 rows and their float32 copies
    have the same order, and the same seed gives both the same centers.
    """
    with np.errstate(over="ignore"):
        rounded = hash_rows(X, n_threads, single=True)
    order = np.empty(len(rounded), dtype=np.int64)
    _kernels.order_by_hash(rounded, order)
    if X.dtype == np.float32:
        return order
    same = rounded[order[1:]] == rounded[order[:-1]]
    if same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        rows = order[tied]
        order[tied] = rows[np.lexsort((hash_rows(X[rows], n_threads), rounded[rows]))]
    return order


def too_few_distinct_rows(X, n_clusters, weights):
    """A row number for each distinct row of positive weight if those are fewer than n_clusters, else None."""
    positive = np.flatnonzero(weights > 0)
    for n_rows in (2 * n_clusters, len(positive)):  # a few rows settle it nearly always
        rows = positive[:n_rows]
        _, first = np.unique(hash_rows(X[rows]), return_index=True)
        if len(first) >= n_clusters:
            return None
    return rows[first]


def random_rows(X, n_clusters, weights, rng):
    """n_clusters row numbers without repetition, drawn by weight where weights differ."""
    if np.all(weights == weights[0]):
        return rng.choice(X.shape[0], n_clusters, replace=False)
    shares = np.where(weights > 0, np.maximum(weights / weights.sum(), 1e-300), 0)
    return rng.choice(X.shape[0], n_clusters, replace=False, p=shares / shares.sum())


@np.errstate(over="ignore", invalid="ignore")  # scores of values too large are not finite
def kmeans_plusplus(X, n_clusters, weights, rng, n_threads=1, packed=None):
    """Greedy k-means++ centers (Arthur and Vassilvitskii 2007), as in scikit-learn.

    The draws do not depend on the order of the rows: they invert the distribution function over the
    rows in the order of their hashes, and candidates of equal potential are tried in that order. So
    integer weights equal repeated rows. Fewer row numbers come back where fewer rows are distinct.

    Parameters
    ----------
    X : (n_samples, n_features) array or CSR
    weights : (n_samples,) not negative, not all zero
    rng : Generator
    packed : function that returns the PackedRows of X, for others to use too; None to make them here

    Returns
    -------
    centers : (n_clusters,) row numbers
    labels : (n_samples,) int32, the nearest center of each row, lowest index on ties
    closest : (n_samples,) squared distances to them
    """
    n_trials = 2 + int(np.log(n_clusters))
    mass = Mass(weights, canonical_order(X, n_threads))
    if runs_native(X):
        packed = packed or (lambda: PackedRows(X, n_threads))
        state = CertifiedSeeding(X, weights, n_clusters, n_threads, packed)
    else:
        state = Seeding(X, weights)
    first = mass.draw(rng.random(1))
    centers = [first[0]]
    state.look(first, np.inf)
    mass.update(*state.take(0))
    while len(centers) < n_clusters and mass.total() > 0:  # else every row of positive weight is at a center
        candidates = mass.draw(rng.random(n_trials))
        state.look(candidates, mass.total())
        gains = state.gains()  # what each takes off the potential, the sum of mass
        best = (gains >= gains.max() - SAME * mass.total()).argmax()
        centers.append(candidates[best])
        mass.update(*state.take(best))
    return np.array(centers), state.labels, state.closest


class Mass:
    """Weighted squared distances of the rows, in canonical order, to draw rows by; the weights at first."""

    def __init__(self, weights, order):
        self.weights, self.order = weights, order
        self.ranks = np.empty(len(order), dtype=np.int64)  # where a row stands in the order
        self.ranks[order] = np.arange(len(order))
        n_blocks = -(-len(order) // MASS_BLOCK)
        self.blocks = np.zeros((n_blocks, MASS_BLOCK))
        self.sums, self.cumulated = np.zeros(n_blocks), np.empty(n_blocks)  # of blocks
        self.update(np.arange(len(order), dtype=np.int32), np.ones(len(order)))

    def update(self, rows, sq_distances):
        """Take over new squared distances of some rows."""
        _kernels.update_mass(
            rows, sq_distances, self.weights, self.ranks, self.blocks, self.sums, self.cumulated
        )

    def total(self):
        """Sum over all rows."""
        return self.cumulated[-1]

    def draw(self, uniforms):
        """Rows in proportion to their mass, one for each number in [0, 1), in canonical order."""
        ranks = np.empty(len(uniforms), dtype=np.int64)
        _kernels.draw_mass(self.blocks, self.cumulated, uniforms, ranks)
        ranks.sort()
        return self.order[ranks]


class Seeding:
    """Squared distances to the closest center so far, computed only where candidates can lower them.

    Matrix products give |x - c|^2 up to rounding; rows that could come closer than they are get it by
    differences.
    """

    def __init__(self, X, weights):
        self.X, self.weights = X, weights
        self.closest = np.full(X.shape[0], np.inf)
        self.labels = np.full(X.shape[0], -1, dtype=np.int32)
        self.n_centers = 0
        if sparse.issparse(X):
            self.shifted = X.astype(np.float64)
            self.sq_norms = np.asarray(self.shifted.multiply(self.shifted).sum(axis=1)).ravel()
        else:
            self.shifted = X - X.mean(axis=0, dtype=np.float64)  # (n_samples, n_features) float64
            self.sq_norms = np.einsum("ij,ij->i", self.shifted, self.shifted)

    def look(self, candidates, potential):
        """Find the rows that are closer to each of the candidate rows."""
        self.closer = self.to_rows(candidates, np.tile(self.closest, (len(candidates), 1)))

    def gains(self):
        """What each candidate takes off the weighted sum of closest, (n_candidates,)."""
        return ((self.closest - self.closer) * self.weights).sum(axis=1)

    def take(self, i):
        """Make the i-th candidate a center; returns the rows that came closer, and their distances."""
        rows = np.flatnonzero(self.closer[i] < self.closest).astype(np.int32)
        self.labels[rows] = self.n_centers
        self.closest = self.closer[i]
        self.n_centers += 1
        return rows, self.closest[rows]

    def to_rows(self, candidates, closest):
        """Lower closest (n_candidates, n_samples) to the distances from the candidates; return it."""
        chosen = self.shifted[candidates]
        chosen = chosen.toarray() if sparse.issparse(chosen) else chosen
        products = (self.shifted @ chosen.T).T  # (n_candidates, n_samples)
        terms = self.sq_norms[candidates][:, None] + self.sq_norms
        error = 4 * (self.X.shape[1] + 8) * np.finfo(np.float64).eps * terms
        which, rows = np.nonzero(terms - 2 * products - error < closest)
        exact = np.empty(len(rows))
        centers = self.X[candidates].toarray() if sparse.issparse(self.X) else self.X[candidates]
        pair_sq_distances(self.X, rows, centers.astype(np.float64), which, exact)
        closest[which, rows] = np.minimum(closest[which, rows], exact)
        return closest


class CertifiedSeeding:
    """The same by certified scores: most rows are shown not to come closer by products of 8 bits or floats.

    By the int8 scan of a plane where that pays, else by the lane kernel's scores.
    """

    def __init__(self, X, weights, n_clusters, n_threads, packed):
        n_samples, n_trials = X.shape[0], 2 + int(np.log(n_clusters))
        self.X, self.weights, self.n_threads = X, weights, n_threads
        self.closest = np.full(n_samples, np.inf)
        self.labels = np.full(n_samples, -1, dtype=np.int32)
        self.n_centers = 0
        self.make_packed = packed
        self.packed = self.limits = self.hits = None
        self.plane, self.candidate_scale = None, CandidateScale(0.0, 0.0)
        if n_samples >= 1024 and n_clusters >= 20 and 32 <= X.shape[1] <= WIDEST:
            self.plane = pack_plane(X, all_features(X), n_threads, lanes=16)
        if self.plane is not None:
            self.candidate_scale = CandidateScale.of(X, self.plane)
        size = 0 if self.plane is None else -(-n_samples // 16) * 16
        self.thresholds = np.full(size, np.iinfo(np.int32).min // 2, dtype=np.int32)  # every candidate is
        self.caps = np.full(size, 65535, dtype=np.int32)  # looked at
        # Written in the first steps only, where candidates win many rows.
        self.rows = np.empty((n_trials, n_samples), dtype=np.int32)
        self.sq_distances = np.empty((n_trials, n_samples))
        self.n_parts = -(-n_samples // PART_ROWS)
        self.n_failures = self.n_long = 0

    def look(self, candidates, potential):
        """Find the rows that are closer to each candidate row that may take most off the potential."""
        self._leave_plane_in_vain()
        plane, panels = self.plane, pack_candidates(self.X[candidates], self.plane, self.candidate_scale)
        if plane is not None and panels.error > self.candidate_scale.error:
            plane = None  # too long for the plane
        elif plane is not None:
            panels.error = self.candidate_scale.error
        if plane is None and self.packed is None:
            self._do_without_plane()
        self.wanted = np.ones(len(candidates), dtype=bool)
        if plane is None and self.packed is not None and self.n_centers > 0:
            self.wanted = self._score(panels.centers, self.rounding[candidates], potential)
        self.n_closer = np.empty((self.n_parts, len(candidates)), dtype=np.int64)
        self.part_gains = np.empty((self.n_parts, len(candidates)))
        self.evaluated = []

        def evaluate(parts):
            evaluated = _kernels.native.closer_candidates(
                self.X, plane, panels, self.thresholds, self.caps, self.hits, self.wanted.view(np.uint8),
                self.closest, self.weights, PART_ROWS, parts.start, parts.stop, self.rows, self.sq_distances,
                self.n_closer, self.part_gains,
            )  # fmt: skip
            self.evaluated.append(evaluated)

        n_samples, n_features = self.X.shape
        scan_ns = 0.02 * n_features * len(candidates) if plane is not None else 0
        self._map_parts(evaluate, n_samples * (10 + 0.3 * n_features + scan_ns))

    def _map_parts(self, function, ns):
        n_threads = self.n_threads if ns >= HANDING_NS and self.n_parts > 1 else 1
        run_tasks(function, self.n_parts, 4 * n_threads, n_threads, multiple=1)

    def _do_without_plane(self):
        """Evaluate all rows while that is seldom, else pack them for the lane kernel and leave the plane."""
        height, panel = _kernels.native.tile_rows(), _kernels.native.panel_centers()
        shape = -(-len(self.closest) // height), -(-len(self.rows) // panel) * panel
        self.hits = np.full(shape, ~np.uint64(0))  # all rows; for the first center, or once
        self.n_long += 1
        if self.plane is None or self.n_long > EARLY:
            self.plane = None
            self._pack()

    def _pack(self):
        """Rows for the lane kernel, and the limits of its scores."""
        self.packed = self.make_packed()
        n_tiles, _, height = self.packed.tiles.shape
        self.limits = np.full(n_tiles * height, np.inf, dtype=np.float32)
        self.limits[len(self.closest) :] = -np.inf  # rows that only fill the last tile
        self.weights32 = np.zeros(n_tiles * height, dtype=np.float32)
        self.weights32[: len(self.weights)] = self.weights
        self._set_rounding_of_gains()
        if self.n_centers > 0:
            self._set_closest(np.arange(len(self.closest), dtype=np.int32), self.closest.copy())

    def _set_rounding_of_gains(self):
        """By how much scores make half a gain, in the unit of packed, too high at most: for each candidate.

        The scores' rounding twice, since the limits allow for it (lanes.c); the limits' own, and underflow.
        """
        n_features, unit = self.X.shape[1], np.square(self.packed.scale)  # inf for tiny values
        sq_lengths = np.square(self.packed.lengths)
        weight, sq_length = self.weights.sum(), self.weights @ sq_lengths
        score = (n_features + 10) * 2.0**-24 * 1.01
        underflow = n_features * 2.0**-1072 * unit + 2.0**-98
        self.rounding = 3 * score * weight * sq_lengths + (score + 4e-7) * sq_length + underflow * weight

    def _score(self, candidates, rounding, potential):
        """Which candidates may have the largest gain, by float scores; sets hits."""
        gains = np.empty((self.n_parts, self.hits.shape[1]))

        def score(parts):
            _kernels.native.score_candidates(
                self.X, self.packed, candidates, self.limits, self.weights32, PART_ROWS, parts.start,
                parts.stop, self.hits, gains,
            )  # fmt: skip

        n_samples, n_features = self.X.shape
        self._map_parts(score, n_samples * len(candidates) * (1 + 0.04 * n_features))
        most, potential = gains.sum(axis=0)[: len(candidates)], potential * np.square(self.packed.scale)
        errors = rounding + 4e-7 * potential + 3e-6 * most  # of limits, and of sums in float32
        return ~(most + errors < (most - errors).max() - SAME * potential)  # all where not finite

    def _leave_plane_in_vain(self):
        """Go on without the plane where its bound has excluded too little."""
        if self.plane is None or self.n_centers < EARLY:
            return
        self.n_failures += sum(self.evaluated) > FAILURE * self.n_closer.shape[1] * len(self.closest)
        if self.n_failures > EARLY:
            self.plane = None

    def gains(self):
        """What each candidate takes off the potential, (n_candidates,); -inf for those not looked at."""
        return np.where(self.wanted, self.part_gains.sum(axis=0), -np.inf)

    def take(self, i):
        """Make the i-th candidate a center; returns the rows that came closer, and their distances."""
        rows, sq_distances = self.rows[i], self.sq_distances[i]
        n = self.n_closer[0, i]
        if self.n_parts > 1:
            n = _kernels.native.join_parts(rows, sq_distances, self.n_closer[:, i], PART_ROWS)
        rows, sq_distances = rows[:n], sq_distances[:n]
        self.labels[rows] = self.n_centers
        self._set_closest(rows, sq_distances)
        self.n_centers += 1
        return rows, sq_distances

    def _set_closest(self, rows, sq_distances):
        _kernels.native.set_closest(
            self.X, self.plane, self.packed, self.candidate_scale.scale, self.candidate_scale.error, rows,
            sq_distances, self.closest, self.thresholds, self.caps, self.limits,
        )  # fmt: skip

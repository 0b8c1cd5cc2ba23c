"""First centers of k-means: greedy k-means++ and distinct random rows."""

import numpy as np
from scipy import sparse

from skivfpq._kernels import pair_sq_distances, row_hashes

# Potentials that agree this well differ by the order of their additions only.
SAME = 1e-10


def hash_rows(X):
    """Hashes of the rows, (n_samples,) uint64; equal rows have equal hashes."""
    factors = np.random.default_rng(0).integers(1 << 63, size=X.shape[1], dtype=np.uint64) * 2 + 1
    hashes = np.empty(X.shape[0], dtype=np.uint64)
    row_hashes(X, factors, hashes)
    return hashes


def canonical_order(X):
    """Row numbers in an order that depends on the rows' values only, (n_samples,).

    By the hashes of the values rounded to float32 first, so that float64 rows and their float32 copies
    have the same order, and the same seed gives both the same centers.
    """
    with np.errstate(over="ignore"):
        rounded = hash_rows(X.astype(np.float32))
    if X.dtype == np.float32:
        return np.argsort(rounded, kind="stable")
    return np.lexsort((hash_rows(X), rounded))


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


def kmeans_plusplus(X, n_clusters, weights, rng):
    """Row numbers of greedy k-means++ centers (Arthur and Vassilvitskii 2007), as in scikit-learn.

    The draws do not depend on the order of the rows: they invert the distribution function over the
    rows in the order of their hashes, and candidates of equal potential are tried in that order. So
    integer weights equal repeated rows. Fewer row numbers come back where fewer rows are distinct.

    Parameters
    ----------
    X : (n_samples, n_features) array or CSR
    weights : (n_samples,) not negative, not all zero
    rng : Generator
    """
    n_trials = 2 + int(np.log(n_clusters))
    order = canonical_order(X)
    rank = np.argsort(order)  # where a row stands in it
    distances = CandidateDistances(X)
    centers = _draw(weights, order, rng.random(1))
    closest = distances.to_rows(centers, np.full((1, X.shape[0]), np.inf))[0]  # (n_samples,)
    while len(centers) < n_clusters:
        mass = weights * closest
        if not mass.any():
            break  # every row of positive weight is at a center
        candidates = _draw(mass, order, rng.random(n_trials))
        candidates = candidates[np.argsort(rank[candidates])]
        closer = distances.to_rows(candidates, np.tile(closest, (n_trials, 1)))  # (n_trials, n_samples)
        potentials = (closer * weights).sum(axis=1)
        best = np.argmax(potentials <= potentials.min() * (1 + SAME))
        centers = np.append(centers, candidates[best])
        closest = closer[best]
    return centers


def _draw(mass, order, uniforms):
    """Rows drawn in proportion to their mass, one for each of the uniform numbers in [0, 1)."""
    cumulated = np.cumsum(mass[order])
    places = np.searchsorted(cumulated, uniforms * cumulated[-1], side="right")
    last = np.searchsorted(cumulated, cumulated[-1])  # the last row that adds any mass
    return order[np.minimum(places, last)]


class CandidateDistances:
    """Squared distances from some rows of X to all rows, computed only where they can shrink.

    Matrix products give |x - c|^2 up to rounding; rows that could come closer than they are get it by
    differences.
    """

    def __init__(self, X):
        self.X = X
        if sparse.issparse(X):
            self.shifted = X.astype(np.float64)
            self.sq_norms = np.asarray(self.shifted.multiply(self.shifted).sum(axis=1)).ravel()
        else:
            self.shifted = X - X.mean(axis=0, dtype=np.float64)  # (n_samples, n_features) float64
            self.sq_norms = np.einsum("ij,ij->i", self.shifted, self.shifted)

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

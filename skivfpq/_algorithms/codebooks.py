"""Product quantization: subspaces, their codebooks, codes, tables and rotations."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from skivfpq._algorithms.blocks import evenly, map_rows, nearest_ns, run_tasks, runs_native
from skivfpq._algorithms.lloyd import GrowingStep, lloyd
from skivfpq._algorithms.seeding import random_rows, too_few_distinct_rows
from skivfpq._kernels import encode, row_blocks, sq_distance_matrix

ACCELERATED = 0.56  # steps that reach the error of one plain Lloyd step, samples included
SAMPLED = 24  # rows for each codeword that a sample must have
ALTERNATED = 256  # rows for each codeword from which OPQ learns its rotation, or 40 for each feature
N_ALTERNATIONS = 20  # of OPQ: later ones lower the error by less than 0.1 % each


def subspace_slices(n_features, n_subspaces):
    """Column slices of the subspaces, as ``numpy.array_split`` cuts: sizes differ by one at most."""
    bounds = np.cumsum([0] + [len(part) for part in np.array_split(np.arange(n_features), n_subspaces)])
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def train_codebooks(X, slices, n_codewords, *, max_iter, rng, n_threads, report):
    """One k-means in each subspace, from random distinct rows; on samples of the rows first.

    Returns
    -------
    codebooks : list of (n_codewords, subspace_dim), fewer codewords where fewer rows are distinct
    n_iter : int, most iterations of any subspace
    """
    first, weights = [], np.ones(len(X))
    for columns in slices:
        rows = X[:, columns]
        chosen = too_few_distinct_rows(rows, n_codewords, weights)
        chosen = random_rows(rows, n_codewords, weights, rng) if chosen is None else chosen
        first.append(np.ascontiguousarray(rows[chosen]))
    stages = _stages(len(X), n_codewords, max_iter)
    order = rng.permutation(len(X)) if len(stages) > 1 else None
    return refine_codebooks(X, slices, first, stages=stages, order=order, n_threads=n_threads, report=report)


def _stages(n_samples, n_codewords, max_iter):
    """Rows and steps, (n_rows, n_steps) each: fewer than max_iter, the steps being accelerated."""
    n_steps = max(min(max_iter, 4), round(ACCELERATED * max_iter))
    stages, n_left = [], n_steps
    for divisor, share in ((8, 5 / 14), (2, 5 / 14)):
        n = min(round(share * n_steps), n_left - 4)
        if n > 0 and n_samples // divisor >= SAMPLED * n_codewords:
            stages.append((n_samples // divisor, n))
            n_left -= n
    return [*stages, (n_samples, n_left)]


def refine_codebooks(X, slices, codebooks, *, stages, order=None, n_threads, report=None):
    """Accelerated Lloyd iterations in each subspace from given codebooks; returns codebooks and n_iter."""
    outer, inner = (n_threads, 1) if len(slices) >= n_threads else (1, n_threads)
    results, n_steps = [None] * len(slices), sum(n for _, n in stages)

    def refine(subspaces):
        for m in range(subspaces.start, subspaces.stop):
            rows = np.ascontiguousarray(X[:, slices[m]])
            step = GrowingStep(rows, stages, order, inner, len(codebooks[m]))
            found, moments, n_iter = lloyd(step, codebooks[m], max_iter=n_steps, tol=0.0, accelerated=True)
            inertia = None if report is None else (moments or step(found)).inertia()
            results[m] = found, inertia, n_iter

    run_tasks(refine, len(slices), len(slices), outer, multiple=1)
    for m, (_, inertia, n_iter) in enumerate(results):
        if report is not None:
            report(f"Subspace {m}: {n_iter} iterations, squared error {inertia / len(X):.6g} a row.")
    return [codewords for codewords, _, _ in results], max(n_iter for _, _, n_iter in results)


@dataclass(frozen=True, eq=False)
class Codebooks:
    """Codewords of all subspaces, and the rotation that comes first."""

    slices: list  # of columns, one for each subspace
    codewords: list  # of (n_codewords, subspace_dim), one for each subspace
    rotation: np.ndarray | None  # (n_features, n_features)

    @property
    def dtype(self):
        """Of the codewords and of decoded rows."""
        return self.codewords[0].dtype

    @property
    def eps(self):
        """Relative rounding of decoded rows, and of the rotation if there is one."""
        n_features = self.slices[-1].stop
        rotated = 0 if self.rotation is None else 4 * n_features * _rotation_unit(n_features) ** 2
        return np.finfo(self.dtype).eps + rotated

    @property
    def n_codewords(self):
        """Most codewords of a subspace."""
        return max(len(codewords) for codewords in self.codewords)

    def encode(self, X, n_threads, codes=None):
        """Number of the nearest codeword in each subspace, (n_samples, n_subspaces)."""
        if codes is None:
            codes = np.empty((len(X), len(self.slices)), np.uint8 if self.n_codewords <= 256 else np.uint16)
        columns = np.array([part.start for part in self.slices] + [self.slices[-1].stop])
        codewords = np.concatenate([part.ravel() for part in self.codewords]).astype(np.float64)
        first_codewords = np.cumsum([0] + [len(part) for part in self.codewords])

        def encode_rows(rows):
            rotated = np.ascontiguousarray(rotate(X[rows], self.rotation))
            encode(rotated, columns, codewords, first_codewords, codes[rows])

        row_ns = sum(map(nearest_ns, self.codewords))
        map_rows(encode_rows, len(X), n_threads if runs_native(X) else 1, row_ns)
        return codes

    def decode(self, codes):
        """Concatenated codewords, rotated back, (n_samples, n_features)."""
        decoded = np.empty((len(codes), self.slices[-1].stop), dtype=self.dtype)
        for m, columns in enumerate(self.slices):
            decoded[:, columns] = self.codewords[m][codes[:, m]]
        return decoded if self.rotation is None else rotate(decoded, self.rotation.T)

    def distance_tables(self, X, n_codewords):
        """Squared distance of each row's m-th part to each codeword, (n_samples, n_subspaces, n_codewords).

        +inf stands for codewords that were not learnt.
        """
        rotated = rotate(X, self.rotation)
        tables = np.full((len(X), len(self.slices), n_codewords), np.inf)
        for m, columns in enumerate(self.slices):
            part = np.empty((len(X), len(self.codewords[m])))
            sq_distance_matrix(rotated[:, columns], self.codewords[m].astype(np.float64), part)
            tables[:, m, : len(self.codewords[m])] = part
        return tables

    def product_tables(self, X):
        """Product of each row's m-th part with each codeword, (n_samples, n_subspaces, n_codewords)."""
        rotated = rotate(X, self.rotation)
        tables = np.zeros((len(X), len(self.slices), self.n_codewords))
        for m, columns in enumerate(self.slices):
            tables[:, m, : len(self.codewords[m])] = (
                rotated[:, columns] @ self.codewords[m].astype(np.float64).T
            )
        return tables


def rotate(X, rotation):
    """X @ rotation in the dtype of X, with the same bits for a row in every batch.

    Matrix products round as they please, which would break ties between equal rows. Here both factors
    are cut into two pieces of so few bits that every product and every sum is exact in float64.
    Right to about 2^-40 of a row's largest value. X itself without a rotation.
    """
    if rotation is None:
        return X
    unit = _rotation_unit(len(rotation))
    high, low = _two_pieces(rotation, unit)
    rotated = np.empty((len(X), rotation.shape[1]), dtype=X.dtype)
    for block in row_blocks(len(X), X.shape[1]):
        rows = X[block].astype(np.float64)
        _, exponents = np.frexp(np.abs(rows).max(axis=1, keepdims=True))
        x_high, x_low = _two_pieces(np.ldexp(rows, -exponents), unit)
        rotated[block] = np.ldexp(x_high @ high + (x_high @ low + x_low @ high), exponents)
    return rotated


def _rotation_unit(n_features):
    """Grain of the pieces: products of two of them, added up over the features, fit 53 bits."""
    return 0.5 ** ((53 - int(np.ceil(np.log2(n_features)))) // 2)


def _two_pieces(values, unit):
    """Values up to one as a multiple of unit and one of unit squared, what is left being dropped."""
    high = np.rint(values / unit) * unit
    return high, np.rint((values - high) / unit**2) * unit**2


def random_rotation(n_features, rng):
    """A rotation drawn uniformly (Haar): QR of a Gaussian matrix, signs fixed."""
    q, r = np.linalg.qr(rng.standard_normal((n_features, n_features)))
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def pca_rotation(X, slices):
    """Principal axes, dealt to the subspaces so that their variances' products balance.

    Parametric OPQ's eigenvalue allocation (Ge et al. 2013, section 3.2): axes by falling variance,
    each to the subspace of least product so far that has room.
    """
    mean = X.mean(axis=0, dtype=np.float64)
    scatter = np.zeros((X.shape[1], X.shape[1]))
    for block in row_blocks(len(X), X.shape[1]):
        scatter += (X[block] - mean).T @ (X[block] - mean)
    variances, axes = np.linalg.eigh(scatter)
    floor = max(variances[-1], np.finfo(np.float64).tiny) * 1e-12
    log_products = np.zeros(len(slices))
    dealt = [[] for _ in slices]
    for axis in np.argsort(-variances, kind="stable"):
        room = [len(dealt[m]) < columns.stop - columns.start for m, columns in enumerate(slices)]
        m = np.argmin(np.where(room, log_products, np.inf))
        dealt[m].append(axis)
        log_products[m] += np.log(max(variances[axis], floor) / floor)
    return axes[:, np.concatenate(dealt)]


def optimize_rotation(X, rotation, slices, codebooks, n_threads):
    """Optimized product quantization (Ge et al. 2013, section 3.1.1), from a rotation and its codebooks.

    Alternates (a) one Lloyd step of the codebooks on the rotated rows and (b) the rotation that brings
    the rows closest to their decoded selves (orthogonal Procrustes); both lower the error.

    Returns
    -------
    rotation : (n_features, n_features)
    codebooks : list of (n_codewords, subspace_dim)
    """
    X = X[evenly(len(X), max(ALTERNATED * max(map(len, codebooks)), 40 * X.shape[1]))]
    mean = X.mean(axis=0, dtype=np.float64)
    centered = (X - mean).astype(X.dtype)  # so that products in its dtype are right to its spread
    codebooks = _shifted(codebooks, slices, -(mean @ rotation))
    for _ in range(N_ALTERNATIONS):
        rotated = centered @ rotation.astype(X.dtype)
        codebooks, _ = refine_codebooks(rotated, slices, codebooks, stages=[(len(X), 1)], n_threads=n_threads)
        unrotated = Codebooks(slices, codebooks, None)
        decoded = unrotated.decode(unrotated.encode(rotated, n_threads))
        u, _, v = np.linalg.svd(_cross_products(centered, decoded))
        rotation = u @ v
    return rotation, _shifted(codebooks, slices, mean @ rotation)


def _shifted(codebooks, slices, shift):
    """Codebooks plus a vector (n_features,)."""
    return [(part + shift[columns]).astype(part.dtype) for part, columns in zip(codebooks, slices)]


def _cross_products(X, Y):
    """X.T @ Y (n_features, n_features), float64 sums over blocks of rows."""
    products = np.zeros((X.shape[1], Y.shape[1]))
    for start in range(0, len(X), 4096):
        products += X[start : start + 4096].T @ Y[start : start + 4096]
    return products

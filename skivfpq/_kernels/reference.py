"""Every kernel in NumPy: the readable specification, the oracle of the tests, the fallback.

Kernels take validated arrays, write into arrays that the caller allocated (OUT) and return nothing.
Distances are sums of squared differences in float64, so that they do not cancel; matrix products only
decide what such a sum need not be computed for, and only beyond what rounding can do to them.
``native.pyx`` has the same functions, compiled, for those that pay.
"""

import numpy as np
from scipy import sparse

UNIT = np.finfo(np.float64).eps / 2
UNDERFLOW = 1e-290  # more than products below the smallest normal number can add up to
BLOCK_ELEMENTS = 1 << 20  # 8 MB of float64: temporary arrays stay near the cache


def row_blocks(n_rows, row_elements):
    """Slices that cut n_rows rows into blocks of about BLOCK_ELEMENTS elements."""
    height = max(1, BLOCK_ELEMENTS // max(1, row_elements))
    return [slice(start, min(start + height, n_rows)) for start in range(0, n_rows, height)]


def dense_rows(X, rows):
    """Rows of an array or a CSR matrix as float64, (n_rows, n_features)."""
    block = X[rows]
    return block.toarray().astype(np.float64) if sparse.issparse(X) else block.astype(np.float64)


def pair_sq_distances(X, rows, centers, columns, out):
    """out[i] = |X[rows[i]] - centers[columns[i]]|^2, by differences.

    X : IN (n_samples, n_features) array or CSR
    rows, columns : IN (n_pairs,) or slices of that length
    centers : IN (n_centers, n_features)
    out : OUT (n_pairs,) float64
    """
    for block in row_blocks(len(out), X.shape[1]):
        differences = dense_rows(X, rows[block]) - centers[columns[block]]  # (n_block, n_features)
        np.square(differences, out=differences)
        differences.sum(axis=-1, out=out[block])


def row_sq_distances(X, centers, labels, out):
    """out[i] = |X[i] - centers[labels[i]]|^2 for every row.

    Dense rows by differences. CSR rows by |x|^2 - 2 x.c + |c|^2, where that does not cancel.
    """
    if not sparse.issparse(X):
        return pair_sq_distances(X, np.arange(len(labels)), centers, labels, out)
    sq_norms = csr_sq_norms(X)
    center_norms = np.einsum("ij,ij->i", centers, centers)[labels]
    row_of_value = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
    products = X.data * centers[labels[row_of_value], X.indices]
    out[:] = sq_norms - 2 * np.bincount(row_of_value, products, X.shape[0]) + center_norms
    cancelled = np.flatnonzero(out < CANCELLATION * (sq_norms + center_norms))
    exact = np.empty(len(cancelled))
    pair_sq_distances(X, cancelled, centers, labels[cancelled], exact)
    out[cancelled] = exact


# A sum |x|^2 - 2 x.c + |c|^2 below this share of its terms is computed again by differences, so that
# every distance is right to about d * 1e-12 relative.
CANCELLATION = 1e-4


def csr_sq_norms(X):
    """Squared norms of CSR rows, (n_samples,) float64."""
    row_of_value = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
    return np.bincount(row_of_value, X.data.astype(np.float64) ** 2, X.shape[0])


def row_norms(X):
    """Lengths of dense rows, (n_samples,) float64; no square over- or underflows."""
    rows, exponents = scaled_rows(X)
    return np.ldexp(np.sqrt(np.square(rows).sum(axis=1)), exponents)


def scaled_rows(X):
    """Dense rows times a power of two that brings their largest value to [1/2, 1), and its exponent."""
    _, exponents = np.frexp(np.abs(X, dtype=np.float64).max(axis=1))
    return np.ldexp(X.astype(np.float64), -exponents[:, None]), exponents


def unit_rows(X):
    """Rows of length one, array (float64) or CSR (its dtype); rows of zeros stay."""
    if not sparse.issparse(X):
        rows, _ = scaled_rows(X)
        norms = np.sqrt(np.square(rows).sum(axis=1))
        return rows / np.where(norms > 0, norms, 1)[:, None]
    row_of_value = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
    largest = np.zeros(X.shape[0])
    np.maximum.at(largest, row_of_value, np.abs(X.data))
    _, exponents = np.frexp(largest)
    values = np.ldexp(X.data.astype(np.float64), -exponents[row_of_value])
    norms = np.sqrt(np.bincount(row_of_value, values**2, X.shape[0]))
    unit = X.copy()
    unit.data = (values / np.where(norms > 0, norms, 1)[row_of_value]).astype(X.dtype)
    return unit


def is_zero_row(X):
    """Which rows hold nothing but zeros, (n_samples,) bool."""
    if not sparse.issparse(X):
        return ~X.any(axis=1)
    row_of_value = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
    return np.bincount(row_of_value, X.data != 0, X.shape[0]) == 0


def sq_distance_matrix(X, centers, out):
    """out[i, j] = |X[i] - centers[j]|^2, right to 1e-10 relative whatever the offset of the data.

    X : IN (n_samples, n_features) array or CSR
    centers : IN (n_centers, n_features) float64
    out : OUT (n_samples, n_centers) float64
    """
    origin = np.zeros(X.shape[1]) if sparse.issparse(X) else centers.mean(axis=0)
    shifted = centers - origin
    center_norms = np.einsum("ij,ij->i", shifted, shifted)
    for block in row_blocks(X.shape[0], max(centers.shape)):
        rows = X[block] if sparse.issparse(X) else X[block] - origin
        sq_norms = csr_sq_norms(rows) if sparse.issparse(X) else np.einsum("ij,ij->i", rows, rows)
        terms = sq_norms[:, None] + center_norms
        out[block] = terms - 2 * (rows @ shifted.T)
        i, j = np.nonzero(out[block] <= CANCELLATION * terms + UNDERFLOW)
        exact = np.empty(len(i))
        pair_sq_distances(X, i + block.start, centers, j, exact)
        out[i + block.start, j] = exact


def nearest_centers(X, centers, labels, sq_distances):
    """Label each row with its nearest center, lowest index on ties.

    Rows whose two best scores are closer than rounding allows get all their distances by differences:
    labels are the argmin of ``np.square(x - centers).sum(axis=1)``, bit for bit.

    X : IN (n_samples, n_features) array or CSR
    centers : IN (n_clusters, n_features) float64
    labels : OUT (n_samples,) int32
    sq_distances : OUT (n_samples,) float64, or None
    """
    n_features = X.shape[1]
    origin = np.zeros(n_features) if sparse.issparse(X) else centers.mean(axis=0)
    shifted = centers - origin
    half_norms = np.einsum("ij,ij->i", shifted, shifted) / 2
    longest = np.sqrt(2 * half_norms.max())
    for block in row_blocks(X.shape[0], 8 * max(centers.shape)):  # 1 MB of scores: three passes from cache
        rows = X[block] if sparse.issparse(X) else X[block] - origin
        lengths = np.sqrt(csr_sq_norms(rows) if sparse.issparse(X) else np.einsum("ij,ij->i", rows, rows))
        scores = half_norms - rows @ shifted.T  # (n_block, n_clusters): half of |x - c|^2 - |x|^2
        labels[block] = scores.argmin(axis=1)
        best = scores[np.arange(len(scores)), labels[block]]
        scores[np.arange(len(scores)), labels[block]] = np.inf
        reach = lengths + longest
        error = (n_features + 8) * UNIT * (longest * reach + reach**2)
        certain = scores.min(axis=1) - best > 2 * error + UNDERFLOW
        _label_by_differences(X, np.flatnonzero(~certain) + block.start, centers, labels)
    if sq_distances is not None:
        row_sq_distances(X, centers, labels, sq_distances)


def _label_by_differences(X, rows, centers, labels):
    for block in row_blocks(len(rows), centers.size):
        differences = dense_rows(X, rows[block])[:, None, :] - centers
        labels[rows[block]] = np.square(differences, out=differences).sum(axis=-1).argmin(axis=1)


def cluster_sums(X, weights, order, bounds, clusters, sums, counts):
    """Weighted sum and total weight of the rows of some clusters, rows added in their order.

    X : IN (n_samples, n_features) array or CSR
    weights : IN (n_samples,)
    order : IN (n_samples,) rows by cluster, bounds : IN (n_clusters + 1,) where each cluster starts
    clusters : IN which clusters
    sums : OUT (n_clusters, n_features) float64
    counts : OUT (n_clusters,) float64
    """
    members = sparse.csr_array((weights[order], order, bounds), shape=(len(counts), X.shape[0]))[clusters]
    counts[clusters] = members @ np.ones(X.shape[0])
    if sparse.issparse(X):
        sums[clusters] = (members @ X).toarray()
        return
    for columns in row_blocks(X.shape[1], X.shape[0]):
        sums[clusters, columns] = members @ X[:, columns].astype(np.float64)


def order_by_label(labels, order, bounds):
    """Row numbers sorted by label, and where each label starts.

    labels : IN (n_samples,) from 0 to n_clusters - 1
    order : OUT (n_samples,) int32
    bounds : OUT (n_clusters + 1,) int32
    """
    order[:] = np.argsort(labels, kind="stable")
    bounds[:] = np.searchsorted(labels[order], np.arange(len(bounds)))


def row_hashes(X, factors, single, out):
    """A 64-bit hash of each row's values: equal for equal rows, dense or CSR, -0.0 or 0.0.

    X : IN (n_samples, n_features) array or CSR
    factors : IN (n_features,) uint64
    single : IN whether of the values rounded to float32
    out : OUT (n_samples,) uint64
    """
    if sparse.issparse(X):
        sums = np.zeros(len(X.data) + 1, dtype=np.uint64)
        np.cumsum(_mix(X.data, single) * factors[X.indices], out=sums[1:])  # modulo 2^64, as the rows' sums
        out[:] = sums[X.indptr[1:]] - sums[X.indptr[:-1]]
        return
    for block in row_blocks(X.shape[0], X.shape[1]):
        (_mix(X[block], single) * factors).sum(axis=1, out=out[block])


def _mix(values, single):
    """Scrambled bits of float64 values; zeros, of either sign, give 0 so that CSR may leave them out."""
    values = values.astype(np.float32) if single else values
    bits = (values.astype(np.float64) + 0.0).view(np.uint64)  # -0.0 + 0.0 is 0.0
    bits ^= bits >> np.uint64(33)
    bits *= np.uint64(0xFF51AFD7ED558CCD)
    bits ^= bits >> np.uint64(29)
    return bits


def order_by_hash(hashes, order):
    """Row numbers by rising hash, equal ones in their order.

    hashes : IN (n_samples,) uint64
    order : OUT (n_samples,) int64
    """
    order[:] = np.argsort(hashes, kind="stable")


def update_mass(rows, sq_distances, weights, ranks, blocks, sums, cumulated):
    """Weighted squared distances of some rows at their ranks; sums of blocks, added eight by eight.

    rows : IN (n_rows,) int32, sq_distances : IN (n_rows,) float64
    weights : IN (n_samples,), ranks : IN (n_samples,) int64
    blocks : INOUT (n_blocks, block rows, a multiple of 8)
    sums : INOUT (n_blocks,), cumulated : OUT (n_blocks,)
    """
    blocks.reshape(-1)[ranks[rows]] = weights[rows] * sq_distances
    touched = np.unique(ranks[rows] // blocks.shape[1])
    parts = blocks[touched].reshape(len(touched), blocks.shape[1] // 8, 8).sum(axis=1)
    for _ in range(3):
        parts = parts[:, ::2] + parts[:, 1::2]
    sums[touched] = parts[:, 0]
    np.cumsum(sums, out=cumulated)


def draw_mass(blocks, cumulated, uniforms, ranks):
    """Where the cumulated mass exceeds these shares of the total; never where it does not rise.

    blocks : IN (n_blocks, block rows), cumulated : IN (n_blocks,) of their sums
    uniforms : IN (n_draws,) in [0, 1)
    ranks : OUT (n_draws,) int64
    """
    places = uniforms * cumulated[-1]
    last = np.searchsorted(cumulated, cumulated[-1])  # the last block that adds any mass
    chosen = np.minimum(np.searchsorted(cumulated, places, side="right"), last)
    within = np.cumsum(blocks[chosen], axis=1)  # (n_draws, block rows)
    places -= np.where(chosen > 0, cumulated[chosen - 1], 0)
    steps = (within <= places[:, None]).sum(axis=1)
    last = (within < within[:, -1:]).sum(axis=1)  # the last row of the block that adds any
    ranks[:] = chosen * blocks.shape[1] + np.minimum(steps, last)


def encode(X, columns, codewords, first_codewords, codes):
    """Number of the nearest codeword of each subspace, lowest on ties.

    X : IN (n_samples, n_features)
    columns : IN (n_subspaces + 1,) where each subspace starts
    codewords : IN (k_m, width_m) float64 of each subspace, one after the other
    first_codewords : IN (n_subspaces + 1,) how many there are before each subspace
    codes : OUT (n_samples, n_subspaces) uint8 or uint16
    """
    labels, sq_distances = np.empty(len(X), dtype=np.int32), np.empty(len(X))
    for m, width in enumerate(np.diff(columns)):
        book, codewords = np.split(codewords, [(first_codewords[m + 1] - first_codewords[m]) * width])
        nearest_centers(X[:, columns[m] : columns[m + 1]], book.reshape(-1, width), labels, sq_distances)
        codes[:, m] = labels


def adc_scan(tables, queries, codes, out):
    """Sum the table entries that the codes select (asymmetric distance computation).

    tables : IN (n_tables, n_subspaces, n_codewords) float64
    queries : IN (n_queries,) which tables
    codes : IN (n_codes, n_subspaces) uint8 or uint16
    out : OUT (n_queries, n_codes) float64
    """
    out[:] = 0
    for m in range(codes.shape[1]):
        out += tables[queries, m][:, codes[:, m]]

"""ProductQuantizer: worked by hand, against nanopq and faiss, invariants of the rotations."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from skivfpq import ProductQuantizer
from skivfpq._algorithms.codebooks import (
    Codebooks,
    _stages,
    pca_rotation,
    random_rotation,
    rotate,
    subspace_slices,
)

ROTATIONS = [None, "pca", "opq", "random"]


@pytest.fixture(scope="module")
def correlated():
    """Rows (3000, 16) whose features are mixed, float32."""
    rng = np.random.default_rng(0)
    scales = 2.0 ** -np.arange(16)
    return ((rng.normal(size=(3000, 16)) * scales) @ rng.normal(size=(16, 16))).astype(np.float32)


def errors(quantizer, X):
    return np.square(X - quantizer.inverse_transform(quantizer.transform(X))).sum(axis=1)


def test_worked_example():
    X = np.array([[0.0, 0, 9], [0, 0, 7], [4, 4, 9], [4, 4, 7]])
    quantizer = ProductQuantizer(n_subspaces=2, n_bits=1, random_state=0).fit(X)
    first, second = quantizer.codebooks_
    assert_array_equal(np.sort(first, axis=0), [[0, 0], [4, 4]])
    assert_array_equal(np.sort(second, axis=0), [[7], [9]])
    codes = quantizer.transform(X)
    assert_array_equal(first[codes[:, 0]], X[:, :2])
    assert_array_equal(second[codes[:, 1]], X[:, 2:])
    assert quantizer.score(X) == 0
    # |(1, 0) - (0, 0)|^2 = 1 and |(1, 0) - (4, 4)|^2 = 25; |8 - 7|^2 = |8 - 9|^2 = 1
    tables = quantizer.distance_tables([[1.0, 0, 8]])
    assert_array_equal(np.sort(tables[0], axis=1), [[1, 25], [1, 1]])
    assert_allclose(quantizer.score([[1.0, 0, 8]]), -2)


@pytest.mark.parametrize("n_features", [1, 2, 7, 10, 33])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_any_number_of_features(n_features, rotation):
    X = np.random.default_rng(0).normal(size=(200, n_features))
    for n_subspaces in {1, (n_features + 1) // 2, n_features}:
        quantizer = ProductQuantizer(n_subspaces, n_bits=3, rotation=rotation, random_state=0).fit(X)
        sizes = [codebook.shape[1] for codebook in quantizer.codebooks_]
        assert sizes == [len(part) for part in np.array_split(np.arange(n_features), n_subspaces)]
        assert quantizer.transform(X).shape == (200, n_subspaces)
        assert quantizer.inverse_transform(quantizer.transform(X)).shape == X.shape


@pytest.mark.parametrize("n_bits", range(1, 17))
def test_every_number_of_bits(n_bits):
    X = np.random.default_rng(0).normal(size=(700, 6)).astype(np.float32)
    quantizer = ProductQuantizer(2, n_bits, max_iter=2, random_state=0)
    if n_bits > 9:
        with pytest.warns(ConvergenceWarning, match="only 700 distinct training rows"):
            quantizer.fit(X)
    else:
        quantizer.fit(X)
    codes = quantizer.transform(X)
    assert codes.dtype == (np.uint8 if n_bits <= 8 else np.uint16)
    n_codewords = min(2**n_bits, 700)
    assert [len(codebook) for codebook in quantizer.codebooks_] == [n_codewords, n_codewords]
    assert quantizer.distance_tables(X[:2]).shape == (2, 2, 2**n_bits)
    assert np.isfinite(quantizer.distance_tables(X[:2])).sum() == 2 * 2 * n_codewords
    if n_bits > 9:  # a codeword for each row: nothing is lost
        assert_array_equal(quantizer.inverse_transform(codes), X)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_codes_are_the_nearest_codewords(correlated, rotation):
    quantizer = ProductQuantizer(5, 4, rotation=rotation, random_state=0).fit(correlated)
    X = correlated[:300].astype(np.float64)
    rotated = X if rotation is None else X @ quantizer.rotation_
    codes = quantizer.transform(X)
    tables = quantizer.distance_tables(X)
    columns = 0
    for m, codebook in enumerate(quantizer.codebooks_):
        part = rotated[:, columns : columns + codebook.shape[1]]
        columns += codebook.shape[1]
        expected = np.square(part[:, None] - codebook.astype(np.float64)).sum(axis=-1)
        assert_array_equal(codes[:, m], expected.argmin(axis=1))
        assert_allclose(tables[:, m], expected, rtol=1e-6, atol=1e-9)
    assert_array_equal(quantizer.predict(X), codes)
    # ADC: the sum of the table entries is the distance to the decoded row
    adc = np.take_along_axis(tables, codes[:, :, None].astype(int), axis=2).sum(axis=(1, 2))
    assert_allclose(adc, np.square(X - quantizer.inverse_transform(codes)).sum(axis=1), rtol=1e-4)


@pytest.mark.parametrize("rotation", ["pca", "opq", "random"])
def test_rotations_are_orthogonal(correlated, rotation):
    quantizer = ProductQuantizer(4, 4, rotation=rotation, random_state=0).fit(correlated)
    assert_allclose(quantizer.rotation_ @ quantizer.rotation_.T, np.eye(16), atol=1e-10)


def test_learnt_rotations_lower_the_error(correlated, seed):
    mean_errors = {
        rotation: errors(
            ProductQuantizer(4, 5, rotation=rotation, random_state=seed).fit(correlated), correlated
        )
        for rotation in ROTATIONS
    }
    mean_errors = {rotation: error.mean() for rotation, error in mean_errors.items()}
    assert mean_errors["pca"] < 0.8 * mean_errors[None]
    assert mean_errors["opq"] <= 1.001 * mean_errors["pca"]


def test_alternating_improves_on_principal_axes(seed):
    rng = np.random.default_rng(0)
    X = np.abs(rng.normal(size=(3000, 16))) ** 1.5 @ rng.normal(size=(16, 16))  # skewed: axes do not do
    pca, opq = (ProductQuantizer(4, 5, rotation=r, random_state=seed).fit(X).score(X) for r in ("pca", "opq"))
    assert opq > 0.99 * pca  # scores are negative: the error is at least 1 % less


def plain_codebooks(X, slices, n_codewords, n_iter, seed):
    """By textbook Lloyd steps from random rows."""
    rng, codebooks = np.random.default_rng(seed), []
    for columns in slices:
        rows = X[:, columns].astype(np.float64)
        codewords = rows[rng.choice(len(X), n_codewords, replace=False)]
        for _ in range(n_iter):
            codes = np.square(rows[:, None] - codewords).sum(axis=-1).argmin(axis=1)
            for c in np.unique(codes):
                codewords[c] = rows[codes == c].mean(axis=0)
        codebooks.append(codewords)
    return Codebooks(slices, codebooks, None)


@pytest.mark.parametrize("scale", [1.0, 3.0])  # of the longest rows: Gaussian, and with a heavy tail
def test_accelerated_training_is_as_good_as_25_plain_steps(seed, scale):
    rng = np.random.default_rng(5)
    X = rng.normal(size=(3000, 8)) @ rng.normal(size=(8, 8))
    X[:300] *= scale
    quantizer = ProductQuantizer(2, 5, random_state=seed).fit(X)
    assert quantizer.n_iter_ <= 14
    plain = plain_codebooks(X, subspace_slices(8, 2), 32, 25, seed)
    plain_error = np.square(plain.decode(plain.encode(X, 1)) - X).sum(axis=1).mean()
    assert errors(quantizer, X).mean() < 1.002 * plain_error


def test_one_step_is_lloyds(correlated):
    X = correlated[:500].astype(np.float64)
    (codewords,) = ProductQuantizer(1, 3, max_iter=1, random_state=0).fit(X).codebooks_
    first = np.array(X[np.random.default_rng(0).choice(500, 8, replace=False)])
    codes = np.square(X[:, None] - first).sum(axis=-1).argmin(axis=1)
    assert_allclose(codewords, [X[codes == c].mean(axis=0) for c in range(8)], rtol=1e-9)


def test_many_steps_end_where_lloyds_do(correlated):
    X = correlated.astype(np.float64)
    quantizer = ProductQuantizer(2, 3, max_iter=500, max_samples=None, random_state=0).fit(X)
    assert quantizer.n_iter_ < 200
    codes = quantizer.transform(X)
    for m, columns in enumerate(subspace_slices(16, 2)):
        means = [X[codes[:, m] == c, columns].mean(axis=0) for c in range(8)]
        assert_allclose(quantizer.codebooks_[m], means, rtol=1e-6, atol=1e-7)


def test_stages_take_no_more_steps_than_asked_for():
    assert _stages(60_000, 256, 25) == [(7500, 5), (30_000, 5), (60_000, 4)]
    assert _stages(10_000, 256, 25) == [(10_000, 14)]
    for max_iter in range(1, 60):
        stages = _stages(100_000, 16, max_iter)
        assert 1 <= sum(n for _, n in stages) <= max_iter
        assert all(n > 0 for _, n in stages)
        assert stages[-1][0] == 100_000


def test_score_is_minus_the_mean_squared_error(correlated):
    quantizer = ProductQuantizer(4, 5, random_state=0).fit(correlated)
    assert_allclose(quantizer.score(correlated), -errors(quantizer, correlated).mean(), rtol=1e-5)
    assert isinstance(quantizer.score(correlated), float)


def test_more_bits_lower_the_error(correlated):
    scores = [
        ProductQuantizer(4, n_bits, random_state=0).fit(correlated).score(correlated)
        for n_bits in (2, 4, 6, 8)
    ]
    assert scores == sorted(scores)


def test_balanced_allocation_by_hand():
    # variances 16, 9, 4, 1: 16 and 1 to the one subspace, 9 and 4 to the other
    X = np.concatenate([np.diag([4.0, 3, 2, 1]), -np.diag([4.0, 3, 2, 1])])
    rotation = pca_rotation(X, subspace_slices(4, 2))
    assert_allclose(np.abs(rotation), np.eye(4)[:, [0, 3, 1, 2]], atol=1e-12)


def test_rotate_gives_a_row_the_same_bits_in_every_batch(rng):
    X, rotation = rng.normal(size=(500, 37)) * 100, random_rotation(37, rng)
    rotated = rotate(X, rotation)
    assert_allclose(rotated, X @ rotation, rtol=1e-9, atol=1e-9)
    for rows in (slice(0, 1), slice(3, 5), slice(100, 500), [7, 7, 7], np.arange(499, -1, -1)):
        assert_array_equal(rotate(X[rows], rotation), rotated[rows])


def test_offset_data_keeps_its_precision():
    X = np.random.default_rng(0).normal(size=(2000, 8))
    near = ProductQuantizer(4, 6, random_state=0).fit(X)
    far = ProductQuantizer(4, 6, random_state=0).fit(X + 1e6)
    assert_array_equal(far.transform(X + 1e6), near.transform(X))
    assert_allclose(far.score(X + 1e6), near.score(X), rtol=1e-6)


def test_auto_subspaces_and_explicit_ones():
    X = np.random.default_rng(0).normal(size=(300, 20))
    assert ProductQuantizer(n_bits=2).fit(X).n_subspaces_ == 2
    assert ProductQuantizer(n_bits=2).fit(X[:, :5]).n_subspaces_ == 1
    with pytest.raises(ValueError, match="n_subspaces=21 must be at most n_features=20"):
        ProductQuantizer(21).fit(X)


@pytest.mark.parametrize("max_samples", ["auto", None, 100, 0.2])
def test_max_samples(correlated, max_samples):
    quantizer = ProductQuantizer(4, 2, max_samples=max_samples, random_state=0).fit(correlated)
    assert quantizer.transform(correlated).shape == (3000, 4)


@pytest.mark.parametrize("n_jobs", [1, 2, 4])
def test_the_same_bits_for_every_number_of_threads(n_jobs):
    X = np.random.default_rng(0).normal(size=(9000, 16)).astype(np.float32)
    one, other = (ProductQuantizer(n_bits=4, n_jobs=jobs, random_state=0).fit(X) for jobs in (1, n_jobs))
    for first, second in zip(one.codebooks_, other.codebooks_):
        assert_array_equal(first, second)
    assert_array_equal(one.transform(X), other.transform(X))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64, np.uint16, np.uint64])
def test_codes_of_any_integer_dtype(correlated, dtype):
    quantizer = ProductQuantizer(4, 4, random_state=0).fit(correlated)
    codes = quantizer.transform(correlated[:50])
    decoded = quantizer.inverse_transform(codes)
    assert decoded.dtype == np.float32
    assert_array_equal(quantizer.inverse_transform(codes.astype(dtype)), decoded)
    assert_array_equal(quantizer.inverse_transform(codes.tolist()), decoded)
    assert quantizer.inverse_transform(codes[:0]).shape == (0, 16)


@pytest.mark.parametrize(
    "codes",
    [
        [[16, 0, 0, 0]],
        [[-1, 0, 0, 0]],
        [[0.0, 0, 0, 0]],
        [[0, 0, 0]],
        [0, 0, 0, 0],
        [["a"] * 4],
        [[True] * 4],
    ],
)
def test_codes_that_are_refused(correlated, codes):
    quantizer = ProductQuantizer(4, 4, random_state=0).fit(correlated)
    with pytest.raises(ValueError, match=r"Codes must be (integers of shape \(n_samples, 4\)|from 0 to 15)"):
        quantizer.inverse_transform(codes)


def test_constant_rows_need_one_codeword():
    with pytest.warns(ConvergenceWarning, match="only 1 distinct"):
        quantizer = ProductQuantizer(2, 4).fit(np.ones((10, 4)))
    assert_array_equal(quantizer.inverse_transform(quantizer.transform(np.ones((2, 4)))), np.ones((2, 4)))


def test_codes_feed_a_classifier():
    X, y = load_digits(return_X_y=True)
    codes = make_pipeline(
        ProductQuantizer(16, 4, random_state=0),
        OneHotEncoder(handle_unknown="ignore"),
        LogisticRegression(max_iter=500),
    )
    assert codes.fit(X[:1200], y[:1200]).score(X[1200:], y[1200:]) > 0.85


def test_codes_equal_nanopqs_for_the_same_codebooks(correlated):
    nanopq = pytest.importorskip("nanopq")
    ours = ProductQuantizer(4, 6, random_state=0).fit(correlated)
    theirs = nanopq.PQ(M=4, Ks=64, verbose=False)
    theirs.Ds, theirs.code_dtype = 4, np.uint8
    theirs.codewords = np.array(ours.codebooks_)
    assert_array_equal(ours.transform(correlated), theirs.encode(correlated))
    assert_array_equal(
        ours.inverse_transform(ours.transform(correlated)), theirs.decode(theirs.encode(correlated))
    )
    tables = ours.distance_tables(correlated[:5])
    assert_allclose(tables, [theirs.dtable(row).dtable for row in correlated[:5]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_bits", [4, 8])
def test_codes_equal_faisss_for_the_same_codebooks(correlated, n_bits):
    faiss = pytest.importorskip("faiss")
    ours = ProductQuantizer(4, n_bits, random_state=0).fit(correlated)
    theirs = faiss.ProductQuantizer(16, 4, n_bits)
    faiss.copy_array_to_vector(np.array(ours.codebooks_).ravel(), theirs.centroids)
    packed = theirs.compute_codes(correlated)  # 4-bit codes: two to a byte, the first one low
    codes = packed if n_bits == 8 else np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), 4)
    assert_array_equal(ours.transform(correlated), codes)
    assert_allclose(ours.inverse_transform(codes), theirs.decode(packed), rtol=1e-6)


def test_error_is_no_worse_than_faisss(correlated):
    faiss = pytest.importorskip("faiss")
    theirs = faiss.ProductQuantizer(16, 4, 6)
    theirs.train(correlated)
    error = np.square(correlated - theirs.decode(theirs.compute_codes(correlated))).sum(axis=1).mean()
    ours = [-ProductQuantizer(4, 6, random_state=s).fit(correlated).score(correlated) for s in range(5)]
    assert np.mean(ours) < 1.02 * error

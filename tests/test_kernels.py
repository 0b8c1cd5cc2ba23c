"""Every compiled kernel equals its NumPy twin bit for bit, on every instruction set that runs here."""

import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse

from skivfpq import _kernels
from skivfpq._kernels import reference

INSTRUCTION_SETS = _kernels.native.runnable() + _kernels.native.emulated() if _kernels.NATIVE else []


@pytest.fixture(params=["reference", *INSTRUCTION_SETS])
def kernels(request):
    """The reference kernels and each compiled variant in turn."""
    if request.param == "reference":
        yield reference
        return
    before = _kernels.native.INSTRUCTION_SET
    _kernels.native.use(request.param)
    yield _kernels.native
    _kernels.native.use(before)


def nearest(kernels, X, centers):
    labels, sq_distances = np.full(len(X), -1, dtype=np.int32), np.full(len(X), np.nan)
    kernels.nearest_centers(X, np.ascontiguousarray(centers, dtype=np.float64), labels, sq_distances)
    return labels, sq_distances


def by_differences(X, centers):
    sq_distances = np.square(X.astype(np.float64)[:, None] - centers.astype(np.float64)).sum(axis=-1)
    return sq_distances.argmin(axis=1), sq_distances.min(axis=1)


def test_a_compiled_build_is_tested_as_such():
    if os.environ.get("SKIVFPQ_KERNELS") == "reference":
        assert not _kernels.NATIVE
    elif _kernels.NATIVE:
        assert INSTRUCTION_SETS


@pytest.mark.parametrize("n_features", [1, 2, 7, 8, 9, 64, 127, 128, 129, 300, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearest_centers_is_the_argmin_of_differences(kernels, n_features, dtype):
    rng = np.random.default_rng(n_features)
    for n_clusters in (1, 2, 5, 6, 7, 50):
        for offset in (0, 1e3, 1e6):
            X = (rng.normal(size=(53, n_features)) + offset).astype(dtype)
            centers = X[rng.integers(len(X), size=n_clusters)] + rng.normal(size=(n_clusters, n_features))
            labels, sq_distances = nearest(kernels, X, centers)
            expected_labels, expected = by_differences(X, centers)
            assert_array_equal(labels, expected_labels)
            assert_array_equal(sq_distances, expected)  # the same sums in the same order: the same bits


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "case",
    ["duplicates", "near ties", "two clouds", "long row", "long column", "constant", "tiny", "huge", "zeros"],
)
def test_nearest_centers_of_awkward_data(kernels, dtype, case):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(97, 20))
    if case == "duplicates":
        X = np.repeat(X[:13], 8, axis=0)[:97]
    elif case == "two clouds":
        X += rng.choice([-1000, 1000], size=(97, 1))
    elif case == "long row":
        X[5] *= 1e6
    elif case == "long column":
        X[:, 3] *= 1e6
    elif case == "constant":
        X[:, 2:] = 7
    elif case == "tiny":
        X *= 1e-30
    elif case == "huge":
        X *= 1e30
    elif case == "zeros":
        X[:] = 0
    X = X.astype(dtype)
    centers = X[rng.integers(97, size=31)].astype(np.float64)
    if case == "near ties":
        centers = np.repeat(centers[:8], 4, axis=0)
        centers[1::4] = np.nextafter(centers[1::4], np.inf)
        centers[2::4] = np.nextafter(centers[2::4], -np.inf)
    labels, sq_distances = nearest(kernels, X, centers)
    expected_labels, expected = by_differences(X, centers)
    assert_array_equal(labels, expected_labels)
    assert_array_equal(sq_distances, expected)


def test_ties_go_to_the_lowest_index(kernels):
    X = np.array([[0.0, 0.0], [1.0, 1.0]])
    centers = np.array([[5, 5], [1, 0], [0, 1], [-1, 0], [0, -1], [1, 0]])
    assert_array_equal(nearest(kernels, X, centers)[0], [1, 1])


def test_rows_that_are_read_only(kernels):
    X = np.random.default_rng(0).normal(size=(10, 3))
    X.flags.writeable = False
    centers = X[:2]
    assert_array_equal(nearest(kernels, X, centers)[0], by_differences(X, centers)[0])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (0, 4, 2), (2, 0, 3), (17, 100, 33)])
def test_adc_scan_equals_its_definition(kernels, dtype, shape):
    n_queries, n_codes, n_subspaces = shape
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(n_queries + 2, n_subspaces, 16))
    queries = rng.permutation(n_queries + 2)[:n_queries].astype(np.int64)
    codes = rng.integers(16, size=(n_codes, n_subspaces)).astype(dtype)
    out, expected = np.full((n_queries, n_codes), np.nan), np.zeros((n_queries, n_codes))
    kernels.adc_scan(tables, queries, codes, out)
    for m in range(n_subspaces):
        expected += tables[queries][:, m][:, codes[:, m]]
    assert_array_equal(out, expected)


@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
def test_sq_distance_matrix_does_not_cancel(offset):
    rng = np.random.default_rng(0)
    X, centers = rng.normal(size=(40, 9)) + offset, rng.normal(size=(11, 9)) + offset
    centers[3] = X[5]
    out = np.empty((40, 11))
    reference.sq_distance_matrix(X, centers, out)
    assert_allclose(out, np.square(X[:, None] - centers).sum(axis=-1), rtol=1e-10)
    assert out[5, 3] == 0


def test_csr_rows_have_the_labels_of_dense_ones():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 30)) * (rng.random((80, 30)) < 0.2)
    X[:3] = 0
    centers = X[rng.integers(80, size=9)]
    dense, csr = nearest(reference, X, centers), (np.empty(80, np.int32), np.empty(80))
    reference.nearest_centers(sparse.csr_array(X), centers, *csr)
    assert_array_equal(csr[0], dense[0])
    assert_allclose(csr[1], dense[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cluster_sums(kernels, dtype):
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(80, 30)) * (rng.random((80, 30)) < 0.2)).astype(dtype)
    labels, weights = rng.integers(4, size=80), rng.random(80)
    order = np.argsort(labels, kind="stable").astype(np.int32)
    bounds = np.searchsorted(labels[order], np.arange(6)).astype(np.int32)
    clusters = np.array([0, 2, 3, 4])  # cluster 4 is empty, 1 is left alone
    results = []
    for name, rows in (("tested", X), ("reference", X), ("reference", sparse.csr_array(X))):
        sums, counts = np.full((5, 30), np.nan), np.full(5, np.nan)
        (kernels if name == "tested" else reference).cluster_sums(
            rows, weights, order, bounds, clusters, sums, counts
        )
        results.append((sums, counts))
        expected = [weights[labels == k] @ X[labels == k].astype(float) for k in clusters]
        assert_allclose(sums[clusters], expected, atol=1e-13)
        assert np.isnan(sums[1]).all()
        assert np.isnan(counts[1])
    for sums, counts in results[1:]:
        assert_array_equal(sums, results[0][0])  # bit for bit: rows are added in their order
        assert_array_equal(counts, results[0][1])


@pytest.mark.parametrize("labels", [[], [0], [3, 1, 3, 0, 1, 3], [2] * 40])
def test_order_by_label(kernels, labels):
    order, bounds = np.full(len(labels), -1, np.int32), np.full(6, -1, np.int32)  # label 4 is not used
    kernels.order_by_label(np.array(labels, dtype=np.int32), order, bounds)
    assert_array_equal(order, np.argsort(labels, kind="stable"))
    assert_array_equal(bounds, [sum(label < c for label in labels) for c in range(6)])


def test_row_hashes_see_values_only(kernels):
    X = np.array([[0.0, 1.5, 0.0], [-0.0, 1.5, 0.0], [1.5, 0.0, 0.0], [0.0, 1.5, 1.0]])
    factors = np.array([3, 5, 7], dtype=np.uint64) << np.uint64(40) | np.uint64(1)
    expected = np.empty(4, dtype=np.uint64)
    reference.row_hashes(X, factors, False, expected)
    assert expected[0] == expected[1]
    assert len(set(expected.tolist())) == 3
    nearly = X * (1 + 1e-12)  # the same float32 values
    for rows, single in [
        (X, False), (X, True), (nearly, True), (X.astype(np.float32), False), (np.asfortranarray(X), False),
        (sparse.csr_array(X), False), (sparse.csr_array(nearly), True),
    ]:  # fmt: skip
        hashes = np.empty(4, dtype=np.uint64)
        if sparse.issparse(rows):
            reference.row_hashes(rows, factors, single, hashes)
        else:
            kernels.row_hashes(np.ascontiguousarray(rows), factors, single, hashes)
        assert_array_equal(hashes, expected)
    kernels.row_hashes(nearly, factors, False, hashes)
    assert hashes[0] != expected[0]


def _what_runs(**environment):
    code = "import skivfpq; skivfpq.show_versions()"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
        check=False,
    )


def test_environment_picks_the_kernels():
    assert "kernels: reference (NumPy)" in _what_runs(SKIVFPQ_KERNELS="reference").stdout
    assert "must be 'native' or 'reference'" in _what_runs(SKIVFPQ_KERNELS="fast").stderr
    for name in INSTRUCTION_SETS:
        stdout = _what_runs(SKIVFPQ_SIMD=name).stdout
        assert f"kernels: compiled, {name}" in stdout
    if INSTRUCTION_SETS:
        assert "SKIVFPQ_SIMD must be one of" in _what_runs(SKIVFPQ_SIMD="mmx").stderr


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("code_dtype", [np.uint8, np.uint16])
def test_encode_is_the_nearest_codeword_of_each_subspace(kernels, dtype, code_dtype):
    rng = np.random.default_rng(0)
    X = rng.integers(-3, 4, size=(2051, 11)).astype(dtype)  # with ties; more rows than a block
    columns, sizes = np.array([0, 4, 8, 11]), [5, 1, 17]
    books = [
        X[rng.integers(len(X), size=size), start:stop].astype(np.float64)
        for size, start, stop in zip(sizes, columns, columns[1:])
    ]
    codes = np.full((len(X), 3), 99, dtype=code_dtype)
    flat = np.concatenate([book.ravel() for book in books])
    kernels.encode(X, columns, flat, np.cumsum([0, *sizes]), codes)
    for m, book in enumerate(books):
        expected, _ = by_differences(X[:, columns[m] : columns[m + 1]], book)
        assert_array_equal(codes[:, m], expected)


@pytest.mark.skipif(not _kernels.NATIVE, reason="compiled kernels")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_adding_rows_has_the_bits_of_cluster_sums(instruction_set, dtype):
    rng = np.random.default_rng(1)
    X, weights = rng.normal(size=(500, 13)).astype(dtype), rng.uniform(size=500)
    labels = rng.integers(7, size=500).astype(np.int32)
    labels[labels == 4] = 5  # an empty cluster
    order, bounds = np.empty(500, dtype=np.int32), np.empty(8, dtype=np.int32)
    reference.order_by_label(labels, order, bounds)
    sums, counts = np.full((7, 13), np.nan), np.full(7, np.nan)
    expected, expected_counts = sums.copy(), counts.copy()
    reference.cluster_sums(X, weights, order, bounds, np.arange(7), expected, expected_counts)
    _kernels.native.add_rows(X, weights, labels, sums, counts, 9, 13)
    assert_array_equal(sums[:, 9:], expected[:, 9:])
    assert np.isnan(sums[:, :9]).all()
    assert np.isnan(counts).all()
    _kernels.native.add_rows(X, weights, labels, sums, counts, 0, 9)
    assert_array_equal(sums, expected)
    assert_array_equal(counts, expected_counts)

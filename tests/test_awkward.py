"""Awkward uses and data that once went wrong."""

import threading
import tracemalloc

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from sklearn.cluster import AgglomerativeClustering
from sklearn.exceptions import NotFittedError

from skivfpq import IVFIndex, LloydKMeans, ProductQuantizer, exact_neighbors
from skivfpq._algorithms.codebooks import random_rotation, rotate

X = np.random.default_rng(0).standard_normal((300, 4))


# ---- a failed fit


@pytest.mark.parametrize(
    ("estimator", "bad_params", "method"),
    [
        (LloydKMeans(3, random_state=0), {"n_clusters": 50}, "predict"),
        (ProductQuantizer(2, 3, random_state=0), {"n_subspaces": 5000}, "transform"),
        (IVFIndex(3, random_state=0), {"n_lists": 50}, "kneighbors"),
    ],
)
def test_a_failed_refit_leaves_the_model_as_it_was(estimator, bad_params, method):
    expected = getattr(estimator.fit(X), method)(X)
    with pytest.raises(ValueError):
        estimator.set_params(**bad_params).fit(np.ones((5, 4000)))
    assert estimator.n_features_in_ == 4
    assert_array_equal(getattr(estimator, method)(X), expected)
    with pytest.raises(ValueError, match="X has 4000 features"):
        getattr(estimator, method)(np.ones((5, 4000)))


def test_a_failed_first_fit_leaves_nothing():
    index = IVFIndex(3, vectors_dtype="float16")
    with pytest.raises(ValueError, match="range of float16"):
        index.fit(X * 1e6)
    with pytest.raises(NotFittedError):
        index.kneighbors(X)
    for name in ("labels_", "n_lists_", "list_sizes_", "n_samples_fit_", "bytes_per_vector_"):
        with pytest.raises(NotFittedError):
            getattr(IVFIndex(), name)


# ---- scales


@pytest.mark.parametrize("scale", [1, 1e-7, 1e-16, 1e20, 1e30, 1e-30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("container", [np.asarray, sparse.csr_array])
def test_cosine_does_not_depend_on_the_scale(scale, dtype, container):
    rng = np.random.default_rng(0)
    directions = np.repeat(np.eye(3), 50, axis=0) + 0.1 * rng.standard_normal((150, 3))
    expected = LloydKMeans(3, metric="cosine", random_state=0).fit(directions)
    kmeans = LloydKMeans(3, metric="cosine", random_state=0).fit(
        container((directions * scale).astype(dtype))
    )
    assert_allclose(kmeans.inertia_, expected.inertia_, rtol=1e-4)
    assert len(set(kmeans.labels_)) == 3


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # distances of zero, then, to float64
@pytest.mark.parametrize("scale", [1e-155, 1e-160, 1e-162, 1e-165, 1e-200, 1e138])
def test_labels_and_neighbours_of_the_plain_formula_where_squares_underflow(scale):
    rows = X * scale
    kmeans = LloydKMeans(20, init=rows[:20], max_iter=1).fit(rows)
    with np.errstate(under="ignore"):
        sq_distances = np.square(rows[:, None] - kmeans.cluster_centers_).sum(axis=-1)
        plain = np.square(rows[:50, None] - rows).sum(axis=-1)
    assert_array_equal(kmeans.labels_, sq_distances.argmin(axis=1))
    nearest = np.argsort(plain, axis=1, kind="stable")[:, :5]
    assert_array_equal(exact_neighbors(rows[:50], rows, 5)[1], nearest)
    index = IVFIndex(7, 7, random_state=0).fit(rows)
    assert_array_equal(index.kneighbors(rows[:50], 5)[1], nearest)


def test_radius_search_by_product_with_tiny_queries():
    queries = X[:50] * 1e-165
    index = IVFIndex(9, 9, metric="inner_product", random_state=0).fit(X)
    plain = -(queries[:, None] * X).sum(axis=-1)
    for query, keys in zip(queries, plain):
        radius = np.sort(keys)[30]
        found = index.radius_neighbors(query[None], radius, return_distance=False)[0]
        assert_array_equal(np.sort(found), np.flatnonzero(keys <= radius))


# ---- rows of zeros, radii


def test_rows_of_zeros_are_at_cosine_distance_one():
    rows = np.concatenate([X[:200], np.zeros((3, 4))])
    index = IVFIndex(4, 4, metric="cosine", random_state=0).fit(rows)
    for distances, indices in (
        index.kneighbors(np.zeros((1, 4)), 5),
        exact_neighbors(np.zeros((1, 4)), rows, 5, "cosine"),
    ):
        assert_array_equal(indices, [[0, 1, 2, 3, 4]])
        assert_array_equal(distances, np.ones((1, 5)))
    assert len(index.radius_neighbors(np.zeros((1, 4)), 1.0, return_distance=False)[0]) == 203
    kmeans = LloydKMeans(3, metric="cosine", random_state=0).fit(rows)
    assert_array_equal(kmeans.transform(np.zeros((1, 4))), np.ones((1, 3)))


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine", "inner_product"])
@pytest.mark.parametrize("fine_quantizer", [None, ProductQuantizer(2, 4)])
def test_a_row_at_the_radius_is_within_it(metric, fine_quantizer):
    index = IVFIndex(6, 6, metric=metric, fine_quantizer=fine_quantizer, random_state=0).fit(X)
    distances, indices = index.kneighbors(X[:100] * 1.1, 10)
    for i in range(100):
        found, rows = index.radius_neighbors(X[i : i + 1] * 1.1, distances[i, -1])
        assert_array_equal(rows[0][:10], indices[i])
        assert (found[0] <= distances[i, -1]).all()


@pytest.mark.parametrize("metric", ["sqeuclidean", "inner_product"])
@pytest.mark.parametrize("offset", [0, 10, 1e3, 1e6])
def test_radius_search_over_decoded_rows_skips_no_list(metric, offset):
    rows = (np.random.default_rng(0).standard_normal((200, 1)) * 3 + offset).astype(np.float32)
    index = IVFIndex(16, 16, metric=metric, fine_quantizer=ProductQuantizer(1, 3), random_state=0).fit(rows)
    decoded = index.reconstruct(np.arange(200)).astype(np.float64)
    for query in rows[:60]:
        query = query.astype(np.float64) + 0.01
        plain = np.square(decoded - query)[:, 0] if metric == "sqeuclidean" else -(decoded * query)[:, 0]
        radius = float(np.sort(plain)[20])
        found = index.radius_neighbors(query[None], radius, return_distance=False)[0]
        assert_array_equal(np.sort(found), np.flatnonzero(plain <= radius))


# ---- bounds, memory


@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine", "inner_product"])
@pytest.mark.parametrize("n_features", [3, 64, 512])
@pytest.mark.parametrize("long_coordinate", [1, 1e6])
def test_errors_of_keys_from_codes_are_within_their_bound(metric, n_features, long_coordinate):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, n_features))
    rows[:, 0] *= long_coordinate
    fine = ProductQuantizer(min(8, n_features), 4, rotation="random", max_iter=2, random_state=0)
    file = IVFIndex(5, 5, metric=metric, fine_quantizer=fine, random_state=0).fit(rows)._file
    queries = file.metric.rows(rows[:40])
    exact = file._exact_keys(queries)
    numbers = np.arange(40)
    for number in range(5):
        part = slice(file.lists.offsets[number], file.lists.offsets[number + 1])
        keys, errors, positions = file._scan(queries, None)(number, part, numbers)
        pairs = np.repeat(numbers, len(positions)), np.tile(positions, 40)
        difference = np.abs(keys - exact(*pairs).reshape(40, -1)).max(axis=1)
        assert (difference <= errors).all()


def test_memory_does_not_grow_with_ties():
    rows = np.ones((4000, 4))
    index = IVFIndex(3, 3, random_state=0).fit(rows)
    tracemalloc.start()
    indices = index.kneighbors(rows, 5, return_distance=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_array_equal(indices, np.tile(np.arange(5), (4000, 1)))
    assert peak < 600e6  # 16 million pairs tie: kept all at once they took 2.3 GB


def test_memory_does_not_grow_with_the_length_of_a_list():
    rows = np.random.default_rng(0).standard_normal((6000, 4))
    index = IVFIndex(1, 1, random_state=0).fit(rows)
    tracemalloc.start()
    index.kneighbors(rows, 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6  # all keys at once would be 288 MB, three times over


# ---- k-means


def test_fractional_weights_leave_no_residue_behind():
    rows = np.array([[50.0, 50.1], [49.9, 49.7], [-0.05, -0.1], [0.01, 0.13], [-0.05, -0.06], [0.05, 0.04]])
    init = np.array([[40, 40], [0.05, 0.05], [1e3, 1e3], [2e3, 2e3]], dtype=float)
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = np.round(rng.random(6) + 0.1, 1)
        with pytest.warns(match="distinct clusters"):
            kmeans = LloydKMeans(4, init=init, tol=0, max_iter=1).fit(rows, sample_weight=weights)
        assert np.abs(kmeans.cluster_centers_).max() < 51


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_csr_and_dense_rows_tie_alike():
    rng = np.random.default_rng(0)
    for _ in range(60):
        rows = rng.integers(-3, 4, size=(6, 2)) * 0.1
        init = np.concatenate([rng.integers(-3, 4, size=(2, 2)) * 0.1, [[99.9, 99.9], [199.9, 0]]])
        fits = [
            LloydKMeans(4, init=init, max_iter=1).fit(container(rows))
            for container in (np.asarray, sparse.csr_array)
            if len(np.unique(rows, axis=0)) >= 4
        ]
        if fits and len(set(fits[0].labels_)) == 4:
            assert_array_equal(fits[0].labels_, fits[1].labels_)
            assert_allclose(fits[0].cluster_centers_, fits[1].cluster_centers_, atol=1e-9)


def test_csr_and_dense_rows_stop_alike_far_from_zero():
    rows = np.random.default_rng(0).standard_normal((150, 3)) + 1e9
    for seed in range(5):
        dense, csr = (LloydKMeans(8, random_state=seed).fit(c(rows)) for c in (np.asarray, sparse.csr_array))
        assert dense.n_iter_ == csr.n_iter_


@pytest.mark.parametrize("weights", [np.full(300, 1e308), np.r_[np.full(299, 1.0), np.inf]])
def test_weights_that_overflow_are_refused(weights):
    with pytest.raises(ValueError, match="sample_weight"):
        LloydKMeans(2).fit(X, sample_weight=weights)


def test_weights_of_very_different_sizes():
    weights = np.r_[np.full(290, 1e-300), np.full(10, 1e100)]
    kmeans = LloydKMeans(20, init="random", n_init=1, random_state=0).fit(X, sample_weight=weights)
    assert np.isfinite(kmeans.cluster_centers_).all()


# ---- threads


def test_graphs_of_the_rows_beside_a_writer():
    index = IVFIndex(5, 2, random_state=0).fit(X)
    failures, shapes = [], set()

    def read():
        for _ in range(25):
            try:
                shapes.add(index.kneighbors_graph().shape)
                index.radius_neighbors_graph(radius=0.5)
            except Exception as error:
                failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for start in range(0, 300, 10):
        index.partial_fit(X[start : start + 10])
        index.remove([start])
    for reader in readers:
        reader.join()
    assert failures == []
    assert all(height == width for height, width in shapes)


# ---- parameters


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int64])
def test_small_integer_parameters(dtype):
    assert LloydKMeans(dtype(3), max_iter=dtype(127), n_init=dtype(2), random_state=0).fit(X).n_iter_ >= 1
    quantizer = ProductQuantizer(dtype(2), dtype(8), max_iter=dtype(5), random_state=0).fit(X)
    assert quantizer.distance_tables(X[:1]).shape == (1, 2, 256)
    index = IVFIndex(dtype(4), n_neighbors=dtype(5), random_state=0).fit(X)
    assert index.transform(X).nnz == 1800
    many = IVFIndex(dtype(4), dtype(4), n_neighbors=dtype(127), random_state=0).fit(X)
    assert many.transform(X).nnz == 300 * 128


def test_a_huge_refine_factor_refines_everything():
    index = IVFIndex(4, 4, fine_quantizer=ProductQuantizer(2, 2), refine_factor=1e308, random_state=0).fit(X)
    assert_array_equal(index.kneighbors(X)[1], exact_neighbors(X, X)[1])


def test_a_coarse_quantizer_without_centers_is_named():
    with pytest.raises(ValueError, match="coarse_quantizer must have cluster_centers_"):
        IVFIndex(3, coarse_quantizer=AgglomerativeClustering()).fit(X)


@pytest.mark.parametrize("n_neighbors", [0, -1, 1.5, "5", None, True, np.array(3)])
def test_transform_checks_its_parameter(n_neighbors):
    index = IVFIndex(4, 4, random_state=0).fit(X).set_params(n_neighbors=n_neighbors)
    with pytest.raises((ValueError, TypeError), match="n_neighbors must be"):
        index.transform(X)


@pytest.mark.parametrize("method", ["score", "tune", "transform", "predict"])
def test_none_is_no_query_there(method):
    with pytest.raises(ValueError):
        getattr(IVFIndex(4, 4, random_state=0).fit(X), method)(None)


@pytest.mark.parametrize("estimator", [LloydKMeans(2), ProductQuantizer(1, 2), IVFIndex(2)])
@pytest.mark.parametrize("dtype", ["datetime64[s]", "timedelta64[s]"])
def test_times_are_no_numbers(estimator, dtype):
    with pytest.raises((ValueError, TypeError)):
        estimator.fit(np.arange(20).reshape(10, 2).astype(dtype))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: LloydKMeans(2, init=np.full((2, 4), 1e300)).fit(X), "init must hold values up to"),
        (lambda index: index.kneighbors(X, refine_factor="abc"), "refine_factor must be a number"),
        (lambda index: index.radius_neighbors(X, 10**400), "radius must be finite"),
        (lambda index: index.kneighbors_graph(X, mode=np.array(["distance"] * 2)), "mode must be"),
        (lambda index: index.set_params(n_probes=np.array([1, 2])).kneighbors(X), "n_probes must be an int"),
    ],
)
def test_messages_name_the_argument(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(IVFIndex(4, 4, random_state=0).fit(X))


def test_large_distances_are_not_mistaken_for_unlearnt_codewords():
    rows = (X * 1e25).astype(np.float32)
    assert np.isfinite(ProductQuantizer(2, 3, random_state=0).fit(rows).distance_tables(rows)).all()


def test_rotated_rows_of_any_scale():
    rotation = random_rotation(4, np.random.default_rng(0))
    for scale in (1e-300, 1e-30, 1.0, 1e30, 1e140):
        assert_allclose(rotate(X * scale, rotation), (X @ rotation) * scale, rtol=1e-8, atol=1e-11 * scale)

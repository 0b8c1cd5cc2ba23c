"""Properties that hold for any data: order, copies, scale; k-means, codes and neighbours."""

import warnings

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.exceptions import ConvergenceWarning

from skivfpq import IVFIndex, LloydKMeans, ProductQuantizer, exact_neighbors

VALUES = st.one_of(
    st.integers(-3, 3).map(float),  # many ties and copies
    st.floats(-1e6, 1e6, width=32),
    st.floats(-(2.0**-20), 2.0**-20, width=32),
)


@st.composite
def rows(draw, min_rows=2, max_rows=30):
    """Rows (n_samples, n_features), float32 or float64, often with ties."""
    shape = draw(st.tuples(st.integers(min_rows, max_rows), st.integers(1, 6)))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return draw(arrays(dtype, shape, elements=VALUES))


def quietly(estimator, X, **params):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, **params)


def differences(X, Y):
    return np.square(X.astype(np.float64)[:, None] - Y.astype(np.float64)).sum(axis=-1)


@given(rows(), st.integers(1, 8), st.sampled_from(["k-means++", "random"]), st.integers(0, 9))
def test_labels_are_the_argmin_and_none_is_empty(X, n_clusters, init, seed):
    kmeans = quietly(LloydKMeans(min(n_clusters, len(X)), init=init, random_state=seed), X)
    sq_distances = differences(X, kmeans.cluster_centers_)
    assert_array_equal(kmeans.labels_, sq_distances.argmin(axis=1))
    assert_array_equal(kmeans.predict(X), kmeans.labels_)
    assert_allclose(kmeans.inertia_, sq_distances.min(axis=1).sum(), rtol=1e-9)
    assert np.isfinite(kmeans.cluster_centers_).all()
    assert len(kmeans.cluster_centers_) <= len(np.unique(X + 0.0, axis=0))


@given(rows(), st.integers(1, 6), st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(X, n_clusters, random):
    order = list(range(len(X)))
    random.shuffle(order)
    kmeans = LloydKMeans(min(n_clusters, len(X)), random_state=0, max_iter=5)
    first = quietly(kmeans, X).cluster_centers_
    second = quietly(kmeans, X[order]).cluster_centers_
    assert_allclose(second, first, rtol=1e-5, atol=1e-5 * np.abs(X).max())


@given(rows(max_rows=15), st.integers(1, 4), st.integers(2, 4))
def test_copies_equal_weights(X, n_clusters, times):
    kmeans = LloydKMeans(min(n_clusters, len(X)), random_state=0, max_iter=5)
    copied = quietly(kmeans, np.repeat(X, times, axis=0)).cluster_centers_
    weighted = quietly(kmeans, X, sample_weight=np.full(len(X), times)).cluster_centers_
    assert_allclose(copied, weighted, rtol=1e-5, atol=1e-5 * np.abs(X).max())


@given(rows(), st.integers(1, 6), st.integers(-30, 30))
def test_scaling_by_powers_of_two_scales_everything(X, n_clusters, exponent):
    X = X.astype(np.float64)
    init = X[: min(n_clusters, len(X))]
    kmeans = LloydKMeans(len(init), init=init, max_iter=5)
    plain = quietly(kmeans, X)
    centers, labels, inertia = plain.cluster_centers_, plain.labels_, plain.inertia_
    scaled = quietly(LloydKMeans(len(init), init=np.ldexp(init, exponent), max_iter=5), np.ldexp(X, exponent))
    assert_array_equal(scaled.labels_, labels)
    assert_allclose(scaled.cluster_centers_, np.ldexp(centers, exponent), rtol=1e-12)
    assert_allclose(scaled.inertia_, np.ldexp(inertia, 2 * exponent), rtol=1e-9)


@given(rows(), st.integers(1, 10), st.sampled_from([None, "pca", "opq", "random"]), st.integers(1, 6))
def test_codes_are_nearest_codewords(X, n_bits, rotation, n_subspaces):
    quantizer = ProductQuantizer(
        min(n_subspaces, X.shape[1]), n_bits, rotation=rotation, max_iter=3, random_state=0
    )
    quantizer = quietly(quantizer, X)
    codes = quantizer.transform(X)
    decoded = quantizer.inverse_transform(codes)
    assert_array_equal(quantizer.transform(X[:1]), codes[:1])
    tables = quantizer.distance_tables(X)
    chosen = np.take_along_axis(tables, codes[:, :, None].astype(int), axis=2)[:, :, 0]
    assert (chosen <= tables.min(axis=2) * (1 + 1e-5) + 1e-30).all()
    reach = np.square(X.astype(np.float64)).sum(axis=1).max()
    errors = np.square(X - decoded.astype(np.float64)).sum(axis=1)
    assert_allclose(chosen.sum(axis=1), errors, rtol=1e-3, atol=1e-5 * reach)


@given(
    rows(min_rows=3),
    st.integers(1, 5),
    st.integers(1, 30),
    st.sampled_from(["euclidean", "sqeuclidean", "cosine", "inner_product"]),
)
def test_full_probing_is_exact_search(X, n_lists, k, metric):
    k = min(k, len(X))
    index = quietly(IVFIndex(min(n_lists, len(X)), 99, metric=metric, random_state=0), X)
    distances, indices = index.kneighbors(X, k)
    expected, expected_indices = exact_neighbors(X, X, k, metric)
    assert_array_equal(indices, expected_indices)
    assert_array_equal(distances, expected)


@given(rows(min_rows=4), st.integers(1, 4), st.booleans(), st.data())
def test_neighbours_are_k_distinct_allowed_rows_in_order(X, n_lists, coded, data):
    fine = ProductQuantizer(1, 2, random_state=0) if coded else None
    index = IVFIndex(min(n_lists, len(X)), 1, fine_quantizer=fine, random_state=0)
    index = quietly(index, X)
    allowed = data.draw(st.lists(st.integers(0, len(X) - 1), min_size=1, unique=True))
    k = data.draw(st.integers(1, len(allowed)))
    distances, indices = index.kneighbors(X, k, subset=allowed)
    assert np.isin(indices, allowed).all()
    assert all(len(set(row)) == k for row in indices.tolist())
    assert (np.diff(distances) >= 0).all()
    kept = index.reconstruct(np.arange(len(X))).astype(np.float64)
    plain = np.sqrt(np.square(kept[indices] - X.astype(np.float64)[:, None]).sum(axis=-1))
    assert_allclose(distances, plain, rtol=1e-9)


@given(rows(min_rows=3, max_rows=20), st.floats(0, 1e7))
def test_radius_search_misses_nothing(X, radius):
    index = quietly(IVFIndex(3, random_state=0), X)
    plain = np.sqrt(differences(X, X))
    for row, expected in zip(index.radius_neighbors(X, radius)[1], plain):
        assert_array_equal(np.sort(row), np.flatnonzero(np.square(expected) <= radius * radius))

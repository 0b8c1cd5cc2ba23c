"""IVFIndex: equal to brute force when every list is probed, k guaranteed, recall measured."""

import copy
import pickle
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from sklearn.base import clone
from sklearn.cluster import DBSCAN, KMeans, MiniBatchKMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.manifold import Isomap
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, KNeighborsTransformer, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skivfpq import (
    IVFIndex,
    LloydKMeans,
    ProductQuantizer,
    _kernels,
    exact_neighbors,
    neighbors_recall,
)
from skivfpq._algorithms import ivf

# 512 codewords are more than some of these tests have rows
pytestmark = pytest.mark.filterwarnings("ignore:A subspace has only")

METRICS = ["euclidean", "sqeuclidean", "cosine", "inner_product"]
QUANTIZERS = {
    "flat": {},
    "pq": {"fine_quantizer": ProductQuantizer(4, 4)},
    "pq without residuals": {"fine_quantizer": ProductQuantizer(4, 4), "by_residual": False},
    "opq": {"fine_quantizer": ProductQuantizer(3, 5, rotation="opq")},
    "16-bit codes": {"fine_quantizer": ProductQuantizer(5, 9, max_iter=2)},
}


def plain_distances(Q, X, metric):
    """Distances (n_queries, n_samples) by the plain formula in float64."""
    Q, X = Q.astype(np.float64), X.astype(np.float64)
    if metric == "inner_product":
        return -np.array([(q * X).sum(axis=1) for q in Q])
    if metric == "cosine":
        return pairwise_distances(Q, X, metric="cosine")
    sq_distances = np.square(Q[:, None] - X).sum(axis=-1)
    return np.sqrt(sq_distances) if metric == "euclidean" else sq_distances


def plain_neighbors(Q, X, k, metric):
    distances = plain_distances(Q, X, metric)
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, indices, axis=1), indices


def data(kind, seed=0):
    """Rows (400, 12) and queries (30, 12)."""
    rng = np.random.default_rng(seed)
    X = make_blobs(430, n_features=12, centers=9, cluster_std=3.0, random_state=seed)[0]
    if kind == "integers":
        X = np.clip(X * 8 + 100, 0, 255).astype(np.uint8)
    elif kind == "few values":
        X = rng.integers(0, 3, size=(430, 12)).astype(np.float64)
    elif kind == "copies":
        X = np.repeat(X[:43], 10, axis=0)
    elif kind == "offset":
        X = X + 1e6
    elif kind == "far offset":  # squares of 1e15 are right to 0.1 only, about a neighbour's distance
        X = X + 3e7
    else:
        X = X.astype(kind)
    X = rng.permutation(X)
    return X[:400], X[400:]


KINDS = ["float32", "float64", "float16", "integers", "few values", "copies", "offset"]


# ---- equal to exact search


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_full_probing_is_exact_search(seed, metric, kind):
    X, queries = data(kind, seed)
    index = IVFIndex(13, 13, metric=metric, random_state=seed).fit(X)
    distances, indices = index.kneighbors(queries, 10)
    expected, expected_indices = plain_neighbors(queries, X, 10, metric)
    assert_allclose(distances, expected, rtol=1e-6, atol=1e-9)
    exact_distances, exact_indices = exact_neighbors(queries, X, 10, metric)
    assert_array_equal(indices, exact_indices)
    assert_array_equal(distances, exact_distances)
    if kind not in ("copies", "few values", "offset"):  # where the plain formula, too, tells rows apart
        assert_array_equal(indices, expected_indices)
    assert_array_equal(index.reconstruct(np.arange(400)), X)
    assert index.reconstruct([0]).dtype == X.dtype


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "flat"])
@pytest.mark.parametrize("kind", ["float32", "float64", "copies", "offset", "far offset"])
def test_codes_fully_probed_are_brute_force_over_the_decoded_rows(metric, name, kind):
    X, queries = data(kind)
    index = IVFIndex(13, 13, metric=metric, random_state=0, **QUANTIZERS[name]).fit(X)
    decoded = index.reconstruct(np.arange(400))
    assert (
        np.square(decoded - X.astype(np.float64)).sum() < np.square(X - X.mean(axis=0)).sum()
        or metric == "cosine"
    )
    distances, indices = index.kneighbors(queries, 10)
    expected, expected_indices = exact_neighbors(queries, decoded, 10, metric)
    scale = np.abs(expected).max()
    assert_allclose(distances, expected, rtol=1e-6, atol=1e-6 * scale)
    if metric != "cosine":  # there decoded rows are made to be of length one once more
        assert_array_equal(indices, expected_indices)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_subset_is_applied_inside_the_scan(metric, name):
    X, queries = data("float32")
    index = IVFIndex(13, 13, metric=metric, random_state=0, **QUANTIZERS[name]).fit(X)
    rows = np.random.default_rng(1).permutation(400)[:25]
    kept = index.reconstruct(np.sort(rows))
    expected, expected_indices = exact_neighbors(queries, kept, 10, metric)
    mask = np.isin(np.arange(400), rows)
    for subset in (rows, mask, list(rows)):
        for n_probes in (1, 13):  # one list rarely holds ten of the 25: more are probed then
            distances, indices = index.kneighbors(queries, 10, n_probes=n_probes, subset=subset)
            assert mask[indices].all()
            assert len({tuple(row) for row in np.sort(indices)}) > 1
        assert_allclose(distances, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        if name == "flat":
            assert_array_equal(indices, np.sort(rows)[expected_indices])


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_always_k_neighbours(name):
    X, queries = data("float64")
    index = IVFIndex(40, 1, random_state=0, **QUANTIZERS[name]).fit(X)
    for k in (1, 7, 50, 400):
        distances, indices = index.kneighbors(queries, k)
        assert distances.shape == indices.shape == (30, k)
        assert all(len(set(row)) == k for row in indices)
        assert (np.diff(distances) >= 0).all()
    subset = np.arange(390, 400)
    assert_array_equal(np.sort(index.kneighbors(queries, 10, subset=subset)[1]), np.tile(subset, (30, 1)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("n_probes", [1, 5])
def test_one_query_equals_the_batch(metric, name, n_probes):
    X, queries = data("float32")
    index = IVFIndex(13, n_probes, metric=metric, random_state=0, **QUANTIZERS[name]).fit(X)
    distances, indices = index.kneighbors(queries)
    for i, query in enumerate(queries):
        one_distances, one_indices = index.kneighbors(query[None])
        assert_array_equal(one_indices[0], indices[i])
        assert_array_equal(one_distances[0], distances[i])


@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_few_plain_queries_are_answered_as_any_others(dtype, metric, name, monkeypatch):
    """Their way around the checks gives the same bits, and leaves what is wrong to the checks."""
    rng = np.random.default_rng(2)
    X = rng.normal(size=(400, 9)).astype(dtype)
    index = IVFIndex(11, 4, metric=metric, random_state=0, **QUANTIZERS[name]).fit(X)
    queries = rng.normal(size=(5, 9)).astype(dtype)
    given = [(queries,), (queries[:1], 1), (queries[2:4], 30), (queries, 400)]
    found = [index.kneighbors(*args) for args in given]
    by_probes = index.kneighbors(queries, 3, n_probes=2)
    rows_only = index.kneighbors(queries, 3, return_distance=False)
    monkeypatch.setattr(type(index._file), "search_few", lambda *args: None)
    for args, (distances, indices) in zip(given, found):
        others = index.kneighbors(*args)
        assert indices.dtype == others[1].dtype
        assert_array_equal(distances, others[0])
        assert_array_equal(indices, others[1])
    assert_array_equal(by_probes[1], index.kneighbors(queries, 3, n_probes=2)[1])
    assert_array_equal(rows_only, index.kneighbors(queries, 3)[1])


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda q: q[:, :8].copy(), ValueError),
        (lambda q: np.where(q == q[0, 0], np.nan, q), ValueError),
        (lambda q: np.where(q == q[0, 0], np.inf, q), ValueError),
        (lambda q: np.where(q == q[0, 0], -np.inf, q), ValueError),
        (lambda q: q.astype(np.float64) * 1e200, ValueError),
        (lambda q: q[:0], ValueError),
        (lambda q: q[0], ValueError),
        (lambda q: q.astype(str), ValueError),
        (lambda q: q.astype(np.complex64), ValueError),
        (lambda q: sparse.csr_array(q), TypeError),
    ],
)
def test_a_few_wrong_queries_meet_the_same_errors(spoil, error, monkeypatch):
    rng = np.random.default_rng(2)
    index = IVFIndex(5, 2, random_state=0).fit(rng.normal(size=(100, 9)).astype(np.float32))
    wrong = spoil(rng.normal(size=(3, 9)).astype(np.float32))
    with pytest.raises(error) as first:
        index.kneighbors(wrong)
    monkeypatch.setattr(type(index._file), "search_few", lambda *args: None)
    with pytest.raises(error) as second:
        index.kneighbors(wrong)
    assert str(first.value) == str(second.value)


def test_more_neighbors_than_any_integer_holds_are_refused():
    index = IVFIndex(5, 2, random_state=0).fit(np.random.default_rng(0).normal(size=(100, 3)))
    for k in (101, 2**40, 10**30):
        with pytest.raises(ValueError, match="Expected n_neighbors <= n_samples_fit"):
            index.kneighbors(np.zeros((2, 3)), k)


def test_names_of_features_are_looked_at_for_few_queries_too():
    X = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    index = IVFIndex(3, 3, random_state=0).fit(pd.DataFrame(X, columns=["a", "b"]))
    with pytest.warns(UserWarning, match="feature names"):
        index.kneighbors(X[:1])


def test_probed_lists_are_the_nearest_and_searched_exactly():
    X, queries = data("float64")
    index = IVFIndex(13, 3, random_state=0).fit(X)
    centers = index.coarse_quantizer_.cluster_centers_
    for query, row in zip(queries, index.kneighbors(queries, 5, return_distance=False)):
        lists = np.argsort(np.square(centers - query).sum(axis=1))[:3]
        rows = np.flatnonzero(np.isin(index.labels_, lists))
        nearest = rows[np.argsort(np.square(X[rows] - query).sum(axis=1))[:5]]
        assert_array_equal(row, nearest)


# ---- every row without itself, radius, graphs


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["float64", "copies"])
def test_own_neighbours_leave_out_the_row_itself(metric, kind):
    X, _ = data(kind)
    index = IVFIndex(13, 13, metric=metric, random_state=0).fit(X)
    distances, indices = index.kneighbors(n_neighbors=15)
    assert not (indices == np.arange(400)[:, None]).any()
    plain = plain_distances(X, X, metric)
    np.fill_diagonal(plain, np.inf)
    assert_allclose(distances, np.sort(plain, axis=1)[:, :15], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_radius_neighbors_are_all_within_the_radius(metric, name):
    X, queries = data("float64")
    index = IVFIndex(13, 1, metric=metric, random_state=0, **QUANTIZERS[name]).fit(X)
    kept = index.reconstruct(np.arange(400))
    plain = plain_distances(queries, kept, metric)
    for radius in np.quantile(plain, [0.001, 0.05, 0.5]):
        distances, indices = index.radius_neighbors(queries, radius)
        for i in range(30):
            if name == "flat":
                assert_array_equal(np.sort(indices[i]), np.flatnonzero(plain[i] <= radius))
            else:  # rows within rounding of the radius may fall on either side
                near = np.flatnonzero(plain[i] <= radius * (1 - 1e-9 * np.sign(radius)))
                assert set(near) <= set(indices[i])
                assert (plain[i][indices[i]] <= radius + 1e-9 * abs(radius)).all()
            assert (np.diff(distances[i]) >= 0).all()
            assert_allclose(distances[i], plain[i][indices[i]], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("most", [8192, 32])
def test_radius_neighbors_are_found_by_all_means_alike(metric, name, most, monkeypatch):
    """By ever more nearest rows, or by all lists that are near: the same rows and the same bits."""
    monkeypatch.setattr(ivf, "NEAREST_WITHIN", (4, most))
    X, queries = data("float32")
    X = np.concatenate([X, X[:40], X[:40]])
    queries = np.concatenate([queries, X[:5]])
    index = IVFIndex(13, 1, metric=metric, random_state=0, **QUANTIZERS[name]).fit(X)
    radii = np.quantile(index.kneighbors(queries, 40, n_probes=13)[0], [0, 0.02, 0.3, 1])
    subsets = [None, np.arange(0, 480, 5)]
    found = [index.radius_neighbors(queries, r, subset=subset) for r in radii for subset in subsets]
    monkeypatch.setattr(type(index._file), "_nearest_within", lambda *args: iter(()))
    others = [index.radius_neighbors(queries, r, subset=subset) for r in radii for subset in subsets]
    for (distances, indices), (other_distances, other_indices) in zip(found, others):
        for one, other in zip([*distances, *indices], [*other_distances, *other_indices]):
            assert one.dtype == other.dtype
            assert_array_equal(one, other)
    assert max(map(len, found[-2][1])) > 40


def test_no_row_within_a_radius():
    X, queries = data("float32")
    index = IVFIndex(13, 1, random_state=0).fit(X)
    distances, indices = index.radius_neighbors(queries + 1000, 1.0)
    assert all(len(row) == 0 and row.dtype == np.float64 for row in distances)
    assert all(len(row) == 0 and row.dtype == np.int64 for row in indices)
    assert len(index.radius_neighbors(X[:1], 0.0)[1][0]) == 1
    empty = index.remove(np.arange(400)).radius_neighbors(queries, 5.0)[1]
    assert all(len(row) == 0 for row in empty)


def test_radius_neighbors_of_the_rows_and_of_a_subset():
    X, queries = data("float64")
    index = IVFIndex(13, random_state=0).fit(X)
    theirs = NearestNeighbors(radius=9.0).fit(X)
    ours = index.radius_neighbors(radius=9.0, return_distance=False)
    for row, expected in zip(ours, theirs.radius_neighbors(return_distance=False)):
        assert_array_equal(np.sort(row), np.sort(expected))
    subset = np.arange(0, 400, 3)
    for row in index.radius_neighbors(queries, 15.0, subset=subset)[1]:
        assert np.isin(row, subset).all()
    graph = index.radius_neighbors_graph(queries, 9.0, mode="distance")
    assert_allclose(graph.toarray(), theirs.radius_neighbors_graph(queries, mode="distance").toarray())
    assert index.radius_neighbors_graph(radius=9.0).shape == (400, 400)
    assert_array_equal(
        index.radius_neighbors_graph(radius=9.0).toarray(), theirs.radius_neighbors_graph().toarray()
    )


@pytest.mark.parametrize("mode", ["distance", "connectivity"])
def test_graph_equals_scikit_learns(mode):
    X, queries = data("float64")
    index = IVFIndex(13, 13, mode=mode, random_state=0).fit(X)
    theirs = KNeighborsTransformer(mode=mode).fit(X)
    for rows in (X, queries):
        ours, expected = index.transform(rows), theirs.transform(rows)
        assert type(ours) is type(expected)
        assert ours.shape == expected.shape
        assert_array_equal(ours.indptr, expected.indptr)
        assert_allclose(ours.toarray(), expected.toarray(), atol=1e-7)
    if mode == "distance":
        stored = ours.data.reshape(30, 6)
        assert (np.diff(stored) >= 0).all()
        assert index.transform(X).nnz == 400 * 6  # zeros of the rows themselves are kept
    assert_array_equal(index.fit_transform(X).toarray(), index.transform(X).toarray())
    assert_allclose(
        index.kneighbors_graph(mode="distance").toarray(),
        theirs.kneighbors_graph(mode="distance").toarray(),
        atol=1e-7,
    )


def test_inner_product_has_no_graph_of_distances():
    X, _ = data("float64")
    index = IVFIndex(5, metric="inner_product", random_state=0).fit(X)
    for call in (
        lambda: index.transform(X),
        lambda: index.kneighbors_graph(X, mode="distance"),
        lambda: index.radius_neighbors_graph(X, 1.0, mode="distance"),
    ):
        with pytest.raises(ValueError, match="use metric='cosine', or mode='connectivity'"):
            call()
    assert index.set_params(mode="connectivity").transform(X).nnz == 2000


def test_consumers_of_the_graph():
    X, y = load_digits(return_X_y=True)
    X, y = X[:800], y[:800]
    classifier = make_pipeline(
        StandardScaler(), IVFIndex(20, random_state=0), KNeighborsClassifier(metric="precomputed")
    )
    assert classifier.fit(X[:600], y[:600]).score(X[600:], y[600:]) > 0.9
    graph = IVFIndex(20, 20, n_neighbors=30, random_state=0).fit_transform(X)
    labels = DBSCAN(eps=20, min_samples=5, metric="precomputed").fit_predict(graph)
    assert_array_equal(labels, DBSCAN(eps=20, min_samples=5).fit_predict(X))
    assert Isomap(n_neighbors=8, metric="precomputed", n_components=2).fit_transform(graph).shape == (800, 2)


def test_grid_search_over_the_index_in_a_classifier():
    X, y = load_digits(return_X_y=True)
    pipeline = make_pipeline(IVFIndex(random_state=0), KNeighborsClassifier(metric="precomputed"))
    grid = {"ivfindex__n_lists": [4, 30], "ivfindex__n_probes": [1, 4]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(X[:500], y[:500])
    exact = cross_val_score(KNeighborsClassifier(), X[:500], y[:500], cv=2).mean()
    assert search.best_score_ > exact - 0.02


# ---- adding and removing


def kept_as(name):
    """Parameters of an index that keeps vectors, codes or both."""
    if name == "refined":
        return {"fine_quantizer": ProductQuantizer(4, 4), "refine_factor": 400}
    return QUANTIZERS[name] or {}


def assert_holds(index, rows, queries, metric, exact):
    """Asserts that a fully probed index finds what a brute force search finds among rows, number -> row."""
    numbers = np.array(sorted(rows))
    expected, places = exact_neighbors(queries, np.array([rows[i] for i in numbers]), 9, metric)
    distances, indices = index.kneighbors(queries, 9)
    assert_allclose(distances, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    if exact:
        assert_array_equal(indices, numbers[places])
    assert np.isin(indices, numbers).all()
    assert index.list_sizes_.sum() == len(numbers)
    assert_array_equal(np.flatnonzero(index.labels_ >= 0), numbers)
    return numbers


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [*QUANTIZERS, "refined"])
def test_add_and_remove_against_brute_force(seed, metric, name):
    rng = np.random.default_rng(seed)
    X, queries = data("float32", seed)
    index = IVFIndex(13, 13, metric=metric, random_state=seed, **kept_as(name)).fit(X[:200])
    rows = {number: row for number, row in enumerate(index.reconstruct(np.arange(200)))}
    for step in range(3):
        new = X[200 + 60 * step : 260 + 60 * step]
        index.partial_fit(new)
        first = index.n_samples_fit_ - len(new)
        rows |= dict(enumerate(index.reconstruct(np.arange(first, first + len(new))), start=first))
        gone = rng.choice(list(rows), 30, replace=False)
        index.remove(gone)
        for number in gone:
            del rows[number]
        numbers = assert_holds(index, rows, queries, metric, exact=name in ("flat", "refined"))
        assert index.kneighbors()[1].shape == (len(numbers), 5)
    assert index.n_samples_fit_ == 380
    assert index.kneighbors_graph().shape == (380, 380)
    assert index.kneighbors_graph(queries).shape == (30, 380)
    removed = np.setdiff1d(np.arange(380), numbers)
    assert_array_equal(np.diff(index.kneighbors_graph().indptr)[removed], 0)
    with pytest.raises(ValueError, match="was removed"):
        index.remove(removed[:1])
    with pytest.raises(ValueError, match="was removed"):
        index.reconstruct(removed[:1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", [*QUANTIZERS, "refined"])
def test_few_rows_come_and_go_without_moving_others(seed, metric, name):
    X, queries = data("float32", seed)
    index = IVFIndex(5, 5, metric=metric, random_state=seed, **kept_as(name)).fit(X[:150])
    index.partial_fit(X[150:200])  # moves all, to where there is room for more
    rows = dict(enumerate(index.reconstruct(np.arange(200))))
    held, file = next(iter(index._file.lists.rows.values())), index._file
    found = file.search(file.metric.queries(queries), 4, file.probing().probes(5))
    for step in range(10):
        gone, number = np.unique(found[1])[step], index.n_samples_fit_
        index.remove([gone, gone])
        del rows[gone]
        index.partial_fit(X[200 + step : 201 + step])
        rows[number] = index.reconstruct([number])[0]
    assert next(iter(index._file.lists.rows.values())) is held
    assert_holds(index, rows, queries, metric, exact=name in ("flat", "refined"))
    for before, after in zip(found, file.search(file.metric.queries(queries), 4, file.probing().probes(5))):
        assert_array_equal(before, after)  # a search under way sees the rows as they were
    assert index.kneighbors()[1].shape == (len(rows), 5)
    assert_array_equal(index.kneighbors(queries, 4, subset=list(rows))[1], index.kneighbors(queries, 4)[1])
    restored = pickle.loads(pickle.dumps(index))
    assert len(restored._file.lists.ids) == len(rows) < len(index._file.lists.ids)
    assert_array_equal(restored.kneighbors(queries, 4), index.kneighbors(queries, 4))
    assert_array_equal(restored.labels_, index.labels_)
    assert restored.bytes_per_vector_ < index.bytes_per_vector_


def test_copies_of_an_index_do_not_share_added_rows():
    X, queries = data("float32")
    index = IVFIndex(5, 5, random_state=0).fit(X[:150]).partial_fit(X[150:200])
    other = copy.copy(index)
    index.partial_fit(X[200:205])
    other.partial_fit(X[205:210])
    for own, added in ((index, X[200:205]), (other, X[205:210])):
        assert_array_equal(own.reconstruct(np.arange(200, 205)), added)
        expected = exact_neighbors(queries, np.concatenate([X[:200], added]), 6)
        assert_array_equal(own.kneighbors(queries, 6), expected)


class ChangedOnce(IVFIndex):
    """Rows come, as from another thread, just after the index was first looked at."""

    new = None

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if name == "_file" and self.new is not None:
            new, self.new = self.new, None
            self.partial_fit(new)  # which moves all rows
        return value


def test_rows_are_reconstructed_from_one_state_of_the_index():
    X, _ = data("float32")
    index = ChangedOnce(5, 5, random_state=0).fit(X[:200])
    index.new = X[200:210]
    assert_array_equal(index.reconstruct(np.arange(200)), X[:200])
    assert index.n_samples_fit_ == 210


def test_list_sizes_are_a_copy():
    X, _ = data("float32")
    index = IVFIndex(5, 5, random_state=0).fit(X)
    index.list_sizes_[:] += 1
    assert index.list_sizes_.sum() == len(index.labels_) == len(X)


@pytest.mark.skipif(not _kernels.NATIVE, reason="kernels that are compiled only")
def test_removed_rows_near_zero_do_not_make_scores_coarse():
    X, _ = data("float32")
    X[:8] = 0
    fine = ProductQuantizer(4, 8, random_state=0)
    index = IVFIndex(5, 5, metric="cosine", fine_quantizer=fine, by_residual=False, random_state=0).fit(X)
    before = index._file.planes()[1].largest_term
    index.remove(np.arange(8))
    assert index._file.planes()[1].largest_term <= before


def test_rows_move_together_when_many_were_removed():
    X, queries = data("float32")
    index = IVFIndex(5, 5, random_state=0).fit(X[:200])
    index.remove(np.arange(0, 60, 2))
    assert len(index._file.lists.ids) == 200
    index.remove(np.arange(1, 60, 2))
    assert len(index._file.lists.ids) == 140
    distances, indices = index.kneighbors(queries, 6)
    expected, places = exact_neighbors(queries, X[60:200], 6)
    assert_array_equal(distances, expected)
    assert_array_equal(indices, places + 60)


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
def test_added_rows_are_filed_like_the_first(metric):
    X, _ = data("float64")
    index = IVFIndex(13, metric=metric, random_state=0).fit(X)
    assert_array_equal(index.labels_, index.predict(X))
    centers = index.coarse_quantizer_.cluster_centers_
    assert_array_equal(index.labels_, np.square(X[:, None] - centers).sum(axis=-1).argmin(axis=1))
    index.partial_fit(X[::-1])
    assert_array_equal(index.labels_, np.concatenate([index.predict(X), index.predict(X)[::-1]]))
    assert_array_equal(index.list_sizes_, np.bincount(index.labels_, minlength=13))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("vectors_dtype", [None, "float16"])
@pytest.mark.parametrize("n_lists", [4, 150])  # trained on some of the rows, and on all
@pytest.mark.parametrize("is_half", [False, True])
def test_rows_are_filed_as_they_are_kept(metric, vectors_dtype, n_lists, is_half, rng, monkeypatch):
    X = (rng.normal(size=(1200, 3)) + 40).astype(np.float32)  # float16 rounds to 1 / 32
    X = X.astype(np.float16).astype(np.float32) if is_half else X
    searched, nearest_list = [], ivf.InvertedFile.nearest_list
    monkeypatch.setattr(
        ivf.InvertedFile,
        "nearest_list",
        lambda self, rows, n: searched.append(len(rows)) or nearest_list(self, rows, n),
    )
    index = IVFIndex(n_lists, 1, metric=metric, vectors_dtype=vectors_dtype, random_state=0).fit(X)
    rows = index.reconstruct(np.arange(1200)).astype(np.float64)
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1)[:, None]
    centers = index.coarse_quantizer_.cluster_centers_.astype(np.float64)
    assert_array_equal(index.labels_, np.square(rows[:, None] - centers).sum(axis=-1).argmin(axis=1))
    if n_lists == 150 and metric != "cosine" and (is_half or vectors_dtype is None):
        assert searched == []  # training has labelled them


def test_all_rows_removed_and_added_again():
    X, queries = data("float64")
    index = IVFIndex(5, 5, random_state=0).fit(X).remove(np.arange(400))
    with pytest.raises(ValueError, match="there are 0 live rows"):
        index.kneighbors(queries)
    index.partial_fit(X)
    assert_array_equal(index.kneighbors(queries)[1], exact_neighbors(queries, X)[1] + 400)


def test_first_partial_fit_is_fit():
    X, queries = data("float64")
    fitted, added = IVFIndex(5, random_state=0).fit(X), IVFIndex(5, random_state=0).partial_fit(X)
    assert_array_equal(fitted.kneighbors(queries)[1], added.kneighbors(queries)[1])


def test_searches_see_the_index_before_or_after_a_change():
    X, queries = data("float64")
    index = IVFIndex(13, 13, random_state=0).fit(X)
    before = index.kneighbors(queries)[1]
    index.partial_fit(X)
    after = index.kneighbors(queries)[1]
    index = IVFIndex(13, 13, random_state=0).fit(X)
    seen = []
    searcher = threading.Thread(target=lambda: seen.extend(index.kneighbors(queries)[1] for _ in range(20)))
    searcher.start()
    index.partial_fit(X)
    searcher.join()
    assert all(np.array_equal(found, before) or np.array_equal(found, after) for found in seen)
    assert len(seen) == 20


# ---- kept dtypes, re-ranking


def test_bytes_stay_bytes():
    X, queries = data("integers")
    index = IVFIndex(13, 13, random_state=0).fit(X)
    assert index.reconstruct(np.arange(5)).dtype == np.uint8
    bytes_per_vector = 12 + 8  # the vector and two row numbers
    if _kernels.NATIVE:  # and int8 points of 12 features with a term of 4, in whole blocks of 16, and a bit
        bytes_per_vector += (16 * 16 * np.ceil(index.list_sizes_ / 16).sum() + np.ceil(len(X) / 8)) / len(X)
    assert index.bytes_per_vector_ == pytest.approx(bytes_per_vector)
    index.partial_fit(X.astype(np.float64))  # the same integers as floats fit too
    with pytest.raises(ValueError, match="integers in the range of uint8"):
        index.partial_fit(X + 0.5)
    with pytest.raises(ValueError, match="integers in the range of uint8"):
        index.partial_fit(X.astype(int) + 200)
    assert index.n_samples_fit_ == 800


def test_vectors_dtype():
    X, queries = data("float64")
    half = IVFIndex(13, 13, vectors_dtype="float16", random_state=0).fit(X)
    kept = half.reconstruct(np.arange(400))
    assert_array_equal(kept, X.astype(np.float16))
    assert_array_equal(half.kneighbors(queries)[0], exact_neighbors(queries, kept)[0])
    with pytest.raises(ValueError, match="range of float16"):
        half.partial_fit(X * 1e6)


@pytest.mark.parametrize("metric", METRICS)
def test_refining_ranks_by_exact_distances(metric):
    X, queries = data("float32")
    params = {"fine_quantizer": ProductQuantizer(2, 3), "metric": metric, "random_state": 0}
    index = IVFIndex(13, 13, refine_factor=1, **params).fit(X)
    codes = IVFIndex(13, 13, **params).fit(X)
    candidates = codes.kneighbors(queries, 20, return_distance=False)
    distances, indices = index.kneighbors(queries, 5, refine_factor=4)
    plain = plain_distances(queries, X, metric)
    for i in range(30):
        best = candidates[i][np.argsort(plain[i][candidates[i]], kind="stable")][:5]
        assert_allclose(distances[i], plain[i][best], rtol=1e-6, atol=1e-9)
        assert_array_equal(indices[i], best)
    everything = index.kneighbors(queries, 5, refine_factor=80, return_distance=False)
    assert_array_equal(everything, exact_neighbors(queries, X, 5, metric)[1])
    assert_array_equal(index.set_params(refine_factor=80).kneighbors(queries)[1], everything)
    with pytest.raises(ValueError, match="set refine_factor before fit"):
        codes.kneighbors(queries, refine_factor=4)


# ---- recall


@pytest.fixture(scope="module")
def embedded():
    """Rows (6000, 24) and unseen queries (1500, 24) from one mixture, float32."""
    X = make_blobs(7500, n_features=24, centers=60, cluster_std=4.0, random_state=0)[0].astype(np.float32)
    return X[:6000], X[6000:]


@pytest.mark.parametrize("target", [0.8, 0.95, 0.99])
def test_auto_probes_reach_their_target_on_unseen_queries(embedded, target, seed):
    X, queries = embedded
    index = IVFIndex(n_neighbors=10, target_recall=target, random_state=seed).fit(X)
    recall = neighbors_recall(exact_neighbors(queries, X, 10)[1], index.kneighbors(queries)[1])
    assert recall == index.score(queries)
    assert recall >= target - 0.02
    assert recall >= target - 0.005 or index.recall_ - recall < 0.02
    fewer = neighbors_recall(
        exact_neighbors(queries, X, 10)[1],
        index.kneighbors(queries, n_probes=max(1, index.n_probes_ - 2), return_distance=False),
    )
    assert fewer < target + 0.02  # not simply many


class RecordingKMeans(KMeans):
    """Remembers the rows that it was fitted on."""

    def fit(self, X, y=None, sample_weight=None):
        self.rows_ = X
        return super().fit(X)


@pytest.mark.parametrize(("n_samples", "n_left_out"), [(999, 0), (1000, 100), (6000, 600)])
def test_rows_that_measure_recall_are_not_trained_on(embedded, n_samples, n_left_out):
    X = embedded[0][:n_samples]
    index = IVFIndex(8, coarse_quantizer=RecordingKMeans(n_init=1), random_state=0).fit(X)
    assert len(index.coarse_quantizer_.rows_) == n_samples - n_left_out
    assert index.list_sizes_.sum() == n_samples
    given = IVFIndex(8, 3, coarse_quantizer=RecordingKMeans(n_init=1), random_state=0).fit(X)
    assert len(given.coarse_quantizer_.rows_) == n_samples


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_auto_probes_with_refined_codes(embedded, metric):
    X, queries = embedded
    index = IVFIndex(
        n_neighbors=10,
        metric=metric,
        fine_quantizer=ProductQuantizer(6, 6),
        refine_factor=10,
        random_state=0,
    ).fit(X)
    recall = neighbors_recall(exact_neighbors(queries, X, 10, metric)[1], index.kneighbors(queries)[1])
    assert recall == index.score(queries)
    assert recall >= 0.93


def test_codes_that_cannot_reach_the_target_are_named(embedded):
    X, queries = embedded
    index = IVFIndex(20, fine_quantizer=ProductQuantizer(2, 2), random_state=0)
    with pytest.warns(UserWarning, match="below target_recall=0.95.*Set refine_factor"):
        index.fit(X)
    assert 0 < index.recall_ < 0.95
    refined = IVFIndex(20, fine_quantizer=ProductQuantizer(2, 2), refine_factor=1, random_state=0)
    with pytest.warns(UserWarning, match=r"Raise refine_factor \(now 1\)"):
        refined.fit(X)


def test_score_needs_vectors(embedded):
    X, queries = embedded
    index = IVFIndex(20, 20, fine_quantizer=ProductQuantizer(2, 2), random_state=0).fit(X)
    assert not hasattr(index, "score")
    with pytest.raises(AttributeError) as error:
        index.score(queries)
    assert "refine_factor" in str(error.value) + str(error.value.__cause__)
    assert IVFIndex(20, 20, random_state=0).fit(X).score(queries) == 1.0


def test_tune_on_other_queries(embedded):
    X, queries = embedded
    index = IVFIndex(60, 60, n_neighbors=10, random_state=0).fit(X)
    assert index.n_probes_ == 60
    index.tune(queries, target_recall=0.9)
    assert 0.9 <= index.score(queries) < 0.97
    assert index.n_probes_ < 60
    assert index.recall_ == pytest.approx(index.score(queries))
    low = index.n_probes_
    assert index.tune(queries, target_recall=0.99).n_probes_ > low
    assert index.tune(queries, target_recall=1.0).score(queries) == 1.0
    codes = IVFIndex(60, fine_quantizer=ProductQuantizer(24, 8), n_probes=3, random_state=0).fit(X)
    codes.tune(queries, target_recall=0.9, n_neighbors=3)  # against probing every list
    full = codes.kneighbors(queries, 3, n_probes=60, return_distance=False)
    assert neighbors_recall(full, codes.kneighbors(queries, 3, return_distance=False)) >= 0.9


# ---- adaptive probes


@pytest.fixture(scope="module")
def uneven():
    """Rows (5000, 24) and queries (1000, 24) of few dimensions, whose density varies, float32."""
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(6000, 6)) * np.exp(rng.normal(size=(6000, 1)))) @ rng.normal(size=(6, 24))
    return np.split(np.float32(X + 0.05 * rng.normal(size=X.shape)), [5000])


def probed_lists(index, queries, n_probes):
    """The lists of each query, by the formula."""
    most, reach, _ = index._file.probing().probes(n_probes)
    centers = index.coarse_quantizer_.cluster_centers_.astype(np.float64)
    queries = queries.astype(np.float64)
    if index.metric == "cosine":
        queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    name = "inner_product" if index.metric == "inner_product" else "sqeuclidean"
    for keys in plain_distances(queries, centers, name):
        order = np.argsort(keys, kind="stable")[:most]
        limit = keys[order[:4]].mean() + (reach * abs(keys[order[0]]) if reach < np.inf else np.inf)
        yield order[(keys[order] <= limit) | (keys[order] == keys[order[0]])]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["flat", "pq", "16-bit codes"])
@pytest.mark.parametrize("n_probes", [2, 7, 20])
def test_adaptive_probes_are_the_lists_within_reach(uneven, metric, name, n_probes):
    X, queries = uneven[0], uneven[1][:60]
    index = IVFIndex(50, 3, probing="adaptive", metric=metric, random_state=0, **QUANTIZERS[name]).fit(X)
    rows = index.reconstruct(np.arange(5000))
    distances, indices = index.kneighbors(queries, 10, n_probes=n_probes)
    n_compared, sizes = 0, []
    for i, lists in enumerate(probed_lists(index, queries, n_probes)):
        sizes.append(len(lists))
        members = np.flatnonzero(np.isin(index.labels_, lists))
        one = index.kneighbors(queries[i : i + 1], 10, n_probes=n_probes)
        assert_array_equal(one[0][0], distances[i])
        assert_array_equal(one[1][0], indices[i])
        if len(members) < 10:  # more lists are probed then
            continue
        expected, found = exact_neighbors(queries[i : i + 1], rows[members], 10, metric)
        n_compared += 1
        assert_allclose(distances[i], expected[0], rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        if name == "flat":
            assert_array_equal(indices[i], members[found[0]])
    assert n_compared > 15
    assert len(set(sizes)) > 1
    assert max(sizes) <= 2 * n_probes


def test_adaptive_probes_are_so_many_on_average(uneven, embedded):
    for X, queries in (uneven, embedded):
        index = IVFIndex(90, 3, probing="adaptive", random_state=0).fit(X)
        for n_probes in (2, 5, 12, 40):
            sizes = [len(lists) for lists in probed_lists(index, queries, n_probes)]
            assert np.mean(sizes) == pytest.approx(n_probes, rel=0.15)


def test_adaptive_probes_find_more_in_as_many_lists(uneven, embedded):
    for (X, queries), n_probes in ((uneven, 4), (uneven, 8), (embedded, 2)):
        index = IVFIndex(90, n_probes, n_neighbors=10, probing="adaptive", random_state=0).fit(X)
        missed = 1 - index.score(queries)
        assert missed < 0.8 * (1 - index.set_params(probing="fixed").score(queries))


@pytest.mark.parametrize("target", [0.9, 0.98])
def test_adaptive_probes_are_tuned(uneven, target):
    X, queries = uneven
    index = IVFIndex(90, n_neighbors=10, probing="adaptive", target_recall=target, random_state=0).fit(X)
    assert target - 0.02 <= index.score(queries) < 1
    assert abs(index.recall_ - index.score(queries)) < 0.03
    index.tune(queries, target_recall=0.95)
    assert 0.95 <= index.score(queries) < 0.98
    assert index.recall_ == pytest.approx(index.score(queries))
    fixed = IVFIndex(90, 1, n_neighbors=10, random_state=0).fit(X).tune(queries, target_recall=0.95)
    assert index.n_probes_ < fixed.n_probes_
    codes = {"fine_quantizer": ProductQuantizer(12, 6), "refine_factor": 10}
    refined = IVFIndex(90, n_neighbors=10, probing="adaptive", random_state=0, **codes).fit(X)
    assert refined.score(queries) >= 0.93


def test_probes_are_tuned_as_they_will_be_searched(uneven):
    X, queries = uneven
    index = IVFIndex(90, 1, n_neighbors=10, probing="adaptive", random_state=0).fit(X)
    for probing in ("adaptive", "fixed", "adaptive"):
        index.set_params(probing=probing).tune(queries, target_recall=0.95)
        assert index.recall_ == pytest.approx(index.score(queries))
    with pytest.raises(ValueError, match="probing='adaptive' must be set before fit"):
        IVFIndex(30, 5, random_state=0).fit(X).set_params(probing="adaptive").tune(queries)


def test_adaptive_probes_of_one_and_of_all_lists(uneven):
    X, queries = uneven[0], uneven[1][:200]
    index = IVFIndex(30, 1, n_neighbors=3, probing="adaptive", random_state=0).fit(X)
    for n_probes in (1, 30, 99):
        adaptive = index.set_params(probing="adaptive").kneighbors(queries, n_probes=n_probes)[1]
        fixed = index.set_params(probing="fixed").kneighbors(queries, n_probes=n_probes)[1]
        assert_array_equal(adaptive, fixed)
    assert_array_equal(fixed, exact_neighbors(queries, X, 3)[1])


def test_adaptive_probes_are_measured_in_fit(uneven):
    X, queries = uneven
    with pytest.raises(ValueError, match="probing='adaptive' must be set before fit"):
        IVFIndex(30, 5, random_state=0).fit(X).set_params(probing="adaptive").kneighbors(queries)
    index = IVFIndex(30, 5, probing="adaptive", random_state=0).fit(X[:4000])
    before = index._file.probing().probes(5)
    index.partial_fit(X[4000:]).remove(np.arange(500))
    assert index._file.probing().probes(5) == before
    assert pickle.loads(pickle.dumps(index))._file.probing().probes(5) == before
    found = index.kneighbors(queries, 10)[1]
    assert found.min() >= 500
    subset = np.arange(600, 650)
    assert np.isin(index.kneighbors(queries[:50], 40, subset=subset)[1], subset).all()
    for _ in range(2):  # whatever the number of threads
        assert_array_equal(index.set_params(n_jobs=1).kneighbors(queries, 10)[1], found)
        index.set_params(n_jobs=3)


@pytest.mark.parametrize("metric", ["euclidean", "inner_product"])
def test_adaptive_probes_where_rows_are_zeros(metric, rng):
    X = rng.normal(size=(1300, 3)).astype(np.float32)
    X[rng.random(1300) < 0.4] = 0
    index = IVFIndex(8, 1, probing="adaptive", metric=metric, random_state=0).fit(X[40:])
    for n_probes in (2, 3, 7):
        assert np.isfinite(index._file.probing().probes(n_probes).reach)
        distances, indices = index.kneighbors(X[:40], 5, n_probes=n_probes)
        for i, lists in enumerate(probed_lists(index, X[:40], n_probes)):
            members = np.flatnonzero(np.isin(index.labels_, lists))
            expected, found = exact_neighbors(X[i : i + 1], X[40:][members], 5, metric)
            assert_array_equal(distances[i], expected[0])
            assert_array_equal(indices[i], members[found[0]])


@pytest.mark.parametrize("n_lists", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["copies", "few values", "float32"])
def test_adaptive_probes_of_few_lists_and_of_copies(n_lists, kind):
    X, queries = data(kind)
    index = IVFIndex(n_lists, 2, probing="adaptive", random_state=0).fit(X)
    for k in (1, 30, 400):
        assert index.kneighbors(queries, k)[1].shape == (30, k)
    assert_array_equal(index.kneighbors(X[:50], 1, n_probes=1)[0], np.zeros((50, 1)))
    assert_array_equal(index.kneighbors(queries, 7, n_probes=n_lists)[1], exact_neighbors(queries, X, 7)[1])


def test_search_parameters_take_effect_after_fit(embedded):
    X, queries = embedded
    index = IVFIndex(60, 4, random_state=0).fit(X)
    low = index.score(queries)
    assert index.set_params(n_probes=60).score(queries) == 1.0
    assert index.set_params(n_probes=4).score(queries) == low
    assert index.set_params(n_neighbors=9).kneighbors(queries)[1].shape == (1500, 9)
    assert_array_equal(
        index.kneighbors(queries[:50], n_probes=60)[1],
        index.set_params(n_probes=60).kneighbors(queries[:50])[1],
    )


# ---- quantizers


@pytest.mark.parametrize(
    "coarse",
    [KMeans(n_init=1), MiniBatchKMeans(n_init=1), LloydKMeans(init="random"), LloydKMeans(metric="cosine")],
    ids=repr,
)
def test_any_clusterer_is_a_coarse_quantizer(coarse):
    X, queries = data("float64")
    index = IVFIndex(7, 7, coarse_quantizer=coarse, random_state=0).fit(X)
    assert index.n_lists_ == 7
    assert type(index.coarse_quantizer_) is type(coarse)
    assert coarse.n_clusters == 8  # a clone was fitted
    assert not hasattr(coarse, "cluster_centers_")
    assert_array_equal(index.kneighbors(queries)[1], exact_neighbors(queries, X)[1])


def test_quantizers_are_cloned_and_seeded():
    X, queries = data("float64")
    fine = ProductQuantizer(4, 4)
    indexes = [
        IVFIndex(7, coarse_quantizer=LloydKMeans(), fine_quantizer=fine, n_probes=7, random_state=3)
        for _ in "ab"
    ]
    first, second = (index.fit(X).kneighbors(queries) for index in indexes)
    assert_array_equal(first[0], second[0])
    assert not hasattr(fine, "codebooks_")
    assert fine.random_state is None
    assert "fine_quantizer__n_bits" in indexes[0].get_params()


@pytest.mark.parametrize(("max_samples", "n_rows"), [(0.5, 3000), (100, 100), (None, 6000), ("auto", 1024)])
def test_fine_quantizer_trains_on_its_max_samples(embedded, monkeypatch, max_samples, n_rows):
    seen = []
    train = ProductQuantizer._train
    monkeypatch.setattr(
        ProductQuantizer, "_train", lambda self, X, rng: seen.append(len(X)) or train(self, X, rng)
    )
    fine = ProductQuantizer(4, 2, max_samples=max_samples, random_state=0)
    IVFIndex(20, 2, fine_quantizer=fine, random_state=0).fit(embedded[0])
    assert seen == [n_rows]


def test_fewer_distinct_rows_than_lists():
    X = np.repeat(np.eye(4), 25, axis=0)
    index = IVFIndex(10, random_state=0).fit(X)
    assert index.n_lists_ == 4
    assert_array_equal(
        index.kneighbors(np.eye(4), 3)[1], [[0, 1, 2], [25, 26, 27], [50, 51, 52], [75, 76, 77]]
    )


@pytest.mark.parametrize("n_samples", [1, 2, 5, 16, 17, 40])
def test_defaults_clip_themselves(n_samples):
    X = np.random.default_rng(0).normal(size=(n_samples, 3))
    index = IVFIndex(n_neighbors=1).fit(X)
    assert_array_equal(index.kneighbors(X)[1][:, 0], np.arange(n_samples))


@pytest.mark.parametrize("n_jobs", [1, 2, 4])
def test_the_same_index_for_every_number_of_threads(embedded, n_jobs):
    X, queries = embedded
    one, other = (IVFIndex(30, n_jobs=jobs, random_state=0).fit(X) for jobs in (1, n_jobs))
    assert_array_equal(one.labels_, other.labels_)
    assert one.n_probes_ == other.n_probes_
    assert_array_equal(one.kneighbors(queries)[0], other.kneighbors(queries)[0])


def test_inputs_are_never_changed():
    X, queries = data("float64")
    copies = X.copy(), queries.copy()
    index = IVFIndex(
        13, fine_quantizer=ProductQuantizer(4, 4, rotation="opq"), refine_factor=3, metric="cosine"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index.fit(X)
        index.kneighbors(queries)
        index.radius_neighbors(queries)
        index.partial_fit(X).transform(queries)
        index.remove([3])
        index.tune(queries)
    assert_array_equal(X, copies[0])
    assert_array_equal(queries, copies[1])
    flat = IVFIndex(13, 13, random_state=0).fit(X)
    before = flat.kneighbors(queries)[1]
    X[:] = 0  # the index keeps its own vectors
    assert_array_equal(flat.kneighbors(queries)[1], before)


def test_metric_is_that_of_fit():
    X, queries = data("float64")
    index = IVFIndex(13, 13, random_state=0).fit(X)
    expected = index.kneighbors(queries)[0]
    assert_array_equal(clone(index).fit(X).set_params(metric="cosine").kneighbors(queries)[0], expected)


def test_verbose_reports_steps(capsys):
    X, _ = data("float64")
    IVFIndex(13, verbose=1, random_state=0).fit(X)
    assert "13 lists trained on 400 rows" in capsys.readouterr().out

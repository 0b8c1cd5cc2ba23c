"""LloydKMeans: worked by hand, against scikit-learn, against float64 differences, invariants."""

import tracemalloc
import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import cosine_distances
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skivfpq import LloydKMeans
from skivfpq._algorithms import blocks, lloyd, planes
from skivfpq._algorithms.seeding import Seeding, canonical_order, kmeans_plusplus
from skivfpq._kernels import NATIVE

SIX_POINTS = np.array([[0, 0], [0.2, 0.1], [0.1, 0.2], [5, 5], [5.1, 4.9], [4.9, 5.1]])


def differences(X, centers):
    """Squared distances (n_samples, n_clusters) in float64."""
    return np.square(X.astype(np.float64)[:, None] - centers.astype(np.float64)).sum(axis=-1)


def lloyd_by_differences(X, centers, max_iter):
    """The textbook, in float64: assign, move to the mean, until nothing changes."""
    X, centers = X.astype(np.float64), centers.astype(np.float64)
    for _ in range(max_iter):
        labels = differences(X, centers).argmin(axis=1)
        moved = np.array([X[labels == k].mean(axis=0) for k in range(len(centers))])
        if np.array_equal(moved, centers):
            break
        centers = moved
    return centers, differences(X, centers).argmin(axis=1)


# ---- worked by hand


def test_textbook_example():
    kmeans = LloydKMeans(n_clusters=2, init="random", n_init=1, random_state=0).fit(SIX_POINTS)
    assert_allclose(kmeans.cluster_centers_, [[5, 5], [0.1, 0.1]], rtol=1e-12)
    assert_array_equal(kmeans.labels_, [1, 1, 1, 0, 0, 0])
    # (0.02 + 0.01 + 0.01) + (0 + 0.02 + 0.02)
    assert_allclose(kmeans.inertia_, 0.08, rtol=1e-12)
    assert kmeans.labels_.dtype == np.int32


def test_random_init_draws_distinct_rows_as_documented():
    rows = np.random.default_rng(7).choice(6, size=3, replace=False)
    kmeans = LloydKMeans(3, init="random", n_init=1, random_state=7, max_iter=1).fit(SIX_POINTS)
    labels = differences(SIX_POINTS, SIX_POINTS[rows]).argmin(axis=1)
    means = np.array([SIX_POINTS[labels == k].mean(axis=0) for k in range(3)])
    assert_allclose(kmeans.cluster_centers_, means, rtol=1e-12)


def test_weights_by_hand():
    kmeans = LloydKMeans(1).fit([[0.0], [10.0]], sample_weight=[3, 1])
    assert_allclose(kmeans.cluster_centers_, [[2.5]])
    assert_allclose(kmeans.inertia_, 3 * 2.5**2 + 7.5**2)
    assert_allclose(kmeans.score([[0.0], [10.0]], sample_weight=[3, 1]), -kmeans.inertia_)


def test_one_iteration_with_an_empty_cluster_by_hand():
    X = np.array([[0.0], [1.0], [9.0], [10.0], [30.0]])
    kmeans = LloydKMeans(3, init=np.array([[0.5], [9.5], [1000.0]]), max_iter=1).fit(X)
    # 30 is farthest from its center 9.5, so the empty cluster moves there, and 9.5 loses it
    assert_allclose(kmeans.cluster_centers_, [[0.5], [9.5], [30.0]])
    assert_array_equal(kmeans.labels_, [0, 0, 1, 1, 2])


def test_copies_move_to_an_empty_cluster_together():
    X = np.array([[0.0], [1.0], [20.0], [20.0], [5.0]])
    kmeans = LloydKMeans(2, init=np.array([[4.0], [1000.0]]), max_iter=1).fit(X)
    assert_allclose(kmeans.cluster_centers_, [[2.0], [20.0]])


def test_a_cluster_that_loses_its_only_row_joins_the_largest():
    X, init = np.array([[0.0], [1.0], [100.0]]), np.array([[0.0], [90.0], [1000.0]])
    # 100 is farthest from its center, 90, so the empty cluster moves there, and 90 is left without rows
    ours = LloydKMeans(3, init=init, max_iter=1)
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(2\)"):
        ours.fit(X)
    assert_allclose(ours.cluster_centers_, [[0.5], [0.5], [100.0]])
    assert_array_equal(ours.labels_, [0, 0, 2])
    with pytest.warns(ConvergenceWarning):
        theirs = KMeans(3, init=init, n_init=1, max_iter=1).fit(X)
    assert_allclose(ours.cluster_centers_, theirs.cluster_centers_)


# ---- against scikit-learn, same first centers


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["dense", "csr matrix", "csr array"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_empty", [0, 1, 2])
@pytest.mark.parametrize("max_iter", [2, 300])
def test_equals_scikit_learn(seed, dtype, kind, weighted, n_empty, max_iter):
    rng = np.random.default_rng(seed)
    X = (rng.normal(size=(300, 7)) + 3 * rng.integers(4, size=(300, 1))).astype(dtype)
    if kind != "dense":
        X *= rng.random(X.shape) < 0.7
    init = X[rng.choice(300, 10, replace=False)].copy()
    init[10 - n_empty :] = 1000 + 10 * np.arange(n_empty)[:, None]
    weights = rng.random(300) + 0.1 if weighted else None
    rows = {"dense": X, "csr matrix": sparse.csr_matrix(X), "csr array": sparse.csr_array(X)}[kind]

    ours = LloydKMeans(10, init=init, max_iter=max_iter).fit(rows, sample_weight=weights)
    theirs = KMeans(10, init=init, n_init=1, max_iter=max_iter).fit(rows, sample_weight=weights)
    rtol = 1e-6 if dtype == np.float64 else 1e-5  # theirs adds float32 in float32
    assert_array_equal(ours.labels_, theirs.labels_)
    assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=rtol, atol=rtol)
    assert_allclose(ours.inertia_, theirs.inertia_, rtol=rtol)
    assert ours.cluster_centers_.dtype == dtype
    if dtype == np.float64:
        assert ours.n_iter_ == theirs.n_iter_
    assert_allclose(ours.transform(rows), theirs.transform(rows), rtol=1e-4, atol=1e-4)


def test_default_fit_is_as_good_as_scikit_learns():
    X = load_digits().data
    ours = [LloydKMeans(10, random_state=s).fit(X).inertia_ for s in range(10)]
    theirs = [KMeans(10, random_state=s).fit(X).inertia_ for s in range(10)]
    assert np.mean(ours) < 1.01 * np.mean(theirs)


# ---- exact labels, where the expansion of the square cancels


def offset_data(case, dtype, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(600, 16))
    if case == "two clouds":
        X += rng.choice([-1000, 1000], size=(600, 1))
    else:
        X += case
    return X.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", [0, 1e3, 1e6, "two clouds"])
def test_labels_are_the_argmin_of_float64_differences(seed, dtype, case):
    X = offset_data(case, dtype, seed)
    kmeans = LloydKMeans(20, random_state=seed).fit(X)
    expected = differences(X, kmeans.cluster_centers_)
    assert_array_equal(kmeans.labels_, expected.argmin(axis=1))
    assert_array_equal(kmeans.predict(X), kmeans.labels_)
    assert_allclose(kmeans.inertia_, expected.min(axis=1).sum(), rtol=1e-12)
    # differences in float64 decide, even where the two are float32 of 1e6: 0.06 apart
    rtol = 1e-6 if dtype == np.float32 else 1e-12
    assert_allclose(kmeans.transform(X), np.sqrt(expected), rtol=rtol)


@pytest.mark.parametrize("case", [0, 1e3, 1e6, "two clouds"])
def test_equals_float64_lloyd_by_differences(seed, case):
    X = offset_data(case, np.float64, seed)
    init = X[np.random.default_rng(seed).choice(600, 12, replace=False)]
    kmeans = LloydKMeans(12, init=init, tol=0).fit(X)
    centers, labels = lloyd_by_differences(X, init, 300)
    assert_array_equal(kmeans.labels_, labels)
    assert_allclose(kmeans.cluster_centers_, centers, rtol=1e-12)


def test_scikit_learn_mislabels_what_we_do_not():
    X = offset_data("two clouds", np.float32, 0)
    theirs = KMeans(20, n_init=1, random_state=0).fit(X)
    wrong = theirs.predict(X) != differences(X, theirs.cluster_centers_).argmin(axis=1)
    assert wrong.mean() > 0.1  # else this test compares with nothing
    ours = LloydKMeans(20, init=theirs.cluster_centers_, max_iter=1).fit(X)
    assert_array_equal(ours.predict(X), differences(X, ours.cluster_centers_).argmin(axis=1))


@pytest.mark.parametrize("params", [{}, {"init": "random"}, {"metric": "cosine"}, {"max_samples": 0.5}])
@pytest.mark.parametrize("max_iter", [1, 3, 300])
def test_predict_on_the_training_rows_gives_labels(blobs, seed, params, max_iter):
    for X in (blobs, blobs.astype(np.float32), (10 * blobs).astype(np.int64), sparse.csr_matrix(blobs)):
        kmeans = LloydKMeans(9, max_iter=max_iter, random_state=seed, **params).fit(X)
        assert_array_equal(kmeans.predict(X), kmeans.labels_)
        assert_allclose(kmeans.score(X), -kmeans.inertia_, rtol=1e-12)


# ---- seeding


def brute_force_seeding(X, n_clusters, weights, rng):
    """Greedy k-means++ by differences, with the draws of the real one."""
    order = canonical_order(X)
    n_trials = 2 + int(np.log(n_clusters))

    def draw(mass, n):
        uniforms = rng.random(n) * np.cumsum(mass[order])[-1]
        return order[np.searchsorted(np.cumsum(mass[order]), uniforms, side="right")]

    centers = list(draw(weights, 1))
    while len(centers) < n_clusters:
        closest = differences(X, X[centers]).min(axis=1)
        candidates = draw(weights * closest, n_trials)
        candidates = sorted(candidates, key=lambda row: np.flatnonzero(order == row)[0])
        potentials = [(weights * np.minimum(closest, differences(X, X[[c]])[:, 0])).sum() for c in candidates]
        best = min(potentials)
        centers.append(next(c for c, p in zip(candidates, potentials) if p <= best * (1 + 1e-10)))
    return centers


@pytest.mark.parametrize("offset", [0, 1e6])
def test_kmeans_plusplus_picks_what_brute_force_picks(blobs, seed, offset):
    X, weights = blobs + offset, np.random.default_rng(seed).random(len(blobs))
    picks, labels, closest = kmeans_plusplus(X, 25, weights, np.random.default_rng(seed))
    expected = brute_force_seeding(X, 25, weights, np.random.default_rng(seed))
    assert_array_equal(X[picks], X[expected])
    assert_array_equal(labels, differences(X, X[picks]).argmin(axis=1))
    assert_array_equal(closest, differences(X, X[picks]).min(axis=1))


def test_candidate_distances_are_exact():
    X = np.random.default_rng(0).normal(size=(50, 5)) + 1e6
    closest = Seeding(X, np.ones(50)).to_rows(np.array([3, 9]), np.full((2, 50), np.inf))
    assert_array_equal(closest, differences(X, X[[3, 9]]).T)
    tiny = X * 2.0**-20
    closer = Seeding(tiny, np.ones(50)).to_rows(np.array([8]), differences(tiny, tiny[[3]]).T)
    assert_array_equal(closer[0], differences(tiny, tiny[[3, 8]]).min(axis=1))


def test_integer_weights_equal_repeated_rows_in_any_order(blobs, seed):
    rng = np.random.default_rng(seed)
    weights = rng.integers(0, 4, size=len(blobs))
    repeated = np.repeat(blobs, weights, axis=0)[rng.permutation(weights.sum())]
    ours = LloydKMeans(12, random_state=seed)
    weighted = clone(ours).fit(blobs, sample_weight=weights)
    others = [clone(ours).fit(repeated), clone(ours).fit(sparse.csr_array(repeated))]
    for other in others:
        assert_allclose(other.cluster_centers_, weighted.cluster_centers_, rtol=1e-9)
        assert_array_equal(other.predict(blobs), weighted.labels_)


def test_float32_copies_get_the_same_centers(blobs, seed):
    single, double = (
        LloydKMeans(8, random_state=seed).fit(blobs.astype(t)) for t in (np.float32, np.float64)
    )
    assert_array_equal(single.labels_, double.labels_)


# ---- fewer distinct rows than clusters


@pytest.mark.parametrize("init", ["k-means++", "random", np.arange(10.0).reshape(5, 2)])
@pytest.mark.parametrize("container", [np.asarray, sparse.csr_matrix])
def test_one_center_for_each_distinct_row(init, container):
    X = container(np.repeat([[1.0, 2.0], [3.0, 0.0], [5.0, 6.0]], [4, 1, 7], axis=0))
    kmeans = LloydKMeans(5, init=init, random_state=0)
    with pytest.warns(
        ConvergenceWarning, match=r"distinct clusters \(3\) found smaller than n_clusters \(5\)"
    ):
        kmeans.fit(X)
    assert kmeans.cluster_centers_.shape == (3, 2)
    assert_array_equal(np.sort(kmeans.cluster_centers_, axis=0), [[1, 0], [3, 2], [5, 6]])
    assert_array_equal(np.unique(kmeans.labels_), [0, 1, 2])
    assert kmeans.inertia_ == 0
    assert kmeans.transform(X).shape == (12, 3)


def test_rows_of_weight_zero_are_no_centers():
    with pytest.warns(ConvergenceWarning):
        kmeans = LloydKMeans(3).fit([[0.0], [1.0], [50.0]], sample_weight=[1, 1, 0])
    assert_array_equal(np.sort(kmeans.cluster_centers_[:, 0]), [0, 1])


# ---- cosine


def test_cosine_is_spherical_k_means(seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(200, 6)) * rng.random((200, 1)) * 100
    kmeans = LloydKMeans(7, metric="cosine", random_state=seed).fit(X)
    assert_allclose(np.linalg.norm(kmeans.cluster_centers_, axis=1), 1)
    distances = cosine_distances(X, kmeans.cluster_centers_)
    assert_array_equal(kmeans.labels_, distances.argmin(axis=1))
    assert_allclose(kmeans.transform(X), distances, atol=1e-12)
    assert_allclose(kmeans.inertia_, distances.min(axis=1).sum())
    scaled = LloydKMeans(7, metric="cosine", random_state=seed).fit(X * 4)
    assert_array_equal(scaled.labels_, kmeans.labels_)


def test_cosine_of_rows_of_zeros():
    X = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    kmeans = LloydKMeans(2, metric="cosine", init=X[1:]).fit(X)
    assert_allclose(kmeans.transform(X), [[1, 1], [0, 1], [1, 0]], atol=1e-15)


# ---- parameters


def test_max_samples_trains_on_some_and_labels_all(blobs):
    for max_samples in (100, 0.2):
        kmeans = LloydKMeans(6, max_samples=max_samples, random_state=0).fit(blobs)
        assert kmeans.labels_.shape == (600,)
        assert_array_equal(kmeans.labels_, differences(blobs, kmeans.cluster_centers_).argmin(axis=1))
        assert_allclose(kmeans.inertia_, differences(blobs, kmeans.cluster_centers_).min(axis=1).sum())
    full = LloydKMeans(6, random_state=0).fit(blobs)
    assert kmeans.inertia_ >= full.inertia_ * 0.999
    with pytest.raises(ValueError, match="max_samples=5 leaves 5 rows to train on, fewer than n_clusters=6"):
        LloydKMeans(6, max_samples=5).fit(blobs)


def test_callable_init_gets_rows_and_a_random_state(blobs):
    seen = {}

    def first_rows(X, n_clusters, random_state):
        seen.update(shape=X.shape, random_state=random_state)
        return X[:n_clusters]

    called = LloydKMeans(4, init=first_rows, random_state=0).fit(blobs)
    given = LloydKMeans(4, init=blobs[:4]).fit(blobs)
    assert_array_equal(called.labels_, given.labels_)
    assert seen["shape"] == blobs.shape
    assert isinstance(seen["random_state"], np.random.RandomState)


def test_more_starts_are_no_worse(blobs):
    one = LloydKMeans(15, init="random", n_init=1, random_state=0).fit(blobs)
    ten = LloydKMeans(15, init="random", random_state=0).fit(blobs)
    assert ten.inertia_ <= one.inertia_


@pytest.mark.parametrize(
    "make", [lambda: 3, lambda: np.random.RandomState(3), lambda: np.random.default_rng(3)]
)
def test_random_state_kinds_repeat(blobs, make):
    first, second = (LloydKMeans(6, random_state=make()).fit(blobs) for _ in range(2))
    assert_array_equal(first.cluster_centers_, second.cluster_centers_)
    clone(LloydKMeans(6, random_state=make())).fit(blobs)


def test_tol_stops_early(blobs):
    exact, loose = LloydKMeans(20, tol=0, random_state=0), LloydKMeans(20, tol=0.1, random_state=0)
    assert loose.fit(blobs).n_iter_ < exact.fit(blobs).n_iter_


@pytest.mark.parametrize("dtype", [np.float16, np.int8, np.uint8, np.int16, np.uint16])
def test_small_dtypes_become_float32(rng, dtype):
    X = rng.integers(0, 100, size=(50, 3)).astype(dtype)
    kmeans = LloydKMeans(4, random_state=0).fit(X)
    assert kmeans.cluster_centers_.dtype == np.float32
    assert_array_equal(kmeans.predict(X), kmeans.labels_)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.longdouble, bool])
def test_other_dtypes_become_float64(rng, dtype):
    X = rng.integers(0, 2**24 + 3, size=(50, 3)).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert LloydKMeans(4, random_state=0).fit(X).cluster_centers_.dtype == np.float64


def test_integers_are_never_rounded():
    X = np.array([[2**24 + 1], [2**24], [0]], dtype=np.int32)  # one apart: float32 would merge them
    assert len(set(LloydKMeans(3).fit(X).labels_)) == 3
    with pytest.raises(ValueError, match=r"integers up to 2\*\*53"):
        LloydKMeans(1).fit(np.array([[2**53 + 1]]))


@pytest.mark.parametrize("n_jobs", [1, 2, 4, -1])
def test_the_same_bits_for_every_number_of_threads(n_jobs):
    X = np.random.default_rng(0).normal(size=(9000, 12)).astype(np.float32)
    one = LloydKMeans(40, n_jobs=1, random_state=0, max_iter=8).fit(X)
    other = LloydKMeans(40, n_jobs=n_jobs, random_state=0, max_iter=8).fit(X)
    assert_array_equal(one.cluster_centers_, other.cluster_centers_)
    assert_array_equal(one.labels_, other.labels_)
    assert one.inertia_ == other.inertia_


def test_verbose_reports_iterations(blobs, capsys):
    LloydKMeans(4, random_state=0).fit(blobs)
    assert capsys.readouterr().out == ""
    LloydKMeans(4, random_state=0, verbose=1).fit(blobs)
    assert "Iteration 1, inertia" in capsys.readouterr().out


def test_csr_that_is_not_canonical(blobs):
    rows = sparse.csr_matrix(([1.0, 2.0, 5.0, 1.0], [1, 1, 0, 1], [0, 2, 3, 4]), shape=(3, 2))
    before = rows.data.copy()
    kmeans, dense = (LloydKMeans(2, random_state=0).fit(X) for X in (rows, rows.toarray()))
    assert_array_equal(kmeans.labels_, dense.labels_)
    assert_allclose(kmeans.transform(rows), dense.transform(rows.toarray()), atol=1e-12)
    assert_allclose(kmeans.inertia_, dense.inertia_)
    assert_array_equal(rows.data, before)


# ---- inside scikit-learn


def test_grid_search_over_n_clusters_in_a_supervised_pipeline():
    X, y = load_digits(return_X_y=True)
    pipeline = make_pipeline(
        StandardScaler(), LloydKMeans(random_state=0), StandardScaler(), LogisticRegression()
    )
    search = GridSearchCV(pipeline, {"lloydkmeans__n_clusters": [5, 40]}, cv=2, n_jobs=2).fit(
        X[:600], y[:600]
    )
    assert search.best_params_ == {"lloydkmeans__n_clusters": 40}
    few, many = search.cv_results_["mean_test_score"]
    assert many > few + 0.1


def test_finds_the_clouds(blobs):
    labels = LloydKMeans(6, random_state=0).fit_predict(blobs)
    assert adjusted_rand_score(labels, KMeans(6, random_state=0).fit_predict(blobs)) > 0.95


@pytest.mark.parametrize("short", [0, blocks.SHORT])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_centers_are_means_however_rows_move(monkeypatch, dtype, short):
    """Sums follow the rows that move; rows of 1e30 come and go without a trace."""
    monkeypatch.setattr(blocks, "SHORT", short)
    monkeypatch.setattr(blocks, "MOVED", 1.0)
    monkeypatch.setattr(lloyd, "FEW", 1.0)
    rng = np.random.default_rng(0)
    X = rng.normal(size=(3000, 40)).astype(dtype)
    X[::500] *= dtype(1e30)
    weights = rng.random(3000) + 0.1
    weights[::333] *= 1e12
    step = lloyd.MemoryStep(X, weights, 2, 60)
    centers = X[rng.choice(np.arange(1, 500), 60, replace=False)]
    for number in range(12):
        moments = step(centers)
        centers = centers + rng.normal(size=centers.shape).astype(dtype) / (2 + 4 * number)
        if number == 5:
            centers[:6] = X[::500]  # which now have clusters of their own
        for cluster in range(60):
            inside = step.labels == cluster
            expected = (weights[inside, None] * X[inside].astype(np.float64)).sum(axis=0)
            scale = (weights[inside, None] * np.abs(X[inside].astype(np.float64))).sum(axis=0)
            assert np.all(np.abs(moments.sums[cluster] - expected) <= 1e-12 * scale)
            assert moments.counts[cluster] == pytest.approx(weights[inside].sum(), rel=1e-12)


@pytest.mark.skipif(not NATIVE, reason="NumPy's kernels hold matrix products")
@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_peak_memory(monkeypatch, init):
    monkeypatch.setattr(planes, "LEAST_WORK", 0)
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(200, 128))[rng.integers(200, size=40_000)] + rng.normal(size=(40_000, 128))).astype(
        "f4"
    )
    kmeans = LloydKMeans(256, init=init, n_init=1, max_iter=4, n_jobs=2, random_state=0)
    tracemalloc.start()
    try:
        kmeans.fit(X)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 0.5 * X.nbytes < peak < 1.5 * X.nbytes


@pytest.mark.parametrize("n_features", [3, 300])
def test_a_step_without_changes_adds_nothing_up(n_features):
    X = np.random.default_rng(0).normal(size=(2000, n_features))
    step = lloyd.MemoryStep(X, np.ones(2000), 1, 5)
    before = step(X[:5])
    sums, counts = before.sums.copy(), before.counts.copy()
    step.sums += 1  # to see that nobody writes
    again = step(X[:5])
    assert again.n_changed == 0
    assert_array_equal(again.sums, sums + 1)
    assert_array_equal(again.counts, counts)
    step.start()
    assert step(X[:5]).n_changed == 2000
    assert_array_equal(step.sums, sums)

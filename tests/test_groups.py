"""Lists in groups: the lists that a query probes are the nearest of those in the nearest groups."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from skivfpq import IVFIndex, LloydKMeans, ProductQuantizer, _kernels, exact_neighbors, neighbors_recall
from skivfpq._algorithms import center_planes, groups, heads
from skivfpq._algorithms.groups import Groups
from skivfpq._algorithms.probing import FixedProbes, GroupedProbes, Probes, Reaches
from skivfpq._algorithms.search import Metric, nearest_lists

native = _kernels.native
compiled = pytest.mark.skipif(not _kernels.NATIVE, reason="kernels that are compiled only")
METRICS = ["euclidean", "sqeuclidean", "cosine", "inner_product"]


@pytest.fixture(scope="module")
def clouds():
    """Rows (6000, 12) around 40 places, and queries (500, 12) like them, float32."""
    rng = np.random.default_rng(0)
    places = 3 * rng.normal(size=(40, 12))
    X = places[rng.integers(40, size=6500)] + rng.normal(size=(6500, 12))
    return np.split(np.float32(X), [6000])


def lists_by_hand(nearness, queries, centers, grouped, probes):
    """The lists that each query probes, by sorting all of them."""
    by_product = nearness.name == "inner_product"
    for query in queries:
        keys, group_keys = (
            -(query * rows).sum(axis=1) if by_product else np.square(query - rows).sum(axis=1)
            for rows in (centers, grouped.centers)
        )
        n_groups = probes.n_groups or len(group_keys)
        near = np.argsort(group_keys, kind="stable")[:n_groups]
        inside = np.flatnonzero(np.isin(grouped.labels, near))
        nearest = inside[np.argsort(keys[inside], kind="stable")]
        limit = keys[nearest[:4]].mean() + (
            np.inf if probes.reach == np.inf else probes.reach * abs(keys[nearest[0]])
        )
        few = nearest[: probes.most]
        yield few[(keys[few] <= limit) | (keys[few] == keys[nearest[0]])]


def found_in(index, query, lists):
    """The nearest rows of some lists, by looking at all of theirs."""
    members = np.flatnonzero(np.isin(index.labels_, lists))
    return members[exact_neighbors(query[None], index.reconstruct(members), 5)[1][0]]


def some_centers(rng, n=300, d=37):
    """Centers (n, d) with copies and one far away, and queries (70, d), some of them centers."""
    centers, queries = rng.normal(size=(n, d)), rng.normal(size=(70, d))
    centers[n // 2 : n // 2 + 9] = centers[:9]
    centers[11] *= 1000
    queries[:5] = centers[:5]
    return centers, queries


@compiled
@pytest.mark.parametrize("name", ["sqeuclidean", "inner_product"])
@pytest.mark.parametrize("most", [1, 9, 60, 300])
@pytest.mark.parametrize("reach", [np.inf, 0.15])
@pytest.mark.parametrize("n_groups", [0, 8, 11, 14])
@pytest.mark.parametrize("kind", ["near each other", "at random"])
def test_lists_are_the_nearest_of_the_nearest_groups(instruction_set, name, most, reach, n_groups, kind, rng):
    nearness, (centers, queries) = Metric(name), some_centers(rng)
    grouped = Groups.of(nearness, centers, 14, queries, rng, 1)
    if kind == "at random":  # the center far away is in a group of others
        grouped = replace(grouped, labels=rng.permutation(np.arange(300, dtype=np.int32) % 14))
    planes, probes = (
        center_planes.CenterPlanes(nearness, centers, groups=grouped),
        Probes(most, reach, n_groups),
    )
    expected = list(lists_by_hand(nearness, queries, centers, grouped, probes))
    for some in (slice(0, 70), slice(3, 4), slice(11, 19)):
        found, unserved = np.empty((len(queries[some]), most), dtype=np.int32), np.empty(70, np.uint8)[some]
        native.nearest_lists(
            planes.planes.packed, queries[some], found, unserved, reach, planes.groups.packed, n_groups
        )
        assert not unserved.any()
        for lists, true in zip(found, expected[some]):
            assert_array_equal(np.sort(lists[lists >= 0]), np.sort(true))
            assert lists[0] >= 0


@pytest.mark.parametrize("name", ["sqeuclidean", "inner_product"])
@pytest.mark.parametrize("n_groups", [0, 1, 5, 14])
def test_numpy_looks_in_the_nearest_groups(name, n_groups, rng):
    nearness, (centers, queries) = Metric(name), some_centers(rng)
    grouped = Groups.of(nearness, centers, 14, queries, rng, 1)
    most = int(np.sort(np.bincount(grouped.labels))[: n_groups or 14].sum())
    probes = Probes(most, n_groups=n_groups)
    _, lists = nearest_lists(nearness, queries, centers, probes, grouped)
    assert_array_equal(lists, list(lists_by_hand(nearness, queries, centers, grouped, probes)))


@compiled
def test_groups_and_a_head_of_the_centers(instruction_set, monkeypatch, rng):
    """More queries at a time than a panel has columns."""
    basis = rng.normal(size=(12, 200))
    centers, queries = (
        rng.normal(size=(n, 12)) @ basis + 0.02 * rng.normal(size=(n, 200)) for n in (300, 130)
    )
    monkeypatch.setattr(heads, "LEAST_HEAD", 0)
    monkeypatch.setattr(heads, "WORTHWHILE", 1)
    nearness = Metric("sqeuclidean")
    grouped = Groups.of(nearness, centers, 20, queries, rng, 1)
    planes, probes = (
        center_planes.CenterPlanes(nearness, centers, queries, groups=grouped),
        Probes(9, n_groups=7),
    )
    assert planes.planes.points.head is not None
    found, unserved = np.empty((130, 9), dtype=np.int32), np.empty(130, np.uint8)
    native.nearest_lists(planes.planes.packed, queries, found, unserved, np.inf, planes.groups.packed, 7)
    assert not unserved.any()
    assert_array_equal(np.sort(found), np.sort(nearest_lists(nearness, queries, centers, probes, grouped)[1]))


@compiled
@pytest.mark.parametrize("reach", [np.inf, 0.2])
def test_queries_that_scores_cannot_serve_are_told(instruction_set, reach, rng):
    nearness, (centers, queries) = Metric("sqeuclidean"), some_centers(rng)
    grouped = Groups.of(nearness, centers, 14, queries, rng, 1)
    planes = center_planes.CenterPlanes(nearness, centers, groups=grouped)
    queries[[0, 20, 69]] *= np.array([[1e30], [1e60], [1e100]])
    found, unserved = np.empty((70, 5), dtype=np.int32), np.empty(70, np.uint8)
    native.nearest_lists(planes.planes.packed, queries, found, unserved, reach, planes.groups.packed, 6)
    served, probes = unserved == 0, Probes(5, reach, 6)
    assert served.sum() >= 67
    for lists, true in zip(found[served], lists_by_hand(nearness, queries[served], centers, grouped, probes)):
        assert_array_equal(np.sort(lists[lists >= 0]), np.sort(true))


@compiled
def test_groups_that_do_not_fit_are_refused(rng):
    centers, queries = some_centers(rng)
    grouped = Groups.of(Metric("sqeuclidean"), centers, 14, queries, rng, 1)
    planes = center_planes.CenterPlanes(Metric("sqeuclidean"), centers, groups=grouped)
    found, unserved = np.empty((70, 5), dtype=np.int32), np.empty(70, np.uint8)
    others = center_planes.CenterPlanes(Metric("sqeuclidean"), centers[:13]).planes.packed
    for wrong, n_groups in ((planes.groups.packed, 15), (planes.groups.packed, -1), (None, 3), (others, 3)):
        with pytest.raises(ValueError, match="groups must be"):
            native.nearest_lists(planes.planes.packed, queries, found, unserved, np.inf, wrong, n_groups)


# ---- how many groups


def test_so_many_groups_hold_nearly_all_of_the_lists(clouds):
    X, queries = clouds
    index = IVFIndex(300, 5, n_groups=30, random_state=0).fit(X)
    centers, grouped = index._file.centers, index._file.groups
    assert (np.diff(grouped.counts) >= 0).all()
    assert grouped.counts[-1] == len(grouped.centers)
    smallest = np.cumsum(np.sort(np.bincount(grouped.labels)))
    for n_probes in (1, 3, 10, 40):
        probes = index._file.probing().probes(n_probes)
        assert 0 < probes.n_groups < 30
        assert smallest[probes.n_groups - 1] >= n_probes  # for every query
        _, near = nearest_lists(index._file.metric, queries, centers, probes, grouped)
        _, nearest = nearest_lists(index._file.metric, queries, centers, Probes(n_probes))
        covered = np.mean([np.isin(a, b).mean() for a, b in zip(nearest, near)])
        assert covered >= groups.COVERED - 0.02


def test_counts_by_hand(monkeypatch):
    monkeypatch.setattr(groups, "COVERED", 0.75)
    needed = np.array([[1, 1, 2, 3], [2, 1, 3, 1]])  # of two queries, four lists
    # The nearest list: one query of two is served by one group, both by two. Two nearest: three of four by one.
    assert_array_equal(groups._counts(needed, np.array([1, 2, 1])), [2, 2, 3, 3])  # monotone; all for all
    assert_array_equal(groups._counts(needed, np.array([4, 0, 0])), [3, 3, 3, 3])  # two groups may hold none


@given(st.lists(st.integers(1, 200), min_size=1, max_size=30), st.data())
def test_shares_are_in_proportion(sizes, data):
    sizes = np.array(sizes)
    n = data.draw(st.integers(len(sizes), sizes.sum()))
    shares = groups._shares(sizes, n)
    assert shares.sum() == n
    assert (shares >= 1).all()
    assert (shares <= sizes).all()
    larger = sizes[:, None] >= sizes
    assert (shares[:, None] >= shares - 1)[larger].all()


@pytest.mark.parametrize("kind", ["normal", "copies", "three places"])
@pytest.mark.parametrize("n_groups", [1, 5, 40])
def test_centers_of_two_levels(kind, n_groups, rng):
    X = rng.normal(size=(400, 6))
    X = {"normal": X, "copies": np.repeat(X[:100], 4, axis=0), "three places": X[np.arange(400) % 3]}[kind]
    centers = groups.two_level_centers(X, 40, n_groups, np.random.default_rng(1), 2)
    assert centers.shape == (40, 6)
    assert_array_equal(centers, groups.two_level_centers(X, 40, n_groups, np.random.default_rng(1), 1))
    if kind != "three places":
        trained = LloydKMeans(40, init=centers, n_init=1, max_iter=2).fit(X)
        plain = LloydKMeans(40, init="random", n_init=1, max_iter=10, random_state=0).fit(X)
        assert len(np.unique(trained.labels_)) == 40
        assert trained.inertia_ <= 1.15 * plain.inertia_


# ---- the index


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("probing", ["fixed", "adaptive"])
def test_results_are_those_of_numpy(clouds, metric, codes, probing, monkeypatch):
    X, queries = clouds
    fine = ProductQuantizer(4, max_iter=3, random_state=0) if codes else None
    params = {"metric": metric, "probing": probing, "fine_quantizer": fine, "random_state": 0}
    index = IVFIndex(120, 6, n_groups=20, **params).fit(X[:3000])
    found = index.kneighbors(queries[:150], 8)
    one_by_one = [index.kneighbors(query[None], 8) for query in queries[:40]]
    assert 0 < index._probes(index._file, None).n_groups < 20
    for i, part in enumerate(found):
        assert_array_equal(np.concatenate([one[i] for one in one_by_one]), part[:40])
    if _kernels.NATIVE:
        monkeypatch.setattr(center_planes.CenterPlanes, "serve", lambda self, probes: False)
        for part, numpys in zip(found, index.kneighbors(queries[:150], 8)):
            assert_array_equal(part, numpys)


@pytest.mark.parametrize("metric", METRICS)
def test_all_lists_are_all_groups(clouds, metric):
    X, queries = clouds
    index = IVFIndex(90, 4, n_groups="auto", metric=metric, random_state=0).fit(X)
    true = exact_neighbors(queries, X, 12, metric)
    for n_probes in (90, 1000):
        for part, exact in zip(index.kneighbors(queries, 12, n_probes=n_probes), true):
            assert_array_equal(part, exact)
    near = exact_neighbors(queries[:5], X, 1, metric)[0].max()
    for indices in index.radius_neighbors(queries[:5], near if metric != "inner_product" else -near)[1]:
        assert len(indices) or metric == "inner_product"


def test_rows_are_filed_under_the_nearest_of_all_lists(clouds):
    X, queries = clouds
    index = IVFIndex(200, 4, n_groups=20, random_state=0).fit(X)
    centers = index.coarse_quantizer_.cluster_centers_.astype(np.float64)
    assert_array_equal(
        index.predict(queries), nearest_lists(Metric("euclidean"), queries, centers, Probes(1))[1][:, 0]
    )
    assert_array_equal(index.labels_, index.predict(X))


@pytest.mark.parametrize("n_jobs", [2, 4])
def test_results_do_not_depend_on_threads(clouds, n_jobs):
    X, queries = clouds
    one, more = (IVFIndex(150, n_groups=16, random_state=0, n_jobs=n).fit(X) for n in (1, n_jobs))
    assert_array_equal(one.coarse_quantizer_.cluster_centers_, more.coarse_quantizer_.cluster_centers_)
    assert_array_equal(one._file.groups.centers, more._file.groups.centers)
    assert_array_equal(one._file.groups.counts, more._file.groups.counts)
    assert one.n_probes_ == more.n_probes_
    for a, b in zip(one.kneighbors(queries), more.kneighbors(queries)):
        assert_array_equal(a, b)


@pytest.mark.parametrize("probing", ["fixed", "adaptive"])
@pytest.mark.parametrize("target", [0.8, 0.95])
def test_probes_are_measured_with_their_groups(clouds, probing, target):
    X, queries = clouds
    index = IVFIndex(
        200, n_neighbors=10, n_groups=25, probing=probing, target_recall=target, random_state=0
    ).fit(X)
    true = exact_neighbors(queries, X, 10)[1]
    assert index._probes(index._file, None).n_groups > 0
    assert neighbors_recall(true, index.kneighbors(queries)[1]) >= target - 0.01
    index.tune(queries, target)
    recall = neighbors_recall(true, index.kneighbors(queries)[1])
    assert index.recall_ <= recall + 1e-9  # lists that make up for those of other groups are not counted
    assert recall >= target


@pytest.mark.parametrize("probing", ["fixed", "adaptive"])
def test_fewest_lists_by_hand(probing):
    keys = np.arange(8.0)[None] + 1
    grouped = Groups(np.zeros((4, 1)), np.zeros(8, np.int32), np.array([1, 1, 2, 2, 3, 3, 3, 4]))
    every = Reaches(keys) if probing == "adaptive" else FixedProbes(8)
    places, group_places = np.array([[0, 2, 2, 1]]), np.array([[0, 0, 2, 3]])
    if probing == "fixed":
        assert_array_equal(GroupedProbes(every, grouped).covering(keys, places, group_places), [[1, 3, 5, 8]])
    covering = GroupedProbes(every, grouped).covering(keys, places, group_places)
    for number, place, group in zip(covering[0], places[0], group_places[0]):
        for n in range(1, 9):
            probes = GroupedProbes(every, grouped).probes(n)
            is_found = place < probes.within(keys)[0, : probes.most].sum() and group < (probes.n_groups or 4)
            assert is_found == (n >= number)


def test_groups_outlive_what_happens_to_the_index(clouds):
    X, queries = clouds
    index = IVFIndex(150, 6, n_groups=16, random_state=0).fit(X[:5000])
    same = pickle.loads(pickle.dumps(index))
    assert_array_equal(same.kneighbors(queries)[1], index.kneighbors(queries)[1])
    index.partial_fit(X[5000:]).remove(np.arange(0, 6000, 7))
    assert index._probes(index._file, None).n_groups > 0
    file, probes = index._file, index._probes(index._file, None)
    _, lists = nearest_lists(file.metric, queries, file.centers, probes, file.groups)
    for query, own, found in zip(queries, lists, index.kneighbors(queries)[1]):
        assert_array_equal(found, found_in(index, query, own))


def test_no_groups_after_fit_are_all_lists(clouds, monkeypatch):
    X, queries = clouds
    monkeypatch.setattr(groups, "COVERED", 0.7)
    index = IVFIndex(150, 3, n_groups=40, random_state=0).fit(X)
    by_groups = index.kneighbors(queries)[1]
    flat = index.set_params(n_groups=None).kneighbors(queries)[1]
    assert (flat != by_groups).any()
    _, lists = nearest_lists(index._file.metric, queries, index._file.centers, Probes(3))
    for query, own, found in zip(queries, lists, flat):
        assert_array_equal(found, found_in(index, query, own))
    assert_array_equal(index.set_params(n_groups=40).kneighbors(queries)[1], by_groups)


@pytest.mark.parametrize("n_groups", [1, 7, 20, 500, "auto"])
def test_few_lists_may_have_any_number_of_groups(clouds, n_groups):
    X, queries = clouds
    for n_lists in (1, 2, 7):
        index = IVFIndex(n_lists, 2, n_groups=n_groups, random_state=0).fit(X[:60])
        number = min(n_lists, int(2 * np.sqrt(n_lists)) if n_groups == "auto" else n_groups)
        assert index.n_groups_ == (None if number == 1 else number)
        assert (np.sort(index.kneighbors(queries[:9], 60)[1]) == np.arange(60)).all()


def test_groups_of_a_coarse_quantizer_that_is_given(clouds):
    X, queries = clouds
    given = IVFIndex(150, 3, n_groups=40, coarse_quantizer=LloydKMeans(max_iter=3), random_state=0).fit(X)
    plain = IVFIndex(150, 3, coarse_quantizer=LloydKMeans(max_iter=3), random_state=0).fit(X)
    assert_array_equal(given.coarse_quantizer_.cluster_centers_, plain.coarse_quantizer_.cluster_centers_)
    file, probes = given._file, given._probes(given._file, None)
    assert probes.n_groups > 0
    _, lists = nearest_lists(file.metric, queries, file.centers, probes, file.groups)
    for query, own, found in zip(queries, lists, given.kneighbors(queries)[1]):
        assert_array_equal(found, found_in(plain, query, own))


def test_copies_of_rows_leave_no_list_empty(rng):
    X = np.repeat(rng.normal(size=(100, 5)), 4, axis=0)
    index = IVFIndex(90, 5, n_groups=9, random_state=0).fit(X)
    assert index.list_sizes_.min() > 0
    assert_array_equal(index.labels_, np.repeat(index.labels_[::4], 4))


def test_rows_that_are_all_the_same_have_one_group():
    index = IVFIndex(3, 1, n_groups=2, random_state=0).fit(np.ones((50, 4)))
    assert_array_equal(index.kneighbors(np.ones((2, 4)), 3)[1], [[0, 1, 2]] * 2)

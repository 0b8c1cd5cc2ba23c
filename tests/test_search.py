"""The certified search against the NumPy search, on every instruction set that runs: same rows, same keys, same bits."""

import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from skivfpq import IVFIndex, _kernels, exact_neighbors
from skivfpq._algorithms import center_planes, heads, list_planes
from skivfpq._algorithms.planes import all_features, turned_head
from skivfpq._algorithms.probing import Probes
from skivfpq._algorithms.search import Metric, nearest_rows

native = _kernels.native
pytestmark = pytest.mark.skipif(not _kernels.NATIVE, reason="kernels that are compiled only")

METRICS = ["euclidean", "cosine", "inner_product"]
DTYPES = [np.float64, np.float32, np.float16, np.int8, np.uint8]
CASES = [
    "normal",
    "offset",
    "duplicates",
    "two places",
    "dense spot",
    "zeros",
    "long rows",
    "long column",
    "integers",
    "tiny",
    "1e30",
]


def normal_rows(case, shape, dtype, rng):
    """Float64 rows (n, d), the first of which are like the queries."""
    X = rng.normal(size=shape)
    n = len(X)
    if case == "offset":
        X += 1e6 if dtype == np.float64 else 300 if dtype in (np.float32, np.float16) else 1
    elif case == "duplicates":
        X[n // 2 :] = X[: n - n // 2]
    elif case == "two places":
        X[:] = X[rng.integers(2, size=n)]
    elif case == "dense spot":
        X[n // 4 :] = X[0] + 1e-3 * X[n // 4 :]
    elif case == "integers":
        X = rng.integers(-3, 4, size=shape).astype(np.float64)
    elif case == "bytes":
        X = rng.integers(256, size=shape).astype(np.float64)
    return X


def rows_of(case, shape, dtype, rng):
    """The same of a dtype, some scaled."""
    X = normal_rows(case, shape, dtype, rng)
    scaled, factor = {
        "zeros": (np.s_[::3], 0),
        "long rows": (np.s_[::7], 100),
        "long column": (np.s_[:, 0], 100),
        "tiny": (np.s_[:], 1e-30),
        "1e30": (np.s_[:], 1e30),
    }.get(case, (np.s_[:], 1))
    X[scaled] *= factor
    if dtype == np.float16:
        return np.clip(X, -6e4, 6e4).astype(dtype)
    if dtype in (np.int8, np.uint8):
        info = np.iinfo(dtype)
        return np.clip(np.rint(40 * X + (100 if dtype == np.uint8 else 0)), info.min, info.max).astype(dtype)
    return X.astype(dtype)


def filed(metric, X, n_lists, rng, n_axes=0):
    """Planes of the rows in lists of any size, some empty; scanned by a head of so many axes."""
    offsets = np.concatenate([[0], np.sort(rng.integers(len(X) + 1, size=n_lists - 1)), [len(X)]])
    ids = rng.permutation(len(X)).astype(np.int32)
    head = any_head(metric, X, n_axes) if n_axes else None
    return list_planes.pack_lists(metric, X, offsets.astype(np.int64), ids, head=head)


@np.errstate(over="ignore")
def any_head(metric, X, n_axes):
    """A head on axes that have nothing to do with the rows."""
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(X.shape[1], n_axes)))[0].T
    rows = np.float32(metric.rows(X))
    origin = all_features(rows).origin
    tails = rows - origin - (rows - origin) @ np.float32(axes.T @ axes)
    lengths = np.linalg.norm(tails, axis=1)
    usual = np.median(lengths[np.isfinite(lengths)]) if np.isfinite(lengths).any() else 0.0
    return turned_head(origin, np.ascontiguousarray(axes), float(usual))


def all_lists(n_queries, n_lists, rng):
    return np.array([rng.permutation(n_lists) for _ in range(n_queries)], dtype=np.int32)


def assert_same_search(metric, planes, queries, k, probes, allowed=None):
    """Asserts that the queries that are served have the neighbours of the NumPy search; returns how many are."""
    everything = np.arange(len(planes.ids))
    searched = planes if allowed is None else planes.allowing(allowed)
    allowed = planes.ids >= 0 if allowed is None else allowed
    keys, positions, left = searched.search(queries, probes, k, 1)
    served = np.setdiff1d(np.arange(len(queries)), left)
    lists = np.searchsorted(planes.offsets, everything, side="right") - 1
    for query in served:
        inside = np.isin(lists, probes[query]) & allowed
        rows = np.flatnonzero(inside)
        true_keys, true = nearest_rows(metric, queries[[query]], planes.vectors[rows], k, planes.ids[rows])
        assert_array_equal(positions[query], rows[true[0]])
        assert_array_equal(keys[query], true_keys[0])
    return len(served)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METRICS)
def test_neighbors_are_those_of_the_plain_search(instruction_set, name, dtype, case, rng):
    metric, X = Metric(name), rows_of(case, (700, 19), dtype, rng)
    planes = filed(metric, X, 9, rng)
    if planes is None:
        assert case in ("tiny", "1e30")
        return
    queries = metric.queries(rows_of(case, (40, 19), dtype, rng))
    queries[:5] = metric.queries(X[:5])
    n_served = assert_same_search(metric, planes, queries, 7, all_lists(40, 9, rng))
    assert n_served >= (0 if case in ("zeros", "long rows", "two places", "tiny") else 38)


@pytest.fixture
def heads_always(monkeypatch):
    """Heads are used however many rows are too long for them."""
    monkeypatch.setattr(list_planes, "MOST_STRAYS", 1)


@pytest.mark.parametrize("case", [*CASES, "bytes"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["euclidean", "cosine"])
def test_heads_exclude_none_of_the_neighbors(instruction_set, heads_always, name, dtype, case, rng):
    metric, X = Metric(name), rows_of(case, (700, 45), dtype, rng)
    planes = filed(metric, X, 15, rng, n_axes=12)
    if planes is None:
        assert case in ("tiny", "1e30")
        return
    assert planes.whole is not None
    queries = metric.queries(rows_of(case, (40, 45), dtype, rng))
    queries[:5] = metric.queries(X[:5])
    probes = all_lists(40, 15, rng)
    n_served = assert_same_search(metric, planes, queries, 7, probes)
    assert n_served >= (0 if case in ("zeros", "long rows", "two places", "tiny", "1e30") else 38)
    for query in (0, 20):  # alone
        assert_same_search(metric, planes, queries[query : query + 1], 7, probes[query : query + 1])


@pytest.mark.parametrize(
    ("d", "n_axes"), [(20, 1), (63, 28), (64, 12), (65, 60), (129, 33), (300, 124), (1000, 60)]
)
def test_heads_of_all_widths(instruction_set, heads_always, d, n_axes, rng):
    metric, X = Metric("euclidean"), rng.normal(size=(400, 10)) @ rng.normal(size=(10, d))
    X = np.float32(X + 0.1 * rng.normal(size=X.shape))
    planes = filed(metric, X, 12, rng, n_axes)
    assert planes.points.width == n_axes + 4
    assert planes.whole.codes.shape[2] == 1
    queries = X[:30] + np.float32(0.1) * rng.normal(size=(30, d)).astype(np.float32)
    for k, n in [(1, 30), (5, 30), (20, 17), (300, 2), (5, 1)]:
        assert assert_same_search(metric, planes, queries[:n], k, all_lists(n, 12, rng)) == n


@pytest.mark.parametrize("n_axes", [12, 92])
def test_heads_of_many_rows(instruction_set, heads_always, n_axes, rng):
    """Enough to be searched by heads in batches too, whatever the instruction set."""
    metric, X = Metric("euclidean"), rng.normal(size=(9000, 10)) @ rng.normal(size=(10, 100))
    X = np.float32(X + 0.2 * rng.normal(size=X.shape))
    X[4000:4500] = X[:500]
    planes = filed(metric, X, 20, rng, n_axes)
    queries = X[:50] + np.float32(0.1) * rng.normal(size=(50, 100)).astype(np.float32)
    allowed = rng.random(9000) < 0.5
    assert assert_same_search(metric, planes, queries, 5, all_lists(50, 20, rng)) == 50
    assert assert_same_search(metric, planes, queries, 90, all_lists(50, 20, rng), allowed) == 50


def test_heads_that_rows_are_too_long_for_are_not_used(rng):
    X = np.float32(rng.normal(size=(600, 40)))
    metric, head = Metric("euclidean"), any_head(Metric("euclidean"), X, 8)
    offsets, ids = np.array([0, 300, 600]), np.arange(600, dtype=np.int32)
    assert list_planes.pack_lists(metric, X, offsets, ids, head=head).whole is not None
    X[5::9, 3] += 1e4 * head.axes[3, 0]
    assert list_planes.pack_lists(metric, X, offsets, ids, head=head).whole is None


def test_heads_wider_than_all_features_are_refused(rng):
    X = np.float32(rng.normal(size=(100, 64)))
    planes = filed(Metric("euclidean"), X, 3, rng, n_axes=63)
    with pytest.raises(ValueError, match="wider than heads"):
        planes.search(X[:5], all_lists(5, 3, rng), 2, 1)


def test_heads_with_strays_subsets_and_far_queries(instruction_set, heads_always, rng):
    metric, X = Metric("euclidean"), rng.normal(size=(900, 40)).astype(np.float32)
    X[::50] *= 30  # strays
    planes = filed(metric, X, 14, rng, n_axes=28)
    assert len(planes.strays) > 5
    queries = rng.normal(size=(30, 40)) * 1.0
    queries[:9] *= np.array([0, 3, 10, 30, 100, 1e3, 1e6, 1e12, 1e30])[:, None]
    probes = all_lists(30, 14, rng)
    allowed = rng.random(900) < 0.3
    assert assert_same_search(metric, planes, queries, 4, probes) == 30
    assert assert_same_search(metric, planes, queries, 4, probes, allowed) == 30
    probes[::2, 9:] = -1
    probes[3] = -1
    assert assert_same_search(metric, planes, queries, 4, probes) == 29


@pytest.mark.parametrize("d", [1, 2, 3, 5, 16, 63, 64, 65, 129, 300, 1000])
@pytest.mark.parametrize("name", METRICS)
def test_all_widths(instruction_set, name, d, rng):
    metric, X = Metric(name), rng.normal(size=(300, d)).astype(np.float32)
    planes = filed(metric, X, 3, rng)
    queries = metric.queries(rng.normal(size=(20, d)).astype(np.float32))
    served = assert_same_search(metric, planes, queries, 5, all_lists(20, 3, rng))
    assert served == 20


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 64, 300, 1000])
@pytest.mark.parametrize("n_queries", [1, 2, 17, 70])
def test_any_number_of_neighbors_and_queries(instruction_set, k, n_queries, rng):
    metric, X = Metric("euclidean"), rng.normal(size=(1100, 12)).astype(np.float32)
    planes = filed(metric, X, 5, rng)
    queries = rng.normal(size=(n_queries, 12))
    assert assert_same_search(metric, planes, queries, k, all_lists(n_queries, 5, rng)) == n_queries


def test_some_lists_only_and_some_rows_only(instruction_set, rng):
    metric, X = Metric("euclidean"), rng.normal(size=(900, 20)).astype(np.float32)
    X[::50] *= 30  # strays
    planes = filed(metric, X, 12, rng)
    assert len(planes.strays) > 5
    queries = rng.normal(size=(30, 20)).astype(np.float32)
    probes = all_lists(30, 12, rng)[:, :6]
    probes[::2, 4:] = -1
    probes[3] = -1
    allowed = rng.random(900) < 0.3
    assert assert_same_search(metric, planes, queries, 4, probes) >= 25
    assert assert_same_search(metric, planes, queries, 4, probes, allowed) >= 20
    _, _, left = planes.search(queries, probes, 4, 1)
    assert 3 in left  # no list at all


def test_queries_far_away_are_served(instruction_set, rng):
    metric, X = Metric("euclidean"), rng.normal(size=(600, 24))
    planes = filed(metric, X, 6, rng)
    queries = (
        rng.normal(size=(12, 24)) * np.array([1, 3, 10, 30, 100, 1e3, 1e6, 1e12, 1e30, 1e100, 0, 2])[:, None]
    )
    assert assert_same_search(metric, planes, queries, 3, all_lists(12, 6, rng)) == 12


def two_clouds(rng):
    """Rows on both sides of zero, and queries so far out that scores of the other side would span 2^16."""
    axis = np.full(16, 0.25)
    X = axis * np.concatenate([rng.uniform(0.97, 1, 300), -rng.uniform(0.8, 1, 300)])[:, None]
    queries = axis * np.linspace(1.05, 1.9, 40)[:, None]
    return X + 0.004 * rng.normal(size=X.shape), queries


def test_scores_far_apart_are_exact(instruction_set, rng):
    X, queries = two_clouds(rng)
    planes = filed(Metric("euclidean"), X, 4, rng)
    assert assert_same_search(Metric("euclidean"), planes, queries, 5, all_lists(40, 4, rng)) == 40


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int8, np.uint8])
@pytest.mark.parametrize(("low", "high"), [(0, 256), (-128, 128), (-40, 50), (900, 1100)])
@pytest.mark.parametrize("d", [6, 2000])
def test_integers_have_points_without_error(instruction_set, dtype, low, high, d, rng):
    X = rng.integers(low, high, size=(200, d)).astype(dtype)  # those that do not fit 8 bits wrap
    planes = filed(Metric("euclidean"), X, 3, rng)
    assert planes.points.error == 0
    assert not len(planes.strays)
    queries = np.concatenate([X[:9], X[9:18] + 0.3]).astype(np.float64)
    assert assert_same_search(Metric("euclidean"), planes, queries, 4, all_lists(18, 3, rng)) > 15
    planes = filed(Metric("inner_product"), X, 3, rng)
    assert assert_same_search(Metric("inner_product"), planes, queries, 4, all_lists(18, 3, rng)) > 15


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("kind", ["integers", "halves", "nearly integers", "out of range"])
@pytest.mark.parametrize("d", [3, 64, 131])
def test_keys_of_integers_are_exact(instruction_set, metric, kind, d, rng):
    rows = rng.integers(0, 256, size=(400, d)).astype(np.float64)
    rows[[7, 300]] += 0.25  # strays
    queries = rng.integers(0, 256, size=(40, d)).astype(np.float64)
    rows[::2, 0] = 1
    queries[::3] = rows[rng.integers(200, size=14) * 2]
    if kind == "halves":
        queries[:, 0] += 0.5
    elif kind == "nearly integers":
        queries[:, 0] = 1e-15  # less 128 it is an integer
    elif kind == "out of range":
        queries[:, 0] += 300
    metric = Metric(metric)
    planes = filed(metric, rows, 7, rng)
    assert (planes.odd is None) == metric.is_cosine
    assert assert_same_search(metric, planes, metric.queries(queries), 9, all_lists(40, 7, rng)) == 40


def test_few_integers_are_no_bytes(instruction_set, rng):
    """Their unit would be too coarse for queries between them."""
    planes = filed(Metric("euclidean"), rng.integers(0, 2, size=(200, 30)).astype(np.float32), 3, rng)
    assert planes.points.scale < 0.1


def test_numbers_near_integers_are_none(rng):
    """Less the lowest, in float32, they would be."""
    X = np.sign(rng.normal(size=(40, 8192))).astype(np.float32) * 120
    X[:2] = 5
    X[1, :12] += np.repeat([1, -1], 6)
    X[1] -= 7.15e-6
    planes = list_planes.pack_lists(Metric("euclidean"), X, np.array([0, 40]), np.arange(40, dtype=np.int32))
    queries = np.full((1, 8192), -120.0)
    assert_same_search(Metric("euclidean"), planes, queries, 1, np.zeros((1, 1), dtype=np.int32))


def test_the_widest_bytes_do_not_leave_the_range_of_scores(instruction_set):
    X = np.repeat(np.array([[255], [0]], dtype=np.uint8), 16, axis=0) * np.ones(16384, dtype=np.uint8)
    X[:, :32] -= np.eye(32, dtype=np.uint8) * (X[:, :32] > 0)
    planes = list_planes.pack_lists(Metric("euclidean"), X, np.array([0, 32]), np.arange(32, dtype=np.int32))
    queries = np.full((2, 16384), 255.0)
    assert_same_search(Metric("euclidean"), planes, queries, 20, np.zeros((2, 1), dtype=np.int32))


@pytest.mark.parametrize("size", [1, 1e-140, 1e-149, 1e-151, 1e-162, 1e-200, 1e-280, 1e-308, 5e-324])
def test_tiny_queries_of_inner_products(size, rng):
    metric, X = Metric("inner_product"), rng.normal(size=(2000, 16))
    planes = filed(metric, X, 1, rng)
    if planes is not None:
        queries = rng.normal(size=(8, 16)) * size
        assert_same_search(metric, planes, queries, 50, np.zeros((8, 1), dtype=np.int32))
    centers = center_planes.CenterPlanes(metric, X).planes
    if centers is not None:
        probes, unserved = np.empty((8, 50), dtype=np.int32), np.empty(8, dtype=np.uint8)
        queries = rng.normal(size=(8, 16)) * size
        native.nearest_lists(centers.packed, queries, probes, unserved)
        true = nearest_rows(metric, queries, X, 50)[1]
        assert_array_equal(np.sort(probes[unserved == 0]), np.sort(true[unserved == 0]))


def test_sums_of_many_products_round(rng):
    X = np.full((200, 16384), 1.1e-16)
    X[:, 0] = 1 + rng.permutation(1000)[:200] * 2.0**-52
    metric, queries = Metric("inner_product"), np.ones((2, 16384))
    planes = list_planes.pack_lists(metric, X, np.array([0, 200]), np.arange(200, dtype=np.int32))
    if planes is not None:
        assert_same_search(metric, planes, queries, 3, np.zeros((2, 1), dtype=np.int32))


def test_planes_are_freed_at_once(rng):
    planes = filed(Metric("euclidean"), rng.normal(size=(50, 4)), 3, rng)
    planes.search(rng.normal(size=(2, 4)), all_lists(2, 3, rng), 2, 1)
    gone = weakref.ref(planes)
    del planes
    assert gone() is None


def test_a_few_rows_of_other_numbers_are_strays_among_integers(rng):
    X = rng.integers(0, 256, size=(20000, 5)).astype(np.float32)
    X[[7, 100, 1999]] += np.array([[0.5], [1000], [-300]])
    planes = filed(Metric("euclidean"), X, 3, rng)
    assert_array_equal(planes.strays, [7, 100, 1999])
    assert planes.points.error == 0
    queries = X[[7, 100, 1999, 5000]].astype(np.float64)
    assert assert_same_search(Metric("euclidean"), planes, queries, 4, all_lists(4, 3, rng)) == 4


def test_rows_that_tie_are_settled_exactly(instruction_set, rng):
    """More equal rows than a query can keep waiting, and the lowest row numbers win."""
    metric, X = Metric("euclidean"), np.zeros((5000, 8), dtype=np.float32)
    X[::1000] = 1
    planes = list_planes.pack_lists(metric, X, np.array([0, 2500, 5000]), np.arange(5000, dtype=np.int32))
    keys, positions, left = planes.search(np.full((3, 8), 0.25), np.tile([1, 0], (3, 1)), 6, 1)
    assert not len(left)
    assert_array_equal(positions, np.tile([1, 2, 3, 4, 5, 6], (3, 1)))
    assert_array_equal(keys, np.full((3, 6), 0.5))


@pytest.mark.parametrize("k", [3, 5, 6, 10, 16])
def test_rows_allowed_at_few_places(instruction_set, k, rng):
    """All in five of the 64 groups of places whose best rows give the first threshold."""
    metric, X = Metric("euclidean"), rng.normal(size=(1024, 6)).astype(np.float32)
    planes = list_planes.pack_lists(metric, X, np.array([0, 1024]), rng.permutation(1024).astype(np.int32))
    allowed, probes = np.arange(1024) % 64 < 5, np.zeros((40, 1), dtype=np.int32)
    assert assert_same_search(metric, planes, rng.normal(size=(40, 6)), k, probes, allowed) == 40


@given(st.data())
def test_any_small_search(data):
    draw = data.draw
    seed, n, d = draw(st.integers(0, 10**6)), draw(st.integers(1, 120)), draw(st.integers(1, 40))
    k, n_lists = draw(st.integers(1, n)), draw(st.integers(1, 8))
    rng = np.random.default_rng(seed)
    metric, dtype = Metric(draw(st.sampled_from(METRICS))), draw(st.sampled_from(DTYPES))
    before = native.INSTRUCTION_SET
    native.use(draw(st.sampled_from(native.runnable() + native.emulated())))
    try:
        X = rows_of(draw(st.sampled_from(CASES)), (n, d), dtype, rng)
        planes = filed(metric, X, n_lists, rng)
        if planes is not None:
            queries = metric.queries(rows_of("normal", (9, d), dtype, rng))
            assert_same_search(metric, planes, queries, k, all_lists(9, n_lists, rng))
    finally:
        native.use(before)


def assert_probes(planes, nearness, queries, centers, probes):
    """Asserts that the queries probe the lists that NumPy says, the nearest first."""
    found, unserved = np.empty((len(queries), probes.most), dtype=np.int32), np.empty(len(queries), np.uint8)
    native.nearest_lists(planes.packed, queries, found, unserved, probes.reach)
    keys, lists = nearest_rows(nearness, queries, centers, probes.most)
    assert not unserved.any()
    assert_array_equal(np.sort(found), np.sort(np.where(probes.within(keys), lists, -1)))
    n_probed = (found >= 0).sum(axis=1)
    assert (found[np.arange(probes.most) < n_probed[:, None]] >= 0).all()  # -1 behind them
    nearest = nearness.keys(queries, centers[found[:, 0]])
    assert_array_equal(nearest, keys[:, 0])
    return n_probed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["sqeuclidean", "inner_product"])
@pytest.mark.parametrize("most", [1, 9, 150, 300])
@pytest.mark.parametrize("reach", [np.inf, 0.0, 0.15, -0.02, 3.0])
def test_lists_to_probe_are_the_nearest(instruction_set, name, case, most, reach, rng):
    nearness, centers = Metric(name), rows_of(case, (300, 37), np.float64, rng)
    queries = rows_of(case, (21, 37), np.float64, rng)
    queries[:4] = centers[:4]
    planes = center_planes.CenterPlanes(nearness, centers).planes
    if planes is None:
        assert case in ("tiny", "1e30")
        return
    n_probed = assert_probes(planes, nearness, queries, centers, Probes(most, reach))
    assert reach < np.inf or (n_probed == most).all()


@pytest.mark.parametrize("n_lists", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("reach", [0.0, 0.1, 2.0])
def test_few_lists_are_probed_within_reach(instruction_set, n_lists, reach, rng):
    nearness, centers = Metric("sqeuclidean"), rng.normal(size=(n_lists, 9))
    planes, queries = center_planes.CenterPlanes(nearness, centers).planes, rng.normal(size=(20, 9))
    assert_probes(planes, nearness, queries, centers, Probes(n_lists, reach))


@pytest.mark.parametrize("name", ["sqeuclidean", "inner_product"])
@pytest.mark.parametrize("distance", [30, 1e3, 1e5])
@pytest.mark.parametrize("reach", [0, 0.3, 1, 4])
def test_limits_of_far_queries(instruction_set, name, distance, reach, rng):
    nearness, centers = Metric(name), rng.normal(size=(300, 37))
    centers[7] = centers[8]
    queries = rng.normal(size=(40, 37)) * distance
    planes = center_planes.CenterPlanes(nearness, centers).planes
    reach = reach / 10 if nearness.is_product else reach / distance  # squares differ by less and less
    n_probed = assert_probes(planes, nearness, queries, centers, Probes(290, reach))
    assert n_probed.max() > 1


@pytest.mark.parametrize("gap", [0, 1, -1])
def test_a_list_at_the_limit_is_told_apart_exactly(instruction_set, gap, rng):
    centers = 50 * rng.normal(size=(60, 24))
    centers[:4] = np.eye(24)[:4] * [[1.0], [2.0], [3.0], [4.0]]  # squared, 7.5 on average
    centers[5] = 0
    centers[5, 9] = np.nextafter(np.sqrt(8.0), 9 * gap) if gap else np.sqrt(8.0)
    nearness, queries, probes = Metric("sqeuclidean"), np.zeros((3, 24)), Probes(50, 0.5)
    planes = center_planes.CenterPlanes(nearness, centers).planes
    assert_probes(planes, nearness, queries, centers, probes)


@pytest.mark.parametrize("most", [1, 17, 300])
@pytest.mark.parametrize("reach", [np.inf, 0.2])
@pytest.mark.parametrize("noise", [0, 0.02, 0.2])
def test_a_head_of_the_centers_excludes_none_of_the_nearest(
    instruction_set, noise, most, reach, monkeypatch, rng
):
    nearness, basis = Metric("sqeuclidean"), rng.normal(size=(12, 200))
    centers, queries = (
        rng.normal(size=(n, 12)) @ basis + noise * rng.normal(size=(n, 200)) for n in (300, 45)
    )
    centers[200:] = centers[:100]
    centers[7] *= 1000  # a stray
    queries[:6] = centers[[0, 1, 2, 150, 250, 7]]
    queries[6:12] *= np.array([0, 30, 1e3, 1e12, 1e30, 1e100])[:, None]
    monkeypatch.setattr(heads, "LEAST_HEAD", 0)
    monkeypatch.setattr(heads, "WORTHWHILE", 1)
    planes = center_planes.CenterPlanes(nearness, centers, queries[12:]).planes
    assert planes.points.width < 100
    with pytest.raises(ValueError, match="do not fit"):
        planes.search(queries, np.zeros((45, 1)), 5, 1)
    for some in (slice(0, 45), slice(3, 4), slice(9, 10)):
        assert_probes(planes, nearness, queries[some], centers, Probes(most, reach))


@pytest.mark.parametrize("copies", [0, 150, 200])
def test_centers_without_principal_axes_have_no_head(copies, monkeypatch, rng):
    monkeypatch.setattr(heads, "LEAST_HEAD", 0)
    centers, queries = (rng.normal(size=(n, 64)) for n in (200, 30))
    centers[:copies] = 0
    assert heads.head_of_centers(centers, queries) is None
    assert heads.head_of_centers(centers + 1e200, queries) is None
    assert heads.head_of_centers(centers[:50], queries) is None


def low_rank(n, rng):
    return np.float32(rng.normal(size=(n, 16)) @ rng.normal(size=(16, 80)) + 0.05 * rng.normal(size=(n, 80)))


@pytest.mark.parametrize("metric", METRICS)
def test_an_index_of_rows_with_a_head(metric, monkeypatch, rng):
    X, more = np.split(low_rank(2600, rng), [2000])
    one_by_one = lambda index: np.concatenate([index.kneighbors(x[None])[1] for x in more[:40]])  # noqa: E731
    index = IVFIndex(n_lists=24, n_probes=11, metric=metric, random_state=0).fit(X)
    least = heads.LEAST_ROWS
    monkeypatch.setattr(heads, "LEAST_ROWS", 0)
    monkeypatch.setattr(heads, "LEAST_FEATURES", 0)
    by_heads = IVFIndex(n_lists=24, n_probes=11, metric=metric, random_state=0).fit(X)
    assert (
        by_heads._file.planes()[1].whole is None
        if metric == "inner_product"
        else (by_heads._file.planes()[1].points.width <= 40)
    )
    for change in (
        lambda index: index,
        lambda index: index.partial_fit(more[:300]),
        lambda index: index.remove(np.arange(0, 2300, 7)),
        lambda index: index.partial_fit(more[300:301]),
        lambda index: pickle.loads(pickle.dumps(index)),
    ):
        by_heads = change(by_heads)
        with monkeypatch.context() as patch:
            patch.setattr(heads, "LEAST_ROWS", least)
            index = change(index)
            assert index._file.planes()[1].whole is None
        for found, expected in zip(by_heads.kneighbors(more), index.kneighbors(more)):
            assert_array_equal(found, expected)
        assert_array_equal(one_by_one(by_heads), one_by_one(index))
        subset = np.flatnonzero(index._file.lists.positions >= 0)[::3]
        assert_array_equal(*(some.kneighbors(more[:50], subset=subset)[1] for some in (by_heads, index)))
        assert_array_equal(*(some.radius_neighbors(more[:5], 2.0)[1][3] for some in (by_heads, index)))


def test_rows_without_principal_axes_have_no_head(monkeypatch, rng):
    monkeypatch.setattr(heads, "LEAST_ROWS", 0)
    monkeypatch.setattr(heads, "LEAST_FEATURES", 0)
    X, offsets, ids = low_rank(2000, rng), np.arange(0, 2001, 200), np.arange(2000, dtype=np.int32)

    def head_of(X):
        return heads.head_of_rows(Metric("euclidean"), X, offsets, ids, np.float64(X[::200]))

    assert head_of(X) is not None
    for spoilt in (
        0 * X,
        X * np.float32(1e34),
        0 * X + X[0],
        rng.normal(size=X.shape),
        np.float64(X) * 1e200,
    ):
        assert head_of(spoilt) is None
    ids[:1999] = -1
    assert head_of(X) is None  # too few rows are left to tell


def test_lists_far_apart_are_served(instruction_set, rng):
    centers, queries = two_clouds(rng)
    planes = center_planes.CenterPlanes(Metric("sqeuclidean"), centers).planes
    probes, unserved = np.empty((40, 30), dtype=np.int32), np.empty(40, dtype=np.uint8)
    native.nearest_lists(planes.packed, queries, probes, unserved)
    true = nearest_rows(Metric("sqeuclidean"), queries, centers, 30)[1]
    assert not unserved.any()
    assert_array_equal(np.sort(probes), np.sort(true))


def test_lists_are_ranked_by_exact_distance(instruction_set, rng):
    nearness, centers = Metric("sqeuclidean"), rng.normal(size=(90, 10))
    centers[50:] = centers[:40]
    queries = rng.normal(size=(12, 10))
    keys, ranked = center_planes.CenterPlanes(nearness, centers).ranked(queries, 1)
    true_keys, true = nearest_rows(nearness, queries, centers, 90)
    assert_array_equal(ranked, true)
    assert_array_equal(keys, true_keys)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n_rows", [40, 40000])  # by points of the centers, and as k-means does
def test_rows_are_filed_under_the_nearest_list(instruction_set, case, n_rows, rng):
    X = rows_of(case, (300, 13), np.float64, rng)
    index = IVFIndex(20, 1, random_state=0).fit(X)
    centers = index.coarse_quantizer_.cluster_centers_
    rows = np.concatenate([X[:20], (centers[:10] + centers[1:11]) / 2, 1e30 * X[:5], 1e100 + X[:5]])
    rows = np.resize(rows, (n_rows, 13))
    sq_distances = np.square(rows[:, None] - centers).sum(axis=2)
    assert_array_equal(index.predict(rows), sq_distances.argmin(axis=1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("subset", [False, True])
def test_an_index_finds_what_the_reference_kernels_find(instruction_set, metric, subset, monkeypatch, rng):
    X = rng.normal(size=(800, 14)).astype(np.float32)
    X[600:] = X[:200]
    index = IVFIndex(n_lists=20, n_probes=3, metric=metric, random_state=0).fit(X).remove(np.arange(50, 90))
    chosen = np.arange(100, 700, 4) if subset else None
    for n_queries in (1, 60):
        for k in (1, 10, 90):  # 90: more than the probed lists hold at times
            found = index.kneighbors(X[:n_queries], k, subset=chosen)
            with monkeypatch.context() as without_planes:
                without_planes.setattr(list_planes, "_can_serve", lambda *_: False)
                plain = pickle.loads(pickle.dumps(index)).kneighbors(X[:n_queries], k, subset=chosen)
            assert_array_equal(found[0], plain[0])
            assert_array_equal(found[1], plain[1])


def test_one_query_a_batch_and_several_threads_agree(rng):
    X = rng.normal(size=(4000, 24)).astype(np.float32)
    index = IVFIndex(n_lists=40, n_probes=6, random_state=0).fit(X)
    distances, indices = index.kneighbors(X[:300])
    for i in range(0, 300, 30):
        one = index.kneighbors(X[i : i + 1])
        assert_array_equal(one[0][0], distances[i])
        assert_array_equal(one[1][0], indices[i])
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda i: index.kneighbors(X[i : i + 20])[1], range(0, 300, 20)))
    assert_array_equal(np.concatenate(parts), indices)
    assert_array_equal(index.set_params(n_jobs=1).kneighbors(X[:300])[1], indices)


def test_a_fully_probed_index_equals_brute_force(instruction_set, rng):
    X = rng.normal(size=(900, 33)).astype(np.float32)
    index = IVFIndex(n_lists=15, n_probes=15, random_state=0).fit(X)
    for k in (1, 12):
        found, true = index.kneighbors(X[:80] + 0.1, k), exact_neighbors(X[:80] + 0.1, X, k)
        assert_array_equal(found[0], true[0])
        assert_array_equal(found[1], true[1])


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_many_neighbors_of_many_queries_go_part_by_part(monkeypatch, n_jobs, rng):
    X = rng.normal(size=(2500, 4)).astype(np.float32)
    index = IVFIndex(n_lists=10, n_probes=10, random_state=0, n_jobs=n_jobs).fit(X)
    sizes, search_index = [], native.search_index
    monkeypatch.setattr(native, "search_index", lambda *a: sizes.append(len(a[3])) or search_index(*a))
    monkeypatch.setattr(list_planes, "SCRATCH_BYTES", 1 << 22)
    indices = index.kneighbors(X[:200], 2000)[1]
    assert sum(sizes) == 200
    assert max(sizes) * 32 * 2000 <= 1 << 22
    assert_array_equal(indices, exact_neighbors(X[:200], X, 2000)[1])


def test_planes_are_packed_anew_after_a_pickle(rng):
    X = rng.normal(size=(500, 16)).astype(np.float32)
    index = IVFIndex(n_lists=10, random_state=0).fit(X)
    copy = pickle.loads(pickle.dumps(index))
    assert copy._file._packed == {}
    assert_array_equal(copy.kneighbors(X[:9])[1], index.kneighbors(X[:9])[1])


def test_rows_seen_to_be_valid_are_answered_as_others(rng):
    """Rows that pass at a glance, and the same as a list, in another order, or of another dtype."""
    X = rng.normal(size=(300, 6))
    index = IVFIndex(n_lists=5, n_probes=2, random_state=0).fit(X)
    queries = X[:7].astype(np.float32)
    expected = index.kneighbors(queries)
    for same in (
        queries.tolist(),
        np.asfortranarray(queries),
        np.repeat(queries, 2, axis=0)[::2],
        queries.astype("f8"),
    ):
        found = index.kneighbors(same)
        assert_array_equal(found[0], expected[0])
        assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda X: X[:, :5], "5 features"),
        (lambda X: X[0], "2D array"),
        (lambda X: X[:0], "0 sample"),
        (lambda X: np.where(X[2, 3] == X, np.nan, X), "NaN"),
        (lambda X: np.where(X[2, 3] == X, -np.inf, X), "infinity"),
        (lambda X: X.astype(complex), "[Cc]omplex"),
    ],
)
def test_wrong_queries_are_refused_as_by_scikit_learn(dtype, spoil, message, rng):
    X = rng.normal(size=(60, 6)).astype(dtype)
    index = IVFIndex(n_lists=3, random_state=0).fit(X)
    with pytest.raises(ValueError, match=message):
        index.kneighbors(spoil(X[:4]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_within_sees_every_place(dtype, value):
    largest = float(np.finfo(dtype).max)
    X = np.full((3, 5), largest, dtype=dtype)
    X[::2] *= -1
    assert native.all_within(X, largest)
    assert native.all_within(X, largest / 2) == (dtype == np.float32)
    for i, j in np.ndindex(X.shape):
        spoilt = X.copy()
        spoilt[i, j] = value
        assert not native.all_within(spoilt, largest)


@pytest.mark.parametrize("case", ["normal", "long rows", "integers", "zeros", "duplicates", "bytes"])
@pytest.mark.parametrize(
    ("name", "n_axes"), [*((name, 0) for name in METRICS), ("euclidean", 6), ("cosine", 6)]
)
def test_rows_come_to_free_places_and_go(instruction_set, name, n_axes, case, rng):
    metric = Metric(name)
    X = rows_of(case, (500, 13), np.float32, rng)
    X[::200] *= 40  # strays
    ids = rng.permutation(500).astype(np.int32)
    offsets = np.concatenate([[0], np.sort(rng.integers(501, size=9)), [500]])
    new = np.sort(rng.choice(500, 60, replace=False))
    before, others = ids.copy(), X.copy()
    before[new], others[new] = -1, 0
    head = any_head(metric, others, n_axes) if n_axes else None
    planes = list_planes.pack_lists(metric, others, offsets, before, head=head)
    queries = metric.queries(rows_of(case, (30, 13), np.float32, rng))
    least, probes = 28 if case != "zeros" else 0, all_lists(30, 10, rng)
    assert assert_same_search(metric, planes, queries, 4, probes) >= least
    others[new] = X[new]  # its vectors
    added = planes.adding(metric, ids, new)
    if added is None:  # too many strays are new
        assert case in ("long rows", "zeros")
        return
    assert added.points.codes is planes.points.codes
    assert assert_same_search(metric, added, queries, 4, probes) >= least
    gone = rng.choice(500, 80, replace=False)
    ids = ids.copy()
    ids[gone] = -1
    assert assert_same_search(metric, added.without(ids, gone), queries, 4, probes) >= least


def test_rows_beyond_the_scale_have_all_packed_again(rng):
    metric, X = Metric("euclidean"), rng.normal(size=(300, 8)).astype(np.float32)
    offsets, ids, new = np.array([0, 100, 200, 300]), np.arange(300, dtype=np.int32), np.arange(150, 200)
    before = np.where(np.isin(ids, new), -1, ids).astype(np.int32)
    planes = list_planes.pack_lists(metric, X, offsets, before)
    assert planes.adding(metric, ids, new) is not None
    X[new] *= 1000
    assert planes.adding(metric, ids, new) is None


def test_arrays_that_do_not_fit_are_refused(rng):
    metric, X = Metric("euclidean"), rng.normal(size=(50, 4))
    planes = filed(metric, X, 3, rng)
    keys, positions, unserved = np.empty((2, 5)), np.empty((2, 5), np.int64), np.empty(2, np.uint8)
    probes = np.zeros((2, 1), dtype=np.int32)
    wrong = [
        (X[:2, :3].copy(), probes, keys, positions, unserved),
        (X[:2], probes[:1], keys, positions, unserved),
        (X[:2], probes, keys[:1], positions, unserved),
        (X[:2], probes, keys, positions[:, :4].copy(), unserved),
        (X[:2], probes, keys, positions, unserved[:1]),
        (X[:0], probes[:0], keys[:0], positions[:0], unserved[:0]),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="search"):
            native.search_lists(planes.packed, *arguments)
    centers = center_planes.CenterPlanes(Metric("sqeuclidean"), X).planes.packed
    with pytest.raises(ValueError, match="centers"):
        native.nearest_lists(centers, X[:2], np.empty((2, 51), dtype=np.int32), unserved)
    with pytest.raises(ValueError, match="centers"):
        native.nearest_lists(planes.packed, X[:2], probes, unserved)
    with pytest.raises(ValueError, match="search_index"):
        native.search_index(
            centers, None, planes.packed, X[:2], None, 1, np.inf, 0, keys, positions, unserved
        )  # 50 centers, 3 lists

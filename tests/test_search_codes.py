"""The search of codes by tables against brute force over decoded rows, on every instruction set: same rows, same bits."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from skivfpq import IVFIndex, ProductQuantizer, _kernels
from skivfpq._algorithms import center_planes
from skivfpq._algorithms.codebooks import Codebooks, random_rotation, subspace_slices
from skivfpq._algorithms.inverted_lists import InvertedLists
from skivfpq._algorithms.ivf import InvertedFile
from skivfpq._algorithms.list_codes import Coding, ListCodes
from skivfpq._algorithms.search import Metric

native_only = pytest.mark.skipif(not _kernels.NATIVE, reason="kernels that are compiled only")
METRICS = ["euclidean", "cosine", "inner_product"]
CASES = ["normal", "offset", "duplicates", "zeros", "long rows", "long column", "tiny", "1e30", "far clouds"]
CASES += ["coarse floats", "alike"]


def rows_of(case, n, d, rng, dtype=np.float32):
    """Rows (n, d), awkward or not."""
    X = rng.normal(size=(n, d))
    if case == "offset":
        X += 1e6 if dtype == np.float64 else 300
    elif case == "duplicates":
        X[n // 2 :] = X[: n - n // 2]
    elif case == "far clouds":
        X += rng.choice([-1e4, 1e4], size=(n, 1))
    elif case == "coarse floats":
        X += 1e16 if dtype == np.float64 else 1e7
    elif case == "alike":
        X = rng.normal(size=d) + 1e-4 * X
    scaled, factor = {
        "zeros": (np.s_[::3], 0),
        "long rows": (np.s_[::7], 100),
        "long column": (np.s_[:, 0], 100),
        "tiny": (np.s_[:], 1e-30),
        "1e30": (np.s_[:], 1e30 if dtype == np.float64 else 1e15),
    }.get(case, (np.s_[:], 1))
    X[scaled] *= factor
    return X.astype(dtype)


def coded_file(name, X, n_lists, n_subspaces, n_codewords, rng, *, rotation=None, residual=True):
    """Rows filed under centers, and coded by codewords, that are rows drawn from them: nothing is trained."""
    metric = Metric(name)
    rows = metric.rows(X)
    centers = rows[rng.choice(len(X), n_lists, replace=False)]
    centers = centers + 0.1 * (rows - centers.mean(axis=0)).std() * rng.random(centers.shape)
    left = rows - centers[rng.integers(n_lists, size=len(X))] if residual else rows
    left = left if rotation is None else left @ rotation
    slices = subspace_slices(X.shape[1], n_subspaces)
    codewords = [
        np.ascontiguousarray(left[rng.integers(len(X), size=n_codewords), part].astype(X.dtype))
        for part in slices
    ]
    coding = Coding.of(metric, centers, Codebooks(slices, codewords, rotation), residual)
    return InvertedFile(metric, centers, coding, None, InvertedLists.empty(n_lists)).append(X, 1)


def brute_force(file, queries, probes, k, allowed=None):
    """Keys and positions (n_queries, k) by differences from all decoded rows of the lists; for one query a row."""
    numbers = file.lists.list_of(np.arange(len(file.lists.ids)))
    rows = file.metric.rows(file._decoded(np.arange(len(numbers))))
    turned = file.coding.turned(queries.astype(np.float64))
    keys, positions = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
    for i, query in enumerate(turned):
        inside = np.isin(numbers, probes[i]) if allowed is None else np.isin(numbers, probes[i]) & allowed
        places = np.flatnonzero(inside)
        own = file.metric.keys(query[None], rows[places])
        order = np.lexsort((file.lists.ids[places], own))[:k]
        keys[i], positions[i] = own[order], places[order]
    return keys, positions


def assert_same_search(file, queries, k, n_probes=None, allowed=None, rng=None):
    """Asserts that queries that are served have the neighbours of brute force; returns how many are."""
    n_lists = len(file.centers)
    n_probes = n_lists if n_probes is None else n_probes
    probes = np.array([(rng or np.random.default_rng(0)).permutation(n_lists)[:n_probes] for _ in queries])
    rows = file.planes()[1]
    rows = rows if allowed is None else rows.allowing(allowed)
    turned = np.ascontiguousarray(file.coding.turned(queries.astype(np.float64)))
    keys, positions, left = rows.search(turned, probes, k, 1)
    served = np.setdiff1d(np.arange(len(queries)), left)
    true_keys, true = brute_force(file, queries[served], probes[served], k, allowed)
    assert_array_equal(positions[served], true)
    assert_array_equal(keys[served], true_keys)
    return len(served)


@native_only
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", METRICS)
def test_neighbors_are_those_of_brute_force(instruction_set, name, dtype, case, rng):
    X = rows_of(case, 700, 19, rng, dtype)
    file = coded_file(name, X, 9, 5, 40, rng, residual=case != "alike")
    queries = file.metric.queries(np.concatenate([rows_of(case, 30, 19, rng, dtype), X[:10]]))
    assert assert_same_search(file, queries, 7) == (40 if case != "zeros" or name != "cosine" else 26)


@native_only
@pytest.mark.parametrize("n_codewords", [1, 2, 15, 16, 17, 255, 256, 257, 700])
@pytest.mark.parametrize("n_subspaces", [1, 2, 3, 8, 24])
def test_any_number_of_codewords_and_subspaces(instruction_set, n_codewords, n_subspaces, rng):
    X = rows_of("normal", 500, 24, rng)
    file = coded_file("euclidean", X, 4, n_subspaces, n_codewords, rng)
    queries = rows_of("normal", 20, 24, rng)
    assert assert_same_search(file, queries, 5) == 20
    assert assert_same_search(file, queries, 5, 2) == 20


@native_only
@pytest.mark.parametrize(
    ("d", "n_subspaces"), [(1, 1), (2, 2), (3, 1), (17, 5), (64, 2), (300, 300), (600, 520)]
)
@pytest.mark.parametrize("n_codewords", [16, 200])
@pytest.mark.parametrize("name", METRICS)
def test_all_widths(instruction_set, name, d, n_subspaces, n_codewords, rng):
    X = rows_of("normal", 200, d, rng)
    file = coded_file(name, X, 3, n_subspaces, n_codewords, rng)
    assert assert_same_search(file, file.metric.queries(rows_of("normal", 9, d, rng)), 4) == 9


def filed(name, slices, codewords, codes, labels):
    """A file of given codes, its anchors zeros."""
    n_lists, n_features = labels.max() + 1, slices[-1].stop
    coding = Coding.of(
        Metric(name), np.zeros((n_lists, n_features)), Codebooks(slices, codewords, None), False
    )
    lists = InvertedLists.empty(n_lists)
    file = InvertedFile(Metric(name), np.zeros((n_lists, n_features)), coding, None, lists)
    terms = {} if name == "inner_product" else {"terms": np.zeros(len(codes), dtype=np.float32)}
    lists, _ = lists.append(labels, {"codes": codes, **terms}, np.ones(len(codes)), file._hold)
    return replace(file, lists=lists)


@native_only
def test_levels_that_all_round_the_wrong_way(instruction_set):
    """Products of rounded codewords order them wrongly."""
    far = np.where(np.arange(64) % 2, 3900.51, 3900.40)  # in levels: half of the features are rounded up
    near = np.full(64, 3900.49)  # all are rounded down
    spread = np.sqrt(32000**2 / 64 - 3900.49**2)
    longest = 3900.49 + np.where(np.arange(64) % 2, spread, -spread)  # 32000 levels
    codes = np.repeat([0, 1], 8).astype(np.uint8)[:, None]
    words = [np.array([near, far, longest])]
    file = filed("inner_product", [slice(0, 64)], words, codes, np.zeros(16, dtype=np.int64))
    assert_allclose(file.coding.level * file.coding.unit, 1, rtol=1e-12)
    _, positions, left = file.planes()[1].search(np.ones((1, 64)), np.array([[0]]), 5, 1)
    assert len(left) == 0
    assert_array_equal(positions, [[0, 1, 2, 3, 4]])


@native_only
@pytest.mark.parametrize("n_codewords", [16, 17])
def test_sums_of_many_subspaces_do_not_wrap(instruction_set, n_codewords, rng):
    """The first list's rows are as far as can be: their sums, modulo 2^16, would be those of near ones."""
    n = 518  # subspaces, of one feature
    codes = np.zeros((80, n), dtype=np.uint8)
    codes[:40] = 1
    codes[40:, :10] = 1
    words = [np.array([[1.0], [-1.0]] * 10, dtype=np.float32)[:n_codewords]] * n
    file = filed("inner_product", subspace_slices(n, n), words, codes, np.repeat([0, 1], 40))
    keys, _, left = file.planes()[1].search(np.ones((1, n)), np.array([[0, 1]]), 5, 1)
    assert len(left) == 0
    assert_array_equal(keys, np.full((1, 5), 20.0 - n))


@native_only
@pytest.mark.parametrize("k", [1, 2, 16, 64, 300, 1000])
def test_any_number_of_neighbors(instruction_set, k, rng):
    file = coded_file("euclidean", rows_of("normal", 1100, 12, rng), 5, 4, 100, rng)
    assert assert_same_search(file, rows_of("normal", 9, 12, rng), k) == 9


@native_only
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("name", METRICS)
def test_turned_codes_and_codes_of_whole_rows(instruction_set, name, turned, residual, rng):
    rotation = random_rotation(14, rng) if turned else None
    X = rows_of("normal", 400, 14, rng) + np.float32(3)
    file = coded_file(name, X, 6, 4, 30, rng, rotation=rotation, residual=residual)
    queries = file.metric.queries(rows_of("normal", 20, 14, rng) + np.float32(3))
    assert assert_same_search(file, queries, 5) == 20
    allowed = rng.random(400) < 0.2
    assert assert_same_search(file, queries, 5, None, allowed) == 20


@native_only
def test_lists_that_hold_too_few_leave_the_query(instruction_set, rng):
    file = coded_file("euclidean", rows_of("normal", 300, 8, rng), 30, 2, 10, rng)
    queries = rows_of("normal", 40, 8, rng)
    assert assert_same_search(file, queries, 15, 2) < 40
    assert assert_same_search(file, queries, 15, 12) > 30
    allowed = np.zeros(300, dtype=bool)
    allowed[::9] = True
    assert assert_same_search(file, queries, 15, 12, allowed) < 40


@native_only
def test_queries_far_away_are_served_or_left(instruction_set, rng):
    file = coded_file("euclidean", rows_of("normal", 300, 8, rng, np.float64), 4, 3, 50, rng)
    lengths = np.array([0, 1e-300, 1e-30, 1, 10, 1e3, 1e6, 1e10, 1e20, 1e100])
    queries = rng.normal(size=(10, 8)) * lengths[:, None]
    assert assert_same_search(file, queries, 3) == 8


@pytest.mark.parametrize("n_codewords", [7, 16, 17, 300])
@pytest.mark.parametrize("n_subspaces", [1, 4, 7])
def test_packed_codes_are_the_codes(n_codewords, n_subspaces, rng):
    sizes = np.array([0, 1, 15, 16, 17, 0, 100, 3])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    dtype = np.uint8 if n_codewords <= 256 else np.uint16
    codes = rng.integers(n_codewords, size=(offsets[-1], n_subspaces)).astype(dtype)
    packed = ListCodes.empty(offsets, n_subspaces, n_codewords)
    order = rng.permutation(len(codes))
    packed[order[:70]] = codes[order[:70]]
    packed[order[70:]] = codes[order[70:]]
    assert_array_equal(packed[np.arange(len(codes))], codes)
    positions = rng.integers(len(codes), size=50)
    assert_array_equal(packed[positions], codes[positions])
    assert_array_equal(packed.of_list(6, slice(60, 80)), codes[60:80])
    assert_array_equal(packed.of_list(6, np.array([51, 148])), codes[[51, 148]])
    n_bytes = sum(-(-size // 16) * 16 for size in sizes) * -(-n_subspaces // (2 if n_codewords <= 16 else 1))
    assert packed.nbytes == (n_bytes + 64) * codes.itemsize


@pytest.mark.parametrize("quantizer", [ProductQuantizer(4, 4), ProductQuantizer(3, 6, rotation="pca")])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("refine_factor", [None, 1, 3])
def test_the_index_finds_what_its_rows_say(metric, quantizer, refine_factor, rng):
    X = rows_of("normal", 900, 12, rng)
    index = IVFIndex(
        20, 5, metric=metric, fine_quantizer=quantizer, refine_factor=refine_factor, random_state=0
    ).fit(X[:600])
    index.partial_fit(X[600:]).remove(np.arange(0, 900, 7))
    subset = np.flatnonzero(rng.random(900) < 0.7)
    queries = rows_of("normal", 30, 12, rng)
    distances, indices = index.kneighbors(queries, 6, n_probes=20, subset=subset)
    live = np.setdiff1d(subset, np.arange(0, 900, 7))
    file = index._file
    positions = file.lists.positions[live]
    coded = file.metric.rows(file._decoded(positions))
    for i, query in enumerate(file.metric.queries(queries).astype(np.float64)):
        keys = file.metric.keys(file.coding.turned(query[None]), coded)
        rows = live[np.lexsort((live, keys))][: 6 * (refine_factor or 1)]
        keys = np.sort(keys)[:6]
        if refine_factor:
            keys = file.metric.keys(query[None], file.metric.rows(X[rows]))
            order = np.lexsort((rows, keys))[:6]
            rows, keys = rows[order], keys[order]
        assert_array_equal(indices[i], rows)
        assert_allclose(distances[i], file.metric.distances(keys), rtol=1e-12, atol=1e-15)


def test_a_query_of_zeros_is_as_far_from_every_row_by_the_cosine(rng):
    X = rows_of("normal", 200, 6, rng)
    fine = ProductQuantizer(2, 3, random_state=0)
    index = IVFIndex(4, 4, metric="cosine", fine_quantizer=fine, refine_factor=2, random_state=0).fit(X)
    queries = np.concatenate([np.zeros((1, 6), dtype=np.float32), X[:9]])
    distances, indices = index.kneighbors(queries, 5)
    assert_array_equal(distances[0], np.ones(5))
    assert_array_equal(indices[0], np.arange(5))
    assert_array_equal(indices[1:, 0], np.arange(9))


@native_only
def test_few_rows_near_zero_do_not_make_all_scores_coarse(instruction_set, rng):
    """Their cosines are evaluated one by one; so is what they are to a subset."""
    X = rows_of("normal", 400, 8, rng)
    file = coded_file("cosine", X, 4, 2, 200, rng, residual=False)
    codes = file.lists.rows["codes"][np.arange(400)]
    codes[::50] = 0  # a codeword of next to nothing, in both subspaces
    words = [part.copy() for part in file.codebooks.codewords]
    words[0][0], words[1][0] = 1e-9, -1e-9
    labels = file.lists.list_of(np.arange(400))
    coding = Coding.of(file.metric, file.centers, Codebooks(file.codebooks.slices, words, None), False)
    anchors = coding.anchors[labels]
    terms = coding._terms(coding.codebooks.decode(codes).astype(np.float64), anchors, codes, labels)
    kept = {"codes": codes, "terms": terms.astype(np.float32)}
    lists, _ = InvertedLists.empty(4).append(labels, kept, np.ones(400), file._hold)
    file = InvertedFile(file.metric, file.centers, coding, None, lists)
    assert len(file.planes()[1].strays) == 8
    assert file.planes()[1].largest_term < 100
    queries = file.metric.queries(rows_of("normal", 20, 8, rng))
    queries[0] = file.metric.rows(np.array([[1.0] * 4 + [-1.0] * 4]))[0]
    assert assert_same_search(file, queries, 10) == 20
    assert assert_same_search(file, queries, 10, None, np.arange(400) % 3 == 0) == 20


@native_only
def test_turned_rows_that_cancel_keep_their_cosine(rng):
    """Terms are those of the turned rows: turned back, one may round to zero."""
    for seed in range(200):
        rng = np.random.default_rng(seed)
        rotation = random_rotation(4, rng)
        X = np.rint(rows_of("normal", 40, 4, rng)).astype(np.float32)
        file = coded_file("cosine", X, 3, 1, 12, rng, rotation=rotation)
        exact = np.linalg.norm(file._decoded(np.arange(40)).astype(np.float64), axis=1)
        terms = file.lists.rows["terms"]
        assert_allclose(terms[exact > 0], (file.coding.unit / exact[exact > 0]), rtol=1e-5)
        assert_same_search(file, file.metric.queries(X[:9]), 5)


def test_rows_that_overflow_are_left_to_numpy(rng):
    X = rows_of("normal", 30, 4, rng) * np.float32(5e37)
    file = coded_file("euclidean", X, 2, 1, 10, rng)
    assert file.planes()[1] is None or file.coding.reach < 3e38
    wide = np.zeros((6, 20_000), dtype=np.float32)
    wide[:, 0] = np.arange(6)
    index = IVFIndex(1, 1, metric="cosine", fine_quantizer=ProductQuantizer(1, 1, max_iter=1), random_state=0)
    assert index.fit(wide + 1).kneighbors(wide[:1] + 1, 2)[1].shape == (1, 2)


@native_only
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("probes", [[0, 1], [1, 0]])
def test_products_with_centers_that_cancel(share, probes, rng):
    """Four running sums of 16,384 products are wrong by more than the rows differ by."""
    d = 16384
    third = d // 12 * 4
    ones = np.zeros(d)
    ones[:third], ones[third : 3 * third] = 1, -0.5  # which sum up to nothing

    def running(values):
        return sum(np.cumsum(values[lane::4])[-1] for lane in range(4))

    query = max((c * ones for c in rng.uniform(1, 2, 300)), key=lambda q: abs(running(q) - q.sum()))
    query = query if running(query) < query.sum() else -query
    length = np.linalg.norm(query)
    anchors = np.ones((2, d))
    anchors[1] = 0
    anchors[1, [0, third]] = 1, 2  # orthogonal to the query, exactly
    between = (query.sum() - (query.sum() - running(query)) * share) / length**2  # where the other row is
    words = np.array([0 * query, between * query])
    coding = Coding.of(Metric("inner_product"), anchors, Codebooks([slice(0, d)], [words], None), True)
    lists = InvertedLists.empty(2)
    file = InvertedFile(Metric("inner_product"), anchors, coding, None, lists)
    codes = np.array([[0], [1]], dtype=np.uint8)
    lists, _ = lists.append(np.array([0, 1]), {"codes": codes}, np.ones(2), file._hold)
    file = replace(file, lists=lists)
    keys, positions, left = file.planes()[1].search(query[None], np.array([probes]), 1, 1)
    true_keys, true = brute_force(file, query[None], [[0, 1]], 1)
    assert len(left) == 0
    assert_array_equal(positions, true)
    assert_array_equal(keys, true_keys)


def test_turned_codes_are_found_where_they_say(rng):
    """What reconstruct gives is as far from a query as kneighbors says, if only to the rounding of its floats."""
    X = rows_of("normal", 500, 12, rng)
    fine = ProductQuantizer(4, 4, rotation="opq", random_state=0)
    index = IVFIndex(6, 6, fine_quantizer=fine, random_state=0).fit(X)
    distances, indices = index.kneighbors(X[:20], 3)
    rows = index.reconstruct(indices.ravel()).reshape(20, 3, 12)
    assert_allclose(distances, np.linalg.norm(X[:20, None] - rows, axis=2), rtol=1e-5)


def test_threads_and_pickles_change_nothing(rng):
    X = rows_of("normal", 3000, 16, rng)
    index = IVFIndex(30, 6, fine_quantizer=ProductQuantizer(4, 8), refine_factor=4, random_state=0).fit(X)
    found = index.set_params(n_jobs=1).kneighbors(X[:500], 9)
    again = index.set_params(n_jobs=3).kneighbors(X[:500], 9)
    copied = pickle.loads(pickle.dumps(index)).kneighbors(X[:500], 9)
    for distances, indices in (again, copied):
        assert_array_equal(indices, found[1])
        assert_array_equal(distances, found[0])


def test_searches_at_once_find_the_same(rng):
    X = rows_of("normal", 2000, 16, rng)
    index = IVFIndex(20, 6, fine_quantizer=ProductQuantizer(4, 8), random_state=0, n_jobs=1).fit(X)
    queries = [X[start : start + size] for start in range(0, 2000, 200) for size in (1, 5, 150)]
    alone = [index.kneighbors(some, 4) for some in queries]
    index = pickle.loads(pickle.dumps(index))  # nothing packed yet
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda some: index.kneighbors(some, 4), queries))
    for one, other in zip(alone, together):
        assert_array_equal(one[0], other[0])
        assert_array_equal(one[1], other[1])


def test_codes_are_kept_once():
    """A byte for two codes of 4 bits, a float and two row numbers: nothing else grows with the rows."""
    X = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    index = IVFIndex(2, 1, fine_quantizer=ProductQuantizer(16, 4, max_iter=2), random_state=0).fit(X)
    assert 8 + 4 + 4 + 4 <= index.bytes_per_vector_ < 8 + 4 + 4 + 4.5
    pickled = pickle.dumps(index)
    assert len(pickled) < 4000 * 25
    index.kneighbors(X[:3], 2)
    assert len(pickle.dumps(index)) == len(pickled)


@native_only
def test_arrays_that_do_not_fit_are_refused(rng):
    file = coded_file("euclidean", rows_of("normal", 50, 6, rng), 3, 2, 10, rng)
    rows, queries = file.planes()[1], rng.normal(size=(2, 6))
    keys, positions, unserved = np.empty((2, 5)), np.empty((2, 5), np.int64), np.empty(2, np.uint8)
    probes = np.zeros((2, 1), dtype=np.int32)
    native = _kernels.native
    with pytest.raises(ValueError, match="search"):
        native.search_lists(rows.packed, queries[:, :4].copy(), probes, keys, positions, unserved)
    for name, wrong in (
        ("ids", rows.ids[1:]),
        ("terms", rows.terms[1:]),
        ("terms", None),
        ("allowed", np.ones(3, np.uint8)),
    ):
        spoilt = type(rows)(
            **{
                **{f: getattr(rows, f) for f in ("coding", "codes", "ids", "terms", "strays", "allowed")},
                name: wrong,
            }
        )
        with pytest.raises(ValueError, match="shapes"):
            native.PackedCodes(spoilt)
    vectors = native.PackedRows("distance", rng.normal(size=(9, 6)), np.arange(9, dtype=np.int32))
    candidates = np.zeros((2, 4), dtype=np.int64)
    with pytest.raises(ValueError, match="rank_rows"):
        native.rank_rows(vectors, queries, candidates, keys, positions)
    with pytest.raises(ValueError, match="row numbers"):
        native.PackedRows("distance", rng.normal(size=(9, 6)), np.arange(8, dtype=np.int32))
    centers = center_planes.CenterPlanes(Metric("sqeuclidean"), file.centers).planes.packed
    with pytest.raises(ValueError, match="turned"):
        native.search_index(
            centers, None, rows.packed, queries, queries[:1], 1, np.inf, 0, keys, positions, unserved
        )

"""The certified scan: what it excludes is never nearest, on any data, on every instruction set."""

import functools
from collections import Counter

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from skivfpq import LloydKMeans, _kernels
from skivfpq._algorithms import assignment, blocks, lloyd, planes, seeding

pytestmark = pytest.mark.skipif(not _kernels.NATIVE, reason="the scan is compiled only")

CASES = [
    "normal",
    "steep spectrum",
    "clusters",
    "near ties",
    "duplicates",
    "long row",
    "long column",
    "constant columns",
    "constant",
    "offset",
    "two clouds",
    "tiny",
    "denormal",
    "huge",
    "1e30 row",
    "integers",
    "heavy tails",
    "zeros",
]


@pytest.fixture(autouse=True)
def scans_however_little_it_saves(monkeypatch):
    """Small problems take the scan, and keep to it."""
    monkeypatch.setattr(planes, "LEAST_WORK", 0)
    monkeypatch.setattr(planes, "JUDGED_ROWS", 256)


def scan_on(monkeypatch):
    """However slow the scan turns out to be: of all features first, then of the head."""
    monkeypatch.setattr(planes.NearestCenters, "_judge", lambda *args: None)
    monkeypatch.setattr(planes.NearestCenters, "_trial", fast_trial)
    monkeypatch.setattr(planes.NearestCenters, "_seconds_of_lanes", lambda *args: 1.0)


def fast_trial(search, embedding, centers, labels):
    """In place of _trial."""
    return -2e9 if (embedding.axes is None) == (labels[0] < 0) else -1e9


def awkward(case, n_samples, n_features, dtype, seed=0):  # noqa: C901 - a table of cases
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_samples, n_features))
    if case == "steep spectrum":
        X *= np.arange(1, n_features + 1) ** -1.0
    elif case == "clusters":
        X = 10 * rng.normal(size=(20, n_features))[rng.integers(20, size=n_samples)] + X
    elif case == "near ties":  # rows halfway between two others, but for one unit in the last place
        third = n_samples // 3
        X[:third] = (X[third : 2 * third] + X[2 * third : 3 * third]) / 2
        X[:third] = np.nextafter(X[:third].astype(dtype), dtype(np.inf))
    elif case == "duplicates":
        X = X[rng.integers(n_samples // 4, size=n_samples)]
    elif case == "long row":
        X[5] *= 1000
    elif case == "long column":
        X[:, 3] *= 50
    elif case == "constant columns":
        X[:, 1::2] = 7
    elif case == "constant":
        X[:] = 3
        X[:200] += rng.normal(size=(200, 1))
    elif case == "offset":
        X += 1e6
    elif case == "two clouds":
        X += rng.choice([-1000, 1000], size=(n_samples, 1))
    elif case == "tiny":
        X *= 1e-30
    elif case == "denormal":
        X *= np.finfo(dtype).smallest_subnormal * 100
    elif case == "huge":
        X *= 1e30
    elif case == "1e30 row":
        X[7] *= 1e30
        X[11, 2] = 1e30
    elif case == "integers":
        X = rng.integers(0, 256, size=X.shape)
    elif case == "heavy tails":
        X = rng.standard_cauchy(X.shape)
    elif case == "zeros":
        X[rng.random(X.shape) < 0.9] = 0
        X[: n_samples // 2] = 0
    return np.ascontiguousarray(X, dtype=dtype)


def by_differences(X, centers):
    """The oracle: labels and squared distances of float64 differences."""
    labels, sq_distances = np.empty(len(X), np.int32), np.empty(len(X))
    for start in range(0, len(X), 16):
        rows = slice(start, start + 16)
        distances = np.square(X[rows, None].astype(np.float64) - centers).sum(axis=-1)
        labels[rows], sq_distances[rows] = distances.argmin(axis=1), distances.min(axis=1)
    return labels, sq_distances


def find(search, centers, labels, sq_distances):
    """Nearest centers, and the squared distances to them where the search leaves them to its caller."""
    if not search(centers, labels, sq_distances):
        blocks.row_sq_distances(search.X, centers, labels, sq_distances)


def steps(X, n_clusters, n_steps, seed=0):
    """Centers as Lloyd's steps move them, some that stay and equal ones; and the oracle's answer."""
    rng = np.random.default_rng(seed)
    centers = X[rng.choice(len(X), n_clusters, replace=False)].astype(np.float64)
    for step in range(n_steps):
        labels, sq_distances = by_differences(X, centers)
        yield centers.copy(), labels, sq_distances
        for c in np.unique(labels):
            if step != 2 or c % 3:  # in one step a third of them stays
                centers[c] = X[labels == c].astype(np.float64).mean(axis=0)
        if step == 3:
            centers[n_clusters // 2] = centers[0]  # equal centers: the lower index wins
        centers = centers.astype(X.dtype).astype(np.float64)


@functools.cache
def cached_steps(case, shape, dtype):
    n_samples, n_features, n_clusters = shape
    X = awkward(case, n_samples, n_features, dtype)
    return X, list(steps(X, n_clusters, 5))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "first_label"), [((1031, 33, 130), -1), ((700, 64, 256), -1), ((700, 64, 256), 7)]
)
def test_labels_are_those_of_differences(instruction_set, monkeypatch, case, dtype, shape, first_label):
    X, expected_steps = cached_steps(case, shape, dtype)
    n_samples, _, n_clusters = shape
    scan_on(monkeypatch)
    search = planes.NearestCenters(X, n_clusters, n_threads=2)
    assert search.scans
    labels, sq_distances = np.full(n_samples, first_label, dtype=np.int32), np.empty(n_samples)
    for centers, expected, expected_sq_distances in expected_steps:
        find(search, centers, labels, sq_distances)
        assert_array_equal(labels, expected)
        assert_array_equal(sq_distances, expected_sq_distances)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pays", ["always", "as judged", "never"])
def test_rows_that_come_once_go_by_points_of_the_centers(instruction_set, monkeypatch, case, dtype, pays):
    X, expected_steps = cached_steps(case, (300, 45, 70), dtype)
    asked, nearest = [], assignment.CenterPlanes.nearest
    monkeypatch.setattr(assignment, "WORTHWHILE", 0)
    monkeypatch.setattr(assignment, "LEAST_NS", 0)
    monkeypatch.setattr(
        assignment.CenterPlanes,
        "nearest",
        lambda self, rows, n: asked.append(len(rows)) or nearest(self, rows, n),
    )
    monkeypatch.setattr(assignment, "_vain", Counter())
    if pays != "as judged":
        seconds = np.inf if pays == "always" else 0.0
        monkeypatch.setattr(assignment, "_seconds_of_lanes", lambda X, centers: seconds)
    for number, (centers, expected, expected_sq_distances) in enumerate(expected_steps):
        asked.clear()
        labels, sq_distances = assignment.nearest_centers(X, centers, 2)
        assert_array_equal(labels, expected)
        assert_array_equal(sq_distances, expected_sq_distances)
        if pays == "always":
            assert sum(asked) == len(X)
        elif pays == "never":  # and is not tried for ever
            assert sum(asked) == (assignment.JUDGED_ROWS if number < 2 else 0)


@functools.cache
def cached_mixture(case, dtype):
    """Rows of a steep spectrum, whose first features are of another case."""
    X = awkward("steep spectrum", 900, 65, dtype)
    X[:, :5] = awkward(case, 900, 5, dtype)
    return X, list(steps(X, 256, 3))


@pytest.mark.parametrize("case", ["steep spectrum", "duplicates", "long row", "1e30 value", "clusters"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_head_may_serve_the_first_centers_too(instruction_set, monkeypatch, case, dtype):
    X, expected_steps = cached_mixture(case, dtype)
    scan_on(monkeypatch)
    monkeypatch.setattr(
        planes.NearestCenters,
        "_trial",
        lambda search, embedding, *args: 0.0 if embedding.axes is None else -1.0,
    )
    search = planes.NearestCenters(X, 256, n_threads=2)
    labels, sq_distances = np.full(len(X), -1, dtype=np.int32), np.empty(len(X))
    for centers, expected, expected_sq_distances in expected_steps:
        find(search, centers, labels, sq_distances)
        assert_array_equal(labels, expected)
        assert_array_equal(sq_distances, expected_sq_distances)
    if _kernels.native.scan_shape()[2] == 16:  # AMX's fills 64 axes, half of the features or more here
        return
    assert len(search.embeddings) == 2
    assert search.plane is None or search.plane.embedding is search.embeddings[1]


def test_the_fastest_embedding_is_packed(monkeypatch):
    X, expected_steps = cached_steps("steep spectrum", (900, 65, 256), np.float32)
    monkeypatch.setattr(planes.NearestCenters, "_seconds_of_lanes", lambda *args: 1.0)
    monkeypatch.setattr(planes.NearestCenters, "_judge", lambda *args: None)
    seconds = iter([0.5, 0.6, 0.5, 0.45, 0.5, 0.6, 0.5, 0.39])  # of all features and the head, twice, twice
    monkeypatch.setattr(planes.NearestCenters, "_trial", lambda *args: next(seconds))
    for packed in ("all features", "head"):  # anew only where that saves a fifth: of .5, .39 does
        search = planes.NearestCenters(X, 256, n_threads=1)
        labels, sq_distances = np.full(len(X), -1, dtype=np.int32), np.empty(len(X))
        for centers, expected, _ in expected_steps:
            find(search, centers, labels, sq_distances)
            assert_array_equal(labels, expected)
        assert (search.plane.embedding.axes is not None) == (packed == "head")


@pytest.mark.parametrize("shape", [(500, 70, 251), (500, 150, 219), (500, 197, 240), (300, 1000, 128)])
def test_rows_of_many_units_and_panels_in_part(instruction_set, monkeypatch, shape):
    X, expected_steps = cached_steps("clusters", shape, np.float32)
    n_samples, _, n_clusters = shape
    scan_on(monkeypatch)
    search = planes.NearestCenters(X, n_clusters, n_threads=1)
    labels, sq_distances = np.full(n_samples, -1, dtype=np.int32), np.empty(n_samples)
    for centers, expected, expected_sq_distances in expected_steps:
        find(search, centers, labels, sq_distances)
        assert_array_equal(labels, expected)
        assert_array_equal(sq_distances, expected_sq_distances)


def test_scores_of_long_columns_do_not_overflow(instruction_set, monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.choice([-1.0, 1.0], size=(100, 16384)).astype(np.float32)
    centers = 40 * rng.choice([-1.0, 1.0], size=(128, 16384))
    centers[:4] = X[:4] + rng.normal(size=(4, 16384))
    scan_on(monkeypatch)
    plain, left = blocks.nearest_centers, []
    monkeypatch.setattr(
        blocks, "nearest_centers", lambda rows, *args: left.append(len(rows)) or plain(rows, *args)
    )
    search = planes.NearestCenters(X, 128, n_threads=1)
    labels, sq_distances = np.zeros(len(X), dtype=np.int32), np.empty(len(X))
    find(search, centers, labels, sq_distances)
    _, _, _, wraps = _kernels.native.scan_shape()
    assert not left or wraps  # whose columns are too coarse for such lengths
    expected, expected_sq_distances = plain(X, centers)
    assert_array_equal(labels, expected)
    assert_array_equal(sq_distances, expected_sq_distances)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bounds_hold_and_save_work(instruction_set, monkeypatch, dtype):
    X = awkward("clusters", 1200, 64, dtype)
    scan_on(monkeypatch)
    search = planes.NearestCenters(X, 256, n_threads=1)
    labels, sq_distances = np.full(len(X), -1, dtype=np.int32), np.empty(len(X))
    for centers, _, _ in steps(X, 256, 8):
        find(search, centers, labels, sq_distances)
        distances = np.sqrt(np.square(X[:, None].astype(np.float64) - centers).sum(axis=-1))
        assert np.all(search.upper >= distances[np.arange(len(X)), labels] * (1 - 1e-12))
        assert np.all(search.upper <= distances[np.arange(len(X)), labels] + 0.2 * np.median(search.upper))
        distances[np.arange(len(X)), labels] = np.inf
        assert np.all(search.lower <= distances.min(axis=1) * (1 + 1e-12))
    assert (search.lower > np.sqrt(sq_distances) * (1 + 1e-6)).mean() > 0.2


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_seeding_of_awkward_data(instruction_set, case, dtype):
    X = awkward(case, 1100, 40, dtype)
    weights = np.random.default_rng(1).integers(0, 3, size=len(X)).astype(float)
    certified = seeding.kmeans_plusplus(X, 30, weights, np.random.default_rng(2), n_threads=2)
    plain = plain_seeding(X, 30, weights, np.random.default_rng(2))
    for found, expected in zip(certified, plain):
        assert_array_equal(found, expected)
    labels, sq_distances = by_differences(X, X[certified[0]].astype(np.float64))
    assert_array_equal(certified[1], labels)
    assert_array_equal(certified[2], sq_distances)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_seeding_by_float_scores_of_awkward_data(instruction_set, monkeypatch, case, dtype):
    monkeypatch.setattr(seeding, "pack_plane", lambda *args, **kwargs: None)
    test_seeding_of_awkward_data(instruction_set, case, dtype)
    X = awkward(case, 700, 4, dtype)
    assert_array_equal(
        seeding.kmeans_plusplus(X, 20, np.ones(700), np.random.default_rng(0), n_threads=2)[0],
        plain_seeding(X, 20, np.ones(700), np.random.default_rng(0))[0],
    )


def test_seeding_evaluates_few_candidates(monkeypatch):
    X = awkward("normal", 4000, 10, np.float64)
    wanted = []
    score = seeding.CertifiedSeeding._score
    monkeypatch.setattr(
        seeding.CertifiedSeeding, "_score", lambda *args: wanted.append(score(*args)) or wanted[-1]
    )
    seeding.kmeans_plusplus(X, 30, np.ones(4000), np.random.default_rng(0))
    assert np.shape(wanted) == (29, 5)
    assert 1 <= np.mean(np.sum(wanted, axis=1)) < 1.5


def plain_seeding(X, n_clusters, weights, rng):
    """The same draws by the plain class."""
    original = seeding.CertifiedSeeding
    try:
        seeding.CertifiedSeeding = lambda X, weights, *args: seeding.Seeding(X, weights)
        return seeding.kmeans_plusplus(X, n_clusters, weights, rng)
    finally:
        seeding.CertifiedSeeding = original


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_same_bits_for_any_number_of_threads(dtype):
    X = awkward("steep spectrum", 9000, 64, dtype)
    fits = [LloydKMeans(256, n_jobs=n_jobs, max_iter=12, random_state=0).fit(X) for n_jobs in (1, 2, 4)]
    for other in fits[1:]:
        assert_array_equal(other.cluster_centers_, fits[0].cluster_centers_)
        assert_array_equal(other.labels_, fits[0].labels_)
        assert other.inertia_ == fits[0].inertia_
        assert other.n_iter_ == fits[0].n_iter_


@pytest.mark.parametrize("n_axes", [None, 16])
def test_an_embedding_never_lengthens(n_axes):
    X = awkward("steep spectrum", 300, 48, np.float32)
    axes = None
    if n_axes is not None:
        axes = np.linalg.qr(np.random.default_rng(0).normal(size=(48, 48)))[0][:, :n_axes]
    embedding = planes.Embedding(X.mean(axis=0), axes, tail_origin=0.3)
    Y, bounds = embedding(X)
    assert Y.shape == (300, embedding.width)
    apart = np.sqrt(np.square(Y[:, None].astype(np.float64) - Y).sum(axis=-1))
    really = np.sqrt(np.square(X[:, None].astype(np.float64) - X).sum(axis=-1))
    assert np.all(apart <= really + bounds[:, None] + bounds)
    assert apart[0].max() > 0.5 * really[0].max()


@pytest.mark.parametrize("lanes", [1, 16])
def test_int8_points_are_within_their_errors(instruction_set, lanes):
    X = awkward("heavy tails", 1040, 50, np.float32)
    X[3] = 1e20  # too long for the plane
    plane = planes.pack_plane(X, planes.all_features(X), lanes=lanes)
    Y, _ = plane.embedding(X)
    codes = plane.codes.transpose(0, 2, 1, 3).reshape(-1, plane.codes.shape[1] * 4)[: len(X), :50]
    q = codes.astype(np.float64) - 128
    served = np.isfinite(plane.errors)
    assert not served[3]
    assert 0.1 < served.mean() < 1
    errors = np.sqrt(np.square(Y - plane.scale * q).sum(axis=1))
    assert np.all(errors[served] <= plane.errors[served])
    assert_array_equal(plane.sq_norms[served], np.square(q[served]).sum(axis=1))
    codes, scales, errors, sq_norms = plane.fine
    shifted = X.astype(np.float64) - plane.embedding.origin
    fine = np.sqrt(np.square(shifted - scales[:, None].astype(np.float64) * codes).sum(axis=1))
    assert np.all(fine <= errors)
    assert_array_equal(sq_norms, np.square(codes.astype(int)).sum(axis=1))


def test_rows_that_defeat_the_bound_go_to_the_lane_kernel(instruction_set, monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(4096, 40)) + 1e4 * rng.choice([-1, 1], size=(4096, 1)) * rng.normal(size=40)
    left = []
    plain = blocks.nearest_centers
    scan_on(monkeypatch)
    monkeypatch.setattr(
        blocks, "nearest_centers", lambda rows, *args: left.append(len(rows)) or plain(rows, *args)
    )
    search = planes.NearestCenters(X, 256, n_threads=1)
    labels, sq_distances = np.full(len(X), -1, dtype=np.int32), np.empty(len(X))
    centers = X[rng.choice(len(X), 256, replace=False)]
    find(search, centers, labels, sq_distances)
    assert sum(left) > 3000
    assert_array_equal(labels, by_differences(X, centers)[0])


def test_seeding_leaves_a_scan_that_excludes_too_little(monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(4096, 40)) + 1e4 * rng.choice([-1, 1], size=(4096, 1)) * rng.normal(size=40)
    started = []
    original = blocks.PackedRows.__init__
    monkeypatch.setattr(
        blocks.PackedRows, "__init__", lambda self, *args: started.append(1) or original(self, *args)
    )
    found = seeding.kmeans_plusplus(X, 60, np.ones(4096), np.random.default_rng(1))
    assert started == [1]
    for one, other in zip(found, plain_seeding(X, 60, np.ones(4096), np.random.default_rng(1))):
        assert_array_equal(one, other)


def test_a_scan_that_does_not_pay_is_given_up():
    X = awkward("normal", 3000, 64, np.float32)
    search = planes.NearestCenters(X, 256, n_threads=1)
    search.plane = object()
    search._judge(0.0, X[:256].astype(np.float64))
    search._judge(1e3, X[:256].astype(np.float64))
    assert search.scans
    search._judge(1e3, X[:256].astype(np.float64))
    assert not search.scans
    assert search.plane is None
    proven = planes.NearestCenters(X, 256, n_threads=1)
    for seconds in (0.0, 0.0, 1e3, 1e3):
        proven._judge(seconds, X[:256].astype(np.float64))
    assert proven.scans
    labels, sq_distances = np.full(len(X), -1, dtype=np.int32), np.empty(len(X))
    for centers, expected, expected_sq_distances in steps(X, 256, 3):
        find(search, centers, labels, sq_distances)
        assert_array_equal(labels, expected)
        assert_array_equal(sq_distances, expected_sq_distances)


@pytest.mark.parametrize(("case", "promising"), [("clusters", True), ("two clouds", False)])
def test_a_trial_tells_whether_the_bound_serves(case, promising):
    rng = np.random.default_rng(0)
    if promising:
        X = 10 * rng.normal(size=(300, 64))[rng.integers(300, size=6000)] + rng.normal(size=(6000, 64))
    else:
        X = rng.normal(size=(6000, 64)) + 1e4 * rng.choice([-1, 1], size=(6000, 1)) * rng.normal(size=64)
    centers = X[rng.choice(6000, 1024, replace=False)]
    labels, _ = blocks.nearest_centers(X, centers)
    judged = []
    for _ in range(5):  # a clock may be interrupted
        search = planes.NearestCenters(X, 1024, n_threads=1)
        seconds = search._trial(planes.all_features(X), centers, labels)
        judged.append(seconds < planes.PROMISING * search._seconds_of_lanes(centers))
    assert (sum(judged) > 2) == promising


def test_a_start_forgets_the_bounds_of_the_one_before(monkeypatch):
    scan_on(monkeypatch)
    X = awkward("normal", 700, 64, np.float64)
    step = lloyd.MemoryStep(X, np.ones(len(X)), 1, 256)
    *_, (last, _, _) = steps(X, 256, 4)
    for centers in (last, last, last):  # which find bounds a little beyond the nearest centers
        step(centers)
    beyond = step.search.lower / np.sqrt(np.maximum(step.sq_distances(), 1e-9))
    row = np.argmax(np.where(step.sq_distances() > 1, beyond, 0))
    assert beyond[row] > 1.01
    near, other = step.labels[row], (step.labels[row] + 1) % 256
    # Another start, whose centers come to where they were, but for one that took the row meanwhile.
    first = last.copy()
    first[near] += 1e3
    first[other] = X[row] + 1.005 * (X[row] - last[near])
    second = first.copy()
    second[near] = last[near]
    step.start(first, *by_differences(X, first))
    for centers in (first, second):
        step(centers)
        expected, expected_sq_distances = by_differences(X, centers)
        assert_array_equal(step.labels, expected)
        assert_array_equal(step.sq_distances(), expected_sq_distances)

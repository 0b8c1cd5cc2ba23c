"""The certified scan: what it excludes is never nearest, on any data, on every instruction set."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from skivfpq import LloydKMeans, _kernels
from skivfpq._algorithms import blocks, planes, seeding

INSTRUCTION_SETS = _kernels.native.runnable() if _kernels.NATIVE else []
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


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Each compiled variant in turn."""
    before = _kernels.native.INSTRUCTION_SET
    _kernels.native.use(request.param)
    yield request.param
    _kernels.native.use(before)


def awkward(case, n_samples, n_features, dtype, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_samples, n_features))
    if case == "steep spectrum":
        X *= np.arange(1, n_features + 1) ** -1.0
    elif case == "clusters":
        X = 10 * rng.normal(size=(20, n_features))[rng.integers(20, size=n_samples)] + X
    elif case == "near ties":  # rows halfway between two others, but for one unit in the last place
        X[::3] = (X[1::3][: len(X[::3])] + X[2::3][: len(X[::3])].mean(axis=0)) / 2
        X[::3] = np.nextafter(X[::3].astype(dtype), dtype(np.inf))
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
    for i, x in enumerate(X):
        differences = np.square(x.astype(np.float64) - centers).sum(axis=1)
        labels[i] = differences.argmin()
        sq_distances[i] = differences[labels[i]]
    return labels, sq_distances


def steps(X, n_clusters, n_steps, seed=0):
    """Centers as Lloyd's steps move them, and some that hardly move or jump."""
    rng = np.random.default_rng(seed)
    centers = X[rng.choice(len(X), n_clusters, replace=False)].astype(np.float64)
    for step in range(n_steps):
        yield centers.copy()
        labels, _ = by_differences(X, centers)
        for c in np.unique(labels):
            if step != 2 or c % 3:  # in one step a third of them stays
                centers[c] = X[labels == c].astype(np.float64).mean(axis=0)
        if step == 3:
            centers[n_clusters // 2] = centers[0]  # equal centers: the lower index wins
        centers = centers.astype(X.dtype).astype(np.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1031, 33, 130), (1200, 64, 256)])
def test_labels_are_those_of_differences(instruction_set, case, dtype, shape):
    n_samples, n_features, n_clusters = shape
    X = awkward(case, n_samples, n_features, dtype)
    search = planes.NearestCenters(X, n_clusters, n_threads=2)
    assert search.scans
    labels, sq_distances = np.full(n_samples, -1, dtype=np.int32), np.empty(n_samples)
    for centers in steps(X, n_clusters, 6):
        search(centers, labels, sq_distances)
        expected, expected_sq_distances = by_differences(X, centers)
        assert_array_equal(labels, expected)
        assert_array_equal(sq_distances, expected_sq_distances)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lower_bounds_hold_and_save_work(instruction_set, dtype):
    X = awkward("clusters", 1200, 64, dtype)
    search = planes.NearestCenters(X, 256, n_threads=1)
    labels, sq_distances = np.full(len(X), -1, dtype=np.int32), np.empty(len(X))
    for centers in steps(X, 256, 8):
        search(centers, labels, sq_distances)
        distances = np.sqrt(np.square(X[:, None].astype(np.float64) - centers).sum(axis=-1))
        distances[np.arange(len(X)), labels] = np.inf
        assert np.all(search.lower <= distances.min(axis=1) * (1 + 1e-12))
    assert (search.lower > np.sqrt(sq_distances)).mean() > 0.5


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


def plain_seeding(X, n_clusters, weights, rng):
    """The same draws by the plain class."""
    original = seeding.CertifiedSeeding
    try:
        seeding.CertifiedSeeding = seeding.Seeding
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
    monkeypatch.setattr(blocks, "nearest_centers", lambda rows, *args: left.append(len(rows)) or plain(rows, *args))
    search = planes.NearestCenters(X, 256, n_threads=1)
    labels, sq_distances = np.full(len(X), -1, dtype=np.int32), np.empty(len(X))
    centers = X[rng.choice(len(X), 256, replace=False)]
    search(centers, labels, sq_distances)
    assert sum(left[1:]) > 3000  # the first call guesses
    assert_array_equal(labels, by_differences(X, centers)[0])

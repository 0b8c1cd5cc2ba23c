"""Bad input: a ValueError or TypeError that names what was expected and what came."""

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from skivfpq import IVFIndex, LloydKMeans, ProductQuantizer, exact_neighbors, neighbors_recall

X = np.random.default_rng(0).normal(size=(40, 4))
ESTIMATORS = {
    "kmeans": LloydKMeans(3, random_state=0),
    "pq": ProductQuantizer(2, 2, random_state=0),
    "flat": IVFIndex(3, random_state=0),
    "ivfpq": IVFIndex(3, 2, fine_quantizer=ProductQuantizer(2, 2), random_state=0),
}
METHODS = {
    "kmeans": ["predict", "transform", "score"],
    "pq": ["predict", "transform", "score", "distance_tables"],
    "flat": [
        "predict",
        "transform",
        "score",
        "kneighbors",
        "kneighbors_graph",
        "radius_neighbors",
        "tune",
        "partial_fit",
    ],
    "ivfpq": ["predict", "transform", "kneighbors", "radius_neighbors", "tune", "partial_fit"],
}
CALLS = [(name, method) for name, methods in METHODS.items() for method in methods]


def spoilt(value):
    bad = X.copy()
    bad[3, 1] = value
    return bad


BAD_ROWS = {
    "NaN": (spoilt(np.nan), ValueError, "NaN"),
    "inf": (spoilt(np.inf), ValueError, "infinity"),
    "too large": (spoilt(1e200), ValueError, r"values up to 1e\+140 .* got 1e\+200"),
    "1-D": (X[0], ValueError, "Expected 2D array, got 1D array"),
    "3-D": (X[None], ValueError, "expected <= 2|dim 3"),
    "no rows": (X[:0], ValueError, "0 sample"),
    "no columns": (X[:, :0], ValueError, "0 feature"),
    "strings": (np.array([["a", "b", "c", "d"]] * 5), ValueError, "bytes/strings|could not convert"),
    "objects": (np.array([[{}, 1, 2, 3]] * 5, dtype=object), TypeError, "must be a string or a real number"),
    "complex": (X + 1j, ValueError, "Complex data not supported"),
    "large integers": (np.full((5, 4), 2**60), ValueError, r"integers up to 2\*\*53"),
    "None": (None, ValueError, None),
    "a string": ("abc", ValueError, "Expected 2D array, got scalar array|could not convert"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_fit_refuses(name, case):
    bad, error, message = BAD_ROWS[case]
    with pytest.raises(error, match=message):
        type(ESTIMATORS[name])(**ESTIMATORS[name].get_params(deep=False)).fit(bad)


@pytest.mark.parametrize("case", [case for case in BAD_ROWS if case != "None"])
@pytest.mark.parametrize(("name", "method"), CALLS)
def test_methods_refuse(name, method, case):
    bad, error, message = BAD_ROWS[case]
    fitted = ESTIMATORS[name].fit(X)
    with pytest.raises(error, match=message):
        getattr(fitted, method)(bad)


@pytest.mark.parametrize(("name", "method"), CALLS)
def test_wrong_number_of_features(name, method):
    fitted = ESTIMATORS[name].fit(X)
    with pytest.raises(ValueError, match="X has 3 features, but .* is expecting 4 features"):
        getattr(fitted, method)(X[:, :3])


@pytest.mark.parametrize(("name", "method"), [call for call in CALLS if call[1] != "partial_fit"])
def test_unfitted_use(name, method):
    params = ESTIMATORS[name].get_params(deep=False)
    with pytest.raises(NotFittedError, match="not fitted yet"):
        getattr(type(ESTIMATORS[name])(**params), method)(X)


@pytest.mark.parametrize(
    "call",
    [
        lambda index: index.remove([0]),
        lambda index: index.reconstruct([0]),
        lambda index: index.radius_neighbors_graph(),
        lambda index: ProductQuantizer().inverse_transform([[0]]),
    ],
)
def test_other_unfitted_use(call):
    with pytest.raises(NotFittedError):
        call(IVFIndex())


BAD_PARAMETERS = [
    (LloydKMeans(0), "n_clusters' parameter of LloydKMeans must be an int in the range .* Got 0 instead"),
    (LloydKMeans(2.5), "n_clusters"),
    (LloydKMeans(41), "n_samples=40 should be >= n_clusters=41"),
    (LloydKMeans(10**9), "n_samples=40 should be >= n_clusters=1000000000"),
    (LloydKMeans(init="kmeans"), "'init' parameter .* Got 'kmeans' instead"),
    (LloydKMeans(2, init=X[:3]), "does not match the number of clusters 2"),
    (LloydKMeans(2, init=X[:2, :3]), "does not match the number of features of the data 4"),
    (LloydKMeans(2, init=X[:2] * np.nan), "NaN"),
    (LloydKMeans(n_init=0), "n_init"),
    (LloydKMeans(max_iter=0), "max_iter"),
    (LloydKMeans(tol=-1), "tol"),
    (LloydKMeans(metric="manhattan"), "metric"),
    (LloydKMeans(max_samples=1.5), "max_samples"),
    (LloydKMeans(max_samples=0), "max_samples"),
    (LloydKMeans(n_jobs=0), "n_jobs"),
    (LloydKMeans(random_state="seed"), "random_state"),
    (ProductQuantizer(0), "n_subspaces"),
    (ProductQuantizer(5), "n_subspaces=5 must be at most n_features=4"),
    (ProductQuantizer(n_bits=0), "n_bits"),
    (ProductQuantizer(n_bits=17), "n_bits"),
    (ProductQuantizer(rotation="svd"), "rotation"),
    (ProductQuantizer(max_samples=-3), "max_samples"),
    (IVFIndex(0), "n_lists"),
    (IVFIndex(10**9), "n_lists=1000000000 must be at most n_samples=40"),
    (IVFIndex(n_probes=0), "n_probes' parameter of IVFIndex must be .* Got 0 instead"),
    (IVFIndex(n_probes="all"), "n_probes"),
    (IVFIndex(n_neighbors=0), "n_neighbors"),
    (IVFIndex(target_recall=0), "target_recall"),
    (IVFIndex(target_recall=1.1), "target_recall"),
    (IVFIndex(metric="l2"), "metric"),
    (IVFIndex(coarse_quantizer="kmeans"), "coarse_quantizer"),
    (
        IVFIndex(coarse_quantizer=ProductQuantizer()),
        "coarse_quantizer must be a clusterer with the parameter n_clusters",
    ),
    (IVFIndex(fine_quantizer=LloydKMeans()), "fine_quantizer"),
    (IVFIndex(refine_factor=0.5), "refine_factor"),
    (IVFIndex(vectors_dtype="int8"), "vectors_dtype"),
    (IVFIndex(mode="graph"), "mode"),
    (IVFIndex(by_residual=None), "by_residual"),
]


@pytest.mark.parametrize(("estimator", "message"), BAD_PARAMETERS, ids=lambda value: repr(value)[:60])
def test_parameters_are_named(estimator, message):
    with pytest.raises((ValueError, TypeError), match=message):
        estimator.fit(X)


BAD_ARGUMENTS = [
    (lambda index: index.kneighbors(X, 0), ValueError, "n_neighbors must be >= 1, got 0"),
    (lambda index: index.kneighbors(X, -3), ValueError, "n_neighbors"),
    (lambda index: index.kneighbors(X, 2.0), TypeError, "n_neighbors must be an int, got 2.0 of type float"),
    (lambda index: index.kneighbors(X, True), TypeError, "n_neighbors"),
    (lambda index: index.kneighbors(X, "5"), TypeError, "n_neighbors"),
    (lambda index: index.kneighbors(X, 10**9), ValueError, "n_neighbors = 1000000000, n_samples_fit = 40"),
    (lambda index: index.kneighbors(X, 41), ValueError, "Expected n_neighbors <= n_samples_fit"),
    (lambda index: index.kneighbors(n_neighbors=40), ValueError, "no row is its own neighbour"),
    (lambda index: index.kneighbors(X, n_probes=0), ValueError, "n_probes must be >= 1, got 0"),
    (lambda index: index.kneighbors(X, n_probes=1.5), TypeError, "n_probes"),
    (lambda index: index.kneighbors(X, subset=[1, 2]), ValueError, "2 live rows in subset"),
    (lambda index: index.kneighbors(X, subset=[]), ValueError, "0 live rows in subset"),
    (
        lambda index: index.kneighbors(X, subset=[0, 40]),
        ValueError,
        "subset must hold row numbers from 0 to 39, got 40",
    ),
    (
        lambda index: index.kneighbors(X, subset=[-1]),
        ValueError,
        "subset must hold row numbers from 0 to 39, got -1",
    ),
    (lambda index: index.kneighbors(X, subset=[0.5]), ValueError, "subset must be .* dtype float64"),
    (lambda index: index.kneighbors(X, subset=[True]), ValueError, "mask must have 40 entries"),
    (lambda index: index.kneighbors(X, subset=[[1]]), ValueError, "subset must be a 1-D array"),
    (lambda index: index.kneighbors(X, subset=["a"]), ValueError, "subset"),
    (lambda index: index.radius_neighbors(X, np.nan), ValueError, "radius must be finite, got nan"),
    (lambda index: index.radius_neighbors(X, "1"), TypeError, "radius must be a number"),
    (lambda index: index.kneighbors_graph(X, mode="weights"), ValueError, "mode must be"),
    (lambda index: index.remove([40]), ValueError, "indices must hold row numbers from 0 to 39, got 40"),
    (lambda index: index.remove([1.0]), ValueError, "indices must be"),
    (lambda index: index.reconstruct([2**40]), ValueError, "indices must hold row numbers"),
    (
        lambda index: index.tune(X, target_recall=2),
        ValueError,
        "target_recall must be finite, above 0, at most 1",
    ),
    (lambda index: index.tune(X, n_neighbors=10**9), ValueError, "n_neighbors = 1000000000"),
    (lambda index: index.set_params(n_neighbors=100).transform(X), ValueError, "n_neighbors = 101"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_ARGUMENTS, ids=[m for _, _, m in BAD_ARGUMENTS])
@pytest.mark.parametrize("fine_quantizer", [None, ProductQuantizer(2, 2)])
def test_arguments_are_named(fine_quantizer, call, error, message):
    index = IVFIndex(3, 2, fine_quantizer=fine_quantizer, random_state=0).fit(X)
    with pytest.raises(error, match=message):
        call(index)


def test_refine_factor_argument():
    index = IVFIndex(3, 2, fine_quantizer=ProductQuantizer(2, 2), refine_factor=2, random_state=0).fit(X)
    for factor, error in ((0.5, ValueError), (np.inf, ValueError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="refine_factor must be"):
            index.kneighbors(X, refine_factor=factor)


@pytest.mark.parametrize(
    "weights", [np.zeros(40), -np.ones(40), np.full(40, np.nan), np.ones(39), np.ones((40, 2)), "a"]
)
def test_weights_are_refused(weights):
    with pytest.raises((ValueError, TypeError)):
        LloydKMeans(2).fit(X, sample_weight=weights)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, X[:, :3], 2), ValueError, "same number of features, got 4 and 3"),
        ((X, X, 41), ValueError, "n_neighbors=41 must be at most the number of rows of Y, 40"),
        ((X, X, 0), ValueError, "n_neighbors must be >= 1"),
        ((X, X, 2, "l1"), ValueError, "metric must be one of"),
        ((X[0], X, 2), ValueError, "Expected 2D array"),
        ((X * np.nan, X, 2), ValueError, "NaN"),
    ],
)
def test_exact_neighbors_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        exact_neighbors(*arguments)


@pytest.mark.parametrize(
    ("true", "found", "message"),
    [
        ([[1.0]], [[1]], "true must be row numbers"),
        ([[1]], [1], "found must be row numbers"),
        ([[1, 2]], [[1]], "same shape"),
        (np.empty((0, 2), int), np.empty((0, 2), int), "true must be row numbers"),
    ],
)
def test_neighbors_recall_refuses(true, found, message):
    with pytest.raises(ValueError, match=message):
        neighbors_recall(true, found)


def test_a_failed_call_leaves_the_index_as_it_was():
    index = IVFIndex(3, 3, random_state=0).fit(X)
    before = index.kneighbors(X)
    for bad in (spoilt(np.nan), X[:, :3]):
        with pytest.raises(ValueError):
            index.partial_fit(bad)
    with pytest.raises(ValueError):
        index.remove([0, 99])
    np.testing.assert_array_equal(index.kneighbors(X), before)
    assert index.n_samples_fit_ == 40

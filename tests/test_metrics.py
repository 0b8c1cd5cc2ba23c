"""exact_neighbors and neighbors_recall, worked by hand and against scikit-learn."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.neighbors import NearestNeighbors

from skivfpq import exact_neighbors, neighbors_recall
from skivfpq._algorithms.search import Metric, Pool, nearest_rows


def test_exact_neighbors_by_hand():
    Y = [[3.0, 4.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    distances, indices = exact_neighbors([[0.0, 0.0]], Y, 4)
    assert_array_equal(indices, [[3, 1, 2, 0]])  # 1 before 2: a tie
    assert_array_equal(distances, [[0, 1, 1, 5]])
    distances, indices = exact_neighbors([[1.0, 0.0]], Y, 4, metric="inner_product")
    assert_array_equal(indices, [[0, 2, 1, 3]])
    assert_array_equal(distances, [[-3, -1, 0, 0]])
    distances, indices = exact_neighbors([[0.0, 2.0]], Y, 4, metric="cosine")
    assert_array_equal(indices, [[1, 0, 2, 3]])
    assert_allclose(distances, [[0, 0.2, 1, 1]], atol=1e-15)
    distances, _ = exact_neighbors([[0.0, 0.0]], Y, 4, metric="cosine")
    assert_array_equal(distances, [[1, 1, 1, 1]])  # a vector of zeros has no direction


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_exact_neighbors_equals_scikit_learn(rng, metric):
    X, Y = rng.normal(size=(300, 7)), rng.normal(size=(5000, 7))
    expected, expected_indices = NearestNeighbors(algorithm="brute", metric=metric).fit(Y).kneighbors(X)
    distances, indices = exact_neighbors(X, Y, metric=metric)
    assert_array_equal(indices, expected_indices)
    assert_allclose(distances, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_exact_neighbors_far_from_zero(rng, offset):
    Y = (rng.normal(size=(2000, 16)) + offset).astype(np.float32)
    distances, indices = exact_neighbors(Y[:50], Y, 3)
    plain = np.sqrt(np.square(Y[:50, None].astype(float) - Y).sum(axis=-1))
    assert_array_equal(indices, np.argsort(plain, axis=1, kind="stable")[:, :3])
    assert_array_equal(distances, np.sort(plain, axis=1)[:, :3])


def test_many_copies():
    Y = np.tile([[1.0, 2.0]], (20000, 1))
    Y[[17, 19000]] = [[1.0, 2.5], [1.0, 1.9]]
    distances, indices = exact_neighbors([[1.0, 2.0], [1.0, 1.0]], Y, 20)
    assert_array_equal(indices[0], [i for i in range(21) if i != 17])
    assert_array_equal(indices[1], [19000, *[i for i in range(20) if i != 17]])
    assert_array_equal(distances[0], np.zeros(20))


def test_recall_by_hand():
    assert neighbors_recall([[1, 2, 3, 4], [5, 6, 7, 8]], [[4, 3, 9, 9], [5, 6, 7, 8]]) == 0.75
    assert neighbors_recall([[1]], [[2]]) == 0
    assert isinstance(neighbors_recall([[1]], [[1]]), float)


def test_pool_keeps_what_errors_cannot_exclude():
    exact = np.array([0.0, 1.1, 2.2, 2.15, 0.0])
    pool = Pool(1, 2, lambda queries, positions: exact[positions], np.arange(5))
    keys = np.array([[5.0, 1.0, 2.0, 2.4, 3.0]])
    pool.add(np.array([0]), np.arange(5), keys, np.array([0.25]))
    assert_array_equal(np.sort(pool.ranked()[1]), [1, 2, 3])  # 2.4 may be below 2.0, 3.0 may not
    found, places = pool.nearest()
    assert_array_equal(places, [[1, 3]])
    assert_array_equal(found, [[1.1, 2.15]])


def test_ids_break_ties():
    rows = np.zeros((6, 2))
    ids = np.array([5, 3, 4, 0, 2, 1])
    _, places = nearest_rows(Metric("euclidean"), np.zeros((1, 2)), rows, 3, ids)
    assert_array_equal(ids[places], [[0, 1, 2]])

"""Exact neighbours by brute force, and the recall of approximate ones."""

import numpy as np

from skivfpq._algorithms.blocks import effective_n_jobs
from skivfpq._algorithms.list_planes import exact_rows
from skivfpq._algorithms.search import Metric
from skivfpq._validation import check_integer, validate_other_rows

METRICS = ("euclidean", "sqeuclidean", "cosine", "inner_product")


def exact_neighbors(X, Y, n_neighbors=5, metric="euclidean"):
    """The n_neighbors rows of Y nearest to each row of X, by brute force.

    Parameters
    ----------
    X : array-like of shape (n_queries, n_features)
        Queries.
    Y : array-like of shape (n_samples, n_features)
        Rows searched.
    n_neighbors : int, default=5
        Neighbours of each query, at most n_samples.
    metric : {"euclidean", "sqeuclidean", "cosine", "inner_product"}, default="euclidean"
        "inner_product" gives minus the product as the distance.

    Returns
    -------
    distances : ndarray of shape (n_queries, n_neighbors), float64
        Computed from differences, nearest first.
    indices : ndarray of shape (n_queries, n_neighbors), int64
        Row numbers of Y; the lowest first on ties.

    Raises
    ------
    ValueError
        The arrays are not finite, not 2-D or not of the same width; n_neighbors exceeds n_samples.

    Examples
    --------
    >>> from skivfpq import exact_neighbors
    >>> distances, indices = exact_neighbors([[0, 0]], [[3, 4], [0, 1], [1, 0]], n_neighbors=2)
    >>> indices
    array([[1, 2]])
    >>> distances
    array([[1., 1.]])
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}.")
    X, Y = validate_other_rows(X, "X"), validate_other_rows(Y, "Y")
    if X.shape[1] != Y.shape[1]:
        raise ValueError(f"X and Y must have the same number of features, got {X.shape[1]} and {Y.shape[1]}.")
    n_neighbors = check_integer("n_neighbors", n_neighbors, 1)
    if n_neighbors > len(Y):
        raise ValueError(f"n_neighbors={n_neighbors} must be at most the number of rows of Y, {len(Y)}.")
    metric = Metric(metric)
    keys, indices = exact_rows(metric, metric.queries(X), Y, n_neighbors, effective_n_jobs(None))
    return metric.distances(keys), indices.astype(np.int64, copy=False)


def neighbors_recall(true, found):
    """Recall@k: the share of the k true neighbours that are among the k found ones.

    Parameters
    ----------
    true, found : array-like of shape (n_queries, k)
        Row numbers of the neighbours of each query, in any order.

    Returns
    -------
    recall : float
        Mean over the queries, from 0 to 1.

    Raises
    ------
    ValueError
        The arrays are not integers, not 2-D, or not of the same shape.

    Examples
    --------
    >>> from skivfpq import neighbors_recall
    >>> neighbors_recall([[1, 2, 3, 4]], [[4, 3, 7, 8]])
    0.5
    """
    true, found = np.asarray(true), np.asarray(found)
    for name, array in (("true", true), ("found", found)):
        if array.ndim != 2 or array.dtype.kind not in "iu" or array.size == 0:
            raise ValueError(
                f"{name} must be row numbers of shape (n_queries, k), got dtype {array.dtype} "
                f"and shape {array.shape}."
            )
    if true.shape != found.shape:
        raise ValueError(f"true and found must have the same shape, got {true.shape} and {found.shape}.")
    hits = [np.isin(t, f).sum() for t, f in zip(true, found)]
    return float(np.sum(hits) / true.size)

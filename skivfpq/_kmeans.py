"""k-means by Lloyd's algorithm, exact, as a scikit-learn estimator."""

import warnings
from numbers import Integral, Real

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted

from skivfpq._algorithms.assignment import nearest_centers, nearest_labels
from skivfpq._algorithms.blocks import effective_n_jobs
from skivfpq._algorithms.lloyd import MemoryStep, lloyd, scaled_tolerance
from skivfpq._algorithms.seeding import SAME, kmeans_plusplus, random_rows, too_few_distinct_rows
from skivfpq._kernels import dense_rows, is_zero_row, sq_distance_matrix, unit_rows
from skivfpq._sklearn_private import (
    COMMON_CONSTRAINTS,
    Interval,
    RealNotInt,
    StrOptions,
    check_sample_weight,
    fit_context,
)
from skivfpq._validation import all_or_nothing, as_generator, check_size, draw_seed, validate_rows


class LloydKMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """k-means clustering by exact Lloyd iterations, a drop-in for ``sklearn.cluster.KMeans``.

    Every label is the true nearest center, lowest index on ties: scores by matrix products decide
    only what rounding cannot change, differences in float64 decide the rest. So labels do not suffer
    from data far from the origin, and every number of threads gives the same bits.

    Parameters
    ----------
    n_clusters : int, default=8
        Number of clusters, at most the number of rows.
    init : {"k-means++", "random"}, array of shape (n_clusters, n_features) or callable, \
default="k-means++"
        First centers. "k-means++" is the greedy variant of scikit-learn; "random" takes distinct rows
        by ``numpy.random.default_rng(random_state).choice``; a callable gets
        ``(X, n_clusters, random_state=RandomState)`` and returns the centers.
    n_init : int or "auto", default="auto"
        Number of starts, the one of least inertia is kept. "auto": 10 for "random", 1 otherwise.
    max_iter : int, default=300
        Most iterations of one start.
    tol : float, default=1e-4
        An iteration that moves the centers by less, in squared distance relative to the mean weighted
        variance of the features, is the last one.
    metric : {"euclidean", "cosine"}, default="euclidean"
        "cosine" is spherical k-means: rows and centers are brought to length one.
    max_samples : int, float or None, default=None
        Rows to train on, drawn without repetition: a number, or a share of the rows. Labels and
        inertia are always those of all rows.
    n_jobs : int or None, default=None
        Threads. Other than in most of scikit-learn, None is every core that the process may use, as
        in ``sklearn.cluster.KMeans``. Results do not depend on it.
    random_state : int, RandomState, Generator or None, default=None
        Source of the random draws.
    verbose : int, default=0
        Whether each iteration is reported.

    Attributes
    ----------
    cluster_centers_ : ndarray of shape (n_clusters, n_features)
        Centers, in the dtype of the rows. One for each distinct row where those are fewer than
        ``n_clusters``.
    labels_ : ndarray of shape (n_samples,), int32
        Nearest center of each row, the same as ``predict`` gives.
    inertia_ : float
        Weighted sum over the rows of the squared Euclidean distance to the nearest center; for
        ``metric="cosine"`` of the cosine distance.
    n_iter_ : int
        Iterations of the start that was kept.
    n_features_in_ : int
        Number of features seen in fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where X had such.

    Notes
    -----
    float32 and float64 rows are used as they are; float16 and 8- or 16-bit integers become float32,
    everything else float64. An empty cluster moves to the distinct row that is farthest from its
    center. k-means++ depends neither on the order of the rows nor on whether they are dense or CSR,
    and integer weights equal repeated rows.

    References
    ----------
    S. P. Lloyd, "Least squares quantization in PCM", IEEE Transactions on Information Theory 28(2),
    1982, equations 5 and 6. D. Arthur and S. Vassilvitskii, "k-means++: the advantages of careful
    seeding", SODA 2007, section 2.2. I. S. Dhillon and D. S. Modha, "Concept decompositions for large
    sparse text data using clustering", Machine Learning 42, 2001 (metric="cosine").

    Examples
    --------
    >>> import numpy as np
    >>> from skivfpq import LloydKMeans
    >>> X = np.array([[0, 0], [0.2, 0.1], [0.1, 0.2], [5, 5], [5.1, 4.9], [4.9, 5.1]])
    >>> kmeans = LloydKMeans(n_clusters=2, init="random", n_init=1, random_state=0).fit(X)
    >>> kmeans.labels_
    array([1, 1, 1, 0, 0, 0], dtype=int32)
    >>> kmeans.cluster_centers_.round(6)
    array([[5. , 5. ],
           [0.1, 0.1]])
    >>> kmeans.predict([[4, 6]])
    array([0], dtype=int32)
    """

    _parameter_constraints = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "init": [StrOptions({"k-means++", "random"}), callable, "array-like"],
        "n_init": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "metric": [StrOptions({"euclidean", "cosine"})],
        "max_samples": [
            None,
            Interval(Integral, 1, None, closed="left"),
            Interval(RealNotInt, 0, 1, closed="right"),
        ],
        **COMMON_CONSTRAINTS,
    }

    def __init__(
        self,
        n_clusters=8,
        *,
        init="k-means++",
        n_init="auto",
        max_iter=300,
        tol=1e-4,
        metric="euclidean",
        max_samples=None,
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.metric = metric
        self.max_samples = max_samples
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @fit_context(prefer_skip_nested_validation=True)
    @all_or_nothing
    def fit(self, X, y=None, sample_weight=None):
        """Find the centers.

        Parameters
        ----------
        X : {array-like, CSR matrix} of shape (n_samples, n_features)
            Rows to cluster.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows, not negative; None is one each.

        Returns
        -------
        self : LloydKMeans
            The fitted estimator.

        Raises
        ------
        ValueError
            X or a parameter is not as described; n_clusters exceeds n_samples.

        Warns
        -----
        ConvergenceWarning
            Fewer rows are distinct than n_clusters.
        """
        X = self._metric_rows(validate_rows(self, X, reset=True, accept_sparse=True))
        weights = check_sample_weight(sample_weight, X)
        self._check_n_clusters(X.shape[0])
        rng = as_generator(self.random_state)

        training, training_weights = self._training_rows(X, weights, rng)
        centers, labels, sq_distances = self._best_start(training, training_weights, rng)
        if training is not X:
            labels, sq_distances = nearest_centers(X, centers, effective_n_jobs(self.n_jobs))

        self.cluster_centers_, self.labels_ = centers, labels
        self.inertia_ = float((weights * self._distances(X, sq_distances)).sum())
        n_distinct = np.count_nonzero(np.bincount(labels))
        if n_distinct < self.n_clusters:
            warnings.warn(
                f"Number of distinct clusters ({n_distinct}) found smaller than n_clusters "
                f"({self.n_clusters}). Possibly due to duplicate points in X.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _check_n_clusters(self, n_samples):
        if n_samples < self.n_clusters:
            raise ValueError(f"n_samples={n_samples} should be >= n_clusters={self.n_clusters}.")

    def _metric_rows(self, X):
        return unit_rows(X).astype(X.dtype) if self.metric == "cosine" else X

    def _distances(self, X, sq_distances):
        """Distances of the metric, to a unit center each, from squared Euclidean ones."""
        if self.metric == "euclidean":
            return sq_distances
        is_zero = is_zero_row(X).reshape(-1, *[1] * (sq_distances.ndim - 1))
        return np.where(is_zero, 1.0, sq_distances / 2)  # a row of zeros is at 1 from everything

    def _training_rows(self, X, weights, rng):
        n_samples = X.shape[0]
        if self.max_samples is None:
            return X, weights
        is_count = isinstance(self.max_samples, Integral)
        size = min(self.max_samples, n_samples) if is_count else max(1, int(self.max_samples * n_samples))
        if size < self.n_clusters:
            raise ValueError(
                f"max_samples={self.max_samples} leaves {size} rows to train on, "
                f"fewer than n_clusters={self.n_clusters}."
            )
        rows = np.sort(rng.choice(n_samples, size, replace=False))
        if not weights[rows].any():
            raise ValueError(f"max_samples={self.max_samples} drew rows of weight zero only.")
        return X[rows], weights[rows]

    def _best_start(self, X, weights, rng):
        """Centers, labels and squared distances of the start with the least inertia; sets n_iter_."""
        step = MemoryStep(X, weights, effective_n_jobs(self.n_jobs), int(self.n_clusters))
        tol = scaled_tolerance(X, weights, self.tol, step.n_threads)
        best_inertia = np.inf
        for _ in range(self._n_starts()):
            step.start()
            first_centers = self._first_centers(step, rng)
            self._report("Initialization complete")
            centers, moments, n_iter = lloyd(
                step,
                first_centers,
                max_iter=int(self.max_iter),
                tol=tol,
                spherical=self.metric == "cosine",
                report=self._report if self.verbose else None,
            )
            inertia = (moments or step(centers)).inertia()
            if inertia < best_inertia * (1 - SAME) or best_inertia == np.inf:
                best_inertia, self.n_iter_ = inertia, n_iter
                best = centers, step.labels.copy(), step.sq_distances().copy()
        return best

    def _n_starts(self):
        if self.n_init == "auto":
            return 10 if isinstance(self.init, str) and self.init == "random" else 1
        if not isinstance(self.init, str) and not callable(self.init) and self.n_init > 1:
            warnings.warn(
                "Explicit initial center position passed: performing only one init in "
                f"{type(self).__name__} instead of n_init={self.n_init}.",
                RuntimeWarning,
                stacklevel=4,
            )
            return 1
        return self.n_init

    def _first_centers(self, step, rng):
        """First centers (n_clusters, n_features) in the dtype of X; fewer if fewer rows are distinct."""
        X, weights = step.X, step.weights
        n_clusters = int(self.n_clusters)
        distinct = too_few_distinct_rows(X, n_clusters, weights)
        if distinct is not None:
            rows = distinct
        elif isinstance(self.init, str) and self.init == "k-means++":
            rows, labels, sq_distances = kmeans_plusplus(
                X, n_clusters, weights, rng, step.n_threads, step.search.pack
            )
            centers = dense_rows(X, rows).astype(X.dtype)
            step.start(centers, labels, sq_distances)
            return centers
        elif isinstance(self.init, str):
            rows = random_rows(X, n_clusters, weights, rng)
        else:
            return self._given_centers(X, rng)
        return dense_rows(X, rows).astype(X.dtype)

    def _given_centers(self, X, rng):
        centers = self.init
        if callable(centers):
            centers = centers(X, self.n_clusters, random_state=np.random.RandomState(draw_seed(rng)))
        centers = check_array(centers, dtype=X.dtype, copy=True, order="C", input_name="init")
        check_size(centers, "init")
        if centers.shape[0] != self.n_clusters:
            raise ValueError(
                f"The shape of the initial centers {centers.shape} does not match the number of "
                f"clusters {self.n_clusters}."
            )
        if centers.shape[1] != X.shape[1]:
            raise ValueError(
                f"The shape of the initial centers {centers.shape} does not match the number of "
                f"features of the data {X.shape[1]}."
            )
        return self._metric_rows(centers)

    def _report(self, message):
        if self.verbose:
            print(message)  # noqa: T201 - verbose means this

    def predict(self, X):
        """Nearest center of each row.

        Parameters
        ----------
        X : {array-like, CSR matrix} of shape (n_samples, n_features)
            Rows.

        Returns
        -------
        labels : ndarray of shape (n_samples,), int32
            Row numbers of ``cluster_centers_``, the lowest on ties.
        """
        return nearest_labels(self._rows(X), self.cluster_centers_, effective_n_jobs(self.n_jobs))

    def _rows(self, X):
        check_is_fitted(self)
        return self._metric_rows(validate_rows(self, X, accept_sparse=True))

    def transform(self, X):
        """Distance of each row to each center.

        Parameters
        ----------
        X : {array-like, CSR matrix} of shape (n_samples, n_features)
            Rows.

        Returns
        -------
        distances : ndarray of shape (n_samples, n_clusters)
            Euclidean (not squared) or cosine distances, in the dtype of the rows.
        """
        X = self._rows(X)
        distances = np.empty((X.shape[0], len(self.cluster_centers_)))
        sq_distance_matrix(X, self.cluster_centers_.astype(np.float64), distances)
        if self.metric == "euclidean":
            return np.sqrt(distances, out=distances).astype(X.dtype, copy=False)
        return self._distances(X, distances).astype(X.dtype, copy=False)

    def score(self, X, y=None, sample_weight=None):
        """Minus the inertia of X: minus the weighted sum of (squared or cosine) distances.

        Parameters
        ----------
        X : {array-like, CSR matrix} of shape (n_samples, n_features)
            Rows.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_samples,), default=None
            Weights of the rows.

        Returns
        -------
        score : float
            Higher is better; it grows with n_clusters.
        """
        X = self._rows(X)
        _, sq_distances = nearest_centers(X, self.cluster_centers_, effective_n_jobs(self.n_jobs))
        weights = check_sample_weight(sample_weight, X)
        return -float((weights * self._distances(X, sq_distances)).sum())

    @property
    def _n_features_out(self):
        return len(self.cluster_centers_)

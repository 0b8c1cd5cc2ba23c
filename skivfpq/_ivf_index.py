"""Nearest neighbours by inverted lists, as a scikit-learn transformer."""

import warnings
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from skivfpq._algorithms.assignment import nearest_labels
from skivfpq._algorithms.blocks import as_float_rows, effective_n_jobs, evenly
from skivfpq._algorithms.groups import Groups, two_level_centers
from skivfpq._algorithms.inverted_lists import InvertedLists
from skivfpq._algorithms.ivf import InvertedFile, without_self
from skivfpq._algorithms.list_codes import Coding
from skivfpq._algorithms.list_planes import FEW_QUERIES
from skivfpq._algorithms.probes import choose_probes, hold_out, true_neighbors
from skivfpq._algorithms.probing import MEASURED, MEASURED_KEYS
from skivfpq._algorithms.search import Metric, nearness
from skivfpq._algorithms.seeding import too_few_distinct_rows
from skivfpq._kmeans import LloydKMeans
from skivfpq._metrics import METRICS, neighbors_recall
from skivfpq._product_quantizer import ProductQuantizer
from skivfpq._sklearn_private import (
    COMMON_CONSTRAINTS,
    HasMethods,
    Interval,
    StrOptions,
    as_configured_sparse,
    fit_context,
)
from skivfpq._validation import (
    LARGEST,
    all_or_nothing,
    as_generator,
    check_integer,
    check_number,
    check_row_numbers,
    draw_seed,
    validate_rows,
)

ROWS_PER_LIST = 16  # least mean length of a list for n_lists="auto"
TRAINING_ROWS_PER_LIST = 128  # for the default coarse quantizer; all rows scan a few percent less
TRAINING_ITERATIONS = 10
FINAL_ITERATIONS = 2  # over all lists, after they were trained by two levels
MOST_TRUE_NEIGHBORS = 1_000_000  # of all rows that recall is measured with, for large n_neighbors


def _has_vectors(index):
    if index.fine_quantizer is None or index.refine_factor is not None:
        return True
    raise AttributeError(
        "score compares with exact search, which needs the vectors: they are kept without a fine_quantizer "
        "or with refine_factor set (1 keeps them and re-ranks without extra candidates)."
    )


@dataclass(frozen=True)
class TwoLevels:
    """As ``init`` of LloydKMeans: clusters of groups of the rows."""

    n_groups: int
    n_jobs: int | None

    def __call__(self, X, n_clusters, random_state):
        """Centers (n_clusters, n_features)."""
        rng, n_threads = as_generator(random_state), effective_n_jobs(self.n_jobs)
        return two_level_centers(X, n_clusters, self.n_groups, rng, n_threads)


class IVFIndex(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Nearest neighbours by inverted lists: IVF-Flat over vectors, IVF-PQ over codes.

    k-means files each row in the list of its nearest center. A search scans the few lists whose
    centers are nearest to the query, exactly: what the user trades is the number of lists probed
    (``n_probes``) and, with a ``fine_quantizer``, the bytes per vector. As a transformer it gives the
    sparse graph of ``sklearn.neighbors.KNeighborsTransformer``.

    Parameters
    ----------
    n_lists : int or "auto", default="auto"
        Number of inverted lists. "auto" is about ``4 * sqrt(n_samples)``, fewer where lists would
        hold less than 16 rows.
    n_probes : int or "auto", default="auto"
        Lists scanned for a query, the nearest. "auto" is the fewest that reach ``target_recall``,
        measured in fit by leaving out one by one a sample of the rows.
    n_neighbors : int, default=5
        Neighbours by default, in the graph, in the score and for ``target_recall``.
    target_recall : float, default=0.95
        Recall@n_neighbors against exact search that "auto" is to reach.
    probing : {"fixed", "adaptive"}, default="fixed"
        With "adaptive", ``n_probes`` is the number of lists that queries like the rows probe on average:
        one that is close to a center probes fewer, one between many centers up to twice as many. The
        same recall takes a fifth to a half fewer rows, by distances.
    metric : {"euclidean", "sqeuclidean", "cosine", "inner_product"}, default="euclidean"
        "cosine" is one minus the cosine; "inner_product" gives minus the product as the distance.
    coarse_quantizer : clusterer or None, default=None
        Any estimator with ``n_clusters``, ``fit`` and ``cluster_centers_``; a clone is fitted with its
        ``n_clusters`` overwritten by the number of lists. None is :class:`LloydKMeans` with one random
        start and 10 iterations on up to 128 rows for each list.
    n_groups : int, "auto" or None, default=None
        Two levels of lists, worth it from some thousand of them on: lists are clustered in so many groups
        ("auto" is ``2 * sqrt(n_lists)``), and a query looks for the lists that it probes in the nearest
        groups alone, which hold 99 % of them on average. The default coarse quantizer is trained by two
        levels too, in less time. None looks at all lists, also where it is set after fit.
    fine_quantizer : ProductQuantizer or None, default=None
        None keeps the vectors (IVF-Flat). A :class:`ProductQuantizer` keeps its codes (IVF-PQ); a
        clone is fitted.
    by_residual : bool, default=True
        Whether codes are those of the rows minus their list's center.
    refine_factor : float or None, default=None
        With a fine_quantizer: keep the vectors too, and re-rank the best ``refine_factor *
        n_neighbors`` candidates by their exact distances.
    vectors_dtype : {"float32", "float16"} or None, default=None
        How vectors are kept. None is the input's dtype, 8-bit integers and float16 included.
    mode : {"distance", "connectivity"}, default="distance"
        Of the graph that ``transform`` gives, as in scikit-learn.
    n_jobs : int or None, default=None
        Threads. None is every core that the process may use. Results do not depend on it.
    random_state : int, RandomState, Generator or None, default=None
        Source of the random draws.
    verbose : int, default=0
        Whether the steps of fit are reported.

    Attributes
    ----------
    coarse_quantizer_ : clusterer
        The fitted clone; ``cluster_centers_`` are the lists' centers.
    fine_quantizer_ : ProductQuantizer or None
        The fitted clone.
    n_lists_ : int
        Number of lists.
    n_groups_ : int or None
        Number of groups of lists, where they are grouped.
    n_probes_ : int
        Lists probed (on average, where adaptive) as of fit or ``tune``; a number set later by
        ``set_params(n_probes=...)`` wins.
    recall_ : float or None
        Recall that was measured for ``n_probes_`` when it was chosen by "auto" or ``tune``.
    labels_ : ndarray of shape (n_samples_fit_,), int32
        List of each row, -1 for removed ones.
    list_sizes_ : ndarray of shape (n_lists_,)
        Rows in each list.
    n_samples_fit_ : int
        Rows ever added; the width of the graph.
    bytes_per_vector_ : float
        Bytes kept for each row: vectors and their int8 points (a byte a feature and 4, more where lists do
        not fill blocks of 16, or features what the processor multiplies, and where there are heads, see the
        guide), or codes and their terms, and two row numbers.
    n_features_in_ : int
        Number of features seen in fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where X had such.

    Notes
    -----
    Distances come from differences in float64, so that one query and a batch agree. Row numbers are
    stable: ``partial_fit`` numbers on, ``remove`` leaves gaps.

    References
    ----------
    H. Jegou, M. Douze and C. Schmid, "Product quantization for nearest neighbor search", IEEE TPAMI
    33(1), 2011, section 4 (inverted file with asymmetric distance computation). H. Jegou, R. Tavenard,
    M. Douze and L. Amsaleg, "Searching in one billion vectors: re-rank with source coding", ICASSP
    2011 (refine_factor).

    Examples
    --------
    >>> import numpy as np
    >>> from skivfpq import IVFIndex
    >>> X = np.arange(200.0).reshape(100, 2)
    >>> index = IVFIndex(n_lists=4, n_neighbors=2, random_state=0).fit(X)
    >>> distances, indices = index.kneighbors([[11.0, 12.0]])
    >>> indices
    array([[5, 6]])
    >>> distances.round(3)
    array([[1.414, 1.414]])
    >>> index.transform(X).shape
    (100, 100)
    """

    _parameter_constraints = {
        "n_lists": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "n_probes": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "probing": [StrOptions({"fixed", "adaptive"})],
        "target_recall": [Interval(Real, 0, 1, closed="right")],
        "metric": [StrOptions(set(METRICS))],
        "coarse_quantizer": [None, HasMethods(["fit", "get_params", "set_params"])],
        "n_groups": [None, StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "fine_quantizer": [None, ProductQuantizer],
        "by_residual": ["boolean"],
        "refine_factor": [None, Interval(Real, 1, None, closed="left")],
        "vectors_dtype": [None, StrOptions({"float32", "float16"})],
        "mode": [StrOptions({"distance", "connectivity"})],
        **COMMON_CONSTRAINTS,
    }

    def __init__(
        self,
        n_lists="auto",
        n_probes="auto",
        *,
        n_neighbors=5,
        target_recall=0.95,
        probing="fixed",
        metric="euclidean",
        coarse_quantizer=None,
        n_groups=None,
        fine_quantizer=None,
        by_residual=True,
        refine_factor=None,
        vectors_dtype=None,
        mode="distance",
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.n_lists = n_lists
        self.n_probes = n_probes
        self.n_neighbors = n_neighbors
        self.target_recall = target_recall
        self.probing = probing
        self.metric = metric
        self.coarse_quantizer = coarse_quantizer
        self.n_groups = n_groups
        self.fine_quantizer = fine_quantizer
        self.by_residual = by_residual
        self.refine_factor = refine_factor
        self.vectors_dtype = vectors_dtype
        self.mode = mode
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64"]  # distances are float64
        return tags

    # ---------------------------------------------------------------------------------- building

    @fit_context(prefer_skip_nested_validation=False)
    @all_or_nothing
    def fit(self, X, y=None):
        """Train the quantizers on X, file its rows, choose the number of probes.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows to index.
        y : None
            Ignored.

        Returns
        -------
        self : IVFIndex
            The fitted estimator.

        Raises
        ------
        ValueError
            X or a parameter is not as described; n_lists exceeds n_samples.

        Warns
        -----
        UserWarning
            The codes cannot reach ``target_recall``.
        """
        X = validate_rows(self, X, reset=True, keep_small=True)
        rng = as_generator(self.random_state)
        metric = Metric(self.metric)
        n_lists = self._resolve_n_lists(len(X))
        held_out, training = self._split(len(X), n_lists, rng)  # row numbers

        coarse_quantizer, labels = self._fit_coarse(metric, X, training, n_lists, rng)
        centers = np.ascontiguousarray(coarse_quantizer.cluster_centers_, dtype=np.float64)
        fine_quantizer = self._fit_fine(metric, X, training, centers, labels, rng)
        groups = self._group(metric, X, training, centers, rng)
        file = self._empty_file(metric, centers, fine_quantizer, X.dtype, groups)
        file = self._append(file, X, labels)
        if self.probing == "adaptive":
            some = X[_to_measure(held_out, len(centers))]
            file = file.adaptive(file.metric.queries(some), effective_n_jobs(self.n_jobs))
        n_probes, recall = self._choose_probes(file, X, held_out)

        self.coarse_quantizer_, self.fine_quantizer_ = coarse_quantizer, fine_quantizer
        self.n_probes_, self.recall_, self._n_probes_param = n_probes, recall, self.n_probes
        self._file = file
        return self

    def _split(self, n_samples, n_lists, rng):
        """Row numbers to measure with (None where nothing is measured), and those to train on."""
        everything = np.arange(n_samples)
        if self.n_probes != "auto" and self.probing == "fixed":
            return None, everything
        numbers, left_out = hold_out(n_samples, n_lists, rng)
        return numbers, np.setdiff1d(everything, numbers, assume_unique=True) if left_out else everything

    def _resolve_n_lists(self, n_samples):
        if self.n_lists == "auto":
            return max(1, min(int(4 * np.sqrt(n_samples)), n_samples // ROWS_PER_LIST))
        if self.n_lists > n_samples:
            raise ValueError(f"n_lists={self.n_lists} must be at most n_samples={n_samples}.")
        return int(self.n_lists)

    def _fit_coarse(self, metric, X, training, n_lists, rng):
        """The coarse quantizer, fitted: the default one on some of the rows, a given one on all; and labels.

        labels : (n_samples,) int32, the lists that are known from training, -1 for other rows; or None
        """
        seed = draw_seed(rng)
        size = TRAINING_ROWS_PER_LIST * n_lists if self.coarse_quantizer is None else len(training)
        numbers = _sample(training, size, rng)
        rows = _metric_rows(metric, X, numbers)
        distinct = too_few_distinct_rows(rows, n_lists, np.ones(len(rows)))
        n_lists = n_lists if distinct is None else len(distinct)
        quantizer = self._coarse_quantizer(n_lists, seed).fit(rows)
        if not hasattr(quantizer, "cluster_centers_"):
            raise ValueError(
                f"coarse_quantizer must have cluster_centers_ once fitted, which {quantizer!r} has not: use "
                "LloydKMeans, KMeans or MiniBatchKMeans."
            )
        self._report(f"{len(quantizer.cluster_centers_)} lists trained on {len(rows)} rows.")
        if self.coarse_quantizer is not None or metric.is_cosine:  # labels of other rows than will be filed
            return quantizer, None
        labels = np.full(len(X), -1, dtype=np.int32)
        labels[numbers] = quantizer.labels_
        return quantizer, labels

    def _coarse_quantizer(self, n_lists, seed):
        """The unfitted coarse quantizer."""
        if self.coarse_quantizer is None:
            n_groups = self._resolve_n_groups(n_lists)
            how = {"init": "random", "max_iter": TRAINING_ITERATIONS}
            if n_groups > 1:
                how = {"init": TwoLevels(n_groups, self.n_jobs), "max_iter": FINAL_ITERATIONS}
            quantizer = LloydKMeans(**how, n_init=1, n_jobs=self.n_jobs)
        else:
            quantizer = clone(self.coarse_quantizer)
        params = quantizer.get_params()
        if "n_clusters" not in params:
            raise ValueError(
                "coarse_quantizer must be a clusterer with the parameter n_clusters, such as LloydKMeans, "
                f"got {quantizer!r}."
            )
        if params.get("random_state", seed) is None:
            quantizer.set_params(random_state=seed)
        return quantizer.set_params(n_clusters=n_lists)

    def _fit_fine(self, metric, X, training, centers, labels, rng):
        """The fitted fine quantizer, of the rows or of what their centers leave of them; or None.

        labels : of ``_fit_coarse``
        """
        if self.fine_quantizer is None:
            return None
        quantizer = clone(self.fine_quantizer)
        if quantizer.random_state is None:
            quantizer.set_params(random_state=draw_seed(rng))
        is_share = isinstance(quantizer.max_samples, float)  # which the quantizer takes by itself
        size = len(training) if is_share else quantizer._training_size(len(training))
        numbers = _sample(training, size, rng)
        rows = _metric_rows(metric, X, numbers)
        if self.by_residual:
            own = None if labels is None else labels[numbers]
            if own is None or own.min() < 0:
                own = nearest_labels(rows, centers, effective_n_jobs(self.n_jobs))
            rows = (rows - centers[own]).astype(rows.dtype)
        quantizer.fit(rows)
        self._report(f"{quantizer.n_subspaces_} codebooks trained on {len(rows)} rows.")
        return quantizer

    def _resolve_n_groups(self, n_lists):
        """Number of groups of the lists, 1 for none."""
        n_groups = {None: 1, "auto": int(2 * np.sqrt(n_lists))}.get(self.n_groups, self.n_groups)
        return min(int(n_groups), n_lists)

    def _group(self, metric, X, training, centers, rng):
        """Groups of the lists, measured by some of the rows, or None."""
        n_groups = self._resolve_n_groups(len(centers))
        if n_groups == 1:
            return None
        queries = metric.rows(as_float_rows(X[_to_measure(training, len(centers))]))
        groups = Groups.of(nearness(metric), centers, n_groups, queries, rng, effective_n_jobs(self.n_jobs))
        self._report(f"{len(groups.centers)} groups of lists.")
        return groups

    def _empty_file(self, metric, centers, fine_quantizer, dtype, groups):
        keeps_vectors = fine_quantizer is None or self.refine_factor is not None
        coding = None
        if fine_quantizer is not None:
            coding = Coding.of(metric, centers, fine_quantizer._codebooks, self.by_residual)
        return InvertedFile(
            metric,
            centers,
            coding,
            vectors_dtype=np.dtype(self.vectors_dtype or dtype) if keeps_vectors else None,
            lists=InvertedLists.empty(len(centers)),
            groups=groups,
        )

    def _append(self, file, X, labels=None):
        """The file with new rows, in the dtype in which it keeps vectors; labels: their lists, if known."""
        self._report(f"Filing {len(X)} rows.")
        n_threads = effective_n_jobs(self.n_jobs)
        vectors = _as_kept(X, file.vectors_dtype)
        if labels is not None and vectors is not X and not np.array_equal(vectors, X):
            labels = None  # of rows that are rounded
        file = file.append(vectors, n_threads, labels)
        file.planes(n_threads)
        return file

    def _choose_probes(self, file, X, held_out):
        """Number of probes, and the recall that was measured for it."""
        n_lists, k = len(file.centers), min(int(self.n_neighbors), len(X) - 1)
        if self.n_probes != "auto":
            return min(int(self.n_probes), n_lists), None
        if k == 0 or n_lists == 1:
            return n_lists, None
        held_out = held_out[: max(10, MOST_TRUE_NEIGHBORS // k)]
        true = true_neighbors(file.metric, X, held_out, k, effective_n_jobs(self.n_jobs))
        return self._measure_probes(
            file, file.metric.queries(X[held_out]), true, self.target_recall, held_out
        )

    def _measure_probes(self, file, queries, true, target, own=None):
        n_threads = effective_n_jobs(self.n_jobs)
        n_probes, recall = choose_probes(
            file, self._probing(file), queries, true, target, self._refine_factor(file), own, n_threads
        )
        self._report(f"{n_probes} probes reach a recall of {recall:.4f}.")
        if file.codebooks is not None and recall < target:
            if file.keeps_vectors:
                remedy = f"Raise refine_factor (now {self.refine_factor})"
            else:
                remedy = "Set refine_factor to re-rank by exact distances"
            warnings.warn(
                f"The codes reach a recall of {recall:.3f}, below target_recall={target}, however many lists "
                f"are probed. {remedy}, or keep longer codes (n_subspaces, n_bits of fine_quantizer).",
                UserWarning,
                stacklevel=4,
            )
        return n_probes, recall

    def partial_fit(self, X, y=None):
        """Add rows without training anew; the first call is ``fit``.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows to add; they are numbered on from ``n_samples_fit_``.
        y : None
            Ignored.

        Returns
        -------
        self : IVFIndex
            The index.

        Raises
        ------
        ValueError
            X is not as described, or does not fit the dtype in which vectors are kept.
        """
        if not hasattr(self, "_file"):
            return self.fit(X)
        self._file = self._append(self._file, validate_rows(self, X, keep_small=True))
        return self

    def remove(self, indices):
        """Remove rows; the others keep their numbers, and the graph its width.

        Parameters
        ----------
        indices : array-like of int, or boolean mask of shape (n_samples_fit_,)
            Row numbers.

        Returns
        -------
        self : IVFIndex
            The index.

        Raises
        ------
        ValueError
            A number is out of range, or its row was removed before.
        """
        check_is_fitted(self)
        self._file = self._file.remove(_check_live("indices", indices, self._file.lists))
        return self

    def reconstruct(self, indices):
        """The rows as the index keeps them: vectors, or decoded codes.

        Parameters
        ----------
        indices : array-like of int, or boolean mask of shape (n_samples_fit_,)
            Row numbers.

        Returns
        -------
        rows : ndarray of shape (n_indices, n_features)
            Decoded rows are of length one for ``metric="cosine"``.

        Raises
        ------
        ValueError
            A number is out of range, or its row was removed.
        """
        check_is_fitted(self)
        file = self._file  # one, since another thread may change the index
        return file.kept_rows(file.lists.positions[_check_live("indices", indices, file.lists)])

    # --------------------------------------------------------------------------------- searching

    def kneighbors(
        self,
        X=None,
        n_neighbors=None,
        return_distance=True,
        *,
        n_probes=None,
        refine_factor=None,
        subset=None,
    ):
        """The nearest rows of each query, nearest first, the lowest row number first on ties.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features), default=None
            Queries. None: the rows of the index, in order of their numbers, each without itself.
        n_neighbors : int, default=None
            Neighbours of each query; always as many are returned, further lists are probed until they
            are found. None is the parameter ``n_neighbors``.
        return_distance : bool, default=True
            Whether distances are returned too.
        n_probes : int, default=None
            Lists to probe, on average with ``probing="adaptive"``; None is the parameter, or
            ``n_probes_`` where that is "auto".
        refine_factor : float, default=None
            Candidates to re-rank, as a multiple of n_neighbors; None is the parameter.
        subset : array-like of int or boolean mask of shape (n_samples_fit_,), default=None
            Rows that may be returned.

        Returns
        -------
        distances : ndarray of shape (n_queries, n_neighbors), float64
            Only with return_distance.
        indices : ndarray of shape (n_queries, n_neighbors), int64
            Row numbers.

        Raises
        ------
        ValueError
            The index, or the subset, holds fewer rows than n_neighbors; an argument is not as
            described.
        """
        file = self._fitted_file()
        if X is not None and subset is None and refine_factor is None and self.refine_factor is None:
            found = self._kneighbors_of_few(file, X, n_neighbors, n_probes)
            if found is not None:
                return found if return_distance else found[1]
        numbers, queries = self._queries(file, X)
        distances, indices = self._kneighbors(
            file,
            queries,
            n_neighbors,
            numbers=numbers,
            n_probes=n_probes,
            refine_factor=refine_factor,
            subset=subset,
        )
        return (distances, indices) if return_distance else indices

    def _kneighbors_of_few(self, file, X, n_neighbors, n_probes):
        """Neighbours of plain rows that need no further look, as the search itself takes less; else None."""
        if "feature_names_in_" in vars(self):
            return None
        k = check_integer("n_neighbors", self.n_neighbors if n_neighbors is None else n_neighbors, 1)
        return file.search_few(X, k, self._probes(file, n_probes), LARGEST)

    def _kneighbors(
        self, file, queries, n_neighbors=None, *, numbers=None, n_probes=None, refine_factor=None, subset=None
    ):
        """Neighbours of metric rows, without themselves where their numbers are given."""
        k = check_integer("n_neighbors", self.n_neighbors if n_neighbors is None else n_neighbors, 1)
        factor = self._refine_factor(file, refine_factor)
        allowed = _allowed(file.lists, subset)
        _check_enough(k, file.lists, allowed, len(queries), own=numbers is not None)
        n_threads = 1 if len(queries) < FEW_QUERIES else effective_n_jobs(self.n_jobs)
        settings = self._probes(file, n_probes), factor, allowed, n_threads
        if numbers is not None:
            keys, indices = without_self(*file.search(queries, k + 1, *settings), numbers)
        else:
            keys, indices = file.search(queries, k, *settings)
        return file.metric.distances(keys), indices

    def _queries(self, file, X):
        """Queries as the metric sees them; the live rows with their numbers where X is None."""
        if X is not None:
            return None, file.metric.queries(validate_rows(self, X))
        numbers = np.flatnonzero(file.lists.positions >= 0)
        return numbers, file.metric.queries(file.kept_rows(file.lists.positions[numbers]))

    def _probes(self, file, n_probes):
        if n_probes is None:  # what was measured, unless the parameter was changed since
            given = (
                self.n_probes
                if isinstance(self.n_probes, str)
                else check_integer("n_probes", self.n_probes, 1)
            )
            n_probes = self.n_probes_ if given in ("auto", self._n_probes_param) else given
        return self._probing(file).probes(check_integer("n_probes", n_probes, 1))

    def _probing(self, file):
        is_fixed = self.probing == "fixed"
        if not is_fixed and file.reaches is None:
            raise ValueError(
                f"probing={self.probing!r} must be set before fit, which measures how far queries reach: fit "
                "again, or set probing='fixed'."
            )
        return file.probing(is_fixed, self.n_groups is not None)

    def _refine_factor(self, file, refine_factor=None):
        factor = self.refine_factor if refine_factor is None else refine_factor
        if factor is None:
            return None
        factor = check_number("refine_factor", factor, low=1)
        if file.codebooks is None:
            return None
        if not file.keeps_vectors:
            raise ValueError(
                f"refine_factor={factor} re-ranks by vectors, but this index keeps codes only: "
                "set refine_factor before fit."
            )
        return factor

    def radius_neighbors(self, X=None, radius=1.0, return_distance=True, *, sort_results=False, subset=None):
        """All rows within a distance of each query, nearest first.

        Exact: lists are left out only if the triangle inequality shows that no row of theirs can be
        within the radius. With a fine_quantizer distances are those to the decoded rows.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features), default=None
            Queries. None: the rows of the index, in order of their numbers, each without itself.
        radius : float, default=1.0
            Largest distance, in the units of the metric.
        return_distance : bool, default=True
            Whether distances are returned too.
        sort_results : bool, default=False
            Accepted as in scikit-learn; results are always sorted.
        subset : array-like of int or boolean mask of shape (n_samples_fit_,), default=None
            Rows that may be returned.

        Returns
        -------
        distances : ndarray of shape (n_queries,) of float64 arrays
            Only with return_distance.
        indices : ndarray of shape (n_queries,) of int64 arrays
            Row numbers.

        Raises
        ------
        ValueError
            An argument is not as described.
        """
        check_is_fitted(self)
        file = self._file
        distances, indices = self._radius_neighbors(file, *self._queries(file, X), radius, subset)
        return (distances, indices) if return_distance else indices

    def _radius_neighbors(self, file, numbers, queries, radius, subset=None):
        radius = check_number("radius", radius)
        distances, indices = np.empty(len(queries), dtype=object), np.empty(len(queries), dtype=object)
        n_threads = effective_n_jobs(self.n_jobs)
        found = file.search_radius(queries, radius, _allowed(file.lists, subset), n_threads)
        for i, (near, ids) in enumerate(found):
            others = slice(None) if numbers is None else ids != numbers[i]
            distances[i], indices[i] = near[others], ids[others]
        return distances, indices

    # ------------------------------------------------------------------------------------ graphs

    def kneighbors_graph(self, X=None, n_neighbors=None, mode="connectivity"):
        """Sparse graph of the nearest rows.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features), default=None
            Queries. None: the rows of the index, each without itself; removed rows are empty.
        n_neighbors : int, default=None
            Neighbours of each query; None is the parameter.
        mode : {"connectivity", "distance"}, default="connectivity"
            Ones, or distances, zeros kept as entries.

        Returns
        -------
        graph : CSR of shape (n_queries, n_samples_fit_)
            The entries of a row are sorted by distance.

        Raises
        ------
        ValueError
            As ``kneighbors``; mode="distance" with the inner product, whose distances are negative.
        """
        check_is_fitted(self)
        file = self._file
        _check_mode(file, mode)
        numbers, queries = self._queries(file, X)
        return _graph(file, numbers, *self._kneighbors(file, queries, n_neighbors, numbers=numbers), mode)

    def radius_neighbors_graph(self, X=None, radius=1.0, mode="connectivity", sort_results=False):
        """Sparse graph of the rows within a distance.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features), default=None
            Queries. None: the rows of the index, each without itself; removed rows are empty.
        radius : float, default=1.0
            Largest distance, in the units of the metric.
        mode : {"connectivity", "distance"}, default="connectivity"
            Ones, or distances, zeros kept as entries.
        sort_results : bool, default=False
            Accepted as in scikit-learn; the entries of a row are always sorted by distance.

        Returns
        -------
        graph : CSR of shape (n_queries, n_samples_fit_)
            The entries of a row are sorted by distance.

        Raises
        ------
        ValueError
            As ``radius_neighbors``; mode="distance" with the inner product.
        """
        check_is_fitted(self)
        file = self._file
        _check_mode(file, mode)
        numbers, queries = self._queries(file, X)
        return _graph(file, numbers, *self._radius_neighbors(file, numbers, queries, radius), mode)

    def transform(self, X):
        """Sparse graph of the nearest rows, as ``sklearn.neighbors.KNeighborsTransformer`` gives it.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Queries.

        Returns
        -------
        graph : CSR of shape (n_samples, n_samples_fit_)
            ``n_neighbors`` entries a row, and one more for ``mode="distance"``, since consumers count
            a training row among its own neighbours. Sorted by distance, zeros kept as entries.

        Raises
        ------
        ValueError
            As ``kneighbors_graph``.
        """
        check_is_fitted(self)
        file, k = self._file, check_integer("n_neighbors", self.n_neighbors, 1)
        _check_mode(file, self.mode)
        queries = file.metric.queries(validate_rows(self, X))
        neighbors = self._kneighbors(file, queries, k + (self.mode == "distance"))
        return _graph(file, None, *neighbors, self.mode)

    def predict(self, X):
        """The list that each row falls in.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows.

        Returns
        -------
        labels : ndarray of shape (n_samples,), int32
            Numbers of lists.
        """
        check_is_fitted(self)
        file = self._file
        return file.nearest_list(file.metric.rows(validate_rows(self, X)), effective_n_jobs(self.n_jobs))

    # ------------------------------------------------------------------------------------ recall

    @available_if(_has_vectors)
    def score(self, X, y=None):
        """Recall@n_neighbors of ``kneighbors(X)`` against exact search of the vectors kept.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Queries.
        y : None
            Ignored.

        Returns
        -------
        recall : float
            From 0 to 1.

        Raises
        ------
        AttributeError
            The index keeps no vectors: a fine_quantizer without refine_factor.
        """
        check_is_fitted(self)
        file = self._file
        if not file.keeps_vectors:
            raise ValueError("score needs the vectors, but refine_factor was not set before fit.")
        queries = file.metric.queries(validate_rows(self, X))
        _, found = self._kneighbors(file, queries)
        return neighbors_recall(
            file.exact(queries, int(self.n_neighbors), effective_n_jobs(self.n_jobs)), found
        )

    def tune(self, X, target_recall=None, n_neighbors=None):
        """Choose the fewest probes that reach a recall on queries of yours; nothing is rebuilt.

        Recall is measured against exact search of the vectors; where only codes are kept, against
        probing every list.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Queries like those to come, some hundreds or more.
        target_recall : float, default=None
            Recall to reach; None is the parameter.
        n_neighbors : int, default=None
            Neighbours that recall counts; None is the parameter.

        Returns
        -------
        self : IVFIndex
            With new ``n_probes_`` and ``recall_``.

        Raises
        ------
        ValueError
            An argument is not as described.

        Warns
        -----
        UserWarning
            The codes cannot reach that recall.
        """
        check_is_fitted(self)
        target = check_number(
            "target_recall", self.target_recall if target_recall is None else target_recall, above=0, high=1
        )
        k = check_integer("n_neighbors", self.n_neighbors if n_neighbors is None else n_neighbors, 1)
        file = self._file
        queries = file.metric.queries(validate_rows(self, X))
        _check_enough(k, file.lists, None, len(queries))
        true = file.exact(queries, k, effective_n_jobs(self.n_jobs))
        self.n_probes_, self.recall_ = self._measure_probes(file, queries, true, target)
        self._n_probes_param = self.n_probes
        return self

    # ------------------------------------------------------------------------------- what is fitted

    def _fitted_file(self):
        if "_file" not in vars(self):
            check_is_fitted(self)  # which raises; asked last, since it takes as long as a search
        return self._file

    def __sklearn_is_fitted__(self):
        return hasattr(self, "_file")

    @property
    def _lists(self):
        check_is_fitted(self)
        return self._file.lists

    @property
    def n_lists_(self):
        """Number of lists."""
        return len(self._lists.radii)

    @property
    def n_groups_(self):
        """Number of groups of lists, or None."""
        check_is_fitted(self)
        groups = self._file.groups
        return None if groups is None else len(groups.centers)

    @property
    def n_samples_fit_(self):
        """Rows ever added."""
        return len(self._lists.positions)

    @property
    def _n_features_out(self):
        return self.n_samples_fit_

    @property
    def labels_(self):
        """List of each row, -1 for removed ones, (n_samples_fit_,) int32."""
        return self._lists.labels

    @property
    def list_sizes_(self):
        """Rows in each list, (n_lists_,)."""
        return self._lists.sizes.copy()

    @property
    def bytes_per_vector_(self):
        """Bytes kept for each row."""
        check_is_fitted(self)
        file = self._file
        return file.nbytes / max(1, file.lists.n_rows)

    def _report(self, message):
        if self.verbose:
            print(message)  # noqa: T201 - verbose means this


def _check_mode(file, mode):
    if not isinstance(mode, str) or mode not in ("connectivity", "distance"):
        raise ValueError(f"mode must be 'connectivity' or 'distance', got {mode!r}.")
    if mode == "distance" and file.metric.is_product:
        raise ValueError(
            "mode='distance' needs distances that are not negative, which metric='inner_product' does "
            "not give: use metric='cosine', or mode='connectivity'."
        )


def _graph(file, numbers, distances, indices, mode):
    """CSR of the neighbours found; square for the index's own rows of these numbers, removed ones empty."""
    lengths = np.array([len(row) for row in indices], dtype=np.int64)
    if numbers is not None:
        lengths, own_lengths = np.zeros(len(file.lists.positions), dtype=np.int64), lengths
        lengths[numbers] = own_lengths
    columns = np.concatenate([np.empty(0, np.int64), *indices])
    values = np.concatenate([np.empty(0), *distances]) if mode == "distance" else np.ones(len(columns))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    shape = (len(lengths), len(file.lists.positions))
    return as_configured_sparse(sparse.csr_array((values, columns, offsets), shape=shape))


def _sample(numbers, size, rng):
    """Up to size of the numbers, in order."""
    return numbers if size >= len(numbers) else np.sort(rng.choice(numbers, size, replace=False))


def _to_measure(numbers, n_lists):
    """Those whose distances to all lists are measured."""
    return numbers[evenly(len(numbers), min(MEASURED, max(1, MEASURED_KEYS // n_lists)))]


def _metric_rows(metric, X, numbers):
    """The rows of these numbers, float32 or float64, as the metric sees them."""
    rows = as_float_rows(X[numbers] if len(numbers) < len(X) else X)
    return metric.rows(rows).astype(rows.dtype) if metric.is_cosine else rows


def _as_kept(X, dtype):
    """Rows in the dtype in which they are kept (None for codes only), if they fit it."""
    if dtype is None or X.dtype == dtype:
        return X
    with np.errstate(over="ignore", invalid="ignore"):
        kept = X.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(kept, X):
        raise ValueError(
            f"X must hold integers in the range of {dtype}, which this index keeps; got dtype {X.dtype} "
            f"with values from {X.min()} to {X.max()}. Fit on float rows to add such."
        )
    if not np.isfinite(kept).all():
        raise ValueError(f"X must hold values in the range of {dtype}, got up to {np.abs(X).max():g}.")
    return kept


def _check_live(name, indices, lists):
    """Row numbers (n,) of rows that the index holds."""
    numbers = check_row_numbers(name, indices, len(lists.positions))
    removed = numbers[lists.positions[numbers] < 0]
    if removed.size:
        raise ValueError(f"{name} must name rows of the index, but row {removed[0]} was removed.")
    return numbers


def _allowed(lists, subset):
    """Mask over positions of the rows that may be returned, or None for all."""
    if subset is None:
        return None
    positions = lists.positions[check_row_numbers("subset", subset, len(lists.positions))]
    allowed = np.zeros(len(lists.ids), dtype=bool)
    allowed[positions[positions >= 0]] = True
    return allowed


def _check_enough(n_neighbors, lists, allowed, n_queries, own=False):
    n_rows = lists.n_rows if allowed is None else np.count_nonzero(allowed)
    if n_neighbors > n_rows - own:
        raise ValueError(
            f"Expected n_neighbors <= n_samples_fit, but n_neighbors = {n_neighbors}, n_samples_fit = "
            f"{len(lists.positions)}, n_samples = {n_queries}; there are {n_rows} live rows"
            f"{' in subset' if allowed is not None else ''}"
            f"{', and no row is its own neighbour' if own else ''}."
        )

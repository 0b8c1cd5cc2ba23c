"""Nearest neighbours by inverted lists, as a scikit-learn transformer."""

import warnings
from numbers import Integral, Real

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin, clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from skivfpq._algorithms import codebooks as pq
from skivfpq._algorithms.blocks import as_float_rows, effective_n_jobs, nearest_centers
from skivfpq._algorithms.inverted_lists import InvertedLists
from skivfpq._algorithms.search import (
    CodeScan,
    Metric,
    Pool,
    lowest_keys,
    nearest_lists,
    nearest_rows,
    pair_keys,
    probe,
    scan_vectors,
    search_lists,
)
from skivfpq._kernels import row_blocks
from skivfpq._kmeans import LloydKMeans
from skivfpq._metrics import METRICS, neighbors_recall
from skivfpq._product_quantizer import ProductQuantizer
from skivfpq._sklearn_private import HasMethods, Interval, StrOptions, as_configured_sparse, fit_context
from skivfpq._validation import as_generator, check_integer, check_row_numbers, draw_seed, validate_rows

ROWS_PER_LIST = 16  # least mean length of a list for n_lists="auto"
TRAINING_ROWS_PER_LIST = 128  # for the default coarse quantizer; all rows scan a few percent less
TRAINING_ITERATIONS = 10
CALIBRATION_QUERIES = 1000  # rows on which n_probes="auto" is measured: recall@10 to about 0.005


def _has_vectors(index):
    if index.fine_quantizer is None or index.refine_factor is not None:
        return True
    raise AttributeError(
        "score compares with exact search, which needs the vectors: they are kept without a fine_quantizer "
        "or with refine_factor set (1 keeps them and re-ranks without extra candidates)."
    )


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
        Lists scanned for a query. "auto" is the fewest that reach ``target_recall``, measured in fit
        by leaving out one by one a sample of the rows.
    n_neighbors : int, default=5
        Neighbours by default, in the graph, in the score and for ``target_recall``.
    target_recall : float, default=0.95
        Recall@n_neighbors against exact search that "auto" is to reach.
    metric : {"euclidean", "sqeuclidean", "cosine", "inner_product"}, default="euclidean"
        "cosine" is one minus the cosine; "inner_product" gives minus the product as the distance.
    coarse_quantizer : clusterer or None, default=None
        Any estimator with ``n_clusters``, ``fit`` and ``cluster_centers_``; a clone is fitted with its
        ``n_clusters`` overwritten by the number of lists. None is :class:`LloydKMeans` with one random
        start and 10 iterations on up to 128 rows for each list.
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
    n_probes_ : int
        Lists probed as of fit or ``tune``; a number set later by ``set_params(n_probes=...)`` wins.
    recall_ : float or None
        Recall that was measured for ``n_probes_`` when it was chosen by "auto" or ``tune``.
    labels_ : ndarray of shape (n_samples_fit_,), int32
        List of each row, -1 for removed ones.
    list_sizes_ : ndarray of shape (n_lists_,)
        Rows in each list.
    n_samples_fit_ : int
        Rows ever added; the width of the graph.
    bytes_per_vector_ : float
        Bytes kept for each row: vectors or codes, their norms or terms, and two row numbers.
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
        "target_recall": [Interval(Real, 0, 1, closed="right")],
        "metric": [StrOptions(set(METRICS))],
        "coarse_quantizer": [None, HasMethods(["fit", "get_params", "set_params"])],
        "fine_quantizer": [None, ProductQuantizer],
        "by_residual": ["boolean"],
        "refine_factor": [None, Interval(Real, 1, None, closed="left")],
        "vectors_dtype": [None, StrOptions({"float32", "float16"})],
        "mode": [StrOptions({"distance", "connectivity"})],
        "n_jobs": [
            None,
            Interval(Integral, None, -1, closed="right"),
            Interval(Integral, 1, None, closed="left"),
        ],
        "random_state": ["random_state", np.random.Generator],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        n_lists="auto",
        n_probes="auto",
        *,
        n_neighbors=5,
        target_recall=0.95,
        metric="euclidean",
        coarse_quantizer=None,
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
        self.metric = metric
        self.coarse_quantizer = coarse_quantizer
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
        self._fit_storage(X)
        self._fit_coarse(X, rng)
        self._fit_fine(X, rng)
        self._lists = InvertedLists.empty(self.n_lists_)
        self._append(X)
        self._choose_probes(X, rng)
        return self

    def _fit_storage(self, X):
        """What later changes of parameters must not touch: the metric, and what is kept of a row."""
        self._metric = Metric(self.metric)
        self._residual = self.by_residual or self.fine_quantizer is None
        self._keeps_vectors = self.fine_quantizer is None or self.refine_factor is not None
        self._dtype = np.dtype(self.vectors_dtype) if self.vectors_dtype else X.dtype

    def _fit_coarse(self, X, rng):
        """coarse_quantizer_, its centers as float64 (n_lists_, n_features) and n_lists_."""
        n_lists = self._resolve_n_lists(len(X))
        seed = draw_seed(rng)
        if self.coarse_quantizer is None:
            quantizer = LloydKMeans(
                n_lists, init="random", n_init=1, max_iter=TRAINING_ITERATIONS, n_jobs=self.n_jobs
            )
            n_training = min(len(X), TRAINING_ROWS_PER_LIST * n_lists)
            X = X[np.sort(rng.choice(len(X), n_training, replace=False))] if n_training < len(X) else X
        else:
            quantizer = clone(self.coarse_quantizer)
            if "n_clusters" not in quantizer.get_params():
                raise ValueError(
                    "coarse_quantizer must be a clusterer with a parameter n_clusters, such as LloydKMeans; "
                    f"got {quantizer!r}."
                )
            quantizer.set_params(n_clusters=n_lists)
        if quantizer.get_params().get("random_state", seed) is None:
            quantizer.set_params(random_state=seed)
        with warnings.catch_warnings():
            # fewer distinct rows than lists: fewer lists, which is what is wanted
            warnings.filterwarnings("ignore", message="Number of distinct clusters")
            self.coarse_quantizer_ = quantizer.fit(self._metric_rows(as_float_rows(X)))
        self._centers = np.ascontiguousarray(self.coarse_quantizer_.cluster_centers_, dtype=np.float64)
        self.n_lists_ = len(self._centers)
        self._report(f"{self.n_lists_} lists trained.")

    def _resolve_n_lists(self, n_samples):
        if self.n_lists == "auto":
            return max(1, min(int(4 * np.sqrt(n_samples)), n_samples // ROWS_PER_LIST))
        if self.n_lists > n_samples:
            raise ValueError(f"n_lists={self.n_lists} must be at most n_samples={n_samples}.")
        return int(self.n_lists)

    def _fit_fine(self, X, rng):
        """fine_quantizer_ on the rows, or on what their centers leave of them."""
        self.fine_quantizer_ = None
        if self.fine_quantizer is None:
            return
        rows = self._metric_rows(as_float_rows(X))
        if self._residual:
            labels, _ = nearest_centers(rows, self._centers, effective_n_jobs(self.n_jobs))
            rows = (rows - self._centers[labels]).astype(rows.dtype)
        quantizer = clone(self.fine_quantizer)
        if quantizer.random_state is None:
            quantizer.set_params(random_state=draw_seed(rng))
        self.fine_quantizer_ = quantizer.fit(rows)
        self._report(f"{self.fine_quantizer_.n_subspaces_} codebooks trained.")

    def _metric_rows(self, X):
        """Rows of length one for the cosine, in their dtype."""
        return self._metric.rows(X).astype(X.dtype) if self._metric.is_cosine else X

    def _append(self, X):
        """File new rows; nothing changes before all of it has succeeded."""
        stored = self._as_stored(X)
        labels = np.empty(len(X), dtype=np.int64)
        lengths = np.empty(len(X))
        kept = {}
        for block in row_blocks(len(X), 4 * X.shape[1]):
            rows, labels[block], lengths[block] = self._file(stored[block])
            for name, array in rows.items():
                if name not in kept:
                    kept[name] = np.empty((len(X), *array.shape[1:]), dtype=array.dtype)
                kept[name][block] = array
        if self._keeps_vectors:
            kept["vectors"] = stored
        self._lists = self._lists.append(labels, kept, lengths)
        self.n_samples_fit_ = len(self._lists.positions)
        self._n_features_out = self.n_samples_fit_
        self._report(f"{len(X)} rows filed.")

    def _as_stored(self, X):
        """Rows in the dtype in which vectors are kept, if they fit it."""
        if not self._keeps_vectors or X.dtype == self._dtype:
            return X
        with np.errstate(over="ignore", invalid="ignore"):
            stored = X.astype(self._dtype)
        if self._dtype.kind in "iu" and not np.array_equal(stored, X):
            raise ValueError(
                f"This index keeps {self._dtype} vectors; X must hold integers of that range, got dtype "
                f"{X.dtype} with values from {X.min()} to {X.max()}. Fit on float rows to add such."
            )
        if not np.isfinite(stored).all():
            raise ValueError(f"X must fit vectors of dtype {self._dtype}, got values up to {np.abs(X).max():g}.")
        return stored

    def _file(self, stored):
        """Lists of some rows, what is kept of the rows, and their distances to their list's anchor."""
        rows = self._metric.rows(stored)  # float64
        labels = self._nearest_list(rows)
        if self.fine_quantizer_ is None:
            return {}, labels, np.sqrt(np.square(rows - self._centers[labels]).sum(axis=1))
        anchors = self._anchors[labels]
        dtype = self.fine_quantizer_.codebooks_[0].dtype
        codes = self.fine_quantizer_._encode((rows - anchors).astype(dtype))
        decoded = self.fine_quantizer_._decode(codes).astype(np.float64)
        kept = {"codes": codes}
        if self._metric.is_cosine:
            kept["inverse_norms"] = self._metric.inverse_norms((decoded + anchors).astype(dtype))
        elif not self._metric.is_product:
            shifted = anchors - self._origin
            kept["row_terms"] = np.square(decoded).sum(axis=1) + 2 * (decoded * shifted).sum(axis=1)
        return kept, labels, np.sqrt(np.square(decoded).sum(axis=1))

    def _nearest_list(self, metric_rows):
        return nearest_centers(metric_rows, self._centers, effective_n_jobs(self.n_jobs))[0]

    @property
    def _anchors(self):
        """What stored rows are relative to, (n_lists_, n_features): centers, or zeros."""
        return self._centers if self._residual else np.zeros_like(self._centers)

    @property
    def _origin(self):
        """What is taken off queries before their tables are made, (n_features,)."""
        shifts = self._residual and self._metric.name in ("euclidean", "sqeuclidean")
        return self._centers.mean(axis=0) if shifts else np.zeros(self.n_features_in_)

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
        if not hasattr(self, "_lists"):
            return self.fit(X)
        self._append(validate_rows(self, X, keep_small=True))
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
        self._lists = self._lists.remove(self._check_live("indices", indices))
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
        lists = self._lists
        return self._stored_rows(lists, lists.positions[self._check_live("indices", indices)])

    def _stored_rows(self, lists, positions):
        if self._keeps_vectors:
            return lists.rows["vectors"][positions]
        return self._metric_rows(self._decoded(lists, positions))

    def _check_live(self, name, indices):
        numbers = check_row_numbers(name, indices, self.n_samples_fit_)
        removed = numbers[self._lists.positions[numbers] < 0]
        if removed.size:
            raise ValueError(f"{name} must name rows of the index, but row {removed[0]} was removed.")
        return numbers

    def _decoded(self, lists, positions):
        """Anchors plus decoded codes, in the dtype of the codebooks."""
        decoded = self.fine_quantizer_._decode(lists.rows["codes"][positions])
        return (decoded + self._anchors[lists.list_of(positions)]).astype(decoded.dtype)

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
            Lists to probe; None is the parameter, or ``n_probes_`` where that is "auto".
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
        check_is_fitted(self)
        lists = self._lists
        n_neighbors = check_integer("n_neighbors", self.n_neighbors if n_neighbors is None else n_neighbors, 1)
        settings = self._resolve_n_probes(n_probes), self._resolve_refine_factor(refine_factor)
        allowed = self._allowed(lists, subset)
        if X is None:
            numbers, queries = self._own_rows(lists)
            self._check_enough(n_neighbors, lists, allowed, len(numbers), own=True)
            keys, indices = self._search(lists, queries, n_neighbors + 1, *settings, allowed)
            keys, indices = _without_self(keys, indices, numbers)
        else:
            queries = self._metric.rows(validate_rows(self, X))
            self._check_enough(n_neighbors, lists, allowed, len(queries))
            keys, indices = self._search(lists, queries, n_neighbors, *settings, allowed)
        return (self._metric.distances(keys), indices) if return_distance else indices

    def _own_rows(self, lists):
        """Numbers of the live rows, and the rows as queries."""
        numbers = np.flatnonzero(lists.positions >= 0)
        return numbers, self._metric.rows(self._stored_rows(lists, lists.positions[numbers]))

    def _resolve_n_probes(self, n_probes=None):
        if n_probes is None:  # what was tuned, unless the parameter was changed since
            unchanged = isinstance(self.n_probes, str) or self.n_probes == self._n_probes_param
            n_probes = self.n_probes_ if unchanged else self.n_probes
        return min(check_integer("n_probes", n_probes, 1), self.n_lists_)

    def _resolve_refine_factor(self, refine_factor=None):
        factor = self.refine_factor if refine_factor is None else refine_factor
        if factor is None or self.fine_quantizer_ is None:
            return None
        if isinstance(factor, bool) or not isinstance(factor, Real) or not 1 <= factor < np.inf:
            raise ValueError(f"refine_factor must be a number >= 1 or None, got {factor!r}.")
        if not self._keeps_vectors:
            raise ValueError(
                f"refine_factor={factor} re-ranks by vectors, but this index keeps codes only: "
                "set refine_factor before fit."
            )
        return factor

    def _allowed(self, lists, subset):
        """Mask over positions of the rows that may be returned, or None for all."""
        if subset is None:
            return None
        positions = lists.positions[check_row_numbers("subset", subset, len(lists.positions))]
        allowed = np.zeros(len(lists.ids), dtype=bool)
        allowed[positions[positions >= 0]] = True
        return allowed

    def _check_enough(self, n_neighbors, lists, allowed, n_queries, own=False):
        n_rows = len(lists.ids) if allowed is None else np.count_nonzero(allowed)
        if n_neighbors > n_rows - own:
            rows = f"{n_rows} live rows" if allowed is None else f"{n_rows} live rows of subset"
            raise ValueError(
                f"Expected n_neighbors <= n_samples_fit, but n_neighbors = {n_neighbors}, n_samples_fit = "
                f"{len(lists.positions)}, n_samples = {n_queries}; there are {rows}"
                f"{', and no row is its own neighbour' if own else ''}."
            )

    def _search(self, lists, queries, k, n_probes, refine_factor, allowed=None):
        """Keys and row numbers (n_queries, k) of the nearest rows, block by block of queries."""
        keys, ids = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
        for block in self._query_blocks(len(queries)):
            keys[block], ids[block] = self._search_block(
                lists, queries[block], k, n_probes, refine_factor, allowed
            )
        return keys, ids

    def _query_blocks(self, n_queries):
        elements = self.n_lists_
        if self.fine_quantizer_ is not None:
            elements += sum(len(codewords) for codewords in self.fine_quantizer_.codebooks_)
        return row_blocks(n_queries, elements)

    def _search_block(self, lists, queries, k, n_probes, refine_factor, allowed):
        n_rows, sizes = self._allowed_sizes(lists, allowed)
        n_candidates = k if refine_factor is None else min(int(np.ceil(refine_factor * k)), n_rows)
        pairs = probe(self._metric, queries, self._centers, n_probes, sizes, n_candidates)
        pool = Pool(len(queries), n_candidates)
        search_lists(self._scan(lists, queries, allowed), pairs, pool)
        keys, positions = pool.nearest(self._exact_keys(lists, queries), lists.ids)
        if refine_factor is not None:
            keys, positions = self._refine(lists, queries, positions, k)
        return keys, lists.ids[positions]

    def _allowed_sizes(self, lists, allowed):
        """Rows that may be returned: how many, and how many in each list."""
        if allowed is None:
            return len(lists.ids), lists.sizes
        cumulated = np.concatenate([[0], np.cumsum(allowed)])
        return cumulated[-1], np.diff(cumulated[lists.offsets])

    def _scan(self, lists, queries, allowed):
        """The function (list, query numbers) -> positions, keys, errors that searches one list."""
        keys_of = self._vector_keys(lists, queries) if self.fine_quantizer_ is None else self._code_keys(lists, queries)

        def scan(number, query_numbers):
            positions = np.arange(lists.offsets[number], lists.offsets[number + 1])
            if allowed is not None:
                positions = positions[allowed[positions]]
            if len(positions) == 0:
                return positions, None, None
            return positions, *keys_of(number, query_numbers, positions)

        return scan

    def _vector_keys(self, lists, queries):
        def keys_of(number, query_numbers, positions):
            rows = self._metric.rows(lists.rows["vectors"][positions])
            radius = lists.radii[number] * (1 + 1e-9)
            return scan_vectors(self._metric, queries[query_numbers], rows, self._centers[number], radius)

        return keys_of

    def _code_keys(self, lists, queries):
        quantizer, origin, anchors = self.fine_quantizer_, self._origin, self._anchors
        shifted = pq.rotate(queries - origin, quantizer.rotation_)
        tables = pq.product_tables(shifted, quantizer._slices, quantizer.codebooks_)
        eps = np.finfo(quantizer.codebooks_[0].dtype).eps
        scan = CodeScan(self._metric, queries, tables, origin, eps)
        row_terms, inverse_norms = lists.rows.get("row_terms"), lists.rows.get("inverse_norms")

        def keys_of(number, query_numbers, positions):
            return scan.keys(
                query_numbers,
                anchors[number],
                lists.rows["codes"][positions],
                None if row_terms is None else row_terms[positions],
                None if inverse_norms is None else inverse_norms[positions],
                lists.radii[number] * (1 + 1e-9),
            )

        return keys_of

    def _exact_keys(self, lists, queries):
        """The function (query numbers, positions) -> keys of vectors, or of decoded codes."""
        if self.fine_quantizer_ is None:
            return self._exact_vector_keys(lists, queries)
        return pair_keys(
            self._metric,
            queries,
            lambda positions: self._metric.rows(self._decoded(lists, positions)),
            queries.shape[1],
        )

    def _exact_vector_keys(self, lists, queries):
        return pair_keys(
            self._metric,
            queries,
            lambda positions: self._metric.rows(lists.rows["vectors"][positions]),
            queries.shape[1],
        )

    def _refine(self, lists, queries, positions, k):
        """Re-rank candidates (n_queries, n_candidates) by the exact keys of their vectors."""
        n_queries, n_candidates = positions.shape
        numbers = np.repeat(np.arange(n_queries), n_candidates)
        keys = self._exact_vector_keys(lists, queries)(numbers, positions.ravel()).reshape(positions.shape)
        order = np.lexsort((lists.ids[positions], keys), axis=1)[:, :k]
        return np.take_along_axis(keys, order, 1), np.take_along_axis(positions, order, 1)

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
        lists = self._lists
        key = self._key_of_radius(radius)
        allowed = self._allowed(lists, subset)
        if X is None:
            numbers, queries = self._own_rows(lists)
        else:
            numbers, queries = None, self._metric.rows(validate_rows(self, X))
        distances, indices = np.empty(len(queries), dtype=object), np.empty(len(queries), dtype=object)
        for block in self._query_blocks(len(queries)):
            found = self._search_radius(lists, queries[block], key, allowed)
            for i, (keys, ids) in enumerate(found, start=block.start):
                others = slice(None) if numbers is None else ids != numbers[i]
                distances[i], indices[i] = self._metric.distances(keys[others]), ids[others]
        return (distances, indices) if return_distance else indices

    def _key_of_radius(self, radius):
        if isinstance(radius, bool) or not isinstance(radius, Real) or not np.isfinite(radius):
            raise ValueError(f"radius must be a finite number, got {radius!r}.")
        return self._metric.key_of_radius(float(radius))

    def _search_radius(self, lists, queries, key, allowed):
        """Keys and row numbers of the rows up to that key, a pair for each query."""
        if self._metric.is_cosine and self.fine_quantizer_ is not None:
            lowest = np.full((len(queries), self.n_lists_), -np.inf)  # decoded rows are renormalised
        else:
            lowest = lowest_keys(self._metric, queries, self._anchors, lists.radii * (1 + 1e-6))
        near, numbers = np.nonzero(lowest <= key)
        pool = Pool(len(queries), None, threshold=key)
        search_lists(self._scan(lists, queries, allowed), (near, numbers, near >= 0), pool)
        found, positions, keys = pool.ranked(self._exact_keys(lists, queries), lists.ids)
        inside = keys <= key
        found, keys, ids = found[inside], keys[inside], lists.ids[positions[inside]].astype(np.int64)
        bounds = np.searchsorted(found, np.arange(len(queries) + 1))
        return [(keys[i:j], ids[i:j]) for i, j in zip(bounds[:-1], bounds[1:])]

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
        self._check_mode(mode)
        distances, indices = self.kneighbors(X, n_neighbors)
        return self._graph(X, list(distances), list(indices), mode)

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
        self._check_mode(mode)
        distances, indices = self.radius_neighbors(X, radius)
        return self._graph(X, list(distances), list(indices), mode)

    def _check_mode(self, mode):
        check_is_fitted(self)
        if mode not in ("connectivity", "distance"):
            raise ValueError(f"mode must be 'connectivity' or 'distance', got {mode!r}.")
        if mode == "distance" and self._metric.is_product:
            raise ValueError(
                "mode='distance' needs distances that are not negative, which metric='inner_product' does not "
                "give: use metric='cosine', or mode='connectivity'."
            )

    def _graph(self, X, distances, indices, mode):
        lengths = np.array([len(row) for row in indices], dtype=np.int64)
        if X is None:  # square: removed rows are there, and empty
            live = self._lists.positions >= 0
            lengths, live_lengths = np.zeros(len(live), dtype=np.int64), lengths
            lengths[live] = live_lengths
        columns = np.concatenate([np.empty(0, np.int64), *indices])
        values = np.concatenate([np.empty(0), *distances]) if mode == "distance" else np.ones(len(columns))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        graph = sparse.csr_array((values, columns, offsets), shape=(len(lengths), self.n_samples_fit_))
        return as_configured_sparse(graph)

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
        return self.kneighbors_graph(X, self.n_neighbors + (self.mode == "distance"), self.mode)

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
        return self._nearest_list(self._metric.rows(validate_rows(self, X)))

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
        found = self.kneighbors(X, return_distance=False)
        if not self._keeps_vectors:
            raise ValueError("score needs the vectors, but refine_factor was set only after fit.")
        queries = self._metric.rows(validate_rows(self, X))
        return neighbors_recall(self._exact(self._lists, queries, self.n_neighbors), found)

    def _exact(self, lists, queries, k):
        """Row numbers (n_queries, k) of the true neighbours among the live rows."""
        _, positions = nearest_rows(self._metric, queries, lists.rows["vectors"], k, lists.ids)
        return lists.ids[positions]

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
        target = self.target_recall if target_recall is None else target_recall
        if isinstance(target, bool) or not isinstance(target, Real) or not 0 < target <= 1:
            raise ValueError(f"target_recall must be a number above 0 and up to 1, got {target!r}.")
        k = check_integer("n_neighbors", self.n_neighbors if n_neighbors is None else n_neighbors, 1)
        lists = self._lists
        queries = self._metric.rows(validate_rows(self, X))
        self._check_enough(k, lists, None, len(queries))
        if self._keeps_vectors:
            true = self._exact(lists, queries, k)
        else:
            true = self._search(lists, queries, k, self.n_lists_, None)[1]
        self._calibrate(lists, queries, true, None, target)
        return self

    def _choose_probes(self, X, rng):
        if self.n_probes != "auto":
            self.n_probes_, self.recall_ = min(int(self.n_probes), self.n_lists_), None
            self._n_probes_param = self.n_probes
            return
        n_queries = min(CALIBRATION_QUERIES, len(X))
        numbers = np.sort(rng.choice(len(X), n_queries, replace=False))
        k = min(self.n_neighbors, len(X) - 1)
        if k == 0 or self.n_lists_ == 1:
            self.n_probes_, self.recall_, self._n_probes_param = self.n_lists_, 1.0, self.n_probes
            return
        queries = self._metric.rows(X[numbers])
        keys, true = nearest_rows(self._metric, queries, X, k + 1)
        self._calibrate(self._lists, queries, _without_self(keys, true, numbers)[1], numbers, self.target_recall)

    def _calibrate(self, lists, queries, true, own, target):
        """Set n_probes_ to the fewest lists that reach the target; own are the queries' row numbers, if any."""
        coverage = self._coverage(lists, queries, true)
        n_probes = int(np.argmax(coverage >= min(target, coverage[-1]))) + 1
        recall = coverage[n_probes - 1]
        if self.fine_quantizer_ is not None:
            n_probes, recall = self._probes_of_codes(lists, queries, true, own, target, n_probes)
        self.n_probes_, self.recall_, self._n_probes_param = n_probes, float(recall), self.n_probes
        self._report(f"{n_probes} probes reach a recall of {recall:.4f}.")

    def _coverage(self, lists, queries, true):
        """Share of the true neighbours in the nearest 1, 2, ... lists, (n_lists_,)."""
        hits = np.zeros(self.n_lists_)
        for block in row_blocks(len(queries), self.n_lists_ * queries.shape[1]):
            order = nearest_lists(self._metric, queries[block], self._centers, self.n_lists_)
            rank = np.argsort(order, axis=1)
            lists_of_true = lists.list_of(lists.positions[true[block]])
            ranks = np.take_along_axis(rank, lists_of_true, axis=1)
            hits += np.bincount(ranks.ravel(), minlength=self.n_lists_)
        return np.cumsum(hits) / true.size

    def _probes_of_codes(self, lists, queries, true, own, target, n_probes):
        """Fewest probes, from n_probes on, with which the codes reach the target, and the recall.

        Doubles the probes until the target is reached or more probes do not help, then bisects.
        """
        k = true.shape[1]
        factor = self._resolve_refine_factor()

        def recall_with(probes):
            keys, found = self._search(lists, queries, k + (own is not None), probes, factor)
            return neighbors_recall(true, found if own is None else _without_self(keys, found, own)[1])

        low, high, recall = n_probes - 1, n_probes, recall_with(n_probes)
        while recall < target and high < self.n_lists_:
            wider = min(2 * high, self.n_lists_)
            gained = recall_with(wider)
            if gained < min(target, recall + 0.002):
                break
            low, high, recall = high, wider, gained
        if recall < target:
            self._warn_unreachable(target, recall, factor)
        while high - low > max(1, high // 32) and recall >= target:
            middle = (low + high) // 2
            with_middle = recall_with(middle)
            if with_middle >= target:
                high, recall = middle, with_middle
            else:
                low = middle
        return high, recall

    def _warn_unreachable(self, target, recall, factor):
        if factor is None and self._keeps_vectors is False:
            remedy = "Set refine_factor to re-rank by exact distances, or keep longer codes (n_subspaces, n_bits)."
        else:
            remedy = f"Raise refine_factor (now {factor}), or keep longer codes (n_subspaces, n_bits)."
        warnings.warn(
            f"The codes reach a recall of {recall:.3f}, below target_recall={target}, however many lists are "
            f"probed. {remedy}",
            UserWarning,
            stacklevel=4,
        )

    @property
    def labels_(self):
        """List of each row, -1 for removed ones, (n_samples_fit_,) int32."""
        return self._lists.labels

    @property
    def list_sizes_(self):
        """Rows in each list, (n_lists_,)."""
        return self._lists.sizes

    @property
    def bytes_per_vector_(self):
        """Bytes kept for each row."""
        return self._lists.nbytes / max(1, len(self._lists.ids))

    def _report(self, message):
        if self.verbose:
            print(message)  # noqa: T201 - verbose means this


def _without_self(keys, indices, numbers):
    """Neighbours (n, k + 1) of rows less the row itself, or less the last where it was not found."""
    own = indices == numbers[:, None]
    own[~own.any(axis=1), -1] = True
    return keys[~own].reshape(len(keys), -1), indices[~own].reshape(len(keys), -1)

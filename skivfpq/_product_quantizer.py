"""Product quantization as a scikit-learn transformer: rows to codes of a few bytes, and back."""

import warnings
from numbers import Integral

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

from skivfpq._algorithms import codebooks as pq
from skivfpq._algorithms.blocks import effective_n_jobs
from skivfpq._sklearn_private import COMMON_CONSTRAINTS, Interval, RealNotInt, StrOptions, fit_context
from skivfpq._validation import all_or_nothing, as_generator, validate_rows

ROWS_PER_CODEWORD = 256  # of max_samples="auto"; four times as many lower the error by less than 1 %


class ProductQuantizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Compress vectors to short codes: one small k-means in each of several subspaces.

    ``transform`` cuts each row into ``n_subspaces`` parts and replaces each part by the number of its
    nearest codeword; ``inverse_transform`` puts the codewords together again.

    Parameters
    ----------
    n_subspaces : int or "auto", default="auto"
        Codes per row. "auto" is one for eight features, at least one. Any number up to n_features
        works; parts are cut as by ``numpy.array_split``.
    n_bits : int, default=8
        Bits per code, 1 to 16: each subspace learns up to ``2 ** n_bits`` codewords.
    rotation : {"pca", "opq", "random"} or None, default=None
        Rotation of the rows before they are cut. "pca": principal axes, dealt to the subspaces so
        that their variances balance; "opq": starts there, then alternates between codebooks and
        rotation; "random": a random one.
    max_iter : int, default=25
        Most k-means iterations of a subspace. Fewer are made: accelerated ones, the first of them on
        samples of the rows, whose error is that of so many plain Lloyd iterations or less.
    max_samples : int, float, "auto" or None, default="auto"
        Rows to train on, drawn without repetition: a number, a share, or all (None). "auto" is 256
        for each codeword.
    n_jobs : int or None, default=None
        Threads. None is every core that the process may use. Results do not depend on it.
    random_state : int, RandomState, Generator or None, default=None
        Source of the random draws.
    verbose : int, default=0
        Whether each subspace is reported.

    Attributes
    ----------
    codebooks_ : list of n_subspaces_ ndarrays of shape (n_codewords, subspace_dim)
        Codewords of each subspace, of the rotated rows; fewer than ``2 ** n_bits`` where fewer
        training rows were distinct.
    rotation_ : ndarray of shape (n_features, n_features) or None
        ``X @ rotation_`` is what is cut.
    n_subspaces_ : int
        Codes per row.
    n_iter_ : int
        Most iterations of any subspace.
    n_features_in_ : int
        Number of features seen in fit.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Their names, where X had such.

    See Also
    --------
    IVFIndex : Search by such codes.

    References
    ----------
    H. Jegou, M. Douze and C. Schmid, "Product quantization for nearest neighbor search", IEEE TPAMI
    33(1), 2011, equations 8 to 13. T. Ge, K. He, Q. Ke and J. Sun, "Optimized product quantization",
    IEEE TPAMI 36(4), 2014, sections 3 and 4 (rotation="opq" and "pca").

    Examples
    --------
    >>> import numpy as np
    >>> from skivfpq import ProductQuantizer
    >>> X = np.array([[0.0, 0, 9], [0, 0, 7], [4, 4, 9], [4, 4, 7]])
    >>> quantizer = ProductQuantizer(n_subspaces=2, n_bits=1, random_state=0).fit(X)
    >>> codes = quantizer.transform(X)
    >>> codes.shape, codes.dtype
    ((4, 2), dtype('uint8'))
    >>> bool((quantizer.inverse_transform(codes) == X).all())
    True
    """

    _parameter_constraints = {
        "n_subspaces": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "n_bits": [Interval(Integral, 1, 16, closed="both")],
        "rotation": [None, StrOptions({"pca", "opq", "random"})],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "max_samples": [
            None,
            StrOptions({"auto"}),
            Interval(Integral, 1, None, closed="left"),
            Interval(RealNotInt, 0, 1, closed="right"),
        ],
        **COMMON_CONSTRAINTS,
    }

    def __init__(
        self,
        n_subspaces="auto",
        n_bits=8,
        *,
        rotation=None,
        max_iter=25,
        max_samples="auto",
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
        self.n_subspaces = n_subspaces
        self.n_bits = n_bits
        self.rotation = rotation
        self.max_iter = max_iter
        self.max_samples = max_samples
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # codes are small integers
        return tags

    @fit_context(prefer_skip_nested_validation=True)
    @all_or_nothing
    def fit(self, X, y=None):
        """Learn the rotation and the codebooks.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Training rows.
        y : None
            Ignored.

        Returns
        -------
        self : ProductQuantizer
            The fitted estimator.

        Raises
        ------
        ValueError
            X or a parameter is not as described; n_subspaces exceeds n_features.

        Warns
        -----
        ConvergenceWarning
            A subspace has fewer distinct training rows than ``2 ** n_bits``, and so fewer codewords.
        """
        X = validate_rows(self, X, reset=True)
        rng = as_generator(self.random_state)
        self.n_subspaces_ = self._resolve_n_subspaces(X.shape[1])
        training = self._training_rows(X, rng)  # (n_training, n_features)
        self.rotation_ = self._first_rotation(training, rng)
        self.codebooks_, self.n_iter_ = self._train(pq.rotate(training, self.rotation_), rng)
        if self.rotation == "opq":
            self._alternate(training)
        self._warn_if_few_codewords()
        return self

    def _resolve_n_subspaces(self, n_features):
        if self.n_subspaces == "auto":
            return max(1, n_features // 8)
        if self.n_subspaces > n_features:
            raise ValueError(
                f"n_subspaces={self.n_subspaces} must be at most n_features={n_features}: "
                "a subspace needs a feature."
            )
        return int(self.n_subspaces)

    @property
    def _slices(self):
        return pq.subspace_slices(self.n_features_in_, self.n_subspaces_)

    def _training_size(self, n_samples):
        if self.max_samples is None:
            return n_samples
        if self.max_samples == "auto":
            return min(n_samples, ROWS_PER_CODEWORD << int(self.n_bits))
        if isinstance(self.max_samples, Integral):
            return min(n_samples, int(self.max_samples))
        return max(1, int(self.max_samples * n_samples))

    def _training_rows(self, X, rng):
        size = self._training_size(len(X))
        return X if size == len(X) else X[np.sort(rng.choice(len(X), size, replace=False))]

    def _first_rotation(self, X, rng):
        if self.rotation is None:
            return None
        if self.rotation == "random":
            return pq.random_rotation(X.shape[1], rng)
        return pq.pca_rotation(X, self._slices)

    def _train(self, rotated, rng):
        return pq.train_codebooks(
            rotated,
            self._slices,
            1 << int(self.n_bits),
            max_iter=int(self.max_iter),
            rng=rng,
            n_threads=effective_n_jobs(self.n_jobs),
            report=self._report if self.verbose else None,
        )

    def _alternate(self, X):
        n_threads = effective_n_jobs(self.n_jobs)
        self.rotation_, codebooks = pq.optimize_rotation(
            X, self.rotation_, self._slices, self.codebooks_, n_threads
        )
        rotated = pq.rotate(X, self.rotation_)
        self.codebooks_, n_iter = pq.refine_codebooks(
            rotated,
            self._slices,
            codebooks,
            stages=[(len(X), max(1, round(pq.ACCELERATED * self.max_iter)))],
            n_threads=n_threads,
            report=self._report if self.verbose else None,
        )
        self.n_iter_ = max(self.n_iter_, n_iter)

    def _warn_if_few_codewords(self):
        fewest = min(len(codewords) for codewords in self.codebooks_)
        wanted = 1 << int(self.n_bits)
        if fewest < wanted:
            warnings.warn(
                f"A subspace has only {fewest} distinct training rows, fewer than the {wanted} "
                f"codewords of n_bits={self.n_bits}: fewer are learnt. Lower n_bits or train on more rows.",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _report(self, message):
        if self.verbose:
            print(message)  # noqa: T201 - verbose means this

    def transform(self, X):
        """Encode rows: the number of the nearest codeword in each subspace.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows.

        Returns
        -------
        codes : ndarray of shape (n_samples, n_subspaces_)
            uint8, or uint16 for n_bits > 8.
        """
        check_is_fitted(self)
        return self._encode(validate_rows(self, X))

    def _encode(self, X):
        codes = np.empty((len(X), self.n_subspaces_), dtype=np.uint8 if self.n_bits <= 8 else np.uint16)
        return self._codebooks.encode(X, effective_n_jobs(self.n_jobs), codes)

    @property
    def _codebooks(self):
        return pq.Codebooks(self._slices, self.codebooks_, self.rotation_)

    def predict(self, X):
        """Encode rows, as ``transform``: nearest codewords, as ``KMeans.predict`` gives nearest centers.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows.

        Returns
        -------
        codes : ndarray of shape (n_samples, n_subspaces_)
            uint8, or uint16 for n_bits > 8.
        """
        check_is_fitted(self)
        return self._encode(validate_rows(self, X))

    def inverse_transform(self, X):
        """Decode: put the codewords together and rotate back.

        Parameters
        ----------
        X : array-like of int, shape (n_samples, n_subspaces_)
            Codes.

        Returns
        -------
        rows : ndarray of shape (n_samples, n_features)
            Approximations of the rows, in the dtype of the training rows.

        Raises
        ------
        ValueError
            The codes are no integers, not of that shape, or name codewords that were not learnt.
        """
        check_is_fitted(self)
        return self._codebooks.decode(self._validate_codes(X))

    def _validate_codes(self, X):
        codes = np.asarray(X)
        if codes.dtype.kind not in "iu" or codes.ndim != 2 or codes.shape[1] != self.n_subspaces_:
            raise ValueError(
                f"Codes must be integers of shape (n_samples, {self.n_subspaces_}), as transform returns; "
                f"got dtype {codes.dtype} and shape {codes.shape}."
            )
        sizes = np.array([len(codewords) for codewords in self.codebooks_])
        if len(codes) and (codes.min() < 0 or np.any(codes.max(axis=0) >= sizes)):
            raise ValueError(
                f"Codes must be from 0 to {sizes.min() - 1}, numbers of learnt codewords; got codes from "
                f"{codes.min()} to {codes.max()}."
            )
        return codes

    def distance_tables(self, X):
        """Squared distance of each part of each row to each codeword.

        The asymmetric distance (ADC) between a row and codes is ``tables[m, codes[m]]`` summed over m.

        Parameters
        ----------
        X : array-like of shape (n_queries, n_features)
            Rows.

        Returns
        -------
        tables : ndarray of shape (n_queries, n_subspaces_, 2 ** n_bits)
            float64; +inf for codewords that were not learnt.
        """
        check_is_fitted(self)
        X = validate_rows(self, X)
        return self._codebooks.distance_tables(X, 1 << int(self.n_bits))

    def score(self, X, y=None):
        """Minus the mean over the rows of their squared distance to their decoded selves.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            Rows.
        y : None
            Ignored.

        Returns
        -------
        score : float
            Higher is better, 0 is lossless.
        """
        check_is_fitted(self)
        X = validate_rows(self, X)
        errors = X - self._codebooks.decode(self._encode(X)).astype(np.float64)
        return -float(np.square(errors).sum(axis=1).mean())

    @property
    def _n_features_out(self):
        return self.n_subspaces_

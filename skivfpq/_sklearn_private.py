"""The private parts of scikit-learn that skivfpq uses, all of them, in one place."""

from numbers import Integral

import numpy as np
from sklearn.base import _fit_context as fit_context
from sklearn.utils._param_validation import HasMethods, Interval, RealNotInt, StrOptions
from sklearn.utils.validation import _check_sample_weight

try:  # scikit-learn 1.9: sparse arrays or matrices, as the user's configuration asks
    from sklearn.utils import _align_api_if_sparse as as_configured_sparse
except ImportError:
    from scipy.sparse import csr_matrix as as_configured_sparse

__all__ = [
    "COMMON_CONSTRAINTS",
    "HasMethods",
    "Interval",
    "RealNotInt",
    "StrOptions",
    "as_configured_sparse",
    "check_sample_weight",
    "fit_context",
]


COMMON_CONSTRAINTS = {  # of the parameters that every estimator has
    "n_jobs": [
        None,
        Interval(Integral, None, -1, closed="right"),
        Interval(Integral, 1, None, closed="left"),
    ],
    "random_state": ["random_state", np.random.Generator],
    "verbose": ["verbose"],
}


def check_sample_weight(sample_weight, X):
    """Weights (n_samples,) float64: ones for None, else finite, not negative, not all zero."""
    if sample_weight is None:
        return np.ones(X.shape[0])
    weights = _check_sample_weight(sample_weight, X, dtype="float64")
    if weights.min() < 0:
        raise ValueError(f"sample_weight must not be negative, got a weight of {weights.min()}.")
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not np.isfinite(total):
        raise ValueError("sample_weight must have a finite sum, got weights that overflow: divide them.")
    if not weights.any():
        raise ValueError("sample_weight must hold a positive weight, got zeros only.")
    return weights

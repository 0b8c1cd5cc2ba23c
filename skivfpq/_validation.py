"""Checks of users' arrays and numbers: what was expected, what came, what to do."""

import functools
import numbers

import numpy as np
from scipy import sparse
from sklearn.utils import check_array
from sklearn.utils.validation import validate_data

from skivfpq import _kernels
from skivfpq._algorithms.blocks import as_float_rows

LARGEST = 1e140  # squared distances, and their sums over 1e28 terms, stay below 1.8e308


def as_generator(random_state):
    """A numpy Generator from None, an int, a Generator or, by one draw, a RandomState."""
    if isinstance(random_state, np.random.RandomState):
        random_state = random_state.randint(np.iinfo(np.int32).max)
    return np.random.default_rng(random_state)


def draw_seed(rng):
    """An int random_state for a clone."""
    return int(rng.integers(np.iinfo(np.int32).max))


def validate_rows(estimator, X, *, reset=False, accept_sparse=False, keep_small=False):
    """Rows of the user's X, (n_samples, n_features), finite, in C order, never the user's to change.

    float32 and float64 stay; float16 and 8- or 16-bit integers become float32, everything else
    float64. ``keep_small`` leaves float16 and 8-bit integers as they are. CSR stays CSR.
    """
    is_plain = type(X) is np.ndarray and X.ndim == 2 and X.dtype.char in "fd"
    if is_plain:
        X = np.ascontiguousarray(X)
    if is_plain and _is_valid(estimator, X, reset):
        if reset:
            estimator.n_features_in_ = X.shape[1]
        return X
    sparse_format = "csr" if accept_sparse else False
    X = validate_data(estimator, X, reset=reset, accept_sparse=sparse_format, dtype="numeric", order="C")
    return _finish_rows(X, type(estimator).__name__, keep_small)


def _is_valid(estimator, X, reset):
    """Whether a plain X is such rows, seen at a glance: scikit-learn's checks take longer than a search."""
    if not (_kernels.NATIVE and X.flags.aligned and X.dtype.isnative and X.size > 0):
        return False
    if hasattr(estimator, "feature_names_in_"):
        return False
    if not reset and X.shape[1] != getattr(estimator, "n_features_in_", None):
        return False
    return _kernels.native.all_within(X, LARGEST)


def validate_other_rows(X, name, *, keep_small=False):
    """The same for an array that is no estimator's input; name is what the user calls it."""
    return _finish_rows(check_array(X, dtype="numeric", order="C", input_name=name), name, keep_small)


def all_or_nothing(fit):
    """A fit that fails, or is interrupted, leaves the estimator as it was."""

    @functools.wraps(fit)
    def wrapper(self, *args, **kwargs):
        before = dict(vars(self))
        try:
            return fit(self, *args, **kwargs)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return wrapper


def _finish_rows(X, name, keep_small):
    if X.dtype.kind not in "fiub":
        raise ValueError(f"Input X of {name} must hold numbers, got dtype {X.dtype}.")
    _check_exact(X.data if sparse.issparse(X) else X, name)
    if sparse.issparse(X):
        small = X.dtype in (np.float16, np.float32) or (X.dtype.kind in "iu" and X.dtype.itemsize <= 2)
        X = X.astype(np.float32 if small else np.float64, copy=False)
        if not X.has_canonical_format:
            X = X.copy()
            X.sum_duplicates()
    elif not (keep_small and X.dtype in (np.float16, np.int8, np.uint8)):
        X = as_float_rows(X)
    check_size(X, f"Input X of {name}")
    return X


def check_size(X, name):
    """Values whose squared distances do not overflow."""
    if X.dtype != np.float64:
        return
    values = X.data if sparse.issparse(X) else X
    largest = max(values.max(initial=0), -values.min(initial=0))
    if largest > LARGEST:
        raise ValueError(
            f"{name} must hold values up to {LARGEST:g} in size, since squares of larger ones overflow "
            f"float64; got {largest:g}. Scale the data, or mend the value."
        )


def _check_exact(values, name):
    """No integer is ever rounded: those that float64 cannot hold are refused."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize < 8 or values.size == 0:
        return
    largest = max(int(values.max()), -int(values.min()))
    if largest > 1 << 53:
        raise ValueError(
            f"Input X of {name} must hold integers up to 2**53, the largest that float64 holds exactly; "
            f"got {largest}. Convert X to float64 if rounding is fine."
        )


def check_integer(name, value, low, high=None):
    """An int between low and high."""
    if type(value) is int and value >= low and (high is None or value <= high):
        return value  # at a glance
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
    if value < low or (high is not None and value > high):
        expected = f">= {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {expected}, got {value}.")
    return int(value)


def check_number(name, value, *, low=None, above=None, high=None):
    """A finite float, at least low, above ``above``, at most high."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}.")
    try:
        value = float(value)
    except OverflowError:
        value = np.inf
    bounds = {"at least": low, "above": above, "at most": high}
    inside = (
        (low is None or value >= low) and (above is None or value > above) and (high is None or value <= high)
    )
    if not (np.isfinite(value) and inside):
        expected = "".join(f", {word} {bound}" for word, bound in bounds.items() if bound is not None)
        raise ValueError(f"{name} must be finite{expected}, got {value}.")
    return value


def check_row_numbers(name, indices, n_rows):
    """Row numbers (n,) int64 below n_rows from a list of them or from a boolean mask of that length."""
    indices = np.asarray(indices)
    if indices.size == 0 and indices.ndim == 1 and indices.dtype.kind != "b":
        return np.empty(0, dtype=np.int64)
    if indices.ndim != 1 or indices.dtype.kind not in "biu":
        raise ValueError(
            f"{name} must be a 1-D array of row numbers or a boolean mask, got an array of shape "
            f"{indices.shape} and dtype {indices.dtype}."
        )
    if indices.dtype.kind == "b":
        if len(indices) != n_rows:
            raise ValueError(
                f"{name} as a mask must have {n_rows} entries, one for each row, got {len(indices)}."
            )
        return np.flatnonzero(indices)
    if int(indices.min()) < 0 or int(indices.max()) >= n_rows:
        wrong = indices.min() if indices.min() < 0 else indices.max()
        raise ValueError(f"{name} must hold row numbers from 0 to {n_rows - 1}, got {wrong}.")
    return indices.astype(np.int64)

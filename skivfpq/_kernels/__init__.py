"""Arrays in, arrays out. Picks the compiled kernels or the reference ones once, at import.

``SKIVFPQ_KERNELS=reference`` asks for the NumPy kernels, ``SKIVFPQ_SIMD=name`` for one instruction
set of the compiled ones; :func:`skivfpq.show_versions` tells what runs.
"""

import os
from importlib import import_module
from importlib.util import find_spec

from scipy import sparse

from skivfpq._kernels import reference
from skivfpq._kernels.reference import (
    UNDERFLOW,
    dense_rows,
    is_zero_row,
    pair_sq_distances,
    row_blocks,
    row_norms,
    sq_distance_matrix,
    unit_rows,
)

__all__ = [
    "NATIVE",
    "UNDERFLOW",
    "adc_scan",
    "cluster_sums",
    "dense_rows",
    "draw_mass",
    "encode",
    "is_zero_row",
    "nearest_centers",
    "order_by_hash",
    "order_by_label",
    "pair_sq_distances",
    "row_blocks",
    "row_hashes",
    "row_norms",
    "row_sq_distances",
    "sq_distance_matrix",
    "unit_rows",
    "update_mass",
]

_choice = os.environ.get("SKIVFPQ_KERNELS", "")
if _choice not in ("", "native", "reference"):
    raise ImportError(f"SKIVFPQ_KERNELS must be 'native' or 'reference', got {_choice!r}.")

# A build without a compiler has no compiled module.
if _choice == "native" or (_choice == "" and find_spec("skivfpq._kernels.native") is not None):
    native = import_module("skivfpq._kernels.native")
else:
    native = None

NATIVE = native is not None
_dense = native if NATIVE else reference
adc_scan = _dense.adc_scan
encode = _dense.encode
draw_mass = _dense.draw_mass
order_by_hash = _dense.order_by_hash
order_by_label = _dense.order_by_label
update_mass = _dense.update_mass


def _either(name):
    """The kernel of that name: the reference one for CSR rows, the best for others."""

    def kernel(X, *args):
        getattr(reference if sparse.issparse(X) else _dense, name)(X, *args)

    kernel.__doc__ = getattr(reference, name).__doc__
    return kernel


nearest_centers = _either("nearest_centers")
cluster_sums = _either("cluster_sums")
row_hashes = _either("row_hashes")
row_sq_distances = _either("row_sq_distances")

"""Vector clustering, compression and search as scikit-learn estimators.

=====================  ================================================================
LloydKMeans            exact k-means, a drop-in for ``sklearn.cluster.KMeans``
ProductQuantizer       vectors to codes of a few bytes, and back
IVFIndex               nearest neighbours by inverted lists, of vectors or of codes
exact_neighbors        the same by brute force
neighbors_recall       how many of the true neighbours were found
show_versions          which kernels run here
=====================  ================================================================

Three layers, imports go down only::

    _kmeans.py  _product_quantizer.py  _ivf_index.py    estimators: parameters, validation, the recipe
    _algorithms/                                        functions on validated arrays
    _kernels/                                           arrays in, arrays out; compiled, or NumPy

k-means is the building block: its centers are the regions of the inverted lists and the codewords of
the product quantizer.
"""

from importlib.metadata import version as _version

from skivfpq._ivf_index import IVFIndex
from skivfpq._kmeans import LloydKMeans
from skivfpq._metrics import exact_neighbors, neighbors_recall
from skivfpq._product_quantizer import ProductQuantizer
from skivfpq._versions import show_versions

__version__ = _version("skivfpq")

__all__ = [
    "IVFIndex",
    "LloydKMeans",
    "ProductQuantizer",
    "__version__",
    "exact_neighbors",
    "neighbors_recall",
    "show_versions",
]

"""scikit-learn's own checks, without an expected failure."""

import warnings

import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

from skivfpq import IVFIndex, LloydKMeans, ProductQuantizer

# The checks fit 10 to 40 rows: fewer distinct rows than codewords are the rule there.
pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

ROTATIONS = [ProductQuantizer(rotation=rotation) for rotation in ("pca", "opq", "random")]
BITS = [ProductQuantizer(n_bits=n_bits) for n_bits in (1, 4, 12)]
METRICS = ["euclidean", "sqeuclidean", "cosine", "inner_product"]


def _mode(metric):
    """The graph of distances that the inner product does not have."""
    return "connectivity" if metric == "inner_product" else "distance"


INDEXES = [
    IVFIndex(metric=metric, mode=_mode(metric), **params)
    for metric in METRICS
    for params in (
        {},
        {"n_lists": 3, "n_probes": 1},
        {"probing": "adaptive"},
        {"n_groups": "auto"},
        {"n_lists": 8, "n_groups": 3, "n_probes": 2},
        {"n_lists": 6, "n_probes": 2, "probing": "adaptive", "fine_quantizer": ProductQuantizer()},
        {"fine_quantizer": ProductQuantizer()},
        {"fine_quantizer": ProductQuantizer(rotation="opq"), "by_residual": False},
        {"fine_quantizer": ProductQuantizer(n_bits=4), "refine_factor": 4, "n_lists": 2, "n_probes": 2},
    )
]
OTHERS = [LloydKMeans(metric="cosine"), IVFIndex(vectors_dtype="float16"), IVFIndex(mode="connectivity")]


@pytest.mark.parametrize("estimator", [LloydKMeans(), ProductQuantizer(), IVFIndex()], ids=repr)
def test_check_estimator(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        results = check_estimator(estimator, on_skip=None)
    assert {result["status"] for result in results} <= {"passed", "skipped"}
    assert {result["check_name"] for result in results if result["status"] == "skipped"} <= {
        "check_array_api_input"  # needs SCIPY_ARRAY_API=1, under which the CI runs this file once more
    }


@parametrize_with_checks([*ROTATIONS, *BITS, *INDEXES, *OTHERS])
def test_variants(estimator, check):
    check(estimator)


BY_HAND = [  # what scikit-learn runs on its own estimators, but check_estimator leaves out
    "check_param_validation",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_set_output_transform_polars",
    "check_global_output_transform_pandas",
    "check_global_set_output_transform_polars",
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_dataframe_column_names_consistency",
    "check_get_feature_names_out_error",
    "check_inplace_ensure_writeable",
]


@pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names")
@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize(
    "estimator",
    [
        LloydKMeans(n_clusters=3),
        ProductQuantizer(),
        IVFIndex(),
        IVFIndex(fine_quantizer=ProductQuantizer(), refine_factor=2),
    ],
    ids=repr,
)
def test_checks_by_hand(estimator, name):
    check = getattr(estimator_checks, name)
    check(type(estimator).__name__, estimator)

"""Shared data; every random number comes from a seed."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from sklearn.datasets import make_blobs

import skivfpq
from skivfpq import _kernels

if Path(skivfpq.__file__).parents[1] == Path(__file__).parents[1] and not _kernels.NATIVE:
    pytest.exit(
        "These are the uncompiled sources beside the tests. Run `pip install '.[test]'`, then `pytest`, "
        "not `python -m pytest`, which puts this folder in front of the installed package.",
        returncode=4,
    )

# Machines are shared and slow at times: no deadline, and the same examples in every run.
settings.register_profile(
    "skivfpq",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("skivfpq")


INSTRUCTION_SETS = _kernels.native.runnable() + _kernels.native.emulated() if _kernels.NATIVE else []


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    """Each compiled variant in turn."""
    before = _kernels.native.INSTRUCTION_SET
    _kernels.native.use(request.param)
    yield request.param
    _kernels.native.use(before)


@pytest.fixture(params=[0, 1, 2])
def seed(request):
    """A few seeds: what is tested must hold for each."""
    return request.param


@pytest.fixture(scope="session")
def blobs():
    """Six clouds, (600, 8) float64."""
    return make_blobs(600, n_features=8, centers=6, cluster_std=2.0, random_state=0)[0]


@pytest.fixture
def rng():
    """A generator of its own for each test."""
    return np.random.default_rng(0)

"""What runs here: versions, kernels, threads."""

import platform
import sys
from importlib.metadata import version

from skivfpq import _kernels
from skivfpq._algorithms.blocks import effective_n_jobs


def show_versions():
    """Print the versions of skivfpq and its dependencies, and which kernels run on which CPU features.

    Examples
    --------
    >>> import skivfpq
    >>> skivfpq.show_versions()  # doctest: +ELLIPSIS
    skivfpq: ...
    """
    native = _kernels.native
    facts = {
        **{name: version(name) for name in ("skivfpq", "scikit-learn", "numpy", "scipy")},
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "kernels": f"compiled, {native.INSTRUCTION_SET}" if native else "reference (NumPy)",
        "runnable": ", ".join(native.runnable()) if native else "reference",
        "threads": effective_n_jobs(None),
    }
    for name, fact in facts.items():
        print(f"{name}: {fact}")  # noqa: T201 - printing is what it is for

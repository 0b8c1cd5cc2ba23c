"""Run peers in turn, keep every timing, and describe the machine."""

import gc
import io
import os
import platform
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

PAUSE = 0.05  # seconds before a run, since threads of the last peer's OpenMP spin for a while
FLAGS = ("sse4_1", "avx2", "fma", "avx512f", "avx512_vbmi", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8")
FLAGS += ("asimd", "asimddp", "i8mm", "sve")
VARIABLES = ("SKIVFPQ_SIMD", "SKIVFPQ_KERNELS", "FAISS_SIMD_LEVEL", "OPENBLAS_CORETYPE", "OMP_NUM_THREADS")
VARIABLES += ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND")
PACKAGES = ("skivfpq", "numpy", "scipy", "scikit-learn", "scikit-learn-intelex", "faiss-cpu", "superkmeans")
PACKAGES += ("nanopq", "threadpoolctl", "hnswlib", "usearch", "scann", "scalable-vs", "pynndescent")


@dataclass
class Record:
    """The runs of one peer."""

    peer: str
    first: dict | None = None  # phases of the run before the rounds: it warms up and is checked
    rounds: list = field(default_factory=list)  # phases of each
    result: Any = None  # of the last run
    failure: str = ""
    warnings: list = field(default_factory=list)  # distinct ones

    def seconds(self, phase=None):
        """Seconds of each round, of one phase or in all; of the first run if there was no round."""
        runs = self.rounds or [self.first]
        return [sum(cost["seconds"] for name, cost in run.items() if phase in (None, name)) for run in runs]

    def cores(self):
        """Processor time by elapsed time, of all runs kept."""
        costs = [cost for run in self.rounds or [self.first] for cost in run.values()]
        return sum(cost["cpu_seconds"] for cost in costs) / sum(cost["seconds"] for cost in costs)

    def describe(self):
        """Everything but the result."""
        timings = {"first": self.first, "rounds": self.rounds}
        return {"peer": self.peer, **timings, "failure": self.failure, "warnings": self.warnings}


class Stopwatch:
    """``with stopwatch("fit"): ...`` keeps the elapsed and the processor time of each phase."""

    def __init__(self):
        self.phases = {}

    @contextmanager
    def __call__(self, phase):
        """Time what is done in it."""
        elapsed, processor = perf_counter(), process_time()
        yield
        costs = perf_counter() - elapsed, process_time() - processor
        self.phases[phase] = dict(zip(("seconds", "cpu_seconds"), costs))


def say(message):
    """Progress, apart from the tables."""
    print(message, file=sys.stderr, flush=True)


def run_once(record, runner, number):
    """Phases of one run; a failure is kept in the record, and None returned."""
    record.result = None
    gc.collect()
    sleep(PAUSE)
    stopwatch = Stopwatch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            record.result = runner(stopwatch, number)
        except Exception as error:
            record.failure = f"{type(error).__name__}: {error}"
            say(f"  {record.peer} failed: {record.failure}")
            return None
    messages = {f"{one.category.__name__}: {one.message}" for one in caught}
    record.warnings = sorted({*record.warnings, *messages})
    return stopwatch.phases


def first_runs(runners):
    """A record of each runner with one run, which loads what there is to load and can be checked.

    A runner is called with a stopwatch and the number of the run, 0 for this one.
    """
    records = {name: Record(name) for name in runners}
    for name, runner in runners.items():
        records[name].first = run_once(records[name], runner, 0)
    return records


def run_rounds(runners, records, repeats, *, slow=np.inf, budget=np.inf):
    """Rounds A B C A B C; none for failed and slow peers, no more once the budget (seconds) is spent."""
    start = perf_counter()
    for number in range(1, repeats + 1):
        for name, runner in runners.items():
            record = records[name]
            if record.failure or sum(record.seconds()[-1:]) > slow:
                continue
            phases = run_once(record, runner, number)
            if phases is not None:
                record.rounds.append(phases)
        if perf_counter() - start > budget:
            return


def spread(seconds):
    """Median, minimum, maximum and number of timings."""
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds), "n": len(seconds)}


def ratio(peer_seconds, our_seconds):
    """How many times the peer's median is ours: above 1, ours is faster."""
    return median(peer_seconds) / median(our_seconds)


def sgemm_gflops(size=2048, repeats=7):
    """Best rate of a float32 matrix product, with the threads that BLAS is limited to."""
    a, b = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    out = np.empty_like(a)
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        np.matmul(a, b, out=out)
        seconds.append(perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e9


def lloyd_gflops(shape, n_clusters, n_iter, seconds):
    """Rate of Lloyd iterations as if every distance were computed; the labels at the end are one more."""
    return 2 * shape[0] * shape[1] * n_clusters * (n_iter + 1) / seconds / 1e9


def machine():
    """Processor, system and what the libraries make of them; no names of hosts, no paths."""
    model, flags = processor(Path("/proc/cpuinfo"))
    return {
        "cpu": model,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES if package_version(name)},
        "skivfpq": skivfpq_facts(),
        "faiss_simd": faiss_simd(),
        "thread_pools": [
            {key: pool.get(key) for key in ("prefix", "version", "architecture", "num_threads")}
            for pool in threadpool_info()
        ],
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def processor(cpuinfo):
    """Model and flags, from /proc/cpuinfo where there is one."""
    try:
        lines = [line.partition(":") for line in cpuinfo.read_text().splitlines()]
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    model = facts.get("model name") or platform.processor() or "unknown"
    return model, set((facts.get("flags") or facts.get("Features") or "").split())


def usable_cores():
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def package_version(name):
    """Version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def skivfpq_facts():
    """What skivfpq.show_versions prints."""
    import skivfpq

    with redirect_stdout(io.StringIO()) as printed:
        skivfpq.show_versions()
    lines = (line.partition(": ") for line in printed.getvalue().splitlines())
    return {name: fact for name, _, fact in lines}


def faiss_simd():
    """Instruction set that faiss uses, where it is loaded and says so."""
    config = getattr(sys.modules.get("faiss"), "SIMDConfig", None)
    return config.get_level_name() if hasattr(config, "get_level_name") else None

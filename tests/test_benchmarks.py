"""The benchmark runner: its readers, tables, checks, and each command on a few rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
ROWS = np.arange(12).reshape(4, 3)


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def vecs(rows, dtype):
    """The bytes of a .fvecs file and its kin."""
    return b"".join(np.int32(len(row)).tobytes() + row.astype(dtype).tobytes() for row in rows)


def write(path, rows):
    if path.suffix == ".npz":
        np.savez(path, ids=np.arange(4), vectors=rows, more=rows + 1)
    elif path.suffix in (".hdf5", ".h5"):
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            file["train"], file["test"] = rows, rows[:1]
    elif path.suffix == ".npy":
        np.save(path, rows)
    else:
        path.write_bytes(vecs(rows, {".fvecs": "<f4", ".bvecs": "u1", ".ivecs": "<i4"}[path.suffix]))


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".fvecs", ".bvecs", ".ivecs", ".hdf5", ".h5"])
def test_files_come_back_as_float32(tmp_path, suffix):
    from data import load

    path = tmp_path / f"some{suffix}"
    write(path, ROWS.astype(np.float32 if suffix == ".fvecs" else np.int32))
    data = load(path)
    assert_array_equal(data.X, ROWS)
    assert data.X.dtype == np.float32
    assert data.X.flags.c_contiguous
    assert data.X.flags.writeable
    assert data.name == path.name


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i1", "u1", "i2", "u2", "i4", "i8", "u8"])
def test_every_number_is_read_from_npy(tmp_path, dtype):
    from data import load

    np.save(tmp_path / "a.npy", np.asfortranarray(ROWS.astype(dtype)))
    data = load(tmp_path / "a.npy")
    assert_array_equal(data.X, ROWS)
    assert data.X.flags.c_contiguous


def test_some_rows_are_drawn_without_repetition(tmp_path):
    from data import load

    np.save(tmp_path / "a.npy", np.arange(200.0).reshape(100, 2))
    drawn = load(tmp_path / "a.npy", n_rows=30).X
    assert len(np.unique(drawn[:, 0])) == 30
    assert_array_equal(drawn, load(tmp_path / "a.npy", n_rows=30).X)


def test_more_rows_are_spread_like_neighbours(tmp_path):
    from data import load

    np.save(tmp_path / "a.npy", np.arange(200.0).reshape(100, 2))
    grown = load(tmp_path / "a.npy", n_rows=1000)
    assert grown.name == "a.npy, with rows near others"
    assert grown.X.shape == (1000, 2)
    assert np.isin(np.arange(0, 200, 2), grown.X[:, 0]).all()
    assert len(np.unique(grown.X[:, 0])) > 900
    assert_allclose(grown.X[:, 1] - grown.X[:, 0], 1, rtol=1e-4, atol=1e-4)  # all of them on the line
    nearest = np.abs(grown.X[:, :1] - np.arange(0, 200, 2)).min(axis=1)
    assert nearest.max() < 40


MALFORMED = {
    "no rows": ("a.fvecs", b"", "too few for a row"),
    "cut short": ("a.fvecs", vecs(ROWS, "<f4")[:-1], "is it cut short"),
    "another length": ("a.fvecs", vecs(ROWS, "<f4")[:16] + vecs(ROWS[:, :2], "<f4")[:12] + b"1234", "row 1"),
    "no length": ("a.bvecs", b"\xff\xff\xff\xff" + bytes(8), "claims -1 values"),
    "text as vecs": ("a.ivecs", b"hello, these are no vectors", "claims"),
    "text as npy": ("a.npy", b"hello", "cannot be read as .npy"),
    "empty npy": ("a.npy", b"", "cannot be read as .npy"),
    "text as npz": ("a.npz", b"hello", "cannot be read as .npz"),
    "unknown": ("a.csv", b"1,2", "files may end in .npy"),
}


def test_descriptors_of_the_photographs():
    from data import describe_pixels, load

    data = load("descriptors", n_rows=2000)
    assert data.X.shape == (2000, 128)
    assert data.X.dtype == np.float32
    assert data.X.min() == 0
    assert 150 < data.X.max() <= 255
    assert_array_equal(data.X, np.rint(data.X))
    assert np.all(np.abs(np.linalg.norm(data.X, axis=1) - 512) < 60)
    flat = np.zeros((64, 64))
    flat[:, 32:] = 100  # an edge: all gradients point to the right
    cells = describe_pixels(flat, 1.0, 4).reshape(-1, 16, 8)
    assert cells.sum(axis=(0, 1)).argmax() == 2
    assert cells[:, :, 2].sum() > 0.999 * cells.sum()


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_in_words(tmp_path, case):
    from data import DataError, load

    name, content, message = MALFORMED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(3.0), "expected a matrix"),
        (np.empty((0, 3)), "expected a matrix"),
        (np.array([["a"]]), "expected a matrix"),
        (np.ones((2, 2), dtype=complex), "expected a matrix"),
        (np.array([[1, 2], [np.nan, 3]]), "row 1 is not finite"),
        (np.array([[1e300, 2]]), "row 0 is not finite in float32"),
        (np.array([[None, 2]]), "cannot be read as .npy"),
    ],
)
def test_arrays_that_are_no_vectors_are_refused(tmp_path, array, message):
    from data import DataError, load

    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.npy")


def test_a_file_without_a_matrix_is_refused(tmp_path):
    from data import DataError, load

    np.savez(tmp_path / "a.npz", ids=np.arange(3))
    with pytest.raises(DataError, match=r"no matrix among its arrays \(ids\)"):
        load(tmp_path / "a.npz")
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "b.npz")


def test_hdf5_without_train_is_refused(tmp_path):
    from data import DataError, load

    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["test"] = ROWS
    with pytest.raises(DataError, match='no dataset "train", only test'):
        load(tmp_path / "a.hdf5")
    (tmp_path / "b.hdf5").write_bytes(b"hello")
    with pytest.raises(DataError, match="cannot be read as .hdf5"):
        load(tmp_path / "b.hdf5")


def test_missing_h5py_is_named(tmp_path, monkeypatch):
    from data import DataError, load

    (tmp_path / "a.hdf5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        load(tmp_path / "a.hdf5")


def test_distinct_rows(rng):
    from data import DataError, distinct_rows

    X = np.repeat(rng.standard_normal((20, 3), dtype=np.float32), 50, axis=0)
    rows = distinct_rows(X, 20, seed=0)
    assert len(np.unique(rows, axis=0)) == 20
    assert_array_equal(rows, distinct_rows(X, 20, seed=0))
    with pytest.raises(DataError, match="21 clusters need as many distinct rows; the data have 20"):
        distinct_rows(X, 21, seed=0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0012345, "0.00123"),
        (1.5, "1.50"),
        (12.345, "12.3"),
        (123.4, "123"),
        (12345.6, "12,300"),
        (0, "0.00"),
        (9.999, "10.0"),
        (None, "-"),
        (float("nan"), "-"),
    ],
)
def test_numbers(value, text):
    from report import number

    assert number(value) == text


def test_tables():
    from report import table

    header, rows = ("peer", "ratio"), [("a", "1.00"), ("longer", "12.34")]
    plain = ["peer    ratio", "------  -----", "a        1.00", "longer  12.34"]
    assert table(header, rows) == plain
    marked = ["| peer   | ratio |", "| ------ | ----: |", "| a      |  1.00 |", "| longer | 12.34 |"]
    assert table(header, rows, markdown=True) == marked


def test_times_and_ratios():
    from measure import Record, lloyd_gflops, ratio, spread

    record = Record("a", first={"fit": {"seconds": 9.0, "cpu_seconds": 18.0}})
    assert record.seconds() == [9.0]
    one = {"seconds": 1.0, "cpu_seconds": 1.0}
    record.rounds = [{"fit": {"seconds": s, "cpu_seconds": s}, "transform": one} for s in (1.0, 5.0, 3.0)]
    assert record.seconds("fit") == [1.0, 5.0, 3.0]
    assert record.seconds() == [2.0, 6.0, 4.0]
    assert record.cores() == 1
    assert spread(record.seconds()) == {"median": 4.0, "min": 2.0, "max": 6.0, "n": 3}
    assert ratio([6.0, 2.0, 4.0], [1.0, 2.0, 9.0]) == 2
    assert lloyd_gflops((1000, 10), 50, 9, 2.0) == 2 * 1000 * 10 * 50 * 10 / 2e9


def test_peers_take_turns_and_failures_are_kept():
    from measure import first_runs, run_rounds

    turns = []

    def runner(name, seconds=0.0):
        def run(stopwatch, number):
            turns.append((name, number))
            if name == "broken":
                raise ValueError("on purpose")
            with stopwatch("fit"):
                pass
            stopwatch.phases["fit"]["seconds"] = seconds
            return name

        return run

    runners = {"a": runner("a"), "broken": runner("broken"), "slow": runner("slow", 99.0), "b": runner("b")}
    records = first_runs(runners)
    run_rounds(runners, records, 2, slow=10)
    first = [("a", 0), ("broken", 0), ("slow", 0), ("b", 0)]
    assert turns == [*first, ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert records["broken"].failure == "ValueError: on purpose"
    assert records["slow"].seconds() == [99.0]
    assert records["b"].result == "b"


def test_wrong_labels_and_inertia_are_seen(rng):
    from kmeans import failed_checks, inertia, wrong_labels
    from peers import OURS, Clustering

    X = rng.standard_normal((500, 4), dtype=np.float32)
    centers = X[:10]
    labels = np.square(X[:, None].astype(float) - centers).sum(axis=2).argmin(axis=1)
    right = Clustering(centers, labels, 1)
    assert wrong_labels(X, right) == 0
    assert inertia(X, right) == pytest.approx(np.square(X.astype(float) - centers[labels]).sum())
    wrong = Clustering(centers, (labels + (np.arange(500) < 7)) % 10, 1)
    assert wrong_labels(X, wrong) == 7
    assert failed_checks({"wrong_labels": 0}, {OURS: 1.0, "other": 1.0}) == []
    assert len(failed_checks({"wrong_labels": 7}, {OURS: 1.1, "other": 1.0})) == 2


def test_wrong_codes_are_seen(rng):
    from quantize import squared_error, subspaces, wrong_codes

    from skivfpq import ProductQuantizer

    X = rng.standard_normal((500, 6), dtype=np.float32)
    quantizer = ProductQuantizer(n_subspaces=3, n_bits=3, random_state=0).fit(X)
    codes = quantizer.transform(X)
    assert wrong_codes(X, quantizer, codes) == 0
    assert squared_error(X, quantizer, codes) == pytest.approx(-quantizer.score(X))
    codes[:5, 1] ^= 1
    assert wrong_codes(X, quantizer, codes) == 5
    assert [subspaces(n, 8) for n in (192, 100, 7, 128, 17)] == [24, 10, 1, 16, 1]


def test_the_cheapest_parameter_is_found():
    from pareto import cheapest, sweep

    assert cheapest({1: 0.5, 4: 0.9, 8: 0.95}, 0.9) == 4
    assert cheapest({1: 0.5}, 0.9) is None
    asked = []

    def recall_of(parameter):
        asked.append(parameter)
        return 1 - 0.5 / parameter

    recalls = sweep(recall_of, 1, 512, [0.9, 0.99])
    assert asked[:9] == [1, 2, 4, 8, 16, 32, 64, 128, 6]  # the first above .995 ends the doubling
    assert len(asked) == len(set(asked)) == len(recalls)
    assert (cheapest(recalls, 0.9), cheapest(recalls, 0.99)) == (5, 50)
    assert max(sweep(lambda parameter: 0.5, 3, 20, [0.9])) == 20  # a target out of reach ends at the cap
    assert max(sweep(lambda parameter: 1 - 0.5 / parameter, 10, 10_000, [0.999])) == 640
    assert list(sweep(lambda parameter: 1.0, 5, 3, [0.9])) == [3]


def test_a_large_parameter_is_found_to_one_part_in_64():
    from pareto import cheapest, sweep

    recalls = sweep(lambda parameter: float(parameter >= 1500), 1, 4096, [0.9])
    assert 1500 <= cheapest(recalls, 0.9) <= 1500 * (1 + 1 / 64) + 1
    assert len(recalls) < 20


def test_what_is_beaten_is_left_out():
    from pareto import front, undominated

    assert undominated([(1, 2), (2, 1), (2, 2), (3, 3), (1, 2)]) == [0, 1, 4]
    assert undominated([(1.0, 1.0), (1.2, 1.2), (1.3, 1.3)], slack=1.25) == [0, 1]
    assert undominated([]) == []
    assert front([(0.9, 100), (0.8, 50), (0.95, 10), (0.7, 300), (0.9, 90)]) == [
        (0.7, 300),
        (0.9, 100),
        (0.95, 10),
    ]


@pytest.fixture
def problem(rng):
    """40 queries among 400 rows that all come twice."""
    from data import Data
    from search import draw_queries

    X = np.repeat(rng.standard_normal((220, 6), dtype=np.float32), 2, axis=0)
    return draw_queries(
        SimpleNamespace(queries=40, n_neighbors=5, threads=1, lists=None), Data("rows", X, "float32")
    )


def test_numbers_of_lists(problem):
    """The power of two near 4 sqrt(400), half and twice as many, or those asked for; 39 rows at least in each."""
    from dataclasses import replace

    from search_peers import flat_faiss, list_counts

    assert list_counts(problem) == [5, 10]
    wide = replace(problem, X=np.zeros((90_000, 2), dtype=np.float32))
    assert list_counts(wide) == [512, 1024, 2048]
    asked = replace(wide, lists=[7, 3, 10_000])
    assert list_counts(asked) == [3, 7, 90_000 // 39]
    assert [index.name for index in flat_faiss(asked)] == ["IVF3,Flat", "IVF7,Flat", "IVF2307,Flat"]


def test_recall_counts_ties_and_nothing_twice(problem):
    from search import recall

    assert problem.X.shape == (400, 6)
    distances = np.square(problem.Q[:, None].astype(float) - problem.X).sum(axis=2)
    nearest = distances.argsort(axis=1, kind="stable")[:, :5]
    assert recall(problem, nearest) == 1
    last_first = 399 - distances[:, ::-1].argsort(axis=1, kind="stable")[:, :5]
    assert np.any(last_first != nearest)
    assert recall(problem, last_first.astype(np.uint64)) == 1
    assert recall(problem, np.repeat(nearest[:, :1], 5, axis=1)) == pytest.approx(0.2)
    nearest[:, 3:] = [-1, 2**32 - 1]  # how libraries say that there is none
    assert recall(problem, nearest) == pytest.approx(0.6)
    assert recall(problem, distances.argsort(axis=1)[:, -5:]) == 0


def test_one_by_one_alone(problem):
    from measure import Stopwatch
    from search import BATCH, SINGLES, Configuration, timed_search

    asked = []
    index = SimpleNamespace(set=lambda *values: asked.append(values), limit=asked.append)
    index.batch = index.one = lambda Q, k: asked.append((Q.shape, k))
    configuration = Configuration("other", index, "second", 1.0, None)
    stopwatch = Stopwatch()
    timed_search(problem, configuration, 3, (SINGLES,), stopwatch, 1)
    assert asked == [(3, "second"), 1] + 40 * [((1, 6), 5)]
    timed_search(problem, configuration, 3, (BATCH,), stopwatch, 1)
    assert asked[-3:] == [(3, "second"), problem.threads, ((40, 6), 5)]
    assert list(stopwatch.phases) == [SINGLES, BATCH]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"queries": 96}, "--queries 96 leaves too few of the 100 rows"),
        ({"recalls": [0.9, 1.5]}, "--recalls are above 0 and at most 1"),
        ({"queries": 20, "tasks": ["changes"]}, "--queries 20: the task changes adds them"),
        ({"plot": "a.png", "tasks": ["pq"]}, "--plot draws the task flat"),
    ],
)
def test_what_search_cannot_do_is_refused_first(option, message):
    from data import DataError
    from search import check_arguments

    fine = {"queries": 50, "n_neighbors": 5, "recalls": [0.9, 1], "plot": None, "tasks": ["flat"]}
    check_arguments(SimpleNamespace(**fine), 100)
    with pytest.raises(DataError, match=message):
        check_arguments(SimpleNamespace(**{**fine, **option}), 100)


def test_wrong_neighbors_are_seen(problem):
    from search import wrong_neighbors

    assert wrong_neighbors(problem) == []
    problem.indices[7, 2] = problem.indices[7, 1]
    farthest = np.square(problem.Q[9].astype(float) - problem.X).sum(axis=1).argmax()
    problem.indices[9, 4] = farthest
    assert wrong_neighbors(problem) == ["exact_neighbors: 2 of 40 queries do not get their nearest rows"]


def test_peers_on_request_need_a_name():
    from peers import OURS, Peer, choose

    able = {"indexes": {"flat": list}}
    peers = [
        Peer(OURS, "skivfpq", "skivfpq", "", **able),
        Peer("rare", "x", "json", "", **able, on_request=True),
    ]
    assert [peer.name for peer in choose(("indexes",), None, peers)[0]] == [OURS]
    assert [peer.name for peer in choose(("indexes",), ["rare"], peers)[0]] == [OURS, "rare"]


def test_missing_matplotlib_is_named(monkeypatch):
    import plot
    from data import DataError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DataError, match="pip install matplotlib"):
        plot.check()


def test_fronts_have_ours_last(tmp_path):
    import plot
    from search import BATCH, SINGLES, Configuration

    configurations = [Configuration(peer, None, None, 1.0, None) for peer in ("skivfpq", "other", "other")]
    for one, seconds in zip(configurations, (0.1, 0.2, 0.5)):
        one.points = {p: {"recall": 0.5 + p / 10, BATCH: seconds * p, SINGLES: seconds} for p in (1, 2)}
    assert plot.fronts(configurations, BATCH) == {
        "other": [(0.6, 5.0), (0.7, 2.5)],
        "skivfpq": [(0.6, 10.0), (0.7, 5.0)],
    }
    pytest.importorskip("matplotlib")
    plot.draw(tmp_path / "a.png", configurations, (BATCH, SINGLES), "some data")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_peers_are_refused():
    from peers import choose

    with pytest.raises(ValueError, match=r"no peer called nobody; there are scikit-learn, .*nanopq"):
        choose(("lloyd", "quantizer"), ["nobody"])


def test_processor_without_proc(tmp_path):
    from measure import processor

    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2\n\n")
    assert processor(tmp_path / "cpuinfo") == ("Some CPU", {"fpu", "avx2"})
    assert processor(tmp_path / "nothing")[1] == set()


def run(*arguments, code=0):
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture
def vectors(tmp_path, rng):
    """A file of 600 rows."""
    np.save(tmp_path / "vectors.npy", rng.standard_normal((600, 16)).astype(np.float32))
    return tmp_path / "vectors.npy"


def test_kmeans_end_to_end(tmp_path, vectors):
    options = "--clusters 5 --iterations 2 --repeats 2 --seeds 2 --grid-rows 200 --grid-features 2 --grid-clusters 3"
    out = tmp_path / "out.json"
    printed = run("kmeans", "--data", vectors, "--json", out, "--peers", "scikit-learn", *options.split())
    document = json.loads(out.read_text())
    assert [section["task"] for section in document["sections"]] == ["lloyd", "default", "small", "predict"]
    assert set(document["sections"][3]["records"][0]["rounds"][0]) == {"1", "10", "100", "1000", "10000"}
    assert document["data"] == {"name": "vectors.npy", "rows": 600, "features": 16, "file_dtype": "float32"}
    assert document["failed_checks"] == []
    assert document["sgemm_gflops"] > 0
    assert str(tmp_path) not in out.read_text()
    ours, sklearn = document["sections"][0]["records"]
    assert (ours["peer"], sklearn["peer"]) == ("skivfpq", "scikit-learn")
    assert len(ours["rounds"]) == len(sklearn["rounds"]) == 2
    assert ours["wrong_labels"] == 0
    assert ours["ratio"] == 1
    assert [outcome["seed"] for outcome in document["sections"][1]["records"][0]["outcomes"]] == [0, 1]
    assert [cell["data"] for cell in document["sections"][2]["cells"]] == ["digits", "blobs"]
    assert "k-means, 5 clusters, 2 iterations from the same centers" in printed.stdout


def test_quantize_end_to_end_with_whatever_is_installed(tmp_path, vectors):
    out = tmp_path / "out.json"
    options = "--settings 4:4 8:8 --iterations 2 --repeats 1 --threads 1 --markdown"
    printed = run("quantize", "--data", vectors, "--rows", 500, "--json", out, *options.split())
    sections = json.loads(out.read_text())["sections"]
    assert [(one["task"], one["n_bits"], one["n_subspaces"]) for one in sections] == [
        ("pq", 4, 4),
        ("pq", 8, 2),
        ("opq", 4, 4),
        ("opq", 8, 2),
    ]
    for section in sections:
        for record in section["records"]:
            assert record["failure"] == ""
            assert set(record["rounds"][0]) == {"fit", "transform"}
            assert 0 < record["of_variance"] < 1
    assert "### PQ, 4 codes of 4 bits, 500 training rows, 2 iterations" in printed.stdout
    assert "| skivfpq" in printed.stdout


def test_search_end_to_end(tmp_path, rng):
    np.save(tmp_path / "vectors.npy", rng.standard_normal((600, 8)).astype(np.float32))
    out = tmp_path / "out.json"
    options = "--peers none --queries 30 --n-neighbors 5 --recalls .8 1 --tasks flat pq exact changes lists --repeats 1"
    printed = run("search", "--data", tmp_path / "vectors.npy", "--json", out, *options.split())
    document = json.loads(out.read_text())
    assert document["failed_checks"] == []
    assert "iterations" not in document["arguments"]
    assert str(tmp_path) not in out.read_text()
    tasks = [section["task"] for section in document["sections"]]
    assert tasks == ["indexes", "flat", "flat", "pq", "pq", "exact", "changes", "lists"]
    indexes, low, high, pq, _, exact, changes, lists = document["sections"]
    assert [one["configuration"] for one in indexes["configurations"]] == [
        f"n_lists={n_lists}, probing={probing}"
        for n_lists in ("auto", 7, 14)
        for probing in ("fixed", "adaptive")
    ]
    assert all(one["points"][0]["parameter"] == 1 for one in indexes["configurations"])
    for section, target in ((low, 0.8), (high, 1)):
        assert section["target"] == target
        for record in section["records"]:
            assert record["recall"] >= target
            assert len(record["rounds"]) == 1
            assert record["build_seconds"] > 0
            assert record["batch"]["n"] == record["one by one"]["n"] == 1
        for phase in ("batch", "one by one"):
            assert min(record[phase]["ratio"] for record in section["records"]) == 1
    assert pq["records"][0]["setting"] == "n_probes=4"
    assert [record["recall"] for record in exact["records"]] == [1, 1]
    assert set(changes["records"][0]["rounds"][0]) == {"a row", "many rows", "removing them"}
    assert changes["records"][0]["a row"]["ratio"] == 1
    assert [one["configuration"] for one in lists["configurations"]] == [
        f"n_lists={n_lists}{groups}" for n_lists in (7, 14) for groups in ("", ", n_groups=auto")
    ]
    for one in lists["configurations"]:
        few, all_found = one["targets"]
        assert few["rows"] <= all_found["rows"] <= 570
        assert few["n_probes"] <= all_found["n_probes"]
    assert "10 rows added to 570 and removed, ms" in printed.stdout
    assert "indexes, 570 rows, 30 queries" in printed.stdout
    assert "recall@5 of 0.8" in printed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kmeans", "--clusters", "601"], "--clusters 601 is more than the 600 rows"),
        (["kmeans", "--repeats", "0"], "--repeats must be above 0"),
        (["kmeans", "--peers", "nobody"], "no peer called nobody"),
        (["quantize", "--settings", "9:8"], "expected bits (1 to 8)"),
        (["quantize", "--rows", "256"], "256 codewords need more than the 256 training rows"),
        (["quantize", "--json", "/nonexistent/out.json"], "there is no such folder"),
    ],
)
def test_errors_are_for_people(vectors, arguments, message):
    command, *options = arguments
    task = {"kmeans": "lloyd", "quantize": "pq"}[command]
    result = run(command, "--data", vectors, "--tasks", task, *options, code=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_default_data_are_the_patches_of_the_quickstart():
    from data import load

    data = load(n_rows=100)
    assert data.X.shape == (100, 192)
    assert data.name == "patches of the sample photographs"

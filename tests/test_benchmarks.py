"""The benchmark runner: its readers, tables, checks, and each command on a few rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

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
    assert len(load(tmp_path / "a.npy", n_rows=1000).X) == 100


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
    assert [section["task"] for section in document["sections"]] == ["lloyd", "default", "small"]
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

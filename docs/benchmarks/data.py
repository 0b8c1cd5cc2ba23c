"""What the benchmarks run on: vector files, patches and descriptors of photographs, point clouds."""

import sys
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from scipy.ndimage import convolve1d, gaussian_filter
from sklearn.datasets import load_sample_images, make_blobs
from sklearn.preprocessing import normalize

EXAMPLES = Path(__file__).parents[2] / "examples"
DESCRIPTORS = "descriptors"  # in place of a file's name
LONGEST_ROW = 1_000_000  # values; a .fvecs file that claims more is none


NEIGHBORS = 10  # whose spread new rows have
GROWN = 65536  # rows at a time


class DataError(ValueError):
    """The data cannot be used; the message is for the person who asked."""


@dataclass(frozen=True, eq=False)
class Data:
    """Rows to measure on, and what they were made from."""

    name: str  # of the file, without folders
    X: np.ndarray  # (n_samples, n_features) float32
    dtype: str  # of the file

    def is_half(self):
        """Whether every value is a float16, as in the file; rows near others (``grown``) are in none."""
        with np.errstate(over="ignore"):
            return self.dtype == "float16" and np.array_equal(self.X.astype(np.float16), self.X)

    def describe(self):
        """Facts for the report."""
        rows, features = self.X.shape
        return {"name": self.name, "rows": rows, "features": features, "file_dtype": self.dtype}


def load(path=None, n_rows=None):
    """Rows of a file, or of the sample photographs, as float32; n_rows of them, or grown to as many."""
    if path is None:
        source, name = sample_patches(), "patches of the sample photographs"
    elif str(path) == DESCRIPTORS:
        source, name = sample_descriptors(), "descriptors of the sample photographs"
    else:
        source, name = read(path), Path(path).name
    if n_rows is not None and n_rows < len(source):
        source = source[np.sort(np.random.default_rng(0).choice(len(source), n_rows, replace=False))]
    X = as_float32(source, name)
    if n_rows is not None and n_rows > len(X):
        X, name = grown(X, n_rows), f"{name}, with rows near others"
    return Data(name, X, str(source.dtype))


def grown(X, n_rows):
    """X and as many more rows as are missing, each near a row, spread like its neighbours.

    The density of the data rises with their number; their clusters, and their dimension near a row (up to
    that of its neighbours), stay.
    """
    from skivfpq import IVFIndex

    rng = np.random.default_rng(0)
    neighbors = IVFIndex(n_probes=8, n_neighbors=NEIGHBORS, random_state=0).fit(X).kneighbors()[1]
    more = np.empty((n_rows, X.shape[1]), dtype=np.float32)
    more[: len(X)] = X
    for start in range(len(X), n_rows, GROWN):
        block = slice(start, min(start + GROWN, n_rows))
        rows = rng.integers(len(X), size=block.stop - start)
        weights = rng.standard_normal((len(rows), NEIGHBORS), dtype=np.float32) / np.sqrt(NEIGHBORS)
        more[block] = X[rows]
        for weight, others in zip(weights.T, neighbors[rows].T):
            more[block] += weight[:, None] * (X[others] - X[rows])
    return more[rng.permutation(n_rows)]


def sample_patches():
    """The 8 x 8 patches of the quickstart, in its order, (133140, 192) float32."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from quickstart import image_patches
    except ImportError as error:
        raise DataError(
            f"The default data need examples/ of the repository ({error}); or give --data."
        ) from None
    finally:
        sys.path.remove(str(EXAMPLES))
    return np.random.default_rng(0).permutation(image_patches())


def sample_descriptors(scales=((1.0, 4), (1.6, 5)), n_rows=150_000):
    """SIFT descriptors (Lowe 2004) around every second pixel of the photographs, (n_rows, 128) float32.

    Gradients by 8 directions in 4 x 4 cells, as whole numbers up to 255. scales: of the blur, and of a cell.
    """
    photographs = [photograph.mean(axis=2) for photograph in load_sample_images().images]
    descriptors = np.concatenate(
        [describe_pixels(photograph, *scale) for photograph in photographs for scale in scales]
    )
    return np.random.default_rng(0).permutation(descriptors)[:n_rows]


def describe_pixels(photograph, blur, cell):
    """Descriptors (n_pixels, 128) of all but the flattest tenth of the pixels."""
    down, right = np.gradient(gaussian_filter(photograph, blur))
    angle = np.arctan2(right, down) % (2 * np.pi) * 8 / (2 * np.pi)
    nearest = np.abs(np.arange(8) - angle[:, :, None])
    shares = np.maximum(1 - np.minimum(nearest, 8 - nearest), 0)  # of the two directions beside it
    histograms = np.hypot(down, right)[:, :, None] * shares
    for axis in (0, 1):
        histograms = convolve1d(histograms, np.bartlett(2 * cell + 1), axis=axis)
    height, width = photograph.shape
    rows, columns = np.arange(12, height - 12, 2), np.arange(12, width - 12, 2)
    offsets = ((np.arange(4) - 1.5) * cell).astype(int)
    cells = [histograms[np.ix_(rows + y, columns + x)] for y in offsets for x in offsets]
    descriptors = np.stack(cells, axis=2).reshape(-1, 128)
    lengths = np.linalg.norm(descriptors, axis=1)
    descriptors = descriptors[lengths > np.quantile(lengths, 0.1)]
    descriptors = np.minimum(normalize(descriptors), 0.2)  # Lowe's limit for edges
    return np.rint(np.minimum(512 * normalize(descriptors), 255)).astype(np.float32)


def read(path):
    """The matrix in a file, in the file's dtype, where possible without reading all of it."""
    path = Path(path)
    if path.suffix not in READERS:
        raise DataError(f"{path.name}: files may end in {', '.join(READERS)}.")
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        matrix = READERS[path.suffix](path)
    except DataError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path.name}: cannot be read as {path.suffix} ({error}).") from error
    if matrix.ndim != 2 or matrix.dtype.kind not in "fiu" or 0 in matrix.shape:
        raise DataError(
            f"{path.name}: expected a matrix of numbers with a row for each vector, "
            f"got shape {matrix.shape} of {matrix.dtype}."
        )
    return matrix


def read_npy(path):
    """The array of a .npy file, mapped."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


def read_npz(path):
    """The first matrix of a .npz file."""
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            if arrays[name].ndim == 2:
                return arrays[name]
        raise DataError(f"{path.name}: no matrix among its arrays ({', '.join(arrays.files) or 'none'}).")


def read_vecs(path, dtype):
    """Rows of a .fvecs, .bvecs or .ivecs file: before each, its length as int32."""
    dtype = np.dtype(dtype)
    size = path.stat().st_size
    if size < 4:
        raise DataError(f"{path.name}: has {size} bytes, too few for a row.")
    data = np.memmap(path, np.uint8, mode="r")
    length = int(data[:4].view("<i4")[0])
    if not 0 < length <= LONGEST_ROW:
        raise DataError(f"{path.name}: its first row claims {length} values; is it {path.suffix}?")
    width = 4 + length * dtype.itemsize
    if size % width:
        raise DataError(
            f"{path.name}: {size} bytes are no whole number of rows of {length} {dtype.name} values "
            f"({width} bytes each); is it cut short?"
        )
    rows = data.reshape(-1, width)
    lengths = rows[:, :4].copy().view("<i4")[:, 0]
    if np.any(lengths != length):
        odd = int(np.argmax(lengths != length))
        raise DataError(f"{path.name}: row 0 has {length} values, row {odd} claims {lengths[odd]}.")
    return rows[:, 4:].view(dtype)


def read_hdf5(path):
    """The dataset "train" of an ann-benchmarks file."""
    try:
        import h5py
    except ImportError:
        raise DataError(f"{path.name}: HDF5 files need h5py (pip install h5py).") from None
    with h5py.File(path, "r") as file:
        if not isinstance(file.get("train"), h5py.Dataset):
            raise DataError(f'{path.name}: has no dataset "train", only {", ".join(file) or "nothing"}.')
        return file["train"][()]


READERS = {
    ".npy": read_npy,
    ".npz": read_npz,
    ".fvecs": partial(read_vecs, dtype="<f4"),
    ".bvecs": partial(read_vecs, dtype="u1"),
    ".ivecs": partial(read_vecs, dtype="<i4"),
    ".hdf5": read_hdf5,
    ".h5": read_hdf5,
}


def as_float32(source, name):
    """A contiguous float32 copy, refused where not finite."""
    with np.errstate(over="ignore"):
        X = np.array(source, dtype=np.float32, order="C")
    finite = np.isfinite(X).all(axis=1)
    if not finite.all():
        raise DataError(f"{name}: row {int(np.argmin(finite))} is not finite in float32.")
    return X


def distinct_rows(X, n_rows, seed):
    """Random rows of X that differ from each other, (n_rows, n_features)."""
    order = np.random.default_rng(seed).permutation(len(X))
    pool = 2 * n_rows
    while True:
        candidates = X[order[:pool]]
        first = np.sort(np.unique(candidates, axis=0, return_index=True)[1])
        if len(first) >= n_rows:
            return np.ascontiguousarray(candidates[first[:n_rows]])
        if pool >= len(X):
            raise DataError(f"{n_rows} clusters need as many distinct rows; the data have {len(first)}.")
        pool *= 2


def sample_rows(X, n_rows):
    """X, or that many of its rows drawn without repetition."""
    if n_rows >= len(X):
        return X
    return X[np.sort(np.random.default_rng(0).choice(len(X), n_rows, replace=False))]


def blobs(n_rows, n_features, n_clusters, dtype):
    """Overlapping Gaussian clouds, as many as clusters are looked for."""
    X, _ = make_blobs(n_rows, n_features, centers=n_clusters, cluster_std=3.0, random_state=0)
    return X.astype(dtype)

"""Search 100,000 image patches: scaler, PCA and an IVF-PQ index in one Pipeline.

Cuts the two photographs that ship with scikit-learn into overlapping 8 x 8 patches, indexes them as
codes of 16 bytes, keeps them as float16 too for re-ranking, and compares with exact search.

    python examples/quickstart.py
"""

from time import perf_counter

import numpy as np
from photographs import photographs
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skivfpq import IVFIndex, ProductQuantizer, exact_neighbors, neighbors_recall


def image_patches(size=8, step=2):
    """All patches (n_patches, size * size * 3) of the sample photographs, a step apart."""
    patches = []
    for image in photographs():  # (427, 640, 3) uint8
        windows = np.lib.stride_tricks.sliding_window_view(image, (size, size, 3))
        patches.append(windows[::step, ::step].reshape(-1, size * size * 3))
    return np.concatenate(patches).astype(np.float32)


def main():
    """Build, search, compare."""
    patches = np.random.default_rng(0).permutation(image_patches())
    queries, patches = patches[:2000], patches[2000:]  # queries that the index has not seen
    print(f"{len(patches):,} patches of {patches.shape[1]} values")

    search = make_pipeline(
        StandardScaler(),
        PCA(n_components=64, random_state=0),
        IVFIndex(
            n_neighbors=10,
            fine_quantizer=ProductQuantizer(n_subspaces=16),
            refine_factor=8,
            vectors_dtype="float16",
            random_state=0,
        ),
    )
    start = perf_counter()
    search.fit(patches)
    print(f"build time          {perf_counter() - start:8.1f} s")

    index, reduce = search[-1], search[:-1]
    reduced = reduce.transform(queries)  # (2000, 64)
    start = perf_counter()
    _, found = index.kneighbors(reduced)
    print(f"queries per second  {len(queries) / (perf_counter() - start):8,.0f}")
    print(f"bytes per vector    {index.bytes_per_vector_:8.0f} of {patches.shape[1] * patches.itemsize}")

    _, true = exact_neighbors(reduced, reduce.transform(patches), n_neighbors=10)
    print(f"recall@10           {neighbors_recall(true, found):8.3f}")
    print(
        f"({index.n_probes_} of {index.n_lists_} lists probed for a target recall of {index.target_recall})"
    )


if __name__ == "__main__":
    main()

"""The peers of ``search``: for each task, a function that lists their indexes for a problem."""

import math

from indexes import (
    WIDEST,
    Faiss,
    FaissWithOurCodebooks,
    Hnswlib,
    Pynndescent,
    Scann,
    Skivfpq,
    SkivfpqAll,
    SkivfpqExact,
    SkivfpqLists,
    SvsIvf,
    SvsVamana,
    Usearch,
)
from peers import OURS, Peer
from quantize import subspaces

ROWS_PER_LIST = 39  # faiss warns below that
GROUPED = 4096  # lists, which groups may pay for


def list_counts(problem):
    """Numbers of inverted lists to try: those asked for, or ``list_count``, half and twice as many."""
    middle = list_count(problem)
    counts = problem.lists or (middle // 2, middle, 2 * middle)
    return sorted({fitting(len(problem.X), count) for count in counts})


def list_count(problem):
    """The power of two near 4 sqrt(rows), or fewer where rows are few."""
    n_rows = len(problem.X)
    return fitting(n_rows, 2 ** round(math.log2(4 * math.sqrt(n_rows))))


def fitting(n_rows, count):
    """That many lists, or as many as can be trained."""
    return max(1, min(count, n_rows // ROWS_PER_LIST))


def flat_skivfpq(problem):
    """The default, and the numbers of lists that the others get, many in groups too; both ways to probe.

    Vectors that the file has in float16 are kept so once more, which rounds nothing.
    """
    both = {"probing": ("fixed", "adaptive")}
    halves = [Skivfpq(list_counts(problem)[0], **both, dtype="float16")] if problem.is_half else []
    counts = list_counts(problem)
    grouped = [Skivfpq(count, **both, n_groups="auto") for count in counts if count >= GROUPED]
    return [Skivfpq(**both), *(Skivfpq(count, **both) for count in counts), *grouped, *halves]


def flat_faiss(problem):
    """IndexIVFFlat."""
    return [Faiss(f"IVF{count},Flat", "nprobe", cap=count) for count in list_counts(problem)]


def flat_fastscan(problem):
    """Codes of 4 bits for 4 features, scanned in registers, then exact distances."""
    codes = subspaces(problem.X.shape[1], 4)
    factors = {"second": "k_factor_rf", "variants": (4, 8, 16, 32)}
    return [
        Faiss(f"IVF{count},PQ{codes}x4fs,RFlat", "nprobe", cap=count, **factors)
        for count in list_counts(problem)
    ]


def pq_sizes(problem):
    """Lists, and codes of 8 bits for 8 features."""
    return list_count(problem), subspaces(problem.X.shape[1], 8)


def pq_faiss(problem):
    """IndexIVFPQ."""
    count, codes = pq_sizes(problem)
    return [Faiss(f"IVF{count},PQ{codes}x8", "nprobe", cap=count)]


def pq_fastscan(problem):
    """As many bytes in codes of 4 bits, scanned in registers."""
    count, codes = pq_sizes(problem)
    return [Faiss(f"IVF{count},PQ{2 * codes}x4fs", "nprobe", cap=count)]


def pq_skivfpq(problem):
    """IVFIndex over codes of 8 bits, and over as many bytes of codes of 4 bits."""
    count, codes = pq_sizes(problem)
    return [Skivfpq(count, codes), Skivfpq(count, 2 * codes, n_bits=4)]


SEARCH_PEERS = [
    Peer(
        OURS,
        "skivfpq",
        "skivfpq",
        "IVFIndex(n_lists, probing, n_jobs, random_state=0), kneighbors(Q, k, n_probes); exact_neighbors",
        indexes={
            "flat": flat_skivfpq,
            "pq": pq_skivfpq,
            "exact": lambda problem: [SkivfpqAll(), SkivfpqExact()],
            "changes": lambda problem: [Skivfpq(list_count(problem))],
            "lists": lambda problem: [
                SkivfpqLists(count, n_groups=n_groups)
                for count in list_counts(problem)
                for n_groups in (None, "auto")
            ],
        },
    ),
    Peer(
        "faiss",
        "faiss-cpu",
        "faiss",
        "IndexIVFFlat, IndexIVFPQ, IndexFlatL2; it chooses its instructions, FAISS_SIMD_LEVEL sets them",
        indexes={
            "flat": flat_faiss,
            "pq": pq_faiss,
            "exact": lambda problem: [Faiss("Flat")],
            "changes": lambda problem: [
                Faiss(f"IVF{list_count(problem)},Flat", "nprobe", cap=list_count(problem))
            ],
        },
    ),
    Peer(
        "faiss-fastscan",
        "faiss-cpu",
        "faiss",
        "IVF, PQ with 4 bits for 4 features (fast scan), refined by exact distances of k_factor * k rows",
        indexes={"flat": flat_fastscan, "pq": pq_fastscan},
    ),
    Peer(
        "faiss-same",
        "faiss-cpu",
        "faiss",
        "IndexIVFPQ with the lists and codebooks of skivfpq, whose rows it must find; its build is both",
        indexes={"pq": lambda problem: [FaissWithOurCodebooks(*pq_sizes(problem))]},
    ),
    Peer(
        "faiss-hnsw",
        "faiss-cpu",
        "faiss",
        "HNSW32, efSearch swept",
        indexes={
            task: lambda problem: [Faiss("HNSW32", "efSearch", start=problem.k, cap=WIDEST)]
            for task in ("flat", "changes")
        },
    ),
    Peer(
        "hnswlib",
        "hnswlib",
        "hnswlib",
        "M=16, ef_construction=200, ef swept",
        indexes={task: lambda problem: [Hnswlib(problem.k)] for task in ("flat", "changes")},
    ),
    Peer(
        "usearch",
        "usearch",
        "usearch",
        "connectivity=16, float32, expansion_search swept",
        indexes={"flat": lambda problem: [Usearch(problem.k)]},
    ),
    Peer(
        "scann",
        "scann",
        "scann",
        "tree, asymmetric hashing (anisotropic 0.2), reorder; leaves swept; search_batched_parallel, search",
        indexes={"flat": lambda problem: [Scann(list_count(problem), problem.k)]},
    ),
    Peer(
        "svs",
        "scalable-vs",
        "svs",
        "IVF and Vamana over float32 rows; n_probes and search_window_size swept",
        indexes={
            "flat": lambda problem: [*(SvsIvf(count) for count in list_counts(problem)), SvsVamana(problem.k)]
        },
    ),
    Peer(
        "pynndescent",
        "pynndescent",
        "pynndescent",
        "NNDescent(n_neighbors=30), epsilon swept; compiled before it is timed",
        indexes={"flat": lambda problem: [Pynndescent()]},
        on_request=True,
    ),
]

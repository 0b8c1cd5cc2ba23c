"""The indexes that ``search`` compares, each behind the same few functions.

``build(X, threads)`` trains and adds; ``limit(threads)`` and ``set(parameter, variant)`` prepare searches;
``batch(Q, k)`` and ``one(q, k)`` do them, and return row numbers. Metric: Euclidean, everywhere.
"""

import os

import numpy as np
from scipy.spatial.distance import cdist

WIDEST = 4096  # candidates of a graph search


class Index:
    """A configuration that can be built, and the parameter that trades time for recall."""

    name = ""  # of the configuration, in tables
    parameter = ""  # swept from start to cap; "" if there is none
    start = cap = 1
    removes = False  # whether rows can be removed
    second = ""  # another parameter, which takes each of the variants
    variants = (None,)

    def warm_up(self, X, threads):
        """What is not to be timed: compilers that run at the first call."""

    def limit(self, threads):
        """Threads of the searches to come."""

    def set(self, parameter, variant):
        """Parameters of the searches to come."""

    def one(self, q, k):
        """Row numbers for a single query, (1, n_features)."""
        return self.batch(q, k)

    def bytes_per_vector(self):
        """Of the built index; None where the library does not say."""
        return None


class Skivfpq(Index):
    """IVFIndex over vectors, or over codes."""

    parameter, removes = "n_probes", True

    def __init__(
        self, n_lists="auto", n_subspaces=None, n_bits=8, *, probing=("fixed",), dtype=None, n_groups=None
    ):
        self.n_lists, self.n_subspaces, self.n_bits = n_lists, n_subspaces, n_bits
        self.n_groups = n_groups  # of lists
        self.dtype = dtype  # of vectors, that of the rows if None
        self.second, self.variants = ("probing", probing) if len(probing) > 1 else ("", probing)

    @property
    def name(self):
        """As IVFIndex is called."""
        codes = f", PQ({self.n_subspaces}, {self.n_bits})" if self.n_subspaces else ""
        groups = f", n_groups={self.n_groups}" if self.n_groups else ""
        return f"n_lists={self.n_lists}{groups}{codes}" + (f", {self.dtype}" if self.dtype else "")

    def build(self, X, threads):
        """Fit."""
        from skivfpq import IVFIndex, ProductQuantizer

        codes = ProductQuantizer(self.n_subspaces, self.n_bits, random_state=0) if self.n_subspaces else None
        params = {"fine_quantizer": codes, "vectors_dtype": self.dtype, "probing": self.variants[-1]}
        params["n_groups"] = self.n_groups
        index = IVFIndex(self.n_lists, 1, **params, n_jobs=threads, random_state=0)
        self.index = index.fit(X)
        self.cap = index.n_lists_

    def limit(self, threads):
        """n_jobs."""
        self.index.set_params(n_jobs=threads)

    def set(self, parameter, variant):
        """n_probes, and whether they are adaptive."""
        self.n_probes = parameter
        self.index.set_params(probing=variant)

    def batch(self, Q, k):
        """Row numbers."""
        return self.index.kneighbors(Q, k, n_probes=self.n_probes)[1]

    def add(self, rows):
        """Their numbers."""
        self.index.partial_fit(rows)
        return np.arange(self.index.n_samples_fit_ - len(rows), self.index.n_samples_fit_)

    def remove(self, numbers):
        """Rows of these numbers."""
        self.index.remove(numbers)

    def bytes_per_vector(self):
        """As the index says."""
        return self.index.bytes_per_vector_


class SkivfpqLists(Skivfpq):
    """IVFIndex whose lists were trained in one way or the other; all of them are looked at."""

    def build(self, X, threads):
        """Fit."""
        super().build(X, threads)
        self.index.set_params(n_groups=None)

    def rows_scanned(self, Q, n_probes):
        """Rows in the lists that a query probes, on average."""
        index = self.index
        distances = cdist(Q.astype(np.float64), index.coarse_quantizer_.cluster_centers_)
        nearest = np.argpartition(distances, n_probes - 1, axis=1)[:, :n_probes]
        return float(index.list_sizes_[nearest].sum(axis=1).mean())


class SkivfpqAll(Skivfpq):
    """IVFIndex that probes every list."""

    parameter = ""

    def build(self, X, threads):
        """Fit."""
        super().build(X, threads)
        self.n_probes, self.cap = self.cap, 1

    def set(self, parameter, variant):
        """Nothing to set."""


class SkivfpqExact(Index):
    """exact_neighbors, which builds nothing."""

    name = "exact_neighbors"

    def build(self, X, threads):
        """Remember the rows."""
        from skivfpq import exact_neighbors

        self.X, self.search = X, exact_neighbors

    def limit(self, threads):
        """It has no n_jobs, and takes every core but for this variable, which it reads at each call."""
        os.environ["OMP_NUM_THREADS"] = str(threads)

    def batch(self, Q, k):
        """Row numbers."""
        return self.search(Q, self.X, k)[1]


class Faiss(Index):
    """What faiss.index_factory makes of a description; parameters are named as in its ParameterSpace."""

    def __init__(self, description, parameter="", *, start=1, cap=1, second="", variants=(None,)):
        self.name, self.parameter, self.start, self.cap = description, parameter, start, cap
        self.second, self.variants = second, variants
        self.removes = description.startswith("IVF")

    def build(self, X, threads):
        """Train and add."""
        import faiss

        self.limit(threads)
        self.index = faiss.index_factory(X.shape[1], self.name)
        self.index.train(X)
        self.index.add(X)
        self.n_added = len(X)
        self.space = faiss.ParameterSpace()

    def limit(self, threads):
        """Of OpenMP."""
        import faiss

        faiss.omp_set_num_threads(threads)

    def set(self, parameter, variant):
        """Both, where there are."""
        for name, value in ((self.parameter, parameter), (self.second, variant)):
            if name:
                self.space.set_index_parameter(self.index, name, value)

    def batch(self, Q, k):
        """Row numbers."""
        return self.index.search(Q, k)[1]

    def add(self, rows):
        """Their numbers; given where rows may be removed, since it counts those that it holds."""
        numbers = np.arange(self.n_added, self.n_added + len(rows))
        self.n_added += len(rows)
        if self.removes:
            self.index.add_with_ids(rows, numbers)
        else:
            self.index.add(rows)
        return numbers

    def remove(self, numbers):
        """Rows of these numbers."""
        self.index.remove_ids(numbers)

    def bytes_per_vector(self):
        """Of the index as it would be written."""
        import faiss

        return faiss.serialize_index(self.index).nbytes / self.index.ntotal


class FaissWithOurCodebooks(Faiss):
    """IndexIVFPQ with the lists and the codebooks that IVFIndex learns, so that both index the same codes."""

    def __init__(self, n_lists, n_subspaces):
        super().__init__(f"IVF{n_lists},PQ{n_subspaces}x8", "nprobe", cap=n_lists)
        self.ours = Skivfpq(n_lists, n_subspaces)

    def build(self, X, threads):
        """Train ours, hand over, add."""
        import faiss

        self.ours.build(X, threads)
        self.limit(threads)
        centers = self.ours.index.coarse_quantizer_.cluster_centers_.astype(np.float32)
        codebooks = self.ours.index.fine_quantizer_.codebooks_
        self.lists = faiss.IndexFlatL2(X.shape[1])  # which the index does not keep alive
        self.lists.add(centers)
        self.index = faiss.IndexIVFPQ(self.lists, X.shape[1], len(centers), len(codebooks), 8)
        faiss.copy_array_to_vector(
            np.concatenate([part.ravel() for part in codebooks]), self.index.pq.centroids
        )
        self.index.is_trained = True
        self.index.precompute_table()
        self.index.add(X)
        self.cap, self.space = len(centers), faiss.ParameterSpace()


class Hnswlib(Index):
    """hnswlib.Index."""

    name, parameter, cap, removes = "M=16, ef_construction=200", "ef", WIDEST, True

    def __init__(self, k):
        self.start = k

    def build(self, X, threads):
        """Add."""
        import hnswlib

        self.index = hnswlib.Index("l2", X.shape[1])
        self.index.init_index(len(X), M=16, ef_construction=200, random_seed=0)
        self.index.add_items(X, num_threads=threads)

    def limit(self, threads):
        """Of queries."""
        self.index.set_num_threads(threads)

    def set(self, parameter, variant):
        """ef."""
        self.index.set_ef(parameter)

    def batch(self, Q, k):
        """Row numbers."""
        return self.index.knn_query(Q, k)[0]

    def add(self, rows):
        """Their numbers; when it is full, it gets room for an eighth more."""
        first = self.index.get_current_count()
        if first + len(rows) > self.index.get_max_elements():
            self.index.resize_index(first + len(rows) + first // 8)
        numbers = np.arange(first, first + len(rows))
        self.index.add_items(rows, numbers)
        return numbers

    def remove(self, numbers):
        """Rows of these numbers: they are passed through, and not returned."""
        for number in numbers:
            self.index.mark_deleted(number)

    def bytes_per_vector(self):
        """Of the index as it would be written."""
        return self.index.index_file_size() / self.index.get_current_count()


class Usearch(Index):
    """usearch.index.Index."""

    name, parameter, cap = "connectivity=16, f32", "expansion_search", WIDEST

    def __init__(self, k):
        self.start = k

    def build(self, X, threads):
        """Add."""
        from usearch.index import Index as Graph

        self.index = Graph(ndim=X.shape[1], metric="l2sq", dtype="f32", connectivity=16)
        self.index.add(np.arange(len(X)), X, threads=threads)

    def limit(self, threads):
        """Passed on with every search."""
        self.threads = threads

    def set(self, parameter, variant):
        """expansion_search."""
        self.index.expansion_search = parameter

    def batch(self, Q, k):
        """Row numbers."""
        return self.index.search(Q, k, threads=self.threads).keys

    def bytes_per_vector(self):
        """Of the index as it would be written."""
        return self.index.serialized_length / len(self.index)


class Scann(Index):
    """ScaNN's tree, codes of two features each in 4 bits, exact distances for the best of them."""

    parameter, second = "leaves", "reorder"

    def __init__(self, n_leaves, k):
        self.k, self.cap, self.variants = k, n_leaves, (2 * k, 5 * k, 10 * k, 20 * k)
        self.name = f"{n_leaves} leaves, AH 2, anisotropic 0.2"

    def build(self, X, threads):
        """Train and add."""
        from scann import scann_ops_pybind

        builder = scann_ops_pybind.builder(X, self.k, "squared_l2").set_n_training_threads(threads)
        builder = builder.tree(self.cap, 1, training_sample_size=min(len(X), 256 * self.cap))
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(self.variants[-1])
        self.index = builder.build()

    def limit(self, threads):
        """Of the parallel search; the other one has one thread."""
        self.index.set_num_threads(threads)
        self.search = self.index.search_batched_parallel if threads > 1 else self.index.search_batched

    def set(self, parameter, variant):
        """Passed on with every search."""
        self.leaves, self.reorder = parameter, variant

    def batch(self, Q, k):
        """Row numbers."""
        return self.search(Q, k, self.reorder, self.leaves)[0]

    def one(self, q, k):
        """Row numbers."""
        return self.index.search(q[0], k, self.reorder, self.leaves)[0]


class Svs(Index):
    """What the indexes of SVS share; over float32, since its LVQ ends the process on AMD's processors."""

    def limit(self, threads):
        """Of queries."""
        self.index.num_threads = threads

    def batch(self, Q, k):
        """Row numbers."""
        return self.index.search(Q, k)[0]


class SvsIvf(Svs):
    """svs.IVF."""

    parameter = "n_probes"

    def __init__(self, n_lists):
        self.cap, self.name = n_lists, f"IVF, num_centroids={n_lists}"

    def build(self, X, threads):
        """Cluster, then assemble."""
        import svs

        share = min(1.0, 256 * self.cap / len(X))
        parameters = svs.IVFBuildParameters(self.cap, training_fraction=share, seed=0)
        clustering = svs.Clustering.build(parameters, X, svs.DistanceType.L2, num_threads=threads)
        self.index = svs.IVF.assemble_from_clustering(clustering, X, svs.DistanceType.L2, num_threads=threads)
        self.parameters = svs.IVFSearchParameters

    def set(self, parameter, variant):
        """n_probes."""
        self.index.search_parameters = self.parameters(n_probes=parameter)


class SvsVamana(Svs):
    """svs.Vamana."""

    name, parameter, cap = "Vamana, graph_max_degree=32", "search_window_size", WIDEST

    def __init__(self, k):
        self.start = k

    def build(self, X, threads):
        """Build."""
        import svs

        parameters = svs.VamanaBuildParameters(graph_max_degree=32)
        self.index = svs.Vamana.build(parameters, X, svs.DistanceType.L2, num_threads=threads)

    def set(self, parameter, variant):
        """search_window_size."""
        self.index.search_window_size = parameter


class Pynndescent(Index):
    """pynndescent.NNDescent; its search comes parallel or fast for one query, so that two are kept."""

    name, parameter, cap = "n_neighbors=30", "100 epsilon", 64

    def warm_up(self, X, threads):
        """numba compiles for half a minute."""
        self.build(X[:2000], threads)

    def build(self, X, threads):
        """Build and prepare."""
        import copy

        from pynndescent import NNDescent

        several = NNDescent(X, random_state=0, n_jobs=threads, parallel_batch_queries=True)
        several.prepare()
        single = copy.copy(several)
        single.parallel_batch_queries = False
        del single._search_function
        single.prepare()
        self.several, self.single = several, single

    def limit(self, threads):
        """Of numba."""
        import numba

        numba.set_num_threads(threads)
        self.index = self.several if threads > 1 else self.single

    def set(self, parameter, variant):
        """Epsilon."""
        self.epsilon = parameter / 100

    def batch(self, Q, k):
        """Row numbers."""
        return self.index.query(Q, k, epsilon=self.epsilon)[0]

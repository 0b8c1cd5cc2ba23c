"""The implementations that are compared, each behind the same functions.

``lloyd(problem)`` iterates from given centers, ``default_fit(X, n_clusters, seed, threads)`` fits as a
user would who sets nothing else, ``quantizer(spec)`` has fit, transform and inverse_transform. A peer
that cannot do one of them has None there. search_peers.py has those of ``search``.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

OURS = "skivfpq"
ALL_ROWS = 2**31 - 1  # points per centroid: no peer is to train on a sample


@dataclass(frozen=True, eq=False)
class Problem:
    """Lloyd iterations to be done."""

    X: np.ndarray  # (n_samples, n_features) float32
    centers: np.ndarray  # (n_clusters, n_features) float32, where every exact peer starts
    iterations: int
    threads: int
    seed: int  # for peers that take no centers


@dataclass(frozen=True)
class Clustering:
    """What a k-means returned."""

    centers: np.ndarray
    labels: np.ndarray
    n_iter: int


@dataclass(frozen=True)
class CodeSpec:
    """Codes to be learnt."""

    n_subspaces: int
    n_bits: int
    opq: bool
    iterations: int
    threads: int
    seed: int


def fitted(kmeans):
    """Clustering of a fitted estimator."""
    return Clustering(kmeans.cluster_centers_, kmeans.labels_, kmeans.n_iter_)


def lloyd_parameters(problem):
    """How scikit-learn's KMeans, and those with its interface, are told to iterate from given centers."""
    return {
        "n_clusters": len(problem.centers),
        "init": problem.centers,
        "n_init": 1,
        "max_iter": problem.iterations,
        "tol": 0,
    }


def lloyd_skivfpq(problem):
    """Lloyd iterations of skivfpq."""
    from skivfpq import LloydKMeans

    kmeans = LloydKMeans(**lloyd_parameters(problem), n_jobs=problem.threads)
    return fitted(kmeans.fit(problem.X))


def default_skivfpq(X, n_clusters, seed, threads):
    """A fit of skivfpq."""
    from skivfpq import LloydKMeans

    return fitted(LloydKMeans(n_clusters, n_jobs=threads, random_state=seed).fit(X))


def predictor_of(kmeans, centers):
    """The method predict of an estimator that has these centers."""
    kmeans.set_params(n_clusters=len(centers), init=centers, n_init=1, max_iter=1).fit(centers)
    kmeans.cluster_centers_ = centers
    return kmeans.predict


def predictor_skivfpq(centers, threads):
    """LloydKMeans.predict."""
    from skivfpq import LloydKMeans

    return predictor_of(LloydKMeans(n_jobs=threads), centers)


def predictor_sklearn(centers, _threads):
    """KMeans.predict, its threads limited by threadpoolctl."""
    from sklearn.cluster import KMeans

    return predictor_of(KMeans(), centers)


def predictor_faiss(centers, _threads):
    """IndexFlatL2.search."""
    import faiss

    index = faiss.IndexFlatL2(centers.shape[1])
    index.add(centers)
    return lambda rows: index.search(rows, 1)[1][:, 0]


def lloyd_sklearn(problem):
    """Lloyd iterations of scikit-learn, its threads limited by threadpoolctl."""
    from sklearn.cluster import KMeans

    return fitted(KMeans(**lloyd_parameters(problem)).fit(problem.X))


def default_sklearn(X, n_clusters, seed, threads):
    """A fit of scikit-learn."""
    from sklearn.cluster import KMeans

    return fitted(KMeans(n_clusters, random_state=seed).fit(X))


def accelerated(kmeans):
    """Clustering of a fitted estimator of scikit-learn-intelex, unless it left the fit to scikit-learn."""
    if not hasattr(kmeans, "_onedal_estimator"):
        raise RuntimeError("scikit-learn-intelex fell back to scikit-learn")
    return fitted(kmeans)


def lloyd_intelex(problem):
    """Lloyd iterations of oneDAL."""
    from sklearnex.cluster import KMeans

    kmeans = KMeans(**lloyd_parameters(problem), n_jobs=problem.threads)
    return accelerated(kmeans.fit(problem.X))


def default_intelex(X, n_clusters, seed, threads):
    """A fit of oneDAL."""
    from sklearnex.cluster import KMeans

    return accelerated(KMeans(n_clusters, n_jobs=threads, random_state=seed).fit(X))


def set_clustering(parameters, iterations, seed):
    """faiss: that many iterations on all rows."""
    parameters.niter = iterations
    parameters.seed = seed
    parameters.max_points_per_centroid = ALL_ROWS
    parameters.min_points_per_centroid = 1


def faiss_labels(X, clustering, n_clusters):
    """faiss: centers of a clustering, and the nearest of every row."""
    import faiss

    centers = faiss.vector_to_array(clustering.centroids).reshape(n_clusters, X.shape[1])
    index = faiss.IndexFlatL2(X.shape[1])
    index.add(centers)
    return centers, index.search(X, 1)[1][:, 0]


def lloyd_faiss(problem):
    """Lloyd iterations of faiss.Clustering, then an assignment of all rows."""
    import faiss

    n_clusters, n_features = problem.centers.shape
    parameters = faiss.ClusteringParameters()
    set_clustering(parameters, problem.iterations, problem.seed)
    clustering = faiss.Clustering(n_features, n_clusters, parameters)
    faiss.copy_array_to_vector(problem.centers.ravel(), clustering.centroids)
    clustering.train(problem.X, faiss.IndexFlatL2(n_features))
    return Clustering(*faiss_labels(problem.X, clustering, n_clusters), problem.iterations)


def lloyd_faiss_super(problem):
    """Pruned iterations of faiss.SuperKMeans, then an assignment of all rows."""
    import faiss

    n_clusters, n_features = problem.centers.shape
    parameters = faiss.SuperKMeansParameters()
    set_clustering(parameters, problem.iterations, problem.seed)
    clustering = faiss.SuperKMeans(n_features, n_clusters, parameters)
    clustering.train(problem.X)
    return Clustering(*faiss_labels(problem.X, clustering, n_clusters), problem.iterations)


def lloyd_superkmeans(problem):
    """Pruned iterations of superkmeans, flat, on all rows, then its fast assignment of the training rows."""
    from superkmeans import SuperKMeans

    n_clusters, n_features = problem.centers.shape
    kmeans = SuperKMeans(
        n_clusters,
        n_features,
        hierarchical=False,
        iters=problem.iterations,
        sampling_fraction=1.0,
        max_points_per_cluster=ALL_ROWS,
        n_threads=problem.threads,
        seed=problem.seed,
        tol=0.0,
        early_termination=False,
    )
    centers = kmeans.train(problem.X)
    # Where it does not prune (few features or clusters), that assignment only prints a warning more.
    pruned = not kmeans.iteration_stats[-1].is_gemm_only
    assign = kmeans.assign_training_points if pruned else kmeans.assign
    return Clustering(centers, assign(problem.X, centers), len(kmeans.iteration_stats))


def quantizer_skivfpq(spec):
    """ProductQuantizer of skivfpq, on all training rows."""
    from skivfpq import ProductQuantizer

    return ProductQuantizer(
        spec.n_subspaces,
        spec.n_bits,
        rotation="opq" if spec.opq else None,
        max_iter=spec.iterations,
        max_samples=None,
        n_jobs=spec.threads,
        random_state=spec.seed,
    )


class FaissQuantizer:
    """faiss.ProductQuantizer, after an OPQMatrix with its own settings where asked for."""

    def __init__(self, spec):
        self.spec = spec

    def _quantizer(self, n_features):
        """An untrained quantizer."""
        import faiss

        quantizer = faiss.ProductQuantizer(n_features, self.spec.n_subspaces, self.spec.n_bits)
        set_clustering(quantizer.cp, self.spec.iterations, self.spec.seed)
        return quantizer

    def fit(self, X):
        """Learn rotation and codebooks."""
        import faiss

        self.rotation_ = None
        if self.spec.opq:
            self.rotation_ = faiss.OPQMatrix(X.shape[1], self.spec.n_subspaces)
            self._inner = self._quantizer(X.shape[1])  # the matrix keeps a bare pointer to it
            self.rotation_.pq = self._inner
            self.rotation_.max_train_points = len(X)
            self.rotation_.train(X)
        self.quantizer_ = self._quantizer(X.shape[1])
        self.quantizer_.train(self._rotate(X))
        return self

    def _rotate(self, X):
        """X in the space of the codebooks."""
        return X if self.rotation_ is None else self.rotation_.apply(X)

    def transform(self, X):
        """Codes, packed."""
        return self.quantizer_.compute_codes(self._rotate(X))

    def inverse_transform(self, codes):
        """Rows from codes."""
        rows = self.quantizer_.decode(codes)
        return rows if self.rotation_ is None else self.rotation_.reverse_transform(rows)


class NanoQuantizer:
    """nanopq.PQ, or nanopq.OPQ with its own number of rotations."""

    def __init__(self, spec):
        self.spec = spec

    def fit(self, X):
        """Learn rotation and codebooks."""
        import nanopq

        spec = self.spec
        kind = nanopq.OPQ if spec.opq else nanopq.PQ
        self.quantizer_ = kind(spec.n_subspaces, 1 << spec.n_bits, verbose=False)
        iterations = {"pq_iter" if spec.opq else "iter": spec.iterations}
        self.quantizer_.fit(X, seed=spec.seed, **iterations)
        return self

    def transform(self, X):
        """Codes."""
        return self.quantizer_.encode(X)

    def inverse_transform(self, codes):
        """Rows from codes."""
        return self.quantizer_.decode(codes)


@dataclass(frozen=True)
class Peer:
    """An implementation, and how it is called."""

    name: str  # in tables and in --peers
    package: str  # for pip
    module: str
    setup: str  # in words, for people
    exact: bool = True  # k-means that computes every distance, or proves that it need not
    lloyd: Callable | None = None
    default_fit: Callable | None = None
    predictor: Callable | None = None
    quantizer: Callable | None = None
    indexes: Mapping = field(default_factory=dict)  # by task of ``search``: function of shape and k
    on_request: bool = False  # left out unless --peers names it
    needs: str = ""  # something that only newer versions of the module have

    def load(self):
        """Import it; what is wrong in words, or nothing."""
        try:
            module: Any = importlib.import_module(self.module)
        except ImportError as error:
            broken = "" if error.name == self.module else f"; installed, but {error.name} cannot be imported"
            return f"pip install {self.package}{broken}"
        if self.needs and not hasattr(module, self.needs):
            return f"pip install --upgrade {self.package}"
        return ""

    def version(self):
        """Version of the package."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return "unknown"


PEERS = [
    Peer(
        OURS,
        "skivfpq",
        "skivfpq",
        "LloydKMeans(init=centers, n_init=1, max_iter, tol=0, n_jobs); ProductQuantizer(max_samples=None)",
        lloyd=lloyd_skivfpq,
        default_fit=default_skivfpq,
        predictor=predictor_skivfpq,
        quantizer=quantizer_skivfpq,
    ),
    Peer(
        "scikit-learn",
        "scikit-learn",
        "sklearn",
        "KMeans(init=centers, n_init=1, max_iter, tol=0); threads by threadpoolctl",
        lloyd=lloyd_sklearn,
        default_fit=default_sklearn,
        predictor=predictor_sklearn,
    ),
    Peer(
        "scikit-learn-intelex",
        "scikit-learn-intelex",
        "sklearnex",
        "sklearnex.cluster.KMeans(init=centers, n_init=1, max_iter, tol=0, n_jobs)",
        lloyd=lloyd_intelex,
        default_fit=default_intelex,
    ),
    Peer(
        "faiss",
        "faiss-cpu",
        "faiss",
        "Clustering from the same centers on all rows, then IndexFlatL2.search; ProductQuantizer; "
        "OPQMatrix with its own 50 rotations",
        lloyd=lloyd_faiss,
        predictor=predictor_faiss,
        quantizer=FaissQuantizer,
    ),
    Peer(
        "faiss-superkmeans",
        "faiss-cpu",
        "faiss",
        "SuperKMeans on all rows, then IndexFlatL2.search; approximate; starts at random rows of its own",
        exact=False,
        lloyd=lloyd_faiss_super,
        needs="SuperKMeans",
    ),
    Peer(
        "superkmeans",
        "superkmeans",
        "superkmeans",
        "SuperKMeans(hierarchical=False, sampling_fraction=1, early_termination=False, tol=0); "
        "approximate; starts at random rows of its own",
        exact=False,
        lloyd=lloyd_superkmeans,
    ),
    Peer(
        "nanopq",
        "nanopq",
        "nanopq",
        "PQ.fit(iter), encode; OPQ with its own 10 rotations; threads by threadpoolctl",
        quantizer=NanoQuantizer,
    ),
]


def choose(abilities, wanted=None, peers=PEERS):
    """Installed peers with one of the abilities, ours first, and what to do about the missing ones.

    Returns
    -------
    peers : list of Peer
    missing : dict from name to what to do
    """
    able = [peer for peer in peers if any(getattr(peer, ability) for ability in abilities)]
    if wanted is None:
        able = [peer for peer in able if not peer.on_request]
    else:
        unknown = sorted(set(wanted) - {peer.name for peer in able})
        if unknown:
            names = ", ".join(peer.name for peer in able if peer.name != OURS)
            raise ValueError(f"no peer called {', '.join(unknown)}; there are {names}.")
        able = [peer for peer in able if peer.name in {OURS, *wanted}]
    troubles = {peer.name: peer.load() for peer in able}
    if troubles[OURS]:
        raise ValueError(f"skivfpq itself is not installed: {troubles[OURS]}.")
    missing = {name: trouble for name, trouble in troubles.items() if trouble}
    return [peer for peer in able if peer.name not in missing], missing


def limit_threads(peers, threads):
    """Threads of every library that the peers have loaded; returns what keeps the limits in force."""
    if any(peer.module == "faiss" for peer in peers):
        import faiss

        faiss.omp_set_num_threads(threads)
    return threadpool_limits(limits=threads)

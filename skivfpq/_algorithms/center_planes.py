"""int8 points of the centers of lists, for the coarse step (probe.c)."""

import numpy as np

from skivfpq import _kernels
from skivfpq._algorithms.blocks import run_tasks
from skivfpq._algorithms.heads import head_of_centers
from skivfpq._algorithms.list_planes import exact_rows, over_queries, pack_lists

QUERIES = 64  # rows that stand for queries to come
ROWS_PER_TASK = 256  # at least, to find the nearest centers of


class CenterPlanes:
    """Centers of lists, to find the nearest of."""

    def __init__(self, nearness, centers, rows=None, n_threads=1, groups=None):
        """nearness: Metric by which centers are near; centers (n_lists, n_features) float64.

        rows : (n, n_features) like the queries to come, to find out whether a head saves time; or None
        groups : Groups of the lists, or None
        """
        self.nearness, self.centers = nearness, centers
        head = None if rows is None or nearness.is_product else head_of_centers(centers, rows, n_threads)
        self.groups = None if groups is None else self._pack(groups.centers)
        self.planes = self._pack(centers, head, groups)

    def _pack(self, centers, head=None, groups=None):
        """Planes of centers in their order, or group by group."""
        n, order = len(centers), None if groups is None else groups.order
        offsets = np.array([0, n]) if groups is None else groups.offsets
        vectors, ids = (centers, np.arange(n)) if groups is None else (centers[order], order)
        return pack_lists(self.nearness, vectors, offsets, ids.astype(np.int32), head=head, fine=True)

    def serve(self, probes):
        """Whether such probes can be found by the planes."""
        return self.planes is not None and (self.groups is not None or probes.n_groups == 0)

    @property
    def packed(self):
        """What the kernels take: centers, and groups or None."""
        return self.planes.packed, None if self.groups is None else self.groups.packed

    def search(self, rows, queries, k, probes, n_threads, turned=None):
        """The k nearest rows of each query in the lists that it probes, as ``ListPlanes.search``.

        probes : probing.Probes
        turned : (n_queries, n_features) float64, the queries as codes have them, or None for the same
        """

        def search(some, keys, positions, unserved):
            if not self.serve(probes):
                unserved[:] = 1
                return len(unserved)
            others = None if turned is None else turned[some]
            found = keys, positions, unserved
            return _kernels.native.search_index(
                *self.packed, rows.packed, queries[some], others, *probes, *found
            )

        return over_queries(search, queries, k, n_threads, probes.most)

    def nearest(self, rows, n_threads):
        """The nearest center of each row, (n_rows,) int32, the lowest on ties; -1 where it cannot serve."""
        rows = np.ascontiguousarray(rows)
        labels, unserved = np.full((len(rows), 1), -1, dtype=np.int32), np.ones(len(rows), dtype=np.uint8)

        def find(some):
            _kernels.native.nearest_lists(self.planes.packed, rows[some], labels[some], unserved[some])

        if self.planes is not None and len(rows):
            run_tasks(find, len(rows), len(rows) // ROWS_PER_TASK, n_threads, multiple=1)
        labels[unserved != 0] = -1
        return labels[:, 0]

    def ranked(self, queries, n_threads, centers=None):
        """All lists, or such centers, nearest first: keys and numbers, (n_queries, n_centers)."""
        centers = self.centers if centers is None else centers
        return exact_rows(self.nearness, queries, centers, len(centers), n_threads)

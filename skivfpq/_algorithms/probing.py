"""Which lists a query probes: a number of the nearest, or an adaptive one that is right on average.

A query between many lists must probe more of them than one that is close to a center. Adaptive probes
are, of the 2 n nearest lists, those with

    s_i <= (s_1 + s_2 + s_3 + s_4) / 4 + reach |s_1|,        s: squared distances, or minus inner products,

and the nearest always. The reach is such that queries like the rows probe n lists on average. (Chen et
al., "SPANN: Highly-efficient billion-scale approximate nearest neighbor search", NeurIPS 2021, section
3.3, prune by s_i <= (1 + reach)^2 s_1: relative to the nearest center alone it takes more rows than a
fixed number does, see docs/development.md.)
"""

from functools import cached_property
from typing import NamedTuple

import numpy as np

FEW = 4  # nearest lists, whose mean is the base of the limit; probe.c has it too
MOST = 2  # times the mean number of lists, for no query more
MEASURED = 256  # queries that reaches are measured with, fewer of very many lists
MEASURED_KEYS = 1 << 22
PER_OCTAVE = 4  # numbers of lists whose reach is measured, others are interpolated


class Probes(NamedTuple):
    """The lists that queries probe: up to so many of the nearest, within a limit."""

    most: int  # within a limit FEW, at least, or all lists
    reach: float = np.inf  # of the limit; inf for none
    n_groups: int = 0  # the nearest ones, whose lists alone are looked at; 0 for all

    def within(self, keys):
        """Which lists are probed, (n_queries, n): of the keys (n_queries, n) of the nearest, ascending."""
        if self.reach == np.inf:
            return np.ones(keys.shape, dtype=bool)
        nearest = keys[:, 0]
        limits = keys[:, :FEW].mean(axis=1) + self.reach * np.abs(nearest)
        return keys <= np.maximum(limits, nearest)[:, None]


class FixedProbes:
    """As many lists for each query."""

    def __init__(self, n_lists):
        self.n_lists = n_lists

    def probes(self, n_probes):
        """Of so many lists."""
        return Probes(min(n_probes, self.n_lists))

    def covering(self, keys, places, group_places=None):
        """Fewest lists with which each query probes those at such places, as ``Reaches.covering``."""
        return places + 1


class Reaches:
    """Adaptive probes: the reach for each mean number of lists.

    Parameters
    ----------
    keys : (n_queries, n_lists)
        Squared distances, or minus products, of some queries and all centers, ascending in each row.
    """

    def __init__(self, keys):
        n_queries, n_lists = keys.shape
        self.values = np.full(n_lists, np.inf)  # of 1, 2, ... lists
        if n_lists < 3:
            return
        heights = _heights(keys)
        heights[:, 0] = -np.inf  # probed always
        octaves = np.log2(n_lists)
        measured = np.unique(np.geomspace(2, n_lists - 1, int(PER_OCTAVE * octaves)).astype(int))
        reaches = np.array([_smallest(heights[:, : MOST * n], n * n_queries) for n in measured])
        finite = np.isfinite(reaches)  # but where the nearest has no size: zeros, or queries that are centers
        if finite.any():
            numbers = np.arange(1, n_lists + 1)
            values = np.interp(numbers, measured[finite], reaches[finite], right=np.inf)
            self.values = np.maximum.accumulate(values)
        self.values[0] = -np.inf

    def probes(self, n_probes):
        """Of so many lists on average."""
        n_lists = len(self.values)
        if n_probes == 1 or n_probes >= n_lists:
            return Probes(min(n_probes, n_lists))
        return Probes(min(MOST * n_probes, n_lists), float(self.values[n_probes - 1]))

    def covering(self, keys, places, group_places=None):
        """Fewest lists on average, (n_queries, n), with which each query probes those at such places.

        keys : (n_queries, n_lists) ascending in each row
        places : (n_queries, n) from 0 on
        """
        heights = np.take_along_axis(_heights(keys), places, axis=1)
        by_reach = 1 + np.searchsorted(self.values, heights)
        return np.where(places == 0, 1, np.maximum(by_reach, -(-(places + 1) // MOST)).clip(2))


class GroupedProbes:
    """The same probes, looked for in the nearest groups of lists.

    Parameters
    ----------
    probing : FixedProbes or Reaches
    groups : groups.Groups
    """

    def __init__(self, probing, groups):
        self.probing, self.groups = probing, groups

    def probes(self, n_probes):
        """Of so many lists."""
        return self.groups.within(self.probing.probes(n_probes))

    @cached_property
    def _looked_in(self):
        """Groups of 1, 2, ... lists, (n_lists,), ascending."""
        n_lists = len(self.groups.counts)
        return np.array([self.groups.counts[self.probing.probes(n).most - 1] for n in range(1, n_lists + 1)])

    def covering(self, keys, places, group_places):
        """As ``Reaches.covering``; more where lists are in farther groups, at such places (n_queries, n)."""
        by_groups = 1 + np.searchsorted(self._looked_in, group_places + 1)
        return np.maximum(self.probing.covering(keys, places), by_groups)


def _smallest(values, n):
    """The n-th smallest."""
    return np.partition(values, n - 1, axis=None)[n - 1]


def _heights(keys):
    """How far keys (n_queries, n_lists), ascending, are above the base, in sizes of the nearest."""
    above = keys - keys[:, :FEW].mean(axis=1, keepdims=True)
    sizes = np.abs(keys[:, :1])
    everywhere = np.where(above > 0, np.inf, -np.inf)
    with np.errstate(over="ignore"):
        return np.divide(above, sizes, out=everywhere, where=sizes > 0)

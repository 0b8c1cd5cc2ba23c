"""Inverted lists: rows sorted by the list they belong to, one array for each thing kept of a row."""

import threading
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

BLOCK = 16  # rows
FREE = 8  # rows of a list that one more place is left free for, where rows were added to it
CLAIMING = threading.Lock()  # copies of an index share places, and may be changed in different threads
MOST_REMOVED = 0.25  # share of the places taken, beyond which rows move together


@dataclass(frozen=True, eq=False)
class InvertedLists:
    """Rows of all lists, one list after the other, each in places of its own; never changed, only replaced.

    So a search that runs while rows are added or removed sees the lists as they were before. A removed row
    leaves its place empty. Added rows are written to places that were free from the first: lists from before
    share these arrays, but do not look there.
    """

    offsets: np.ndarray  # (n_lists + 1,) where the places of each list start
    ids: np.ndarray  # (n_places,) row numbers, ascending within a list; -1 where there is no row
    positions: np.ndarray  # (n_samples_fit,) where each row number stands, -1 once removed
    rows: dict  # name -> (n_places, ...) what is kept of each row
    radii: np.ndarray  # (n_lists,) no row is farther from its list's anchor
    sizes: np.ndarray  # (n_lists,) rows in each list
    ends: np.ndarray  # (n_lists,) the place behind the last that was taken
    claims: np.ndarray | None = None  # the same of all lists that share these arrays; None where none is free

    @classmethod
    def empty(cls, n_lists):
        """Lists without rows."""
        none, zeros = np.empty(0, dtype=np.int32), np.zeros(n_lists, dtype=np.int64)
        return cls(np.zeros(n_lists + 1, dtype=np.int64), none, none, {}, np.zeros(n_lists), zeros, zeros)

    @property
    def n_rows(self):
        """Rows in all lists."""
        return int(self.sizes.sum())

    @cached_property
    def live(self):
        """Mask (n_places,) of places that hold a row; None where all do."""
        return None if self.n_rows == len(self.ids) else self.ids >= 0

    @property
    def taken(self):
        """The places that hold a row, (n_rows,), list by list."""
        return np.arange(len(self.ids)) if self.live is None else np.flatnonzero(self.live)

    def list_of(self, positions):
        """The list that each position belongs to."""
        return list_of(self.offsets, positions)

    @property
    def labels(self):
        """List of each row number, -1 once removed, (n_samples_fit,)."""
        labels = np.full(len(self.positions), -1, dtype=np.int32)
        labels[self.ids[self.taken]] = self._labels_by_place()
        return labels

    def _labels_by_place(self):
        """List of each row, (n_rows,), list by list."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def append(self, labels, rows, lengths, hold):
        """Lists with new rows, numbered on from the last; and their places, None where all rows have moved.

        rows : name -> (n_rows, ...) what is to be kept of each
        lengths : (n_rows,) distances to their anchors
        hold : function (name, array, offsets) -> what keeps such things of rows at the places of lists
        """
        radii = self.radii.copy()
        np.maximum.at(radii, labels, lengths)
        counts = np.bincount(labels, minlength=len(self.sizes))
        with CLAIMING:
            claimed = self._claim(counts)
        if not claimed:
            return replace(self._moved(labels, rows, hold, roomy=self.n_rows > 0), radii=radii), None
        places = _in_lists(labels, counts, self.ends)
        for name, array in rows.items():
            self.rows[name][places] = array
        ids = self.ids.copy()
        ids[places] = np.arange(len(self.positions), len(self.positions) + len(labels))
        positions = np.concatenate([self.positions, places.astype(self.positions.dtype)])
        sizes, ends = self.sizes + counts, self.ends + counts
        return replace(self, ids=ids, positions=positions, radii=radii, sizes=sizes, ends=ends), places

    def _claim(self, counts):
        """Take free places for so many rows of each list; False if they do not fit, or others took some."""
        if self.claims is None or len(self.positions) + counts.sum() > np.iinfo(self.ids.dtype).max:
            return False
        is_free = (self.claims == self.ends) & (self.ends + counts <= self.offsets[1:])
        if not (is_free | (counts == 0)).all():
            return False
        self.claims[:] += counts
        return True

    def remove(self, numbers, hold):
        """Lists without the rows of these numbers, the others keep theirs; and whether those have moved."""
        numbers = np.unique(numbers)
        places = self.positions[numbers]
        ids, positions = self.ids.copy(), self.positions.copy()
        ids[places] = positions[numbers] = -1
        sizes = self.sizes - np.bincount(self.list_of(places), minlength=len(self.sizes))
        lists = replace(self, ids=ids, positions=positions, sizes=sizes)
        if sizes.sum() >= (1 - MOST_REMOVED) * (self.ends - self.offsets[:-1]).sum():
            return lists, False
        return lists.compact(hold), True

    def compact(self, hold):
        """The same rows without places between them."""
        if self.live is None:
            return replace(self, claims=None)
        return self._moved(np.empty(0, dtype=np.int64), dict.fromkeys(self.rows), hold, roomy=False)

    def _moved(self, labels, rows, hold, roomy):
        """Lists of the rows and of new ones in new arrays; roomy: with free places for more."""
        labels = np.concatenate([self._labels_by_place(), labels])
        sizes = np.bincount(labels, minlength=len(self.sizes))
        n_places = -(-(sizes + sizes // FREE + 1) // BLOCK) * BLOCK if roomy else sizes
        offsets = np.concatenate([[0], np.cumsum(n_places)])
        places = _in_lists(labels, sizes, offsets[:-1])
        n_old, n_samples = self.n_rows, len(self.positions) + len(labels) - self.n_rows
        dtype = np.int32 if max(n_samples, offsets[-1]) <= np.iinfo(np.int32).max else np.int64
        taken = self.taken
        numbers = np.concatenate([self.ids[taken], np.arange(len(self.positions), n_samples)])
        ids, positions = np.full(offsets[-1], -1, dtype=dtype), np.full(n_samples, -1, dtype=dtype)
        ids[places], positions[numbers] = numbers, places
        held = {}
        for name, array in rows.items():
            held[name] = hold(name, self.rows[name] if array is None else array, offsets)
            if n_old:
                held[name][places[:n_old]] = self.rows[name][taken]
            if array is not None:
                held[name][places[n_old:]] = array
        ends = offsets[:-1] + sizes
        return InvertedLists(
            offsets, ids, positions, held, self.radii, sizes, ends, ends.copy() if roomy else None
        )

    @property
    def nbytes(self):
        """Bytes of everything that is kept for each row."""
        return sum(array.nbytes for array in (self.ids, self.positions, *self.rows.values()))


def list_of(offsets, positions):
    """The list that each position belongs to, of lists that start at offsets (n_lists + 1,)."""
    return np.searchsorted(offsets, positions, side="right") - 1


def _in_lists(labels, counts, firsts):
    """Places of rows (n_rows,), those of each list (n_lists,) from its first on, in their order."""
    places = np.empty(len(labels), dtype=np.int64)
    order = np.argsort(labels, kind="stable")
    places[order] = np.arange(len(labels)) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)
    return places

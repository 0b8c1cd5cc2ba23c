"""Inverted lists: rows sorted by the list they belong to, one array for each thing kept of a row."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True, eq=False)
class InvertedLists:
    """Rows of all lists, one list after the other; never changed, only replaced.

    So a search that runs while rows are added sees the lists as they were before.
    """

    offsets: np.ndarray  # (n_lists + 1,) where each list starts
    ids: np.ndarray  # (n_rows,) row numbers, ascending within a list
    positions: np.ndarray  # (n_samples_fit,) where each row number stands, -1 once removed
    rows: dict  # name -> (n_rows, ...) what is kept of each row
    radii: np.ndarray  # (n_lists,) no row is farther from its list's anchor

    @classmethod
    def empty(cls, n_lists):
        """Lists without rows."""
        none = np.empty(0, dtype=np.int32)
        return cls(np.zeros(n_lists + 1, dtype=np.int64), none, none, {}, np.zeros(n_lists))

    @property
    def sizes(self):
        """Rows in each list, (n_lists,)."""
        return np.diff(self.offsets)

    def list_of(self, positions):
        """The list that each position belongs to."""
        return np.searchsorted(self.offsets, positions, side="right") - 1

    @property
    def labels(self):
        """List of each row number, -1 once removed, (n_samples_fit,)."""
        labels = np.full(len(self.positions), -1, dtype=np.int32)
        labels[self.ids] = np.repeat(np.arange(len(self.radii), dtype=np.int32), self.sizes)
        return labels

    def append(self, labels, rows, lengths):
        """New rows, numbered on from the last; lengths are their distances to their anchors."""
        n_samples = len(self.positions) + len(labels)
        id_dtype = np.int32 if n_samples <= np.iinfo(np.int32).max else np.int64
        new = {"ids": np.arange(len(self.positions), n_samples, dtype=id_dtype), **rows}
        old = {"ids": self.ids.astype(id_dtype, copy=False), **self.rows}
        all_labels = np.concatenate([np.repeat(np.arange(len(self.radii)), self.sizes), labels])
        order = np.argsort(all_labels, kind="stable")
        merged = {
            name: (np.concatenate([old[name], array]) if len(self.ids) else array)[order]
            for name, array in new.items()
        }
        radii = self.radii.copy()
        np.maximum.at(radii, labels, lengths)
        return replace(
            self._sorted(merged, np.bincount(all_labels, minlength=len(radii)), n_samples), radii=radii
        )

    def remove(self, numbers):
        """The lists without the rows of these numbers; the others keep their numbers."""
        keep = np.ones(len(self.ids), dtype=bool)
        keep[self.positions[numbers]] = False
        kept = {name: array[keep] for name, array in {"ids": self.ids, **self.rows}.items()}
        labels = np.repeat(np.arange(len(self.radii)), self.sizes)
        return self._sorted(kept, np.bincount(labels[keep], minlength=len(self.radii)), len(self.positions))

    def _sorted(self, rows, sizes, n_samples):
        ids = rows.pop("ids")
        positions = np.full(n_samples, -1, dtype=ids.dtype)
        positions[ids] = np.arange(len(ids))
        return InvertedLists(np.concatenate([[0], np.cumsum(sizes)]), ids, positions, rows, self.radii)

    @property
    def nbytes(self):
        """Bytes of everything that is kept for each row."""
        return sum(array.nbytes for array in (self.ids, self.positions, *self.rows.values()))

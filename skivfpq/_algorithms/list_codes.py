"""Rows of inverted lists as codes: how they are made, kept, and found by their tables (adc.c)."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from skivfpq import _kernels
from skivfpq._algorithms.codebooks import Codebooks, rotate
from skivfpq._algorithms.inverted_lists import list_of
from skivfpq._algorithms.list_planes import BLOCK, first_blocks_of, kernel_name, search_lists
from skivfpq._algorithms.planes import WIDEST
from skivfpq._algorithms.search import EPS, Metric
from skivfpq._kernels import UNDERFLOW, adc_scan, row_blocks, row_norms

READ_BEHIND = 64  # codes that kernels may read behind the last
TERM_EPS = np.finfo(np.float32).eps
LONGEST_PART = 32000  # so that products of two parts fit 32 bits
LARGEST_TERM = 16  # times the median, of rows that are scored
NIBBLES = 16  # codewords that fit half a byte


@dataclass(frozen=True, eq=False)
class Coding:
    """How rows become codes: x = a + y, its list's anchor and its codewords, which may be turned.

    Codes are compared where the codewords are: rows, anchors and queries are turned there, once.
    """

    metric: Metric
    codebooks: Codebooks
    anchors: np.ndarray  # (n_lists, n_features) float64: centers, or zeros
    is_residual: bool  # whether anchors are centers

    def __getstate__(self):
        return {
            own.name: getattr(self, own.name) for own in fields(self)
        }  # what follows from them is not kept

    @classmethod
    def of(cls, metric, centers, codebooks, is_residual):
        """With the centers of the lists as anchors, or without any."""
        return cls(metric, codebooks, centers if is_residual else np.zeros_like(centers), is_residual)

    @cached_property
    def origin(self):
        """What is taken off queries before their tables are made, (n_features,)."""
        shifts = self.is_residual and self.metric.is_distance
        return self.anchors.mean(axis=0) if shifts else np.zeros(self.anchors.shape[1])

    def turned(self, rows):
        """float64 rows where the codewords are."""
        return rotate(rows, self.codebooks.rotation)

    @cached_property
    def turned_anchors(self):
        """The same of the anchors."""
        return np.ascontiguousarray(self.turned(self.anchors))

    @cached_property
    def turned_origin(self):
        """The same of the origin."""
        return self.turned(self.origin[None])[0]

    @cached_property
    def unit(self):
        """A power of two that no codewords of a row, nor an anchor less the origin, are much longer than."""
        longest = max(self._longest_word, row_norms(self.anchors - self.origin).max())
        return np.ldexp(1.0, int(np.frexp(longest)[1])) if longest > 0 else 1.0

    @cached_property
    def _longest_word(self):
        return np.sqrt(sum(float(np.square(row_norms(part)).max()) for part in self.codebooks.codewords))

    @property
    def longest_word(self):
        """Of a row's codewords, scaled by the unit."""
        return self._longest_word / self.unit * (1 + 1e-6)

    @cached_property
    def longest_anchor(self):
        """Of an anchor less the origin, scaled."""
        return row_norms(self.anchors - self.origin).max() / self.unit * (1 + 1e-6)

    @cached_property
    def reach(self):
        """No decoded row is longer."""
        return (row_norms(self.anchors).max() + self._longest_word) * (1 + 1e-6)

    @property
    def rounding(self):
        """By how much of its length a decoded row may differ from anchor plus codewords, eightfold."""
        return 8 * self.codebooks.eps + 64 * EPS

    def encode(self, rows, labels, n_threads):
        """Codes and terms of metric rows of some lists, and their lengths |y|.

        Terms (n_rows,) float32: the bracket of ``search.CodeScan``, over unit^2; for the cosine the unit
        over |a + y|; none for the inner product.
        """
        anchors = self.anchors[labels]
        codes = self.codebooks.encode((rows - anchors).astype(self.codebooks.dtype), n_threads)
        decoded = self.codebooks.decode(codes).astype(np.float64)
        lengths = np.sqrt(np.square(decoded).sum(axis=1))
        terms = self._terms(decoded, anchors, codes, labels)
        return {"codes": codes} | ({} if terms is None else {"terms": terms.astype(np.float32)}), lengths

    @np.errstate(over="ignore")
    def _terms(self, decoded, anchors, codes, labels):
        if self.metric.is_product:
            return None
        if self.metric.is_cosine:
            inverse_norms = self.metric.inverse_norms(self.decode(codes, labels))
            return np.minimum(self.unit * inverse_norms, np.finfo(np.float32).max)
        scaled, shifts = decoded / self.unit, (anchors - self.origin) / self.unit
        return (scaled * (scaled + 2 * shifts)).sum(axis=1)

    def decode(self, codes, labels):
        """Turned rows of codes (n_rows, n_subspaces), in the dtype of the codebooks."""
        words = replace(self.codebooks, rotation=None).decode(codes)
        return (words + self.turned_anchors[labels]).astype(words.dtype)

    def turned_queries(self, queries):
        """Queries where the codewords are, float64 and in C order; None where they are there already."""
        if self.codebooks.rotation is None:
            return None
        return self.turned(queries.astype(np.float64, copy=False))

    # ---- what the kernels take

    @cached_property
    def features(self):
        """The first of each subspace, (n_subspaces + 1,)."""
        slices = self.codebooks.slices
        return np.array([part.start for part in slices] + [slices[-1].stop])

    @cached_property
    def codewords(self):
        """Of all subspaces, one after the other."""
        return np.concatenate([part.ravel() for part in self.codebooks.codewords])

    @cached_property
    def starts(self):
        """Where those of each subspace begin, (n_subspaces,)."""
        return np.cumsum([0] + [part.size for part in self.codebooks.codewords[:-1]])

    @cached_property
    def pairs(self):
        """The first pair of features of each subspace, (n_subspaces + 1,)."""
        return np.concatenate([[0], np.cumsum((np.diff(self.features) + 1) // 2)])

    @cached_property
    def level(self):
        """Of 16-bit levels of codewords, scaled: the longest part of any has LONGEST_PART."""
        longest = max(row_norms(part).max() for part in self.codebooks.codewords)
        return longest / self.unit / LONGEST_PART if longest > 0 else 1.0

    @cached_property
    def scaled(self):
        """Features (n_features, n_codewords) of codewords, scaled; the last again where they are few."""
        n = table_size(self.codebooks.n_codewords)
        scaled = np.empty((self.features[-1], n), dtype=np.float32)
        for columns, part in zip(self.codebooks.slices, self.codebooks.codewords):
            scaled[columns] = (part / self.unit).T[:, np.minimum(np.arange(n), len(part) - 1)]
        return scaled

    @cached_property
    def levels(self):
        """The same in levels, in pairs of features: (n_pairs, n_codewords, 2)."""
        levels = np.zeros((self.pairs[-1], self.scaled.shape[1], 2), dtype=np.int16)
        for first, columns in zip(self.pairs, self.codebooks.slices):
            for j, feature in enumerate(self.scaled[columns].astype(np.float64)):
                levels[first + j // 2, :, j % 2] = np.rint(feature / self.level)
        return levels


class CodeScan:
    """Scans lists of codes by asymmetric distance computation (Jegou et al. 2011, section 3.1), in NumPy.

    A row is x = a + y, a its list's anchor and y decoded. By |q - x|^2 = |q - a|^2 + (|y|^2 + 2 a.y) -
    2 q.y one table of products q.y for each query serves every list; the bracket is the row's term.
    Data far from zero has an origin o taken off a and q in the term and in the products.
    """

    def __init__(self, coding, queries):
        shifted = queries - coding.origin
        self.coding = coding
        self.queries = queries  # (n_queries, n_features) float64, as the metric sees them
        self.tables = coding.codebooks.product_tables(shifted)  # (n_queries, n_subspaces, n_codewords)
        self.lengths = row_norms(shifted)

    def keys(self, query_numbers, anchor, codes, terms, radius, reach):
        """Keys (n_queries, n_codes) and bounds (n_queries,) of their errors.

        terms : (n_codes,) of ``Coding.encode``
        radius, reach : most that a decoded row is away from its anchor, and from zero
        """
        metric, unit = self.coding.metric, self.coding.unit
        queries = self.queries[query_numbers]
        products = np.empty((len(queries), len(codes)))
        adc_scan(self.tables, query_numbers, np.ascontiguousarray(codes), products)
        slack = 8 * (len(anchor) + 8) * EPS + 8 * self.coding.codebooks.eps
        if metric.is_distance:
            sq_distances = np.square(queries - anchor).sum(axis=1)
            keys = sq_distances[:, None] + terms * unit**2 - 2 * products
            span = np.sqrt(sq_distances) + self.lengths[query_numbers] + radius
            rounding = TERM_EPS * np.abs(terms).max() * unit**2
            return keys, slack * span * (span + reach) + rounding + UNDERFLOW
        products += (queries @ anchor)[:, None]
        errors = slack * self.lengths[query_numbers] * reach + UNDERFLOW
        if metric.is_product:
            return -products, errors
        inverse_norms = terms / unit
        return 1 - products * inverse_norms, errors * inverse_norms.max() + slack + 2 * TERM_EPS


def table_size(n_codewords):
    """Entries of a table as kernels have them."""
    return next((n for n in (NIBBLES, 256) if n_codewords <= n), -(-n_codewords // 16) * 16)


@dataclass(frozen=True, eq=False)
class ListCodes:
    """Codes of the rows of lists, column by column within each list; it starts with a new block of 16 rows.

    Two codes of at most 16 codewords share a byte.
    """

    columns: np.ndarray  # (16 n_blocks n_columns + READ_BEHIND,) uint8 or uint16
    offsets: np.ndarray  # (n_lists + 1,) where each list starts
    blocks: np.ndarray  # (n_lists + 1,) the first block of each list
    n_subspaces: int
    packs: bool  # whether two codes share a byte

    @classmethod
    def empty(cls, offsets, n_subspaces, n_codewords):
        """Zeros, at the places of lists."""
        packs, blocks = n_codewords <= NIBBLES, first_blocks_of(offsets)
        dtype = np.uint8 if n_codewords <= 256 else np.uint16
        n_columns = -(-n_subspaces // 2) if packs else n_subspaces
        columns = np.zeros(BLOCK * blocks[-1] * n_columns + READ_BEHIND, dtype=dtype)
        return cls(columns, offsets, blocks, n_subspaces, packs)

    @property
    def shape(self):
        """(n_places, n_subspaces)."""
        return self.offsets[-1], self.n_subspaces

    @property
    def n_columns(self):
        """Of bytes, or of codes of 16 bits."""
        return -(-self.n_subspaces // 2) if self.packs else self.n_subspaces

    @property
    def nbytes(self):
        """Bytes of the codes."""
        return self.columns.nbytes

    def _list(self, number):
        """View (n_columns, rows in whole blocks) of a list."""
        first, last = BLOCK * self.n_columns * self.blocks[number : number + 2]
        return self.columns[first:last].reshape(self.n_columns, -1)

    def _unpacked(self, columns):
        """Codes (n_rows, n_subspaces) of columns (n_columns, n_rows)."""
        if not self.packs:
            return columns.T
        codes = np.empty((columns.shape[1], 2 * len(columns)), dtype=np.uint8)
        codes[:, ::2], codes[:, 1::2] = columns.T & 15, columns.T >> 4
        return codes[:, : self.n_subspaces]

    def of_list(self, number, part):
        """Codes (n_rows, n_subspaces) of some positions of a list: a slice, or an array."""
        first = self.offsets[number]
        inside = slice(part.start - first, part.stop - first) if isinstance(part, slice) else part - first
        return self._unpacked(self._list(number)[:, inside])

    def __getitem__(self, positions):
        """Codes (n_positions, n_subspaces) at any positions."""
        codes = np.empty((len(positions), self.n_subspaces), dtype=self.columns.dtype)
        for block in row_blocks(len(positions), self.n_columns):
            codes[block] = self._unpacked(self.columns[self._places(positions[block])])
        return codes

    def __setitem__(self, positions, codes):
        """Write codes (n_positions, n_subspaces) to their positions."""
        for block in row_blocks(len(positions), self.n_columns):
            low, high = (codes[block, ::2], codes[block, 1::2]) if self.packs else (codes[block], None)
            columns = low.T.copy()  # (n_columns, n_rows)
            if self.packs:
                columns[: high.shape[1]] |= high.T << 4
            self.columns[self._places(positions[block])] = columns

    def _places(self, positions):
        """Where the columns of rows at positions are, (n_columns, n_positions)."""
        lists = list_of(self.offsets, positions)
        strides = BLOCK * np.diff(self.blocks)[lists]
        firsts = BLOCK * self.n_columns * self.blocks[lists] + positions - self.offsets[lists]
        return firsts + strides * np.arange(self.n_columns)[:, None]


@dataclass(frozen=True, eq=False)
class CodedLists:
    """Rows list by list, as codes, for the scan of adc.c."""

    coding: Coding
    codes: ListCodes
    ids: np.ndarray  # (n_places,) int32, row numbers
    terms: np.ndarray | None  # (n_places,) float32, of Coding.encode
    strays: np.ndarray  # positions of rows that are evaluated, not scored
    allowed: np.ndarray | None = None  # (n_places,) uint8, whether a row may be found by its score

    @classmethod
    def of(cls, coding, lists):
        """Of InvertedLists; None where the kernel cannot serve."""
        can_serve = _kernels.NATIVE and lists.n_rows and lists.ids.dtype == np.int32
        if not (can_serve and coding.features[-1] <= WIDEST and 1e-100 < coding.unit < 1e100):
            return None
        if not coding.reach < np.finfo(coding.codebooks.dtype).max:
            return None
        codes, terms = lists.rows["codes"], lists.rows.get("terms")
        strays, allowed = np.empty(0, dtype=np.intp), lists.live
        if coding.metric.is_cosine:  # the few rows whose terms would make all scores coarse
            is_stray = terms > LARGEST_TERM * np.median(terms[lists.taken])
            if lists.live is not None:
                is_stray &= lists.live
            if is_stray.any():
                strays = np.flatnonzero(is_stray)
                allowed = ~is_stray if allowed is None else allowed & ~is_stray
        return cls(
            coding, codes, lists.ids, terms, strays, allowed if allowed is None else allowed.astype(np.uint8)
        )

    @property
    def metric(self):
        """As the kernels call it."""
        return kernel_name(self.coding.metric)

    @property
    def offsets(self):
        """(n_lists + 1,) where each list starts."""
        return self.codes.offsets

    @cached_property
    def largest_term(self):
        """Of all rows that may be found by their scores, if only a little."""
        if self.terms is None:
            return 1.0
        terms = self.terms if self.allowed is None else self.terms[self.allowed != 0]
        return float(max(terms.max(initial=0), 1e-30))

    @cached_property
    def scanned_terms(self):
        """The terms, none larger than of a row that may be found: scores of others fit 32 bits too."""
        if self.allowed is None or not self.coding.metric.is_cosine:
            return self.terms
        return np.minimum(self.terms, np.float32(self.largest_term))

    @cached_property
    def stray_offsets(self):
        """Where those of each list start, (n_lists + 1,)."""
        return np.searchsorted(self.strays, self.offsets)

    @cached_property
    def packed(self):
        """What the kernels take."""
        return _kernels.native.PackedCodes(self)

    def search(self, queries, probes, k, n_threads):
        """As ``ListPlanes.search``, for turned queries."""
        return search_lists(self, queries, probes, k, n_threads)

    def allowing(self, allowed):
        """The same of which only allowed rows, a mask over positions, are found."""
        mask = allowed.astype(np.uint8)
        mask[self.strays] = 0
        return replace(self, strays=self.strays[allowed[self.strays]], allowed=mask)

"""Kernels that are compiled only, against twins in NumPy, bit for bit, on every instruction set that runs.

The twins stand here because the package never runs them; ``certified_nearest`` has its oracle in
``test_planes.py``.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.testing import assert_allclose, assert_array_equal

from skivfpq import _kernels
from skivfpq._algorithms import blocks, planes, seeding
from skivfpq._kernels import reference, row_norms

native = _kernels.native
pytestmark = pytest.mark.skipif(not _kernels.NATIVE, reason="kernels that are compiled only")

CASES = [
    "normal",
    "zeros",
    "denormal",
    "inverse overflows",
    "tiny",
    "1e30",
    "1e30 value",
    "beyond float32",
    "constant columns",
    "long row",
]
SHAPES = [(1, 1), (17, 7), (33, 8), (48, 50)]
UNTOUCHED = 99


def awkward(case, shape, dtype=np.float64):
    X = np.random.default_rng(0).normal(size=shape)
    if case == "zeros":
        X[::3] = 0
        X[:, ::4] = 0
    elif case == "denormal":
        X *= 300 * np.finfo(dtype).smallest_subnormal
    elif case == "inverse overflows":
        X *= {np.float32: 1e-37, np.float64: 1e-305}[dtype]
    elif case == "tiny":
        X *= 1e-30
    elif case == "1e30":
        X *= 1e30
    elif case == "1e30 value":
        X[-1, -1] = 1e30
    elif case == "beyond float32":
        X[0] *= 1e39
    elif case == "constant columns":
        X[:, 1::2] = 7
    elif case == "long row":
        X[-1] *= 1000
    with np.errstate(over="ignore"):
        return X.astype(dtype)


@np.errstate(all="ignore")
def lengths_of(V):
    return row_norms(np.asarray(V, dtype=np.float64))


@np.errstate(all="ignore")
def quantized(V, steps):
    """Levels of float32 rows V (n, width) with a step for each; those beyond 127, or not finite, are 0.

    Returns the levels, int64, and which rows have none beyond 127.
    """
    inverse = np.divide(np.float32(1), steps, out=np.zeros_like(steps), where=steps > 0)
    levels = np.rint(V * inverse[:, None])
    return np.where(np.abs(levels) <= 127, levels, 0).astype(np.int64), ~(np.abs(levels) > 127).any(axis=1)


def pack_rows(Y, scale, codes, sq_norms):
    """Rows (n, width) as q + 128 into codes (n_blocks, units, lanes, 4), those that do not fit as zeros."""
    levels, fits = quantized(Y, np.full(len(Y), scale, dtype=np.float32))
    levels[~fits] = 0
    _, units, lanes, _ = codes.shape
    padded = np.zeros((len(Y), 4 * units), dtype=np.int64)
    padded[:, : Y.shape[1]] = levels
    for i, row in enumerate(padded):
        codes[i // lanes, :, i % lanes] = row.reshape(units, 4) + 128
    sq_norms[:] = np.square(levels).sum(axis=1)
    return levels, fits


def pack_columns(Y, scale, row_scale, panels, starts):
    """Columns (k, width) into panels (n_panels, units * columns * 4) and starts -128 sum(p) - h."""
    levels, _ = quantized(Y, np.full(len(Y), scale, dtype=np.float32))
    columns = native.scan_shape()[0]
    view = panels.reshape(len(panels), -1, columns, 4)  # (n_panels, units, columns, 4)
    for i, level in enumerate(levels):
        for j, value in enumerate(level):
            view[i // columns, j // 4, i % columns, j % 4] = value
    starts[: len(Y)] = -128 * levels.sum(axis=1) - np.floor(
        scale * np.square(levels).sum(axis=1) / (2 * row_scale)
    ).astype(np.int64)
    return levels


@np.errstate(all="ignore")
def fine_scales(V):
    """For float32 rows (n, width), up to rounding: products of levels fit 32 bits, and levels 16."""
    largest, lengths = np.fmax.reduce(np.abs(V), axis=1), lengths_of(V)
    scales = np.fmax(lengths / 46000, largest / 32766)
    return np.where((largest >= 1e-15) & (np.square(lengths) < np.finfo(np.float32).max), scales, 0)


def assert_bounds(errors, rests, slack):
    """errors (n,) are no less than the lengths of rests (n, width), and hardly more where those are known."""
    true = lengths_of(rests)
    assert np.all((errors >= true) | np.isnan(errors))  # NaN excludes nothing
    known = np.isfinite(true) & (true < 1e15)
    assert np.all(errors[known] <= 1.001 * true[known] + slack[known])


def scale_for(Y):
    """A scale as planes choose them: most rows fit, those that are much longer than others do not."""
    largest = np.abs(Y).max(axis=1)
    return float(np.clip(2.5 * np.median(largest) / 127, 1e-15, 1e15))


def check_rows(Y, scale, lanes, n_more_units=0):
    n, width = Y.shape
    bounds = np.zeros(n, dtype=np.float32)
    shape = (-(-n // lanes), -(-width // 4) + n_more_units, lanes, 4)
    codes, expected_codes = np.full(shape, UNTOUCHED, np.uint8), np.full(shape, UNTOUCHED, np.uint8)
    sq_norms, expected_sq_norms, errors = (
        np.empty(n, np.int32),
        np.empty(n, np.int32),
        np.empty(n, np.float32),
    )
    native.pack_rows(Y, scale, bounds, codes, sq_norms, errors)
    levels, fits = pack_rows(Y, scale, expected_codes, expected_sq_norms)
    assert_array_equal(codes, expected_codes)
    assert_array_equal(sq_norms, expected_sq_norms)
    assert np.all(errors[~fits] == np.inf)
    q, y = levels[fits], Y[fits].astype(np.float64)
    assert_bounds(errors[fits], y - scale * q, 2e-6 * scale * lengths_of(q) + 2e-18 * np.sqrt(width))
    more = np.linspace(0, 3, n, dtype=np.float32)
    more_errors = np.empty_like(errors)
    native.pack_rows(Y, scale, more, codes, sq_norms, more_errors)
    assert_array_equal(more_errors, errors + more)


def check_columns(Y, scale, row_scale):
    columns, _, multiple, _ = native.scan_shape()
    k, width = Y.shape
    units = -(-width // (4 * multiple)) * multiple
    shape = (-(-k // columns), 4 * units * columns)
    panels, expected_panels = np.zeros(shape, np.int8), np.zeros(shape, np.int8)
    starts, expected_starts = np.zeros(shape[0] * columns, np.int32), np.zeros(shape[0] * columns, np.int32)
    bounds = np.linspace(0, scale, k, dtype=np.float32)
    error = native.pack_columns(Y, scale, bounds, row_scale, panels, starts)
    levels = pack_columns(Y, scale, row_scale, expected_panels, expected_starts)
    if multiple > 1:  # a panel in an order of its own
        panels, expected_panels = np.sort(panels), np.sort(expected_panels)
    assert_array_equal(panels, expected_panels)
    assert_array_equal(starts, expected_starts)
    slack = 2e-6 * scale * lengths_of(levels).max(keepdims=True) + 2e-18 * np.sqrt(width)
    true = (lengths_of(Y - scale * levels) + bounds).max(keepdims=True)
    assert_bounds(np.array([error]), true[:, None], slack)


def check_fine(X, origin):
    codes, sq_norms = np.empty(X.shape, np.int16), np.empty(len(X), np.int32)
    scales, errors = np.empty(len(X), np.float32), np.empty(len(X), np.float32)
    native.pack_fine(X, origin, codes, scales, errors, sq_norms)
    with np.errstate(all="ignore"):
        V = (X - origin.astype(X.dtype)).astype(np.float32)
        expected = fine_scales(V)
        assert_allclose(scales, expected, rtol=2e-4)
        levels = np.rint(
            V * np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)[:, None]
        )
        assert_array_equal(codes, np.where(np.abs(levels) <= 32767, levels, 0))
        rests = X.astype(np.float64) - origin - scales[:, None].astype(np.float64) * codes
        slack = 2e-6 * scales * lengths_of(codes) + 2e-18 * np.sqrt(X.shape[1])
    assert_array_equal(sq_norms, np.square(codes.astype(np.int64)).sum(axis=1))
    assert np.all(sq_norms < 2**31 - 2**24)
    assert_bounds(errors, rests, slack)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_points_of_rows_and_columns(instruction_set, case, shape):
    Y = awkward(case, shape, np.float32)
    scale = scale_for(Y)
    for lanes, n_more_units in ((1, 0), (1, 2), (16, 0)):
        check_rows(Y, scale, lanes, n_more_units)
    fitting = np.ascontiguousarray(Y[np.abs(Y).max(axis=1) <= 60 * scale])
    if len(fitting):
        for row_scale in (scale / 64, scale, 3 * scale):
            check_columns(fitting, scale, row_scale)


def test_rows_fit_up_to_level_127(instruction_set):
    Y = np.zeros((8, 11), dtype=np.float32)
    Y[range(8), [0, 1, 2, 3, 8, 9, 10, 10]] = [127, 127.4, 127.6, -127.6, -127.4, 127.6, 128, -127]
    check_rows(Y, 1.0, 1)
    assert_array_equal(quantized(Y, np.ones(8, np.float32))[1], [1, 1, 0, 0, 1, 0, 0, 1])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fine_points(instruction_set, case, shape, dtype):
    X = awkward(case, shape, dtype)
    for origin in (np.zeros(shape[1], np.float32), np.linspace(-2, 3, shape[1], dtype=np.float32)):
        check_fine(X, origin)


FLOATS = {width: st.floats(width=width, allow_nan=False, allow_infinity=False) for width in (32, 64)}
FEW = array_shapes(min_dims=2, max_dims=2, max_side=20)


@given(
    Y=arrays(np.float32, FEW, elements=FLOATS[32]),
    scale=st.floats(1e-15, 1e15),
    ratio=st.floats(1 / 64, 64),
    lanes=st.sampled_from([1, 16]),
)
def test_points_of_any_rows_and_columns(instruction_set, Y, scale, ratio, lanes):
    check_rows(Y, scale, lanes)
    largest = native.scan_shape()[1] * scale
    check_columns(np.clip(Y, -largest, largest).astype(np.float32), scale, scale / ratio)


@given(
    X=arrays(np.float64, FEW, elements=FLOATS[64]), shift=st.floats(-1e3, 1e3, width=32), single=st.booleans()
)
def test_fine_points_of_any_rows(instruction_set, X, shift, single):
    origin = np.full(X.shape[1], shift, dtype=np.float32)
    with np.errstate(over="ignore"):
        check_fine(X.astype(np.float32) if single else X, origin)


@pytest.mark.parametrize("case", ["normal", "zeros", "1e30 value", "constant columns", "long row"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_thresholds_let_through_what_is_closer(instruction_set, case, dtype):
    X = awkward(case, (1050, 40), dtype)
    plane = planes.pack_plane(X, planes.all_features(X), lanes=16)
    chosen = np.flatnonzero(np.isfinite(plane.errors))[1::100]
    candidate_scale = planes.CandidateScale.of(X, plane)
    panels = planes.pack_candidates(X[chosen], plane, candidate_scale)
    scores, sq_distances = exact_scores(X, plane, panels), all_sq_distances(X, X[chosen])
    served = np.isfinite(plane.errors)
    for c in range(len(chosen)):
        closest, thresholds, caps = closest_of(X, plane, panels, sq_distances[:, c])
        assert_array_equal(closest, sq_distances[:, c])
        out = scores - thresholds[: len(X), None]  # (n_samples, n_candidates)
        assert np.all(out[sq_distances <= closest[:, None]] >= 0)
        kept = served & (caps[: len(X)] != 65535)
        assert np.all(out[kept] <= caps[: len(X), None][kept])  # so that sums modulo 2^16 do
    assert kept.mean() > 0.4
    assert (out[kept] < 0).mean() > 0.1


def exact_scores(X, plane, panels):
    """<q, p> - h of all rows and columns, (n_samples, n_candidates) int64."""
    Y, _ = plane.embedding(X)
    rows, fits = quantized(Y, np.full(len(Y), plane.scale, dtype=np.float32))
    Y, _ = plane.embedding(panels.centers)
    columns, _ = quantized(Y, np.full(len(Y), panels.scale, dtype=np.float32))
    half_norms = panels.starts[: len(columns)] + 128 * columns.sum(axis=1)
    return np.where(fits[:, None], rows, 0) @ columns.T + half_norms


def all_sq_distances(X, centers):
    return np.square(X[:, None].astype(np.float64) - centers).sum(axis=-1)


def closest_of(X, plane, panels, sq_distances):
    """closest (n_samples,), thresholds and caps (16 n_blocks,) that set_closest writes for all rows."""
    closest, thresholds, caps, _ = bars_of(X, plane, None, panels, sq_distances)
    return closest, thresholds, caps


def bars_of(X, plane, packed, panels, sq_distances):
    """The same, and limits (n_tiles * tile_rows(),)."""
    size, height = -(-len(X) // 16) * 16, native.tile_rows()
    closest, thresholds = np.full(len(X), np.inf), np.full(size, np.iinfo(np.int32).min // 2, dtype=np.int32)
    caps = np.full(size, 65535, dtype=np.int32)
    limits = np.full(-(-len(X) // height) * height, np.inf, dtype=np.float32)
    rows = np.arange(len(X), dtype=np.int32)
    sq_distances = np.ascontiguousarray(sq_distances)
    native.set_closest(
        X, plane, packed, panels.scale, panels.error, rows, sq_distances, closest, thresholds, caps, limits
    )
    return closest, thresholds, caps, limits


@pytest.mark.parametrize("has_plane", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "case", ["normal", "zeros", "long row", "1e30 value", "tiny", "far origin", "near ties"]
)
def test_closer_candidates(instruction_set, case, dtype, has_plane):
    rng = np.random.default_rng(1)
    X = awkward("normal" if case in ("tiny", "far origin", "near ties") else case, (1050, 40), dtype)
    X *= 1e-25 if case == "tiny" else 1
    X += 1e4 * rng.normal(size=40).astype(dtype) if case == "far origin" else 0
    weights = rng.random(len(X))
    plane = planes.pack_plane(X, planes.all_features(X), lanes=16) if has_plane else None
    if has_plane and plane is None:
        return  # values that no plane holds
    served = np.flatnonzero(np.isfinite(plane.errors)) if has_plane else np.arange(len(X))
    chosen = np.append(served[5:1000:111], len(X) - 1 if not has_plane else served[0])
    scale = planes.CandidateScale.of(X, plane) if has_plane else None
    panels = planes.pack_candidates(X[chosen], plane, scale)
    packed = blocks.PackedRows(X, 1)
    sq_distances = all_sq_distances(X, X[chosen])
    taken = X[[*range(0, 1000, 200), chosen[3]]]  # rows as far from a candidate as before
    if case == "near ties":
        taken = (X[chosen] * (1 + 1e-7 * rng.normal(size=(len(chosen), 40)))).astype(dtype)
    closest, *bars = bars_of(X, plane, packed, panels, all_sq_distances(X, taken).min(axis=1))
    rows, found = np.empty((len(chosen), 1050), np.int32), np.empty((len(chosen), 1050))
    n_closer, gains = np.full((3, len(chosen)), -1), np.full((3, len(chosen)), np.nan)
    parts = [slice(0, 480), slice(480, 960), slice(960, 1050)]
    thresholds, caps, limits = bars
    wanted = np.ones(len(chosen), np.uint8) if has_plane else np.arange(len(chosen), dtype=np.uint8) % 3 != 1
    width = -(-len(chosen) // native.panel_centers()) * native.panel_centers()
    hits, most = np.zeros((len(packed.tiles), width), np.uint64), np.full((3, width), np.nan)
    for part in ((0, 1), (1, 3)):
        weights32 = np.append(weights, np.zeros(len(limits) - 1050)).astype(np.float32)
        limits[1050:] = -np.inf
        native.score_candidates(X, packed, panels.centers, limits, weights32, 480, *part, hits, most)
    n_evaluated = [
        native.closer_candidates(
            X, plane, panels, thresholds, caps, hits, wanted.view(np.uint8), closest, weights, 480, *part, rows,
            found, n_closer, gains,
        )
        for part in ((0, 2), (2, 3))
    ]  # fmt: skip
    unit = packed.scale**2 / 2
    for p, part in enumerate(parts):
        for c in range(len(chosen)):
            closer = np.flatnonzero(sq_distances[part, c] < closest[part]) + part.start
            wins = weights[closer] * (closest[closer] - sq_distances[closer, c])
            if np.isfinite(most[p, c]):
                assert most[p, c] >= wins.sum() * unit * (1 - 3e-6)
            if not wanted[c]:
                assert n_closer[p, c] == gains[p, c] == 0
                continue
            stored = slice(part.start, part.start + len(closer))
            assert n_closer[p, c] == len(closer)
            assert_array_equal(rows[c, stored], closer)
            assert_array_equal(found[c, stored], sq_distances[closer, c])
            assert gains[p, c] == np.cumsum([0, *wins])[-1]  # added in the order of the rows
    if case == "normal":
        true = np.maximum(closest[:, None] - sq_distances, 0) * weights[:, None]
        sq_lengths = np.square(packed.lengths)
        rounding = 48 * 2.0**-24 * (weights @ sq_lengths + 3 * sq_lengths[chosen] * weights.sum())
        over = most.sum(axis=0)[: len(chosen)] - true.sum(axis=0) * unit
        assert np.all(over <= rounding + 1e-6 * weights @ (closest * unit + sq_lengths))
    if case in ("normal", "tiny") and (has_plane or case == "normal"):
        pairs = (closest > 0).sum() * len(chosen)
        assert sum(n_evaluated) < (0.9 if has_plane else 0.6) * pairs
    for c in np.flatnonzero(wanted):
        n = native.join_parts(rows[c], found[c], n_closer[:, c], 480)
        assert_array_equal(rows[c, :n], np.flatnonzero(sq_distances[:, c] < closest))
        assert_array_equal(found[c, :n], sq_distances[rows[c, :n], c])


@pytest.mark.parametrize("n", [1, 255, 256, 257, 3000])
def test_masses(n):
    rng = np.random.default_rng(n)
    weights, order = rng.integers(0, 3, n).astype(float), rng.permutation(n)
    weights[order[n // 2 :]] = 0  # blocks that add nothing
    weights[order[0]] = 1
    ranks = np.argsort(order)
    states = [(np.zeros((-(-n // 256), 256)), np.zeros(-(-n // 256)), np.empty(-(-n // 256))) for _ in "ab"]
    for rows in (np.arange(n), rng.permutation(n)[: n // 3], np.empty(0, int)):
        sq_distances = rng.random(len(rows))
        for kernels, state in zip((native, reference), states):
            kernels.update_mass(rows.astype(np.int32), sq_distances, weights, ranks, *state)
        for one, other in zip(*states):
            assert_array_equal(one, other)
    masses = states[0][0].reshape(-1)
    assert masses[:n].sum() == pytest.approx(states[0][2][-1], rel=1e-12)
    uniforms = np.append(rng.random(200), [0.0, 1 - 2.0**-53])
    found, expected = np.empty(202, np.int64), np.empty(202, np.int64)
    native.draw_mass(states[0][0], states[0][2], uniforms, found)
    reference.draw_mass(states[0][0], states[0][2], uniforms, expected)
    assert_array_equal(found, expected)
    assert np.all(masses[found] > 0)
    assert_array_equal(found[:200], np.searchsorted(np.cumsum(masses), uniforms[:200] * masses.sum()))


@pytest.mark.parametrize("bits", [64, 40, 3, 0])
@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_order_by_hash(n, bits):
    hashes = np.random.default_rng(0).integers(0, 2**64 - 1, n, dtype=np.uint64)
    hashes = hashes >> np.uint64(64 - bits) if bits else hashes * np.uint64(0)  # in one bucket, many equal
    order = np.full(n, -1)
    native.order_by_hash(hashes, order)
    assert_array_equal(order, np.argsort(hashes, kind="stable"))


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 15), (9, 33, 16), (4, 100, 50), (17, 20, 144)])
def test_multiply(instruction_set, shape):
    n, n_features, n_axes = shape
    rng = np.random.default_rng(0)
    V = rng.normal(size=(n, n_features)).astype(np.float32)
    axes = rng.normal(size=(n_features, n_axes)).astype(np.float32)
    out = np.full((n + 1, n_axes), UNTOUCHED, dtype=np.float32)
    native.multiply(V, axes, out[:n])
    V, axes = V.astype(np.float64), axes.astype(np.float64)
    rounding = (n_features + 2) * 2.0**-24 * (np.abs(V) @ np.abs(axes))
    assert np.all(np.abs(out[:n] - V @ axes) <= rounding)
    assert np.all(out[n:] == UNTOUCHED)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (20, 33), (64, 64)])
def test_orthonormalize(instruction_set, shape):
    Q = np.random.default_rng(0).normal(size=shape) * 10.0 ** -np.arange(shape[0])[:, None]
    found = Q.copy()
    native.orthonormalize(found)
    assert_allclose(found @ found.T, np.eye(shape[0]), atol=1e-14)
    for m in range(1, shape[0] + 1):  # in their order: the same span as of the rows so far
        left = Q[:m] - Q[:m] @ found[:m].T @ found[:m]
        assert np.all(np.abs(left) <= 1e-13 * np.abs(Q[:m]).max(axis=1, keepdims=True))


def test_orthonormalize_nearly_equal_rows(instruction_set):
    Q = 1 + 1e-6 * np.random.default_rng(0).normal(size=(20, 33))
    native.orthonormalize(Q)
    assert_allclose(Q @ Q.T, np.eye(20), atol=1e-14)  # 1e-10 without a second round


def test_rows_in_the_span_of_others_become_zeros(instruction_set):
    Q = np.random.default_rng(0).normal(size=(5, 12))
    Q[2], Q[3] = Q[0] - 3 * Q[1], 0
    native.orthonormalize(Q)
    assert_array_equal(Q[2:4], np.zeros((2, 12)))
    assert_allclose(Q @ Q.T, np.diag([1, 1, 0, 0, 1]), atol=1e-14)


@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 7, 16), (9, 32, 48), (13, 51, 80), (4, 1001, 16)])
def test_project(instruction_set, shape):
    n, n_features, n_axes = shape
    rng = np.random.default_rng(0)
    codes = rng.integers(-1000, 1000, (n, n_features)).astype(np.int16)
    axes = rng.integers(-1000, 1000, (n_features, n_axes)).astype(np.int16)
    padded = np.vstack([axes, np.full((n_features % 2, n_axes), 77, np.int16)])  # the last code has no other
    out = np.full((n + 1, n_axes), 7, dtype=np.int32)
    packed = np.ascontiguousarray(padded.reshape(-1, 2, n_axes).transpose(0, 2, 1))
    native.project(codes, packed, out[:n])
    assert_array_equal(out[:n], codes.astype(np.int64) @ axes)
    assert np.all(out[n:] == 7)
    with pytest.raises(ValueError, match="shapes"):
        native.project(codes, packed[:, :-1].copy(), out[:n, :-1].copy())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n_axes", [None, 5, 16, 44])
def test_embed(instruction_set, dtype, n_axes):
    X = awkward("steep spectrum", (21, 50), dtype)
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(50, 50)))[0][:, :n_axes] if n_axes else None
    embedding = planes.Embedding(X.mean(axis=0), axes, tail_origin=0.2)
    Y, bounds = np.full((22, embedding.width), UNTOUCHED, np.float32), np.full(22, np.nan, np.float32)
    native.embed(X, embedding, Y[:21], bounds[:21])
    expected = X.astype(np.float64) - embedding.origin
    if n_axes:
        assert_allclose(embedding.axes, axes, atol=2e-3)
        assert np.linalg.norm(embedding.axes, 2) <= 1
        head = expected @ embedding.axes
        tails = np.sqrt(np.square(expected).sum(axis=1) - np.square(head).sum(axis=1)) - 0.2
        expected = np.hstack([head, np.repeat(tails[:, None] / 2, 4, axis=1)])
    assert np.all(lengths_of(Y[:21] - expected) <= bounds[:21])
    assert np.all(bounds[:21] <= 1e-2 * lengths_of(expected) + 1e-6)
    assert np.all(Y[21] == UNTOUCHED)
    assert np.isnan(bounds[21])


@pytest.mark.parametrize("lanes", [1, 16])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_packing_in_one_pass(instruction_set, lanes, dtype):
    X = awkward("heavy tails", (133, 50), dtype)
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(50, 50)))[0][:, :16]
    for embedding in (planes.all_features(X), planes.Embedding(X.mean(axis=0), axes)):
        plane = planes.pack_plane(X, embedding, lanes=lanes)
        Y, bounds = embedding(X)
        codes = np.full_like(plane.codes, 128)
        sq_norms, errors = np.empty(133, np.int32), np.empty(133, np.float32)
        native.pack_rows(Y, plane.scale, bounds, codes, sq_norms, errors)
        fine = [np.empty_like(array) for array in plane.fine]
        native.pack_fine(X, embedding.origin, *fine)
        for found, expected in zip(
            (plane.codes, plane.sq_norms, plane.errors, *plane.fine), (codes, sq_norms, errors, *fine)
        ):
            assert_array_equal(found, expected)
        with pytest.raises(ValueError, match="shapes"):
            native.pack_plane(X, plane, 7 if lanes > 1 else 133, 133, True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_moved_rows(instruction_set, dtype):
    rng = np.random.default_rng(0)
    n, k, limit = 400, 9, 50.0
    X = rng.normal(size=(n, 13)).astype(dtype)
    X[3] *= 1000
    weights = rng.random(n) + 0.5
    before = rng.integers(k, size=n).astype(np.int32)
    before[before == 8] = 0  # an empty one
    labels = np.where(rng.random(n) < 0.3, rng.integers(k, size=n), before).astype(np.int32)
    before[3], labels[3] = 2, 5
    rows = np.flatnonzero(labels != before).astype(np.int32)
    moves = np.concatenate([before[rows], labels[rows]])
    events, bounds = np.empty(len(moves), np.int32), np.empty(k + 1, np.int32)
    native.order_by_label(moves, events, bounds)
    sums = np.zeros((k, 13))
    np.add.at(sums, before, weights[:, None] * X)
    clusters, given_up = np.array([0, 1, 2, 5, 8]), np.full(k, 7, np.uint8)
    expected = sums.copy()
    for e in events:  # by hand, in their order
        row, cluster = rows[e % len(rows)], moves[e]
        if cluster in clusters:
            expected[cluster] += (-1 if e < len(rows) else 1) * weights[row] * X[row].astype(np.float64)
    native.move_rows(X, weights, rows, events, bounds, clusters, limit, sums, given_up)
    assert_array_equal(sums, expected)
    assert_array_equal(given_up, [0, 0, 1, 7, 7, 1, 7, 7, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_follow_labels(instruction_set, dtype):
    rng = np.random.default_rng(0)
    X, weights = rng.normal(size=(300, 11)).astype(dtype), rng.random(300)
    before, labels = rng.integers(7, size=(2, 300)).astype(np.int32)
    labels[30:] = before[30:]
    moved = np.flatnonzero(labels != before)
    sums, counts = rng.normal(size=(7, 11)), rng.random(7)

    def followed(few):
        result = sums.copy(), counts.copy()
        assert native.follow_labels(X, weights, labels, before, few, 10.0, *result) == len(moved)
        return result

    by_moves = sums.copy()
    for row in moved:  # in their order
        by_moves[before[row]] -= weights[row] * X[row].astype(np.float64)
        by_moves[labels[row]] += weights[row] * X[row].astype(np.float64)
    anew = np.zeros((7, 11))
    np.add.at(anew, labels, weights[:, None] * X.astype(np.float64))
    weighed = np.bincount(labels, weights, minlength=7)
    for few, expected in [(len(moved), by_moves), (len(moved) - 1, anew), (-1, anew)]:
        assert_array_equal(followed(few)[0], expected)
        assert_array_equal(followed(few)[1], weighed)
    X[100] = 1e6  # which does not move
    assert_array_equal(followed(300)[0], by_moves)
    labels[100] = 6 - before[100] if before[100] != 3 else 0
    moved = np.flatnonzero(labels != before)
    anew[before[100]] = anew[labels[100]] = 0
    for row in np.flatnonzero((labels == before[100]) | (labels == labels[100])):
        anew[labels[row]] += weights[row] * X[row].astype(np.float64)
    assert_array_equal(followed(300)[0], anew)
    labels[:] = before
    moved = []
    assert_array_equal(followed(0)[0], sums)
    assert_array_equal(followed(0)[1], counts)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_centers_far_beyond_the_rows_that_set_the_scale(instruction_set, monkeypatch, dtype):
    """Rows and centers about 2^60 times as long as most, where tiles leave rows out."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(600, 5)).astype(dtype)
    far = np.setdiff1d(np.arange(600), np.arange(600)[blocks.evenly(600, blocks.SAMPLE)])[::25]
    X[far, 0] = rng.choice([-1, 1], len(far)) * 2.0 ** rng.uniform(61, 65, len(far))
    packed = blocks.PackedRows(X, 1)
    for chosen in (far, *far.reshape(-1, 2), *far.reshape(-1, 3)):
        centers = X[chosen].astype(np.float64)
        labels = np.full(len(X), -1, dtype=np.int32)
        packed.nearest_centers(centers, labels)
        sq_distances = np.square(X[:, None].astype(np.float64) - centers).sum(axis=2)
        assert_array_equal(labels, sq_distances.argmin(axis=1))
    chosen = [seeding.kmeans_plusplus(X, 8, np.ones(600), np.random.default_rng(i)) for i in range(10)]
    monkeypatch.setattr(seeding, "runs_native", lambda X: False)
    for i in range(10):
        expected = seeding.kmeans_plusplus(X, 8, np.ones(600), np.random.default_rng(i))
        for ours, plain in zip(chosen[i], expected):
            assert_array_equal(ours, plain)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("origin_dtype", [np.float32, np.float64])
def test_tiles_and_what_is_nearest_by_them(instruction_set, case, dtype, origin_dtype):
    if case == "beyond float32" and np.float32 in (dtype, origin_dtype):
        pytest.skip("not finite")
    X = awkward(case, (130, 20), dtype)
    height = native.tile_rows()
    rounded, scale = X.mean(axis=0, dtype=np.float64).astype(origin_dtype), 0.25
    origin = rounded.astype(np.float64)
    shape = (-(-len(X) // height), 20, height)
    tiles, lengths = np.full(shape, UNTOUCHED, np.float32), np.full(len(X), np.nan)
    cut = 2 * height
    native.pack_tiles(X, origin, scale, 0, cut, tiles, lengths)
    native.pack_tiles(X, origin, scale, cut, len(X), tiles, lengths)
    shifted = ((X - rounded) * scale).astype(np.float64)  # in float32 where both are
    expected = np.empty((shape[0] * height, 20), dtype=np.float32)
    expected[: len(X)] = -np.where(np.abs(shifted) < 2.0**60, shifted, 0)
    expected[len(X) :] = expected[len(X) - 1]
    assert_array_equal(tiles, expected.reshape(shape[0], height, 20).transpose(0, 2, 1))
    assert_allclose(lengths, lengths_of(shifted), rtol=1e-14, atol=1e-160)
    centers = X[::9].astype(np.float64)
    labels, sq_distances = np.full(len(X), -1, np.int32), np.empty(len(X))
    for first, last in ((0, cut), (cut, len(X))):
        native.nearest_packed(X, origin, scale, tiles, lengths, centers, first, last, labels)
    distances = all_sq_distances(X, centers)
    assert_array_equal(labels, distances.argmin(axis=1))
    native.row_sq_distances(X, centers, labels, sq_distances)
    assert_array_equal(sq_distances, distances.min(axis=1))

"""The command ``quantize``: product quantization and its rotation, learning and encoding."""

from functools import partial

import numpy as np
from data import DataError, sample_rows
from kmeans import excess, notes, require_ours
from measure import first_runs, ratio, run_rounds, say, spread
from peers import OURS, CodeSpec
from report import number
from scipy.spatial.distance import cdist

ABILITIES = ("quantizer",)
TASKS = ("pq", "opq")
DEFAULT_ITERATIONS = 25
DEFAULT_SETTINGS = ["8:8", "8:16", "4:4", "4:8"]
CHECKED_ROWS = 2000
BLOCK = 4096


def add_arguments(parser):
    """Options of this command alone."""
    parser.add_argument(
        "--settings",
        nargs="+",
        default=DEFAULT_SETTINGS,
        metavar="BITS:FEATURES",
        help=f"bits of a code, and features that share one (default: {' '.join(DEFAULT_SETTINGS)})",
    )
    parser.add_argument("--training-rows", type=int, default=65_536, help="most rows to learn from")


def run(args, data, peers, report, _peak):
    """All settings and tasks that were asked for."""
    training = sample_rows(data.X, args.training_rows)
    settings = [parse_setting(text) for text in args.settings]
    most = max(1 << n_bits for n_bits, _ in settings)
    if most >= len(training):
        raise DataError(f"{most} codewords need more than the {len(training)} training rows.")
    for task in args.tasks:
        for n_bits, features in settings:
            n_subspaces = subspaces(data.X.shape[1], features)
            spec = CodeSpec(n_subspaces, n_bits, task == "opq", args.iterations, args.threads, seed=0)
            compare(args, data.X, training, spec, peers, report)


def parse_setting(text):
    """Bits of a code and features of a subspace, from 8:16."""
    bits, _, features = text.partition(":")
    if not (bits.isdigit() and features.isdigit() and 1 <= int(bits) <= 8 and int(features) > 0):
        raise DataError(f"--settings {text}: expected bits (1 to 8) and features of a code, as in 8:16.")
    return int(bits), int(features)


def subspaces(n_features, features):
    """How many codes for a row: peers want subspaces of equal size, of that many features or more."""
    most = max(1, n_features // features)
    return next(count for count in range(most, 0, -1) if n_features % count == 0)


def squared_error(X, model, codes):
    """Mean over the rows of their squared distance to their decoded selves, in float64."""
    total = 0.0
    for start in range(0, len(X), BLOCK):
        decoded = np.asarray(model.inverse_transform(codes[start : start + BLOCK]), dtype=np.float64)
        total += np.square(X[start : start + BLOCK] - decoded).sum()
    return total / len(X)


def wrong_codes(X, quantizer, codes):
    """How many of some rows' codes of ours do not name the nearest codeword, without a rotation."""
    rows = np.random.default_rng(0).choice(len(X), min(CHECKED_ROWS, len(X)), replace=False)
    parts = np.array_split(X[rows].astype(np.float64), quantizer.n_subspaces_, axis=1)
    wrong = 0
    for m, (part, codewords) in enumerate(zip(parts, quantizer.codebooks_)):
        distances = cdist(part, codewords.astype(np.float64), "sqeuclidean")
        own = distances[np.arange(len(rows)), codes[rows, m]]
        wrong += int(np.count_nonzero(own > distances.min(axis=1) * (1 + 1e-12)))
    return wrong


def timed_codes(quantizer, spec, training, X, stopwatch, _number):
    """One run: learn from the training rows, encode all."""
    model = quantizer(spec)
    with stopwatch("fit"):
        model.fit(training)
    with stopwatch("transform"):
        codes = model.transform(X)
    return model, codes


def compare(args, X, training, spec, peers, report):
    """One setting, by everybody."""
    title = f"{'OPQ' if spec.opq else 'PQ'}, {spec.n_subspaces} codes of {spec.n_bits} bits"
    say(title)
    runners = {peer.name: partial(timed_codes, peer.quantizer, spec, training, X) for peer in peers}
    records = first_runs(runners)
    require_ours(records)
    errors = {name: squared_error(X, *record.result) for name, record in records.items() if record.result}
    wrong = 0 if spec.opq else wrong_codes(X, *records[OURS].result)
    failed = [f"{title}: {wrong} codes are not those of the nearest codeword"] if wrong else []
    run_rounds(runners, records, args.repeats, slow=args.slow)

    variance = X.var(axis=0, dtype=np.float64).sum()
    rows, facts = [], []
    for name, error in errors.items():
        times = phase_times(records[name], records[OURS])
        quality = {"squared_error": error, "of_variance": error / variance}
        rows.append(code_row(records[name], times, quality, errors[OURS]))
        facts.append({**records[name].describe(), **times, **quality, "cores": records[name].cores()})
    facts += [record.describe() for record in records.values() if record.first is None]
    report.section(
        f"{title}, {len(training):,} training rows, {spec.iterations} iterations",
        ("peer", "fit s", "ratio", "transform s", "ratio", "sum s", "min", "max", "runs", "ratio", "cores")
        + ("squared error", "of variance", "vs ours"),
        rows,
        notes(records, failed),
        {
            "task": "opq" if spec.opq else "pq",
            **{"n_subspaces": spec.n_subspaces, "n_bits": spec.n_bits, "training_rows": len(training)},
            **{"failed_checks": failed, "records": facts},
        },
    )


def phase_times(record, ours):
    """Spread and ratio of fit, transform and both."""
    phases = {"fit": "fit", "transform": "transform", "sum": None}
    return {
        name: {**spread(record.seconds(phase)), "ratio": ratio(record.seconds(phase), ours.seconds(phase))}
        for name, phase in phases.items()
    }


def code_row(record, times, quality, our_error):
    """Cells of a peer."""
    whole = times["sum"]
    phases = [
        cell
        for name in ("fit", "transform")
        for cell in (number(times[name]["median"]), f"{times[name]['ratio']:.2f}")
    ]
    error = quality["squared_error"]
    return (
        record.peer,
        *phases,
        *(number(whole[key]) for key in ("median", "min", "max")),
        *(str(whole["n"]), f"{whole['ratio']:.2f}", f"{record.cores():.2f}"),
        *(f"{error:.6g}", f"{quality['of_variance']:.4f}", excess(error, our_error)),
    )

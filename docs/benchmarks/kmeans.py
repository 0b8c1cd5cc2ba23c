"""The command ``kmeans``: Lloyd iterations from given centers, default fits, small problems."""

from dataclasses import replace
from functools import partial
from itertools import product
from math import exp, fsum, log
from statistics import mean, median

import numpy as np
from data import DataError, blobs, distinct_rows
from measure import first_runs, lloyd_gflops, ratio, run_rounds, say, spread
from peers import OURS, Clustering, Problem
from report import number
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

ABILITIES = ("lloyd", "default_fit")
TASKS = ("lloyd", "default", "small", "predict")
DEFAULT_ITERATIONS = 10
CHECKED_ROWS = 2000
BLOCK = 4096  # rows whose differences are held at a time
RTOL = 1e-5  # of inertia: float32 scores cost the peers that much
WARM_UP_ROWS = 1000
PREDICTED = (1, 10, 100, 1000, 10_000)  # rows whose labels are asked for
PREDICTED_TOGETHER = 2000  # rows of a run: fewer are asked for several times
CELL_SECONDS = 30  # rounds of one small problem: no more are begun after that


def add_arguments(parser):
    """Options of this command alone."""
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 1024], metavar="K")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the default fits")
    parser.add_argument("--default-repeats", type=int, default=1, help="rounds over those seeds")
    grid = parser.add_argument_group("small problems")
    grid.add_argument("--grid-clusters", type=int, nargs="+", default=[2, 10, 100], metavar="K")
    grid.add_argument("--grid-rows", type=int, nargs="+", default=[1000, 10_000, 100_000], metavar="N")
    grid.add_argument("--grid-features", type=int, nargs="+", default=[2, 10, 100], metavar="D")
    grid.add_argument("--grid-dtype", choices=["float32", "float64"], default="float64")


def run(args, data, peers, report, peak):
    """All tasks that were asked for."""
    if "small" not in args.tasks or len(args.tasks) > 1:
        most = max(args.clusters)
        if most > len(data.X):
            raise DataError(f"--clusters {most} is more than the {len(data.X)} rows.")
    for n_clusters in args.clusters:
        if "lloyd" in args.tasks:
            lloyd(args, data.X, n_clusters, peers, report, peak)
    for n_clusters in args.clusters:
        if "default" in args.tasks:
            default_fits(args, data.X, n_clusters, peers, report)
    if "small" in args.tasks:
        small(args, peers, report)
    for n_clusters in args.clusters:
        if "predict" in args.tasks:
            predict(args, data.X, n_clusters, peers, report)


def inertia(X, clustering):
    """Sum of squared differences to the own center, in float64."""
    centers = np.asarray(clustering.centers, dtype=np.float64)
    blocks = (slice(start, start + BLOCK) for start in range(0, len(X), BLOCK))
    return fsum(np.square(X[block] - centers[clustering.labels[block]]).sum() for block in blocks)


def wrong_labels(X, clustering):
    """How many of some rows have a nearer center than their own, by differences in float64."""
    rows = np.random.default_rng(0).choice(len(X), min(CHECKED_ROWS, len(X)), replace=False)
    centers = np.asarray(clustering.centers, dtype=np.float64)
    distances = cdist(X[rows].astype(np.float64), centers, "sqeuclidean")
    own = distances[np.arange(len(rows)), clustering.labels[rows]]
    return int(np.count_nonzero(own > distances.min(axis=1) * (1 + 1e-12)))


def quality(X, clustering):
    """What a clustering is worth."""
    return {
        "inertia": inertia(X, clustering),
        "wrong_labels": wrong_labels(X, clustering),
        "n_iter": int(clustering.n_iter),
    }


def one_iteration(problem, peers):
    """Inertia of exact peers and ours after one iteration.

    Later ones tell nothing: peers that assign by float32 scores take another path after a near tie, and
    may end lower or higher.
    """
    single = replace(problem, iterations=1)
    runners = {peer.name: partial(timed_lloyd, peer.lloyd, single) for peer in peers if peer.exact}
    records = first_runs(runners)
    require_ours(records)
    return {name: inertia(problem.X, record.result) for name, record in records.items() if record.result}


def failed_checks(ours, inertias):
    """What is wrong with our clustering, or with our inertia after one iteration beside the peers'."""
    failed = []
    if ours["wrong_labels"]:
        failed.append(f"{ours['wrong_labels']} labels looked at are not those of the nearest center")
    for name, value in inertias.items():
        if inertias[OURS] > value * (1 + RTOL):
            found = f"{inertias[OURS]:.9g} exceeds {value:.9g} of {name}"
            failed.append(f"inertia after one iteration {found}")
    return failed


def lloyd(args, X, n_clusters, peers, report, peak):
    """The same number of iterations from the same centers, by everybody."""
    peers = [peer for peer in peers if peer.lloyd]
    problem = Problem(X, distinct_rows(X, n_clusters, seed=0), args.iterations, args.threads, seed=0)
    say(f"Lloyd iterations, {n_clusters} clusters")
    runners = {peer.name: partial(timed_lloyd, peer.lloyd, problem) for peer in peers}
    records = first_runs(runners)
    alive = [peer for peer in peers if not records[peer.name].failure]
    require_ours(records)
    qualities = {peer.name: quality(X, records[peer.name].result) for peer in alive}
    single = one_iteration(problem, alive)
    failed = failed_checks(qualities[OURS], single)
    run_rounds(runners, records, args.repeats, slow=args.slow)

    rows, facts = [], []
    for peer in alive:
        record, found = records[peer.name], qualities[peer.name]
        rates = rate(X.shape, n_clusters, found["n_iter"], record, peak)
        times = {**spread(record.seconds()), "ratio": ratio(record.seconds(), records[OURS].seconds())}
        rows.append(lloyd_row(record, times, rates, found, qualities[OURS]))
        facts.append({**record.describe(), **times, **rates, **found, "exact": peer.exact})
    facts += [record.describe() for record in records.values() if record.first is None]
    report.section(
        f"k-means, {n_clusters} clusters, {args.iterations} iterations from the same centers",
        ("peer", "seconds", "min", "max", "runs", "ratio", "iterations", "GFLOP/s", "of sgemm", "cores")
        + ("inertia", "vs ours", "wrong labels"),
        rows,
        notes(records, failed),
        {"task": "lloyd", "clusters": n_clusters, "failed_checks": failed}
        | {"inertia_after_one_iteration": single, "records": facts},
    )


def timed_lloyd(function, problem, stopwatch, _number):
    """One run."""
    with stopwatch("fit"):
        return function(problem)


def rate(shape, n_clusters, n_iter, record, peak):
    """GFLOP/s as if every distance were computed, and as a share of what matrix products reach."""
    gflops = lloyd_gflops(shape, n_clusters, n_iter, median(record.seconds()))
    return {"gflops": gflops, "of_sgemm": gflops / peak, "cores": record.cores()}


def lloyd_row(record, times, rates, found, ours):
    """Cells of a peer."""
    return (
        record.peer,
        *(number(times[key]) for key in ("median", "min", "max")),
        str(times["n"]),
        f"{times['ratio']:.2f}",
        str(found["n_iter"]),
        *(number(rates["gflops"]), number(rates["of_sgemm"]), f"{rates['cores']:.2f}"),
        *(f"{found['inertia']:.7g}", excess(found["inertia"], ours["inertia"]), str(found["wrong_labels"])),
    )


def excess(value, ours):
    """By how many percent something is above ours."""
    return f"{100 * (value / ours - 1):+.3f} %" if ours else "-"


def notes(records, failed=()):
    """What readers of a table should know."""
    lines = [f"CHECK FAILED: {check}" for check in failed]
    lines += [f"{record.peer} failed: {record.failure}" for record in records.values() if record.failure]
    lines += [f"{record.peer} warned: {text}" for record in records.values() for text in record.warnings]
    return [line.splitlines()[0] for line in lines]


def require_ours(records):
    """Without ours there is nothing to compare with."""
    if records[OURS].failure:
        raise DataError(f"skivfpq failed: {records[OURS].failure}")


class DefaultFits:
    """Fits of one peer that sets nothing but n_clusters and random_state, run after run."""

    def __init__(self, peer, X, n_clusters, args, *, warm_up):
        self.fit, self.X, self.n_clusters, self.threads = peer.default_fit, X, n_clusters, args.threads
        self.n_seeds, self.warm_up = args.seeds, warm_up
        self.outcomes = []

    def __call__(self, stopwatch, number):
        """One run: number 0 on a few rows if it is to warm up, the others by turns of the seeds."""
        X, n_clusters, seed = self.X, self.n_clusters, (number - 1) % self.n_seeds
        if number == 0 and self.warm_up:
            X = X[:WARM_UP_ROWS]
            n_clusters = min(n_clusters, 10, len(X))
        with stopwatch("fit"):
            clustering = self.fit(X, n_clusters, seed, self.threads)
        if number or not self.warm_up:
            facts = {"run": number, "seed": seed, "n_iter": int(clustering.n_iter)}
            self.outcomes.append({**facts, "inertia": inertia(X, clustering)})

    def mean(self, key):
        """Of the timed runs, or of the first where there was no other."""
        kept = [outcome[key] for outcome in self.outcomes if outcome["run"]]
        return mean(kept or [self.outcomes[0][key]])


def compare_default_fits(X, n_clusters, peers, args, *, repeats, warm_up, **limits):
    """Records and fits of each peer, by name."""
    fits = {peer.name: DefaultFits(peer, X, n_clusters, args, warm_up=warm_up) for peer in peers}
    records = first_runs(fits)
    require_ours(records)
    run_rounds(fits, records, repeats, **limits)
    require_ours(records)
    return records, fits


def default_facts(records, fits):
    """Everything about default fits, peer by peer, failed ones without times."""
    facts = {}
    for name, record in records.items():
        facts[name] = {**record.describe(), "outcomes": fits[name].outcomes}
        if not record.failure:
            seconds = record.seconds()
            facts[name] |= {**spread(seconds), "ratio": ratio(seconds, records[OURS].seconds())}
            facts[name] |= {f"mean_{key}": fits[name].mean(key) for key in ("inertia", "n_iter")}
    return facts


def default_fits(args, X, n_clusters, peers, report):
    """Fits of estimators by default, over seeds."""
    peers = [peer for peer in peers if peer.default_fit]
    say(f"default fits, {n_clusters} clusters")
    repeats = args.seeds * args.default_repeats
    records, fits = compare_default_fits(X, n_clusters, peers, args, repeats=repeats, warm_up=True)
    facts = default_facts(records, fits)
    ours = facts[OURS]
    rows = [
        (
            name,
            *(number(fact[key]) for key in ("median", "min", "max")),
            *(str(fact["n"]), f"{fact['ratio']:.2f}", f"{fact['mean_n_iter']:.1f}"),
            *(f"{fact['mean_inertia']:.7g}", excess(fact["mean_inertia"], ours["mean_inertia"])),
        )
        for name, fact in facts.items()
        if not fact["failure"]
    ]
    report.section(
        f"k-means, {n_clusters} clusters, default fits with {args.seeds} seeds",
        ("peer", "seconds", "min", "max", "runs", "ratio", "mean iterations", "mean inertia", "vs ours"),
        rows,
        notes(records),
        {"task": "default", "clusters": n_clusters, "records": list(facts.values())},
    )


def n_calls(n_rows):
    """How many times the labels of so many rows are asked for in a run."""
    return max(1, PREDICTED_TOGETHER // n_rows)


def timed_predictions(predictor, X, stopwatch, _number):
    """One run: labels of few rows, several times, and of more; those of the most rows."""
    for n_rows in PREDICTED:
        with stopwatch(f"{n_rows}"):
            for start in range(n_calls(n_rows)):
                labels = predictor(X[start : start + n_rows])
    return labels


def predict(args, X, n_clusters, peers, report):
    """Labels of rows that were not clustered, for given centers: distinct rows."""
    say(f"labels of rows among {n_clusters} clusters")
    centers = distinct_rows(X, n_clusters, 0)
    rows = X[np.arange(max(PREDICTED) + PREDICTED_TOGETHER) % len(X)]
    predictors = {peer.name: peer.predictor(centers, args.threads) for peer in peers if peer.predictor}
    runners = {name: partial(timed_predictions, one, rows) for name, one in predictors.items()}
    records = first_runs(runners)
    require_ours(records)
    wrong = wrong_labels(rows[: max(PREDICTED)], Clustering(centers, records[OURS].result, 0))
    failed = [f"skivfpq: {wrong} rows are not at their nearest center"] if wrong else []
    run_rounds(runners, records, args.repeats, slow=args.slow)
    table, facts = [], []
    for name, record in records.items():
        cells, fact = [name], record.describe()
        for n_rows in PREDICTED if not record.failure else ():
            seconds = [one / n_calls(n_rows) for one in record.seconds(f"{n_rows}")]
            fact[f"{n_rows}"] = spread(seconds)
            cells += [number(1e3 * median(seconds))]
            cells += [f"{ratio(record.seconds(f'{n_rows}'), records[OURS].seconds(f'{n_rows}')):.2f}"]
        table.append((*cells, *["-"] * (1 + 2 * len(PREDICTED) - len(cells))))
        facts.append(fact)
    report.section(
        f"k-means, predict among {n_clusters:,} clusters, ms",
        ("peer", *(title for n_rows in PREDICTED for title in (f"{n_rows:,} rows", "ratio"))),
        table,
        notes(records, failed),
        {"task": "predict", "clusters": n_clusters, "failed_checks": failed, "records": facts},
    )


def small_problems(args):
    """Name, rows and number of clusters of each."""
    yield "digits", load_digits().data, 10
    for n_rows, n_features, n_clusters in product(args.grid_rows, args.grid_features, args.grid_clusters):
        if n_clusters <= n_rows:
            yield "blobs", blobs(n_rows, n_features, n_clusters, args.grid_dtype), n_clusters


def small(args, peers, report):
    """Default fits where overheads show."""
    peers = [peer for peer in peers if peer.default_fit]
    limits = {"repeats": args.repeats, "warm_up": False, "slow": args.slow, "budget": CELL_SECONDS}
    rows, cells, remarks = [], [], {}
    for name, X, n_clusters in small_problems(args):
        say(f"small problems: {name}, {X.shape[0]} x {X.shape[1]}, {n_clusters} clusters")
        records, fits = compare_default_fits(X, n_clusters, peers, args, **limits)
        facts = default_facts(records, fits)
        rows.append(small_row(name, X, n_clusters, facts))
        remarks |= dict.fromkeys(notes(records))
        shape = {"rows": X.shape[0], "features": X.shape[1], "clusters": n_clusters}
        cells.append({"data": name, "dtype": str(X.dtype), **shape, "records": list(facts.values())})
    others = [column for peer in peers if peer.name != OURS for column in (f"{peer.name} ms", "ratio")]
    report.section(
        f"k-means, small problems, default fits ({args.grid_dtype} blobs)",
        ("data", "rows", "features", "clusters", f"{OURS} ms", *others, "iterations", "inertia vs ours"),
        rows,
        [*remarks, *small_summary(cells)],
        {"task": "small", "cells": cells},
    )


def small_row(name, X, n_clusters, facts):
    """Cells of a problem; iterations and inertia in the order of the peers."""
    ours, *others = facts.values()
    times = [number(1e3 * ours["median"])]
    for fact in others:
        times += ["-", "-"] if fact["failure"] else [number(1e3 * fact["median"]), f"{fact['ratio']:.2f}"]
    iterations = ["-" if fact["failure"] else f"{fact['mean_n_iter']:.0f}" for fact in facts.values()]
    excesses = [
        "-" if fact["failure"] else excess(fact["mean_inertia"], ours["mean_inertia"]) for fact in others
    ]
    shape = (f"{X.shape[0]:,}", str(X.shape[1]), str(n_clusters))
    return (name, *shape, *times, " / ".join(iterations), " / ".join(excesses) or "-")


def small_summary(cells):
    """Geometric mean and least of the ratios to each peer."""
    ratios = {}
    for cell in cells:
        for fact in cell["records"]:
            if fact["peer"] != OURS and not fact["failure"]:
                ratios.setdefault(fact["peer"], []).append(fact["ratio"])
    return [
        f"{name}: ratio {exp(mean(map(log, values))):.2f} in the geometric mean, {min(values):.2f} at least"
        for name, values in ratios.items()
    ]

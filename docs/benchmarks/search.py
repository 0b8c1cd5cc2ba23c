"""The command ``search``: nearest neighbours at equal recall, in batches and one by one."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

import numpy as np
import plot
from data import DataError
from indexes import FaissWithOurCodebooks
from kmeans import notes
from measure import PAUSE, Record, Stopwatch, first_runs, ratio, run_once, run_rounds, say, spread
from pareto import cheapest, sweep, undominated
from peers import OURS
from report import number
from scipy.spatial.distance import cdist
from search_peers import SEARCH_PEERS
from threadpoolctl import threadpool_limits

PEERS = SEARCH_PEERS
ABILITIES = ("indexes",)
TASKS = ("flat", "pq", "exact", "changes", "lists")
DEFAULT_TASKS = ("flat",)
BATCH, SINGLES = "batch", "one by one"  # phases of a run
N_SINGLES = 500  # queries one by one, at most
ADD_ONE, ADD_MANY, REMOVE = "a row", "many rows", "removing them"  # phases of a run of the task changes
N_ONE, N_MANY = 20, 1000  # rows that it adds, at most
CHECKED_QUERIES = 50
PROBES = (4, 16, 64)  # of the task pq
BLOCK = 4096  # rows or queries whose differences are held at a time
SLACK = 1.25  # beaten by so much in the first run, a configuration is not run again
MOST_MISPLACED = 0.1  # share of queries for which rounding may give faiss farther rows
TRIFLE = 1e-3  # seconds of a build that nothing is compared with
GREEDY = 1.2  # times the cores allowed: remarked upon


@dataclass(frozen=True, eq=False)
class Problem:
    """Queries, and the rows they are looked up in."""

    X: np.ndarray  # (n_samples, n_features) float32
    Q: np.ndarray  # (n_queries, n_features) float32
    k: int
    limits: np.ndarray  # (n_queries,) float64: squared distance of the k-th neighbour
    indices: np.ndarray  # (n_queries, k): the true neighbours
    threads: int
    lists: list | None = None  # numbers of inverted lists to try, instead of those that the rows suggest
    is_half: bool = False  # whether the file has the vectors in float16


@dataclass(eq=False)
class Configuration:
    """A built index, one of its variants, and what was measured of it."""

    peer: str
    index: Any
    variant: Any
    build_seconds: float
    bytes_per_vector: float | None
    points: dict = field(default_factory=dict)  # by parameter: recall, and seconds a query of each phase

    @property
    def name(self):
        """As tables say it."""
        return self.index.name + (f", {self.index.second}={self.variant}" if self.index.second else "")

    def recalls(self):
        """By parameter."""
        return {parameter: point["recall"] for parameter, point in self.points.items()}

    def setting(self, parameter):
        """The parameter in words."""
        return f"{self.index.parameter}={parameter}" if self.index.parameter else "-"

    def describe(self):
        """Facts for the file."""
        facts = {"peer": self.peer, "configuration": self.name, "parameter_name": self.index.parameter}
        return {**facts, "build_seconds": self.build_seconds, "bytes_per_vector": self.bytes_per_vector}


def add_arguments(parser):
    """Options of this command alone."""
    parser.add_argument("--queries", type=int, default=2000, help="rows taken out to be looked up")
    parser.add_argument("--n-neighbors", type=int, default=10, metavar="K")
    parser.add_argument("--recalls", type=float, nargs="+", default=[0.9, 0.95, 0.99], metavar="R")
    parser.add_argument("--lists", type=int, nargs="+", metavar="N", help="numbers of inverted lists to try")
    parser.add_argument("--single", action="store_true", help="rounds of queries one by one, not of batches")
    parser.add_argument("--plot", type=Path, help="draw recall against queries per second (.png)")


def run(args, data, peers, report, _peak):
    """All tasks that were asked for."""
    check_arguments(args, len(data.X))
    problem = draw_queries(args, data)
    failed = wrong_neighbors(problem)
    for task in args.tasks:
        configurations, records = build_all(problem, peers, task)
        if not any(one.peer == OURS for one in configurations):
            raise DataError(f"skivfpq failed: {records[0].failure}")
        TASK_FUNCTIONS[task](args, data, problem, configurations, report, records, failed)


def check_arguments(args, n_rows):
    """Refuse what cannot be done, before anything is measured."""
    if args.queries + args.n_neighbors > n_rows:
        raise DataError(f"--queries {args.queries} leaves too few of the {n_rows} rows to be searched.")
    if "changes" in args.tasks and args.queries <= N_ONE:
        raise DataError(f"--queries {args.queries}: the task changes adds them, and needs more than {N_ONE}.")
    if max(args.recalls) > 1:
        raise DataError("--recalls are above 0 and at most 1.")
    if args.plot is not None:
        if "flat" not in args.tasks:
            raise DataError("--plot draws the task flat.")
        plot.check()


def draw_queries(args, data):
    """The problem; its neighbours are those of exact_neighbors."""
    from skivfpq import exact_neighbors

    X = data.X
    order = np.random.default_rng(0).permutation(len(X))
    queries, rows = np.sort(order[: args.queries]), np.sort(order[args.queries :])
    X, Q = X[rows], X[queries]
    say(f"true neighbours of {len(Q)} queries among {len(X)} rows")
    indices = exact_neighbors(Q, X, args.n_neighbors)[1]
    limits = squared_distances(X, Q, indices).max(axis=1)
    return Problem(X, Q, args.n_neighbors, limits, indices, args.threads, args.lists, data.is_half())


def squared_distances(X, Q, indices):
    """From each query to the rows of these numbers, by differences in float64, (n_queries, k)."""
    distances = np.empty(indices.shape)
    for start in range(0, len(Q), BLOCK // 16):
        block = slice(start, start + BLOCK // 16)
        differences = X[indices[block]].astype(np.float64) - Q[block, None]
        distances[block] = np.einsum("ijk,ijk->ij", differences, differences)
    return distances


def wrong_neighbors(problem):
    """What is wrong with the true neighbours of some queries, by differences in float64 to all rows."""
    X, Q, indices = problem.X, problem.Q[:CHECKED_QUERIES], problem.indices[:CHECKED_QUERIES]
    blocks = (X[start : start + BLOCK].astype(np.float64) for start in range(0, len(X), BLOCK))
    distances = np.hstack([cdist(Q.astype(np.float64), block, "sqeuclidean") for block in blocks])
    nearest = np.sort(np.partition(distances, problem.k - 1, axis=1)[:, : problem.k], axis=1)
    found = np.sort(squared_distances(X, Q, indices), axis=1)
    wrong = np.any(~np.isclose(found, nearest, rtol=1e-9, atol=0), axis=1)
    wrong |= [len(set(row)) < problem.k for row in indices]
    count = int(np.count_nonzero(wrong))
    return [f"exact_neighbors: {count} of {len(Q)} queries do not get their nearest rows"] if count else []


def recall(problem, found):
    """Share of the k neighbours found; any row as near as the k-th true one counts, once."""
    found = np.sort(np.asarray(found).astype(np.int64), axis=1)
    fresh = (np.diff(found, axis=1, prepend=-1) > 0) & (found < len(problem.X))
    distances = squared_distances(problem.X, problem.Q, np.where(fresh, found, 0))
    return float(np.mean(fresh & (distances <= problem.limits[:, None] * (1 + 1e-9))))


def build_all(problem, peers, task):
    """Configurations of all peers, and the records of the builds."""
    configurations, records = [], []
    for peer in peers:
        for index in peer.indexes[task](problem) if task in peer.indexes else []:
            say(f"{peer.name}: {index.name}")
            index.warm_up(problem.X, problem.threads)
            record = Record(f"{peer.name} {index.name}")
            record.first = run_once(record, partial(timed_build, problem, index), 0)
            records.append(record)
            if not record.failure:
                facts = sum(record.seconds()), index.bytes_per_vector()
                variants = [Configuration(peer.name, index, variant, *facts) for variant in index.variants]
                configurations += variants
    return configurations, records


def timed_build(problem, index, stopwatch, _number):
    """Train and add; then some searches, which load what there is to load."""
    with stopwatch("build"):
        index.build(problem.X, problem.threads)
    index.set(index.cap, index.variants[-1])
    index.limit(problem.threads)
    index.batch(problem.Q[:10], problem.k)


def timed_search(problem, configuration, parameter, phases, stopwatch, _number):
    """One run: all queries at once, some one by one; row numbers of the batch."""
    index, found = configuration.index, None
    index.set(parameter, configuration.variant)
    if BATCH in phases:
        index.limit(problem.threads)
        with stopwatch(BATCH):
            found = index.batch(problem.Q, problem.k)
    if SINGLES in phases:
        sleep(PAUSE)
        queries = [problem.Q[i : i + 1] for i in range(min(len(problem.Q), N_SINGLES))]
        index.limit(1)
        with threadpool_limits(limits=1), stopwatch(SINGLES):
            for query in queries:
                index.one(query, problem.k)
    return found


def per_query(problem, phase, seconds):
    """Seconds of each query, from those of a phase."""
    return seconds / (len(problem.Q) if phase == BATCH else min(len(problem.Q), N_SINGLES))


def measure(problem, configuration, phases, parameter):
    """Recall, which is kept together with the seconds of one run."""
    stopwatch = Stopwatch()
    found = timed_search(problem, configuration, parameter, phases, stopwatch, 0)
    point = {"parameter": parameter, "recall": recall(problem, found)}
    for phase, cost in stopwatch.phases.items():
        point[phase] = per_query(problem, phase, cost["seconds"])
    configuration.points[parameter] = point
    return point["recall"]


def flat(args, data, problem, configurations, report, builds, failed):
    """Sweep every configuration, then time the cheapest points that reach each recall."""
    configurations = sweep_all(args, problem, configurations, builds)
    swept(problem, configurations, report, builds, failed)
    peers = dict.fromkeys(one.peer for one in configurations)
    for target in args.recalls:
        chosen = [(one, cheapest(one.recalls(), target)) for one in configurations]
        chosen = [(one, parameter) for one, parameter in chosen if parameter is not None]
        lines = [f"{peer} does not reach it" for peer in peers if peer not in {one.peer for one, _ in chosen}]
        facts = {"task": "flat", "target": target}
        compare(args, problem, chosen, report, f"recall@{problem.k} of {target:g}", facts, lines, failed)
    if args.plot:
        plot.draw(args.plot, configurations, (BATCH, SINGLES), f"{data.name}, {args.threads} threads")


def sweep_all(args, problem, configurations, builds):
    """The configurations, with recalls; without those that fail, whose records join those of the builds."""
    phases, swept = (BATCH, SINGLES) if args.plot else (BATCH,), []
    for one in configurations:
        say(f"recall of {one.peer}: {one.name}")
        record = Record(f"{one.peer} {one.name}")
        run_once(record, partial(sweep_one, problem, one, phases, args.recalls), 0)
        (builds if record.failure else swept).append(record if record.failure else one)
    return swept


def sweep_one(problem, configuration, phases, targets, _stopwatch, _number):
    """Fill in the points of a configuration."""
    index = configuration.index
    sweep(partial(measure, problem, configuration, phases), index.start, index.cap, targets)


def swept(problem, configurations, report, builds, failed):
    """A table of what was built; its facts hold every point."""
    rows = [
        (
            one.peer,
            *(one.name, number(one.build_seconds), number(one.bytes_per_vector)),
            f"{max(one.recalls().values()):.4f}",
        )
        for one in configurations
    ]
    facts = [{**one.describe(), "points": list(one.points.values())} for one in configurations]
    report.section(
        f"indexes, {len(problem.X):,} rows, {len(problem.Q):,} queries",
        ("peer", "configuration", "build s", "bytes/vector", "most recall"),
        rows,
        notes({record.peer: record for record in builds}, failed),
        {"task": "indexes", "failed_checks": failed, "configurations": facts}
        | {"failures": {record.peer: record.failure for record in builds if record.failure}},
    )


def codes(args, _data, problem, configurations, report, builds, failed):
    """IVF-PQ of the same sizes, at the same numbers of probes."""
    lines = notes({record.peer: record for record in builds})
    lines.append("each library learns codebooks and lists of its own, but for faiss-same, which has ours")
    for n_probes in sorted({min(probes, configurations[0].index.cap) for probes in PROBES}):
        for one in configurations:
            measure(problem, one, (BATCH,), n_probes)
        wrong, remarks = compare_same_codes(problem, configurations, n_probes)
        failed = [*failed, *wrong]
        title = f"IVF-PQ, {n_probes} probes, recall@{problem.k}"
        facts = {"task": "pq", "n_probes": n_probes}
        chosen = [(one, n_probes) for one in configurations]
        compare(args, problem, chosen, report, title, facts, [*lines, *remarks], failed)


def compare_same_codes(problem, configurations, n_probes):
    """What is wrong with the neighbours by codes that two libraries share, and remarks."""
    other = next((one for one in configurations if isinstance(one.index, FaissWithOurCodebooks)), None)
    if other is None:
        return [], []
    index = other.index.ours
    index.set(n_probes, None), other.index.set(n_probes, None)
    found = index.batch(problem.Q, problem.k), other.index.batch(problem.Q, problem.k)
    full = (found[1] >= 0).all(axis=1)  # lists that hold k rows
    rows = index.index.reconstruct(np.arange(len(problem.X)))
    distances = (squared_distances(rows, problem.Q[full], indices[full]) for indices in found)
    ours, others = (np.sort(some, axis=1) for some in distances)
    n_wrong = int((ours > others * (1 + 1e-6)).any(axis=1).sum())
    n_misplaced = int((others > ours * (1 + 1e-4)).any(axis=1).sum())  # sums of float32 terms
    failed = []
    if n_wrong:
        failed.append(
            f"n_probes={n_probes}: faiss finds nearer rows for {n_wrong} queries from the same codes"
        )
    if n_misplaced > MOST_MISPLACED * len(ours):
        failed.append(f"n_probes={n_probes}: faiss has other codes: farther rows for {n_misplaced} queries")
    return failed, [
        f"faiss-same: rows farther by 1e-4 and more for {n_misplaced} of {len(ours)} queries: rounding"
    ]


def exact(args, _data, problem, configurations, report, builds, failed):
    """All neighbours, by everybody."""
    for one in configurations:
        measure(problem, one, (BATCH,), one.index.cap)
        if one.peer == OURS and not np.array_equal(one.index.batch(problem.Q, problem.k), problem.indices):
            failed = [*failed, f"{one.name} does not find the neighbours of exact_neighbors"]
    lines = notes({record.peer: record for record in builds})
    chosen = [(one, one.index.cap) for one in configurations]
    title = f"exact search, {problem.k} neighbours"
    compare(args, problem, chosen, report, title, {"task": "exact"}, lines, failed)


def timed_changes(problem, index, stopwatch, _number):
    """One run: rows added one by one, and many together, those removed where that can be done.

    Returns row numbers found for some of the many, before and after, and their own.
    """
    rows = problem.Q[: N_ONE + N_MANY]
    looked_up = rows[N_ONE:][:CHECKED_QUERIES]
    index.limit(problem.threads)
    with stopwatch(ADD_ONE):
        for row in rows[:N_ONE]:
            index.add(row[None])
    with stopwatch(ADD_MANY):
        numbers = index.add(rows[N_ONE:])
    before, after = index.batch(looked_up, 1)[:, 0], None
    if index.removes:
        with stopwatch(REMOVE):
            index.remove(numbers)
        after = index.batch(looked_up, 1)[:, 0]
    return before, after, numbers[: len(looked_up)]


def changes(args, _data, problem, configurations, report, builds, failed):
    """Rows added and removed."""
    say("adding and removing rows")
    runners = {one.peer: partial(timed_changes, problem, one.index) for one in configurations}
    records = first_runs(runners)
    run_rounds(runners, records, args.repeats, slow=args.slow)
    before, after, numbers = records[OURS].result
    if not np.isin(numbers, before).all() or np.isin(numbers, after).any():
        failed = [*failed, "skivfpq does not find rows that were added, or finds those that were removed"]
    n_many = min(len(problem.Q) - N_ONE, N_MANY)
    timed = []
    for one in configurations:
        record, fact = records[one.peer], one.describe()
        for phase, n_rows in ((ADD_ONE, N_ONE), (ADD_MANY, 1), (REMOVE, 1)):
            if not record.failure and phase in record.first:
                fact[phase] = spread([seconds / n_rows for seconds in record.seconds(phase)])
                fact[phase]["ratio"] = ratio(record.seconds(phase), records[OURS].seconds(phase))
        timed.append({**record.describe(), **fact})
    report.section(
        f"{n_many:,} rows added to {len(problem.X):,} and removed, ms",
        ("peer", "configuration", "build s", "ratio")
        + tuple(title for phase in (ADD_ONE, ADD_MANY, REMOVE) for title in (phase, "ratio")),
        [change_cells(fact, timed[0]["build_seconds"]) for fact in timed],
        notes({record.peer: record for record in [*builds, *records.values()]}, failed),
        {"task": "changes", "failed_checks": failed, "records": timed},
    )


def change_cells(fact, our_build):
    """Cells of a peer."""
    cells = [fact["peer"], fact["configuration"], number(fact["build_seconds"])]
    cells.append(number(fact["build_seconds"] / our_build))
    for phase in (ADD_ONE, ADD_MANY, REMOVE):
        known = fact.get(phase)
        cells += [number(1e3 * known["median"]), f"{known['ratio']:.2f}"] if known else ["-", "-"]
    return tuple(cells)


def lists(args, _data, problem, configurations, report, builds, failed):
    """How many rows lists of either training make a query scan, at each recall."""
    timed = []
    for one in sweep_all(args, problem, configurations, builds):
        fact = {**one.describe(), "targets": []}
        for target in args.recalls:
            n_probes = cheapest(one.recalls(), target)
            rows = None if n_probes is None else one.index.rows_scanned(problem.Q, n_probes)
            fact["targets"].append({"target": target, "n_probes": n_probes, "rows": rows})
        timed.append(fact)
    report.section(
        f"rows scanned at a recall@{problem.k}, lists trained in one level or two",
        ("configuration", "build s")
        + tuple(title for target in args.recalls for title in (f"{target:g}: lists", "rows")),
        [list_cells(fact) for fact in timed],
        notes({record.peer: record for record in builds}, failed),
        {"task": "lists", "failed_checks": failed, "configurations": timed},
    )


def list_cells(fact):
    """Cells of a configuration."""
    cells = [cell for one in fact["targets"] for cell in (str(one["n_probes"]), number(one["rows"], 4))]
    return (fact["configuration"], number(fact["build_seconds"]), *cells)


TASK_FUNCTIONS = {"flat": flat, "pq": codes, "exact": exact, "changes": changes, "lists": lists}


def compare(args, problem, chosen, report, title, facts, lines, failed):
    """Time configurations at parameters in turn; of those at a recall, only the best of each peer."""
    say(title)
    phases = (SINGLES,) if args.single else (BATCH, SINGLES)
    chosen = {f"{one.peer} {one.name} {one.setting(p)}": (one, p) for one, p in chosen}
    runners = {label: partial(timed_search, problem, *pair, phases) for label, pair in chosen.items()}
    records = first_runs(runners)
    alive = best_of_peers(chosen, records, phases, SLACK) if "target" in facts else list(chosen)
    run_rounds({label: runners[label] for label in alive}, records, args.repeats, slow=args.slow)
    if "target" in facts:
        alive = best_of_peers({label: chosen[label] for label in alive}, records, phases)
    alive = [label for label in alive if not records[label].failure]
    ours = [records[label] for label in alive if chosen[label][0].peer == OURS]
    if not ours:
        trouble = "; ".join(record.failure for record in records.values() if record.failure)
        raise DataError(f"{title}: {OURS} failed: {trouble or 'does not reach it'}")
    timed = [describe(problem, *chosen[label], records[label], ours, phases) for label in alive]
    builds = {record.peer: chosen[record.peer][0].build_seconds for record in ours}
    build = builds[fastest(ours, phases[0]).peer]
    for fact, label in zip(timed, alive):
        fact["build_ratio"] = fact["build_seconds"] / build if build > TRIFLE else None
        point = chosen[label][0].points[chosen[label][1]]
        point |= {phase: fact[phase]["median"] for phase in phases}
    greedy = [remark for label in alive for remark in greedy_phases(records[label], args.threads)]
    report.section(
        title,
        ("peer", "configuration", "parameter", "recall", *phase_header(phases), "runs")
        + ("build s", "ratio", "bytes/vector"),
        [cells(fact, phases) for fact in timed],
        [*notes({}, failed), *lines, *notes(records), *greedy],
        {**facts, "failed_checks": failed, "records": timed},
    )


def best_of_peers(chosen, records, phases, slack=1.0):
    """Labels of the runs that no other one of the same peer beats in every phase."""
    kept = []
    for peer in dict.fromkeys(one.peer for one, _ in chosen.values()):
        own = [label for label, (one, _) in chosen.items() if one.peer == peer and not records[label].failure]
        costs = [[median(records[label].seconds(phase)) for phase in phases] for label in own]
        kept += [own[i] for i in undominated(costs, slack)]
    return kept


def fastest(records, phase):
    """The record with the least median."""
    return min(records, key=lambda record: median(record.seconds(phase)))


def describe(problem, configuration, parameter, record, ours, phases):
    """Everything about a point: timings in seconds a query, ratios to those of ours that is fastest then."""
    facts = {**record.describe(), **configuration.describe(), "parameter": parameter}
    facts |= {"setting": configuration.setting(parameter), "recall": configuration.recalls()[parameter]}
    for phase in phases:
        seconds = record.seconds(phase)
        facts[phase] = spread([per_query(problem, phase, value) for value in seconds])
        facts[phase]["ratio"] = ratio(seconds, fastest(ours, phase).seconds(phase))
    return facts


def greedy_phases(record, threads):
    """Remarks on phases that took more cores than they were allowed."""
    for phase, allowed in ((BATCH, threads), (SINGLES, 1)):
        costs = [run[phase] for run in record.rounds or [record.first] if phase in run]
        used = sum(cost["cpu_seconds"] for cost in costs)
        if used > GREEDY * allowed * sum(cost["seconds"] for cost in costs):
            yield f"{record.peer} took {used / sum(cost['seconds'] for cost in costs):.1f} cores, {phase}"


def phase_header(phases):
    """Titles of the columns of the phases."""
    return [title for phase in phases for title in (f"{phase} q/s", "min", "max", "ratio")]


def cells(fact, phases):
    """Cells of a point."""
    rates = []
    for phase in phases:
        rates += [number(1 / fact[phase][key]) for key in ("median", "max", "min")]
        rates.append(f"{fact[phase]['ratio']:.2f}")
    built = [number(fact[key]) for key in ("build_seconds", "build_ratio", "bytes_per_vector")]
    named = fact["peer"], fact["configuration"], fact["setting"], f"{fact['recall']:.4f}"
    return (*named, *rates, str(fact[phases[0]]["n"]), *built)

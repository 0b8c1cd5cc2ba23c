"""Time skivfpq beside other libraries, in turn, on the same rows.

    python docs/benchmarks/run.py kmeans
    python docs/benchmarks/run.py quantize --data vectors.fvecs --rows 100000 --json out.json
    python docs/benchmarks/run.py search --data vectors.fvecs --plot recall.png

README.md beside this file says what is measured, and how each library is called.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import kmeans
import quantize
import search
from data import DataError, load
from measure import machine, sgemm_gflops, usable_cores
from peers import OURS, PEERS, choose, limit_threads
from report import Report, number

# A command is a module: ABILITIES of peers that it needs, TASKS, add_arguments, run; and where it differs
# from the others PEERS, DEFAULT_TASKS (all), DEFAULT_ITERATIONS (none to set).
COMMANDS = {"kmeans": kmeans, "quantize": quantize, "search": search}
NOT_KEPT = ("data", "json", "plot", "command")  # arguments that are paths, or stand elsewhere


def main(argv=None):
    """Run a command; 1 if a check of our results failed."""
    parser = arguments()
    args = parser.parse_args(argv)
    command = COMMANDS[args.command]
    try:
        check_numbers(args)
        peers, missing = choose(command.ABILITIES, args.peers, getattr(command, "PEERS", PEERS))
        data = load(args.data, args.rows)
    except ValueError as error:  # DataError is one
        parser.error(str(error))
    report = Report(path=args.json, markdown=args.markdown)
    limits = limit_threads(peers, args.threads)  # in force while this name lives
    try:
        peak = sgemm_gflops()
        introduce(report, args, data, peers, missing, peak)
        command.run(args, data, peers, report, peak)
    except DataError as error:
        parser.error(str(error))
    finally:
        limits.restore_original_limits()
    return 1 if report.failed_checks() else 0


def arguments():
    """The parser."""
    parser = argparse.ArgumentParser(description="Time skivfpq beside other libraries, on the same rows.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__.splitlines()[0])
        add_common_arguments(command, module)
        module.add_arguments(command)
    return parser


def add_common_arguments(parser, module):
    """Options of every command."""
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help=".npy, .npz, .fvecs, .bvecs, .ivecs or .hdf5, or the word descriptors (default: image patches)",
    )
    add("--rows", type=int, help="use that many rows, drawn at random, or more, near others")
    tasks = list(getattr(module, "DEFAULT_TASKS", module.TASKS))
    add("--tasks", nargs="+", choices=module.TASKS, default=tasks, help=f"default: {' '.join(tasks)}")
    if hasattr(module, "DEFAULT_ITERATIONS"):
        add("--iterations", type=int, default=module.DEFAULT_ITERATIONS, help="default: %(default)s")
    add("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    add("--slow", type=float, default=60, help="seconds beyond which a peer is run once only")
    add("--threads", type=int, default=usable_cores(), help="default: every core (%(default)s)")
    add("--peers", type=names, help="only these, as a,b; or none")
    add("--json", type=Path, help="write every timing to this file")
    add("--markdown", action="store_true", help="print tables in Markdown")


def names(text):
    """Names in a list with commas; none of them for "none"."""
    return [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]


def check_numbers(args):
    """Refuse numbers that nothing can be done with."""
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        numbers = [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
        if any(one <= 0 for one in numbers):
            raise ValueError(f"--{name.replace('_', '-')} must be above 0.")
    for name in ("json", "plot"):
        path = getattr(args, name, None)
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no such folder.")


def introduce(report, args, data, peers, missing, peak):
    """Say and keep what is compared on what."""
    described = machine()
    settings = {key: value for key, value in vars(args).items() if key not in NOT_KEPT}
    report.facts = {
        "format": 1,
        "command": args.command,
        "date": datetime.now(UTC).date().isoformat(),
        "arguments": settings,
        "machine": described,
        "sgemm_gflops": peak,
        "data": data.describe(),
        "peers": {peer.name: {"version": peer.version(), "setup": peer.setup} for peer in peers},
        "missing": missing,
    }
    report.save()
    rows, features = data.X.shape
    report.title(f"{args.command}: {data.name}, {rows:,} x {features}")
    kernels = described["skivfpq"].get("kernels", "unknown")
    lines = [
        f"{described['cpu']}, {args.threads} threads, {' '.join(described['flags']) or 'no known flags'}",
        f"sgemm (NumPy, 2048 x 2048 x 2048): {number(peak)} GFLOP/s",
        f"kernels of {OURS}: {kernels}",
    ]
    lines += [f"{name}={value}" for name, value in described["environment"].items()]
    lines += [f"{peer.name} {peer.version()}: {peer.setup}" for peer in peers]
    lines += [f"not here: {name} ({what})" for name, what in missing.items()]
    report.lines([*lines, f"ratio: median seconds of a peer by those of {OURS}"])


if __name__ == "__main__":
    sys.exit(main())

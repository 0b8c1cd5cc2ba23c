"""Recall against queries per second, drawn with matplotlib."""

from data import DataError
from pareto import front
from peers import OURS

LEAST_RECALL = 0.5  # drawn


def check():
    """Refuse to go on without matplotlib."""
    try:
        import matplotlib  # noqa: F401 - whether it can be imported
    except ImportError:
        raise DataError("--plot needs matplotlib (pip install matplotlib).") from None


def fronts(configurations, phase):
    """By peer, ours last: recall and queries per second that no other configuration of it beats."""
    names = dict.fromkeys(one.peer for one in configurations)
    points = {name: [] for name in sorted(names, key=OURS.__eq__)}
    for one in configurations:
        known = [point for point in one.points.values() if phase in point]
        points[one.peer] += [(point["recall"], 1 / point[phase]) for point in known]
    return {name: front([pair for pair in own if pair[0] >= LEAST_RECALL]) for name, own in points.items()}


def draw(path, configurations, phases, title):
    """A panel for each phase, a line for each peer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(phases), 5), layout="constrained")
    for phase, axes in zip(phases, figure.subplots(1, len(phases), squeeze=False)[0]):
        for name, pairs in fronts(configurations, phase).items():
            ours = {"color": "black", "linewidth": 3, "zorder": 3} if name == OURS else {"linewidth": 1.2}
            axes.plot(*zip(*pairs), marker="o", markersize=3, label=name, **ours)
        axes.set(title=phase, xlabel="recall", ylabel="queries per second", yscale="log")
        axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)

"""How many lists to probe: the fewest that reach a recall, measured."""

import numpy as np

from skivfpq._algorithms.groups import places_in
from skivfpq._algorithms.ivf import without_self
from skivfpq._algorithms.list_planes import exact_rows
from skivfpq._kernels import row_blocks

HELD_OUT = 1000  # rows that are queries in place of training rows: recall@10 to about 0.005
LEAST_HELD_OUT = 100
CONFIDENCE = 1.645  # standard errors of a one-sided 95 % bound


def hold_out(n_samples, n_lists, rng):
    """Row numbers to measure recall with, and whether they are to be left out of the training.

    Quantizers know the rows that they were trained on: measured on such, recall comes out 0.01 to
    0.02 too high. Where rows are few, training needs them all.
    """
    if n_samples < max(10 * LEAST_HELD_OUT, 2 * n_lists):
        return np.sort(rng.permutation(n_samples)[:HELD_OUT]), False
    return np.sort(rng.choice(n_samples, min(HELD_OUT, n_samples // 10), replace=False)), True


def true_neighbors(metric, X, numbers, k, n_threads):
    """The k true neighbours (n_numbers, k) of some rows of X, each without itself."""
    return without_self(*exact_rows(metric, metric.queries(X[numbers]), X, k + 1, n_threads), numbers)[1]


def choose_probes(file, probing, queries, true, target, refine_factor, own=None, n_threads=1):
    """Fewest probes that reach a mean recall with 95 % confidence, and that recall.

    Where codes cannot reach it, the fewest probes that find what can be found.

    Parameters
    ----------
    file : InvertedFile
    probing : FixedProbes, Reaches or GroupedProbes
    queries : (n_queries, n_features) float32 or float64, as the metric sees them
    true : (n_queries, k) row numbers of their true neighbours
    own : (n_queries,) row numbers of the queries themselves, None for queries from elsewhere
    """
    covered = _covering_probes(file, probing, queries, true, n_threads)
    n_lists = len(file.centers)
    n_probes, recall = _fewest(lambda n: (covered <= n).mean(axis=1), target, 1, n_lists, patient=True)
    if file.codebooks is None:  # exact within the lists: found is what they hold
        return n_probes, recall
    k = true.shape[1] + (own is not None)

    def recall_of_codes(n_probes):
        keys, found = file.search(queries, k, probing.probes(n_probes), refine_factor, n_threads=n_threads)
        found = found if own is None else without_self(keys, found, own)[1]
        return np.array([np.isin(t, f).mean() for t, f in zip(true, found)])

    return _fewest(recall_of_codes, target, n_probes, n_lists)


def _covering_probes(file, probing, queries, true, n_threads):
    """How many lists must be probed to find each true neighbour, (n_queries, k)."""
    covered = np.empty(true.shape, dtype=np.int64)
    for block in row_blocks(len(queries), 4 * len(file.centers)):
        planes = file.planes(n_threads)[0]
        lists = file.lists.list_of(file.lists.positions[true[block]])
        keys, order = planes.ranked(queries[block], n_threads)
        group_places = None
        if file.groups is not None:
            _, group_order = planes.ranked(queries[block], n_threads, file.groups.centers)
            group_places = places_in(group_order, file.groups.labels[lists])
        covered[block] = probing.covering(keys, places_in(order, lists), group_places)
    return covered


def _fewest(recall_of, target, low, high, patient=False):
    """Fewest probes from low to high whose mean recall reaches the target for sure, and that recall.

    Doubles the probes until it does or, unless patient, a doubling gains less than a tenth of what is
    missing; then bisects. Where only the mean itself reaches the target, that has to do.

    recall_of : function n_probes -> recall of each query
    """
    measured = {}

    def shortfall(n_probes, confidence):
        if n_probes not in measured:
            recalls = recall_of(n_probes)
            measured[n_probes] = recalls.mean(), recalls.std() / np.sqrt(len(recalls))
        mean, error = measured[n_probes]
        return target - (mean - confidence * error)

    for confidence in (CONFIDENCE, 0.0):
        failed, n_probes = low - 1, low
        missing = shortfall(n_probes, confidence)
        while missing > 0 and n_probes < high:
            wider = min(2 * n_probes, high)
            still_missing = shortfall(wider, confidence)
            if still_missing > 0.9 * missing and not patient:
                break  # n_probes, then, finds about what can be found
            failed, n_probes, missing = n_probes, wider, still_missing
        if missing <= 0:
            break
    while missing <= 0 and n_probes - failed > 1:
        middle = (failed + n_probes) // 2
        if shortfall(middle, confidence) <= 0:
            n_probes = middle
        else:
            failed = middle
    return n_probes, float(measured[n_probes][0])

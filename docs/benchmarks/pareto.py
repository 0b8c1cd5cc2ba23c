"""Choose among configurations: the cheapest parameter for a recall, and those that no other one beats."""

ENOUGH = 0.995  # recall above which a sweep ends
STEPS = 64  # a parameter is the cheapest to one part in so many


def cheapest(recalls, target):
    """The least parameter with that recall; None if there is none. recalls: by parameter."""
    return min((parameter for parameter, recall in recalls.items() if recall >= target), default=None)


def sweep(recall_of, start, cap, targets):
    """Recall by parameter: doubled until it is enough, then halved towards the cheapest for each target."""
    recalls, parameter = {}, min(start, cap)
    while True:
        recalls[parameter] = recall_of(parameter)
        if parameter >= cap or (recalls[parameter] > ENOUGH and recalls[parameter] >= max(targets)):
            break
        parameter = min(2 * parameter, cap)
    for target in targets:
        while (middle := between(recalls, target)) is not None:
            recalls[middle] = recall_of(middle)
    return recalls


def between(recalls, target):
    """A parameter halfway between the cheapest one and the next below; None if they are close."""
    above = cheapest(recalls, target)
    if above is None:
        return None
    below = max((parameter for parameter in recalls if parameter < above), default=above)
    return (above + below) // 2 if above - below > max(1, above // STEPS) else None


def undominated(costs, slack=1.0):
    """Which of the tuples of costs no other one beats: by that factor in all, and at all in one."""
    return [i for i, cost in enumerate(costs) if not any(beats(other, cost, slack) for other in costs)]


def beats(one, other, slack=1.0):
    """Whether costs are no higher than others, and one is lower."""
    pairs = [(slack * mine, theirs) for mine, theirs in zip(one, other)]
    return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)


def front(points):
    """Pairs of recall and rate that no other one beats, by recall."""
    costs = [(-recall, -rate) for recall, rate in points]
    return sorted({points[i] for i in undominated(costs)})

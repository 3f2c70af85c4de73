"""How a number of samples is cut between several places, in any proportion."""

from collections.abc import Sequence


def cut(total: int, weights: Sequence[float], place: int) -> range:
    """Return the part of 0 ... total - 1 that belongs to a place; all places together have each number once, in order.

    Example: `cut(9, [1, 1], 0)` is 0 ... 3 and `cut(9, [0, 1, 3], 1)` is 0 and 1.
    """
    low, high = (round(total * sum(weights[:end]) / sum(weights)) for end in (place, place + 1))
    return range(low, high)


def overlap(a: range, b: range) -> range:
    """Return the numbers that two ranges of step 1 share."""
    low = max(a.start, b.start)
    return range(low, max(low, min(a.stop, b.stop)))

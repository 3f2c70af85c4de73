"""A few of many units drawn, each with the weight that keeps their mean unbiased: a part stands for the whole.

A unit is whatever is replayed together: the unmasking step of a sample, the denoising step of a rollout. Draws are
named (`seeds.py`), so they are the same on any rank. This file is free of torch, since settings draw by it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from flashgrpo.seeds import keyed_bits

Draw = Literal["all", "independent", "stratified"]


def draw_units(chances: Sequence[float], count: int, draw: Draw, *name: int | str) -> list[tuple[int, float]]:
    """Draw `count` of n units, each as likely as its chance says; returns the number and the weight of each, rising.

    A unit drawn with probability p has weight (1 / n) / p, so that for any numbers f of the units

        E[ mean_j w_j f(u_j) ] = mean_u f(u)          over all n units

    A unit may be drawn more than once, and then stands there so often. "independent" draws each by itself;
    "stratified" cuts the sum of chances into `count` equal parts and draws once in each, which spreads the draws and
    leaves the mean as it is; "all" takes each unit once, with weight 1. Where no unit has a chance, all have the same.

    With chances (.5, 1, 2, .5) the probabilities are (.125, .25, .5, .125), and the weights (2, 1, .5, 2).

    Args:
        chances: of n units, at least 0; they need not sum to 1. A unit without one is never drawn, which is unbiased
            where its f is 0.
        name: of the draw.
    """
    if draw == "all":
        return [(unit, 1.0) for unit in range(len(chances))]
    if not any(chances):
        chances = [1.0] * len(chances)
    edges = list(accumulate(chances))
    possible = [unit for unit, chance in enumerate(chances) if chance > 0]
    units = []
    for number in range(count):
        u = uniform(*name, number)
        place = (number + u) / count if draw == "stratified" else u
        # rounding may lead beyond the last edge
        units.append(min(bisect_right(edges, place * edges[-1]), possible[-1]))
    return [(unit, edges[-1] / (len(chances) * chances[unit])) for unit in sorted(units)]


def uniform(*name: int | str) -> float:
    """Return a number in [0, 1) by its name."""
    return (keyed_bits(*name) >> 11) / 2**53

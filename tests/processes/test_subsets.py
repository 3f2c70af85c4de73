"""A few of many units stand for all of them: weights, spreads and expectations by hand and by enumeration."""

from statistics import fmean, pvariance

import pytest

from flashgrpo.processes import subsets
from flashgrpo.processes.subsets import draw_units

CHANCES = (0.5, 1.0, 2.0, 0.5)  # probabilities (.125, .25, .5, .125)
F = (1.0, 2.0, 3.0, 4.0)


def estimate(drawn) -> float:
    return fmean(weight * F[unit] for unit, weight in drawn)


def test_a_unit_weighs_as_much_less_as_it_is_likelier(monkeypatch):
    """Places .05, .3, .6 and .97 of the sum of probabilities are the units 0, 1, 2 and 3."""
    places = iter((0.05, 0.3, 0.6, 0.97))
    monkeypatch.setattr(subsets, "uniform", lambda *name: next(places))
    assert draw_units(CHANCES, 4, "independent", 0, "name") == [(0, 2.0), (1, 1.0), (2, 0.5), (3, 2.0)]


def test_the_last_place_is_the_last_unit_that_can_be_drawn(monkeypatch):
    monkeypatch.setattr(subsets, "uniform", lambda *name: 1.0 - 2**-53)
    assert draw_units((0.1, 0.2, 0.7, 0.0), 1, "independent", 0) == [(2, pytest.approx(0.25 / 0.7))]


@pytest.mark.parametrize("draw", ["independent", "stratified"])
def test_the_weighted_mean_of_draws_is_the_mean_of_all(monkeypatch, draw):
    """Expected over the uniform numbers, by enumeration of a fine grid of them: each is drawn for itself."""
    grid = [(place + 0.5) / 800 for place in range(800)]
    found = []
    for number in range(3):
        for place in grid:
            monkeypatch.setattr(subsets, "uniform", lambda *name, at=place, one=number: at if name[-1] == one else 0.5)
            drawn = draw_units(CHANCES, 3, draw, 0)
            monkeypatch.setattr(subsets, "uniform", lambda *name: 0.5)
            still = draw_units(CHANCES, 3, draw, 0)
            found.append(
                (estimate(drawn) - estimate(still)) * 3
            )  # by what this one draw differs from that in its middle
    middle = estimate(draw_units(CHANCES, 3, draw, 0))
    assert middle + sum(found) / len(grid) / 3 == pytest.approx(fmean(F), abs=1e-9)


def test_spreading_draws_lowers_the_variance_and_not_the_mean():
    spread, alone = (
        [estimate(draw_units([1.0] * 4, 2, draw, seed, "variance")) for seed in range(500)]
        for draw in ("stratified", "independent")
    )
    assert pvariance(spread) < 0.6 * pvariance(alone)
    assert fmean(spread) == pytest.approx(2.5, abs=0.1)


def test_all_units_are_all_units_whatever_their_chances():
    assert draw_units(CHANCES, 2, "all", 0) == [(unit, 1.0) for unit in range(4)]


def test_without_any_chance_all_have_the_same():
    assert {weight for _, weight in draw_units((0.0, 0.0), 8, "stratified", 0)} == {1.0}
    assert [unit for unit, _ in draw_units((0.0, 0.0), 8, "stratified", 0)] == [0] * 4 + [1] * 4

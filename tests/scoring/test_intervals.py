"""95 % intervals hold what they say, however few the prompts are."""

import numpy as np
import pytest
import torch

from flashgrpo.errors import UserError
from flashgrpo.scoring.intervals import jackknife, mean_interval

DRAWS = 2_000  # intervals of a coverage, whose standard error is then half a per cent


def coverage(tables: np.ndarray) -> float:
    """The share of the intervals of tables (draws, ...) that hold 0."""
    intervals = np.array([mean_interval(table) for table in tables])
    return float(((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0)).mean())


def test_an_interval_by_hand():
    """Two numbers: t(1) = 12.706, std = sqrt(2), so +-12.706; three: t(2) = 4.303 and std 1 over sqrt(3)."""
    assert mean_interval([1.0, 3.0]) == pytest.approx([2 - 12.706, 2 + 12.706], abs=1e-3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx([2 - 2.484, 2 + 2.484], abs=1e-3)
    assert mean_interval([0.5, 0.5, 0.5]) == [0.5, 0.5]
    assert mean_interval([0.5]) is None
    assert mean_interval([]) is None
    assert mean_interval([[0.5], [0.25]]) is None, "two seeds, one prompt"


@pytest.mark.parametrize("prompts", [2, 4, 8, 32])
def test_it_holds_the_mean_of_normal_numbers_as_often_as_it_says(prompts):
    values = np.random.default_rng(prompts).normal(size=(DRAWS, prompts))
    assert coverage(values) == pytest.approx(0.95, abs=0.015)


def test_selection_widens_no_interval_and_fresh_noise_needs_none():
    """Without any effect the interval of the best of 20 evaluations leaves out 0 far too often; on other noise 5 %.

    Evaluations share most of their noise, as those of neighbouring updates do: 20 % is each one's own.
    """
    random = np.random.default_rng(3)
    shared, own = random.normal(size=(DRAWS, 1, 16)), random.normal(size=(DRAWS, 20, 16))
    evaluations = 0.8**0.5 * shared + 0.2**0.5 * own
    best = evaluations[np.arange(DRAWS), evaluations.mean(axis=2).argmax(axis=1)]
    assert coverage(best) < 0.91
    assert coverage(random.normal(size=best.shape)) == pytest.approx(0.95, abs=0.015)


def test_seeds_and_prompts_by_hand():
    """Seeds differ by 0.1 and prompts by 1 without any rest: A = 3 x 0.005, B = 2 x 1, E = 0, of 6 numbers."""
    table = np.array([[0.0, 1.0, 2.0], [0.1, 1.1, 2.1]])
    a, b = 3 * 0.005, 2 * 1.0
    degrees = (a + b) ** 2 / (a**2 / 1 + b**2 / 2)
    assert degrees == pytest.approx(2.03, abs=0.01)
    t = 4.26  # between t(2) = 4.303 and t(3) = 3.182
    low, high = mean_interval(table)
    assert (low + high) / 2 == pytest.approx(1.05)
    assert high - low == pytest.approx(2 * t * ((a + b) / 6) ** 0.5, rel=0.01)
    assert mean_interval([[0.25] * 5] * 3) == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.3, 1.0)])
@pytest.mark.parametrize("seeds", [2, 3])
def test_it_holds_the_mean_over_seeds_and_prompts(seeds, of_seeds, of_prompts):
    """Whatever differs: seeds, prompts, both or neither. The spread of two seeds has one degree of freedom."""
    random = np.random.default_rng(seeds)
    effects = of_seeds * random.normal(size=(DRAWS, seeds, 1)) + of_prompts * random.normal(size=(DRAWS, 1, 12))
    assert 0.87 + 0.05 * (seeds > 2) <= coverage(effects + 0.5 * random.normal(size=(DRAWS, seeds, 12))) <= 0.995


def test_what_is_easy_for_every_seed_is_no_more_evidence_for_being_so_in_four_of_them():
    values = np.random.default_rng(1).normal(2.0, 1.0, 40)
    assert mean_interval(np.stack([values] * 4)) == pytest.approx(mean_interval(values))


def test_the_jackknife_of_a_mean_is_the_interval_of_the_mean():
    values = torch.tensor([1.0, 2.0, 3.0, 7.0], dtype=torch.float64)
    [mean] = jackknife(lambda units: values[units].mean()[None], 4)
    assert mean.value == 3.25
    assert mean.interval == pytest.approx(mean_interval(values.tolist()))
    with pytest.raises(UserError, match="3 prompts or updates"):
        jackknife(lambda units: torch.zeros(1).double(), 2)

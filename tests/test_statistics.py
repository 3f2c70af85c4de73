"""Means of group statistics, variances and intervals, against numpy and scipy on drawn tables of any size and scale."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.compare.statistics import gradient_spread
from flashgrpo.diagnostics.measure import split_variance, variance_parts
from flashgrpo.learning.advantage import EPSILON, combine_advantages, group_advantages
from flashgrpo.scoring.intervals import jackknife, mean_interval

few = settings(max_examples=40, deadline=None)
seeds, scales = st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e4])


def table(seed: int, scale: float, *shape: int) -> np.ndarray:
    """Numbers around 2 scale, each entry and each row with a part of its own."""
    random = np.random.default_rng(seed)
    rows = random.normal(size=(shape[0], *[1] * (len(shape) - 1)))
    return scale * (2 + rows + random.normal(size=shape))


@few
@given(seeds, scales, st.integers(2, 20))
def test_an_interval_over_prompts(seed, scale, prompts):
    values = table(seed, scale, prompts)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values.tolist()) == pytest.approx([expected.low, expected.high], rel=1e-9)


@few
@given(seeds, scales, st.integers(2, 5), st.integers(2, 12))
def test_an_interval_over_seeds_and_prompts(seed, scale, count, prompts):
    """Mean squares of the two-way layout summed entry by entry, and Satterthwaite's degrees of freedom."""
    values = table(seed, scale, count, prompts)
    mean, rows, columns = values.mean(), values.mean(axis=1), values.mean(axis=0)
    a = prompts * sum((row - mean) ** 2 for row in rows) / (count - 1)
    b = count * sum((column - mean) ** 2 for column in columns) / (prompts - 1)
    free = (count - 1) * (prompts - 1)
    e = sum((values[i, j] - rows[i] - columns[j] + mean) ** 2 for i in range(count) for j in range(prompts)) / free
    kept = [(square, degrees) for square, degrees in ((a, count - 1), (b, prompts - 1)) if square > e]
    parts = [*kept, (e, free)] if len(kept) != 1 else kept
    variance = a + b - e if len(kept) == 2 else parts[0][0]
    degrees = max(variance**2 / sum(square**2 / df for square, df in parts), 1)
    margin = scipy.stats.t.ppf(0.975, degrees) * (variance / values.size) ** 0.5
    assert mean_interval(values) == pytest.approx([mean - margin, mean + margin], rel=1e-9)


@few
@given(seeds, scales, st.integers(3, 10))
def test_the_jackknife_of_a_ratio_of_means(seed, scale, units):
    """Leave out one unit at a time, with numpy."""
    values = table(seed, scale, units, 2)
    values[:, 1] = np.abs(values[:, 1]) + scale
    ratio = [np.delete(values, i, axis=0).mean(axis=0) for i in range(units)]
    left_out = np.array([means[0] / means[1] for means in ratio])
    margin = scipy.stats.t.ppf(0.975, units - 1) * ((units - 1) * np.var(left_out)) ** 0.5
    whole = values[:, 0].mean() / values[:, 1].mean()
    tensors = torch.tensor(values)
    [found] = jackknife(lambda kept: (tensors[kept, 0].mean() / tensors[kept, 1].mean())[None], units)
    assert found.value == pytest.approx(whole)
    assert found.interval == pytest.approx([whole - margin, whole + margin])


@few
@given(seeds, scales, st.integers(3, 5), st.integers(1, 6), st.integers(2, 5))
def test_the_split_of_a_variance(seed, scale, prompts, steps, members):
    rewards = table(seed, scale, prompts, steps, members)
    within = [np.mean([np.var(cell, ddof=1) for cell in rows]) for rows in rewards]
    between = [np.var([cell.mean() for cell in rows]) for rows in rewards]
    between = [b - w * (steps - 1) / (steps * members) for b, w in zip(between, within, strict=True)]
    found = variance_parts(torch.tensor(rewards))
    np.testing.assert_allclose(np.stack([part.numpy() for part in found]), [within, between], rtol=1e-9)
    plain = sum(part.numpy() for part in variance_parts(torch.tensor(rewards), unbiased=False))
    np.testing.assert_allclose(plain, [rows.var() for rows in rewards], rtol=1e-9)
    split = split_variance(torch.tensor(rewards), range(steps))
    means = (split.within.value, split.between.value, split.total.value)
    expected = np.mean(within), np.mean(between), np.mean(within) + np.mean(between)
    assert means == pytest.approx(expected, rel=1e-9, abs=1e-9 * scale**2)


@few
@given(seeds, st.integers(2, 9), st.integers(1, 6))
def test_the_spread_of_gradient_norms(seed, updates, steps):
    norms = np.abs(table(seed, 1.0, updates, steps)) + 0.1
    lines = [{"grad_norm": row.sum(), "grad_norm_by_step": {str(k): n for k, n in enumerate(row)}} for row in norms]
    found = gradient_spread(lines)
    assert found["over_updates"] == pytest.approx(scipy.stats.variation(norms.sum(axis=1)))
    assert list(found["by_step"].values()) == pytest.approx(norms.mean(axis=0).tolist())
    if steps > 1:
        assert found["over_steps"] == pytest.approx(scipy.stats.variation(norms.mean(axis=0)))


@few
@given(seeds, scales, st.integers(1, 5), st.integers(2, 6), st.sampled_from(["group", "batch"]))
def test_advantages_of_one_reward_and_of_several(seed, scale, groups, members, std):
    rewards, weights = table(seed, scale, groups, members, 2), np.array([0.5, -2.0])

    def normalized(values: np.ndarray) -> np.ndarray:
        spread = [np.std(values if std == "batch" else row) for row in values]
        return np.array([(row - row.mean()) / (s + EPSILON) for row, s in zip(values, spread, strict=True)])

    one = group_advantages(torch.tensor(rewards[:, :, 0]), std)
    np.testing.assert_allclose(one, normalized(rewards[:, :, 0]).clip(-5, 5), rtol=1e-5, atol=1e-6)
    several = combine_advantages(torch.tensor(rewards), torch.tensor(weights), std)
    expected = sum(weight * normalized(rewards[:, :, r]) for r, weight in enumerate(weights))
    np.testing.assert_allclose(several, expected.clip(-5, 5), rtol=1e-5, atol=1e-6)
    raw = combine_advantages(torch.tensor(rewards), torch.tensor(weights), std, combine="raw")
    np.testing.assert_allclose(raw, normalized(rewards @ weights).clip(-5, 5), rtol=1e-5, atol=1e-6)

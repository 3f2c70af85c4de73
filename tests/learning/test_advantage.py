"""Advantages by hand arithmetic, and what must not depend on units, order or rounding."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from flashgrpo.errors import UserError
from flashgrpo.learning.advantage import combine_advantages, group_advantages
from flashgrpo.learning.settings import Credit

REFUSED = (ValueError, TypeCheckError)
reward_tables = st.builds(
    lambda p, g, seed: torch.randn(p, g, generator=torch.Generator().manual_seed(seed)),
    st.integers(1, 6),
    st.integers(2, 8),
    st.integers(0, 1000),
)


def close(actual: torch.Tensor, expected: list) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_group_std_by_hand():
    """1 2 6: mean 3, deviations -2 -1 3, population std sqrt(14/3) = 2.160247; 0 0 3: mean 1, std sqrt(2)."""
    s, t = math.sqrt(14 / 3) + 1e-4, math.sqrt(2) + 1e-4
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    close(group_advantages(rewards), [[-2 / s, -1 / s, 3 / s], [-1 / t, -1 / t, 2 / t]])


def test_batch_std_by_hand():
    """Group means 1 and 10 are taken off; 0 2 7 13 has mean 5.5 and std sqrt((30.25 + 12.25 + 2.25 + 56.25) / 4)."""
    s = math.sqrt(101 / 4) + 1e-4
    close(group_advantages(torch.tensor([[0.0, 2.0], [7.0, 13.0]]), std="batch"), [[-1 / s, 1 / s], [-3 / s, 3 / s]])


def test_without_a_std_the_differences_stay_as_they_are():
    """1 2 6 around 3; 0 0 30 around 10, clipped at 5; ragged or not, and each reward of several by its weight alone."""
    close(
        group_advantages(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 30.0]]), "none"),
        [[-2.0, -1.0, 3.0], [-5.0, -5.0, 5.0]],
    )
    two = torch.tensor([[[1.0, 10.0], [3.0, 20.0]]])
    for combine in ("normalized", "raw"):
        close(combine_advantages(two, torch.tensor([1.0, 0.1]), "none", combine=combine), [[-1.5, 1.5]])


def test_clip_by_hand():
    """One winner among 100: A = 0.99 / sqrt(0.0099) = 9.95, clipped to 5."""
    rewards = torch.zeros(1, 100)
    rewards[0, 7] = 1.0
    advantages = group_advantages(rewards)
    assert advantages[0, 7] == 5.0
    assert advantages[0, 0].item() == pytest.approx(-0.01 / (math.sqrt(0.0099) + 1e-4))
    assert group_advantages(rewards, clip=20.0)[0, 7].item() == pytest.approx(9.94, abs=0.01)
    assert group_advantages(-rewards, clip=2.0)[0, 7] == -2.0


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.7, 1e6])
def test_a_group_without_spread_contributes_exactly_zero(std, value):
    rewards = torch.tensor([[value] * 7, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], dtype=torch.float64)
    advantages = group_advantages(rewards, std=std)
    assert not advantages[0].any()
    assert advantages[1].all().item() is False  # its middle member
    assert advantages[1].abs().max() > 0.5 or (std, value) == ("batch", 1e6)


@pytest.mark.parametrize("std", ["group", "batch"])
def test_rounding_is_no_preference(std):
    """0.1 + 0.2 against 0.3 in float32, and 1000 with its neighbour: the same score, computed in another order."""
    above = torch.nextafter(torch.tensor(1000.0), torch.tensor(2000.0)).item()
    rewards = torch.tensor([[0.1 + 0.2, 0.3], [1000.0, above]])
    assert not group_advantages(rewards, std=std).any()
    assert group_advantages(torch.tensor([[0.5, 0.5001]]), std=std).abs().min() > 0.3  # small but real


@settings(max_examples=30, deadline=None)
@given(rewards=reward_tables, shift=st.floats(-3, 3), std=st.sampled_from(["group", "batch"]), data=st.data())
def test_groups_are_compared_with_themselves(rewards, shift, std, data):
    advantages = group_advantages(rewards, std=std, clip=100.0)
    assert advantages.mean(1).abs().max() < 1e-5
    order = torch.tensor(data.draw(st.permutations(range(len(rewards)))))
    torch.testing.assert_close(group_advantages(rewards[order], std=std, clip=100.0), advantages[order])
    if std == "group":  # a prompt that is easier for everybody changes nothing
        moved = rewards.clone()
        moved[0] += shift
        torch.testing.assert_close(group_advantages(moved, clip=100.0), advantages, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(group_advantages(rewards[:1], clip=100.0), advantages[:1])


def test_several_rewards_normalized_or_raw_by_hand():
    """(0, 2) and (30, 10) with weights 1 and 0.5. Normalized: (-1, 1) + 0.5 (1, -1) = (-0.5, 0.5).

    Raw: 0 + 15 = 15 and 2 + 5 = 7, mean 11, std 4: (1, -1). The reward with the larger unit decides.
    """
    rewards, weights = torch.tensor([[[0.0, 30.0], [2.0, 10.0]]]), torch.tensor([1.0, 0.5])
    torch.testing.assert_close(combine_advantages(rewards, weights), torch.tensor([[-0.5, 0.5]]), atol=1e-3, rtol=0)
    raw = combine_advantages(rewards, weights, combine="raw")
    torch.testing.assert_close(raw, torch.tensor([[1.0, -1.0]]), atol=1e-3, rtol=0)


def test_clip_comes_after_the_sum():
    """9.95 - 9.95 = 0: the two rewards disagree on the winner, and no clip stands between them."""
    rewards = torch.zeros(1, 100, 2)
    rewards[0, 7] = torch.tensor([1.0, -1.0])
    assert combine_advantages(rewards, torch.tensor([1.0, 1.0])).abs().max() < 1e-5
    assert combine_advantages(rewards, torch.tensor([2.0, 1.0]))[0, 7] == 5.0


@settings(max_examples=20, deadline=None)
@given(rewards=reward_tables, std=st.sampled_from(["group", "batch"]), combine=st.sampled_from(["normalized", "raw"]))
def test_one_reward_of_weight_one_is_the_plain_advantage(rewards, std, combine):
    combined = combine_advantages(rewards[..., None], torch.tensor([1.0]), std=std, combine=combine)
    assert torch.equal(combined, group_advantages(rewards, std=std))


def test_a_group_of_one_is_refused():
    with pytest.raises(UserError, match="group size of at least 2"):
        group_advantages(torch.tensor([[1.0], [2.0]]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_no_numbers_are_refused(value):
    rewards = torch.tensor([[0.0, 1.0], [2.0, value]])
    with pytest.raises(UserError, match="sample 1 of group 1"):
        group_advantages(rewards)
    with pytest.raises(UserError, match="sample 1 of group 1"):
        combine_advantages(torch.stack([torch.zeros(2, 2), rewards], -1), torch.ones(2))
    with pytest.raises(UserError, match="weights"):
        combine_advantages(torch.zeros(2, 2, 2), torch.tensor([1.0, value]))


def test_misuse_is_refused():
    rewards = torch.tensor([[0.0, 1.0]])
    with pytest.raises(REFUSED):
        group_advantages(torch.tensor([0.0, 1.0]))
    with pytest.raises(REFUSED):
        combine_advantages(torch.zeros(2, 3, 2), torch.ones(3))
    with pytest.raises(REFUSED):
        group_advantages(rewards, std="global")
    with pytest.raises(REFUSED):
        Credit(std="global")
    with pytest.raises(REFUSED):
        Credit(combine="sum")
    with pytest.raises(REFUSED):
        Credit(baseline="best")
    for clip in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="clip"):
            group_advantages(rewards, clip=clip)
        with pytest.raises(ValueError, match="clip"):
            Credit(clip=clip)

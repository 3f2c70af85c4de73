"""Advantages by key: groups of any sizes, several channels, and samples with any number of terms."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.learning import advantage
from flashgrpo.learning.advantage import advantages_by_key, combine_advantages
from flashgrpo.learning.experience import Compared, Drawn, compare, draw_and_score
from flashgrpo.learning.settings import Credit
from flashgrpo.process import Record
from flashgrpo.types import REWARD, Prompt, PromptGroup, RewardTable
from tests.learning.toy import CPU, Features, FirstOfTwo, SecondOfTwo, Toy, toy_record

WORLD = World(CPU)
ROOT = math.sqrt(2) + 1e-4  # the std of 0, 0, 3
ONE = 1 / (1 + 1e-4)  # of 1, 3: deviation and std are 1


def table(*columns: list[float], weights=None, channels=()) -> RewardTable:
    """A reward table of these components."""
    values = torch.tensor(columns, dtype=torch.float64).T
    names = tuple(f"r{number}" for number in range(len(columns)))
    return RewardTable(names, values, torch.tensor(weights or [1.0] * len(columns)).double(), channels=channels)


def by_key(rewards: RewardTable, key: list[int], sample=None, channel=None, channels=(REWARD,), **credit) -> Tensor:
    """The advantage of each pair; without more, sample i has the i-th key."""
    pairs = torch.tensor(key), torch.tensor(channel or [0] * len(key)), torch.tensor(sample or list(range(len(key))))
    return advantages_by_key(rewards, channels, Credit(**credit), *pairs)[0]


def close(actual: Tensor, expected: list[float], atol: float = 1e-6) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), atol=atol, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(2, 9), st.integers(1, 4)),
    std=st.sampled_from(["group", "batch"]),
    combine=st.sampled_from(["normalized", "raw"]),
    clip=st.sampled_from([0.5, 5.0]),
    seed=st.integers(0, 1000),
)
def test_equal_groups_have_the_advantages_of_combine_advantages(sizes, std, combine, clip, seed):
    """Bit for bit, whatever the numbers of samples and keys, and the order of the pairs."""
    groups, members, components = sizes
    source = torch.Generator().manual_seed(seed)
    count = groups * members
    values = torch.randn(count, components + 1, generator=source, dtype=torch.float64) * 10
    weights = torch.rand(components, generator=source, dtype=torch.float64) + 0.1
    watched = torch.cat([weights[:1], torch.zeros(1, dtype=torch.float64), weights[1:]])
    names = tuple(f"r{number}" for number in range(components + 1))
    trained = [0, *range(2, components + 1)]
    samples = torch.randperm(count, generator=source).unflatten(0, (groups, members)).sort(dim=1).values
    expected = combine_advantages(values[samples][..., trained], weights, std, clip, combine)

    keys = (torch.arange(groups) * 7 + 3)[:, None].expand_as(samples)
    order = torch.randperm(count, generator=source)
    pairs = keys.flatten()[order], torch.zeros(count, dtype=torch.int64), samples.flatten()[order]
    credit = Credit(std=std, combine=combine, clip=clip)
    found, _ = advantages_by_key(RewardTable(names, values, watched), (REWARD,), credit, *pairs)
    assert torch.equal(found, expected.flatten()[order])


def test_the_example_of_the_docstring():
    assert by_key(table([1.0, 3.0, 5.0]), [0, 0, 1]).tolist() == pytest.approx([-0.9999, 0.9999, 0], abs=1e-6)


def test_ragged_groups_by_hand_with_the_std_of_the_group():
    """1 3 | 5 | 0 0 3: mean 2 and std 1, alone, mean 1 and std sqrt(2)."""
    rewards = table([1.0, 0.0, 5.0, 3.0, 0.0, 3.0])
    found = by_key(rewards, [4, 9, 6, 4, 9, 9])
    close(found, [-ONE, -1 / ROOT, 0.0, ONE, -1 / ROOT, 2 / ROOT])


def test_ragged_groups_by_hand_with_the_std_of_the_batch():
    """1 3 | 5 | 0 0 3: all six have mean 2 and squared deviations 1 1 9 4 4 1, so their std is sqrt(20 / 6)."""
    s = math.sqrt(20 / 6) + 1e-4
    found = by_key(table([1.0, 3.0, 5.0, 0.0, 0.0, 3.0]), [0, 0, 1, 2, 2, 2], std="batch")
    close(found, [-1 / s, 1 / s, 0.0, -1 / s, -1 / s, 2 / s])


def test_several_rewards_of_ragged_groups_by_hand():
    """(1, 30) (3, 10) | (0, 0) (0, 0) (3, 6), the second with weight 0.5.

    Normalized: (-1, 1) + 0.5 (1, -1), and 1.5 times (-1, -1, 2) / sqrt(2).
    Raw: 16 and 8, mean 12, std 4; 0, 0 and 6, mean 2, std sqrt(8).
    """
    rewards = table([1.0, 3.0, 0.0, 0.0, 3.0], [30.0, 10.0, 0.0, 0.0, 6.0], weights=[1.0, 0.5])
    key, root = [0, 0, 1, 1, 1], math.sqrt(2)
    expected = [-0.5, 0.5, -1.5 / root, -1.5 / root, 3 / root]
    torch.testing.assert_close(by_key(rewards, key), torch.tensor(expected), atol=1e-3, rtol=0)
    raw = [1.0, -1.0, -2 / math.sqrt(8), -2 / math.sqrt(8), 4 / math.sqrt(8)]
    torch.testing.assert_close(by_key(rewards, key, combine="raw"), torch.tensor(raw), atol=1e-3, rtol=0)


@pytest.mark.parametrize("std", ["group", "batch"])
def test_groups_of_one_have_nothing_to_compare(std):
    assert by_key(table([1.0, 7.0, -2.0]), [0, 1, 2], std=std).tolist() == [0, 0, 0]
    found = by_key(table([1.0, 7.0, -2.0]), [0, 1, 1], std=std)
    assert found[0] == 0
    assert found[1] > 0.5 > -0.5 > found[2]


@settings(max_examples=30, deadline=None)
@given(
    key=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    seed=st.integers(0, 100),
    std=st.sampled_from(["group", "batch"]),
    combine=st.sampled_from(["normalized", "raw"]),
)
def test_advantages_of_a_key_sum_to_nothing(key, seed, std, combine):
    """And a key whose rewards are all the same gives exact zeros, beside any others."""
    values = torch.randn(len(key), 2, generator=torch.Generator().manual_seed(seed)).double()
    values[torch.tensor(key) == 0] = 1 / 3
    rewards = RewardTable(("a", "b"), values, torch.tensor([1.0, 0.5]).double())
    found = by_key(rewards, key, std=std, combine=combine, clip=100.0)
    for number in set(key):
        own = found[torch.tensor(key) == number]
        assert abs(float(own.sum())) < 1e-4
        assert number != 0 or not own.any()


def test_advantages_are_clipped():
    winner = [0.0] * 100
    winner[7] = 1.0
    found = by_key(table([*winner, 0.0]), [0] * 100 + [1])
    assert found[7] == 5.0
    assert by_key(table([*winner, 0.0]), [0] * 100 + [1], clip=2.0)[7] == 2.0


def test_two_channels_are_judged_by_their_own_components():
    """The first by r0 and r2 within groups, the second by r1 among all; a channel without a component gives 0."""
    components = [1.0, 3.0, 0.0, 0.0], [0.0, 9.0, 0.0, 3.0], [9.0, 9.0, 2.0, 6.0]
    rewards = table(*components, channels=("good", "short", "good"))
    key = [0, 0, 1, 1, 0, 0, 0, 0]
    channel, sample = [0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 3, 0, 1, 2, 3]
    of_all = torch.tensor([0.0, 9.0, 0.0, 3.0]).double()
    s = float(of_all.std(correction=0)) + 1e-4
    half = 2 / (2 + 1e-4)  # of 2, 6
    expected = [-ONE, ONE, -half, half, -3 / s, 6 / s, -3 / s, 0.0]
    close(by_key(rewards, key, sample, channel, ("good", "short")), expected)
    assert by_key(rewards, key, sample, channel, ("good", "long"))[4:].tolist() == [0, 0, 0, 0]


def test_a_sample_may_be_compared_under_several_keys():
    """Sample 1 wins against 0, and loses against 2: its rewards are 1, 3 and 5."""
    found = by_key(table([1.0, 3.0, 5.0]), [0, 0, 1, 1], sample=[0, 1, 1, 2])
    close(found, [-ONE, ONE, -ONE, ONE])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("combine", ["normalized", "raw"])
def test_a_group_with_a_reward_that_is_no_number_is_dropped(bad, std, combine):
    """The others, of any size, have the advantages that they have without it; a watched reward drops nothing."""
    key, first, other = [0, 1, 0, 2, 2, 2, 1], [1.0, bad, 3.0, 2.0, 5.0, 7.0, 0.0], [2.0, 1.0, 0.0, 5.0, 1.0, 1.0, 3.0]
    credit = Credit(std=std, combine=combine)
    pairs = torch.tensor(key), torch.zeros(7).long(), torch.arange(7)
    found, dropped = advantages_by_key(table(first, other), (REWARD,), credit, *pairs)
    assert dropped.tolist() == [False, True, False, False, False, False, True]
    assert not found[dropped].any()
    without = by_key(table(first, other), [0, 0, 2, 2, 2], [0, 2, 3, 4, 5], std=std, combine=combine)
    assert torch.equal(found[~dropped], without)
    _, dropped = advantages_by_key(table(other, first, weights=[1.0, 0.0]), (REWARD,), credit, *pairs)
    assert not dropped.any()


# ---- records of several ranks ----------------------------------------------------------------------------------------


def record_of(sample: list[int], key: list[int], channel: list[int] | None = None) -> Record:
    """A record of a single unit that has these terms."""
    count = len(sample)
    columns = (torch.tensor(column, dtype=torch.int64) for column in (sample, key, channel or [0] * count))
    unit = torch.zeros(count, dtype=torch.int64)
    return Record(torch.zeros(1).long(), unit, *columns, torch.ones(count), torch.zeros(count), Features(unit[:1], []))


def compared(record: Record, rewards: RewardTable, world=WORLD, first=0, channels=(REWARD,)) -> Compared:
    return compare(Drawn(0, first, None, record, rewards), channels, Credit(), world)


@pytest.mark.parametrize("times", [(1, 1, 1), (5, 1, 1), (1, 2, 7)])
def test_a_sample_counts_once_for_a_key_however_many_terms_it_has(times):
    """Rewards 0, 0, 3 of one key: weighed by their terms, the means would be 0.43, 1 and 2.1."""
    sample = [number for number, count in enumerate(times) for _ in range(count)]
    found = compared(record_of(sample[::-1], [4] * len(sample)), table([0.0, 0.0, 3.0]))
    expected = [-1 / ROOT, -1 / ROOT, 2 / ROOT]
    close(found.record.advantage, [expected[number] for number in sample[::-1]])
    assert (found.sample.tolist(), found.key.tolist()) == ([0, 1, 2], [4, 4, 4])
    close(found.advantage, expected)


def test_ranks_compare_their_samples_with_each_other():
    """Rank 0 has samples 0 and 1, rank 1 sample 2, with two terms: all of one key, and one more key of rank 1 alone."""
    rewards = table([0.0, 0.0, 3.0])
    first, second = record_of([0, 1], [4, 4]), record_of([0, 0, 0], [4, 4, 8])
    of_first, of_second = [[4, 4], [0, 0], [0, 1]], [[4, 8], [0, 0], [2, 2]]  # keys, channels, samples of all ranks
    seen = compared(first, rewards, FirstOfTwo(said=[of_second]))
    close(seen.record.advantage, [-1 / ROOT, -1 / ROOT])
    close(seen.advantage, [-1 / ROOT, -1 / ROOT, 2 / ROOT, 0.0])
    seen = compared(second, rewards, SecondOfTwo(said=[of_first]), first=2)
    close(seen.record.advantage, [2 / ROOT, 2 / ROOT, 0.0])
    close(seen.advantage, [-1 / ROOT, -1 / ROOT, 2 / ROOT, 0.0])


def test_flat_groups_are_counted_by_key_and_channel():
    """Key 0 is flat by the first channel and not by the second, key 1 has one sample."""
    rewards = table([2.0, 2.0, 5.0], [0.0, 1.0, 0.0], channels=("good", "short"))
    record = record_of([0, 1, 0, 1, 2], [0, 0, 0, 0, 1], [0, 0, 1, 1, 0])
    found = compared(record, rewards, channels=("good", "short"))
    assert found.flat_groups == 2
    assert found.record.advantage.tolist() == pytest.approx([0, 0, -1, 1, 0], abs=1e-3)


def test_a_rank_without_samples_compares_all_the_same():
    record = record_of([], [])
    seen = compared(record, table([1.0, 3.0]), SecondOfTwo(said=[[[0, 0], [0, 0], [0, 1]]]), first=2)
    assert len(seen.record.advantage) == 0
    close(seen.advantage, [-ONE, ONE])


def test_soft_clipping_bends_and_keeps_the_order():
    """V-GRPO's golden numbers: eta tanh(A / eta) of (-4, -1, 0, 1, 4) with eta = 3."""
    credit = Credit(combine="raw", clip=3.0, bend="soft")
    wanted = torch.tensor([[-4.0, -1.0, 0.0, 1.0, 4.0]], dtype=torch.float64)
    close(advantage._clipped(wanted, credit)[0], [-2.6102, -0.9645, 0.0, 0.9645, 2.6102], atol=5e-5)
    hard = by_key(table([0.0, 0.0, 3.0]), [0, 0, 0], clip=1.0)
    soft = by_key(table([0.0, 0.0, 3.0]), [0, 0, 0], clip=1.0, bend="soft")
    close(hard, [-1 / ROOT, -1 / ROOT, 1.0])
    close(soft, [math.tanh(-1 / ROOT), math.tanh(-1 / ROOT), math.tanh(2 / ROOT)])


def test_rescaling_makes_the_largest_of_the_update_one():
    """Two keys: 0 0 3 has -1, -1, 2 over its std, 1 3 has -1, 1; all are divided by the largest, 2 / ROOT."""
    found = by_key(table([0.0, 0.0, 3.0, 1.0, 3.0]), [0, 0, 0, 1, 1], rescale="largest")
    close(found, [-0.5, -0.5, 1.0, -ONE * ROOT / 2, ONE * ROOT / 2])
    assert not by_key(table([1.0, 1.0]), [0, 0], rescale="largest").any()


def test_a_rank_draws_its_share_and_says_where_it_begins():
    """Three samples of two ranks: the second draws what is left."""
    prompt = Prompt("a red circle", {})
    groups, asked = [PromptGroup(3, 0, prompt, 2), PromptGroup(3, 1, prompt, 1)], []

    class Drawing(Toy):
        def draw(self, samples, seed, on_drawn, uses=1, columns=()):
            asked.append(([sample.name for sample in samples], seed, uses))
            on_drawn(torch.arange(len(samples)), "outputs")
            return "outputs", toy_record(self, [0], [1], advantages=False)

    class Scores:
        def __init__(self) -> None:
            self.rows: list[int] = []

        def add(self, rows: Tensor, outputs: object) -> None:
            self.rows += rows.tolist()

        def table(self) -> RewardTable:
            return table([1.0, 2.0, 3.0])

    names = [(3, 0, 0), (3, 0, 1), (3, 1, 0)]
    for world in (FirstOfTwo(), SecondOfTwo()):
        scores, mine = Scores(), world.share(3)
        drawn = draw_and_score(Drawing(), scores, groups, 7, world, lambda phase: contextlib.nullcontext(), 2)
        assert (drawn.update, drawn.first, drawn.outputs) == (3, mine.start, "outputs")
        assert asked.pop() == ([names[number] for number in mine], 7, 2)
        assert scores.rows == list(range(len(mine)))
        assert drawn.rewards.values.tolist() == [[1], [2], [3]]

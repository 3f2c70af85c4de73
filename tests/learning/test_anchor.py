"""Advantages over an anchor: golden numbers of KVPO, several rewards in one channel, and what is refused."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.distributed.world import single_process
from flashgrpo.learning.advantage import advantages_by_key, combine_advantages, group_advantages
from flashgrpo.learning.experience import compare, draw_and_score
from flashgrpo.learning.settings import Credit
from flashgrpo.types import Prompt, PromptGroup, RewardTable, Sample
from tests.learning.toy import CPU, FirstOfTwo, SecondOfTwo
from tests.streams import Stream, number_of

WORLD = single_process(computes=False)
ANCHORED = Credit(baseline="anchor", std="group-and-anchor")


def close(actual: torch.Tensor, expected: list, atol: float = 3e-4) -> None:
    """The golden numbers have no 1e-4 beside the std."""
    torch.testing.assert_close(actual, torch.tensor(expected), atol=atol, rtol=0)


def fused(rewards: list[list[float]], anchor: list[float], weights: list[float], **credit) -> torch.Tensor:
    """The advantages of one key whose samples come first and whose anchor comes last, by components of a channel."""
    values = torch.tensor([*zip(*rewards, strict=True), anchor], dtype=torch.float64)
    names = tuple(f"r{number}" for number in range(len(anchor)))
    table = RewardTable(names, values, torch.tensor(weights).double(), channels=("fused",) * len(names))
    sample = torch.arange(len(values) - 1)
    key, channel, held = (torch.full_like(sample, value) for value in (3, 1, len(sample)))
    rule = Credit(**{"baseline": "anchor", **credit})
    return advantages_by_key(table, ("rank", "fused"), rule, key, channel, sample, held)[0]


def test_golden_advantage_over_the_anchor():
    """1 2 4 and the anchor's 2 have mean 2.25, squared deviations 4.75, and 4.75 / 3 = 1.258306 squared."""
    s = 1.258306 + 1e-4
    found = group_advantages(torch.tensor([[1.0, 2.0, 4.0]]), "group-and-anchor", anchor=torch.tensor([2.0]))
    close(found, [[-1 / s, 0.0, 2 / s]], atol=1e-6)
    close(found, [[-0.794719, 0.0, 1.589439]])


def test_golden_fused_channel():
    """Two signals in one channel, each over its own std: (-1, 0, 2) with weight 1 and (1, -1, 0) with 1/2."""
    signals = [-1.0, 0.0, 2.0], [1.0, -1.0, 0.0]
    close(fused(signals, [0.0, 0.0], [1.0, 0.5]), [-0.189411, -0.612372, 1.603567])
    moved = [3.0, 4.0, 6.0], [11.0, 9.0, 10.0]  # the anchor is what they are held against
    close(fused(moved, [4.0, 10.0], [1.0, 0.5]), [-0.189411, -0.612372, 1.603567])
    close(fused(signals, [0.0, 0.0], [1.0, 0.5], clip=0.5), [-0.189411, -0.5, 0.5])


def test_the_published_two_steps_are_one():
    """Divided by the std of group and anchor, and then by the std of what that gives: the first of them cancels."""
    source = torch.Generator().manual_seed(0)
    local, whole = torch.randn(2, 8, generator=source, dtype=torch.float64)
    anchors, published = [0.3, -0.2], torch.zeros(8, dtype=torch.float64)
    for weight, reward, anchor in ((1.0, local, anchors[0]), (0.5, whole, anchors[1])):
        first = (reward - anchor) / torch.cat([reward, torch.tensor([anchor]).double()]).std()
        published += weight * first / first.std(correction=0)
    found = fused([local.tolist(), whole.tolist()], anchors, [1.0, 0.5], clip=2.5)
    close(found, published.clamp(-2.5, 2.5).float().tolist(), atol=1e-3)


def test_raw_rewards_are_added_first():
    """(1, 0) (3, 2) and the anchor's (0, 2) with weights 1 and 1/2: 1 and 4 against 1, over the std 1.5."""
    found = fused([[1.0, 3.0], [0.0, 2.0]], [0.0, 2.0], [1.0, 0.5], combine="raw")
    close(found, [0.0, 3 / 1.5], atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    std=st.sampled_from(["group", "group-and-anchor", "batch", "none"]),
    seed=st.integers(0, 1000),
    size=st.integers(2, 6),
)
def test_keys_of_any_size_have_the_advantages_of_combine_advantages(std, seed, size):
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(3 * (size + 1), 2, generator=source, dtype=torch.float64)
    table = RewardTable(("a", "b"), values, torch.tensor([1.0, 0.5]).double())
    number = torch.arange(len(values)).view(3, size + 1)
    sample, anchor = number[:, :-1].flatten(), number[:, -1:].expand(-1, size).flatten()
    key, channel = torch.arange(3).repeat_interleave(size), torch.zeros(3 * size, dtype=torch.int64)
    credit = Credit("anchor", std)
    found, dropped = advantages_by_key(table, ("reward",), credit, key, channel, sample, anchor)
    expected = combine_advantages(values[number[:, :-1]], table.weights, std, anchor=values[number[:, -1]])
    assert torch.equal(found.view(3, size), expected)
    assert not dropped.any()
    spoilt = replace(table, values=values.index_put((number[1, -1],), torch.tensor(torch.nan).double()))
    again, dropped = advantages_by_key(spoilt, ("reward",), credit, key, channel, sample, anchor)
    assert torch.equal(dropped, key == 1)
    assert not again[key == 1].any()
    if std != "batch":
        assert torch.equal(again[key != 1], found[key != 1])


@pytest.mark.parametrize("std", ["group", "group-and-anchor", "batch", "none"])
def test_a_group_as_good_as_its_anchor_gives_zero(std):
    rewards = torch.tensor([[0.7, 0.7, 0.7], [0.0, 1.0, 2.0]])
    found = group_advantages(rewards, std, anchor=torch.tensor([0.7, 5.0]))
    assert not found[0].any()
    assert (found[1] < 0).all()


def test_a_group_that_is_alike_and_worse_than_its_anchor():
    """Its own std is 0, and says nothing; with the anchor it is that of 0 0 0 1, 1/2."""
    rewards, anchor = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([1.0])
    assert not group_advantages(rewards, "group", anchor=anchor).any()
    close(group_advantages(rewards, "group-and-anchor", anchor=anchor), [[-2.0, -2.0, -2.0]], atol=1e-3)


def test_one_sample_can_be_held_against_an_anchor():
    """1 and the anchor's 3: mean 2, unbiased std sqrt(2), so -2 / sqrt(2)."""
    found = fused([[1.0]], [3.0], [1.0], std="group-and-anchor")
    close(found, [-math.sqrt(2)], atol=1e-3)


def test_where_nothing_beats_the_anchor_the_weight_is_another():
    worse = [[0.0, 1.0, 2.0], [5.0, 5.0, 4.0]]
    safe = fused(worse, [2.0, 5.0], [1.0, 0.5])
    assert safe.min() < 0
    for weight in (0.0, 0.5, 1.0):
        assert torch.equal(fused(worse, [2.0, 5.0], [1.0, 0.5], unsafe_weight=weight), weight * safe)
    one_signal = [[0.0, 1.0, 2.0], [5.0, 6.0, 4.0]]  # a single sample is better in the second reward alone
    kept = fused(one_signal, [2.0, 5.0], [1.0, 0.5], unsafe_weight=0.0)
    assert torch.equal(kept, fused(one_signal, [2.0, 5.0], [1.0, 0.5]))
    assert not fused(one_signal, [2.0, 5.0], [1.0, -0.5], unsafe_weight=0.0)[:1].any() or kept.any()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"std": "group-and-anchor"}, "there is no anchor for"),
        ({"unsafe_weight": 0.5}, "there is no anchor for"),
        ({"baseline": "anchor", "unsafe_weight": 1.5}, "unsafe_weight must be from 0 to 1"),
        ({"baseline": "anchor", "unsafe_weight": math.nan}, "unsafe_weight must be from 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(settings, sentence):
    with pytest.raises(Exception, match=sentence):
        Credit(**settings)


# ---- drawn by a process ----------------------------------------------------------------------------------------------

GROUPS = [PromptGroup(4, number, Prompt(text, {}), 3, anchored=True) for number, text in enumerate(("wall", "door"))]


class Redness:
    """Scores each sample by its first number, whatever it is."""

    def __init__(self, samples):
        self.values = torch.zeros(samples, 1, dtype=torch.float64)

    def add(self, rows, outputs):
        self.values[rows] = number_of(outputs).double().cpu()

    def table(self):
        return RewardTable(("red",), self.values, torch.ones(1, dtype=torch.float64))


def drawn(world=WORLD):
    process = Stream(True, micro_batch=4, group_size=3)
    return process, draw_and_score(process, Redness(8), GROUPS, 0, world, lambda phase: nullcontext(), 2)


def test_samples_of_an_anchored_group():
    names = [sample.name for sample in GROUPS[1].samples]
    assert names == [(4, 1, 0), (4, 1, 1), (4, 1, 2), (4, 1, 3)]
    assert [sample.is_anchor for sample in GROUPS[1].samples] == [False, False, False, True]
    plain = PromptGroup(4, 1, Prompt("", {}), 3)
    assert [sample.is_anchor for sample in plain.samples] == [False, False, False]


def test_an_anchor_is_scored_and_is_no_term():
    process, one = drawn()
    assert one.anchor.tolist() == [3, 3, 3, 3, 7, 7, 7, 7]
    assert one.record.sample.tolist() == [0, 1, 2, 4, 5, 6]
    assert len(one.rewards.total) == 8
    assert one.members.values[:, 0].tolist() == one.rewards.values[[0, 1, 2, 4, 5, 6], 0].tolist()
    assert one.anchors.values[:, 0].tolist() == one.rewards.values[[3, 7], 0].tolist()
    compared = compare(one, process.channels, ANCHORED, WORLD)
    rewards = one.rewards.values[:, 0].view(2, 4)
    expected = group_advantages(rewards[:, :3], "group-and-anchor", anchor=rewards[:, 3])
    assert torch.equal(compared.record.advantage, expected.flatten())
    assert (compared.groups, compared.flat_groups, compared.dropped_groups) == (2, 0, 0)


def test_an_anchor_may_be_on_another_rank():
    process, one = drawn()
    whole = compare(one, process.channels, ANCHORED, WORLD)
    for rank, kind in ((0, FirstOfTwo), (1, SecondOfTwo)):
        mine = torch.arange(2) + (0 if rank == 0 else 2)  # the first rank has two members of each group's three
        units = torch.isin(one.record.sample, mine)
        part = one.record[units.nonzero()[:, 0]]
        other = one.record[(~units).nonzero()[:, 0]]
        said = torch.stack([other.key, other.channel, other.sample]).unique(dim=1).tolist()
        world = kind(CPU, said=[said], **({"rank": 1} if rank else {}))
        found = compare(replace(one, record=part), process.channels, ANCHORED, world)
        assert torch.equal(found.record.advantage, whole.record.advantage[units])


def test_a_process_that_makes_a_term_of_an_anchor_is_found_out():
    process, one = drawn()
    wrong = replace(one.record, sample=one.record.sample + 1)
    with pytest.raises(AssertionError, match="is no term"):
        compare(replace(one, record=wrong), process.channels, ANCHORED, WORLD)
    assert Sample(GROUPS[0], 3).is_anchor

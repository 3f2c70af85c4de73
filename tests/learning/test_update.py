"""The update of any process: what is replayed when, what is summed, and what ranks do together; on a toy process."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.learning.objective import Clipped
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import Work, policy_update
from flashgrpo.process import Record
from tests.learning.toy import CPU, FirstOfTwo, SecondOfTwo, Toy, toy_record

WORLD = World(CPU)
SLOTS, TERMS = [2, 0, 0, 2, 0], [1, 3, 2, 1, 4]


def updated(process: Toy, record: Record, objective=None, world=WORLD, **options) -> tuple[dict, Tensor]:
    """The metrics of one update, and the gradient of its first optimizer step."""
    config = OptimConfig(max_grad_norm=1e9, weight_decay=0.0, **options)
    optimizer = Optimizer({"weight": process.weight}, config, world)
    gradients, take = [], optimizer.take

    def spied() -> list[Tensor]:
        (gradient,) = taken = take()
        gradients.append(gradient[0].clone())
        return taken

    optimizer.take = spied
    metrics = policy_update(process, objective or Clipped(), optimizer, record, config, world)
    assert optimizer.steps == len(gradients) == config.passes * config.minibatches
    return metrics, gradients[0]


def expected_gradient(record: Record) -> Tensor:
    """-mean(w A grad score) over the terms, where every ratio is 1."""
    return -((record.weight * record.advantage)[:, None] * record.state.rows).sum(0) / len(record.unit)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
def test_the_first_gradient_is_the_policy_gradient_of_the_terms(micro_batch):
    """Whatever the micro-batch; a term counts once, however many others its unit has."""
    process = Toy(micro_batch)
    record = toy_record(process, SLOTS, TERMS)
    expected = expected_gradient(record)
    metrics, gradient = updated(process, record)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(-(record.weight * record.advantage).mean()), rel=1e-5)
    assert (metrics["drift"], metrics["ratio_max_dev"], metrics["clip_fraction"], metrics["kl"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("micro_batch", [1, 2, 100])
def test_each_unit_is_replayed_once_beside_units_of_its_slot(micro_batch):
    process = Toy(micro_batch)
    metrics, _ = updated(process, toy_record(process, SLOTS, TERMS))
    assert sorted(unit for units in process.replayed for unit in units) == list(range(5))
    assert all(len(units) <= micro_batch and len({SLOTS[unit] for unit in units}) == 1 for units in process.replayed)
    assert metrics["transitions_by_step"] == {"0": 3, "2": 2}
    assert process.idled == []


def test_gradient_norms_by_slot_are_those_of_the_slots_terms():
    process = Toy()
    record = toy_record(process, SLOTS, TERMS)
    norms = {}
    for slot in (0, 2):
        own = record[(record.slot == slot).nonzero().flatten()]
        norms[str(slot)] = pytest.approx(float(expected_gradient(own).norm()), rel=1e-5)
    assert updated(process, record)[0]["grad_norm_by_step"] == norms
    other = Toy()
    metrics, gradient = updated(other, record, grad_norm_by_step=False)
    assert metrics["grad_norm_by_step"] == {}
    torch.testing.assert_close(gradient, expected_gradient(record), rtol=1e-5, atol=1e-6)


def test_the_kl_is_asked_for_and_added():
    """Its gradient by the weight is the weight: each term's column is half the weight's square."""
    process = Toy()
    record = toy_record(process, SLOTS, TERMS)
    before, expected = process.weight.detach().clone(), expected_gradient(record)
    metrics, gradient = updated(process, record, Clipped(kl_coef=0.3))
    torch.testing.assert_close(gradient, expected + 0.3 * before[0], rtol=1e-5, atol=1e-6)
    kl = float(before.square().sum()) / 2
    assert metrics["kl"] == pytest.approx(kl, rel=1e-6)
    assert metrics["loss"] == pytest.approx(float(-(record.weight * record.advantage).mean()) + 0.3 * kl, rel=1e-5)


@pytest.mark.parametrize(("minibatches", "passes"), [(1, 2), (2, 1), (2, 3), (5, 1)])
def test_each_pass_replays_each_unit_once(minibatches, passes):
    process = Toy(1)
    metrics, _ = updated(process, toy_record(process, SLOTS, TERMS), minibatches=minibatches, passes=passes, lr=1e-2)
    replayed = [unit for (unit,) in process.replayed]
    for first in range(0, 5 * passes, 5):
        assert sorted(replayed[first : first + 5]) == list(range(5))
    assert metrics["drift"] == 0
    assert metrics["ratio_max_dev"] > 0
    assert metrics["transitions_by_step"] == {"0": 3, "2": 2}


def test_the_loss_of_an_optimizer_step_is_of_its_own_terms():
    """The first of two optimizer steps takes units 0, 2 and 4, of 1 + 2 + 4 terms, where all have one key."""
    process = Toy()
    record = toy_record(process, SLOTS, TERMS)
    _, gradient = updated(process, record, minibatches=2)
    torch.testing.assert_close(gradient, expected_gradient(record[torch.tensor([0, 2, 4])]), rtol=1e-5, atol=1e-6)


def test_an_optimizer_step_takes_whole_groups():
    """Two steps of 4 groups of 3 on two ranks are 2 groups each, of both ranks; a group that lies on both is one."""
    process, keys = Toy(), ([0, 0, 0, 1, 1, 1, 2], [2, 2, 3, 3, 3])
    slots = [[0] * 7, [0] * 5]
    record = dataclasses.replace(toy_record(process, slots[0], [1] * 7), key=torch.tensor(keys[0]))
    said = [slots[1], [1] * 5, keys[1]]
    steps = list(Work.of(process, record, FirstOfTwo(said=[said])).optimizer_steps(OptimConfig(minibatches=2)))
    assert [step.key.tolist() for step in steps] == [[0, 0, 0, 2, 2, 2], [1, 1, 1, 3, 3, 3]]
    assert [step.owner.tolist() for step in steps] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    three = list(Work.of(process, record, FirstOfTwo(said=[said])).optimizer_steps(OptimConfig(minibatches=3)))
    assert [sorted({*step.key.tolist()}) for step in three] == [[0, 3], [1], [2]]
    six = Work.of(process, record, FirstOfTwo(said=[said])).optimizer_steps(OptimConfig(minibatches=6))
    assert [len(step.key) for step in six] == [2] * 6, "fewer groups than steps"


def test_weights_that_are_not_those_that_drew_show_as_drift():
    process = Toy()
    record = toy_record(process, SLOTS, TERMS)
    process.weight.data += 0.1
    metrics, _ = updated(process, record)
    assert metrics["drift"] == metrics["ratio_max_dev"] > 0


def test_nothing_to_learn_changes_no_bit():
    process = Toy()
    record = toy_record(process, SLOTS, TERMS)
    before = process.weight.detach().clone()
    flat = dataclasses.replace(record, advantage=torch.zeros(len(record.unit)))
    assert updated(process, flat, lr=0.1, passes=2)[0]["grad_norm"] == 0
    assert torch.equal(process.weight, before)


def test_samples_are_compared_before_they_are_learnt_from():
    process = Toy()
    with pytest.raises(AssertionError, match="compared"):
        updated(process, toy_record(process, SLOTS, TERMS, advantages=False))


class LossOf(Clipped):
    """A loss of which one term is not finite, and its gradient is."""

    def losses(self, score, old, advantage, weight, columns):
        losses = super().losses(score, old, advantage, weight, columns)
        return losses + torch.tensor([torch.inf, *[0.0] * (len(losses) - 1)])


class LossInTwo(LossOf):
    coupled = True


@pytest.mark.parametrize("objective", [Clipped(), LossOf(), LossInTwo()], ids=lambda one: type(one).__name__)
def test_a_bad_step_is_skipped_and_counted(objective):
    """Whatever comes before and after is as if it had not been; the one in a row too many ends the run."""
    process = Toy()
    record = toy_record(process, SLOTS, TERMS)
    config = OptimConfig(max_bad_steps=3, ema={"every": 1})
    optimizer = Optimizer({"weight": process.weight}, config, WORLD)

    def step(objective, record) -> dict:
        return policy_update(process, objective, optimizer, record, config, WORLD)

    bad = record if type(objective) is not Clipped else dataclasses.replace(record, weight=record.weight * torch.inf)
    assert "skipped_steps" not in step(Clipped(), record)
    before, moments = process.weight.detach().clone(), optimizer.state()["optimizer"]
    moments = {name: value.clone() for name, value in moments.items() if name != "steps"}
    assert step(objective, bad)["skipped_steps"] == 1
    assert (optimizer.steps, optimizer.skipped_in_a_row) == (2, 1)
    step(objective, bad)
    assert torch.equal(process.weight, before)
    for name, value in moments.items():
        assert torch.equal(optimizer.state()["optimizer"][name], value)
    with pytest.raises(UserError, match=r"step 4 is nan, number 3 in a row.*optim.max_bad_steps"):
        step(objective, bad)
    assert torch.equal(process.weight, before)
    optimizer.skipped_in_a_row = 2
    assert step(Clipped(), record)["grad_norm"] > 0
    assert optimizer.skipped_in_a_row == 0


# ---- ranks -----------------------------------------------------------------------------------------------------------


def work(process: Toy, rank: int) -> Work:
    """Slots 2 0 0 2 0 of rank 0 and 1 of rank 1, a term each."""
    owners = [SLOTS, [1] * 5], [[1], [1]]
    world = (SecondOfTwo if rank else FirstOfTwo)(said=[[*owners[1 - rank], [0] * len(owners[1 - rank][0])]])
    record = toy_record(process, owners[rank][0], owners[rank][1])
    return Work.of(process, record, world)


def test_rounds_by_hand():
    """3 calls and 1 call: one round of slots 0, 1 and 2, in which rank 1 makes 2 calls on nothing."""
    assert list(work(Toy(2), 0).rounds(by_slot=False)) == [([0, 1, 2], 0)]
    assert list(work(Toy(2), 1).rounds(by_slot=False)) == [([0, 1, 2], 2)]


def test_rounds_by_slot_by_hand():
    """Slot 0 is 2 calls and none, slot 1 none and 1, slot 2 is 1 and none: 4 calls in place of 3."""
    assert list(work(Toy(2), 0).rounds(by_slot=True)) == [([0], 0), ([1], 1), ([2], 0)]
    assert list(work(Toy(2), 1).rounds(by_slot=True)) == [([0], 2), ([1], 0), ([2], 1)]


def test_rounds_of_two_stages_by_hand():
    """Slots 0 and 1 are the first part of the network, slot 2 the second: 2 calls and 1, then 1 and none."""
    assert list(work(Toy(2, slots_of_stage=2), 0).rounds(by_slot=False)) == [([0, 1], 0), ([2], 0)]
    assert list(work(Toy(2, slots_of_stage=2), 1).rounds(by_slot=False)) == [([0, 1], 1), ([2], 1)]


def test_a_rank_replays_its_own_units():
    process = Toy(2)
    for rank, expected in ((0, [[1, 2], [4], [0, 3]]), (1, [[0]])):
        own = work(process, rank)
        record = toy_record(process, SLOTS, [1] * 5) if rank == 0 else toy_record(process, [1], [1])
        assert [part.state.number.tolist() for part in own.micro_batches(record, [0, 1, 2])] == expected
        assert (own.terms, own.terms_of(0), own.units_by_slot) == (6, 3, {"0": 3, "1": 1, "2": 2})


@settings(max_examples=40, deadline=None)
@given(
    slots=st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=2, max_size=2).filter(any),
    micro_batch=st.integers(1, 3),
    slots_of_stage=st.integers(1, 4),
    by_slot=st.booleans(),
)
def test_ranks_make_equally_many_calls_in_every_round(slots, micro_batch, slots_of_stage, by_slot):
    process, rounds = Toy(micro_batch, slots_of_stage), []
    for rank, world in enumerate((FirstOfTwo, SecondOfTwo)):
        theirs = slots[1 - rank]
        record = toy_record(process, slots[rank], [1] * len(slots[rank]))
        own = Work.of(process, record, world(said=[[theirs, [1] * len(theirs), [0] * len(theirs)]]))
        calls = [(list(each), idle + len(list(own.micro_batches(record, each)))) for each, idle in own.rounds(by_slot)]
        assert not by_slot or all(len(members) == 1 for members, _ in calls)
        rounds.append(calls)
    assert rounds[0] == rounds[1]


def test_ranks_that_hold_a_network_between_them_call_it_together():
    """Rank 1 replays slot 1 once, and makes two more calls on nothing; its part of the loss is of all 6 terms, twice,
    since FSDP2 takes the mean over ranks."""
    process = Toy(2)
    record = toy_record(process, [1], [1])
    expected = 2 / 6 * expected_gradient(record)
    world = SecondOfTwo(uses_fsdp=True, said=[[SLOTS, [1] * 5, [0] * 5], {}])
    metrics, gradient = updated(process, record, world=world)
    assert process.replayed == [[0]]
    assert process.idled == [2, 2]
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert metrics["grad_norm_by_step"] == {}  # not by slot, which would cost calls
    assert metrics["transitions_by_step"] == {"0": 3, "1": 1, "2": 2}


def test_metrics_are_of_all_ranks():
    """Rank 0 says that its terms had losses 1 and 2, and a ratio of 1 each; this rank's ratio is e^0.5."""
    process = Toy()
    record = toy_record(process, [1], [1])
    record = dataclasses.replace(record, old=record.old - 0.5, advantage=torch.zeros(1))
    zeros = {name: [0.0, 0.0] for name in ("score", "old", "advantage", "first_score", "first_old")}
    said = zeros | {"loss": [1.0, 2.0]}
    world = SecondOfTwo(uses_fsdp=True, said=[[[0, 0], [1, 1], [0, 0]], said])
    metrics, _ = updated(process, record, world=world)
    assert metrics["loss"] == pytest.approx(1.0)
    ratio = torch.tensor(0.5).exp().item()
    assert metrics["ratio_mean"] == pytest.approx((2 + ratio) / 3)
    assert metrics["drift"] == pytest.approx(ratio - 1)
    assert metrics["clip_fraction"] == pytest.approx(1 / 3)

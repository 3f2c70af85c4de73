"""Which samples are denoised together, in which network calls, and how ranks make equally many of them."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.presets import DANCE_GRPO, FLASH_GRPO
from flashgrpo.processes.calls import fixed_batches, number_of_calls
from flashgrpo.processes.flow.rollout import MicroBatch, calls_of, plan, run_together
from flashgrpo.processes.flow.shortcuts import visited
from flashgrpo.processes.flow.steps import OneStep
from tests.processes.flow.drawing import WORLD, draw_from, make_process, samples_of


def masks(num_steps: int, *stochastic: tuple[int, ...]) -> Tensor:
    """A row for each sample, set at its stochastic steps."""
    rows = torch.zeros(len(stochastic), num_steps, dtype=torch.bool)
    for row, steps in enumerate(stochastic):
        rows[row, list(steps)] = True
    return rows


# ---- calls of one size -----------------------------------------------------------------------------------------------


def test_batches_of_one_size_by_hand():
    """3 rows in batches of 2 are ([0, 1], 2) and ([2, 2], 1): the last is filled up with copies of its last row."""
    assert [(rows.tolist(), new) for rows, new in fixed_batches(3, 2)] == [([0, 1], 2), ([2, 2], 1)]
    assert [(rows.tolist(), new) for rows, new in fixed_batches(1, 3)] == [([0, 0, 0], 1)]
    assert list(fixed_batches(0, 4)) == []


@settings(max_examples=50, deadline=None)
@given(count=st.integers(0, 40), size=st.integers(1, 9))
def test_batches_of_one_size_have_every_row_once(count, size):
    batches = list(fixed_batches(count, size))
    assert all(len(rows) == size for rows, _ in batches)
    assert [row for rows, new in batches for row in rows[:new].tolist()] == list(range(count))
    assert all((rows[new:] == rows[new - 1]).all() for rows, new in batches)
    assert len(batches) == number_of_calls(count, size)


# ---- micro-batches ---------------------------------------------------------------------------------------------------


def test_a_plan_by_hand():
    """Steps 2, 2, 0, 2 with size 2 are the micro-batches [0, 1], [3] and [2]."""
    stochastic = masks(4, (2,), (2,), (0,), (2,))
    batches = plan(stochastic, stochastic, None, 2)
    assert [batch.rows.tolist() for batch in batches] == [[0, 1], [3], [2]]
    assert [batch.stochastic for batch in batches] == [{2}, {2}, {0}]
    assert all(batch.trained == batch.stochastic and list(batch.points) == [0, 1, 2, 3] for batch in batches)


def test_samples_go_together_only_where_the_same_steps_are_trained():
    """Samples 0 and 2 differ in what is trained alone; sample 1 in what is stochastic."""
    stochastic = masks(4, (0, 1), (1,), (0, 1), (0, 1))
    trained = masks(4, (0,), (1,), (1,), (0,))
    batches = plan(stochastic, trained, None, 8)
    assert [batch.rows.tolist() for batch in batches] == [[0, 3], [1], [2]]
    assert [(set(batch.stochastic), set(batch.trained)) for batch in batches] == [
        ({0, 1}, {0}),
        ({1}, {1}),
        ({0, 1}, {1}),
    ]


def test_each_walk_stops_at_its_own_points():
    """Two points of six besides both ends of a stochastic step."""
    stochastic = masks(6, (1,), (4,), ())
    batches = plan(stochastic, stochastic, 2, 8)
    assert [list(batch.points) for batch in batches] == [[0, 1, 2, 3], [0, 3, 4, 5], [0, 3]]


@settings(max_examples=30, deadline=None)
@given(
    groups=st.integers(1, 5),
    members=st.integers(1, 4),
    size=st.integers(1, 6),
    steps=st.sampled_from([None, 2, 5]),
    seed=st.integers(0, 50),
)
def test_a_plan_has_each_sample_once_in_walks_of_one_pattern(groups, members, size, steps, seed):
    """Also where every sample draws a step of its own."""
    group_ids = torch.arange(groups).repeat_interleave(members)
    of_group = torch.arange(members).repeat(groups)
    stochastic = OneStep(per="sample", window=(0.0, 0.5)).mask(seed, 0, group_ids, 10, members=of_group)
    batches = plan(stochastic, stochastic, steps, size)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(groups * members))
    points = visited(stochastic, steps)
    for batch in batches:
        assert 1 <= len(batch.rows) <= size
        assert batch.rows.tolist() == sorted(batch.rows.tolist())
        for row in batch.rows:
            assert batch.stochastic == set(stochastic[row].nonzero().flatten().tolist())
            assert list(batch.points) == points[row].nonzero().flatten().tolist()
    patterns = [tuple(batch.stochastic) for batch in batches if len(batch.rows) < size]
    assert len(patterns) == len(set(patterns)), "only the last micro-batch of a pattern is not full"


def test_nothing_to_draw_is_no_micro_batch():
    assert plan(masks(4), masks(4), None, 2) == []


# ---- ranks that call together ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Busy(World):
    """A world whose other ranks make more network calls than this one."""

    device: torch.device = WORLD.device
    most: tuple[int, ...] = ()

    def max_over_ranks(self, calls: Tensor) -> Tensor:
        return torch.maximum(calls, torch.tensor(self.most))


HIGH, LOW = nn.Linear(1, 1), nn.Linear(1, 1)
STAGES = {HIGH: 1, LOW: 3}  # two experts on a grid of four steps


def expert(k: int) -> nn.Module:
    return HIGH if k < 2 else LOW


def together(batches: list[MicroBatch], most: tuple[int, ...], size: int = 2) -> list[str]:
    """The network calls of a rank in their order: "1b" is step 1 of walk b, "-3" one on nothing at step 3."""
    made: list[str] = []

    def walk(name: str, batch: MicroBatch) -> Iterator[int]:
        for k in batch.points:
            yield k
            made.extend([f"{k}{name}"] * (number_of_calls(len(batch.rows), size) if k in batch.stochastic else 1))

    walks = [walk(name, batch) for name, batch in zip("abcdef", batches, strict=False)]
    calls = [calls_of(batch, expert, size) for batch in batches]
    run_together(walks, batches, calls, STAGES, expert, lambda k: made.append(f"-{k}"), Busy(most=most))
    return made


def test_calls_of_a_walk_by_hand():
    """Three samples with step 1 stochastic, two rows a call: steps 0 and 1 are three calls of the first expert."""
    batch = MicroBatch(torch.arange(3), [0, 1, 2, 3], frozenset([1]), frozenset([1]))
    assert calls_of(batch, expert, 2) == {HIGH: 3, LOW: 2}
    assert calls_of(batch, expert, 8) == {HIGH: 2, LOW: 2}
    assert calls_of(dataclasses.replace(batch, points=[0, 1]), expert, 1) == {HIGH: 4}


def test_a_rank_fills_up_part_by_part():
    """It has 3 and 2 calls to make, another rank 5 and 3: each expert's are all made before the next one's."""
    batch = MicroBatch(torch.arange(3), [0, 1, 2, 3], frozenset([1]))
    assert together([batch], (5, 3)) == ["0a", "1a", "1a", "-1", "-1", "2a", "3a", "-3"]
    assert together([batch], (0, 0)) == ["0a", "1a", "1a", "2a", "3a"]


def test_walks_meet_where_the_expert_changes():
    """A walk begins when its turn comes, and no walk calls the second expert before all are done with the first."""
    a = MicroBatch(torch.arange(2), [0, 1, 2, 3])
    b = MicroBatch(torch.arange(2, 3), [0, 2, 3], frozenset([2]))
    assert together([a, b], (4, 4)) == ["0a", "1a", "0b", "-1", "2a", "3a", "2b", "3b"]


def test_a_rank_without_samples_makes_all_calls_on_nothing():
    assert together([], (2, 1)) == ["-1", "-1", "-3"]


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 5), st.sets(st.integers(0, 3), min_size=1), st.sets(st.integers(0, 3))), max_size=4
    ),
    size=st.integers(1, 4),
    more=st.tuples(st.integers(0, 5), st.integers(0, 5)),
)
def test_every_rank_makes_as_many_calls_as_the_busiest(shapes, size, more):
    batches = [
        MicroBatch(torch.arange(rows), sorted(points), frozenset(stochastic & points))
        for rows, points, stochastic in shapes
    ]
    own = [sum(calls_of(batch, expert, size).get(part, 0) for batch in batches) for part in STAGES]
    most = tuple(mine + extra for mine, extra in zip(own, more, strict=True))
    made = together(batches, most, size)
    of_high = [call for call in made if expert(int(call.strip("-abcdef"))) is HIGH]
    assert (len(of_high), len(made) - len(of_high)) == most
    assert made[: len(of_high)] == of_high
    assert (made.count("-1"), made.count("-3")) == more


@pytest.mark.parametrize("algorithm", [FLASH_GRPO, DANCE_GRPO], ids=["flash", "dance"])
def test_a_draw_makes_the_calls_that_it_announces(model, monkeypatch, algorithm):
    """Whoever trusts the number of another rank's calls waits for ever where it is wrong."""
    process = make_process(model, algorithm, steps=4, micro_batch=3, exact=2)
    samples, announced, made, idle = samples_of(2, 2), [], [], []
    velocity, no_sample = model.velocity, model.idle

    class Watched(World):
        def max_over_ranks(self, calls: Tensor) -> Tensor:
            announced.append(calls.tolist())
            return calls + 2

    latents, record = draw_from(process, samples)
    monkeypatch.setattr(model, "velocity", lambda *inputs: made.append(1) or velocity(*inputs))
    monkeypatch.setattr(model, "idle", lambda point: idle.append(1) or no_sample(point))
    process.world = Watched(process.device)
    same, filled_up = draw_from(process, samples)
    assert announced == [[len(made)]]
    assert len(idle) == 2
    assert torch.equal(same, latents)
    assert torch.equal(filled_up.old, record.old)

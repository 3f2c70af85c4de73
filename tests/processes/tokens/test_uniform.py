"""The process of uniform tokens, beside what tests/processes/test_conformance.py asks of every process."""

from dataclasses import replace

import pytest
import torch

from flashgrpo.distributed.world import single_process
from flashgrpo.processes.settings import Chosen
from flashgrpo.processes.tokens import chunks
from flashgrpo.processes.tokens.uniform.process import UniformModel, UniformTokensProcess
from flashgrpo.processes.tokens.uniform.settings import (
    Metric,
    Mixture,
    TokensAtTimes,
    UniformRollout,
    UniformSampling,
    UniformTokens,
)
from flashgrpo.types import Prompt, PromptGroup
from tests.tokens import TokenPictures

GROUPS = [PromptGroup(0, number, Prompt("two red cells", {}), 2) for number in range(6)]
SAMPLES = [sample for group in GROUPS for sample in group.samples]
STEPS = 5


def process(micro_batch=4, model=None, score=None, **rollout) -> UniformTokensProcess:
    rollout = UniformRollout(num_steps=STEPS, micro_batch=micro_batch, **rollout)
    score, sampling = score or TokensAtTimes(), UniformSampling(num_steps=STEPS)
    world = single_process()
    return UniformTokensProcess(model or TokenPictures(), UniformTokens(), score, rollout, sampling, micro_batch, world)


def draw(one: UniformTokensProcess, **settings):
    return one.draw(SAMPLES, 3, lambda rows, tokens: None, **settings)


def test_the_pictures_are_a_model_of_uniform_tokens():
    assert isinstance(TokenPictures(), UniformModel)


def test_a_unit_is_a_sample_at_a_time_and_each_group_draws_where_they_start():
    outputs, record = draw(process())
    assert outputs.shape == (len(SAMPLES), 16)
    assert len(record) == 3 * len(SAMPLES)
    slots = record.slot.view(len(GROUPS), 2, 3)
    assert torch.equal(slots[:, 0], slots[:, 1])  # members of a group are trained at the same times
    assert torch.equal(slots - slots[..., :1], torch.arange(3).expand(len(GROUPS), 2, 3))
    assert slots[..., 0].unique().tolist() == [0, 1, 2]
    assert torch.equal(record.state.action, outputs[record.sample])
    assert record.old is None


def test_the_states_are_noised_samples_of_the_path():
    """At t = 0 nothing is left of a sample, and near the end of the grid almost everything."""
    _, record = draw(process(score=TokensAtTimes(times=STEPS, starts=1), path={"kind": "mixture"}))
    state = record.state
    clean = [float((state.x == state.action)[state.k == k].double().mean()) for k in range(STEPS)]
    expected = [k / STEPS + (1 - k / STEPS) / 8 for k in range(STEPS)]
    assert clean == pytest.approx(expected, abs=0.12)


def test_the_last_step_is_the_guess_and_the_ablations_record_the_sampler():
    score = TokensAtTimes(times=STEPS, starts=1, state="sampler", action="guess")
    outputs, record = draw(process(score=score))
    x, guess = (rows.view(len(SAMPLES), STEPS, -1) for rows in (record.state.x, record.state.action))
    assert torch.equal(guess[:, -1], outputs)
    moved = x[:, 1:] != x[:, :-1]
    assert bool(moved.any())
    _, clean = draw(process(score=replace(score, action="clean")))
    assert torch.equal(clean.state.x, record.state.x)
    assert torch.equal(clean.state.action, outputs[clean.sample])
    forward, others = draw(process(score=replace(score, state="forward")))
    assert torch.equal(forward, outputs)
    assert torch.equal(others.state.action, record.state.action)
    assert not torch.equal(others.state.x, record.state.x)


def test_by_derivatives_the_first_step_moves_nothing():
    score = TokensAtTimes(times=2, starts=1, state="sampler")
    for jumps, moves in (("derivative", False), ("difference", True)):
        _, record = draw(process(score=score, jumps=jumps))
        x = record.state.x.view(len(SAMPLES), 2, -1)
        assert bool((x[:, 0] != x[:, 1]).any()) is moves


def test_the_shift_and_the_path_are_the_checkpoints_unless_the_rollout_has_its_own():
    model = TokenPictures()
    model.shift, model.path = 3.0, Mixture()
    assert process(model=model).times[1] == pytest.approx(1 / 13)
    assert process(model=model).path.vocabulary == 8
    own = process(model=model, shift=1, path={"kind": "metric", "c": 2})
    assert (own.times[1], own.path.settings) == (0.2, Metric(c=2.0))


@pytest.mark.parametrize("columns", [(), ("kl",), ("kl", "kl_average")])
def test_chunks_change_scores_and_divergences_by_rounding_only(monkeypatch, columns):
    one = process()
    (outputs, record), found = draw(one), []
    for size in (chunks.AT_ONCE, 4 * 8 * 5):
        monkeypatch.setattr(chunks, "AT_ONCE", size)
        again, _ = draw(one)
        assert torch.equal(again, outputs)
        part = one.micro_batches(record[(record.slot == 1).nonzero().flatten()])[0]
        ((score, others),) = one.replay(part, columns)
        score.sum().backward()
        found.append([score.detach(), *others.values(), *(p.grad.clone() for p in one.network.parameters())])
        one.network.zero_grad()
    assert set(others) == set(columns)
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_the_doctor_is_told_of_an_inert_step_and_of_what_is_trained():
    for settings, level in (({"jumps": "derivative"}, "warning"), ({}, "sound")):
        one = process(**settings)
        outputs, record = draw(one)
        first, states, rounding = one.checks(record, outputs, 3, thorough=True)
        assert first.level == level
        assert 0 <= states.numbers["clean"] <= 1
        assert 0 <= rounding.numbers["floor"] < 1e-5


CHOSEN = Chosen(
    explore=UniformTokens(),
    score=TokensAtTimes(),
    columns=("kl", "kl_average"),
    coupled=False,
    anchored=False,
    uses=1,
    held_between=False,
    frozen=True,
    offload=False,
    compiled=False,
)


@pytest.mark.parametrize(
    ("given", "steps", "named"),
    [
        ({"anchored": True}, 10, r"algorithm\.credit\.baseline: uniform tokens have no anchor"),
        ({"coupled": True}, 10, r"algorithm\.objective: of uniform tokens .* take algorithm\.objective\.kind=clipped"),
        ({"columns": ("toward:1.0",)}, 10, r"algorithm\.objective: of uniform tokens"),
        ({"columns": ("kl_old",)}, 10, r"algorithm\.objective: of uniform tokens"),
        ({}, 4, r"3 trained steps from one of the first 3 on are more than rollout\.num_steps 4 holds"),
    ],
)
def test_what_cannot_work_is_refused(given, steps, named):
    UniformRollout().check(CHOSEN)
    with pytest.raises(ValueError, match=named):
        UniformRollout(num_steps=steps).check(replace(CHOSEN, **given))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TokensAtTimes(times=0), "times of TokensAtTimes must be from 1"),
        (lambda: TokensAtTimes(starts=0), "starts of TokensAtTimes must be from 1"),
        (lambda: Metric(alpha=0.0), "alpha of Metric must be from"),
        (lambda: Metric(c=-1.0), "c of Metric must be from"),
        (lambda: UniformRollout(num_steps=1), "num_steps"),
        (lambda: UniformRollout(shift=0), "shift"),
        (lambda: UniformRollout(jumps="both"), "jumps"),
    ],
)
def test_numbers_out_of_bounds_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()

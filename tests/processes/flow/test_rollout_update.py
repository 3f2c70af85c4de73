"""Rollout, replay and update on the bundled model: exactness, and what the micro-batch may not change."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from flashgrpo.learning.objective import AnyObjective, Clipped
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.models.lora import trained_parameters
from flashgrpo.presets import DANCE_GRPO, FLASH_GRPO, FLOW_GRPO, FLOW_GRPO_FAST, MIX_GRPO, PRESETS
from flashgrpo.process import Record
from flashgrpo.processes.flow.choices import FLOW, Recorded, Stochastic
from flashgrpo.processes.flow.noise import Ode
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.steps import AllSteps
from flashgrpo.processes.flow.weighting import NoiseLevel, NormalizedRatio, StepLength
from tests.processes.flow.drawing import PROMPTS, WORLD, draw, perturb

GUARD = dataclasses.replace(FLOW_GRPO, score=Recorded(StepLength(), NormalizedRatio()))


def judged(record: Record, advantages: Tensor) -> Record:
    """The record of samples with these advantages."""
    return dataclasses.replace(record, advantage=advantages[record.sample])


def replaying(process: FlowProcess, size: int) -> FlowProcess:
    """The same process, which replays `size` units at once."""
    other = copy.copy(process)
    other.micro_batch, other.source = size, copy.copy(process.source)
    other.source.micro_batch = size
    return other


def micro_batches(process: FlowProcess, record: Record) -> list[Record]:
    """What a process alone replays at a time."""
    slots = [record[(record.slot == slot).nonzero().flatten()] for slot in record.slot.unique()]
    return [part for units in slots for part in process.micro_batches(units)]


@pytest.mark.parametrize("algorithm", [FLASH_GRPO, FLOW_GRPO, FLOW_GRPO_FAST, DANCE_GRPO])
@pytest.mark.parametrize(("micro_batch", "exact"), [(64, 2), (64, 8), (3, 2), (1, 1), (5, 3)])
def test_the_first_ratio_is_one_bit_for_bit(model, algorithm, micro_batch, exact):
    perturb(model)
    process, _, record = draw(model, algorithm, steps=4, micro_batch=micro_batch, exact=exact)
    assert torch.equal(record.old, record.state.log_prob)
    parts = micro_batches(process, record)
    assert sum(map(len, parts)) == len(record)
    for part in parts:
        assert len(part) <= exact
        [(score, _)] = process.replay(part, ())
        assert score.requires_grad
        assert torch.equal(score.detach(), part.old)


def test_each_sample_has_one_transition_at_its_groups_step(model):
    _, _, record = draw(model, FLASH_GRPO, steps=10, groups=4, size=3)
    assert record.sample.tolist() == record.unit.tolist() == list(range(12))
    assert record.key.tolist() == [group for group in range(4) for _ in range(3)]
    k = record.slot.unflatten(0, (4, 3))
    assert (k == k[:, :1]).all()
    expected = FLASH_GRPO.explore.steps.mask(0, 0, torch.arange(4), 10).nonzero()[:, 1]
    assert k[:, 0].tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1


def test_the_recorded_step_leads_to_the_final_latents(model):
    """Walking on deterministically from x_{k+1} must give the rollout's own latents."""
    process, latents, record = draw(model, FLASH_GRPO, steps=6, groups=2)
    ode, state = Ode()(process.grid.sigmas), record.state
    for row in range(len(record)):
        x, condition = state.x_next[row : row + 1], state.condition[torch.tensor([row])]
        for k in range(int(record.slot[row]) + 1, process.grid.num_steps):
            x = ode.mean(k, x, process.source.exact.velocity(k, x, condition).detach())
        torch.testing.assert_close(x[0], latents[row], rtol=1e-3, atol=1e-4)


def test_videos_do_not_depend_on_the_rollout_micro_batch(model):
    _, whole, _ = draw(model, FLASH_GRPO, micro_batch=64)
    _, cut, _ = draw(model, FLASH_GRPO, micro_batch=4)
    torch.testing.assert_close(whole, cut, rtol=1e-3, atol=1e-4)


def test_members_share_initial_noise_only_when_asked(model):
    _, _, shared = draw(model, MIX_GRPO, size=2)
    x = shared.state.x[shared.slot == 0].unflatten(0, (3, 2))
    assert torch.equal(x[:, 0], x[:, 1])
    _, _, independent = draw(model, FLOW_GRPO, size=2)
    x = independent.state.x[independent.slot == 0].unflatten(0, (3, 2))
    assert not torch.isclose(x[:, 0], x[:, 1]).any(dim=-1).all()


def updated(process: FlowProcess, record: Record, objective: AnyObjective | None = None, **settings) -> dict:
    """The metrics of one update."""
    config = OptimConfig(**settings)
    optimizer = Optimizer(trained_parameters(process.network), config, WORLD)
    return policy_update(process, objective or Clipped(), optimizer, record, config, WORLD)


def gradient(process: FlowProcess, record: Record, micro_batch: int) -> dict[str, Tensor]:
    """The gradient of one optimizer step, read before the optimizer clears it."""
    config = OptimConfig(max_grad_norm=1e9)
    optimizer = Optimizer(trained_parameters(process.network), config, WORLD)
    seen: dict[str, Tensor] = {}

    def read() -> float:
        seen.update(zip(optimizer.parameters, optimizer.take(), strict=True))
        return 0.0

    optimizer.step = read
    policy_update(replaying(process, micro_batch), Clipped(), optimizer, record, config, WORLD)
    return seen


@pytest.mark.parametrize("algorithm", [FLASH_GRPO, FLOW_GRPO])
def test_the_gradient_does_not_depend_on_the_micro_batch(model, algorithm):
    perturb(model)
    process, _, record = draw(model, algorithm, steps=4)
    record = judged(record, torch.linspace(-1, 1, 6))
    whole = gradient(process, record, 6)
    for size in (1, 4, 5):
        cut = gradient(process, record, size)
        for name, expected in whole.items():
            torch.testing.assert_close(cut[name], expected, rtol=2e-3, atol=1e-3 * float(expected.abs().max()) + 1e-12)


def test_the_gradient_is_that_of_the_policy_gradient(model):
    """At ratio 1 the gradient is -mean(w A grad log_prob), computed here sample by sample without the loss."""
    perturb(model)
    process, _, record = draw(model, FLASH_GRPO, groups=2, size=2)
    advantages, state = torch.tensor([1.0, -2.0, 0.5, 0.25]), record.state
    candidates = FLASH_GRPO.explore.steps.candidates(6)
    weights = FLASH_GRPO.score.weighting.weights(process.source.table, candidates, record.slot)
    assert torch.equal(record.weight, weights)
    log_probs = []
    for row in range(4):
        one = state[torch.tensor([row])]
        v = process.source.exact.velocity(int(one.k), one.x, one.conditions)
        log_probs.append(process.source.table.log_prob(one.k, one.x_next, one.x, v)[0])
    objective = -(weights * advantages * torch.stack(log_probs)).mean()
    parameters = trained_parameters(model.network)
    expected = dict(zip(parameters, torch.autograd.grad(objective, list(parameters.values())), strict=True))
    for name, value in gradient(process, judged(record, advantages), 2).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=1e-3 * float(expected[name].abs().max()))


def test_gradient_norms_by_step_are_those_of_the_step_alone(model):
    perturb(model)
    process, _, record = draw(model, FLOW_GRPO, groups=1, size=2, steps=3)
    record = judged(record, torch.tensor([1.0, -1.0]))
    metrics = updated(process, record, max_grad_norm=1e9, lr=1e-12)
    for k in (0, 1):
        alone = gradient(process, record[(record.slot == k).nonzero().flatten()], 2)
        norm = torch.stack([g.square().sum() for g in alone.values()]).sum().sqrt()
        assert metrics["grad_norm_by_step"][str(k)] == pytest.approx(float(norm), rel=1e-3)


def test_an_update_makes_rewarded_samples_likelier(model):
    process, _, record = draw(model, FLASH_GRPO, groups=2, size=4, exact=4)
    record = judged(record, torch.tensor([1.0, -1.0] * 4))
    metrics = updated(process, record, lr=1e-3)
    assert (metrics["drift"], metrics["ratio_max_dev"], metrics["clip_fraction"]) == (0, 0, 0)
    parts = micro_batches(process, record)
    change = [(process.replay(part, ())[0][0].detach() - part.old) * part.advantage for part in parts]
    assert float(torch.cat(change).mean()) > 0


@pytest.mark.parametrize("settings", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_optimizer_steps_and_average_per_update(model, settings):
    minibatches, passes = settings
    process, _, record = draw(model, FLASH_GRPO, groups=2, size=4, uses=minibatches * passes)
    record = judged(record, torch.linspace(-1, 1, 8))
    config = OptimConfig(minibatches=minibatches, passes=passes, ema={"decay": 0.5, "every": 1})
    optimizer = Optimizer(trained_parameters(model.network), config, WORLD)
    averages = []
    step = optimizer.step

    def spy() -> float:
        norm = step()
        averages.append({name: value.clone() for name, value in optimizer.ema.items()})
        return norm

    optimizer.step = spy
    start = {name: value.clone() for name, value in optimizer.ema.items()}
    policy_update(process, Clipped(), optimizer, record, config, WORLD)
    assert optimizer.steps == len(averages) == minibatches * passes
    if len(averages) == 1:
        for name, weight in optimizer.weights().items():
            torch.testing.assert_close(averages[0][name], (start[name] + weight) / 2)


@pytest.mark.parametrize("train", ["{kind: lora, rank: 4}", "{kind: full}"])
def test_kl_to_the_base_is_zero_at_the_start_and_positive_later(make_model, train):
    model = make_model("algorithm.kl_coef=0.1", f"model.train={train}")
    process, _, record = draw(model, FLASH_GRPO, groups=2, size=2)
    record = judged(record, torch.tensor([1.0, -1.0, 1.0, -1.0]))
    objective, config = Clipped(kl_coef=0.1), OptimConfig(lr=1e-3)
    names = set(trained_parameters(model.network))
    optimizer = Optimizer(trained_parameters(model.network), config, WORLD)
    first = policy_update(process, objective, optimizer, record, config, WORLD)
    second = policy_update(process, objective, optimizer, record, config, WORLD)
    assert first["kl"] == 0
    assert second["kl"] > 0
    assert set(trained_parameters(model.network)) == names  # switching adapters off and on froze nothing


def test_the_saved_lora_gives_the_pipeline_the_tuned_velocity(make_model, tmp_path):
    model = make_model("model.train.rank=4", "model.train.alpha=8")
    perturb(model)
    model.save_lora(tmp_path / "lora", {n: p.detach() for n, p in trained_parameters(model.network).items()})
    pipeline = WanPipeline.from_pretrained(Path(model.pipeline.config._name_or_path), dtype=torch.float32)
    x = torch.randn(1, *model.latent_shape)
    text = model.encode(PROMPTS[:1]).tensors["text"]
    with torch.no_grad():
        base = pipeline.transformer(x, torch.tensor([500.0]), text, return_dict=False)[0]
        pipeline.load_lora_weights(tmp_path / "lora")
        loaded = pipeline.transformer(x, torch.tensor([500.0]), text, return_dict=False)[0]
        tuned = model.network(x, torch.tensor([500.0]), text, return_dict=False)[0]
    assert not torch.allclose(loaded, base, atol=1e-3)
    torch.testing.assert_close(loaded, tuned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].explore.process == FLOW])
def test_every_preset_draws_and_updates_without_drift(model, name):
    algorithm = PRESETS[name]
    process, _, record = draw(model, algorithm, groups=2, size=2, steps=8)
    record = judged(record, torch.tensor([1.0, -1.0, 0.5, -0.5]))
    metrics = updated(process, record, algorithm.objective, lr=1e-4)
    assert (metrics["drift"], metrics.get("clip_fraction", 0)) == (0, 0)
    assert metrics["grad_norm"] > 0
    candidates = algorithm.explore.steps.candidates(8) if isinstance(algorithm.explore, Stochastic) else [0]
    assert {int(step) for step in metrics["transitions_by_step"]} <= set(candidates)


@pytest.mark.parametrize("settings", [{}, {"passes": 2}, {"minibatches": 2}])
def test_the_normalized_ratio_starts_at_one_and_moves(model, settings):
    perturb(model)
    process, _, record = draw(model, GUARD, groups=2, size=2, steps=4, uses=len(settings) + 1)
    record = judged(record, torch.tensor([1.0, -1.0, 0.5, -0.5]))
    metrics = updated(process, record, lr=1e-3, **settings)
    assert metrics["drift"] == 0
    assert (metrics["ratio_max_dev"] > 0) == bool(settings)


@pytest.mark.parametrize("score", [Recorded(ratio=NormalizedRatio()), Recorded(NoiseLevel())], ids=["ratio", "weight"])
def test_the_options_do_not_depend_on_the_micro_batch(model, score):
    perturb(model)
    process, _, record = draw(model, dataclasses.replace(FLOW_GRPO, score=score), groups=2, size=3, steps=4)
    record = judged(record, torch.linspace(-1, 1, 6))
    whole = gradient(process, record, 6)
    for size in (1, 4):
        cut = gradient(process, record, size)
        for name, expected in whole.items():
            torch.testing.assert_close(cut[name], expected, rtol=2e-3, atol=1e-3 * float(expected.abs().max()) + 1e-12)


def test_the_normalized_ratio_is_of_the_policy_that_drew(model):
    """At every optimizer step `old_v` is the velocity of the rollout, though the weights have moved since."""
    perturb(model)
    process, _, record = draw(model, GUARD, groups=2, size=2, steps=4, uses=4)
    state, v = record.state, torch.empty_like(record.state.x)
    with torch.no_grad():
        for k in state.k.unique().tolist():
            for units in (state.k == k).nonzero().flatten().split(process.micro_batch):
                v[units] = process.source.exact.velocity(k, state.x[units], state[units].conditions)
    seen: list[int] = []
    replay = process.replay

    def spied(part: Record, columns):
        now = part.state
        units = [
            int(((state.log_prob == value) & (state.k == k)).nonzero())
            for value, k in zip(now.log_prob, now.k, strict=True)
        ]
        assert torch.equal(now.old_v, v[units])
        seen.extend(units)
        return replay(part, columns)

    process.replay = spied
    record = judged(record, torch.tensor([1.0, -1.0, 0.5, -0.5]))
    updated(process, record, lr=1e-2, passes=2, minibatches=2)
    assert sorted(seen) == sorted(2 * list(range(len(record))))


def test_no_velocity_is_computed_twice_for_a_ratio(model, monkeypatch):
    """Nor kept where the ratio does not need it, or where the weights that replay are those that drew."""
    process, _, record = draw(model, FLASH_GRPO, groups=2, size=2, uses=2)
    assert record.state.old_v is None
    assert draw(model, GUARD, groups=1, steps=3, uses=1)[2].state.old_v is None
    calls, velocity = [], model.velocity
    monkeypatch.setattr(model, "velocity", lambda *inputs: calls.append(1) or velocity(*inputs))
    parts = micro_batches(process, record)
    updated(process, judged(record, torch.tensor([1.0, -1.0, 0.5, -0.5])), passes=2)
    assert len(calls) == 2 * len(parts)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_kernel_that_differs_where_gradients_are_asked_for_moves_no_ratio(
    make_model, monkeypatch, retain, checkpointing
):
    """As cuDNN's attention does: with planted rounding the trained step of the rollout still is that of the replay."""
    usual, kinds = torch.nn.functional.scaled_dot_product_attention, set()

    def attention(query, key, value, *arguments, **options):
        kinds.add(torch.is_grad_enabled())
        out = usual(query, key, value, *arguments, **options)
        return out if torch.is_grad_enabled() else out * (1 + 1e-3)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    model = make_model()
    perturb(model)
    if checkpointing:
        model.network.enable_gradient_checkpointing()
    process, _, record = draw(model, FLASH_GRPO, groups=2, steps=4, retain=retain, uses=1)
    assert kinds == {True, False}
    assert bool(record.state.kept) == retain
    for part in process.micro_batches(record):
        score, _ = process.replay(part, ())[0]
        assert torch.equal(score, part.old)
    assert not record.state.x_next.requires_grad
    assert not record.old.requires_grad


def test_steps_that_were_drawn_weigh_as_they_were_drawn(model):
    """The factor of a part of all steps, times the weighting's; in the update that they belong to."""
    steps = AllSteps(0.5, "independent", "early")
    for update in (0, 4):
        explore = dataclasses.replace(FLOW_GRPO.explore, steps=steps)
        algorithm = dataclasses.replace(FLOW_GRPO, explore=explore, score=Recorded(NoiseLevel()))
        process, _, record = draw(model, algorithm, groups=1, size=2, steps=7, update=update)
        factors = steps.factors(0, update, 7)
        plain = NoiseLevel().weights(process.source.table, steps.candidates(7), record.slot)
        assert sorted(set(record.slot.tolist())) == sorted(factors)
        expected = plain * torch.tensor([factors[k] for k in record.slot.tolist()])
        torch.testing.assert_close(record.weight, expected)

"""Rollout, replay and update on the bundled model: exactness, and what the micro-batch may not change."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from flashgrpo.processes.flow.policy import Policy
from torch import Tensor

from flashgrpo.distributed.world import single_process
from flashgrpo.learning import update
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import UpdateMetrics, micro_batches, policy_update, replay
from flashgrpo.models.lora import trained_parameters
from flashgrpo.presets import DANCE_GRPO, FLASH_GRPO, FLOW_GRPO, FLOW_GRPO_FAST, MIX_GRPO, PRESETS, Algorithm
from flashgrpo.processes.flow.noise import Ode
from flashgrpo.processes.flow.rollout import rollout
from flashgrpo.processes.flow.shortcuts import Environment
from flashgrpo.processes.flow.weighting import NoiseLevel, NormalizedRatio, StepLength
from flashgrpo.types import Prompt, PromptGroup, Sample

WORLD = single_process()
TEXTS = [
    "a red circle moving left slowly",
    "a blue square moving up quickly",
    "a green triangle moving down slowly",
    "a yellow circle moving right quickly",
]
PROMPTS = [Prompt(text, {}) for text in TEXTS]


def draw(model, algorithm: Algorithm, steps=6, groups=3, size=2, micro_batch=64, exact=2, seed=0, update=0):
    grid = model.grid(steps)
    policy = Policy(model, grid, algorithm.noise(grid.sigmas), torch.full((steps,), 2.0), micro_batch=exact)
    prompt_groups = [PromptGroup(update, g, PROMPTS[g], size) for g in range(groups)]
    samples = [Sample(group, member) for group in prompt_groups for member in range(size)]
    condition = model.encode(PROMPTS[:groups])[torch.arange(groups).repeat_interleave(size)]
    environment = Environment(model, grid, policy.guidance)
    latents, transitions = rollout(policy, environment, samples, condition, algorithm, seed, micro_batch, WORLD)
    return policy, latents, transitions


def batches(transitions, size: int) -> list[Tensor]:
    """The micro-batches of a process alone."""
    cut = micro_batches(transitions.k, torch.zeros_like(transitions.k), 0, size)
    return [rows for _, parts, _ in cut for rows in parts]


def perturb(model) -> None:
    """Move the adapters off their start, where the B matrices are zero and half of the gradient vanishes."""
    noise = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(model.network).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)


@pytest.mark.parametrize("algorithm", [FLASH_GRPO, FLOW_GRPO, FLOW_GRPO_FAST, DANCE_GRPO])
@pytest.mark.parametrize(("micro_batch", "exact"), [(64, 2), (64, 8), (3, 2), (1, 1), (5, 3)])
def test_the_first_ratio_is_one_bit_for_bit(make_model, algorithm, micro_batch, exact):
    model = make_model()
    perturb(model)
    policy, _, transitions = draw(model, algorithm, micro_batch=micro_batch, exact=exact)
    condition = transitions.condition
    replayed = torch.empty(len(transitions))
    for rows in batches(transitions, exact):
        batch = transitions[rows]
        v = policy.exact_velocity(batch.k, batch.x, condition[batch.sample])
        assert v.requires_grad
        replayed[rows] = policy.table.log_prob(batch.k, batch.x_next, batch.x, v).detach()
    assert torch.equal(replayed, transitions.log_prob)


def test_each_sample_has_one_transition_at_its_groups_step(make_model):
    model = make_model()
    _, _, transitions = draw(model, FLASH_GRPO, steps=10, groups=4, size=3)
    assert transitions.sample.tolist() == list(range(12))
    k = transitions.k.unflatten(0, (4, 3))
    assert (k == k[:, :1]).all()
    expected = FLASH_GRPO.steps.mask(0, 0, torch.arange(4), 10).nonzero()[:, 1]
    assert k[:, 0].tolist() == expected.tolist()
    assert len(set(expected.tolist())) > 1


def test_the_recorded_step_leads_to_the_final_latents(make_model):
    """Walking on deterministically from x_{k+1} must give the rollout's own latents."""
    model = make_model()
    policy, latents, transitions = draw(model, FLASH_GRPO, steps=6, groups=2)
    ode = Ode()(policy.grid.sigmas)
    for row in range(len(transitions)):
        x, condition = transitions.x_next[row : row + 1], transitions.condition[torch.tensor([row])]
        for k in range(int(transitions.k[row]) + 1, policy.grid.num_steps):
            x = ode.mean(k, x, policy.velocity(torch.tensor([k]), x, condition).detach())
        torch.testing.assert_close(x[0], latents[row], rtol=1e-3, atol=1e-4)


def test_videos_do_not_depend_on_the_rollout_micro_batch(make_model):
    model = make_model()
    _, whole, _ = draw(model, FLASH_GRPO, micro_batch=64)
    _, cut, _ = draw(model, FLASH_GRPO, micro_batch=4)
    torch.testing.assert_close(whole, cut, rtol=1e-3, atol=1e-4)


def test_members_share_initial_noise_only_when_asked(make_model):
    model = make_model()
    _, _, independent = draw(model, MIX_GRPO, size=2)
    first = independent.k == 0
    x = independent.x[first].unflatten(0, (3, 2))
    assert torch.equal(x[:, 0], x[:, 1])
    _, _, independent = draw(model, FLOW_GRPO, size=2)
    x = independent.x[independent.k == 0].unflatten(0, (3, 2))
    assert not torch.isclose(x[:, 0], x[:, 1]).any(dim=-1).all()


def gradient(model, policy, transitions, advantages, algorithm, micro_batch: int) -> dict[str, Tensor]:
    """The gradient of one optimizer step, read before the optimizer clears it."""
    config = OptimConfig(micro_batch=micro_batch, max_grad_norm=1e9)
    optimizer = Optimizer(trained_parameters(model.network), config, WORLD)
    seen: dict[str, Tensor] = {}

    def read() -> float:
        seen.update(zip(optimizer.parameters, optimizer._gradients, strict=True))
        return 0.0

    optimizer.step = read
    policy_update(policy, optimizer, transitions, advantages, algorithm, config, WORLD)
    return seen


@pytest.mark.parametrize("algorithm", [FLASH_GRPO, FLOW_GRPO])
def test_the_gradient_does_not_depend_on_the_micro_batch(make_model, algorithm):
    model = make_model()
    perturb(model)
    policy, _, transitions = draw(model, algorithm, groups=3, size=4)
    advantages = torch.linspace(-1, 1, 12)
    whole = gradient(model, policy, transitions, advantages, algorithm, 12)
    for size in (1, 4, 5):
        cut = gradient(model, policy, transitions, advantages, algorithm, size)
        for name, expected in whole.items():
            torch.testing.assert_close(cut[name], expected, rtol=2e-3, atol=1e-3 * float(expected.abs().max()) + 1e-12)


def test_the_gradient_is_that_of_the_policy_gradient(make_model):
    """At ratio 1 the gradient is -mean(w A grad log_prob), computed here sample by sample without the loss."""
    model = make_model()
    perturb(model)
    policy, _, transitions = draw(model, FLASH_GRPO, groups=2, size=2)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.25])
    weights = FLASH_GRPO.weighting.weights(policy.table, FLASH_GRPO.steps.candidates(6), transitions.k)
    log_probs = []
    for row in range(4):
        batch = transitions[torch.tensor([row])]
        v = policy.velocity(batch.k, batch.x, batch.condition[batch.sample])
        log_probs.append(policy.table.log_prob(batch.k, batch.x_next, batch.x, v)[0])
    objective = -(weights * advantages * torch.stack(log_probs)).mean()
    parameters = trained_parameters(model.network)
    expected = dict(zip(parameters, torch.autograd.grad(objective, list(parameters.values())), strict=True))
    for name, value in gradient(model, policy, transitions, advantages, FLASH_GRPO, 2).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=1e-3 * float(expected[name].abs().max()))


def test_gradient_norms_by_step_are_those_of_the_step_alone(make_model):
    model = make_model()
    perturb(model)
    policy, _, transitions = draw(model, FLOW_GRPO, groups=1, size=2, steps=3)
    advantages = torch.tensor([1.0, -1.0])
    config = OptimConfig(micro_batch=2, max_grad_norm=1e9, lr=1e-12)
    metrics = policy_update(
        policy,
        Optimizer(trained_parameters(model.network), config, WORLD),
        transitions,
        advantages,
        FLOW_GRPO,
        config,
        WORLD,
    )
    for k in (0, 1):
        alone = gradient(model, policy, transitions[(transitions.k == k).nonzero().flatten()], advantages, FLOW_GRPO, 2)
        norm = torch.stack([g.square().sum() for g in alone.values()]).sum().sqrt()
        assert metrics["grad_norm_by_step"][str(k)] == pytest.approx(float(norm), rel=1e-3)


def test_an_update_makes_rewarded_samples_likelier(make_model):
    model = make_model()
    policy, _, transitions = draw(model, FLASH_GRPO, groups=2, size=4)
    advantages = torch.tensor([1.0, -1.0] * 4)
    config = OptimConfig(micro_batch=4, lr=1e-3)
    optimizer = Optimizer(trained_parameters(model.network), config, WORLD)
    metrics = policy_update(policy, optimizer, transitions, advantages, FLASH_GRPO, config, WORLD)
    assert (metrics["drift"], metrics["ratio_max_dev"], metrics["clip_fraction"]) == (0, 0, 0)
    collected = UpdateMetrics(FLASH_GRPO)
    change = []
    for rows in batches(transitions, 4):
        batch = transitions[rows]
        replay(policy, batch, advantages[batch.sample], torch.ones(len(rows)), FLASH_GRPO, collected)
        change.append((collected._rows["log_prob"][-1] - batch.log_prob) * advantages[batch.sample])
    assert float(torch.cat(change).mean()) > 0


@pytest.mark.parametrize("settings", [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_optimizer_steps_and_average_per_update(make_model, settings):
    minibatches, passes = settings
    model = make_model()
    policy, _, transitions = draw(model, FLASH_GRPO, groups=2, size=4)
    config = OptimConfig(micro_batch=2, minibatches=minibatches, passes=passes, ema={"decay": 0.5, "every": 1})
    optimizer = Optimizer(trained_parameters(model.network), config, WORLD)
    averages = []
    step = optimizer.step

    def spy() -> float:
        norm = step()
        averages.append({name: value.clone() for name, value in optimizer.ema.items()})
        return norm

    optimizer.step = spy
    start = {name: value.clone() for name, value in optimizer.ema.items()}
    policy_update(policy, optimizer, transitions, torch.linspace(-1, 1, 8), FLASH_GRPO, config, WORLD)
    assert optimizer.steps == len(averages) == minibatches * passes
    if len(averages) == 1:
        for name, weight in optimizer.weights().items():
            torch.testing.assert_close(averages[0][name], (start[name] + weight) / 2)


@pytest.mark.parametrize("train", ["{kind: lora, rank: 4}", "{kind: full}"])
def test_kl_to_the_base_is_zero_at_the_start_and_positive_later(make_model, train):
    model = make_model("algorithm.kl_coef=0.1", f"model.train={train}")
    algorithm = dataclasses.replace(FLASH_GRPO, kl_coef=0.1)
    policy, _, transitions = draw(model, algorithm, groups=2, size=2)
    config = OptimConfig(micro_batch=2, lr=1e-3)
    names = set(trained_parameters(model.network))
    optimizer = Optimizer(trained_parameters(model.network), config, WORLD)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    first = policy_update(policy, optimizer, transitions, advantages, algorithm, config, WORLD)
    second = policy_update(policy, optimizer, transitions, advantages, algorithm, config, WORLD)
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


GUARD = dataclasses.replace(FLOW_GRPO, weighting=StepLength(), ratio=NormalizedRatio())


def updated(model, algorithm: Algorithm, drawn, advantages: Tensor, **settings) -> dict:
    policy, _, transitions = drawn
    config = OptimConfig(micro_batch=2, **settings)
    optimizer = Optimizer(trained_parameters(model.network), config, WORLD)
    return policy_update(policy, optimizer, transitions, advantages, algorithm, config, WORLD)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_draws_and_updates_without_drift(make_model, name):
    model = make_model()
    drawn = draw(model, PRESETS[name], groups=2, size=2)
    metrics = updated(model, PRESETS[name], drawn, torch.tensor([1.0, -1.0, 0.5, -0.5]), lr=1e-4)
    assert (metrics["drift"], metrics["clip_fraction"]) == (0, 0)
    assert metrics["grad_norm"] > 0
    candidates = PRESETS[name].steps.candidates(6)
    assert {int(step) for step in metrics["transitions_by_step"]} <= set(candidates)


@pytest.mark.parametrize("settings", [{}, {"passes": 2}, {"minibatches": 2}])
def test_the_normalized_ratio_starts_at_one_and_moves(make_model, settings):
    model = make_model()
    perturb(model)
    drawn = draw(model, GUARD, groups=2, size=2, steps=4)
    metrics = updated(model, GUARD, drawn, torch.tensor([1.0, -1.0, 0.5, -0.5]), lr=1e-3, **settings)
    assert metrics["drift"] == 0
    assert (metrics["ratio_max_dev"] > 0) == bool(settings)


@pytest.mark.parametrize("change", [{"ratio": NormalizedRatio()}, {"weighting": NoiseLevel()}])
def test_the_options_do_not_depend_on_the_micro_batch(make_model, change):
    model = make_model()
    perturb(model)
    algorithm = dataclasses.replace(FLOW_GRPO, **change)
    policy, _, transitions = draw(model, algorithm, groups=2, size=3, steps=4)
    advantages = torch.linspace(-1, 1, 6)
    whole = gradient(model, policy, transitions, advantages, algorithm, 6)
    for size in (1, 4):
        cut = gradient(model, policy, transitions, advantages, algorithm, size)
        for name, expected in whole.items():
            torch.testing.assert_close(cut[name], expected, rtol=2e-3, atol=1e-3 * float(expected.abs().max()) + 1e-12)


def test_the_normalized_ratio_is_of_the_policy_that_drew(make_model, monkeypatch):
    """At every optimizer step `old_v` is the velocity of the rollout, though the weights have moved since."""
    model = make_model()
    perturb(model)
    policy, _, transitions = drawn = draw(model, GUARD, groups=2, size=2, steps=4)
    with torch.no_grad():
        v = policy.exact_velocity(transitions.k, transitions.x, transitions.condition[transitions.sample])
    seen = []

    def spied(policy, batch, advantage, weight, algorithm, metrics, old_v, v_kept):
        rows = [
            int(((transitions.log_prob == value) & (transitions.k == k)).nonzero())
            for value, k in zip(batch.log_prob, batch.k, strict=True)
        ]
        assert torch.equal(old_v, v[rows])
        seen.extend(rows)
        return replay(policy, batch, advantage, weight, algorithm, metrics, old_v, v_kept)

    monkeypatch.setattr(update, "replay", spied)
    updated(model, GUARD, drawn, torch.tensor([1.0, -1.0, 0.5, -0.5]), lr=1e-2, passes=2, minibatches=2)
    assert sorted(seen) == sorted(2 * list(range(len(transitions))))


def test_the_plain_ratio_computes_no_velocity_twice(make_model, monkeypatch):
    model = make_model()
    drawn = draw(model, FLASH_GRPO, groups=2, size=2)
    monkeypatch.delattr(update, "drawn_velocities")
    updated(model, FLASH_GRPO, drawn, torch.tensor([1.0, -1.0, 0.5, -0.5]), passes=2)

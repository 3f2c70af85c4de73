"""The diagnostics against what can be computed by hand, and on the bundled model: nothing is moved, all repeats."""

import json
import xml.etree.ElementTree
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from flashgrpo.assembly import Assembly
from flashgrpo.diagnostics.gradients import (
    Kept,
    consistency_of,
    gradient_by_step,
    gradient_consistency,
    gram,
    groups_at_every_step,
    score_norm,
)
from flashgrpo.diagnostics.measure import (
    Effort,
    diagnose,
    figures,
    reward_variance,
    split_variance,
    variance_parts,
)
from flashgrpo.distributed.world import World, single_process
from flashgrpo.errors import UserError
from flashgrpo.learning.update import policy_update
from flashgrpo.presets import FLASH_GRPO, FLOW_GRPO, Algorithm
from flashgrpo.process import Record
from flashgrpo.processes.flow.noise import LinearSde
from flashgrpo.processes.flow.state import FlowState
from flashgrpo.processes.flow.steps import OneStep
from flashgrpo.processes.flow.weighting import Rectified, Uniform
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from flashgrpo.types import Condition

SMALL = Effort(prompts=3, members=2, updates=3)


@pytest.fixture
def make_parts(make_run):
    """The parts of the very small run with overrides; their rewards' threads end with the test."""
    made = []

    def make(*overrides: str) -> Assembly:
        made.append(Assembly(make_run(*overrides), single_process()))
        return made[-1]

    yield make
    for parts in made:
        parts.rewards.close()


def with_explore(algorithm: Algorithm, **settings) -> Algorithm:
    """The same algorithm that explores otherwise."""
    return replace(algorithm, explore=replace(algorithm.explore, **settings))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- variance


def test_plain_parts_add_up_to_the_variance():
    assert [part.tolist() for part in variance_parts(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]).double(), False)] == [
        [1.0],
        [4.0],
    ]
    for shape in [(5, 4, 3), (1, 7, 2), (3, 1, 6), (2, 5, 1)]:
        rewards = 3 + randn(*shape) * torch.linspace(0.1, 2, shape[1]).double()[:, None]
        within, between = variance_parts(rewards, unbiased=False)
        whole = rewards.flatten(1).var(dim=1, correction=0)
        assert (within + between - whole).abs().max() < 1e-12


def test_unbiased_parts_are_right_on_average():
    within, between = variance_parts(torch.tensor([[[1.0, 3.0], [5.0, 7.0]]]).double())
    assert (within.item(), between.item()) == (2.0, 3.5)
    means, stds = torch.tensor([0.0, 0.3, 1.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()
    truth = {"within": stds.square().mean(), "between": means.var(correction=0)}
    for members in (2, 5):
        rewards = means[:, None] + stds[:, None] * randn(40_000, 3, members)
        estimates = dict(zip(truth, variance_parts(rewards), strict=True))
        plain = dict(zip(truth, variance_parts(rewards, unbiased=False), strict=True))
        for name, values in estimates.items():
            error = values.std() / len(values) ** 0.5
            assert abs(values.mean() - truth[name]) < 4 * error
            assert abs(plain[name].mean() - truth[name]) > 10 * error


def test_a_split_sees_its_steps_only():
    rewards = randn(6, 4, 3)
    rewards[:, 3] += 100
    split = split_variance(rewards, [0, 1, 2])
    within, between = variance_parts(rewards[:, :3])
    assert split.within.value == pytest.approx(within.mean().item())
    assert split.total.value == pytest.approx((within + between).mean().item())
    assert split.share.value == pytest.approx((between.mean() / (within + between).mean()).item())
    assert split.by_prompt == torch.stack([within, between], 1).tolist()
    assert split_variance(rewards, [0, 3]).between.value > 1000
    assert split_variance(torch.ones(3, 2, 2).double(), [0, 1]).share.value == 0  # no spread at all


def test_rewards_reach_the_step_at_which_they_were_drawn(make_parts, monkeypatch):
    """Rewards that are 10 k + prompt: no variance within a step, and that of 0 10 20 between them."""
    real = Assembly.draw_and_score

    def of_the_step(parts, groups, clock, uses):
        drawn = real(parts, groups, clock, uses)
        k, prompt = drawn.record.state.k, drawn.record.state.sample // groups[0].size
        assert k.reshape(len(groups), -1).sort(dim=1).values.tolist() == [[0, 0, 1, 1, 2, 2]] * len(groups)
        return SimpleNamespace(record=drawn.record, rewards=SimpleNamespace(total=(10.0 * k + prompt).double()))

    monkeypatch.setattr(Assembly, "draw_and_score", of_the_step)
    variance = reward_variance(make_parts(), shared_noise=False, prompts=3, members=2)
    assert (variance.mean, variance.std) == ([1.0, 11.0, 21.0], [0.0, 0.0, 0.0])
    whole = variance.windows["whole grid"]
    assert (whole.within.value, whole.share.value) == (0.0, 1.0)
    assert whole.between.value == pytest.approx(200 / 3)
    assert variance.windows["first half"].between.value == pytest.approx(25.0)


# ---- the gradient by step


def test_the_score_is_lambda_where_the_velocity_is_the_parameter(make_parts, monkeypatch):
    """v = theta: the gradient of the mean log-density is lambda xi / D, by autograd as by hand."""
    parts = make_parts("rollout.num_steps=6", "algorithm.noise={kind: linear, eta: 1.0}")
    shape, process = parts.process.model.latent_shape, parts.process
    theta = nn.Parameter(0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(process.model, "velocity", lambda x, point, condition: theta.expand_as(x))
    kept = Kept({"theta": theta}, single_process())
    nothing = Condition({"text": torch.zeros(1, 1, 1)})
    for k in range(5):
        x, xi = torch.randn(1, *shape), torch.randn(1, *shape)
        step, v = torch.tensor([k]), theta.detach()[None]
        x_next = process.source.table.sample(step, x, v, xi)
        old, first = process.source.table.log_prob(step, x_next, x, v), torch.tensor([0])
        state = FlowState(first, step, x, x_next, old, nothing)
        unit = Record(step, first, first, first, first, torch.ones(1), old, state)
        by_hand = (xi.norm() / process.source.table.rectification[k] / xi.numel()).item()
        assert score_norm(process, kept, unit) == pytest.approx(by_hand, rel=1e-4)
    assert theta.grad is None
    monkeypatch.setattr(parts.optimizer, "parameters", {"theta": theta})
    by_step = gradient_by_step(parts, False, 3)
    dims = torch.tensor(shape).prod().item()
    for scale, rectification, score in zip(by_step.scale, by_step.rectification, by_step.score, strict=True):
        assert scale * rectification == pytest.approx(1)
        assert score.value == pytest.approx(scale / dims**0.5, rel=0.03)
    whole = by_step.windows["whole grid"]
    assert whole.score_exponent.value == pytest.approx(1, abs=0.03)
    assert whole.score.value == pytest.approx(whole.predicted, rel=0.05)
    assert whole.rectified_score.value < 0.03
    assert whole.rectified.value < whole.uniform.value


def test_rectification_is_a_factor_of_each_steps_gradient(make_parts):
    """One backward pass serves both weightings: an update with rectified weights has the same norms by step."""
    parts = make_parts("rollout.num_steps=6")
    by_step = gradient_by_step(parts, False, 3)
    own, record = groups_at_every_step(parts, False, 3)
    candidates = own.process.explore.steps.candidates(own.process.grid.num_steps)
    for weighting, ours in ((Uniform(), by_step.norm), (Rectified(), by_step.rectified)):
        kept = Kept(own.optimizer.parameters, own.world)
        weighted = replace(record, weight=weighting.weights(own.process.source.table, candidates, record.slot))
        metrics = policy_update(own.process, own.objective, kept, weighted, own.config.optim, own.world)
        theirs = list(metrics["grad_norm_by_step"].values())
        assert [one.value for one in ours] == pytest.approx(theirs, rel=1e-4)
    assert by_step.drift == 0
    assert [one["value"] * w for one, w in zip(asdict(by_step)["norm"], by_step.weight, strict=True)] == pytest.approx(
        [one.value for one in by_step.rectified]
    )


@pytest.mark.parametrize("noise", ["{kind: linear, eta: 1.0}", "{kind: cps, eta: 0.7}"])
def test_the_bundled_models_scores_rise_with_lambda(make_parts, noise):
    by_step = gradient_by_step(make_parts("rollout.num_steps=8", f"algorithm.noise={noise}"), False, 4)
    score, scale = (np.array(column) for column in ([one.value for one in by_step.score], by_step.scale))
    assert np.corrcoef(np.log(score), np.log(scale))[0, 1] > 0.9
    whole = by_step.windows["whole grid"]
    assert whole.rectified_score.value < 0.7 * whole.score.value


# ---- consistency


def test_equal_gradients_agree_and_orthogonal_ones_do_not():
    equal = consistency_of(gram([torch.tensor([1.0, 2.0])] * 4), samples=8)
    assert equal.cosine.value == pytest.approx(1)
    assert equal.noise_scale == pytest.approx(0, abs=1e-12)
    orthogonal = consistency_of(gram(list(torch.eye(4))), samples=8)
    assert orthogonal.cosine.value == 0
    assert orthogonal.squared_norm.value == 0
    assert orthogonal.noise_scale is None
    still = consistency_of(torch.zeros(3, 3).double(), samples=8)
    assert (still.cosine.value, still.noise_scale) == (0, None)
    products = torch.tensor([[25.0, 24.0, 24.0], [24.0, 25.0, 24.0], [24.0, 24.0, 25.0]]).double()
    example = consistency_of(products, samples=10)
    assert example.cosine.value == pytest.approx(24 / 25)
    assert example.noise_scale == pytest.approx(10 / 24)
    json.dumps([asdict(one) for one in (equal, orthogonal, still, example)], allow_nan=False)


def test_the_noise_scale_of_gaussian_gradients():
    """tr(Sigma) = 1 + 4 + ... and |G|^2 = 40 / 4, in samples whatever the batch; and as McCandlish et al. write it."""
    mean, std = torch.full((40,), 0.5).double(), torch.linspace(1, 3, 40).double()
    truth = (std.square().sum() / mean.square().sum()).item()
    for batch in (16, 256):
        gradients = mean + std * randn(300, 40, seed=batch) / batch**0.5
        found = consistency_of(gram(list(gradients.float())), batch)
        low, high = found.noise_scale_interval
        assert found.noise_scale == pytest.approx(truth, rel=0.1)
        assert low < truth < high
        small, big = gradients.square().sum(1).mean(), gradients.mean(0).square().sum()
        b_small, b_big = batch, 300 * batch
        square = (b_big * big - b_small * small) / (b_big - b_small)
        trace = (small - big) / (1 / b_small - 1 / b_big)
        assert found.squared_norm.value == pytest.approx(square.item(), rel=1e-4)
        assert found.noise_scale == pytest.approx((trace / square).item(), rel=1e-3)


# ---- on the bundled model


def test_nothing_is_moved_and_all_repeats(make_parts):
    parts = make_parts()
    before = {name: parameter.detach().clone() for name, parameter in parts.optimizer.parameters.items()}
    config, table = parts.config, parts.process.source.table
    shared = with_explore(FLASH_GRPO, shared_noise=True)
    first = [gradient_consistency(parts, algorithm, 3) for algorithm in (FLASH_GRPO, shared)]
    assert first[0] != first[1]
    assert [gradient_consistency(parts, algorithm, 3) for algorithm in (FLASH_GRPO, shared)] == first
    assert reward_variance(parts, False, 3, 2) == reward_variance(parts, False, 3, 2)
    assert parts.config is config
    assert parts.process.source.table is table
    assert parts.optimizer.steps == 0
    for name, parameter in parts.optimizer.parameters.items():
        assert torch.equal(parameter, before[name])
        assert torch.equal(parts.optimizer.ema[name], before[name])
        assert parameter.grad is None
    assert {one.drift for one in first} == {0.0}


def test_another_algorithm_shares_the_parts(make_parts):
    parts = make_parts()
    other = parts.with_algorithm(FLASH_GRPO)
    assert other.process.model is parts.process.model
    assert (other.optimizer, other.rewards) == (parts.optimizer, parts.rewards)
    assert other.config == parts.config.model_copy(update={"algorithm": FLASH_GRPO})
    assert torch.equal(other.process.source.table.std, LinearSde()(parts.process.grid.sigmas).std)
    assert not torch.equal(other.process.source.table.std, parts.process.source.table.std)


def test_several_processes_are_refused(make_parts):
    parts = make_parts()
    parts.world = World(torch.device("cpu"), size=2)
    with pytest.raises(UserError, match="one process"):
        gradient_consistency(parts, FLASH_GRPO, 3)


@pytest.mark.parametrize("effort", [{"prompts": 2}, {"members": 1}, {"updates": 2}])
def test_too_little_effort_is_refused(effort):
    with pytest.raises(UserError, match=next(iter(effort))):
        Effort(**effort)


@pytest.fixture(scope="module")
def diagnosed(tmp_path_factory):
    """A very small run of two updates, and the diagnosis of its base model and of its tuned weights."""
    from tests.conftest import small_run

    quick = ("updates=2", "optim.passes=2", "optim.lr=0.05", "tracking.preflight=skip", "evaluation.videos=0")
    config = small_run(tmp_path_factory.mktemp("diagnosed") / "run", *quick)
    run = train(config)
    algorithms = {
        "flash": with_explore(FLASH_GRPO, steps=OneStep(window=(0.0, 1.0))),
        "flow": with_explore(FLOW_GRPO, noise=config.algorithm.explore.noise),
    }
    tuned = diagnose(config, {"flow": algorithms["flow"]}, run, SMALL)
    return config, run, (diagnose(config, algorithms, effort=SMALL), tuned)


def test_a_diagnosis_is_whole_and_is_json(diagnosed, make_run):
    config, run, (base, tuned) = diagnosed
    assert json.loads(json.dumps(base, allow_nan=False)) == base
    assert base["noises"].keys() == {"linear, eta 1", "cps, eta 0.7"}
    assert base["consistency"].keys() == {"flash", "flow"}
    for noise in base["noises"].values():
        assert {kind: one["reward_variance"]["shared_noise"] for kind, one in noise.items()} == {
            "independent": False,
            "shared": True,
        }
        for kind, one in noise.items():
            assert one["gradient_by_step"]["shared_noise"] == (kind == "shared")
            assert one["gradient_by_step"]["steps"] == [0, 1, 2]
            assert one["gradient_by_step"]["drift"] == 0
    for one in base["consistency"].values():
        assert (one["samples"], one["updates"], one["drift"]) == (4, 3, 0)
    assert base["weights"] is None
    assert tuned["weights"]["run"] == str(run)
    assert tuned["weights"]["update"] in (1, 2)
    assert tuned["consistency"]["flow"] != base["consistency"]["flow"]
    with pytest.raises(UserError, match=r"model\.train"):
        diagnose(make_run("model.train.rank=2"), {"flash": FLASH_GRPO}, run, SMALL)
    with pytest.raises(UserError, match="algorithm"):
        diagnose(config, {}, effort=SMALL)


def test_ratios_of_a_run(diagnosed):
    """The second pass of an update sees weights that have moved; the first does not."""
    _, run, _ = diagnosed
    lines = read_lines(run / "metrics.jsonl")
    assert [line["drift"] for line in lines] == [0.0, 0.0]
    assert min(line["ratio_max_dev"] for line in lines) > 0


def test_figures_can_be_opened(diagnosed, tmp_path):
    _, _, (base, _) = diagnosed
    files = figures(base, tmp_path / "figures")
    names = {f"{kind}_figure.{ending}" for kind in ("gradient", "variance", "consistency") for ending in ("svg", "png")}
    assert {file.name for file in files} == names
    for file in files:
        if file.suffix == ".png":
            assert Image.open(file).size[0] == pytest.approx(1300, abs=2)
        else:
            assert xml.etree.ElementTree.parse(file).getroot().tag.endswith("svg")
    again = figures(base, tmp_path / "again")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]

"""The gradient of the policy on the weights that a model has now, which stay as they are.

Rectification says that the gradient norm of a denoising step follows lambda_k and that the weight 1/lambda_k makes it
level; and what all of Flash-GRPO is for is that independent gradient estimates of one policy agree. Draws are named by
the seed and by what they are for, so algorithms that are compared see the same prompts and the same noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from flashgrpo.assembly import Assembly
from flashgrpo.distributed.world import World, local
from flashgrpo.errors import UserError
from flashgrpo.learning.optim import GradientSum
from flashgrpo.learning.update import policy_update
from flashgrpo.presets import Algorithm
from flashgrpo.process import Process, Record
from flashgrpo.processes.flow.choices import Recorded, Stochastic
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.processes.flow.steps import OneStep
from flashgrpo.processes.flow.weighting import Rectified
from flashgrpo.prompts import prompt_groups
from flashgrpo.scoring.intervals import Estimate, jackknife
from flashgrpo.scoring.scoring import untimed
from flashgrpo.seeds import keyed_bits

WINDOWS = {"whole grid": (0.0, 1.0), "first half": (0.0, 0.5)}
OfPrompts = Callable[[list[int]], Float64[Tensor, " steps"]]


@dataclass(frozen=True)
class Levelness:
    """How far the gradient norm is from level over some steps: coefficients of variation, std / mean.

    `score` and `rectified_score` are of the norms of single samples' gradients of the log-density. The theory predicts
    that of lambda (`predicted`) without and 0 with rectification. The exponents are slopes of log norm over log lambda,
    predicted to be 1; one step has none.
    """

    steps: list[int]
    predicted: float
    uniform: Estimate
    rectified: Estimate
    score: Estimate
    rectified_score: Estimate
    exponent: Estimate | None
    score_exponent: Estimate | None


@dataclass(frozen=True)
class GradientByStep:
    """Gradient norms at each step of the grid but the last, which all rest on the same prompts.

    Args:
        advantage_std: over what the std in the advantages is taken; over the whole "batch", a step whose rewards spread
            little has small advantages, and so a small `norm`.
        scale: lambda, the predicted scale of the gradient; `rectification` is its inverse.
        weight: of `Rectified` over the whole grid.
        norm: of the mean gradient of the surrogate, over groups that are all stochastic at the step; `rectified` with
            the weight.
        score: mean over samples of the norm of a single sample's gradient of the log-density.
        signal: squared norm of the expected gradient, without bias, so that it may be negative.
        drift: the largest |ratio - 1| in the replay.
    """

    shared_noise: bool
    advantage_std: str
    steps: list[int]
    sigma: list[float]
    scale: list[float]
    rectification: list[float]
    weight: list[float]
    norm: list[Estimate]
    rectified: list[Estimate]
    score: list[Estimate]
    signal: list[Estimate]
    drift: float
    windows: dict[str, Levelness]


def gradient_by_step(parts: Assembly, shared_noise: bool, prompts: int = 6) -> GradientByStep:
    """Replay one group for every prompt and step by itself; intervals are jackknifes over prompts.

    A step's weight is a constant factor of its gradient, so the rectified norm is the uniform one times the weight.
    """
    own, record = groups_at_every_step(parts, shared_noise, prompts)
    process, steps = own.process, windows(own)["whole grid"]
    table, prompt = (
        stochastic_of(own.config.algorithm).noise(grid_of(own).sigmas),
        record.sample // (len(record) // prompts),
    )
    grams, scores, drifts = [], [], []
    for step in steps:
        kept = Kept(own.optimizer.parameters, own.world)
        groups = [((record.slot == step) & (prompt == p)).nonzero().flatten() for p in range(prompts)]
        drifts += [kept.update(own, record[group]) for group in groups]
        grams.append(gram(kept.gradients))
        scores.append([score_norm(process, kept, record[group[:1]]) for group in groups])
    products, score = torch.stack(grams), torch.tensor(scores, dtype=torch.float64)
    weight = Rectified().weights(table, steps, torch.tensor(steps)).double()

    def norms(units: list[int]) -> Float64[Tensor, " steps"]:
        return products[:, units][:, :, units].mean(dim=(1, 2)).clamp(min=0).sqrt()

    def score_norms(units: list[int]) -> Float64[Tensor, " steps"]:
        return score[:, units].mean(dim=1)

    scale = 1 / table.rectification[steps]
    return GradientByStep(
        shared_noise,
        own.config.algorithm.credit.std,
        steps,
        grid_of(own).sigmas[steps].tolist(),
        scale.tolist(),
        table.rectification[steps].tolist(),
        weight.tolist(),
        jackknife(norms, prompts),
        jackknife(lambda units: weight * norms(units), prompts),
        jackknife(score_norms, prompts),
        jackknife(lambda units: torch.stack([_off_diagonal(one, units) for one in products]), prompts),
        max(drifts),
        {name: _level(inside, scale, norms, score_norms, prompts) for name, inside in windows(own).items()},
    )


def groups_at_every_step(parts: Assembly, shared_noise: bool, prompts: int) -> tuple[Assembly, Record]:
    """Draw a group of each prompt at each step but the last, compared; returns the assembly that drew them, too."""
    every_step = OneStep(per="group", window=(0.0, 1.0), draw="stratified")  # deals each step once to K groups in turn
    algorithm = parts.config.algorithm
    explore = replace(stochastic_of(algorithm), steps=every_step, shared_noise=shared_noise)
    plain = replace(algorithm, explore=explore, score=Recorded(), objective=replace(algorithm.objective, kl_coef=0.0))
    own, count = named(parts, plain, "gradient by step"), len(windows(parts)["whole grid"])
    one_each = prompt_groups(parts.prompts, parts.config.seed, 0, prompts, parts.config.rollout.group_size)
    groups = [replace(group, group=group.group * count + i) for group in one_each for i in range(count)]
    return own, own.compare(own.draw_and_score(groups, untimed, uses=2)).record


def stochastic_of(algorithm: Algorithm) -> Stochastic:
    """Return how an algorithm explores by noise, which is what is looked at here.

    Raises:
        UserError: its rollouts have no stochastic steps.
    """
    if not isinstance(algorithm.explore, Stochastic):
        raise UserError("diagnostics look at stochastic steps, and this algorithm's rollouts have none; leave it out")
    return algorithm.explore


def score_norm(process: Process, gradients: GradientSum, unit: Record) -> float:
    """Return the norm of the gradient of one unit's log-density, lambda |J^T xi| / D with J = dv/dtheta."""
    for score, _ in process.replay(unit, ()):
        score.sum().backward()
    norm = float(gradients.collect())
    gradients.take()
    return norm


def _level(steps: list[int], scale: Tensor, norms: OfPrompts, score_norms: OfPrompts, prompts: int) -> Levelness:
    predictor = scale[steps].log() - scale[steps].log().mean()

    def variation(values: Tensor) -> Tensor:
        return values.std(correction=0) / values.mean().clamp(min=1e-300)

    def variations(units: list[int]) -> Float64[Tensor, "4"]:
        both = norms(units)[steps], score_norms(units)[steps]
        return torch.stack([variation(v) for values in both for v in (values, values / scale[steps])])

    def exponents(units: list[int]) -> Float64[Tensor, "2"]:
        logs = [values[steps].clamp(min=1e-300).log() for values in (norms(units), score_norms(units))]
        return torch.stack([(predictor * log).sum() / predictor.square().sum() for log in logs])

    uniform, rectified, score, rectified_score = jackknife(variations, prompts)
    exponent, score_exponent = jackknife(exponents, prompts) if len(steps) > 1 else (None, None)
    predicted = float(variation(scale[steps]))
    return Levelness(steps, predicted, uniform, rectified, score, rectified_score, exponent, score_exponent)


@dataclass(frozen=True)
class GradientConsistency:
    """How well K independent gradient estimates g_i of one policy agree, each from `samples` samples.

    Args:
        cosine: mean over pairs of their cosines.
        squared_norm: |G|^2 of the expected gradient, mean over pairs of `g_i . g_j`; without bias, so that it may be
            negative.
        norm: mean |g_i|.
        noise_scale: `tr(Sigma) / |G|^2` in samples, with `tr(Sigma) / samples = mean |g_i|^2 - |G|^2`: the batch whose
            signal and noise are equal (McCandlish et al., arXiv 1812.06162, whose estimators these are for batches of
            one and of K updates). None where it, or an end of its interval, is infinite.
        drift: the largest |ratio - 1| in the replays.
        gram: the products `g_i . g_j`.
    """

    updates: int
    samples: int
    cosine: Estimate
    squared_norm: Estimate
    norm: float
    noise_scale: float | None
    noise_scale_interval: list[float | None]
    drift: float
    gram: list[list[float]]


def gradient_consistency(parts: Assembly, algorithm: Algorithm, updates: int = 8) -> GradientConsistency:
    """Compare the gradients of several updates at fixed weights; each has its own prompts, steps and noise."""
    own, rollout = named(parts, algorithm, "consistency"), parts.config.rollout
    kept, drifts = Kept(own.optimizer.parameters, own.world), []
    for update in range(updates):
        groups = prompt_groups(parts.prompts, parts.config.seed, update, rollout.prompts, rollout.group_size)
        drawn = own.draw_and_score(groups, untimed, uses=2)  # a gradient is that of a replay
        drifts.append(kept.update(own, own.compare(drawn).record))
    return consistency_of(gram(kept.gradients), rollout.prompts * rollout.group_size, max(drifts))


def consistency_of(
    products: Float64[Tensor, "updates updates"], samples: int, drift: float = 0.0
) -> GradientConsistency:
    """Measure the consistency from the products of the estimates; intervals are jackknifes over them.

    Two estimates (3, 4) and (4, 3) from 10 samples each: cosine 24 / 25, |G|^2 = 24, noise scale 10 (25 - 24) / 24.
    """
    norms = products.diagonal().sqrt()
    cosines = products / torch.outer(norms, norms).clamp(min=1e-300)  # an estimate of length 0 agrees with none
    updates, mean_square = len(products), float(products.diagonal().mean())
    both = (cosines, products)
    cosine, square = jackknife(lambda units: torch.stack([_off_diagonal(one, units) for one in both]), updates)

    def noise_scale(squared_norm: float) -> float | None:
        return samples * max(mean_square - squared_norm, 0.0) / squared_norm if squared_norm > 0 else None

    low, high = square.interval
    scale, interval = noise_scale(square.value), [noise_scale(high), noise_scale(low)]
    norm = float(norms.mean())
    return GradientConsistency(updates, samples, cosine, square, norm, scale, interval, drift, products.tolist())


class Kept(GradientSum):
    """Stands in for the optimizer: keeps the gradients, flat and on the CPU, and leaves the weights as they are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World) -> None:
        super().__init__(parameters, world)
        self.gradients: list[Float[Tensor, " parameters"]] = []

    @property
    def lr(self) -> float:
        """A learning rate of 0: no step is taken."""
        return 0.0

    def step(self) -> float:
        """Keep the gradient that was collected; returns its norm."""
        flat = torch.cat([local(gradient).flatten().float().cpu() for gradient in self.take()])
        self.gradients.append(flat)
        return float(flat.norm())

    def update(self, parts: Assembly, record: Record) -> float:
        """Keep the gradient of an update of one optimizer step; returns its drift."""
        once = parts.config.optim.model_copy(update={"minibatches": 1, "passes": 1})
        metrics = policy_update(parts.process, parts.objective, self, record, once, parts.world)
        return float(metrics["drift"])


def gram(gradients: Sequence[Float[Tensor, " parameters"]]) -> Float64[Tensor, "gradients gradients"]:
    """Return all products of the gradients, in float64."""
    return torch.stack([torch.stack([torch.dot(a.double(), b.double()) for b in gradients]) for a in gradients])


def _off_diagonal(products: Float64[Tensor, "n n"], units: list[int]) -> Float64[Tensor, ""]:
    """Return the mean over the pairs of different units."""
    block = products[units][:, units]
    return (block.sum() - block.diagonal().sum()) / (len(units) * (len(units) - 1))


def grid_of(parts: Assembly) -> SigmaGrid:
    """Return the noise levels of the rollout."""
    assert isinstance(parts.process, FlowProcess), "only those have stochastic steps"
    return parts.process.grid


def windows(parts: Assembly) -> dict[str, list[int]]:
    """Return the steps of each window."""
    return {name: OneStep(window=w).candidates(grid_of(parts).num_steps) for name, w in WINDOWS.items()}


def named(parts: Assembly, algorithm: Algorithm, purpose: str) -> Assembly:
    """Return parts that draw as `algorithm` does, with noise and steps that no run and no other measurement has."""
    if parts.world.size > 1:
        raise UserError(f"diagnostics run in one process, not in {parts.world.size}; start them without torchrun")
    own = parts.with_algorithm(algorithm)
    own.config = own.config.model_copy(update={"seed": keyed_bits(purpose, parts.config.seed)})
    return own

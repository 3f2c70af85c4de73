"""Where Flash-GRPO's claims hold, in numbers and figures: `diagnose` measures, `figures` draws. Nothing is trained.

Iso-temporal grouping rests on the law of total variance of a prompt's rewards R over the stochastic step k,

    Var(R) = E_k[Var(R | k)] + Var_k(E[R | k])

for the samples of a group that shares k are spared the second term. The gradient's side is in `gradients.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float64
from matplotlib.figure import Figure
from torch import Tensor

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.diagnostics.gradients import gradient_by_step, gradient_consistency, named, stochastic_of, windows
from flashgrpo.distributed.world import process_group, use_threads
from flashgrpo.errors import UserError
from flashgrpo.models.lora import weights_replaced
from flashgrpo.presets import Algorithm
from flashgrpo.processes.flow.steps import OneStep
from flashgrpo.prompts import prompt_groups
from flashgrpo.report.comparison_charts import OKABE_ITO, save_figure
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.scoring.intervals import Estimate, jackknife
from flashgrpo.scoring.scoring import untimed

Say = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much `diagnose` draws: about two minutes for one noise with the bundled model on two cores.

    Args:
        prompts, members: prompts of the measurements by step, and samples of each at each step for the variance.
        updates: gradient estimates, each of a whole update, for their consistency.
    """

    prompts: int = 6
    members: int = 4
    updates: int = 8

    def __post_init__(self) -> None:
        for name, least in (("prompts", 3), ("members", 2), ("updates", 3)):
            if getattr(self, name) < least:
                raise UserError(f"diagnostics need {name} of at least {least}, not {getattr(self, name)}")


def diagnose(
    config: RunConfig,
    algorithms: Mapping[str, Algorithm],
    weights: Path | None = None,
    effort: Effort | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure all, as JSON: for each noise (with the std of the first algorithm that has it) and algorithm.

    Args:
        weights: a run directory; its best checkpoint's averaged weights are measured instead of the base model's.

    Raises:
        UserError: several processes, no algorithm, or `weights` is no run of this model with a checkpoint.
    """
    if not algorithms:
        raise UserError("diagnostics need at least one algorithm")
    for algorithm in algorithms.values():
        stochastic_of(algorithm)
    effort = effort or Effort()
    updates = max(effort.updates, -(-effort.prompts // config.rollout.prompts))  # whose prompts are to be encoded
    keeps_reference = max(algorithms.values(), key=lambda algorithm: algorithm.objective.kl_coef)
    config = config.model_copy(update={"updates": updates, "algorithm": keeps_reference})
    use_threads(config.parallel.threads)
    with process_group(config.parallel, config.model.compute_dtype, strict=False) as world:
        parts = Assembly(config, world, say)
        try:
            update, tensors = _averaged(parts, weights, say)
            with weights_replaced(parts.process.network, tensors):
                measured = _measure(parts, algorithms, effort, say)
        finally:
            parts.rewards.close()
    source = {"run": str(weights), "update": update} if weights else None
    settings = config.rollout.model_dump(include={"num_steps", "prompts", "group_size"})
    return {"seed": config.seed, **settings, "weights": source, "effort": asdict(effort), **measured}


def _averaged(parts: Assembly, run: Path | None, say: Say) -> tuple[int | None, dict[str, Tensor]]:
    """Return the weights to measure, and the update that they are of; without a run those that are there."""
    tensors = {name: parameter.detach().clone() for name, parameter in parts.optimizer.parameters.items()}
    if run is None:
        return None, tensors
    directory, of_run = RunDirectory.existing(run)
    if of_run.model.train != parts.config.model.train:
        raise UserError(f"model.train is not that of {run}, whose weights are to be measured")
    directory.check_model(parts.process.identity)
    update = directory.choose_checkpoint(None, say)
    checkpoint.read_into(directory.checkpoints, update, {"ema": tensors}, parts.world)
    return update, tensors


def _measure(parts: Assembly, algorithms: Mapping[str, Algorithm], effort: Effort, say: Say) -> dict[str, Any]:
    firsts: dict[str, Assembly] = {}
    noises, consistency = {}, {}
    for algorithm in algorithms.values():
        firsts.setdefault(_name(stochastic_of(algorithm).noise), parts.with_algorithm(algorithm))
    for noise, own in firsts.items():
        say(f"diagnostics of {noise} noise by step")
        noises[noise] = {"independent": _by_step(own, False, effort), "shared": _by_step(own, True, effort)}
    for name, algorithm in algorithms.items():
        say(f"gradient consistency of {name}")
        consistency[name] = asdict(gradient_consistency(parts, algorithm, effort.updates))
    return {"noises": noises, "consistency": consistency}


def _name(noise: Any) -> str:
    return f"{noise.kind}, eta {noise.eta:g}"


def _by_step(parts: Assembly, shared_noise: bool, effort: Effort) -> dict[str, Any]:
    variance = reward_variance(parts, shared_noise, effort.prompts, effort.members)
    gradient = gradient_by_step(parts, shared_noise, effort.prompts)
    return {"gradient_by_step": asdict(gradient), "reward_variance": asdict(variance)}


@dataclass(frozen=True)
class VarianceSplit:
    """The variance of the reward within a prompt when k is uniform over `steps`: unbiased means over prompts.

    A group that shares k sees `within`; one whose samples draw k each for themselves sees `total = within + between`.
    `share` is between / total. `between` may come out negative. `by_prompt` has [within, between] of each prompt.
    """

    steps: list[int]
    within: Estimate
    between: Estimate
    total: Estimate
    share: Estimate
    by_prompt: list[list[float]]


@dataclass(frozen=True)
class RewardVariance:
    """Rewards of samples that are stochastic at step k: mean, and standard deviation within a prompt, by k."""

    shared_noise: bool
    steps: list[int]
    mean: list[float]
    std: list[float]
    windows: dict[str, VarianceSplit]


def reward_variance(parts: Assembly, shared_noise: bool, prompts: int = 6, members: int = 4) -> RewardVariance:
    """Draw `members` samples of each prompt at each step of the grid, and split the variance of their rewards.

    Args:
        shared_noise: all samples of a prompt start from one initial noise, at whatever step they are stochastic.
    """
    algorithm = parts.config.algorithm
    every_step = OneStep(per="sample", window=(0.0, 1.0), draw="stratified")  # deals K members each step once
    explore = replace(stochastic_of(algorithm), steps=every_step, shared_noise=shared_noise)
    steps = windows(parts)["whole grid"]
    groups = prompt_groups(parts.prompts, parts.config.seed, 0, prompts, members * len(steps))
    drawn = named(parts, replace(algorithm, explore=explore), "reward variance").draw_and_score(groups, untimed, uses=2)
    by_step = drawn.record.slot.reshape(prompts, -1).argsort(dim=1, stable=True)
    rewards = drawn.rewards.total.reshape(prompts, -1).gather(1, by_step).reshape(prompts, len(steps), members)
    return RewardVariance(
        shared_noise,
        steps,
        rewards.mean(dim=(0, 2)).tolist(),
        rewards.var(dim=2).mean(dim=0).sqrt().tolist(),
        {name: split_variance(rewards, inside) for name, inside in windows(parts).items()},
    )


def variance_parts(
    rewards: Float64[Tensor, "prompts steps members"], unbiased: bool = True
) -> tuple[Float64[Tensor, " prompts"], Float64[Tensor, " prompts"]]:
    """Split each prompt's rewards R (P, K, M), of independent cells, into within-step and between-step variance.

    Plain parts, `mean_k var_m R` and `var_k mean_m R`, add up to the variance of a prompt's K M rewards exactly. The
    unbiased `within` divides by M - 1, and unbiased `between` leaves out `within (K - 1) / (K M)`, which is what the
    noise of the cells' means adds to it. R = [[1, 3], [5, 7]] has plain parts 1 and 4, and unbiased 2 and 3.5.
    """
    steps, members = rewards.shape[1:]
    within = rewards.var(dim=2, correction=int(unbiased)).mean(dim=1)
    between = rewards.mean(dim=2).var(dim=1, correction=0)
    return within, between - int(unbiased) * within * (steps - 1) / (steps * members)


def split_variance(rewards: Float64[Tensor, "prompts steps members"], steps: Sequence[int]) -> VarianceSplit:
    """Split the variance over some of the steps, without bias; intervals are jackknifes over prompts."""
    parts = torch.stack(variance_parts(rewards[:, list(steps)]))

    def split(prompts: list[int]) -> Float64[Tensor, "4"]:
        within, between = parts[:, prompts].mean(dim=1)
        total = within + between
        return torch.stack([within, between, total, between / total.clamp(min=1e-300)])

    within, between, total, share = jackknife(split, len(rewards))
    return VarianceSplit(list(steps), within, between, total, share, parts.T.tolist())


BLUE, ORANGE, GREEN, GREY = *(OKABE_ITO[i] for i in (0, 2, 3)), "#666666"
STYLE: dict[Any, Any] = {"font.size": 8, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "flashgrpo"}


@matplotlib.rc_context(STYLE)
def figures(diagnosis: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw a diagnosis, 6.5 inches wide, as SVG and PNG into `folder`; returns the files."""
    return [
        file
        for draw in (gradient_figure, variance_figure, consistency_figure)
        for file in save_figure(draw(diagnosis), folder / draw.__name__)
    ]


def gradient_figure(diagnosis: Mapping[str, Any]) -> Figure:
    """Draw norms by step, each curve relative to its mean, beside lambda; a panel for each noise and initial noise."""
    noises = diagnosis["noises"]
    figure = Figure(figsize=(6.5, 0.4 + 2.2 * len(noises)), layout="constrained")
    curves = (("norm", ORANGE, "surrogate"), ("rectified", BLUE, "rectified"), ("score", GREEN, "score of one sample"))
    panels = [(f"{noise}, {kind} $x_0$", one) for noise, by_kind in noises.items() for kind, one in by_kind.items()]
    for axes, (title, one) in zip(figure.subplots(len(noises), 2, sharey=True).flat, panels, strict=True):
        by_step = one["gradient_by_step"]
        steps, scale = by_step["steps"], np.array(by_step["scale"])
        axes.plot(steps, scale / scale.mean(), "--", color=GREY, label="lambda")
        for key, colour, label in curves:
            value, low, high = _columns(by_step[key]) / np.mean([one["value"] for one in by_step[key]])
            bars = [value - low.clip(min=value / 3), high - value]  # an end below 0 has no logarithm
            axes.errorbar(steps, value, bars, color=colour, marker="o", ms=3, lw=1, elinewidth=0.6, label=label)
        axes.set(yscale="log", xlabel="denoising step k", ylabel="gradient norm / its mean", title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.label_outer()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def variance_figure(diagnosis: Mapping[str, Any]) -> Figure:
    """Draw within-step and between-step variance, and the latter's share, for each noise, initial noise and window."""
    splits = {
        f"{noise}\n{kind} $x_0$, {window}": split
        for noise, by_kind in diagnosis["noises"].items()
        for kind, one in by_kind.items()
        for window, split in one["reward_variance"]["windows"].items()
    }
    within, between, share = (_columns([s[part] for s in splits.values()]) for part in ("within", "between", "share"))
    figure = Figure(figsize=(6.5, 1 + 0.35 * len(splits)), layout="constrained")
    axes, shares = figure.subplots(1, 2, sharey=True)
    axes.barh(list(splits), within[0], color=BLUE, label="within a step")
    axes.barh(list(splits), between[0].clip(min=0), left=within[0], color=ORANGE, label="between steps")
    shares.errorbar(share[0], list(splits), xerr=abs(share[1:] - share[0]), fmt="o", color=ORANGE, ecolor=GREY)
    shares.axvline(0, color=GREY, lw=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("reward variance in a prompt")
    shares.set_xlabel("share between steps")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def consistency_figure(diagnosis: Mapping[str, Any]) -> Figure:
    """Draw the mean cosine between independent gradient estimates, by algorithm, with its 95 % interval."""
    value, low, high = _columns([one["cosine"] for one in diagnosis["consistency"].values()])
    figure = Figure(figsize=(6.5, 0.8 + 0.35 * len(value)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(diagnosis["consistency"]), value, xerr=[value - low, high - value], color=BLUE, ecolor=GREY)
    axes.axvline(0, color=GREY, lw=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("mean cosine between independent gradient estimates")
    return figure


def _columns(estimates: Sequence[Mapping[str, Any]]) -> np.ndarray:  # values, lower and upper ends, (3, n)
    return np.array([[one["value"], *one["interval"]] for one in estimates]).T

"""Held-out prompts on fixed noise with a deterministic solver, paired with the base model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import World
from flashgrpo.processes.flow.model import VideoModel
from flashgrpo.processes.flow.policy import guidance_by_step
from flashgrpo.processes.flow.rollout import denoise, noise_of
from flashgrpo.processes.flow.shortcuts import Environment
from flashgrpo.run.directory import RunDirectory
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import Scoring, decode
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.types import Prompt, RewardTable
from flashgrpo.video import Video, write_mp4

EXTREMES = 2  # videos at either end that are kept beside those that are chosen without a look at their rewards


@dataclass(frozen=True)
class Evaluation:
    """The scores of n = prompts x samples_per_prompt videos, a prompt's samples one after the other."""

    prompts: Sequence[Prompt]
    table: RewardTable
    shown: Sequence[int]  # rows whose videos are kept
    videos: Mapping[int, Video]  # those of them that this process made


class Evaluator:
    """Scores a model's current weights, always on the same prompts and noise."""

    def __init__(
        self,
        model: VideoModel,
        config: RunConfig,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        world: World,
    ) -> None:
        settings = config.evaluation
        self.environment = deterministic(model, config, settings.num_steps)
        self._config = config
        self._prompts = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
        self._rewards = rewards
        self._world = world

    @torch.no_grad()
    def __call__(self, limit: int | None = None) -> Evaluation:
        """Sample and score every held-out prompt with the weights that the model has now, each rank its share.

        Args:
            limit: take the first so many prompts only.
        """
        count = None if limit is None else limit * self._config.evaluation.samples_per_prompt
        every, settings = self._prompts[:count], self._config.rollout
        rows = self._world.share(len(every))
        prompts = [every[row] for row in rows]
        model = self.environment.model
        condition = model.encode(prompts or self._prompts[:1])
        shown = self._shown_rows()
        scoring = Scoring(
            self._rewards,
            model,
            self._world,
            every,
            True,
            settings.decode_micro_batch,
            keep=shown,
            at_once=self._config.model.offload,
        )
        denoise(self.environment, self._noise(rows), condition, settings.micro_batch, self._world, scoring.add)
        table = scoring.table()
        return Evaluation(every, table, shown, scoring.videos)

    @torch.no_grad()
    def again(self, rows: Sequence[int]) -> list[Video]:
        """The videos of some samples once more, with the weights that the model has now; every process draws them."""
        model, settings = self.environment.model, self._config.rollout
        condition = model.encode([self._prompts[row] for row in rows])
        latents = denoise(self.environment, self._noise(rows), condition, settings.micro_batch, self._world)
        return list(decode(model, latents, settings.decode_micro_batch))

    def _shown_rows(self) -> list[int]:
        """The samples whose videos are kept, spread evenly over the prompts: files often list like beside like."""
        count, total = min(self._config.evaluation.videos, len(self._prompts)), len(self._prompts)
        return [i * total // count for i in range(count)]

    def _noise(self, rows: Sequence[int]) -> Tensor:
        """x_0 of each row, from the evaluation's own seed and purpose."""
        settings, model = self._config.evaluation, self.environment.model
        names = [divmod(row, settings.samples_per_prompt) for row in rows]
        return noise_of(model, settings.seed, "evaluation", names)


def deterministic(model: VideoModel, config: RunConfig, num_steps: int) -> Environment:
    """Sampling without noise on a grid of its own step count, with the guidance and the solver of evaluations."""
    grid = model.grid(num_steps)
    settings = config.rollout if config.evaluation.guidance_scale is None else config.evaluation
    scale = config.evaluation.guidance_scale or config.rollout.guidance_scale
    guidance = guidance_by_step(model, grid, scale, config.evaluation.guidance_scale_2 or settings.guidance_scale_2)
    return Environment(model, grid, guidance, config.evaluation.solver)


def record(update: int, tuned: Evaluation, base: Mapping[str, Any] | None, samples_per_prompt: int) -> dict[str, Any]:
    """A line of evaluations.jsonl: the means, and the paired difference to the base model's line (`base`).

    The interval is a 95 % percentile bootstrap over prompts: a prompt's samples are no independent evidence for other
    prompts. It is None where there are fewer than two prompts. `watched_intervals` are those of the watched components.
    """
    table = tuned.table
    totals = table.total.tolist()
    samples = [
        {"prompt": prompt.text, "reward": totals[row], **_parts(table, row)} for row, prompt in enumerate(tuned.prompts)
    ]
    base_samples = samples if base is None else base["samples"]
    for sample, before in zip(samples, base_samples, strict=True):
        sample |= {f"base_{key}": before[key] for key in ("reward", "rewards", "watched")}
    differences = [sample["reward"] - sample["base_reward"] for sample in samples]
    falls = {
        name: [sample["watched"][name] - sample["base_watched"][name] for sample in samples]
        for name in table.means(trained=False)
    }

    def interval(values: Sequence[float]) -> list[float] | None:
        return bootstrap_interval(np.reshape(values, (-1, samples_per_prompt)).mean(axis=1))

    means = {
        "reward": float(np.mean(totals)),
        "rewards": table.means(trained=True),
        "watched": table.means(trained=False),
    }
    base_means = {f"base_{key}": (means if base is None else base)[key] for key in means}
    return {
        "update": update,
        **means,
        **base_means,
        "difference": float(np.mean(differences)),
        "interval": interval(differences),
        "watched_intervals": {name: interval(values) for name, values in falls.items()},
        "reward_failures": dict(table.failures),
        "samples": samples,
    }


def extremes(samples: Sequence[Mapping[str, Any]], each: int = EXTREMES) -> list[int]:
    """Rows of the samples whose reward fell most and rose most against the base, the largest fall first."""
    order = sorted(range(len(samples)), key=lambda row: samples[row]["reward"] - samples[row]["base_reward"])
    return order if len(order) <= 2 * each else [*order[:each], *order[-each:]]


def broken_watch(line: Mapping[str, Any], rewards: Mapping[str, RewardConfig]) -> str | None:
    """Why a run is to end: a watched reward has fallen by more than its `max_fall` while the trained reward rose.

    It has when the whole 95 % interval of its paired difference to the base lies below -max_fall.
    """
    if line["difference"] <= 0:
        return None
    for name, config in rewards.items():
        for component, interval in line["watched_intervals"].items():
            belongs = component == name or component.startswith(f"{name}.")
            if belongs and config.max_fall is not None and interval and interval[1] < -config.max_fall:
                low, high = (f"{-bound:.3g}" for bound in reversed(interval))
                return (
                    f"the watched reward {component} has fallen by {low} to {high} (95 % interval), more than the "
                    f"{config.max_fall:g} of its max_fall, while the trained reward rose by {line['difference']:.3g}"
                )
    return None


def bootstrap_interval(values: np.ndarray, confidence: float = 0.95) -> list[float] | None:
    """[low, high] of the mean of independent `values`, by percentile bootstrap with a fixed seed."""
    if len(values) < 2:
        return None
    result = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=confidence, method="percentile", rng=np.random.default_rng(0)
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


def write_videos(run: RunDirectory, update: int, evaluation: Evaluation, fps: float) -> dict[int, str]:
    """Write the kept videos that this process made; row -> path relative to the run directory, of all kept ones."""
    paths = {row: f"videos/{update:06d}/{row:03d}.mp4" for row in evaluation.shown}
    for row, video in evaluation.videos.items():
        write_mp4(run.path / paths[row], video, fps)
    return paths


def _parts(table: RewardTable, row: int) -> dict[str, dict[str, float]]:
    values = dict(zip(table.names, table.values[row].tolist(), strict=True))
    trained = {table.names[column] for column in table.trained}
    return {
        "rewards": {name: value for name, value in values.items() if name in trained},
        "watched": {name: value for name, value in values.items() if name not in trained},
    }

"""Held-out prompts on fixed noise with a deterministic solver, paired with the base model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from flashgrpo.distributed.world import World
from flashgrpo.errors import SharedError
from flashgrpo.jsontext import finite
from flashgrpo.media import Medium
from flashgrpo.process import Outputs, Process
from flashgrpo.scoring.intervals import mean_interval
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import Scoring, Watch, unwatched
from flashgrpo.scoring.settings import HeldoutConfig, RewardConfig
from flashgrpo.seeds import Name
from flashgrpo.types import Clip, Prompt, RewardTable

EXTREMES = 2  # samples at either end that are kept beside those that are chosen without a look at their rewards


@dataclass(frozen=True)
class Evaluation:
    """The scores of n = prompts x samples_per_prompt samples, a prompt's one after the other."""

    prompts: Sequence[Prompt]
    table: RewardTable
    kept: Mapping[int, Medium]  # row -> what it shows, of those that are kept and that this process made
    trained_on: int = 0  # prompts that are training prompts
    scenes: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)  # row -> `scenes_of`, where several
    captions: Mapping[int, str] = field(
        default_factory=dict
    )  # row -> what its medium is made of, where that is written


class Evaluator:
    """Scores a model's current weights, always on the same prompts and noise.

    Args:
        decode_batch: outputs decoded at once.
        deferred: decode and score once all is drawn; see `Scoring`.
        trained_on: number of the prompts that are training prompts.
        watch: told how far an evaluation is.
    """

    def __init__(
        self,
        process: Process,
        settings: HeldoutConfig,
        prompts: Sequence[Prompt],
        rewards: Rewards,
        world: World,
        decode_batch: int,
        deferred: bool,
        trained_on: int = 0,
        watch: Watch = unwatched,
    ) -> None:
        self._process = process
        self._settings = settings
        self._prompts = [prompt for prompt in prompts for _ in range(settings.samples_per_prompt)]
        self._rewards = rewards
        self._world = world
        self._decode_batch, self._deferred, self._trained_on = decode_batch, deferred, trained_on
        self._watch = partial(watch, "evaluation")

    @torch.no_grad()
    def __call__(self, limit: int | None = None, fresh: bool = False) -> Evaluation:
        """Sample and score every held-out prompt with the weights that the model has now, each rank its share.

        Args:
            limit: take only the first prompts, at most this many.
            fresh: on other noise than all evaluations that select a checkpoint; keeps no media.
        """
        every = self._prompts[: None if limit is None else limit * self._settings.samples_per_prompt]
        rows, process = self._world.share(len(every)), self._process
        settings = self._decode_batch, [] if fresh else self._shown_rows(), self._deferred

        def clips(view: str, number: int) -> Sequence[Clip]:
            return process.clips(view, every[number], None)

        more: Any = {"watch": self._watch, "sound": process.sound}
        scoring = Scoring(self._rewards, process.media, clips, self._world, every, True, *settings, **more)
        drawn = process.sample([every[row] for row in rows], self._names(rows, fresh), scoring.add)
        own = dict(zip(rows, process.captions(drawn), strict=False))
        captions = {int(row): text for rank in self._world.gather(own) for row, text in rank.items()}
        scenes = {row: scenes_of(clips("clips", row)) for row in range(len(every)) if "clips" in process.views}
        several = {row: of_row for row, of_row in scenes.items() if len(of_row) > 1}
        return Evaluation(every, scoring.table(), scoring.kept, self._trained_on, several, captions)

    @torch.no_grad()
    def resample(self, rows: Sequence[int]) -> Outputs:
        """Some samples once more, with the weights that the model has now; every process draws them."""
        prompts = [self._prompts[row] for row in rows]
        return self._process.sample(prompts, self._names(rows), lambda rows, outputs: None)

    def _shown_rows(self) -> list[int]:
        """The samples that are kept, spread evenly over the prompts: files often list like beside like."""
        count, total = min(self._settings.videos, len(self._prompts)), len(self._prompts)
        return [i * total // count for i in range(count)]

    def _names(self, rows: Sequence[int], fresh: bool = False) -> list[Name]:
        """Of each row's noise: (seed, "evaluation" or "confirmation", prompt, sample)."""
        each, seed = self._settings.samples_per_prompt, self._settings.seed
        purpose = "confirmation" if fresh else "evaluation"
        return [(seed, purpose, *divmod(row, each)) for row in rows]


def evaluation_record(
    update: int, tuned: Evaluation, base: Mapping[str, Any] | None, samples_per_prompt: int
) -> dict[str, Any]:
    """Return a line of evaluations.jsonl: the means, and the paired difference to the base model's line (`base`).

    Intervals are over prompts, since a prompt's samples are no independent evidence for other prompts, and None where
    there are fewer than two. `weights` are those that drew: of the base model, or the moving average of `optim.ema`.
    `watched_intervals` are those of the watched components. `dropped_prompts` counts those that are left out, where
    there are any, for a value that is not finite under either model; `trained_on` those that are training prompts.

    Raises:
        SharedError: no prompt is left.
    """
    table, samples = tuned.table, _paired_samples(tuned, base)
    kept = _complete_prompts(samples, samples_per_prompt)
    if not kept:
        raise SharedError(f"evaluation after update {update}: every held-out prompt has a reward that is not finite")
    table = table if len(kept) == len(samples) else replace(table, values=table.values[kept])
    shown = [samples[row] for row in kept]
    differences = [sample["reward"] - sample["base_reward"] for sample in shown]
    falls = {
        name: [sample["watched"][name] - sample["base_watched"][name] for sample in shown]
        for name in table.means(trained=False)
    }

    def interval(values: Sequence[float]) -> list[float] | None:
        return mean_interval(np.reshape(values, (-1, samples_per_prompt)).mean(axis=1))

    means = {
        "reward": float(np.mean([sample["reward"] for sample in shown])),
        "rewards": table.means(trained=True),
        "watched": table.means(trained=False),
    }
    dropped = (len(samples) - len(kept)) // samples_per_prompt
    of_base = means if base is None else base
    base_means = {f"base_{key}": of_base[key] for key in means}
    if dropped:
        base_means = {key: _mean_of([sample[key] for sample in shown]) for key in base_means}
    weights = "base" if base is None else "ema"
    return {"update": update, "weights": weights} | {
        **means,
        **base_means,
        "difference": float(np.mean(differences)),
        "interval": interval(differences),
        "watched_intervals": {name: interval(values) for name, values in falls.items()},
        "reward_failures": dict(table.failures),
        **({"dropped_prompts": dropped} if dropped else {}),
        **({"trained_on": tuned.trained_on} if tuned.trained_on else {}),
        "samples": samples,
    }


def tuned_lines(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the evaluations of the tuned model, which leave out the base model's."""
    return [line for line in evaluations if line["update"]]


def selected(evaluations: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the update that was selected as the best of several, None where none beat the base or there is but one.

    The largest of several noisy numbers is too large: without any effect, the interval of the best of 20 evaluations
    leaves out 0 in far more than 5 % of runs. So that update is scored once more on other noise (confirmation.json).
    """
    best = [line["update"] for line in tuned_lines(evaluations) if line.get("best")]
    return best[-1] if best and len(tuned_lines(evaluations)) > 1 else None


def scenes_of(clips: Sequence[Clip]) -> list[dict[str, Any]]:
    """Return the video frame at which each prompt of a video begins, and the share of the video before it."""
    starts = [clip for i, clip in enumerate(clips) if i == 0 or clip.prompt.text != clips[i - 1].prompt.text]
    return [{"frame": c.first, "share": c.first / clips[-1].stop, "prompt": c.prompt.text} for c in starts]


def _paired_samples(tuned: Evaluation, base: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Each sample with its values under both models; None is a value that is not finite."""
    totals = tuned.table.total.tolist()
    samples: list[dict[str, Any]] = [
        finite({"prompt": prompt.text, "reward": totals[row], **_parts(tuned.table, row)})
        | ({"scenes": tuned.scenes[row]} if row in tuned.scenes else {})
        | ({"caption": tuned.captions[row]} if row in tuned.captions else {})
        for row, prompt in enumerate(tuned.prompts)
    ]
    base_samples = samples if base is None else base["samples"]
    if len(base_samples) != len(samples):
        raise SharedError(
            f"evaluations.jsonl: the base model was scored on {len(base_samples)} held-out samples, and there are "
            f"{len(samples)} now; something else changed that file"
        )
    for sample, before in zip(samples, base_samples, strict=True):
        sample |= {f"base_{key}": before[key] for key in ("reward", "rewards", "watched", "caption") if key in before}
    return samples


def _mean_of(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of each entry of mappings."""
    if isinstance(values[0], Mapping):
        return {name: _mean_of([value[name] for value in values]) for name in values[0]}
    return float(np.mean(values))


def _complete_prompts(samples: Sequence[Mapping[str, Any]], each: int) -> list[int]:
    """Rows of the prompts all of whose samples have all their values under both models."""

    def whole(value: Any) -> bool:
        return all(whole(part) for part in value.values()) if isinstance(value, Mapping) else value is not None

    rows = range(len(samples))
    complete = [whole(sample) for sample in samples]
    return [row for row in rows if all(complete[row // each * each : (row // each + 1) * each])]


def largest_changes(samples: Sequence[Mapping[str, Any]], each: int = EXTREMES) -> list[int]:
    """Return rows of the samples whose reward fell most and rose most against the base, the largest fall first."""
    rows = _complete_prompts(samples, 1)
    order = sorted(rows, key=lambda row: samples[row]["reward"] - samples[row]["base_reward"])
    return order if len(order) <= 2 * each else [*order[:each], *order[-each:]]


def guard(line: Mapping[str, Any], rewards: Mapping[str, RewardConfig]) -> str | None:
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


def _parts(table: RewardTable, row: int) -> dict[str, dict[str, float]]:
    values = dict(zip(table.names, table.values[row].tolist(), strict=True))
    trained = {table.names[column] for column in table.trained}
    return {
        "rewards": {name: value for name, value in values.items() if name in trained},
        "watched": {name: value for name, value in values.items() if name not in trained},
    }

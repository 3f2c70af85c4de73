"""A run directory: settings, metrics, evaluations, videos - and the rules of who may write into it."""

import errno
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from flashgrpo.config import RunConfig
from flashgrpo.config.recipe import differences, value_at
from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.files import append_line, explain_os_errors, lock, read_object, remove_leftovers, write_json, write_text
from flashgrpo.jsontext import to_json
from flashgrpo.run import checkpoint
from flashgrpo.run.checkpoint import Progress
from flashgrpo.run.lines import Environment, Scored, mistake, ranges, read_lines, whole_lines
from flashgrpo.scoring.heldout import selected
from flashgrpo.types import IMAGE_COLUMNS, Prompt
from flashgrpo.video import image_bytes

FREE_TO_CHANGE = ("out", "updates", "checkpoint", "parallel", "tracking", "model.condition_cache")  # by a later start
NOTED = (  # may change, too, and what changed is kept in changes.jsonl
    *(f"optim.{name}" for name in ("lr", "max_grad_norm", "eps", "weight_decay", "max_bad_steps", "max_bad_groups")),
    *(f"algorithm.objective.{name}" for name in ("clip_range", "tau", "beta", "scale", "kl_coef", "average_coef")),
    *(f"algorithm.behaviour.{name}" for name in ("slope", "start", "ceiling", "updates")),
    *(f"algorithm.credit.{name}" for name in ("clip", "unsafe_weight")),
    "algorithm.credit.unsafe_weight",
)


class RunDirectory:
    """The files of one run. Construction reads only; `begin` writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.evaluations_file = path / "evaluations.jsonl"
        self.environment_file = path / "environment.json"
        self.confirmation_file = path / "confirmation.json"
        self.checkpoints = path / "checkpoints"
        self.lora = path / "lora"
        self.videos = path / "videos"
        self._lock: Any = None

    @classmethod
    def existing(cls, path: Path) -> tuple["RunDirectory", RunConfig]:
        """Open a directory that `train` made, with its settings.

        Raises:
            UserError: there is no such run.
        """
        run = cls(path)
        if not run.config_file.is_file():
            raise UserError(f"{path} is no run directory, for it has no config.yaml")
        return run, RunConfig.load(run.config_file).model_copy(update={"out": str(path)})

    def check(self, config: RunConfig) -> None:
        """Check whether this is a new or empty folder, or a run that has the same settings and is resumed.

        Raises:
            UserError: the folder holds something else, or a run with other settings.
        """
        with explain_os_errors(self.path):
            entries = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
            nearest = next(parent for parent in (self.path, *self.path.absolute().parents) if parent.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK):
                raise PermissionError(errno.EACCES, "not a folder that this user may write into")
        if not self.config_file.is_file():
            foreign = [name for name in entries if not name.startswith(".")]
            if foreign:
                raise UserError(f"out: {self.path} holds {foreign[0]!r} and is no run; choose a new or empty folder")
            return
        if not self._has_lines() and not any(self.checkpoints.glob("*")):
            return  # nothing was done yet that other settings could contradict
        self.environment()  # refused before anything is loaded
        before, now = RunConfig.load(self.config_file).model_dump(mode="json"), config.model_dump(mode="json")
        different = differences(before, now)
        free = {*FREE_TO_CHANGE, *NOTED, *(key for key in different if key.endswith(".max_fall"))}
        changed = [key for key in different if not {key, key.split(".")[0]} & free]
        if changed:
            told = [f"{key} ({value_at(before, key)}, now {value_at(now, key)})" for key in changed[:3]]
            advice = "take its settings to continue it, or choose another folder"
            raise UserError(f"out: {self.path} is a run with another {', '.join(told)}; {advice}")

    def begin(
        self,
        config: RunConfig,
        world: World,
        prompts: Mapping[str, Sequence[Prompt]],
        model: str,
        images: bool,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Create the folder, take its lock, write settings and environment.

        Args:
            prompts: setting -> the prompts of its file, which may not change between the starts of one run.
            model: what tells the base weights from others; they may not change either.
            images: whether a column `image` is what the model starts from, and not a column like any other.
            warn: told of a file system without locks.

        Raises:
            UserError: another process is training into it, it cannot be written, or prompts or weights have changed.
        """
        with explain_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w", encoding="utf-8")
        if not lock(self._lock, warn):
            self.close()
            raise UserError(f"out: another process is training into {self.path}")
        remove_leftovers(self.checkpoints)
        environment = {**_environment(world), "prompts": {key: _digest(file, images) for key, file in prompts.items()}}
        environment["model"] = model
        try:
            self._check_prompts(environment["prompts"])
            if self._has_lines():
                self.check_model(model)
        except UserError:
            self.close()
            raise
        if self._has_lines():
            self._note_changes(config)
        write_text(self.config_file, config.to_yaml())  # first, for it is what marks the folder as a run
        if not self.environment_file.is_file() or self._done() < config.updates:  # nothing is run where all is done
            write_json(self.environment_file, environment, indent=2)

    def _done(self) -> int:
        return max((line["update"] for line in whole_lines(self.metrics_file)), default=0)

    def _note_changes(self, config: RunConfig) -> None:
        """Keep what a later start has changed of how is learnt: setting, values, and the updates done until then."""
        before, now = RunConfig.load(self.config_file).model_dump(mode="json"), config.model_dump(mode="json")
        done = self._done()
        for key in (key for key in differences(before, now) if key in NOTED):
            change = {"after_update": done, "setting": key, "before": value_at(before, key), "now": value_at(now, key)}
            append_line(self.path / "changes.jsonl", to_json(change))

    def _check_prompts(self, now: Mapping[str, str]) -> None:
        before = self.environment().get("prompts", {}) if self._has_lines() else {}
        for key, digest in now.items():
            if before.get(key, digest) != digest:
                raise UserError(f"{key}: the file has changed since {self.path} began; choose another out")

    def check_model(self, model: str) -> None:
        """Check whether the base weights are those that the run was trained on.

        Raises:
            UserError: they are others.
        """
        if self.environment().get("model", model) != model:
            raise UserError(
                f"model.path holds other weights than those that {self.path} was trained on, or model.adapters"
            )

    def environment(self) -> dict[str, Any]:
        """Read environment.json; without one, what the run began with is unknown.

        Raises:
            UserError: it is damaged.
        """
        if not self.environment_file.exists():
            return {}
        known = read_object(self.environment_file)
        if wrong := mistake(Environment, known):
            raise UserError(f"{self.environment_file} is damaged ({wrong}); put it back, or remove it")
        return known

    def close(self) -> None:
        """Release the lock, if it is held."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        append_line(self.metrics_file, to_json(metrics))

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append a line to evaluations.jsonl."""
        append_line(self.evaluations_file, to_json(record))

    def newest_checkpoint(self, warn: Callable[[str], None]) -> Progress | None:
        """Find the checkpoint to resume from, and drop the lines of updates that it does not know.

        `warn` is told of checkpoints that are passed over: damaged ones, and those that know updates whose lines are
        gone, for instance after a power cut.

        Raises:
            UserError: there are checkpoints and none of them will do.
        """
        update = checkpoint.newest_whole(self.checkpoints, warn, self._lost_lines)
        for file in (self.metrics_file, self.evaluations_file):
            if file.exists():
                kept = [to_json(line) for line in whole_lines(file) if line["update"] <= (update or 0)]
                if update and not kept:
                    warn(f"{file} holds no line of the {update} updates that are done")
                write_text(file, "".join(f"{line}\n" for line in kept))
        return checkpoint.read_progress(self.checkpoints, update) if update else None

    def _lost_lines(self, progress: Progress) -> str | None:
        """Say which lines of what a checkpoint knows are missing; a file that was emptied is meant to be empty."""
        known = {self.metrics_file: range(1, progress.update + 1), self.evaluations_file: progress.evaluated}
        for file, updates in known.items():
            there = {line["update"] for line in whole_lines(file)}
            if there and (lost := ranges(sorted({*updates} - there))):
                return f"{file} has lost the lines of updates {lost}"
        return None

    def evaluations(self) -> list[dict[str, Any]]:
        """Read all evaluations, the base model's first (update 0)."""
        return read_lines(self.evaluations_file)

    def write_confirmation(self, record: Mapping[str, Any]) -> None:
        """Write confirmation.json, whole or not at all."""
        write_json(self.confirmation_file, record)

    def confirmation(self) -> dict[str, Any] | None:
        """Read the evaluation of the best checkpoint on noise that selected nothing, where there is one."""
        try:
            record = read_object(self.confirmation_file)
        except UserError:
            return None
        whole = not mistake(Scored, record)
        return record if whole and record["update"] == selected(self.evaluations()) else None

    def result(self) -> dict[str, Any]:
        """Return what a run has come to: its confirmation, or else its last evaluation."""
        return self.confirmation() or self.evaluations()[-1]

    def _has_lines(self) -> bool:
        """Whether something was evaluated, and so begun."""
        return bool(whole_lines(self.evaluations_file))

    def choose_checkpoint(self, update: int | None, warn: Callable[[str], None]) -> int:
        """`update` itself; without one, that of the best held-out reward, or the newest where none beat the base.

        Raises:
            UserError: there is no checkpoint of it, it is damaged, or a watch has fired before there was a best one.
        """
        evaluations = self.evaluations()
        improved = any(line.get("best") and line["update"] for line in evaluations)
        fallen = evaluations[-1].get("watch") if evaluations else None
        if update is None and fallen and not improved:
            raise UserError(
                f"{self.path} has no good checkpoint, since {fallen}; name an update (--checkpoint) to take one "
                "all the same"
            )
        return checkpoint.choose(self.checkpoints, update, warn)


def _digest(prompts: Sequence[Prompt], images: bool) -> str:
    rows = [
        [prompt.text, {name: _content(name, value, images) for name, value in prompt.columns.items()}]
        for prompt in prompts
    ]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def _content(name: str, value: Any, images: bool) -> Any:
    """Return a column's value; of an image what is in it, not where it lies."""
    if isinstance(value, Image.Image) or (images and name in IMAGE_COLUMNS):
        return hashlib.sha256(image_bytes(value)).hexdigest()
    return Path(value).name if name in IMAGE_COLUMNS and isinstance(value, str) else value


def _environment(world: World) -> dict[str, Any]:
    packages = ("torch", "diffusers", "transformers", "peft", "numpy")
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": world.device_name,
        "processes": world.size,
        "threads": torch.get_num_threads(),
        "flashgrpo": metadata.version("flash-grpo"),
        **{name: metadata.version(name) for name in packages},
    }

"""The rewards of a run, computed concurrently with each other and with whatever goes on meanwhile.

Each reward has one thread of its own, which takes the batches in the order in which they were drawn. So a reward is
never called twice at once, and nothing about the result depends on timing.
"""

import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from flashgrpo.distributed.world import World, current_device, use_in_thread
from flashgrpo.errors import UserError, first_line, suggest
from flashgrpo.prompts import columns_of
from flashgrpo.scoring.inputs import Input, LatentVideos, Pixels
from flashgrpo.scoring.loading import (
    bind,
    check_arguments,
    check_columns,
    checked_values,
    declared,
    load_reward,
    makes_reward,
    takes_of,
)
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.types import Latents, PlantedPair, Prompt, Reward, RewardTable, Videos
from flashgrpo.video import write_mp4

Columns = Mapping[str, Sequence[float]]  # component -> a value for each video


class Rewards:
    """The rewards of a run, by name: what each looks at, its weight, and the thread that computes it.

    Args:
        fps: frames a second of the videos.
    """

    def __init__(self, configs: Mapping[str, RewardConfig], fps: float = 16.0) -> None:
        self.configs = dict(configs)
        self.fps = fps
        self._found = {name: load_reward(config.call, f"rewards.{name}.call") for name, config in configs.items()}
        for name, config in configs.items():
            check_arguments(self._found[name], config.args, f"rewards.{name}.args")
        self._rewards: dict[str, Reward] = {}
        self._takes: dict[str, Input] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._failed: dict[str, BaseException] = {}

    def check_columns(self, prompt: Prompt, key: str) -> None:
        """Whether every reward takes the columns of a prompt file.

        Raises:
            UserError: one does not, or has one of them fixed by its `args`; `key` is the setting that names the file.
        """
        for name, found in self._found.items():
            args = self.configs[name].args
            fixed = [column for column in prompt.columns if column in args and not makes_reward(found)]
            if fixed:
                raise UserError(f"rewards.{name}.args: {fixed[0]!r} is a column of {key} as well; rename one of them")
            try:
                check_columns(found, args, prompt.columns)
            except TypeError as error:
                raise UserError(
                    f"rewards.{name}: the function cannot take the columns of {key} ({first_line(error)}); "
                    "give it a **columns parameter"
                ) from error

    def check_guards(self, heldout: int) -> None:
        """Whether so many held-out prompts are enough for the intervals of rewards that may end a run.

        Raises:
            UserError: they are not.
        """
        for name, config in self.configs.items():
            if config.max_fall is not None and heldout < 2:
                raise UserError(f"rewards.{name}.max_fall: an interval needs at least two held-out prompts")

    def check_channels(self, channels: Sequence[str]) -> None:
        """Whether every reward is credited to a channel that the model has.

        Raises:
            UserError: one is not.
        """
        for name, config in self.configs.items():
            if config.channel not in channels:
                raise UserError(
                    f"rewards.{name}.channel: this model has no channel {config.channel!r}; "
                    f"{suggest(config.channel, channels)}"
                )

    def load(self, world: World) -> None:
        """Load what the rewards need, on the ranks that score, before anything is drawn; all learn what each takes.

        Raises:
            SharedError: something is not there, on any of them.
        """
        kinds: TypeAdapter[Input] = TypeAdapter(Input)

        def load() -> dict[str, Any] | None:
            return {name: asdict(self.takes(name)) for name in self.configs} if world.scores else None

        takes = next(takes for takes in world.on_all(load) if takes)
        self._takes = {name: kinds.validate_python(value) for name, value in takes.items()}

    def reward(self, name: str) -> Reward:
        """The reward, which is loaded when it is first asked for."""
        if name not in self._rewards:
            self._rewards[name] = bind(self._found[name], self.configs[name].args, f"rewards.{name}.args")
        return self._rewards[name]

    def takes(self, name: str) -> Input:
        """What the reward is handed: as the recipe says, or as it says itself."""
        if name not in self._takes:
            self._takes[name] = self.configs[name].input or takes_of(self.reward(name))
        return self._takes[name]

    def names(self, watched: bool) -> list[str]:
        """Those that are trained on, and where `watched` those that are not."""
        return [name for name, config in self.configs.items() if watched or not config.watched]

    def begin(self) -> dict[str, int]:
        """Other samples are to be scored: forget that a reward has failed. Returns `failures` so far."""
        self._failed.clear()
        return self.failures()

    def failures(self) -> dict[str, int]:
        """Reward -> attempts that failed and were repeated, as far as it counts them (an attribute `failures`)."""
        return {name: int(declared(reward, "failures", 0)) for name, reward in self._rewards.items()}

    def planted_pairs(self) -> dict[str, PlantedPair]:
        """Reward -> the pair of videos that it declares in an attribute `planted_pair`, where it does."""
        pairs = {name: declared(self.reward(name), "planted_pair") for name in self.configs}
        made = {name: pair() if callable(pair) else pair for name, pair in pairs.items() if pair is not None}
        return {name: pair for name, pair in made.items() if not isinstance(self.takes(name), LatentVideos)}

    def submit(self, batch: "Batch", names: Sequence[str]) -> dict[str, "Future[Columns]"]:
        """Have the batch scored by these rewards; each takes it when it is done with those before."""
        batch.wanted_by(len(names))
        return {name: self._thread(name).submit(self._score, name, self.reward(name), batch) for name in names}

    def score(self, videos: Videos, prompts: Sequence[Prompt], watched: bool, only: str | None = None) -> RewardTable:
        """Score videos (B, F, 3, H, W) against B prompts; watched rewards only where asked for.

        Raises:
            UserError: a reward returned the wrong number of values or one that is not finite, or raised ValueError.
        """
        names = [only] if only else self.names(watched)
        self.begin()
        for name in names:
            self.takes(name)  # loads it, in this thread
        futures = self.submit(Batch(prompts, self.fps, videos), names)
        return self.table({name: [future] for name, future in futures.items()})

    def table(
        self, futures: Mapping[str, Sequence["Future[Columns]"]], before: Mapping[str, int] | None = None
    ) -> RewardTable:
        """Wait for the results of each reward, batch after batch, and put them into one table.

        A reward that returns a mapping becomes several components `reward.component`, which share its weight.

        Args:
            before: `failures` when it was begun, which are not counted.

        Raises:
            UserError: a reward has failed, or its components are not the same for all batches.
        """
        components: list[tuple[str, list[float], float, str]] = []
        for name, batches in futures.items():
            results = [future.result() for future in batches]
            if any(list(result) != list(results[0]) for result in results):
                raise UserError(f"reward {name} returned {list(results[0])} for some videos and others for the rest")
            config = self.configs[name]
            weight = 0.0 if config.watched else config.weight / len(results[0])
            for part in results[0]:
                label = f"{name}.{part}" if part else name
                components.append(
                    (label, [value for result in results for value in result[part]], weight, config.channel)
                )
        return RewardTable(
            names=tuple(label for label, *_ in components),
            values=torch.tensor([values for _, values, _, _ in components], dtype=torch.float64).T.contiguous(),
            weights=torch.tensor([weight for _, _, weight, _ in components], dtype=torch.float64),
            failures={name: self.failures()[name] - (before or {}).get(name, 0) for name in futures},
            channels=tuple(channel for *_, channel in components),
        )

    def close(self) -> None:
        """Let go of what was not begun."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)
        self._threads.clear()

    def _thread(self, name: str) -> ThreadPoolExecutor:
        if name not in self._threads:
            alike = (torch.get_num_threads(), current_device())  # settings of each thread
            self._threads[name] = ThreadPoolExecutor(1, f"reward-{name}", use_in_thread, alike)
        return self._threads[name]

    @torch.no_grad()  # gradient mode belongs to a thread, so the caller's does not reach here
    def _score(self, name: str, reward: Reward, batch: "Batch") -> Columns:
        try:
            if name in self._failed:  # the samples cannot all be scored any more, so it need not be waited for again
                raise self._failed[name]
            return checked_values(batch.scored_by(name, reward, self.takes(name)), len(batch.prompts), f"reward {name}")
        except UserError as error:
            self._failed[name] = error
            raise
        except ValueError as error:
            self._failed[name] = UserError(str(error))
            raise self._failed[name] from error
        finally:
            batch.done()


class Batch:
    """Samples that were drawn together, in each form that a reward takes; a form is made once, when first asked for.

    Args:
        videos: (B, F, 3, H, W) on the CPU; None where no reward asks for what is decoded.
        latents: (B, C, F, H, W); None where no reward asks for them.
    """

    def __init__(
        self, prompts: Sequence[Prompt], fps: float, videos: Videos | None = None, latents: Latents | None = None
    ) -> None:
        self.prompts = prompts
        self._fps, self._videos, self._latents = fps, videos, latents
        self._forms: dict[Input, Any] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()
        self._left = 0

    def wanted_by(self, count: int) -> None:
        """So many rewards will score it."""
        self._left = count

    def done(self) -> None:
        """One of them has; after the last nothing of the batch is kept."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._forms.clear()
                self._videos = self._latents = None
                if self._folder is not None:
                    self._folder.cleanup()

    def scored_by(self, name: str, reward: Reward, takes: Input) -> Any:
        """What the reward returns for this batch.

        Raises:
            UserError: it refused its input, or changed it.
        """
        given = self._form(takes)
        version = given._version if isinstance(given, Tensor) else 0
        texts, columns = [prompt.text for prompt in self.prompts], columns_of(self.prompts)
        try:
            values = reward(given, texts, **columns)
        except UserError as error:
            raise UserError(f"reward {name}: {error}") from error
        except ValueError as error:  # what a reward raises to refuse its input; any other keeps its trace, being a bug
            raise UserError(f"reward {name} refused its input: {first_line(error)}") from error
        if isinstance(given, Tensor) and given._version != version:
            raise UserError(f"reward {name} changed the videos in place, which others read too; work on a copy")
        return values

    def _form(self, takes: Input) -> Any:
        with self._lock:
            if takes not in self._forms:
                self._forms[takes] = self._make(takes)
            return self._forms[takes]

    def _make(self, takes: Input) -> Any:
        if isinstance(takes, LatentVideos):
            assert self._latents is not None
            return self._latents.float().cpu()
        assert self._videos is not None
        if isinstance(takes, Pixels):
            return takes.prepare(self._videos, self._fps)
        self._folder = tempfile.TemporaryDirectory(prefix="flashgrpo-videos-")
        paths = [Path(self._folder.name) / f"{row:04d}.mp4" for row in range(len(self.prompts))]
        for path, video in zip(paths, self._videos, strict=True):
            write_mp4(path, video, self._fps)
        return [str(path) for path in paths]

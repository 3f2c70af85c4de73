"""The rewards of a run, computed concurrently with each other and with whatever is computed meanwhile.

Each reward has one thread of its own, which takes the batches in the order in which they were drawn. So a reward is
never called twice at once, and nothing about the result depends on timing.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from pydantic import TypeAdapter

from flashgrpo.distributed.world import World, current_device, use_in_thread
from flashgrpo.errors import SharedError, UserError, first_line
from flashgrpo.scoring.batch import Batch, Columns
from flashgrpo.scoring.clips import ClipBatch
from flashgrpo.scoring.inputs import Input, LatentVideos
from flashgrpo.scoring.loading import (
    bind,
    check_arguments,
    check_columns,
    declared,
    load_reward,
    makes_reward,
    takes_of,
)
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.types import WHOLE, Media, PlantedPair, Prompt, Reward, RewardTable

FEWEST_GUARDED = 8  # held-out prompts: of fewer, what they have in common by chance would end runs
HEARD = ("audio", "sample_rate")
"""Keywords of a reward that hears: waves (B, channels, samples) in [-1, 1], float32 on the CPU, and their rate."""
Results = Mapping[str, Any]
"""{"values": reward -> component -> a value for each sample, "failures": reward -> count}, as JSON."""


class Rewards:
    """The rewards of a run, by name: what each looks at, its weight, and the thread that computes it.

    Args:
        fps: frames a second of the videos.
    """

    def __init__(self, configs: Mapping[str, RewardConfig], fps: float = 16.0) -> None:
        self.configs = dict(configs)
        self.fps = fps
        self.sample_rate: int | None = None  # of the model's sound; see `check_process`
        self._found = {name: load_reward(config.call, f"rewards.{name}.call") for name, config in configs.items()}
        for name, config in configs.items():
            check_arguments(self._found[name], config.args, f"rewards.{name}.args")
        self._rewards: dict[str, Reward] = {}
        self._takes: dict[str, Input] = {}
        self._compares: dict[str, bool] = {}
        self._watches: dict[str, tuple[str, ...]] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._failed: dict[str, BaseException] = {}
        self._components: dict[str, set[str]] = {}

    def check_columns(self, prompt: Prompt, key: str) -> None:
        """Whether every reward takes the columns of a prompt file.

        Raises:
            UserError: one does not, or has one of them fixed by its `args`; `key` is the setting that names the file.
        """
        for name, found in self._found.items():
            args, heard = self.configs[name].args, dict.fromkeys(HEARD if self.hears(name) else ())
            if taken := [column for column in prompt.columns if column in heard]:
                raise UserError(f"rewards.{name} hears, so that {taken[0]!r} is no column of {key}; rename it there")
            fixed = [column for column in prompt.columns if column in args and not makes_reward(found)]
            if fixed:
                raise UserError(f"rewards.{name}.args: {fixed[0]!r} is a column of {key} as well; rename one of them")
            try:
                check_columns(found, args, {**prompt.columns, **heard})
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"rewards.{name}: the function cannot take the columns of {key} ({first_line(error)}); "
                    "give it a **columns parameter"
                ) from error

    def check_guards(self, heldout: int) -> None:
        """Check that this number of held-out prompts is enough for the intervals of rewards that may end a run.

        Raises:
            UserError: they are not.
        """
        for name, config in self.configs.items():
            if config.max_fall is not None and heldout < FEWEST_GUARDED:
                raise UserError(
                    f"rewards.{name}.max_fall: an interval that may end a run needs at least {FEWEST_GUARDED} held-out "
                    f"prompts, not {heldout}; add some to prompts.heldout, or leave max_fall out"
                )

    def began_with(self, names: Iterable[str]) -> None:
        """Hold the rewards to the components that a run began with, by the names in its evaluations.

        Another version of a reward's code, or another server behind its address, may have others.
        """
        for reward in self.configs:
            own = [name for name in names if name == reward or name.startswith(f"{reward}.")]
            if own:
                self._components[reward] = {name[len(reward) + 1 :] for name in own}

    def hears(self, name: str) -> bool:
        """Whether the reward is handed the sound of videos (its `hears`)."""
        return bool(declared(self._found[name], "hears", False))

    def view(self, name: str) -> str:
        """Return what of a sample the reward looks at."""
        return self.configs[name].looks_at

    def load(self, world: World) -> None:
        """Load what the rewards need, on the ranks that score, before anything is drawn; all learn what each takes.

        Raises:
            SharedError: something is not there, on any of them.
        """
        kinds: TypeAdapter[Input] = TypeAdapter(Input)

        def load() -> dict[str, Any] | None:
            every = self.configs if world.scores else ()
            return {name: [asdict(self.takes(name)), self.compares(name), self.watches(name)] for name in every} or None

        said = next(said for said in world.on_all(load) if said)
        self._takes = {name: kinds.validate_python(takes) for name, (takes, _, _) in said.items()}
        self._compares = {name: compares for name, (_, compares, _) in said.items()}
        self._watches = {name: tuple(watches) for name, (_, _, watches) in said.items()}
        for name, value in self._takes.items():
            if isinstance(value, LatentVideos) and self.view(name) != WHOLE:
                raise UserError(f"rewards.{name}.looks_at: latents are handed over whole; leave looks_at out")
            if self.compares(name) and self.view(name) != WHOLE:
                raise UserError(f"rewards.{name}.looks_at: whole samples are what this reward compares; leave it out")
            if self.compares(name) and world.reward_ranks:
                raise UserError(
                    f"parallel.reward_ranks: they get parts of groups, and rewards.{name} compares whole ones"
                )

    def reward(self, name: str) -> Reward:
        """Return the reward, which is loaded when it is first asked for."""
        if name not in self._rewards:
            self._rewards[name] = bind(self._found[name], self.configs[name].args, f"rewards.{name}.args")
        return self._rewards[name]

    def takes(self, name: str) -> Input:
        """Return what the reward is handed: as the recipe says, or as it says itself."""
        if name not in self._takes:
            self._takes[name] = self.configs[name].input or takes_of(self.reward(name))
        return self._takes[name]

    def compares(self, name: str) -> bool:
        """Whether the reward is called with all samples of one prompt group, or with one alone (its `compares`)."""
        if name not in self._compares:
            self._compares[name] = bool(declared(self.reward(name), "compares", False))
        return self._compares[name]

    def watches(self, name: str) -> tuple[str, ...]:
        """Return the components that tell of the reward and are never trained on (its `watches`)."""
        if name not in self._watches:
            self._watches[name] = tuple(declared(self.reward(name), "watches", ()))
        return self._watches[name]

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
        """Reward -> the pair of samples that it declares in an attribute `planted_pair`, where it does."""
        pairs = {name: declared(self.reward(name), "planted_pair") for name in self.configs}
        made = {name: pair() if callable(pair) else pair for name, pair in pairs.items() if pair is not None}
        latents = [name for name in made if isinstance(self.takes(name), LatentVideos)]
        return {name: pair for name, pair in made.items() if name not in latents and not self.hears(name)}

    def submit(self, batch: Batch | ClipBatch, names: Sequence[str]) -> dict[str, Future[Columns]]:
        """Have the batch scored by these rewards; each takes it when it is done with those before."""
        batch.wanted_by(len(names))
        return {name: self._thread(name).submit(self._score, name, self.reward(name), batch) for name in names}

    def score(self, media: Media, prompts: Sequence[Prompt], watched: bool, only: str | None = None) -> RewardTable:
        """Score videos (B, F, 3, H, W), or B texts, against B prompts; watched rewards only where asked for.

        Raises:
            UserError: a reward returned the wrong number of values or something else, or raised ValueError.
        """
        names = [only] if only else self.names(watched)
        self.begin()
        for name in names:
            self.takes(name)  # loads it, in this thread
        futures = self.submit(Batch(prompts, self.fps, media), names)
        return self.table([self.results({name: [future] for name, future in futures.items()}, {})])

    def results(self, futures: Mapping[str, Sequence[Future[Columns]]], before: Mapping[str, int]) -> Results:
        """Wait for the results of each reward, batch after batch.

        Args:
            before: `failures` when it was begun, which are not counted.

        Raises:
            UserError: a reward has failed, or its components are not the same for all batches.
        """
        values: dict[str, dict[str, list[float]]] = {}
        for name, batches in futures.items():
            batch, *others = [future.result() for future in batches]
            if any(other.keys() != batch.keys() for other in others):
                raise UserError(f"reward {name} returned {list(batch)} for some videos and others for the rest")
            values[name] = {part: [v for one in (batch, *others) for v in one[part]] for part in batch}
        failures = {name: count - before.get(name, 0) for name, count in self.failures().items() if name in futures}
        return {"values": values, "failures": failures}

    def table(self, ranks: Sequence[Results]) -> RewardTable:
        """Return the results of all ranks that have some, in the order of their samples, as one table.

        A reward that returns a mapping becomes several components `reward.component`, which share its weight but for
        those that it `watches`.

        Raises:
            SharedError: a reward has other components on one rank than on another.
        """
        components = [(name, part) for name, parts in ranks[0]["values"].items() for part in parts]
        if any([(n, part) for n, parts in r["values"].items() for part in parts] != components for r in ranks):
            raise SharedError(f"a reward's components differ from one process to another: {components}")
        for name, parts in ranks[0]["values"].items():
            before = self._components.setdefault(name, set(parts))
            if before != set(parts):
                raise SharedError(
                    f"reward {name} returned {_named(parts)}, and at first {_named(before)}; "
                    "a reward has to return the same ones each time"
                )
        configs = [self.configs[name] for name, _ in components]
        channels = [self._channel(name, part) for name, part in components]
        credited = [
            None if config.watched or part in self.watches(name) else (name, channel)
            for config, (name, part), channel in zip(configs, components, channels, strict=True)
        ]
        weights = [c.weight / credited.count(own) if own else 0.0 for c, own in zip(configs, credited, strict=True)]
        columns = [[v for rank in ranks for v in rank["values"][name][part]] for name, part in components]
        return RewardTable(
            names=tuple(f"{name}.{part}" if part else name for name, part in components),
            values=torch.tensor(columns, dtype=torch.float64).T.contiguous(),
            weights=torch.tensor(weights, dtype=torch.float64),
            failures={name: sum(rank["failures"].get(name, 0) for rank in ranks) for name in ranks[0]["values"]},
            channels=tuple(channels),
        )

    def _channel(self, name: str, component: str) -> str:
        channel = self.configs[name].channel_of(component)
        if channel is None:
            raise SharedError(
                f"rewards.{name}.channel: the reward returned the component {component!r}, which has no channel there; "
                "add it"
            )
        return channel

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
    def _score(self, name: str, reward: Reward, batch: Batch | ClipBatch) -> Columns:
        try:
            if name in self._failed:  # the samples cannot all be scored any more, so it need not be waited for again
                raise self._failed[name]
            return batch.values(name, reward, self.takes(name))
        except UserError as error:
            self._failed[name] = error
            raise
        except ValueError as error:
            self._failed[name] = UserError(str(error))
            raise self._failed[name] from error
        finally:
            batch.done()


def _named(components: Iterable[str]) -> str:
    """Say what a reward returned, by the names of its components; a number has none."""
    names = sorted(filter(None, components))
    return f"the components {', '.join(names)}" if names else "a number"

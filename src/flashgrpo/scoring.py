"""All rewards of a batch of videos, concurrently -> RewardTable."""

import importlib
import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from flashgrpo.distributed import Team, current_device, use_in_thread
from flashgrpo.errors import SharedError, UserError
from flashgrpo.explain import first_line, suggest
from flashgrpo.prompts import columns_of
from flashgrpo.settings import RewardConfig
from flashgrpo.shares import overlap
from flashgrpo.types import PlantedPair, Prompt, Reward, RewardTable, Videos


class Rewards:
    """The rewards of a run, by name, with their weights."""

    def __init__(self, configs: Mapping[str, RewardConfig]) -> None:
        self.configs = dict(configs)
        self._calls = {name: _bind(name, config) for name, config in configs.items()}

    def check_columns(self, prompt: Prompt, key: str) -> None:
        """Whether every reward takes the columns of a prompt file.

        Raises:
            UserError: one does not, or has one of them fixed by its `args`; `key` is the setting that names the file.
        """
        for name, call in self._calls.items():
            fixed = [column for column in prompt.columns if column in self.configs[name].args]
            if fixed:
                raise UserError(f"rewards.{name}.args: {fixed[0]!r} is a column of {key} as well; rename one of them")
            try:
                inspect.signature(call).bind([], [], **prompt.columns)
            except TypeError as error:
                raise UserError(
                    f"rewards.{name}: the function cannot take the columns of {key} ({first_line(error)}); "
                    "give it a **columns parameter"
                ) from error

    def planted_pairs(self) -> dict[str, PlantedPair]:
        """Reward -> the pair of videos that its function declares in an attribute `planted_pair`, where it does."""
        declared = {name: getattr(call.func, "planted_pair", None) for name, call in self._calls.items()}
        return {name: pair() if callable(pair) else pair for name, pair in declared.items() if pair is not None}

    @torch.no_grad()
    def score(self, videos: Videos, prompts: Sequence[Prompt], watched: bool, only: str | None = None) -> RewardTable:
        """Score videos (B, F, 3, H, W) against B prompts; watched rewards only where asked for.

        A reward that returns a mapping becomes several components `reward.component`, which share its weight.

        Raises:
            UserError: a reward returned the wrong number of values or one that is not finite, or raised ValueError.
        """
        names = [only] if only else [name for name, config in self.configs.items() if watched or not config.watched]
        texts, columns = [prompt.text for prompt in prompts], columns_of(prompts)
        version = videos._version
        alike = (torch.get_num_threads(), current_device())  # settings of each thread
        with ThreadPoolExecutor(len(names), initializer=use_in_thread, initargs=alike) as pool:
            futures = [pool.submit(_call, name, self._calls[name], videos, texts, columns) for name in names]
            returned = [future.result() for future in futures]
        if videos._version != version:
            raise UserError("a reward changed the videos in place, which others read at the same time; work on a copy")
        components: list[tuple[str, Tensor, float]] = []
        for name, values in zip(names, returned, strict=True):
            config = self.configs[name]
            parts = values if isinstance(values, Mapping) else {"": values}
            if not parts:
                raise UserError(f"reward {name} returned an empty mapping for {len(texts)} videos")
            weight = 0.0 if config.watched else config.weight / len(parts)
            for part, numbers in parts.items():
                label = f"{name}.{part}" if part else name
                components.append((label, _column(label, numbers, len(texts)), weight))
        return RewardTable(
            names=tuple(label for label, _, _ in components),
            values=torch.stack([column for _, column, _ in components], dim=1),
            weights=torch.tensor([weight for _, _, weight in components], dtype=torch.float64),
        )


def score_all(team: Team, rewards: Rewards, videos: Videos, prompts: Sequence[Prompt], watched: bool) -> RewardTable:
    """The table of all ranks' videos in the order of the samples, the same on every rank.

    Args:
        videos: those of this rank's share of the samples.
        prompts: of all samples.

    Raises:
        SharedError: as `Rewards.score`, on every rank.
    """
    rows = team.scored_by(len(prompts), team.rank)
    videos = hand_over(team, videos, len(prompts))

    def score() -> dict[str, Any] | None:
        if not rows:
            return None
        table = rewards.score(videos, prompts[rows.start : rows.stop], watched)
        return {"names": table.names, "values": table.values.tolist(), "weights": table.weights.tolist()}

    tables = [table for table in team.agree(score) if table]
    if any(tuple(table["names"]) != tuple(tables[0]["names"]) for table in tables):
        raise SharedError(f"a reward's components differ from one process to another: {tables[0]['names']}")
    return RewardTable(
        names=tuple(tables[0]["names"]),
        values=torch.tensor([row for table in tables for row in table["values"]], dtype=torch.float64),
        weights=torch.tensor(tables[0]["weights"], dtype=torch.float64),
    )


def hand_over(team: Team, rows: Tensor, total: int) -> Tensor:
    """From the rows of this rank's share of `total` samples, to those that it has to score; (B, ...)."""
    if not team.reward_ranks:
        return rows
    shape = next(shape for shape in team.exchange(list(rows.shape[1:]) if len(rows) else None) if shape)
    wanted, have = team.scored_by(total, team.rank), team.share(total)
    received = torch.empty(len(wanted), *shape)
    transfers, sent = [], []
    for other in range(team.size):
        theirs = team.share(total, other)
        if other % team.context == 0 and (both := overlap(theirs, wanted)):
            into = received[both.start - wanted.start : both.stop - wanted.start]
            if other == team.rank:
                into.copy_(rows[both.start - have.start : both.stop - have.start])
            else:
                transfers.append(dist.irecv(into, other, team.talk))
        both = overlap(have, team.scored_by(total, other))
        if both and team.rank % team.context == 0 and other != team.rank:
            sent.append(rows[both.start - have.start : both.stop - have.start].float().cpu().contiguous())
            transfers.append(dist.isend(sent[-1], other, team.talk))
    for transfer in filter(None, transfers):
        transfer.wait()
    return received


def load_reward(call: str, key: str) -> Reward:
    """Import `package.module:function` or `path/to/file.py:function`.

    Raises:
        UserError: no such module, file or function; the sentence starts with `key`.
    """
    module_name, colon, function = call.rpartition(":")
    if not colon or not module_name or not function:
        raise UserError(f"{key}: {call!r} must have the form package.module:function or path/to/file.py:function")
    try:
        if module_name.endswith(".py"):
            module = _load_file(Path(module_name), key)
        else:
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{key}: {module_name} cannot be imported: {first_line(error)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{key}: {module_name} has no function {function!r}; {suggest(function, public)}")
    return cast(Reward, found)


def _bind(name: str, config: RewardConfig) -> Any:
    """The callable with its fixed arguments, which have to be named parameters: `**columns` would swallow others."""
    call = load_reward(config.call, f"rewards.{name}.call")
    named = {p.name for p in inspect.signature(call).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    for argument in config.args:
        if argument not in named:
            raise UserError(
                f"rewards.{name}.args: the function has no parameter {argument!r}; {suggest(argument, named)}"
            )
    return partial(call, **config.args)


def _load_file(path: Path, key: str) -> Any:
    if not path.is_file():
        raise UserError(f"{key}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"flashgrpo_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()  # gradient mode belongs to a thread, so the caller's does not reach here
def _call(name: str, call: Any, videos: Videos, texts: list[str], columns: dict[str, list[Any]]) -> Any:
    try:
        return call(videos, texts, **columns)
    except ValueError as error:  # what a reward raises to refuse its input; anything else is a bug and keeps its trace
        raise UserError(f"reward {name} refused its input: {first_line(error)}") from error


def _column(label: str, values: Any, count: int) -> Tensor:
    """Check what a reward returned: `count` finite numbers, as float64."""
    try:
        column = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"reward {label} must return {count} numbers, not {type(values).__name__}") from error
    if column.shape != (count,):
        raise UserError(
            f"reward {label} returned shape {tuple(column.shape)} for {count} videos; it must be ({count},)"
        )
    if not torch.isfinite(column).all():
        bad = int((~torch.isfinite(column)).nonzero()[0])
        raise UserError(f"reward {label} returned {float(column[bad])} for video {bad}; rewards must be finite")
    return column

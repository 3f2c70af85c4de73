"""Lines of metrics.jsonl and evaluations.jsonl: what kind each entry has, and readers that take no other kind."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashgrpo.errors import UserError
from flashgrpo.files import read_text
from flashgrpo.formats import FLOAT32
from flashgrpo.jsontext import json_lines
from flashgrpo.settings import MANY

Real = Annotated[float, Field(ge=-FLOAT32, le=FLOAT32)]
Number = Real | None
"""Of JSON: None is what was not finite."""
Numbers = dict[str, Number]
Interval = Annotated[list[Real], Field(min_length=2, max_length=2)]


class Entries(BaseModel):
    """What a JSON object has, beside what else it may have."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Line(Entries):
    update: int = Field(ge=0, le=MANY)


class Forwards(Entries):
    """What an update computed, in forwards of the network."""

    rollout: int
    update: int


class Update(_Line):
    """A line of metrics.jsonl; it may have more entries, and an older one fewer."""

    reward: Number = None
    rewards: Numbers = {}
    compute: Forwards = Forwards(rollout=0, update=0)
    seconds: dict[str, Real] = {}
    samples_per_second: Number = None
    peak_gib: Number = None
    samples: int = 0
    grad_norm: Number = None
    grad_norm_by_step: Numbers | None = None
    skipped_steps: int = 0
    dropped_groups: int = 0


class Sample(Entries):
    """A video of an evaluation, under both models."""

    prompt: str = ""
    reward: Number
    base_reward: Number
    rewards: Numbers
    watched: Numbers
    base_rewards: Numbers = {}
    base_watched: Numbers = {}


class Scored(_Line):
    """confirmation.json: an evaluation that selected nothing."""

    reward: Real
    rewards: dict[str, Real]
    watched: dict[str, Real]
    base_reward: Real
    base_rewards: dict[str, Real] = {}
    base_watched: dict[str, Real]
    difference: Real
    interval: Interval | None
    watched_intervals: dict[str, Interval | None]
    samples: list[Sample] = Field(min_length=1)
    trained_on: int = 0


class Evaluation(Scored):
    """A line of evaluations.jsonl; it may have more entries."""

    best: bool
    watch: str | None = None


class Environment(Entries):
    """environment.json: where a run began, and with what."""

    prompts: dict[str, str] = {}
    model: str | None = None


OF_THE_MACHINE = ("seconds", "samples_per_second", "peak_gib")
"""Entries of a metrics line that say how fast and in what memory; all others are the same wherever a run is done."""
KINDS: Mapping[str, type[BaseModel]] = {"metrics.jsonl": Update, "evaluations.jsonl": Evaluation}


def read_lines(file: Path, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read the whole lines of a .jsonl file; what a kill left of a last line is passed over.

    Args:
        needs: entries that the reader cannot do without.

    Raises:
        UserError: a line is none that a run writes.
    """
    lines = []
    for number, value in _json_lines(file):
        lacking = [name for name in needs if name not in value] if isinstance(value, dict) else []
        if wrong := f"{lacking[0]} is missing" if lacking else mistake(KINDS[file.name], value):
            raise UserError(_changed(file, number, wrong))
        lines.append(value)
    return lines


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """Read the lines before the first that is none that a run writes: what a power cut leaves may hold anything.

    Raises:
        UserError: there are whole lines after it, so that it was no power cut.
    """
    read = list(_json_lines(file))
    wrong = [mistake(KINDS[file.name], value) for _, value in read]
    whole = next((place for place, said in enumerate(wrong) if said), len(read))
    if not all(wrong[whole:]):
        raise UserError(_changed(file, read[whole][0], wrong[whole]))
    return [value for _, value in read[:whole]]


def _changed(file: Path, number: int, wrong: str | None) -> str:
    return f"{file} line {number} is no line that a run writes ({wrong}): something else changed it"


def mistake(kind: type[BaseModel], value: Any) -> str | None:
    """Say what of a value is not as a kind of line has it, if anything."""
    if isinstance(value, ValueError):
        return f"no JSON, {value}"
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, said = ".".join(map(str, first["loc"])), first["msg"]
        return f"{place}: {said[:1].lower()}{said[1:]}" if place else "no object"
    return None


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    if file.exists():
        yield from json_lines(read_text(file).rpartition("\n")[0])


def ranges(numbers: Iterable[int]) -> str:
    """Write rising numbers in short: '3, 7 to 12'."""
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)

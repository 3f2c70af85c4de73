"""From the calls of runs to the record of an update."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.process import Record
from flashgrpo.processes.programs.model import LanguageModel
from flashgrpo.processes.programs.phases import Cut, phase_of_tokens
from flashgrpo.processes.programs.settings import CallTokens
from flashgrpo.processes.programs.state import ProgramState
from flashgrpo.processes.programs.writing import Written
from flashgrpo.seeds import keyed_bits
from flashgrpo.types import to_device


@dataclass(frozen=True)
class Made:
    """A call that a run has made: the `number`-th of its module there, from 0, with the tokens of its input."""

    sample: int
    module: str
    number: int
    slot: int
    prompt: Sequence[int]
    written: Written


@dataclass(frozen=True)
class Calls:
    """The calls of some runs, by run, then in their order, and how they are judged: in how many phases, cut where."""

    made: Sequence[Made]
    phases: int
    cut: Cut
    score: CallTokens


def key_of(group: int, module: str, number: int, channel: int) -> int:
    """Return what the terms of (group, module, k-th call, phase) are compared by: alike on every rank, below 2^43."""
    return (group << 23) | (keyed_bits("call", module, number, channel) >> 41)


def record_of(calls: Calls, groups: Sequence[int], model: LanguageModel, world: World) -> Record:
    """Record calls, whose samples have these groups; the slot of a unit is that of its call."""
    made, score = calls.made, calls.score
    phases = [_phases(call.written, calls, model) for call in made]
    state = ProgramState.of([m.prompt for m in made], [m.written for m in made], phases, model.width, model.length)
    slot = torch.tensor([call.slot for call in made], dtype=torch.int64)
    numbers = calls.phases
    keys = [[key_of(groups[m.sample], m.module, m.number, phase) for phase in range(numbers)] for m in made]
    key = torch.tensor(keys, dtype=torch.int64).view(-1, numbers)
    sample = torch.tensor([call.sample for call in made], dtype=torch.int64)
    if score.term == "token":
        unit, place = state.is_drawn.nonzero().T
        channel = state.phase[unit, place]
    else:
        unit, channel = state.tokens_of(numbers).nonzero().T
    weight = to_device(_weights(state, score, world)[unit], model.device)
    return Record(slot, unit, sample[unit], key[unit, channel], channel, weight, None, state)


def _phases(written: Written, calls: Calls, model: LanguageModel) -> list[int]:
    if calls.phases < 2:
        return [0] * len(written.ids)
    ends = list(accumulate((len(model.text(written.ids[: n + 1])) for n in range(len(written.ids))), max))
    return phase_of_tokens(ends, calls.cut(model.text(written.ids)))


def _weights(state: ProgramState, score: CallTokens, world: World) -> Float32[Tensor, " units"]:
    """Return the factor of each unit's tokens, such that the mean over all tokens is what `score.length` says.

    With the mean number of tokens n of the update's calls, on all ranks, those of a completion of m tokens get n / m
    ("sequence") or n / L ("maximum").
    """
    if score.term == "phase" or score.length == "tokens":
        return torch.ones(len(state))
    counts: list[list[int]] = world.gather([int(state.drawn.sum()), len(state)])
    tokens, units = (sum(of_rank[i] for of_rank in counts) for i in range(2))
    each: Int64[Tensor, " units"] = (
        state.drawn if score.length == "sequence" else torch.full_like(state.drawn, state.length)
    )
    return (tokens / max(units, 1)) / each.float()

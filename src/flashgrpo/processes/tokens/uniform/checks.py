"""What the doctor has to know of uniform tokens: the first step moves, samples can be told from noise where trained."""

from typing import TYPE_CHECKING

import torch

from flashgrpo.process import Finding, Record
from flashgrpo.processes.tokens.uniform.path import MetricPath
from flashgrpo.processes.tokens.uniform.state import TokensState

if TYPE_CHECKING:
    from flashgrpo.processes.tokens.uniform.process import UniformTokensProcess


def uniform_checks(process: "UniformTokensProcess", record: Record, thorough: bool) -> list[Finding]:
    """All of them, on samples that `draw` has drawn."""
    quick = [first_step(process), clean_share(process, record)]
    return [*quick, rounding(process, record)] if thorough else quick


def first_step(process: "UniformTokensProcess") -> Finding:
    """A sampler that takes the rate at the beginning of a step never moves at the first of a metric path."""
    steps = process.rollout.num_steps
    if isinstance(process.path, MetricPath) and process.rollout.jumps == "derivative":
        sentence = f"the first of {steps} steps moves no token, as in URSA; rollout.jumps=difference makes use of it"
        return Finding("first step", "warning", sentence)
    return Finding("first step", "sound", f"tokens move at all of {steps} steps")


def clean_share(process: "UniformTokensProcess", record: Record) -> Finding:
    """Return how many tokens the network is shown, where it is trained, that are those of the finished sample."""
    state: TokensState = record.state  # type: ignore[assignment]
    if process.score.action == "guess":
        return Finding("trained states", "sound", "the guesses of the sampler are scored", {"clean": None})
    clean = float((state.x == state.action).double().mean()) if len(state) else 0.0
    times = sorted({process.times[k] for k in state.k.tolist()})
    of = f"at times {times[0]:.2g} to {times[-1]:.2g} " if times else ""
    sentence = f"{of}{clean:.1%} of the tokens that the network is shown are those of the finished sample"
    return Finding("trained states", "sound", sentence, {"clean": clean, "times": times})


def rounding(process: "UniformTokensProcess", record: Record) -> Finding:
    """Return how far ratios would be from 1 if replays were cut into other batches than rollouts."""
    floor = noise_floor(process, record)
    if floor is None:
        return Finding("rounding", "sound", "not measured where ranks hold the network between them", {"floor": None})
    sentence = f"if replays were cut in other batches, ratios would be off by {floor:.1g}; they are not"
    return Finding("rounding", "sound", sentence, {"floor": floor})


@torch.no_grad()
def noise_floor(process: "UniformTokensProcess", record: Record) -> float | None:
    """Return the largest |ratio - 1| between forwards of one row each and one forward of all rows."""
    if process.world.uses_fsdp or not len(record):
        return None
    state: TokensState = record.state[torch.arange(min(len(record), process.micro_batch))]  # type: ignore[assignment]
    singly = torch.cat([process.unfilled(state[row]) for row in torch.arange(len(state)).split(1)])
    return float(torch.expm1(process.unfilled(state) - singly).abs().max())

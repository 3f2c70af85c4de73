"""The only denoising loop: walks along the sigma grid, a micro-batch at a time.

The samples of a micro-batch share one pattern of stochastic steps, so that a walk is a plain solver loop.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.process import OnDrawn
from flashgrpo.processes.calls import fixed_batches, number_of_calls
from flashgrpo.processes.flow.model import VideoModel
from flashgrpo.processes.flow.network import GuidedNetwork
from flashgrpo.processes.flow.shortcuts import DeterministicSteps, Features, visited
from flashgrpo.processes.flow.steps import StepMask
from flashgrpo.seeds import Name, normal
from flashgrpo.types import Condition, Latents, index_rows, to_device

Around = Callable[[], AbstractContextManager[bool | None]]


@dataclass(frozen=True)
class MicroBatch:
    """Samples that are denoised together, all of one pattern of stochastic steps.

    Args:
        rows: their numbers among this rank's samples.
        points: of the grid, at which they stop, rising.
        stochastic, trained: which of the points are.
    """

    rows: Int64[Tensor, " batch"]
    points: Sequence[int]
    stochastic: frozenset[int] = frozenset()
    trained: frozenset[int] = frozenset()


def plan(stochastic: StepMask, trained: StepMask, steps: int | None, size: int) -> list[MicroBatch]:
    """Cut samples into micro-batches of at most `size` and of one pattern each, in the order of their first samples.

    Args:
        stochastic, trained: (B, N).
        steps: points of the grid at which a walk stops besides its stochastic steps; see `visited`.

    Example: 4 samples with the stochastic steps 2, 2, 0, 2 and size 2 are the micro-batches [0, 1], [3] and [2].
    """
    batches = []
    patterns = torch.cat([stochastic, trained], dim=1).tolist()
    groups: dict[tuple[bool, ...], list[int]] = {}
    for row, pattern in enumerate(patterns):
        groups.setdefault(tuple(pattern), []).append(row)
    points = visited(stochastic, steps)
    for members in groups.values():
        first = members[0]
        walk, acts, learns = ([int(k) for k in mask[first].nonzero()] for mask in (points, stochastic, trained))
        for rows in torch.tensor(members).split(size):
            batches.append(MicroBatch(rows, walk, frozenset(acts), frozenset(learns)))
    return batches


@runtime_checkable
class Act(Protocol):
    """Makes the stochastic steps of a micro-batch."""

    @property
    def condition(self) -> Condition:
        """Of each sample."""
        ...

    def __call__(self, k: int, x: Latents) -> Latents:
        """x_{k+1} of x_k."""
        ...


@dataclass(frozen=True)
class Start:
    """Where the walk of a micro-batch begins.

    Args:
        x, condition: a row for each group of samples that are the same until their first stochastic step.
        of: (B,) the row of each sample.
        act: makes the stochastic steps; None where there are none.
    """

    x: Latents
    condition: Condition
    of: Int64[Tensor, " members"]
    act: Act | None = None


def walk(
    moves: DeterministicSteps,
    features: Features,
    batch: MicroBatch,
    start: Callable[[MicroBatch], Start],
    latents: Latents,
    on_drawn: OnDrawn,
) -> Iterator[int]:
    """Walk a micro-batch along the grid; yields each step before it is made.

    The end is written to the micro-batch's rows of `latents`, and told to `on_drawn`.
    """
    begun = start(batch)
    x, condition, of = begun.x, begun.condition, begun.of
    path = moves.walk(batch.points)
    for k in batch.points:
        yield k
        if begun.act and k in batch.stochastic:
            features.forget()
            x, condition = begun.act(k, index_rows(x, of)), begun.act.condition
            of = torch.arange(len(x))
            path.restart()
        else:
            with features.of((id(batch), moves.network.guided(k))):
                v = moves.velocity(k, x, condition)
            x = path.step(k, x, v)
    x = index_rows(x, of)
    latents.index_copy_(0, batch.rows.to(latents.device, non_blocking=True), x)
    on_drawn(batch.rows, x)


def exact_velocities(
    network: GuidedNetwork, k: int, x: Latents, condition: Condition, size: int, around: Around = nullcontext
) -> list[Tensor]:
    """Velocities at step k, bit for bit the same for a sample whatever else is computed with it; `size` rows a call.

    Args:
        around: a context around each call; it says False where the call's graph is to be dropped at once.
    """
    parts = []
    for rows, new in fixed_batches(len(x), size):
        with around() as kept:
            v = network.velocity(k, index_rows(x, rows), condition[rows])[:new]
        parts.append(v.detach() if kept is False else v)
        del v
    return parts


def run_together(
    walks: Sequence[Iterator[int]],
    batches: Sequence[MicroBatch],
    calls: Sequence[Mapping[nn.Module, int]],
    stages: Mapping[nn.Module, int],
    stage: Callable[[int], nn.Module],
    idle: Callable[[int], object],
    world: World,
) -> None:
    """Make all walks, so that every rank calls each part of the network equally often.

    FSDP2 makes every call a collective of the ranks that hold the network between them, whatever the step: a rank makes
    as many calls as the one with most work, part by part in the order of the grid, and fills up on nothing.

    Args:
        batches, calls: the micro-batch of each walk, and its calls by part of the network.
        stages: the parts that the grid calls, in its order, and a step of each.
        stage: the part that computes a step.
    """
    own = torch.tensor([sum(of_walk.get(part, 0) for of_walk in calls) for part in stages], dtype=torch.int64)
    most = world.max_over_ranks(own)
    upcoming: list[int | None] = [batch.points[0] for batch in batches]  # a walk starts when its turn comes
    for (part, step), missing in zip(stages.items(), (most - own).tolist(), strict=True):
        for number, one in enumerate(walks):
            while (k := upcoming[number]) is not None and stage(k) is part:
                upcoming[number] = next(one, None)
        for _ in range(missing):
            idle(step)


def calls_of(batch: MicroBatch, stage: Callable[[int], nn.Module], size: int) -> dict[nn.Module, int]:
    """How often a walk calls each part of the network: once a deterministic step, in batches of `size` the others."""
    calls: dict[nn.Module, int] = {}
    for k in batch.points:
        made = number_of_calls(len(batch.rows), size) if k in batch.stochastic else 1
        calls[stage(k)] = calls.get(stage(k), 0) + made
    return calls


def noise_of(model: VideoModel, names: Sequence[Name]) -> Latents:
    """Standard normal latents on the model's device, each a function of its name alone."""
    shape = model.latent_shape
    noise = [normal(shape, *name) for name in names]
    return to_device(torch.stack(noise) if noise else torch.empty(0, *shape), model.device)


def shared_starts(names: Sequence[tuple[int, int, int, int]], shared: bool) -> list[Name]:
    """Return the name of each sample's initial noise, given its (seed, update, group, member).

    A group that shares its noise has its first member's.
    """
    return [(seed, "noise", update, group, 0 if shared else member) for seed, update, group, member in names]


@contextmanager
def with_a_graph() -> Iterator[bool]:
    """Around a call that is to give what its replay gives: attention takes other kernels without gradients.

    The graph itself is not kept.
    """
    with torch.enable_grad():
        yield False

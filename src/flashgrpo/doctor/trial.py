"""A trial of a recipe on a few prompt groups, measured: what the doctor looks at. Weights end as they began."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashgrpo.assembly import Assembly
from flashgrpo.distributed import memory
from flashgrpo.distributed.world import local
from flashgrpo.errors import SharedError
from flashgrpo.learning.experience import Compared, Drawn
from flashgrpo.learning.optim import GradientSum, gradient_norm
from flashgrpo.process import Finding
from flashgrpo.prompts import prompt_groups
from flashgrpo.run.progress import Clock
from flashgrpo.types import PromptGroup


@dataclass(frozen=True)
class Trial:
    """What was drawn, learnt and spent.

    Args:
        groups, group_size: the samples, of all ranks together.
        again: the rewards of the same videos, scored a second time: (B, R).
        received: trained parameter -> norm of its gradient.
        gradient_size: median of the entries of the clipped gradient that are not 0, as the optimizer sees them.
        metrics: of the update; drift is there.
        replicas: a sentence where copies of the network differ after a step along the gradient.
        of_process: what the process itself found.
        evaluated: samples that the short evaluation drew, on all ranks.
        seconds, memory: by phase; bytes at the highest.
        memory_before: bytes in use before the trial.
    """

    groups: int
    group_size: int
    drawn: Drawn
    compared: Compared
    again: Tensor
    received: dict[str, float]
    gradient_size: float
    metrics: dict[str, Any]
    replicas: str | None
    of_process: Sequence[Finding]
    evaluated: int
    seconds: dict[str, float]
    memory: dict[str, int]
    memory_before: int


class Meter:
    """A clock that also notes the highest memory use of each phase."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock()
        self.memory: dict[str, int] = {}
        self._device = device
        self._open: list[str] = []
        self.before = memory.peak(device, reset=True)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time and the memory inside for `phase`, of which others may lie inside."""
        self._note()
        memory.peak(self._device, reset=True)
        self._open.append(phase)
        with self.clock(phase):
            yield
        self._note()
        self._open.pop()
        memory.peak(self._device, reset=True)

    def _note(self) -> None:
        """What the phase that is open has used at the highest since the last note."""
        for phase in self._open[-1:]:
            self.memory[phase] = max(self.memory.get(phase, 0), memory.peak(self._device))


def try_out(parts: Assembly, groups: int, group_size: int, thorough: bool) -> Trial:
    """Draw, score, replay and learn from the first groups of the run, then undo what was learnt.

    Args:
        thorough: also step along the gradient, evaluate a few prompts, and measure numeric noise.
    """
    config, world, meter = parts.config, parts.world, Meter(parts.world.device)
    anchored = config.algorithm.credit.anchored
    first = prompt_groups(parts.prompts, config.seed, 0, groups, group_size, anchored)
    drawn = parts.draw_and_score(first, meter, uses=2)  # the replay is what is examined, also where it could be spared
    again = _scored_again(parts, first, drawn)
    compared, probe = parts.compare(drawn), _GradientProbe(parts, steps=thorough)
    with meter("update"):
        metrics = parts.learn(compared.record, probe)
    evaluated = 0
    if thorough:
        with meter("evaluate"):
            evaluated = len(parts.evaluator(limit=world.data_size).prompts)
    return Trial(
        groups,
        group_size,
        drawn,
        compared,
        again,
        _on_any_rank(parts, probe.received),
        statistics.median(parts.world.gather(probe.size)),
        metrics,
        probe.difference,
        parts.process.checks(drawn.record, drawn.outputs, config.seed, thorough),
        evaluated,
        meter.clock.lap(),
        meter.memory,
        meter.before,
    )


def _scored_again(parts: Assembly, groups: Sequence[PromptGroup], drawn: Drawn) -> Tensor:
    """Score what was drawn once more; (B, R)."""
    scoring = parts.scoring([sample for group in groups for sample in group.samples])
    for rows in torch.arange(len(drawn.outputs)).split(parts.config.rollout.micro_batch):  # as they were drawn
        scoring.add(rows, drawn.outputs[rows])
    return scoring.table().values


class _GradientProbe(GradientSum):
    """Stands in for the optimizer: notes what gradient each parameter receives, and leaves the weights as they are."""

    def __init__(self, parts: Assembly, steps: bool) -> None:
        super().__init__(parts.optimizer.parameters, parts.world)
        self.received: dict[str, float] = defaultdict(float)
        self.difference: str | None = None
        self.size = 0.0
        self._config = parts.config.optim
        self._steps = steps

    @property
    def lr(self) -> float:
        return 0.0

    def step(self) -> float:
        gradients = self.take()
        for name, gradient in zip(self.parameters, gradients, strict=True):
            self.received[name] += float(torch.linalg.vector_norm(local(gradient)))
        clipped = self._config.clip_factor(float(gradient_norm(gradients)))
        self.size = self.size or clipped * _median_entry([local(gradient) for gradient in gradients])
        if self._steps:
            self._compare_after_step(gradients)
        return 0.0

    @torch.no_grad()
    def _compare_after_step(self, gradients: Sequence[Tensor]) -> None:
        """Step along the gradient, compare the copies of the network, step back."""
        weights = [local(parameter) for parameter in self.parameters.values()]
        before = [weight.to("cpu", copy=True) for weight in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.sub_(local(gradient))
        try:
            self.world.check_replicas(self.parameters)
        except SharedError as error:
            self.difference = str(error)
        for weight, kept in zip(weights, before, strict=True):
            weight.copy_(kept)


def _median_entry(gradients: Sequence[Tensor], most: int = 2**20) -> float:
    """Return the median size of the entries that are not 0, of about `most` that lie evenly; 0 where there are none."""
    stride = max(1, sum(gradient.numel() for gradient in gradients) // most)
    entries = torch.cat([gradient.flatten()[::stride].abs().float().cpu() for gradient in gradients])
    entries = entries[entries > 0]
    return float(entries.median()) if len(entries) else 0.0


def _on_any_rank(parts: Assembly, received: dict[str, float]) -> dict[str, float]:
    """Return the largest norm of each gradient over the ranks: a small parameter may lie on one rank whole."""
    everyone = parts.world.gather(dict(received))
    return {name: max(theirs[name] for theirs in everyone) for name in received}

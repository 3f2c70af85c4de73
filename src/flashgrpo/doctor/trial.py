"""A trial of a recipe on a few prompt groups, measured: what the doctor looks at. Weights end as they began."""

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashgrpo.assembly import Assembly, Experience, experience
from flashgrpo.distributed import memory
from flashgrpo.distributed.world import local
from flashgrpo.errors import SharedError
from flashgrpo.learning.optim import GradientSum
from flashgrpo.learning.update import policy_update
from flashgrpo.processes.flow.model import Transitions
from flashgrpo.processes.flow.policy import Policy
from flashgrpo.prompts import prompt_groups
from flashgrpo.run.progress import Clock


@dataclass(frozen=True)
class Trial:
    """What was drawn, learnt and spent.

    Args:
        groups, group_size: the samples, of all ranks together.
        again: the rewards of the same videos, scored a second time: (B, R).
        received: trained parameter -> norm of its gradient.
        metrics: of the update; drift is there.
        replicas: a sentence where copies of the network differ after a step along the gradient.
        finish: largest distance between the rollout's latents and a noiseless finish of their last recorded step,
            relative to the latents' size; None where no sample can be followed, or features are reused, which depend
            on what else is drawn.
        noise_floor: the largest |ratio - 1| if a replay were not cut into the rollout's batches; None: not measured.
        evaluated: samples that the short evaluation drew, on all ranks.
        seconds, memory: by phase; bytes at the highest.
        memory_before: bytes in use before the trial.
    """

    groups: int
    group_size: int
    drawn: Experience
    again: Tensor
    received: dict[str, float]
    metrics: dict[str, Any]
    replicas: str | None
    finish: float | None
    noise_floor: float | None
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
    parts = copy.copy(parts)
    parts.graphs = None  # the replay is what is examined, also where the run can do without
    first = prompt_groups(parts.prompts, config.seed, 0, groups, group_size)
    drawn = experience(parts, first, meter)
    prompts = [group.prompt for group in first for _ in range(group_size)]
    once_more = parts.scoring(prompts)
    for rows in torch.arange(len(drawn.latents)).split(config.rollout.micro_batch):  # as they were drawn
        once_more.add(rows, drawn.latents[rows])
    again = once_more.table().values
    recorder = _Recorder(parts, steps=thorough)
    with meter("update"):
        advantages = drawn.advantages[drawn.mine]
        metrics = policy_update(
            parts.policy, recorder, drawn.transitions, advantages, config.algorithm, config.optim, world
        )
    evaluated = 0
    if thorough:
        with meter("evaluate"):
            evaluated = len(parts.evaluator(limit=world.data_size).prompts)
    return Trial(
        groups,
        group_size,
        drawn,
        again,
        _on_any_rank(parts, recorder.received),
        metrics,
        recorder.difference,
        _distance_to_finish(parts, drawn),
        _noise_floor(parts.policy, drawn.transitions)
        if thorough and not world.uses_fsdp and len(drawn.latents)
        else None,
        evaluated,
        meter.clock.lap(),
        meter.memory,
        meter.before,
    )


class _Recorder(GradientSum):
    """Stands in for the optimizer: notes what gradient each parameter receives, and leaves the weights as they are."""

    def __init__(self, parts: Assembly, steps: bool) -> None:
        super().__init__(parts.optimizer.parameters, parts.world)
        self.received: dict[str, float] = defaultdict(float)
        self.difference: str | None = None
        self._steps = steps

    @property
    def lr(self) -> float:
        return 0.0

    def step(self) -> float:
        gradients = self.take()
        for name, gradient in zip(self.parameters, gradients, strict=True):
            self.received[name] += float(torch.linalg.vector_norm(local(gradient)))
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


def _on_any_rank(parts: Assembly, received: dict[str, float]) -> dict[str, float]:
    """The largest norm of each gradient over the ranks: a small parameter may lie on one rank whole."""
    everyone = parts.world.gather(dict(received))
    return {name: max(theirs[name] for theirs in everyone) for name in received}


@torch.no_grad()
def _distance_to_finish(parts: Assembly, drawn: Experience) -> float | None:
    policy, transitions, steps = parts.policy, drawn.transitions, parts.config.algorithm.steps
    if parts.world.uses_fsdp or not len(transitions) or parts.config.rollout.reuse:
        return None  # calls of a network that is held between ranks have to be made by all of them
    last = {int(sample): row for row, sample in enumerate(transitions.sample)}  # sorted by sample, then by step
    batch = transitions[torch.tensor(list(last.values())[: policy.micro_batch])]
    groups, seed, num_steps = torch.arange(drawn.rewards.values.shape[0]), parts.config.seed, policy.grid.num_steps
    unrecorded = steps.mask(seed, 0, groups, num_steps) & ~steps.trained(seed, 0, groups, num_steps)
    if unrecorded[:, int(batch.k.min()) + 1 :].any():
        return None  # a step that is stochastic and not trained follows
    distance = 0.0
    for last_step in batch.k.unique().tolist():
        rows = (batch.k == last_step).nonzero().flatten()
        x, condition = batch.x_next[rows], batch.condition[batch.sample[rows]]
        visits = parts.environment.visits(torch.arange(num_steps)[None] == last_step)[0]
        points = [k for k in visits.nonzero().flatten().tolist() if k > last_step]
        walk = parts.environment.walk(points)
        for step in points:
            x = walk.step(step, x, parts.environment.velocity(torch.full_like(rows, step), x, condition))
        latents = drawn.latents[batch.sample[rows]]
        distance = max(distance, float((x - latents).abs().max() / latents.abs().max()))
    return distance


@torch.no_grad()
def _noise_floor(policy: Policy, transitions: Transitions) -> float:
    """The largest |ratio - 1| between forwards of one row each and one forward of all rows."""
    batch = transitions[torch.arange(min(len(transitions), policy.micro_batch))]
    condition = batch.condition[batch.sample]
    rows = torch.arange(len(batch)).split(1)
    together = policy.velocity(batch.k, batch.x, condition)
    singly = torch.cat([policy.velocity(batch.k[row], batch.x[row], condition[row]) for row in rows])
    a, b = (policy.table.log_prob(batch.k, batch.x_next, batch.x, v) for v in (together, singly))
    return float(torch.expm1(a - b).abs().max())

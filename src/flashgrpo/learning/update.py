"""One policy update from a record: replay its units, judge their terms, step the optimizer."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.learning.optim import GradientSum
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.types import Columns, Process, Record


@runtime_checkable
class Objective(Protocol):
    """What is minimised, as a pure function of columns of numbers; (T,) each, a row for each term."""

    @property
    def columns(self) -> Sequence[str]:
        """What a replay has to bring besides the score."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether a column is computed by the base model's weights."""
        ...

    def losses(self, score: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, columns: Columns) -> Tensor:
        """The loss of each term, (T,), differentiable by the score and the columns."""
        ...

    def metrics(self, score: Tensor, old: Tensor) -> Mapping[str, float]:
        """What the scores of an update say of it; `ratio_max_dev`, where there is a ratio, makes `drift`."""
        ...


def policy_update(
    process: Process,
    objective: Objective,
    optimizer: GradientSum,
    record: Record,
    config: OptimConfig,
    world: World,
) -> dict[str, Any]:
    """`config.passes` times `config.minibatches` optimizer steps on one rollout; returns the metrics of all ranks.

    The loss of an optimizer step is the mean of the objective over its terms, on all ranks.

    Args:
        record: the units of this rank's samples, with the advantages of their terms.

    Raises:
        UserError: a gradient is not finite.
    """
    work, metrics = Work.of(process, record, world), UpdateMetrics(objective)
    by_slot = config.grad_norm_by_step
    if by_slot is None:
        by_slot = not (world.uses_fsdp and world.size > 1)
    for batch in work.optimizer_steps(config):
        for slots, idle in batch.rounds(by_slot):
            for part in batch.micro_batches(record, slots):
                losses = _losses(process, objective, part, metrics)
                (losses.sum() * (world.loss_scale / batch.terms)).backward()
            for _ in range(idle if world.uses_fsdp else 0):
                (process.idle(slots[-1], objective.columns).sum() * 0).backward()
            if by_slot:
                metrics.add_gradient(slots[0], optimizer.collect() * (batch.terms / batch.terms_of(slots[0])))
        if not by_slot:
            optimizer.collect()
        metrics.add_step(optimizer.lr, optimizer.step())
    return {**metrics.summary(world), "transitions_by_step": work.units_by_slot}


def _losses(process: Process, objective: Objective, part: Record, metrics: "UpdateMetrics") -> Tensor:
    """The objective of each term of a micro-batch, replayed."""
    assert part.advantage is not None, "samples are compared before they are learnt from"
    score, columns = process.replay(part, objective.columns)
    losses = objective.losses(score, part.old, part.advantage, part.weight, columns)
    metrics.add_batch(score, part.old, losses, columns)
    return losses


@dataclass(frozen=True)
class Work:
    """The units of an optimizer step, on all ranks; (U,) each, ranks one after the other.

    Args:
        slot: of each unit.
        owner: the rank that has the unit.
        term_counts: how many terms the unit has.
        number: of each unit in its rank's record.
    """

    process: Process
    rank: int
    slot: Int64[Tensor, " units"]
    owner: Int64[Tensor, " units"]
    term_counts: Int64[Tensor, " units"]
    number: Int64[Tensor, " units"]

    @classmethod
    def of(cls, process: Process, record: Record, world: World) -> "Work":
        """Tell all ranks what each has to do."""
        counts = record.unit.bincount(minlength=len(record))
        everyone = world.gather([record.slot.tolist(), counts.tolist()])
        slots, terms = (torch.tensor([n for rank in everyone for n in rank[i]], dtype=torch.int64) for i in (0, 1))
        lengths = torch.tensor([len(rank[0]) for rank in everyone])
        owner = torch.arange(len(everyone)).repeat_interleave(lengths)
        number = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return cls(process, world.data_rank, slots, owner, terms, number)

    def optimizer_steps(self, config: OptimConfig) -> Iterator["Work"]:
        """Cut the work into optimizer steps; each takes some of every rank's units."""
        for _ in range(config.passes):
            for first in range(config.minibatches):
                columns = (self.slot, self.owner, self.term_counts, self.number)
                yield Work(self.process, self.rank, *(column[first :: config.minibatches] for column in columns))

    @property
    def terms(self) -> int:
        """Terms of all ranks."""
        return int(self.term_counts.sum())

    def terms_of(self, slot: int) -> int:
        """Terms of a slot, on all ranks."""
        return int(self.term_counts[self.slot == slot].sum())

    @property
    def units_by_slot(self) -> dict[str, int]:
        """Slot -> units, on all ranks."""
        return {str(slot): count for slot, count in enumerate(self.slot.bincount().tolist()) if count}

    def micro_batches(self, record: Record, slots: Sequence[int]) -> Iterator[Record]:
        """What this rank replays of some slots, in turn."""
        for slot in slots:
            own = self.number[(self.slot == slot) & (self.owner == self.rank)]
            yield from self.process.micro_batches(record[own])

    def rounds(self, by_slot: bool) -> Iterator[tuple[Sequence[int], int]]:
        """Cut the work where all ranks have to meet: yields slots, and how many calls this rank makes on nothing.

        Ranks that hold a network between them call it together, so each makes as many calls as the one with most work.
        They meet once for each stage of the network, or `by_slot`, so that each slot's gradient is summed by itself.

        Example of one stage, for rank 0: slots 2 0 0 2 0 of rank 0 and 1 of rank 1 in micro-batches of 2 are 3 calls
        and 1 call: one round of slots 0, 1 and 2, in which rank 1 makes 2 calls on nothing.
        """
        slots = sorted(set(self.slot.tolist()))
        stages: dict[Any, list[int]] = {}
        for slot in slots:
            stages.setdefault(slot if by_slot else self.process.stage(slot), []).append(slot)
        for members in stages.values():
            calls = torch.zeros(int(self.owner.max()) + 1, dtype=torch.int64)
            for slot in members:
                units = self.owner[self.slot == slot].bincount(minlength=len(calls))
                calls += -(-units // self.process.micro_batch)
            own = int(calls[self.rank]) if self.rank < len(calls) else 0
            yield members, int(calls.max()) - own


class UpdateMetrics:
    """Collects what an update shows, without waiting for the device before its end."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._grad_norms: list[float] = []
        self._lr = 0.0
        self._slot_gradients: dict[int, list[Tensor]] = defaultdict(list)

    def add_batch(self, score: Tensor, old: Tensor, losses: Tensor, columns: Columns) -> None:
        """Record a micro-batch, a value per term."""
        rows = {"score": score, "old": old, "loss": losses, **columns}
        if not self._grad_norms:
            rows |= {"first_score": score, "first_old": old}
        for name, values in rows.items():
            self._rows[name].append(values.detach())

    def add_gradient(self, slot: int, norm: Tensor) -> None:
        """Record the norm of the mean gradient of the terms of a slot."""
        self._slot_gradients[slot].append(norm)

    def add_step(self, lr: float, grad_norm: float) -> None:
        """Record an optimizer step."""
        self._lr = lr
        self._grad_norms.append(grad_norm)

    def summary(self, world: World) -> dict[str, Any]:
        """The metrics of the update; means over the terms of all ranks and over its optimizer steps.

        `drift` is the largest |ratio - 1| within the first optimizer step, where the policy has not changed yet: any
        deviation there is a difference between rollout and replay. `ratio_max_dev` is over all of them.
        `grad_norm_by_step` is the norm of the mean gradient of the terms of a slot.
        """
        own = {name: torch.cat(values).tolist() for name, values in self._rows.items()}
        rows = defaultdict[str, list[float]](list)
        for theirs in world.gather(own):
            for name, values in theirs.items():
                rows[name] += values
        score, old, first, first_old = (
            torch.tensor(rows[name]) for name in ("score", "old", "first_score", "first_old")
        )
        return {
            "loss": statistics.fmean(rows["loss"]),
            "kl": statistics.fmean(rows["kl"]) if "kl" in rows else 0.0,
            **self._objective.metrics(score, old),
            "lr": self._lr,
            "drift": self._objective.metrics(first, first_old).get("ratio_max_dev", 0.0),
            "grad_norm": sum(self._grad_norms) / len(self._grad_norms),
            "grad_norm_by_step": {str(k): float(sum(n)) / len(n) for k, n in sorted(self._slot_gradients.items())},
        }

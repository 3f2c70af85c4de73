"""One policy update from a record: replay its units, judge their terms, step the optimizer."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, repeat
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.learning.optim import GradientSum
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.work import Work
from flashgrpo.process import Columns, Process, Record
from flashgrpo.types import to_device


@runtime_checkable
class Objective(Protocol):
    """What is minimised, as a pure function of columns of numbers; (T,) each, a row for each term."""

    @property
    def columns(self) -> Sequence[str]:
        """What a replay has to bring besides the score."""
        ...

    @property
    def constants(self) -> Sequence[str]:
        """Columns that no gradient goes through."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether a column is computed by the base model's weights."""
        ...

    @property
    def coupled(self) -> bool:
        """Whether the loss of a term depends on the scores of others of its key.

        Then `columns["key"]` is the number of each term's key, from 0, and the terms of a key are there together.
        """
        ...

    def losses(self, score: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, columns: Columns) -> Tensor:
        """Return the loss of each term, (T,), differentiable by the score and the columns."""
        ...

    def log_ratio(self, score: Tensor, old: Tensor, columns: Columns) -> Tensor:
        """Return the logarithm of the ratio of each term to the policy that drew, (T,)."""
        ...

    def metrics(self, score: Tensor, old: Tensor, advantage: Tensor, columns: Columns) -> Mapping[str, float]:
        """Return what the terms of an update say of it."""
        ...


def policy_update(
    process: Process,
    objective: Objective,
    optimizer: GradientSum,
    record: Record,
    config: OptimConfig,
    world: World,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """`config.passes` times `config.minibatches` optimizer steps on one rollout; returns the metrics of all ranks.

    The loss of an optimizer step is the mean of the objective over its terms, on all ranks. Replays of several addends
    differ in their number of network calls from slot to slot, so ranks then meet at every slot.

    Args:
        record: the units of this rank's samples, with the advantages of their terms.
        watch: told how many of this rank's replays are done, of how many.

    Raises:
        UserError: too many optimizer steps in a row were not finite.
    """
    work, metrics = Work.of(process, record, world), UpdateMetrics(objective)
    by_slot = config.grad_norm_by_step
    if by_slot is None:
        by_slot = not (world.uses_fsdp and world.size > 1)
    assert not objective.coupled or record.one_key_each, "a unit would part the terms of a key"
    two_passes = objective.coupled or process.addends > 1
    replayed = [name for name in objective.columns if not (two_passes and name in objective.constants)]
    watch(done := 0, of := len(record) * config.passes)
    for batch in work.optimizer_steps(config, whole_keys=objective.coupled):
        rounds, scale = list(batch.rounds(by_slot or process.addends > 1)), world.loss_scale / batch.terms
        given = iter(_judged(process, objective, record, batch, rounds, world, metrics)) if two_passes else repeat(None)
        for slots, idle in rounds:
            for part in batch.micro_batches(record, slots):
                _backward(process, objective, part, next(given), scale, metrics)
                watch(done := done + len(part), of)
            _idle(process, replayed, slots, idle if world.uses_fsdp else 0)
            if by_slot:
                metrics.add_gradient(slots[0], optimizer.collect() * (batch.terms / batch.terms_of(slots[0])))
        if not by_slot:
            optimizer.collect()
        metrics.add_step(optimizer.lr, optimizer.step())
    return {**metrics.summary(world), "transitions_by_step": work.units_by_slot}


def _backward(
    process: Process,
    objective: Objective,
    part: Record,
    derivatives: Columns | None,
    scale: float,
    metrics: "UpdateMetrics",
) -> None:
    """Replay a micro-batch and add its gradient; never more than the graph of one addend is in memory.

    Args:
        derivatives: of the loss by each score and column, from a first pass; None where there is one addend, whose
            graph the loss is computed on.
    """
    if derivatives is None:
        ((score, columns),) = process.replay(part, objective.columns)
        assert part.advantage is not None, "samples are compared before they are learnt from"
        old = score.detach() if part.old is None else part.old
        losses = objective.losses(score, old, part.advantage, part.weight, columns)
        metrics.add_batch(score, old, part.advantage, losses, columns)
        _spoilt_where_not_finite(losses.sum() * scale).backward()
        return
    for score, columns in process.replay(part, [name for name in derivatives if name != "score"]):
        addend = sum(derivatives[name] * values for name, values in {"score": score, **columns}.items())
        assert isinstance(addend, Tensor)
        if addend.requires_grad:
            _spoilt_where_not_finite(addend.sum() * scale).backward()


def _spoilt_where_not_finite(loss: Tensor) -> Tensor:
    """Return the loss, with a gradient that is not finite where it is not: the norm of their sum tells all ranks."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def _idle(process: Process, columns: Sequence[str], slots: Sequence[int], calls: int) -> None:
    for _ in range(calls):
        for addend in process.idle(slots[-1], columns):
            if addend.requires_grad:
                (addend.sum() * 0).backward()


@torch.no_grad()
def _judged(
    process: Process,
    objective: Objective,
    record: Record,
    batch: Work,
    rounds: Sequence[tuple[Sequence[int], int]],
    world: World,
    metrics: "UpdateMetrics",
) -> list[Columns]:
    """The first of two passes: scores without gradient, and the derivative of the loss by each; a part after the other.

    Scores of a coupled objective are exchanged between the ranks, a few numbers a term. With the chain rule the second
    pass then differentiates one addend at a time, and the sum of gradients is that of one graph of everything.
    """
    parts: list[dict[str, Tensor]] = []
    for slots, idle in rounds:
        for part in batch.micro_batches(record, slots):
            assert part.advantage is not None, "samples are compared before they are learnt from"
            found = _summed(process.replay(part, objective.columns))
            old = found["score"] if part.old is None else part.old
            known = {"old": old, "advantage": part.advantage, "weight": part.weight, "key": part.key}
            parts.append({**found, **known})
        _idle(process, objective.columns, slots, idle if world.uses_fsdp else 0)
    own = {name: torch.cat([part[name] for part in parts]).cpu() for name in (parts[0] if parts else ())}
    terms, mine = _exchanged(own, world) if objective.coupled else (own, slice(None))
    if not terms:
        return []
    losses, gradients = _differentiated(objective, terms)
    metrics.add_terms(terms, losses, mine)
    return _by_part({name: values[mine] for name, values in gradients.items()}, parts)


def _exchanged(own: Columns, world: World) -> tuple[Columns, slice]:
    """Return the columns of the terms of all ranks, with keys numbered from 0, and which rows are this rank's.

    They are few numbers, so they are in float64: what is made of them hardly depends on who had which term.
    """
    ranks = world.gather({name: values.tolist() for name, values in own.items()})
    names = next(filter(None, ranks), {})
    types = {name: torch.int64 if name == "key" else torch.float64 for name in names}
    terms = {
        name: torch.cat([torch.tensor(theirs[name], dtype=types[name]) for theirs in ranks if theirs]) for name in names
    }
    if names:
        terms["key"] = terms["key"].unique(return_inverse=True)[1]
    first = sum(len(theirs["score"]) for theirs in ranks[: world.data_rank] if theirs)
    return terms, slice(first, first + len(own.get("score", ())))


def _differentiated(objective: Objective, terms: Columns) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses of terms, and the derivative of their sum by the score and by each column."""
    graded = ("score", *(name for name in objective.columns if name not in objective.constants))
    leaves = {name: terms[name].clone().requires_grad_() for name in graded}
    with torch.enable_grad():
        losses = objective.losses(
            leaves["score"], terms["old"], terms["advantage"], terms["weight"], {**terms, **leaves}
        )
        derivatives = torch.autograd.grad(
            _spoilt_where_not_finite(losses.sum()), list(leaves.values()), materialize_grads=True
        )
    return losses.detach(), dict(zip(leaves, derivatives, strict=True))


def _summed(addends: Iterable[tuple[Tensor, Columns]]) -> dict[str, Tensor]:
    """Scores and columns as the sums of their addends."""
    total: dict[str, Tensor] = {}
    for score, columns in addends:
        for name, values in {"score": score, **columns}.items():
            total[name] = total[name] + values if name in total else values
    return total


def _by_part(gradients: Columns, parts: Sequence[Columns]) -> list[Columns]:
    """Cut derivatives into those of each part, on its device."""
    counts = [len(part["score"]) for part in parts]
    cut = {name: values.split(counts) for name, values in gradients.items()}
    scores = [part["score"] for part in parts]
    return [{name: to_device(cut[name][i].to(s.dtype), s.device) for name in cut} for i, s in enumerate(scores)]


class UpdateMetrics:
    """Collects what an update shows, without waiting for the device before its end."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._keys = 0
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._grad_norms: list[float] = []
        self._lr = 0.0
        self._slot_gradients: dict[int, list[Tensor]] = defaultdict(list)

    def add_batch(self, score: Tensor, old: Tensor, advantage: Tensor, losses: Tensor, columns: Columns) -> None:
        """Record a micro-batch, a value per term."""
        rows = {"score": score, "old": old, "advantage": advantage, "loss": losses, **columns}
        if not self._grad_norms:
            rows |= {f"first_{name}": rows[name] for name in ("score", "old", "key") if name in rows}
        for name, values in rows.items():
            self._rows[name].append(values.detach())

    def add_terms(self, terms: Columns, losses: Tensor, mine: slice) -> None:
        """Record the terms of an optimizer step that are this rank's; keys of later steps get other numbers."""
        columns = {name: terms[name][mine] for name in self._objective.columns}
        if self._objective.coupled:
            columns["key"] = terms["key"][mine] + self._keys
            self._keys += int(terms["key"].max()) + 1
        self.add_batch(terms["score"][mine], terms["old"][mine], terms["advantage"][mine], losses[mine], columns)

    def add_gradient(self, slot: int, norm: Tensor) -> None:
        """Record the norm of the mean gradient of the terms of a slot."""
        self._slot_gradients[slot].append(norm)

    def add_step(self, lr: float, grad_norm: float) -> None:
        """Record an optimizer step."""
        self._lr = lr
        self._grad_norms.append(grad_norm)

    def summary(self, world: World) -> dict[str, Any]:
        """Return the metrics of the update; means over the terms of all ranks and over its optimizer steps.

        `drift` is the largest |ratio - 1| within the first optimizer step, where the policy has not changed yet: where
        the weights that are trained have drawn, any deviation there is a difference between rollout and replay.
        `grad_norm` is the mean of the steps that were taken; `skipped_steps` counts the others, where there are any.
        `grad_norm_by_step` is the norm of the mean gradient of the terms of a slot.
        """
        mine = {name: torch.cat(values) for name, values in self._rows.items()}
        flat = iter(torch.cat(list(mine.values())).tolist() if mine else ())  # one wait for the device
        own = {name: list(islice(flat, len(values))) for name, values in mine.items()}
        rows = defaultdict[str, list[float]](list)
        for theirs in world.gather(own):
            for name, values in theirs.items():
                rows[name] += values
        columns = {name: torch.tensor(values) for name, values in rows.items()}
        columns |= {name: columns[name].long() for name in ("key", "first_key") if name in columns}
        first = {name.removeprefix("first_"): values for name, values in columns.items() if name.startswith("first_")}
        moved = self._objective.log_ratio(first["score"], first["old"], first)
        taken = [norm for norm in self._grad_norms if math.isfinite(norm)]
        skipped = len(self._grad_norms) - len(taken)
        return {
            "loss": _mean(rows["loss"]),
            "kl": _mean(rows["kl"]) if "kl" in rows else 0.0,
            **({"kl_average": _mean(rows["kl_average"])} if "kl_average" in rows else {}),
            **self._objective.metrics(columns["score"], columns["old"], columns["advantage"], columns),
            "lr": self._lr,
            "drift": float((moved.exp() - 1).abs().max()),
            "grad_norm": sum(taken) / len(taken) if taken else math.nan,
            "grad_norm_by_step": {str(k): float(sum(n)) / len(n) for k, n in sorted(self._slot_gradients.items())},
            **({"skipped_steps": skipped} if skipped else {}),
        }


def _mean(values: Sequence[float]) -> float:
    """The exact mean; NaN where one of the values is not finite."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.nan

"""The only denoising loop: samples of prompt groups -> latents, and the transitions that the update will replay."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.processes.flow.model import VideoModel
from flashgrpo.processes.flow.policy import Around, LogProb, Policy
from flashgrpo.processes.flow.retain import Graphs
from flashgrpo.processes.flow.settings import Stochastic
from flashgrpo.processes.flow.shortcuts import Environment, leaders
from flashgrpo.processes.flow.state import FlowState, KeptGraph
from flashgrpo.seeds import Name, normal
from flashgrpo.types import Condition, Latents, Sample, index_rows, to_device

Drawn = Callable[[Tensor, Latents], None]  # hears of the rows (B,) and latents of each micro-batch when it is done


def _nobody(rows: Tensor, latents: Latents) -> None:
    """Hears of what is drawn where nobody waits for it."""


@torch.no_grad()
def rollout(
    policy: Policy,
    environment: Environment,
    samples: Sequence[Sample],
    condition: Condition,
    explore: Stochastic,
    seed: int,
    micro_batch: int,
    world: World,
    drawn: Drawn = _nobody,
    graphs: Graphs | None = None,
    keep_v: bool = False,
) -> tuple[Latents, FlowState]:
    """Draw samples of one update: stochastic where `explore.steps` says, deterministic elsewhere.

    With shared initial noise the steps before the first stochastic one are computed once for a group's samples in a
    micro-batch.

    Args:
        samples: this rank's B samples; any part of the update's, also none.
        condition: a row per sample (at least one row where there is no sample).
        micro_batch: samples denoised at once; it changes speed and memory, and the videos at most in the last bits.
        drawn: hears of each micro-batch before the next is begun.
        graphs: decides whether the graphs of the trained steps are kept for the update; None keeps none.

    Returns:
        Final latents (B, C, F, H, W), and the trained transitions in the order of the samples.
    """
    names, num_steps = [sample.name for sample in samples], policy.grid.num_steps
    numbers = torch.tensor(names, dtype=torch.int64).reshape(-1, 3)
    update, group_ids, members = int(numbers[0, 0]) if names else 0, numbers[:, 1], numbers[:, 2]
    stochastic = explore.steps.mask(seed, update, group_ids, num_steps, members=members)
    trained = explore.steps.trained(seed, update, group_ids, num_steps, members=members)
    shape, device = policy.model.latent_shape, policy.model.device
    shared = explore.shared_noise

    latents, records = [torch.empty(0, *shape, device=device)], Records(graphs, keep_v)
    parts = torch.arange(len(names)).split(micro_batch) if names else ()
    for rows, calls in _in_step(environment, policy, stochastic, parts, world):
        mine = [names[row] for row in rows]
        leader = leaders([(group, 0 if shared else member) for _, group, member in mine], stochastic[rows])
        records.begin(rows, trained[rows])
        acts = _Acts(policy, seed, mine, records)
        x = initial_noise(policy.model, seed, mine, shared)
        latents.append(_denoise(environment, acts, x, condition[rows], stochastic[rows], leader, calls))
        drawn(rows, latents[-1])
    return torch.cat(latents), records.state(condition, shape, device)


@torch.no_grad()
def denoise(
    environment: Environment,
    x: Latents,
    condition: Condition,
    micro_batch: int,
    world: World,
    drawn: Drawn = _nobody,
) -> Latents:
    """Deterministic sampling of every row from its noise: evaluation, and `flashgrpo sample`."""
    never = torch.zeros(len(x), environment.grid.num_steps, dtype=torch.bool)
    parts = torch.arange(len(x)).split(micro_batch) if len(x) else ()
    done = [torch.empty_like(x[:0])]
    for rows, calls in _in_step(environment, None, never, parts, world):
        alone = torch.arange(len(rows))
        done.append(_denoise(environment, None, x[rows], condition[rows], never[rows], alone, calls))
        drawn(rows, done[-1])
    return torch.cat(done)


def initial_noise(model: VideoModel, seed: int, names: Sequence[tuple[int, int, int]], shared: bool) -> Latents:
    """x_0 of each sample, named (update, group, member); a group that shares it has its first member's."""
    return noise_of(model, [(seed, "noise", update, group, 0 if shared else member) for update, group, member in names])


def noise_of(model: VideoModel, names: Sequence[Name]) -> Latents:
    """Standard normal latents on the model's device, each a function of its name alone."""
    shape = model.latent_shape
    noise = [normal(shape, *name) for name in names]
    return to_device(torch.stack(noise) if noise else torch.empty(0, *shape), model.device)


class Records:
    """The trained transitions of a rollout as they are drawn."""

    def __init__(self, graphs: Graphs | None, keep_v: bool) -> None:
        self._graphs = graphs
        if graphs:
            graphs.begin()
        self._keep_v = keep_v
        self._rows: list[tuple[int, int, Tensor, Tensor, Tensor, Tensor | None]] = []
        self._retained: list[tuple[list[tuple[int, int]], Tensor]] = []
        self._batch, self._trained = torch.empty(0), torch.empty(0)

    def begin(self, rows: Int64[Tensor, " batch"], trained: Bool[Tensor, "batch steps"]) -> None:
        """The next micro-batch: its rows among the rollout's, and which of their steps are trained."""
        self._batch, self._trained = rows, trained

    def graph_of(self, network: nn.Module, step: int, rows: Int64[Tensor, " rows"]) -> Around:
        """What goes around each call of the network for a stochastic step: its graph is left where it is to be kept."""
        if self._graphs is None or not bool(self._trained[rows, step].all()):
            return nullcontext
        return partial(self._graphs.of, network)

    def add(
        self, step: int, rows: Tensor, x: Latents, x_next: Latents, log_prob: LogProb, parts: Sequence[Tensor]
    ) -> None:
        """A stochastic step of some rows of the micro-batch, whose velocities are `parts`, one after the other."""
        wanted = self._trained[rows, step]
        names = [(int(self._batch[row]), step) for row in rows]
        v = torch.cat(list(parts)).detach() if self._keep_v else None
        for i in _rows(wanted):  # clones, for a view would keep the latents of the whole batch
            old_v = None if v is None else v[i].clone()
            self._rows.append((*names[i], x[i].clone(), x_next[i].clone(), log_prob[i], old_v))
        if self._graphs and not self._graphs.kept:
            self._retained.clear()  # now, and not when the rollout ends
        first = 0
        for v in parts if wanted.all() and self._graphs and self._graphs.kept else ():
            self._retained.append((names[first : first + len(v)], v))
            first += len(v)

    def state(self, condition: Condition, shape: Sequence[int], device: torch.device) -> FlowState:
        """All of them, by sample, then by step."""
        self._rows.sort(key=lambda record: record[:2])
        sample, k = (torch.tensor([record[i] for record in self._rows], dtype=torch.int64) for i in (0, 1))
        nothing = torch.empty(0, *shape, device=device)
        x = torch.stack([record[2] for record in self._rows]) if self._rows else nothing
        x_next = torch.stack([record[3] for record in self._rows]) if self._rows else nothing
        log_prob = torch.stack([record[4] for record in self._rows]) if self._rows else torch.empty(0, device=device)
        velocities = [record[5] for record in self._rows if record[5] is not None]
        old_v = torch.stack(velocities) if velocities else None
        place = {record[:2]: row for row, record in enumerate(self._rows)}
        kept = [KeptGraph(torch.tensor([place[name] for name in names]), v) for names, v in self._retained]
        return FlowState(sample, k, x, x_next, log_prob, condition, old_v, kept[1:])  # the first is replayed: see drift


@dataclass(frozen=True)
class _Acts:
    """The stochastic steps of a micro-batch."""

    policy: Policy
    seed: int
    names: Sequence[tuple[int, int, int]]
    records: Records = field(repr=False)

    def __call__(self, step: int, rows: Int64[Tensor, " rows"], x: Latents, condition: Condition) -> Latents:
        """x_{k+1} of these rows of the micro-batch, which is recorded; `x` and `condition` are theirs."""
        shape, policy = tuple(x.shape[1:]), self.policy
        noise = torch.stack([normal(shape, self.seed, "step", *self.names[row], step) for row in rows])
        k = torch.full_like(rows, step)
        parts = policy.exact_parts(k, x, condition, self.records.graph_of(policy.model.network, step, rows))
        x_next, log_prob = policy.act(k, x, torch.cat(parts).detach(), to_device(noise, x.device))
        self.records.add(step, rows, x, x_next, log_prob, parts)
        return x_next


def _in_step(
    environment: Environment,
    policy: Policy | None,
    stochastic: Bool[Tensor, "batch steps"],
    parts: Sequence[Tensor],
    world: World,
) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches, each with the network calls that every rank makes at each step: (N, 2), by kind of step.

    Ranks that hold a network between them have to call it together, so all make as many calls as any rank needs; one
    with fewer samples gets empty micro-batches.
    """
    most = int(world.max_over_ranks(torch.tensor(len(parts))))
    calls = torch.zeros(most, environment.grid.num_steps, 2, dtype=torch.int64)
    for i, rows in enumerate(parts):
        acting = stochastic[rows]
        calls[i, :, 0] = (environment.visits(acting) & ~acting).any(dim=0).long()
        if policy is not None:
            calls[i, :, 1] = policy.calls(acting.sum(dim=0))
    none = torch.empty(0, dtype=torch.int64)
    return list(zip([*parts, *[none] * (most - len(parts))], world.max_over_ranks(calls), strict=True))


def _denoise(
    environment: Environment,
    acts: _Acts | None,
    x: Latents,
    condition: Condition,
    stochastic: Bool[Tensor, "batch steps"],
    leader: Int64[Tensor, " batch"],
    calls: Int64[Tensor, "steps 2"],
) -> Latents:
    """Walk the grid. Rows may differ in where they stop and which steps are stochastic: each step serves the rows that
    stop there, the two kinds in turn. Rows whose stochastic steps are the same go together in one walk of the solver.

    Args:
        acts: makes the stochastic steps; None where there are none.
        leader: of each row the one that computes for it until its first stochastic step.
    """
    x, leader = x.clone(), leader.clone()
    patterns, walk_of = stochastic.unique(dim=0, return_inverse=True)
    walks = [environment.walk(_rows(stops).tolist()) for stops in environment.visits(patterns)]
    visits, features = environment.visits(stochastic), environment.features()
    for step in range(environment.grid.num_steps):
        moving, acting = _rows(visits[:, step] & ~stochastic[:, step]), _rows(stochastic[:, step])
        moves = 0
        if len(moving):
            computing, of = leader[moving].unique(return_inverse=True)
            k = torch.full_like(computing, step)
            with features.of((*computing.tolist(), bool(environment.guidance[step] > 1))):
                v = environment.velocity(k, index_rows(x, computing), condition[computing])
            for number in walk_of[moving].unique().tolist():
                together = walk_of[moving] == number
                rows, v_of_rows = moving[together], index_rows(v, of[together])
                _put(x, rows, walks[number].step(step, index_rows(x, rows), v_of_rows))
            moves = 1
        for _ in range(int(calls[step, 0]) - moves):
            environment.idle(step)
        if acts is not None:
            if len(acting):
                features.forget()
                _put(x, acting, acts(step, acting, index_rows(x, acting), condition[acting]))
                leader[acting] = acting
            for _ in range(int(calls[step, 1] - acts.policy.calls(torch.tensor(len(acting))))):
                acts.policy.idle(step)
        for walk, pattern in zip(walks, patterns, strict=True):
            if pattern[step]:
                walk.restart()
    features.forget()
    return x


def _put(x: Latents, rows: Int64[Tensor, " rows"], new: Tensor) -> None:
    """Write rows whose numbers are on the CPU, without waiting for the device."""
    x.index_copy_(0, rows.to(x.device, non_blocking=True), new)


def _rows(mask: Bool[Tensor, " batch"]) -> Int64[Tensor, " rows"]:
    return mask.nonzero().flatten()

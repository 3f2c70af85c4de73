"""The only denoising loop: samples of prompt groups -> latents, and the transitions that the update will replay."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.presets import Algorithm
from flashgrpo.processes.flow.model import Retained, Transitions, VideoModel
from flashgrpo.processes.flow.policy import Around, LogProb, Policy
from flashgrpo.processes.flow.retain import Graphs
from flashgrpo.processes.flow.shortcuts import Environment, leaders
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Latents, Sample, sent, taken

Drawn = Callable[[Tensor, Latents], None]  # hears of the rows (B,) and latents of each micro-batch when it is done


def _nobody(rows: Tensor, latents: Latents) -> None:
    """Hears of what is drawn where nobody waits for it."""


@torch.no_grad()
def rollout(
    policy: Policy,
    environment: Environment,
    samples: Sequence[Sample],
    condition: Condition,
    algorithm: Algorithm,
    seed: int,
    micro_batch: int,
    world: World,
    drawn: Drawn = _nobody,
    graphs: Graphs | None = None,
) -> tuple[Latents, Transitions]:
    """Draw samples of one update: stochastic where `algorithm.steps` says, deterministic elsewhere.

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
    stochastic = algorithm.steps.mask(seed, update, group_ids, num_steps, members=members)
    trained = algorithm.steps.trained(seed, update, group_ids, num_steps, members=members)
    shape, device = policy.model.latent_shape, policy.model.device
    shared = algorithm.grouping.shared_noise

    latents, records = [torch.empty(0, *shape, device=device)], Records(graphs)
    parts = torch.arange(len(names)).split(micro_batch) if names else ()
    for rows, calls in _in_step(environment, policy, stochastic, parts, world):
        mine = [names[row] for row in rows]
        leader = leaders([(group, 0 if shared else member) for _, group, member in mine], stochastic[rows])
        records.begin(rows, trained[rows])
        acts = _Acts(policy, seed, mine, records)
        x = initial_noise(policy.model, seed, mine, shared)
        latents.append(_denoise(environment, acts, x, condition[rows], stochastic[rows], leader, calls))
        drawn(rows, latents[-1])
    return torch.cat(latents), records.transitions(condition, shape, device)


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
    owners = [(update, group, 0 if shared else member) for update, group, member in names]
    return noise_of(model, seed, "noise", owners)


def noise_of(model: VideoModel, seed: int, purpose: str, names: Sequence[tuple[int, ...]]) -> Latents:
    """Standard normal latents on the model's device, each a function of seed, purpose and its name alone."""
    shape = model.latent_shape
    noise = [normal(shape, seed, purpose, *name) for name in names]
    return sent(torch.stack(noise) if noise else torch.empty(0, *shape), model.device)


class Records:
    """The trained transitions of a rollout as they are drawn."""

    def __init__(self, graphs: Graphs | None) -> None:
        self._graphs = graphs
        if graphs:
            graphs.begin()
        self._rows: list[tuple[int, int, Tensor, Tensor, Tensor]] = []
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
        for i in _rows(wanted):  # clones, for a view would keep the latents of the whole batch
            self._rows.append((*names[i], x[i].clone(), x_next[i].clone(), log_prob[i]))
        if self._graphs and not self._graphs.kept:
            self._retained.clear()  # now, and not when the rollout ends
        first = 0
        for v in parts if wanted.all() and self._graphs and self._graphs.kept else ():
            self._retained.append((names[first : first + len(v)], v))
            first += len(v)

    def transitions(self, condition: Condition, shape: Sequence[int], device: torch.device) -> Transitions:
        """All of them, by sample, then by step."""
        self._rows.sort(key=lambda record: record[:2])
        nothing = [torch.empty(0, *shape, device=device)] * 2 + [torch.empty(0, device=device)]
        x, x_next, log_prob = map(torch.stack, list(zip(*self._rows, strict=True))[2:]) if self._rows else nothing
        sample, k = (torch.tensor([record[i] for record in self._rows], dtype=torch.int64) for i in (0, 1))
        place = {record[:2]: row for row, record in enumerate(self._rows)}
        retained = [Retained(torch.tensor([place[name] for name in names]), v) for names, v in self._retained]
        whole = sum(len(one.rows) for one in retained) == len(place)  # not where the first was found to be too large
        return Transitions(sample, k, x, x_next, log_prob, condition, tuple(retained) if whole else ())


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
        x_next, log_prob = policy.act(k, x, torch.cat(parts).detach(), sent(noise, x.device))
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
                v = environment.velocity(k, taken(x, computing), condition[computing])
            for number in walk_of[moving].unique().tolist():
                together = walk_of[moving] == number
                rows, v_of_rows = moving[together], taken(v, of[together])
                _put(x, rows, walks[number].step(step, taken(x, rows), v_of_rows))
            moves = 1
        for _ in range(int(calls[step, 0]) - moves):
            environment.idle(step)
        if acts is not None:
            if len(acting):
                features.forget()
                _put(x, acting, acts(step, acting, taken(x, acting), condition[acting]))
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

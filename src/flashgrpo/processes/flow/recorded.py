"""Scores of the stochastic steps of a rollout: recorded as they are drawn, and computed again by `RecordedSteps`."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.process import Record
from flashgrpo.processes.flow.choices import Recorded, Stochastic
from flashgrpo.processes.flow.network import GuidedNetwork
from flashgrpo.processes.flow.retain import Graphs, room_for_graphs
from flashgrpo.processes.flow.rollout import Around, MicroBatch, exact_velocities, plan, with_a_graph
from flashgrpo.processes.flow.settings import RolloutConfig
from flashgrpo.processes.flow.source import Names, Score, Source, group_of, names_of
from flashgrpo.processes.flow.state import FlowState, KeptGraph
from flashgrpo.processes.flow.table import StepTable
from flashgrpo.processes.settings import needs_old_velocity
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Latents, Sample, index_rows, to_device


class RecordedSteps(Source):
    """A unit is a trained stochastic step, and its slot is the step's number.

    Args:
        exact: the network with the guidance of stochastic steps.
    """

    def __init__(
        self,
        exact: GuidedNetwork,
        explore: Stochastic,
        score: Recorded,
        rollout: RolloutConfig,
        micro_batch: int,
        world: World,
    ) -> None:
        super().__init__(exact.model, micro_batch, world)
        self.exact, self.explore, self.score, self.rollout = exact, explore, score, rollout
        self.table: StepTable = explore.noise(exact.grid.sigmas)
        self.graphs: Graphs | None = None

    def plan(self, samples: Sequence[Sample], seed: int) -> list[MicroBatch]:
        """Return the micro-batches of a rollout, each of one pattern of stochastic steps."""
        if not samples:
            return []
        names = torch.tensor([sample.name for sample in samples])
        steps, num_steps, update = self.explore.steps, self.exact.grid.num_steps, int(names[0, 0])
        stochastic = steps.mask(seed, update, names[:, 1], num_steps, members=names[:, 2])
        trained = steps.trained(seed, update, names[:, 1], num_steps, members=names[:, 2])
        return plan(stochastic, trained, self.rollout.deterministic_steps, self.rollout.micro_batch)

    def begin(
        self, samples: Sequence[Sample], condition: Condition, seed: int, uses: int, columns: Sequence[str]
    ) -> "RecordedDrawing":
        """With several uses the velocities of the weights that draw are kept where the ratio or a column needs them."""
        keep_v = (self.score.ratio.needs_old_velocity or needs_old_velocity(columns)) and uses > 1
        recorder = Recorder(self.graphs_for(seed) if uses == 1 else None, keep_v)
        return RecordedDrawing(self, samples, names_of(samples, seed), condition, recorder, seed)

    def record(self, samples: Sequence[Sample], state: FlowState, seed: int) -> Record:
        """Return the record of a state of all units of these samples."""
        device = self.model.device
        weight, old = torch.empty(0, device=device), state.log_prob
        if len(state):
            steps, num_steps, update = self.explore.steps, self.exact.grid.num_steps, samples[0].group.update
            weight = self.score.weighting.weights(self.table, steps.candidates(num_steps), state.k)
            factors = steps.factors(seed, update, num_steps)
            weight = to_device(weight * torch.tensor([factors.get(k, 1.0) for k in state.k.tolist()]), device)
            _, old = self.score.ratio.scores(self.table, state.k, state.log_prob, state.log_prob, state.x, state.x)
        key, channel = group_of(samples)[state.sample], torch.zeros_like(state.sample)
        return Record(state.k, torch.arange(len(state)), state.sample, key, channel, weight, old, state)

    @property
    def keeps_graphs(self) -> bool:  # type: ignore[override]
        """Whether the last rollout has left its graphs to the update."""
        return self.graphs is not None and self.graphs.kept

    def graphs_for(self, seed: int) -> Graphs | None:
        """Made when the first samples are drawn, in the memory that is then left."""
        settings, one = self.rollout, torch.zeros(1).long()
        if settings.retain is False or self.world.uses_fsdp or self.world.context > 1 or self.model.offloads:
            return None
        if self.graphs is None:
            trained = self.explore.steps.trained(seed, 0, one, settings.num_steps, members=one)
            own = len(self.world.share(settings.prompts * settings.group_size))
            calls = -(-own * int(trained.sum()) // self.micro_batch)
            self.graphs = Graphs(calls, None if settings.retain else room_for_graphs(self.model.device))
        return self.graphs

    def micro_batches(self, record: Record) -> Sequence[Record]:
        """Units whose graph was kept go together as they were drawn; the others in batches of `micro_batch`."""
        state: FlowState = record.state  # type: ignore[assignment]
        with_graph = [one.units for one in state.kept]
        rest = torch.ones(len(record), dtype=torch.bool)
        for units in with_graph:
            rest[units] = False
        left = rest.nonzero().flatten()
        return [record[units] for units in (*(left.split(self.micro_batch) if len(left) else ()), *with_graph)]

    def replay(self, record: Record, columns: Sequence[str]) -> Score:
        """Log-density of each recorded step, or what the ratio makes of it, with its KLs.

        "kl" is to the base model, "kl_average" to the average, "kl_old" from the policy that drew. Without recorded
        velocities v is the old one, too.
        """
        state: FlowState = record.state  # type: ignore[assignment]
        table, k, step = self.table, state.k, int(state.k[0])
        v = self.velocities(step, state) if state.graph is None else state.graph
        log_prob = table.log_prob(k, state.x_next, state.x, v)
        old_v = v if state.old_v is None else state.old_v
        score, _ = self.score.ratio.scores(table, k, log_prob, state.log_prob, v, old_v)
        others = dict(self.by_other_weights(columns, lambda: self.velocities(step, state)))
        if "kl_old" in columns:
            others["kl_old"] = old_v.detach()
        return score, {name: table.kl(k, v, other) for name, other in others.items()}

    def velocities(self, k: int, state: FlowState) -> Latents:
        """Of the network as it is now, in batches of one size."""
        return torch.cat(exact_velocities(self.exact, k, state.x, state.conditions, self.micro_batch))

    def unfilled(self, record: Record) -> Float32[Tensor, " terms"]:
        """Return the log-densities by one call of exactly these units."""
        state: FlowState = record.state  # type: ignore[assignment]
        v = self.exact.velocity(int(state.k[0]), state.x, state.conditions)
        return self.table.log_prob(state.k, state.x_next, state.x, v)

    def stage(self, slot: int) -> nn.Module:
        """Return the expert that computes step `slot`."""
        return self.model.expert(float(self.exact.grid.timesteps[slot]))

    def call_on_nothing(self, slot: int) -> Tensor:
        """Return the call of step `slot`."""
        return self.exact.idle(slot)


@dataclass(frozen=True)
class RecordedDrawing:
    """The samples of an update while they are drawn; see `Drawing`."""

    source: RecordedSteps
    samples: Sequence[Sample]
    names: Names
    condition: Condition
    recorder: "Recorder"
    seed: int

    def act(self, batch: MicroBatch) -> "StochasticStep":
        """Return what makes and records the stochastic steps of a micro-batch."""
        own = [self.names[row] for row in batch.rows.tolist()]
        source = self.source
        return StochasticStep(
            source.exact, source.table, source.micro_batch, batch, own, self.condition[batch.rows], self.recorder
        )

    def record(self, latents: Latents) -> Record:
        """Return the recorded steps, by sample, then by step."""
        shape, device = self.source.model.latent_shape, self.source.model.device
        return self.source.record(self.samples, self.recorder.state(self.condition, shape, device), self.seed)


@dataclass(frozen=True)
class StochasticStep:
    """Makes and records the stochastic steps of a micro-batch: each is the policy's action, computed exactly.

        pi(x_{k+1} | x_k, condition) = N( mean(k, x_k, v), std_k^2 I ),   v = velocity of the network with guidance

    Args:
        exact: the network as replay calls it, on `size` rows at a time.
        names: (seed, update, group, member) of each sample; they name its noise.
    """

    exact: GuidedNetwork
    table: StepTable
    size: int
    batch: MicroBatch
    names: Sequence[tuple[int, int, int, int]]
    condition: Condition
    recorder: "Recorder" = field(repr=False)

    def __call__(self, k: int, x: Latents) -> Latents:
        """x_{k+1}, which is recorded where step k is trained."""
        trained, steps = k in self.batch.trained, torch.full((len(x),), k)
        noise = torch.stack([normal(tuple(x.shape[1:]), seed, "step", *name, k) for seed, *name in self.names])
        around = self.recorder.around(self.exact.model.network) if trained else nullcontext
        parts = exact_velocities(self.exact, k, x, self.condition, self.size, around)
        v = torch.cat(parts).detach()
        x_next = self.table.sample(steps, x, v, to_device(noise, x.device))
        if trained:
            log_prob = self.table.log_prob(steps, x_next, x, v)
            self.recorder.add(self.batch.rows, k, x, x_next, log_prob, v, parts)
        return x_next


class Recorder:
    """The trained steps of a rollout as they are drawn."""

    def __init__(self, graphs: Graphs | None, keep_v: bool) -> None:
        self._graphs, self._keep_v = graphs, keep_v
        if graphs:
            graphs.begin()
        self._names: list[Int64[Tensor, "2 batch"]] = []  # sample and step of each unit
        self._columns: list[tuple[Tensor, ...]] = []
        self._parts: list[Sequence[Tensor]] = []

    def around(self, network: nn.Module) -> Around:
        """Return what goes around each call for a trained step: the call's graph is left where it is to be kept."""
        return partial(self._graphs.of, network) if self._graphs else with_a_graph

    def add(
        self,
        rows: Int64[Tensor, " batch"],
        k: int,
        x: Latents,
        x_next: Latents,
        log_prob: Float32[Tensor, " batch"],
        v: Latents,
        parts: Sequence[Tensor],
    ) -> None:
        """A step of some samples, whose velocities are `parts`, one after the other."""
        self._names.append(torch.stack([rows, torch.full_like(rows, k)]))
        self._columns.append((x, x_next, log_prob, v if self._keep_v else log_prob))
        kept = self._graphs is not None and self._graphs.kept
        if not kept:
            self._parts.clear()  # now, and not when the rollout ends
        self._parts.append(parts if kept else ())

    def state(self, condition: Condition, shape: Sequence[int], device: torch.device) -> FlowState:
        """All of them, by sample, then by step."""
        if not self._names:
            none = torch.empty(0, dtype=torch.int64)
            nothing = torch.empty(0, *shape, device=device)
            return FlowState(none, none, nothing, nothing, torch.empty(0, device=device), condition)
        sample, k = torch.cat(self._names, dim=1)
        order = (sample * (int(k.max()) + 1) + k).argsort()
        x, x_next, log_prob, v = (index_rows(torch.cat(column), order) for column in zip(*self._columns, strict=True))
        old_v = v if self._keep_v else None
        return FlowState(sample[order], k[order], x, x_next, log_prob, condition, old_v, self._kept(order))

    def _kept(self, order: Int64[Tensor, " units"]) -> list[KeptGraph]:
        """The graphs by their units; the first is left out and replayed, since else nothing would show a drift."""
        if not self._graphs or not self._graphs.kept:
            return []
        place, first, kept = order.argsort(), 0, []
        for v in (part for parts in self._parts for part in parts):
            kept.append(KeptGraph(place[first : first + len(v)], v))
            first += len(v)
        return kept[1:]

"""Scores of finished samples that are noised again: a forward process, which needs no stochastic step."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.process import Record
from flashgrpo.processes import renoise
from flashgrpo.processes.calls import fixed_batches, number_of_calls
from flashgrpo.processes.flow.choices import Renoised
from flashgrpo.processes.flow.model import GridPoint, VideoModel
from flashgrpo.processes.flow.rollout import Around, MicroBatch, plan, with_a_graph
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.processes.flow.settings import RolloutConfig
from flashgrpo.processes.flow.source import Score, Source, group_of
from flashgrpo.processes.settings import needs_old_velocity
from flashgrpo.seeds import normal
from flashgrpo.types import Condition, Latents, Sample, index_rows, to_device


@dataclass(frozen=True)
class RenoisedState:
    """Samples at noise levels, U units: the sample of each, and what names its level and its noise.

    `x0` and `condition` have a row for each of this rank's samples, not for each unit; noise is drawn again by name.
    `old_v` is the velocity by the weights that drew, where a column needs it for several uses.

    Args:
        seed: of the run.
        names: (update, group, member, number of the level) of each unit's noise.
    """

    seed: int
    sample: Int64[Tensor, " units"]
    names: Int64[Tensor, "units 4"]
    sigma: Float64[Tensor, " units"]
    timestep: Shaped[Tensor, " units"]
    x0: Float[Tensor, "samples channels frames height width"]
    condition: Condition
    old_v: Float[Tensor, "units channels frames height width"] | None = None

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, units: Int64[Tensor, " some"]) -> "RenoisedState":
        """Return the state of some units."""
        return RenoisedState(
            self.seed,
            self.sample[units],
            self.names[units],
            self.sigma[units],
            self.timestep[units],
            self.x0,
            self.condition,
            None if self.old_v is None else index_rows(self.old_v, units),
        )

    def noised(self) -> tuple[Latents, Latents]:
        """Return x_t = (1 - t) x0 + t eps of each unit, and the velocity u = eps - x0 that leads there."""
        shape = tuple(self.x0.shape[1:])
        noise = torch.stack([normal(shape, self.seed, "renoised", *name) for name in self.names.tolist()])
        eps, x0 = to_device(noise, self.x0.device).to(self.x0.dtype), index_rows(self.x0, self.sample)
        t = to_device(self.sigma.to(x0.dtype), x0.device).view(-1, *[1] * (x0.ndim - 1))
        return (1 - t) * x0 + t * eps, eps - x0


class RenoisedSamples(Source):
    """A unit is a sample at one noise level; its slot is the expert that computes there, in the order of the grid."""

    def __init__(
        self,
        model: VideoModel,
        grid: SigmaGrid,
        score: Renoised,
        rollout: RolloutConfig,
        micro_batch: int,
        world: World,
    ) -> None:
        super().__init__(model, micro_batch, world)
        self.grid, self.score, self.rollout = grid, score, rollout

    @cached_property
    def _stages(self) -> dict[nn.Module, float]:
        """Each expert, with a timestep at which it computes."""
        stages: dict[nn.Module, float] = {}
        for timestep in (*self.grid.timesteps.double().tolist(), 0.0):
            stages.setdefault(self.model.expert(timestep), timestep)
        return stages

    def plan(self, samples: Sequence[Sample], seed: int) -> list[MicroBatch]:
        """Return the micro-batches of a rollout without stochastic steps."""
        if not samples:
            return []
        none = torch.zeros(len(samples), self.grid.num_steps, dtype=torch.bool)
        return plan(none, none, self.rollout.deterministic_steps, self.rollout.micro_batch)

    def begin(
        self, samples: Sequence[Sample], condition: Condition, seed: int, uses: int, columns: Sequence[str]
    ) -> "RenoisedDrawing":
        """What is replayed once is judged by the weights that drew: then nothing is computed before the update."""
        return RenoisedDrawing(self, samples, condition, seed, uses, columns)

    def units_of(self, samples: Sequence[Sample], x0: Latents, condition: Condition, seed: int) -> RenoisedState:
        """Return every sample at each of its levels; members of a group have one level and noise where `shared`."""
        positions, names, rows = list[float](), list[tuple[int, int, int, int]](), list[int]()
        for row, sample in enumerate(samples):
            update, group, member = sample.name
            name = (update, group, 0 if self.score.shared else member)
            for number, position in enumerate(self.score.positions(self.grid.num_steps, seed, *name)):
                positions.append(position)
                names.append((*name, number))
                rows.append(row)
        sigma, timestep = levels(self.grid, torch.tensor(positions, dtype=torch.float64))
        of = torch.tensor(names, dtype=torch.int64).view(-1, 4)
        return RenoisedState(seed, torch.tensor(rows, dtype=torch.int64), of, sigma, timestep, x0, condition)

    def slots(self, state: RenoisedState) -> Int64[Tensor, " units"]:
        """Return the number of the expert that computes each unit."""
        order = list(self._stages)
        experts = [order.index(self.model.expert(timestep)) for timestep in state.timestep.double().tolist()]
        return torch.tensor(experts, dtype=torch.int64)

    @torch.no_grad()
    def old(self, state: RenoisedState, slot: Int64[Tensor, " units"], keep_v: bool) -> tuple[Tensor, Latents | None]:
        """The scores by the weights that draw, computed as a replay does, and the velocities; all ranks together."""
        scores, kept = torch.empty(len(state), device=self.model.device), list[Tensor]()
        every, order = torch.arange(len(state)), list[Tensor]()
        units = slot.bincount(minlength=len(self._stages)).tolist()
        calls = torch.tensor([number_of_calls(count, self.micro_batch) for count in units])
        missing = (
            self.world.max_over_ranks(calls) - calls
        ).tolist()  # asked before the first call: ranks call together
        for number in range(len(self._stages)):
            for rows, v, u in self._called(state, every[slot == number], with_a_graph):
                scores.index_copy_(0, to_device(rows, scores.device), self._score(state[rows], v, u))
                kept.append(v if keep_v else v[:0])
                order.append(rows)
            for _ in range(missing[number]):
                self.call_on_nothing(number)
        if not keep_v:
            return scores, None
        none = torch.empty(0, *self.model.latent_shape, device=self.model.device)
        place = torch.cat([every[:0], *order]).argsort()
        return scores, index_rows(torch.cat([none, *kept]), place)

    def micro_batches(self, record: Record) -> Sequence[Record]:
        """Cut the units of one slot into batches of `micro_batch`."""
        return [record[units] for units in torch.arange(len(record)).split(self.micro_batch) if len(units)]

    def replay(self, record: Record, columns: Sequence[str]) -> Score:
        """Return minus the error of each unit's velocity; see `renoise.py`.

        "kl", "kl_average" and "kl_old" are mean squared distances of velocities: to the base model, to the average and
        to the policy that drew. "toward:b" and "away:b" are the errors of v+ and v- of DiffusionNFT at beta b. Without
        recorded velocities v is the old one, too.
        """
        state: RenoisedState = record.state  # type: ignore[assignment]
        x, u = state.noised()
        v = self._velocity(state, x)
        old_v = v.detach() if state.old_v is None else state.old_v
        others = dict(self.by_other_weights(columns, lambda: self._velocity(state, x)))
        if "kl_old" in columns:
            others["kl_old"] = old_v
        found = {name: renoise.distance(v, other) for name, other in others.items()}
        kind, sigma = self.score.weight, self._sigma(state)
        for beta in (name.removeprefix("toward:") for name in columns if name.startswith("toward:")):
            toward, away = renoise.contrast(kind, sigma, v, old_v, u, float(beta))
            found |= {f"toward:{beta}": toward, f"away:{beta}": away}
        return self._score(state, v, u), found

    def _score(self, state: RenoisedState, v: Latents, u: Latents) -> Tensor:
        return -renoise.error(self.score.weight, self._sigma(state), v, u)

    def _sigma(self, state: RenoisedState) -> Tensor:
        return to_device(state.sigma.to(state.x0.dtype), state.x0.device)

    def _called(
        self, state: RenoisedState, units: Int64[Tensor, " some"], around: Around
    ) -> Iterator[tuple[Int64[Tensor, " batch"], Latents, Latents]]:
        """Units, their velocities and targets, a call of the network at a time; nothing of the graph is kept."""
        for rows in units.split(self.micro_batch) if len(units) else ():
            x, u = state[rows].noised()
            yield rows, self._velocity(state[rows], x, around).detach(), u

    def _velocity(self, state: RenoisedState, x: Latents, around: Around = nullcontext) -> Latents:
        """At most `micro_batch` units, filled up to so many, so that equal units have equal bits."""
        ((rows, new),) = fixed_batches(len(x), self.micro_batch)
        with around():
            return self._call(state[rows], index_rows(x, rows))[:new]

    def _call(self, state: RenoisedState, x: Latents) -> Latents:
        scale = torch.full((len(x),), self.score.guidance_scale)
        return self.model.velocity(x, GridPoint(state.timestep, state.sigma, scale), state.condition[state.sample])

    def unfilled(self, record: Record) -> Float32[Tensor, " terms"]:
        """Compute the scores by one call of exactly these units."""
        state: RenoisedState = record.state  # type: ignore[assignment]
        x, u = state.noised()
        return self._score(state, self._call(state, x), u)

    def stage(self, slot: int) -> nn.Module:
        """Return the expert with this number."""
        return list(self._stages)[slot]

    def call_on_nothing(self, slot: int) -> Tensor:
        """Call the expert with this number on one row of zeros."""
        timestep = torch.tensor([list(self._stages.values())[slot]], dtype=self.grid.timesteps.dtype)
        one = torch.ones(1, dtype=torch.float64)
        return self.model.idle(GridPoint(timestep, one, torch.full((1,), self.score.guidance_scale)))


@dataclass(frozen=True)
class RenoisedDrawing:
    """The samples of an update while they are drawn; see `Drawing`."""

    source: RenoisedSamples
    samples: Sequence[Sample]
    condition: Condition
    seed: int
    uses: int
    columns: Sequence[str]

    def act(self, batch: MicroBatch) -> None:
        """No step is stochastic."""
        return None

    def record(self, latents: Latents) -> Record:
        """Record every sample at each of its levels, by sample, then by level."""
        state = self.source.units_of(self.samples, latents, self.condition, self.seed)
        slot, old = self.source.slots(state), None
        if self.uses > 1:
            old, old_v = self.source.old(state, slot, needs_old_velocity(self.columns))
            state = replace(state, old_v=old_v)
        key, channel = group_of(self.samples)[state.sample], torch.zeros_like(state.sample)
        weight = torch.ones(len(state), device=latents.device)
        return Record(slot, torch.arange(len(state)), state.sample, key, channel, weight, old, state)


def levels(
    grid: SigmaGrid, positions: Float64[Tensor, " batch"]
) -> tuple[Float64[Tensor, " batch"], Shaped[Tensor, " batch"]]:
    """Return the sigma and the timestep at positions on a grid, between its points too: k is its k-th point.

    Example: on a grid of sigmas 1, 0.75, 0 the position 0.5 is sigma 0.875, and 1.5 is 0.375.
    """
    k = positions.long()
    share = positions - k
    sigmas, timesteps = grid.sigmas, torch.cat([grid.timesteps, grid.timesteps.new_zeros(1)]).double()
    sigma, timestep = ((1 - share) * row[k] + share * row[k + 1] for row in (sigmas, timesteps))
    return sigma, timestep.to(grid.timesteps.dtype)

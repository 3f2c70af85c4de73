"""The flow process: a rectified-flow model whose stochastic denoising steps are drawn, recorded and scored again."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from flashgrpo.distributed.sharding import blocks_of
from flashgrpo.distributed.world import World
from flashgrpo.process import Columns, Cost, Finding, OnDrawn, Outputs, Record
from flashgrpo.processes.flow.checks import flow_checks
from flashgrpo.processes.flow.cost import guided_steps, update_cost
from flashgrpo.processes.flow.float8 import Float8
from flashgrpo.processes.flow.model import VideoModel
from flashgrpo.processes.flow.network import GuidedNetwork, guidance_of
from flashgrpo.processes.flow.retain import Graphs, room_for_graphs
from flashgrpo.processes.flow.rollout import (
    Act,
    MicroBatch,
    Recorder,
    Start,
    calls_of,
    exact_velocities,
    noise_of,
    plan,
    run_together,
    shared_starts,
    walk,
)
from flashgrpo.processes.flow.settings import Recorded, RolloutConfig, SamplingConfig, Stochastic
from flashgrpo.processes.flow.shortcuts import DeterministicSteps, leaders
from flashgrpo.processes.flow.state import FlowState
from flashgrpo.seeds import Name
from flashgrpo.types import REWARD, Condition, Latents, LoraStyle, Prompt, Sample, Videos, to_device


class FlowProcess:
    """A video flow model as a `Process`: a unit is a trained stochastic step, and its slot is the step's number.

    Attributes:
        micro_batch: units replayed at once, and rows of every call of the network whose result is judged.
    """

    channels: Sequence[str] = (REWARD,)
    addends = 1

    def __init__(
        self,
        model: VideoModel,
        explore: Stochastic,
        score: Recorded,
        rollout: RolloutConfig,
        sampling: SamplingConfig,
        micro_batch: int,
        world: World,
    ) -> None:
        self.model = model
        self.explore, self.score = explore, score
        self.rollout, self.sampling = rollout, sampling
        self.micro_batch = micro_batch
        self.world = world
        self.grid = model.grid(rollout.num_steps)
        self.table = explore.noise(self.grid.sigmas)
        scales = rollout.guidance_scale, rollout.guidance_scale_2
        self.guidance = guidance_of(model, self.grid, *scales, rollout.guidance_interval)
        self.exact = GuidedNetwork(model, self.grid, self.guidance.stochastic)
        self._graphs: Graphs | None = None

    @cached_property
    def moves(self) -> DeterministicSteps:
        """How a sample moves where its steps are not stochastic, in a rollout."""
        rollout, model = self.rollout, self.model
        float8 = Float8(blocks_of(model.network)) if rollout.deterministic_dtype == "float8" else None
        dtype = torch.bfloat16 if rollout.deterministic_dtype else None
        network = GuidedNetwork(model, self.grid, self.guidance.deterministic, dtype, float8, compiled=True)
        return DeterministicSteps(network, rollout.solver, rollout.deterministic_steps, rollout.reuse)

    def sampler(self, num_steps: int | None = None) -> DeterministicSteps:
        """Sampling without noise and without shortcuts, with the guidance and the solver of evaluations."""
        own, rollout = self.sampling, self.rollout
        grid = self.model.grid(num_steps or own.num_steps)
        second = rollout.guidance_scale_2 if own.guidance_scale is None else own.guidance_scale_2
        scales = own.guidance_scale or rollout.guidance_scale, own.guidance_scale_2 or second
        network = GuidedNetwork(self.model, grid, guidance_of(self.model, grid, *scales).stochastic, compiled=True)
        return DeterministicSteps(network, own.solver)

    def exploring(self, explore: Stochastic, score: Recorded) -> "FlowProcess":
        """The same model, not copied or loaded again, that draws and scores otherwise."""
        other = copy.copy(self)
        other.explore, other.score = explore, score
        other.table = explore.noise(self.grid.sigmas)
        other._graphs = None
        return other

    @property
    def network(self) -> nn.Module:
        """The network, with all experts where there are several."""
        return self.model.network

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.device

    @property
    def identity(self) -> str:
        """Tells the base weights from others, wherever they lie."""
        return self.model.identity

    @property
    def takes_image(self) -> bool:
        """Whether each prompt has to come with its video's first frame, in a column `image`."""
        return self.model.takes_image

    @property
    def keeps_graphs(self) -> bool:
        """Whether the last rollout has left its graphs to the update."""
        return self._graphs is not None and self._graphs.kept

    # Drawing

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """The rows of the prompts' texts, and of their images where the family takes them."""
        return self.model.encode(prompts)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before any are cut off."""
        return self.model.token_counts(texts)

    @torch.no_grad()
    def draw(
        self, samples: Sequence[Sample], seed: int, on_drawn: OnDrawn, uses: int = 1, columns: Sequence[str] = ()
    ) -> tuple[Outputs, Record]:
        """Draw samples: stochastic where `explore.steps` says, deterministic elsewhere; see `Process`.

        With shared initial noise the steps before the first stochastic one are computed once for a group's samples in a
        micro-batch.
        """
        names = [(seed, *sample.name) for sample in samples]
        condition = self.encode([sample.group.prompt for sample in samples]) if samples else self.model.nothing()
        keep_v = (self.score.ratio.needs_old_velocity or "kl_old" in columns) and uses > 1
        recorder = Recorder(self._graphs_for(seed) if uses == 1 else None, keep_v)

        def start(batch: MicroBatch) -> Start:
            own, of_batch = [names[row] for row in batch.rows.tolist()], condition[batch.rows]
            starts = shared_starts(own, self.explore.shared_noise)
            first, of = leaders(starts)
            act = Act(self.exact, self.table, self.micro_batch, batch, own, of_batch, recorder)
            return Start(noise_of(self.model, [starts[row] for row in first.tolist()]), of_batch[first], of, act)

        latents = self._walk_all(self.moves, self._plan(samples, seed), start, on_drawn)
        state = recorder.state(condition, self.model.latent_shape, self.device)
        return latents, self._record(samples, state)

    def _plan(self, samples: Sequence[Sample], seed: int) -> list[MicroBatch]:
        """The micro-batches of a rollout."""
        if not samples:
            return []
        names = torch.tensor([sample.name for sample in samples])
        steps, num_steps, update = self.explore.steps, self.grid.num_steps, int(names[0, 0])
        stochastic = steps.mask(seed, update, names[:, 1], num_steps, members=names[:, 2])
        trained = steps.trained(seed, update, names[:, 1], num_steps, members=names[:, 2])
        return plan(stochastic, trained, self.rollout.deterministic_steps, self.rollout.micro_batch)

    def _walk_all(
        self,
        moves: DeterministicSteps,
        batches: Sequence[MicroBatch],
        start: Callable[[MicroBatch], Start],
        on_drawn: OnDrawn,
    ) -> Latents:
        """Walk every micro-batch; the final latents of all samples."""
        grid, features = moves.network.grid, moves.features()

        def stage(k: int) -> nn.Module:
            return self.model.expert(float(grid.timesteps[k]))

        latents = torch.empty(sum(len(batch.rows) for batch in batches), *self.model.latent_shape, device=self.device)
        walks = [walk(moves, features, batch, start, latents, on_drawn) for batch in batches]
        calls = [calls_of(batch, stage, self.micro_batch) for batch in batches]
        stages = {stage(k): k for k in range(grid.num_steps)}
        run_together(walks, batches, calls, stages, stage, moves.network.idle, self.world)
        features.forget()
        return latents

    def _record(self, samples: Sequence[Sample], state: FlowState) -> Record:
        candidates = self.explore.steps.candidates(self.grid.num_steps)
        weight = torch.empty(0, device=self.device)
        old = state.log_prob
        if len(state):
            weight = to_device(self.score.weighting.weights(self.table, candidates, state.k), self.device)
            _, old = self.score.ratio.scores(self.table, state.k, state.log_prob, state.log_prob, state.x, state.x)
        group = torch.tensor([sample.group.group for sample in samples], dtype=torch.int64)
        key, channel = group[state.sample], torch.zeros_like(state.sample)
        return Record(state.k, torch.arange(len(state)), state.sample, key, channel, weight, old, state)

    def _graphs_for(self, seed: int) -> Graphs | None:
        """Made when the first samples are drawn, in the memory that is then left."""
        settings, one = self.rollout, torch.zeros(1).long()
        if settings.retain is False or self.world.uses_fsdp or self.world.context > 1 or self.model.offloads:
            return None
        if self._graphs is None:
            trained = self.explore.steps.trained(seed, 0, one, settings.num_steps, members=one)
            own = len(self.world.share(settings.prompts * settings.group_size))
            calls = -(-own * int(trained.sum()) // self.micro_batch)
            self._graphs = Graphs(calls, None if settings.retain else room_for_graphs(self.device))
        return self._graphs

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], names: Sequence[Name], on_drawn: OnDrawn, num_steps: int | None = None
    ) -> Outputs:
        """Draw deterministically on the grid of `sampling`, or of `num_steps` steps; see `Process`."""
        condition = self.encode(prompts) if prompts else self.model.nothing()
        moves = self.sampler(num_steps)

        def start(batch: MicroBatch) -> Start:
            rows = batch.rows
            noise = noise_of(self.model, [names[row] for row in rows.tolist()])
            return Start(noise, condition[rows], torch.arange(len(rows)))

        every = torch.arange(len(prompts)).split(self.rollout.micro_batch) if prompts else ()
        batches = [MicroBatch(rows, range(moves.network.grid.num_steps)) for rows in every]
        return self._walk_all(moves, batches, start, on_drawn)

    def media(self, outputs: Outputs, frames: int | None = None) -> Videos:
        """Videos (B, F, 3, H, W) in [0, 1] of latents; with `frames` only the first of F."""
        return self.model.decode(outputs, frames)

    # Scoring again

    def micro_batches(self, record: Record) -> Sequence[Record]:
        """Units whose graph was kept go together as they were drawn; the others in batches of `micro_batch`."""
        state: FlowState = record.state  # type: ignore[assignment]
        with_graph = [one.units for one in state.kept]
        rest = torch.ones(len(record), dtype=torch.bool)
        for units in with_graph:
            rest[units] = False
        left = rest.nonzero().flatten()
        return [record[units] for units in (*(left.split(self.micro_batch) if len(left) else ()), *with_graph)]

    def replay(self, record: Record, columns: Sequence[str]) -> list[tuple[Float32[Tensor, " terms"], Columns]]:
        """Log-density of each recorded step, or what the ratio makes of it, with its KLs.

        "kl" is to the base model, "kl_old" from that which drew. Without recorded velocities v is the old one, too.
        """
        state: FlowState = record.state  # type: ignore[assignment]
        table, k, step = self.table, state.k, int(state.k[0])
        v = self._exact(step, state) if state.graph is None else state.graph
        log_prob = table.log_prob(k, state.x_next, state.x, v)
        old_v = v if state.old_v is None else state.old_v
        score, _ = self.score.ratio.scores(table, k, log_prob, state.log_prob, v, old_v)
        found = {"kl_old": table.kl(k, v, old_v.detach())} if "kl_old" in columns else {}
        if "kl" in columns:
            with torch.no_grad(), self.model.reference():
                found["kl"] = table.kl(k, v, self._exact(step, state))
        return [(score, found)]

    def _exact(self, k: int, state: FlowState) -> Latents:
        return torch.cat(exact_velocities(self.exact, k, state.x, state.conditions, self.micro_batch))

    def stage(self, slot: int) -> nn.Module:
        """The expert that computes step `slot`."""
        return self.model.expert(float(self.grid.timesteps[slot]))

    def idle(self, slot: int, columns: Sequence[str]) -> Tensor:
        """Take part in the collectives of a replay of step `slot`, without a gradient of one's own."""
        v = self.exact.idle(slot)
        if "kl" in columns:
            with torch.no_grad(), self.model.reference():
                self.exact.idle(slot)
        return v

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context the network is the base model."""
        return self.model.reference()

    # What it costs, whether it is sound, getting the result out

    def cost(self, seed: int, update: int, passes: int, columns: Sequence[str]) -> Cost:
        """Forwards of an update, with guidance where this model's grid has it; see `cost.py`."""
        guided, recomputes = guided_steps(self.model, self.rollout), self.model.recomputes
        return update_cost(self.explore, self.rollout, seed, update, passes, columns, recomputes, guided)

    def checks(self, record: Record, outputs: Outputs, seed: int, thorough: bool) -> Sequence[Finding]:
        """Residual noise, the evaluation's sampler, and how far rounding would move a ratio."""
        return flow_checks(self, record, outputs, seed, thorough)

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write trained adapters as the family's own pipeline loads them, or as ComfyUI does."""
        return self.model.save_lora(folder, tensors, style)

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a whole pipeline with the trained parameters in it."""
        self.model.save_merged(folder, tensors)

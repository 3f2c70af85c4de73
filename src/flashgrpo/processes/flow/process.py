"""The flow process: a rectified-flow model whose stochastic denoising steps are drawn, recorded and scored again."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from flashgrpo.distributed.sharding import blocks_of
from flashgrpo.distributed.world import World
from flashgrpo.process import Columns, Cost, Finding, OnDrawn, Outputs, PipelineCall, Record
from flashgrpo.processes.flow.checks import flow_checks
from flashgrpo.processes.flow.choices import Explore, Renoised, ScoreKind, Stochastic, branches_of
from flashgrpo.processes.flow.cost import guided_steps, update_cost
from flashgrpo.processes.flow.float8 import Float8
from flashgrpo.processes.flow.model import VideoModel
from flashgrpo.processes.flow.network import GuidedNetwork, guidance_of
from flashgrpo.processes.flow.recorded import RecordedSteps
from flashgrpo.processes.flow.renoised import RenoisedSamples
from flashgrpo.processes.flow.rollout import (
    MicroBatch,
    Start,
    calls_of,
    noise_of,
    run_together,
    shared_starts,
    walk,
)
from flashgrpo.processes.flow.settings import RolloutConfig, SamplingConfig
from flashgrpo.processes.flow.shortcuts import DeterministicSteps, leaders
from flashgrpo.processes.flow.source import Source, names_of
from flashgrpo.processes.of_model import ModelProcess
from flashgrpo.seeds import Name
from flashgrpo.types import Latents, Prompt, Sample, Videos, Waves


class FlowProcess(ModelProcess[VideoModel]):
    """A video flow model as a `Process`.

    Attributes:
        source: what is scored of the samples: units, slots and all that a replay needs are its own.
        micro_batch: units replayed at once, and rows of every call of the network whose result is judged.
    """

    def __init__(
        self,
        model: VideoModel,
        explore: Explore,
        score: ScoreKind,
        rollout: RolloutConfig,
        sampling: SamplingConfig,
        micro_batch: int,
        world: World,
    ) -> None:
        super().__init__(model, micro_batch, world)
        self.explore, self.score = explore, score
        self.rollout, self.sampling = rollout, sampling
        self.grid = model.grid(rollout.num_steps)
        scales = rollout.guidance_scale, rollout.guidance_scale_2
        self.guidance = guidance_of(model, self.grid, *scales, rollout.guidance_interval)
        self.source = self._source()

    @cached_property
    def moves(self) -> DeterministicSteps:
        """Return how a sample moves where its steps are not stochastic, in a rollout."""
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

    def exploring(self, explore: Explore, score: ScoreKind) -> "FlowProcess":
        """Return the same model, not copied or loaded again, that draws and scores otherwise."""
        other = super().exploring(explore, score)
        other.source = other._source()
        other.source.average = self.source.average
        return other

    def set_average(self, weights: Callable[[], AbstractContextManager[None]]) -> None:
        """Say in which context the network has the averaged weights that an objective stays near."""
        self.source.average = weights

    def _source(self) -> Source:
        explore, score, rollout = self.explore, self.score, self.rollout
        if isinstance(score, Renoised):
            return RenoisedSamples(self.model, self.grid, score, rollout, self.micro_batch, self.world)
        assert isinstance(explore, Stochastic), "refused by `check_score`"
        exact = GuidedNetwork(self.model, self.grid, self.guidance.stochastic)
        return RecordedSteps(exact, explore, score, rollout, self.micro_batch, self.world)

    @property
    def takes_image(self) -> bool:
        """Whether each prompt has to come with its video's first frame, in a column `image`."""
        return self.model.takes_image

    # Drawing

    @torch.no_grad()
    def draw(
        self, samples: Sequence[Sample], seed: int, on_drawn: OnDrawn, uses: int = 1, columns: Sequence[str] = ()
    ) -> tuple[Outputs, Record]:
        """Draw samples: stochastic where `explore.steps` says, deterministic elsewhere; see `Process`.

        With shared initial noise the steps before the first stochastic one are computed once for a group's samples in a
        micro-batch.
        """
        names = names_of(samples, seed)
        condition = self.encode([sample.group.prompt for sample in samples])
        drawing = self.source.begin(samples, condition, seed, uses, columns)

        def start(batch: MicroBatch) -> Start:
            own, of_batch = [names[row] for row in batch.rows.tolist()], condition[batch.rows]
            starts = shared_starts(own, self.explore.shared_noise)
            first, of = leaders(starts)
            noise = noise_of(self.model, [starts[row] for row in first.tolist()])
            return Start(noise, of_batch[first], of, drawing.act(batch))

        batches = self.source.plan(samples, seed)
        latents = self._walk_all(self.moves, batches, start, on_drawn)
        return latents, drawing.record(latents)

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

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], names: Sequence[Name], on_drawn: OnDrawn, num_steps: int | None = None
    ) -> Outputs:
        """Draw deterministically on the grid of `sampling`, or of `num_steps` steps; see `Process`."""
        condition = self.encode(prompts)
        moves = self.sampler(num_steps)

        def start(batch: MicroBatch) -> Start:
            rows = batch.rows
            noise = noise_of(self.model, [names[row] for row in rows.tolist()])
            return Start(noise, condition[rows], torch.arange(len(rows)))

        every = torch.arange(len(prompts)).split(self.rollout.micro_batch) if prompts else ()
        batches = [MicroBatch(rows, range(moves.network.grid.num_steps)) for rows in every]
        return self._walk_all(moves, batches, start, on_drawn)

    def media(self, outputs: Outputs, frames: int | None = None) -> Videos:
        """Return videos (B, F, 3, H, W) in [0, 1] of latents; with `frames` only the first of F."""
        return self.model.decode(outputs, frames)

    @property
    def sample_rate(self) -> int | None:
        """Samples a second of the sound, where the family makes some."""
        return self.model.sample_rate

    def sound(self, outputs: Outputs) -> Waves:
        """Return the sound of latents that hold some."""
        return self.model.decode_sound(outputs)

    # Scoring again

    def micro_batches(self, record: Record) -> Sequence[Record]:
        """Units of one slot in batches of `micro_batch`; what shares a graph goes together."""
        return self.source.micro_batches(record)

    def replay(self, record: Record, columns: Sequence[str]) -> list[tuple[Float32[Tensor, " terms"], Columns]]:
        """Return the score of each unit, and the columns asked for, by the weights that there are now; see `source`."""
        return [self.source.replay(record, columns)]

    def stage(self, slot: int) -> nn.Module:
        """Return the expert that computes a slot."""
        return self.source.stage(slot)

    def idle(self, slot: int, columns: Sequence[str]) -> list[Tensor]:
        """Take part in the collectives of a replay, without a gradient of one's own."""
        return [self.source.idle(slot, columns)]

    # What it costs, whether it is sound, getting the result out

    def cost(self, seed: int, update: int, passes: int, columns: Sequence[str], uses: int = 1) -> Cost:
        """Forwards of an update, with guidance where this model's grid has it; see `cost.py`."""
        guided, recomputes = guided_steps(self.model, self.rollout), self.model.recomputes
        how = self.explore, self.score, self.rollout
        branches = branches_of(self.model.guidance)
        return update_cost(*how, seed, update, passes, columns, uses, recomputes, guided, branches)

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall:
        """Return the family's own pipeline, and the arguments as it names and counts them."""
        return self.model.pipeline_call(given)

    def checks(self, record: Record, outputs: Outputs, seed: int, thorough: bool) -> Sequence[Finding]:
        """Residual noise, the evaluation's sampler, and how far rounding would move a ratio."""
        return flow_checks(self, record, outputs, seed, thorough)

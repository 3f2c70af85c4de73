"""Flow models of videos: `processes/flow`."""

import math
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import highest, highest_with, size_of
from flashgrpo.distributed.sharding import blocks_of
from flashgrpo.distributed.world import World
from flashgrpo.models.load import META, Say, branches, load_model, weightless
from flashgrpo.models.settings import ModelConfig
from flashgrpo.process import Cost
from flashgrpo.processes.flow.choices import Explore, ScoreKind, branches_of
from flashgrpo.processes.flow.cost import (
    Guided,
    branches_of_replay,
    guided_steps,
    latents_per_unit,
    scored_while_drawn,
    units_per_sample,
    update_cost,
)
from flashgrpo.processes.flow.float8 import check_float8, frozen_layers
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.settings import RolloutConfig, SamplingConfig
from flashgrpo.types import Condition, Prompt


def make_process(config: RunConfig, world: World, prompts: Sequence[Prompt], say: Say | None = None) -> FlowProcess:
    """Load the model of a run, with the process that draws from it; see `Kind`."""
    rollout, sampling = config.rollout, config.evaluation
    assert isinstance(rollout, RolloutConfig)
    assert isinstance(sampling, SamplingConfig)
    if rollout.deterministic_dtype == "float8":
        check_float8(world.device)  # before anything is loaded
    model = load_model(config.model, world, config.seed, prompts, config.algorithm.objective.needs_reference, say)
    return FlowProcess(model, *_chosen(config), rollout, sampling, config.optim.micro_batch, world)


def planned_cost(config: RunConfig, update: int) -> Cost:
    """Return what an update will cost; guidance counts where the model's own grid has it."""
    settings = config.rollout
    assert isinstance(settings, RolloutConfig)
    plain = settings.guidance_scale_2 is None and tuple(settings.guidance_interval) == (0, 1)
    return update_cost(
        *_chosen(config),
        settings,
        config.seed,
        update,
        config.optim.passes,
        config.algorithm.objective.columns,
        config.uses,
        config.model.gradient_checkpointing,
        None if plain else _guided(config.model, settings),
        branches(config.model),
    )


@lru_cache(maxsize=64)
def _guided(model: ModelConfig, settings: RolloutConfig) -> Guided:
    """Which steps run two branches: only the model knows their sigmas, and which expert computes them."""
    return guided_steps(weightless(model), settings)


class FlowMemory:
    """What a flow model takes, counted on its full size without weights; see `Memory`."""

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.rollout, RolloutConfig)
        self._config, self._rollout = config, config.rollout
        self._explore, self._score = _chosen(config)
        self._model: Any = weightless(config.model)
        self.network: nn.Module = self._model.network
        self.networks: Sequence[nn.Module] = list(self._model.experts.values())
        self.decoder: nn.Module = nn.ModuleDict(self._model.source.decoders)
        self._branches = branches_of(self._model.guidance)
        self._call = cache(self._count_call)
        self._replay = cache(self._count_replay)
        self._decode = cache(self._count_decoding)

    @property
    def further_weights(self) -> int:
        """Bytes of the frozen layers once more, in float8."""
        if self._rollout.deterministic_dtype != "float8":
            return 0
        return sum(layer.weight.numel() for layer in frozen_layers(blocks_of(self.network)))

    @property
    def sample(self) -> float:
        """Bytes of a sample that has been drawn: its latents and its condition."""
        return self._bytes_of_latents(1.0)

    def kept(self, samples: int) -> Mapping[str, int]:
        """Count what is kept of samples from the rollout to the end of the update, and graphs that are to be kept.

        Where it is left to the run, graphs are kept only if they fit.
        """
        columns, uses = self._config.algorithm.objective.columns, self._config.uses
        units = units_per_sample(self._explore, self._score, self._rollout, self._config.seed)
        recorded = {"samples": self._bytes_of_latents(1 + units * latents_per_unit(self._score, columns, uses))}
        if self._rollout.retain:
            recorded["graphs"] = units * self.update(samples) / min(samples, self._config.optim.micro_batch)
        return {name: round(samples * size) for name, size in recorded.items()}

    def drawing(self, samples: int) -> int:
        """Count a call of the rollout on a micro-batch of these."""
        judged = scored_while_drawn(self._score, self._config.uses)
        return max(self.sampling(samples), self._replay(self._rows_of_replay(samples))[0] if judged else 0)

    def update(self, samples: int) -> int:
        """Count a replay of a micro-batch with its backward pass."""
        return self._replay(self._rows_of_replay(samples))[1]

    def sampling(self, samples: int) -> int:
        """Count a call without gradients on a micro-batch."""
        two = self._rollout.guidance_scale > 1
        return self._call(min(samples, self._rollout.micro_batch) * (self._branches if two else 1))

    def decoding(self, samples: int) -> int:
        """Count decoding a micro-batch."""
        return self._decode(min(samples, self._rollout.decode_micro_batch))

    def _count_decoding(self, rows: int) -> int:
        latents = torch.zeros(rows, *self._model.latent_shape, device=META)
        model, weights = self._model, list(self.decoder.parameters())
        sound = highest(lambda: model.decode_sound(latents), weights) if model.sample_rate else 0
        return max(highest(lambda: model.decode_latents(model.pipeline.vae, latents), weights), sound)

    def _rows_of_replay(self, samples: int) -> int:
        branches = branches_of_replay(self._score, self._rollout, self._branches)
        return min(samples, self._config.optim.micro_batch) * branches

    def _bytes_of_latents(self, latents: float | int) -> float:
        """Count the bytes of so many latents of a sample, and of its condition."""
        return math.prod(self._model.latent_shape) * 4 * latents + size_of(self._model.nothing().tensors.values())

    def _count_call(self, rows: int) -> int:
        return self._count(rows, graph=False)[0]

    def _count_replay(self, rows: int) -> tuple[int, int]:
        """Count a call with its graph, and with the backward pass."""
        return self._count(rows, graph=True)

    def _count(self, rows: int, graph: bool) -> tuple[int, int]:
        model, network = self._model, self.networks[0]
        row = model.nothing().tensors
        condition = Condition({name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in row.items()})
        x = torch.zeros(rows, *model.latent_shape, device=META)
        point = GridPoint(torch.zeros(rows), torch.ones(rows, dtype=torch.float64), torch.ones(rows))

        def backward(v: Tensor) -> None:
            if graph:
                v.square().mean().backward()

        outside = [*network.parameters(), x, *condition.tensors.values()]
        counted = highest_with(lambda: model.forward(network, x, point, condition), backward, outside, graph)
        call, whole = (count // self._config.parallel.context + x.numel() * 4 for count in counted)
        return call, whole


memory = FlowMemory


def units_of_sample(config: RunConfig) -> float:
    """Return how many units a sample has, the mean over the groups of the first update."""
    assert isinstance(config.rollout, RolloutConfig)
    return units_per_sample(*_chosen(config), config.rollout, config.seed)


def _chosen(config: RunConfig) -> tuple[Explore, ScoreKind]:
    explore, score = config.algorithm.explore, config.algorithm.score
    assert isinstance(explore, Explore)
    assert isinstance(score, ScoreKind)
    return explore, score

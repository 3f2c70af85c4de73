"""Draws a few samples of a model with any algorithm, for the tests of the flow process."""

from typing import Any

import torch

from flashgrpo.distributed.world import single_process
from flashgrpo.models.lora import trained_parameters
from flashgrpo.presets import Algorithm
from flashgrpo.process import Record
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.settings import RolloutConfig, SamplingConfig
from flashgrpo.types import Latents, Prompt, PromptGroup, Sample

WORLD = single_process()
TEXTS = [
    "a red circle moving left slowly",
    "a blue square moving up quickly",
    "a green triangle moving down slowly",
    "a yellow circle moving right quickly",
]
PROMPTS = [Prompt(text, {}) for text in TEXTS]


def samples_of(groups: int, size: int, update: int = 0) -> list[Sample]:
    """The samples of some prompt groups."""
    every = [PromptGroup(update, number, PROMPTS[number], size) for number in range(groups)]
    return [Sample(group, member) for group in every for member in range(size)]


def make_process(model, algorithm: Algorithm, steps=6, micro_batch=64, exact=2, **rollout: Any) -> FlowProcess:
    """A process with guidance 2 that denoises `micro_batch` samples at once and replays `exact` units at once."""
    settings = {"num_steps": steps, "guidance_scale": 2.0, "micro_batch": micro_batch, "retain": False, **rollout}
    config = RolloutConfig.model_validate(settings)
    return FlowProcess(model, algorithm.explore, algorithm.score, config, SamplingConfig(), exact, WORLD)


def draw(
    model, algorithm: Algorithm, groups=3, size=2, update=0, uses=1, columns=(), **settings: Any
) -> tuple[FlowProcess, Latents, Record]:
    """A process, with the samples of some groups drawn from it."""
    process = make_process(model, algorithm, **settings)
    return process, *draw_from(process, samples_of(groups, size, update), uses, columns)


def draw_from(process: FlowProcess, samples: list[Sample], uses: int = 1, columns=()) -> tuple[Latents, Record]:
    """Draw these samples, with seed 0."""
    return process.draw(samples, 0, lambda rows, latents: None, uses, columns)


def perturb(model) -> None:
    """Move the adapters off their start, where the B matrices are zero and half of the gradient vanishes."""
    noise = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(model.network).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise)

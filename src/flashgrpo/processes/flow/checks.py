"""What the doctor has to know of the flow process: no noise is left in the videos, and rounding moves no ratio."""

from typing import TYPE_CHECKING

import torch

from flashgrpo.process import Finding, Record
from flashgrpo.processes.flow.choices import Stochastic
from flashgrpo.processes.flow.shortcuts import visited
from flashgrpo.processes.flow.state import FlowState
from flashgrpo.types import Latents

if TYPE_CHECKING:
    from flashgrpo.processes.flow.process import FlowProcess


def flow_checks(process: "FlowProcess", record: Record, latents: Latents, seed: int, thorough: bool) -> list[Finding]:
    """All of them, on samples that `draw` has drawn."""
    if isinstance(record.state, FlowState):
        residual = residual_noise(process, record.state, latents, seed)
    else:
        residual = Finding("residual noise", "sound", "no step of a rollout is stochastic", {"distance": None})
    quick = [residual, evaluation_sampler(process)]
    return [*quick, rounding(process, record)] if thorough else quick


def residual_noise(process: "FlowProcess", state: FlowState, latents: Latents, seed: int) -> Finding:
    """No noise stays in the videos: the last step is deterministic, and recorded steps lead to the final latents."""
    if process.grid.num_steps - 1 in state.k.tolist():
        sentence = "the last step is stochastic, so its noise stays in the videos that are scored"
        return Finding("residual noise", "unsound", sentence)
    distance = distance_to_finish(process, state, latents, seed)
    if distance is None:
        return Finding("residual noise", "sound", "the last step is deterministic", {"distance": None})
    if not distance < 1e-2:
        sentence = f"the videos are not what their recorded step leads to: latents differ by {distance:.1%}"
        return Finding("residual noise", "unsound", sentence, {"distance": distance})
    sentence = f"from the recorded step on, latents are those of a deterministic finish ({distance:.1g} apart)"
    return Finding("residual noise", "sound", sentence, {"distance": distance})


def evaluation_sampler(process: "FlowProcess") -> Finding:
    """Evaluation samples without noise."""
    sampler = process.sampler()
    steps = sampler.network.grid.num_steps
    x = torch.ones(1, *process.model.latent_shape)
    once, again = (sampler.walk(range(steps)).step(0, x, x) for _ in range(2))
    if not torch.equal(once, again):
        sentence = (
            "evaluation adds noise at its steps as training does, so its scores are not those of the model in use"
        )
        return Finding("evaluation sampler", "unsound", sentence)
    sentence = f"evaluation is deterministic, {steps} steps where training takes {process.grid.num_steps}"
    return Finding("evaluation sampler", "sound", sentence)


@torch.no_grad()
def distance_to_finish(process: "FlowProcess", state: FlowState, latents: Latents, seed: int) -> float | None:
    """The largest distance between latents and a noiseless finish of their last recorded step, relative to their size.

    None where no sample can be followed, or features are reused, which depend on what else is drawn. Samples are
    finished in the micro-batches that they were drawn in, one of each pattern of steps: in bf16 other batches round
    differently, and guidance multiplies that.
    """
    if process.world.uses_fsdp or not len(state) or process.rollout.reuse:
        return None  # calls of a network that is held between ranks have to be made by all of them
    batches = _drawn_together(state, process.rollout.micro_batch)
    assert isinstance(process.explore, Stochastic)
    steps, num_steps = process.explore.steps, process.grid.num_steps
    groups = torch.arange(process.rollout.prompts)
    unrecorded = steps.mask(seed, 0, groups, num_steps) & ~steps.trained(seed, 0, groups, num_steps)
    if unrecorded[:, min(int(batch.k.min()) for batch in batches) + 1 :].any():
        return None  # a step that is stochastic and not trained follows
    return max(_finish(process, batch, latents) for batch in batches)


def _drawn_together(state: FlowState, size: int) -> list[FlowState]:
    """The last recorded steps of the samples of a micro-batch, of one micro-batch for each pattern; see `plan`."""
    of_sample: dict[int, list[int]] = {}
    for row, sample in enumerate(state.sample.tolist()):  # sorted by sample, then by step
        of_sample.setdefault(sample, []).append(row)
    patterns: dict[tuple[int, ...], list[int]] = {}
    for rows in of_sample.values():
        patterns.setdefault(tuple(state.k[rows].tolist()), []).append(rows[-1])
    return [state[torch.tensor(rows[:size])] for rows in patterns.values()]


def _finish(process: "FlowProcess", batch: FlowState, latents: Latents) -> float:
    """The same of units of one step."""
    step, num_steps = int(batch.k[0]), process.grid.num_steps
    x, condition, moves = batch.x_next, batch.conditions, process.moves
    visits = visited(torch.arange(num_steps)[None] == step, moves.steps)[0]
    points = [k for k in visits.nonzero().flatten().tolist() if k > step]
    path = moves.walk(points)
    for k in points:
        x = path.step(k, x, moves.velocity(k, x, condition))
    expected = latents[batch.sample.to(latents.device)]
    return float((x - expected).abs().max() / expected.abs().max())


def rounding(process: "FlowProcess", record: Record) -> Finding:
    """Return how far ratios would be from 1 if replays were cut into other batches than rollouts."""
    floor = noise_floor(process, record)
    if floor is None:
        return Finding("rounding", "sound", "not measured where ranks hold the network between them", {"floor": None})
    sentence = f"if replays were cut in other batches, ratios would be off by {floor:.1g}; they are not"
    return Finding("rounding", "sound", sentence, {"floor": floor})


@torch.no_grad()
def noise_floor(process: "FlowProcess", record: Record) -> float | None:
    """Return the largest |ratio - 1| between forwards of one row each and one forward of all rows."""
    if process.world.uses_fsdp or not len(record):
        return None
    batch = record[torch.arange(min(len(record), process.micro_batch))]
    batch = batch[(batch.slot == batch.slot[0]).nonzero().flatten()]
    rows = torch.arange(len(batch)).split(1)
    singly = torch.cat([process.source.unfilled(batch[row]) for row in rows])
    return float(torch.expm1(process.source.unfilled(batch) - singly).abs().max())

"""What an update costs, in network forwards: the unit in which algorithms are compared whatever the machine.

One unit is one forward of the network for one sample. A backward pass counts two, and one more where the blocks are
computed again in it (`model.gradient_checkpointing`). A step with guidance runs the network on two branches and counts
twice. So a rollout of B samples and N steps costs, with b_k branches at step k,

    rollout = B sum_k b_k        update = sum over the trained transitions of b_k passes (1 + 2 [+ 1] [+ 1])

where k runs over the points at which a sample stops: all N, or fewer with `rollout.deterministic_steps`. With shared
initial noise a group is one sample until its first stochastic step. The second [+ 1] is the base model's forward that a
KL penalty (`kl_coef` above 0) needs. With flash-grpo at 20 steps a sample costs 20 + 3, with flow-grpo 20 + 57.
A graph that is kept from the rollout (`rollout.retain`) saves the update's forward; memory decides it, so it is
counted all the same.

Of re-noised samples the update replays every noise level of each, and a rollout that is replayed more than once (or
drawn by other weights) scores each before, to compare with. Their guidance is `score.guidance_scale`.

Not counted are the rows that only fill a batch up (`processes/calls.py`, and ranks that wait), a group's start again
in each micro-batch that holds a part of it, decoding, rewards, the optimizer's step and evaluations: a comparison gives
those to every algorithm alike, or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashgrpo.process import Cost
from flashgrpo.processes.flow.choices import Deterministic, Explore, Recorded, ScoreKind, branches_of
from flashgrpo.processes.flow.model import VideoModel
from flashgrpo.processes.flow.network import guidance_of
from flashgrpo.processes.flow.settings import RolloutConfig
from flashgrpo.processes.flow.shortcuts import leaders, visited
from flashgrpo.processes.flow.steps import StepMask
from flashgrpo.processes.settings import needs_old_velocity


@dataclass(frozen=True)
class Guided:
    """Whether step k runs two branches: where it is deterministic, and where it is stochastic; (N,) each."""

    deterministic: Sequence[bool]
    stochastic: Sequence[bool]


def guided_steps(model: VideoModel, rollout: RolloutConfig) -> Guided:
    """Which steps of a rollout run two branches."""
    grid = model.grid(rollout.num_steps)
    scales = rollout.guidance_scale, rollout.guidance_scale_2
    guidance = guidance_of(model, grid, *scales, rollout.guidance_interval)
    two = branches_of(model.guidance) == 2
    return Guided((two & (guidance.deterministic > 1)).tolist(), (two & (guidance.stochastic > 1)).tolist())


def update_cost(
    explore: Explore,
    score: ScoreKind,
    rollout: RolloutConfig,
    seed: int,
    update: int,
    passes: int,
    columns: Sequence[str],
    uses: int,
    recomputes: bool,
    guided: Guided | None = None,
    branches: int = 2,
) -> Cost:
    """Return what update number `update` (from 0) of a run costs; the seed alone decides which steps it trains.

    Args:
        passes: over a rollout.
        columns: what the objective asks of a replay: "kl" and "kl_average" take a forward by other weights.
        uses: how often `draw` was told that a unit is replayed.
        recomputes: whether a backward pass computes the blocks again.
        guided: when it is not given, as the guidance scales say. Which of two experts computes a step, and which
            sigmas lie in `rollout.guidance_interval`, only the model knows: without it every step counts as guided
            where a scale is above 1, and the cost is an upper bound.
        branches: of a call with guidance: one where the network is fed its scale.

    Example: 4 samples of 20 steps without guidance cost 80 + 12 with flash-grpo, 80 + 228 with flow-grpo.
    """
    size = rollout.group_size
    if guided is None:
        scale = max(rollout.guidance_scale, rollout.guidance_scale_2 or 1)
        every = [branches == 2 and scale > 1] * rollout.num_steps
        guided = Guided(every, every)
    moves, acts = (1 + torch.tensor(which).long() for which in (guided.deterministic, guided.stochastic))
    groups = torch.arange(rollout.prompts).repeat_interleave(size)
    members = torch.arange(size).repeat(rollout.prompts)
    stochastic, trained = masks(explore, seed, update, groups, rollout.num_steps, members)
    visits = visited(stochastic, rollout.deterministic_steps)
    if explore.shared_noise:
        first, _ = leaders(list(zip(groups.tolist(), map(tuple, stochastic.tolist()), strict=True)))
        leads = torch.zeros(len(groups), dtype=torch.bool)
        leads[first] = True
        visits &= leads[:, None] | (stochastic.cumsum(dim=1) > 0)
    drawn = int((visits * torch.where(stochastic, acts, moves)).sum())
    each = passes * (3 + recomputes + sum(name in columns for name in ("kl", "kl_average")))
    if isinstance(score, Recorded):
        return Cost(drawn, int((trained * acts).sum()) * each)
    scored = len(groups) * score.count(rollout.num_steps) * branches_of_replay(score, rollout, branches)
    return Cost(drawn + (scored if scored_while_drawn(score, uses) else 0), scored * each)


def masks(
    explore: Explore, seed: int, update: int, groups: Tensor, num_steps: int, members: Tensor
) -> tuple[StepMask, StepMask]:
    """Return which steps of each sample are stochastic, and which of those are trained, (B, N); none of an ODE."""
    if isinstance(explore, Deterministic):
        none = torch.zeros(len(groups), num_steps, dtype=torch.bool)
        return none, none
    steps = explore.steps
    return (
        steps.mask(seed, update, groups, num_steps, members=members),
        steps.trained(seed, update, groups, num_steps, members=members),
    )


def branches_of_replay(score: ScoreKind, rollout: RolloutConfig, branches: int = 2) -> int:
    """Return how many branches a call of the network has in an update, at most; `branches` with guidance."""
    return branches if (rollout if isinstance(score, Recorded) else score).guidance_scale > 1 else 1


def scored_while_drawn(score: ScoreKind, uses: int) -> bool:
    """Whether a rollout calls the network with gradients enabled; re-noised samples that are replayed once need not."""
    return isinstance(score, Recorded) or uses > 1


def units_per_sample(explore: Explore, score: ScoreKind, rollout: RolloutConfig, seed: int) -> float:
    """Return how many units a sample has, the mean over the groups of the first update."""
    if not isinstance(score, Recorded):
        return float(score.count(rollout.num_steps))
    groups = torch.arange(rollout.prompts)
    _, trained = masks(explore, seed, 0, groups, rollout.num_steps, torch.zeros_like(groups))
    return float(trained.sum()) / rollout.prompts


def latents_per_unit(score: ScoreKind, columns: Sequence[str], uses: int) -> int:
    """Return how many latents a unit keeps from its rollout to the end of its update."""
    if isinstance(score, Recorded):
        return 2 + (uses > 1 and (score.ratio.needs_old_velocity or needs_old_velocity(columns)))
    return int(uses > 1 and needs_old_velocity(columns))

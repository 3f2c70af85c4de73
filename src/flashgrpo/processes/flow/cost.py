"""What an update costs, in network forwards: the unit in which algorithms are compared whatever the machine.

One unit is one forward of the network for one sample. A backward pass counts two, and one more where the blocks are
computed again in it (`model.gradient_checkpointing`). A step with guidance runs the network on two branches and counts
twice. So a rollout of B samples and N steps costs, with b_k branches at step k,

    rollout = B sum_k b_k        update = sum over the trained transitions of b_k (passes (1 + 2 [+ 1] [+ 1]) [+ 1])

where k runs over the points at which a sample stops: all N, or fewer with `rollout.deterministic_steps`. With shared
initial noise a group is one sample until its first stochastic step. The second [+ 1] is the base model's forward that a
KL penalty (`kl_coef` above 0) needs, and the third, once for all passes, that of the policy before it moves, where the
ratio needs its velocity and the update has several optimizer steps. With flash-grpo at 20 steps that is 20 + 3 for each
sample, with flow-grpo 20 + 57. A graph that is kept from the rollout (`rollout.retain`) saves the update's forward;
memory decides of that, so it is counted all the same.

Not counted are the rows that only fill a batch up (`Policy.exact_velocity`, and ranks that wait), a group's start again
in each micro-batch that holds a part of it, decoding, rewards, the optimizer's step and evaluations: a comparison gives
those to every algorithm alike, or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flashgrpo.config import RunConfig
from flashgrpo.processes.flow.shortcuts import leaders, visited


@dataclass(frozen=True)
class Cost:
    """Network forwards of one update, in forwards of one sample."""

    rollout: int
    update: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.rollout + self.update


@dataclass(frozen=True)
class Guided:
    """Whether step k runs two branches: where it is deterministic, and where it is stochastic; (N,) each."""

    deterministic: Sequence[bool]
    stochastic: Sequence[bool]


def update_cost(config: RunConfig, update: int, guided: Guided | None = None) -> Cost:
    """What update number `update` (from 0) of a run costs; which steps it trains is a function of the seed alone.

    Args:
        guided: when it is not given, as the guidance scales say. Which of two experts computes a step, and which
            sigmas lie in `rollout.guidance_interval`, only the model knows: without it every step counts as guided
            where a scale is above 1, and the cost is an upper bound.

    Example: 4 samples of 20 steps without guidance cost 80 + 12 with flash-grpo, 80 + 228 with flow-grpo.
    """
    settings = config.rollout
    steps, size = settings.num_steps, settings.group_size
    if guided is None:
        every = [max(settings.guidance_scale, settings.guidance_scale_2 or 1) > 1] * steps
        guided = Guided(every, every)
    moves, acts = (1 + torch.tensor(which).long() for which in (guided.deterministic, guided.stochastic))
    groups = torch.arange(settings.prompts).repeat_interleave(size)
    members = torch.arange(size).repeat(settings.prompts)
    trained = config.algorithm.steps.trained(config.seed, update, groups, steps, members=members)
    algorithm, optim = config.algorithm, config.optim
    stochastic = algorithm.steps.mask(config.seed, update, groups, steps, members=members)
    visits = visited(stochastic, settings.deterministic_steps)
    if algorithm.grouping.shared_noise:
        leader = leaders([(group, 0) for group in groups.tolist()], stochastic)
        follows = (leader != torch.arange(len(groups)))[:, None] & (stochastic.cumsum(dim=1) == 0)
        visits &= ~follows
    rollout = int((visits * torch.where(stochastic, acts, moves)).sum())
    each = optim.passes * (3 + config.model.gradient_checkpointing + (algorithm.kl_coef > 0))
    each += algorithm.ratio.needs_old_velocity and optim.passes * optim.minibatches > 1
    return Cost(rollout, int((trained * acts).sum()) * each)

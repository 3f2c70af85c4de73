"""The parts of a run put together, and one rollout batch brought as far as its advantages."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flashgrpo.config import RunConfig
from flashgrpo.distributed.sharding import blocks_of
from flashgrpo.distributed.world import World, use_threads
from flashgrpo.errors import UserError
from flashgrpo.learning.advantage import combine_advantages
from flashgrpo.learning.optim import Optimizer
from flashgrpo.models.load import load_model
from flashgrpo.models.lora import trained_parameters
from flashgrpo.presets import Algorithm
from flashgrpo.processes.flow.cost import Guided
from flashgrpo.processes.flow.float8 import Float8, check_float8
from flashgrpo.processes.flow.model import Transitions, VideoModel
from flashgrpo.processes.flow.policy import Policy, guidance_by_step
from flashgrpo.processes.flow.retain import Graphs, room_for_graphs
from flashgrpo.processes.flow.rollout import rollout
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.processes.flow.settings import RolloutConfig
from flashgrpo.processes.flow.shortcuts import Environment, within
from flashgrpo.prompts import prompt_groups, read_prompts
from flashgrpo.scoring.heldout import Evaluator
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import Scoring, untimed
from flashgrpo.types import Latents, Prompt, PromptGroup, RewardTable, Sample

Phases = Callable[[str], AbstractContextManager[None]]  # a clock: `with clock("rollout"): ...`


class Assembly:
    """Everything that a run computes with; nothing here knows of files that are written, or of how far a run is."""

    def __init__(self, config: RunConfig, world: World, say: Callable[[str], None] | None = None) -> None:
        self.config = config
        self.world = world
        self.prompts = read_prompts(config.prompts.train, "prompts.train")
        self.heldout = read_prompts(config.prompts.heldout, "prompts.heldout")
        self.rewards = Rewards(config.rewards, config.model.fps)
        self.rewards.check_columns(self.prompts[0], "prompts.train")
        self.rewards.check_columns(self.heldout[0], "prompts.heldout")
        for name, reward in config.rewards.items():
            if reward.max_fall is not None and len(self.heldout) < 2:
                raise UserError(f"rewards.{name}.max_fall: an interval needs at least two held-out prompts")
        use_threads(config.parallel.threads)
        groups, size = config.rollout.prompts, config.rollout.group_size
        drawn = (prompt_groups(self.prompts, config.seed, update, groups, size) for update in range(config.updates))
        self.used = [*{id(g.prompt): g.prompt for update in drawn for g in update}.values(), *self.heldout]
        if config.rollout.deterministic_dtype == "float8":
            check_float8(world.device)
        model = load_model(config.model, world, config.seed, self.used, config.algorithm.kl_coef > 0, say)
        self.rewards.load(world)  # after the prompts' encoders have made room, and before anything is drawn
        grid, settings = model.grid(config.rollout.num_steps), config.rollout
        table = config.algorithm.noise(grid.sigmas)
        of_policy, of_environment = guidance(model, grid, settings)
        self.policy = Policy(model, grid, table, of_policy, config.optim.micro_batch)
        self.environment = Environment(
            model,
            grid,
            of_environment,
            settings.solver,
            settings.deterministic_steps,
            torch.bfloat16 if settings.deterministic_dtype else None,
            Float8(blocks_of(model.network)) if settings.deterministic_dtype == "float8" else None,
            settings.reuse,
        )
        self.optimizer = Optimizer(trained_parameters(model.network), config.optim, world)
        self.graphs = self._graphs()  # in the memory that is left
        self.evaluator = Evaluator(model, config, self.heldout, self.rewards, world)

    def scoring(self, prompts: Sequence[Prompt], clock: Phases = untimed) -> Scoring:
        """The trained rewards of samples that are about to be drawn, of all ranks."""
        config, batch = self.config, self.config.rollout.decode_micro_batch
        offloads = config.model.offload
        model = self.policy.model
        return Scoring(self.rewards, model, self.world, prompts, False, batch, at_once=offloads, clock=clock)

    def _graphs(self) -> Graphs | None:
        config, rollout, one = self.config, self.config.rollout, torch.zeros(1).long()
        if rollout.retain is False or config.replays:
            return None
        trained = config.algorithm.steps.trained(config.seed, 0, one, rollout.num_steps, members=one)
        own = len(self.world.share(rollout.prompts * rollout.group_size))
        calls = -(-own * int(trained.sum()) // config.optim.micro_batch)
        return Graphs(calls, None if rollout.retain else room_for_graphs(self.world.device))

    @property
    def guided(self) -> Guided:
        """Which steps run two branches."""
        return _guided(self.policy.guidance, self.environment.guidance)

    def with_algorithm(self, algorithm: Algorithm) -> "Assembly":
        """The same parts, none of them copied or loaded again, that draw and compare as another algorithm does."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"algorithm": algorithm})
        other.policy = replace(self.policy, table=algorithm.noise(self.policy.grid.sigmas))
        other.graphs = other._graphs()
        return other


def guidance(model: VideoModel, grid: SigmaGrid, settings: RolloutConfig) -> tuple[Tensor, Tensor]:
    """The guidance scale of each step, (N,): where it is stochastic, and where it is deterministic."""
    scales = guidance_by_step(model, grid, settings.guidance_scale, settings.guidance_scale_2)
    return scales, within(scales, grid, settings.guidance_interval)


def guided_steps(model: VideoModel, settings: RolloutConfig) -> Guided:
    """Which steps of a rollout run two branches."""
    return _guided(*guidance(model, model.grid(settings.num_steps), settings))


def _guided(stochastic: Tensor, deterministic: Tensor) -> Guided:
    return Guided((deterministic > 1).tolist(), (stochastic > 1).tolist())


@dataclass(frozen=True)
class Experience:
    """One rollout batch of B samples in all, of which this rank has drawn `mine`.

    `latents` and `transitions` are this rank's; `rewards` and `advantages` (B,) are those of all samples. Videos are
    large and are not kept: they are gone when every reward has seen them.
    """

    mine: slice
    latents: Latents
    transitions: Transitions
    rewards: RewardTable
    advantages: Float[Tensor, " batch"]


def experience(parts: Assembly, groups: Sequence[PromptGroup], clock: Phases) -> Experience:
    """Draw the samples of the groups, decode and score them meanwhile, compare them within their groups."""
    config, world, policy, settings = parts.config, parts.world, parts.policy, parts.config.rollout
    samples = [Sample(group, member) for group in groups for member in range(group.size)]
    share = world.slice(len(samples))
    mine = samples[share]
    scoring = parts.scoring([sample.group.prompt for sample in samples], clock)
    with clock("rollout"):
        condition = policy.model.encode([sample.group.prompt for sample in mine or samples[:1]])
        latents, transitions = rollout(
            policy,
            parts.environment,
            mine,
            condition,
            config.algorithm,
            config.seed,
            settings.micro_batch,
            world,
            scoring.add,
            parts.graphs,
        )
    rewards = scoring.table()
    columns, grouping = list(rewards.trained), config.algorithm.grouping
    by_group = rewards.values[:, columns].unflatten(0, (len(groups), -1))
    weights = rewards.weights[columns]
    advantages = combine_advantages(by_group, weights, grouping.std, config.algorithm.adv_clip, grouping.combine)
    return Experience(share, latents, transitions, rewards, advantages.flatten())

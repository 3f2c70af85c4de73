"""The parts of a run put together: the process, the rewards, the objective and the optimizer that it trains with."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from flashgrpo.config import RunConfig
from flashgrpo.distributed.memory import explain_shortage
from flashgrpo.distributed.world import World, use_threads
from flashgrpo.errors import SharedError
from flashgrpo.files import cache_folder
from flashgrpo.kinds import kind_of
from flashgrpo.learning.behaviour import Behaviour
from flashgrpo.learning.experience import Compared, Drawn, Phases, compare, draw_and_score
from flashgrpo.learning.optim import GradientSum, Optimizer
from flashgrpo.learning.update import policy_update
from flashgrpo.models.load import Say
from flashgrpo.models.lora import trained_parameters, weights_replaced
from flashgrpo.presets import Algorithm
from flashgrpo.process import Process
from flashgrpo.prompts import prompt_groups, read_prompts, trained_on
from flashgrpo.scoring.fit import check_process
from flashgrpo.scoring.heldout import Evaluator
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import Scoring, Watch, untimed, unwatched
from flashgrpo.types import Clip, Prompt, PromptGroup, Sample, representable


class Assembly:
    """Everything that a run computes with; nothing here knows of files that are written, or of how far a run is.

    Attributes:
        used: every prompt that the run will draw or evaluate, each once.
        trained_on: held-out prompts that are training prompts; where there are some, nothing calls them held-out.
    """

    def __init__(self, config: RunConfig, world: World, say: Say | None = None, watch: Watch = unwatched) -> None:
        self.config = config
        self.world = world
        self._watch, self._watch_replay = partial(watch, "rollout"), partial(watch, "replay")
        self.prompts = read_prompts(config.prompts.train, "prompts.train")
        self.heldout = read_prompts(config.prompts.heldout, "prompts.heldout")
        self.rewards = Rewards(config.rewards, config.model.fps)
        self.rewards.check_columns(self.prompts[0], "prompts.train")
        self.rewards.check_columns(self.heldout[0], "prompts.heldout")
        self.rewards.check_guards(len(self.heldout))
        use_threads(config.parallel.threads)
        drawn = (self.prompt_groups(update) for update in range(config.updates))
        self.used = [*{id(g.prompt): g.prompt for update in drawn for g in update}.values(), *self.heldout]
        with explain_shortage("what lies on the GPU: model.dtype=bfloat16, model.offload or parallel.shard"):
            self.process = make_process(config, world, self.used, say)
        self.trained_on = trained_on(self.heldout, self.prompts, self.process.takes_image)
        check_process(self.rewards, self.process)
        self.rewards.load(world)  # after the prompts' encoders have made room, and before anything is drawn
        self.objective = config.algorithm.objective
        self.optimizer = Optimizer(trained_parameters(self.process.network), config.optim, world)
        self.behaviour = Behaviour(config.algorithm.behaviour, self.optimizer.parameters)
        self.process.set_average(self._behaviours_weights)
        self.evaluator = make_evaluator(config, self.process, self.heldout, self.rewards, world, self.trained_on, watch)

    def prompt_groups(self, update: int) -> list[PromptGroup]:
        """Return the prompt groups of an update."""
        settings, anchored = self.config.rollout, self.config.algorithm.credit.anchored
        return prompt_groups(self.prompts, self.config.seed, update, settings.prompts, settings.group_size, anchored)

    def draw_and_score(self, groups: Sequence[PromptGroup], clock: Phases, uses: int | None = None) -> Drawn:
        """Draw the samples of the groups, and score them meanwhile.

        Args:
            uses: how often the update will replay each unit, where it is not as often as `optim` says.
        """
        config = self.config
        scoring = self.scoring([sample for group in groups for sample in group.samples], clock)
        uses = uses or config.uses
        drawing = self._behaviours_weights() if self.behaviour.draws else nullcontext()
        cure = "rollout.micro_batch, or optim.micro_batch, which the trained steps are computed by"
        with drawing, explain_shortage(cure):
            return draw_and_score(
                self.process, scoring, groups, config.seed, self.world, clock, uses, self.objective.columns
            )

    def _behaviours_weights(self) -> AbstractContextManager[None]:
        return weights_replaced(self.process.network, self.behaviour.weights)

    def scoring(self, samples: Sequence[Sample], clock: Phases = untimed) -> Scoring:
        """Return the trained rewards of samples that are about to be drawn, of all ranks."""
        batch, deferred = self.config.rollout.decode_micro_batch, self.config.model.offload
        watch = self._watch if clock is not untimed else lambda done, of: None  # what is scored again is not drawn
        prompts, groups = [sample.group.prompt for sample in samples], [sample.group.group for sample in samples]

        def clips(view: str, number: int) -> Sequence[Clip]:
            return self.process.clips(view, prompts[number], (samples[number], self.config.seed))

        rewards, process = self.rewards, self.process
        settings = prompts, False, batch, (), deferred, clock, watch, groups
        return Scoring(rewards, process.media, clips, self.world, *settings, sound=process.sound)

    def compare(self, drawn: Drawn) -> Compared:
        """Compare the samples of all ranks within their keys."""
        return compare(drawn, self.process.channels, self.config.algorithm.credit, self.world)

    def refuse_dropped(self, groups: Sequence[PromptGroup], drawn: Drawn, compared: Compared) -> None:
        """End a run whose rewards are not finite in more groups of an update than it puts up with.

        Raises:
            SharedError: they are not.
        """
        dropped, limit, rewards = compared.dropped_groups, self.config.optim.max_bad_groups, drawn.rewards
        if dropped <= limit * compared.groups:
            return
        bad = ~representable(rewards.values) & (rewards.weights != 0)
        row, column = bad.nonzero()[0].tolist()
        text = [sample.group.prompt.text for group in groups for sample in group.samples][row]
        raise SharedError(
            f"rewards of update {drawn.update + 1} are not finite in {dropped} of {compared.groups} groups: reward "
            f"{rewards.names[column]} is {float(rewards.values[row, column])} for {text!r}; fix the reward, or raise "
            f"optim.max_bad_groups from {limit:g}, and start again to go on from update {drawn.update}"
        )

    def learn(self, record: Any, optimizer: GradientSum | None = None) -> dict[str, Any]:
        """Make the optimizer steps of one update; returns its metrics."""
        optimizer = optimizer or self.optimizer
        with explain_shortage("optim.micro_batch, or set model.gradient_checkpointing"):
            metrics = policy_update(
                self.process, self.objective, optimizer, record, self.config.optim, self.world, self._watch_replay
            )
        if self.behaviour.draws and optimizer is self.optimizer:
            del metrics["drift"]  # other weights have drawn, so a first ratio that is not 1 is none
        return metrics

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next update depends on, as the very tensors in use; see `Optimizer.state`."""
        return self.optimizer.state() | self.behaviour.state()

    def describe(self, drawn: Drawn, compared: Compared) -> dict[str, Any]:
        """The part of a metrics line that tells of rewards and compute; stds are over all samples of the update."""
        rewards, anchors, advantage = drawn.members.complete, drawn.anchors, compared.advantage
        total, watched = rewards.total, rewards.means(trained=False)
        spread = dict(zip(rewards.names, rewards.values.std(dim=0, correction=0).tolist(), strict=True))
        columns = self.objective.columns
        passes, uses = self.config.optim.passes, self.config.uses
        cost = self.process.cost(self.config.seed, drawn.update, passes, columns, uses)
        return {
            "reward": float(total.mean()),
            "reward_std": float(total.std(correction=0)),
            "rewards": rewards.means(trained=True),
            **({"watched": watched} if watched else {}),
            "rewards_std": spread,
            "reward_failures": dict(rewards.failures),
            "advantage_mean": float(advantage.mean()),
            "advantage_std": float(advantage.std(correction=0)),
            "advantage_max": float(advantage.abs().max()),
            "zero_spread_groups": compared.flat_groups,
            **({} if anchors is None else {"anchor_reward": float(anchors.complete.total.mean())}),
            "samples": len(drawn.rewards.total),
            "compute": asdict(cost),
            **({"dropped_groups": compared.dropped_groups} if compared.dropped_groups else {}),
        }

    def with_algorithm(self, algorithm: Algorithm) -> "Assembly":
        """The same parts, none of them copied or loaded again, that draw and compare as another algorithm does."""
        other = copy.copy(self)
        other.config = self.config.model_copy(update={"algorithm": algorithm})
        other.process = self.process.exploring(algorithm.explore, algorithm.score)
        other.objective = algorithm.objective
        other.behaviour = Behaviour(algorithm.behaviour, self.optimizer.parameters)
        other.process.set_average(other._behaviours_weights)
        return other


def make_process(config: RunConfig, world: World, prompts: Sequence[Prompt], say: Say | None = None) -> Process:
    """Load the model of a run, with the process that draws from it; encodes `prompts` before the network is loaded."""
    if config.model.condition_cache is None:
        cache = cache_folder(Path(config.out) / ".cache", say or (lambda _: None)) / "conditions"
        model = config.model.model_copy(update={"condition_cache": str(cache)})
        config = config.model_copy(update={"model": model})
    return kind_of(config).make_process(config, world, prompts, say)


def make_evaluator(
    config: RunConfig,
    process: Process,
    prompts: Sequence[Prompt],
    rewards: Rewards,
    world: World,
    trained_on: int,
    watch: Watch = unwatched,
) -> Evaluator:
    """Return the evaluation of a run's held-out prompts, of which so many are training prompts."""
    batch, deferred = config.rollout.decode_micro_batch, config.model.offload
    return Evaluator(process, config.evaluation, prompts, rewards, world, batch, deferred, trained_on, watch)

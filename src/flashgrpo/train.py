"""The main loop: roll out, score, compare within groups, update."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from flashgrpo import checkpoint
from flashgrpo.advantage import combine_advantages
from flashgrpo.checkpoint import Progress
from flashgrpo.config import Lora, RunConfig
from flashgrpo.distributed import default_device, use_threads
from flashgrpo.errors import UserError
from flashgrpo.evaluate import Evaluator, decode, record, write_videos
from flashgrpo.files import write_aside
from flashgrpo.models import load_model
from flashgrpo.models.lora import trained_parameters, weights_replaced
from flashgrpo.optim import Optimizer
from flashgrpo.policy import Policy
from flashgrpo.progress import Clock, Interrupt, Reporter
from flashgrpo.prompts import TextCache, prompt_groups, read_prompts
from flashgrpo.rollout import rollout
from flashgrpo.run_directory import RunDirectory
from flashgrpo.scoring import Rewards
from flashgrpo.types import RewardTable, Transitions
from flashgrpo.update import policy_update


def train(config: RunConfig, reporter: Reporter | None = None) -> Path:
    """Train from where the run directory stands, or from the start where it is new; returns the directory.

    An interrupt (SIGINT, SIGTERM) ends the run after the update that it is in, with a checkpoint.

    Raises:
        UserError: bad settings, files or rewards; the updates done until then are kept in a checkpoint.
    """
    config = config.with_absolute_paths()
    run = Run(config, reporter or Reporter(quiet=not config.tracking.progress))
    settings, policy = config.rollout, run.policy
    with run, Interrupt() as interrupt:
        clock = Clock()
        for update in range(run.progress.update, config.updates):
            if run.is_stale or interrupt.requested:
                break
            groups = prompt_groups(run.prompts, config.seed, update, settings.prompts, settings.group_size)
            prompts = [group.prompt for group in groups for _ in range(group.size)]
            with clock("rollout"):
                condition = run.texts([group.prompt.text for group in groups])
                latents, transitions = rollout(
                    policy, groups, condition, config.algorithm, settings.solver, config.seed, settings.micro_batch
                )
            with clock("decode"):
                videos = decode(policy.model, latents, settings.decode_micro_batch)
            with clock("reward"):
                rewards = run.rewards.score(videos, prompts, watched=False)
                advantages = advantages_of(rewards, config)
            with clock("update"):
                metrics = describe_rewards(rewards, advantages, transitions, settings.group_size)
                metrics |= policy_update(policy, run.optimizer, transitions, advantages, config.algorithm, config.optim)
            run.log(metrics, clock.lap())
            with clock("evaluate"):
                run.evaluate_if_due()
            with clock("checkpoint"):
                run.save_if_due()
    return run.directory.path


class Run:
    """A run in progress: its directory, model, optimizer and how far it has come. Opening it resumes it."""

    def __init__(self, config: RunConfig, reporter: Reporter) -> None:
        self.config = config
        self.reporter = reporter
        self.progress = Progress()
        self._evaluations: list[dict[str, Any]] = []
        self._saved = 0  # the update of the newest checkpoint that this process wrote or read
        self.directory = RunDirectory.for_training(config)
        self.prompts = read_prompts(config.prompts.train, "prompts.train")
        heldout = read_prompts(config.prompts.heldout, "prompts.heldout")
        self.rewards = Rewards(config.rewards)
        self.rewards.check_columns(self.prompts[0], "prompts.train")
        self.rewards.check_columns(heldout[0], "prompts.heldout")
        use_threads(config.parallel.threads)
        device = default_device()
        model = load_model(config.model, device, config.seed, keep_reference=config.algorithm.kl_coef > 0)
        grid = model.grid(config.rollout.num_steps)
        table = config.algorithm.noise(grid.sigmas)
        self.policy = Policy(model, grid, table, config.rollout.guidance_scale, config.optim.micro_batch)
        self.optimizer = Optimizer(trained_parameters(model.network), config.optim)
        self.texts = TextCache(model)
        self.evaluator = Evaluator(model, config, heldout, self.rewards, self.texts)
        self.directory.begin(config, device, {"prompts.train": self.prompts, "prompts.heldout": heldout})

    def __enter__(self) -> "Run":
        try:
            self._resume()
            self.reporter.start(self.progress.update, self.config.updates)
            self.evaluate_if_due()
        except BaseException:
            self._close()
            raise
        return self

    def _resume(self) -> None:
        """Score the base model once, then continue from the newest checkpoint that is whole."""
        saved = checkpoint.load_newest(self.directory.checkpoints, self.reporter.warn)
        self.directory.forget_after(saved[1].update if saved else 0)
        self._evaluations = self.directory.evaluations()
        if not self._evaluations:
            self.reporter.say("scoring the base model on the held-out prompts")
            self._evaluate(0)
        if saved:
            self.optimizer.load(saved[0])
            self.progress = saved[1]
            self._saved = self.progress.update
            done = self.progress.update >= self.config.updates
            self.reporter.say(
                f"{self.directory.path} is complete; another run needs another folder"
                if done
                else f"continuing {self.directory.path} after update {self.progress.update}"
            )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whatever ended the loop, the updates that are done are kept."""
        try:
            with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
                self.save()
        finally:
            self._close()
        if self._saved < self.progress.update:
            self.reporter.warn(f"updates after {self._saved} could not be saved and will be done again")
        if kind is None and self.progress.update < self.config.updates:
            reason = f"no new best in {self.progress.stale} evaluations" if self.is_stale else "interrupted"
            self.reporter.say(f"stopped after update {self.progress.update}: {reason}")

    def _close(self) -> None:
        self.reporter.stop()
        self.directory.close()

    @property
    def is_stale(self) -> bool:
        """Whether so many evaluations passed without a new best that the run is to stop."""
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.stale >= patience

    def log(self, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        """Append the update's line to metrics.jsonl; the update counts as done from here on."""
        line = {"update": self.progress.update + 1, **metrics, "seconds": seconds}
        self.directory.log_metrics(line)
        self.progress = replace(self.progress, update=line["update"])
        self.reporter.update(line)

    def evaluate_if_due(self) -> None:
        """Evaluate the averaged weights after every so many updates and after the last, once; export a new best."""
        update = self.progress.update
        due = update % self.config.evaluation.every == 0 or update == self.config.updates
        if not due or self._evaluations[-1]["update"] >= update:
            return
        with weights_replaced(self.policy.model.network, self.optimizer.ema):
            line = self._evaluate(update)
        if not line["best"]:
            self.progress = replace(self.progress, stale=self.progress.stale + 1)
            return
        if isinstance(self.config.model.train, Lora):
            with write_aside(self.directory.lora) as aside:
                self.policy.model.save_lora(aside, self.optimizer.ema)
        self.progress = replace(self.progress, best_update=update, stale=0)

    def _evaluate(self, update: int) -> dict[str, Any]:
        evaluation = self.evaluator()
        earlier = self._evaluations
        line = record(update, evaluation, earlier[0] if earlier else None, self.config.evaluation.samples_per_prompt)
        line["best"] = line["reward"] > max((e["reward"] for e in earlier), default=float("-inf"))
        if line["best"] or update == self.config.updates:
            base = (earlier[0] if earlier else line)["samples"]
            for row, video in write_videos(self.directory, update, evaluation, self.config.model.fps).items():
                line["samples"][row] |= {"video": video, "base_video": base[row].get("video", video)}
        self.directory.log_evaluation(line)
        self._evaluations.append(line)
        self.reporter.evaluation(line)
        return line

    def save_if_due(self) -> None:
        """Write a checkpoint after every so many updates and after every evaluation."""
        update = self.progress.update
        if update % self.config.checkpoint.every == 0 or self._evaluations[-1]["update"] == update:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this update or an update was broken off in the middle."""
        steps_per_update = self.config.optim.minibatches * self.config.optim.passes
        whole = self.optimizer.whole and self.optimizer.steps == self.progress.update * steps_per_update
        if whole and self.progress.update > self._saved:
            keep = self.config.checkpoint.keep
            checkpoint.save(self.directory.checkpoints, self.optimizer.state(), self.progress, keep)
            self._saved = self.progress.update


def advantages_of(rewards: RewardTable, config: RunConfig) -> Float[Tensor, " batch"]:
    """The advantage of each sample, (B,), from the trained components."""
    columns = list(rewards.trained)
    by_group = rewards.values[:, columns].unflatten(0, (config.rollout.prompts, config.rollout.group_size))
    grouping = config.algorithm.grouping
    return combine_advantages(
        by_group, rewards.weights[columns], grouping.std, config.algorithm.adv_clip, grouping.combine
    ).flatten()


def describe_rewards(
    rewards: RewardTable, advantages: Float[Tensor, " batch"], transitions: Transitions, group_size: int
) -> dict[str, Any]:
    """The part of a metrics line that tells of rewards and draws; stds are over all samples of the update."""
    total, by_step = rewards.total, transitions.k.bincount().tolist()
    spread = dict(zip(rewards.names, rewards.values.std(dim=0, correction=0).tolist(), strict=True))
    return {
        "reward": float(total.mean()),
        "reward_std": float(total.std(correction=0)),
        "rewards": rewards.means(trained=True),
        "rewards_std": spread,
        "advantage_mean": float(advantages.mean()),
        "advantage_std": float(advantages.std(correction=0)),
        "advantage_max": float(advantages.abs().max()),
        "zero_spread_groups": int((advantages.unflatten(0, (-1, group_size)) == 0).all(dim=1).sum()),
        "samples": len(total),
        "transitions_by_step": {str(step): count for step, count in enumerate(by_step) if count},
    }

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
    run = Run(config, reporter or Reporter(quiet=not config.tracking.progress))
    settings, policy, clock = config.rollout, run.policy, Clock()
    with run, Interrupt() as interrupt:
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
            evaluate_now = (update + 1) % config.evaluation.every == 0 or update + 1 == config.updates
            with clock("evaluate"):
                progress = run.evaluate(update + 1) if evaluate_now else replace(run.progress, update=update + 1)
            run.log(
                progress,
                {**describe_rewards(rewards, advantages, transitions, settings.group_size), **metrics},
                clock.lap(),
            )
            if evaluate_now or progress.update % config.checkpoint.every == 0:
                with clock("checkpoint"):
                    run.save()
    return run.directory.path


class Run:
    """A run in progress: its directory, model, optimizer and how far it has come. Opening it resumes it."""

    def __init__(self, config: RunConfig, reporter: Reporter) -> None:
        self.config = config
        self.reporter = reporter
        self.progress = Progress()
        self._saved = 0  # the update of the newest checkpoint that this process wrote or read
        self.directory = RunDirectory.for_training(config)
        self.prompts = read_prompts(config.prompts.train, "prompts.train")
        heldout = read_prompts(config.prompts.heldout, "prompts.heldout")
        self.rewards = Rewards(config.rewards)
        use_threads(config.parallel.threads)
        device = default_device()
        model = load_model(config.model, device, config.seed, keep_reference=config.algorithm.kl_coef > 0)
        grid = model.grid(config.rollout.num_steps)
        table = config.algorithm.noise(grid.sigmas)
        self.policy = Policy(model, grid, table, config.rollout.guidance_scale, config.optim.micro_batch)
        self.optimizer = Optimizer(trained_parameters(model.network), config.optim)
        self.texts = TextCache(model)
        self.evaluator = Evaluator(model, config, heldout, self.rewards, self.texts)
        self.directory.begin(config, device)
        self._resume()

    def _resume(self) -> None:
        """Score the base model once, then continue from the newest checkpoint that is whole."""
        saved = checkpoint.load_newest(self.directory.checkpoints, self.reporter.warn)
        self.directory.forget_after(saved[1].update if saved else 0)
        if not self.directory.evaluations():
            self.reporter.say("scoring the base model on the held-out prompts")
            self._log_evaluation(0)
        if saved:
            self.optimizer.load(saved[0])
            self.progress = saved[1]
            self._saved = self.progress.update
            self.reporter.say(f"continuing {self.directory.path} after update {self.progress.update}")

    def __enter__(self) -> "Run":
        self.reporter.start(self.progress.update, self.config.updates)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Whatever ended the loop, the updates that are done are kept."""
        with contextlib.suppress(UserError) if kind else contextlib.nullcontext():
            self.save()
        self.reporter.stop()
        self.directory.close()
        if kind is None and self.progress.update < self.config.updates:
            reason = f"no new best in {self.progress.stale} evaluations" if self.is_stale else "interrupted"
            self.reporter.say(f"stopped after update {self.progress.update}: {reason}")

    @property
    def is_stale(self) -> bool:
        """Whether so many evaluations passed without a new best that the run is to stop."""
        patience = self.config.evaluation.patience
        return patience is not None and self.progress.stale >= patience

    def evaluate(self, update: int) -> Progress:
        """Evaluate the averaged weights; returns the progress with this evaluation in it, and exports a new best."""
        with weights_replaced(self.policy.model.network, self.optimizer.ema):
            line = self._log_evaluation(update)
        best = self.progress.best_reward
        if best is not None and line["reward"] <= best:
            return replace(self.progress, update=update, stale=self.progress.stale + 1)
        if isinstance(self.config.model.train, Lora):
            with write_aside(self.directory.lora) as aside:
                self.policy.model.save_lora(aside, self.optimizer.ema)
        return Progress(update, best_update=update, best_reward=line["reward"], stale=0)

    def _log_evaluation(self, update: int) -> dict[str, Any]:
        evaluation = self.evaluator()
        earlier = self.directory.evaluations()
        line = record(update, evaluation, earlier[0] if earlier else None, self.config.evaluation.samples_per_prompt)
        line["best"] = update > 0 and line["reward"] > max((e["reward"] for e in earlier[1:]), default=float("-inf"))
        if update == 0 or line["best"] or update == self.config.updates:
            base = (earlier[0] if earlier else line)["samples"]
            for row, video in enumerate(write_videos(self.directory, update, evaluation, self.config.model.fps)):
                line["samples"][row] |= {"video": video, "base_video": base[row].get("video", video)}
        self.directory.log_evaluation(line)
        self.reporter.evaluation(line)
        return line

    def log(self, progress: Progress, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        """Append the update's line to metrics.jsonl; the update counts as done from here on."""
        line = {"update": progress.update, **metrics, "seconds": seconds}
        self.directory.log_metrics(line)
        self.progress = progress
        self.reporter.update(line)

    def save(self) -> None:
        """Write a checkpoint, unless there is one of this update or an update was broken off in the middle."""
        steps_per_update = self.config.optim.minibatches * self.config.optim.passes
        whole = self.optimizer.steps == self.progress.update * steps_per_update
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

"""Held-out prompts on fixed noise with a deterministic solver, paired with the base model."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import process_group, use_threads
from flashgrpo.errors import UserError
from flashgrpo.models.load import load_model
from flashgrpo.models.lora import trained_parameters, weights_replaced
from flashgrpo.prompts import read_prompts
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter
from flashgrpo.scoring.heldout import Evaluator, record
from flashgrpo.scoring.rewards import Rewards


def evaluate(target: str | Path, overrides: Sequence[str] = (), checkpoint_update: int | None = None) -> dict[str, Any]:
    """Evaluate a run's checkpoint (the best by default) against its base model; of a recipe, the base model alone.

    Returns:
        A record as in evaluations.jsonl. Nothing is written.

    Raises:
        UserError: `target` is neither a run with a checkpoint nor a recipe, or an override or setting is bad.
    """
    is_run = Path(target).is_dir()
    for override in overrides if is_run else ():
        if override.split(".")[0] not in ("evaluation", "rewards", "prompts", "parallel"):
            raise UserError(f"override {override!r} has no effect on an evaluation")
    if checkpoint_update is not None and not is_run:
        raise UserError(f"--checkpoint: {target} is no run directory, so it has no checkpoints")
    run, config = RunDirectory.existing(Path(target)) if is_run else (None, RunConfig.load(target, overrides))
    if is_run and overrides:
        config = RunConfig.load(Path(target) / "config.yaml", overrides)
    use_threads(config.parallel.threads)
    rewards = Rewards(config.rewards, config.model.fps)
    prompts = read_prompts(config.prompts.heldout, "prompts.heldout")
    rewards.check_columns(prompts[0], "prompts.heldout")
    update = run.choose_checkpoint(checkpoint_update, Reporter().warn) if run else None
    with process_group(config, strict=False) as world, contextlib.ExitStack() as stack:
        model = load_model(config.model, world, config.seed, prompts, say=Reporter().say)
        if run:
            run.check_model(model.identity)
        rewards.load(world)
        stack.callback(rewards.close)
        evaluator = Evaluator(model, config, prompts, rewards, world)
        base = record(0, evaluator(), None, config.evaluation.samples_per_prompt)
        if run is None or update is None:
            return base
        averaged = {name: tensor.detach().clone() for name, tensor in trained_parameters(model.network).items()}
        checkpoint.read_into(run.checkpoints, update, {"ema": averaged}, world)
        with weights_replaced(model.network, averaged):
            return record(update, evaluator(), base, config.evaluation.samples_per_prompt)

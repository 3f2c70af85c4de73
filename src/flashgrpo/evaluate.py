"""`flashgrpo evaluate`: a run's checkpoint on held-out prompts, paired with its base model."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError


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
    return _evaluate(Path(target) if is_run else None, target, overrides, checkpoint_update)


def _evaluate(run: Path | None, target: str | Path, overrides: Sequence[str], update: int | None) -> dict[str, Any]:
    from flashgrpo.assembly import make_evaluator, make_process  # brings torch, which `import flashgrpo` does without
    from flashgrpo.distributed.world import process_group, use_threads
    from flashgrpo.models.lora import trained_parameters, weights_replaced
    from flashgrpo.prompts import read_prompts
    from flashgrpo.run import checkpoint
    from flashgrpo.run.directory import RunDirectory
    from flashgrpo.run.progress import Reporter
    from flashgrpo.scoring.heldout import evaluation_record
    from flashgrpo.scoring.rewards import Rewards

    directory, config = RunDirectory.existing(run) if run else (None, RunConfig.load(target, overrides))
    if run and overrides:
        config = RunConfig.load(run / "config.yaml", overrides)
    use_threads(config.parallel.threads)
    rewards = Rewards(config.rewards, config.model.fps)
    prompts = read_prompts(config.prompts.heldout, "prompts.heldout")
    rewards.check_columns(prompts[0], "prompts.heldout")
    update = directory.choose_checkpoint(update, Reporter().warn) if directory else None
    each = config.evaluation.samples_per_prompt
    group = process_group(config.parallel, config.model.compute_dtype, strict=False)
    with group as world, contextlib.ExitStack() as stack:
        process = make_process(config, world, prompts, Reporter().say)
        if directory:
            directory.check_model(process.identity)
        rewards.load(world)
        stack.callback(rewards.close)
        evaluator = make_evaluator(config, process, prompts, rewards, world)
        base = evaluation_record(0, evaluator(), None, each)
        if directory is None or update is None:
            return base
        averaged = {name: tensor.detach().clone() for name, tensor in trained_parameters(process.network).items()}
        checkpoint.read_into(directory.checkpoints, update, {"ema": averaged}, world)
        with weights_replaced(process.network, averaged):
            return evaluation_record(update, evaluator(), base, each)

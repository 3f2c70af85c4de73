"""A checkpoint scored beside its base model: what `evaluate` shows, and what confirms a run's best at its end."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from flashgrpo.assembly import Assembly, make_evaluator, make_process
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import World, process_group, use_threads
from flashgrpo.errors import UserError
from flashgrpo.models.lora import trained_parameters, weights_replaced
from flashgrpo.process import Process
from flashgrpo.prompts import read_prompts, trained_on
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter
from flashgrpo.scoring.fit import check_process
from flashgrpo.scoring.heldout import Evaluator, evaluation_record, selected, tuned_lines
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import unwatched
from flashgrpo.types import Prompt


def confirmation(
    parts: Assembly, directory: RunDirectory, update: int, evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Score the checkpoint that the evaluations selected, and the base model, on noise that selected nothing."""
    with parts.process.reference():
        base = evaluation_record(0, parts.evaluator(fresh=True), None, parts.config.evaluation.samples_per_prompt)
    record = _of_checkpoint(parts.config, parts.process, parts.evaluator, parts.world, directory, update, base, True)
    return record | {"selected_from": len(tuned_lines(evaluations))}


def evaluate_checkpoint(target: str | Path, overrides: Sequence[str], update: int | None) -> dict[str, Any]:
    """Evaluate the checkpoint of an update (None: the best) against its base model; of a recipe, the base model alone.

    The noise is that of the run's evaluations, but for a checkpoint that was selected among several by it.

    Raises:
        UserError: there is no such run or checkpoint, or a setting is bad.
    """
    is_run = Path(target).is_dir()
    directory, config = RunDirectory.existing(Path(target)) if is_run else (None, RunConfig.load(target, overrides))
    if is_run and overrides:
        config = RunConfig.load(Path(target) / "config.yaml", overrides)
    use_threads(config.parallel.threads)
    rewards = Rewards(config.rewards, config.model.fps)
    prompts = read_prompts(config.prompts.heldout, "prompts.heldout")
    rewards.check_columns(prompts[0], "prompts.heldout")
    reporter = Reporter()
    update = directory.choose_checkpoint(update, reporter.warn) if directory else None
    evaluations = directory.evaluations() if directory else []
    fresh = update is not None and update == selected(evaluations)
    group = process_group(config.parallel, config.model.compute_dtype, strict=False)
    with group as world, closing(rewards), ExitStack() as stack:
        stack.callback(reporter.stop)
        process = make_process(config, world, prompts, reporter.say)
        if directory:
            directory.check_model(process.identity)
        check_process(rewards, process)
        rewards.load(world)
        trained, watch = (
            _trained_on(config, process, prompts, directory),
            reporter.watch if world.is_main else unwatched,
        )
        evaluator = make_evaluator(config, process, prompts, rewards, world, trained, watch)
        base = evaluation_record(0, evaluator(fresh=fresh), None, config.evaluation.samples_per_prompt)
        if directory is None or update is None:
            return base
        record = _of_checkpoint(config, process, evaluator, world, directory, update, base, fresh)
        return record | ({"selected_from": len(tuned_lines(evaluations))} if fresh else {})


def _trained_on(config: RunConfig, process: Process, prompts: Sequence[Prompt], directory: RunDirectory | None) -> int:
    """Count the prompts that are training prompts; where the file of those is not here, as the run has noted."""
    try:
        return trained_on(prompts, read_prompts(config.prompts.train, "prompts.train"), process.takes_image)
    except UserError:
        return max((line.get("trained_on", 0) for line in directory.evaluations()), default=0) if directory else 0


def _of_checkpoint(
    config: RunConfig,
    process: Process,
    evaluator: Evaluator,
    world: World,
    directory: RunDirectory,
    update: int,
    base: Mapping[str, Any],
    fresh: bool,
) -> dict[str, Any]:
    averaged = {name: tensor.detach().clone() for name, tensor in trained_parameters(process.network).items()}
    checkpoint.read_into(directory.checkpoints, update, {"ema": averaged}, world)
    with weights_replaced(process.network, averaged):
        record = evaluation_record(update, evaluator(fresh=fresh), base, config.evaluation.samples_per_prompt)
    return record | {"average_moved": config.optim.average_moved(update)}

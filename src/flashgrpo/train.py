"""The main loop: roll out, score, compare within groups, update."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from flashgrpo.assembly import Assembly, Phases, experience
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import process_group
from flashgrpo.learning.update import policy_update
from flashgrpo.processes.flow.cost import update_cost
from flashgrpo.prompts import prompt_groups
from flashgrpo.run.progress import Clock, Interrupt, Reporter, traced
from flashgrpo.session import Run, describe_rewards
from flashgrpo.types import PromptGroup


def train(config: RunConfig, reporter: Reporter | None = None) -> Path:
    """Train from where the run directory stands, or from the start where it is new; returns the directory.

    Under torchrun every process calls this. An interrupt (SIGINT, SIGTERM) of any of them ends the run after the update
    that it is in, with a checkpoint.

    Raises:
        UserError: bad settings, files or rewards; the updates done until then are kept in a checkpoint.
    """
    config = config.with_absolute_paths()
    with process_group(config) as world:
        reporter = reporter or Reporter(quiet=not config.tracking.progress)
        run = Run(config, reporter if world.is_main else Reporter(Console(quiet=True)), world)
        with Interrupt(patient=world.size > 1) as interrupt, run:
            _train(run, interrupt)
        return run.directory.path


def _train(run: "Run", interrupt: Interrupt) -> None:
    config, parts, clock, rollout = run.config, run.parts, Clock(), run.config.rollout
    trace = run.directory.path / "profile" / f"rank-{run.world.rank}.json.gz"
    with traced(config.tracking.profile, trace) as update_ended:
        for update in range(run.progress.update, config.updates):
            if run.ending or run.world.any(interrupt.requested):
                break
            groups = prompt_groups(parts.prompts, config.seed, update, rollout.prompts, rollout.group_size)
            metrics = one_update(parts, groups, clock)
            run.log(metrics, clock.lap())
            with clock("evaluate"):
                run.evaluate_if_due()
            with clock("checkpoint"):
                run.save_if_due()
            update_ended()


def one_update(parts: Assembly, groups: Sequence[PromptGroup], clock: Phases) -> dict[str, Any]:
    """Draw, compare, learn; nothing that was drawn is kept, for videos are large."""
    config = parts.config
    drawn = experience(parts, groups, clock)
    with clock("update"):
        own = drawn.advantages[drawn.mine]
        metrics = describe_rewards(drawn, config.rollout.group_size)
        metrics["compute"] = asdict(update_cost(config, groups[0].update, parts.guided))
        return metrics | policy_update(
            parts.policy, parts.optimizer, drawn.transitions, own, config.algorithm, config.optim, parts.world
        )

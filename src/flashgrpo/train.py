"""The main loop: prompt groups, draw and score, compare, update; log, evaluate, save."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgrpo.config import RunConfig
from flashgrpo.errors import Interrupted

if TYPE_CHECKING:
    from flashgrpo.assembly import Assembly
    from flashgrpo.learning.experience import Phases
    from flashgrpo.run.progress import Reporter
    from flashgrpo.types import PromptGroup


def train(config: RunConfig, reporter: "Reporter | None" = None) -> Path:
    """Train from where the run directory stands, or from the start where it is new; returns the directory.

    Under torchrun every process calls this. An interrupt (SIGINT, SIGTERM) of any of them ends the run after the update
    that it is in, with a checkpoint.

    Raises:
        Interrupted: that happened; as a `SystemExit` it gives the exit code of the signal, 130 or 143.
        UserError: bad settings, files or rewards; the updates done until then are kept in a checkpoint.
    """
    from flashgrpo.session import Session  # brings torch, which `import flashgrpo` does without

    with Session.opened(config, reporter) as session:
        for update in session.updates():
            groups = session.parts.prompt_groups(update)
            metrics = one_update(session.parts, groups, session.clock)
            session.log(metrics)
            session.save_if_due()
            session.evaluate_if_due()
        session.confirm()
        number = 0 if session.done else session.interrupted
    if number:
        raise Interrupted(number)
    return session.directory.path


def settings_of(target: str, overrides: Sequence[str]) -> RunConfig:
    """Read what to train by: a recipe, or a run directory, which is resumed with the settings that it has.

    Raises:
        UserError: it is neither, or an override is bad.
    """
    own = Path(target) / "config.yaml"
    resumed = False
    with contextlib.suppress(OSError, ValueError):  # too long for a path: it is none
        resumed = own.is_file()
    return RunConfig.load(own, [f"out={target}", *overrides]) if resumed else RunConfig.load(target, overrides)


def one_update(parts: "Assembly", groups: "Sequence[PromptGroup]", clock: "Phases") -> dict[str, Any]:
    """Draw and score, compare, learn, and say who draws next; what was drawn is large, and is not kept afterwards."""
    drawn = parts.draw_and_score(groups, clock)
    compared = parts.compare(drawn)
    parts.refuse_dropped(groups, drawn, compared)
    with clock("update"):
        metrics = parts.describe(drawn, compared) | parts.learn(compared.record)
        parts.behaviour.follow(drawn.update + 1)
    return metrics


def train_on_ray(config: RunConfig, workers: int) -> Path:
    """Train in a number of Ray workers; `config.out` has to lie on storage that all of them share.

    Raises:
        UserError: Ray is not installed, or as `train`.
    """
    from flashgrpo.distributed.ray import run_on_ray

    config = config.with_absolute_paths()
    arguments, storage = {"config": config.model_dump(mode="json")}, Path(config.out).parent / ".ray"
    run_on_ray(_work, arguments, workers, storage, config.parallel.timeout)
    return Path(config.out)


def _work(arguments: dict[str, Any]) -> None:
    train(RunConfig.parse(arguments["config"], "the recipe"))

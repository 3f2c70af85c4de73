"""Everything that `train` does before a run's first update, without a run: `flashgrpo train RECIPE --dry-run`."""

from pathlib import Path

from rich.console import Console

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import process_group
from flashgrpo.doctor import refuse_unsound
from flashgrpo.doctor.verdict import print_estimate
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter
from flashgrpo.run.trackers import check_installed


def rehearse(config: RunConfig, ray_workers: int = 0) -> None:
    """Check settings, folder and trackers, load model and rewards, run the preflight, count memory; no run is written.

    Encoded prompts may be kept in the cache, as by any command that loads the model.

    Args:
        ray_workers: processes that the memory is counted for, where Ray is to start them; else those of this launch.

    Raises:
        UserError: what `train` would refuse.
    """
    config = config.with_absolute_paths()
    with process_group(config.parallel, config.model.compute_dtype) as world:
        reporter = Reporter(quiet=False) if world.is_main else Reporter(Console(quiet=True))
        world.on_main(lambda: check_installed(config.tracking))
        world.on_main(lambda: RunDirectory(Path(config.out)).check(config))
        parts = Assembly(config, world, reporter.say, reporter.watch)
        try:
            refuse_unsound(parts, reporter.warn)
        finally:
            parts.rewards.close()
            reporter.stop()
        if world.is_main:
            print_estimate(config, ray_workers or world.size, None, as_json=False)
            print(f"nothing stands against this run; without --dry-run it is written to {config.out}")

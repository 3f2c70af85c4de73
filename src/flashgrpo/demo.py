"""The bundled run: train the bundled model on its bundled reward, evaluate on held-out prompts, write the report."""

from pathlib import Path
from typing import Any

from flashgrpo.config import RunConfig
from flashgrpo.report import write_report
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter
from flashgrpo.train import train


def demo(out: Path | None, seed: int, reporter: Reporter) -> tuple[Path, dict[str, Any]]:
    """Run `recipes/tiny.yaml`, or resume it where it was interrupted.

    Returns:
        The report, and the record of the best update on noise that selected nothing.
    """
    folder = out or Path("runs") / f"demo-seed{seed}"
    run = train(RunConfig.load("tiny", [f"seed={seed}"]).model_copy(update={"out": str(folder)}), reporter)
    return write_report(run), RunDirectory(run).result()

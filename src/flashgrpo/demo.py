"""The bundled runs: train a bundled model on its bundled reward, evaluate on held-out prompts, write the report."""

from pathlib import Path
from typing import Any

from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError, suggest
from flashgrpo.report import write_report
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter
from flashgrpo.train import train

RECIPES = {
    "flow": "tiny",
    "streaming": "tiny-streaming",
    "uniform-tokens": "tiny-uniform-tokens",
    "masked-tokens": "tiny-masked-tokens",
    "programs": "tiny-program",
}
"""Process -> the recipe of its bundled run."""


def demo(out: Path | None, seed: int, reporter: Reporter, process: str = "flow") -> tuple[Path, dict[str, Any]]:
    """Run the bundled recipe of a process, or resume it where it was interrupted.

    Returns:
        The report, and the record of the best update on noise that selected nothing.

    Raises:
        UserError: no bundled run is of such a process.
    """
    if process not in RECIPES:
        raise UserError(f"--process: there is no bundled run of {process!r}; {suggest(process, RECIPES)}")
    name = "demo" if process == "flow" else f"demo-{process}"
    folder = out or Path("runs") / f"{name}-seed{seed}"
    run = train(RunConfig.load(RECIPES[process], [f"seed={seed}"]).model_copy(update={"out": str(folder)}), reporter)
    return write_report(run), RunDirectory(run).result()

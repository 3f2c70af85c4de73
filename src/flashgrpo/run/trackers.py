"""What metrics.jsonl and evaluations.jsonl say, sent to trackers as well, through the tracker classes of accelerate.

Everything stays here unless `tracking.offline` is false: TensorBoard and MLflow write into the run directory,
Weights & Biases and SwanLab keep their offline folders there, trackio its local data base.

A run that is resumed is one run there, too: its id is kept in the run directory.
"""

import html
import os
import secrets
import string
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from flashgrpo.config.settings import TrackingConfig
from flashgrpo.errors import UserError
from flashgrpo.files import read_text, write_text
from flashgrpo.media import NOUNS
from flashgrpo.run import checkpoint

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}  # any of them; other trackers are named as their package


def check_installed(config: TrackingConfig) -> None:
    """Check whether the packages of the trackers are there.

    Raises:
        UserError: one is not.
    """
    for name in config.trackers:
        if not any(find_spec(package) for package in PACKAGES.get(name, (name,))):
            raise UserError(f"tracking.trackers: {name} is not installed: pip install {name}")


class Trackers:
    """The trackers of a run, of which one that fails is left out from then on: a run outlives its spectators.

    Args:
        run: the run directory; its name is the run's.
        settings: the resolved recipe, as it is shown beside the curves.
        warn: called with a sentence on each tracker that fails.
    """

    def __init__(
        self, config: TrackingConfig, run: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._open: dict[str, Any] = {}
        for name in config.trackers:
            self._do(name, lambda name=name: self._begin(name, config, run, settings))  # type: ignore[misc]

    def log(self, section: str, line: Mapping[str, Any]) -> None:
        """Send the numbers of a line of metrics.jsonl or evaluations.jsonl, named `section/key/subkey`."""
        values = dict(_numbers(line, section))
        for name, tracker in list(self._open.items()):
            self._do(name, lambda tracker=tracker: tracker.log(values, step=line["update"]))  # type: ignore[misc]

    def media(self, update: int, files: Mapping[str, Path]) -> None:
        """Send mp4, png and txt files, label -> path, to the trackers that show such."""
        for name, tracker in list(self._open.items()):
            if send := SENDERS.get(name):
                self._do(name, lambda send=send, tracker=tracker: send(tracker, update, files))  # type: ignore[misc]

    def close(self) -> None:
        """Tell the trackers that the run has ended."""
        for name, tracker in list(self._open.items()):
            self._do(name, tracker.finish)
        self._open.clear()

    def _begin(self, name: str, config: TrackingConfig, run: Path, settings: Mapping[str, Any]) -> None:
        from accelerate import PartialState, tracking

        threads = torch.get_num_threads()
        PartialState()  # accelerate's logging asks it, and stops where there is none
        torch.set_num_threads(threads)  # which it may have set to its own liking
        local = run / "trackers"
        local.mkdir(exist_ok=True)
        tracker: Any
        known = local / "mlflow.txt"
        earlier = read_text(known) if known.exists() else None
        again = {"id": own_id(local / "id.txt"), "resume": "allow"}
        if name == "tensorboard":  # what it was told of updates that are done again is hidden
            saved = checkpoint.updates(run / "checkpoints")
            tracker = tracking.TensorBoardTracker("tensorboard", local, purge_step=max(saved, default=-1) + 1)
        elif name == "wandb":
            mode = "offline" if config.offline else "online"
            tracker = tracking.WandBTracker(config.project, name=run.name, dir=str(local), mode=mode, **again)
        elif name == "trackio":
            os.environ.setdefault("TRACKIO_DIR", str(local / "trackio"))
            # which knows a run by its name
            tracker = tracking.TrackioTracker(config.project, name=f"{run.name}-{again['id'][:4]}", resume="allow")
        elif name == "swanlab":
            mode = "offline" if config.offline else "cloud"
            tracker = tracking.SwanLabTracker(
                config.project, experiment_name=run.name, logdir=str(local / "swanlab"), mode=mode, **again
            )
        else:
            if config.offline:
                os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{local / 'mlflow.db'}"
            tracker = tracking.MLflowTracker(
                config.project, logging_dir=f"file://{local / 'mlflow'}", run_id=earlier, run_name=run.name
            )
        tracker.main_process_only = (
            False  # only the leading process has trackers; accelerate need not ask its own state
        )
        tracker.start()
        self._open[name] = tracker
        if name == "mlflow":  # whose servers give the ids
            write_text(known, tracker.tracker.info.run_id)
        # TensorBoard takes flat settings only, and makes a run of its own of them; MLflow refuses a changed one
        if name != "tensorboard" and not (name == "mlflow" and earlier):
            tracker.store_init_configuration(dict(settings))

    def _do(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # of any kind: no tracker's trouble may end a run of days
            self._open.pop(name, None)
            self._warn(f"tracker {name} failed and is left out from here on: {type(error).__name__}: {error}")


def own_id(file: Path) -> str:
    """Return the id of a run among all of a tracker's, which is made at its first start: 21 letters and digits."""
    if not file.exists():
        write_text(file, "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(21)))
    return read_text(file)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers in nested mappings, named by the path to them."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            if key != "update":
                yield from _numbers(below, f"{name}/{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, float(value)


def _to_wandb(tracker: Any, update: int, files: Mapping[str, Path]) -> None:
    import wandb

    def text(content: str) -> Any:
        return wandb.Html(f"<pre>{html.escape(content)}</pre>", inject=False)

    tracker.log(_shown(files, wandb.Video, wandb.Image, text), step=update)


def _to_trackio(tracker: Any, update: int, files: Mapping[str, Path]) -> None:
    import trackio

    tracker.log(_shown(files, trackio.Video, trackio.Image, trackio.Markdown), step=update)


def _to_mlflow(tracker: Any, update: int, files: Mapping[str, Path]) -> None:
    import mlflow

    for file in files.values():
        mlflow.log_artifact(str(file), f"{NOUNS[file.suffix]}s/{update:06d}")


def _shown(files: Mapping[str, Path], video: Any, image: Any, text: Callable[[str], Any]) -> dict[str, Any]:
    """Return what a tracker shows of each file, named `videos/label`, `images/label` or `texts/label`."""
    shows: dict[str, Callable[[Path], Any]] = {
        ".mp4": lambda file: video(str(file), format="mp4"),
        ".png": lambda file: image(str(file)),
        ".txt": lambda file: text(read_text(file)),
    }
    return {f"{NOUNS[file.suffix]}s/{label}": shows[file.suffix](file) for label, file in files.items()}


SENDERS: dict[str, Callable[[Any, int, Mapping[str, Path]], None]] = {
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "mlflow": _to_mlflow,
}

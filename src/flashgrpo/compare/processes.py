"""The runs of a comparison as processes: each is a `flashgrpo train` of its own, so one that fails fails alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from flashgrpo.compare.folder import RunFiles
from flashgrpo.config import RunConfig
from flashgrpo.files import write_aside
from flashgrpo.run.progress import Interrupt

POLL = 0.2  # seconds between two looks at the processes
Process = subprocess.Popen[bytes]


def run_all(runs: Mapping[RunFiles, RunConfig], jobs: int, console: Console, ended: Callable[[RunFiles], None]) -> bool:
    """Train them, `jobs` at a time; `ended` hears of each. Returns whether an interrupt came before all had ended.

    The first SIGINT or SIGTERM is passed on to the runs, each of which ends after the update that it is in, with a
    checkpoint; a second one ends all at once. A run that another process still trains, for instance because the
    comparison that started it was killed, is waited for.
    """
    waiting, running, passed_on = list(runs), dict[int, tuple[RunFiles, Process]](), False
    with Interrupt() as interrupt, Board(console, runs) as board:
        try:
            while waiting or running:
                for slot, (run, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        if process.returncode and not interrupt.requested:
                            note_failure(run, process.returncode)
                        ended(run)
                if interrupt.requested and not passed_on:
                    board.say("interrupted: every run ends after the update that it is in")
                    for _, process in running.values():
                        process.send_signal(signal.SIGINT)
                    waiting, passed_on = [], True
                for slot in sorted({*range(jobs)} - {*running}):
                    free = next((run for run in waiting if not run.busy), None)
                    if free:
                        waiting.remove(free)
                        running[slot] = free, start(free, runs[free], slot, jobs)
                board.show([run for run, _ in running.values()], waiting)
                time.sleep(POLL)
        finally:
            for _, process in running.values():
                process.terminate()
    return interrupt.requested


def start(run: RunFiles, config: RunConfig, slot: int, jobs: int) -> Process:
    """Begin a run, or go on with it; its output goes to its log."""
    parallel = config.parallel
    if jobs > 1 and parallel.threads is None:
        parallel = parallel.model_copy(update={"threads": max(1, (os.cpu_count() or 1) // jobs)})
    config = config.model_copy(update={"out": str(run.path), "seed": run.seed, "parallel": parallel})
    with write_aside(run.recipe) as aside:
        aside.write_text(config.to_yaml(), encoding="utf-8")
    run.failure.unlink(missing_ok=True)
    command = [sys.executable, "-m", "flashgrpo", "train", str(run.recipe)]
    with run.log.open("ab") as log:
        log.write(f"# {' '.join(command[1:])}\n".encode())
        log.flush()
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_gpu_of(slot, jobs)},
            start_new_session=True,  # a Ctrl-C reaches it once, from here
        )


def _gpu_of(slot: int, jobs: int) -> dict[str, str]:
    """One GPU for each run of several at a time, where there are several."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named is not None else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)]} if jobs > 1 and len(visible) > 1 else {}


def note_failure(run: RunFiles, code: int) -> None:
    """Keep why a run failed: what it said itself, or else its log's last line; and the signal that ended it, if any.

    Libraries may have a word after ours, such as "terminate called without an active exception" as the process ends.
    """
    attempt = run.log.read_text(encoding="utf-8", errors="replace").rpartition("# -m flashgrpo")[2]
    lines = [line.strip() for line in attempt.splitlines() if line.strip()]
    own = [line.removeprefix("flashgrpo: ") for line in lines if line.startswith("flashgrpo: ")]
    last = (own or lines or [""])[-1]
    how = f"ended by {signal.Signals(-code).name} after: " if code < 0 else ""
    with write_aside(run.failure) as aside:
        aside.write_text(f"{how}{last}\n", encoding="utf-8")


class Board:
    """What a person sees: on a terminal a line for each run in progress, else a sentence for each that begins."""

    def __init__(self, console: Console, runs: Mapping[RunFiles, RunConfig]) -> None:
        self._console, self._runs = console, runs
        self._rows: dict[RunFiles, TaskID] = {}
        self._told: set[RunFiles] = set()
        columns = TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn()
        self._live = Progress(*columns, console=console, speed_estimate_period=3600)

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, sentence: str) -> None:
        """A sentence that stays."""
        self._console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def show(self, running: list[RunFiles], waiting: list[RunFiles]) -> None:
        """These runs are in progress."""
        for run in self._rows.keys() - running:
            self._live.remove_task(self._rows.pop(run))
        for run in running:
            label = f"{run.algorithm} seed {run.seed}"
            if run not in self._rows:
                self._rows[run] = self._live.add_task(label, total=self._runs[run].updates)
                if not self._console.is_terminal:
                    self.say(f"started {label}")
            self._live.update(self._rows[run], completed=_updates_done(run.path / "metrics.jsonl"))
        for run in waiting[:1]:
            if not running and run not in self._told:
                self._told.add(run)
                self.say(f"waiting for {run.path}, which another process trains")


def _updates_done(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

"""The runs of a comparison as processes: each is a `flashgrpo train` of its own, so one that fails fails alone."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from flashgrpo.compare.folder import RunFiles
from flashgrpo.config import RunConfig
from flashgrpo.files import explain_os_errors, read_text, write_text
from flashgrpo.run.progress import Interrupt
from flashgrpo.terminal import cell

POLL = 0.2  # seconds between two looks at the processes
Process = subprocess.Popen[bytes]


def run_all(runs: Mapping[RunFiles, RunConfig], jobs: int, console: Console, ended: Callable[[RunFiles], None]) -> int:
    """Train runs, `jobs` at a time, and return the signal that came before all had ended; 0 without one.

    `ended` is called with each that has. The first SIGINT or SIGTERM is passed on to the runs, each of which ends after
    the update that it is in, with a checkpoint; a second one ends all at once. A run that another process still trains,
    for instance because the comparison that started it was killed, is waited for.
    """
    pool, passed_on = Pool(runs, jobs), False
    with Interrupt() as interrupt, Board(console, runs) as board, pool:
        while pool.waiting or pool.running:
            for run in pool.reap(note_failures=not interrupt.number):
                ended(run)
            if interrupt.number and not passed_on:
                board.say("interrupted: every run ends after the update that it is in")
                pool.interrupt()
                passed_on = True
            pool.fill()
            board.show([run for run, _ in pool.running.values()], pool.waiting)
            time.sleep(POLL)
    return interrupt.number


class Pool:
    """Runs that wait for a slot, and those in progress with their processes, by slot. Leaving it ends all processes."""

    def __init__(self, runs: Mapping[RunFiles, RunConfig], jobs: int) -> None:
        self._runs, self._jobs = runs, jobs
        self.waiting = list(runs)
        self.running: dict[int, tuple[RunFiles, Process]] = {}

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        for _, process in self.running.values():
            process.terminate()

    def reap(self, note_failures: bool) -> Iterator[RunFiles]:
        """Take out and yield the runs whose processes have ended."""
        for slot, (run, process) in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[slot]
                if code and note_failures:
                    note_failure(run, code)
                yield run

    def interrupt(self) -> None:
        """Let every run end after the update that it is in, and start no other."""
        self.waiting = []
        for _, process in self.running.values():
            process.send_signal(signal.SIGINT)

    def fill(self) -> None:
        """Start a run in each free slot, passing over those that another process still trains."""
        for slot in sorted({*range(self._jobs)} - {*self.running}):
            free = next((run for run in self.waiting if not run.busy), None)
            if free:
                self.waiting.remove(free)
                self.running[slot] = free, start(free, self._runs[free], slot, self._jobs)


def start(run: RunFiles, config: RunConfig, slot: int, jobs: int) -> Process:
    """Start or resume a run; its output goes to its log."""
    parallel = config.parallel
    if jobs > 1 and parallel.threads is None:
        parallel = parallel.model_copy(update={"threads": max(1, (os.cpu_count() or 1) // jobs)})
    config = config.model_copy(update={"out": str(run.path), "seed": run.seed, "parallel": parallel})
    write_text(run.recipe, config.to_yaml())
    command = [sys.executable, "-m", "flashgrpo", "train", str(run.recipe)]
    with explain_os_errors(run.log), run.log.open("ab") as log:
        run.failure.unlink(missing_ok=True)
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
    """Choose one GPU for each run of several at a time, where there are several."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = named.split(",") if named is not None else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": visible[slot % len(visible)]} if jobs > 1 and len(visible) > 1 else {}


def note_failure(run: RunFiles, code: int) -> None:
    """Keep why a run failed: what it said itself, or else its log's last line; and the signal that ended it, if any.

    Libraries may have a word after ours, such as "terminate called without an active exception" as the process ends.
    """
    attempt = read_text(run.log).rpartition("# -m flashgrpo")[2]
    lines = [line.strip() for line in attempt.splitlines() if line.strip()]
    own = [line.removeprefix("flashgrpo: ") for line in lines if line.startswith("flashgrpo: ")]
    last = (own or lines or [""])[-1]
    how = f"ended by {signal.Signals(-code).name} after: " if code < 0 else ""
    write_text(run.failure, f"{how}{last}\n")


class Board:
    """What a person sees: on a terminal a line for each run in progress, else a sentence for each that begins."""

    def __init__(self, console: Console, runs: Mapping[RunFiles, RunConfig]) -> None:
        self._console, self._runs = console, runs
        self._rows: dict[RunFiles, TaskID] = {}
        self._told: set[RunFiles] = set()
        columns = (
            TextColumn("{task.description}", markup=False),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
        )
        self._live = Progress(*columns, console=console, speed_estimate_period=3600)

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, sentence: str) -> None:
        """Print a sentence that stays."""
        self._console.print(cell(sentence), highlight=False, soft_wrap=True)

    def show(self, running: list[RunFiles], waiting: list[RunFiles]) -> None:
        """Show the runs that are in progress."""
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
    return read_text(metrics).count("\n") if metrics.exists() else 0

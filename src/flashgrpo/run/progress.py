"""What a person sees of a run in progress, the clock by phase, and the interrupt that ends it cleanly."""

import shlex
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flashgrpo.distributed.memory import peak, wait_for_device
from flashgrpo.distributed.world import World
from flashgrpo.errors import this_command
from flashgrpo.formats import Numbers, called, not_held_out
from flashgrpo.terminal import cell

SPEED = {"samples_per_second": "samples/s", "peak_gib": "GiB"}  # of a metrics line, and their units
RARELY = 60.0  # seconds between two lines about one phase, where no terminal shows it at once


class Reporter:
    """Shows a run's progress on `console`, which defaults to standard error; `quiet` shows warnings only."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self._quiet = quiet
        self._live: Progress | None = None
        self._task: Any = None
        self._phase: Any = None
        self._phase_begun = self._told = time.monotonic()
        self._total = 0
        self._held_out = ""

    def start(self, done: int, total: int) -> None:
        """Begin to show a run that is at update `done` of `total`."""
        self._total = total
        if self._shows_live():
            self._task = self._progress().add_task("", label="update", total=total, completed=done)

    def watch(self, phase: str, done: int, of: int) -> None:
        """Show that `done` of `of` samples or replays are done: at a terminal at once, elsewhere once a minute."""
        now = time.monotonic()
        if self._shows_live():
            live = self._progress()
            if done <= 0 or self._phase is None:
                self._end_phase()
                self._phase = live.add_task("", label=phase, total=of)
            live.update(self._phase, completed=done)
            if done >= of:
                self._end_phase()
        elif done <= 0:
            self._phase_begun = now
        elif now - self._told >= RARELY:
            left = (now - self._phase_begun) * (of - done) / done
            self.say(f"{phase}: {done} of {of}, about {left:.0f} s left")

    def _end_phase(self) -> None:
        if self._live and self._phase is not None:
            self._live.remove_task(self._phase)
        self._phase = None

    def _shows_live(self) -> bool:
        return not self._quiet and self.console.is_terminal

    def _progress(self) -> Progress:
        """Return the live lines, which are there from the first thing to show on."""
        if self._live is None:
            self._live = Progress(
                TextColumn("{task.fields[label]}", markup=False),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}", markup=False),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                speed_estimate_period=3600,  # rich forgets steps older than 30 s, and an update can take minutes
            )
            self._live.start()
        return self._live

    def say(self, sentence: str) -> None:
        """Print a sentence that stays."""
        if not self._quiet:
            self._told = time.monotonic()
            self.console.print(cell(sentence), highlight=False, soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Print a warning, also when quiet."""
        self.console.print(cell("warning: ", "yellow") + cell(sentence), soft_wrap=True)

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show that an update is done."""
        counts = {"groups dropped": metrics.get("dropped_groups"), "steps skipped": metrics.get("skipped_steps")}
        bad = [f"{count} {what}" for what, count in counts.items() if count]
        speed = [f"{metrics[key]:.3g} {unit}" for key, unit in SPEED.items() if metrics.get(key)]
        reward = ", ".join([f"reward {Numbers.alone(metrics['reward']).plain(metrics['reward'])}", *bad])
        if self._live and self._task is not None:
            shown = reward, self._held_out, ", ".join(speed)
            self._live.update(self._task, completed=metrics["update"], description="  ".join(filter(None, shown)))
        elif metrics["update"] % max(1, self._total // 20) == 0:
            seconds = f"{metrics['seconds']['total']:.1f} s"
            self.say(f"update {metrics['update']}/{self._total}  {reward}  {', '.join([seconds, *speed])}")

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show a held-out evaluation; update 0 is the base model's."""
        if not record["update"]:
            self.say(f"base model: {describe(record)}")
            return
        form = Numbers.of(record)
        self._held_out = f"{called(record)} {form.plain(record['reward'])} ({form.signed(record['difference'])})"
        if not self._live:
            self.say(f"update {record['update']}/{self._total}  {describe(record)}")

    def stop(self) -> None:
        """Take the live line away."""
        self._end_phase()
        if self._live:
            self._live.stop()
            self._live = self._task = None


def describe(record: Mapping[str, Any]) -> str:
    """Say an evaluation in words: 'held-out reward 0.71, 0.16 above the base (95 % interval +0.12 to +0.20)'."""
    form, difference, interval = Numbers.of(record), record["difference"], record["interval"]
    said = f"{called(record)} reward {form.plain(record['reward'])}"
    if record["update"]:
        side = "above" if difference >= 0 else "below"
        between = f" (95 % interval {form.between(interval)})" if interval else ""
        said += f", {form.plain(abs(difference))} {side} the base{between}"
    still = 1 - record.get("average_moved", 1.0) if record["update"] else 0.0
    lag = (
        f"of averaged weights that are still the base model to {100 * still:.0f} %"
        if still > 0.5 and record["update"]
        else ""
    )
    fresh = "on noise that selected nothing" if "selected_from" in record else ""
    return ", ".join(filter(None, (said, fresh, lag, not_held_out(record))))


def last_words(
    path: Path, evaluations: Sequence[Mapping[str, Any]], confirmed: Mapping[str, Any] | None, stopped: str | None
) -> str:
    """Say what a run has come to, and which command shows it.

    Args:
        confirmed: the best update on noise that selected nothing, where it was scored.
        stopped: after which update and why it ended before its last, if it did.
    """
    tuned = [line for line in evaluations if line["update"]]
    best = confirmed or next((line for line in reversed(tuned) if line.get("best")), None)
    found = "no update has been evaluated"
    if best:
        found = f"best update {best['update']}: {describe(best)}"
    elif tuned:
        found = f"no evaluated update was above the base model; the last, {tuned[-1]['update']}: {describe(tuned[-1])}"
    page = f"for its page: {this_command()} report {shlex.quote(str(path))}"
    return f"{f'stopped {stopped}; ' if stopped else ''}{found}\n{page}"


class Clock:
    """Seconds by phase since the last lap; `total` is the wall clock, so what is in no phase shows as the rest.

    Phases may lie inside of one another; the time of an inner one is not counted for the outer.
    """

    def __init__(self) -> None:
        self._phases: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # of each phase that is open, the seconds of those inside of it
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside for `phase`."""
        if self._inside:
            wait_for_device()
        started = time.perf_counter()
        self._inside.append(0.0)
        try:
            with torch.profiler.record_function(phase):
                yield
        finally:
            wait_for_device()  # what a GPU still computes belongs to the phase that asked for it
            spent = time.perf_counter() - started
            self._phases[phase] += spent - self._inside.pop()
            if self._inside:
                self._inside[-1] += spent

    def lap(self) -> dict[str, float]:
        """Return the seconds of each phase and their `total`; starts over."""
        now = time.perf_counter()
        seconds = {
            **{phase: round(spent, 4) for phase, spent in self._phases.items()},
            "total": round(now - self._started, 4),
        }
        self._phases.clear()
        self._started = now
        return seconds


def machine_of(clock: Clock, samples: int, world: World) -> dict[str, Any]:
    """Return what `OF_THE_MACHINE` names, since the last call; all ranks call this together.

    Samples a second are those of training: evaluations and checkpoints are left out. Memory is the highest of any
    rank, in GiB: what torch has allocated of a GPU, or what the process held resident on a CPU.
    """
    highest = max(world.all_gather_json(peak(world.device)))
    peak(world.device, reset=True)
    seconds = clock.lap()
    training = seconds["total"] - seconds.get("evaluate", 0.0) - seconds.get("checkpoint", 0.0)
    rate = round(samples / training, 4) if training > 0 else None
    return {"samples_per_second": rate, "peak_gib": round(highest / 2**30, 4), "seconds": seconds}


@contextmanager
def traced(updates: int, path: Path) -> Iterator[Callable[[], None]]:
    """Trace `updates` updates after the first into the file `path`; what it yields is called after each update."""
    if not updates:
        yield lambda: None
        return
    path.parent.mkdir(exist_ok=True)
    with torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=updates, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        yield profiler.step


class Interrupt:
    """Inside this context the first SIGINT or SIGTERM is only noted; a second one has its usual effect.

    Attributes:
        number: of the signal that was noted; 0 until then.

    Args:
        patient: later ones are only noted as well. Processes of torchrun get a Ctrl-C twice, from the terminal and from
            torchrun, and it kills by itself those that do not end.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, patient: bool = False) -> None:
        self.number = 0
        self._patient = patient
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for other, handler in self._before.items() if not self._patient else ():
            signal.signal(other, handler)

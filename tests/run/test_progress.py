"""A sign of life inside an update and an evaluation."""

import io

import pytest
from rich.console import Console

from flashgrpo.assembly import Assembly
from flashgrpo.distributed.world import single_process
from flashgrpo.run import progress
from flashgrpo.run.progress import Clock, Reporter, machine_of


def test_elsewhere_than_at_a_terminal_a_phase_is_told_once_a_minute(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    reporter = Reporter(Console(file=out))
    for done in range(9):
        now[0] = 20.0 * done
        reporter.watch("evaluation", done, 8)
    reporter.watch("rollout", 0, 4)
    assert out.getvalue().splitlines() == [
        "evaluation: 3 of 8, about 100 s left",
        "evaluation: 6 of 8, about 40 s left",
    ]


def test_at_a_terminal_it_is_shown_at_once_and_taken_away():
    out = io.StringIO()
    reporter = Reporter(Console(file=out, force_terminal=True, width=100))
    reporter.watch("evaluation", 0, 8)
    reporter.watch("evaluation", 2, 8)
    [task] = reporter._live.tasks
    assert (task.fields["label"], task.completed, task.total) == ("evaluation", 2, 8)
    reporter.start(0, 5)
    reporter.watch("evaluation", 8, 8)
    [task] = reporter._live.tasks
    assert task.fields["label"] == "update"
    reporter.stop()
    assert reporter._live is None


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_shows_nothing_of_it(quiet):
    out = io.StringIO()
    reporter = Reporter(Console(file=out, force_terminal=True), quiet=quiet)
    reporter.watch("rollout", 0, 8)
    reporter.stop()
    assert bool(out.getvalue()) == (not quiet)


@pytest.mark.parametrize(("passes", "replays"), [(1, [0, 2, 4]), (2, [0, 2, 4, 6, 8])])
def test_rollout_replay_and_evaluation_count(make_run, passes, replays):
    told: list[tuple[str, int, int]] = []
    run = make_run("rollout.micro_batch=2", "optim.micro_batch=2", f"optim.passes={passes}")
    parts = Assembly(run, single_process(), watch=lambda *given: told.append(given))
    drawn = parts.draw_and_score(parts.prompt_groups(0), Clock())
    assert told == [("rollout", done, 4) for done in (0, 2, 4)]
    told.clear()
    parts.learn(parts.compare(drawn).record)
    assert told == [("replay", done, replays[-1]) for done in replays]
    told.clear()
    parts.evaluator()
    assert [told[0], told[-1]] == [("evaluation", 0, 2), ("evaluation", 2, 2)]


def test_speed_and_memory_of_an_update(monkeypatch):
    """8 samples in 4 s, of which 2 s are an evaluation and a checkpoint: 4 a second; the mark is set anew each time."""
    clock, world = Clock(), single_process(computes=False)
    told = {"rollout": 1.5, "evaluate": 1.5, "checkpoint": 0.5, "total": 4.0}
    monkeypatch.setattr(clock, "lap", lambda: told)
    resets = []
    monkeypatch.setattr(progress, "peak", lambda device, reset=False: resets.append(reset) or 3 * 2**29)
    found = machine_of(clock, 8, world)
    assert found["samples_per_second"] == 4.0
    assert found["seconds"] == told
    assert (found["peak_gib"], resets) == (1.5, [False, True])
    console = Console(record=True, file=io.StringIO(), width=200)
    reporter = Reporter(console)
    reporter.start(0, 1)
    reporter.update({"update": 1, "reward": 0.5, "peak_gib": 1.234, "samples_per_second": 4.0, "seconds": told})
    assert "4.0 s, 4 samples/s, 1.23 GiB" in console.export_text()

"""Several algorithms on one problem at equal compute: the same base weights, prompts and evaluation noise, over seeds.

    compare("tiny", ["updates=50"], "flash-grpo,flow-grpo", seeds=3)  ->  runs/compare-tiny/report.html

    plan.py        what runs: settings of each algorithm, the updates that the budget buys it
    folder.py      where it lies, and whether it may be resumed
    processes.py   each run in a process of its own
    record.py      what is read of one run; results.py: of all -> comparison.json; statistics.py: what they say together
    table.py       comparison.md; measured.py: its end, where a diagnosis was asked for
    figures.py     figures/*.svg, *.png; the page is `report/comparison.py`

A comparison's folder:

    plan.json                 what was asked for; another plan needs another folder, but for more seeds and algorithms
    ALGORITHM/seed-S/         a run directory; beside it seed-S.yaml (its recipe), seed-S.log, seed-S.failed (why)
    ALGORITHM/seed-S.json     what the comparison reads of a run that has ended; plan.json and these are enough to go on
    comparison.json           every evaluation and every update of every run, and what they say together
    comparison.md  figures/  report.html
    diagnosis.json            gradients by step, variance of rewards, consistency: `diagnostics/measure.py`
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from flashgrpo.compare.figures import write_figures
from flashgrpo.compare.folder import ComparisonFolder, RunFiles
from flashgrpo.compare.measured import diagnosis_as_markdown
from flashgrpo.compare.plan import Plan, make_plan
from flashgrpo.compare.processes import run_all
from flashgrpo.compare.record import is_done, keep_record
from flashgrpo.compare.results import collect
from flashgrpo.compare.table import as_markdown
from flashgrpo.config import RunConfig
from flashgrpo.diagnostics import measure as diagnostics
from flashgrpo.diagnostics.gradients import stochastic_of
from flashgrpo.errors import Interrupted, UserError, launcher_number
from flashgrpo.files import explain_damage, read_object, read_text, write_json, write_text
from flashgrpo.report import write_report
from flashgrpo.terminal import cell

__all__ = ["compare"]


def compare(
    recipe: str,
    overrides: Sequence[str] = (),
    algorithms: str | Sequence[str] = "flash-grpo,flow-grpo",
    seeds: int = 3,
    out: Path | str | None = None,
    budget: int | None = None,
    points: int = 5,
    jobs: int = 1,
    keep: str | Sequence[str] = "",
    levels: Sequence[float] = (),
    diagnose: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train every algorithm with every seed until the budget is spent, and write down how they compare.

    The same call resumes where a signal ended it (`Interrupted`): complete runs are left alone, the others resume,
    those that failed are tried again. A run that fails is reported and does not end the others.

    Args:
        recipe: the problem; its own `algorithm` is replaced by each of `algorithms`, but for what `keep` names.
        overrides: `key=value` for all; `algorithm.noise={kind: cps, eta: 0.7}` for the algorithm of all, after its
            preset; `NAME:optim.lr=1e-3` for the algorithm called NAME alone (its algorithm, rollout, optim, model.train
            and model.gradient_checkpointing); `NAME:updates=30` gives it so many updates, whatever they cost.
        algorithms: presets, or `NAME={preset: flow-grpo, kl_coef: 0.1}`; the first is what the others are held against.
        seeds: number of seeds, from the recipe's `seed` upwards.
        out: the folder; runs/compare-RECIPE when not given.
        budget: of each run, in network forwards (`processes/flow/cost.py`); what the recipe's `updates` cost the first
            algorithm when not given. A run gets as many whole updates as it pays for.
        points: evaluations of a run after the base model's, at equal shares of its compute.
        jobs: runs at a time.
        keep: parts of the recipe's own algorithm that stay in place of every preset's, for instance `noise,steps`.
        levels: held-out rewards whose cost is looked for; quarters of the first algorithm's gain when not given.
        diagnose: also measure, at the base weights, what grouping and rectification have to work on (`diagnostics/`).

    Returns:
        What comparison.json holds.

    Raises:
        UserError: an unknown or doubled algorithm, a bad setting, a budget below one update, no seed, an algorithm that
            cannot be diagnosed, or a folder that holds something else.
    """
    _check_start(jobs)
    plan = make_plan(recipe, overrides, algorithms, seeds, budget, points, keep)
    _check_diagnosed(plan.algorithms if diagnose else {})
    folder = ComparisonFolder(Path(out or Path("runs") / f"compare-{Path(recipe).stem}"))
    with folder.claimed(plan):
        signal = _run(plan, folder, jobs, levels, console or Console(stderr=True), diagnose)
        return _write_all(folder, levels, signal)


def _check_start(jobs: int) -> None:
    if jobs < 1:
        raise UserError(f"--jobs: at least 1 run at a time, not {jobs}")
    if launcher_number("WORLD_SIZE", 1) > 1:
        raise UserError("compare starts processes of its own; call it without torchrun")


def _check_diagnosed(algorithms: Mapping[str, RunConfig]) -> None:
    """Refuse what would fail only after hours have been spent."""
    for name, config in algorithms.items():
        try:
            stochastic_of(config.algorithm)
        except UserError as error:
            raise UserError(f"--diagnose: {name}: {error}") from error


def _run(
    plan: Plan, folder: ComparisonFolder, jobs: int, levels: Sequence[float], console: Console, diagnose: bool
) -> int:
    """Run whatever of the plan is not done yet, then diagnose; comparison.json is written after each run.

    Returns:
        The number of the signal that came before all had ended; 0 without one.
    """
    entries = plan.as_json()
    runs = folder.runs(entries)
    for run in runs:  # of a comparison that was killed between a run's end and its record
        keep_record(run, entries["algorithms"][run.algorithm])
    todo = {
        run: plan.algorithms[run.algorithm] for run in runs if not is_done(run, entries["algorithms"][run.algorithm])
    }

    def say(sentence: str) -> None:
        console.print(cell(sentence), highlight=False, soft_wrap=True)

    def ended(run: RunFiles) -> None:
        why = read_text(run.failure).strip() if run.failure.exists() else None
        words = f"failed: {why}; all of it is in {run.log}" if why else "ended"
        say(f"{run.algorithm} seed {run.seed} {words}")
        keep_record(run, entries["algorithms"][run.algorithm])
        write_data(folder, levels)

    lengths = ", ".join(f"{name} {config.updates} updates" for name, config in plan.algorithms.items())
    count = f"{len(runs)} run" + "s" * (len(runs) > 1)
    say(f"{folder.path}: {count} of {plan.budget:,} forwards each ({lengths}), {len(todo)} to do")
    signal = run_all(todo, jobs, console, ended)
    if diagnose and not signal:
        _diagnose(plan, folder, console)
    return signal


def _diagnose(plan: Plan, folder: ComparisonFolder, console: Console) -> None:
    """Measure all algorithms at the base weights, once, with the first one's rollouts."""
    if not folder.diagnosis.exists():
        algorithms = {name: config.algorithm for name, config in plan.algorithms.items()}
        first = next(iter(plan.algorithms.values()))
        measured = diagnostics.diagnose(
            first, algorithms, say=lambda sentence: console.print(cell(sentence), highlight=False)
        )
        write_json(folder.diagnosis, measured, indent=1)


@contextmanager
def read_diagnosis(folder: ComparisonFolder) -> Iterator[dict[str, Any]]:
    """Read diagnosis.json; what goes wrong with it inside of this context is told in one sentence."""
    with explain_damage(folder.diagnosis, "remove it, and --diagnose measures it anew"):
        yield read_object(folder.diagnosis)


def write_data(folder: ComparisonFolder, levels: Sequence[float]) -> dict[str, Any]:
    """Write comparison.json and comparison.md from the runs as far as they have come; returns the former."""
    comparison = collect(folder, levels)
    parts = [as_markdown(comparison)]
    if folder.diagnosis.exists():
        with read_diagnosis(folder) as diagnosis:
            parts.append(diagnosis_as_markdown(diagnosis))
    write_json(folder.results, comparison, indent=1)
    write_text(folder.table, "\n".join(parts))
    return comparison


def _write_all(folder: ComparisonFolder, levels: Sequence[float], signal: int) -> dict[str, Any]:
    """Write the data, the figures and the page; end there if a signal has come."""
    comparison = write_data(folder, levels)
    write_figures(comparison, folder.figures)
    if folder.diagnosis.exists():
        with read_diagnosis(folder) as diagnosis:
            diagnostics.figures(diagnosis, folder.figures)
    write_report(folder.path)
    if signal:
        raise Interrupted(signal)
    return comparison

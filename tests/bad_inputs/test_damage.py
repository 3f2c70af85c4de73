"""Files of runs and comparisons that something else changed: each reader has one sentence, or reads what is left."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.card import model_card
from flashgrpo.compare import read_diagnosis, record, write_data
from flashgrpo.compare.figures import write_figures
from flashgrpo.compare.folder import ComparisonFolder
from flashgrpo.diagnostics import measure
from flashgrpo.errors import UserError
from flashgrpo.export import evaluated
from flashgrpo.files import write_json
from flashgrpo.report import charts, write_report
from flashgrpo.run.directory import RunDirectory
from flashgrpo.scoring.heldout import guard
from tests.compare.test_compare import plan, write_run

ODD = [
    *(None, "", "x", "a\0b", "\ud800", "/" * 5000, True, 0, -1, 7, 10**18, 10**400, 5e-324, 1e308, -1e308),
    *(float("nan"), float("inf"), [], [1], [[]], [None, None], {}, {"a": 1}, {"update": 3}),
]
BYTES = [b"", b"\0", b"\x80", b"\xef\xbb\xbf", b'"', b",", b"\n", b"NaN", b"[" * 5000, b"9" * 5000]


def nodes(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Yield the place of every entry, the shallow ones of a list's first entries before the deep ones."""
    yield place
    entries = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, below in entries:
        yield from nodes(below, (*place, key))


def changed(value: Any, place: tuple, new: Callable[[Any], Any]) -> Any:
    """Return a copy in which one entry is another, or is gone where `new` says so with Ellipsis."""
    if not place:
        return new(value)
    copy = value.copy()
    entry = changed(value[place[0]], place[1:], new)
    if entry is ...:
        del copy[place[0]]
    else:
        copy[place[0]] = entry
    return copy


@st.composite
def damages(draw: Any) -> Callable[[bytes], bytes]:
    """Draw what happens to a file: some bytes of it, or some entries of its JSON, are others."""
    seed, odd = draw(st.lists(st.floats(0, 0.999), min_size=6, max_size=6)), draw(st.sampled_from([..., *ODD]))
    if draw(st.integers(0, 9)) == 0:
        cut, gone, put = seed[0], draw(st.sampled_from([0, 1, 10**9])), draw(st.sampled_from(BYTES))
        return lambda old: old[: int(cut * len(old))] + put + old[int(cut * len(old)) + gone :]

    def damaged(old: bytes) -> bytes:
        lines = [json.loads(line) for line in old.splitlines()] if b"\n{" in old else [json.loads(old)]
        number = int(seed[0] * len(lines))
        depth = 1 + int(seed[1] * 5)
        places = [place for place in nodes(lines[number]) if len(place) <= depth]
        lines[number] = changed(lines[number], places[int(seed[2] * len(places))], lambda _: odd)
        kept = [json.dumps(line) for line in lines if line is not ...]
        return ("\n".join(kept) + "\n").encode("utf-8", "surrogatepass")

    return damaged


@st.composite
def damaged_files(draw: Any, names: list[str]) -> dict[str, list[Callable[[bytes], bytes]]]:
    """Draw one file, sometimes two, and what happens to each."""
    return draw(
        st.dictionaries(st.sampled_from(names), st.lists(damages(), min_size=1, max_size=2), min_size=1, max_size=2)
    )


def survives(folder: Path, damaged: dict[str, list], *readers: Callable[[], object]) -> None:
    """Let each reader read a folder with damaged files: it has one sentence, or none at all. The folder is restored."""
    before = {file: file.read_bytes() for file in folder.rglob("*.json*")}
    for name, harms in damaged.items():
        content = (folder / name).read_bytes()
        for harm in harms:
            with contextlib.suppress(ValueError, IndexError):  # no JSON any more, so the first harm has to do
                content = harm(content)
        (folder / name).write_bytes(content)
    for read in readers:
        told = "a sentence that is long enough"
        try:
            read()
        except UserError as error:
            told = str(error)
        assert 20 < len(told) < 12_000
        assert "\n" not in told
    for file, content in before.items():
        file.write_bytes(content)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Draw charts, but do not write them out, which takes nearly all of the time."""
    monkeypatch.setattr(charts, "svg", lambda figure, name, label: "")


# ---- runs ------------------------------------------------------------------------------------------------------------

OF_A_RUN = [
    "metrics.jsonl",
    "evaluations.jsonl",
    "environment.json",
    "confirmation.json",
    "checkpoints/000001/state.json",
]


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """A run with all of its files."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("damaged") / "run"))
    last = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    write_json(folder / "confirmation.json", {**last, "selected_from": 2})
    return folder


def resume(run: Path) -> None:
    """Read what a resume reads before it loads the model, and once more before it evaluates."""
    directory, config = RunDirectory.existing(run)
    directory.check(config.model_copy(update={"updates": 9}))
    directory.newest_checkpoint(lambda _: None)
    if evaluations := directory.evaluations():
        guard(evaluations[-1], config.rewards)
        assert all(isinstance(line["best"], bool) for line in evaluations)
        assert all({"reward", "rewards", "watched"} <= sample.keys() for sample in evaluations[0]["samples"])


def export(run: Path) -> None:
    """Read what an evaluation and an export read, and write the model card."""
    directory, config = RunDirectory.existing(run)
    update = directory.choose_checkpoint(None, lambda _: None)
    directory.check_model("a model")
    model_card(config, "diffusers", ["a.safetensors"], update, evaluated(directory, update), False)


@pytest.mark.parametrize("reader", [resume, export, write_report])
def test_readers_of_a_damaged_run(run, reader):
    @settings(max_examples=40, deadline=None, database=None)
    @given(damaged_files(OF_A_RUN))
    def holds(damaged):
        survives(run, damaged, lambda: reader(run))

    holds()


# ---- comparisons -----------------------------------------------------------------------------------------------------

ESTIMATE = {"value": 0.5, "interval": [0.25, 0.75]}
PARTS = ("within", "between", "total", "share", "uniform", "rectified", "score", "rectified_score")
WINDOWS = {"predicted": 0.5, **dict.fromkeys(PARTS, ESTIMATE)}
STEPS = {"steps": [0, 1], "scale": [2.0, 1.0], **{part: [ESTIMATE] * 2 for part in ("norm", "rectified", "score")}}
MEASURED = {
    "reward_variance": {"windows": {"whole grid": WINDOWS}},
    "gradient_by_step": {"windows": {"whole grid": WINDOWS}, **STEPS},
}
DIAGNOSIS = {
    **{"seed": 0, "prompts": 2, "group_size": 4, "effort": {"prompts": 3, "members": 2, "updates": 3}},
    "noises": {"linear, eta 1": {"independent": MEASURED, "shared": MEASURED}},
    "consistency": {"flash-grpo": {"cosine": ESTIMATE, "noise_scale": None, "drift": 0.0}},
}
OF_A_COMPARISON = [
    *("plan.json", "comparison.json", "diagnosis.json", "flash-grpo/seed-0.json"),
    *(f"flow-grpo/seed-{seed}/{name}.jsonl" for seed in (0, 1) for name in ("metrics", "evaluations")),
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> ComparisonFolder:
    """A comparison of which one run has its record, and another is not complete."""
    made = plan("updates=6")
    folder = ComparisonFolder(tmp_path_factory.mktemp("damaged") / "compared")
    with folder.claimed(made):
        pass
    entries = made.as_json()
    for files in folder.runs(entries):
        whole = files.algorithm == "flash-grpo" or files.seed == 0
        write_run(files, made.algorithms[files.algorithm], 0.1, None if whole else 3)
    files = folder.runs(entries)[0]
    write_json(files.record, record.read_run(files, entries["algorithms"][files.algorithm]))
    write_data(folder, ())
    write_json(folder.diagnosis, DIAGNOSIS)
    return folder


def compare(folder: ComparisonFolder) -> None:
    """Read what a comparison reads that goes on, and write all of its pages."""
    entries = folder.plan()
    for run in folder.runs(entries):
        record.is_done(run, entries["algorithms"][run.algorithm])
    write_figures(write_data(folder, ()), folder.figures)
    with read_diagnosis(folder) as diagnosis:
        for draw in (measure.gradient_figure, measure.variance_figure, measure.consistency_figure):
            draw(diagnosis)


def test_readers_of_a_damaged_comparison(compared):
    @settings(max_examples=40, deadline=None, database=None)
    @given(damaged_files(OF_A_COMPARISON))
    def holds(damaged):
        survives(compared.path, damaged, lambda: write_report(compared.path), lambda: compare(compared))

    holds()


def test_a_page_of_a_comparison_that_lacks_anything(compared):
    """One thing after the other is gone: one sentence each, or a page that does without."""
    whole = json.loads((compared.path / "comparison.json").read_bytes())
    for place in nodes(whole):
        if not place or "settings" in place or any(isinstance(key, int) and key for key in place):
            continue  # settings are shown as they are; and of a list the first
        harm = [lambda old, place=place: json.dumps(changed(json.loads(old), place, lambda _: ...)).encode()]
        survives(compared.path, {"comparison.json": harm}, lambda: write_report(compared.path))

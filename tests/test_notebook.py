"""What a notebook does: train twice in one process, inside of a running event loop, and look at what came of it."""

import asyncio
import html
import re
import signal
import sys
from pathlib import Path

import pytest

from flashgrpo import Run, train
from flashgrpo.scoring.loading import load_reward
from tests.conftest import small_run
from tests.report.test_report import make_run, metrics_row


def test_two_runs_in_one_process_and_their_pages(tmp_path: Path):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    async def cells() -> list[Run]:  # a kernel runs cells inside of its event loop
        names = ("first", "second")
        return [
            Run(train(small_run(tmp_path / name, "updates=1", "evaluation.every=1", "evaluation.videos=1")))
            for name in names
        ]

    first, second = asyncio.run(cells())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert [line["update"] for line in first.metrics] == [1]
    assert [line["reward"] for line in first.metrics] == [line["reward"] for line in second.metrics]
    assert [line["update"] for line in first.evaluations] == [0, 1]
    assert first.result
    assert first.samples()[0]["prompt"] == "a red square moving left slowly"
    shown = first._repr_html_()
    frame = re.fullmatch(r'<iframe title="[^"]*first" style="[^"]*" srcdoc="([^"]*)"></iframe>', shown)
    assert frame
    page = html.unescape(frame[1])
    for part in ("<svg", "data:video/mp4;base64,", "paired samples", "update 1"):
        assert part in page


def test_a_run_is_read_anew_and_one_that_is_not_there_is_told(tmp_path: Path):
    run = Run(tmp_path / "<run>")
    assert run._repr_html_().startswith("<p>")
    assert "&lt;run&gt; is no run directory" in run._repr_html_()
    make_run(tmp_path / "<run>", [metrics_row(1)], [])
    assert len(run.metrics) == 1
    assert run.result is None
    assert run.samples() == []
    make_run(tmp_path / "other", [metrics_row(1), metrics_row(2)], [])
    assert len(Run(str(tmp_path / "other")).metrics) == 2


def test_a_function_of_a_cell_is_a_reward(monkeypatch: pytest.MonkeyPatch):
    def brightness(videos, prompts, **columns):
        return [0.0] * len(prompts)

    monkeypatch.setattr(sys.modules["__main__"], "brightness", brightness, raising=False)
    assert load_reward("__main__:brightness", "rewards.bright.call") is brightness

"""`flashgrpo watch`: the report's page over HTTP, and that a browser follows a run that goes on."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from flashgrpo.errors import UserError
from flashgrpo.report import live
from flashgrpo.report.live import Server, watch, watching
from tests.report.test_report import CHROMIUM, evaluation, make_run, metrics_row, whole_run


@contextmanager
def served(*runs: Path) -> Iterator[Server]:
    with Server(runs) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def append(file: Path, row: object) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def test_it_is_the_reports_page_with_links_for_media(tmp_path: Path):
    run = whole_run(tmp_path / "demo", videos=1)
    with served(run) as server, closing(httpx.Client(base_url=server.url, follow_redirects=True, timeout=60)) as client:
        page = client.get("/")
        assert page.url.path == "/0/"
        assert "Held-out reward rose" in page.text
        assert "Over time" in page.text
        assert 'src="videos/000.mp4"' in page.text
        assert "data:video" not in page.text
        assert client.get("/0/videos/000.mp4").content == (run / "videos/000.mp4").read_bytes()
        for path in ("/0/config.yaml", "/0/videos/none.mp4", "/0/../demo/config.yaml", "/0//etc/hostname", "/1/", "/x"):
            assert client.get(path).status_code == 404, path
        assert client.get("/0/", headers={"Host": "elsewhere.example"}).status_code == 403
    assert not list(run.glob("*.html"))


def test_news_comes_when_a_file_changes(tmp_path: Path):
    run = make_run(tmp_path / "run", [metrics_row(1)], [evaluation(0, 0.0)])
    with served(run) as server, httpx.stream("GET", f"{server.url}0/events", timeout=60) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        lines = answer.iter_lines()
        assert next(lines) == "data: changed"
        assert next(lines) == ""
        append(run / "metrics.jsonl", metrics_row(2))
        assert next(lines) == "data: changed"


def test_a_page_that_took_long_to_draw_is_left_as_it_is_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, now = make_run(tmp_path / "run", [metrics_row(1)], [evaluation(0, 0.0)]), iter([10.0, 12.0, 19.9, 20.0])
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: next(now)))
    live.page(run, live.stamp(run))
    assert not live.rested(run)
    assert live.rested(run)


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path):
    with served(tmp_path / "run") as server:
        assert "Waiting for the run to begin" in httpx.get(f"{server.url}0/", timeout=60).text
        make_run(tmp_path / "run", [metrics_row(1), metrics_row(2) | {"skipped_steps": 1}], [evaluation(0, 0.0)])
        page = httpx.get(f"{server.url}0/", timeout=60).text
    assert "In the last 2 updates 1 optimizer step(s) were skipped" in page
    assert "58 updates, each as long as the last 2" in page


def test_several_runs_stand_side_by_side(tmp_path: Path):
    runs = [make_run(tmp_path / name, [], []) for name in ("one", "two")]
    with served(*runs) as server:
        page = httpx.get(server.url, timeout=60).text
    assert 'src="/0/" title="one"' in page
    assert 'src="/1/" title="two"' in page


def test_what_cannot_be_watched_is_told(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("", "utf-8")
    with pytest.raises(UserError, match="is a file, not the folder of a run"):
        watch([file], 0)
    with served(tmp_path) as server, pytest.raises(UserError, match=r"cannot be listened on .*; choose another"):
        watch([tmp_path], server.server_address[1])


def test_train_watches_from_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = []

    class Process:
        def __init__(self, command: list[str], **_: object) -> None:
            started.append(command)

        def terminate(self) -> None:
            started.append("terminated")

        def wait(self) -> None:
            started.append("waited")

    monkeypatch.setattr(subprocess, "Popen", Process)
    with watching(tmp_path):
        assert started == [[sys.executable, "-m", "flashgrpo", "watch", str(tmp_path)]]
    assert started[1:] == ["terminated", "waited"]


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
@pytest.mark.parametrize("look", [(390, "dark"), (1280, "light")], ids=["phone", "desk"])
def test_a_browser_follows_the_run(tmp_path: Path, look: tuple[int, str]):
    playwright = pytest.importorskip("playwright.sync_api")
    width, scheme = look
    run = whole_run(tmp_path / "demo", videos=2)
    with (
        served(run) as server,
        playwright.sync_playwright() as p,
        p.chromium.launch(executable_path=CHROMIUM) as browser,
    ):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.set_default_timeout(90_000)
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(server.url)
        page.get_by_text("Live: follows the run").wait_for()
        page.wait_for_function("videos().length > 4 && videos().every(v => v.readyState >= 2 && !v.paused)")
        page.get_by_text("config.yaml", exact=True).first.click()
        page.evaluate("window.kept = document.querySelector('#samples')")
        page.locator("#play").focus()
        append(run / "metrics.jsonl", metrics_row(61))
        page.locator(".tiles").get_by_text("61", exact=True).wait_for()
        assert page.evaluate("kept === document.querySelector('#samples') && document.activeElement.id") == "play"
        assert page.locator("details[open] > summary").inner_text() == "config.yaml"
        page.keyboard.press("Enter")
        assert page.evaluate("videos().every(v => v.paused)")
        append(run / "evaluations.jsonl", evaluation(70, 0.3, 2, best=True))
        page.get_by_text("update 70").first.wait_for()
        assert page.evaluate("videos().every(v => v.paused)")
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        if shots := os.environ.get("FLASHGRPO_SHOTS"):
            page.screenshot(path=Path(shots) / f"{width}-{scheme}.png", full_page=True)
        browser.close()
        assert not errors

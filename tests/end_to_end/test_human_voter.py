"""A scripted voter judges a run by its pictures: it reads the pixels of the page, and prefers what is brighter."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flashgrpo.files import resolve_path
from flashgrpo.run.lines import read_lines
from flashgrpo.serving.human.votes import Votes
from flashgrpo.train import train
from tests.conftest import small_run
from tests.report.test_report import CHROMIUM

playwright = pytest.importorskip("playwright.sync_api")
READY = """() => question && [...document.querySelectorAll("#samples button")].every(button =>
  button.firstChild.readyState >= 2 && question.samples.includes(button.dataset.name))"""
BRIGHTNESS = """() => [...document.querySelectorAll("#samples video")].map(video => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 32, height: 32 });
  const context = canvas.getContext("2d");
  context.drawImage(video, 0, 0, 32, 32);
  return context.getImageData(0, 0, 32, 32).data.reduce((sum, value) => sum + value, 0);
})"""

HELDOUT = Path(resolve_path("flashgrpo:tiny/prompts/heldout.jsonl"))
RUN = (
    "updates=8",
    "rollout.prompts=3",
    "rollout.group_size=4",
    "evaluation.every=8",
    "tracking.preflight=skip",
)


class Voter(threading.Thread):
    """Ranks all samples of each group with the keyboard until it is told to leave."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.left, self.votes = url, threading.Event(), 0
        self.problems: list[str] = []

    def run(self) -> None:
        with (
            playwright.sync_playwright() as p,
            p.chromium.launch(executable_path=CHROMIUM) as browser,
        ):
            page = browser.new_page(viewport={"width": 1000, "height": 800})
            page.on("pageerror", lambda error: self.problems.append(str(error)))
            page.goto(self.url)
            while not self.left.is_set():
                try:
                    page.wait_for_function(READY, timeout=2000, polling=50)
                except playwright.TimeoutError:
                    continue
                self.vote(page)

    def vote(self, page) -> None:
        key = page.evaluate("question.key")
        brightness = page.evaluate(BRIGHTNESS)
        for place in sorted(range(len(brightness)), key=lambda place: -brightness[place]):
            page.keyboard.press("123456789"[place])
        page.keyboard.press("Enter")
        page.wait_for_function("key => question?.key !== key", arg=key, timeout=60_000, polling=50)
        self.votes += 1


def brightness(videos, prompts, **columns):
    return videos.mean(dim=(1, 2, 3, 4))


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
def test_what_the_voter_prefers_rises(tmp_path: Path):
    command = [sys.executable, "-m", "flashgrpo", "reward", "human", str(tmp_path / "votes"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as server:
        try:
            assert server.stdout
            url = server.stdout.readline().split()[-1]
            voter = Voter(url)
            voter.start()
            try:
                few = tmp_path / "heldout.jsonl"
                few.write_text("".join(HELDOUT.read_text("utf-8").splitlines(True)[::3]), "utf-8")
                rewards = f"rewards={{agreement: null, persistence: null, background: null, human: {{call: '{url}'}}, "
                rewards += f"bright: {{call: '{__name__}:brightness', watched: true}}}}"
                config = small_run(tmp_path / "run", rewards, f"prompts.heldout={few}", *RUN)
                train(config)
            finally:
                voter.left.set()
                voter.join()
        finally:
            server.terminate()
    assert not voter.problems
    last = read_lines(tmp_path / "run" / "evaluations.jsonl")[-1]
    assert last["base_reward"] == 0
    assert last["interval"][0] > 0
    assert last["watched"]["bright"] > last["base_watched"]["bright"]
    assert Votes(tmp_path / "votes").count() == voter.votes

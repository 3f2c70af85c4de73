"""Reward servers, good and bad, and a reward that waits until it is told to go on."""

import time
from pathlib import Path

import pytest

from tests.reward_servers import Fake, Served


@pytest.fixture(scope="module")
def server():
    """One that is good to all tests."""
    served = Served(batch=4, max_mib=1.0)
    yield served
    assert served.process.is_alive()  # whatever the tests did to it
    served.stop()
    assert served.process.exitcode == 0


@pytest.fixture
def fake():
    """Starts servers that misbehave, and ends them."""
    started = []

    def start(act, info=None) -> Fake:
        started.append(Fake(act, info))
        return started[-1]

    yield start
    for server in started:
        server.close()


class Gate:
    """A prompt with which a request is computed until `open` is called; `wait` is for that to begin."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.prompt = folder, f"until {folder}/opened"

    def wait(self) -> None:
        while not (self._folder / "started").exists():
            time.sleep(0.01)

    def open(self) -> None:
        (self._folder / "opened").touch()


@pytest.fixture
def gate(tmp_path):
    made = Gate(tmp_path)
    yield made
    made.open()


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("FLASHGRPO_REWARD_TOKEN", raising=False)

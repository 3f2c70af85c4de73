"""Training on a served reward: a server that goes away ends the run with its checkpoint, and nothing is lost by it."""

import socket
import threading
import time
from pathlib import Path

import pytest

from flashgrpo.errors import UserError
from flashgrpo.report import write_report
from flashgrpo.run import checkpoint
from flashgrpo.run.lines import OF_THE_MACHINE, read_lines
from flashgrpo.train import train
from tests.conftest import small_run
from tests.reward_servers import Served

OWN = {*OF_THE_MACHINE, "reward_failures"}  # of a run that was cut short


def settings(call: str, args: str = "{}") -> list[str]:
    rewards = f"agreement: null, persistence: null, background: null, bright: {{call: '{call}', args: {args}}}"
    return [f"rewards={{{rewards}}}", "updates=6", "tracking.preflight=skip"]


def lines(run: Path, name: str) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in OWN} for line in read_lines(run / name)]


def kill_after(server: Served, file: Path, count: int) -> None:
    until = time.monotonic() + 120
    while len(read_lines(file)) < count and time.monotonic() < until:
        time.sleep(0.005)
    server.kill()


def test_a_server_that_dies_and_comes_back_changes_no_number(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = train(small_run(tmp_path / "a" / "run", *settings("tests.reward_servers:brightness")))

    server = Served("brightness")
    remote = settings(server.url, "{encoding: float32, patience: 1.0, batch: 1}")
    config = small_run(tmp_path / "b" / "run", *remote)
    metrics = tmp_path / "b" / "run" / "metrics.jsonl"
    killer = threading.Thread(target=kill_after, args=(server, metrics, 2))
    killer.start()
    with pytest.raises(UserError, match=r"reward bright: .*cannot be reached.*reward serve.* running there"):
        train(config)
    killer.join()
    done = len(read_lines(metrics))
    assert 2 <= done < 6
    assert checkpoint.newest_whole(tmp_path / "b" / "run" / "checkpoints", lambda _: None) == done

    with pytest.raises(UserError, match="reward serve"):  # absent at the start: nothing is drawn, nothing is changed
        train(config)
    assert len(read_lines(metrics)) == done

    again = Served("brightness", port=server.port)
    run = train(config)
    again.stop()
    assert lines(run, "metrics.jsonl") == lines(expected, "metrics.jsonl")
    assert [line["reward"] for line in lines(run, "evaluations.jsonl")] == [
        line["reward"] for line in lines(expected, "evaluations.jsonl")
    ]


def test_a_failure_that_passes_is_counted_and_survived(make_run):
    server = Served("brightness")
    config = make_run(*settings(server.url, "{encoding: float32, patience: 60, batch: 1}"))
    revived: list[Served] = []

    def kill_and_revive() -> None:
        kill_after(server, Path(config.out) / "metrics.jsonl", 2)
        with socket.create_server(("127.0.0.1", server.port)) as nobody:  # until a request has failed
            nobody.accept()[0].close()
        revived.append(Served("brightness", port=server.port))

    thread = threading.Thread(target=kill_and_revive)
    thread.start()
    run = train(config)
    thread.join()
    revived[0].stop()
    metrics = read_lines(run / "metrics.jsonl")
    assert [line["update"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    both = [*metrics, *read_lines(run / "evaluations.jsonl")]
    assert sum(line["reward_failures"]["bright"] for line in both) >= 1
    assert "failed attempts, repeated" in write_report(run).read_text()

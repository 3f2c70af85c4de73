"""Trackers get what the run's own files get, through accelerate's classes; none of them can end a run."""

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashgrpo.config.settings import TrackingConfig
from flashgrpo.errors import UserError
from flashgrpo.run.lines import read_lines
from flashgrpo.run.trackers import SENDERS, Trackers
from flashgrpo.train import train

STAND_IN = '''
"""Stands in for a tracker's package: writes what it is told into a file."""
import json, os

LOG = os.environ["STAND_IN_LOG"]


def note(**what):
    with open(LOG, "a") as file:
        file.write(json.dumps(what, default=str) + "\\n")


class Config(dict):
    def update(self, values, **_):
        note(config=values)


config = Config()


class Video:
    def __init__(self, path, **_):
        self.path = path

    def __str__(self):
        return f"{type(self).__name__.lower()} {self.path} {os.path.exists(self.path)}"


class Image(Video):
    pass


class Html:
    def __init__(self, text, **_):
        self.text = text

    def __str__(self):
        return f"text {self.text}"


Markdown = Html


class Run:
    def log(self, values, step=None, **_):
        if os.environ.get("STAND_IN_FAILS"):
            raise ConnectionError("no route")
        note(step=step, values=values)

    def finish(self, **_):
        note(finish=True)


run = Run()
finish = run.finish


def init(**settings):
    note(init=settings)
    return run
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a package of that name importable; returns what it was told so far."""

    def make(name: str):
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(STAND_IN)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / f"{name}.log"))
        return lambda: [json.loads(line) for line in (tmp_path / f"{name}.log").read_text().splitlines()]

    return make


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_what_a_tracker_is_told(make_run, stand_in, name):
    told = stand_in(name)
    run = train(make_run(f"tracking.trackers=[{name}]", "tracking.project=mine", "evaluation.videos=1"))
    begin, config, *logged = told()
    assert begin["init"]["project"] == "mine"
    assert begin["init"].get("mode", "offline") == "offline"
    assert config["config"]["rollout"]["num_steps"] == 4
    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "evaluations.jsonl")
    rewards = {
        line["step"]: line["values"]["train/reward"] for line in logged if "train/reward" in line.get("values", {})
    }
    assert rewards == {line["update"]: line["reward"] for line in metrics}
    heldout = {line["step"]: line["values"] for line in logged if "heldout/difference" in line.get("values", {})}
    assert {step: one["heldout/watched/background"] for step, one in heldout.items()} == {
        line["update"]: line["watched"]["background"] for line in evaluations
    }
    assert any("train/seconds/rollout" in line.get("values", {}) for line in logged)
    videos = [value for line in logged for key, value in line.get("values", {}).items() if key.startswith("videos/")]
    assert bool(videos) == (name != "swanlab")  # which shows no mp4
    assert all(value.endswith(".mp4 True") for value in videos)
    assert logged[-1] == {"finish": True}


@pytest.mark.parametrize("name", ["wandb", "trackio", "swanlab"])
def test_a_run_that_is_started_again_is_the_same_run_there(stand_in, tmp_path, name):
    told, config = stand_in(name), TrackingConfig(trackers=(name,))
    for folder in ("run", "run", "another"):
        (tmp_path / folder).mkdir(exist_ok=True)
        Trackers(config, tmp_path / folder, {}, pytest.fail).close()
    first, second, another = (line["init"] for line in told() if "init" in line)
    assert first == second
    assert first["resume"] == "allow"
    key = "name" if name == "trackio" else "id"  # which knows a run by its name
    assert another[key] != first[key]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_video_an_image_and_a_text(stand_in, tmp_path, name):
    told, files = stand_in(name), {"0": tmp_path / "0.mp4", "1": tmp_path / "1.png", "2": tmp_path / "2.txt"}
    for file in files.values():
        file.write_text("a < b")
    trackers = Trackers(TrackingConfig(trackers=(name,)), tmp_path, {}, pytest.fail)
    trackers.media(3, files)
    trackers.close()
    [(step, values)] = [(line["step"], line["values"]) for line in told() if "values" in line]
    text = "<pre>a &lt; b</pre>" if name == "wandb" else "a < b"
    assert step == 3
    assert values == {
        "videos/0": f"video {files['0']} True",
        "images/1": f"image {files['1']} True",
        "texts/2": f"text {text}",
    }


def test_mlflow_keeps_the_files_themselves(tmp_path, monkeypatch):
    files = {"0": tmp_path / "0.mp4", "1": tmp_path / "1.png", "2": tmp_path / "2.txt"}
    kept = []
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_artifact=lambda *given: kept.append(given)))
    SENDERS["mlflow"](None, 3, files)
    assert kept == [
        (str(files["0"]), "videos/000003"),
        (str(files["1"]), "images/000003"),
        (str(files["2"]), "texts/000003"),
    ]


def test_tensorboard_hides_updates_that_are_done_again(tmp_path):
    pb = pytest.importorskip("tensorboardX.proto.event_pb2")
    config = TrackingConfig(trackers=("tensorboard",))
    for update in ("000000", "000004"):
        (tmp_path / "checkpoints" / update).mkdir(parents=True)
    trackers = Trackers(config, tmp_path, {}, pytest.fail)
    trackers.log("train", {"update": 5, "reward": 0.5})
    trackers.close()
    (file,) = (tmp_path / "trackers").rglob("*tfevents*")
    starts = [event for event in events(file, pb) if event.HasField("session_log")]
    assert [(event.session_log.status, event.step) for event in starts] == [(pb.SessionLog.START, 5)]


def test_a_tracker_that_fails_is_left_out(make_run, stand_in, monkeypatch, capsys):
    told = stand_in("wandb")
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    run = train(make_run("tracking.trackers=[wandb]"))
    assert len(read_lines(run / "metrics.jsonl")) == 4
    assert (
        capsys.readouterr().err.count("tracker wandb failed and is left out from here on: ConnectionError: no route")
        == 1
    )
    assert [set(line) for line in told()] == [{"init"}, {"config"}]


def test_a_package_that_is_missing(make_run, monkeypatch):
    monkeypatch.setattr("flashgrpo.run.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking.trackers: mlflow is not installed: pip install mlflow"):
        train(make_run("tracking.trackers=[mlflow]"))
    with pytest.raises(UserError, match=r"entry 1 of tracking.trackers must be"):
        make_run("tracking.trackers=[wandbb]")


def test_tensorboard_for_real(make_run, tmp_path):
    pb = pytest.importorskip("tensorboardX.proto.event_pb2")
    config = make_run().tracking.model_copy(update={"trackers": ("tensorboard",)})
    warned: list[str] = []
    trackers = Trackers(config, tmp_path, {}, warned.append)
    trackers.log("train", {"update": 3, "reward": 0.25, "rewards": {"a.b": 0.5}, "note": "text", "flag": True})
    trackers.close()
    assert warned == []
    (file,) = (tmp_path / "trackers").rglob("*tfevents*")
    found = {v.tag: (event.step, v.simple_value) for event in events(file, pb) for v in event.summary.value}
    assert found == {"train/reward": (3, 0.25), "train/rewards/a.b": (3, 0.5)}


def events(file: Path, pb):
    """Records of an event file: length, checksum, message, checksum."""
    data, place = file.read_bytes(), 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        yield pb.Event.FromString(data[place + 12 : place + 12 + length])
        place += 16 + length

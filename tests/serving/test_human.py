"""`flashgrpo reward human`: votes and their numbers, the page, and a server that is killed while it asks."""

import contextlib
import io
import json
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from flashgrpo.errors import UserError
from flashgrpo.rewards.human import Replay
from flashgrpo.scoring.inputs import VideoFiles
from flashgrpo.serving import wire
from flashgrpo.serving.client import remote
from flashgrpo.serving.commands import Options
from flashgrpo.serving.http import Transient
from flashgrpo.serving.human import judging
from flashgrpo.serving.human.judging import Human
from flashgrpo.serving.human.votes import FILE, Agreement, Question, Vote, Votes, standings
from flashgrpo.serving.server import Service, listen, load_and_serve
from tests.reward_servers import FORKS

CALL = "flashgrpo.serving.human.judging:Human"


def png(level: int) -> bytes:
    content = io.BytesIO()
    Image.new("L", (4, 4), level).save(content, format="PNG")
    return content.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Four images, each brighter than the one before."""
    for level in range(4):
        (tmp_path / f"{level}.png").write_bytes(png(60 * level))
    return [str(tmp_path / f"{level}.png") for level in range(4)]


@pytest.fixture
def people(tmp_path: Path):
    """Makes the reward, in a folder of that name; all are closed in the end."""
    made: list[Human] = []

    def make(name: str = "votes", **settings) -> Human:
        made.append(Human(str(tmp_path / name), **settings))
        return made[-1]

    yield make
    for human in made:
        human.close()


def names_of(folder: Path, files: list[str]) -> list[str]:
    """What the samples of these files are called, once they were asked about."""
    by_content = {file.read_bytes(): file.name for file in (folder / "samples").iterdir()}
    return [by_content[Path(file).read_bytes()] for file in files]


@contextlib.contextmanager
def asked(human: Human, files: list[str], prompts: list[str] | None = None, **columns):
    """A call of the reward in a thread; yields what it returns, once it has, after the question is open."""
    answer: list = []

    def call() -> None:
        try:
            answer.append(human(files, prompts or ["p"] * len(files), **columns))
        except Transient as error:
            answer.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    until = time.monotonic() + 30
    while thread.is_alive() and not human.shown_to("me")["question"] and time.monotonic() < until:
        time.sleep(0.005)
    yield answer
    thread.join(30)
    assert not thread.is_alive()


def test_what_a_vote_says_of_each_sample():
    """Of four, the first chosen beats 3; the second beats two and loses to one: (2 - 1) / 3; the others (0 - 2) / 3."""
    assert standings("abcd", "ca") == pytest.approx({"a": 1 / 3, "b": -2 / 3, "c": 1.0, "d": -2 / 3})
    assert set(standings("abcd", "").values()) == {0.0}
    assert standings("ab", "b") == {"a": -1.0, "b": 1.0}
    assert sum(standings("abcde", "ecb").values()) == pytest.approx(0)


def test_a_group_is_answered_by_the_vote(people, tmp_path: Path, files: list[str]):
    human = people()
    with asked(human, files) as answer:
        shown = human.shown_to("me")
        names = names_of(tmp_path / "votes", files)
        assert shown["question"]["prompt"] == "p"
        assert sorted(shown["question"]["samples"]) == sorted(names)
        assert not human.vote("another question", "me", [], 1.0)
        with pytest.raises(ValueError, match="chooses what was not shown, or the same twice"):
            human.vote(shown["question"]["key"], "me", [names[0], names[0]], 1.0)
        with pytest.raises(ValueError, match="chooses what was not shown"):
            human.vote(shown["question"]["key"], "me", ["0" * 32 + ".png"], 1.0)
        assert human.vote(shown["question"]["key"], "me", [names[3], names[1]], 2.5)
    assert answer[0] == pytest.approx([-2 / 3, 1 / 3, -2 / 3, 1.0])
    assert human.shown_to("me") | {"an_hour": None} == {
        "question": None,
        "an_hour": None,
        "agreement": {"same": 0, "pairs": 0},
        "waiting": 0,
        "votes": 1,
        "mine": 1,
    }
    assert human(files, ["p"] * 4) == answer[0]  # nobody is asked twice
    assert human(files[::-1], ["p"] * 4) == answer[0][::-1]
    human.close()
    with pytest.raises(Transient, match="the server is ending"):
        human(files[:2], ["p"] * 2)


def test_who_cannot_say_gives_no_number_and_equal_samples_are_not_asked_about(people, tmp_path: Path, files: list[str]):
    human = people()
    with asked(human, files) as answer:
        human.vote(human.shown_to("me")["question"]["key"], "me", None, 1.0)
    assert answer == [[None] * 4]
    assert human([files[0]] * 3, ["p"] * 3) == [0.0] * 3
    with asked(human, [files[0], files[0], files[1]]) as answer:
        key, names = human.shown_to("me")["question"]["key"], names_of(tmp_path / "votes", files[:2])
        human.vote(key, "me", [names[1]], 1.0)
    assert answer == [[-1.0, -1.0, 1.0]]


def test_a_sample_alone_is_held_against_the_first_of_its_prompt(people, tmp_path: Path, files: list[str]):
    human = people()
    assert human(files[:1], ["p"], color=["red"]) == [0.0]
    assert human(files[1:2], ["p"], color=["blue"]) == [0.0]  # other columns are another prompt
    with asked(human, files[2:3], ["p"], color=["red"]) as answer:
        key, names = human.shown_to("me")["question"]["key"], names_of(tmp_path / "votes", files[:3])
        assert sorted(human.shown_to("me")["question"]["samples"]) == sorted([names[0], names[2]])
        human.vote(key, "me", [names[2]], 1.0)
    assert answer == [[1.0]]
    assert human(files[:1], ["p"], color=["red"]) == [0.0]


def test_several_voters_and_how_far_they_agree(people, tmp_path: Path, files: list[str]):
    human = people(voters=2)
    with asked(human, files) as answer:
        key, names = human.shown_to("me")["question"]["key"], names_of(tmp_path / "votes", files)
        human.vote(key, "anna", names[::-1], 1.0)
        assert human.shown_to("anna")["question"] is None
        assert human.shown_to("bo")["waiting"] == 1
        human.vote(key, "bo", [names[3], names[0], names[1], names[2]], 1.0)
    # anna: 0 < 1 < 2 < 3; bo: 2 < 1 < 0 < 3. They differ in the three pairs of 0, 1 and 2.
    assert human.votes.agreement() == Agreement(3, 6)
    assert answer[0] == pytest.approx([(-1 + 1 / 3) / 2, -1 / 3, (1 / 3 - 1) / 2, 1.0])


def test_a_group_is_given_up_after_the_wait_and_asked_again_after_the_hold(people, tmp_path: Path, files, monkeypatch):
    human = people("a", wait=0)
    assert human(files, ["p"] * 4) == [None] * 4
    assert human.shown_to("me")["question"] is None
    monkeypatch.setattr(judging, "HOLD", 0.02)
    human = people("b")
    with pytest.raises(Transient, match="a group waits to be judged"):
        human(files, ["p"] * 4)
    assert human.shown_to("me")["waiting"] == 1  # the page goes on to show it


def test_votes_an_hour_leave_pauses_out(tmp_path: Path):
    votes = Votes(tmp_path)
    asked = ["0" * 32 + ".png", "1" * 32 + ".png"]
    assert votes.an_hour("me") is None
    for at in (0.0, 10.0, 20.0, 5000.0, 5010.0):
        votes.add(Vote(voter="me", at=at, seconds=1.0, prompt="p", asked=asked, best=None))
    assert votes.an_hour("me") == pytest.approx(360)
    assert (votes.count(), votes.count("me"), votes.count("you")) == (5, 5, 0)


def test_a_cut_line_is_dropped_and_any_other_is_told(tmp_path: Path):
    asked = ["0" * 32 + ".png", "1" * 32 + ".png"]
    Votes(tmp_path).add(Vote(voter="me", at=0.0, seconds=1.0, prompt="p", asked=asked, best=asked[:1]))
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + whole[:-20])
    votes = Votes(tmp_path)
    assert votes.numbers(Question("p", tuple(asked))) == {asked[0]: 1.0, asked[1]: -1.0}
    assert (tmp_path / FILE).read_bytes() == whole
    for line in ('{"vote": {"voter": "me"}}', "[1]", "nonsense", '{"vote": {"voter": ' + '"x"' * 2 + "}}"):
        (tmp_path / FILE).write_bytes(whole + line.encode() + b"\n")
        with pytest.raises(UserError, match=r"votes.jsonl, line 2: it is no vote; take the line out"):
            Votes(tmp_path)


def test_replayed_votes_know_what_was_judged_and_nothing_else(people, tmp_path: Path, files: list[str]):
    human = people()
    assert human(files[:1], ["q"]) == [0.0]
    with asked(human, files) as answer:
        key, names = human.shown_to("me")["question"]["key"], names_of(tmp_path / "votes", files)
        human.vote(key, "me", names[2:], 1.0)
    before = (tmp_path / "votes" / FILE).read_bytes()
    replay = Replay(str(tmp_path / "votes"))
    assert replay(files, ["p"] * 4) == answer[0]
    assert replay(files[:3], ["p"] * 3) == [None] * 3
    assert replay(files, ["other"] * 4) == [None] * 4
    assert replay(files[:1], ["q"]) == [0.0]
    assert replay(files[1:2], ["q"]) == [None]
    assert replay(files[1:2], ["r"]) == [None]
    assert (tmp_path / "votes" / FILE).read_bytes() == before
    with pytest.raises(UserError, match=r"has no votes.jsonl; .flashgrpo reward human"):
        Replay(str(tmp_path))


def test_settings_and_folders_that_cannot_be_used(people, tmp_path: Path):
    with pytest.raises(UserError, match="--voters of 1 or more"):
        Human(str(tmp_path / "votes"), voters=0)
    with pytest.raises(UserError, match="--wait of 0 or more"):
        Human(str(tmp_path / "votes"), wait=float("nan"))
    human = people()
    with pytest.raises(UserError, match=r"is in use by another .flashgrpo reward human.; choose another folder"):
        Human(str(tmp_path / "votes"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        Human(str(tmp_path / "file"))
    assert human.file("../votes.jsonl") is None
    assert human.file("none.png") is None


@pytest.fixture
def page(people, tmp_path: Path):
    """The application with the page of a new folder, and the reward."""
    human = people()
    info = wire.Info(name="human", version="1", takes=VideoFiles(), max_bytes=2**20, compares=True)
    service = Service(human, info, Options())
    app = service.application()
    human.add_page(app)
    with TestClient(app, base_url="http://127.0.0.1:8765") as client:
        yield client, human
    service.close()


def test_the_page_is_for_this_machine_alone(page):
    client, _ = page
    answer = client.get("/")
    assert answer.status_code == 200
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert client.get("/", headers={"Host": "localhost:8765"}).status_code == 200
    for headers in ({"Host": "evil.example:8765"}, {"Host": "127.0.0.1:80"}, {"Origin": "http://evil.example"}):
        for path in ("/", "/next?voter=me", "/samples/x.png"):
            assert client.get(path, headers=headers).status_code == 403, (headers, path)
        answer = client.post("/votes", json={}, headers=headers)
        assert (answer.status_code, "open it at 127.0.0.1" in answer.text) == (403, True)
    for name in ("..%2fvotes.jsonl", "votes.jsonl", "%2e%2e/votes.jsonl", ".partial-x.png"):
        assert client.get(f"/samples/{name}").status_code == 404, name


def test_votes_over_http(page, tmp_path: Path, files: list[str]):
    client, human = page
    with asked(human, files) as answer:
        question = client.get("/next?voter=me").json()["question"]
        content = client.get(f"/samples/{question['samples'][0]}")
        assert content.headers["content-type"] == "image/png"
        names = names_of(tmp_path / "votes", files)
        vote = {"question": question["key"], "voter": "me", "best": [names[1]], "seconds": 1.5}
        for change, sentence in (
            ({"voter": ""}, "a voter's name is a line of up to 40 characters"),
            ({"voter": "a\nb"}, "a voter's name is a line"),
            ({"voter": "x" * 41}, "a voter's name is a line"),
            ({"best": "all"}, "the vote, best: Input should be"),
            ({"best": ["nothing"]}, "chooses what was not shown"),
            ({"seconds": -1}, "the vote, seconds"),
            ({"more": 1}, "the vote, more: Extra inputs"),
        ):
            refused = client.post("/votes", json=vote | change)
            assert (refused.status_code, sentence in refused.json()["detail"]) == (422, True), refused.text
        assert client.post("/votes", content=json.dumps(vote)).status_code == 415
        large = {"Content-Type": "application/json"}
        assert client.post("/votes", content=b"x" * 2**17, headers=large).status_code == 413
        assert not human.votes.count()
        assert client.post("/votes", json=vote).json()["mine"] == 1
        assert client.post("/votes", json=vote).status_code == 409
    assert answer[0] == pytest.approx([-1 / 3, 1.0, -1 / 3, -1 / 3])


def be_human(port: int, said, folder: str) -> None:
    torch.set_num_threads(1)
    with listen(Options(port=port)) as listener:
        port = listener.getsockname()[1]
    said.send(port)
    load_and_serve(CALL, "reward human", {"folder": folder, "voters": 1, "wait": None}, Options(port=port))


def start(folder: Path, port: int = 0):
    here, there = FORKS.Pipe()
    process = FORKS.Process(target=be_human, args=(port, there, str(folder)), daemon=True)
    process.start()
    assert here.poll(60)
    return process, f"http://127.0.0.1:{here.recv()}"


def next_question(url: str) -> dict:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{url}/next?voter=me", trust_env=False).json()
            if answer["question"]:
                return answer["question"]
        time.sleep(0.02)
    raise AssertionError("no question came")


def test_a_server_that_is_killed_loses_no_vote_and_asks_on(tmp_path: Path, files: list[str]):
    """Through the wire, as a trainer calls it: two groups, a kill -9 between them, and whole groups in requests."""
    server, url = start(tmp_path / "votes")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/health", trust_env=False)
            break
    reward = remote(url, batch=1)
    assert reward.compares
    assert reward.takes == VideoFiles()
    answers: list = []

    def call() -> None:
        answers.append(reward(files, ["p"] * 4))
        answers.append(reward(files[:2], ["p"] * 2))

    caller = threading.Thread(target=call)
    caller.start()
    question = next_question(url)
    best = names_of(tmp_path / "votes", files)[3:]
    ballot = {"question": question["key"], "voter": "me", "best": best, "seconds": 1.0}
    assert httpx.post(f"{url}/votes", json=ballot, trust_env=False).status_code == 200
    assert len(next_question(url)["samples"]) == 2
    server.kill()
    server.join()
    server, url = start(tmp_path / "votes", int(url.rpartition(":")[2]))
    question = next_question(url)
    assert len(question["samples"]) == 2
    ballot = {"question": question["key"], "voter": "me", "best": None, "seconds": 1.0}
    assert httpx.post(f"{url}/votes", json=ballot, trust_env=False).status_code == 200
    caller.join(60)
    server.terminate()
    server.join(30)
    assert server.exitcode is not None
    assert answers[0] == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 1.0])
    assert all(value != value for value in answers[1])
    assert [json.loads(line)["vote"]["best"] for line in (tmp_path / "votes" / FILE).read_text().splitlines()] == [
        best,
        None,
    ]

"""Rewards on servers, through whatever can go wrong between the two: nothing lost, counted twice or invented.

`tagged` scores a video by its brightness, which is another for each, so that a number tells which video it is of.
"""

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from flashgrpo.errors import UserError
from flashgrpo.scoring.inputs import LatentVideos, VideoFiles
from flashgrpo.scoring.loading import load_reward
from flashgrpo.serving import wire
from flashgrpo.serving.client import Remote, remote
from flashgrpo.serving.http import is_loopback, run
from flashgrpo.serving.messages import Info
from flashgrpo.serving.server import Options, bound, serve
from flashgrpo.serving.service import SLOWEST, Service
from flashgrpo.video import write_mp4
from tests.nursery import free_port
from tests.reward_servers import INFO, Fake, Served, answer, brightness, endpoint, unpack


def videos(count: int, first: int = 0) -> torch.Tensor:
    """Video i has brightness first + i, out of 255."""
    return torch.arange(first, first + count).view(-1, 1, 1, 1, 1).expand(-1, 2, 3, 4, 4) / 255


def body(prompts: list[str], first: int = 0, id: str = "a") -> bytes:
    return b"".join(wire.pack(id, "pixels", videos(len(prompts), first), prompts, {}))


def head(content: bytes, **headers: str) -> dict[str, str]:
    return {"Content-Type": wire.MEDIA_TYPE, wire.DIGEST: f"{zlib.crc32(content):08x}", **headers}


def post(url: str, content: bytes, timeout: float = 60, **headers: str) -> httpx.Response:
    with httpx.Client(verify=False, trust_env=False, timeout=timeout) as client:  # reads no certificates each time
        return client.post(f"{url}/score", content=content, headers=head(content, **headers))


def tags(count: int, first: int = 0) -> list[float]:
    return [float(tag) for tag in range(first, first + count)]


def close_to(values, wanted) -> bool:
    return torch.allclose(torch.tensor(values), torch.tensor(wanted), atol=1e-3)


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


@pytest.fixture
def gate(tmp_path):
    """A prompt with which a request is computed until `open` is called, and waits for that to begin."""

    class Gate:
        prompt = f"until {tmp_path}/opened"

        def wait(self) -> None:
            while not (tmp_path / "started").exists():
                time.sleep(0.01)

        def open(self) -> None:
            (tmp_path / "opened").touch()

    made = Gate()
    yield made
    made.open()


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    monkeypatch.delenv("FLASHGRPO_REWARD_TOKEN", raising=False)


# The good case


def test_numbers_come_in_the_order_of_the_videos(server):
    reward = remote(server.url, batch=3)
    values = reward(videos(20), ["p"] * 20, n=list(range(20)))
    assert close_to(values["tag"], tags(20))
    assert max(values["batch"]) <= 4
    assert reward.takes.kind == "pixels"
    assert reward(videos(0), []) == []


def test_a_plain_reward_in_every_encoding_and_kind(tmp_path):
    scored = videos(5) + 0.1003
    servers = [Served(name) for name in ("brightness", "latent_mean", "file_brightness")]
    exact = Remote([servers[0].url], encoding="float32", batch=2)
    assert exact.score_range == (0, 1)
    assert exact(scored, ["p"] * 5) == brightness(scored, []).tolist()
    rounded = Remote([servers[0].url])(scored, ["p"] * 5)
    assert torch.allclose(torch.tensor(rounded), torch.tensor(exact(scored, ["p"] * 5)), atol=0.5 / 255)
    coded = Remote([servers[0].url], encoding="mp4")(scored[:2], ["p"] * 2)
    assert torch.allclose(torch.tensor(coded), torch.tensor(rounded[:2]), atol=0.02)
    latents = Remote([servers[1].url])
    assert latents.takes == LatentVideos()
    drawn = torch.randn(3, 4, 2, 2, 2)
    assert torch.allclose(torch.tensor(latents(drawn, ["p"] * 3)), drawn.mean(dim=(1, 2, 3, 4)))
    files = Remote([servers[2].url])
    assert files.takes == VideoFiles()
    for number in range(2):
        write_mp4(tmp_path / f"{number}.mp4", torch.full((3, 3, 32, 32), 0.2 + 0.5 * number), 8.0)
    seen = files([str(tmp_path / f"{number}.mp4") for number in range(2)], ["p"] * 2)
    assert torch.allclose(torch.tensor(seen), torch.tensor([0.2, 0.7]), atol=0.03)
    with pytest.raises(ValueError, match="takes files"):
        files(scored, ["p"] * 5)
    for served in servers:
        served.kill()


def test_many_clients_get_their_own_numbers(server):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda tag: post(server.url, body(["p"], tag, f"r{tag}")).json(), range(8)))
    assert close_to([answer["components"]["tag"][0] for answer in answers], tags(8))
    assert [answer["id"] for answer in answers] == [f"r{tag}" for tag in range(8)]


# What a server withstands; each test leaves it alive for the next


@pytest.mark.parametrize(
    ("content", "status", "what"),
    [
        (b"", 422, "this is no request: "),
        (b"\x80\x04\x95pickled, perhaps, but never unpickled", 422, "no safetensors file of two tensors"),
        (bytes(2**20 + 1), 413, "may have 1 MiB"),
        (b"".join(wire.pack("a", "latents", torch.zeros(1, 4, 1, 2, 2), ["p"], {})), 422, "takes pixels, not latents"),
        (body(["refuse"]), 422, "such a prompt is not for me"),
        (body(["raise"]), 500, "the reward failed: KeyError: 'planted'"),
        (body(["exit"]), 500, "the reward failed: SystemExit"),
        (body(["p", "short"]), 500, "1 numbers for 2 videos"),
    ],
    ids=lambda value: value if isinstance(value, int | str) else "",
)
def test_requests_that_a_server_survives(server, content, status, what):
    response = post(server.url, content)
    assert response.status_code == status
    assert re.search(what, response.json()["detail"])
    assert list(response.json()) == ["detail"]
    assert close_to(post(server.url, body(["p"], 7)).json()["components"]["tag"], [7.0])


def test_requests_that_are_damaged_or_of_unknown_length(server):
    assert post(server.url, body(["p"])[:-1], **{wire.DIGEST: head(body(["p"]))[wire.DIGEST]}).status_code == 400
    assert post(server.url, body(["p"]), **{wire.DIGEST: ""}).status_code == 400
    assert post(server.url, body(["p"]), **{"Content-Type": "application/octet-stream"}).status_code == 415
    endless = httpx.post(
        f"{server.url}/score", content=(bytes(9) for _ in range(9)), headers=head(b""), trust_env=False
    )
    assert endless.status_code == 411
    assert httpx.get(f"{server.url}/docs", trust_env=False).status_code == 404
    assert httpx.get(f"{server.url}/score", trust_env=False).status_code == 405


def test_half_a_character_is_refused_on_both_sides(server):
    text = body(["??????"]).replace(b"??????", b"\\ud83d")
    refused = post(server.url, text)
    assert refused.status_code == 422
    assert "Invalid JSON: unexpected end of hex escape" in refused.json()["detail"]
    assert post(server.url, body(["say half"])).json()["detail"].startswith("tagged refused its input: half of")
    with pytest.raises(ValueError, match="half a character"):
        remote(server.url)(videos(1), ["\ud83d"])


def connect(server: Served, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(sent)
    return connection


def test_slow_clients_hold_no_place_and_are_sent_away():
    """As many as the queue has places send heads and bodies a byte at a time; a good client is served all the while."""
    server = Served(queue=2, arrival_seconds=1)
    lines = [f"{key}: {value}" for key, value in head(b"").items()]
    whole = "\r\n".join(["POST /score HTTP/1.1", "Host: x", *lines, f"Content-Length: {SLOWEST}", "", ""]).encode()
    slow = [connect(server, sent) for sent in [whole, whole[:20], b""] * 6]
    for _ in range(3):
        assert close_to(remote(server.url)(videos(3), ["p"] * 3)["tag"], tags(3))
        for connection in slow:
            connection.sendall(b"x")
    with ThreadPoolExecutor(len(slow)) as pool:
        ends = list(pool.map(lambda connection: connection.recv(1000), slow))
    for connection in slow:
        connection.close()
    assert [end[:12] for end in ends[::3]] == [b"HTTP/1.1 408"] * 6
    assert {bytes(end) for end in ends[1::3]} == {b""}
    server.stop()
    assert server.process.exitcode == 0


def memory(server: Served, key: str) -> int:
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())[1])


def test_memory_is_bounded_by_what_is_decoded():
    """Eight mp4 requests of a few kB, of 8 MiB each as pixels: `queue` and five times 8 MiB, however many there are."""
    server = Served("brightness", max_mib=8.0, queue=8)
    clips = wire.pack("a", "pixels", torch.full((1, 42, 3, 256, 256), 0.5), ["p"], {}, "mp4")
    coded = b"".join(clips)
    assert len(coded) < 50_000
    assert post(server.url, coded).status_code == 200  # loads what is loaded once
    before = memory(server, "VmRSS")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(server.url, coded), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert memory(server, "VmHWM") - before < (8 + 5) * 8 * 2**20
    more = b"".join(wire.pack("a", "pixels", torch.full((2, 42, 3, 256, 256), 0.5), ["p"] * 2, {}, "mp4"))
    assert "decode to more than 8388608 bytes" in post(server.url, more).json()["detail"]
    server.kill()


def test_a_server_without_room_for_files_serves_on(monkeypatch):
    """A request that the server's own file system fails is told so, and the next one is computed."""
    about = Info(**{**INFO, "takes": {"kind": "files"}})
    service = Service(lambda paths, prompts: [float(len(paths))], about, Options())
    files = b"".join(wire.pack("a", "files", [b"\0\0\0\x18ftypmp42"], ["p"], {}))

    async def ask() -> httpx.Response:
        app = httpx.ASGITransport(service.application())
        async with httpx.AsyncClient(transport=app, base_url="http://x") as client:
            return await client.post("/score", content=files, headers=head(files))

    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    failed = run(ask())
    assert failed.status_code == 500
    assert "the server failed: [Errno 2] No such file" in failed.json()["detail"]
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert run(ask()).json()["components"] == {"": [1.0]}
    service.close()


def test_a_bad_request_spoils_no_other(server, gate):
    with ThreadPoolExecutor(5) as pool:
        slow = pool.submit(post, server.url, body([gate.prompt]))
        gate.wait()
        prompts = ["p", "raise", "nan", "p"]
        waiting = [pool.submit(post, server.url, body([prompt], tag)) for tag, prompt in enumerate(prompts)]
        time.sleep(0.5)  # until they wait together
        gate.open()
        responses = [future.result() for future in waiting]
        slow.result()
    assert [response.status_code for response in responses] == [200, 500, 200, 200]
    assert responses[2].json()["components"]["tag"] == [None]
    assert close_to([responses[row].json()["components"]["tag"][0] for row in (0, 3)], [0.0, 3.0])


def test_work_of_a_client_that_has_gone_is_left_out(server, gate):
    seen = post(server.url, body(["p"])).json()["components"]["seen"][0]
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(post, server.url, body([gate.prompt]))
        gate.wait()
        for _ in range(3):  # they wait behind the slow one, and give up
            with pytest.raises(httpx.ReadTimeout):
                post(server.url, body(["p"]), timeout=0.2)
        time.sleep(0.3)  # until the server has noticed
        gate.open()
        slow.result()
    assert post(server.url, body(["p"])).json()["components"]["seen"][0] == seen + 2


def test_tokens(monkeypatch, caplog):
    served = Served(token="right-token")
    assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200
    assert httpx.get(f"{served.url}/info", trust_env=False).status_code == 401
    assert post(served.url, body(["p"])).status_code == 401
    assert post(served.url, body(["p"]), Authorization="Bearer right-toke").status_code == 401
    monkeypatch.setenv("FLASHGRPO_REWARD_TOKEN", "wrong-token")
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(UserError, match=r"HTTP 401.*set FLASHGRPO_REWARD_TOKEN") as told,
    ):
        remote(served.url)
    assert "wrong-token" not in str(told.value) + caplog.text
    monkeypatch.setenv("FLASHGRPO_REWARD_TOKEN", "right-token")
    with caplog.at_level(logging.DEBUG):
        assert close_to(remote(served.url)(videos(3), ["p"] * 3)["tag"], tags(3))
    assert "right-token" not in caplog.text
    served.kill()


def test_a_full_queue_is_waited_for(gate):
    served = Served(queue=1)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(post, served.url, body([gate.prompt]))
        gate.wait()
        full = post(served.url, body(["p"]))
        assert full.status_code == 503
        assert full.headers["Retry-After"] == "1"
        assert "1 requests wait already" in full.json()["detail"]
        reward = remote(served.url, batch=2)
        scored = pool.submit(reward, videos(6), ["p"] * 6)
        time.sleep(0.3)
        gate.open()
        assert close_to(scored.result()["tag"], tags(6))
        assert slow.result().status_code == 200
    served.kill()


def test_a_server_that_is_told_to_end_answers_what_it_computes(gate):
    served = Served()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(post, served.url, body([gate.prompt], 9))
        gate.wait()
        waiting = pool.submit(post, served.url, body(["p"]))
        time.sleep(0.5)  # until it has arrived
        served.process.terminate()
        assert waiting.result().status_code == 503
        assert "the server is ending" in waiting.result().json()["detail"]
        gate.open()
        assert close_to(running.result().json()["components"]["tag"], [9.0])
    served.process.join(10)
    assert served.process.exitcode == 0


def test_the_command_serves_a_file_and_ends_well(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def bright(videos, prompts, factor=1, **columns):\n    return factor * videos.mean(dim=(1, 2, 3, 4))\n"
    )
    command = [sys.executable, "-m", "flashgrpo", "reward", "serve", f"{file}:bright", "factor=2", "--port", "0"]
    with subprocess.Popen(
        [*command, "--host", "0.0.0.0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        port = process.stdout.readline().rpartition(":")[2].strip()
        reward = remote(f"http://127.0.0.1:{port}")
        assert close_to(reward(videos(2, 100), ["p"] * 2), [200 / 255, 202 / 255])
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "anybody who reaches 0.0.0.0 can use this server; set FLASHGRPO_REWARD_TOKEN" in said
    assert said.count("\n") == 1


def test_an_address_that_is_taken(monkeypatch):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1"),
    ):
        serve("frames:exposure", [], Options(port=taken.getsockname()[1]))
    with bound(Options(port=0)) as first:

        def load(*names: str) -> object:  # both have bound the port and load their reward; then one listens
            first.listen()
            return load_reward(*names)

        monkeypatch.setattr("flashgrpo.serving.server.load_reward", load)
        with pytest.raises(UserError, match="already in use"):
            serve("frames:exposure", [], Options(port=first.getsockname()[1]))


# What a client withstands


def test_a_server_that_is_not_there_yet_is_waited_for(caplog):
    port, made = free_port(), []
    late = threading.Timer(0.8, lambda: made.append(Served(port=port)))
    late.start()
    reward = remote(f"http://127.0.0.1:{port}", patience=30.0)
    assert close_to(reward(videos(3), ["p"] * 3)["tag"], tags(3))
    assert [record.levelname for record in caplog.records if record.name == "flashgrpo"] == ["WARNING"]
    assert re.search(rf"{port} cannot be reached \(.+\); trying again for up to 30 s", caplog.text)
    late.join()
    made[0].kill()


def test_a_server_that_never_comes_is_told():
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached .* attempts in \d+ s; is `flashgrpo reward serve` running"):
        remote(f"http://127.0.0.1:{free_port()}", patience=0.6)
    assert 0.6 <= time.monotonic() - started < 10


def test_a_server_that_is_absent_at_the_start_is_asked_once_where_no_patience_is_given(caplog):
    with pytest.raises(UserError, match=r"cannot be reached .*; is `flashgrpo reward serve` running there"):
        remote(f"http://127.0.0.1:{free_port()}")
    assert "trying again" not in caplog.text


def test_a_server_that_is_killed_and_restarted_loses_and_doubles_nothing(gate):
    first = Served(batch=1)
    reward = remote(first.url, batch=2, patience=60.0)
    with ThreadPoolExecutor(1) as pool:
        scored = pool.submit(reward, videos(12), ["p"] * 7 + [gate.prompt] + ["p"] * 4)
        gate.wait()
        first.kill()  # in the middle of a piece, of which one video has been scored
        gate.open()
        time.sleep(0.3)
        second = Served(port=first.port)
        values = scored.result()
    assert close_to(values["tag"], tags(12))
    assert set(values) == {"tag", "batch", "seen"}
    assert reward.failures >= 1
    second.kill()


def test_one_of_two_servers_dies(caplog):
    one, other = Served(batch=1), Served(batch=1)
    reward = remote(f"{one.url}, {other.url}", batch=1, patience=60.0)
    killer = threading.Timer(0.3, one.kill)
    killer.start()
    values = reward(videos(16), ["sleep 0.08"] * 16)
    killer.join()
    assert close_to(values["tag"], tags(16))
    assert "asking another server" in caplog.text
    assert caplog.text.count("WARNING") == 1
    assert close_to(reward(videos(4), ["p"] * 4)["tag"], tags(4))
    other.kill()
    with pytest.raises(UserError, match="cannot be reached"):
        Remote([one.url, other.url], patience=0.1)


def test_pieces_go_to_the_server_that_has_fewest():
    servers = [Served(batch=1), Served(batch=1)]
    reward = Remote([server.url for server in servers], batch=1)
    values = reward(videos(8), ["sleep 0.1"] * 8)
    assert close_to(values["tag"], tags(8))
    assert sorted(values["seen"]) == sorted([1.0, 2.0, 3.0, 4.0] * 2)
    for server in servers:
        server.kill()


def test_servers_of_one_reward_are_alike(fake):
    servers = [Served(version="1"), Served(version="2")]
    with pytest.raises(UserError, match=r"serves tagged 1, and .* serves tagged 2; .* must be alike"):
        Remote([server.url for server in servers])
    servers[0].kill()
    servers[1].kill()
    old = fake(lambda *_: None, {**INFO, "format": 1})
    with pytest.raises(UserError, match="speaks format 1 and this is format 2"):
        remote(old.url)
    with pytest.raises(UserError, match="no reward server of this release"):
        remote(fake(lambda *_: None, {**INFO, "takes": {"kind": "code"}}).url)


def test_a_server_that_was_replaced_by_another_reward_is_noticed():
    first = Served(version="1")
    reward = remote(first.url)
    first.kill()
    second = Served(port=first.port, version="2")
    with pytest.raises(UserError, match=r"no valid answer: the answer is of another reward than tagged 1"):
        reward(videos(2), ["p"] * 2)
    second.kill()


def reply(**changes):
    """An answer that is right but for the changes."""

    def act(connection, received, number) -> None:
        request = unpack(received)
        told = {"id": request.about.id, "reward": "fake 1", "components": {"": [0.5] * request.count}}
        connection.sendall(answer(200, json.dumps({**told, **changes})))

    return act


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (reply(components={"": [0.5]}), "1 numbers for 2 videos"),
        (reply(components={"": [0.5, 0.5, 0.5]}), "3 numbers for 2 videos"),
        (reply(components={}), "an empty mapping"),
        (reply(id="x"), "another request"),
        (
            lambda connection, *_: connection.sendall(answer(200, "<html>it works</html>")),
            "no valid answer: the answer: Invalid JSON",
        ),
        (lambda connection, *_: connection.sendall(answer(200, "")), "no valid answer: the answer: Invalid JSON"),
        (reply(components={"\x1b[2J": [0.5, 0.5]}), "no short line of text"),
        (
            lambda connection, *_: connection.sendall(answer(400, '{"error": "so\\nn\\u001bo\\u202et"}')),
            "HTTP 400: so n o t",
        ),
        (
            lambda connection, *_: connection.sendall(answer(403, "no")),
            r"refuses the request .HTTP 403: no.*_REWARD_TOKEN",
        ),
        (lambda connection, *_: connection.sendall(answer(404, "")), "HTTP 404.*is this its address"),
        (lambda connection, *_: connection.sendall(answer(413, "")), "HTTP 413.*fewer videos at once"),
        (lambda connection, *_: connection.sendall(answer(500, '{"error": "it fell"}')), "HTTP 500: it fell"),
        (lambda connection, *_: connection.sendall(answer(302, "", "Location: http://127.0.0.1:1/")), "HTTP 302"),
        (lambda connection, *_: connection.sendall(answer(200, "x" * (2**24 + 1))), "more than 16777216 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_final_is_told_at_once(fake, act, what):
    server = fake(act)
    with pytest.raises(UserError, match=f"{server.url}.*{what}"):
        remote(server.url)(videos(2), ["p"] * 2)
    assert server.requests == 1


def test_components_have_to_be_the_same_in_all_pieces(fake):
    def act(connection, received, number) -> None:
        reply(components={f"c{number % 2}": [0.5]})(connection, received, number)

    with pytest.raises(UserError, match="other components"):
        remote(fake(act).url, batch=1)(videos(4), ["p"] * 4)


def flaky(broken):
    """Does `broken(connection)` to the first two requests, and answers others."""

    def act(connection, received, number) -> None:
        if number <= 2:
            broken(connection)
        else:
            reply()(connection, received, number)

    return act


def reset(connection) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize(
    "broken",
    [
        reset,
        lambda connection: None,  # closes without a word
        lambda connection: connection.sendall(b"garbage\r\n\r\n"),
        lambda connection: connection.sendall(answer(200, "x" * 100)[:-50]),  # ends in the middle
        lambda connection: connection.sendall(answer(408, "")),
        lambda connection: connection.sendall(answer(429, "", "Retry-After: 0")),
        lambda connection: connection.sendall(answer(502, "")),
        lambda connection: connection.sendall(answer(503, "", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT")),
        lambda connection: connection.sendall(answer(504, "")),
    ],
    ids=["reset", "closed", "garbage", "cut", "408", "429", "502", "503", "504"],
)
def test_what_may_be_over_soon_is_repeated(fake, broken):
    server = fake(flaky(broken))
    assert remote(server.url, patience=20.0)(videos(2), ["p"] * 2) == [0.5, 0.5]
    assert server.requests == 3


def test_a_server_says_when_to_come_back(fake):
    def act(connection, received, number) -> None:
        if number == 1:
            connection.sendall(answer(503, "", "Retry-After: 1"))
        else:
            reply()(connection, received, number)

    server = fake(act)
    reward = remote(server.url)
    started = time.monotonic()
    reward(videos(1), ["p"])
    assert time.monotonic() - started >= 1


def test_one_request_has_one_deadline(fake):
    """A server that hangs, or that sends a byte now and then, holds nobody up longer than `timeout`."""

    def dribble(connection, received, number) -> None:
        for byte in answer(200, "x" * 1000):
            connection.sendall(bytes([byte]))
            server.wait(0.05)

    def hang(connection, received, number) -> None:
        server.wait(300)

    for act in (dribble, hang):
        server = fake(act)
        reward = remote(server.url, timeout=0.4, patience=0.0)
        started = time.monotonic()
        with pytest.raises(UserError, match=r"had not answered after 0.4 s, at the last of 1 .*; raise `timeout` if"):
            reward(videos(1), ["p"])
        assert 0.4 <= time.monotonic() - started < 5
        server.close()


def test_a_reward_that_takes_too_long(server):
    reward = remote(server.url, timeout=0.3, patience=0.5)
    with pytest.raises(UserError, match=r"had not answered after 0.3 s, at the last of [23] attempts"):
        reward(videos(1), ["sleep 1"])
    assert close_to(post(server.url, body(["p"], 7)).json()["components"]["tag"], [7.0])


def test_too_large_a_piece_is_told_before_it_is_sent(server):
    with pytest.raises(
        UserError, match=r"2 videos make a request of 1.1 MiB, .* --max-mib 1; lower the reward's batch"
    ):
        remote(server.url)(torch.zeros(2, 1, 3, 440, 440), ["p"] * 2)


def test_a_token_that_is_echoed_is_not_told(fake, monkeypatch):
    monkeypatch.setenv("FLASHGRPO_REWARD_TOKEN", "secret-words")
    server = fake(lambda connection, *_: connection.sendall(answer(400, '{"error": "Bearer secret-words is odd"}')))
    with pytest.raises(UserError, match=r"Bearer \[token\] is odd") as told:
        remote(server.url)(videos(1), ["p"])
    assert "secret-words" not in str(told.value)
    assert any("authorization: bearer secret-words" in head.lower() for head in server.heads)


@pytest.mark.parametrize("url", ["http://user:secret-words@x", "http://x"])
def test_a_password_that_is_refused_is_not_told(url, monkeypatch):
    monkeypatch.setenv("FLASHGRPO_REWARD_TOKEN", "secret-words, two")
    with pytest.raises(UserError, match=r"holds a password|visible ASCII") as told:
        Remote([url])
    assert "secret-words" not in str(told.value)


def test_proxies_are_for_the_world_outside(server, fake, monkeypatch):
    proxy = fake(lambda connection, *_: connection.sendall(answer(200, "by proxy")))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert close_to(remote(server.url)(videos(2), ["p"] * 2)["tag"], tags(2))
    assert proxy.requests == 0

    async def outside() -> bytes:
        there = endpoint("http://reward.invalid:8765")
        async with there.client() as client:
            return await there.ask(client, "GET", "/x")

    assert run(outside()) == b"by proxy"
    assert is_loopback("127.8.8.8")
    assert is_loopback("localhost")
    assert is_loopback("::1")
    assert not is_loopback("localhost.example.org")
    assert not is_loopback("0.0.0.0")


def test_a_caller_with_an_event_loop_of_its_own(server):
    import asyncio

    async def notebook() -> list[float]:
        return remote(server.url)(videos(2), ["p"] * 2)["tag"]

    assert close_to(asyncio.run(notebook()), tags(2))

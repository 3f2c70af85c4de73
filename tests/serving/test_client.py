"""What a client withstands, whatever goes wrong between it and its servers: nothing lost, counted twice or invented."""

import asyncio
import json
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flashgrpo.errors import UserError
from flashgrpo.media import write_medium
from flashgrpo.scoring.inputs import LatentVideos, VideoFiles
from flashgrpo.serving import client
from flashgrpo.serving.client import Remote, remote
from flashgrpo.serving.http import is_loopback, run
from flashgrpo.video import write_mp4
from tests.nursery import free_port
from tests.reward_servers import (
    INFO,
    Served,
    answer,
    body,
    brightness,
    close_to,
    endpoint,
    post,
    tags,
    unpack,
    videos,
)


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
    paths = [str(tmp_path / f"{number}.mp4") for number in range(2)]
    for number, path in enumerate(paths):
        write_mp4(tmp_path / path, torch.full((3, 3, 32, 32), 0.2 + 0.5 * number), 8.0)
    assert torch.allclose(torch.tensor(files(paths, ["p"] * 2)), torch.tensor([0.2, 0.7]), atol=0.03)
    with pytest.raises(ValueError, match="takes files"):
        files(scored, ["p"] * 5)
    for served in servers:
        served.kill()


def test_texts_and_images(tmp_path):
    servers = [Served(name) for name in ("length", "file_ending", "latent_mean")]
    texts = ["", "é", 'a\n"b"', "\N{GRINNING FACE}" * 40]
    lengths = Remote([servers[0].url], batch=3)
    assert lengths(texts, ["p"] * 4) == [0, 1, 5, 40]
    image = tmp_path / "image.png"
    write_medium(image, torch.rand(1, 3, 8, 8), 8.0)
    assert Remote([servers[1].url])([str(image)], ["p"]) == [1]
    with pytest.raises(ValueError, match="takes latents"):
        Remote([servers[2].url])(texts, ["p"] * 4)
    for served in servers:
        served.kill()


# Servers that are away


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


@pytest.mark.parametrize("patience", [None, 0.6])
def test_a_server_that_never_comes_is_told(patience, caplog):
    """Without a patience it is asked once."""
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached .* attempts in \d+ s; is `flashgrpo reward serve` running"):
        remote(f"http://127.0.0.1:{free_port()}", patience=patience)
    assert (patience or 0.0) <= time.monotonic() - started < 10
    assert ("trying again" in caplog.text) == bool(patience)


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
    values = reward(videos(8), ["sleep 0.1"] * 8)
    assert sorted(values["seen"]) == sorted([1.0, 2.0, 3.0, 4.0] * 2)  # they share the work
    killer = threading.Timer(0.3, one.kill)
    killer.start()
    values = reward(videos(16), ["sleep 0.08"] * 16)
    killer.join()
    assert close_to(values["tag"], tags(16))
    assert caplog.text.count("WARNING") == 1
    assert close_to(reward(videos(4), ["p"] * 4)["tag"], tags(4))
    other.kill()
    with pytest.raises(UserError, match="cannot be reached"):
        Remote([one.url, other.url], patience=0.1)


def test_servers_of_one_reward_are_alike(fake):
    first, second = Served(version="1"), Served(version="2")
    with pytest.raises(UserError, match=r"serves tagged 1, and .* serves tagged 2; .* must be alike"):
        Remote([first.url, second.url])
    reward = remote(first.url)
    first.kill()
    second.kill()
    third = Served(port=first.port, version="2")  # it took the place of the first
    with pytest.raises(UserError, match=r"no valid answer: the answer is of another reward than tagged 1"):
        reward(videos(2), ["p"] * 2)
    third.kill()
    for change, what in (({"format": 1}, r"/info, format: Input should be 5\); install one"), ({"takes": {}}, "takes")):
        with pytest.raises(UserError, match=f"is no reward server of this release .*{what}"):
            remote(fake(lambda *_: None, {**INFO, **change}).url)


# Answers


def say(status: int, text: str, *headers: str):
    return lambda connection, *_: connection.sendall(answer(status, text, *headers))


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
        (reply(components={"": [0.5]}), "no valid answer: the reward has 1 numbers for 2 videos"),
        (reply(id="x"), "another request"),
        (say(200, "<html>it works</html>"), "no valid answer: the answer: Invalid JSON"),
        (say(200, ""), "no valid answer: the answer: Invalid JSON"),
        (say(400, '{"error": "so\\nn\\u001bo\\u202et"}'), "HTTP 400: so n o t"),
        (say(400, '{"error": "Bearer secret-words is odd"}'), r"HTTP 400: Bearer \[token\] is odd"),
        (say(403, "no"), r"refuses the request .HTTP 403: no.*_REWARD_TOKEN"),
        (say(404, ""), "HTTP 404.*is this its address"),
        (say(413, ""), "HTTP 413.*fewer videos at once"),
        (say(500, '{"error": "it fell"}'), "HTTP 500: it fell"),
        (say(302, "", "Location: http://127.0.0.1:1/"), "HTTP 302"),
        (say(200, "x" * (2**24 + 1)), "more than 16777216 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_final_is_told_at_once(fake, act, what, monkeypatch):
    monkeypatch.setenv("FLASHGRPO_REWARD_TOKEN", "secret-words")
    server = fake(act)
    with pytest.raises(UserError, match=f"{server.url}.*{what}") as told:
        remote(server.url)(videos(2), ["p"] * 2)
    assert server.requests == 1
    assert "secret-words" not in str(told.value)
    assert any("authorization: bearer secret-words" in head.lower() for head in server.heads)


def reset(connection, *_) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize(
    ("broken", "seconds"),
    [
        (reset, 0),
        (lambda *_: None, 0),  # closes without a word
        (lambda connection, *_: connection.sendall(b"garbage\r\n\r\n"), 0),
        (lambda connection, *_: connection.sendall(answer(200, "x" * 100)[:-50]), 0),  # ends in the middle
        (say(408, ""), 0),
        (say(429, "", "Retry-After: 0"), 0),
        (say(502, ""), 0),
        (say(503, "", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"), 0),
        (say(503, "", "Retry-After: 1"), 2),  # twice
        (say(504, ""), 0),
    ],
    ids=["reset", "closed", "garbage", "cut", "408", "429", "502", "503 date", "503", "504"],
)
def test_what_may_be_over_soon_is_repeated(fake, broken, seconds):
    server = fake(lambda connection, body, number: (broken if number <= 2 else reply())(connection, body, number))
    started = time.monotonic()
    reward = remote(server.url, patience=20.0)
    assert reward(videos(2), ["p"] * 2) == [0.5, 0.5]
    assert time.monotonic() - started >= seconds
    assert (server.requests, reward.failures) == (3, 2)


def test_servers_that_want_endless_patience_get_ours(fake, monkeypatch):
    monkeypatch.setattr(client, "REST", 0.2)
    busy = say(503, "", "Retry-After: 999999999")
    with pytest.raises(UserError, match="cannot answer now"):
        Remote([fake(busy).url, fake(busy).url], batch=1, patience=0.5)(videos(20), ["p"] * 20)


def test_components_have_to_be_the_same_in_all_pieces(fake):
    def act(connection, received, number) -> None:
        reply(components={f"c{number % 2}": [0.5]})(connection, received, number)

    with pytest.raises(UserError, match="gave other components"):
        remote(fake(act).url, batch=1)(videos(4), ["p"] * 4)


# Limits of one request


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


def test_what_cannot_be_sent_is_told_before(server):
    sentence = r"2 videos make a request of 1.1 MiB, .* --max-mib 1; lower the reward's batch"
    with pytest.raises(UserError, match=sentence):
        remote(server.url)(torch.zeros(2, 1, 3, 440, 440), ["p"] * 2)
    with pytest.raises(ValueError, match="half a character"):
        remote(server.url)(videos(1), ["\ud83d"])
    with pytest.raises(ValueError, match="there are 1 prompts for 2 of n"):
        remote(server.url)(videos(1), ["p"], n=[1, 2])


# Tokens, proxies, event loops


@pytest.mark.parametrize("url", ["http://user:secret-words@x", "http://x"])
def test_a_password_that_is_refused_is_not_told(url, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FLASHGRPO_REWARD_TOKEN", "secret-words, two")
    with pytest.raises(UserError, match=r"holds a password|visible ASCII") as told:
        Remote([url])
    assert "secret-words" not in str(told.value) + caplog.text


def test_proxies_are_for_the_world_outside(server, fake, monkeypatch):
    proxy = fake(say(200, "by proxy"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert close_to(remote(server.url)(videos(2), ["p"] * 2)["tag"], tags(2))
    assert proxy.requests == 0

    async def outside() -> bytes:
        there = endpoint("http://reward.invalid:8765")
        async with there.client() as connections:
            return await there.ask(connections, "GET", "/x")

    assert run(outside()) == b"by proxy"
    assert all(map(is_loopback, ("127.8.8.8", "localhost", "::1")))
    assert not any(map(is_loopback, ("localhost.example.org", "0.0.0.0")))


def test_a_caller_with_an_event_loop_of_its_own(server):
    async def notebook() -> list[float]:
        return remote(server.url)(videos(2), ["p"] * 2)["tag"]

    assert close_to(asyncio.run(notebook()), tags(2))

"""What a reward server withstands: requests of every kind, clients that are slow or gone, and its own end.

`tagged` scores a video by its brightness, which is another for each, so that a number tells which video it is of.
"""

import logging
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from flashgrpo.errors import UserError
from flashgrpo.serving import wire
from flashgrpo.serving.client import remote
from flashgrpo.serving.commands import Options
from flashgrpo.serving.http import run
from flashgrpo.serving.server import SLOWEST, Service, serve
from tests.reward_servers import INFO, Served, body, close_to, post, request_headers, tags, videos


def test_many_clients_get_their_own_numbers(server):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda tag: post(server.url, body(["p"], tag, f"r{tag}")).json(), range(8)))
    assert close_to([answer["components"]["tag"][0] for answer in answers], tags(8))
    assert [answer["id"] for answer in answers] == [f"r{tag}" for tag in range(8)]


LATENTS = b"".join(wire.pack("a", "latents", torch.zeros(1, 4, 1, 2, 2), ["p"], {})[0])
HALF = body(["??????"]).replace(b"??????", b"\\ud83d")


@pytest.mark.parametrize(
    ("content", "headers", "status", "what"),
    [
        (b"", {}, 422, "this is no request: "),
        (b"\x80\x04\x95pickled, perhaps, but never unpickled", {}, 422, "no safetensors file of few tensors"),
        (bytes(2**20 + 1), {}, 413, "may have 1 MiB"),
        (LATENTS, {}, 422, "takes pixels, not latents"),
        (HALF, {}, 422, "Invalid JSON: unexpected end of hex escape"),
        (body(["refuse"]), {}, 422, "tagged refused its input: such a prompt is not for me"),
        (body(["say half"]), {}, 422, "tagged refused its input: half of"),
        (body(["raise"]), {}, 500, "tagged failed: KeyError: 'planted'"),
        (body(["exit"]), {}, 500, "tagged failed: SystemExit"),
        (body(["p", "short"]), {}, 500, "1 numbers for 2 videos"),
        (body(["p"])[:-1], {wire.DIGEST: request_headers(body(["p"]))[wire.DIGEST]}, 400, "damaged on its way"),
        (body(["p"]), {wire.DIGEST: ""}, 400, "damaged on its way"),
        (body(["p"]), {"Content-Type": "application/octet-stream"}, 415, "the content type of a request is"),
        ((bytes(9) for _ in range(9)), {}, 411, "says how many bytes"),
    ],
    ids=lambda value: value if isinstance(value, int | str) else "",
)
def test_requests_that_a_server_survives(server, content, headers, status, what):
    response = post(server.url, content, **headers)
    assert response.status_code == status
    assert re.search(what, response.json()["detail"])
    assert list(response.json()) == ["detail"]
    assert close_to(post(server.url, body(["p"], 7)).json()["components"]["tag"], [7.0])


@pytest.mark.parametrize(("path", "status"), [("docs", 404), ("score", 405), ("health", 200)])
def test_addresses(server, path, status):
    assert httpx.get(f"{server.url}/{path}", trust_env=False, verify=False).status_code == status


def connect(server: Served, sent: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(sent)
    return connection


def test_slow_clients_hold_no_place_and_are_sent_away():
    """As many as the queue has places send heads and bodies a byte at a time; a good client is served all the while."""
    server = Served(queue=2, arrival_seconds=1)
    lines = [f"{key}: {value}" for key, value in request_headers(b"").items()]
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

    def coded(count: int) -> bytes:
        clips = torch.full((count, 42, 3, 256, 256), 0.5)
        return b"".join(wire.pack("a", "pixels", clips, ["p"] * count, {}, "mp4")[0])

    one = coded(1)
    assert len(one) < 50_000
    assert post(server.url, one).status_code == 200  # loads what is loaded once
    before = memory(server, "VmRSS")
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(server.url, one), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert memory(server, "VmHWM") - before < (8 + 5) * 8 * 2**20
    assert "decode to more than 8388608 bytes" in post(server.url, coded(2)).json()["detail"]
    server.kill()


def test_a_server_without_room_for_files_serves_on(monkeypatch):
    """A request that the server's own file system fails is told so, and the next one is computed."""
    about = wire.Info(**{**INFO, "takes": {"kind": "files"}})
    service = Service(lambda paths, prompts: [float(len(paths))], about, Options())
    files = b"".join(wire.pack("a", "files", [b"\0\0\0\x18ftypmp42"], ["p"], {})[0])

    async def ask() -> httpx.Response:
        app = httpx.ASGITransport(service.application())
        async with httpx.AsyncClient(transport=app, base_url="http://x") as client:
            return await client.post("/score", content=files, headers=request_headers(files))

    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    failed = run(ask())
    assert failed.status_code == 500
    assert "the server failed: [Errno 2] No such file" in failed.json()["detail"]
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert run(ask()).json()["components"] == {"": [1.0]}
    service.close(wait=True)
    assert run(ask()).status_code == 503


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
    statuses = [httpx.get(f"{served.url}/{path}", trust_env=False).status_code for path in ("health", "info")]
    statuses += [post(served.url, body(["p"]), **header).status_code for header in ({}, {"Authorization": "Bearer r"})]
    assert statuses == [200, 401, 401, 401]
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FLASHGRPO_REWARD_TOKEN", "wrong-token")
    with pytest.raises(UserError, match=r"HTTP 401.*set FLASHGRPO_REWARD_TOKEN") as told:
        remote(served.url)
    monkeypatch.setenv("FLASHGRPO_REWARD_TOKEN", "right-token")
    assert close_to(remote(served.url)(videos(3), ["p"] * 3)["tag"], tags(3))
    assert not re.search("(wrong|right)-token", str(told.value) + caplog.text)
    served.kill()


def test_a_full_queue_is_waited_for(gate):
    served = Served(queue=1)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(post, served.url, body([gate.prompt]))
        gate.wait()
        full = post(served.url, body(["p"]))
        assert (full.status_code, full.headers["Retry-After"]) == (503, "1")
        assert "1 requests wait already" in full.json()["detail"]
        scored = pool.submit(remote(served.url, batch=2), videos(6), ["p"] * 6)
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


def test_another_signal_ends_a_server_whose_reward_hangs(gate):
    served = Served()
    with pytest.raises(httpx.ReadTimeout):  # its client goes
        post(served.url, body([gate.prompt]), timeout=3)
    gate.wait()
    served.process.terminate()
    served.process.join(1)
    assert served.process.is_alive()
    for _ in range(20):
        served.process.terminate()
        served.process.join(1)
    assert served.process.exitcode == -signal.SIGTERM


def test_the_command_serves_a_file_and_ends_well(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def bright(videos, prompts, factor=1, **columns):\n"
        "    return {'': factor * videos.mean(dim=(1, 2, 3, 4)), 'factor': [factor] * len(prompts)}\n\n"
        "bright.watches = ('factor',)\n"
    )
    command = [sys.executable, "-m", "flashgrpo", "reward", "serve", f"{file}:bright", "factor=2", "--port", "0"]
    command += ["--host", "0.0.0.0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        port = process.stdout.readline().rpartition(":")[2].strip()
        reward = remote(f"http://127.0.0.1:{port}")
        said = reward(videos(2, 100), ["p"] * 2)
        assert close_to(said[""], [200 / 255, 202 / 255])
        assert (said["factor"], reward.watches) == ([2, 2], ["factor"])
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "anybody who reaches 0.0.0.0 can use this server; set FLASHGRPO_REWARD_TOKEN" in said
    assert said.count("\n") == 1


def test_an_address_that_is_taken_is_told_before_the_reward_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on 127\.0\.0\.1:{port}: address already in use; choose"):
            serve("no.such:reward", [], Options(port=port))


def test_a_reward_that_hears_is_not_served():
    with pytest.raises(UserError, match="loudness hears, and requests bring no sound; name it in the recipe instead"):
        serve("flashgrpo.rewards.loudness:loudness", [], Options(port=0))

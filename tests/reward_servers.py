"""Reward servers for tests: good ones in processes of their own, and bad ones that do what no good one does.

The good ones are forked from one process that has imported the libraries. Every server is on 127.0.0.1, at a port that
the system chose.
"""

import contextlib
import json
import multiprocessing
import socket
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import torch

from flashgrpo.scoring.inputs import LatentVideos, VideoFiles
from flashgrpo.serving import wire
from flashgrpo.serving.commands import Options
from flashgrpo.serving.http import Endpoint
from flashgrpo.serving.mp4 import ending_of
from flashgrpo.serving.server import listen, serve_on
from tests.videos import read_mp4

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.reward_servers"])
SEEN: list[float] = []


def tagged(videos, prompts, **columns):
    """The brightness of each video, which tells it from the others, and whatever its prompt asks for."""
    tags = (videos[:, 0, 0, 0, 0] * 255).tolist()
    for prompt in prompts:
        if prompt.startswith("sleep "):
            time.sleep(float(prompt.split()[1]))
        if prompt.startswith("until "):
            wait_for(Path(prompt.split()[1]))
        if prompt == "raise":
            raise KeyError("planted")
        if prompt == "exit":
            raise SystemExit(3)
        if prompt == "say half":
            raise ValueError("half of \ud83d")
        if prompt == "refuse":
            raise ValueError("such a prompt is not for me")
    SEEN.extend(tags)
    tags = [{"nan": float("nan"), "inf": float("inf")}.get(p, tag) for p, tag in zip(prompts, tags, strict=True)]
    if "short" in prompts:
        tags = tags[:-1]
    return {"tag": tags, "batch": [len(prompts)] * len(prompts), "seen": [len(SEEN)] * len(prompts)}


def wait_for(path: Path, seconds: float = 60) -> None:
    """Sleep until there is a file, having made another that says so."""
    path.with_name("started").touch()
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def brightness(videos, prompts, **columns):
    return videos.mean(dim=(1, 2, 3, 4)).double()


def latent_mean(latents, prompts, **columns):
    return latents.double().mean(dim=(1, 2, 3, 4))


def file_brightness(paths, prompts, **columns):
    return [float(read_mp4(path).mean()) for path in paths]


brightness.score_range = (0, 1)  # type: ignore[attr-defined]
latent_mean.takes = LatentVideos()  # type: ignore[attr-defined]
file_brightness.takes = VideoFiles()  # type: ignore[attr-defined]


def length(texts, prompts, **columns):
    return [float(len(text)) for text in texts]


def file_ending(paths, prompts, **columns):
    """1 where it is a PNG by its name and its content."""
    return [float(path.endswith(".png") and ending_of(Path(path).read_bytes()) == ".png") for path in paths]


file_ending.takes = VideoFiles()


def be_server(port: int, said, name: str, version: str, token: str, options: dict) -> None:
    torch.set_num_threads(1)
    given = Options(port=port, **options)
    with listen(given) as listener:
        said.send(listener.getsockname()[1])
        serve_on(listener, globals()[name], name, version, given, token)


class Served:
    """A reward server in a process."""

    def __init__(self, name: str = "tagged", port: int = 0, version: str = "1", token: str = "", **options) -> None:
        here, there = FORKS.Pipe()
        self.process = FORKS.Process(target=be_server, args=(port, there, name, version, token, options), daemon=True)
        self.process.start()
        assert here.poll(60)
        self.port = here.recv()
        here.close()
        there.close()
        self.url = f"http://127.0.0.1:{self.port}"
        assert httpx.get(f"{self.url}/health", trust_env=False, verify=False, timeout=60).status_code == 200

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(30)
        assert self.process.exitcode is not None


def videos(count: int, first: int = 0) -> torch.Tensor:
    """Video i has brightness first + i, out of 255."""
    return torch.arange(first, first + count).view(-1, 1, 1, 1, 1).expand(-1, 2, 3, 4, 4) / 255


def tags(count: int) -> list[float]:
    return [float(tag) for tag in range(count)]


def close_to(values, wanted) -> bool:
    return torch.allclose(torch.tensor(values), torch.tensor(wanted), atol=1e-3)


def body(prompts: list[str], first: int = 0, id: str = "a") -> bytes:
    return b"".join(wire.pack(id, "pixels", videos(len(prompts), first), prompts, {})[0])


def request_headers(content: bytes) -> dict[str, str]:
    return {"Content-Type": wire.MEDIA_TYPE, wire.DIGEST: f"{zlib.crc32(content):08x}"}


def post(url: str, content, timeout: float = 60, **headers: str) -> httpx.Response:
    """Ask a server; `content` is what a client sends, or bytes that come in chunks of unknown number."""
    known = request_headers(content if isinstance(content, bytes) else b"")
    with httpx.Client(verify=False, trust_env=False, timeout=timeout) as client:  # reads no certificates each time
        return client.post(f"{url}/score", content=content, headers={**known, **headers})


def unpack(body: bytes, limit: int = 2**30) -> wire.Request:
    """What a server makes of a request."""
    with wire.buffer() as file:
        file.write(body)
        return wire.unpack(file, limit)


INFO = {"format": wire.FORMAT, "name": "fake", "version": "1", "takes": {"kind": "pixels"}, "max_bytes": 2**30}


class Fake:
    """A server that answers /info well and does to every other request what `act(connection, body, number)` does."""

    def __init__(self, act: Callable[[socket.socket, bytes, int], None], info: dict | None = None) -> None:
        self.requests, self._act, self._info = 0, act, info or INFO
        self.heads: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        self._listener.settimeout(0.05)
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._talk, args=(connection,)))
                self._threads[-1].start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            received = b""
            while b"\r\n\r\n" not in received:
                if not (chunk := connection.recv(65536)):
                    return
                received += chunk
            head, _, body = received.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            length = next((int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length")), 0)
            while len(body) < length:
                if not (chunk := connection.recv(65536)):
                    return  # the client gave up half way
                body += chunk
            self.heads.append(head.decode())
            if " /info" in lines[0] or "/info " in lines[0]:
                connection.sendall(answer(200, json.dumps(self._info)))
                return
            self.requests += 1
            self._act(connection, body, self.requests)

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the test."""
        self._ended.wait(seconds)

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._listener.close()


def answer(status: int, body: str, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body.encode())}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body.encode()


def endpoint(url: str, timeout: float = 20.0) -> Endpoint:
    return Endpoint(url, None, "FLASHGRPO_REWARD_TOKEN", timeout)

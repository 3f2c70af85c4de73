"""Reward servers for tests: good ones in processes of their own, and bad ones that do what no good one does.

The good ones are forked from one process that has imported the libraries. Every server is on 127.0.0.1, at a port that
the system chose.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import torch

from flashgrpo.scoring.inputs import LatentVideos, VideoFiles
from flashgrpo.serving import wire
from flashgrpo.serving.http import Endpoint
from flashgrpo.serving.messages import FORMAT
from flashgrpo.serving.server import Options, bound, make_server
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


def be_server(port: int, said, name: str, version: str, token: str, options: dict) -> None:
    torch.set_num_threads(1)
    os.environ.pop("FLASHGRPO_REWARD_TOKEN", None)
    if token:
        os.environ["FLASHGRPO_REWARD_TOKEN"] = token
    given = Options(port=port, **options)
    listener = bound(given)
    server = make_server(globals()[name], name, version, given)
    said.send(listener.getsockname()[1])
    server.run([listener])


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
        for _ in range(500):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", trust_env=False, verify=False).status_code == 200:
                    return
            time.sleep(0.02)
        raise AssertionError("the server does not listen")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(30)
        assert self.process.exitcode is not None


def unpack(body: bytes, limit: int = 2**30) -> wire.Request:
    """What a server makes of a request."""
    with wire.buffer() as file:
        file.write(body)
        return wire.unpack(file, limit)


INFO = {"format": FORMAT, "name": "fake", "version": "1", "takes": {"kind": "pixels"}, "max_bytes": 2**30}


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
                body += connection.recv(65536)
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

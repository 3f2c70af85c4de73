"""A reward that servers compute (`flashgrpo reward serve`), one or several, called as if it were computed here."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import httpx
import torch
from torch import Tensor

from flashgrpo.errors import UserError, suggest
from flashgrpo.scoring.inputs import Input
from flashgrpo.serving import wire
from flashgrpo.serving.answers import Info, unpack_answer
from flashgrpo.serving.http import LOG, Endpoint, Transient, all_of, persist, run

OUTSTANDING = 4  # requests that a server has of one call: one that is computed, one that arrives, and some to batch
REST = 5.0  # seconds during which a server that failed is asked only where no other is left
QUIET = 30.0  # seconds between two warnings of one client
ADVICE = "is `flashgrpo reward serve` running there, and can this machine reach it?"


@dataclass
class Backend:
    """A server, and until when it rests after a failure (`time.monotonic`)."""

    endpoint: Endpoint
    rests_until: float = 0.0


@dataclass(frozen=True)
class Call:
    """What all pieces of one call share."""

    clients: Mapping[str, httpx.AsyncClient]
    outstanding: Counter[str]
    slots: asyncio.Semaphore
    packer: Executor


class Remote:
    """Scores videos on reward servers; a recipe has it as `call: "http://host:port"`, several separated by commas.

    Videos go out in pieces. Each piece goes to the server with the fewest pieces outstanding, and where that fails to
    another; a failure that may be over soon is repeated. A reward must not depend on which videos share a call.

    Args:
        urls: of servers of one reward in one version.
        encoding: of pixels: uint8 (rounded to 1/255), float32 (exact, four times larger), mp4 (lossy, far smaller).
        batch: videos in a piece.
        timeout: seconds that one request may take, in the server's queue too.
        patience: seconds for which failures are repeated, and for which servers are waited for at the start.
        token_env: environment variable with the servers' token.

    Attributes:
        takes: what it is called with, as the servers say.
        score_range: lowest and highest number, where the servers say so.
        failures: attempts that failed and were repeated, so far.

    Raises:
        UserError: a server that is not there, serves another reward than the others, or another format.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        encoding: str = "uint8",
        batch: int = 8,
        timeout: float | int = 300.0,  # a recipe may well say 300
        patience: float | int = 600.0,
        token_env: str = "FLASHGRPO_REWARD_TOKEN",
    ) -> None:
        if encoding not in get_args(wire.Encoding):
            raise UserError(f"encoding: {suggest(encoding, get_args(wire.Encoding))}, not {encoding!r}")
        if batch < 1 or timeout <= 0 or patience < 0 or not urls:
            raise UserError("a remote reward needs a URL, batch of 1 or more, timeout above 0, patience of 0 or more")
        self._encoding: Any = encoding
        self._batch, self._patience = batch, float(patience)
        self._servers = [Backend(Endpoint(url, token_env, float(timeout))) for url in dict.fromkeys(urls)]
        self._warned = -QUIET
        self.failures = 0
        infos = run(all_of([self._info(server.endpoint) for server in self._servers]))
        self._reward = infos[0].reward
        for server, info in zip(self._servers, infos, strict=True):
            if (info.reward, info.takes) != (self._reward, infos[0].takes):
                raise UserError(
                    f"{self._servers[0].endpoint.url} serves {self._reward}, and {server.endpoint.url} serves "
                    f"{info.reward}; the servers of one reward must be alike"
                )
        self._max_bytes = min(info.max_bytes for info in infos)
        self.takes: Input = infos[0].takes
        self.score_range = infos[0].score_range

    def __call__(
        self, videos: Tensor | Sequence[str], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> list[float] | dict[str, list[float]]:
        """Score B videos of the kind that `takes` says.

        Returns:
            B numbers, or component -> B numbers, in the order of the videos.

        Raises:
            UserError: a server refuses the request, answers what is no answer to it, or stays away.
            ValueError: the videos are not of the kind that `takes` says, or cannot be sent.
        """
        if (self.takes.kind == "files") == isinstance(videos, Tensor):
            raise ValueError(f"{self._reward} takes {self.takes.kind}")
        for name, column in {"videos": videos, **columns}.items():
            if len(column) != len(prompts):
                raise ValueError(f"there are {len(prompts)} prompts for {len(column)} of {name}")
        if not prompts:
            return []
        pieces = [slice(start, start + self._batch) for start in range(0, len(prompts), self._batch)]
        requests = [
            (videos[rows], list(prompts[rows]), {name: list(column[rows]) for name, column in columns.items()})
            for rows in pieces
        ]
        answers = run(self._score(requests))
        names = list(answers[0])
        if any(set(answer) != set(names) for answer in answers):
            raise UserError(f"{self._reward} gave other components for some videos than {names} for others")
        joined = {name: [value for answer in answers for value in answer[name]] for name in names}
        return joined[""] if names == [""] else joined

    async def _score(self, requests: Sequence[tuple[Any, list[str], dict[str, list[Any]]]]) -> list[dict[str, Any]]:
        clients = {server.endpoint.url: server.endpoint.client() for server in self._servers}
        # Packing is one thread's work: it would only compete with itself for the memory.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as packer:
            call = Call(clients, Counter(), asyncio.Semaphore(OUTSTANDING * len(self._servers)), packer)
            try:
                return await all_of([self._piece(call, *request) for request in requests])
            finally:
                for client in clients.values():
                    await client.aclose()

    async def _piece(
        self, call: Call, videos: Any, prompts: list[str], columns: dict[str, list[Any]]
    ) -> dict[str, list[float]]:
        async with call.slots:  # so that few pieces are held in memory a second time
            id = uuid.uuid4().hex
            pack = _packing(id, self.takes.kind, videos, prompts, columns, self._encoding)
            body = await asyncio.get_running_loop().run_in_executor(call.packer, pack)
            if len(body) > self._max_bytes:
                raise UserError(
                    f"{len(prompts)} videos make a request of {len(body) / 2**20:.1f} MiB, and {self._reward} is "
                    f"served with --max-mib {self._max_bytes / 2**20:g}; lower the reward's batch or raise that"
                )
            return await persist(
                lambda: self._attempt(call, id, body, len(prompts)), self._patience, ADVICE, self._warn
            )

    async def _attempt(self, call: Call, id: str, body: bytes, count: int) -> dict[str, list[float]]:
        """Ask the servers in turn, the least busy first, until one answers."""
        left = list(self._servers)
        while True:
            now = time.monotonic()
            server = min(left, key=lambda s: (s.rests_until > now, call.outstanding[s.endpoint.url]))
            url = server.endpoint.url
            call.outstanding[url] += 1
            try:
                answer = await server.endpoint.ask(call.clients[url], "POST", "/score", body, wire.MEDIA_TYPE)
                server.rests_until = 0.0
            except Transient as failure:
                self.failures += 1
                server.rests_until = time.monotonic() + max(REST, failure.after or 0.0)
                left.remove(server)
                if not left:
                    raise
                self._warn(failure, None)
                continue
            finally:
                call.outstanding[url] -= 1
            try:
                return unpack_answer(answer, id, self._reward, count)
            except ValueError as error:
                raise UserError(f"{url} gave no valid answer: {error}") from error

    async def _info(self, endpoint: Endpoint) -> Info:
        async def ask() -> bytes:
            return await endpoint.ask(client, "GET", "/info")

        async with endpoint.client() as client:
            answer = await persist(ask, self._patience, ADVICE, self._warn)
        return Info.read(answer, endpoint.url)

    def _warn(self, failure: object, left: float | None) -> None:
        """Tell of a failure, and not of each of the many that one server that is away brings."""
        if time.monotonic() - self._warned >= QUIET:
            self._warned = time.monotonic()
            what = "asking another server" if left is None else f"trying again for up to {left:.0f} s"
            LOG.warning("%s; %s", failure, what)


def remote(url: str, **settings: Any) -> Remote:
    """`Remote` of one URL, or of several separated by commas or blanks."""
    return Remote(url.replace(",", " ").split(), **settings)


def _packing(
    id: str, kind: wire.Kind, videos: Any, prompts: list[str], columns: dict[str, list[Any]], encoding: wire.Encoding
) -> Callable[[], bytes]:
    def pack() -> bytes:
        inputs = [Path(file).read_bytes() for file in videos] if kind == "files" else videos
        return wire.pack(id, kind, inputs, prompts, columns, encoding)

    return pack

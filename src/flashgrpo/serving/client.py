"""A reward that servers compute (`flashgrpo reward serve`), one or several, called as if it were computed here."""

import asyncio
import logging
import time
import uuid
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import httpx
import torch
from torch import Tensor

from flashgrpo.errors import UserError, suggest
from flashgrpo.scoring.inputs import Input
from flashgrpo.serving import wire
from flashgrpo.serving.http import Endpoint, Transient, all_of, persist, run
from flashgrpo.serving.messages import Encoding, Info, unpack_answer

LOG = logging.getLogger("flashgrpo")
TOKEN = "FLASHGRPO_REWARD_TOKEN"
OUTSTANDING = 4  # requests that a server has of one call: one that is computed, one that arrives, and two that wait
REST = 5.0  # seconds during which a server that failed is asked only where no other is left
PATIENCE = 600.0  # seconds
QUIET = 30.0  # seconds between two warnings of one client
ADVICE = "is `flashgrpo reward serve` running there, and can this machine reach it?"

Piece = tuple[Any, list[str], dict[str, list[Any]]]
"""Videos, prompts and columns of one request."""


@dataclass
class Call:
    """What all pieces of one call share."""

    clients: dict[Endpoint, httpx.AsyncClient]
    slots: asyncio.Semaphore
    packer: ThreadPoolExecutor
    outstanding: Counter[Endpoint] = field(default_factory=Counter)


class Remote:
    """Scores videos on reward servers; a recipe has it as `call: "http://host:port"`, several separated by commas.

    Videos go out in pieces. Each piece goes to the server with the fewest pieces outstanding, and where that fails to
    another; a failure that may be over soon is repeated. A reward must not depend on which videos share a call.

    Args:
        urls: of servers of one reward in one version.
        encoding: of pixels: uint8 (rounded to 1/255), float32 (exact, four times larger), mp4 (lossy, far smaller).
        batch: videos in a piece.
        timeout: seconds that one request may take, in the server's queue too.
        patience: seconds for which failures are repeated, and for which servers are waited for at the start. When not
            given, 600, and at the start each is asked once: one that is not there yet is a slip more often than not.
        token_env: variable with the servers' token, FLASHGRPO_...; by default FLASHGRPO_REWARD_TOKEN, if set.

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
        patience: float | int | None = None,
        token_env: str | None = None,
    ) -> None:
        if encoding not in get_args(Encoding):
            raise UserError(f"encoding: {suggest(encoding, get_args(Encoding))}, not {encoding!r}")
        if batch < 1 or not timeout > 0 or (patience is not None and not patience >= 0) or not urls:
            raise UserError("a remote reward needs a URL, batch of 1 or more, timeout above 0, patience of 0 or more")
        self._encoding: Any = encoding
        self._batch = batch
        self._first_patience, self._patience = (0.0, PATIENCE) if patience is None else (float(patience),) * 2
        self._servers = [Endpoint(url, token_env, TOKEN, float(timeout)) for url in dict.fromkeys(urls)]
        self._rests_until: defaultdict[Endpoint, float] = defaultdict(float)  # of `time.monotonic`
        self._warned = -QUIET
        self.failures = 0
        infos = run(all_of([self._info(server) for server in self._servers]))
        self._reward = infos[0].reward
        for server, info in zip(self._servers, infos, strict=True):
            if (info.reward, info.takes) != (self._reward, infos[0].takes):
                raise UserError(
                    f"{self._servers[0].url} serves {self._reward}, and {server.url} serves {info.reward}; "
                    "the servers of one reward must be alike"
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
        answers = run(
            self._score(
                [(videos[rows], list(prompts[rows]), {n: list(c[rows]) for n, c in columns.items()}) for rows in pieces]
            )
        )
        names = list(answers[0])
        if any(set(answer) != set(names) for answer in answers):
            raise UserError(f"{self._reward} gave other components for some videos than {names} for others")
        joined = {name: [value for answer in answers for value in answer[name]] for name in names}
        return joined[""] if names == [""] else joined

    async def _score(self, pieces: Sequence[Piece]) -> list[dict[str, list[float]]]:
        async with AsyncExitStack() as stack:
            # Packing is one thread's work: it would only compete with itself for the memory.
            packer = ThreadPoolExecutor(1, "packer", torch.set_num_threads, (torch.get_num_threads(),))
            stack.enter_context(packer)
            clients = {server: await stack.enter_async_context(server.client()) for server in self._servers}
            call = Call(clients, asyncio.Semaphore(OUTSTANDING * len(clients)), packer)
            return await all_of([self._piece(call, piece) for piece in pieces])

    async def _piece(self, call: Call, piece: Piece) -> dict[str, list[float]]:
        async with call.slots:  # so that few pieces are held in memory a second time
            id = uuid.uuid4().hex
            body, checksum = await asyncio.get_running_loop().run_in_executor(call.packer, self._pack, id, piece)
            size, count = sum(map(len, body)), len(piece[1])
            if size > self._max_bytes:
                raise UserError(
                    f"{count} videos make a request of {size / 2**20:.1f} MiB, and {self._reward} is "
                    f"served with --max-mib {self._max_bytes / 2**20:g}; lower the reward's batch or raise that"
                )
            headers = {"Content-Type": wire.MEDIA_TYPE, wire.DIGEST: checksum}
            return await persist(
                lambda: self._attempt(call, id, body, headers, count), self._patience, ADVICE, self._warn
            )

    def _pack(self, id: str, piece: Piece) -> tuple[list[memoryview], str]:
        """Return a request in parts, and its checksum."""
        videos, prompts, columns = piece
        inputs = [Path(file).read_bytes() for file in videos] if self.takes.kind == "files" else videos
        body = wire.pack(id, self.takes.kind, inputs, prompts, columns, self._encoding)
        checksum = 0
        for part in body:
            checksum = zlib.crc32(part, checksum)
        return body, f"{checksum:08x}"

    async def _attempt(
        self, call: Call, id: str, body: Sequence[memoryview], headers: dict[str, str], count: int
    ) -> dict[str, list[float]]:
        """Ask the servers in turn, the least busy first, until one answers."""
        left = list(self._servers)
        while True:
            now = time.monotonic()
            server = min(left, key=lambda server: (self._rests_until[server] > now, call.outstanding[server]))
            call.outstanding[server] += 1
            try:
                answer = await server.ask(call.clients[server], "POST", "/score", body, headers)
                self._rests_until[server] = 0.0
                return unpack_answer(answer, id, self._reward, count)
            except Transient as failure:
                self.failures += 1
                self._rests_until[server] = time.monotonic() + max(REST, failure.after or 0.0)
                left.remove(server)
                if not left:
                    raise
                self._warn(failure, None)
            except UserError:
                raise
            except ValueError as error:
                raise UserError(f"{server.url} gave no valid answer: {error}") from error
            finally:
                call.outstanding[server] -= 1

    async def _info(self, server: Endpoint) -> Info:
        async with server.client() as client:
            answer = await persist(lambda: server.ask(client, "GET", "/info"), self._first_patience, ADVICE, self._warn)
        return Info.read(answer, server.url)

    def _warn(self, failure: object, left: float | None) -> None:
        """Tell of a failure, and not of each of the many that one server that is away brings."""
        if time.monotonic() - self._warned >= QUIET:
            self._warned = time.monotonic()
            what = "asking another server" if left is None else f"trying again for up to {left:.0f} s"
            LOG.warning("%s; %s", failure, what)


def remote(url: str, **settings: Any) -> Remote:
    """`Remote` of one URL, or of several separated by commas or blanks."""
    return Remote(url.replace(",", " ").split(), **settings)

"""A reward that servers compute (`flashgrpo reward serve`), one or several, called as if it were computed here."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import httpx
from torch import Tensor

from flashgrpo.errors import UserError, suggest
from flashgrpo.scoring.inputs import Input, Kind, kinds
from flashgrpo.serving import wire
from flashgrpo.serving.http import Endpoint, Transient, all_of, persist, run, warn

LOG = logging.getLogger("flashgrpo")
TOKEN = "FLASHGRPO_REWARD_TOKEN"
OUTSTANDING = 4  # requests that a server has of one call: one that is computed, one that arrives, and two that wait
REST = 5.0  # seconds that a place of a server that failed stays empty where there are others, at most
PATIENCE = 600.0  # seconds
QUIET = 30.0  # seconds between two warnings of one client
ADVICE = "is `flashgrpo reward serve` running there, and can this machine reach it?"

Piece = tuple[Any, list[str], dict[str, list[Any]]]
"""Videos or texts, prompts and columns of one request."""
Places = asyncio.Queue[tuple[Endpoint, httpx.AsyncClient]]
"""A server, with connections to it, for each request that it may have at a time."""


class Remote:
    """Scores videos on reward servers; a recipe has it as `call: "http://host:port"`, several separated by commas.

    Videos go out in pieces, each to the next server that has room. A failure that may be over soon is repeated, with
    another server where there is one. A reward must not depend on which videos share a call.

    Args:
        urls: of servers of one reward in one version.
        encoding: of pixels: uint8 (rounded to 1/255), float32 (exact, four times larger), mp4 (lossy, far smaller).
        batch: videos in a piece.
        timeout: seconds that one request may take, in the server's queue too.
        patience: seconds for which failures are repeated, and for which servers are waited for at the start. When not
            given, what they ask for or 600, and at the start each is asked once: one that is not there yet is a slip
            more often than not.
        token_env: variable with the servers' token, FLASHGRPO_...; by default FLASHGRPO_REWARD_TOKEN, if set.

    Attributes:
        takes: what it is called with, as the servers say.
        score_range: lowest and highest number, where the servers say so.
        compares: whether a call has to have all samples of one prompt group, which then travel together.
        watches: components that are never trained on, as the servers say.
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
        if encoding not in get_args(wire.Encoding):
            raise UserError(f"encoding: {suggest(encoding, get_args(wire.Encoding))}, not {encoding!r}")
        if batch < 1 or not timeout > 0 or (patience is not None and not patience >= 0) or not urls:
            raise UserError("a remote reward needs a URL, batch of 1 or more, timeout above 0, patience of 0 or more")
        self._encoding: Any = encoding
        self._batch = batch
        self._servers = [Endpoint(url, token_env, TOKEN, float(timeout)) for url in dict.fromkeys(urls)]
        self._warned = -QUIET
        self.failures = 0
        infos = run(all_of([self._info(server, patience or 0.0) for server in self._servers]))
        self._reward = infos[0].reward
        for server, info in zip(self._servers, infos, strict=True):
            if (info.reward, info.takes) != (self._reward, infos[0].takes):
                raise UserError(
                    f"{self._servers[0].url} serves {self._reward}, and {server.url} serves {info.reward}; "
                    "the servers of one reward must be alike"
                )
        self._patience = float((infos[0].patience or PATIENCE) if patience is None else patience)
        self._max_bytes = min(info.max_bytes for info in infos)
        self.compares, self.watches = infos[0].compares, infos[0].watches
        self.takes: Input = infos[0].takes
        self.score_range = infos[0].score_range

    def __call__(
        self, videos: Tensor | Sequence[str], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> list[float] | dict[str, list[float]]:
        """Score B videos of the kind that `takes` says, or B texts.

        Returns:
            B numbers, or component -> B numbers, in the order of the videos.

        Raises:
            UserError: a server refuses the request, answers what is no answer to it, or stays away.
            ValueError: the videos are not of the kind that `takes` says, or cannot be sent.
        """
        self._kind(videos)
        for name, column in {"videos": videos, **columns}.items():
            if len(column) != len(prompts):
                raise ValueError(f"there are {len(prompts)} prompts for {len(column)} of {name}")
        if not prompts:
            return []
        size = len(prompts) if self.compares else self._batch
        pieces = [slice(start, start + size) for start in range(0, len(prompts), size)]
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
            servers = [(server, await stack.enter_async_context(server.client())) for server in self._servers]
            places: Places = asyncio.Queue()
            for server in servers * OUTSTANDING:
                places.put_nowait(server)
            few = asyncio.Semaphore(places.qsize())  # so that few pieces are held in memory a second time
            packing = asyncio.Lock()  # one at a time: packing would only compete with itself for the memory
            return await all_of([self._piece(piece, places, few, packing) for piece in pieces])

    async def _piece(
        self, piece: Piece, places: Places, few: asyncio.Semaphore, packing: asyncio.Lock
    ) -> dict[str, list[float]]:
        id, count = uuid.uuid4().hex, len(piece[1])
        async with few:
            async with packing:
                body, headers = await asyncio.to_thread(self._pack, id, *piece)
            size = sum(map(len, body))
            if size > self._max_bytes:
                raise UserError(
                    f"{count} videos make a request of {size / 2**20:.1f} MiB, and {self._reward} is "
                    f"served with --max-mib {self._max_bytes / 2**20:g}; lower the reward's batch or raise that"
                )

            async def attempt() -> dict[str, list[float]]:
                async with self._place(places) as (server, client):
                    answer = await server.ask(client, "POST", "/score", body, headers)
                try:
                    return wire.unpack_answer(answer, id, self._reward, count)
                except ValueError as error:
                    raise UserError(f"{server.url} gave no valid answer: {error}") from error

            return await persist(attempt, self._patience, ADVICE, self._warn)

    def _pack(
        self, id: str, videos: Any, prompts: list[str], columns: dict[str, list[Any]]
    ) -> tuple[list[memoryview], dict[str, str]]:
        kind = self._kind(videos)
        inputs = [Path(file).read_bytes() for file in videos] if kind == "files" else videos
        return wire.pack(id, kind, inputs, prompts, columns, self._encoding)

    def _kind(self, videos: Tensor | Sequence[str]) -> Kind:
        possible = ("pixels", "latents") if isinstance(videos, Tensor) else ("files", "texts")
        for kind in kinds(self.takes):
            if kind in possible:
                return kind
        raise ValueError(f"{self._reward} takes {self.takes.kind}")

    @asynccontextmanager
    async def _place(self, places: Places) -> AsyncIterator[tuple[Endpoint, httpx.AsyncClient]]:
        """Take the next place at a server, and put it back; after a rest where that failed and there are others."""
        place, rest = await places.get(), 0.0
        try:
            yield place
        except Transient as failure:
            self.failures += 1
            if len(self._servers) > 1:
                rest = REST if failure.after is None else min(failure.after, REST)
            raise
        finally:
            asyncio.get_running_loop().call_later(rest, places.put_nowait, place)

    async def _info(self, server: Endpoint, patience: float) -> wire.Info:
        async with server.client() as client:
            answer = await persist(lambda: server.ask(client, "GET", "/info"), patience, ADVICE, self._warn)
        try:
            return wire.read_json(wire.Info, answer, "/info")
        except ValueError as error:
            raise UserError(
                f"{server.url} is no reward server of this release ({error}); install one on both sides"
            ) from error

    def _warn(self, failure: object, left: float) -> None:
        """Tell of a failure, and not of each of the many that one server that is away brings."""
        if time.monotonic() - self._warned >= QUIET:
            self._warned = time.monotonic()
            warn(failure, left)


def remote(url: str, **settings: Any) -> Remote:
    """`Remote` of one URL, or of several separated by commas or blanks."""
    return Remote(url.replace(",", " ").split(), **settings)

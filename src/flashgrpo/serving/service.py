"""What a reward server does with requests.

    GET  /health   whether it lives, for anybody
    GET  /info     name, version, what it takes, format
    POST /score    a request of `wire.py` -> an answer of `messages.py`

Requests are data in one format; nothing in them is unpickled, imported or run. They wait as they came, and only the one
whose turn it is gets decoded, so memory is bounded by what is sent and by one request decoded.
"""

import asyncio
import hmac
import logging
import queue
import threading
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from io import FileIO
from typing import Any

import torch

from flashgrpo.errors import UserError, install_hint, printable, system_reason
from flashgrpo.scoring.loading import checked_values
from flashgrpo.serving import wire
from flashgrpo.serving.messages import Info, pack_answer
from flashgrpo.types import Reward

try:
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from starlette.requests import ClientDisconnect
except ImportError as missing:
    raise UserError(f"a reward server needs FastAPI and uvicorn: {install_hint('server')}") from missing

LOG = logging.getLogger("flashgrpo")
SLOWEST = 128 * 2**10  # bytes a second that a request has to arrive with
SOON = {"Retry-After": "1"}  # second


@dataclass(frozen=True)
class Options:
    """How a reward is served.

    Args:
        host: the address to listen on; anything but this machine's own lets others in.
        port: 0 lets the system choose one, which is printed.
        batch: videos that the reward is called with at most.
        queue: requests that wait or are computed; while there are so many, others are told to come back.
        max_mib: size of a request, as it is sent and as uint8. Times `queue` it bounds the memory of all that are held
            as they came, and four times it that of the videos that the reward is called with.
        token_env: variable with the token that clients have to know; by default FLASHGRPO_REWARD_TOKEN, if set.
        arrival_seconds: within which the head of a request has to arrive, and then its body, at `SLOWEST` or faster.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    batch: int = 16
    queue: int = 16
    max_mib: float = 1024.0
    token_env: str | None = None
    arrival_seconds: int = 15

    def __post_init__(self) -> None:
        if self.batch < 1 or self.queue < 1 or not 0 < self.max_mib < 2**30 or not 0 <= self.port < 2**16:
            raise UserError("a server needs --batch and --queue of 1 or more, --max-mib above 0, and a valid --port")

    @property
    def limit(self) -> int:
        """Bytes that a request may have."""
        return int(self.max_mib * 2**20)


class Service:
    """Scores requests one by one, in the order in which they came, in a thread of its own.

    Args:
        token: what clients have to know; empty asks for none.
    """

    def __init__(self, reward: Reward, info: Info, options: Options, token: str = "") -> None:
        self._reward, self._info, self._options, self._token = reward, info, options, token
        self._waiting: queue.SimpleQueue[tuple[Future[bytes], FileIO] | None] = queue.SimpleQueue()
        self._held = 0  # requests that wait or are computed
        self._bytes = 0  # of these, and of those that arrive
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def application(self) -> FastAPI:
        """Return what answers at the three addresses."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        known = [Depends(self._check_token)]

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/info", dependencies=known)
        async def info() -> Info:
            return self._info

        @app.exception_handler(ClientDisconnect)
        async def forget(request: Request, error: Exception) -> Response:
            return Response(status_code=499)  # nobody reads it

        app.post("/score", dependencies=known)(self._score)
        return app

    async def _check_token(self, request: Request) -> None:
        """Compare in a time that does not tell how much of a token is right."""
        given = request.headers.get("authorization", "").encode()
        if self._token and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise HTTPException(401, "the token is missing or wrong")

    async def _score(self, request: Request) -> Response:
        """Answer a request, unless its client does not wait any more."""
        length = request.headers.get("content-length", "")
        if request.headers.get("content-type") != wire.MEDIA_TYPE:
            raise HTTPException(415, f"the content type of a request is {wire.MEDIA_TYPE}")
        if not length.isdecimal():
            raise HTTPException(411, "a request says how many bytes it has")
        if len(length) > 15 or int(length) > self._options.limit:
            raise HTTPException(413, f"a request may have {self._options.max_mib:g} MiB here")
        if self._held >= self._options.queue:
            raise HTTPException(503, f"{self._held} requests wait already", SOON)
        answer: Future[bytes] = Future()
        self._waiting.put((answer, await self._arrived(request, int(length))))
        if self._closed:
            self.close()
        self._held += 1
        try:
            return Response(await _unless_gone(request, asyncio.wrap_future(answer)), media_type="application/json")
        finally:
            self._held -= 1
            self._bytes -= int(length)

    async def _arrived(self, request: Request, length: int) -> FileIO:
        """Return a body once all of it is there; one that is slow holds no place, and memory for what it has sent."""
        checksum = 0
        try:
            body = wire.buffer()
        except OSError as error:  # too many files are open
            raise HTTPException(503, f"the server has no room: {system_reason(error)}", SOON) from error

        async def receive() -> None:
            nonlocal checksum
            async for chunk in request.stream():
                if self._bytes + len(chunk) > self._options.queue * self._options.limit:
                    raise HTTPException(503, "the requests that wait take all the memory they may", SOON)
                self._bytes += body.write(chunk)
                checksum = zlib.crc32(chunk, checksum)

        try:
            await asyncio.wait_for(receive(), self._options.arrival_seconds + length / SLOWEST)
            if request.headers.get(wire.DIGEST) != f"{checksum:08x}" or body.tell() != length:
                raise HTTPException(400, "the request was damaged on its way: its CRC-32 is another")
        except BaseException as error:
            self._bytes -= body.tell()
            body.close()
            if isinstance(error, asyncio.TimeoutError):
                raise HTTPException(408, "the request arrived too slowly") from error
            raise
        return body

    def close(self) -> None:
        """Let what is computed end, and tell those that wait to go elsewhere."""
        self._closed = True
        while not self._waiting.empty():
            if job := self._waiting.get():
                job[1].close()
                if job[0].set_running_or_notify_cancel():
                    job[0].set_exception(HTTPException(503, "the server is ending", {"Retry-After": "5"}))
        self._waiting.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the thread to end: one that frees tensors while the interpreter ends aborts the process."""
        self._thread.join(seconds)

    @torch.no_grad()
    def _work(self) -> None:
        while job := self._waiting.get():
            answer, body = job
            with body:
                if answer.set_running_or_notify_cancel():  # else its client is gone
                    self._answer(answer, body)
            del job, answer, body  # which would be kept until the next one comes

    def _answer(self, answer: "Future[bytes]", body: FileIO) -> None:
        try:
            answer.set_result(self._computed(wire.unpack(body, self._options.limit)))
        except ValueError as error:
            answer.set_exception(HTTPException(422, printable(str(error))))
        except HTTPException as error:
            answer.set_exception(error)
        except Exception as error:  # no room for what is decoded, say; the next request may fit
            LOG.error("a request failed", exc_info=error)
            answer.set_exception(HTTPException(500, f"the server failed: {printable(str(error))}"))

    def _computed(self, request: wire.Request) -> bytes:
        about, name = request.about, self._info.name
        if about.kind != self._info.takes.kind:
            raise ValueError(f"{name} takes {self._info.takes.kind}, not {about.kind}")
        parts = []
        for start in range(0, request.count, self._options.batch):
            rows = slice(start, start + self._options.batch)
            columns = {key: values[rows] for key, values in about.columns.items()}
            with request.inputs(rows) as inputs:
                parts.append(self._called(inputs, about.prompts[rows], columns))
        if any(set(part) != set(parts[0]) for part in parts):
            raise HTTPException(500, f"{name} is at fault: it returns other components for some videos than for others")
        components = {key: [value for part in parts for value in part[key]] for key in parts[0]}
        return pack_answer(about.id, self._info.reward, components)

    def _called(self, inputs: Any, prompts: list[str], columns: dict[str, list[Any]]) -> dict[str, list[float]]:
        """Call the reward; even one that wants to exit ends no server."""
        name = self._info.name
        try:
            values: Any = self._reward(inputs, prompts, **columns)
        except ValueError as error:
            raise ValueError(f"{name} refused its input: {printable(str(error))}") from error
        except BaseException as error:
            LOG.error("the reward failed", exc_info=error)
            said = printable(f"{type(error).__name__}: {error}")
            raise HTTPException(500, f"{name} is at fault: the reward failed: {said}") from error
        try:
            return checked_values(values, len(prompts))
        except ValueError as error:
            raise HTTPException(500, f"{name} is at fault: {printable(str(error))}") from error


async def _unless_gone(request: Request, answer: "asyncio.Future[bytes]") -> bytes:
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
    leaving.cancel()
    if not answer.done():
        answer.cancel()
        raise ClientDisconnect
    return answer.result()

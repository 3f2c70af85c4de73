"""What a reward server does with requests: the three addresses, and what is refused.

    GET  /health   whether it lives, for anybody
    GET  /info     name, version, what it takes, format
    POST /score    a request of `wire.py` -> an answer of `answers.py`

Requests are data in one format; nothing in them is unpickled, imported or run.
"""

import asyncio
import hmac
from dataclasses import dataclass

from flashgrpo.errors import UserError
from flashgrpo.serving.answers import Info, pack_answer
from flashgrpo.serving.batching import Batcher, Broken, Closing
from flashgrpo.serving.wire import MEDIA_TYPE, unpack

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect
except ImportError as missing:
    raise UserError("a reward server needs FastAPI and uvicorn: pip install 'flash-grpo[server]'") from missing


@dataclass(frozen=True)
class Options:
    """How a reward is served.

    Args:
        host: the address to listen on; anything but this machine's own lets others in.
        port: 0 lets the system choose one, which is printed.
        batch: videos that the reward is called with at most.
        queue: requests that are held at a time, computed, waiting or arriving; others are told to come back.
        max_mib: size of a request. Times `queue` it bounds the memory that requests take.
        token_env: environment variable with the token that clients have to know; none is asked for where it is unset.
        body_seconds: within which a request has to arrive.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    batch: int = 16
    queue: int = 16
    max_mib: float = 1024.0
    token_env: str = "FLASHGRPO_REWARD_TOKEN"
    body_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.queue < 1 or self.max_mib <= 0 or not 0 <= self.port < 2**16:
            raise UserError("a server needs --batch and --queue of 1 or more, --max-mib above 0, and a valid --port")


class Refusal(Exception):
    """An HTTP status other than 200, with its sentence, and seconds after which to ask again."""

    def __init__(self, status: int, sentence: str, after: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.after = status, after


class Service:
    """Implements what the three addresses do.

    Args:
        token: what clients have to know; empty asks for none.
    """

    def __init__(self, batcher: Batcher, info: Info, options: Options, token: str) -> None:
        self.batcher, self.info, self.options = batcher, info, options
        self._token = token
        self._held = 0  # requests that arrive, wait or are computed

    async def score(self, request: Request) -> Response:
        """Answer a request, unless its client does not wait any more."""
        if request.headers.get("content-type") != MEDIA_TYPE:
            raise Refusal(415, f"the content type of a request is {MEDIA_TYPE}")
        if self._held >= self.options.queue:
            raise Refusal(503, f"{self._held} requests wait already", after=1)
        self._held += 1
        try:
            return await self._score(request)
        finally:
            self._held -= 1

    async def _score(self, request: Request) -> Response:
        try:
            body = await asyncio.wait_for(self._body(request), self.options.body_seconds)
            # Its checksum is of the whole body; the event loop continues meanwhile.
            wanted = await run_in_threadpool(unpack, body)
        except asyncio.TimeoutError as error:
            raise Refusal(408, f"the request had not arrived after {self.options.body_seconds:g} s") from error
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        if wanted.kind != self.info.takes.kind:
            raise Refusal(422, f"{self.info.name} takes {self.info.takes.kind}, not {wanted.kind}")
        answer = asyncio.wrap_future(self.batcher.submit(wanted))
        gone = asyncio.ensure_future(_until_gone(request))
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not answer.done():
            answer.cancel()
            raise ClientDisconnect
        try:
            components = answer.result()
        except Closing as error:
            raise Refusal(503, "the server is ending", after=5) from error
        except ValueError as error:
            raise Refusal(422, f"{self.info.name} refused its input: {_sentence(error)}") from error
        except Broken as error:
            raise Refusal(500, f"{self.info.name} is at fault: {error}") from error
        return Response(pack_answer(wanted.id, self.info.reward, components), media_type="application/json")

    async def _body(self, request: Request) -> bytearray:
        limit = int(self.options.max_mib * 2**20)
        refusal = Refusal(413, f"a request may have {self.options.max_mib:g} MiB here")
        declared_length = request.headers.get("content-length", "0")
        if declared_length.isdecimal() and int(declared_length) > limit:
            raise refusal
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > limit:
                raise refusal
            body += chunk
        return body

    def check_token(self, request: Request) -> None:
        """Check whether the request knows the token, in a time that does not tell how much of it is right.

        Raises:
            Refusal: it does not.
        """
        given = request.headers.get("authorization", "").encode()
        if self._token and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise Refusal(401, "the token is missing or wrong")


def application(service: Service) -> FastAPI:
    """Return the application that answers at the three addresses."""
    app = FastAPI(title="Flash-GRPO reward", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def info(request: Request) -> Response:
        service.check_token(request)
        return Response(service.info.model_dump_json(), media_type="application/json")

    @app.post("/score")
    async def score(request: Request) -> Response:
        service.check_token(request)
        return await service.score(request)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        headers = {} if refusal.after is None else {"Retry-After": str(refusal.after)}
        return JSONResponse({"error": str(refusal)}, refusal.status, headers)

    @app.exception_handler(ClientDisconnect)
    async def forget(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    return app


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]

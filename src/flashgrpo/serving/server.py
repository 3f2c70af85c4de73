"""A reward behind HTTP: `flashgrpo reward serve NAME`. The other end is `client.py`.

    GET  /health   whether it lives, for anybody
    GET  /info     name, version, what it takes, format
    POST /score    a request of `wire.py` -> an answer of it

Requests are data in one format; nothing in them is unpickled, imported or run. They wait as they came, and only the one
whose turn it is gets decoded, so memory is bounded by what is sent and by one request decoded.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import signal
import socket
import sys
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from flashgrpo.config.recipe import merge_choices, parse_override
from flashgrpo.errors import UserError, install_hint, printable, system_reason
from flashgrpo.jsontext import to_json
from flashgrpo.scoring.inputs import kinds
from flashgrpo.scoring.loading import bind, checked_values, declared, load_reward, takes_of
from flashgrpo.scoring.names import full_name
from flashgrpo.serving import wire
from flashgrpo.serving.client import TOKEN
from flashgrpo.serving.commands import Options
from flashgrpo.serving.http import Transient, is_loopback, token_of
from flashgrpo.types import Reward

try:
    import uvicorn
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from starlette.requests import ClientDisconnect

    from flashgrpo.serving.connection import Connection, unless_gone
except ImportError as missing:
    raise UserError(f"a reward server needs FastAPI and uvicorn: {install_hint('server')}") from missing

LOG = logging.getLogger("flashgrpo")
SLOWEST = 128 * 2**10  # bytes a second that a request has to arrive with
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SOON = {"Retry-After": "1"}  # second


class Service:
    """Scores requests one by one, in the order in which they came, in a thread; an empty token is asked of nobody."""

    def __init__(self, reward: Reward, info: wire.Info, options: Options, token: str = "") -> None:
        self._reward, self._info, self._options, self._token = reward, info, options, token
        self._scoring = ThreadPoolExecutor(1, "scoring")
        self._held = 0  # requests that wait or are computed
        self._bytes = 0  # of these, and of those that arrive

    def application(self) -> FastAPI:
        """Return what answers at the three addresses."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        known = [Depends(self._check_token)]

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/info", dependencies=known)
        async def info() -> wire.Info:
            return self._info

        @app.exception_handler(ClientDisconnect)
        async def forget(request: Request, error: Exception) -> Response:
            return Response(status_code=499)  # nobody reads it

        app.post("/score", dependencies=known)(self._score)
        return app

    def close(self, wait: bool = False) -> None:
        """Tell those that wait to go elsewhere; let what is computed end, and `wait` for it or not.

        A reward that waits for people has a `close`, which ends that.
        """
        declared(self._reward, "close", lambda: None)()
        self._scoring.shutdown(wait=wait, cancel_futures=True)

    async def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if self._token and not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            raise HTTPException(401, "the token is missing or wrong")

    async def _score(self, request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if request.headers.get("content-type") != wire.MEDIA_TYPE:
            raise HTTPException(415, f"the content type of a request is {wire.MEDIA_TYPE}")
        if not length.isdecimal():
            raise HTTPException(411, "a request says how many bytes it has")
        if len(length) > 15 or int(length) > self._options.limit:
            raise HTTPException(413, f"a request may have {self._options.max_mib:g} MiB here")
        if self._held >= self._options.queue:
            raise HTTPException(503, f"{self._held} requests wait already", SOON)
        body = await self._arrived(request, int(length))
        self._held += 1
        try:
            answer = self._scoring.submit(self._answer, body)
            answer.add_done_callback(lambda _: body.close())
            return Response(await unless_gone(request, asyncio.wrap_future(answer)), media_type="application/json")
        except (RuntimeError, asyncio.CancelledError) as error:  # after `close`
            body.close()
            raise HTTPException(503, "the server is ending", {"Retry-After": "5"}) from error
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
            if request.headers.get(wire.DIGEST) != f"{checksum:08x}":
                raise HTTPException(400, "the request was damaged on its way: its CRC-32 is another")
        except BaseException as error:
            self._bytes -= body.tell()
            body.close()
            if isinstance(error, asyncio.TimeoutError):
                raise HTTPException(408, "the request arrived too slowly") from error
            raise
        return body

    @torch.no_grad()
    def _answer(self, body: FileIO) -> bytes:
        try:
            request = wire.unpack(body, self._options.limit)
            told = {"id": request.about.id, "reward": self._info.reward, "components": self._components(request)}
            return to_json(told).encode()
        except ValueError as error:
            raise HTTPException(422, printable(str(error))) from error
        except HTTPException:
            raise
        except Exception as error:  # no room for what is decoded, say; the next request may fit
            LOG.error("a request failed", exc_info=error)
            raise HTTPException(500, f"the server failed: {printable(str(error))}") from error

    def _components(self, request: wire.Request) -> dict[str, list[float]]:
        about, name, takes = request.about, self._info.name, self._info.takes
        if about.kind not in kinds(takes):
            raise ValueError(f"{name} takes {takes.kind}, not {about.kind}")
        parts, size = [], request.count if self._info.compares else self._options.batch
        for start in range(0, request.count, size):
            rows = slice(start, start + size)
            columns = {key: values[rows] for key, values in about.columns.items()}
            with request.inputs(rows) as inputs:
                parts.append(self._called(inputs, about.prompts[rows], columns))
        if any(set(part) != set(parts[0]) for part in parts):
            raise HTTPException(500, f"{name} failed: it returns other components for some videos than for others")
        return {key: [value for part in parts for value in part[key]] for key in parts[0]}

    def _called(self, inputs: Any, prompts: list[str], columns: dict[str, list[Any]]) -> dict[str, list[float]]:
        """Call the reward; even one that wants to exit ends no server."""
        name = self._info.name
        try:
            values: Any = self._reward(inputs, prompts, **columns)
        except Transient as error:
            after = {"Retry-After": f"{error.after or 1:.0f}"}
            raise HTTPException(503, f"{name}: {printable(str(error))}", after) from error
        except ValueError as error:
            raise ValueError(f"{name} refused its input: {printable(str(error))}") from error
        except BaseException as error:
            LOG.error("the reward failed", exc_info=error)
            raise HTTPException(500, printable(f"{name} failed: {type(error).__name__}: {error}")) from error
        try:
            return checked_values(values, len(prompts))
        except ValueError as error:
            raise HTTPException(500, printable(f"{name} failed: {error}")) from error


class Server(uvicorn.Server):
    """Says when it serves; at its end, tells those that wait to go elsewhere, and waits for what is computed."""

    service: Service
    announcement: str

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.announcement, flush=True)  # from now on signals end it well

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.close()
        await super().shutdown(sockets)


def listen(options: Options) -> socket.socket:
    """Listen on the address; clients that come before the reward is loaded wait for it.

    Raises:
        UserError: the address is taken, or not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.create_server((options.host, options.port), family=family)
    except (OSError, ValueError, TypeError) as error:  # the latter two of names that cannot be looked up
        said = f"cannot listen on {options.host}:{options.port}: {system_reason(error).partition(' (while')[0]}"
        raise UserError(f"{said}; choose another --port or --host") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else each answer waits 40 ms for an ACK
    return listener


def serve_on(listener: socket.socket, reward: Reward, name: str, version: str, options: Options, token: str) -> None:
    """Serve a reward until SIGTERM or SIGINT; what is computed then is answered still.

    A reward that people look at adds its page to the application (`add_page`).
    """
    if declared(reward, "hears", False):
        raise UserError(f"{name} hears, and requests bring no sound; name it in the recipe instead")
    bounds, takes = tuple(declared(reward, "score_range") or ()) or None, takes_of(reward)
    more = {"compares": declared(reward, "compares", False), "patience": declared(reward, "patience")}
    more["watches"] = [*declared(reward, "watches", ())]
    info = wire.Info(name=name, version=version, takes=takes, score_range=bounds, max_bytes=options.limit, **more)
    service = Service(reward, info, options, token)
    application = service.application()
    declared(reward, "add_page", lambda app: None)(application)
    settings: dict[str, Any] = {"log_config": None, "log_level": "error", "access_log": False, "lifespan": "off"}
    settings |= {"http": Connection, "timeout_keep_alive": options.arrival_seconds, "ws": "none"}
    server = Server(uvicorn.Config(application, **settings))
    host, port = listener.getsockname()[:2]
    server.announcement = f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}"
    server.service = service
    for number in SIGNALS:  # uvicorn raises them anew once it has ended well
        signal.signal(number, lambda *_: None)
    server.run([listener])
    for number in SIGNALS:  # another one ends the wait for a reward that hangs
        signal.signal(number, signal.SIG_DFL)
    service.close(wait=True)  # a thread that frees tensors while the interpreter ends aborts the process


def serve(name: str, args: Sequence[str], options: Options) -> None:
    """Load a reward, by its name in a recipe or `motion:amount`, with arguments `key=value`, and serve it.

    Raises:
        UserError: no such reward, argument or token, or an address that cannot be listened on.
    """
    if name.startswith(("http://", "https://")):
        raise UserError(f"{name} is a server already; serve a reward by its name")
    settings: dict[str, Any] = {}
    for arg in args:
        settings = merge_choices(settings, parse_override(arg))
    load_and_serve(full_name(name), name, settings, options)


def load_and_serve(call: str, name: str, settings: Mapping[str, Any], options: Options) -> None:
    """Load the reward `call` with these arguments and serve it; `name` is what sentences call it.

    Raises:
        UserError: as `serve`.
    """
    token = token_of(options.token_env, TOKEN)
    with listen(options) as listener:  # before the reward is loaded, which may take minutes
        reward = bind(load_reward(call, name), settings, name)
        if not is_loopback(options.host) and not token:
            LOG.warning("anybody who reaches %s can use this server; set %s to a token", options.host, TOKEN)
        serve_on(listener, reward, call, version_of(call, settings), options, token)


def version_of(call: str, settings: Mapping[str, Any]) -> str:
    """Tells releases and settings of a loaded reward apart: the package's version, a digest of its file and `args`."""
    release = sys.modules["flashgrpo"].__version__  # not imported, as the package lies above this file
    module = call.rpartition(":")[0]
    file = module if module.endswith(".py") else sys.modules[module].__file__
    source = Path(file).read_bytes() if file else b""
    settled = json.dumps(settings, sort_keys=True, default=str).encode()
    return f"{release}+{hashlib.sha256(source + b'|' + settled).hexdigest()[:12]}"

"""A reward behind HTTP: `flashgrpo reward serve NAME`. The other end is `client.py`."""

import asyncio
import hashlib
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashgrpo.config.recipe import merge_choices, parse_override
from flashgrpo.errors import UserError, install_hint, printable
from flashgrpo.scoring.loading import bind, declared, load_reward, takes_of
from flashgrpo.scoring.names import full_name
from flashgrpo.serving.client import TOKEN
from flashgrpo.serving.http import is_loopback, token_of
from flashgrpo.serving.messages import FORMAT, Info
from flashgrpo.serving.service import Options, Scorer, Service, application

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as missing:
    raise UserError(f"a reward server needs FastAPI and uvicorn: {install_hint('server')}") from missing

LOG = logging.getLogger("flashgrpo")


class Connection(H11Protocol):
    """Closes a connection on which the head of a request does not arrive in time, the first one or a later one."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Start the clock when a head is waited for, once for all its bytes, and stop it when it is whole."""
        if self.conn.their_state is h11.IDLE:
            self._deadline = self._deadline or self.loop.call_later(self.timeout_keep_alive, self.transport.close)
        elif self._deadline:
            self._deadline.cancel()
            self._deadline = None


class Server(uvicorn.Server):
    """Says when it listens; at its end, tells those that wait to go elsewhere, and waits for what is computed."""

    def __init__(self, config: uvicorn.Config, scorer: Scorer) -> None:
        super().__init__(config)
        self.scorer = scorer
        self.announcement = ""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, and return."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them anew once it has ended well
                signal.signal(number, lambda *_: None)
        super().run(sockets)
        self.scorer.join(seconds=5)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # two may bind one port before the first of them listens
            raise _cannot_listen(self.config.host, self.config.port, error) from error
        if self.announcement:
            print(self.announcement, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.scorer.close()
        await super().shutdown(sockets)


def make_server(reward: Any, name: str, version: str, options: Options) -> Server:
    """Make a server of a reward, to be run with a bound socket.

    Raises:
        UserError: there is no token where `options` says that there is one.
    """
    bounds = declared(reward, "score_range")
    info = Info(
        format=FORMAT,
        name=name,
        version=version,
        takes=takes_of(reward),
        score_range=None if bounds is None else tuple(bounds),
        max_bytes=options.limit,
    )
    token = token_of(options.token_env, TOKEN)
    scorer = Scorer(reward, info, options)
    config = uvicorn.Config(
        application(Service(scorer, info, options, token)),
        options.host,
        options.port,
        http=Connection,
        ws="none",
        timeout_keep_alive=options.arrival_seconds,
        log_config=None,
        log_level="error",
        access_log=False,
        lifespan="off",
    )
    return Server(config, scorer)


def serve(name: str, args: Sequence[str], options: Options) -> None:
    """Load a reward and serve it until SIGTERM or SIGINT; what is computed then is answered still.

    Args:
        name: `clip:clip_score` for `flashgrpo.rewards.clip:clip_score`, any `package.module:function`, or
            `path/to/file.py:function`; a class in place of a function too.
        args: the reward's arguments, `key=value` each.

    Raises:
        UserError: no such reward or argument, or an address that cannot be listened on.
    """
    if name.startswith(("http://", "https://")):
        raise UserError(f"{name} is a server already; serve a reward by its name")
    token = token_of(options.token_env, TOKEN)
    call = full_name(name)
    settings: dict[str, Any] = {}
    for arg in args:
        settings = merge_choices(settings, parse_override(arg))
    with bound(options) as listener:  # before the reward is loaded, which may take minutes
        reward = bind(load_reward(call, name), settings, name)
        server = make_server(reward, call, version_of(call, settings), options)
        if not is_loopback(options.host) and not token:
            LOG.warning("anybody who reaches %s can use this server; set %s to a token", options.host, TOKEN)
        host, port = listener.getsockname()[:2]
        server.announcement = f"serving {call} at http://{f'[{host}]' if ':' in host else host}:{port}"
        server.run([listener])


def version_of(call: str, settings: Mapping[str, Any]) -> str:
    """Tells releases and settings of a loaded reward apart: the package's version, a digest of its file and `args`."""
    release = sys.modules["flashgrpo"].__version__  # not imported, as the package lies above this file
    module = call.rpartition(":")[0]
    file = module if module.endswith(".py") else sys.modules[module].__file__
    source = Path(file).read_bytes() if file else b""
    settled = json.dumps(settings, sort_keys=True, default=str).encode()
    return f"{release}+{hashlib.sha256(source + b'|' + settled).hexdigest()[:12]}"


def bound(options: Options) -> socket.socket:
    """Bind a socket to the address; it does not listen yet: clients see that there is no server so far.

    Raises:
        UserError: the address is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # Asyncio sends at once (TCP_NODELAY) only where the protocol is named; else each answer waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
    except (OSError, ValueError, TypeError) as error:  # the latter two of names that cannot be looked up
        listener.close()
        raise _cannot_listen(options.host, options.port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: Exception) -> UserError:
    reason = printable(getattr(error, "strerror", None) or str(error)).lower()
    return UserError(f"cannot listen on {host}:{port}: {reason}; choose another --port or --host")

"""A reward behind HTTP: `flashgrpo reward serve NAME`. The other end is `client.py`."""

import asyncio
import contextlib
import hashlib
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h11  # `service` says what is missing
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flashgrpo.config.recipe import merge_choices, parse_override
from flashgrpo.errors import UserError, system_reason
from flashgrpo.scoring.loading import bind, declared, load_reward, takes_of
from flashgrpo.scoring.names import full_name
from flashgrpo.serving.client import TOKEN
from flashgrpo.serving.http import is_loopback, token_of
from flashgrpo.serving.messages import FORMAT, Info
from flashgrpo.serving.service import Options, Service

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
    """Says when it serves; at its end, tells those that wait to go elsewhere, and waits for what is computed."""

    announcement = ""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, and return."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them anew once it has ended well
                signal.signal(number, lambda *_: None)
        super().run(sockets)
        self.service.join(seconds=5)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.announcement:  # from now on signals end it well
            print(self.announcement, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.close()
        await super().shutdown(sockets)


def make_server(reward: Any, name: str, version: str, options: Options) -> Server:
    """Make a server of a reward, to be run with a bound socket.

    Raises:
        UserError: there is no token where `options` says that there is one.
    """
    bounds = declared(reward, "score_range")
    about: dict[str, Any] = {"name": name, "version": version, "takes": takes_of(reward)}
    info = Info(**about, score_range=bounds and tuple(bounds), format=FORMAT, max_bytes=options.limit)
    service = Service(reward, info, options, token_of(options.token_env, TOKEN))
    quiet: dict[str, Any] = {"log_config": None, "log_level": "error", "access_log": False}
    quiet |= {"http": Connection, "timeout_keep_alive": options.arrival_seconds, "ws": "none", "lifespan": "off"}
    return Server(uvicorn.Config(service.application(), **quiet), service)


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
        with _explained(options):  # two may bind one port before the first of them listens
            listener.listen()
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
    with contextlib.ExitStack() as failing, _explained(options):
        failing.callback(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        failing.pop_all()
    return listener


@contextlib.contextmanager
def _explained(options: Options) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:  # the latter two of names that cannot be looked up
        where = f"cannot listen on {options.host}:{options.port}"
        raise UserError(f"{where}: {system_reason(error)}; choose another --port or --host") from error

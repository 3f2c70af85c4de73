"""A reward behind HTTP: `flashgrpo reward serve NAME`. The other end is `client.py`."""

import hashlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashgrpo.config.recipe import merge_choices, parse_override
from flashgrpo.errors import UserError
from flashgrpo.scoring.loading import bind, declared, load_reward, takes_of
from flashgrpo.scoring.names import full_name
from flashgrpo.serving.answers import FORMAT, Info
from flashgrpo.serving.batching import Batcher
from flashgrpo.serving.http import is_loopback
from flashgrpo.serving.service import Options, Service, application

try:
    import uvicorn
except ImportError as missing:
    raise UserError("a reward server needs FastAPI and uvicorn: pip install 'flash-grpo[server]'") from missing

LOG = logging.getLogger("flashgrpo")


class Server(uvicorn.Server):
    """Says when it listens; at its end, tells those that wait to go elsewhere, and waits for what is computed."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher) -> None:
        super().__init__(config)
        self.batcher = batcher
        self.announcement = ""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, and return."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them anew once it has ended well
                signal.signal(number, lambda *_: None)
        super().run(sockets)
        self.batcher.join(seconds=5)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # two may bind one port before the first of them listens
            raise _cannot_listen(self.config.host, self.config.port, error) from error
        if self.announcement:
            print(self.announcement, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.batcher.close()
        await super().shutdown(sockets)


def make_server(reward: Any, name: str, version: str, options: Options) -> Server:
    """Make a server of a reward, to be run with a bound socket."""
    token = os.environ.get(options.token_env, "").strip()
    limit = int(options.max_mib * 2**20)
    bounds = declared(reward, "score_range")
    info = Info(
        format=FORMAT,
        name=name,
        version=version,
        takes=takes_of(reward),
        score_range=None if bounds is None else tuple(bounds),
        max_bytes=limit,
    )
    batcher = Batcher(reward, options.batch, limit)
    app = application(Service(batcher, info, options, token))
    config = uvicorn.Config(
        app, options.host, options.port, log_config=None, log_level="warning", access_log=False, lifespan="off"
    )
    return Server(config, batcher)


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
    call = full_name(name)
    settings: dict[str, Any] = {}
    for arg in args:
        settings = merge_choices(settings, parse_override(arg))
    with bound(options) as listener:  # before the reward is loaded, which may take minutes
        reward = bind(load_reward(call, name), settings, name)
        server = make_server(reward, call, version_of(call, settings), options)
        if not is_loopback(options.host) and not os.environ.get(options.token_env):
            lets_in = "anybody who reaches %s can use this server; set %s to a token"
            LOG.warning(lets_in, options.host, options.token_env)
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
    except OSError as error:
        listener.close()
        raise _cannot_listen(options.host, options.port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
    reason = (error.strerror or str(error)).lower()
    return UserError(f"cannot listen on {host}:{port}: {reason}; choose another --port")

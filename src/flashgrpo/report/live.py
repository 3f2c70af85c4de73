"""`flashgrpo watch`: the report's page, drawn again from the files of a run whenever they change.

A server on this machine's own address that keeps nothing: each request reads the run directory, and server-sent events
say that its files have another size or time. The page then asks for itself and replaces the sections that differ.
"""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from flashgrpo.errors import UserError, system_reason
from flashgrpo.report import render
from flashgrpo.report.page import template
from flashgrpo.report.record import read_run
from flashgrpo.report.samples import file_bytes
from flashgrpo.serving.local import HOST, names_of

LOOK_EVERY = 1.0  # seconds between two looks at the files
ALIVE_EVERY = 15  # looks after which a connection without news is told so, which finds out that it is closed
REST = 4  # times as long as a page took to draw, it stays as it is: drawing takes a fifth of a core at the most
FILES = ("config.yaml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "confirmation.json")
TYPES = {".mp4": "video/mp4", ".png": "image/png", ".txt": "text/plain; charset=utf-8"}
Stamp = tuple[tuple[int, int], ...]

_drawing = threading.Lock()  # matplotlib draws for one thread at a time
_rests: dict[Path, float] = {}  # run -> when its page may be drawn again


class Server(ThreadingHTTPServer):
    """Serves the pages of some runs until `shutdown`."""

    daemon_threads = True

    def __init__(self, runs: Sequence[Path], port: int = 0) -> None:
        self.runs, self.ended = tuple(runs), threading.Event()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UserError(f"--port: {port} cannot be listened on ({system_reason(error)}); choose another") from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def shutdown(self) -> None:
        """End, with the connections that wait for events."""
        self.ended.set()
        super().shutdown()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over a browser that has gone; anything else is told as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """`/` is the page of all runs; `/N/` that of one, `/N/events` its news, `/N/videos/...` its media."""

    server: Server

    def do_GET(self) -> None:
        """Answer."""
        if self.headers.get("Host", "") not in names_of(self.server.server_address[1]):
            return self.send_error(HTTPStatus.FORBIDDEN, "Another host's name")
        path = unquote(urlsplit(self.path).path)
        if path == "/" and len(self.server.runs) == 1:
            return self._elsewhere("/0/")
        if path == "/":
            return self._answer(index(self.server.runs).encode(), "text/html; charset=utf-8")
        number, _, rest = path.removeprefix("/").partition("/")
        if not number.isdecimal() or int(number) >= len(self.server.runs):
            return self.send_error(HTTPStatus.NOT_FOUND)
        run = self.server.runs[int(number)]
        if rest == "events":
            return self._events(run)
        if rest:
            return self._medium(run, rest)
        self._answer(page(run, stamp(run)).encode(), "text/html; charset=utf-8")

    def _elsewhere(self, path: str) -> None:
        self.send_response(HTTPStatus.FOUND)
        self.send_header("Location", path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _medium(self, run: Path, name: str) -> None:
        data = file_bytes(run, name)
        if data is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        self._answer(data, TYPES[Path(name).suffix])

    def _events(self, run: Path) -> None:
        """Tell of every change until the browser or the server leaves."""
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        before: Stamp | None = None
        looks = 0
        while not self.server.ended.wait(LOOK_EVERY if before is not None else 0):
            now, looks = stamp(run), looks + 1
            if before is not None and now != before and not rested(run):
                continue  # told at a later look
            if now != before:
                self.wfile.write(b"data: changed\n\n")
            elif looks % ALIVE_EVERY == 0:
                self.wfile.write(b": nothing new\n\n")
            before = now

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is the run's."""


def stamp(run: Path) -> Stamp:
    """Return time and size of each file that the page is made from."""
    found = []
    for name in FILES:
        try:
            status = (run / name).stat()
            found.append((status.st_mtime_ns, status.st_size))
        except OSError:
            found.append((0, 0))
    return tuple(found)


@lru_cache(maxsize=16)
def page(run: Path, at: Stamp) -> str:
    """Return the page of a run as its files are; two browsers that look at the same files share one drawing."""
    with _drawing:
        started = time.monotonic()
        try:
            return render(read_run(run), live=True)
        except UserError as error:  # it has not begun
            return template("waiting.html.j2").render(name=run.name, why=str(error))
        finally:
            ended = time.monotonic()
            _rests[run] = ended + REST * (ended - started)


def rested(run: Path) -> bool:
    """Whether browsers may be told to ask for a run's page again."""
    return time.monotonic() >= _rests.get(run, 0.0)


def index(runs: Sequence[Path]) -> str:
    """Return the page that holds those of the runs side by side, each a frame of its own."""
    return template("runs.html.j2").render(names=[run.resolve().name for run in runs])


def watch(runs: Sequence[Path], port: int) -> None:
    """Serve the pages of some runs until an interrupt; those that have not begun are waited for.

    Raises:
        UserError: a path is a file, or the port is taken.
    """
    for run in runs:
        if run.is_file():
            raise UserError(f"{run} is a file, not the folder of a run")
    with Server(runs, port) as server:
        print(f"watching at {server.url} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
        server.ended.set()


@contextlib.contextmanager
def watching(run: Path) -> Iterator[None]:
    """Serve the page of a run from a process of its own while the block runs, so that drawing takes no time from it."""
    server = subprocess.Popen([sys.executable, "-m", "flashgrpo", "watch", str(run)], stdout=sys.stderr)
    try:
        yield
    finally:
        server.terminate()
        server.wait()

"""Standard output and error that may be full, closed, or read by nobody any more: a run outlives its spectators."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from flashgrpo.errors import UserError, system_reason


class Outlet:
    """A text stream that loses what can no longer be written; everything else is the stream's own.

    At the first error its file descriptor becomes that of /dev/null, so that libraries and programs that write to it
    by themselves do not fail either. A reader that cannot keep up with a stream that does not wait loses a piece only.

    Attributes:
        lost: the first error, but for that of a reader that has gone, such as `head`, because it has read enough.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, or lose it."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Pass on what was written, or lose it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            self.lost = self.lost or error
        if isinstance(error, BlockingIOError):
            return
        with contextlib.suppress(OSError, ValueError):  # a stream of a program's own, without a descriptor
            _to_nowhere(self._stream.fileno())
            self._stream.flush()


@contextlib.contextmanager
def outlets() -> Iterator[None]:
    """Put an `Outlet` in the place of standard output and error inside of this context."""
    before = sys.stdout, sys.stderr
    for number in range(3):  # Python has no stream for a descriptor that is closed, and the next file would get it
        try:
            os.fstat(number)
        except OSError:
            _to_nowhere(number)
    sys.stdout, sys.stderr = (Outlet(stream or open(os.devnull, "w", encoding="utf-8")) for stream in before)  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def check_arrived() -> None:
    """Check that all that was printed has arrived, for a command that gives nothing else.

    Raises:
        UserError: it has not.
    """
    sys.stdout.flush()
    if lost := getattr(sys.stdout, "lost", None):
        raise UserError(f"the result cannot be written to standard output: {system_reason(lost)}")


def _to_nowhere(number: int) -> None:
    """Make a file descriptor that of /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)

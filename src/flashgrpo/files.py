"""Files and folders that appear whole or not at all: written aside, flushed to disk, renamed."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flashgrpo.errors import UserError, first_line, system_reason
from flashgrpo.jsontext import read_json, to_json
from flashgrpo.settings import expand_home

PACKAGE = Path(__file__).parent
SHIPPED = (PACKAGE / "models", PACKAGE / "shipped", PACKAGE.parent.parent)
"""Where the package's own files lie: installed, and in a checkout."""

UNSUPPORTED = {
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY, errno.EBADF),
    *(errno.EACCES, errno.EPERM, errno.EISDIR),
}
"""What a file system answers that has no locks, or does not flush a folder: it took the bytes, and that has to do."""


def resolve_path(path: str) -> str:
    """`flashgrpo:NAME` is a file or folder that ships with the package (prompts/train.txt); else the path itself."""
    head, colon, tail = path.partition("flashgrpo:")
    if head or not colon:
        return path
    return str(next((folder / tail for folder in SHIPPED if (folder / tail).exists()), SHIPPED[0] / tail))


def cache_folder(otherwise: Path | None = None, say: Callable[[str], None] = lambda _: None) -> Path:
    """Return `$FLASHGRPO_CACHE`, or `~/.cache/flashgrpo` where it is not set.

    Args:
        otherwise: taken where there is no home that can be written, as of a container's user that has no name.
        say: told of that.

    Raises:
        UserError: it cannot be written, and `otherwise` is not given, or the variable names it.
    """
    named = os.environ.get("FLASHGRPO_CACHE")
    try:
        folder = Path(expand_home(named or "~/.cache/flashgrpo"))
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        reason = system_reason(error).partition(";")[0]
        if named or otherwise is None:
            what = f"FLASHGRPO_CACHE: {named}" if named else "~/.cache/flashgrpo"
            raise UserError(f"{what} cannot be written ({reason}); set FLASHGRPO_CACHE to a folder that can") from error
        say(f"~/.cache/flashgrpo cannot be written ({reason}), so the cache is {otherwise}; FLASHGRPO_CACHE moves it")
        return otherwise
    return folder


@contextlib.contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, to be made a file or a folder; on success it takes the place of `path`.

    A crash at any moment leaves either the old `path` or the new one (of a folder that is replaced, for an instant
    neither), and at worst a hidden `.partial-NAME` beside it, which the next write removes. A full disk becomes a
    `UserError` and leaves `path` as it was.
    """
    aside = make_room_aside(path)
    try:
        with explain_os_errors(path):
            yield aside
        publish(path)
    except BaseException:
        discard_aside(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, as `write_aside` does."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write strict JSON into a file, whole or not at all."""
    write_text(path, to_json(value, indent) + "\n")


def make_room_aside(path: Path) -> Path:
    """Return the name to write `path` under until it is whole, after removing what was there."""
    aside = path.with_name(f".partial-{path.name}")  # the ending stays: encoders go by it
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _delete(aside)
    return aside


def discard_aside(path: Path) -> None:
    """Remove what was written aside of `path`, as far as that is possible."""
    with contextlib.suppress(OSError):
        _delete(path.with_name(f".partial-{path.name}"))


def publish(path: Path) -> None:
    """Flush to disk what was written aside of `path`, and give it its name."""
    aside = path.with_name(f".partial-{path.name}")
    with explain_os_errors(path):
        for file in [*sorted(aside.rglob("*")), aside]:
            flush_to_disk(file)
        if path.is_dir() and aside.is_dir():  # a folder cannot be renamed over another
            remove(path)
        os.replace(aside, path)
        flush_to_disk(path.parent)


def read_text(path: Path) -> str:
    """Read a text file that a run wrote, whatever bytes a power cut has left in it.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {system_reason(error)}") from error


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to disk.

    A full disk leaves the file as it was, a kill at most one line without its newline.
    """
    assert "\n" not in line
    with explain_os_errors(path):
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(line.encode() + b"\n")
            flush_to_disk(path)  # before a checkpoint knows of the line
            if not size:
                flush_to_disk(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        value = read_json(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {system_reason(error)}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); put it back, or remove it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object); put it back, or remove it")
    return value


def lock(file: Any, warn: Callable[[str], None] = lambda _: None, *, shared: bool = False, wait: bool = False) -> bool:
    """Take the lock of an open file, exclusive or shared; returns whether no other process holds it.

    The system releases it when the file is closed, also after kill -9. A file system without locks keeps nobody out,
    and `warn` is told.

    Args:
        shared: with others that share it.
        wait: until it is free.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        reason = system_reason(error)
        warn(f"{file.name} cannot be locked ({reason}), so nothing keeps a second process out of its folder")
    return True


def remove(path: Path) -> None:
    """Delete a file or folder in one step: under its name it is there whole or not at all."""
    with explain_os_errors(path):
        aside = path.with_name(f".removed-{path.name}")
        _delete(aside)
        os.replace(path, aside)
        _delete(aside)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left below a folder, as far as that is possible."""
    for leftover in (*folder.rglob(".partial-*"), *folder.rglob(".removed-*")):
        with contextlib.suppress(OSError):
            _delete(leftover)


@contextlib.contextmanager
def explain_os_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses (no room, no permission, not a folder) into one sentence about `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system said in an error of its own
        raise UserError(f"cannot write {path}: {system_reason(error)}") from error


@contextlib.contextmanager
def explain_damage(file: Path, advice: str) -> Iterator[None]:
    """Turn what goes wrong with what was read from a file, where an entry is missing or of another kind, into one
    sentence about it.

    Args:
        advice: what gets the file whole again.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged ({type(error).__name__}: {first_line(error)}); {advice}") from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk, where the file system has such a call."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

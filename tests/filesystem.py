"""A file system that fails: what a test does below a folder gets the answers of a full, damaged or odd disk.

Every call of Python that opens, makes, renames, removes or locks is met by an audit hook, and flushes by a patch of
`os.fsync`. ffmpeg, safetensors and what torch writes by itself use none of them: `limited` is a limit of the operating
system on the size of files, which stops all of them in the middle of a write.
"""

import errno
import os
import resource
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

MEETS = {
    "open": "open",
    "os.mkdir": "make",
    "os.rename": "rename",
    "os.remove": "remove",
    "os.rmdir": "remove",
    "shutil.rmtree": "remove",
    "os.truncate": "truncate",
    "fcntl.flock": "lock",
}
"""Event of `sys.addaudithook` -> what a fault calls it."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Fault:
    """What the operating system answers to some calls.

    Args:
        number: the name of the error, of `errno`; or death, which ends the process without a word.
        calls: those that it answers: open (to write), read, make, rename, remove, truncate, lock, flush, flush folder.
        at: only these paths below the folder, as a pattern; a file that is written aside has its later name.
        after: calls that go well before.
        times: calls that fail; None is all from then on.
    """

    number: str
    calls: Sequence[str]
    at: str = "*"
    after: int = 0
    times: int | None = None

    def __str__(self) -> str:
        return f"{self.number} {'+'.join(self.calls)} {self.at} {self.after}".replace("/", "-")


def no_space(at: str = "*", after: int = 0) -> Fault:
    """A disk that is full from a call on: what is there can be read and removed."""
    return Fault("ENOSPC", ("open", "make", "flush"), at, after)


def death(after: int) -> Fault:
    """The end of the process, as kill -9 would have it, in place of a call that changes something."""
    return Fault("death", ("open", "make", "rename", "remove", "truncate", "flush", "flush folder"), after=after)


def read_only(after: int = 0) -> Fault:
    """A file system that is mounted for reading only, from a call on: so Linux does when a disk is damaged."""
    return Fault("EROFS", ("open", "make", "rename", "remove", "truncate"), "*", after)


def bad_write(at: str = "*", after: int = 0) -> Fault:
    """One call that the disk does not carry out."""
    return Fault("EIO", ("open", "make", "rename", "flush", "flush folder"), at, after, times=1)


def unreadable(at: str) -> Fault:
    """Files that are there and cannot be read."""
    return Fault("EIO", ("read",), at)


class Disk:
    """The calls that a fault has met below a folder."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self._folder, self._fault = os.path.realpath(folder), fault
        self.seen: list[str] = []
        self.refused: list[str] = []

    def meet(self, call: str, path: object) -> None:
        """Raise what the fault says of a call, where it is one of those that fail."""
        fault, inside = self._fault, self._inside(path)
        if inside is None or call not in fault.calls or not fnmatch(inside, fault.at):
            return
        if os.path.lexists(str(path)) == (call == "make") and call in ("make", "remove"):
            return  # for which the system has another answer
        self.seen.append(f"{call} {inside}")
        if len(self.seen) > fault.after and (fault.times is None or len(self.refused) < fault.times):
            self.refused.append(self.seen[-1])
            if fault.number == "death":
                os._exit(9)
            number = getattr(errno, fault.number)
            raise OSError(number, os.strerror(number), str(path))

    def _inside(self, path: object) -> str | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        text = os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        inside = os.path.relpath(text, self._folder).replace(".partial-", "")
        return None if inside.startswith("..") else inside


_disks: list[Disk] = []
_hooked = False


@contextmanager
def failing(folder: Path, fault: Fault) -> Iterator[Disk]:
    """Give what is done below `folder` inside of this context the answers of a fault."""
    real, disk = os.fsync, Disk(folder, fault)

    def fsync(file: int) -> None:
        disk.meet("flush folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "flush", file)
        real(file)

    _hook()
    os.fsync = fsync
    _disks.append(disk)
    try:
        yield disk
    finally:
        _disks.remove(disk)
        os.fsync = real


def _hook() -> None:
    """Begin to listen, once: an audit hook stays as long as the process."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_heard)
        _hooked = True


def _heard(event: str, found: tuple) -> None:
    for disk in list(_disks) if event in MEETS else ():
        reads = event == "open" and not (isinstance(found[2], int) and found[2] & WRITING)
        disk.meet("read" if reads else MEETS[event], found[1] if event == "os.rename" else found[0])


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Let no file grow beyond a number of bytes inside of this context; programs that it starts are limited, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

"""The exceptions that are the user's to fix, and the words of their sentences."""

import difflib
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder of the project, where the package is used from a checkout."""


MOST_NAMES = 20  # told in one sentence


class UserError(ValueError):
    """A mistake of the user's, told in one sentence that names the place and the fix.

    The command line prints it without a traceback and exits with code 2; everything else that is raised is a bug.

    Attributes:
        told: another process of the run prints it, so this one need not.
    """

    told = False


class SharedError(UserError):
    """A `UserError` that every process of a run raises at the same place, so that they can still save together."""


class Interrupted(SystemExit):
    """A signal ended a run before its last update; what is done is in a checkpoint.

    Its exit code is what shells and schedulers expect of a process that a signal ends: 130 after SIGINT (Ctrl-C), 143
    after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?', or the known names where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    more = f" and {len(known) - MOST_NAMES} more" if len(known) > MOST_NAMES else ""
    return f"known are {', '.join(known[:MOST_NAMES])}{more}" if known else "none is known"


def first_line(error: BaseException) -> str:
    """Return an exception's text on one line."""
    return " ".join(str(error).split("\n")[0].split())


def shorten(text: str, most: int) -> str:
    """Cut a text of more letters between two words."""
    return textwrap.shorten(text, most, placeholder=" ...")


def system_reason(error: BaseException) -> str:
    """Return what the operating system, or a library that passed it on, gives as the reason, in lower case."""
    reason = getattr(error, "strerror", None) or first_line(error) or type(error).__name__
    return f"{reason[:1].lower()}{reason[1:]}"


def launcher_number(name: str, default: int) -> int:
    """Return a number that a launcher puts into the environment: RANK, WORLD_SIZE and the like.

    Raises:
        UserError: the variable holds something else.
    """
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(
            f"the environment variable {name} is {printable(text)!r} where a launcher puts a whole number; unset it, "
            "or start with torchrun"
        )
    return int(text)


def install_hint(extra: str) -> str:
    """Return the command that installs an extra of the package where it is used.

    In a checkout it is `pip install -e '.[data]'`. Elsewhere it names the packages: no index has to have this one.
    """
    if (CHECKOUT / "pyproject.toml").is_file():
        folder = "." if Path(os.path.realpath(os.curdir)) == CHECKOUT else CHECKOUT
        return f"pip install -e '{folder}[{extra}]'"
    lines = [line.partition(";") for line in metadata.requires("flash-grpo") or ()]
    return f"pip install {' '.join(repr(line[0].strip()) for line in lines if f'extra == {extra!r}' in line[2])}"


def this_command() -> str:
    """Return what has to be typed to call `flashgrpo` again: its path, where the shell would not find it."""
    called = sys.argv[0] if Path(sys.argv[0]).name == "flashgrpo" else "flashgrpo"
    return shlex.quote("flashgrpo" if shutil.which("flashgrpo") else called)


def is_text(text: str) -> bool:
    """Return whether UTF-8 can hold a text: no half of a surrogate pair, which bytes of a command line may become."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def clean(text: str) -> str:
    """Return lines of a sentence without control and escape codes, or halves of characters, that others put there."""
    return "\n".join("".join(c if c.isprintable() else " " for c in line) for line in text.split("\n"))


def printable(text: str, limit: int = 300) -> str:
    """Return a stranger's text as one line without control and escape codes, or halves of characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:limit]

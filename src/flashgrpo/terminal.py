"""Texts between a terminal and the commands, whatever its locale is."""

import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from flashgrpo.errors import UserError, clean, is_text, launcher_number
from flashgrpo.settings import expand_home


def use_utf8() -> None:
    """Make names of files UTF-8 where the locale has no letters but ASCII, and let no letter end a command.

    Python takes the encoding of file names from the locale when it starts, so this process starts once more, in
    Python's UTF-8 mode. It does so by itself in the C locale, unless PYTHONUTF8=0 forbids it. What a terminal with
    another encoding cannot show is written as an escape sequence.
    """
    if sys.getfilesystemencoding() == "ascii" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def prints() -> bool:
    """Return whether this process of a launcher's is the one that prints results."""
    return launcher_number("RANK", 0) == 0


def cell(text: str, style: str = "") -> Text:
    """Return a text for rich as it stands: square brackets in it are no markup."""
    return Text(clean(text), style)


def path_text(text: str | Path) -> str:
    """Read a path of the command line, or what may be one: `~` is the home, as in settings."""
    try:
        return expand_home(str(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def path(text: str | Path) -> Path:
    """Read a path of the command line."""
    return Path(path_text(text))


PATH: dict[str, Any] = {"parser": path, "metavar": "PATH"}
"""Of an option that is a path."""
PATH_TEXT: dict[str, Any] = {"parser": path_text, "metavar": "PATH"}
"""Of one that may be a path."""


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that are no text, which no file could keep.

    Raises:
        UserError: one is no UTF-8.
    """
    for argument in arguments:
        if not is_text(argument):
            shown = "".join(c if is_text(c) else f"\\x{ord(c) & 0xFF:02x}" for c in argument[:200])
            raise UserError(f"the argument '{shown}' is no UTF-8; rename what it names, or type it in UTF-8")

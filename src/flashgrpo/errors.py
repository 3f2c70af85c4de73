"""The exceptions that are the user's to fix, and the words of their sentences."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's, told in one sentence that names the place and the fix.

    The command line prints it without a traceback and exits with code 2; everything else that is raised is a bug.

    Attributes:
        told: another process of the run prints it, so this one need not.
    """

    told = False


class SharedError(UserError):
    """A `UserError` that every process of a run raises at the same place, so that they can still save together."""


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?', or the known names where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """Return an exception's text on one line."""
    return " ".join(str(error).split("\n")[0].split())

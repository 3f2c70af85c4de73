"""What the settings of every part have in common. Each part keeps its own beside what they set, free of torch."""

import os
from collections.abc import Mapping
from itertools import takewhile
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LONGEST_NAME = 255  # bytes of a file's or a folder's name, of every file system of Linux


def expand_home(path: str) -> str:
    """Replace `~` and `~user` at the beginning of a path, or of the folder in `datasets:FOLDER`.

    Raises:
        ValueError: nobody knows the user's home, or the path is none: it holds the character NUL, or is too long.
    """
    if "\0" in path:
        raise ValueError(f"{path!r:.200} is no path, for it holds the character NUL")
    if any(len(name.encode("utf-8", "surrogatepass")) > LONGEST_NAME for name in path.split("/")):
        raise ValueError(f"{path!r:.40}... is no path, for a name in it has more than {LONGEST_NAME} bytes")
    before, colon, name = path.rpartition("datasets:")
    home = os.path.expanduser(name)
    if home.startswith("~"):
        raise ValueError(f"no home is known for {name.split('/')[0]}; write ./{name} if that is its name")
    return before + colon + home


MANY = 1_000_000
"""More than there is of anything that a setting counts; a larger number is a slip, which could take hours to notice."""
LONG = 10_000_000.0
"""Seconds that nothing takes: four months."""
DEFAULT_ADAPTERS = "default"
"""The name of adapters that have no other."""
SMALLEST, LARGEST = 1e-15, 1e9
"""Of every number of a recipe: float32 holds the product of any four of them, and the inverse of any two."""
Count = Annotated[int, Field(ge=1, le=MANY)]

Positive = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]


Number = int | float


def check_number(name: str, value: Number, lowest: Number = SMALLEST, highest: Number = LARGEST) -> None:
    """Check a number of a setting that is the component at once, for callers from Python as well as for recipes.

    Raises:
        ValueError: it is out of its bounds, or NaN.
    """
    if not lowest <= value <= highest:
        raise ValueError(f"{name} must be from {lowest:,.15g} to {highest:,.15g}, not {value!r:.40}")


PathText = Annotated[str, Field(min_length=1, json_schema_extra={"format": "path"}), AfterValidator(expand_home)]
"""A path, or what may be one: a name on the hub, `datasets:NAME`, a reward's `file.py:function`. `~` is the home."""


def describe(schema: dict[str, Any], part: type) -> None:
    """Give each setting of a dataclass the description that stands under `Args:` in its docstring, or in a base's."""
    name, told = "", {"kind": "Which of the choices this is."}
    for line in (line for kind in part.__mro__ for line in _arguments(kind)):
        head, colon, text = line.strip().partition(": ")
        if colon and line[8:9] != " ":
            name, told[head] = head, text
        elif name:
            told[name] += f" {line.strip()}"
    for key, setting in schema.get("properties", {}).items():
        setting.setdefault("description", told.get(key, "").strip())


def _arguments(part: type) -> list[str]:
    """Return the lines under `Args:` of a class's own docstring."""
    lines = (part.__doc__ or "").partition("Args:\n")[2].splitlines()
    return list(takewhile(lambda line: not line.strip() or line.startswith(" " * 8), lines))


FORBID_EXTRA: dict[str, Any] = {"extra": "forbid", "json_schema_extra": describe}
"""Of a dataclass that is a setting and the component at once (`__pydantic_config__`): an unknown key is an error."""


def default_kind(kind: str) -> BeforeValidator:
    """Let one of several choices, which a `kind` tells apart, be meant where none is named."""
    return BeforeValidator(
        lambda given: {"kind": kind, **given} if isinstance(given, Mapping) and "kind" not in given else given
    )


class Part(BaseModel):
    """Settings are immutable and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

"""What the pages share: how templates are read, and charts in two shapes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template, UndefinedError
from jinja2.runtime import missing
from markupsafe import Markup


class Lacking(UndefinedError, LookupError):
    """What a template looks up is not there, at its top or inside of what it was given."""


class Missing(StrictUndefined):
    """What a template lacks; any use of it is an error as a lookup in code is one."""

    def __init__(self, hint: str | None = None, obj: Any = missing, name: str | None = None, exc: Any = None) -> None:
        super().__init__(hint, obj, name, Lacking)


def template(name: str) -> Template:
    """Read a template of this folder; what is put into it is escaped, and what it lacks is a `LookupError`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=Missing,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def both_shapes(draw: Callable[[tuple[int, int]], str], wide: tuple[int, int]) -> dict[str, Markup]:
    """Draw a broad chart twice, for wide screens and for phones, so that its text shrinks on neither."""
    return {"wide": Markup(draw(wide)), "narrow": Markup(draw((380, 260)))}

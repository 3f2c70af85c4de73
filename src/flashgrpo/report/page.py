"""What the pages share: how templates are read, and charts in two shapes."""

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup


def template(name: str) -> Template:
    """Read a template of this folder; what is put into it is escaped, and what it lacks is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def both_shapes(draw: Callable[[tuple[int, int]], str], wide: tuple[int, int]) -> dict[str, Markup]:
    """Draw a broad chart twice, for wide screens and for phones, so that its text shrinks on neither."""
    return {"wide": Markup(draw(wide)), "narrow": Markup(draw((380, 260)))}

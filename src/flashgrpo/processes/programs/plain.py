"""The program that a recipe without one runs: the prompt is answered by one call."""

from collections.abc import Callable
from typing import Any


def answer(prompt: str, call: Callable[[str, str], str], **columns: Any) -> str:
    """Return what the model writes to the prompt."""
    return call("answer", prompt)

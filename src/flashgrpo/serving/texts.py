"""Texts as bytes and back, for a wire: as JSON, of which no text is empty and no character is lost."""

import json


def to_bytes(text: str) -> bytes:
    """Write a text as a JSON string."""
    return json.dumps(text).encode()


def from_bytes(data: bytes | memoryview) -> str:
    """Read what `to_bytes` has written.

    Raises:
        ValueError: it is no JSON string.
    """
    try:
        text = json.loads(bytes(data))
    except (ValueError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError("a text is no JSON string")
    return text

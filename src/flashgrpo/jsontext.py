"""JSON as every reader of it takes it: written without NaN, read without what cannot be written again."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

MOST_DIGITS = 20  # of a whole number with its sign: 64 bits


def to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> str:
    """Write strict JSON: it has no word for a float that is not finite, and null takes its place."""
    return json.dumps(finite(value), indent=indent, allow_nan=False, sort_keys=sort_keys)


def finite(value: Any) -> Any:
    """Return JSON data with None for each float that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def read_json(text: str) -> Any:
    """Read JSON whose texts can be written again, and whose numbers can be calculated with.

    Raises:
        ValueError: it is none, or nested too deeply; a key comes twice, of which libraries differ in the one they take;
            a whole number has more digits than any that is counted; or a text holds half of a surrogate pair.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_whole_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise ValueError(
                f"it holds {half}, half of a character that takes two, as of an emoji that was cut; take it out"
            ) from error
    return value


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Yield number (from 1) and value of each line that is not blank; where it cannot be read, the `ValueError`."""
    for number, line in enumerate(text.split("\n"), 1):  # JSON text may hold U+2028, which splitlines() cuts
        if line.strip():
            try:
                value = read_json(line)
            except ValueError as error:
                value = error
            yield number, value


def _whole_number(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"it holds a whole number of {len(digits)} digits")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return value

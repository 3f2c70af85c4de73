"""Sentences for settings that do not validate."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's words, for models and for dataclasses


def explain(error: ValidationError, schema: Mapping[str, Any]) -> str:
    """The most telling problem of a validation error in one sentence; a misspelt key comes before what it causes."""
    problem = min(error.errors(include_url=False), key=lambda p: p["type"] not in UNKNOWN)
    if problem["type"] in UNKNOWN:
        place, known = _walk(problem["loc"][:-1], schema)
        name = str(problem["loc"][-1])
        return f"unknown key {'.'.join([*place, name])}; {suggest(name, known)}"
    key = ".".join(_walk(problem["loc"], schema)[0])
    if problem["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = problem["type"] != "value_error" and isinstance(given, str | int | float | bool | None)
    return (f"{key}: " if key else "") + message[0].lower() + message[1:] + (f", not {given!r}" if shown else "")


def suggest(name: str, known: Iterable[str]) -> str:
    """'did you mean X?', or the known names where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def first_line(error: BaseException) -> str:
    """An exception's text on one line."""
    return " ".join(str(error).split("\n")[0].split())


def _walk(location: Sequence[Any], schema: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Follow an error's location through the JSON schema: the key as the user writes it, and the keys known there.

    In a union, pydantic's location also names the kind it chose; the user's file has no such level.
    """
    node, key = _resolve(schema, schema), []
    for part in location:
        kinds = node.get("discriminator", {}).get("mapping", {})
        if part in kinds:
            node = _resolve({"$ref": kinds[part]}, schema)
            continue
        key.append(str(part))
        below = node.get("properties", {}).get(part) or node.get("additionalProperties")
        node = _resolve(below if isinstance(below, Mapping) else {}, schema)
    return key, list(node.get("properties", {}))


def _resolve(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow a `$ref` to its definition, and what may be null to what it is otherwise."""
    while "$ref" in node or "anyOf" in node:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        else:
            choices = [choice for choice in node["anyOf"] if choice.get("type") != "null"]
            if len(choices) > 1:
                return node
            node = choices[0]
    return node

"""Sentences for settings that do not validate."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from flashgrpo.config.algorithm import short_name
from flashgrpo.errors import suggest

UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's words, for models and for dataclasses
MISSING = ("missing", "missing_argument")


def explain(error: ValidationError, schema: Mapping[str, Any]) -> str:
    """Tell the most telling problem of a validation error in one sentence.

    A misspelt key comes before what it causes, and so does a wrong kind, which leaves the preset's settings missing.
    """
    problem = min(error.errors(include_url=False), key=lambda p: (p["type"] not in UNKNOWN, p["type"] in MISSING))
    if problem["type"] in UNKNOWN:
        place, known = _follow(problem["loc"][:-1], schema)
        name = str(problem["loc"][-1])
        return f"unknown key {short_name('.'.join([*place, name]))}; {suggest(name, known)}"
    key = short_name(".".join(_follow(problem["loc"], schema)[0]))
    if problem["type"] in MISSING:
        return f"{key} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    shown = problem["type"] != "value_error" and isinstance(given, str | int | float | bool | None)
    return (f"{key}: " if key else "") + message[0].lower() + message[1:] + (f", not {given!r}" if shown else "")


def _follow(location: Sequence[Any], schema: Mapping[str, Any]) -> tuple[list[str], list[str]]:
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
            with_keys = [choice for choice in choices if "$ref" in choice or "properties" in choice]
            if len(with_keys or choices) > 1:
                return node
            node = (with_keys or choices)[0]
    return node

"""Sentences for settings that do not validate."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from flashgrpo.config.algorithm import short_name
from flashgrpo.config.schema import alternatives, kinds_with, known_below, nodes_at
from flashgrpo.errors import suggest

Tree = Mapping[Any, Any]
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")  # pydantic's words, for models and for dataclasses
MISSING = ("missing", "missing_argument")
OF_THE_PROCESS = ("rollout", "evaluation")  # whose kind the algorithm decides
MOST = 8  # mistakes told at once

WORDS: Mapping[str, str] = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list such as [a, b]"),
    **dict.fromkeys(
        ("dict_type", "model_type", "dataclass_type", "model_attributes_type"), "must hold settings, key: value"
    ),
    "finite_number": "must be a finite number",
    **dict.fromkeys(("string_type", "string_unicode"), "must be text"),
    "string_too_short": "must not be empty",
    "literal_error": "must be {expected}",
    "union_tag_invalid": "is of the kind {expected_tags}",
    "union_tag_not_found": "needs a kind",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "needs {min_length} or more, not {actual_length}",
    "too_long": "takes {max_length} at most, not {actual_length}",
}
"""Pydantic's name of a mistake -> what it is to a person."""


def explain(layers: Sequence[tuple[str, Tree]], validate: Callable[[Tree], Any], schema: Tree) -> str:
    """Tell what is wrong with settings that do not validate: a line for each mistake, with what brought it in.

    Args:
        layers: a recipe and then one override after the other: its name, and the settings once it is merged.
        validate: raises the `ValidationError` of settings.
        schema: the JSON schema of what is validated.
    """
    told = [[*_mistakes(tree, validate, schema), *truths(tree, schema)] for _, tree in layers]
    lines = []
    for sentence in told[-1]:
        brought = len(told) - 1
        while brought and sentence in told[brought - 1]:
            brought -= 1
        lines.append(f"{layers[brought][0]}: {sentence}")
    more = [f"and {len(lines) - MOST} mistakes more"] if len(lines) > MOST else []
    return "\n".join(lines[:MOST] + more)


def _mistakes(tree: Tree, validate: Callable[[Tree], Any], schema: Tree) -> list[str]:
    """Return a sentence for each mistake; not for what is only missing because of another one beside it."""
    try:
        validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
    else:
        return []
    found.sort(key=lambda mistake: mistake["type"] not in UNKNOWN)
    wrong = {mistake["loc"][:-1] for mistake in found if mistake["type"] not in MISSING}
    sentences: dict[str, str] = {}  # by key: of a setting that may be one thing or another each is tried
    for mistake in found:
        if mistake["type"] in MISSING and mistake["loc"][:-1] in wrong:
            continue
        keys = _written(mistake["loc"], schema, mistake["type"] in UNKNOWN)
        sentences.setdefault(f"{keys} {mistake['type'] in UNKNOWN}", _sentence(mistake, keys, schema))
    return list(sentences.values())


def truths(tree: Tree, schema: Tree, above: tuple[str, ...] = ()) -> list[str]:
    """Return a sentence for each true or false in place of a number, which pydantic takes for 1 or 0."""
    sentences = []
    for key, value in tree.items():
        keys = (*above, str(key))
        if isinstance(value, Mapping):
            sentences += truths(value, schema, keys)
            continue
        entries = value if isinstance(value, list | tuple) else [value]
        found = [entry for entry in entries if isinstance(entry, bool)]
        if found and _takes_numbers(keys, schema):
            sentences.append(f"{short_name('.'.join(keys))} must be a number, not {_shown(found[0])}")
    return sentences


def _takes_numbers(keys: Sequence[str], schema: Tree) -> bool:
    """Whether a setting, or an entry of it where it is a list, is a number and never true or false."""
    nodes = nodes_at(keys, schema)
    entries = [entry for node in nodes for entry in [*node.get("prefixItems", ()), node.get("items", {})] if entry]
    every = [*nodes, *(node for entry in entries for node in alternatives(entry, schema))]
    types = {node.get("type") for node in every} | {type(c).__name__ for node in every for c in node.get("enum", ())}
    return bool(types & {"number", "integer"}) and not types & {"boolean", "bool"}


def _sentence(mistake: Mapping[str, Any], keys: list[str], schema: Tree) -> str:
    place, given, kind = short_name(".".join(keys)), mistake["input"], mistake["type"]
    if kind in UNKNOWN:
        if kinds := kinds_with(keys, schema):
            above = short_name(".".join(keys[:-1]))
            if above in OF_THE_PROCESS:
                return f"{place} is of {' or '.join(kinds)} models, and algorithm.explore is of others; leave it out"
            return f"{place} is a setting of another kind of {above}; choose {above}.kind={' or '.join(kinds)} for it"
        return f"unknown key {place}; {suggest(keys[-1], known_below(keys[:-1], schema))}"
    if mistake["loc"][-1:] == ("[key]",):
        place = f"a name in {short_name('.'.join(keys[:-1]))}"
    elif keys and keys[-1].isdigit():
        place = f"entry {int(keys[-1]) + 1} of {short_name('.'.join(keys[:-1]))}"
    if kind in MISSING:
        return f"{place} is missing"
    if kind not in WORDS:
        message = mistake["msg"].removeprefix("Value error, ")
        return (f"{place}: " if place else "") + message[0].lower() + message[1:]
    context = {name: _plain(value) for name, value in mistake.get("ctx", {}).items()}
    said = f"{place} {WORDS[kind].format(**context)}"
    if "actual_length" in context:
        return said
    given = context.get("tag", given)
    quotes = "; put it in quotes" if kind == "string_type" and isinstance(given, bool | int | float) else ""
    return f"{said}, not {_shown(given)}{quotes}"


def _plain(value: Any) -> Any:
    """Return a bound as people write it: 1,000 rather than 1e3 or 1000.0."""
    return f"{int(value):,}" if isinstance(value, int | float) and value == int(value) else value


def _shown(given: Any) -> str:
    """Return a value as it would be written, or what it is where it is long."""
    names = {None: "nothing", True: "true", False: "false"}
    if given is None or isinstance(given, bool):
        return names[given]
    if isinstance(given, str | int | float):
        return f"{given!r:.80}"
    return (
        "a list" if isinstance(given, list | tuple) else "settings" if isinstance(given, Mapping) else repr(given)[:80]
    )


def _written(location: Sequence[Any], schema: Tree, unknown: bool) -> list[str]:
    """Return an error's location as the keys that the user wrote, the last of them unknown or not.

    Pydantic also names the kind that it chose, and which of several types it tried; the user's file has no such level.
    """
    nodes, keys = list(alternatives(schema, schema)), []
    for part in location[: len(location) - unknown]:
        below = [node.get("properties", {}).get(part) or node.get("additionalProperties") for node in nodes]
        found = [node for choice in below if isinstance(choice, Mapping) for node in alternatives(choice, schema)]
        if found or isinstance(part, int):
            keys.append(str(part))
            nodes = found
    return keys + [str(part) for part in location[len(location) - unknown :]]

"""What the JSON schema of a recipe says about a key: which settings it has below, and whether it takes text."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Node = Mapping[str, Any]


def alternatives(node: Node, schema: Node) -> Iterator[Node]:
    """Yield what a node may be, with references and choices followed to their ends."""
    if "$ref" in node:
        yield from alternatives(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
    elif "anyOf" in node or "oneOf" in node:
        for choice in node.get("anyOf") or node["oneOf"]:
            yield from alternatives(choice, schema)
    else:
        yield node


def nodes_at(keys: Sequence[str], schema: Node) -> list[Node]:
    """Return what a setting may be; nothing where there is no such setting."""
    nodes = list(alternatives(schema, schema))
    for key in keys:
        below = [node.get("properties", {}).get(key) or node.get("additionalProperties") for node in nodes]
        nodes = [node for choice in below if isinstance(choice, Mapping) for node in alternatives(choice, schema)]
    return nodes


def known_below(keys: Sequence[str], schema: Node) -> list[str]:
    """Return the names of the settings below a key."""
    return list(dict.fromkeys(name for node in nodes_at(keys, schema) for name in node.get("properties", {})))


def kinds_with(keys: Sequence[str], schema: Node) -> list[str]:
    """Return the kinds of what is above a key that have it."""
    properties = [node.get("properties", {}) for node in nodes_at(keys[:-1], schema)]
    return [below["kind"]["const"] for below in properties if keys[-1] in below and "const" in below.get("kind", {})]


def typed_text(keys: Sequence[str], typed: str, schema: Node) -> bool:
    """Whether an override means the text that was typed; `null` means nothing wherever a setting may be nothing."""
    types = {node.get("type") for node in nodes_at(keys, schema)}
    return types == {"string"} or (types == {"string", "null"} and typed != "null")

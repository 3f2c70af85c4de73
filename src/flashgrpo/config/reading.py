"""YAML as recipes are written: 1e-4 is a number, a key comes once, and nothing is interpolated.

A recipe can ask for an environment variable by a tag, `train: !env FLASHGRPO_DATA/train.txt`, and for no other than
those whose names begin with FLASHGRPO_: it may come from a stranger, and send what it reads to a server that it names.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flashgrpo.errors import UserError, is_text

DEEPEST, MOST, LARGEST = 32, 10_000, 2**20  # levels, values, bytes: far more than any recipe has
FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|[-+]?\d[\d_]*[eE][-+]?\d+$|[-+]?\.inf$|\.nan$", re.I
)
VARIABLE = re.compile(r"(FLASHGRPO_[A-Z0-9_]+)(.*)", re.S)


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.1 without dates and with numbers as Python writes them."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if isinstance(key, str | int | float | None) and keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key!r:.80} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def variable(self, node: Any) -> str:
        """Read `!env FLASHGRPO_NAME/and/more`."""
        found = VARIABLE.fullmatch(self.construct_scalar(node))
        if not found or found[1].endswith("TOKEN"):
            raise yaml.MarkedYAMLError(
                problem="!env reads variables that begin with FLASHGRPO_ and are no token", problem_mark=node.start_mark
            )
        if found[1] not in os.environ:
            raise yaml.MarkedYAMLError(problem=f"${found[1]} is not set", problem_mark=node.start_mark)
        return os.environ[found[1]] + found[2]


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads: text that would be a number there is put in quotes."""

    def text(self, value: str) -> Any:
        """Write a text; in double quotes where it holds a line break that YAML would read as another one."""
        return self.represent_scalar("tag:yaml.org,2002:str", value, style='"' if "\x85" in value else None)


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag.rpartition(":")[2] not in ("float", "timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
_Loader.add_constructor("!env", _Loader.variable)
_Dumper.add_representer(str, _Dumper.text)


def read_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        ValueError: it is none, nests without end, or holds what cannot be written down again.
    """
    try:
        tree = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(" ".join(f"{where}{error.problem or error.context}".split())) from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).split("\n")[0]) from error
    except RecursionError as error:
        raise ValueError(f"it nests more than {DEEPEST} levels deep") from error
    check_tree(tree)
    return tree


def write_yaml(tree: Any) -> str:
    """Write settings as YAML; `read_yaml` gives the same tree."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def read_recipe(path: Path) -> dict[Any, Any]:
    """Read a file of settings.

    Raises:
        UserError: it cannot be read, or holds no mapping.
    """
    try:
        content = path.read_bytes()
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        tree = read_yaml(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no readable YAML file: byte {error.start} is no UTF-8") from error
    except ValueError as error:
        raise UserError(f"{path} is no readable YAML file: {error}") from error
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of settings, not {tree!r:.40}")
    return tree or {}


def check_tree(tree: Any) -> None:
    """Refuse a tree without end (YAML's aliases may refer to themselves), and text that no file can hold.

    Raises:
        ValueError: it is too deep or too large, or a text holds half of a surrogate pair.
    """
    todo, count = [(tree, 0)], 0
    while todo:
        node, depth = todo.pop()
        count += 1
        if depth > DEEPEST:
            raise ValueError(f"it nests more than {DEEPEST} levels deep")
        if count > MOST:
            raise ValueError(f"it holds more than {MOST:,} values")
        if isinstance(node, str) and not is_text(node):
            raise ValueError(f"{node!r:.80} is no text that UTF-8 can hold")
        if isinstance(node, Mapping):
            todo += [(entry, depth + 1) for pair in node.items() for entry in pair]
        elif isinstance(node, list | tuple | set):
            todo += [(entry, depth + 1) for entry in node]

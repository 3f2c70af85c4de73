"""Every sentence that the package can raise is expected by some test: what nobody has raised, nobody has read."""

import ast
import re
from pathlib import Path

import flashgrpo

ROOT = Path(flashgrpo.__file__).parent
TESTS = Path(__file__).parents[1]
SENTENCES = ("UserError", "SharedError", "OtherFormat", "BadParameter", "ValueError", "MarkedYAMLError", "TypeError")
SHAPES = {
    "rewards are p g r with r weights not",
    "the loss takes one value per term all of shape t got",
    "k is an int or",
}
"""Of shapes that jaxtyping refuses first under pytest."""
WORDS = 3  # of a sentence that stand in a test, one after the other


def test_every_sentence_is_expected_by_a_test():
    expected = " ".join(spoken(file.read_text("utf-8")) for file in TESTS.rglob("*.py") if file != Path(__file__))
    lacking = [
        f"{file.relative_to(ROOT)}:{line}: {' ... '.join(parts)}"
        for file in sorted(ROOT.rglob("*.py"))
        for line, parts in raised(ast.parse(file.read_text("utf-8")))
        if not any(phrase in expected for part in parts for phrase in phrases(part)) and not SHAPES & set(parts)
    ]
    assert not lacking, "\n".join(lacking)


def raised(tree: ast.AST) -> list[tuple[int, list[str]]]:
    """Return line and literal parts of each sentence that is raised; those without any say what another one says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = node.exc.func.attr if isinstance(node.exc.func, ast.Attribute) else getattr(node.exc.func, "id", "")
            parts = [part for argument in literals(node.exc) if (part := spoken(argument))]
            if name in SENTENCES and any(len(part.split()) >= WORDS for part in parts):
                found.append((node.lineno, parts))
    return found


def literals(call: ast.Call) -> list[str]:
    """Return the literal parts of a call's texts, between what is filled in."""
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return [
        node.value
        for value in values
        for node in ast.walk(value)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def spoken(text: str) -> str:
    """Return the words of a text, or of a pattern for it."""
    return " ".join(re.findall(r"[a-z0-9_~$#-]+", re.sub(r"\\[bdwsSDW]|\\", "", text.lower())))


def phrases(part: str) -> list[str]:
    """Return each run of a few words."""
    words = part.split()
    return [" ".join(words[first : first + WORDS]) for first in range(len(words) - WORDS + 1)]


def test_what_a_raise_says():
    code = 'raise UserError(f"{key}: the file {path!r} has no prompts; " "write one a line")\nraise KeyError("a b c d")'
    assert raised(ast.parse(code)) == [(1, ["the file", "has no prompts write one a line"])]
    assert phrases("has no prompts here") == ["has no prompts", "no prompts here"]

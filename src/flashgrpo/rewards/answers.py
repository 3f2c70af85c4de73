"""Answers of language models, checked by code: countdown, and numbers of word problems. Nothing is run of a text.

A text answers inside of <answer> and </answer>. How they are gamed: form alone earns a part, so a run may learn to
write the tags and nothing else; `solved` and `right` count nothing but the answer. Watch those.
"""

import ast
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from flashgrpo.types import PlantedPair, Prompt

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
LONGEST = 200  # characters of an expression


def countdown(
    texts: list[str], prompts: list[str], numbers: list[Any], target: list[Any], **columns: Any
) -> list[float]:
    """Whether a text makes the number `target` of the `numbers`, each used once: up to 4, of which the result is 3.

    A third each for an answer in its tags, for an expression of + - * / and whole numbers in it, and for using exactly
    the given numbers (arXiv 2510.04019).

    Args:
        numbers: of each prompt, in any form that holds them: [3, 5, 7] or "3, 5, 7".
        target: of each prompt.
    """
    return [_countdown(*one) for one in zip(texts, map(_whole, numbers), target, strict=True)]


def solved(texts: list[str], prompts: list[str], numbers: list[Any], target: list[Any], **columns: Any) -> list[float]:
    """Whether `countdown` is solved: 1 or 0, to be watched."""
    return [float(value > 3.5) for value in countdown(texts, prompts, numbers, target)]


def exact(texts: list[str], prompts: list[str], answer: list[Any], **columns: Any) -> list[float]:
    """Whether a text's answer is the number of the column `answer`: 3, and half a point each for tags and for a number.

    Args:
        answer: a number, or a text whose last number counts, as "... #### 42" of GSM8K does.
    """
    return [_exact(text, _last_number(str(want))) for text, want in zip(texts, answer, strict=True)]


def right(texts: list[str], prompts: list[str], answer: list[Any], **columns: Any) -> list[float]:
    """Whether the last number of a text, or of its answer, is that of the column `answer`: 1 or 0, to be watched."""
    wanted = [_last_number(str(want)) for want in answer]
    return [float(_last_number(_answer(text) or text) == want) for text, want in zip(texts, wanted, strict=True)]


def _countdown(text: str, numbers: Sequence[int], target: Any) -> float:
    answer = _answer(text)
    if answer is None:
        return 0.0
    found = _value(answer)
    if found is None:
        return 1 / 3
    value, used = found
    right_numbers = sorted(used) == sorted(numbers)
    return (2 + right_numbers) / 3 + 3.0 * (right_numbers and value == Fraction(str(target)))


def _exact(text: str, want: Fraction | None) -> float:
    answer = _answer(text)
    if answer is None:
        return 0.0
    found = _last_number(answer)
    return 0.5 + 0.5 * (found is not None) + 3.0 * (found is not None and found == want)


def _answer(text: str) -> str | None:
    """Return what stands in the last pair of tags, None where there is none."""
    found = ANSWER.findall(text)
    return found[-1].strip() if found else None


def _last_number(text: str) -> Fraction | None:
    found = NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "")) if found else None


def _whole(numbers: Any) -> list[int]:
    return [int(number) for number in re.findall(r"-?\d+", str(numbers))]


def _value(expression: str) -> tuple[Fraction, list[int]] | None:
    """Return the value of an expression and the numbers in it; None where it is none of + - * / and whole numbers."""
    if len(expression) > LONGEST or not re.fullmatch(r"[\d\s+\-*/()]+", expression) or "**" in expression:
        return None
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, int)]
        return _computed(tree.body), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError, KeyError):
        return None


def _computed(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise ValueError
    left, right_ = _computed(node.left), _computed(node.right)
    if isinstance(node.op, ast.Add):
        return left + right_
    if isinstance(node.op, ast.Sub):
        return left - right_
    if isinstance(node.op, ast.Mult):
        return left * right_
    if isinstance(node.op, ast.Div):
        return left / right_
    raise ValueError


def _pair(columns: dict[str, Any], better: str) -> PlantedPair:
    return PlantedPair(Prompt("solve it", columns), worse="I do not know", better=f"so it is <answer>{better}</answer>")


for _puzzle in (countdown, solved):
    _puzzle.planted_pair = _pair({"numbers": [3, 5, 7], "target": 26}, "3 * 7 + 5")  # type: ignore[attr-defined]
for _problem in (exact, right):
    _problem.planted_pair = _pair({"answer": 42}, "42")  # type: ignore[attr-defined]
for _reward, _range in {countdown: (0.0, 4.0), exact: (0.0, 4.0), solved: (0.0, 1.0), right: (0.0, 1.0)}.items():
    _reward.score_range = _range  # type: ignore[attr-defined]

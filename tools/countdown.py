"""Makes the countdown puzzles that ship: `python -m tools.countdown` writes prompts/countdown-*.jsonl again.

Three numbers from 1 to 50 and a target from 10 to 100 that an expression of + - * / makes of them, each used once.
"""

import itertools
import json
import random
from fractions import Fraction
from pathlib import Path

TEXT = (
    "Using the numbers {}, each exactly once, write an expression with + - * / and brackets that equals {}. Think step "
    "by step, and end with the expression alone inside <answer> and </answer>."
)
COUNTS = {"train": 400, "heldout": 100}
FOLDER = Path(__file__).parent.parent / "prompts"


def made_of(numbers: list[int]) -> dict[Fraction, str]:
    """Return each value that an expression of the numbers has, with the first such expression."""
    found: dict[Fraction, str] = {}
    for a, b, c in itertools.permutations(numbers):
        for first, second in itertools.product("+-*/", repeat=2):
            for left, text in ((True, f"({a} {first} {b}) {second} {c}"), (False, f"{a} {first} ({b} {second} {c})")):
                value = _value(a, b, c, first, second, left)
                if value is not None:
                    found.setdefault(value, text)
    return found


def _value(a: int, b: int, c: int, first: str, second: str, left: bool) -> Fraction | None:
    x, y, z = (Fraction(number) for number in (a, b, c))
    if left:
        inner = _of(first, x, y)
        return None if inner is None else _of(second, inner, z)
    inner = _of(second, y, z)
    return None if inner is None else _of(first, x, inner)


def _of(operation: str, x: Fraction, y: Fraction) -> Fraction | None:
    if operation == "/":
        return x / y if y else None
    return {"+": x + y, "-": x - y, "*": x * y}[operation]


def puzzles(seed: int = 0) -> list[dict[str, object]]:
    """Return different puzzles, as many as ship."""
    source, seen = random.Random(seed), set[tuple[tuple[int, ...], int]]()
    lines: list[dict[str, object]] = []
    while len(lines) < sum(COUNTS.values()):
        numbers = [source.randint(1, 50) for _ in range(3)]
        values = made_of(numbers)
        targets = sorted(int(value) for value in values if value.denominator == 1 and 10 <= value <= 100)
        target = source.choice(targets) if targets else 0
        if not target or (tuple(sorted(numbers)), target) in seen:
            continue
        seen.add((tuple(sorted(numbers)), target))
        text = TEXT.format(", ".join(map(str, numbers)), target)
        solution = values[Fraction(target)]
        lines.append({"prompt": text, "numbers": numbers, "target": target, "solution": solution})
    return lines


if __name__ == "__main__":
    lines, first = puzzles(), 0
    for name, count in COUNTS.items():
        rows = lines[first : first + count]
        (FOLDER / f"countdown-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        first += count

"""Numbers and results as text, in one way wherever they are shown: terminal, tables, pages, model cards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
MOST = 12  # decimals
FLOAT32 = 3.4e38  # the largest number that a run can have written


def number(value: object) -> float:
    """Return `value` where it is a number that float32 holds, nan for whatever else a line of JSON can hold."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32:
        return float(value)
    return math.nan


def decimals(change: object = None, interval: Sequence[object] | None = None, level: object = None) -> int:
    """Return the decimals that the scale of numbers asks for, at least 2.

    Those of the interval's width: 0.06 wide gives 2, 0.004 wide 3; up to two more where they make the change itself
    visible. Without an interval the change decides, by two digits: 0.0005 gives 5. Without a change the level does.
    """
    low, high = map(number, interval) if interval and len(interval) == 2 else (math.nan, math.nan)
    moved, value = abs(number(change)), abs(number(level))
    if high > low:
        needed = _place(high - low)
        if moved > 0:
            needed = max(needed, min(_place(moved), needed + 2))
    elif moved > 0:
        needed = _place(moved) + 1
    else:
        needed = _place(value) + 1 if value > 0 else 2
    return min(max(needed, 2), MOST)


def _place(value: float) -> int:
    """Return the place of a number's first digit after the point: 2 of 0.06."""
    return -math.floor(math.log10(value))


@dataclass(frozen=True)
class Numbers:
    """Numbers as text, all with the decimals that the measured uncertainty supports."""

    decimals: int = 2
    minus: str = MINUS

    @classmethod
    def of(cls, record: Mapping[str, Any], least: int = 3) -> "Numbers":
        """Return the form of an evaluation's reward and difference, for terminals and plain text."""
        change, level = record.get("difference"), record.get("reward")
        return cls(max(least, decimals(change, record.get("interval"), level)), "-")

    @classmethod
    def alone(cls, *values: object, least: int = 3) -> "Numbers":
        """Return the form of numbers of which nothing else is known, for terminals and plain text."""
        largest = max((abs(number(value)) for value in values), default=math.nan)
        return cls(max(least, decimals(level=largest)), "-")

    def showing(self, change: object) -> "Numbers":
        """Return the form with as many decimals as show a change that is not 0, two more at most."""
        hidden = round(number(change), self.decimals) == 0 and number(change) != 0
        return replace(self, decimals=min(decimals(change), self.decimals + 2)) if hidden else self

    def plain(self, value: object) -> str:
        """Return it without a plus; what is no number is a dash."""
        rounded = round(number(value), self.decimals) + 0.0  # -0.0 + 0.0 is 0.0: no minus before a zero
        return DASH if math.isnan(rounded) else f"{rounded:.{self.decimals}f}".replace("-", self.minus)

    def signed(self, value: object) -> str:
        """Return it with its sign; what rounds to zero has none."""
        return ("+" if round(number(value), self.decimals) > 0 else "") + self.plain(value)

    def direction(self, value: object) -> str:
        """Return the class of a table cell; what rounds to zero has no direction."""
        rounded = round(number(value), self.decimals)
        return "up" if rounded > 0 else "down" if rounded < 0 else ""

    def interval(self, low: float, high: float) -> str:
        """Return both ends: `[0.15, 0.21]`."""
        return f"[{self.plain(low)}, {self.plain(high)}]"

    def between(self, interval: Sequence[float]) -> str:
        """Return both ends with their signs: `+0.15 to +0.21`."""
        return f"{self.signed(interval[0])} to {self.signed(interval[1])}"


def called(record: Mapping[str, Any]) -> str:
    """Return what an evaluation is: `held-out`, unless some of its prompts were trained on."""
    return "evaluation" if record.get("trained_on") else "held-out"


def not_held_out(record: Mapping[str, Any]) -> str:
    """Return why it is not held-out, in words that follow a comma; empty where it is."""
    count = record.get("trained_on")
    return f"{count} of its prompts are trained on" if count else ""

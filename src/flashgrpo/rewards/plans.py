"""Reward of the bundled program that plans and draws: strokes in the colour opposite to the prompt's, few of them."""

from typing import Any

from flashgrpo.rewards.shapes import COLORS
from flashgrpo.types import PlantedPair, Prompt

COST = 0.05  # of a stroke
WHEEL = list(COLORS)


def opposite(color: str) -> str:
    """Return the colour on the other side of the wheel: cyan of red."""
    return WHEEL[(WHEEL.index(color) + len(WHEEL) // 2) % len(WHEEL)]


def strokes(texts: list[str], prompts: list[str], **columns: Any) -> list[float]:
    """Share of the strokes in the colour opposite to the first colour of the prompt, less 0.05 for each stroke.

    Raises:
        ValueError: a prompt names no colour.
    """
    values = []
    for text, prompt in zip(texts, prompts, strict=True):
        named = [word for word in prompt.split() if word in COLORS]
        if not named:
            raise ValueError(f'the prompt "{prompt}" names none of {", ".join(COLORS)}')
        drawn = text.split()
        right = drawn.count(opposite(named[0]))
        values.append(right / max(1, len(drawn)) - COST * len(drawn))
    return values


strokes.planted_pair = PlantedPair(Prompt("beside red boat", {}), "red red", "cyan")  # type: ignore[attr-defined]
strokes.score_range = (None, 1.0)  # type: ignore[attr-defined]

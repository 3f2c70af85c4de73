"""The three worlds of the bundled language model: strokes of the opposite colour, slates of a kind, and wishes.

A quarter of the prompts of each are held out. Write the shipped prompt files again with
``python -m tools.programs.world``.
"""

import itertools
import json
import random
from pathlib import Path
from typing import Any

from flashgrpo.rewards.shapes import ATTRIBUTES, COLORS
from flashgrpo.rewards.slates import KINDS

TINY = Path(__file__).parents[2] / "src/flashgrpo/models/tiny"
THINGS = ("boat", "tree", "house", "wall", "lamp", "gate", "cart", "bell")
LISTED, RELEVANT = 8, 3
SLATES = 240
SPLIT_SEED = 0
Row = dict[str, Any]


def plans() -> list[Row]:
    """Return what strokes are drawn beside: a colour and a thing."""
    return [{"prompt": f"beside {color} {thing}"} for color, thing in itertools.product(COLORS, THINGS)]


def slates() -> list[Row]:
    """Return a kind, and words of which three are of it, in any order."""
    draw, rows = random.Random(SPLIT_SEED), []
    for number in range(SLATES):
        kind = list(KINDS)[number % len(KINDS)]
        others = [word for other, words in KINDS.items() if other != kind for word in words]
        words = draw.sample(KINDS[kind], RELEVANT) + draw.sample(others, LISTED - RELEVANT)
        draw.shuffle(words)
        rows.append({"prompt": f"{kind} : {' '.join(words)}"})
    return rows


def wish_of(words: Row) -> str:
    """Write a wish for some attributes: "something red going left"."""
    parts = ["something", words["color"], words["shape"]]
    going = [words["direction"], words["speed"]]
    parts += ["going", *going] if any(going) else []
    return " ".join(part for part in parts if part)


def wishes() -> list[Row]:
    """Return wishes that name two or three of the four attributes."""
    rows = []
    for named in itertools.product((False, True), repeat=len(ATTRIBUTES)):
        if sum(named) not in (2, 3):
            continue
        known = (ATTRIBUTES[n] if own else (None,) for n, own in zip(ATTRIBUTES, named, strict=True))
        for words in itertools.product(*known):
            row = dict(zip(ATTRIBUTES, words, strict=True))
            rows.append({"prompt": wish_of(row), **row})
    return rows


WORLDS = {"plans": plans, "slates": slates, "wishes": wishes}
MOST_HELDOUT = 48


def split(name: str, heldout: bool) -> list[Row]:
    """Return the prompts of training, or those held out."""
    rows = WORLDS[name]()
    order = random.Random(SPLIT_SEED).sample(range(len(rows)), len(rows))
    out = set(order[: min(MOST_HELDOUT, len(rows) // 4)])
    return [row for number, row in enumerate(rows) if (number in out) == heldout]


def main() -> None:
    """Write the shipped prompt files."""
    for name in WORLDS:
        folder = TINY / "prompts" / name
        folder.mkdir(parents=True, exist_ok=True)
        for part in ("train", "heldout"):
            rows = split(name, part == "heldout")
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()

"""Rewards of a slate and a ranking: which listed words are of a kind, and how early they stand (F-GRPO, 2605.12995)."""

import math
from collections.abc import Sequence
from typing import Any

from flashgrpo.seeds import keyed_bits
from flashgrpo.types import PlantedPair, Prompt

KINDS = {
    "fruit": ("plum", "fig", "pear", "lime", "date", "kiwi"),
    "tools": ("saw", "axe", "file", "rake", "nail", "drill"),
    "birds": ("owl", "crow", "wren", "dove", "swan", "gull"),
    "ships": ("raft", "yacht", "ferry", "canoe", "barge", "tug"),
}
"""Kind -> its words."""
SLATE, RANKED = 4, 3


def read_phases(text: str) -> tuple[list[str], list[str]]:
    """Return the words of the slate and of the ranking; what is missing is empty."""
    _, _, rest = text.partition("<slate>")
    slate, _, rank = rest.partition("<rank>")
    return slate.split()[:SLATE], rank.split()[:RANKED]


def ndcg(ranked: Sequence[str], relevant: set[str], k: int = RANKED) -> float:
    """Return the normalized discounted cumulative gain of the first k, with gains of 0 and 1; repeats gain nothing.

    With a and b relevant and k 3: [b, a, x] has 1, [b, x, a] 0.919721, [x, a, b] 0.693426.
    """
    first = dict.fromkeys(ranked[:k])
    places = {word: place for place, word in reversed(list(enumerate(ranked[:k])))}
    gained = sum(1 / math.log2(places[word] + 2) for word in first if word in relevant)
    best = sum(1 / math.log2(place + 2) for place in range(min(k, len(relevant))))
    return gained / best if best else 0.0


def phases(texts: list[str], prompts: list[str], noise: float = 0.0, **columns: Any) -> dict[str, list[float]]:
    """Return {"slate": recall of the relevant words, "rank": NDCG@3 of those ranked from the slate}, 0 to 1 each.

    Args:
        noise: standard deviation of what is added to "rank": drawn by prompt and text, so equal texts have equal noise.

    Raises:
        ValueError: a prompt is no kind and list of words.
    """
    found: dict[str, list[float]] = {"slate": [], "rank": []}
    for text, prompt in zip(texts, prompts, strict=True):
        kind, _, listed = prompt.partition(" : ")
        if kind not in KINDS or not listed:
            raise ValueError(f'the prompt "{prompt}" is no kind and list, as "fruit : plum owl saw" is')
        relevant = {word for word in listed.split() if word in KINDS[kind]}
        slate, ranked = read_phases(text)
        found["slate"].append(len(relevant & set(slate)) / max(1, len(relevant)))
        chosen = [word if word in slate else "" for word in ranked]
        found["rank"].append(ndcg(chosen, relevant) + noise * _normal(prompt, text))
    return found


def _normal(prompt: str, text: str) -> float:
    """Return a standard normal number by its name (Box and Muller)."""
    u, v = ((keyed_bits("rank noise", prompt, text, n) >> 11) / 2**53 for n in range(2))
    return math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)


phases.planted_pair = PlantedPair(  # type: ignore[attr-defined]
    Prompt("fruit : plum owl saw fig crow raft", {}),
    "<slate> owl saw crow raft <rank> owl saw crow",
    "<slate> plum fig owl saw <rank> plum fig owl",
)

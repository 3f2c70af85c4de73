"""Phases of a completion: parts of its text that follow each other, each judged by a channel of its own (F-GRPO)."""

from collections.abc import Sequence


def begins_of(text: str, tags: Sequence[str]) -> list[int]:
    """Return the character at which each phase begins: behind its tag, the first always at 0.

    A phase whose tag does not come, behind the one before, does not begin, and none after it does.

    Example: "<SLATE> a b <RANK> b" with tags <SLATE> and <RANK> begins at 0 and 18.
    """
    begins = [0]
    for tag in tags[1:]:
        at = text.find(tag, begins[-1])
        if at < 0:
            break
        begins.append(at + len(tag))
    return begins


def phase_of_tokens(ends: Sequence[int], text: str, tags: Sequence[str]) -> list[int]:
    """Return the phase of each token: the last that has begun where the token begins.

    So the token that completes a tag belongs to the phase before, whose last decision it is.

    Args:
        ends: characters of the text up to the end of each token.
    """
    begins = begins_of(text, tags)
    return [sum(begin <= start for begin in begins) - 1 for start in [0, *ends][: len(ends)]]

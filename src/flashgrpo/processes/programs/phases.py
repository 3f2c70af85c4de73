"""Phases of a completion: parts of its text that follow each other, each judged by a channel of its own (F-GRPO)."""

from collections.abc import Callable, Sequence

from flashgrpo.errors import UserError

Cut = Callable[[str], Sequence[int]]
"""Text of a completion -> the character at which each of its phases begins: rising, the first 0."""


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


def phase_of_tokens(ends: Sequence[int], begins: Sequence[int]) -> list[int]:
    """Return the phase of each token: the last that has begun where the token begins.

    So the token that completes a tag belongs to the phase before, whose last decision it is.

    Args:
        ends: characters of the text up to the end of each token.
        begins: of each phase.
    """
    return [sum(begin <= start for begin in begins) - 1 for start in [0, *ends][: len(ends)]]


def checked(cut: Cut, phases: int) -> Cut:
    """Return the same function, whose answers are looked at.

    Raises:
        UserError: (when it is called) what it returns does not say where phases begin.
    """

    def look(text: str) -> Sequence[int]:
        begins = cut(text)
        is_whole = isinstance(begins, list | tuple) and all(type(one) is int for one in begins)
        if not is_whole or not 0 < len(begins) <= phases or begins[0] or list(begins) != sorted(begins):
            raise UserError(
                f"rollout.cut: a function that cuts a text returns the character at which each of its {phases} phases "
                f"begins, rising from 0 and fewer where phases do not come, and this one returned {begins!r:.200} for "
                f"{text!r:.200}"
            )
        return begins

    return look

"""The programs of the bundled language model: what docs/programs.md explains, line by line."""

from collections.abc import Callable
from typing import Any

Call = Callable[[str, str], str]


def plan_and_draw(prompt: str, call: Call, **columns: Any) -> str:
    """Plan a colour and a number of strokes, and draw each stroke by a call of its own; returns the strokes.

    Raises:
        ValueError: the plan is no colour and number, or a stroke no word.
    """
    color, number = call("plan", f"plan {prompt}").split()
    strokes = [call("draw", f"draw {color}") for _ in range(int(number))]
    if any(len(stroke.split()) != 1 for stroke in strokes):
        raise ValueError("a stroke is one word")
    return " ".join(strokes)


def slate_and_rank(prompt: str, call: Call, **columns: Any) -> str:
    """Choose some of the listed words and put the best of them in order, in one completion of two phases.

    Raises:
        ValueError: the two tags do not each come once, in this order.
    """
    return _two_phases(call("recommend", f"choose {prompt}"))


def choose_and_rank(prompt: str, call: Call, **columns: Any) -> str:
    """Ask an instructed model for what `slate_and_rank` is; prompts are of the same form, "fruit : plum owl saw fig".

    Raises:
        ValueError: the two tags do not each come once, in this order.
    """
    kind, _, words = prompt.partition(" : ")
    wanted = f"Of the words {words}, choose up to four that are {kind}, and put the three best of these in order."
    return _two_phases(
        call("recommend", f"{wanted} Answer in this form, with nothing else: <slate> words <rank> words")
    )


def _two_phases(text: str) -> str:
    before, slate, rest = text.strip().partition("<slate>")
    if before or not slate or rest.count("<rank>") != 1 or "<slate>" in rest:
        raise ValueError("a completion is <slate> words <rank> words")
    return text.strip()


def plan_and_solve(prompt: str, call: Call, **columns: Any) -> str:
    """Ask for a plan, and then for the solution by it; returns the solution."""
    plan = call("plan", f"{prompt}\n\nDo not solve it yet: say in three sentences at most how you would go about it.")
    return call("solve", f"{prompt}\n\nA plan, which may be wrong:\n{plan.strip()}")


def rewrite_prompt(prompt: str, call: Call, **columns: Any) -> str:
    """Ask an instructed model for the prompt that a video model follows best.

    Raises:
        ValueError: it writes nothing.
    """
    asked = (
        "Rewrite this wish as one detailed prompt for a text-to-video model: say what is seen, how it moves, the light"
    )
    text = call(
        "write", f"{asked} and the camera, in 80 words at most. Answer with the prompt alone.\n\n{prompt}"
    ).strip()
    if not text:
        raise ValueError("the model has written nothing")
    return text


def wish_itself(prompt: str, call: Call, **columns: Any) -> str:
    """Return the wish as it stands: what a prompt writer has to beat."""
    return prompt


def fixed_template(prompt: str, call: Call, **columns: Any) -> str:
    """Put a wish into the form of a caption, word by word: "something red going left" -> "a red moving left"."""
    return prompt.replace("something", "a").replace("going", "moving")


def write_caption(prompt: str, call: Call, **columns: Any) -> str:
    """Write a caption that a video model follows, for what somebody wishes."""
    return call("write", f"wish {prompt}")

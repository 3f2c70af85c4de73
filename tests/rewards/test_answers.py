"""Answers of language models: what counts, by hand, and that nothing of a text is run."""

import json
from pathlib import Path

import pytest

from flashgrpo.prompts import read_prompts
from flashgrpo.rewards import answers

PROMPTS = Path(__file__).parent.parent.parent / "prompts"


def countdown(text: str, numbers=(3, 5, 7), target=26) -> float:
    return answers.countdown([text], ["p"], [list(numbers)], [target])[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("well, 3 * 7 + 5", 0),
        ("<answer>twenty-six</answer>", 1 / 3),
        ("<answer>26</answer>", 2 / 3),
        ("<answer>3 + 5 + 7</answer>", 1),
        ("<answer>1 + 2</answer> no: <answer> 3*7 + 5 </answer>", 4),
        ("<answer>(3 * 7) + 5 + 5 - 5</answer>", 2 / 3),
        ("<answer>3 / (5 - 5) + 7</answer>", 1 / 3),
        ("<answer>9 ** 9 ** 9</answer>", 1 / 3),
        ("<answer>__import__('os')</answer>", 1 / 3),
        (f"<answer>{'(' * 99}3{')' * 99}</answer>", 2 / 3),
        (f"<answer>{'(' * 999}3{')' * 999}</answer>", 1 / 3),
        ("<answer>3,5</answer>", 1 / 3),
        ("<answer>03 + 5 + 7</answer>", 1 / 3),
    ],
)
def test_parts_of_countdown(text, value):
    assert countdown(text) == pytest.approx(value)
    assert answers.solved([text], ["p"], ["3, 5, 7"], ["26"])[0] == (value == 4)


def test_division_is_exact():
    assert countdown("<answer>8 / (3 - 8 / 3)</answer>", (8, 3, 8, 3), 24) == 4


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("42", 0, 1),
        ("<answer>none</answer>", 0.5, 0),
        ("<answer>41</answer>", 1, 0),
        ("6 * 7 is <answer>$42.00</answer>", 4, 1),
        ("<answer>1,042</answer>", 1, 0),
    ],
)
def test_parts_of_a_number(text, value, right):
    for answer in (42, "42", "6 * 7 = 42\n#### 42"):
        assert answers.exact([text], ["p"], [answer]) == [value]
        assert answers.right([text], ["p"], [answer]) == [right]


@pytest.mark.parametrize("name", ["countdown", "solved", "exact", "right"])
def test_the_better_of_the_planted_pair_is_preferred(name):
    reward = getattr(answers, name)
    pair, (low, high) = reward.planted_pair, reward.score_range
    columns = {key: [value] * 2 for key, value in pair.prompt.columns.items()}
    worse, better = reward([pair.worse, pair.better], [pair.prompt.text] * 2, **columns)
    assert low <= worse < better <= high


def test_the_shipped_puzzles_can_be_solved_and_are_not_the_held_out_ones():
    known = {}
    for name in ("train", "heldout"):
        prompts = read_prompts(str(PROMPTS / f"countdown-{name}.jsonl"), "prompts")
        known[name] = {(tuple(sorted(p.columns["numbers"])), p.columns["target"]) for p in prompts}
        solutions = [json.loads(line)["solution"] for line in (PROMPTS / f"countdown-{name}.jsonl").open()]
        columns = [[p.columns[key] for p in prompts] for key in ("numbers", "target")]
        texts = [f"<answer>{solution}</answer>" for solution in solutions]
        assert set(answers.countdown(texts, [p.text for p in prompts], *columns)) == {4.0}
        assert all(str(p.columns["target"]) in p.text for p in prompts)
        assert len(known[name]) == len(prompts)
    assert not known["train"] & known["heldout"]
    assert (len(known["train"]), len(known["heldout"])) == (400, 100)

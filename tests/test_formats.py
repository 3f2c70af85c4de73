"""Decimals follow the scale of what they show."""

import math
from pathlib import Path

import pytest

from flashgrpo.files import write_json
from flashgrpo.formats import Numbers, called, decimals, not_held_out
from flashgrpo.run.progress import describe, last_words


@pytest.mark.parametrize(
    ("change", "interval", "level", "places"),
    [
        (0.18, [0.15, 0.21], 0.7, 2),
        (0.18, [0.178, 0.182], 0.7, 3),
        (0.0005, [0.0002, 0.0008], 0.7, 4),
        (0.0005, None, 0.7, 5),
        (0.0005, [-0.02, 0.03], 0.7, 4),  # two more than the interval supports, so that it is not 0.00
        (1e-9, [-0.02, 0.03], 0.7, 4),
        (2e-7, [1e-7, 3e-7], 1e-6, 7),
        (0.0, None, 0.00034, 5),
        (0.0, [0.0, 0.0], 0.0, 2),
        (1234.5, [1000.0, 1500.0], 5e6, 2),
        (None, [math.nan, math.nan], None, 2),
        (5e-324, None, None, 12),
    ],
)
def test_decimals(change, interval, level, places):
    assert decimals(change, interval, level) == places


def record(**changes):
    return {"update": 4, "reward": 0.7005, "difference": 0.0005, "interval": [0.0002, 0.0008], **changes}


def test_an_evaluation_in_words():
    said = "held-out reward 0.7005, 0.0005 above the base (95 % interval +0.0002 to +0.0008)"
    assert describe(record()) == said
    assert describe(record(trained_on=2)) == f"{said}, 2 of its prompts are trained on".replace(
        "held-out", "evaluation"
    )
    assert describe(record(difference=-0.1, interval=None)) == "held-out reward 0.701, 0.100 below the base"
    assert describe(record(update=0, difference=0.0, interval=[0.0, 0.0], reward=0.00052)) == "held-out reward 0.00052"
    assert describe(record(update=0, average_moved=0.0)) == "held-out reward 0.7005"


def test_numbers_as_text():
    form = Numbers(3, "-")
    assert (form.signed(-0.0004), form.signed(0.1), form.plain(None)) == ("0.000", "+0.100", "–")
    assert form.between([-0.1, 0.25]) == "-0.100 to +0.250"
    assert Numbers.alone(0.00012, 0.5).plain(0.5) == "0.500"
    assert Numbers.alone(0.00012).plain(0.00012) == "0.00012"
    assert Numbers(3).showing(0.0002).signed(0.0002) == "+0.00020"
    assert Numbers(3).showing(0.01) == Numbers(3).showing(0.0) == Numbers(3)
    assert Numbers(2).showing(1e-9) == Numbers(4)
    assert (called({}), not_held_out({})) == ("held-out", "")


def test_the_last_words_of_a_run():
    base, better, worse = record(update=0), record(best=True), record(update=8, difference=-0.2, interval=None)
    run = Path("runs/a b")
    found, page = last_words(run, [base, better, worse], None, None).splitlines()
    assert found == f"best update 4: {describe(better)}"
    assert page == "for its page: flashgrpo report 'runs/a b'"
    confirmed = record(selected_from=2, difference=0.3, interval=[0.2, 0.4])
    said = last_words(run, [base, better, worse], confirmed, "after update 8: interrupted")
    assert said.startswith(f"stopped after update 8: interrupted; best update 4: {describe(confirmed)}\n")
    said = last_words(run, [base, worse], None, None)
    assert said.startswith("no evaluated update was above the base model; the last, 8: ")
    assert last_words(run, [base], None, None).startswith("no update has been evaluated\n")


def test_what_is_not_finite_is_null_in_every_file(tmp_path):
    write_json(tmp_path / "a.json", {"a": [math.nan, (math.inf, 1.0)], "b": {"c": -math.inf}})
    assert (tmp_path / "a.json").read_text() == '{"a": [null, [null, 1.0]], "b": {"c": null}}\n'

"""The loss curve of the tiny run is the one that is stored: what holds a change that is not meant to change numbers."""

import json
from pathlib import Path

import pytest

from tools import curve

STORED = json.loads((Path(__file__).parent.parent / "data/curve.json").read_text("utf-8"))
NAME = "bundled recipe"
TOLERANCE = 1e-4


def test_the_bundled_recipe_has_the_stored_curve(tmp_path, monkeypatch):
    """To the last digit where torch and the CPU are those that are stored, and to 1e-4 elsewhere.

    `make curve AGAINST=COMMIT` compares all of `tools/curve.py` with another commit on the machine at hand.
    """
    here, there = curve.machine(), STORED["machine"]
    exact = here == there
    how = f"every digit, with {here}" if exact else f"{TOLERANCE:g}, since this is {here} and the curve is of {there}"
    monkeypatch.setattr(curve, "RUNS", {NAME: curve.RUNS[NAME]})
    ours = json.loads(json.dumps(curve.curves(tmp_path)))[NAME]
    found = curve.differences(ours, STORED["curves"][NAME], 0.0 if exact else TOLERANCE)
    print(f"compared to {how}")
    assert not found, f"compared to {how}:\n" + "\n".join(found[:20])


def test_a_difference_is_found_and_named():
    ours = {"a": [1.0, {"b": 2.0}], "c": 3}
    assert curve.differences(ours, {"a": [1.0, {"b": 2.0}], "c": 3}) == []
    [found] = curve.differences(ours, {"a": [1.0, {"b": 2.0 + 1e-12}], "c": 3})
    assert found.startswith("/a/1/b: 2.0 here, 2.000000000001")
    assert curve.differences(ours, {"a": [1.0, {"b": 2.0001}], "c": 3}, TOLERANCE) == []
    assert len(curve.differences(ours, {"a": [1.0, {"b": 2.001}], "c": 4}, TOLERANCE)) == 2
    assert len(curve.differences(ours, {"a": [1.0], "c": 3}, TOLERANCE)) == 1


@pytest.mark.parametrize("name", curve.RUNS)
def test_every_run_has_its_curve(name):
    lines = STORED["curves"][name]
    assert [line["update"] for line in lines] == [1, 2, 3, 0, 3], "updates, then evaluations"
    assert all(line["drift"] == 0 for line in lines[:3])

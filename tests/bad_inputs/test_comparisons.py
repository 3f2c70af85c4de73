"""Comparisons: what they compare, and folders that are another's or damaged."""

import json
from typing import Any

import pytest

from flashgrpo.compare.plan import FORMAT
from tests.bad_inputs.cases import Case


def of_plan(sentence: str, **plan: Any) -> Case:
    """Comparing into a folder that has a plan.json."""
    content = {"format": FORMAT, "recipe": "tiny", "budget": 1, "seeds": [], "algorithms": {}, **plan}
    return Case("compare RECIPE updates=20 --out HERE/c", sentence, {"c/plan.json": json.dumps(content)})


CASES = [
    Case("compare RECIPE --out HERE/c --algorithms cps={},cps={}", "cps comes twice; name one otherwise, for instance"),
    Case("compare RECIPE --out HERE/c --algorithms [/b]", "'[/b]' cannot name a folder of runs"),
    Case("compare RECIPE --out HERE/c updates=20 --keep colour", "--keep: an algorithm has no 'colour'; did you mean"),
    Case("compare RECIPE --out HERE/c --budget 1", "are less than one update of flash-grpo"),
    Case(f"compare RECIPE --out HERE/c --budget {10**15}", "updates; lower it"),
    of_plan("c/plan.json was written by another version of flashgrpo", format=0),
    of_plan("c/plan.json is damaged (seeds: input should be a valid list); put it back", seeds=3),
    of_plan("c/plan.json is damaged (algorithms.x: input should be a valid dictionary", algorithms={"x": 3}),
    of_plan("c is a comparison that also has seed 77; choose another folder", seeds=[77]),
    of_plan("c is a comparison with another budget; choose another folder"),
    Case("compare RECIPE updates=20 --out HERE/c", "c holds 'thesis.tex' and is no comparison", {"c/thesis.tex": ""}),
    Case("compare RECIPE updates=20 --out HERE/c", "c/plan.json is damaged (Expecting value", {"c/plan.json": ""}),
    Case("report HERE/c", "comparison.json is damaged (no JSON object)", {"c/comparison.json": "3"}),
    Case(
        "report HERE/c",
        "comparison.json is damaged (Type",
        {"c/comparison.json": '{"summary": [{"final": 3}]}'},
    ),
    Case("report HERE/c", "comparison.json is damaged (it is nested too deeply", {"c/comparison.json": "[" * 100_000}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_comparisons(refuse, case):
    refuse(case)

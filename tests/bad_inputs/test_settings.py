"""Settings: of recipes, of overrides, and of the command line."""

import pytest

from tests.bad_inputs.cases import Case

CASES = [
    Case("train RECIPE updatse=3", "unknown key updatse; did you mean 'updates'?"),
    Case("train RECIPE rollout.group_size=1", "rollout.group_size"),
    Case("train RECIPE algorithm.steps.window=[0.0,2.0]", "window of OneStep"),
    Case("config HERE/none.yaml", "there is no recipe"),
    Case("tran", "No such command 'tran'"),
    Case("demo --seed -1", "Invalid value for '--seed'"),
    Case("sample", "Missing argument 'run'"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_settings(refuse, case):
    refuse(case)

"""Run directories that are none, are another's, or are damaged."""

import pytest

from tests.bad_inputs.cases import Case


def of_environment(content: str | bytes, sentence: str) -> Case:
    """Resuming a run whose environment.json is damaged."""
    return Case("train RECIPE out=RUN updates=2", f"{sentence}", {ENVIRONMENT: content})


def of_lines(line: str, wrong: str) -> Case:
    """Evaluating a run whose first evaluation is damaged."""
    sentence = f"evaluations.jsonl line 1 is no line that a run writes ({wrong}"
    return Case("evaluate RUN", sentence, {"run/evaluations.jsonl": f"{line}\n"})


ENVIRONMENT = "run/environment.json"
CASES = [
    Case("train RECIPE", "holds 'thesis.tex' and is no run", {"run/thesis.tex": "years of work"}),
    Case("train RECIPE", "holds 'config.yaml' and is no run", {"run/config.yaml/thesis.tex": ""}),
    Case("evaluate HERE/run", "is no run directory, for it has no config.yaml", {"run/thesis.tex": ""}),
    Case("report HERE/run", "is no run directory: it has no config.yaml", {"run/thesis.tex": ""}),
    Case("report HERE/run", "is no run directory: there is no such folder"),
    Case("sample HERE/run a", "run is no run directory", {"run/thesis.tex": ""}),
    Case("train HERE/run", "upates", {"run/config.yaml": "upates: 5\n"}),
    Case("train RECIPE out=HERE/file", "cannot write", {"file": ""}),
    Case("train RECIPE out=HERE/file/below", "file/below: not a folder", {"file": ""}),
    Case("train RECIPE out=RUN updates=2 optim.warmup=5", "is a run with another optim.warmup (0, now 5)"),
    Case("train RECIPE out=RUN updates=2", "no checkpoint in", {"run/checkpoints/000001/state.json": "{"}),
    Case("train RECIPE", "RANK is 'x' where a launcher puts a whole number", env={"RANK": "x"}),
    Case("train RECIPE", "WORLD_SIZE is '-1'", env={"WORLD_SIZE": "-1"}),
    Case("train RECIPE", "RANK 3 of WORLD_SIZE 1; unset both, or start with torchrun", env={"RANK": "3"}),
    Case("evaluate RECIPE", "WORLD_SIZE is '1e9'", env={"WORLD_SIZE": "1e9"}),
    Case("compare RECIPE --out HERE/c", "WORLD_SIZE is 'many'", env={"WORLD_SIZE": "many"}),
    Case("evaluate RUN", "is not whole", {"run/checkpoints/000001/state.json": "{"}),
    Case("evaluate RUN optim.lr=1", "'optim.lr=1' has no effect on an evaluation"),
    Case("evaluate RUN 'model={path: x.y}'", "has no effect on an evaluation"),
    Case("evaluate RUN evaluation", "must have the form key=value"),
    Case("evaluate RUN 'evaluation={videos: -1}'", "evaluation.videos must be at least 0, not -1"),
    Case("evaluate RUN 'rewards={a: {call: no.where:to}}'", "rewards.a.call: no.where cannot be imported"),
    of_environment("", "Expecting value"),
    of_environment("{", "Expecting property name"),
    of_environment("[]", "no JSON object); put it back, or remove it"),
    of_environment(b"\x80", ""),
    of_environment("[" * 100_000, "it is nested too deeply"),
    of_environment('{"n": ' + "1" * 5000 + "}", "it holds a whole number of 5000 digits"),
    of_environment('{"prompts": 3}', "prompts: input should be a valid dictionary)"),
    of_environment('{"model": 3}', "model: input should be a valid string"),
    *(
        of_lines(line, wrong)
        for line, wrong in {
            "3": "no object)",
            '"{}"': "no object)",
            "null": "no object)",
            "{}": "update: field required)",
            '{"update": true}': "update: input should be a valid integer)",
            '{"update": 1e300}': "update: ",
            '{"update": -1}': "update: input should be greater than or equal to 0)",
            '{"update": 0, "reward": "high"}': "reward: input should be a valid number)",
            '{"update": 0, "reward": 1, "rewards": [1]}': "rewards: input should be a valid dictionary)",
            '{"update": 0, "reward": NaN}': "reward: input should be a finite number)",
            '{"update": 0, "update": 1}': "no JSON, the key 'update' is there twice)",
            "[" * 100_000: "no JSON, it is nested too deeply)",
        }.items()
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_runs(refuse, case):
    refuse(case)

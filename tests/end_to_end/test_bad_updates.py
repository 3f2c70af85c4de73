"""Rewards and gradients that are not finite: what they cost a whole run, killed and resumed as well."""

import json
import math

import pytest
import torch

from flashgrpo.errors import UserError
from flashgrpo.jsontext import to_json
from flashgrpo.run.lines import read_lines
from flashgrpo.scoring.heldout import Evaluation, evaluation_record, largest_changes
from flashgrpo.train import train
from flashgrpo.types import Prompt, RewardTable
from tests.conftest import small_run
from tests.end_to_end.test_train import assert_same_run

SOME_ARE_NONE = """
def mine(videos, prompts, **columns):
    values = videos.mean(dim=(1, 2, 3, 4)).tolist()
    return [None if int(value * 1e4) % {of} == 0 else value for value in values]
"""


def overrides(folder, of: int = 5) -> list[str]:
    """A reward that has no number for one video in `of`, and limits above that."""
    (folder / "mine.py").write_text(SOME_ARE_NONE.format(of=of))
    return [f"rewards={{mine: {{call: '{folder}/mine.py:mine'}}}}", "tracking.preflight=warn"]


def strict(file) -> list[dict]:
    """Read lines, in which NaN and Infinity are no JSON."""

    def refused(name: str) -> None:
        raise AssertionError(name)

    return [json.loads(line, parse_constant=refused) for line in file.read_text().splitlines()]


def test_killed_and_resumed_through_bad_updates_equals_uninterrupted(tmp_path, nursery):
    """Steps 2 to 4 are bad and some groups are: with a limit of 4 in a row it must not matter where the run was killed,
    with a limit of 3 the count must go on where it stood."""
    limits = ("optim.max_bad_steps=4", "optim.max_bad_groups=1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small_run(tmp_path / "run", "updates=6", *limits, *overrides(tmp_path)).to_yaml())
    settings = str(recipe)
    whole = tmp_path / "whole"
    nursery.run("train_with_bad_steps", settings, [1, 2, 3], None, f"out={whole}")
    for step in (2, 3, 5):
        nursery.start("train_with_bad_steps", settings, [1, 2, 3], step, f"out={tmp_path}/run").wait()
    nursery.run("train_with_bad_steps", settings, [1, 2, 3], None, f"out={tmp_path}/run")
    assert_same_run(tmp_path / "run", whole, 6)
    lines = strict(whole / "metrics.jsonl")
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 1, 1, None, None]
    assert any(line.get("dropped_groups") for line in lines)
    strict(whole / "evaluations.jsonl")
    out = f"out={tmp_path}/short"
    nursery.start("train_with_bad_steps", settings, [1, 2, 3], 3, out, "optim.max_bad_steps=3").wait()
    ended = nursery.start("train_with_bad_steps", settings, [1, 2, 3], None, out, "optim.max_bad_steps=3")
    assert ended.wait() == [2]
    assert "number 3 in a row" in ended.said()


def evaluation(*values: list[float]) -> Evaluation:
    """Scores of two samples each of some prompts, by a trained and a watched reward."""
    prompts = [Prompt(f"prompt {row // 2}", {}) for row in range(len(values))]
    weights = torch.tensor([2.0, 0.0], dtype=torch.float64)
    return Evaluation(prompts, RewardTable(("r", "w"), torch.tensor(values, dtype=torch.float64), weights), {})


def test_a_prompt_without_a_score_leaves_the_paired_difference():
    """Of three prompts the first lacks a score now and the third lacked one of the base model: the second counts."""
    nan = math.nan
    base = evaluation_record(0, evaluation([1, 0], [1, 0], [2, 0], [4, 0], [1, nan], [1, 0]), None, 2)
    assert (base["dropped_prompts"], base["reward"], base["rewards"]) == (1, 4.0, {"r": 2.0})
    base = json.loads(to_json(base))
    line = evaluation_record(5, evaluation([nan, 0], [9, 0], [3, 1], [6, 1], [1, 0], [1, 0]), base, 2)
    assert (line["dropped_prompts"], line["reward"], line["base_reward"]) == (2, 9.0, 6.0)
    assert (line["difference"], line["interval"], line["watched"]) == (3.0, None, {"w": 1.0})
    assert line["base_rewards"] == {"r": 3.0}
    assert 0 not in largest_changes(line["samples"])
    json.dumps(line, allow_nan=False)
    with pytest.raises(UserError, match="every held-out prompt has a reward that is not finite"):
        evaluation_record(5, evaluation([nan, 0], [1, 0]), None, 2)


def test_too_many_bad_groups_end_the_run_and_keep_what_was_done(tmp_path):
    config = small_run(tmp_path / "run", "updates=6", *overrides(tmp_path, of=2), "evaluation.every=100")
    with pytest.raises(UserError, match=r"not finite in . of 2 groups: reward mine is nan for '.*optim.max_bad_groups"):
        train(config)
    done = len(read_lines(tmp_path / "run/metrics.jsonl"))
    assert done < 6


def test_a_resumed_run_may_learn_otherwise_and_says_so(make_run):
    """What a sentence about bad updates advises has to be possible."""
    run = train(make_run("updates=2"))
    changes = ("optim.lr=1e-5", "optim.max_bad_groups=0.5", "algorithm.clip_range=0.002")
    train(make_run("updates=3", *changes))
    train(make_run("updates=3", *changes))
    lines = strict(run / "changes.jsonl")
    assert {line["setting"] for line in lines} == {
        "optim.lr",
        "optim.max_bad_groups",
        "algorithm.objective.clip_range",
    }
    assert len(lines) == 3
    assert all(line["after_update"] == 2 for line in lines)
    assert [line["lr"] for line in read_lines(run / "metrics.jsonl")][1:] == [0.003, 1e-5]

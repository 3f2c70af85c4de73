"""Rewards: their names, their arguments, and what they return."""

import pytest

from flashgrpo.run import checkpoint
from flashgrpo.run.lines import read_lines
from tests.bad_inputs.cases import Case

MINE = """
def good(videos, prompts, threshold=0.5, **columns): return [threshold] * len(prompts)
def few(videos, prompts, **columns): return [1.0]
def nan(videos, prompts, **columns): return [float("nan")] * len(prompts)
def inf(videos, prompts, **columns): return [float("inf")] * len(prompts)
def none(videos, prompts, **columns): return {}
def narrow(videos, prompts): return [1.0] * len(prompts)
def changes(videos, prompts, **columns): return videos.mul_(2).mean((1, 2, 3, 4))
def mean(videos, prompts, **columns): return videos.mean()
def table(videos, prompts, **columns): return videos.mean((2, 3, 4))
def text(videos, prompts, **columns): return ["good"] * len(prompts)
"""


def of_call(call: str, sentence: str, more: str = "", begun: bool = False) -> Case:
    """Training on one reward; mine:NAME is a function of MINE."""
    call = call.replace("mine:", "HERE/mine.py:")
    reward = f"rewards={{agreement: null, persistence: null, background: null, mine: {{call: '{call}'{more}}}}}"
    return Case(["train", "RECIPE", reward, "updates=1"], sentence, {"mine.py": MINE}, begun=begun)


CASES = [
    of_call("nothing", "'nothing' must have the form package.module:function"),
    of_call("no.such.module:f", "no.such.module cannot be imported"),
    of_call("/no/such/file.py:f", "there is no file /no/such/file.py"),
    *(
        of_call(f"builtins:{name}", f"builtins:{name} does not say which arguments it takes; write a function")
        for name in ("max", "dict", "int", "ValueError", "type", "iter")
    ),
    of_call("builtins:abs", "has incorrect arguments); give it a **columns", ", args: {x: 1}"),
    of_call("math:pi", "math has no function 'pi'"),
    of_call("os:path", "os has no function 'path'"),
    of_call("..:f", "rewards.mine.call: .. raised TypeError"),
    of_call("mine:gone", "has no function 'gone'"),
    of_call("flashgrpo.rewards.shapes:agrement", "did you mean 'agreement'?"),
    of_call("mine:good", "did you mean 'threshold'?", ", args: {treshold: 1}"),
    of_call("mine:narrow", "give it a **columns parameter"),
    of_call("mine:few", "reward mine has 1 numbers for 2 videos", begun=True),
    of_call("mine:nan", "reward mine is not finite for 2 of 2 samples; their groups would be dropped", begun=True),
    of_call("mine:inf", "reward mine is not finite for 2 of 2 samples", begun=True),
    of_call("mine:text", "reward mine must be 2 numbers", begun=True),
    of_call("mine:mean", "reward mine must be 2 numbers, one for each video, not one for all of them", begun=True),
    of_call("mine:table", "reward mine must be 2 numbers, one for each video, not of shape (2, 9)", begun=True),
    of_call("mine:none", "reward mine returned an empty mapping", begun=True),
    of_call("mine:changes", "changed the videos in place", begun=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rewards(refuse, case):
    refuse(case)


LATER = """
calls = 0
def later(videos, prompts, **columns):
    global calls
    calls += 1
    return [float(len(prompts) + i) if calls < 14 else float("nan") for i in range(len(prompts))]
"""


def test_a_run_whose_reward_has_been_mended_starts_in_the_same_folder(refuse, command, tmp_path):
    case = of_call("mine:few", "reward mine has 1 numbers", begun=True)
    refuse(case)
    (tmp_path / "mine.py").write_text(MINE.replace("return [1.0]\n", "return [1.0] * len(prompts)\n"))
    assert command(*case.arguments(tmp_path))[0] == 0


def test_a_reward_that_fails_later_loses_nothing(refuse, tmp_path):
    words = [*of_call("mine:later", "").command, "updates=9", "evaluation.every=9", "checkpoint.every=9"]
    refuse(Case(words, "reward mine is nan for", {"mine.py": LATER}, begun=True))
    done = len(read_lines(tmp_path / "run/metrics.jsonl"))
    assert done >= 3
    assert checkpoint.updates(tmp_path / "run/checkpoints") == [done]

"""Reward servers and environments: what is served, where, with which token, and how a recipe asks for it."""

import pytest

from tests.bad_inputs.cases import Case
from tests.bad_inputs.test_rewards import of_call

NOBODY = "http://127.0.0.1:1"


def serve(words: str, sentence: str, **more) -> Case:
    return Case(f"reward serve --port 0 {words}", sentence, **more)


def env(script: str, sentence: str, words: str = "", **files) -> Case:
    """An environment of a file that begins with this."""
    return Case(f"reward env HERE/mine.py:f {words}", sentence, {"mine.py": script, **files})


def block(*lines: str, end: str = "# ///\n") -> str:
    return "# /// script\n" + "".join(f"# {line}\n" for line in lines) + end


def ask(args: str, sentence: str, call: str = NOBODY, **more) -> Case:
    case = of_call(call, sentence, f", args: {{patience: 0, {args}}}")
    return Case(case.command, sentence, **more)


CASES = [
    serve("nothing", "'nothing' must have the form package.module:function"),
    serve("http://127.0.0.1:1", "is a server already; serve a reward by its name"),
    serve("HERE/gone.py:f", "there is no file HERE/gone.py"),
    serve("frames:gone", "flashgrpo.rewards.frames has no function 'gone'"),
    serve("frames:exposure treshold=1", "the function has no parameter 'treshold'"),
    serve("frames:exposure nonsense", "override 'nonsense'"),
    serve("frames:exposure --host 192.0.2.1", "cannot listen on 192.0.2.1:0: cannot assign requested address"),
    serve("frames:exposure --host two..dots", "cannot listen on two..dots:0"),
    serve("frames:exposure --token-env UNSET_VARIABLE", "the environment variable UNSET_VARIABLE is not set"),
    serve("frames:exposure --token-env ''", "token_env: '' is no name of an environment variable"),
    serve("frames:exposure", "FLASHGRPO_REWARD_TOKEN is empty", env={"FLASHGRPO_REWARD_TOKEN": " "}),
    serve("frames:exposure", "visible ASCII characters", env={"FLASHGRPO_REWARD_TOKEN": "two words"}),
    serve("frames:exposure --batch 0", "should be greater than or equal to 1"),
    serve("frames:exposure --max-mib 1e12", "--max-mib above 0"),
    Case("reward human HERE/file --port 0", "cannot write HERE/file: not a directory", {"file": ""}),
    Case(
        "reward human HERE/v --port 0",
        "votes.jsonl, line 1: it is no vote; take the line out",
        {"v/votes.jsonl": "x\n"},
    ),
    Case("reward human HERE/v --voters 0", "should be greater than or equal to 1"),
    Case("reward human HERE/v --port 0 --predict-with HERE", "nobody judges within --wait SECONDS; give both"),
    Case(
        "reward human HERE/v --port 0 --wait 1 --predict-with HERE/gone", "the CLIP model HERE/gone could not be loaded"
    ),
    Case("reward human HERE/v --port 0", "visible ASCII", env={"FLASHGRPO_REWARD_TOKEN": "two words"}),
    of_call("flashgrpo.rewards.human:Replay", "has no votes.jsonl; `flashgrpo reward human", ", args: {folder: HERE}"),
    Case("reward env mine.rewards:f", "give what it needs in --requirements FILE"),
    Case("reward env HERE/gone.py:f", "the reward: HERE/gone.py cannot be read: No such file"),
    env("", "--requirements: HERE/gone.txt cannot be read: No such file", "--requirements HERE/gone.txt"),
    env("", "--requirements: HERE cannot be read: Is a directory", "--requirements HERE"),
    env(block("dependencies = 1"), "mine.py: dependencies must be a list"),
    env(block("dependencies = [1]"), "the block `# /// script` cannot be read"),
    env(block("dependencies = ['a b c']"), "the block `# /// script` cannot be read: Expected"),
    env(block("dependencies = ["), "the block `# /// script` cannot be read: "),
    env(block("dependencies = []", end="import os\n"), "must end with a line `# ///`"),
    env(block("requires-python = '<3.8'"), "needs Python <3.8, and this is"),
    env(block("requires-python = 3.8"), "the block `# /// script` cannot be read"),
    env(block() * 2, "has more than one block `# /// script`"),
    ask("", "write http://host:port", call="http://"),
    ask("", "the URL of x holds a password", call="http://user:word@x"),
    ask("", "is no URL of a server", call="http://x:y"),
    ask("encoding: float", "did you mean 'float32'?, not 'float'"),
    ask("batch: 0", "batch of 1 or more"),
    ask("timeout: 0", "timeout above 0"),
    ask("timeuot: 9", "did you mean 'timeout'?"),
    ask("token_env: SECRET", "'SECRET' must begin with FLASHGRPO_"),
    ask("token_env: FLASHGRPO_UNSET", "FLASHGRPO_UNSET is not set: it must hold a token"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_servers(refuse, case, tmp_path):
    refuse(Case(case.command, case.sentence.replace("HERE", str(tmp_path)), case.files, case.env))

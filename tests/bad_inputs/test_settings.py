"""Settings: of recipes, of overrides, and of the command line."""

import pytest

from tests.bad_inputs.cases import Case

LONG_NAMES = ["config"], ["report"], ["evaluate"], ["export"], ["sample"], ["doctor"], ["compare"], ["demo", "--out"]
LONG_PATHS = "out=", "prompts.train=", "model.path=", "model.condition_cache=", "rewards.agreement.call="
CASES = [
    Case("train RECIPE updatse=3", "unknown key updatse; did you mean 'updates'?"),
    Case("train RECIPE rollout.group_size=1", "rollout.group_size"),
    Case("train RECIPE optim.lr=true", "optim.lr must be a number, not true"),
    Case("train RECIPE algorithm.steps.window=[false,0.5]", "algorithm.steps.window must be a number, not false"),
    Case("train RECIPE algorithm.steps.window=[0.0,2.0]", "window of OneStep"),
    Case("train RECIPE algorithm.objective.kind=contrast", "contrast compares velocities at re-noised samples"),
    Case("train RECIPE algorithm.objective.kind=drpo", "scores of flow are no log-probabilities of tokens"),
    Case("train RECIPE algorithm.objective.kind=competing", "competing is for branches whose scores are no"),
    Case("train RECIPE 'algorithm.objective={kind: competing, tau: 0}'", "tau of Competing must be from"),
    Case("train RECIPE algorithm.objective.kind=competing optim.minibatches=900", "optimizer steps cannot share"),
    Case("train RECIPE algorithm.credit.baseline=anchor", "a flow model draws no anchor"),
    Case("train RECIPE algorithm.credit.unsafe_weight=0.5", "there is no anchor for std=group-and-anchor"),
    Case("train RECIPE algorithm.credit.unsafe_weight=2", "unsafe_weight must be from 0 to 1"),
    Case("train RECIPE algorithm.objective.average_coef=1", "objective.average_coef: there is no average to stay near"),
    Case("train RECIPE algorithm.explore.kind=deterministic", "a deterministic rollout has no steps to record"),
    Case("train RECIPE algorithm.score.kind=renoised", "leave a rollout's stochastic steps untrained"),
    Case("train RECIPE algorithm=awm rollout.num_steps=4", "algorithm.score.times with rollout.num_steps 4"),
    Case("train RECIPE algorithm=v-grpo rollout.retain=true", "rollout.retain: re-noised samples are scored when"),
    Case("train RECIPE algorithm=v-grpo algorithm.score.times=0", "times of Renoised"),
    Case("train RECIPE algorithm=awm algorithm.objective.average_coef=0", "an average that does not draw serves"),
    Case("train RECIPE algorithm=diffusion-nft algorithm.behaviour.ceiling=1", "ceiling of Averaged must be"),
    Case(
        "train RECIPE algorithm.behaviour.kind=frozen algorithm.behaviour.updates=1", "updates of Frozen must be from 2"
    ),
    Case(
        "train RECIPE algorithm=awm algorithm.noise.eta=0.5",
        "algorithm.noise is a setting of another kind of algorithm.expl",
    ),
    Case("config HERE/none.yaml", "there is no recipe"),
    Case("tran", "No such command 'tran'"),
    Case("demo --seed -1", "Invalid value for '--seed'"),
    Case("sample", "Missing argument 'run'"),
    Case("config tiny model.negative_prompt=caf\udce9", "the argument 'model.negative_prompt=caf\\xe9' is no UTF-8"),
    Case("config tiny out=~nobody-here/x", "out: no home is known for ~nobody-here"),
    Case("report ~nobody-here/x", "no home is known for ~nobody-here"),
    Case("compare tiny --out ~nobody-here/x", "no home is known for ~nobody-here"),
    Case("sample HERE/run --file ~nobody-here/x", "no home is known for ~nobody-here"),
    Case(["config", "a\0b"], "'a\\x00b' is no path, for it holds the character NUL"),
    Case(["config", "tiny", "model.path=a\0b"], "'a\\x00b' is no path, for it holds the character NUL"),
    *(Case([*words, "x" * 300], "a name in it has more than 255 bytes") for words in LONG_NAMES),
    *(Case(["config", "tiny", key + "é" * 200], "a name in it has more than 255 bytes") for key in LONG_PATHS),
    Case(["report", "x/" * 3000 + "x"], "file name too long"),
    Case(["evaluate", "x/" * 3000 + "x"], "file name too long"),
    Case(["export", "x/" * 3000 + "x"], "file name too long"),
    Case(["train", "RECIPE", "model.path=" + "x/" * 3000], "file name too long"),
    Case(["train", "RECIPE", "prompts.train=" + "x/" * 3000 + "a.txt"], "file name too long"),
    Case("sample HERE/run", "give either a prompt or --file"),
    Case("reward serve jpeg:compressibility --host 203.0.113.1", "choose another --port or --host"),
    Case("sample RUN ''", "the prompt is empty"),
    Case("export RUN --push lora", "'lora' is no repository; write OWNER/NAME"),
    Case("config HERE/a.yaml", "line 1: $FLASHGRPO_MISSING is not set", {"a.yaml": "out: !env FLASHGRPO_MISSING/a"}),
    Case("config HERE/a.yaml", "it holds more than 10,000 values", {"a.yaml": f"out: [{'1,' * 10_001}]"}),
    Case("train RECIPE parallel.shares=[1,1]", "parallel.shares: 2 shares for 1 data ranks; give each one"),
    Case("config tiny algorithm.steps.window=[0.96,0.99]", "are to be drawn: widen the window or take more steps"),
    Case("reward env no.module:f", "give what it needs in --requirements FILE; only files and shipped rewards tell"),
    Case("config tiny algorithm={preset:[]}", "no preset is called []"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_settings(refuse, case):
    refuse(case)

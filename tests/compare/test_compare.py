"""Algorithms at equal compute: what an update costs, what a budget buys, whole comparisons, the page."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from flashgrpo.assembly import Assembly
from flashgrpo.cli import main
from flashgrpo.compare import compare, statistics, write_data
from flashgrpo.compare.figures import write_figures
from flashgrpo.compare.folder import ComparisonFolder, RunFiles
from flashgrpo.compare.plan import Plan, make_plan, read_algorithms
from flashgrpo.compare.processes import note_failure
from flashgrpo.config import RunConfig
from flashgrpo.diagnostics import measure as diagnostics
from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.formats import Numbers
from flashgrpo.kinds.flow import planned_cost
from flashgrpo.presets import PRESETS
from flashgrpo.process import Cost
from flashgrpo.processes.flow.cost import Guided, update_cost
from flashgrpo.prompts import prompt_groups
from flashgrpo.report import write_report
from flashgrpo.report.comparison import headline
from flashgrpo.run.lines import read_lines
from flashgrpo.run.progress import Clock
from flashgrpo.train import train
from tests.conftest import EXACT, small_run
from tests.report.test_report import CHROMIUM, FLAGS

TWENTY = ("rollout.prompts=3", "rollout.group_size=4", "rollout.num_steps=20")  # 12 samples of 20 steps
PLAIN = (*TWENTY, "rollout.guidance_scale=1")


# ---- what an update costs --------------------------------------------------------------------------------------------


def cost_of(config: RunConfig, update: int, guided: Guided | None = None) -> Cost:
    """Return what an update costs, by the settings alone where `guided` is not given."""
    algorithm, recomputes = config.algorithm, config.model.gradient_checkpointing
    seed, passes, columns = config.seed, config.optim.passes, algorithm.objective.columns
    return update_cost(
        algorithm.explore,
        algorithm.score,
        config.rollout,
        seed,
        update,
        passes,
        columns,
        config.uses,
        recomputes,
        guided,
    )


@pytest.mark.parametrize(
    ("overrides", "rollout", "update"),
    [
        (("algorithm=flash-grpo", *PLAIN), 12 * 20, 12 * 3),
        (("algorithm=flow-grpo", *PLAIN), 12 * 20, 12 * 19 * 3),
        (("algorithm=mix-grpo", *PLAIN), 12 * 20, 12 * 4 * 3),
        (("algorithm=dance-grpo", *PLAIN), 12 * 20, 12 * 11 * 3),  # 0.6 of 19 steps
        (("algorithm=flash-grpo", *TWENTY, "rollout.guidance_scale=4.5"), 2 * 12 * 20, 2 * 12 * 3),
        (("algorithm=flow-grpo", *TWENTY, "rollout.guidance_scale=4.5"), 2 * 12 * 20, 2 * 12 * 19 * 3),
        (("algorithm=flash-grpo", *PLAIN, "model.gradient_checkpointing=true"), 12 * 20, 12 * 4),
        (("algorithm=flash-grpo", *PLAIN, "algorithm.kl_coef=0.1"), 12 * 20, 12 * 4),
        (
            ("algorithm=flow-grpo", *PLAIN, "algorithm.kl_coef=0.1", "model.gradient_checkpointing=true"),
            12 * 20,
            12 * 19 * 5,
        ),
        (("algorithm=flash-grpo", *PLAIN, "optim.passes=2", "optim.minibatches=3"), 12 * 20, 12 * 3 * 2),
        (("algorithm=flash-grpo", *PLAIN, "rollout.guidance_scale_2=3"), 2 * 12 * 20, 2 * 12 * 3),
    ],
)
def test_the_cost_of_an_update_by_hand(make_run, overrides, rollout, update):
    assert cost_of(make_run(*overrides), 5) == Cost(rollout, update)


def test_two_experts_with_guidance_at_one_of_them(make_run):
    guided = Guided([True] * 5 + [False] * 15, [True] * 5 + [False] * 15)
    assert cost_of(make_run("algorithm=flow-grpo", *PLAIN), 0, guided) == Cost(12 * 25, 12 * 24 * 3)


@pytest.mark.parametrize("algorithm", ["flash-grpo", "flow-grpo", "{preset: mix-grpo, steps: {size: 2}}"])
@pytest.mark.parametrize("guidance", [1, 2])
def test_the_network_is_run_as_often_as_counted(make_run, algorithm, guidance):
    config = make_run(
        f"algorithm={algorithm}", f"rollout.guidance_scale={guidance}", "optim.micro_batch=1", "rollout.retain=false"
    )
    parts = Assembly(config, single_process())
    rows = [0]

    def count(module, inputs):
        rows[0] += len(inputs[0])

    parts.process.network.register_forward_pre_hook(count)
    drawn = parts.draw_and_score(prompt_groups(parts.prompts, config.seed, 1, 2, 2), Clock())
    assert rows == [planned_cost(config, 1).rollout]
    rows[0] = 0
    parts.learn(parts.compare(drawn).record)
    assert 3 * rows[0] == planned_cost(config, 1).update
    assert parts.process.cost(config.seed, 1, 1, parts.objective.columns) == planned_cost(config, 1)


def test_every_line_of_metrics_says_what_its_update_cost(make_run):
    config = make_run("updates=2", "algorithm=flow-grpo")
    for line in read_lines(train(config) / "metrics.jsonl"):
        transitions = sum(line["transitions_by_step"].values())
        assert line["compute"] == {"rollout": 2 * line["samples"] * 4, "update": 2 * 3 * transitions}


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan(*overrides: str, algorithms: Any = "flash-grpo,flow-grpo", **options: Any) -> Plan:
    ten = ("rollout.num_steps=10", *EXACT)
    return make_plan(
        "tiny", [*ten, *overrides], algorithms, **{"seeds": 2, "budget": None, "points": 5, "keep": "", **options}
    )


def test_a_budget_buys_whole_updates():
    made = plan("updates=20")  # 64 samples of 10 guided steps: 1280 + 384 an update
    assert made.budget == 20 * 1664
    assert {name: config.updates for name, config in made.algorithms.items()} == {"flash-grpo": 20, "flow-grpo": 7}
    assert made.algorithms["flash-grpo"].evaluation.every == 4
    assert list(made.seeds) == [0, 1]
    exactly = plan(budget=2 * 4736)
    assert exactly.algorithms["flow-grpo"].updates == 2
    assert plan(budget=2 * 4736 - 1).algorithms["flow-grpo"].updates == 1


def test_settings_of_all_of_one_and_of_the_recipe():
    made = plan(
        "algorithm.clip_range=0.01",
        "updates=40",
        "b:optim.lr=1e-5",
        "b:rollout.guidance_scale=1",
        "rewards.agreement.args={parts: [color]}",
        algorithms="flash-grpo,b={preset: flow-grpo, kl_coef: 0.1}",
        keep="noise",
    )
    a, b = made.algorithms["flash-grpo"], made.algorithms["b"]
    assert (a.algorithm.explore.noise.kind, b.algorithm.explore.noise.kind) == ("cps", "cps")
    assert (a.algorithm.objective.clip_range, b.algorithm.objective.clip_range) == (0.01, 0.01)
    assert (a.algorithm.objective.kl_coef, b.algorithm.objective.kl_coef) == (0.0, 0.1)
    assert (a.algorithm.explore.steps.kind, b.algorithm.explore.steps.kind) == ("one", "all")
    assert a.algorithm.explore.steps.draw == "iid", "the recipe's own algorithm is replaced"
    assert (a.optim.lr, b.optim.lr) == (3e-3, 1e-5)
    assert (a.rollout.guidance_scale, b.rollout.guidance_scale) == (1.5, 1.0)
    assert a.evaluation.guidance_scale == b.evaluation.guidance_scale == 1.5
    assert b.rewards["agreement"].args == {"parts": ["color"]}
    [kept] = plan(algorithms="dance-grpo", keep="grouping,adv_clip").algorithms.values()
    assert (kept.algorithm.credit.std, kept.algorithm.explore.shared_noise) == ("batch", False)
    assert kept.algorithm.explore.steps == PRESETS["dance-grpo"].explore.steps
    assert plan("algorithm.noise={kind: cps, eta: 0.5}").algorithms["flow-grpo"].algorithm.explore.noise.eta == 0.5


def test_names_and_changes_are_told_apart():
    assert read_algorithms("a={preset: mix-grpo, steps: {size: 2, start: 1}},flow-grpo") == {
        "a": {"preset": "mix-grpo", "steps": {"size": 2, "start": 1}},
        "flow-grpo": "flow-grpo",
    }


@pytest.mark.parametrize(
    ("overrides", "options", "sentence"),
    [
        ((), {"algorithms": "flsh-grpo"}, "no preset is called 'flsh-grpo'; did you mean 'flash-grpo'?"),
        ((), {"algorithms": "a={preset: flow}"}, "no preset is called 'flow'"),
        ((), {"algorithms": "flash-grpo,flash-grpo"}, "flash-grpo comes twice"),
        ((), {"algorithms": "../x"}, "cannot name a folder"),
        ((), {"algorithms": ""}, "name at least one of flash-grpo"),
        ((), {"seeds": 0}, "--seeds: a comparison needs at least 1 seed"),
        ((), {"points": 0}, "--points"),
        ((), {"budget": 100}, "--budget: 100 forwards are less than one update of flash-grpo, which costs 1,664"),
        ((), {"budget": 10**12}, "more than 100,000 updates"),
        (
            ("updates=2",),
            {},
            "updates: the 2 updates of flash-grpo, 3,328 forwards, are less than one update of flow-grpo, which costs",
        ),
        ((), {"keep": "nois"}, "no 'nois'; did you mean 'noise'?"),
        (("flow:optim.lr=1",), {}, "no algorithm is called 'flow'; did you mean 'flow-grpo'?"),
        (("flow-grpo:rewards.agreement.weight=2",), {}, "all algorithms are to solve one problem"),
        (("flow-grpo:optim.lrr=2",), {}, "tiny, flow-grpo: unknown key optim.lrr; did you mean 'lr'?"),
        (("algorithm=flow-grpo",), {}, "--algorithms says which"),
        (("out=x",), {}, "--out decides that"),
        (("evaluation.every=3",), {}, "--points decides that"),
    ],
)
def test_bad_input_in_one_sentence(overrides, options, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan(*overrides, **options)


def test_a_folder_is_gone_on_with_by_the_same_plan_only(tmp_path):
    folder = ComparisonFolder(tmp_path / "c")

    def claim(*overrides: str, **options: Any) -> None:
        with folder.claimed(plan(*overrides, **options)):
            pass

    claim(budget=99_999)
    claim(budget=99_999)
    claim(
        "checkpoint.every=3", "parallel.threads=2", budget=99_999, seeds=3, algorithms="flash-grpo,flow-grpo,mix-grpo"
    )
    for overrides, options, sentence in (
        (
            ("optim.lr=1e-5",),
            {"seeds": 3, "algorithms": "flash-grpo,flow-grpo,mix-grpo"},
            "another flash-grpo: optim.lr",
        ),
        ((), {"seeds": 3}, "also has mix-grpo"),
        ((), {"algorithms": "flash-grpo,flow-grpo,mix-grpo"}, "also has seed 2"),
    ):
        with pytest.raises(UserError, match=sentence):
            claim(*overrides, budget=99_999, **options)
    written = json.loads(folder.plan_file.read_text())
    for algorithm in written["algorithms"].values():  # as by a version before these settings
        del algorithm["settings"]["algorithm"]["credit"]["unsafe_weight"]
        del algorithm["settings"]["rollout"]["kind"]
    folder.plan_file.write_text(json.dumps(written))
    claim(budget=99_999, seeds=3, algorithms="flash-grpo,flow-grpo,mix-grpo")
    with pytest.raises(UserError, match="is a comparison with another budget; choose another folder"):
        claim(budget=88_888, seeds=3, algorithms="flash-grpo,flow-grpo,mix-grpo")
    with pytest.raises(UserError, match="is no comparison, for it has no plan"):
        ComparisonFolder(tmp_path).plan()
    with pytest.raises(UserError, match="holds 'c' and is no comparison"), ComparisonFolder(tmp_path).claimed(plan()):
        pass
    same = {"budget": 99_999, "seeds": 3, "algorithms": "flash-grpo,flow-grpo,mix-grpo"}
    with folder.claimed(plan(**same)), pytest.raises(UserError, match="another process is comparing"):
        claim(**same)


def test_the_command_line_tells_it_in_one_sentence(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    monkeypatch.setattr(sys, "argv", ["flashgrpo", "compare", "tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "holds 'mine.txt' and is no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# ---- statistics ------------------------------------------------------------------------------------------------------


def run_of(rewards: list[float], each: int = 10, **changes: Any) -> dict[str, Any]:
    points = [
        {"update": i, "compute": 10 * i, "seconds": each * i, "reward": reward, "watch": None, "interval": None}
        for i, reward in enumerate(rewards)
    ]
    return {"points": points, "status": "complete", "reason": None, "updates": [], **changes}


def test_curves_and_the_first_time_at_a_level():
    x, rewards = statistics.curve([run_of([0.0, 1.0, 3.0]), run_of([0.0, 3.0, 3.0], each=20)], "compute")
    assert x.tolist() == [0, 10, 20]
    assert rewards.mean(axis=0).tolist() == [0, 2, 3]
    assert statistics.first_reached(x, rewards[0], 2.0) == 15
    assert statistics.first_reached(x, rewards[0], 0.0) == 0
    assert statistics.first_reached(x, rewards[0], 3.1) is None
    x, _ = statistics.curve([run_of([0.0, 1.0, 3.0]), run_of([0.0, 3.0, 3.0], each=20)], "seconds")
    assert x.tolist() == [0, 15, 30]
    x, rewards = statistics.curve([run_of([0.0, 1.0, 3.0]), run_of([0.0, 2.0], status="ended early")], "compute")
    assert x.tolist() == [0, 10, 20]
    assert rewards.tolist() == [[0, 1, 3], [0, 2, 2]]
    assert len(statistics.curve([], "compute")[0]) == 0


def test_the_spread_of_gradients():
    updates = [
        {"grad_norm": 1.0, "grad_norm_by_step": {"0": 1.0, "3": 3.0}},
        {"grad_norm": 3.0, "grad_norm_by_step": {}},
    ]
    assert statistics.gradient_spread(updates) == {"over_updates": 0.5, "over_steps": 0.5, "by_step": {"0": 1, "3": 3}}
    assert statistics.gradient_spread([])["over_updates"] is None


def test_what_counts_as_a_collapse():
    noise = 0.01 * np.sin(7 * np.arange(60))

    def training(means: np.ndarray, **changes: Any) -> str | None:
        updates = [{"reward": float(r), "grad_norm": 1.0} for r in means + noise]
        return statistics.collapse(run_of([0.5], updates=updates, **changes))

    up, down = np.linspace(0.5, 0.8, 30), np.linspace(0.8, 0.52, 30)
    assert training(np.concatenate([up, np.full(30, 0.8)])) is None
    assert "training reward fell from 0.775 to 0.545" in (training(np.concatenate([up, down])) or "")
    assert training(np.concatenate([up, np.linspace(0.8, 0.7, 30)])) is None, "a third of the gain"
    assert training(np.full(60, 0.5)) is None, "noise alone"
    broken = run_of([0.5], updates=[{"reward": 0.5, "grad_norm": None}])
    assert statistics.collapse(broken) == "a gradient or a reward was not finite"
    skipped = {"reward": 0.5, "grad_norm": None, "skipped_steps": 1}
    dropped = {"reward": None, "grad_norm": 0.0, "dropped_groups": 2}
    assert statistics.collapse(run_of([0.5], updates=[skipped, dropped])) is None, "such an update cost itself"
    assert statistics.collapse(run_of([0.5], updates=[{**skipped, "reward": None}])) is not None
    reason = "the gradient of optimizer step 3 is nan; lower optim.lr or check rewards"
    assert statistics.collapse(run_of([0.5], status="failed", reason=reason)) == reason
    below = run_of([0.5])
    below["points"][-1]["interval"] = [-0.3, -0.1]
    assert statistics.collapse(below) == "held-out reward fell below the base by 0.1 to 0.3"
    watched = run_of([0.5], status="ended early")
    watched["points"][-1]["watch"] = "the watched reward x has fallen"
    assert statistics.collapse(watched) == "the watched reward x has fallen"


# ---- whole comparisons -----------------------------------------------------------------------------------------------

PLANTED = """
import sys
from pathlib import Path
tried = Path(sys.argv[-1]).with_suffix(".tried")
calls = 0
def brightness(videos, prompts, **columns):
    global calls
    calls += 1
    if calls > 2 and sys.argv[-1].endswith("flow-grpo/seed-1.yaml") and not tried.exists():
        tried.touch()
        raise ValueError("planted")
    return videos.mean(dim=(1, 2, 3, 4))
"""


@pytest.fixture(scope="module")
def problem(tmp_path_factory) -> Path:
    """A very small recipe, whose reward fails once in one run of the comparison, after its base model was scored."""
    folder = tmp_path_factory.mktemp("problem")
    (folder / "planted.py").write_text(PLANTED)
    config = small_run(
        folder / "run",
        f"rewards={{bright: {{call: '{folder}/planted.py:brightness'}}, agreement: null, persistence: null}}",
        "tracking.preflight=skip",
        "tracking.progress=true",
        "parallel.threads=1",
        "checkpoint.every=1",
    )
    recipe = folder / "small.yaml"
    recipe.write_text(config.to_yaml(), "utf-8")
    return recipe


OPTIONS = {"algorithms": "flash-grpo,flow-grpo", "budget": 250, "points": 2}  # 32 + 24 and 32 + 72 an update


@pytest.fixture(scope="module")
def compared(problem, tmp_path_factory):
    """Two algorithms, two seeds, two at a time; one run fails."""
    out, said = tmp_path_factory.mktemp("compared") / "c", Console(record=True, file=open(os.devnull, "w"), width=300)  # noqa: SIM115
    return out, compare(str(problem), out=out, seeds=2, jobs=2, console=said, **OPTIONS), said.export_text()


def untimed(value: Any) -> Any:
    """Without what a clock says."""
    if isinstance(value, dict):
        return {key: untimed(entry) for key, entry in value.items() if "seconds" not in key}
    return [untimed(entry) for entry in value] if isinstance(value, list) else value


def test_a_comparison_with_a_run_that_fails(compared):
    out, found, said = compared
    assert found == json.loads((out / "comparison.json").read_text())
    assert {name: entry["updates"] for name, entry in found["algorithms"].items()} == {"flash-grpo": 4, "flow-grpo": 2}
    runs = {(run["algorithm"], run["seed"]): run for run in found["runs"]}
    assert {key: run["status"] for key, run in runs.items()} == {
        ("flash-grpo", 0): "complete",
        ("flash-grpo", 1): "complete",
        ("flow-grpo", 0): "complete",
        ("flow-grpo", 1): "failed",
    }
    assert "planted" in runs["flow-grpo", 1]["reason"]
    assert "flow-grpo seed 1 failed: " in said
    whole = runs["flash-grpo", 0]
    assert [point["update"] for point in whole["points"]] == [0, 2, 4]
    assert [point["compute"] for point in whole["points"]] == [0, 112, 224]
    assert len(whole["updates"]) == 4
    assert {run["points"][0]["reward"] for run in found["runs"] if run["points"]} == {found["base_reward"]}
    flash, flow = found["summary"]
    assert (flash["ended"], flow["ended"], flow["failed"]) == (2, 1, 1)
    assert flow["over_first"]["seeds"] == [0]
    assert flash["per_sample"]["update"] == 6  # 3 of the one step, by two branches
    assert flow["per_sample"]["update"] == 18
    assert flow["per_sample"]["rollout"] == flash["per_sample"]["rollout"] == 8
    assert flash["per_sample"]["update_seconds"] > 0
    assert flash["training_share"] == pytest.approx(24 / 56)
    assert flow["training_share"] == pytest.approx(72 / 104)
    assert flash["final"]["difference"] == pytest.approx(
        np.mean([runs["flash-grpo", seed]["points"][-1]["difference"] for seed in (0, 1)])
    )
    table = (out / "comparison.md").read_text()
    assert re.search(r"\| flow-grpo +\| 1 of 2 +\| 2 ", table)
    assert "planted" in table
    assert len(list((out / "figures").iterdir())) == 8
    assert "planted" in (out / "report.html").read_text()
    config = (out / "flash-grpo/seed-1/config.yaml").read_text()
    assert f"out: {out}/flash-grpo/seed-1" in config
    assert "seed: 1\n" in config


def test_why_a_run_failed_is_what_it_said_itself(tmp_path):
    run = RunFiles("flash", 0, tmp_path / "seed-0")
    run.log.write_text(
        "# -m flashgrpo train a\nflashgrpo: before\n# -m flashgrpo train a\nflashgrpo: the disk is full\nbye\n"
    )
    note_failure(run, -6)
    assert run.failure.read_text() == "ended by SIGABRT after: the disk is full\n"
    run.log.write_text("# -m flashgrpo train a\nKilled\n")
    note_failure(run, 1)
    assert run.failure.read_text() == "Killed\n"


def test_what_is_complete_is_left_alone_and_what_failed_goes_on(compared, problem):
    out, found, _ = compared
    complete = [file for file in out.rglob("metrics.jsonl") if "flow-grpo/seed-1" not in str(file)]
    before = {file: file.stat().st_mtime_ns for file in complete}
    again = compare(str(problem), out=out, seeds=2, console=Console(quiet=True), **OPTIONS)
    assert before == {file: file.stat().st_mtime_ns for file in complete}
    *same, _ = untimed(found["runs"])
    *others, mended = untimed(again["runs"])
    assert others == same
    assert (mended["status"], mended["reason"], len(mended["updates"])) == ("complete", None, 2)
    assert (out / "flow-grpo/seed-1.log").read_text().count("# -m flashgrpo train") == 2


def test_records_of_runs_are_enough_to_go_on(compared, problem, tmp_path, capsys):
    """Of a comparison's folder plan.json and the seed-S.json of runs that ended may be kept alone, in a repository."""
    out, _, _ = compared
    found = compare(str(problem), out=out, seeds=2, console=Console(quiet=True), **OPTIONS)
    kept = tmp_path / "kept"
    for file in [out / "plan.json", *out.glob("*/seed-?.json")]:
        (kept / file.relative_to(out)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, kept / file.relative_to(out))
    assert compare(str(problem), out=kept, seeds=2, console=Console(quiet=True), **OPTIONS) == found
    assert not [*kept.glob("*/seed-?")]
    record = kept / "flow-grpo/seed-0.json"
    record.write_text(record.read_text().replace('"status"', '"state"'))
    with pytest.raises(UserError, match=r"seed-0\.json is damaged \(status: field required\); put it back, or"):
        compare(str(problem), out=kept, seeds=2, console=Console(quiet=True), **OPTIONS)


def test_one_algorithm_may_have_a_number_of_updates_of_its_own(problem):
    plan = make_plan(str(problem), ["flow-grpo:updates=7"], OPTIONS["algorithms"], 1, 250, 2, "")
    lengths = {name: config.updates for name, config in plan.algorithms.items()}
    assert lengths == {"flash-grpo": 4, "flow-grpo": 7}
    assert plan.algorithms["flow-grpo"].evaluation.every == 4


def test_a_diagnosis_is_measured_once_and_told(compared, problem, monkeypatch):
    out, _, _ = compared
    little = diagnostics.Effort(prompts=3, members=2, updates=3)
    real = diagnostics.diagnose
    monkeypatch.setattr(diagnostics, "diagnose", lambda *a, **options: real(*a, effort=little, **options))
    compare(str(problem), out=out, seeds=2, diagnose=True, console=Console(quiet=True), **OPTIONS)
    told = (out / "comparison.md").read_text()
    assert "## Diagnosis of the base model" in told
    assert "| linear, eta 1; independent initial noise | whole grid |" in told
    assert "| flow-grpo " in told.partition("Mean cosine")[2]
    assert {file.name for file in (out / "figures").glob("*_figure.png")} == {
        "gradient_figure.png",
        "variance_figure.png",
        "consistency_figure.png",
    }
    monkeypatch.setattr(diagnostics, "diagnose", lambda *a, **_: pytest.fail("measured a second time"))
    compare(str(problem), out=out, seeds=2, diagnose=True, console=Console(quiet=True), **OPTIONS)
    assert (out / "comparison.md").read_text() == told


def test_what_cannot_be_diagnosed_is_refused_before_a_run(problem, tmp_path):
    out, algorithms = tmp_path / "out", ["flash-grpo", "awm"]
    with pytest.raises(UserError, match="--diagnose: awm: diagnostics look at stochastic steps"):
        compare(str(problem), ["awm:algorithm.score.times=1"], algorithms, 1, out, 500, diagnose=True)
    assert not out.exists()


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for(condition, process: subprocess.Popen, timeout: float = 600) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None and time.monotonic() < until  # noqa: PT018
        time.sleep(0.02)


def test_interrupted_and_killed_it_ends_with_the_same_results(compared, problem, tmp_path):
    """Once by SIGINT; once by SIGKILL of the comparison alone, whose run goes on and is waited for."""
    _, whole, _ = compared
    out, said = tmp_path / "c", tmp_path / "said"
    command = [sys.executable, "-m", "flashgrpo", "compare", str(problem), "--out", str(out), "--seeds", "1"]
    command += ["--algorithms", OPTIONS["algorithms"], "--budget", "250", "--points", "2"]
    metrics = out / "flash-grpo/seed-0/metrics.jsonl"

    def start() -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=said.open("a"), stderr=subprocess.STDOUT)

    process = start()
    wait_for(metrics.exists, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(600) == 130
    statuses = [run["status"] for run in json.loads((out / "comparison.json").read_text())["runs"]]
    assert statuses in (["unfinished", "unfinished"], ["complete", "unfinished"])
    assert not list(out.rglob("*.failed"))

    process = start()
    wait_for(lambda: children(process), process)
    process.kill()
    process.wait()
    process = start()
    assert process.wait(600) == 0, said.read_text()
    found = json.loads((out / "comparison.json").read_text())
    assert untimed(found["runs"]) == untimed([run for run in whole["runs"] if run["seed"] == 0])
    assert not list(out.rglob(".partial*"))


# ---- the page and the figures ----------------------------------------------------------------------------------------


def write_run(files, config, gain: float, upto: int | None = None) -> None:
    """A run as `train` would have left it: the held-out reward rises evenly by `gain`."""
    files.path.mkdir(parents=True)
    cost, noise = planned_cost(config, 0), np.random.default_rng(files.seed)
    metrics, evaluations = [], []
    for update in range(1, (upto or config.updates) + 1):
        norms = {str(k): 1e-4 * noise.uniform(0.5, 1.5) for k in config.algorithm.explore.steps.candidates(10)}
        zero = dict.fromkeys(("drift", "ratio_max_dev", "clip_fraction", "approx_kl", "kl"), 0.0)
        metrics.append({"update": update, "reward": 0.5 + gain * update / config.updates, "reward_std": 0.1, **zero})
        metrics[-1] |= {"ratio_mean": 1.0, "grad_norm": sum(norms.values()), "grad_norm_by_step": norms}
        metrics[-1] |= {"compute": {"rollout": cost.rollout, "update": cost.update}, "samples": 64}
        metrics[-1] |= {"seconds": {"rollout": 1.0, "update": 0.5, "evaluate": 9.0, "total": 11.0}}
    for update in sorted({*range(0, len(metrics) + 1, config.evaluation.every), len(metrics)}):
        base, rise = 0.5 + 0.1 * np.sin(np.arange(20)), gain * update / config.updates * noise.uniform(0, 2, 20)
        row = {
            "update": update,
            "reward": 0.5 + float(rise.mean()),
            "base_reward": 0.5,
            "difference": float(rise.mean()),
        }
        row |= {"interval": [0.0, 0.1], "rewards": {}, "watched": {"w<x>": 0.9}, "base_watched": {"w<x>": 0.9}}
        parts = {"rewards": {}, "watched": {}}
        samples = [
            {"reward": b + r, "base_reward": b, **parts} for b, r in zip(base, rise, strict=True) for _ in (0, 1)
        ]
        evaluations.append({**row, "watched_intervals": {}, "watch": None, "best": False, "samples": samples})
    for name, rows in (("metrics", metrics), ("evaluations", evaluations)):
        (files.path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A comparison of three algorithms and two seeds; one run failed, one has not begun."""
    made = plan("updates=40", algorithms="flash-grpo,flow-grpo,mix-grpo", keep="noise")
    folder = ComparisonFolder(tmp_path_factory.mktemp("written") / "c<b>")
    with folder.claimed(made):
        pass
    gains = {"flash-grpo": 0.2, "flow-grpo": 0.1, "mix-grpo": 0.15}
    for files in folder.runs(made.as_json())[:-1]:
        failed = (files.algorithm, files.seed) == ("flow-grpo", 1)
        write_run(files, made.algorithms[files.algorithm], gains[files.algorithm], 6 if failed else None)
        if failed:
            files.failure.write_text('OSError: </td><script>alert("no room")</script>\n')
    write_figures(write_data(folder, ()), folder.figures)
    write_report(folder.path)
    return folder.path


def test_what_the_page_says(written):
    page = (written / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]*>", " ", page, flags=re.S))
    assert "flash-grpo ended highest: +0.2" in text
    assert re.search(r"flow-grpo ended 0\.\d+ \[0\.\d+, 0\.\d+\] below flash-grpo, paired over 1 seed\.", text)
    assert "mix-grpo, seed 1: unfinished." in text
    assert "flow-grpo, seed 1: failed (OSError:" in text
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "c&lt;b&gt;" in page
    assert "w&lt;x&gt;" in page
    assert not re.search(r"algorithm\.(explore\.)?noise", re.sub(r"<pre.*?</pre>", "", page, flags=re.S)), (
        "kept from the recipe, so it is alike"
    )
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert page.count('role="img"') == page.count("<svg ") == 8


def row(algorithm: str, gain: float, interval: list[float] | None, over_first: list[float] | None = None) -> dict:
    """A row of the summary, as far as the headline goes."""
    over = {"interval": over_first} if over_first else None
    return {"algorithm": algorithm, "final": {"difference": gain, "interval": interval}, "over_first": over}


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        (
            [row("a", 0.2, [0.1, 0.3]), row("b", 0.1, [0.0, 0.2], [-0.2, -0.1])],
            "a ended highest: +0.200 [0.100, 0.300]",
        ),
        (
            [row("a", 0.2, [0.1, 0.3]), row("b", 0.19, [0.1, 0.3], [-0.2, 0.1])],
            "a ended highest: +0.200 [0.100, 0.300] over the base model, but not clearly above b",
        ),
        (
            [row("a", 0.19, [0.1, 0.3]), row("b", 0.2, [0.1, 0.3], [-0.1, 0.2])],
            "b ended highest: +0.200 [0.100, 0.300] over the base model, but not clearly above a",
        ),
        (
            [row("a", 0.1, [-0.1, 0.3]), row("b", 0.0, [-0.1, 0.1], [-0.2, 0.0])],
            "No algorithm ended clearly above the base model; nearest to it is a: +0.100 [−0.100, 0.300] includes zero",
        ),
        ([row("a", -0.2, [-0.3, -0.1])], "Every algorithm ended below the base model, a the least: −0.200"),
        ([row("a", 0.2, None)], "a ended +0.200 from the base model, with no interval to judge it by"),
        ([{"algorithm": "a", "final": None, "over_first": None}], "No run has ended yet"),
    ],
)
def test_the_headline_says_what_the_intervals_do(summary, said):
    assert headline(summary, Numbers(3)).startswith(said)


def test_the_page_is_written_again_as_it_was(written):
    before = (written / "report.html").read_bytes()
    assert write_report(written).read_bytes() == before
    broken = written.parent / "broken"
    broken.mkdir()
    (broken / "comparison.json").write_text("[]")
    with pytest.raises(UserError, match=r"comparison\.json is damaged"):
        write_report(broken)


def test_the_figures(written):
    import imageio.v3 as imageio

    for name in ("reward-by-compute", "reward-by-seconds", "cost-of-an-update", "gradient-by-step"):
        assert imageio.imread(written / f"figures/{name}.png").shape[1] == 1300, "6.5 inches"
        svg = (written / f"figures/{name}.svg").read_text()
        assert "flow-grpo" in svg
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", svg)]
        assert sizes
        assert min(sizes) >= 8  # an SVG pixel of matplotlib is a point


PROBE = """<script>
  const state = document.documentElement.dataset;
  setTimeout(() => {
    state.overflow = document.documentElement.scrollWidth - innerWidth;
    state.charts = [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height > 80).length;
    const stops = [...document.querySelectorAll(".scroll, summary, pre")];
    state.stops = stops.filter(s => { s.focus(); return document.activeElement === s; }).length;
    state.wide = [...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, svg, pre")
      && e.getBoundingClientRect().right > innerWidth + 1).length;
  }, 300);
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="no chromium")
@pytest.mark.parametrize("width", [380, 1280])
def test_chromium_shows_the_page_from_disk(written, tmp_path, width):
    page = (written / "report.html").read_text()
    page = page.replace("style-src 'unsafe-inline'", "style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    (tmp_path / "probed.html").write_text(page.replace("</body>", PROBE + "</body>"))
    flags = [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=2000"]
    command = [str(CHROMIUM), *FLAGS, *flags, "--dump-dom", (tmp_path / "probed.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search(r"<html[^>]*>", dom)[0]))
    assert int(found["overflow"]) <= 0
    assert found["wide"] == "0"
    assert int(found["charts"]) == 4
    assert int(found["stops"]) >= 10

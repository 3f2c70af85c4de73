"""A watched reward that falls while the trained one rises ends the run."""

from pathlib import Path

import pytest

from flashgrpo.errors import UserError
from flashgrpo.report import findings, write_report
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.lines import read_lines
from flashgrpo.run.progress import Reporter
from flashgrpo.scoring.heldout import guard
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.train import train

HACKED = """
calls = {"trained": 0, "watched": 0}


def trained(videos, prompts, **columns):
    calls["trained"] += 1
    return [calls["trained"] + 0.1 * i for i in range(len(prompts))]


def watched(videos, prompts, **columns):
    calls["watched"] += 1
    return {"a": [0.0] * len(prompts), "b": [-float(calls["watched"])] * len(prompts)}
"""


def line(difference: float, **intervals) -> dict:
    return {"difference": difference, "watched_intervals": intervals}


def heldout_prompts(folder: Path, count: int) -> str:
    """The setting of a file with so many prompts."""
    (folder / "heldout.txt").write_text("".join(f"a red square moving left, {i}\n" for i in range(count)))
    return f"prompts.heldout={folder}/heldout.txt"


def test_the_whole_interval_has_to_lie_below():
    rewards = {
        "agreement": RewardConfig(call="x:y"),
        "sharp": RewardConfig(call="x:y", watched=True, max_fall=0.05),
        "sharpness": RewardConfig(call="x:y", watched=True),
    }
    assert guard(line(0.1, sharp=[-0.2, -0.04], sharpness=[-9.0, -8.0]), rewards) is None
    assert guard(line(-0.1, sharp=[-0.2, -0.1]), rewards) is None  # nothing was gained by it
    assert guard(line(0.1, sharp=None), rewards) is None
    assert guard(line(0.1, **{"sharp.edges": [-0.2, -0.06]}), rewards) == (
        "the watched reward sharp.edges has fallen by 0.06 to 0.2 (95 % interval), more than the 0.05 of its max_fall, "
        "while the trained reward rose by 0.1"
    )


def test_a_run_ends_with_its_best_checkpoint_and_says_why(make_run, tmp_path, capsys):
    (tmp_path / "hacked.py").write_text(HACKED)
    rewards = f"""rewards={{agreement: null, persistence: null, background: null,
        t: {{call: "{tmp_path}/hacked.py:trained"}},
        w: {{call: "{tmp_path}/hacked.py:watched", watched: true, max_fall: 1.5}}}}"""
    settings = (rewards, heldout_prompts(tmp_path, 8), "tracking.preflight=skip", "tracking.progress=true", "updates=6")
    run = train(make_run(*settings), Reporter())
    said = capsys.readouterr().err
    evaluations = read_lines(run / "evaluations.jsonl")
    assert [(one["update"], one["best"], bool(one["watch"])) for one in evaluations] == [
        (0, True, False),
        (2, True, False),  # fallen by 1, which is allowed
        (4, False, True),
    ]
    assert evaluations[2]["reward"] > evaluations[1]["reward"]  # it would have been the best
    assert (
        "stopped after update 4: the watched reward w.b has fallen by 2 to 2 (95 % interval), more than the 1.5" in said
    )
    assert "the best checkpoint is that of update 2" in said
    assert (run / "lora").is_dir()

    again = train(make_run(*settings), Reporter())
    assert "the watched reward w.b has fallen" in capsys.readouterr().err
    assert len(read_lines(again / "metrics.jsonl")) == 4
    assert "At the last evaluation, after update 4, the watched reward w.b" in write_report(run).read_text()

    train(make_run(*settings, "rewards.w.max_fall=99"), Reporter())
    assert len(read_lines(run / "metrics.jsonl")) == 6


def test_a_run_without_a_good_checkpoint_gives_none_by_itself(make_run, tmp_path):
    (tmp_path / "hacked.py").write_text(HACKED)
    rewards = f"""rewards={{agreement: null, persistence: null, background: null,
        t: {{call: "{tmp_path}/hacked.py:trained"}},
        w: {{call: "{tmp_path}/hacked.py:watched", watched: true, max_fall: 0.5}}}}"""
    run = train(make_run(rewards, heldout_prompts(tmp_path, 8), "tracking.preflight=skip"), Reporter(quiet=True))
    assert [line["best"] for line in read_lines(run / "evaluations.jsonl")] == [True, False]
    assert not (run / "lora").exists()
    directory = RunDirectory(run)
    with pytest.raises(UserError, match=r"has no good checkpoint, since the watched reward w.b .* all the same"):
        directory.choose_checkpoint(None, print)
    assert directory.choose_checkpoint(2, print) == 2


def test_a_watch_needs_prompts_for_an_interval(make_run, tmp_path):
    sentence = "rewards.background.max_fall: an interval that may end a run needs at least 8 held-out prompts, not 7"
    with pytest.raises(UserError, match=sentence):
        train(make_run("rewards.background.max_fall=0.1", heldout_prompts(tmp_path, 7)))


def test_correlations_by_rank():
    samples = [
        {
            "rewards": {"a": a},
            "base_rewards": {"a": 0.0},
            "watched": {"w": w, "c": 1.0},
            "base_watched": {"w": b, "c": 1.0},
        }
        for a, w, b in ((1.0, 10.0, 0.0), (2.0, 100.0, 1.0), (3.0, 1000.0, 2000.0))
    ]
    names, table = findings.correlations({"samples": samples}, of_changes=False)
    assert names == ["a", "w", "c"]
    assert [(name, watched) for name, watched, _ in table] == [("a", False), ("w", True), ("c", True)]
    assert table[0][2][:2] == pytest.approx([1, 1])
    assert table[0][2][2] != table[0][2][2]  # one that never changes has none
    changed = findings.correlations({"samples": samples}, of_changes=True)
    assert changed.table[0][2][1] == pytest.approx(-0.5)  # changes 10, 99, -1000: ranks 2, 3, 1 against 1, 2, 3
    assert findings.correlations({"samples": samples[:2]}, of_changes=False) is None

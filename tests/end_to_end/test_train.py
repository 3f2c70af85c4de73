"""Whole runs in very small: what a run directory holds, resume after a kill at any moment, and how runs end."""

import gzip
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.evaluate import evaluate
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.lines import OF_THE_MACHINE, read_lines
from flashgrpo.run.progress import Clock, Interrupt
from flashgrpo.sample import sample
from flashgrpo.scoring.heldout import Evaluator, selected
from flashgrpo.train import train
from flashgrpo.types import Prompt
from tests.conftest import small_run
from tests.videos import read_mp4

METRICS = {"update", "reward", "reward_std", "rewards", "ratio_max_dev", "clip_fraction", "approx_kl"} | {
    "grad_norm",
    *OF_THE_MACHINE,
}
EVALUATION = {"update", "reward", "base_reward", "difference", "interval", "rewards", "watched"}


def weights(run: Path, update: int) -> dict[str, torch.Tensor]:
    tensors = checkpoint.load(run / "checkpoints", update)
    return {f"{kind}/{name}": tensor for kind, named in tensors.items() for name, tensor in named.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(file: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in read_lines(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of six updates."""

    config = small_run(tmp_path_factory.mktemp("finished") / "run", "updates=6", "evaluation.videos=1")
    return config, train(config)


def test_a_run_directory_holds_what_the_design_says(finished):
    config, run = finished
    assert {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "checkpoints",
        "videos",
    } <= {path.name for path in run.iterdir()}
    assert RunConfig.load(run / "config.yaml") == config.with_absolute_paths()
    lines = read_lines(run / "metrics.jsonl")
    assert [line["update"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line.keys() >= METRICS
        assert line["drift"] == 0
        assert line["rewards"].keys() == {f"agreement.{part}" for part in ("color", "shape", "direction", "speed")}
        assert line["reward"] == pytest.approx(sum(line["rewards"].values()) / 4)
        phases = dict(line["seconds"])
        assert phases.pop("total") >= sum(phases.values()) - 1e-3
        assert sum(line["transitions_by_step"].values()) == line["samples"] == 4
    evaluations = read_lines(run / "evaluations.jsonl")
    assert [line["update"] for line in evaluations] == [0, 2, 4, 6]
    for line in evaluations:
        assert line.keys() >= EVALUATION
        assert line["watched"].keys() == {"persistence", "background"}
        assert line["base_reward"] == evaluations[0]["reward"]
        assert line["difference"] == pytest.approx(line["reward"] - line["base_reward"])
        low, high = line["interval"]
        assert low <= line["difference"] <= high
    assert not list(run.rglob(".partial*"))
    video = read_mp4(run / evaluations[0]["samples"][0]["video"])
    assert video.shape == (9, 3, 192, 192)


def test_the_videos_that_changed_most_are_kept_with_the_bases(finished, make_run):
    """Of two samples one is always kept; the other is drawn again, by the tuned model and by the base."""
    _, run = finished
    *_, line = read_lines(run / "evaluations.jsonl")
    changes = [sample["reward"] - sample["base_reward"] for sample in line["samples"]]
    assert line["extremes"] == sorted(range(2), key=lambda row: changes[row])
    again = line["samples"][1]
    assert again["base_video"].endswith("001-base.mp4")
    both = train(make_run("updates=1", "evaluation.videos=2"))  # where the base's is kept from the beginning
    first, *_ = read_lines(both / "evaluations.jsonl")
    expected = read_mp4(both / first["samples"][1]["video"]).float()
    assert (read_mp4(run / again["base_video"]).float() - expected).abs().max() < 0.02
    assert (read_mp4(run / again["video"]).float() - expected).abs().max() > 0.02


def test_the_best_of_several_is_scored_once_more_on_other_noise(finished, monkeypatch):
    """Once, also after a kill between the last checkpoint and the end; `evaluate` gives the same digits."""
    config, run = finished
    lines, file = read_lines(run / "evaluations.jsonl"), run / "confirmation.json"
    best = selected(lines)
    assert best, "else this run cannot tell"
    before = file.read_bytes()
    record, line = json.loads(before), next(line for line in lines if line["update"] == best)
    assert (record["update"], record["selected_from"]) == (best, 3)
    assert record["reward"] != line["reward"]
    assert record["base_reward"] != line["base_reward"], "the base has the same other noise"
    assert record["difference"] == pytest.approx(record["reward"] - record["base_reward"])
    assert json.loads(json.dumps(evaluate(run))) == record
    file.unlink()
    metrics = (run / "metrics.jsonl").read_bytes()
    train(config)
    assert (file.read_bytes(), (run / "metrics.jsonl").read_bytes()) == (before, metrics)
    monkeypatch.setattr(Evaluator, "__call__", lambda *_, **__: pytest.fail("it is done once"))
    train(config)


def test_what_counts_as_selected():
    def lines(*best: bool) -> list[dict]:
        return [{"update": 2 * i, "best": one} for i, one in enumerate(best)]

    assert selected(lines(True, False, False)) is None, "none beat the base"
    assert selected(lines(True, True)) is None, "there was no choice"
    assert selected(lines(True, True, False, True, False)) == 6


def test_old_checkpoints_go_but_not_the_newest_or_the_best(finished):
    _, run = finished
    progress = checkpoint.read_progress(run / "checkpoints", 6)
    assert set(checkpoint.updates(run / "checkpoints")) == {5, 6, progress.best_update} - {0}
    rewards = {line["update"]: line["reward"] for line in read_lines(run / "evaluations.jsonl")}
    assert rewards[progress.best_update] == max(rewards.values())


def test_a_finished_run_is_left_as_it_is(finished):
    config, run = finished
    before = {path: path.read_bytes() for path in run.rglob("*.json*")}
    train(config)
    assert before == {path: path.read_bytes() for path in run.rglob("*.json*")}


def test_a_run_made_longer_equals_a_long_one(finished, make_run):
    _, long = finished
    short = train(make_run("updates=3"))
    longer = train(make_run("updates=6"))
    assert short == longer
    assert same(weights(longer, 6), weights(long, 6))


def test_resume_after_damage_uses_the_checkpoint_before_and_says_so(finished, make_run, capsys):
    _, uninterrupted = finished
    run = train(make_run("updates=4"))
    newest = run / "checkpoints/000004/__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-10])
    train(make_run("updates=6"))
    said = " ".join(capsys.readouterr().err.split())
    assert "000004 is damaged" in said
    assert "continuing" not in said  # quiet shows warnings only
    assert checkpoint.read_progress(run / "checkpoints", 6).update == 6
    assert same(weights(run, 6), weights(uninterrupted, 6))
    assert without_seconds(run / "metrics.jsonl") == without_seconds(uninterrupted / "metrics.jsonl")


@pytest.fixture
def recipe(make_run, tmp_path):
    """Writes settings of the very small run to a file."""

    def write(*overrides: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(make_run(*overrides).to_yaml(), "utf-8")
        return file

    return write


def assert_same_run(run: Path, expected: Path, update: int) -> None:
    assert same(weights(run, update), weights(expected, update))
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert without_seconds(run / name) == without_seconds(expected / name)
    assert not list(run.rglob(".partial*"))


@pytest.mark.parametrize("writes", [(30, 62), (8, 35, 48, 52, 67, 78, 83, 100)], ids=["twice", "eight times"])
def test_killed_at_any_write_the_run_ends_with_the_same_weights(finished, recipe, tmp_path, nursery, writes):
    """Deaths in a row, at chosen changes of the run directory, as kill -9 would have it."""
    _, uninterrupted = finished
    settings, run = recipe("updates=6", "evaluation.videos=1"), tmp_path / "run"
    for write in writes:
        nursery.start("train_and_die", settings, write).wait()
        for update in checkpoint.updates(run / "checkpoints"):
            checkpoint.read_progress(run / "checkpoints", update)  # whatever has its name is whole
    nursery.run("train", settings)
    assert_same_run(run, uninterrupted, 6)


def test_killed_thirty_times_at_random_moments_the_run_ends_with_the_same_weights(recipe, tmp_path, nursery):
    """SIGKILL again and again, also while a checkpoint is being written."""
    settings = recipe("updates=16", "evaluation.every=4")
    expected = Path(nursery.run("train", settings, f"out={tmp_path}/whole"))
    moments, killed, runs = random.Random(0), 0, 0
    while killed < 30:
        process = nursery.start("train", settings, f"out={tmp_path}/run{runs}")
        time.sleep(moments.uniform(0.3, 1.6))
        if process.code(0) is None:
            process.kill(0)
            killed += 1
        process.wait()
        if checkpoint.updates(tmp_path / f"run{runs}/checkpoints")[-1:] == [16]:  # it lived long enough; begin another
            nursery.run("train", settings, f"out={tmp_path}/run{runs}")
            assert_same_run(tmp_path / f"run{runs}", expected, 16)
            runs += 1
    nursery.run("train", settings, f"out={tmp_path}/run{runs}")
    assert_same_run(tmp_path / f"run{runs}", expected, 16)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_with_a_checkpoint_and_the_exit_code_of_the_signal(recipe, tmp_path, nursery, number):
    settings, run = recipe("updates=1000", "checkpoint.every=1000", "evaluation.every=1000"), tmp_path / "run"
    process = nursery.start("train", settings)
    while len(read_lines(run / "metrics.jsonl")) < 2:
        assert process.code(0) is None
        time.sleep(0.05)
    os.kill(process.pids[0], number)
    assert process.wait() == [128 + number]
    done = len(read_lines(run / "metrics.jsonl"))
    assert checkpoint.updates(run / "checkpoints") == [done]


def test_patience_ends_a_run_that_does_not_get_better(make_run):
    run = train(make_run("updates=50", "evaluation.every=1", "evaluation.patience=2", "optim.lr=1e-9"))
    evaluations = read_lines(run / "evaluations.jsonl")
    best = max(evaluations, key=lambda line: line["reward"])["update"]
    assert len(evaluations) < 50
    assert evaluations[-1]["update"] == best + 2


@pytest.mark.parametrize(("evaluations", "done"), [(1, 2), (3, 6)])
def test_a_failing_evaluation_loses_no_update_and_is_made_up_for(finished, make_run, monkeypatch, evaluations, done):
    _, uninterrupted = finished
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", refuse_after(evaluations))
        with pytest.raises(UserError, match="no more"):
            train(make_run("updates=6", "evaluation.videos=1", "checkpoint.every=100"))
    run = Path(make_run().out)
    assert checkpoint.updates(run / "checkpoints")[-1] == done
    train(make_run("updates=6", "evaluation.videos=1", "checkpoint.every=1"))
    assert same(weights(run, 6), weights(uninterrupted, 6))
    assert without_seconds(run / "evaluations.jsonl") == without_seconds(uninterrupted / "evaluations.jsonl")
    progress, expected = (checkpoint.read_progress(folder / "checkpoints", 6) for folder in (run, uninterrupted))
    assert progress == expected


def test_mixed_precision_trains_evaluates_and_samples_in_one_process(make_run, tmp_path):
    run = train(make_run("updates=1", "model.compute_dtype=bfloat16"))
    record, line = evaluate(run), read_lines(run / "evaluations.jsonl")[-1]
    assert (record["update"], line["update"]) == (1, 1)
    assert record["reward"] == pytest.approx(line["reward"], rel=1e-3)
    assert (
        read_mp4(sample(run, [Prompt("a red circle moving left slowly", {})], tmp_path / "a.mp4", num_steps=2)).shape[0]
        == 9
    )


def test_what_a_killed_process_left_is_cleared_away(make_run):
    run = train(make_run("updates=1"))
    for leftover in (".partial-000017", ".removed-000003"):
        (run / "checkpoints" / leftover).mkdir()
    train(make_run("updates=2"))
    assert not list((run / "checkpoints").glob(".*"))


def test_a_kill_in_an_evaluation_loses_no_update(finished, make_run, tmp_path, monkeypatch, capsys):
    """What a kill would have left is a copy, made in the evaluation of update 2, when its checkpoint is on disk."""
    _, uninterrupted = finished
    real, config = Evaluator.__call__, make_run("updates=6", "evaluation.videos=1", "checkpoint.every=100")
    run, left = Path(config.out), tmp_path / "left"

    def call(self, **options):
        if not read_lines(run / "metrics.jsonl"):
            return real(self, **options)
        while not checkpoint.updates(run / "checkpoints"):
            time.sleep(0.01)
        shutil.copytree(run, left)
        raise UserError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "__call__", call)
        with pytest.raises(UserError, match="no more"):
            train(config)
    assert checkpoint.updates(left / "checkpoints") == [2]
    assert [line["update"] for line in read_lines(left / "evaluations.jsonl")] == [0]
    train(RunConfig.load(left / "config.yaml", [f"out={left}", "updates=2", "tracking.progress=true"]))
    assert [line["update"] for line in read_lines(left / "evaluations.jsonl")] == [0, 2]
    said = "".join(capsys.readouterr())
    assert "after update 2" in said
    assert "is complete" not in said
    train(RunConfig.load(left / "config.yaml", [f"out={left}", "updates=6"]))
    assert same(weights(left, 6), weights(uninterrupted, 6))
    assert without_seconds(left / "evaluations.jsonl") == without_seconds(uninterrupted / "evaluations.jsonl")
    assert checkpoint.read_progress(left / "checkpoints", 6).evaluated == (0, 2, 4, 6)


def refuse_after(calls: int):
    real, left = Evaluator.__call__, [calls]

    def call(self, limit=None):
        left[0] -= 1
        if left[0] < 0:
            raise UserError("no more")
        return real(self, limit)

    return call


def test_a_changed_prompt_file_is_noticed(make_run, tmp_path):
    config = make_run("updates=1")
    train(config)
    heldout = Path(config.prompts.heldout)
    heldout.write_text(heldout.read_text().replace("red", "green"))
    with pytest.raises(UserError, match=r"prompts\.heldout: the file has changed"):
        train(RunConfig.load(Path(config.out) / "config.yaml", ["updates=2"]))


def test_two_seeds_differ_and_one_seed_does_not(make_run, tmp_path):
    first = train(make_run("updates=1"))
    again = train(make_run("updates=1", f"out={tmp_path / 'again'}"))
    other = train(make_run("updates=1", f"out={tmp_path / 'other'}", "seed=1"))
    assert same(weights(first, 1), weights(again, 1))
    assert not same(weights(first, 1), weights(other, 1))


@pytest.mark.parametrize("algorithm", ["flow-grpo", "flow-grpo-fast", "mix-grpo", "dance-grpo"])
def test_every_preset_trains(make_run, algorithm):
    change = "{preset: mix-grpo, steps: {size: 2}}" if algorithm == "mix-grpo" else algorithm
    run = train(make_run(f"algorithm={change}", "updates=2"))
    lines = read_lines(run / "metrics.jsonl")
    assert all(line["drift"] == 0 for line in lines)
    assert lines[0]["grad_norm"] > 0


@pytest.mark.parametrize("algorithm", ["flash-grpo", "{preset: awm, score: {times: 2}}", "diffusion-nft"])
def test_full_fine_tuning_resumes_bit_for_bit(make_run, tmp_path, algorithm):
    settings = ["model.train={kind: full}", "optim.lr=1e-5", f"algorithm={algorithm}"]
    train(make_run(*settings, "updates=1"))
    resumed = train(make_run(*settings, "updates=2"))
    whole = train(make_run(*settings, "updates=2", f"out={tmp_path / 'whole'}"))
    assert same(weights(resumed, 2), weights(whole, 2))


def test_evaluate_repeats_what_the_run_recorded(finished):
    _, run = finished
    last = read_lines(run / "evaluations.jsonl")[-1]
    record = evaluate(run, checkpoint_update=6)
    assert record["reward"] == pytest.approx(last["reward"], abs=1e-6)
    assert record["base_reward"] == pytest.approx(last["base_reward"], abs=1e-6)
    assert record["interval"] == pytest.approx(last["interval"], abs=1e-6)
    with pytest.raises(UserError, match="no checkpoint of update 99"):
        evaluate(run, checkpoint_update=99)


def test_sample_writes_base_beside_tuned(finished, tmp_path):
    _, run = finished
    out = sample(run, [Prompt("a red circle moving left slowly", {})], tmp_path / "a.mp4", seeds=[1], num_steps=3)
    frames = read_mp4(out)
    assert frames.shape[0] == 9
    assert frames.shape[-1] > 1.9 * frames.shape[-2]
    image = sample(run, [Prompt("a red circle", {})], tmp_path / "b", seeds=[1, 2], num_steps=3, size=(64, 48, 1))
    assert image == tmp_path / "b.png"
    assert Image.open(image).size == (2 * 48 + 4, 2 * 64 + 4)
    with pytest.raises(UserError, match=r"must end in \.png, since this run's model makes images"):
        sample(run, [Prompt("a", {})], tmp_path / "c.mp4", num_steps=2, size=(64, 48, 1))
    for prompt, path, sentence in ((" ", "a.mp4", "the prompt is empty"), ("a", "a.avi", "must end in .mp4, .gif")):
        with pytest.raises(UserError, match=sentence):
            sample(run, [Prompt(prompt, {})], tmp_path / path)
    with pytest.raises(UserError, match=r"^--size \(width\): 50 is no multiple of 16"):
        sample(run, [Prompt("a", {})], tmp_path / "a", size=(48, 50, 9))


def test_samples_with_labels_and_as_a_contact_sheet(finished, tmp_path, capsys):
    """The label has the rewards that an evaluation would give; what a reward refuses has a label without."""
    _, run = finished
    prompts = [Prompt("a red circle moving left slowly", {})]
    sheet = sample(run, prompts, tmp_path / "a.png", seeds=[1, 2], num_steps=2)
    plain = np.asarray(Image.open(sheet).convert("RGB"))
    assert plain.shape == (2 * 48 + 4, 2 * (5 * 48 + 4) + 4, 3)
    labelled = sample(run, prompts, tmp_path / "b.png", seeds=[1, 2], num_steps=2, label=True)
    pixels = np.asarray(Image.open(labelled).convert("RGB"))
    assert (pixels[: 4 * 48] == plain[:48].repeat(4, axis=0).repeat(4, axis=1)).mean() > 0.99, "the same, enlarged"
    gif = sample(run, [Prompt("no caption", {})], tmp_path / "c.gif", num_steps=2, label=True)
    with Image.open(gif) as opened:
        assert opened.n_frames == 9
    assert "a label says no reward: reward agreement" in capsys.readouterr().err


def test_a_second_process_is_kept_out(make_run):
    config = make_run()
    directory = RunDirectory(Path(config.out))
    directory.begin(config, single_process(), {}, "model", False)
    with pytest.raises(UserError, match="another process is training"):
        train(config)
    directory.close()


def test_a_second_interrupt_is_not_swallowed():
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is made to ignore it
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert interrupt.number
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)


def test_under_torchrun_a_second_interrupt_is_the_same_one():
    with Interrupt(patient=True) as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.number


def test_a_trace_of_two_updates(make_run):
    run = train(make_run("tracking.profile=2"))
    with gzip.open(run / "profile/rank-0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    phases = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert phases.count("rollout") == phases.count("update") == 2


def test_clock_counts_phases_and_starts_over():
    clock = Clock()
    with clock("rollout"):
        time.sleep(0.02)
    first = clock.lap()
    assert first["rollout"] >= 0.02
    assert first["total"] >= first["rollout"]
    assert clock.lap().keys() == {"total"}
    json.dumps(first)


def test_training_raises_the_reward(recipe, tmp_path, nursery):
    """Not a number that looks plausible but the thing itself: brighter videos are rewarded, and videos get brighter."""
    (tmp_path / "mine.py").write_text(
        "def bright(videos, prompts, **columns):\n    return videos.mean(dim=(1, 2, 3, 4))\n"
    )
    settings = recipe(
        "updates=20",
        "rollout.prompts=4",
        "rollout.group_size=4",
        "optim.lr=3e-3",
        "evaluation.every=20",
        "prompts.heldout=flashgrpo:tiny/prompts/heldout.jsonl",
        "rewards.agreement.watched=true",
        f"rewards.bright.call={tmp_path}/mine.py:bright",
    )
    run = Path(nursery.run("train", settings))
    last = read_lines(run / "evaluations.jsonl")[-1]
    assert last["difference"] > 0.01
    assert last["interval"][0] > 0
    assert [path.name for path in (run / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]

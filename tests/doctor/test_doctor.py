"""The doctor finds a sound run sound, and each planted fault by the check that is meant for it."""

import collections
import dataclasses
import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import flashgrpo.doctor.costs
import flashgrpo.models.network
import flashgrpo.models.wan
from flashgrpo.cli import app
from flashgrpo.distributed import memory
from flashgrpo.doctor import Diagnosis, examine
from flashgrpo.doctor.checks import QUICK, THOROUGH, TOLD
from flashgrpo.doctor.costs import COSTS
from flashgrpo.errors import UserError
from flashgrpo.learning import experience
from flashgrpo.models.lora import trained_parameters
from flashgrpo.process import Finding
from flashgrpo.processes.flow import checks
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.recorded import RecordedSteps
from flashgrpo.processes.flow.solvers import Euler
from flashgrpo.train import train


@pytest.fixture
def diagnose(make_run, tmp_path):
    """Examine the very small run with overrides; returns the diagnosis."""

    def do(*overrides: str) -> Diagnosis:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(make_run("rollout.group_size=3", *overrides).to_yaml(), "utf-8")
        return examine(str(recipe))

    return do


def finding(diagnosis: Diagnosis, check: str):
    [found] = [finding for finding in diagnosis.findings if finding.check == check]
    return found


def only_fault(diagnosis: Diagnosis, check: str) -> str:
    """The sentence of the one check that fails."""
    assert [finding.check for finding in diagnosis.findings if finding.level == "unsound"] == [check]
    assert not diagnosis.sound
    return finding(diagnosis, check).sentence


def reward(tmp_path, body: str) -> list[str]:
    """Overrides that train on a reward of one's own alone."""
    (tmp_path / "mine.py").write_text(f"import random\n\ndef mine(videos, prompts, **columns):\n{body}")
    return ["rewards.agreement.watched=true", f"rewards.mine.call={tmp_path}/mine.py:mine"]


@pytest.mark.parametrize("algorithm", ["flash-grpo", "flow-grpo", "dance-grpo", "flow-grpo-fast"])
def test_a_sound_run(diagnose, algorithm):
    diagnosis = diagnose(f"algorithm={algorithm}")
    assert diagnosis.sound
    assert {"residual noise", "evaluation sampler", "rounding"} <= {found.check for found in diagnosis.findings}
    assert len(diagnosis.findings) == len({*QUICK, *TOLD, *THOROUGH, *COSTS}) + 3  # those are the process's own
    assert {finding.level for finding in diagnosis.findings} == {"sound"}
    for found in diagnosis.findings:
        assert "\n" not in found.sentence
    assert finding(diagnosis, "first ratio").numbers == {"drift": 0.0}
    assert finding(diagnosis, "time").numbers["seconds_per_update"] > 0
    estimate = finding(diagnosis, "memory").numbers["estimate"]
    assert estimate.keys() == {"rollout", "decode", "reward", "update", "evaluate"}
    assert 1e8 < max(estimate.values()) < 1e10
    distance = finding(diagnosis, "residual noise").numbers["distance"]
    assert distance < 1e-3
    assert finding(diagnosis, "trained layers").sentence.startswith("24 of 24 targeted layers")


@pytest.mark.parametrize(
    "shortcut",
    [
        ["rollout.solver.kind=unipc", "rollout.deterministic_steps=3", "rollout.guidance_interval=[0,0]"],
        ["rollout.deterministic_dtype=float8"],
        ["rollout.reuse.kind=taylorseer"],
        ["rollout.reuse={kind: first-block, threshold: 0.3}"],
    ],
    ids=["unipc", "float8", "taylorseer", "first-block"],
)
def test_a_run_with_shortcuts_is_sound(diagnose, shortcut):
    diagnosis = diagnose("rollout.num_steps=12", *shortcut)
    assert {finding.level for finding in diagnosis.findings} == {"sound"}
    distance = finding(diagnosis, "residual noise").numbers["distance"]
    assert (distance is None) == ("reuse" in shortcut[0])


def test_the_trial_leaves_the_weights_alone(make_run, monkeypatch):
    """With and without the quick checks a run learns the same, bit for bit."""
    seen = []
    real = flashgrpo.doctor.try_out

    def spy(parts, *arguments, **options):
        before = {name: weight.detach().clone() for name, weight in trained_parameters(parts.process.network).items()}
        trial = real(parts, *arguments, thorough=True)
        for name, weight in trained_parameters(parts.process.network).items():
            assert torch.equal(weight, before[name])
            assert weight.grad is None
        seen.append(trial)
        return trial

    monkeypatch.setattr(flashgrpo.doctor, "try_out", spy)
    train(make_run("updates=1"))
    assert len(seen) == 1


def test_on_the_command_line(make_run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_run("rollout.group_size=3").to_yaml(), "utf-8")
    result = CliRunner().invoke(app, ["doctor", str(recipe)])
    assert result.exit_code == 0
    assert "a run would be sound" in result.stdout
    result = CliRunner().invoke(
        app, ["doctor", str(recipe), "prompts.heldout=flashgrpo:tiny/prompts/train.jsonl", "--json"]
    )
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["sound"] is False
    assert {check["level"] for check in told["checks"] if check["check"] == "prompts"} == {"unsound"}
    assert not (tmp_path / "run").exists()


def test_replay_that_differs_from_rollout(diagnose, monkeypatch):
    real = RecordedSteps.velocities

    def drifting(self, k, state):
        return real(self, k, state) * (1.05 if torch.is_grad_enabled() else 1.0)

    monkeypatch.setattr(RecordedSteps, "velocities", drifting)
    diagnosis = diagnose("algorithm.clip_range=0.5")
    assert "replay differs from rollout" in only_fault(diagnosis, "first ratio")
    drift = finding(diagnosis, "first ratio").numbers["drift"]
    diagnosis = diagnose(f"algorithm.clip_range={5 * drift}")
    assert f"take at least {10 * drift:.1e}" in finding(diagnosis, "clip range").sentence
    assert finding(diagnosis, "clip range").level == "unsound"


def test_a_layer_without_its_adapter(diagnose, monkeypatch):
    real = flashgrpo.models.network.prepare

    def forgetful(network, *given):
        real(network, *given)
        attention = network.blocks[2].attn2
        attention.to_q = attention.to_q.base_layer

    monkeypatch.setattr(flashgrpo.models.network, "prepare", forgetful)
    assert "adapters sit on 23 of 24 targeted layers" in only_fault(diagnose(), "trained layers")


@pytest.mark.parametrize("choice", ["{kind: lora, rank: 2, targets: [attn2.to_q]}", "{kind: full}"])
def test_a_parameter_without_gradient(diagnose, monkeypatch, choice):
    real = flashgrpo.models.network.prepare

    def cut(network, *given):
        real(network, *given)
        name = next(name for name in trained_parameters(network) if "attn2.to_q" in name and "lora_A" not in name)
        trained_parameters(network)[name].register_hook(torch.zeros_like)

    monkeypatch.setattr(flashgrpo.models.network, "prepare", cut)
    assert "1 trained parameters receive no gradient" in only_fault(diagnose(f"model.train={choice}"), "trained layers")


def test_noise_that_stays_in_the_videos(diagnose, monkeypatch):
    real = FlowProcess.draw

    def noisy(self, samples, seed, on_drawn, uses=1, columns=()):
        latents, record = real(self, samples, seed, lambda rows, outputs: None, uses, columns)
        latents = latents + 0.1 * torch.randn_like(latents)
        on_drawn(torch.arange(len(latents)), latents)
        return latents, record

    monkeypatch.setattr(FlowProcess, "draw", noisy)
    assert "not what their recorded step leads to" in only_fault(diagnose(), "residual noise")


def test_a_last_step_that_is_stochastic(diagnose, monkeypatch):
    real = checks.residual_noise

    def late(process, state, *arguments):
        state.k[0] = 3  # of four
        return real(process, state, *arguments)

    monkeypatch.setattr(checks, "residual_noise", late)
    monkeypatch.setattr(checks, "rounding", lambda *_: Finding("rounding", "sound", ""))  # such a step has no density
    found = finding(diagnose(), "residual noise")
    assert found.level == "unsound"
    assert "the last step is stochastic" in found.sentence


def test_an_eps_of_the_size_of_the_gradient(diagnose):
    """At an eps of four times the median gradient half of the weights move by a fifth of the learning rate at most."""
    found = finding(diagnose(), "optimizer eps")
    assert (found.level, found.numbers["over_eps"]) == ("sound", pytest.approx(found.numbers["median_gradient"] / 1e-8))
    eps = 4 * found.numbers["median_gradient"]
    found = finding(diagnose(f"optim.eps={eps}"), "optimizer eps")
    assert found.level == "warning"
    assert "0.25 times optim.eps" in found.sentence
    assert "in half of the weights Adam steps by 20% of optim.lr or less" in found.sentence
    cut = finding(diagnose("optim.max_grad_norm=1e-9"), "optimizer eps")
    assert cut.level == "warning", "what is cut to a norm of 1e-9 is smaller than eps"


def test_a_reward_that_changes_its_mind(diagnose, tmp_path):
    overrides = reward(tmp_path, "    return [random.random() for _ in prompts]\n")
    assert "reward mine gave the same video two values" in only_fault(diagnose(*overrides), "rewards repeat")


def test_a_reward_without_spread(diagnose, tmp_path):
    overrides = reward(tmp_path, "    return [float(len(prompt)) for prompt in prompts]\n")
    assert "nothing can be learnt" in only_fault(diagnose(*overrides), "reward spread")


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')"])
def test_a_reward_that_is_not_finite(diagnose, tmp_path, value):
    found = only_fault(diagnose(*reward(tmp_path, f"    return [{value}] * len(prompts)\n")), "rewards repeat")
    assert "reward mine is not finite for" in found


def test_a_reward_the_wrong_way_round(diagnose, tmp_path):
    overrides = reward(
        tmp_path,
        "    from flashgrpo.rewards.shapes import agreement\n"
        "    return {name: -values for name, values in agreement(videos, prompts, **columns).items()}\n\n"
        "from flashgrpo.rewards.shapes import agreement\nmine.planted_pair = agreement.planted_pair\n",
    )
    assert "reward mine prefers the worse of two samples" in only_fault(diagnose(*overrides), "planted pair")


def test_advantages_of_one_sign(diagnose, monkeypatch):
    real = experience.advantages_by_key
    monkeypatch.setattr(experience, "advantages_by_key", lambda *given: (real(*given)[0].abs() + 0.1, real(*given)[1]))
    assert "same sign" in only_fault(diagnose(), "advantages")


def test_an_evaluation_that_samples_as_training_does(diagnose, monkeypatch):
    real = FlowProcess.sampler

    class Noisy(Euler):
        def walk(self, grid, points):
            walk = super().walk(grid, points)
            exact = walk.step
            walk.step = lambda k, x, v: exact(k, x, v) + torch.randn_like(x)
            return walk

    monkeypatch.setattr(FlowProcess, "sampler", lambda *given: dataclasses.replace(real(*given), solver=Noisy()))
    assert "evaluation adds noise" in only_fault(diagnose(), "evaluation sampler")


def test_prompts(diagnose, tmp_path):
    leak = diagnose("prompts.heldout=flashgrpo:tiny/prompts/train.jsonl")
    assert "108 held-out prompts are trained on" in only_fault(leak, "prompts")
    cut = diagnose("model.max_sequence_length=4")
    assert "110 prompts are longer than 4 tokens" in only_fault(cut, "prompts")
    (tmp_path / "twice.txt").write_text("a red circle moving up slowly\n" * 2)
    columns = ["prompts.train=" + str(tmp_path / "twice.txt")]
    twice = finding(diagnose(*columns), "prompts")
    assert (twice.level, twice.numbers["duplicates"]) == ("warning", 1)


def test_an_embedding_that_is_not_finite(diagnose, monkeypatch):
    real = flashgrpo.models.wan.WanModel.encode

    def encode(self, prompts):
        condition = real(self, prompts)
        if [prompt.text for prompt in prompts] == ["a cyan circle moving right quickly"]:  # held out, and not the first
            condition.tensors["text"][:] = float("nan")
        return condition

    monkeypatch.setattr(flashgrpo.models.wan.WanModel, "encode", encode)
    assert "'a cyan circle moving right quickly'" in only_fault(diagnose("evaluation.videos=0"), "text embeddings")


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = memory.total(torch.device("cpu"))
    assert whole > 2**28
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.total(torch.device("cpu")) == whole // 4


def test_too_little_memory_and_disk(diagnose, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(memory, "total", lambda device: 10**8)
        assert "a process would need" in only_fault(diagnose(), "memory")
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert "lower checkpoint.keep" in only_fault(diagnose(), "disk")


def test_replicas_that_drift_apart(nursery, make_run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_run().to_yaml(), "utf-8")
    diagnosis = nursery.run("examine_with_other_replica", recipe, size=2)
    faults = {check["check"]: check["sentence"] for check in diagnosis["checks"] if check["level"] == "unsound"}
    assert "rank 1 trains another model than rank 0" in faults["replicas"]
    assert nursery.run("examine", recipe, size=2)["sound"]


def test_train_refuses_what_is_unsound(make_run, tmp_path, capsys):
    overrides = reward(tmp_path, "    return [random.random() for _ in prompts]\n")
    with pytest.raises(UserError, match="this run would be unsound: reward mine gave the same video two values"):
        train(make_run(*overrides))
    assert not (tmp_path / "run/evaluations.jsonl").exists()
    train(make_run(*overrides, "tracking.preflight=warn", "updates=1"))
    assert "two values" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(tmp_path / "run")
    train(make_run(*overrides, "tracking.preflight=skip", "updates=1"))
    assert "two values" not in capsys.readouterr().err

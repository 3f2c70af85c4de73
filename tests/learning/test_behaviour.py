"""Whose weights draw: the schedules, what is kept, and whole runs that are killed and resumed."""

import json

import pytest
import torch
from torch import nn

from flashgrpo.assembly import Assembly
from flashgrpo.distributed.world import single_process
from flashgrpo.learning.behaviour import Behaviour
from flashgrpo.learning.settings import Averaged, Current, Frozen
from flashgrpo.models.lora import trained_parameters
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.run import checkpoint
from flashgrpo.run.lines import OF_THE_MACHINE
from flashgrpo.run.progress import Clock
from flashgrpo.train import train
from tests.conftest import small_run

SECOND = Averaged(slope=0.0075, start=75, ceiling=0.999)  # of DiffusionNFT


@pytest.mark.parametrize(
    ("settings", "updates", "kept"),
    [
        (Averaged(), [0, 1, 100, 500, 5000], [0, 0.001, 0.1, 0.5, 0.5]),
        (SECOND, [0, 75, 76, 175, 300], [0, 0, 0.0075, 0.75, 0.999]),
        (Averaged(ceiling=0.3, draws=False), [200, 300, 400], [0.2, 0.3, 0.3]),
        (Frozen(updates=3), [1, 2, 3, 4, 5, 6], [1, 1, 0, 1, 1, 0]),
    ],
)
def test_schedules(settings, updates, kept):
    assert [settings.kept(n) for n in updates] == pytest.approx(kept)


def test_what_follows_the_weights():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    averaged = Behaviour(Averaged(slope=0.25, ceiling=0.5), {"w": parameter})
    frozen = Behaviour(Frozen(updates=2), {"w": parameter})
    current = Behaviour(Current(), {"w": parameter})
    parameter.data += 1.0  # (2, 3)
    for one in (averaged, frozen, current):
        one.follow(1)
    assert averaged.weights["w"].tolist() == [1.75, 2.75]  # d = 1/4
    assert frozen.weights["w"].tolist() == [1, 2]
    parameter.data += 1.0  # (3, 4)
    averaged.follow(2)
    frozen.follow(2)
    assert averaged.weights["w"].tolist() == [2.375, 3.375]  # d = 1/2
    assert torch.equal(frozen.weights["w"], parameter)
    assert (current.weights, current.state(), current.draws) == ({}, {}, False)
    assert averaged.state()["behaviour"]["w"] is averaged.weights["w"]
    assert (averaged.draws, frozen.draws, Behaviour(Averaged(draws=False), {}).draws) == (True, True, False)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Averaged(slope=-1.0),
        lambda: Averaged(ceiling=1.0),
        lambda: Averaged(start=-1),
        lambda: Frozen(updates=1),
    ],
)
def test_settings_are_refused_where_they_are_built(build):
    with pytest.raises(ValueError, match="must be"):
        build()


AVERAGED = (
    "algorithm={preset: diffusion-nft, behaviour: {slope: 0.2, ceiling: 0.9}}",
    "rollout.num_steps=4",
    "rollout.guidance_scale=1",
    "optim.ema.every=1",
)


def state_of(run, update: int) -> dict:
    return checkpoint.load(run / "checkpoints", update, ("policy", "ema", "optimizer", "behaviour"))


def test_a_run_that_is_killed_ends_with_the_same_weights_and_average(nursery, tmp_path):
    """Killed in its third update; bit for bit, and its metrics line for line."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small_run(tmp_path / "run", *AVERAGED).to_yaml(), "utf-8")
    whole = tmp_path / "whole"
    nursery.run("train_with_bad_steps", str(recipe), [], None, f"out={whole}")
    nursery.start("train_with_bad_steps", str(recipe), [], 2, f"out={tmp_path}/run").wait()
    nursery.run("train_with_bad_steps", str(recipe), [], None, f"out={tmp_path}/run")
    found, expected = state_of(tmp_path / "run", 4), state_of(whole, 4)
    assert expected["behaviour"].keys() == expected["policy"].keys()
    for kind, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[kind][name], tensor), (kind, name)
    apart = [not torch.equal(expected["behaviour"][name], tensor) for name, tensor in expected["policy"].items()]
    assert any(apart)
    assert any(not torch.equal(expected["behaviour"][n], t) for n, t in expected["ema"].items())
    lines, others = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "run", whole)
    )
    for line, other in zip(lines, others, strict=True):
        assert {**line, **dict.fromkeys(OF_THE_MACHINE)} == {**other, **dict.fromkeys(OF_THE_MACHINE)}
        assert "drift" not in line
        assert line["error"] > 0
    evaluations = [json.loads(line) for line in (whole / "evaluations.jsonl").read_text().splitlines()]
    assert [line["weights"] for line in evaluations] == ["base", *["ema"] * (len(evaluations) - 1)]
    assert (whole / "config.yaml").read_text().count("kind: averaged") == 1


def test_sharded_weights_and_averages_are_those_of_one_process(nursery, tmp_path):
    """Two processes that hold the network between them; a large eps makes Adam's step linear in the gradient."""
    recipe = tmp_path / "recipe.yaml"
    more = ("updates=2", "optim.eps=0.1", "rollout.prompts=1", "rollout.group_size=5")
    recipe.write_text(small_run(tmp_path / "run", *AVERAGED, *more).to_yaml(), "utf-8")
    nursery.run("train", str(recipe), f"out={tmp_path}/one")
    nursery.run("train", str(recipe), f"out={tmp_path}/two", "parallel.shard=2", size=2)
    one, two = state_of(tmp_path / "one", 2), state_of(tmp_path / "two", 2)
    for kind in ("policy", "behaviour"):
        for name, expected in one[kind].items():
            torch.testing.assert_close(two[kind][name], expected, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(one["behaviour"][name], tensor) for name, tensor in one["policy"].items())


def test_frozen_weights_draw_until_they_are_replaced(make_run, monkeypatch):
    """Of four updates the first two are drawn by the base's weights, the others by those after two updates."""
    drew, learnt = [], []

    def noting(kind, method: str, into: list) -> None:
        real = getattr(kind, method)

        def noted(self, *given):
            parts = getattr(self, "process", self)
            before = {name: p.detach().clone() for name, p in trained_parameters(parts.network).items()}
            found = real(self, *given)
            after = {name: p.detach().clone() for name, p in trained_parameters(parts.network).items()}
            into.append((before, after))
            return found

        monkeypatch.setattr(kind, method, noted)

    noting(FlowProcess, "draw", drew)
    noting(Assembly, "learn", learnt)
    train(make_run("algorithm.behaviour={kind: frozen, updates: 2}", "optim.lr=1e-3", "tracking.preflight=skip"))
    assert len(drew) == len(learnt) == 4
    base, second = learnt[0][0], learnt[1][1]
    assert any(not torch.equal(base[name], tensor) for name, tensor in second.items())
    for number, expected in enumerate((base, base, second, second)):
        assert all(torch.equal(drew[number][0][name], tensor) for name, tensor in expected.items())


def test_the_penalty_to_the_average_is_that_of_the_averaged_weights(make_run):
    """Held to the base's weights it is the distance to the base, and to the trained weights nothing."""
    awm = "algorithm={preset: awm, score: {times: 1}, objective: {kl_coef: 0.1}}"
    parts = Assembly(make_run(awm, "optim.lr=1e-2", "rollout.guidance_scale=1"), single_process())
    start = {name: tensor.clone() for name, tensor in parts.behaviour.weights.items()}
    record = parts.compare(parts.draw_and_score(parts.prompt_groups(0), Clock())).record
    metrics = parts.learn(record)
    assert metrics["kl_average"] == 0
    parts.learn(record)
    for weights, same in ((start, True), (trained_parameters(parts.process.network), False)):
        for name, tensor in weights.items():
            parts.behaviour.weights[name].copy_(tensor.detach())
        with torch.no_grad():
            part = next(iter(parts.process.micro_batches(record[(record.slot == record.slot[0]).nonzero().flatten()])))
            [(_, columns)] = parts.process.replay(part, ("kl", "kl_average"))
        assert bool((columns["kl"] > 0).all())
        torch.testing.assert_close(columns["kl_average"], columns["kl"] * same)

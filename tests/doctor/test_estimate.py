"""Memory counted without weights, against networks whose numbers are known and against tensors that are there."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from flashgrpo.assembly import Assembly
from flashgrpo.cli import app
from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import LiveBytes
from flashgrpo.distributed.world import single_process
from flashgrpo.doctor.estimate import MOMENTS, estimate
from flashgrpo.kinds import kind_of
from flashgrpo.models.load import load_model
from flashgrpo.process import Record
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.processes.flow.retain import Graphs
from flashgrpo.prompts import prompt_groups, read_prompts
from flashgrpo.run.progress import Clock
from flashgrpo.scoring.scoring import AHEAD
from flashgrpo.types import Prompt, Sample

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
BILLIONS = {
    "wan21-1.3b": 1.42,
    "wan21-14b": 14.29,
    "wan21-i2v-14b": 16.4,
    "wan22-5b": 5.0,
    "wan22-a14b": 2 * 14.29,
    "ltx-video": 1.92,
    "ltx2-19b": 19.0,
    "hunyuan-video-15": 8.3,
    "sana-video-2b": 2.06,
    "ursa-1.7b-images": 1.98,
    "amused-256": 0.617,
    "llada-8b": 8.18,
}
CARDS = {  # processes, GiB of each
    "wan21-1.3b-24gb": (1, 24),
    "ltx-video": (1, 24),
    "ltx2-19b": (1, 80),
    "tiny": (1, 2),
    "tiny-image": (1, 2),
    "sd35-medium": (1, 24),
    "flux1-dev": (1, 40),
    "flux1-kontext": (1, 40),
    "flux2-klein-4b": (1, 24),
    "qwen-image": (1, 80),
    "z-image-turbo": (1, 24),
    "sana-1.6b": (1, 24),
    "sana-video-2b": (1, 40),
    "ursa-1.7b-images": (8, 40),
    "amused-256": (1, 24),
    "llada-8b": (8, 40),
    "qwen3-program": (1, 40),
    "qwen3-slate": (1, 24),
    "prompt-writer-qwen3-wan": (1, 40),
}


def test_what_lives_at_a_time_is_counted():
    before = torch.ones(1000)
    with LiveBytes([before]) as live:
        a = before + 1
        b = a.view(10, 100)  # no memory of its own
        assert live.now == 4000
        c = torch.cat([b, b])
        assert live.now == live.peak == 12_000
        del a, b
        assert live.now == 8000
        del c
    assert (live.now, live.peak) == (0, 12_000)


def test_the_estimate_is_what_a_real_network_takes(make_run):
    """The same call with weights, on the CPU, whose attention keeps no scores either."""
    config = make_run("rollout.micro_batch=2", "model.num_frames=33", "model.height=96", "model.width=96")
    model = load_model(config.model, single_process(), 0)
    condition = model.encode([Prompt("a red circle", {})] * 4)
    x = torch.zeros(4, *model.latent_shape)
    point = GridPoint(torch.full((4,), 500.0), torch.full((4,), 0.5, dtype=torch.float64), torch.ones(4))
    with torch.autograd.set_multithreading_enabled(False):
        live = LiveBytes([*model.network.parameters(), x, *condition.tensors.values()])
        with live:
            model.velocity(x, point, condition).square().mean().backward()
    counted = estimate(config).phases["update"]["work"] - x.numel() * 4
    assert counted == pytest.approx(live.peak, rel=0.15)


ALGORITHMS = {  # an algorithm of each kind of score, and whatever keeps or computes more than another
    "flash-grpo": (),
    "awm": ("rollout.num_steps=10", "algorithm.score.times=2"),
    "diffusion-nft": ("algorithm.score={draw: grid, times: 2}", "algorithm.objective.kl_coef=0"),
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_phase_takes_what_is_counted(make_run, algorithm):
    """One micro-batch of a real run on the CPU, without the weights, which are there before and are known."""
    sizes = ["model.num_frames=33", "model.height=96", "model.width=96", "evaluation.videos=0"]
    batch = ["rollout.micro_batch=4", "rollout.decode_micro_batch=4", "optim.micro_batch=4"]
    run = make_run(*sizes, *batch, "evaluation.num_steps=2", f"algorithm={algorithm}", *ALGORITHMS[algorithm])
    parts = Assembly(run, single_process())
    groups = parts.prompt_groups(0)
    samples = [Sample(group, member) for group in groups for member in range(group.size)]
    moments = MOMENTS * sum(tensor.nbytes for tensor in parts.optimizer.weights().values())

    def draw() -> tuple[torch.Tensor, Record]:
        return parts.process.draw(samples, run.seed, lambda rows, drawn: None, run.uses)

    taken = {"rollout": _taken(parts, draw)}
    outputs, record = draw()
    scoring, state = parts.scoring(samples), vars(record.state).values()
    kept = {id(tensor): tensor.nbytes for tensor in (outputs, *state) if torch.is_tensor(tensor)}
    taken["decode"] = _taken(parts, lambda: scoring.add(torch.arange(len(outputs)), outputs)) + sum(kept.values())
    learnt = replace(record, advantage=torch.linspace(-1, 1, len(record)))
    taken["update"] = _taken(parts, lambda: parts.learn(learnt)) + sum(kept.values())
    taken["evaluation"] = _taken(parts, parts.evaluator)
    parts.rewards.close()
    counted = {phase: sum(of.values()) - of["weights"] for phase, of in estimate(run).phases.items()}
    assert {phase: size + moments for phase, size in taken.items()} == pytest.approx(counted, rel=0.15)


def test_a_streaming_run_takes_what_is_counted(tmp_path):
    """Its update, and drawing an evaluation; videos fork at one place here, the last, which is what is counted."""
    texts = ("a red circle moving left slowly", "a blue square moving up quickly", "a red square", "a green circle")
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{text} {name}" for text in texts))
    files = [f"prompts.{name}={tmp_path}/{name}.txt" for name in ("train", "heldout")]
    sizes = ["model.height=64", "model.width=64", "rollout.local=18", "algorithm.explore.earliest=18"]
    batch = ["rollout.prompts=2", "rollout.group_size=4", "rollout.micro_batch=4", "optim.micro_batch=4"]
    run = RunConfig.load("tiny-streaming", [*files, *sizes, *batch, "evaluation.samples_per_prompt=1"])
    parts, memory = Assembly(run, single_process()), kind_of(run).memory(run)
    moments = MOMENTS * sum(tensor.nbytes for tensor in parts.optimizer.weights().values())
    samples = [sample for group in parts.prompt_groups(0) for sample in group.samples]
    outputs, record = parts.process.draw(samples, run.seed, lambda rows, drawn: None, run.uses)
    kept = outputs.nbytes + record.state.recorded.nbytes + sum(fork.cache.nbytes for fork in record.state.forks)
    learnt = replace(record, advantage=torch.linspace(-1, 1, len(record)))
    taken = _taken(parts, lambda: parts.learn(learnt)) + kept + moments
    counted = estimate(run).phases["update"]
    assert taken == pytest.approx(sum(counted.values()) - counted["weights"], rel=0.15)
    prompts, names = [Prompt(text, {}) for text in texts], [(0, number) for number in range(4)]
    drawn = _taken(parts, lambda: parts.process.sample(prompts, names, lambda rows, outputs: None))
    parts.rewards.close()
    assert drawn == pytest.approx(memory.sampling(4) + 4 * memory.sample, rel=0.25)


def _taken(parts: Assembly, call: Callable[[], Any]) -> int:
    """Count the bytes at the highest of a call, beside the weights and the optimizer's state."""
    model = parts.process.model
    decoder = model.vae if hasattr(model, "vae") else model.pipeline.vae
    weights = [*parts.process.network.parameters(), *decoder.parameters()]
    state = [tensor for named in parts.optimizer.state().values() for tensor in named.values()]
    with torch.autograd.set_multithreading_enabled(False), LiveBytes([*weights, *state]) as live:
        call()
    return live.peak


@pytest.mark.parametrize(("train", "copies"), [("{kind: full}", 1), ("{kind: lora, rank: 2, targets: [to_q]}", 0)])
def test_the_base_that_full_training_is_held_near_is_counted(make_run, train, copies):
    """Adapters are switched off for it; of full weights there is a copy."""
    plain, held = (
        estimate(make_run("algorithm=v-grpo", f"algorithm.kl_coef={coefficient}", f"model.train={train}"))
        for coefficient in (0, 0.1)
    )
    more = held.phases["update"]["learning"] - plain.phases["update"]["learning"]
    assert more == copies * 4 * held.parameters["trained"]


def test_processes_rewards_and_servers_are_counted(make_run):
    """The fewest processes that a recipe can have, a reward rank that gets pieces, requests on their way."""
    video = 4 * 3 * 5 * 32 * 32
    small = ["model.num_frames=5", "model.height=32", "model.width=32", "rollout.decode_micro_batch=2"]
    for settings, processes in (([], 1), (["parallel.shard=4"], 4), (["parallel.shares=[1,1,0]"], 3)):
        assert estimate(make_run(*small, *settings)).processes == processes
    ranked = estimate(make_run(*small, "parallel.reward_ranks=[7]", "rollout.group_size=16"))
    assert (ranked.processes, ranked.host["decoded"]) == (8, 2 * (AHEAD + 1) * video)
    served = make_run(*small, "rewards={far: {call: 'http://127.0.0.1:1'}}", "evaluation.videos=2")
    assert estimate(served).host == {"decoded": 4 * video, "kept": 2 * video, "requests": 4 * video // 4}


def test_graphs_that_are_to_be_kept_are_counted(make_run):
    """Against what autograd saves for a call of the real network, of four transitions."""
    run = make_run("rollout.guidance_scale=1", "rollout.retain=true", "rollout.group_size=4", "optim.micro_batch=4")
    parts = Assembly(run, single_process())
    graphs = parts.process.source.graphs = Graphs(2, 2**40)
    parts.draw_and_score(prompt_groups(parts.prompts, run.seed, 0, 2, 4), Clock())
    counted = estimate(run).phases["rollout"]["graphs"]
    assert graphs.kept
    assert 0.8 < counted / (2 * graphs.bytes_each) < 1.5  # what lives in the backward pass besides is counted, too


WHOLE_WORLDS = {
    "qwen3-slate": (192, 48),
    "tiny-program": (36, 12),
}  # of whose problem there are 48 prompts in all: a colour beside a thing


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_whole_and_fit_their_card(name):
    text = (ROOT / f"recipes/{name}.yaml").read_text("utf-8")
    assert "# Hardware:" in text
    assert name.startswith("tiny") or ("# Hours:" in text and "# Verification:" in text)
    config = RunConfig.load(name)
    if not config.prompts.train.startswith("prompts/images"):
        train, heldout = (read_prompts(path, "prompts") for path in (config.prompts.train, config.prompts.heldout))
        least = WHOLE_WORLDS.get(name, (100, 32) if name.startswith("tiny") else (400, 64))
        assert (len(train), len(heldout)) >= least
        assert len(heldout) >= least[1]
        assert not {prompt.text for prompt in train} & {prompt.text for prompt in heldout}
    processes, card = CARDS.get(name, (8, 80))
    counted = estimate(config, processes)
    assert counted.highest < card * 2**30
    if not name.startswith("tiny"):
        row = " | ".join(f"{size / 2**30:.1f}" for size in counted.totals.values())
        network, trained = counted.parameters["network"] / 1e9, counted.parameters["trained"] / 1e6
        line = f"| {name} | {processes} | {network:.2f} B | {trained:.1f} M | {row} |"
        assert line in (ROOT / "docs/hardware.md").read_text("utf-8")
    assert sum(counted.host.values()) < 64 * 2**30
    if name in BILLIONS:
        assert counted.parameters["network"] / 1e9 == pytest.approx(BILLIONS[name], rel=0.015)
    if name == "wan21-1.3b":
        assert counted.parameters["trained"] == 11_796_480  # as published


def test_on_the_command_line(make_run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(make_run().to_yaml())), "utf-8")
    result = CliRunner().invoke(app, ["doctor", str(recipe), "--estimate", "--json"])
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.output)["bytes"]) == {"rollout", "decode", "update", "evaluation"}
    table = CliRunner().invoke(app, ["doctor", str(recipe), "--estimate"]).output
    assert "rollout" in table
    assert "a process at the highest, counted for 1 process" in table
    fits = CliRunner().invoke(app, ["doctor", str(recipe), "--estimate", "--card", "24"])
    assert fits.exit_code == 0
    assert "fits a card of 24 GiB: " in fits.output
    too_large = CliRunner().invoke(app, ["doctor", str(recipe), "--estimate", "--card", "0.001"])
    assert too_large.exit_code == 1
    assert "does not fit a card of 0.001 GiB: " in too_large.output
    assert "first: " in too_large.output
    cut = CliRunner().invoke(app, ["doctor", str(recipe), "parallel.shard=2", "--estimate", "--processes", "3"])
    assert "3 processes cannot be cut into shard 2" in str(cut.exception)
    unknown = CliRunner().invoke(app, ["doctor", str(recipe), "model.path=nobody/nothing", "--estimate"])
    assert "the sizes of nobody/nothing are not known; known are Wan-AI/Wan2.1-T2V-1.3B" in str(unknown.exception)

"""What the estimate counts for uniform tokens, against one micro-batch of a real run on the CPU."""

import json
from dataclasses import replace

import pytest
import torch

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import LiveBytes
from flashgrpo.distributed.world import single_process
from flashgrpo.doctor.estimate import MOMENTS, estimate
from flashgrpo.types import Sample
from tests.end_to_end.test_uniform_tokens import recipe

WIDE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 12 + 1000,
    "lm_head_size": 1000,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    """Random weights, wide enough for what is computed to be more than what is kept beside it."""
    folder = tmp_path_factory.mktemp("wide")
    path = recipe(folder)
    for part, change in (("transformer", WIDE), ("vae", {"num_vq_embeddings": 1000, "block_out_channels": [32, 64]})):
        file = folder / "model" / part / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    sizes = ["model.random_init=true", "model.height=32", "model.width=32", "evaluation.videos=0"]
    batch = ["rollout.micro_batch=4", "rollout.decode_micro_batch=4", "optim.micro_batch=4", "rollout.group_size=2"]
    rewards = "rewards={compressibility: {call: 'flashgrpo.rewards.jpeg:compressibility'}}"
    return RunConfig.load(path, [*sizes, *batch, rewards, "rewards.brightness=null"])


@pytest.mark.parametrize("phase", ["rollout", "decode", "update", "evaluation"])
def test_each_phase_takes_what_is_counted(run, phase):
    parts = Assembly(run, single_process())
    groups = parts.prompt_groups(0)
    scoring = parts.scoring([sample for group in groups for sample in group.samples])
    samples = [Sample(group, member) for group in groups for member in range(group.size)]
    model = parts.process.model
    weights = [*parts.process.network.parameters(), *model.decoder.parameters(), model.codes, model.places]
    state = [tensor for named in parts.optimizer.state().values() for tensor in named.values()]
    before = MOMENTS * sum(tensor.nbytes for tensor in parts.optimizer.weights().values())
    if phase in ("decode", "update"):
        outputs, record = parts.process.draw(samples, run.seed, lambda rows, drawn: None, run.uses)
        kept = (outputs, record.state.x, record.state.action)
        before += sum(tensor.nbytes for tensor in kept)
    with torch.autograd.set_multithreading_enabled(False), LiveBytes([*weights, *state]) as live:
        if phase == "rollout":
            parts.process.draw(samples, run.seed, lambda rows, drawn: None, run.uses)
        elif phase == "decode":
            scoring.add(torch.arange(len(outputs)), outputs)
        elif phase == "update":
            parts.learn(replace(record, advantage=torch.linspace(-1, 1, len(record))))
        else:
            parts.evaluator()
    parts.rewards.close()
    counted = estimate(run).phases[phase]
    assert live.peak + before == pytest.approx(sum(counted.values()) - counted["weights"], rel=0.15)

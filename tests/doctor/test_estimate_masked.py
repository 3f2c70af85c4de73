"""What the estimate counts for masked tokens, against one micro-batch of a real run on the CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import LiveBytes
from flashgrpo.distributed.world import single_process
from flashgrpo.doctor.estimate import MOMENTS, estimate
from flashgrpo.types import Sample
from tests.models import test_llada as llada

WIDE = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 128, "vocab_size": 2000}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunConfig:
    """A LLaDA of random weights, wide enough for what is computed to be more than what is kept beside it."""
    folder: Path = tmp_path_factory.mktemp("wide")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps({**llada.SIZES, **WIDE}))
    (folder / "heldout.jsonl").write_text('{"prompt": "a", "numbers": [1], "target": 1}\n' * 4)
    size = ["model.length=32", "model.max_sequence_length=40", "rollout.num_steps=8", "rollout.block=16"]
    few = ["rollout.prompts=2", "rollout.group_size=2", "evaluation.num_steps=8", "evaluation.block=16"]
    batch = ["rollout.micro_batch=4", "optim.micro_batch=4", "evaluation.videos=0", "algorithm.score.steps=2"]
    names = [f"out={folder}/run", f"model.path={folder}/model", f"prompts.heldout={folder}/heldout.jsonl"]
    other = ["model.random_init=true", "model.dtype=float32", "updates=4", "optim.ema.every=1", "optim.warmup=0"]
    return RunConfig.load("llada-8b", [*size, *few, *batch, *names, *other, "model.train.rank=4"])


@pytest.mark.parametrize("phase", ["rollout", "update", "evaluation"])
def test_each_phase_takes_what_is_counted(run, phase):
    parts = Assembly(run, single_process())
    samples = [Sample(group, member) for group in parts.prompt_groups(0) for member in range(group.size)]
    weights = [*parts.process.network.parameters(), *parts.process.network.buffers()]
    state = [tensor for named in parts.optimizer.state().values() for tensor in named.values()]
    before = MOMENTS * sum(tensor.nbytes for tensor in parts.optimizer.weights().values())
    if phase == "update":
        outputs, record = parts.process.draw(samples, run.seed, lambda rows, drawn: None, run.uses)
        kept = (outputs, record.state.unmasked.kept, *record.state.condition.tensors.values())
        before += sum(tensor.nbytes for tensor in kept)
    with torch.autograd.set_multithreading_enabled(False), LiveBytes([*weights, *state]) as live:
        if phase == "rollout":
            parts.process.draw(samples, run.seed, lambda rows, drawn: None, run.uses)
        elif phase == "update":
            parts.learn(replace(record, advantage=torch.linspace(-1, 1, len(record.weight))))
        else:
            parts.evaluator()
    parts.rewards.close()
    counted = estimate(run).phases[phase]
    assert live.peak + before == pytest.approx(sum(counted.values()) - counted["weights"], rel=0.15)

"""The recipes that ship for programs of full-size models: an update of each, with tiny networks of the same classes."""

from pathlib import Path

import pytest

from flashgrpo.config import RunConfig
from flashgrpo.files import resolve_path
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from tests.programs import WORDS, write_language_model

SMALL = [
    "updates=1",
    "rollout.prompts=2",
    "rollout.group_size=2",
    "rollout.micro_batch=4",
    "optim.micro_batch=2",
    "optim.ema.every=1",
    "model.dtype=float32",
    "model.length=6",
    "evaluation.videos=1",
    "tracking.progress=false",
]
QWEN3 = {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
OWN = {
    "qwen3-program": [],
    "qwen3-slate": ["rollout.failure_reward=-0.5"],
    "prompt-writer-qwen3-wan": [
        "rollout.environment=tiny",
        "rollout.environment_steps=1",
        "rewards={pickscore: null, small: {call: 'flashgrpo.rewards.jpeg:compressibility'}}",
    ],
}


@pytest.mark.parametrize("recipe", OWN)
def test_an_update(recipe, tmp_path):
    """Of the classes of the published checkpoints: Qwen3, and a Wan pipeline that draws what it writes."""
    folder = write_language_model(tmp_path / "model", [*WORDS, "<slate>", "<rank>"], kind="qwen3", **QWEN3)
    shipped = RunConfig.load(recipe).prompts.heldout
    lines = Path(resolve_path(shipped)).read_text("utf-8").splitlines()[:2]
    heldout = tmp_path / f"heldout{Path(shipped).suffix}"
    heldout.write_text("\n".join(lines) + "\n", "utf-8")
    where = [f"out={tmp_path}/run", f"model.path={folder}", f"prompts.heldout={heldout}"]
    config = RunConfig.load(recipe, [*SMALL, *where, "model.max_sequence_length=512", *OWN[recipe]])
    assert config.model.gradient_checkpointing
    run = train(config)
    (line,) = read_lines(run / "metrics.jsonl")
    assert line["drift"] == 0
    assert line["samples"] == 4
    calls = 4 * (2 if recipe == "qwen3-program" else 1)
    assert calls <= line["compute"]["rollout"] <= 6 * calls
    assert line["compute"]["update"] >= 4 * calls
    captions = [sample.get("caption") for sample in read_lines(run / "evaluations.jsonl")[0]["samples"]]
    assert all(captions) == (recipe == "prompt-writer-qwen3-wan")

"""The recipes that ship for models that fill masks: an update of each, with tiny networks of the same classes."""

import json
from pathlib import Path

import pytest
import torch

from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError
from flashgrpo.files import resolve_path
from flashgrpo.run.lines import read_lines
from flashgrpo.train import train
from tests.models import test_amused as amused
from tests.models import test_llada as llada

SMALL = [
    "updates=1",
    "rollout.prompts=2",
    "rollout.group_size=2",
    "rollout.micro_batch=2",
    "optim.micro_batch=4",
    "optim.ema.every=1",
    "evaluation.num_steps=2",
    "evaluation.videos=1",
    "tracking.progress=false",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A tiny LLaDA."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return llada.write(tmp_path_factory.mktemp("llada") / "model", llada.Plain())


def heldout(folder, shipped: str) -> str:
    """Two of the held-out prompts."""
    lines = Path(resolve_path(shipped)).read_text("utf-8").splitlines()[:2]
    file = folder / f"heldout.{shipped.rsplit('.', 1)[1]}"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return f"prompts.heldout={file}"


def test_llada(texts, tmp_path):
    config = RunConfig.load(
        "llada-8b",
        [
            *SMALL,
            f"out={tmp_path}/run",
            f"model.path={texts}",
            "model.length=12",
            "model.dtype=float32",
            "rollout.num_steps=2",
            "rollout.block=6",
            "evaluation.block=12",
            "algorithm.score.steps=2",
            heldout(tmp_path, "flashgrpo:prompts/countdown-heldout.jsonl"),
        ],
    )
    (line,) = read_lines(train(config) / "metrics.jsonl")
    assert line["drift"] == 0
    assert line["compute"] == {"rollout": 8, "update": 4 * 2 * 4}
    assert line["rewards"] == {"countdown": 0}


def test_amused(tmp_path):
    folder = amused.write(tmp_path / "model")
    config = RunConfig.load(
        "amused-256",
        [
            *SMALL,
            f"out={tmp_path}/run",
            f"model.path={folder}",
            "model.height=8",
            "model.width=8",
            "rollout.num_steps=3",
            "algorithm.score.steps=1",
            "rewards={pickscore: null, small: {call: 'flashgrpo.rewards.jpeg:compressibility'}}",
            heldout(tmp_path, "flashgrpo:prompts/heldout.txt"),
        ],
    )
    run = train(config)
    (line,) = read_lines(run / "metrics.jsonl")
    assert line["drift"] == 0
    assert line["grad_norm"] > 0
    assert line["compute"] == {"rollout": 4 * 3 * 2, "update": 4 * 2 * 3}
    assert [file.suffix for file in (run / "videos/000000").iterdir()] == [".png"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rollout.block=5"], "rollout.block: 384 tokens cannot be cut into blocks of 5; the nearest size is 4"),
        (["rollout.num_steps=100"], "rollout.num_steps: 100 steps cannot be shared out among 32 blocks"),
        (["algorithm.explore.top_p=0"], "top_p of Unmasking must be above 0"),
        (["algorithm.explore.temperature=0"], "temperature of Unmasking: 0 draws the likeliest token"),
        (["algorithm.credit.baseline=anchor"], "masked tokens have no anchor"),
        (["algorithm.objective.kind=competing"], "of masked tokens there are log-probabilities"),
        (["rollout.solver={kind: euler}"], "rollout.solver is of flow models"),
        (["algorithm.score.kind=recorded"], "score.kind recorded is flow"),
    ],
)
def test_what_does_not_go_together_is_refused(texts, tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        train(RunConfig.load("llada-8b", [f"out={tmp_path}/run", f"model.path={texts}", *overrides]))


def test_a_mask_that_the_vocabulary_lacks_and_another_tokenizer_are_refused(texts, tmp_path):
    with torch.random.fork_rng(devices=[]):
        plain = llada.Plain()
    mask = llada.write(tmp_path / "mask", plain, mask_token_id=99)
    other = llada.write(tmp_path / "other", plain, [*llada.WORDS, *"efghij"])
    for folder, sentence in (
        (mask, "has mask_token_id 99, which its vocabulary"),
        (other, "belong to different check"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(RunConfig.load("llada-8b", [f"out={tmp_path}/run", f"model.path={folder}"]))
    assert json.loads((texts / "config.json").read_text())["mask_token_id"] == 1

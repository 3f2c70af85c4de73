"""What `train` says before its first update, by the checks of the doctor."""

import re

import pytest
import torch
from PIL import Image

import flashgrpo.doctor
from flashgrpo.assembly import Assembly
from flashgrpo.distributed.world import single_process
from flashgrpo.doctor import refuse_unsound
from flashgrpo.prompts import trained_on
from flashgrpo.types import Prompt

TRAIN = "prompts.train=flashgrpo:tiny/prompts/train.jsonl"


@pytest.fixture
def preflight(make_run):
    """Run the preflight of a very small run with overrides; returns what it warns of."""

    def run(*overrides: str) -> list[str]:
        told: list[str] = []
        refuse_unsound(Assembly(make_run(*overrides), single_process()), told.append)
        return told

    return run


def test_a_sound_run_is_told_nothing(preflight):
    assert preflight() == []


def test_prompts_that_are_trained_on_or_cut_are_told_and_refuse_nothing(preflight):
    (leak,) = preflight("prompts.heldout=flashgrpo:tiny/prompts/train.jsonl")
    assert leak.startswith("108 held-out prompts are trained on as well")
    (cut,) = preflight("model.max_sequence_length=6")
    assert re.match(r"\d+ prompts are longer than 6 tokens \(model.max_sequence_length\) and lose their end, '", cut)
    assert preflight("model.max_sequence_length=6", "tracking.preflight=skip") == []


def watch_trials(monkeypatch, values) -> list[int]:
    """Give the samples of every trial these rewards, one after the other; returns the groups of each trial."""
    seen, real = [], flashgrpo.doctor.try_out

    def try_out(parts, groups, *given, **options):
        trial = real(parts, groups, *given, **options)
        table = trial.drawn.rewards.values
        table[:] = torch.tensor(values, dtype=table.dtype)[: len(table), None]
        trial.again[:] = table
        seen.append(groups)
        return trial

    monkeypatch.setattr(flashgrpo.doctor, "try_out", try_out)
    return seen


def test_a_group_that_is_constant_by_chance_is_told_nothing_of(preflight, monkeypatch):
    """Of a reward that is nearly always 1, as one of right and wrong is, a few groups are flat; more are looked at."""
    groups = watch_trials(monkeypatch, [1.0] * 11 + [0.0])
    assert preflight("rollout.prompts=6") == []
    assert groups == [1, 4, 6]


def test_a_constant_reward_is_named_once_an_update_has_shown_nothing_else(preflight, monkeypatch):
    groups = watch_trials(monkeypatch, [0.7] * 12)
    said = preflight("rollout.prompts=6")[0]
    assert groups == [1, 4, 6]
    assert said == "reward agreement was the same for all 2 samples in each of 6 groups; nothing can be learnt"


def test_a_constant_reward_beside_another_is_named(preflight, tmp_path):
    (tmp_path / "mine.py").write_text("def flat(videos, prompts, **columns): return [3.0] * len(prompts)\n")
    (said,) = preflight(f"rewards.mine.call={tmp_path}/mine.py:flat")
    assert said.startswith("reward mine was the same for all 2 samples in each of 4 groups, so only the other rewards")


def test_the_same_words_are_the_same_prompt(tmp_path):
    train = [Prompt("A red  square", {}), Prompt("a blue circle", {}), Prompt("a blue circle", {})]
    heldout = [Prompt("a red square", {}), Prompt("a blue circle", {}), Prompt("a blue circles", {})]
    assert trained_on(heldout, train, images=False) == 2
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c.png", "red")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name)
    a, b, c = ([Prompt("moves", {"image": str(tmp_path / name)})] for name in ("a.png", "b.png", "c.png"))
    assert trained_on(a, b, images=True) == 0
    assert trained_on(a, b, images=False) == 1
    assert trained_on(a, [*b, *c], images=True) == 1

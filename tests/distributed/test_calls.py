"""Ranks that hold a network between them call it as often as the one with most work, expert by expert, and no more."""

import json

import pytest

from tests.families import KINDS

KIND = KINDS["wan22-a14b"]  # two experts
EXPERTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A run with two experts, of 3 groups of 3 samples, each with its own stochastic step among 5 of the grid's 6."""
    folder = tmp_path_factory.mktemp("calls")
    KIND.build().save_pretrained(folder / "model")
    for file, texts in (("train", ["a red circle", "a blue square"]), ("heldout", ["a green circle"] * 7)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    tree = {
        "out": str(folder / "run"),
        "updates": 1,
        "model": KIND.config(folder / "model").model_dump(mode="json"),
        "algorithm": {"steps": {"kind": "one", "per": "sample", "window": [0, 1]}},
        "rollout": {"prompts": 3, "group_size": 3, "num_steps": 6, "guidance_scale_2": 3, "micro_batch": 2},
        "optim": {"micro_batch": 2, "ema": {"every": 1}},
        "prompts": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl")},
        "rewards": {"compressibility": {"call": "flashgrpo.rewards.jpeg:compressibility"}},
        "evaluation": {"num_steps": 4, "videos": 0},
        "tracking": {"progress": False},
    }
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    return folder / "recipe.yaml"


def busiest(needed: list[list[dict[str, int]]]) -> dict[str, int]:
    """Calls of the rank with most work by expert, added up over the times that ranks meet; `needed` is by rank.

    Example: ranks that need [3, 1] and [2, 2] of an expert at two meetings make 3 + 2 = 5 calls of it.
    """
    meetings = list(zip(*needed, strict=True))
    return {name: sum(max(rank[name] for rank in ranks) for ranks in meetings) for name in EXPERTS}


STEPS = ["optim.minibatches=2", "optim.passes=2", "algorithm=flow-grpo"]
CASES = {
    "2": (2, ["parallel.shares=[1,2]"]),
    "3, one without samples": (3, ["parallel.shard=3", "parallel.shares=[0,1,3]"]),
    "4 that are two copies": (4, ["parallel.shares=[1,4,2,2]"]),
    "4 that split tokens": (4, ["parallel.context=2", "parallel.shares=[1,2]"]),
    "2 that compare with the base": (2, ["parallel.shares=[2,1]", "algorithm.kl_coef=0.1"]),
    "2 in several optimizer steps": (2, ["parallel.shares=[1,3]", "rollout.deterministic_steps=3", *STEPS]),
}


@pytest.mark.parametrize(("size", "settings"), CASES.values(), ids=CASES)
def test_every_rank_makes_the_calls_of_the_busiest(nursery, recipe, size, settings):
    counted = nursery.run("network_calls", recipe, "parallel.shard=2", *settings, size=size)
    assert len(counted["ranks"]) == size
    assert counted["metrics"]["drift"] == 0
    assert counted["metrics"]["grad_norm_by_step"] == {}  # they would have ranks meet at every step
    for phase in ("rollout", "update", "evaluation"):
        needed = [rank["needed"][phase] for rank in counted["ranks"]]
        expected = busiest(needed)
        assert min(expected.values()) > 0, "both experts have work"
        assert len({json.dumps(own) for own in needed}) > 1, "ranks have unequal work"
        for rank in counted["ranks"]:
            assert rank["made"][phase] == expected, phase


def test_norms_by_step_cost_calls_and_are_there_when_asked_for(nursery, recipe):
    shard = ["parallel.shard=3", "parallel.shares=[2,3,4]"]
    plain = nursery.run("network_calls", recipe, *shard, size=3)
    asked = nursery.run("network_calls", recipe, *shard, "optim.grad_norm_by_step=true", size=3)
    norms = asked["metrics"]["grad_norm_by_step"]
    assert norms.keys() == asked["metrics"]["transitions_by_step"].keys()
    assert min(norms.values()) > 0
    assert plain["metrics"]["grad_norm_by_step"] == {}
    for name in ("loss", "grad_norm"):
        assert asked["metrics"][name] == pytest.approx(plain["metrics"][name], rel=1e-4)
    expected = busiest([rank["needed"]["update"] for rank in asked["ranks"]])
    assert {json.dumps(rank["made"]["update"]) for rank in asked["ranks"]} == {json.dumps(expected)}
    calls = [sum(counted["ranks"][0]["made"]["update"].values()) for counted in (plain, asked)]
    assert calls[0] < calls[1]

"""A small version of the comparison of docs/results.md: the facts that have an order of magnitude, not who wins.

`flashgrpo compare --diagnose` on the bundled model at 10 steps over the whole grid, one seed, a few updates.
"""

import json

import pytest
from rich.console import Console

from flashgrpo.compare import compare
from flashgrpo.diagnostics import measure as diagnostics
from flashgrpo.diagnostics.measure import Effort

pytestmark = pytest.mark.slow

WHOLE_GRID = [
    "rollout.num_steps=10",
    "rollout.deterministic_steps=null",
    "rollout.prompts=4",
    "optim.ema.decay=0",
    "evaluation.videos=0",
]
SHORT = ["evaluation.num_steps=4", "evaluation.samples_per_prompt=1", "parallel.threads=1"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out, drawn = tmp_path_factory.mktemp("evidence") / "comparison", []
    with pytest.MonkeyPatch.context() as patch:
        real, effort = diagnostics.diagnose, Effort(prompts=4, members=3, updates=3)
        patch.setattr(diagnostics, "diagnose", lambda *given, **options: real(*given, effort=effort, **options))
        split = diagnostics.split_variance
        patch.setattr(diagnostics, "split_variance", lambda *given: drawn.append(given) or split(*given))
        comparison = compare(
            "tiny",
            [*WHOLE_GRID, *SHORT],
            ["flash-grpo={preset: flash-grpo-whole-grid}", "flow-grpo"],
            seeds=1,
            out=out,
            budget=2 * 32 * (10 + 27),  # one update of Flow-GRPO
            points=1,
            keep="noise",
            diagnose=True,
            console=Console(quiet=True),
        )
    return comparison, json.loads((out / "diagnosis.json").read_text()), drawn


def test_training_costs_a_ninth(found):
    """One of 9 steps is trained, here in network forwards; at 20 steps, as in the paper, it is one of 19."""
    flash, flow = found[0]["summary"]
    assert [row["ended"] for row in (flash, flow)] == [1, 1]
    assert flow["per_sample"]["update"] == 9 * flash["per_sample"]["update"] == 9 * 2 * 3
    assert flow["training_share"] > 0.7 > 0.4 > flash["training_share"]


def test_ratios_are_one_before_the_policy_moves(found):
    comparison, diagnosis, _ = found
    assert {update["drift"] for run in comparison["runs"] for update in run["updates"]} == {0.0}
    assert {one["drift"] for one in diagnosis["consistency"].values()} == {0.0}


def test_rectification_levels_the_gradient(found):
    """Over the whole grid lambda spreads by about its mean, and so does the gradient's norm, until it is rectified."""
    ((_, by_start),) = found[1]["noises"].items()
    level = by_start["independent"]["gradient_by_step"]["windows"]["whole grid"]
    assert level["predicted"] > 0.8
    assert level["uniform"]["value"] > 0.8
    assert level["rectified"]["value"] < level["uniform"]["value"] / 2
    assert level["rectified_score"]["value"] < 0.5


@pytest.mark.parametrize("number", [0, 1], ids=["independent", "shared"])
def test_the_variance_of_rewards_adds_up(found, number):
    """Law of total variance, against numpy on the rewards that were drawn: of K steps and M samples at each,

        var of all K M = between + within (1 - 1 / (K M)),   within the mean over the steps of their unbiased variance

    where the factor is what the unbiased estimates leave out. `within` is what a group that shares its step sees.
    """
    _, diagnosis, drawn = found
    ((_, by_start),) = diagnosis["noises"].items()
    start = ("independent", "shared")[number]
    assert by_start[start]["reward_variance"]["shared_noise"] == bool(number)
    splits = by_start[start]["reward_variance"]["windows"]
    assert len(drawn) == 2 * len(splits)
    for split, (rewards, steps) in zip(splits.values(), drawn[number * len(splits) :], strict=False):
        assert split["steps"] == steps
        within, between, total, share = (split[part]["value"] for part in ("within", "between", "total", "share"))
        cells = rewards.numpy()[:, steps]
        assert within == pytest.approx(cells.var(axis=2, ddof=1).mean())
        whole = cells.reshape(len(cells), -1).var(axis=1).mean()
        assert between + within * (1 - 1 / cells[0].size) == pytest.approx(whole)
        assert total > 0
        assert (total, share) == (pytest.approx(within + between), pytest.approx(between / total))

"""Branches that compete across ranks: any number of them learns the same, and a kill -9 changes nothing."""

import pytest
import torch


def branches(nursery, folder, size=1, updates=3, dies=False, **parallel):
    return nursery.start("learn_from_branches", folder, parallel, updates, dies, size=size)


def result(ranks):
    assert set(ranks.wait()) == {0}, ranks.said()
    return ranks.result()


@pytest.fixture(scope="module")
def alone(nursery, tmp_path_factory):
    return result(branches(nursery, tmp_path_factory.mktemp("alone")))


@pytest.mark.parametrize(
    ("size", "parallel"), [(2, {}), (3, {}), (2, {"shard": 2}), (3, {"shard": 3}), (4, {"shard": 2})]
)
def test_any_number_of_ranks_learns_the_same(nursery, tmp_path, alone, size, parallel):
    """With 2 and 4 ranks a group lies on two of them, whose slots differ in their number of calls; with 4 one of them
    has an anchor and no term of its group.
    """
    found = result(branches(nursery, tmp_path, size, **parallel))
    for name, weight in found["weights"].items():
        torch.testing.assert_close(torch.tensor(weight), torch.tensor(alone["weights"][name]), rtol=1e-4, atol=1e-5)
    for name in ("loss", "kl", "largest_share", "score", "clip_fraction", "grad_norm"):
        assert found["metrics"][name] == pytest.approx(alone["metrics"][name], rel=1e-3, abs=1e-5), name
    assert found["metrics"]["drift"] == alone["metrics"]["drift"] == 0
    assert found["metrics"]["transitions_by_step"] == alone["metrics"]["transitions_by_step"]


@pytest.mark.parametrize(("size", "parallel"), [(1, {}), (2, {}), (2, {"shard": 2})])
def test_killed_between_the_passes_the_run_ends_with_the_same_bits(nursery, tmp_path, size, parallel):
    whole = result(branches(nursery, tmp_path / "whole", size, **parallel))
    killed = branches(nursery, tmp_path / "killed", size, dies=True, **parallel)
    assert -9 in killed.wait()
    resumed = result(branches(nursery, tmp_path / "killed", size, **parallel))
    assert (whole["began"], resumed["began"]) == (0, 2)
    assert resumed["weights"] == whole["weights"]
    assert resumed["metrics"] == whole["metrics"]

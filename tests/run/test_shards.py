"""What ranks share out for a checkpoint and at a start: nothing is copied, read or told once for every rank."""

from pathlib import Path

import pytest
import torch

from flashgrpo.distributed.world import World, single_process
from flashgrpo.errors import UserError
from flashgrpo.run.shards import digests, own_part

CPU = torch.device("cpu")
STATE = {
    kind: {f"{kind}{number}": torch.empty(64 + 8 * number, 16) for number in range(24)} for kind in ("policy", "ema")
}
STATE["optimizer"] = {"steps": torch.tensor(3)}


def size(tensors) -> int:
    return sum(tensor.nbytes for named in tensors.values() for tensor in named.values())


@pytest.mark.parametrize(("ranks", "shard"), [(1, 1), (8, 1), (8, 8), (64, 8), (512, 8), (512, 1)])
def test_copies_of_a_state_share_it_out(ranks, shard):
    """Each tensor has one writer among the ranks that hold it, and none has much more than its share."""
    writers = [own_part(STATE, World(CPU, rank, ranks, shard, uses_fsdp=shard > 1)) for rank in range(ranks)]
    largest = max(tensor.nbytes for named in STATE.values() for tensor in named.values())
    for kind, named in STATE.items():
        for name, tensor in named.items():
            found = [rank for rank, own in enumerate(writers) if own.get(kind, {}).get(name) is tensor]
            assert len(found) == shard
            assert found == list(range(found[0], found[0] + shard))  # the ranks of one copy
    assert max(size(own) for own in writers) <= size(STATE) / (ranks / shard) + largest


def test_digests_are_computed_where_they_are_shared_out(tmp_path):
    for name in "abc":
        (tmp_path / name).write_text(name)
    found = digests(tmp_path, ["a", "b", "c"], single_process(computes=False))
    assert found["a"] == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # sha256sum
    assert len(set(found.values())) == 3
    with pytest.raises(UserError, match=r"is not whole: .*d cannot be read"):
        digests(tmp_path, ["a", "d"], single_process(computes=False))


@pytest.mark.parametrize(("ranks", "shard"), [(2, 1), (4, 1), (4, 2), (3, 3)])
def test_files_bytes_and_opens_of_each_rank(nursery, tmp_path, ranks, shard):
    folder = tmp_path / "checkpoints"
    counted = nursery.run("save_and_resume", str(folder), shard, size=ranks)
    state, largest = counted[0]["state"], 64 * 64 * 4
    shards = list(Path(folder).rglob("*.distcp"))
    assert len(shards) <= ranks
    assert sum(file.stat().st_size for file in shards) < 1.6 * state + 2**15  # once; archives have headers
    for rank, own in enumerate(counted):
        assert own["copied"] <= state / ranks + 3 * largest  # and not the whole state
        assert own["told"] < 1.1 * 2**20 or rank == 0
        assert own["opened to save"] <= (3 if rank else 6 + 3 * ranks)  # the main rank flushes and seals them
        assert own["opened to resume"] <= 2 + ranks
    assert sum(own["copied"] for own in counted) < state + ranks * 2 * largest

"""What an update costs a rank in collectives as the number of ranks grows: `python -m tools.ranks`, about a minute.

A process plays one rank of many on torch's fake process group: FSDP2 and all collectives run, no data moves, and what
other ranks would answer is this rank's own answer. It draws one prompt group of two samples of the bundled model.
"""

import multiprocessing
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashgrpo.assembly import make_process
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import World
from flashgrpo.learning.experience import compare, draw_and_score
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.update import policy_update
from flashgrpo.models.lora import trained_parameters
from flashgrpo.scoring.scoring import untimed
from flashgrpo.types import Prompt, PromptGroup, RewardTable

PROMPT = Prompt("a red circle moving left slowly", {})
RANK, GROUP_SIZE = 3, 2
SIZES = (8, 64, 512)
EXCHANGES = ("allgather", "broadcast")
"""Of small values; the other collectives are of gradients and, with FSDP2, of weights."""


class Collectives(TorchDispatchMode):
    """Counts collectives by name, and the bytes of each: what this rank gives or gets, whichever is more."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1].strip("_")
            self.calls[name] += 1
            self.bytes[name] += max(sum(one.nbytes for one in tree_leaves(a) if isinstance(one, Tensor)) for a in args)
        return func(*args, **(kwargs or {}))


class Answers:
    """Rewards of the samples of all ranks, in the place of `Scoring`."""

    def __init__(self, samples: int) -> None:
        self._values = torch.rand(samples, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def add(self, rows: Tensor, outputs: Tensor) -> None:
        """Score nothing."""

    def table(self) -> RewardTable:
        """Return the rewards."""
        return RewardTable(("reward",), self._values, torch.ones(1, dtype=torch.float64))


def measured(ranks: int, shard: bool) -> dict[str, dict[str, Any]]:
    """Go through an update as one of so many ranks; phase -> calls and bytes by collective, and Python's peak memory.

    Args:
        shard: whether the ranks hold one network between them, or a whole one each.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=ranks)
    sizes = [f"rollout.prompts={ranks}", f"rollout.group_size={GROUP_SIZE}", "rollout.num_steps=4"]
    config = RunConfig.load("tiny", sizes)
    settings: dict[str, Any] = {"shard": ranks, "uses_fsdp": True} if shard else {}
    world = World(torch.device("cpu"), RANK, ranks, cpu_group=dist.group.WORLD, **settings)
    process = make_process(config, world, [PROMPT])
    optimizer = Optimizer(trained_parameters(process.network), config.optim, world)
    groups = [PromptGroup(0, number, PROMPT, GROUP_SIZE) for number in range(ranks)]
    phases: dict[str, dict[str, Any]] = {}
    tracemalloc.start()

    def phase(name: str, do: Callable[[], Any]) -> Any:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        with Collectives() as counted:
            result = do()
        memory = tracemalloc.get_traced_memory()[1] - before
        phases[name] = {"calls": dict(counted.calls), "bytes": dict(counted.bytes), "memory": memory}
        return result

    answers, objective = Answers(GROUP_SIZE * ranks), config.algorithm.objective
    drawn = phase("rollout", lambda: draw_and_score(process, answers, groups, 0, world, untimed, 1))
    compared = phase("advantages", lambda: compare(drawn, process.channels, config.algorithm.credit, world))
    phase("update", lambda: policy_update(process, objective, optimizer, compared.record, config.optim, world))
    phase("check of replicas", lambda: world.check_replicas(optimizer.weights()))
    return phases


def by_size(shard: bool, sizes: tuple[int, ...] = SIZES) -> dict[int, dict[str, dict[str, Any]]]:
    """Measure each number of ranks in a process of its own."""
    results = {}
    for ranks in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[ranks] = pool.apply(measured, (ranks, shard))
    return results


def main() -> None:
    """Print the table of docs/distributed.md."""
    sizes = ", ".join(map(str, SIZES))
    print(f"With {sizes} ranks:\n")
    print("| phase | a rank has | collectives | small values, KiB | gradients, KiB | Python's memory, KiB |")
    print("|---|---|---|---|---|---|")
    for shard in (False, True):
        results = by_size(shard)
        for name, first in results[SIZES[0]].items():
            rows = [results[ranks][name] for ranks in SIZES]
            small = [sum(row["bytes"].get(one, 0) for one in EXCHANGES) / 1024 for row in rows]
            gradients = [sum(size for one, size in row["bytes"].items() if "reduce" in one) / 1024 for row in rows]
            cells = [name, "a shard" if shard else "a network", str(sum(first["calls"].values()))]
            cells += [", ".join(f"{value:.0f}" for value in values) for values in (small, gradients)]
            cells.append(", ".join(f"{row['memory'] / 1024:.0f}" for row in rows))
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

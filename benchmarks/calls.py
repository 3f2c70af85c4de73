"""How many network calls ranks that hold a network between them make, against those that their work needs.

    python benchmarks/calls.py wan21-14b --ranks 8 64

Each rank makes as many calls of a phase as the one with most work. Beside it stands the rule by which ranks would meet
at each denoising step, in a rollout for each kind of step. Nothing is loaded: which steps are stochastic is a function
of the seed; one expert is assumed.
"""

import argparse
from collections.abc import Sequence

import torch

from flashgrpo import RunConfig
from flashgrpo.distributed.shares import cut
from flashgrpo.processes.calls import number_of_calls
from flashgrpo.processes.flow.rollout import MicroBatch, plan

Calls = dict[tuple[int, int, bool], int]
"""(micro-batch, step, whether it is stochastic) -> calls."""


def counted(config: RunConfig, update: int, ranks: int) -> tuple[list[Calls], list[Calls]]:
    """The calls of each rank in the rollout, and in the update."""
    settings, steps = config.rollout, config.algorithm.explore.steps
    groups = torch.arange(settings.prompts).repeat_interleave(settings.group_size)
    members = torch.arange(settings.group_size).repeat(settings.prompts)
    stochastic = steps.mask(config.seed, update, groups, settings.num_steps, members=members)
    trained = steps.trained(config.seed, update, groups, settings.num_steps, members=members)
    rollout, learning = [], []
    for rank in range(ranks):
        own = cut(len(groups), [1.0] * ranks, rank)
        rows = slice(own.start, own.stop)
        batches = plan(stochastic[rows], trained[rows], settings.deterministic_steps, settings.micro_batch)
        walks = [(i, batch, k) for i, batch in enumerate(batches) for k in batch.points]
        rollout.append({(i, k, k in batch.stochastic): calls(config, batch, k) for i, batch, k in walks})
        units = trained[rows].sum(dim=0).tolist()
        learning.append({(0, k, True): number_of_calls(n, config.optim.micro_batch) for k, n in enumerate(units) if n})
    return rollout, learning


def calls(config: RunConfig, batch: MicroBatch, k: int) -> int:
    """Of one step of a micro-batch."""
    return number_of_calls(len(batch.rows), config.optim.micro_batch) if k in batch.stochastic else 1


def together(ranks: Sequence[Calls]) -> tuple[int, int, int]:
    """Calls that all ranks need, that they make, and that they would make if they met at each step."""
    places = {place for own in ranks for place in own}
    by_step = sum(max(own.get(place, 0) for own in ranks) for place in places)
    totals = [sum(own.values()) for own in ranks]
    return sum(totals), max(totals) * len(ranks), by_step * len(ranks)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--updates", type=int, default=20)
    arguments = parser.parse_args()
    config = RunConfig.load(arguments.recipe)
    print("| ranks | phase | needed | made | made / needed | met at each step / needed |\n|---|---|---|---|---|---|")
    for ranks in arguments.ranks:
        every = [counted(config, update, ranks) for update in range(arguments.updates)]
        for phase, number in (("rollout", 0), ("update", 1)):
            sums = [sum(column) for column in zip(*(together(one[number]) for one in every), strict=True)]
            needed, made, by_step = sums
            print(f"| {ranks} | {phase} | {needed} | {made} | {made / needed:.2f} | {by_step / needed:.2f} |")


if __name__ == "__main__":
    main()

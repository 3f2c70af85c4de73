"""Rows that travel from the ranks that drew them to those that score them."""

import torch
import torch.distributed as dist
from torch import Tensor

from flashgrpo.distributed.shares import overlap
from flashgrpo.distributed.world import World


def hand_over(world: World, rows: Tensor, total: int) -> Tensor:
    """From the rows of this rank's share of `total` samples, to those that it has to score; (B, ...)."""
    if not world.reward_ranks:
        return rows
    shape = next(shape for shape in world.all_gather_json(list(rows.shape[1:]) if len(rows) else None) if shape)
    wanted, have = world.scored_by(total, world.rank), world.share(total)
    received = torch.empty(len(wanted), *shape)
    transfers, sent = [], []
    for other in range(world.size):
        theirs = world.share(total, other)
        if other % world.context == 0 and (both := overlap(theirs, wanted)):
            into = received[both.start - wanted.start : both.stop - wanted.start]
            if other == world.rank:
                into.copy_(rows[both.start - have.start : both.stop - have.start])
            else:
                transfers.append(dist.irecv(into, other, world.cpu_group))
        both = overlap(have, world.scored_by(total, other))
        if both and world.rank % world.context == 0 and other != world.rank:
            sent.append(rows[both.start - have.start : both.stop - have.start].float().cpu().contiguous())
            transfers.append(dist.isend(sent[-1], other, world.cpu_group))
    for transfer in filter(None, transfers):
        transfer.wait()
    return received

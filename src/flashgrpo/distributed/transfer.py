"""Rows that travel from the ranks that drew them to those that score them, a piece at a time."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from flashgrpo.distributed.messages import from_bytes, to_bytes
from flashgrpo.distributed.shares import overlap
from flashgrpo.distributed.world import World
from flashgrpo.types import Failed

DIMENSIONS = 8  # of rows, at most; their shape travels ahead of them, and of texts 0 dimensions and their bytes


@dataclass(frozen=True)
class Piece:
    """Samples that travel together.

    Args:
        source: the rank that has drawn them.
        destination: the rank that scores them.
        numbers: of the samples, among those of all ranks.
    """

    source: int
    destination: int
    numbers: range


Rows = Tensor | list[str]
"""(B, ...), or B texts."""


def pieces(world: World, total: int, size: int) -> list[Piece]:
    """Cut `total` samples into pieces of at most `size`, in the order in which all ranks hand them over.

    The first piece of every rank comes before the second of any, so that ranks make their pieces at the same time. As
    the order is the same everywhere, no rank waits for one that waits for it.
    """
    found: list[tuple[int, Piece]] = []
    for source in range(0, world.size, world.context):  # ranks of one context have drawn the same
        turn = 0
        for destination in world.reward_ranks:
            both = overlap(world.share(total, source), world.scored_by(total, destination))
            for first in range(both.start, both.stop, size):
                found.append((turn, Piece(source, destination, range(first, min(first + size, both.stop)))))
                turn += 1
    return [piece for _, piece in sorted(found, key=lambda one: one[0])]


def hand_over(world: World, rows: Rows | None, piece: Piece) -> Rows | None:
    """Return the rows of a piece, (B, ...) or B texts, where they are to be scored, of the rank that gives `rows`.

    They travel once the other rank waits for them, so each rank holds one piece of what it makes or receives.
    """
    if piece.destination == piece.source:
        return rows
    world.meet(piece.source, piece.destination)  # which may have waited for a reward
    if world.rank == piece.source:
        assert rows is not None
        sent = to_bytes(_packed(rows)) if isinstance(rows, list) else rows.float().cpu().contiguous()
        _send(world, torch.tensor(_header(rows, sent)), piece.destination)
        _send(world, sent, piece.destination)
    if world.rank != piece.destination:
        return None
    header = torch.empty(1 + DIMENSIONS, dtype=torch.int64)
    dist.recv(header, piece.source, world.cpu_group)
    count, *shape = header.tolist()
    received = torch.empty(shape[:count]) if count else torch.empty(shape[0], dtype=torch.uint8)
    dist.recv(received, piece.source, world.cpu_group)
    return received if count else _unpacked(from_bytes(received))


def _packed(texts: list[str]) -> list[str | float]:
    """Write texts such that those that have failed keep their reward."""
    return [text.reward if isinstance(text, Failed) else text for text in texts]


def _unpacked(texts: list[str | float]) -> list[str]:
    return [text if isinstance(text, str) else Failed(text) for text in texts]


def _header(rows: Rows, sent: Tensor) -> list[int]:
    dimensions = 0 if isinstance(rows, list) else sent.ndim
    return [dimensions, *sent.shape, *[0] * (DIMENSIONS - sent.ndim)]


def _send(world: World, rows: Tensor, rank: int) -> None:
    dist.send(rows, rank, world.cpu_group)

"""Settings of the processes of a run."""

from typing import Annotated

from pydantic import Field

from flashgrpo.errors import UserError
from flashgrpo.settings import LARGEST, LONG, MANY, Count, Part


class ParallelConfig(Part):
    """Use of the machine, and of many: what torchrun started is cut into replicate x shard x context."""

    threads: int | None = Field(default=None, ge=1, le=10_000)
    """CPU threads of the tensor library; its own choice when not given."""
    shard: Count = 1
    """Processes that hold one copy of the network between them (FSDP2); the rest of the processes are copies."""
    context: Count = 1
    """Processes that compute one sample together, each a part of its tokens (Ulysses); it divides heads and tokens."""
    shares: tuple[Annotated[float, Field(ge=0, le=LARGEST)], ...] | None = None
    """How much of an update's samples each data rank takes, in any unit; equal parts when not given."""
    reward_ranks: tuple[Annotated[int, Field(ge=0, le=MANY)], ...] = ()
    """The processes that compute the rewards of all videos; when none is given, each scores what it has drawn."""
    dead_after: float = Field(default=60, gt=2, le=LONG)
    """Seconds without a sign of life after which a process counts as dead, and all end."""
    start_timeout: float = Field(default=300, ge=1, le=LONG)
    """Seconds that the processes wait at the start until all of them are there."""
    timeout: float = Field(default=1800, ge=1, le=LONG)
    """Seconds that a process waits for the others while all compute; for rewards and files they wait for each other."""

    @property
    def fewest_processes(self) -> int:
        """The fewest processes that these settings can be cut into."""
        if self.shares:
            return len(self.shares) * self.context
        together = self.shard * self.context
        return -(-(1 + max(self.reward_ranks, default=0)) // together) * together

    def check_mesh(self, size: int) -> None:
        """Check that a number of processes fits the mesh.

        Raises:
            UserError: it does not.
        """
        shard, context, shares = self.shard, self.context, self.shares
        if size % (shard * context):
            these, needed = "1 process" if size == 1 else f"{size} processes", shard * context
            raise UserError(
                f"parallel: {these} cannot be cut into shard {shard} x context {context}; start {needed} or a multiple "
                f"with torchrun --nproc-per-node {needed} -m flashgrpo train ..., or lower these"
            )
        if shares is not None and (len(shares) != size // context or not sum(shares)):
            raise UserError(f"parallel.shares: {len(shares)} shares for {size // context} data ranks; give each one")
        if any(rank >= size for rank in self.reward_ranks):
            raise UserError(f"parallel.reward_ranks: {list(self.reward_ranks)} with {size} processes, numbered from 0")

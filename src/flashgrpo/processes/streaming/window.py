"""Which past frames a block of a streaming video looks at."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The first frames of the video, the *sink*, and the last ones before a block, up to and including itself.

    Counts are of latent frames. KVPO and LongLive: sink 3, local 9, blocks of 3, so a block attends to 12 frames with
    its own (arXiv 2605.14278).

    Example: `Window().past(21) == (0, 1, 2, 15, 16, 17, 18, 19, 20)`
    """

    sink: int = 3
    local: int = 9
    block: int = 3

    def __post_init__(self) -> None:
        if self.block < 1 or self.sink < 0 or self.local < self.block:
            raise ValueError(
                f"a window of sink {self.sink} and local {self.local} does not hold a block of {self.block} frames; "
                f"local counts the block's own frames, so it is {max(self.block, 1)} or more"
            )

    @property
    def frames(self) -> int:
        """Frames that a block attends to at most, its own among them."""
        return self.sink + self.local

    def past(self, start: int) -> tuple[int, ...]:
        """Return the past frames of the block that begins at frame `start`, in order."""
        return self._joined(start, (), self.local)

    def routed(self, start: int, frames: Sequence[int], nearest: int) -> tuple[int, ...]:
        """Return the past frames in a branch that is shown other old frames: sink | `frames` | the nearest.

        Args:
            frames: to look at in place of the window's own; of the past, in any order.
            nearest: last frames that are kept, the block's own among them, as `local` counts.

        Raises:
            ValueError: a frame is not between the sink and the nearest.
        """
        free = range(min(self.sink, start), max(0, start + self.block - nearest))
        if wrong := sorted(set(frames) - set(free)):
            raise ValueError(
                f"frame {wrong[0]} cannot be routed to the block at {start}: free are {free.start} to {free.stop - 1}"
            )
        return self._joined(start, frames, nearest)

    def _joined(self, start: int, frames: Sequence[int], nearest: int) -> tuple[int, ...]:
        first = max(0, start + self.block - nearest)
        return tuple(sorted({*range(min(self.sink, start)), *frames, *range(first, start)}))

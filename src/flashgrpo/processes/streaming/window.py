"""Which past frames a block of a streaming video looks at."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """The first frames of the video, the *sink*, and the last ones before a block, up to and including itself.

    Counts are of latent frames. KVPO and LongLive: sink 3, local 9, blocks of 3, so a block attends to 12 frames with
    its own (arXiv 2605.14278).

    Args:
        first: frames of a video's first block, where it is a shorter one; 0 where it is as long as the others.

    Example: `Window().past(21) == (0, 1, 2, 15, 16, 17, 18, 19, 20)`
    """

    sink: int = 3
    local: int = 9
    block: int = 3
    first: int = 0

    def __post_init__(self) -> None:
        if self.block < 1 or self.sink < 0 or self.local < self.block:
            raise ValueError(
                f"a window of sink {self.sink} and local {self.local} does not hold a block of {self.block} frames; "
                f"local counts the block's own frames, so it is {max(self.block, 1)} or more"
            )
        if not 0 <= self.first <= self.block:
            raise ValueError(f"a first block of {self.first} frames is longer than the others, which have {self.block}")

    # Blocks

    def starts(self, frames: int) -> list[int]:
        """Return the first frames of the blocks that begin before a frame, in order."""
        return [self._start(number) for number in range(self.begun(frames))]

    def size(self, start: int) -> int:
        """Return the frames of the block that begins at a frame."""
        return self.block if start else self.first or self.block

    def begun(self, frame: int) -> int:
        """Return how many blocks begin before a frame."""
        return 1 + max(0, -(-(frame - self.size(0)) // self.block)) if frame > 0 else 0

    def next_start(self, frame: int) -> int:
        """Return the first frame of the block that begins at a frame or, if none does, soonest after it."""
        return self._start(self.begun(frame))

    def whole(self, frames: int) -> int:
        """Return how many of a video's first frames are whole blocks."""
        rest = frames - self.size(0)
        return 0 if rest < 0 else frames - rest % self.block

    def recent(self, frame: int) -> int:
        """Return where the blocks begin that are cached anew where the prompt changes at a frame: the window's last."""
        return self.next_start(frame - self.frames)

    def _start(self, number: int) -> int:
        return self.size(0) + (number - 1) * self.block if number else 0

    # What they look at

    @property
    def frames(self) -> int:
        """Frames that a block attends to at most, its own among them."""
        return self.sink + self.local

    def past(self, start: int) -> tuple[int, ...]:
        """Return the past frames of the block that begins at frame `start`, in order."""
        return self._joined(start, (), self.local)

    def kept(self, start: int) -> int:
        """Count the frames of all blocks that hold a past frame of the block that begins at frame `start`."""
        past = set(self.past(start))
        blocks = (range(first, first + self.size(first)) for first in self.starts(start))
        return sum(len(block) for block in blocks if not past.isdisjoint(block))

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

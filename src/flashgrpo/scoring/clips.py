"""Parts of videos for rewards that look at those: each under its own prompt, and the mean of a video's parts."""

from collections import defaultdict
from collections.abc import Sequence

import torch

from flashgrpo.scoring.batch import Batch, Columns
from flashgrpo.scoring.inputs import Input
from flashgrpo.types import Clip, Prompt, Reward, Videos


class ClipBatch:
    """Clips of samples that were drawn together, in place of their `Batch`; clips of one length are scored together.

    Args:
        videos: (B, F, 3, H, W) on the CPU, or the first frames, as far as the clips go.
        clips: of each sample, one or more.
    """

    def __init__(self, videos: Videos, clips: Sequence[Sequence[Clip]], fps: float) -> None:
        by_length: dict[int, list[tuple[int, Clip]]] = defaultdict(list)
        for row, of_row in enumerate(clips):
            for clip in of_row:
                by_length[clip.stop - clip.first].append((row, clip))
        self._counts = [len(of_row) for of_row in clips]
        self._parts = [(self._batch(videos, part, fps), [row for row, _ in part]) for part in by_length.values()]

    @staticmethod
    def _batch(videos: Videos, part: Sequence[tuple[int, Clip]], fps: float) -> Batch:
        shown = torch.stack([videos[row, clip.first : clip.stop] for row, clip in part])
        return Batch([clip.prompt for _, clip in part], fps, shown)

    @property
    def prompts(self) -> Sequence[Prompt]:
        """The prompts of all clips."""
        return [prompt for batch, _ in self._parts for prompt in batch.prompts]

    def wanted_by(self, count: int) -> None:
        """So many rewards will score it."""
        for batch, _ in self._parts:
            batch.wanted_by(count)

    def done(self) -> None:
        """One of them has; after the last nothing is kept."""
        for batch, _ in self._parts:
            batch.done()

    def values(self, name: str, reward: Reward, takes: Input) -> Columns:
        """Return the mean over its clips for each sample, by component.

        Raises:
            UserError: as `Batch.values`, or the components of some clips are not those of others.
        """
        sums: dict[str, list[float]] = {}
        for batch, rows in self._parts:
            found = batch.values(name, reward, takes)
            if sums and found.keys() != sums.keys():
                raise ValueError(f"reward {name} returned {list(sums)} for some clips and {list(found)} for others")
            for component, values in found.items():
                column = sums.setdefault(component, [0.0] * len(self._counts))
                for row, value in zip(rows, values, strict=True):
                    column[row] += value
        return {name: [s / n for s, n in zip(column, self._counts, strict=True)] for name, column in sums.items()}

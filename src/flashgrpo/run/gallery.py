"""The videos that a run keeps: samples that nobody chose, and those that changed most."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgrpo.distributed.world import World
from flashgrpo.process import Process
from flashgrpo.scoring.heldout import Evaluation, Evaluator, largest_changes
from flashgrpo.scoring.scoring import decode
from flashgrpo.video import write_mp4


class Gallery:
    """Writes videos of evaluations below `folder`, the run directory."""

    def __init__(self, folder: Path, evaluator: Evaluator, process: Process, world: World, fps: float) -> None:
        self._folder, self._evaluator, self._process, self._world, self._fps = folder, evaluator, process, world, fps

    def keep(
        self, line: dict[str, Any], base: Sequence[dict[str, Any]], evaluation: Evaluation, changed: bool
    ) -> dict[str, str]:
        """Write the videos of the fixed samples and, where `changed`, of those that changed most against the base.

        Args:
            line: of evaluations.jsonl, whose samples get the videos' paths.
            base: the samples of the base model's line.

        Returns:
            Label -> path in the run directory, of all samples with a video.
        """
        update, samples = line["update"], line["samples"]
        videos = self._world.on_all(lambda: self._write(update, evaluation))[0]
        for row, video in videos.items():
            samples[int(row)] |= {"video": video, "base_video": base[int(row)].get("video", video)}
        if update and videos and changed:
            line["extremes"] = largest_changes(samples)
            self._write_changes(update, samples, [row for row in line["extremes"] if "video" not in samples[row]])
        return {f"{row:03d}": sample["video"] for row, sample in enumerate(samples) if "video" in sample}

    def _write(self, update: int, evaluation: Evaluation) -> dict[int, str]:
        """Write the kept videos that this process made; row -> path, of all kept ones."""
        paths = {row: f"videos/{update:06d}/{row:03d}.mp4" for row in evaluation.shown}
        for row, video in evaluation.videos.items():
            write_mp4(self._folder / paths[row], video, self._fps)
        return paths

    def _write_changes(self, update: int, samples: Sequence[dict[str, Any]], rows: Sequence[int]) -> None:
        """Draw some samples once more, tuned and base, and write both."""
        if not rows:
            return
        tuned = self._evaluator.resample(rows)
        with self._process.reference():
            before = self._evaluator.resample(rows)
        names = {row: [f"videos/{update:06d}/{row:03d}{end}.mp4" for end in ("", "-base")] for row in rows}

        def write() -> None:
            for outputs, of_each in zip((tuned, before), zip(*names.values(), strict=True), strict=True):
                for number, name in enumerate(of_each):  # one at a time: a video is far larger than its latents
                    [video] = decode(self._process.media, outputs[number : number + 1], 1)
                    write_mp4(self._folder / name, video, self._fps)

        self._world.on_main(write)
        for row, (video, base_video) in names.items():
            samples[row] |= {"video": video, "base_video": base_video}

"""The videos, images or texts that a run keeps: of samples that nobody chose, and of those that changed most."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashgrpo.distributed.world import World
from flashgrpo.media import Medium, suffix_of, write_medium
from flashgrpo.process import Process
from flashgrpo.scoring.heldout import Evaluation, Evaluator, largest_changes
from flashgrpo.scoring.scoring import shown


class Gallery:
    """Writes samples of evaluations below `folder`, the run directory."""

    def __init__(self, folder: Path, evaluator: Evaluator, process: Process, world: World, fps: float) -> None:
        self._folder, self._evaluator, self._process, self._world, self._fps = folder, evaluator, process, world, fps

    def keep(
        self, line: dict[str, Any], base: Sequence[dict[str, Any]], evaluation: Evaluation, changed: bool
    ) -> dict[str, str]:
        """Write the fixed samples and, where `changed`, those that changed most against the base.

        Args:
            line: of evaluations.jsonl, whose samples get the paths as `video` and `base_video`, whatever these are.
            base: the samples of the base model's line.

        Returns:
            Label -> path in the run directory, of all samples with a file.
        """
        update, samples = line["update"], line["samples"]
        ranks = self._world.on_all(lambda: self._write(update, evaluation.kept))
        files = {int(row): file for rank in ranks for row, file in rank.items()}
        for row, file in files.items():
            samples[row] |= {"video": file, "base_video": base[row].get("video", file)}
        if update and files and changed:
            line["extremes"] = largest_changes(samples)
            self._write_changes(update, samples, [row for row in line["extremes"] if "video" not in samples[row]])
        return {f"{row:03d}": sample["video"] for row, sample in enumerate(samples) if "video" in sample}

    def _write(self, update: int, kept: Mapping[int, Medium]) -> dict[int, str]:
        """Write what this process made; row -> path."""
        paths = {row: f"videos/{update:06d}/{row:03d}{suffix_of(medium)}" for row, medium in kept.items()}
        for row, medium in kept.items():
            write_medium(self._folder / paths[row], medium, self._fps)
        return paths

    def _write_changes(self, update: int, samples: Sequence[dict[str, Any]], rows: Sequence[int]) -> None:
        """Draw some samples once more, tuned and base, and write both."""
        if not rows:
            return
        tuned = self._evaluator.resample(rows)
        with self._process.reference():
            before = self._evaluator.resample(rows)

        def write() -> list[dict[str, str]]:
            files: list[dict[str, str]] = [{} for _ in rows]
            for key, end, outputs in (("video", "", tuned), ("base_video", "-base", before)):
                for number, row in enumerate(rows):  # one at a time: a video is far larger than its latents
                    medium = shown(self._process, outputs[number : number + 1])
                    files[number][key] = f"videos/{update:06d}/{row:03d}{end}{suffix_of(medium)}"
                    write_medium(self._folder / files[number][key], medium, self._fps)
            return files

        for row, names in zip(rows, self._world.on_main(write), strict=True):
            samples[row] |= names

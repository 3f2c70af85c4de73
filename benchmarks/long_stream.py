"""Memory and seconds of streaming a video to an mp4 as it grows: a block is drawn, decoded, written and forgotten.

    python benchmarks/long_stream.py [RECIPE] [--windows 2 10 40]

A row for each length, in attention windows of the model, each in a process of its own: frames, peak memory, and seconds
of a block in the first and the last tenth. `flashgrpo sample` writes videos this way.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

from torch import Tensor

from flashgrpo.assembly import make_process
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process, use_threads
from flashgrpo.prompts import read_prompts
from flashgrpo.types import Prompt
from flashgrpo.video import write_video_of


def streamed(recipe: str, windows: int) -> tuple[int, float, float, float]:
    """Return frames, peak memory in MiB, and median seconds of a block in the first and the last tenth."""
    config = RunConfig.load(recipe, ["out=runs/benchmark"])
    use_threads(config.parallel.threads)
    rollout: Any = config.rollout
    latent_frames = (rollout.sink + rollout.local) * windows // rollout.block * rollout.block
    frames = 1 + 4 * (latent_frames - 1)
    config = config.model_copy(update={"model": config.model.model_copy(update={"num_frames": frames})})
    prompt = Prompt(read_prompts(config.prompts.heldout, "prompts.heldout")[0].text, {})  # switches stay out
    seconds: list[float] = []

    def timed(pieces: Iterator[Any]) -> Iterator[Tensor]:
        begin = perf_counter()
        for piece in pieces:
            seconds.append(perf_counter() - begin)
            yield piece[0]
            begin = perf_counter()

    process = make_process(config, single_process(), [prompt])
    with tempfile.TemporaryDirectory() as folder:
        write_video_of(Path(folder) / "long.mp4", timed(process.stream(prompt, (0, "long"))), config.model.fps)
    tenth = max(1, len(seconds) // 10)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return frames, peak, statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])


def main() -> None:
    """Print a row for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="tiny-streaming")
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 10, 40])
    given = parser.parse_args()
    print("| windows | frames | peak memory, MiB | seconds of a block at first | at last |\n|---|---|---|---|---|")
    for windows in given.windows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            frames, peak, first, last = pool.apply(streamed, (given.recipe, windows))
        print(f"| {windows} | {frames:,} | {peak:.0f} | {first:.3f} | {last:.3f} |", flush=True)


if __name__ == "__main__":
    main()

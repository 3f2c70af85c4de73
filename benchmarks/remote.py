"""What it costs to score on a reward server rather than in this process: `python benchmarks/remote.py [--json]`.

64 clips of 17 frames of 64 x 64. The server is another process of this machine; each has one thread, OpenCV's too.
Both ways are measured in turn, and medians are printed; `added` is the median of the pairs' ratios, minus one. On a
machine that does other things too, look at the processor's time, of this process and the server together.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flashgrpo.scoring.loading import bind, load_reward
from flashgrpo.scoring.names import full_name
from flashgrpo.serving.client import Remote

REWARDS = ("motion:amount", "motion:flicker", "frames:sharpness", "jpeg:compressibility")
SHAPE = (64, 17, 3, 64, 64)


def processor_seconds(process: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def served(name: str) -> Iterator[tuple[str, int]]:
    """The URL of a server of the reward, and its process."""
    command = [sys.executable, "-m", "flashgrpo", "reward", "serve", name, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1], process.pid
        finally:
            process.terminate()


def measure(name: str, rounds: int, encoding: str, batch: int) -> dict[str, Any]:
    """Seconds of both ways, in turn."""
    coarse = torch.rand(SHAPE[0], 3, SHAPE[1], 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(SHAPE[1], *SHAPE[3:]), mode="trilinear")
    videos, prompts = smooth.transpose(1, 2).contiguous(), [""] * SHAPE[0]
    here = bind(load_reward(full_name(name), name), {}, name)
    with served(name) as (url, server):
        there = Remote([url], encoding=encoding, batch=batch)
        seconds: dict[str, list[float]] = {"here": [], "there": []}
        busy = {"here": 0.0, "there": 0.0}
        for number in range(rounds + 1):  # the first warms up
            for way, call in (("here", here), ("there", there)):
                worked = time.process_time() + processor_seconds(server)
                started = time.perf_counter()
                call(videos, prompts)
                if number:
                    seconds[way].append(time.perf_counter() - started)
                    busy[way] += (time.process_time() + processor_seconds(server) - worked) / rounds
    ratios = [there / here for here, there in zip(*seconds.values(), strict=True)]
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        **{way: round(value, 4) for way, value in medians.items()},
        "added": round(statistics.median(ratios) - 1, 3),
        "processor_here": round(busy["here"], 4),
        "processor_there": round(busy["there"], 4),
        "clips_per_second": round(SHAPE[0] / medians["there"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="pairs of measurements of each reward")
    parser.add_argument("--encoding", default="uint8", help="uint8, float32 or mp4")
    parser.add_argument("--batch", type=int, default=8, help="clips in a request")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OPENCV_FOR_THREADS_NUM"] = "1"  # read when it is imported
    os.environ.pop("FLASHGRPO_REWARD_TOKEN", None)
    results = {name: measure(name, arguments.rounds, arguments.encoding, arguments.batch) for name in REWARDS}
    if arguments.json:
        print(
            json.dumps({"clips": SHAPE, "encoding": arguments.encoding, "batch": arguments.batch, "rewards": results})
        )
        return
    table = Table("reward", "s here", "s there", "added", "processor s here", "there", "clips a second there")
    for name, row in results.items():
        numbers = [f"{row[key]:.3f}" for key in ("here", "there", "processor_here", "processor_there")]
        table.add_row(name, *numbers[:2], f"{row['added']:+.0%}", *numbers[2:], str(row["clips_per_second"]))
    Console().print(table)


if __name__ == "__main__":
    main()

"""What the rewards that need no download cost: milliseconds for a frame of 480 x 832, one thread, median of three.

python benchmarks/rewards.py [--json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from flashgrpo.rewards import frames, jpeg, motion, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    coarse = torch.rand(1, 3, 9, 30, 52, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(9, 480, 832), mode="trilinear")
    videos = smooth.permute(0, 2, 1, 3, 4).contiguous()
    calls: dict[str, Callable[..., Any]] = {
        "jpeg:compressibility": partial(jpeg.compressibility, frames=9),
        "frames:sharpness": partial(frames.sharpness, frames=9),
        "frames:exposure": partial(frames.exposure, frames=9),
        "motion:amount": motion.amount,
        "motion:smoothness": motion.smoothness,
        "motion:flicker": motion.flicker,
        "text:spelling": partial(text.spelling, text=["nothing"], frames=9),
    }
    costs = {name: milliseconds(call, videos) for name, call in calls.items()}
    if arguments.json:
        print(json.dumps(costs))
        return
    table = Table("reward", "ms a frame")
    for name, cost in costs.items():
        table.add_row(name, f"{cost:.1f}")
    Console().print(table)


def milliseconds(call: Callable[..., Any], videos: torch.Tensor) -> float:
    """Of a frame, the first call left out."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        call(videos, [""])
        seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds[1:]) / videos.shape[1], 2)


if __name__ == "__main__":
    main()

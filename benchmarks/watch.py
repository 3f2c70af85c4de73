"""How long the page of `flashgrpo watch` takes for runs of many updates.

    python benchmarks/watch.py [UPDATES ...] [--repeats 5]

Makes a run directory with so many updates and 50 evaluations of 36 prompts from a seeded generator, serves it, and asks
for its page: when nothing has been drawn yet, and, `--repeats` times, after a line was appended. CPU seconds of the
server (other programs on the machine change them little), medians; and bytes of the page.
"""

import argparse
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from flashgrpo.report.live import Server

REWARDS = ("agreement.color", "agreement.shape", "agreement.direction", "agreement.speed")
PROMPTS, EVALUATIONS = 36, 50


def update(number: int, draw: np.random.Generator) -> dict[str, Any]:
    """Return a line of metrics.jsonl."""
    reward, noise = 0.5 + 0.02 * float(draw.normal()), [float(value) for value in draw.random(5)]
    return {
        "update": number,
        "reward": reward,
        "reward_std": 0.1,
        "rewards": dict.fromkeys(REWARDS, reward),
        "rewards_std": dict.fromkeys(REWARDS, 0.1),
        "samples": 64,
        "compute": {"rollout": 640, "update": 704},
        **dict(zip(("ratio_max_dev", "clip_fraction", "approx_kl", "kl", "grad_norm"), noise, strict=True)),
        "drift": 0.0,
        "grad_norm_by_step": {str(number % 5): noise[-1]},
        "zero_spread_groups": 0,
        "samples_per_second": 64.0,
        "peak_gib": 1.0,
        "seconds": {"decode": 0.1, "reward": 0.05, "rollout": 0.5, "update": 0.3, "total": 1.0},
    }


def evaluation(number: int, draw: np.random.Generator) -> dict[str, Any]:
    """Return a line of evaluations.jsonl."""
    gain = 0.1 * min(1.0, number / 1000) + 0.01 * float(draw.normal())
    values = {"reward": 0.5 + gain, "base_reward": 0.5}
    parts = {"rewards": dict.fromkeys(REWARDS, 0.5 + gain), "base_rewards": dict.fromkeys(REWARDS, 0.5)}
    watched = {"watched": {"persistence": 0.9}, "base_watched": {"persistence": 0.9}}
    samples = [{"prompt": f"prompt {i}", **values, **parts, **watched} for i in range(PROMPTS)]
    interval = [gain - 0.02, gain + 0.02]
    more = {"difference": gain, "interval": interval, "best": number > 0, "samples": samples}
    return {"update": number, **values, **parts, **watched, **more}


def write_run(run: Path, updates: int, seed: int = 0) -> None:
    """Write a run directory."""
    draw = np.random.default_rng(seed)
    run.mkdir()
    (run / "config.yaml").write_text(f"updates: {2 * updates}\n", "utf-8")
    lines = {
        "metrics": [update(number, draw) for number in range(1, updates + 1)],
        "evaluations": [evaluation(n, draw) for n in range(0, updates + 1, max(1, updates // EVALUATIONS))],
    }
    for name, rows in lines.items():
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def measured(run: Path, updates: int, repeats: int) -> tuple[float, float, int]:
    """Return CPU seconds of the first page, of one after a new line, and bytes of a page."""
    draw, took = np.random.default_rng(1), []
    with Server([run]) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for number in range(updates + 1, updates + 2 + repeats):
            started = time.process_time()
            with urllib.request.urlopen(f"{server.url}0/") as answer:
                size = len(answer.read())
            took.append(time.process_time() - started)
            with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(update(number, draw)) + "\n")
        server.shutdown()
    return took[0], statistics.median(took[1:]), size


def main() -> None:
    """Print a row for each length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("updates", nargs="*", type=int, default=[100, 1_000, 10_000])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print("| updates | first page | after an update | page |\n|---|---|---|---|")
    for updates in given.updates:
        with tempfile.TemporaryDirectory() as folder:
            write_run(Path(folder) / "run", updates)
            first, later, size = measured(Path(folder) / "run", updates, given.repeats)
        print(f"| {updates:,} | {first:.2f} s | {later:.2f} s | {size / 1024:.0f} KiB |", flush=True)


if __name__ == "__main__":
    main()

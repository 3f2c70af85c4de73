"""One complete update at full size with random weights: seconds, memory and the share of the matmul rate, by phase.

    python benchmarks/hardware.py                                 wan21-1.3b at 480 x 832 x 81, one group of 4
    python benchmarks/hardware.py --recipe tiny --json            another recipe; one line of JSON

No checkpoint is needed. The first update warms up and is not counted. Memory is compared with what
`flashgrpo doctor --estimate` says; the matmul rate is measured on this device in the recipe's dtype first.
"""

import argparse
import json
import platform
import tempfile
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from flashgrpo import RunConfig
from flashgrpo.assembly import Assembly
from flashgrpo.distributed.world import process_group
from flashgrpo.doctor.estimate import estimate
from flashgrpo.doctor.trial import Meter
from flashgrpo.kinds import kind_of
from flashgrpo.kinds.flow import units_of_sample
from flashgrpo.models.load import META, weightless
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.train import one_update

PHASES = ("rollout", "decode", "update")


def measure(config: RunConfig) -> dict[str, Any]:
    """Two updates, the second of them measured."""
    with process_group(config.parallel, config.model.compute_dtype) as world:
        parts = Assembly(config, world)
        for update in range(2):
            meter = Meter(world.device)
            one_update(parts, parts.prompt_groups(update), meter)
        seconds = meter.clock.lap()
        device = world.device
        rate = matmul_rate(device, getattr(torch, config.model.dtype))
        kept = parts.process.source.keeps_graphs
        settings = config.rollout.model_copy(update={"retain": kept})
        counted = estimate(config.model_copy(update={"rollout": settings})).totals
        work = operations(config, graphs_kept=kept)
        return {
            "device": world.device_name,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "videos": config.rollout.prompts * config.rollout.group_size,
            "seconds": {phase: seconds.get(phase, 0.0) for phase in PHASES},
            "gib": {phase: meter.memory[phase] / 2**30 for phase in PHASES},
            "estimated_gib": {phase: counted[phase] / 2**30 for phase in PHASES},
            "matmul_tflops": rate / 1e12,
            "share_of_matmul": {phase: work[phase] / seconds[phase] / rate for phase in work},
        }


def operations(config: RunConfig, graphs_kept: bool) -> dict[str, float]:
    """Floating-point operations of the network in a phase, counted on a network without weights.

    An update counts its forward, where the rollout's was not kept, what checkpointing computes again, and the gradients
    that adapters really need.
    """
    model = weightless(config.model)
    x = torch.zeros(1, *model.latent_shape, device=META)
    point = GridPoint(torch.zeros(1), torch.ones(1, dtype=torch.float64), torch.ones(1))
    counts = []
    for learns in (False, True):
        once = torch.autograd.set_multithreading_enabled(False)  # or what is computed in backward is not counted
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learns), once:
            v = model.forward(model.expert(1000.0), x, point, model.nothing())
            if learns:
                v.square().mean().backward()
        counts.append(counter.get_total_flops())
    settings = config.rollout
    branches = 2 if settings.guidance_scale > 1 else 1
    rows = branches * settings.prompts * settings.group_size
    return {
        "rollout": counts[0] * kind_of(config).planned_cost(config, 0).rollout,
        "update": (counts[1] - counts[0] * graphs_kept) * rows * config.optim.passes * units_of_sample(config),
    }


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Operations a second of one large matrix product, the best of ten."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="wan21-1.3b")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    small = ["rollout.prompts=1", "rollout.group_size=4", "optim.minibatches=1", "optim.ema.every=1"]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"out={folder}", "model.random_init=true", "tracking.progress=false"]
        result = measure(RunConfig.load(arguments.recipe, [*fixed, *small, *arguments.overrides]))
    if arguments.json:
        print(json.dumps(result))
        return
    title = f"{result['videos']} videos on {result['device']}, {result['matmul_tflops']:.3g} TFLOP/s in a matmul"
    table = Table("phase", "seconds", "GiB", "estimated GiB", "share of matmul rate", title=title)
    for phase in PHASES:
        share = result["share_of_matmul"].get(phase)
        table.add_row(
            phase,
            f"{result['seconds'][phase]:.2f}",
            f"{result['gib'][phase]:.2f}",
            f"{result['estimated_gib'][phase]:.2f}",
            f"{share:.0%}" if share is not None else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()

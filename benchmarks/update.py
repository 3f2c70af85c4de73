"""Seconds of one update by phase, and how much faster a recipe is than the same without shortcuts.

    python benchmarks/update.py [RECIPE] [--updates 7] [--json] [key=value ...] [NAME='key=value ...' ...]
    python benchmarks/update.py --diffusers                 and beside diffusers' own WanPipeline
    python benchmarks/update.py --network 8x4x64 ...        with a wider network, where its calls are what costs

Updates of the published way to compute them (Euler at every step, guidance at every step, the trained step replayed,
an autoencoder in float32), of the recipe as it is, and of each NAME, which is the published way with changes, are
measured in turn, on the same prompts and in one process. Printed are the medians over all updates but the first of
each, which warms up, and the median ratio of the pairs.

`--diffusers` has the pipeline of the checkpoint draw and decode as many videos by its own scheduler, and compares the
pictures with those that an evaluation here draws from the same noise by the same solver. `--network LxHxW` replaces
the transformer of the checkpoint by one of L layers with H heads of width W and random weights.
"""

import argparse
import json
import math
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from rich.console import Console
from rich.table import Table

from flashgrpo import RunConfig
from flashgrpo.assembly import Assembly
from flashgrpo.distributed import memory
from flashgrpo.distributed.world import process_group
from flashgrpo.files import resolve_path
from flashgrpo.models.pipeline import PipelineModel
from flashgrpo.processes.flow.rollout import noise_of
from flashgrpo.run.progress import Clock
from flashgrpo.seeds import Name
from flashgrpo.train import one_update
from flashgrpo.types import Prompt, PromptGroup

PUBLISHED = (
    "rollout.solver={kind: euler}",
    "rollout.deterministic_steps=null",
    "rollout.guidance_interval=[0,1]",
    "rollout.deterministic_dtype=null",
    "rollout.reuse=null",
    "rollout.retain=false",
    "model.compile=false",
    "model.vae_dtype=float32",
)
PHASES = ("rollout", "decode", "reward", "update")
Seconds = Mapping[str, float]


class Watch:
    """Seconds spent in calls of the model and in backward passes (meaningful where nothing is computed later)."""

    def __init__(self) -> None:
        self.spent = 0.0
        for owner, name in (
            (PipelineModel, "velocity"),
            (PipelineModel, "encode"),
            (PipelineModel, "decode"),
            (torch.Tensor, "backward"),
        ):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.spent += time.perf_counter() - started

        return call


class Diffusers:
    """The pipeline of a checkpoint, which draws and decodes the videos of an update in the recipe's micro-batches."""

    def __init__(self, parts: Assembly) -> None:
        model, rollout = parts.config.model, parts.config.rollout
        self.parts, self.rows = parts, rollout.micro_batch
        self.pipeline: Any = WanPipeline.from_pretrained(resolve_path(model.path), dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)
        self.call = {
            "height": model.height,
            "width": model.width,
            "num_frames": model.num_frames,
            "max_sequence_length": model.max_sequence_length,
            "guidance_scale": rollout.guidance_scale,
            "num_inference_steps": rollout.num_steps,
            "output_type": "pt",
        }

    def draw(self, prompts: Sequence[Prompt], names: Sequence[Name]) -> torch.Tensor:
        """Return videos (B, F, 3, H, W) in [0, 1]."""
        found = []
        for first in range(0, len(prompts), self.rows):
            rows = slice(first, first + self.rows)
            noise, texts = noise_of(self.parts.process.model, names[rows]), [prompt.text for prompt in prompts[rows]]
            found.append(self.pipeline(prompt=texts, negative_prompt="", latents=noise, **self.call).frames)
        return torch.cat(found)

    def difference(self, groups: Sequence[PromptGroup]) -> float:
        """Return the largest difference of a pixel to the pictures that an evaluation draws from the same noise."""
        prompts, process = [group.prompt for group in groups], self.parts.process
        own: list[torch.Tensor] = []
        names: list[Name] = [(0, "noise", 0, group.group, 0) for group in groups]
        process.sample(
            prompts, names, lambda rows, outputs: own.append(process.media(outputs)), self.call["num_inference_steps"]
        )
        return float((torch.cat(own) - self.draw(prompts, names)).abs().max())

    def seconds(self, groups: Sequence[PromptGroup]) -> Seconds:
        """Draw and decode as many videos as an update has."""
        samples = [sample for group in groups for sample in group.samples]
        names: list[Name] = [(0, "noise", 0, sample.group.group, sample.member) for sample in samples]
        clock = Clock()
        with clock("rollout and decode"):
            self.draw([sample.group.prompt for sample in samples], names)
        return clock.lap()


def measure(configs: Mapping[str, RunConfig], updates: int, diffusers: bool) -> dict[str, Any]:
    """Medians by phase of every way, their ratios to the published one, and what they were measured on."""
    watch, first = Watch(), configs["published"]
    with process_group(first.parallel, first.model.compute_dtype) as world:
        ways = {name: Assembly(config, world) for name, config in configs.items()}
        lines: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        pipeline, theirs = Diffusers(ways["published"]) if diffusers else None, []
        difference = pipeline.difference(ways["published"].prompt_groups(0)) if pipeline else None
        for update in range(updates + 1):
            groups = ways["published"].prompt_groups(update)
            for name, parts in ways.items():
                memory.peak(world.device, reset=True)
                clock, spent = Clock(), watch.spent
                one_update(parts, groups, clock)
                seconds = clock.lap()
                seconds["models"] = watch.spent - spent + seconds.get("reward", 0.0)
                seconds["peak"] = memory.peak(world.device)
                lines[name].append(seconds)
            if pipeline:
                theirs.append(pipeline.seconds(groups))
        for parts in ways.values():
            parts.rewards.close()
        result: dict[str, Any] = {
            "updates": updates,
            "videos": first.rollout.prompts * first.rollout.group_size,
            "device": world.device_name,
            "threads": torch.get_num_threads(),
            "ways": {name: summary(lines[name][1:], ways[name]) for name in ways},
        }
        for name in ways:
            result["ways"][name]["speedup"] = ratio(lines["published"][1:], lines[name][1:], ("total",))
        if pipeline:
            result["diffusers"] = {
                "seconds": round(statistics.median(line["total"] for line in theirs[1:]), 3),
                "largest_difference": difference,
                "speedup": {name: ratio(theirs[1:], lines[name][1:], ("rollout", "decode")) for name in ways},
            }
        return result


def ratio(slow: Sequence[Seconds], fast: Sequence[Seconds], phases: Sequence[str]) -> list[float]:
    """Return median, least and largest of the pairs' ratios: the total of the one, some phases of the other."""
    found = [a["total"] / math.fsum(b[phase] for phase in phases) for a, b in zip(slow, fast, strict=True)]
    return [round(value, 3) for value in (statistics.median(found), min(found), max(found))]


def summary(lines: Sequence[Seconds], parts: Assembly) -> dict[str, Any]:
    """Of the updates of one way."""
    seconds = {phase: statistics.median(line.get(phase, 0.0) for line in lines) for phase in (*PHASES, "total")}
    outside = [1 - math.fsum(line.get(phase, 0.0) for phase in PHASES) / line["total"] for line in lines]
    config, columns = parts.config, parts.objective.columns
    return {
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "videos_per_hour": round(3600 * config.rollout.prompts * config.rollout.group_size / seconds["total"], 1),
        "forwards": parts.process.cost(config.seed, 0, config.optim.passes, columns).total,
        "peak_gib": round(max(line["peak"] for line in lines) / 2**30, 2),
        "graphs_kept": parts.process.source.keeps_graphs,
        "outside_phases": round(statistics.median(outside), 4),
        "outside_models": round(statistics.median(1 - line["models"] / line["total"] for line in lines), 4),
    }


def widened(checkpoint: Path, folder: Path, size: str) -> Path:
    """Copy a checkpoint with another network in it, L layers with H heads of width W, by random weights of seed 0."""
    layers, heads, width = (int(word) for word in size.split("x"))
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    settings = json.loads((checkpoint / "transformer" / "config.json").read_text())
    settings |= {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width}
    settings["ffn_dim"] = 4 * heads * width
    torch.manual_seed(0)
    WanTransformer3DModel.from_config(settings).save_pretrained(folder / "transformer")
    return folder


def show(result: Mapping[str, Any]) -> None:
    """Print a table with a column for each way, and a line for each ratio."""
    ways, console = result["ways"], Console(width=max(80, 24 + 16 * len(result["ways"])))
    title = f"one update of {result['videos']} videos, {result['device']}, {result['threads']} threads"
    table = Table("", *ways, title=title)
    for phase in (*PHASES, "total"):
        table.add_row(f"{phase}, s", *(f"{way['seconds'][phase]:.2f}" for way in ways.values()))
    for key in ("videos_per_hour", "forwards", "peak_gib", "graphs_kept"):
        table.add_row(key.replace("_", " "), *(str(way[key]) for way in ways.values()))
    for key in ("outside_phases", "outside_models"):
        table.add_row(key.replace("_", " "), *(f"{way[key]:.1%}" for way in ways.values()))
    console.print(table)
    for name, way in ways.items():
        if name != "published":
            median, low, high = way["speedup"]
            console.print(f"{name}: {median:.2f} times faster than published (pairs {low:.2f} to {high:.2f})")
    if theirs := result.get("diffusers"):
        console.print(
            f"WanPipeline draws and decodes them in {theirs['seconds']:.2f} s; largest difference of a pixel to an "
            f"evaluation's: {theirs['largest_difference']:.1e}"
        )
        for name, (median, low, high) in theirs["speedup"].items():
            console.print(f"{name} does so {median:.2f} times faster ({low:.2f} to {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="tiny")
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--diffusers", action="store_true", help="measure diffusers' WanPipeline, too")
    parser.add_argument("--network", metavar="LxHxW", help="layers, heads and width of a head")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("changes", nargs="*", metavar="key=value, or NAME='key=value ...'")
    arguments = parser.parse_intermixed_args()
    recipe, words = arguments.recipe, arguments.changes
    if "=" in recipe and not Path(recipe).exists():
        recipe, words = "tiny", [recipe, *words]
    common, named = split_ways(words)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.network:
            checkpoint = Path(resolve_path(RunConfig.load(recipe, ["out=unused", *common]).model.path))
            common = [*common, f"model.path={widened(checkpoint, Path(folder), arguments.network)}"]
        fixed = ["out=unused", f"updates={arguments.updates + 1}", "evaluation.solver={kind: unipc}", *common]
        ways = {"published": PUBLISHED, **{name: (*PUBLISHED, *changes) for name, changes in named.items()}}
        configs = {name: RunConfig.load(recipe, [*fixed, *changes]) for name, changes in ways.items()}
        configs["recipe"] = RunConfig.load(recipe, fixed)
        result = measure(configs, arguments.updates, arguments.diffusers)
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)


def split_ways(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split key=value for all ways from NAME='key=value ...', a way of its own."""
    common: list[str] = []
    ways: dict[str, list[str]] = {}
    for word in words:
        name, _, changes = word.partition("=")
        if "." in name or "=" not in changes:
            common.append(word)
        else:
            ways[name] = shlex.split(changes)
    return common, ways


if __name__ == "__main__":
    main()

"""What a run will cost: memory at the highest, hours, disk. Measured on the trial, scaled to the recipe's sizes."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flashgrpo.assembly import Assembly
from flashgrpo.distributed import memory
from flashgrpo.doctor.trial import Trial
from flashgrpo.models.settings import ModelConfig
from flashgrpo.process import Finding

MP4_BITS = 1.0  # bits per pixel and frame of the videos that evaluations keep; crf 18 rarely needs more


def memory_needed(parts: Assembly, trial: Trial) -> Finding:
    """Hold the highest use of each phase, with what all samples of an update keep, against what the device has."""
    settings = parts.config.rollout
    tried = max(1, len(trial.drawn.outputs))
    own = math.ceil(settings.prompts * settings.group_size / parts.world.data_size)
    held = max(0, own - tried) * _bytes_per_sample(trial, parts.config.model)
    needed = {}
    for phase, highest in trial.memory.items():
        batch = {"rollout": settings.micro_batch, "decode": settings.decode_micro_batch}.get(phase)
        larger = min(batch, own) / min(batch, tried) if batch else 1.0
        needed[phase] = int(trial.memory_before + (highest - trial.memory_before) * max(1.0, larger) + held)
    phase = max(needed, key=lambda name: needed[name])
    there = memory.total(parts.world.device)
    numbers = {"measured": trial.memory, "estimate": needed, "device": there}
    words = f"about {in_words(needed[phase])} of {in_words(there)}, at the highest in {phase}"
    if needed[phase] > there:
        cure = {"rollout": "rollout.micro_batch", "decode": "rollout.decode_micro_batch"}.get(
            phase, "optim.micro_batch"
        )
        return Finding("memory", "unsound", f"a process would need {words}; lower {cure}", numbers)
    return Finding("memory", "warning" if needed[phase] > 0.9 * there else "sound", f"a process needs {words}", numbers)


def hours_needed(parts: Assembly, trial: Trial) -> Finding:
    """Estimate the wall clock to the last update, from the measured seconds of each phase."""
    config, settings = parts.config, parts.config.rollout
    larger = settings.prompts * settings.group_size / (trial.groups * trial.group_size)
    seconds = {name: spent * larger for name, spent in trial.seconds.items() if name in PHASES}
    update = sum(seconds.values())
    samples = len(parts.heldout) * config.evaluation.samples_per_prompt
    evaluation = trial.seconds.get("evaluate", 0.0) * samples / max(1, trial.evaluated)
    evaluations = 1 + math.ceil(config.updates / config.evaluation.every)
    total = config.updates * update + evaluations * evaluation
    numbers = {"seconds_per_update": update, "seconds_per_evaluation": evaluation, "hours": total / 3600}
    duration = f"{total / 3600:.1f} h" if total > 5400 else f"{total / 60:.0f} min"
    parts_of_it = f"{config.updates} updates of {update:.3g} s and {evaluations} evaluations of {evaluation:.3g} s"
    return Finding("time", "sound", f"about {duration}: {parts_of_it}", {**numbers, "seconds": seconds})


def disk_needed(parts: Assembly, trial: Trial) -> Finding:
    """Add up the checkpoints that are kept, one that is being written, and the videos of evaluations."""
    config, model = parts.config, parts.config.model
    state = parts.state()
    checkpoint = sum(tensor.numel() * tensor.element_size() for named in state.values() for tensor in named.values())
    evaluations = 1 + math.ceil(config.updates / config.evaluation.every)
    pixels = model.num_frames * model.height * model.width
    videos = evaluations * config.evaluation.videos * pixels * MP4_BITS / 8
    needed = int(checkpoint * (config.checkpoint.keep + 2) + videos)
    out = Path(config.out).absolute()
    free = shutil.disk_usage(next(folder for folder in (out, *out.parents) if folder.exists())).free
    numbers = {"needed": needed, "free": free, "checkpoint": checkpoint}
    words = f"{in_words(needed)} at most ({in_words(checkpoint)} a checkpoint), and {in_words(free)} are free"
    if needed > free:
        return Finding(
            "disk", "unsound", f"the run needs {words}; lower checkpoint.keep or choose another out", numbers
        )
    return Finding("disk", "sound", f"the run needs {words}", numbers)


PHASES = ("rollout", "decode", "reward", "update")
COSTS: tuple[Callable[[Assembly, Trial], Finding], ...] = (memory_needed, hours_needed, disk_needed)


def in_words(size: int) -> str:
    """Write bytes as a person says them: '1.3 GiB'."""
    unit = 2**30 if size >= 2**30 else 2**20
    return f"{size / unit:.3g} {'GiB' if unit == 2**30 else 'MiB'}"


def _bytes_per_sample(trial: Trial, model: ModelConfig) -> int:
    """Count what a sample keeps from its rollout to the end of its update."""
    drawn, samples = trial.drawn, max(1, len(trial.drawn.outputs))
    kept = [drawn.outputs, *tensors_of(drawn.record.state)]
    video = 0
    if drawn.outputs.device.type == "cpu":  # where videos are, too; all of them at the most
        video = model.num_frames * 3 * model.height * model.width * 4
    return sum(tensor.numel() * tensor.element_size() for tensor in kept) // samples + video


def tensors_of(value: Any) -> list[Tensor]:
    """Find all tensors inside of a record's state, whatever the process keeps there."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name))]
    if isinstance(value, Mapping):
        return [tensor for entry in value.values() for tensor in tensors_of(entry)]
    return [tensor for entry in value for tensor in tensors_of(entry)] if isinstance(value, list | tuple) else []

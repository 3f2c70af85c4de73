"""Getting the result out: adapters for diffusers and ComfyUI, or a merged pipeline, with a model card."""

from pathlib import Path
from typing import Any, Literal

from flashgrpo.assembly import make_process
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.files import write_aside
from flashgrpo.models.settings import Lora
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter, describe

Format = Literal["diffusers", "comfyui", "merged"]


def export(
    run: Path, format: Format = "diffusers", out: Path | None = None, checkpoint_update: int | None = None
) -> Path:
    """Write the averaged weights of a checkpoint, the best by default, in a format that others load.

    - `diffusers`: adapters for `pipe.load_lora_weights(folder)`.
    - `comfyui`: the same under the original names of the family's layers, which ComfyUI (and diffusers) reads.
    - `merged`: a whole pipeline folder for `from_pretrained`; the only one for a fully trained model.

    Returns:
        The folder, `RUN/export/FORMAT` by default; its README.md is a model card.

    Raises:
        UserError: no run or checkpoint, adapters asked of a fully trained model, or a folder that is not empty.
    """
    directory, config = RunDirectory.existing(run)
    if format != "merged" and not isinstance(config.model.train, Lora):
        raise UserError(f"--format {format}: {run} trained every weight, so there are no adapters; use --format merged")
    folder = out or run / "export" / format
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not empty; choose another folder")
    update = directory.choose_checkpoint(checkpoint_update, Reporter().warn)
    averaged = checkpoint.load(directory.checkpoints, update, kinds=["ema"])["ema"]
    config = config.model_copy(update={"model": config.model.plain()})
    process = make_process(config, single_process(computes=False), ())
    directory.check_model(process.identity)
    with write_aside(folder) as aside:
        aside.mkdir()
        if format == "merged":
            process.save_merged(aside, averaged)
            use = ['DiffusionPipeline.from_pretrained("this/folder")']
        else:
            use = _how_to_load(process.save_lora(aside, averaged, style=format), format)
        (aside / "README.md").write_text(_card(config, use, update, _evaluated(directory, update)), encoding="utf-8")
    return folder


def _how_to_load(files: list[str], format: Format) -> list[str]:
    """Write a line for each file; the second of two is the low-noise expert's."""
    if format == "comfyui":
        return [f"LoraLoaderModelOnly on {file}, strength 1" for file in files]
    second = ["", ", load_into_transformer_2=True"]
    return [
        f'pipe.load_lora_weights("this/folder", weight_name="{file}"{more})'
        for file, more in zip(files, second, strict=False)
    ]


def _evaluated(directory: RunDirectory, update: int) -> dict[str, Any] | None:
    """Return the evaluation of an update, on noise that selected nothing where it was selected among several."""
    lines = [directory.confirmation() or {}, *directory.evaluations()]
    return next((line for line in lines if line.get("update") == update), None)


def _card(config: RunConfig, use: list[str], update: int, evaluated: dict[str, Any] | None) -> str:
    """Write what a reader of the files needs to know: base, data, reward, settings, and the paired result."""
    train, algorithm = config.model.train, config.algorithm
    result = "This checkpoint was not evaluated."
    if evaluated:
        result = f"{describe(evaluated).capitalize()}, on {len(evaluated['samples'])} held-out videos, paired by noise."
        watched = [
            f"{name} {evaluated['watched'][name] - evaluated['base_watched'][name]:+.3f}"
            for name in evaluated["watched"]
        ]
        result += f" Watched and never trained on: {', '.join(watched)}." if watched else ""
    what = f"LoRA, rank {train.rank}, alpha {train.alpha}" if isinstance(train, Lora) else "every weight"
    rewards = ", ".join(f"{name} ({reward.call})" for name, reward in config.rewards.items() if not reward.watched)
    lines = {
        "Base": config.model.path,
        "Trained": f"{what}; {update} updates of {config.rollout.prompts} x {config.rollout.group_size} videos",
        "Videos": f"{config.model.width} x {config.model.height}, {config.model.num_frames} frames",
        "Prompts": config.prompts.train,
        "Reward": rewards,
        "Algorithm": f"{algorithm.explore}, {algorithm.score}, {algorithm.credit}, {algorithm.objective}",
        "Guidance": f"{config.rollout.guidance_scale:g} in training, {config.rollout.num_steps} steps",
        "Seed": str(config.seed),
    }
    lines_of_use = "\n".join(f"    {line}" for line in use)
    facts = "\n".join(f"- {name}: {value}" for name, value in lines.items())
    return f"# Aligned with Flash-GRPO\n\n{result}\n\n{facts}\n\nTo use it:\n\n{lines_of_use}\n"

"""Videos of the base model beside those of the tuned one, from the same noise."""

from collections.abc import Sequence
from pathlib import Path

import torch

from flashgrpo.assembly import make_process
from flashgrpo.distributed.world import process_group, use_threads
from flashgrpo.errors import UserError
from flashgrpo.models.lora import weights_replaced
from flashgrpo.models.settings import ModelConfig
from flashgrpo.process import Process
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter
from flashgrpo.types import Prompt
from flashgrpo.video import Video, side_by_side, write_mp4

Size = tuple[int, int, int]


def sample(
    run: Path,
    prompts: Sequence[Prompt],
    out: Path,
    seeds: Sequence[int] = (0,),
    num_steps: int | None = None,
    size: Size | None = None,
    checkpoint_update: int | None = None,
    from_image: bool = False,
) -> Path:
    """Write one mp4: the base model's video on the left, the tuned model's on the right.

    Every prompt is drawn with every seed, and the pairs follow one another: the seeds of the first prompt, of the
    second, and so on.

    Args:
        num_steps: denoising steps; the evaluation's when not given.
        size: (height, width, frames); those of the run when not given.
        checkpoint_update: the best checkpoint when not given.
        from_image: refuse a model that would not look at the prompts' images.

    Raises:
        UserError: no run or checkpoint, an empty prompt, a size that the model cannot take, or `out` is no .mp4 that
            can be written.
    """
    directory, config = RunDirectory.existing(run)
    if not prompts or any(not prompt.text.strip() for prompt in prompts):
        raise UserError("the prompt is empty")
    if out.suffix != ".mp4":
        raise UserError(f"--out: {out} must end in .mp4")
    update = directory.choose_checkpoint(checkpoint_update, Reporter().warn)
    averaged = checkpoint.load(directory.checkpoints, update, kinds=["ema"])["ema"]
    use_threads(config.parallel.threads)
    with process_group(config.parallel, config.model.compute_dtype, strict=False) as world:
        process = make_process(config.model_copy(update={"model": _resized(config.model, size)}), world, prompts)
        directory.check_model(process.identity)
        if from_image and not process.takes_image:
            raise UserError("--image: this run's model makes videos from text only; leave it out")
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]

        def videos() -> list[Video]:
            return [_draw(process, prompt, seed, num_steps) for prompt, seed in pairs]

        base = videos()
        with weights_replaced(process.network, averaged):
            tuned = videos()
    shown = [side_by_side(before, after) for before, after in zip(base, tuned, strict=True)]
    write_mp4(out, torch.cat(shown), config.model.fps)
    return out


@torch.no_grad()
def _draw(process: Process, prompt: Prompt, seed: int, num_steps: int | None) -> Video:
    outputs = process.sample([prompt], [(seed, "sample")], lambda rows, outputs: None, num_steps)
    return process.media(outputs)[0].cpu()


def _resized(model: ModelConfig, size: Size | None) -> ModelConfig:
    if size is None:
        return model
    return model.model_copy(update=dict(zip(("height", "width", "num_frames"), size, strict=True)))

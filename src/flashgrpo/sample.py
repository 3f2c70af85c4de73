"""Videos, images or texts of the base model beside those of the tuned one, from the same noise."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, starmap
from pathlib import Path
from typing import Any

from torch import Tensor

from flashgrpo.assembly import make_process
from flashgrpo.distributed.world import process_group, use_threads
from flashgrpo.errors import UserError
from flashgrpo.media import NOUNS, Medium, suffix_of, write_medium
from flashgrpo.models.lora import weights_replaced
from flashgrpo.models.settings import ModelConfig
from flashgrpo.process import Process
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter
from flashgrpo.types import Prompt
from flashgrpo.video import side_by_side, write_mp4_of

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
    """Write one file: the base model's video or image on the left, the tuned model's on the right; texts in turn.

    Every prompt is drawn with every seed, and the pairs follow one another: the seeds of the first prompt, of the
    second, and so on; images stand in rows.

    Args:
        out: without an ending it gets the one of what the model makes: .mp4, .png or .txt.
        num_steps: denoising steps; the evaluation's when not given.
        size: (height, width, frames); those of the run when not given.
        checkpoint_update: the best checkpoint when not given.
        from_image: refuse a model that would not look at the prompts' images.

    Raises:
        UserError: no run or checkpoint, an empty prompt, a size that the model cannot take, or `out` cannot be
            written, or has another ending than what the model makes.
    """
    directory, config = RunDirectory.existing(run)
    if not prompts or any(not prompt.text.strip() for prompt in prompts):
        raise UserError("the prompt is empty")
    if out.suffix and out.suffix not in NOUNS:
        raise UserError(f"--out: {out} must end in {', '.join(NOUNS)}, or in nothing to get the ending that fits")
    update = directory.choose_checkpoint(checkpoint_update, Reporter().warn)
    averaged = checkpoint.load(directory.checkpoints, update, kinds=["ema"])["ema"]
    use_threads(config.parallel.threads)
    with process_group(config.parallel, config.model.compute_dtype, strict=False) as world:
        process = make_process(config.model_copy(update={"model": _resized(config.model, size)}), world, prompts)
        directory.check_model(process.identity)
        if from_image and not process.takes_image:
            raise UserError("--image: this run's model starts from text only; leave it out")
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]

        pieces = _pieces(process, averaged, pairs, num_steps)
        first = next(pieces)
        path = _with_ending(out, first[0])  # refused before the others are drawn
        every = chain([first], pieces)
        if path.suffix == ".mp4":
            write_mp4_of(path, starmap(side_by_side, every), config.model.fps)
        else:
            write_medium(path, joined(pairs, list(every)), config.model.fps)
    return path


def joined(pairs: Sequence[tuple[Prompt, int]], shown: Sequence[tuple[Any, Any]]) -> Medium:
    """Put each image of the base model beside the tuned model's, in rows; texts one after the other."""
    if isinstance(shown[0][0], str):
        heads = [f"# {prompt.text} (seed {seed})" for prompt, seed in pairs]
        texts = zip(heads, shown, strict=True)
        return "\n".join(f"{head}\n\n## base\n\n{before}\n\n## tuned\n\n{after}\n" for head, (before, after) in texts)
    rows = starmap(side_by_side, shown)
    return side_by_side(*(row.transpose(2, 3) for row in rows)).transpose(2, 3)


def _with_ending(out: Path, medium: Medium) -> Path:
    ending = suffix_of(medium)
    if out.suffix not in ("", ending):
        raise UserError(f"--out: {out} must end in {ending}, since this run's model makes {NOUNS[ending]}s")
    return out.with_suffix(ending)


def _pieces(
    process: Process,
    averaged: Mapping[str, Tensor],
    pairs: Sequence[tuple[Prompt, int]],
    num_steps: int | None,
) -> Iterator[tuple[Any, Any]]:
    """Draw each pair by the base model and the tuned one side by side; of long videos a piece at a time."""
    for prompt, seed in pairs:
        base, tuned = (process.stream(prompt, (seed, "sample"), num_steps) for _ in range(2))
        for piece in base:
            with weights_replaced(process.network, averaged):
                other = next(tuned)
            yield piece[0], other[0]


def _resized(model: ModelConfig, size: Size | None) -> ModelConfig:
    if size is None:
        return model
    return model.model_copy(update=dict(zip(("height", "width", "num_frames"), size, strict=True)))

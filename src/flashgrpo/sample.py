"""Videos, images or texts of the base model beside those of the tuned one, from the same noise."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from flashgrpo.assembly import make_process
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import World, process_group, use_threads
from flashgrpo.errors import UserError, first_line
from flashgrpo.files import write_text
from flashgrpo.media import NOUNS, Medium, frames_of, labelled, stacked, strip, suffix_of, write_medium
from flashgrpo.models.lora import weights_replaced
from flashgrpo.process import Process
from flashgrpo.run import checkpoint
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.progress import Reporter
from flashgrpo.scoring.fit import check_process
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import Scoring
from flashgrpo.types import Clip, Prompt
from flashgrpo.video import Film, Video, left_and_right, side_by_side, write_video_of

Size = tuple[int, int, int]
ENDINGS = {".mp4": (".mp4", ".gif", ".png"), ".png": (".png",), ".txt": (".txt",)}
"""Ending of what a model makes -> the endings of files that it is written to; a video's .png is a contact sheet."""


@dataclass(frozen=True)
class Pair:
    """What the base model and the tuned one make of a prompt from the noise of a seed, or a piece of it.

    Attributes:
        rewards: of both, where they were asked for and can be had; see `RewardTable.total`.
    """

    prompt: Prompt
    seed: int
    base: Medium
    tuned: Medium
    rewards: tuple[float | None, float | None] = (None, None)

    @property
    def facts(self) -> str:
        """The seed, and the rewards."""
        return f"seed {self.seed}" + ("" if None in self.rewards else ", reward {:.3f} → {:.3f}".format(*self.rewards))

    @property
    def text(self) -> str:
        """Both texts below their prompt."""
        return f"# {self.prompt.text} ({self.facts})\n\n## base\n\n{self.base}\n\n## tuned\n\n{self.tuned}\n"

    def picture(self, label: bool, as_strip: bool = False) -> Video:
        """Return the base model's frames beside the tuned model's; some of them in a row where it is to be a strip."""
        shown = frames_of(self.base), frames_of(self.tuned)
        picture = side_by_side(*map(strip, shown) if as_strip else shown)
        text = f"base | tuned, {self.facts}: {self.prompt.text}"  # long prompts are cut
        return labelled(picture, text) if label else picture

    def film(self, label: bool) -> Video | Film:
        """Return the same with both sounds, where there are some: the base model's on the left."""
        picture = self.picture(label)
        if not isinstance(self.base, Film) or not isinstance(self.tuned, Film):
            return picture
        return Film(picture, left_and_right(self.base.wave, self.tuned.wave), self.base.rate)


def sample(
    run: Path,
    prompts: Sequence[Prompt],
    out: Path,
    seeds: Sequence[int] = (0,),
    num_steps: int | None = None,
    size: Size | None = None,
    checkpoint_update: int | None = None,
    from_image: bool = False,
    label: bool = False,
) -> Path:
    """Write one file: the base model's video or image on the left, the tuned model's on the right; texts in turn.

    Every prompt is drawn with every seed, and the pairs follow one another: the seeds of the first prompt, of the
    second, and so on; images stand in rows.

    Args:
        out: its ending says what videos become: .mp4; .gif; .png for a contact sheet, a row of some frames for each
            pair. Without an ending it gets that of what the model makes: .mp4, .png or .txt.
        num_steps: denoising steps; the evaluation's when not given.
        size: (height, width, frames); those of the run when not given.
        checkpoint_update: the best checkpoint when not given.
        from_image: refuse a model that would not look at the prompts' images.
        label: write the prompt, the seed and both rewards, by the run's own, below each pair; each is then in memory
            as a whole.

    Raises:
        UserError: no run or checkpoint, an empty prompt, a size that the model cannot take, or `out` cannot be
            written, or has another ending than what the model makes.
    """
    directory, config = RunDirectory.existing(run)
    if not prompts or any(not prompt.text.strip() for prompt in prompts):
        raise UserError("the prompt is empty")
    if out.suffix and out.suffix not in (all_of := [*dict.fromkeys(chain(*ENDINGS.values()))]):
        raise UserError(f"--out: {out} must end in {', '.join(all_of)}, or in nothing to get the ending that fits")
    update = directory.choose_checkpoint(checkpoint_update, Reporter().warn)
    averaged = checkpoint.load(directory.checkpoints, update, kinds=["ema"])["ema"]
    use_threads(config.parallel.threads)
    with process_group(config.parallel, config.model.compute_dtype, strict=False) as world, ExitStack() as stack:
        process = _process(config, size, world, prompts)
        directory.check_model(process.identity)
        if from_image and not process.takes_image:
            raise UserError("--image: this run's model starts from text only; leave it out")
        rewards = _rewards(config, prompts[0], process, world) if label else None
        if rewards:
            stack.enter_context(closing(rewards))
        wanted = [(prompt, seed) for prompt in prompts for seed in seeds]
        drawing = Drawing(process, averaged, num_steps, rewards, world, whole=label or out.suffix == ".png")
        pieces = (piece for prompt, seed in wanted for piece in drawing.pairs(prompt, seed))
        return _written(out, pieces, label, config.model.fps)


def _written(out: Path, pieces: Iterator[Pair], label: bool, fps: float) -> Path:
    first = next(pieces)
    path = _with_ending(out, first.base)  # refused before the others are drawn
    drawn = chain([first], pieces)
    if path.suffix in (".mp4", ".gif"):
        write_video_of(path, (piece.film(label) for piece in drawn), fps)
    elif path.suffix == ".txt":
        write_text(path, "\n".join(piece.text for piece in drawn))
    else:
        write_medium(path, stacked(*(piece.picture(label, len(piece.base) > 1) for piece in drawn)), fps)
    return path


def _joined(pieces: Sequence[Medium]) -> Medium:
    frames = [piece for piece in pieces if isinstance(piece, Tensor)]
    return torch.cat(frames) if frames else pieces[0]


def _with_ending(out: Path, medium: Medium) -> Path:
    made = suffix_of(medium)
    if out.suffix and out.suffix not in ENDINGS[made]:
        allowed = " or ".join(ENDINGS[made])
        raise UserError(f"--out: {out} must end in {allowed}, since this run's model makes {NOUNS[made]}s")
    return out if out.suffix else out.with_suffix(made)


def _process(config: RunConfig, size: Size | None, world: World, prompts: Sequence[Prompt]) -> Process:
    """Load the model of a run, for samples of another size where one is given."""
    if size is None:
        return make_process(config, world, prompts)
    resized = dict(zip(("height", "width", "num_frames"), size, strict=True))
    config = config.model_copy(update={"model": config.model.model_copy(update=resized)})
    try:
        return make_process(config, world, prompts)
    except UserError as error:
        said = re.sub(r"^model\.(height|width|num_frames)", r"--size (\1)", str(error))
        raise UserError(said) from error


def _rewards(config: RunConfig, prompt: Prompt, process: Process, world: World) -> Rewards | None:
    """Load the rewards that a run is trained on, of which a label has the weighted sum; None where they need more."""
    rewards = Rewards({name: one for name, one in config.rewards.items() if not one.watched}, config.model.fps)
    try:
        rewards.check_columns(prompt, "the prompt")
        check_process(rewards, process)
        rewards.load(world)
    except UserError as error:
        Reporter().warn(f"labels say no reward: {error}")
        return None
    return rewards


@dataclass(frozen=True)
class Drawing:
    """How pairs are drawn: in pieces as they grow, or `whole`; with rewards, each is scored as in an evaluation."""

    process: Process
    averaged: Mapping[str, Tensor]
    num_steps: int | None
    rewards: Rewards | None
    world: World
    whole: bool

    @torch.no_grad()
    def pairs(self, prompt: Prompt, seed: int) -> Iterator[Pair]:
        """Draw a prompt by the base model and the tuned one side by side; of long videos a piece at a time."""
        if self.rewards is not None:
            base, before = self._scored(self.rewards, prompt, seed)
            with weights_replaced(self.process.network, self.averaged):
                tuned, after = self._scored(self.rewards, prompt, seed)
            yield Pair(prompt, seed, base, tuned, (before, after))
            return
        streams = [self.process.stream(prompt, (seed, "sample"), self.num_steps) for _ in range(2)]
        pieces = []
        for piece in streams[0]:
            with weights_replaced(self.process.network, self.averaged):
                other = next(streams[1])
            pieces.append(Pair(prompt, seed, piece, other))
            if not self.whole:
                yield pieces.pop()
        if pieces:
            yield replace(pieces[0], base=_joined([p.base for p in pieces]), tuned=_joined([p.tuned for p in pieces]))

    def _scored(self, rewards: Rewards, prompt: Prompt, seed: int) -> tuple[Medium, float | None]:
        """Draw and score one sample by the weights that there are now; None where a reward refuses it."""

        def clips(view: str, number: int) -> Sequence[Clip]:
            return self.process.clips(view, prompt, None)

        parts = rewards, self.process.media, clips, self.world, [prompt], False
        scoring = Scoring(*parts, micro_batch=1, keep=[0], sound=self.process.sound)
        self.process.sample([prompt], [(seed, "sample")], scoring.add, self.num_steps)
        try:
            total = float(scoring.table().total[0])
        except UserError as error:
            Reporter().warn(f"a label says no reward: {first_line(error)}")
            total = None
        return scoring.kept[0], total

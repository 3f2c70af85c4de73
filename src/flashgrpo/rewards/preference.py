"""A preference head: what people would say of samples that nobody judged, from CLIP's features and the votes there are.

It is the Bradley-Terry model whose scores are linear in the features x: a beats b with probability
sigmoid(w (x_a - x_b)). With D the differences x_better - x_worse of all pairs that people have put in an order, scaled
to a root mean square length of 1, w is the maximum of

    sum_i log sigmoid(w D_i) - |w|^2 / 2

A sample's number is then what `votes.standings` gives it in expectation: the mean of tanh(w (x - x_other) / 2).
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.rewards.clip import Clip
from flashgrpo.serving.human.votes import Pairs, Question
from flashgrpo.video import open_image

LOG = logging.getLogger("flashgrpo")
ENOUGH = 16  # judged groups, of which there is a head
FRAMES = 4  # of a sample, spread evenly, as CLIP's rewards look at
MOST_STEPS = 10_000
MP4 = ["-f", "mp4", "-protocol_whitelist", "file", "-threads", "1"]
WATCHES = ("judged", "agreement")
"""Components beside the number: 1 where people judged the sample, and the head's agreement with them; 0 without one."""


@dataclass(frozen=True)
class Head:
    """Scores of samples are `features @ direction`.

    Args:
        agreement: share of the pairs of each judged group that a head without it puts in the voters' order.
        groups: that it was learnt from.
    """

    direction: Float64[Tensor, " width"]
    agreement: float
    groups: int

    def numbers(self, features: Float64[Tensor, "samples width"]) -> list[float]:
        """Return what is expected of each sample of a group, in [-1, 1]; the mean is 0."""
        scores = features @ self.direction
        return (((scores[:, None] - scores) / 2).tanh().sum(dim=1) / (len(scores) - 1)).tolist()


def fit(differences: Float64[Tensor, "pairs width"], kept: Bool[Tensor, "fits pairs"]) -> Float64[Tensor, "fits width"]:
    """Return w of the pairs that each fit keeps.

    The curvature is replaced by its bound, sigmoid' <= 1/4 (Boehning and Lindsay, 1988): every step raises the
    objective, and one factor serves all fits.
    """
    curvature = differences.T @ differences / 4 + torch.eye(differences.shape[1], dtype=torch.float64)
    factor = torch.linalg.cholesky(curvature)
    heads = torch.zeros(len(kept), differences.shape[1], dtype=torch.float64)
    for _ in range(MOST_STEPS):
        slope = (torch.sigmoid(-heads @ differences.T) * kept) @ differences - heads
        if float(slope.abs().max()) < 1e-10:
            break
        heads = heads + torch.cholesky_solve(slope.T, factor).T
    return heads


def learn(groups: Sequence[Pairs], features: Mapping[str, Tensor]) -> Head:
    """Learn a head from (better, worse) of each judged group.

    A group's agreement is that of a head without it and without all groups that share a sample with it.

    Raises:
        UserError: the features do not tell the samples apart, or the head knows no more than chance.
    """
    of = torch.tensor([number for number, pairs in enumerate(groups) for _ in pairs])
    differences = torch.stack([features[better] - features[worse] for pairs in groups for better, worse in pairs])
    scale = differences.square().sum(dim=1).mean().sqrt()
    if not scale > 0:
        raise UserError("CLIP has the same features for all judged samples, so that there is no preference head")
    names = [{name for pair in pairs for name in pair} for pairs in groups]
    apart = torch.tensor([[not own & other for other in names] for own in names])[:, of]
    heads = fit(differences / scale, torch.cat([torch.ones(1, len(of), dtype=torch.bool), apart]))
    agreement = float(((heads[1:][of] * differences).sum(dim=1) > 0).double().mean())
    if agreement <= 0.5:
        raise UserError(
            f"a preference head puts {agreement:.0%} of the pairs that it has not seen in the voters' order, no more "
            "than chance; until more votes are there, groups that nobody judged have no number"
        )
    return Head(heads[0] / scale, agreement, len(groups))


class Predictor:
    """The head of the votes in a folder, and what it says of groups that nobody judged; nothing is written.

    Args:
        folder: of `flashgrpo reward human`.
        checkpoint: of CLIP, folder or hub id, whose embedding of a sample's frames, their mean, is its features.

    Raises:
        UserError: the checkpoint is not there, or is none of CLIP's.
    """

    def __init__(self, folder: Path, checkpoint: str) -> None:
        self._samples, self._clip = folder / "samples", Clip(checkpoint, checkpoint, FRAMES)
        self._features: dict[str, Tensor] = {}  # of judged samples
        self._seen: list[Pairs] | None = None
        self._head: Head | None = None

    def learn(self, groups: Sequence[Pairs]) -> Head:
        """Learn the head of these groups; of samples that are gone from the folder, it learns nothing.

        Raises:
            UserError: there are too few groups, or as `learn`.
        """
        there = [tuple(pair for pair in pairs if all(map(self._is_there, pair))) for pairs in groups]
        there = [pairs for pairs in there if pairs]
        if len(there) < ENOUGH:
            raise UserError(
                f"a preference head needs {ENOUGH} groups that people put in an order and whose files are in "
                f"{self._samples}, and there are {len(there)}; until then groups that nobody judged have no number"
            )
        for name in sorted({name for pairs in there for pair in pairs for name in pair} - self._features.keys()):
            self._features[name] = self._of(self._samples / name)
        return learn(there, self._features)

    def head(self, groups: Sequence[Pairs]) -> Head | None:
        """Return the head, learnt again where the votes have changed; None, and a warning, where there is none."""
        if self._seen != [*groups]:
            self._seen, self._head = [*groups], None
            try:
                self._head = self.learn(groups)
            except UserError as error:
                LOG.warning("%s", error)
        return self._head

    def answer(
        self,
        names: Sequence[str],
        files: Sequence[str],
        question: Question | None,
        numbers: list[float | None],
        voted: bool,
        head: Head | None,
    ) -> dict[str, list[float | None]]:
        """Return the numbers of one group and what tells of them (`WATCHES`).

        Args:
            files: of the samples `names`; a question may have another, which lies in the folder.
            numbers: that people gave; None where they did not.
            voted: whether somebody has answered, be it that they cannot say.
        """
        if head and question and not voted and None in numbers:
            lie = {
                **{name: self._samples / name for name in question.samples},
                **dict(zip(names, map(Path, files), strict=True)),
            }
            if all(lie[name].is_file() for name in question.samples):
                found = head.numbers(torch.stack([self._of(lie[name]) for name in question.samples]))
                numbers = [found[question.samples.index(name)] for name in names]
        beside = float(voted), head.agreement if head else 0.0
        return {"": numbers, **{name: [value] * len(names) for name, value in zip(WATCHES, beside, strict=True)}}

    def _is_there(self, name: str) -> bool:
        return name in self._features or (self._samples / name).is_file()

    def _of(self, file: Path) -> Float64[Tensor, " width"]:
        return self._clip.images(read_sample(file)[None])[0].mean(dim=0).double().cpu()


def read_sample(file: Path) -> Float[Tensor, "frames 3 height width"]:
    """Read an mp4 or PNG file, in [0, 1].

    Raises:
        UserError: it cannot be read.
    """
    if file.suffix == ".png":
        pixels = np.array(open_image(str(file)))[None]
    else:
        try:
            with closing(imageio_ffmpeg.read_frames(str(file), input_params=MP4)) as stream:
                width, height = next(stream)["size"]
                frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in stream]
            pixels = np.stack(frames)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read as a video; without it the votes on it count as before") from error
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255

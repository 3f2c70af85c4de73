"""What people have said, as a reward: the votes of `flashgrpo reward human FOLDER`, and what is learnt from them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flashgrpo.errors import UserError
from flashgrpo.rewards.preference import WATCHES, Predictor
from flashgrpo.scoring.inputs import VideoFiles
from flashgrpo.serving.human.judging import Human
from flashgrpo.serving.human.votes import FILE, Votes, name_of, numbers_of

Numbers = list[float | None]


class Replay:
    """The numbers that people gave to these very samples; NaN where nobody has judged them, which drops the group.

    The same recipe and seed on the same machine draws the same samples, so a whole run can be repeated without people.
    A sample is known by its mp4 or PNG file, byte for byte: another ffmpeg, or one more update, makes it a stranger.

    `reward(files, prompts)` gives numbers in [-1, 1], 0 on average in a group.

    Args:
        folder: of `flashgrpo reward human`.
        predict_with: a CLIP checkpoint: groups that nobody judged have the number that a preference head gives them.

    Raises:
        UserError: there are no votes, or too few for a head.
    """

    takes = VideoFiles()
    compares = True
    score_range = (-1.0, 1.0)

    def __init__(self, folder: str, predict_with: str | None = None) -> None:
        if not (Path(folder) / FILE).is_file():
            raise UserError(f"{folder} has no {FILE}; `flashgrpo reward human {folder}` collects votes there")
        self._votes = Votes(Path(folder))
        self._predictor = None if predict_with is None else Predictor(Path(folder), predict_with)
        self._head = None if self._predictor is None else self._predictor.learn(self._votes.pairs())
        self.watches = WATCHES if self._predictor else ()

    def __call__(
        self, files: Sequence[str], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> Numbers | Mapping[str, Numbers]:
        """Score one group, or one sample alone against the first that came alone for its prompt."""
        read = [Path(file) for file in files]
        names = [name_of(file.read_bytes(), file.suffix) for file in read]
        question = self._votes.question(names, prompts[0], columns, begins=False)
        numbers = numbers_of(names, question, self._votes.numbers)
        if self._predictor is None:
            return numbers
        voted = question is not None and bool(self._votes.of(question))
        return self._predictor.answer(names, files, question, numbers, voted, self._head)


class Predicted(Human):
    """`Human`, with the number of a preference head for groups that nobody has judged when the wait is over.

    Args:
        folder: as `Human`, like `voters` and `wait`.
        predict_with: a CLIP checkpoint, folder or hub id.

    Raises:
        UserError: as `Human`; no wait; or the checkpoint is not there.
    """

    watches = WATCHES

    def __init__(self, folder: str, predict_with: str, voters: int = 1, wait: float | int | None = None) -> None:
        if wait is None:
            raise UserError("--predict-with is for groups that nobody judges within --wait SECONDS; give both")
        self._predictor = Predictor(Path(folder), predict_with)
        super().__init__(folder, voters, wait)

    def __call__(self, files: Sequence[str], prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Numbers]:
        """Return the numbers of one group: what people said, or what the head expects them to say."""
        names, question = self._asked(files, prompts, columns)
        numbers = numbers_of(names, question, self._judged)
        with self._changed:
            voted = question is not None and bool(self.votes.of(question))
            groups = self.votes.pairs()
        return self._predictor.answer(names, files, question, numbers, voted, self._predictor.head(groups))

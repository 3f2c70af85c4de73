"""What people have said, as a reward: the votes that `flashgrpo reward human FOLDER` has collected."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashgrpo.errors import UserError
from flashgrpo.scoring.inputs import VideoFiles
from flashgrpo.serving.human.votes import FILE, Votes, name_of, numbers_of


class Replay:
    """The numbers that people gave to these very samples; NaN where nobody has judged them, which drops the group.

    The same recipe and seed on the same machine draws the same samples, so a whole run can be repeated without people.
    A sample is known by its mp4 or PNG file, byte for byte: another ffmpeg, or one more update, makes it a stranger.

    `reward(files, prompts)` gives numbers in [-1, 1], 0 on average in a group.

    Args:
        folder: of `flashgrpo reward human`.

    Raises:
        UserError: there are no votes.
    """

    takes = VideoFiles()
    compares = True
    score_range = (-1.0, 1.0)

    def __init__(self, folder: str) -> None:
        if not (Path(folder) / FILE).is_file():
            raise UserError(f"{folder} has no {FILE}; `flashgrpo reward human {folder}` collects votes there")
        self._votes = Votes(Path(folder))

    def __call__(self, files: Sequence[str], prompts: Sequence[str], **columns: Sequence[Any]) -> list[float | None]:
        """Score one group, or one sample alone against the first that came alone for its prompt."""
        read = [Path(file) for file in files]
        names = [name_of(file.read_bytes(), file.suffix) for file in read]
        return numbers_of(names, self._votes.question(names, prompts[0], columns, begins=False), self._votes.numbers)

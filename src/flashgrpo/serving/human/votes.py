"""What people have said of samples: a file to which votes are appended, and the numbers that follow from them.

    FOLDER/votes.jsonl   {"vote": ...} as somebody has given it; {"reference": ...} of a prompt: what later samples
                         that come alone are held against
    FOLDER/samples/      what they have seen; a name is a digest of the content, so the same sample is never asked twice

A sample's number is what it beats less what beats it, of all that it was shown with: -1 is the worst, 1 the best.

>>> standings(["a", "b", "c"], ["b"])       # b was picked, and said to be better than the others; of these, nothing
{'a': -0.5, 'b': 1.0, 'c': -0.5}
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from flashgrpo.errors import UserError, printable
from flashgrpo.files import append_line, explain_os_errors, read_text
from flashgrpo.jsontext import json_lines, to_json

FILE = "votes.jsonl"
PAUSE = 300.0  # seconds between two votes beyond which somebody was away
Columns = Mapping[str, Sequence[Any]]
Pairs = tuple[tuple[str, str], ...]
"""(better, worse), names of samples."""
SampleName = Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.(mp4|png)$")]


def _short_line(name: str) -> str:
    if name != printable(name, 40) or not name.strip():
        raise ValueError("a voter's name is a line of up to 40 characters")
    return name


Voter = Annotated[str, AfterValidator(_short_line)]


class Vote(BaseModel):
    """What one person said of samples that were shown together.

    Args:
        at: seconds since 1970.
        seconds: that the samples were looked at.
        asked: the samples, in the order in which they were shown.
        best: those that were chosen, the best first; each of them is better than all that were not chosen. None were:
            all are equally good. Null: this person cannot say.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    voter: Voter
    at: float
    seconds: float = Field(ge=0)
    prompt: str
    asked: list[SampleName] = Field(min_length=2)
    best: list[SampleName] | None

    @property
    def key(self) -> str:
        """The question that it answers."""
        return Question(self.prompt, tuple(sorted(self.asked))).key


class Reference(BaseModel):
    """The first sample that came alone for a prompt with its columns (`about`)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    about: str
    sample: SampleName


class _Line(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    vote: Vote | None = None
    reference: Reference | None = None


@dataclass(frozen=True)
class Question:
    """Samples that are to be compared: their names in alphabetical order, each once."""

    prompt: str
    samples: tuple[str, ...]

    @property
    def key(self) -> str:
        """A digest that tells it from others."""
        return hashlib.sha256(to_json([self.prompt, *self.samples]).encode()).hexdigest()[:32]

    def shown_to(self, voter: str) -> list[str]:
        """Return the samples in an order that tells nothing of them, the same each time for the same person."""
        return sorted(self.samples, key=lambda name: hashlib.sha256(f"{voter}\n{self.key}\n{name}".encode()).digest())


class Agreement(NamedTuple):
    """How many of the pairs that two voters have both ordered are in the same order, and how many there are."""

    same: int
    pairs: int


class Votes:
    """The votes in a folder.

    Raises:
        UserError: a line of the file is none; a last one that was cut is taken out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._votes: list[Vote] = []
        self._by_key: dict[str, dict[str, Vote]] = {}
        self._references: dict[str, str] = {}
        self._read()

    def _read(self) -> None:
        file = self.folder / FILE
        text = read_text(file) if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        for number, value in json_lines(whole):
            try:
                line = _Line.model_validate_json(to_json(value)) if isinstance(value, dict) else None
            except ValidationError:
                line = None
            if line is None:
                raise UserError(f"{file}, line {number}: it is no vote; take the line out")
            self._take(line)
        if whole != text:  # a kill in the middle of a write leaves a line without its end
            with explain_os_errors(file), file.open("r+b") as cut:
                cut.truncate(len(whole.encode()))

    def _take(self, line: _Line) -> None:
        if line.vote is not None:
            self._votes.append(line.vote)
            self._by_key.setdefault(line.vote.key, {})[line.vote.voter] = line.vote
        if line.reference is not None:
            self._references[line.reference.about] = line.reference.sample

    def _append(self, line: _Line) -> None:
        append_line(self.folder / FILE, to_json(line.model_dump(exclude_none=line.vote is None)))
        self._take(line)

    def add(self, vote: Vote) -> None:
        """Write a vote to disk, and count it; a later one of the same person takes its place."""
        self._append(_Line(vote=vote))

    def question(self, names: Sequence[str], prompt: str, columns: Columns, begins: bool) -> Question | None:
        """Return what is to be compared: samples with each other, and one alone with the first that came so.

        Args:
            begins: where none has, it is the first from now on; else there is no question.
        """
        if len(names) == 1:
            about = _about(prompt, columns)
            if begins and about not in self._references:
                self._append(_Line(reference=Reference(about=about, sample=names[0])))
            if about not in self._references:
                return None
            names = [*names, self._references[about]]
        return Question(prompt, tuple(sorted({*names})))

    def of(self, question: Question) -> dict[str, Vote]:
        """Voter -> vote, of those who have answered."""
        return self._by_key.get(question.key, {})

    def numbers(self, question: Question) -> dict[str, float] | None:
        """Return sample -> mean of what its voters' votes give it; None where nobody could say, or was asked."""
        told = [vote.best for vote in self.of(question).values() if vote.best is not None]
        each = [standings(question.samples, best) for best in told]
        return {name: sum(of[name] for of in each) / len(each) for name in question.samples} if each else None

    def pairs(self) -> list[Pairs]:
        """Return the pairs that voters have put in an order, by question, in an order that is not that of the votes."""
        return [
            tuple(pair for _, vote in sorted(votes.items()) for pair in _ordered(vote))
            for _, votes in sorted(self._by_key.items())
        ]

    def agreement(self) -> Agreement:
        """Compare the votes of every two people on the same question."""
        same = pairs = 0
        for votes in self._by_key.values():
            each = [standings(vote.asked, vote.best) for vote in votes.values() if vote.best is not None]
            for one, other in itertools.combinations(each, 2):
                signs = [(one[a] - one[b]) * (other[a] - other[b]) for a, b in itertools.combinations(one, 2)]
                same, pairs = same + sum(s > 0 for s in signs), pairs + sum(s != 0 for s in signs)
        return Agreement(same, pairs)

    def count(self, voter: str | None = None) -> int:
        """How many votes there are, of one person or of all."""
        return sum(voter in (None, vote.voter) for vote in self._votes)

    def an_hour(self, voter: str) -> float | None:
        """Return how many votes a person gives in an hour, without pauses; None before the second vote."""
        times = [vote.at for vote in self._votes if vote.voter == voter]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times) if 0 < later - earlier <= PAUSE]
        return 3600 * len(gaps) / sum(gaps) if gaps else None


def standings(samples: Sequence[str], best: Sequence[str]) -> dict[str, float]:
    """Return sample -> (those that it beats - those that beat it) / all others; `best` are ranked, above the rest."""
    places = {name: place for place, name in enumerate(best)}
    place = [places.get(name, len(best)) for name in samples]
    signs = [[(other > own) - (other < own) for other in place] for own in place]
    return {name: sum(row) / (len(samples) - 1) for name, row in zip(samples, signs, strict=True)}


def _ordered(vote: Vote) -> list[tuple[str, str]]:
    """Return (better, worse) of each pair that a vote puts in an order."""
    of = standings(sorted(vote.asked), vote.best or ())
    return [(one, other) for one, other in itertools.permutations(of, 2) if of[one] > of[other]]


def numbers_of(
    names: Sequence[str], question: Question | None, answered: Callable[[Question], dict[str, float] | None]
) -> list[float | None]:
    """Return the number of each sample; what is the same as all that it is compared with has 0, unasked."""
    if question is not None and len(question.samples) == 1:
        return [0.0] * len(names)
    numbers = None if question is None else answered(question)
    return [None if numbers is None else numbers[name] for name in names]


def name_of(content: bytes, suffix: str) -> str:
    """Return the name of a sample whose file has this content."""
    return hashlib.sha256(content).hexdigest()[:32] + suffix


def _about(prompt: str, columns: Columns) -> str:
    """Return what a sample is asked to show, as a key: the prompt, and columns that are texts or numbers."""
    first = {name: column[0] for name, column in columns.items()}
    plain = {name: value for name, value in first.items() if isinstance(value, str | int | float)}
    return to_json([prompt, plain], sort_keys=True)

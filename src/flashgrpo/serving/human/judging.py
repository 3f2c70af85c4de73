"""A reward that waits for people."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashgrpo.errors import UserError
from flashgrpo.files import explain_os_errors, lock, write_aside
from flashgrpo.scoring.inputs import VideoFiles
from flashgrpo.serving.http import Transient
from flashgrpo.serving.human.votes import Columns, Question, Vote, Votes, name_of, numbers_of

if TYPE_CHECKING:
    from fastapi import FastAPI

HOLD = (
    240.0  # seconds that a request is held for an answer: less than the client's own limit, after which it asks again
)
DAY = 86400.0


class Human:
    """The number of a sample is what people say of it beside others: -1 the worst, 1 the best (`votes.standings`).

    Samples of a group are compared with each other. A sample that comes alone, as in an evaluation, is compared with
    the first that came alone for its prompt: the base model's, which has 0. Who could not say has no number (NaN), and
    costs that group its part in the update; no vote is ever assumed.

    Args:
        folder: of the votes and of what was seen; see `votes.py`.
        voters: people who answer each question before its numbers are given.
        wait: seconds after which a question is given up and answered by the votes that are there; None waits.

    Raises:
        UserError: no such settings, or a folder that cannot be used.
    """

    takes = VideoFiles()
    compares = True
    score_range = (-1.0, 1.0)
    patience = 14 * DAY

    def __init__(self, folder: str, voters: int = 1, wait: float | int | None = None) -> None:
        if voters < 1 or (wait is not None and not 0 <= wait <= 365 * DAY):
            raise UserError("people are asked with --voters of 1 or more, and --wait of 0 or more seconds")
        self._samples, self._voters, self._wait = Path(folder) / "samples", voters, wait
        with explain_os_errors(Path(folder)):
            self._samples.mkdir(parents=True, exist_ok=True)
            self._lock = (Path(folder) / ".lock").open("w", encoding="utf-8")
        if not lock(self._lock):
            self._lock.close()
            raise UserError(f"{folder} is in use by another `flashgrpo reward human`; choose another folder")
        self.votes = Votes(Path(folder))
        self._open: dict[str, tuple[Question, float]] = {}  # what is asked, and since when
        self._changed, self._closed = threading.Condition(), False

    def __call__(
        self, files: Sequence[str], prompts: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None] | dict[str, list[float | None]]:
        """Return the numbers of one group, once people have judged it; None where they have not.

        Raises:
            Transient: nobody has yet.
        """
        names, question = self._asked(files, prompts, columns)
        return numbers_of(names, question, self._judged)

    def _asked(
        self, files: Sequence[str], prompts: Sequence[str], columns: Columns
    ) -> tuple[list[str], Question | None]:
        names = [self._keep(Path(file)) for file in files]
        with self._changed:
            return names, self.votes.question(names, prompts[0], columns, begins=True)

    def _judged(self, question: Question) -> dict[str, float] | None:
        until = time.monotonic() + HOLD
        with self._changed:
            since = self._open.setdefault(question.key, (question, time.monotonic()))[1]
            while not self._closed:
                now = time.monotonic()
                late = self._wait is not None and now - since >= self._wait
                if late or len(self.votes.of(question)) >= self._voters:
                    self._open.pop(question.key, None)
                    return self.votes.numbers(question)
                if now >= until:
                    raise Transient("a group waits to be judged")
                given_up = until if self._wait is None else since + self._wait
                self._changed.wait(max(0.0, min(until, given_up) - now))
        raise Transient("the server is ending", after=5.0)

    def _keep(self, file: Path) -> str:
        content = file.read_bytes()
        name = name_of(content, file.suffix)
        if not (self._samples / name).exists():
            with write_aside(self._samples / name) as aside:
                aside.write_bytes(content)
        return name

    def file(self, name: str) -> Path | None:
        """Return a sample's file, where there is one of that name."""
        file = self._samples / name
        return file if file.parent == self._samples and file.is_file() and not name.startswith(".") else None

    def shown_to(self, voter: str) -> dict[str, Any]:
        """Return what a person's page shows: the oldest question that is not answered, how many wait, and figures."""
        with self._changed:
            waiting = [question for question, _ in self._open.values() if voter not in self.votes.of(question)]
            agreement = self.votes.agreement()._asdict()
            rate = self.votes.an_hour(voter)
            counts = {"waiting": len(waiting), "votes": self.votes.count(), "mine": self.votes.count(voter)}
        first = [{"key": q.key, "prompt": q.prompt, "samples": q.shown_to(voter)} for q in waiting[:1]]
        return {"question": first[0] if first else None, "an_hour": rate, "agreement": agreement, **counts}

    def vote(self, key: str, voter: str, best: list[str] | None, seconds: float) -> bool:
        """Write down an answer; returns whether the question was open, without which nothing is written.

        Raises:
            ValueError: it chooses what was not shown, or the same twice.
        """
        with self._changed:
            if key not in self._open:
                return False
            question = self._open[key][0]
            if best is not None and (len({*best}) < len(best) or not {*best} <= {*question.samples}):
                raise ValueError("a vote chooses what was not shown, or the same twice")
            asked = question.shown_to(voter)
            prompt = question.prompt
            self.votes.add(Vote(voter=voter, at=time.time(), seconds=seconds, prompt=prompt, asked=asked, best=best))
            if len(self.votes.of(question)) >= self._voters:
                del self._open[key]
            self._changed.notify_all()
            return True

    def add_page(self, app: "FastAPI") -> None:
        """Serve the page on which people judge."""
        from flashgrpo.serving.human.page import add_page

        add_page(app, self)

    def close(self) -> None:
        """Wait for nobody any more, and leave the folder to others."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._lock.close()

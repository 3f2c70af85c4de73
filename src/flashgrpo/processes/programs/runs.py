"""Runs of a program, side by side: each in a thread of its own, which waits where the program calls the model.

Only one thread runs at a time, and always the one that was told to, so that programs need no locks and their order says
nothing about what is drawn.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from flashgrpo.errors import UserError, first_line

Call = Callable[[str, str], str]
"""`call(module, text)` -> what the model writes to a text."""
Program = Callable[..., Any]
"""`program(prompt, call, **columns)` -> text."""


@dataclass(frozen=True)
class Question:
    """A call that waits for its completion; `number` counts the calls of its module in this run from 0."""

    module: str
    number: int
    text: str


@dataclass(frozen=True)
class Answer:
    """What a run has come to: its text, or why it has failed."""

    text: str
    failure: str | None = None


class Stopped(BaseException):
    """Ends a program at a call; no `except Exception` of its own keeps it from that."""


class Run:
    """A run of a program on a prompt, which is resumed with the completion of each of its calls.

    Args:
        explain: a context that turns what the program's code raises into one sentence.
        max_calls: after which it has failed.
        patience: seconds from one call to the next.
    """

    def __init__(
        self,
        program: Program,
        prompt: str,
        columns: Mapping[str, Any],
        explain: Callable[[], AbstractContextManager[None]],
        max_calls: int,
        patience: float,
    ) -> None:
        self._program, self._prompt, self._columns, self._explain = program, prompt, columns, explain
        self._max_calls, self._patience = max_calls, patience
        self._counts: dict[str, int] = {}
        self._told: queue.SimpleQueue[str | Stopped | None] = queue.SimpleQueue()
        self._asked: queue.SimpleQueue[Question | Answer | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="program", daemon=True)

    def resume(self, completion: str | Stopped | None = None) -> Question | Answer:
        """Run on to the next call, or to the end.

        Args:
            completion: of the call that waits; None where the run begins; `Stopped` lets it fail there.

        Raises:
            UserError: the program raised what is no failure, returned no text, or took too long.
        """
        if not self._thread.ident:
            self._thread.start()
        else:
            self._told.put(completion)
        try:
            found = self._asked.get(timeout=self._patience)
        except queue.Empty:
            raise UserError(
                f"rollout.program: a program has neither called nor returned for {self._patience:g} s, given the "
                f"prompt {self._prompt!r:.200}; raise rollout.patience, or look for a loop without an end"
            ) from None
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        """Let go of a run that is not resumed again."""
        self._told.put(Stopped("closed"))

    def _work(self) -> None:
        try:
            self._asked.put(self._result())
        except BaseException as error:
            self._asked.put(error)

    def _result(self) -> Answer:
        with self._explain():
            try:
                text = self._program(self._prompt, self._call, **self._columns)
            except (Stopped, ValueError, LookupError) as error:
                return Answer("", f"{type(error).__name__}: {first_line(error)}")
        if not isinstance(text, str):
            raise UserError(
                f"rollout.program: a program returns a text, and this one returned {type(text).__name__} for "
                f"the prompt {self._prompt!r:.200}"
            )
        return Answer(text)

    def _call(self, module: Any, text: Any) -> str:
        if not isinstance(module, str) or not isinstance(text, str):
            raise TypeError("call(module, text) takes the name of a module and a text")
        if sum(self._counts.values()) >= self._max_calls:
            raise Stopped(f"more than {self._max_calls} calls")
        number = self._counts.get(module, 0)
        self._counts[module] = number + 1
        self._asked.put(Question(module, number, text))
        told = self._told.get()
        if isinstance(told, Stopped):
            raise told
        assert told is not None
        return told

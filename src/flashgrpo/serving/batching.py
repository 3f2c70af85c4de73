"""The one thread of a reward server that scores: requests that are alike and wait are scored in one call."""

import contextlib
import logging
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flashgrpo.errors import first_line
from flashgrpo.scoring.loading import checked_values
from flashgrpo.serving.wire import Request, read
from flashgrpo.types import Reward

LOG = logging.getLogger("flashgrpo")
Components = dict[str, list[float]]


class Closing(Exception):
    """The server ends before this request's turn."""


class Broken(Exception):
    """The reward failed, or returned what is no reward; the text is a sentence."""


@dataclass
class Job:
    """A request that waits, and the place of its answer."""

    request: Request
    answer: "Future[Components]" = field(default_factory=Future)


class Batcher:
    """Scores requests, in the order in which they came but for those that join an earlier one.

    Args:
        reward: what scores; it is called by one thread only.
        batch: videos in a call. A request of more is scored in several.
        limit: bytes of the videos of a request, as uint8, when mp4 files are decoded.
    """

    def __init__(self, reward: Reward, batch: int, limit: int) -> None:
        self._reward, self._batch, self._limit = reward, batch, limit
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> "Future[Components]":
        """Queue a request. Cancelling the future before its turn leaves it out.

        The future raises `Closing`, `Broken`, or a ValueError where the reward refuses its input.
        """
        job = Job(request)
        with self._changed:
            if self._closed:
                job.answer.set_exception(Closing())
            else:
                self._waiting.append(job)
                self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Let what runs end, and tell those that wait."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify()
        for job in waiting:
            if job.answer.set_running_or_notify_cancel():
                job.answer.set_exception(Closing())

    def join(self, seconds: float) -> None:
        """Wait for the thread to end: one that frees tensors while the interpreter ends aborts the process."""
        self._thread.join(seconds)

    @torch.no_grad()
    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                jobs = self._take()
            jobs = [job for job in jobs if job.answer.set_running_or_notify_cancel()]  # else its client is gone
            if len(jobs) > 1 and self._together(jobs):
                continue
            for job in jobs:  # alone, or one by one, so that a request that cannot be scored spoils no other
                self._alone(job)

    def _take(self) -> list[Job]:
        """Take the oldest job, and with it those like it that fill up the batch."""
        first = self._waiting.popleft()
        taken, count = [first], first.request.count
        for job in list(self._waiting):
            if job.request.alike == first.request.alike and count + job.request.count <= self._batch:
                self._waiting.remove(job)
                taken.append(job)
                count += job.request.count
        return taken

    def _together(self, jobs: Sequence[Job]) -> bool:
        try:
            components = self._score([job.request for job in jobs])
        except Exception:  # whichever request it is about, each is tried alone
            return False
        start = 0
        for job in jobs:
            end = start + job.request.count
            job.answer.set_result({name: values[start:end] for name, values in components.items()})
            start = end
        return True

    def _alone(self, job: Job) -> None:
        try:
            job.answer.set_result(self._score([job.request]))
        except (ValueError, Broken) as error:
            job.answer.set_exception(error)
        except BaseException as error:  # even a reward that wants to exit ends no server
            LOG.error("the reward failed", exc_info=error)
            job.answer.set_exception(Broken(f"the reward failed: {type(error).__name__}: {first_line(error)[:200]}"))

    def _score(self, requests: Sequence[Request]) -> Components:
        prompts = [prompt for request in requests for prompt in request.prompts]
        columns = {
            name: [value for request in requests for value in request.columns[name]] for name in requests[0].columns
        }
        with self._inputs(requests) as inputs:
            parts = []
            for start in range(0, len(prompts), self._batch):
                rows = slice(start, start + self._batch)
                part = {name: values[rows] for name, values in columns.items()}
                values: Any = self._reward(inputs[rows], prompts[rows], **part)
                try:
                    parts.append(checked_values(values, len(prompts[rows])))
                except ValueError as error:
                    raise Broken(str(error)) from error
        if any(set(part) != set(parts[0]) for part in parts):
            raise Broken("the reward returns other components for some videos than for others")
        return {name: [value for part in parts for value in part[name]] for name in parts[0]}

    @contextlib.contextmanager
    def _inputs(self, requests: Sequence[Request]) -> Iterator[Any]:
        """Yield what the reward is called with: a tensor, or paths of files that exist as long as the call lasts."""
        if requests[0].kind != "files":
            yield read(requests, self._limit)
            return
        with tempfile.TemporaryDirectory(prefix="flashgrpo-reward-") as folder:
            files = [file for request in requests for file in request.files()]
            paths = [Path(folder) / f"{number:04d}.mp4" for number in range(len(files))]
            for path, file in zip(paths, files, strict=True):
                path.write_bytes(file)
            yield [str(path) for path in paths]

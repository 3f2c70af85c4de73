"""How the processes of a run notice that one of them has died, and end together with one message that names it.

A collective waits for every rank, so without this a run of which one process was killed hangs until a timeout of half
an hour, or for ever. Each process beats once a second into the rendezvous store from a thread of its own; rank 0
watches all beats, the others watch rank 0's. Whoever finds a rank silent, or fails itself, posts the reason once; every
other process reads it and ends. Nothing is saved on the way out: the last checkpoint is whole by construction.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Sequence

import torch.distributed as dist

from flashgrpo.distributed.settings import ParallelConfig
from flashgrpo.errors import UserError

INTERVAL = 1.0  # seconds between two beats
GRACE = 5.0  # seconds that a process gets to end by itself once the end of the run was posted
BROKEN = 5.0  # seconds of silence that count as death once a collective has broken off
LOST = "the process that keeps the rendezvous has gone, so all ranks end; the last checkpoint is whole"


class Heartbeat:
    """Beats for this rank and watches the others until `stop`.

    Args:
        store: a connection of its own, since requests of one connection wait for each other.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, settings: ParallelConfig) -> None:
        self._store, self._rank, self._size, self._settings = store, rank, size, settings
        self._dead_after = settings.dead_after
        self._met: dict[str, int] = defaultdict(int)
        self._stopped = threading.Event()
        self._beats = 0
        self._heard_end = False
        self._lock = threading.Lock()
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to watch, once every rank has beaten for the first time.

        Raises:
            UserError: one has not, within `parallel.start_timeout`.
        """
        limit = self._settings.start_timeout
        until, pause = time.monotonic() + limit, 0.001
        while missing := [rank for rank in range(self._size) if not self._check([f"beat/{rank}"])]:
            if time.monotonic() > until:
                who = f"rank {missing[0]} has" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} have"
                raise UserError(f"{who} not come within {limit:g} s of the start (parallel.start_timeout)")
            pause = self._pause(pause)
        self._thread.start()

    def meet(self, name: str, size: int) -> None:
        """Wait until `size` ranks have called this as often as this one for meetings of this name, while all live.

        Each time that `parallel.timeout` passes, the first ranks that wait say so: what hangs is not dead.

        Raises:
            UserError: the run has ended, for instance since one has died.
        """
        self._met[name] += 1
        pause, needed = 0.001, self._met[name] * size
        come, limit = self._add(name, 1), self._settings.timeout
        told = begun = time.monotonic()
        while come < needed:
            pause = self._pause(pause)
            come, now = self._add(name, 0), time.monotonic()
            if now - told > limit:
                told = now
                if self._rank < 2:  # rank 1 speaks where it is rank 0 that hangs
                    waited = f"rank {self._rank} has waited {now - begun:.0f} s for {needed - come} of {size} ranks"
                    slow = "which live: something on them is slow, or hangs (a reward, a file system)"
                    print(f"warning: {waited}, {slow}", file=sys.stderr)

    def _pause(self, seconds: float) -> float:
        """Wait a little before the store is asked again; returns how long to wait the next time."""
        if (reason := self._posted()) is not None:
            raise UserError(reason)
        time.sleep(seconds)
        return min(2 * seconds, 0.2)

    def _add(self, name: str, count: int) -> int:
        with self._lock:
            return int(self._store.add(f"met/{name}", count))

    def _check(self, keys: list[str]) -> bool:
        with self._lock:
            return bool(self._store.check(keys))

    def stop(self) -> None:
        """Stop watching: the run ends as it should."""
        self._stopped.set()
        self._thread.join(timeout=GRACE)

    def explain(self, error: BaseException) -> BaseException:
        """Return what to raise in place of `error`, which may be but the consequence of another rank's end.

        The first rank that posts a reason tells it; the errors of the others are marked as told.
        """
        try:
            reason = str(error) if isinstance(error, UserError) else self._wait_for_end(GRACE) or self._find_silent()
            if (
                reason is None
                and isinstance(error, RuntimeError)
                and re.search("timed? ?out", str(error), re.IGNORECASE)
            ):
                limit = f"{self._settings.timeout:g} s (parallel.timeout)"
                reason = f"rank {self._rank} has waited for another longer than {limit}; raise it if steps take as long"
            if reason is None:  # this rank's own bug, which keeps its traceback
                self._post(f"rank {self._rank} ended: {type(error).__name__}: {error}")
                return error
            explained = error if isinstance(error, UserError) else UserError(reason)
            explained.told = not self._post(reason)
            return explained
        except (dist.DistStoreError, RuntimeError):
            lost = UserError(LOST)
            lost.told = self._rank != 1 or self._heard_end
            return lost
        finally:
            self._let_others_go()
            self._stopped.set()

    def _let_others_go(self) -> None:
        """Say that this rank knows of the end; rank 0, which may keep the store, waits until all do."""
        with contextlib.suppress(dist.DistStoreError, RuntimeError):
            with self._lock:
                self._store.set(f"left/{self._rank}", "")
            keys, until = [f"left/{rank}" for rank in range(self._size)], time.monotonic() + GRACE
            while self._rank == 0 and time.monotonic() < until and not self._store.check(keys):
                time.sleep(0.1)

    def _post(self, reason: str) -> bool:
        """Post why the run ends; False where another rank was first."""
        mine = json.dumps([self._rank, reason])
        with self._lock:
            return bool(self._store.compare_set("end", "", mine) == mine.encode())

    def _posted(self) -> str | None:
        with self._lock:
            if not self._store.check(["end"]):
                return None
            self._heard_end = True
            return str(json.loads(self._store.get("end"))[1])

    def _wait_for_end(self, seconds: float) -> str | None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (reason := self._posted()) is not None:
                return reason
            time.sleep(0.2)
        return None

    def _find_silent(self) -> str | None:
        others = [rank for rank in range(self._size) if rank != self._rank]
        before = self._read(others)
        if (reason := self._wait_for_end(BROKEN)) is not None:
            return reason
        silent = [rank for rank, old, new in zip(others, before, self._read(others), strict=True) if old == new]
        return _death(silent, BROKEN) if silent else None

    def _beat(self) -> None:
        with self._lock:
            self._store.set(f"beat/{self._rank}", str(self._beats))
        self._beats += 1

    def _read(self, ranks: Sequence[int]) -> list[bytes]:
        with self._lock:
            return list(self._store.multi_get([f"beat/{rank}" for rank in ranks]))

    def _watch(self) -> None:
        watched = list(range(1, self._size)) if self._rank == 0 else [0]
        last = dict.fromkeys(watched, b"")
        heard = dict.fromkeys(watched, time.monotonic())
        while not self._stopped.wait(INTERVAL):
            try:
                self._look(last, heard)
            except (dist.DistStoreError, RuntimeError):
                self._leave(LOST if self._rank == 1 else "")

    def _look(self, last: dict[int, bytes], heard: dict[int, float]) -> None:
        """Beat once, and look once at the beats of the watched ranks: rank -> its last beat, and when that came."""
        self._beat()
        if self._posted() is not None:
            self._let_others_go()
            self._leave("")
        for rank, beat in zip(last, self._read(list(last)), strict=True):
            if beat != last[rank]:
                last[rank], heard[rank] = beat, time.monotonic()
        silent = [rank for rank in last if time.monotonic() - heard[rank] > self._dead_after]
        if silent:
            reason = _death(silent, self._dead_after)
            self._leave(reason if self._post(reason) else "")

    def _leave(self, reason: str) -> None:
        """End this process, whose main thread may wait in a collective for ever, if it does not end by itself."""
        if self._stopped.wait(0 if reason else GRACE):
            return
        if reason:
            print(f"flashgrpo: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


def _death(ranks: Sequence[int], seconds: float) -> str:
    named = f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
    return (
        f"{named} not been heard from for {seconds:.0f} s, so all ranks end; "
        "the last checkpoint is whole, and the same command resumes from it"
    )

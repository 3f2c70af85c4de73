"""Runs functions of `tests/jobs.py` in processes of their own, several of them as the ranks of one run.

Starting Python and importing the libraries takes seconds, so one nursery process does that once and forks a child for
every rank. It computes nothing itself, for a process that has computed cannot be forked safely.

As a script this file is the nursery: it reads one JSON request a line and answers each with the children's process ids.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parent
STILL = 300.0  # seconds without work after which ranks count as hanging; what they wait for comes far sooner
WORK = 0.1  # seconds of CPU time that count as work
LAST_RESORT = 7200.0  # seconds after which ranks that do work are given up, too
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Ranks:
    """The processes of one job, as seen by a test."""

    folder: Path
    pids: list[int]
    _used: dict[int, float] = field(default_factory=dict)

    def code(self, rank: int) -> int | None:
        """Return its exit code (negative: the signal that killed it), or None while it runs."""
        file = self.folder / f"exit{rank}"
        return int(file.read_text()) if file.exists() and file.read_text() else None

    def wait(self) -> list[int]:
        """Wait until all have ended; returns their exit codes."""
        self.until(lambda: None not in self.codes())
        return self.codes()

    def codes(self) -> list[int | None]:
        """Return the exit codes of all; see `code`."""
        return [self.code(rank) for rank in range(len(self.pids))]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, as long as the ranks are at work, however slow a busy machine makes them."""
        began = since = looked = time.monotonic()
        used = self.cpu_seconds()
        while not condition():
            time.sleep(0.01)
            now = time.monotonic()
            if now - looked < 1:
                continue
            looked, total = now, self.cpu_seconds()
            if total - used > WORK:
                since, used = now, total
            assert now - since < STILL, f"ranks hang: {self.codes()}\n{self.said()}"
            assert now - began < LAST_RESORT, f"ranks still run: {self.codes()}\n{self.said()}"

    def cpu_seconds(self) -> float:
        """Return the CPU time of all ranks' main threads, which have none while they wait for each other.

        Other threads do not count: a heartbeat beats in a rank that hangs, too.
        """
        for pid in self.pids:
            try:
                fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            self._used[pid] = (int(fields[11]) + int(fields[12])) / TICKS
        return sum(self._used.values())

    def kill(self, rank: int) -> None:
        """Send SIGKILL to a rank."""
        os.kill(self.pids[rank], 9)

    def said(self, rank: int | None = None) -> str:
        """Return what a rank, or all of them, wrote to its standard output and error."""
        ranks = range(len(self.pids)) if rank is None else [rank]
        return "".join((self.folder / f"said{r}").read_text() for r in ranks)

    def result(self, rank: int = 0):
        """Return what the job returned."""
        return json.loads((self.folder / f"result{rank}").read_text())


class Nursery:
    """Starts jobs; one for a whole test session."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._jobs = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TESTS.parent,
            env=environment,
        )

    def start(self, job: str, *arguments, size: int = 1) -> Ranks:
        """Start `jobs.JOB(*arguments)` in `size` ranks; the arguments pass as JSON."""
        self._jobs += 1
        folder = self._folder / f"job{self._jobs}"
        folder.mkdir()
        request = {"job": job, "arguments": arguments, "size": size, "folder": str(folder), "port": free_port()}
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        return Ranks(folder, json.loads(self._process.stdout.readline()))

    def run(self, job: str, *arguments, size: int = 1):
        """Start, wait, and return what rank 0 returned; every rank has to end well."""
        ranks = self.start(job, *arguments, size=size)
        assert ranks.wait() == [0] * size, ranks.said()
        return ranks.result()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def be_nursery() -> None:
    sys.path.insert(0, str(TESTS.parent))
    from tests import jobs

    children = {}
    os.set_blocking(0, False)
    pending = ""
    while True:
        chunk = None
        try:
            chunk = os.read(0, 65536)
        except BlockingIOError:
            time.sleep(0.005)
        if chunk == b"":
            return
        pending += (chunk or b"").decode()
        while "\n" in pending:
            line, pending = pending.split("\n", 1)
            request = json.loads(line)
            pids = [fork(jobs, request, rank) for rank in range(request["size"])]
            children |= {pid: Path(request["folder"]) / f"exit{rank}" for rank, pid in enumerate(pids)}
            print(json.dumps(pids), flush=True)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            children.pop(pid).write_text(str(os.waitstatus_to_exitcode(status)))


def fork(jobs, request, rank: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    jobs.torch.set_num_threads(
        1
    )  # a child replaces torch's pool of threads at its first use, which two threads may not race for
    folder = Path(request["folder"])
    said = os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if request["size"] > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(request["size"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(request["port"]),
        }
    code = 1
    try:
        result = getattr(jobs, request["job"])(*request["arguments"])
        (folder / f"result{rank}").write_text(json.dumps(result))
        code = 0
    except BaseException as error:
        code = jobs.tell(error)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    be_nursery()

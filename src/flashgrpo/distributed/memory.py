"""Memory of the device that a process computes on: the highest use of a phase, and what there is."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from flashgrpo.errors import UserError, first_line, launcher_number


@contextlib.contextmanager
def explain_shortage(remedy: str) -> Iterator[None]:
    """Turn a GPU's shortage of memory into a sentence that says which settings take less.

    Raises:
        UserError: memory ran out inside of this context.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: lower {remedy}; {first_line(error)[:200]}") from error


def peak(device: torch.device, reset: bool = False) -> int:
    """Return the bytes at the highest since the last reset: allocated on a GPU, resident in this process on the CPU."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        if reset:  # Linux keeps the mark of a process
            with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
                file.write("5")  # resets the high-water mark below
        with open("/proc/self/status", encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wait_for_device() -> None:
    """Wait until the GPU has done what it was asked for, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def free(device: torch.device) -> int:
    """Count the bytes of a GPU that this process has not taken; of the CPU, whose memory others give back, all."""
    return total(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else total(device)


def total(device: torch.device) -> int:
    """Count the bytes of a device; of the CPU's this process's share, and no more than its container may take."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return there // max(1, launcher_number("LOCAL_WORLD_SIZE", 1))

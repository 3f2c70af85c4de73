"""How the processes of a run find each other: at a store, within a short limit of its own, and only then in groups.

A process group waits for its ranks as long as its collectives may take, which is far too long for one that never comes.
"""

import os
from datetime import timedelta

import torch.distributed as dist

from flashgrpo.distributed.heartbeat import Heartbeat
from flashgrpo.distributed.settings import ParallelConfig
from flashgrpo.errors import UserError, first_line, launcher_number


def find_store(rank: int, size: int, settings: ParallelConfig) -> tuple[dist.Store, Heartbeat]:
    """Return the store that all ranks have come to, for process groups, and a heartbeat with a connection of its own.

    Raises:
        UserError: not all have come within `parallel.start_timeout`.
    """
    limit = timedelta(seconds=settings.start_timeout)
    host, port = os.environ.get("MASTER_ADDR", ""), launcher_number("MASTER_PORT", 0)
    try:
        store, _, _ = next(iter(dist.rendezvous("env://", rank, size, timeout=limit)))
        own = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"rank {rank} has not met the other processes at {host}:{port} within {settings.start_timeout:g} s "
            f"(parallel.start_timeout): {first_line(error)[:200]}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it starts anew
    name = f"flashgrpo/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}"
    return dist.PrefixStore(f"{name}/groups", store), Heartbeat(dist.PrefixStore(name, own), rank, size, settings)

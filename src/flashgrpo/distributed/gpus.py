"""Which GPU each process has."""

from collections.abc import Callable
from typing import Any

import torch

from flashgrpo.errors import SharedError


def refuse_shared_gpus(device: torch.device, all_gather: Callable[[Any], list[Any]]) -> None:
    """Refuse two processes on one GPU, which would take its memory twice and which NCCL cannot serve.

    Told by the GPUs' own ids: a launcher may show each process one GPU only, so that all of them have number 0.

    Args:
        all_gather: gives the values of all processes.

    Raises:
        SharedError: there are more processes than GPUs.
    """
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    own = str(gpu.uuid) if gpu is not None else None
    everyone = all_gather(own)
    for rank, one in enumerate(everyone):
        if one is not None and one in everyone[:rank]:
            raise SharedError(
                f"processes {everyone.index(one)} and {rank} have the same GPU; start one process for each GPU"
            )

"""Where a run computes."""

import torch


def default_device() -> torch.device:
    """The first CUDA device when there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None leaves the tensor library's choice."""
    if threads is not None:
        torch.set_num_threads(threads)

"""A second launcher, for clusters that run Ray instead of torchrun; the extra `ray` installs it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flashgrpo.errors import UserError, install_hint


def run_on_ray(
    work: Callable[[dict[str, Any]], None], arguments: dict[str, Any], workers: int, storage: Path, timeout: float
) -> None:
    """Call `work(arguments)` in `workers` Ray workers, which find each other as processes of torchrun do.

    The workers take a GPU each where this machine has one.

    Args:
        storage: a folder that all of them share.
        timeout: seconds that a worker waits for the others.

    Raises:
        UserError: Ray is not installed, or a worker raised one.
    """
    try:
        import ray.train.torch
    except ImportError as error:
        raise UserError(f"--ray-workers needs Ray: {install_hint('ray')}") from error
    on_gpu = torch.cuda.is_available()
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config=arguments,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=on_gpu),
        run_config=ray.train.RunConfig(storage_path=str(storage)),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=int(timeout)),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps what a worker raised, in other classes from release to release
        told = re.search(r"(?:UserError|SharedError)\S*: (.+)", str(error))
        if told:
            raise UserError(told[1]) from None
        raise

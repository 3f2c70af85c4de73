"""A second launcher, for clusters that run Ray instead of torchrun: `pip install flash-grpo[ray]`."""

import re
from pathlib import Path
from typing import Any

import torch

from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError


def train_on_ray(config: RunConfig, workers: int) -> Path:
    """Run `train` in so many Ray workers, which find each other as processes of torchrun do; returns the run directory.

    The workers take a GPU each where this machine has one. `config.out` has to lie on storage that all of them share.

    Raises:
        UserError: Ray is not installed, or a worker raised one.
    """
    try:
        import ray.train.torch
    except ImportError as error:
        raise UserError("--ray-workers needs Ray: pip install 'flash-grpo[ray]'") from error
    on_gpu = torch.cuda.is_available()
    config = config.with_absolute_paths()
    trainer = ray.train.torch.TorchTrainer(
        _work,
        train_loop_config={"config": config.model_dump(mode="json")},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=on_gpu),
        run_config=ray.train.RunConfig(storage_path=str(Path(config.out).parent / ".ray")),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if on_gpu else "gloo", timeout_s=int(config.parallel.timeout)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps what a worker raised, in other classes from release to release
        told = re.search(r"(?:UserError|SharedError)\S*: (.+)", str(error))
        if told:
            raise UserError(told[1]) from None
        raise
    return Path(config.out)


def _work(arguments: dict[str, Any]) -> None:
    from flashgrpo.train import train

    train(RunConfig.parse(arguments["config"], "the recipe"))

"""One network made ready: what is trained of it, how it computes, where it lies."""

from typing import Any

import torch

from flashgrpo.distributed import Team
from flashgrpo.errors import UserError
from flashgrpo.models.lora import prepare
from flashgrpo.settings import ModelConfig
from flashgrpo.sharding import place


def prepare_network(network: Any, config: ModelConfig, team: Team, seed: int, prefix: str = "") -> None:
    """Prepare a transformer of diffusers for rollout and update.

    Args:
        seed, prefix: of the adapters' initial weights; `prefix` sets apart the names of two experts.

    Raises:
        UserError: targets match nothing, an attention back end is not there, or the network cannot be split.
    """
    prepare(network, config.train, seed, prefix)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.attention:
        _set_attention(network, config.attention)
    if config.compile:
        network.compile_repeated_blocks()
    place(network, team, getattr(torch, config.compute_dtype) if config.compute_dtype else None)


def _set_attention(network: Any, backend: str) -> None:
    try:
        network.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        raise UserError(f"model.attention: {' '.join(str(error).split())[:300]}") from error

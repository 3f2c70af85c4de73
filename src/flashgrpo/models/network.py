"""One network made ready: what is trained of it, how it computes, where it lies."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from flashgrpo.distributed.sharding import place
from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.models.lora import prepare
from flashgrpo.models.settings import Lora, ModelConfig
from flashgrpo.models.warm_start import WarmStart
from flashgrpo.settings import DEFAULT_ADAPTERS


def prepare_network(
    network: Any,
    config: ModelConfig,
    world: World,
    seed: int,
    prefix: str = "",
    starts: Mapping[str, WarmStart] = MappingProxyType({}),
    unused: Sequence[str] = (),
    adapters: Sequence[str] = (DEFAULT_ADAPTERS,),
) -> None:
    """Prepare a transformer of diffusers for rollout and update.

    Args:
        seed, prefix: of the adapters' initial weights; `prefix` sets apart the names of two experts.
        starts: by the names of adapters, those of a file that they begin with; of one name where they are merged.
        unused: modules that are not trained.
        adapters: names of the sets that are trained, of which the first computes.

    Raises:
        UserError: targets match nothing or not the adapters to begin with, an attention back end is not there, or the
            network cannot be split.
    """
    for start in starts.values() if config.merge_adapters else ():
        start.merge_into(network)
    prepare(network, config.train, seed, prefix, unused, adapters)
    if isinstance(config.train, Lora) and not config.merge_adapters:
        for name, start in starts.items():
            start.continue_in(network, config.train, name)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if config.compile:
        network.compile_repeated_blocks()
        # What is trained is computed by the blocks as they are, in backward too: compiled ones round otherwise.
        torch.compiler.set_stance("force_eager")
    place(network, world, getattr(torch, config.compute_dtype) if config.compute_dtype else None)
    if config.attention:
        with explain_attention(
            network, config.attention
        ):  # after its tokens are split, which not every back end supports
            network.set_attention_backend(config.attention)


def channels_last(module: nn.Module) -> None:
    """Lay out the weights of convolutions with channels last, which their results then have too."""
    layouts = ((nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d))
    for part in module.modules():
        for kind, layout in layouts:
            if isinstance(part, kind):
                part.to(memory_format=layout)  # type: ignore[call-overload]


@torch.no_grad()
def try_attention(networks: Iterable[Any], backend: str, call: Callable[[Any], object]) -> None:
    """Call each network once: many back ends refuse a mask, a type or a device only when they are called."""
    for network in networks:
        with explain_attention(network, backend):
            call(network)


@contextlib.contextmanager
def explain_attention(network: Any, backend: str | None) -> Iterator[None]:
    """Turn what a back end refuses into one sentence, and take it out again: diffusers has one for all networks."""
    try:
        yield
    except torch.OutOfMemoryError:  # which says nothing of the back end
        raise
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        network.set_attention_backend("native")
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.attention: {backend} does not serve this model here: {reason}") from error

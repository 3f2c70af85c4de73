"""What is trained of a network: low-rank adapters (through peft) or every parameter."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from flashgrpo.config import Full, Lora
from flashgrpo.distributed import local
from flashgrpo.errors import UserError
from flashgrpo.seeds import generator


def prepare(network: nn.Module, train: Lora | Full, seed: int) -> None:
    """Make `network` trainable as `train` says; what is trained is float32, everything else is frozen.

    Adapters start as the identity: A is gaussian with standard deviation 1 / rank, drawn from `seed`, and B is zero.

    Raises:
        UserError: no module of the network is called like one of the targets.
    """
    network.eval()  # no dropout: rollout and update must see the same velocity
    network.requires_grad_(isinstance(train, Full))
    if isinstance(train, Lora):
        from peft import LoraConfig  # takes seconds to import, and `flashgrpo --help` should not

        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        matched = [target for target in train.targets if any(f".{name}".endswith(f".{target}") for name in linear)]
        if not matched:
            some = sorted({name.split(".", 2)[-1] for name in linear})
            raise UserError(f"model.train.targets {list(train.targets)} match no linear layer; there are {some}")
        network.add_adapter(  # type: ignore[operator]  # diffusers' PeftAdapterMixin
            LoraConfig(r=train.rank, lora_alpha=train.alpha, target_modules=matched, init_lora_weights="gaussian")
        )
        for name, parameter in trained_parameters(network).items():
            if "lora_A" in name:
                noise = torch.randn(parameter.shape, generator=generator(seed, f"lora:{name}"))
                parameter.data.copy_(noise / train.rank)
    for parameter in trained_parameters(network).values():
        parameter.data = parameter.data.float()


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that has a gradient."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def weights_replaced(network: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute with other values of the trained parameters inside this context (the average, the base).

    `tensors` holds the parameters' own values meanwhile, so that nothing is copied.
    """
    pairs = [(local(parameter), local(tensors[name])) for name, parameter in trained_parameters(network).items()]
    try:
        _exchange(pairs)
        yield
    finally:
        _exchange(pairs)


def _exchange(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Swap values in place: nothing is copied twice, and FSDP2 gathers a sharded parameter from where it lies."""
    for parameter, other in pairs:
        before = parameter.clone()
        parameter.data.copy_(other)  # .data: autograd is not to see it, as the old values are back before backward
        other.copy_(before)

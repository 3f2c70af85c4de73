"""What is trained of a network: low-rank adapters (through peft) or every parameter."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flashgrpo.distributed.world import local
from flashgrpo.errors import UserError
from flashgrpo.models.settings import Full, Lora, ModelConfig
from flashgrpo.seeds import generator
from flashgrpo.settings import DEFAULT_ADAPTERS


def prepare(
    network: nn.Module,
    train: Lora | Full,
    seed: int,
    prefix: str = "",
    unused: Sequence[str] = (),
    adapters: Sequence[str] = (DEFAULT_ADAPTERS,),
) -> None:
    """Make `network` trainable as `train` says; what is trained is float32, everything else is frozen.

    Adapters start as the identity: A is gaussian with standard deviation 1 / rank, drawn from `seed` and its name, and
    B is zero. `prefix` sets apart the names of two experts; modules that are `unused` stay as they are. Of several
    `adapters` all start with the same values, whatever they are called, and the first computes.

    Raises:
        UserError: no module of the network is called like one of the targets.
    """
    network.eval()  # no dropout: rollout and update must see the same velocity
    network.requires_grad_(isinstance(train, Full))
    for name in unused:
        network.get_submodule(name).requires_grad_(False)
    if isinstance(train, Lora):
        linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
        matched = [target for target in train.targets if any(f".{name}".endswith(f".{target}") for name in linear)]
        if not matched:
            some = sorted({name.split(".", 2)[-1] for name in linear})
            raise UserError(f"model.train.targets {list(train.targets)} match no linear layer; there are {some}")
        _check_names(adapters, network)
        # peft warns, here and where the adapters are loaded, of an exclusion that excludes nothing
        unused = [name for name in unused if any(f"{other}.".startswith(f"{name}.") for other in linear)]
        for name in adapters:
            _add_adapters(network, name, train, matched, unused, lambda of: generator(seed, f"lora:{prefix}{of}"))
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        if len(adapters) > 1:
            use_adapters(network, adapters[0])
    for parameter in trained_parameters(network).values():
        parameter.data = parameter.data.float()


def _add_adapters(
    network: Any,
    adapters: str,
    train: Lora,
    targets: Sequence[str],
    unused: Sequence[str],
    drawn_by: Callable[[str], torch.Generator],
) -> None:
    """Put the identity on the layers of the targets; what A is drawn by follows from its layer, not from `adapters`."""
    from peft import LoraConfig  # takes seconds to import, and `flashgrpo --help` should not

    config = LoraConfig(
        r=train.rank,
        lora_alpha=train.alpha,
        target_modules=list(targets),
        exclude_modules=list(unused) or None,
        init_lora_weights="gaussian",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of several, as is meant
        network.add_adapter(config, adapters)  # of diffusers' PeftAdapterMixin, or transformers'
    for name, parameter in trained_parameters(network).items():  # peft trains those that were added last
        if "lora_A" in name:
            same = name.removesuffix(f"{adapters}.weight") + f"{DEFAULT_ADAPTERS}.weight"
            parameter.data.copy_(torch.randn(parameter.shape, generator=drawn_by(same)) / train.rank)


def _check_names(adapters: Sequence[str], network: nn.Module) -> None:
    """Refuse names of adapters that torch or peft take for something else.

    Raises:
        UserError: names the first.
    """
    taken = {part for name, _ in network.named_modules() for part in name.split(".")}
    for name in adapters:
        if name in taken or hasattr(nn.ModuleDict(), name) or name in "lora_":
            raise UserError(
                f"rollout.adapters: adapters cannot be called {name!r}, which is the name of something else in the "
                "network; take another"
            )


def left_out(network: nn.Module) -> set[str]:
    """Return the names of the modules that `prepare` was told are unused, of an adapted network or of two experts."""
    experts = {f"{name}.": expert for name, expert in network.items()} if isinstance(network, nn.ModuleDict) else {}
    configs = {start: getattr(part, "peft_config", {}) for start, part in (experts or {"": network}).items()}
    return {
        f"{start}{name}"
        for start, own in configs.items()
        for config in own.values()
        for name in config.exclude_modules or ()
    }


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return what has a gradient, name -> parameter."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def write_adapters(
    experts: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    folder: Path,
    original_name: Callable[[str], str | None] | None = None,
) -> list[str]:
    """Write the adapters of one network, or a file for each of two; returns the files' names. See `_write_file`."""
    if len(experts) == 1:
        files = {"": "pytorch_lora_weights.safetensors"}
    else:
        files = dict(
            zip((f"{name}." for name in experts), ("high_noise.safetensors", "low_noise.safetensors"), strict=True)
        )
    for network, (prefix, file) in zip(experts.values(), files.items(), strict=True):
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        _write_file(network, own, folder / file, original_name)
    return list(files.values())


def _write_file(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    file: Path,
    original_name: Callable[[str], str | None] | None = None,
) -> None:
    """Write adapters (name -> tensor of `network`) to a file that diffusers loads.

    Args:
        original_name: writes what ComfyUI reads, with a layer's name in the released checkpoints and the factor
            alpha / rank inside of B.

    Raises:
        UserError: a layer has no original name.
    """
    from diffusers import WanPipeline
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(network, state_dict=dict(tensors), adapter_name="default")
    lora: Any = network.peft_config["default"]  # type: ignore[index]
    if original_name is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            WanPipeline.save_lora_weights(  # as each pipeline's own does, of those that have one
                file.parent,
                layers,
                weight_name=file.name,
                transformer_lora_adapter_metadata=_in_order(lora.to_dict()),
            )
        return
    scaled = {}
    for name, tensor in layers.items():
        original = original_name(name)
        if original is None:
            raise UserError(
                f"--format comfyui: layer {name.split('.lora_')[0]} has no name there; use diffusers or merged"
            )
        scale = lora.lora_alpha / lora.r if ".lora_B." in name else 1.0
        scaled[f"diffusion_model.{original}"] = (tensor * scale).contiguous()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(scaled, file)


def _in_order(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose sets are sorted lists: equal runs write equal bytes."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}


def starting_weights(network: nn.Module, config: ModelConfig, keep_reference: bool) -> dict[str, Tensor]:
    """Copy what is trained, where the model that training begins with cannot be had by switching adapters off.

    Args:
        keep_reference: whether anything will compare with that model, if all of the network is trained.
    """
    needed = config.continues_adapters or (keep_reference and isinstance(config.train, Full))
    trained = trained_parameters(network) if needed else {}
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def at_start(
    network: nn.Module, parts: Sequence[Any], start: Mapping[str, Tensor]
) -> contextlib.AbstractContextManager[None]:
    """Compute with the model that training began with inside this context.

    Args:
        parts: of the network, those that have adapters.
        start: as `starting_weights` returned it.
    """
    if start:
        return weights_replaced(network, start)
    assert hasattr(parts[0], "peft_config"), "load with keep_reference to compare a fully trained model with its base"
    return adapters_off(parts)


@contextlib.contextmanager
def adapters_off(networks: Sequence[Any]) -> Iterator[None]:
    """Compute as before training inside this context."""
    with contextlib.ExitStack() as stack:
        for network in networks:
            stack.enter_context(_trained_afterwards(network))
            network.disable_adapters()
            stack.callback(network.enable_adapters)
        yield


def use_adapters(network: Any, name: str) -> None:
    """Compute with the adapters of this name from now on; those of other names stay trained."""
    with _trained_afterwards(network):
        network.set_adapter(name)


@contextlib.contextmanager
def _trained_afterwards(network: nn.Module) -> Iterator[None]:
    """Train after this context what was trained before: peft freezes adapters that do not compute."""
    trained = trained_parameters(network)
    try:
        yield
    finally:
        for parameter in trained.values():
            parameter.requires_grad_(True)


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

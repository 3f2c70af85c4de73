"""Weights held against the network that they are for: none is left out, left over or filled in with random numbers.

The libraries warn of such weights and go on. A network that was loaded for its weights is useless without one of them.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from flashgrpo.errors import UserError, first_line

DERIVED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
"""Buffers that older releases stored, and that a network computes from its settings."""

Shapes = tuple[str, Collection[int], Collection[int]]
"""Name, shape in the files, shape in the network."""


def load_network(kind: Any, folder: str | Path, what: str, **settings: Any) -> Any:
    """Load a network of diffusers or transformers by its class, and check that the files hold all of its weights.

    Tied weights count once, by whichever of their names the files have. What the class itself declares as ignorable
    (`_keys_to_ignore_on_load_missing`, `_keys_to_ignore_on_load_unexpected`) is ignored.

    Args:
        folder: of the component, or the hub id of a repository.
        what: begins the sentence of an error.
        settings: further arguments of `from_pretrained`.

    Raises:
        UserError: a file is missing or damaged, or weights are missing, unexpected, of another shape or not finite.
    """
    try:
        network, report = kind.from_pretrained(
            folder, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except Exception as error:  # each library, safetensors and torch raise kinds of their own, and all mean this
        raise UserError(f"{what} could not be loaded: {' '.join(str(error).split())[:200]}") from error
    tensors = dict(network.state_dict(keep_vars=True))
    shapes = list(report["mismatched_keys"])
    missing = {*report["missing_keys"], *(name for name, tensor in tensors.items() if tensor.is_meta)}
    missing -= {name for name, *_ in shapes}
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    missing = {name for name in missing if name not in tensors or id(tensors[name]) not in loaded}
    check_weights(what, network, missing, report["unexpected_keys"], shapes)
    return network


def read_safetensors(files: Sequence[Path], what: str) -> dict[str, Tensor]:
    """Read the weights of a network that lie in several files, as they are stored.

    Args:
        what: begins the sentence of an error.

    Raises:
        UserError: there is no file, or one is damaged.
    """
    if not files:
        raise UserError(f"{what} has no files of weights (safetensors); get its files again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{what} could not be loaded: {file.name}: {first_line(error)[:200]}") from error
    return tensors


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Give a network, which may be on the meta device, these tensors as its weights.

    Raises:
        UserError: as `load_network`.
    """
    wanted = network.state_dict()
    shared = wanted.keys() & tensors.keys()
    shapes = [(n, tensors[n].shape, wanted[n].shape) for n in shared if tensors[n].shape != wanted[n].shape]
    check_weights(what, None, wanted.keys() - shared, tensors.keys() - shared, shapes)
    network.load_state_dict({name: tensors[name] for name in shared}, assign=True)
    check_weights(what, network)


def linear_layers(tensors: Mapping[str, Tensor], bias: bool, what: str) -> list[nn.Linear]:
    """Make layers of `NAME.N.weight`, and `NAME.N.bias` where they have a bias, in the order of N.

    Raises:
        UserError: as `load_network`, or a layer does not take what the one before it gives.
    """
    layers: list[nn.Linear] = []
    names = {name.rpartition(".")[0] for name in tensors}
    for name in sorted(names, key=lambda name: [int(part) if part.isdigit() else 0 for part in name.split(".")]):
        own = {full.rpartition(".")[2]: tensor for full, tensor in tensors.items() if full.rpartition(".")[0] == name}
        shape = own["weight"].shape if "weight" in own else (0, 0)
        if len(shape) != 2 or (layers and shape[1] != layers[-1].out_features):
            raise UserError(f"{what}: {name} is no linear layer that takes what comes before it; get the file again")
        layer = nn.Linear(shape[1], shape[0], bias, device="meta")
        load_tensors(layer, own, f"{what}: {name}")
        layers.append(layer.requires_grad_(False))
    return layers


def check_weights(
    what: str,
    network: nn.Module | None,
    missing: Collection[str] = (),
    unexpected: Collection[str] = (),
    shapes: Collection[Shapes] = (),
) -> None:
    """Refuse a network whose weights are not all there and finite.

    Args:
        network: whose values are looked at; None where they are not there yet.

    Raises:
        UserError: names the first of each kind, and says how many there are.
    """
    unexpected = [name for name in unexpected if not DERIVED.search(name)]
    faults = []
    if missing:
        faults.append(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    if unexpected:
        faults.append(f"{_some(unexpected)} {'belongs' if len(unexpected) == 1 else 'belong'} to no part of it")
    if shapes:
        name, found, wanted = min(shapes, key=lambda shape: shape[0])
        faults.append(f"{_some([one[0] for one in shapes])} should be {list(wanted)}, not {list(found)}")
    if faults:
        raise UserError(f"{what} has other weights than its settings say: {'; '.join(faults)}; get its files again")
    for name, tensor in network.state_dict().items() if network is not None else ():
        if not _is_finite(tensor):
            raise UserError(f"{what} has weights that are not finite in {str(tensor.dtype)[6:]}: {name}")


def _some(names: Collection[str]) -> str:
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, in one pass without a copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(torch.isfinite(end)) for end in tensor.aminmax())

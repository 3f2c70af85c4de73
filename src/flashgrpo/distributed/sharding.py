"""How a network lies on the ranks of a world: whole, in shards (FSDP2), with its tokens split (context parallelism)."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError


def place(network: nn.Module, world: World, compute_dtype: torch.dtype | None) -> None:
    """Leave a network whole, or bring this rank's shard of each block to its device; split its tokens by context.

    Args:
        compute_dtype: weights are cast to it for a computation and gradients are reduced in float32; None computes in
            the dtype of the weights.

    Raises:
        UserError: the network cannot be split that way.
    """
    if world.context > 1:
        _split_tokens(network, world)
    if not world.uses_fsdp:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", message=".*returned a view tensor")  # FSDP2's; nobody changes it in place
    holders = world.shard * world.context  # ranks that hold one copy between them
    shape = (world.size // holders, holders)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if shape[0] > 1 else mesh["shard"]
    precision = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    precise = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in precise_parts_of(network) if compute_dtype else ():
        fully_shard(module, mesh=mesh, mp_policy=precise, reshard_after_forward=True)
    for module in [*blocks_of(network), network]:
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)


def precise_parts_of(network: nn.Module) -> list[nn.Module]:
    """Return the modules with weights that diffusers computes in float32 whatever the dtype of the others is.

    A parameter that has no module of its own (Wan's tables of scales and shifts) is cast with its block.
    """
    if isinstance(network, nn.ModuleDict):
        return [part for expert in network.values() for part in precise_parts_of(expert)]
    names = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    parts = ((name.rpartition(".")[2], module) for name, module in network.named_modules())
    return [part for name, part in parts if name in names and any(True for _ in part.parameters())]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, of two experts too, by the class names that diffusers lists for this purpose."""
    if isinstance(network, nn.ModuleDict):
        return [block for expert in network.values() for block in blocks_of(expert)]
    names = getattr(network, "_no_split_modules", None) or getattr(network, "_repeated_blocks", None) or []
    return [module for module in network.modules() if type(module).__name__ in names]


def _split_tokens(network: nn.Module, world: World) -> None:
    """Each rank of a context computes a part of the tokens, and attention sees all of them, through diffusers' hooks.

    What `enable_parallelism` does, without its division by the number of accelerators, which is zero on a CPU.
    """
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig

    plan = getattr(network, "_cp_plan", None)
    if plan is None:
        raise UserError(f"parallel.context: diffusers has no plan to split {type(network).__name__} by tokens")
    if any("encoder_hidden_states" in inputs for inputs in plan.values() if isinstance(inputs, dict)):
        raise UserError(
            f"parallel.context: diffusers would also split the texts of {type(network).__name__}; use parallel.shard"
        )
    heads = network.config["num_attention_heads"]  # type: ignore[index]
    if heads % world.context:
        raise UserError(f"parallel.context: {heads} attention heads cannot be split over {world.context} processes")
    names = ("data", "ring", "ulysses")
    mesh = init_device_mesh(world.device.type, (world.data_size, 1, world.context), mesh_dim_names=names)
    mesh = mesh["ring", "ulysses"]
    config = ContextParallelConfig(ring_degree=1, ulysses_degree=world.context, mesh=mesh)
    config.setup(world.rank, world.size, world.device, mesh)
    processors: list[Any] = [getattr(module, "processor", None) for module in network.modules()]
    for processor in processors:
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = ParallelConfig(context_parallel_config=config)
    apply_context_parallel(network, config, plan)

"""What a run needs of a device's memory, counted on networks of the full size that have no weights (the meta device).

Nothing is computed and nothing is downloaded: every operation only says how large its result is, and what is alive at
the same time is added up. It tells on a laptop whether a recipe fits a card.
"""

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashgrpo.config import RunConfig
from flashgrpo.distributed.sharding import blocks_of
from flashgrpo.distributed.world import local
from flashgrpo.errors import UserError
from flashgrpo.models.load import META, weightless
from flashgrpo.models.lora import trained_parameters
from flashgrpo.processes.flow.cost import (
    branches_of_replay,
    latents_per_unit,
    scored_while_drawn,
    units_per_sample,
)
from flashgrpo.processes.flow.float8 import frozen_layers
from flashgrpo.processes.flow.model import GridPoint
from flashgrpo.prompts import read_prompts
from flashgrpo.scoring.scoring import AHEAD
from flashgrpo.types import Condition

MOMENTS = 3  # copies of what is trained: Adam's two moments, and the average
GRADIENTS = 2  # as backward leaves them, and as they are collected
ENCODED = {"uint8": 1 / 4, "float32": 1.0, "mp4": 1 / 96}  # of a decoded video's bytes, in a request
BY_STEP = 2  # further copies while gradient norms are recorded by step


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the highest of each phase, on one process, with what they are made of.

    Args:
        parameters: numbers of the network, of what is trained of it, and of the autoencoder.
        phases: phase -> part -> bytes.
        host: bytes of the CPU's memory that a process's videos take at most: decoded and not yet scored, where rewards
            are slow; kept of an evaluation; on their way to reward servers.
        processes: that the count is for.
    """

    parameters: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    host: Mapping[str, int]
    processes: int

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of each phase, by name."""
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def highest(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.totals.values())


def estimate(config: RunConfig, processes: int | None = None) -> MemoryEstimate:
    """Count the memory of a run on one of its processes: the samples kept and one micro-batch.

    Attention is taken not to keep its matrix of scores, as no back end for long sequences does. The text encoder is not
    part of it, since it leaves before the network comes, and neither is what cuDNN takes for convolutions.

    Args:
        processes: of the run; the fewest that fit `parallel` when not given.

    Raises:
        UserError: the sizes of the model are neither known nor in a folder, or do not fit the video's, or the processes
            cannot be cut as `parallel` says.
    """
    model, settings, parallel = weightless(config.model), config.rollout, config.parallel
    processes = processes or parallel.fewest_processes
    parallel.check_mesh(processes)
    own = math.ceil(settings.prompts * settings.group_size * parallel.context / processes)
    heldout = math.ceil(_heldout(config) * parallel.context / processes)
    vae, offload = model.pipeline.vae, config.model.offload
    weights, trained = _weights(model, config)
    while_drawing = weights + (0 if offload else _bytes(vae.parameters()))
    while_decoding = (trained if offload else weights) + _bytes(vae.parameters())
    recorded = round(own * _bytes_per_sample(model, _latents_per_sample(config)))
    rest = {"learning": trained * _copies(config), "samples": recorded}
    guided = 2 if settings.guidance_scale > 1 else 1
    scored = branches_of_replay(config.algorithm.score, settings)
    call, decode = cache(partial(_call, model, context=parallel.context)), cache(partial(_decode, model))
    rows = min(own, config.optim.micro_batch)
    update = call(rows * scored, graph=True, backward=True)
    judged = rows * scored if scored_while_drawn(config.algorithm.score, config.uses) else 0
    drawing = max(call(min(own, settings.micro_batch) * guided), judged and call(judged, graph=True))
    if settings.retain:  # where it is left to the run, graphs are kept only if they fit
        rest["graphs"] = round(own * records_per_sample(config) * update / rows)
    phases = {
        "rollout": {"weights": while_drawing, **rest, "work": drawing},
        "decode": {"weights": while_decoding, **rest, "work": decode(min(own, settings.decode_micro_batch))},
        "update": {"weights": while_drawing, **rest, "work": update},
    }
    drawn = while_drawing, call(min(heldout, settings.micro_batch) * guided)
    evaluation = max(drawn, (while_decoding, decode(min(heldout, settings.decode_micro_batch))), key=sum)
    samples = {"learning": rest["learning"], "samples": round(heldout * _bytes_per_sample(model, 0.0))}
    phases["evaluation"] = {"weights": evaluation[0], **samples, "work": evaluation[1]}
    counts = {
        "network": sum(p.numel() for p in model.network.parameters()),
        "trained": sum(p.numel() for p in trained_parameters(model.network).values()),
        "vae": sum(p.numel() for p in vae.parameters()),
    }
    return MemoryEstimate(counts, phases, _host(config, processes, own, heldout), processes)


def _heldout(config: RunConfig) -> int:
    """Count the samples of an evaluation; of a file that is not there yet, as many as of an update."""
    try:
        return len(read_prompts(config.prompts.heldout, "prompts.heldout")) * config.evaluation.samples_per_prompt
    except UserError:
        return config.rollout.prompts * config.rollout.group_size


def _host(config: RunConfig, processes: int, own: int, heldout: int) -> dict[str, int]:
    """Count the bytes of the videos that a process has in the CPU's memory."""
    model, parallel = config.model, config.parallel
    video = model.num_frames * 3 * model.height * model.width * 4
    piece = min(max(own, heldout), config.rollout.micro_batch)
    most = max(own, heldout)
    if parallel.reward_ranks:
        piece, most = config.rollout.decode_micro_batch, max(own, heldout) * processes
    remote = [reward.args.get("encoding", "uint8") for reward in config.rewards.values() if "://" in reward.call]
    return {
        "decoded": min(most, (AHEAD + 1) * piece) * video,
        "kept": min(heldout, math.ceil(config.evaluation.videos * parallel.context / processes)) * video,
        "requests": round(sum(ENCODED.get(encoding, 1.0) for encoding in remote) * min(most, piece) * video),
    }


def _weights(model: Any, config: RunConfig) -> tuple[int, int]:
    """Return the bytes of the weights that one process computes with, and of what is trained among them."""
    shared, networks = config.parallel.shard * config.parallel.context, list(model.experts.values())
    trained = sum(p.numel() * 4 for p in trained_parameters(model.network).values()) // shared
    sizes = [_bytes(network.parameters()) for network in networks]
    gathered = 0 if shared == 1 else 2 * max(_bytes(block.parameters()) for block in blocks_of(networks[0]))
    weights = (max(sizes) if config.model.offload else sum(sizes)) // shared + gathered
    if config.rollout.deterministic_dtype == "float8":
        weights += sum(layer.weight.numel() for layer in frozen_layers(blocks_of(model.network)))
    return weights, trained


def _copies(config: RunConfig) -> int:
    """Count the copies of what is trained that lie beside it."""
    by_step = config.optim.grad_norm_by_step
    if by_step is None:
        by_step = config.parallel.shard * config.parallel.context == 1
    follows = config.algorithm.behaviour.kind != "current"
    base = config.algorithm.objective.needs_reference and config.model.train.kind == "full"  # adapters are switched off
    return MOMENTS + GRADIENTS + (BY_STEP if by_step else 0) + follows + base


def records_per_sample(config: RunConfig) -> float:
    """Count the units of a sample, mean over the groups of the first update."""
    algorithm = config.algorithm
    return units_per_sample(algorithm.explore, algorithm.score, config.rollout, config.seed)


def _latents_per_sample(config: RunConfig) -> float:
    """Count the latents that a sample's record keeps beside its own."""
    algorithm = config.algorithm
    return records_per_sample(config) * latents_per_unit(algorithm.score, algorithm.objective.columns, config.uses)


def _bytes_per_sample(model: Any, recorded: float) -> float:
    """Count the bytes of a sample: its latents, those of its record, and its condition."""
    return math.prod(model.latent_shape) * 4 * (1 + recorded) + _bytes(model.nothing().tensors.values())


def _call(model: Any, rows: int, context: int, graph: bool = False, backward: bool = False) -> int:
    """Count the bytes at the highest of one call of the network on `rows` rows, with its input.

    Args:
        graph: with gradients enabled, as trained steps are drawn and replayed.
        backward: and then differentiated.
    """
    network = model.experts[model.expert_names[0]]
    row = model.nothing().tensors
    condition = Condition({name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in row.items()})
    x = torch.zeros(rows, *model.latent_shape, device=META)
    point = GridPoint(torch.zeros(rows), torch.ones(rows, dtype=torch.float64), torch.ones(rows))
    live = LiveBytes([*network.parameters(), x, *condition.tensors.values()])
    with _without_scores(), torch.set_grad_enabled(graph), live:
        v = model.forward(network, x, point, condition)
        if backward:
            v.square().mean().backward()
    return live.peak // context + x.numel() * 4


def _decode(model: Any, rows: int) -> int:
    """Count the bytes at the highest of decoding `rows` rows at once."""
    vae = model.pipeline.vae
    latents = torch.zeros(rows, *model.latent_shape, device=META)
    live = LiveBytes(vae.parameters())
    with _without_scores(), torch.no_grad(), live:
        model.decode_latents(vae, latents)
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at a time and were made inside of this context.

    Args:
        outside: tensors that were there before and are not counted.
    """

    def __init__(self, outside: Any = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        for tensor in outside:
            self._see(tensor, counts=False)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and look at what came out; what goes in and is not known was there before."""
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, counts=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._see(tensor, counts=True)
        return result

    def _see(self, tensor: Any, counts: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = local(tensor).untyped_storage()  # of a sharded tensor what lies on this rank
        key = storage._cdata
        if key not in self._known:
            self._known[key] = size = storage.nbytes() if counts else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


class _Attention(torch.autograd.Function):
    """Attention that keeps what flash attention keeps: its inputs, its output, and one number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextlib.contextmanager
def _without_scores() -> Iterator[None]:
    """On the meta device torch takes the attention that writes its scores down; here it is the one above.

    Put in its place for the whole process: what checkpointing computes again in the backward pass sees no other kind of
    replacement. That pass stays in this thread, or its tensors would not be counted.
    """
    usual = nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return _Attention.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = attention
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        nn.functional.scaled_dot_product_attention = usual


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

"""What a run needs of a device's memory, counted on networks of the full size that have no weights (the meta device).

Nothing is computed and nothing is downloaded: every operation only says how large its result is, and what is alive at
the same time is added up. It tells on a laptop whether a recipe fits a card. What a call and a sample take each kind of
process says itself (`kinds/`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import size_of
from flashgrpo.distributed.sharding import blocks_of
from flashgrpo.errors import UserError
from flashgrpo.kinds import Memory, kind_of
from flashgrpo.models.lora import trained_parameters
from flashgrpo.prompts import read_prompts
from flashgrpo.scoring.scoring import AHEAD

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

    The text encoder is not part of it, since it leaves before the network comes, and neither is what cuDNN takes for
    convolutions.

    Args:
        processes: of the run; the fewest that fit `parallel` when not given.

    Raises:
        UserError: the sizes of the model are neither known nor in a folder, or do not fit the video's, or the processes
            cannot be cut as `parallel` says.
    """
    memory, settings, parallel = kind_of(config).memory(config), config.rollout, config.parallel
    processes = processes or parallel.fewest_processes
    parallel.check_mesh(processes)
    members = settings.group_size + config.algorithm.credit.anchored
    own = math.ceil(settings.prompts * members * parallel.context / processes)
    heldout = math.ceil(_heldout(config) * parallel.context / processes)
    offload, decoder = config.model.offload, size_of(memory.decoder.parameters())
    weights, trained = _weights(memory, config)
    while_drawing = weights + (0 if offload else decoder)
    while_decoding = (trained if offload else weights) + decoder
    learning, kept = {"learning": trained * _copies(config)}, memory.kept(own)
    phases = {
        "rollout": {"weights": while_drawing, **learning, **kept, "work": memory.drawing(own)},
        "decode": {"weights": while_decoding, **learning, **kept, "work": memory.decoding(own)},
        "update": {"weights": while_drawing, **learning, **kept, "work": memory.update(own)},
    }
    drawn = while_drawing, memory.sampling(heldout)
    evaluation = max(drawn, (while_decoding, memory.decoding(heldout)), key=sum)
    samples = {"samples": round(heldout * memory.sample)}
    phases["evaluation"] = {"weights": evaluation[0], **learning, **samples, "work": evaluation[1]}
    counts = {
        "network": sum(p.numel() for p in memory.network.parameters()),
        "trained": sum(p.numel() for p in trained_parameters(memory.network).values()),
        "vae": sum(p.numel() for p in memory.decoder.parameters()),
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


def _weights(memory: Memory, config: RunConfig) -> tuple[int, int]:
    """Return the bytes of the weights that one process computes with, and of what is trained among them."""
    shared = config.parallel.shard * config.parallel.context
    trained = sum(p.numel() * 4 for p in trained_parameters(memory.network).values()) // shared
    sizes = [size_of(network.parameters()) for network in memory.networks]
    gathered = 0 if shared == 1 else 2 * max(size_of(block.parameters()) for block in blocks_of(memory.networks[0]))
    weights = (max(sizes) if config.model.offload else sum(sizes)) // shared + gathered
    return weights + memory.further_weights, trained


def _copies(config: RunConfig) -> int:
    """Count the copies of what is trained that lie beside it."""
    by_step = config.optim.grad_norm_by_step
    if by_step is None:
        by_step = config.parallel.shard * config.parallel.context == 1
    follows = config.algorithm.behaviour.kind != "current"
    compared = config.algorithm.objective.needs_reference and config.model.train.kind == "full"
    base = compared or config.model.continues_adapters  # other adapters are switched off
    return MOMENTS + GRADIENTS + (BY_STEP if by_step else 0) + follows + base

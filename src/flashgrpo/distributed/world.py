"""The processes of a run: where each computes, which samples are its own, and what they tell each other.

Started by torchrun, by Ray, or not at all: a process alone is a world of one on the same path. The ranks form a mesh:

    replicate  copies of the network; each draws and replays other samples, and their gradients are added up
    shard      ranks that hold one copy between them (FSDP2), each drawing and replaying samples of its own
    context    ranks that compute one sample together, each a part of its tokens (Ulysses)
"""

import contextlib
import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flashgrpo.distributed.gpus import refuse_shared_gpus
from flashgrpo.distributed.heartbeat import Heartbeat
from flashgrpo.distributed.messages import from_bytes, outcome_of, through_json, to_bytes, values_of
from flashgrpo.distributed.rendezvous import find_store
from flashgrpo.distributed.settings import ParallelConfig
from flashgrpo.distributed.shares import cut
from flashgrpo.errors import SharedError, UserError, launcher_number

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Args:
        device: where this one computes.
        shares: how much of each update's samples a data rank takes, in any unit; equal parts where None.
        reward_ranks: the ranks that compute rewards; where there is none, each scores what it has drawn.
        uses_fsdp: whether FSDP2 wraps the network, so that network calls are collectives and gradients come reduced.
        cpu_group: the group that the processes talk over; on the CPU whatever the device.
        heartbeat: keeps the meetings outside of collectives, which are called `meetings`; None where there is none.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    shard: int = 1
    context: int = 1
    shares: Sequence[float] | None = None
    reward_ranks: Sequence[int] = ()
    uses_fsdp: bool = False
    cpu_group: Any = None
    heartbeat: Heartbeat | None = None
    meetings: str = "run"

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The name of what computes."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor() or "cpu"

    @property
    def data_size(self) -> int:
        """Ranks with samples of their own; the ranks of one context share theirs."""
        return self.size // self.context

    @property
    def data_rank(self) -> int:
        """The number of this rank among those with samples of their own."""
        return self.rank // self.context

    def slice(self, total: int) -> slice:
        """Return `share` of this rank as a slice."""
        own = self.share(total)
        return slice(own.start, own.stop)

    def share(self, total: int, rank: int | None = None) -> range:
        """Return which of `total` samples a rank, this one by default, draws; all data ranks have each once."""
        place = (self.rank if rank is None else rank) // self.context
        return cut(total, self.shares or [1.0] * self.data_size, place)

    def scored_by(self, total: int, rank: int) -> range:
        """Return the numbers of `total` samples that a rank scores: its own, unless some ranks score for all."""
        if self.reward_ranks:
            weights = [float(other in self.reward_ranks) for other in range(self.size)]
            return cut(total, weights, rank)
        if rank % self.context:
            return range(0)
        return self.share(total, rank)

    @property
    def scores(self) -> bool:
        """Whether this rank computes rewards."""
        return self.rank in self.reward_ranks if self.reward_ranks else self.rank % self.context == 0

    @property
    def place_on_machine(self) -> tuple[int, int]:
        """The number of this rank among those of its machine, and their number, as far as the launcher says it."""
        return launcher_number("LOCAL_RANK", 0), launcher_number("LOCAL_WORLD_SIZE", 1)

    def gather(self, value: T) -> list[T]:
        """Gather the JSON values of all data ranks, in the order of their samples."""
        return self.all_gather_json(value)[:: self.context]

    def on_all(self, compute: Callable[[], T]) -> list[T]:
        """Compute on every rank; returns the JSON values of all of them.

        Raises:
            SharedError: on every rank, where `compute` raised a `UserError` on one of them.
        """
        if self.size == 1:
            return [through_json(compute())]
        return values_of(self.all_gather_json(outcome_of(compute)))

    def on_main(self, compute: Callable[[], T]) -> T:
        """Compute on the leading rank alone; its JSON value, or its `UserError`, comes to all."""
        if self.size == 1:
            return through_json(compute())
        message = to_bytes(outcome_of(compute)) if self.is_main else torch.empty(0, dtype=torch.uint8)
        self.meet()
        length = torch.tensor([len(message)])
        dist.broadcast(length, 0, group=self.cpu_group)
        if not self.is_main:
            message = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(message, 0, group=self.cpu_group)
        return values_of([from_bytes(message)])[0]

    def all_gather_json(self, value: T) -> list[T]:
        """Gather JSON values of all ranks. Nothing is unpickled, and Python writes and reads floats without loss."""
        if self.size == 1:
            return [through_json(value)]
        message = to_bytes(value)
        self.meet()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self.cpu_group)
        longest = int(max(lengths))
        padded = nn.functional.pad(message, (0, longest - len(message)))
        messages = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(messages, padded, group=self.cpu_group)
        return [from_bytes(text[: int(length)]) for text, length in zip(messages, lengths, strict=True)]

    def meet(self, *ranks: int) -> None:
        """Wait for these ranks, or for all, as long as they live: a collective waits for `parallel.timeout` only."""
        if self.heartbeat:
            among = "-".join(map(str, sorted(ranks))) or "all"
            self.heartbeat.meet(f"{self.meetings}/{among}", len(ranks) or self.size)

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank."""
        return any(self.all_gather_json(flag))

    def max_over_ranks(self, calls: Tensor) -> Tensor:
        """Return how many network calls every rank has to make, given how many each needs, (...): the most of any.

        Ranks that hold the network between them gather its weights in every call, so they have to call together.
        """
        if self.uses_fsdp and self.size > 1:
            calls = calls.clone()
            dist.all_reduce(calls, dist.ReduceOp.MAX, group=self.cpu_group)
        return calls

    @property
    def loss_scale(self) -> float:
        """What each rank's part of a loss sum is multiplied by: FSDP2 averages gradients over ranks."""
        return float(self.size) if self.uses_fsdp else 1.0

    def all_reduce_(self, gradients: Sequence[Tensor]) -> None:
        """Replace this rank's part of each gradient by the sum over all ranks; FSDP2 has done so already."""
        if self.size == 1 or self.uses_fsdp:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def check_replicas(self, tensors: Mapping[str, Tensor]) -> None:
        """Check whether all copies of the tensors have the same checksum, the sum of their bits as integers.

        Raises:
            SharedError: names the ranks that differ from the first copy and a tensor in which they do.
        """
        sums = {name: int(local(tensor).contiguous().view(torch.int32).sum()) for name, tensor in tensors.items()}
        copy = self.shard * self.context if self.uses_fsdp else 1  # ranks that hold one copy between them
        digests = self.all_gather_json(hashlib.sha256(json.dumps(sums).encode()).hexdigest())
        if all(digest == digests[rank % copy] for rank, digest in enumerate(digests)):
            return  # of thousands of tensors and hundreds of ranks, nobody is sent all sums
        for rank, theirs in enumerate(everyone := self.all_gather_json(sums)):
            different = [name for name, value in theirs.items() if value != everyone[rank % copy][name]]
            if different:
                raise SharedError(
                    f"rank {rank} trains another model than rank {rank % copy}: {different[0]} differs; "
                    "are code, checkpoint and packages the same on every machine?"
                )


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, or the tensor where it is whole."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the whole tensor on every rank; all ranks have to call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def single_process(computes: bool = True) -> World:
    """This process by itself, on the first GPU when there is one and it `computes`, else on the CPU."""
    return World(torch.device("cuda", 0) if computes and torch.cuda.is_available() else torch.device("cpu"))


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads; None leaves the tensor library's choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def current_device() -> torch.device:
    """Return the GPU that this thread computes on, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def use_in_thread(threads: int, device: torch.device) -> None:
    """Give a new thread the number of CPU threads and the GPU of the one it comes from."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextlib.contextmanager
def process_group(parallel: ParallelConfig, compute_dtype: str | None = None, strict: bool = True) -> Iterator[World]:
    """Join the world that the launcher's environment names (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    The processes are cut into the mesh that `parallel` asks for. Inside, a process that dies ends all of them
    within `parallel.dead_after` seconds and a few; see `heartbeat.py`.

    Args:
        compute_dtype: that of `model.compute_dtype`, which FSDP2 casts to also where nothing is sharded.
        strict: False lets one process alone do what was trained on a mesh of several.

    Raises:
        UserError: the number of processes does not fit the mesh.
    """
    size, rank = launcher_number("WORLD_SIZE", 1), launcher_number("RANK", 0)
    if rank >= size:
        raise UserError(f"the environment says RANK {rank} of WORLD_SIZE {size}; unset both, or start with torchrun")
    settings = parallel if strict or size > 1 else ParallelConfig()
    uses_fsdp = settings.shard > 1 or compute_dtype is not None  # not for `shard` where one process evaluates
    settings.check_mesh(size)
    device = _claim_device()
    patience = timedelta(seconds=settings.timeout)
    begun_here = (size > 1 or uses_fsdp) and not dist.is_initialized()
    store, heartbeat = find_store(rank, size, settings) if size > 1 else (dist.HashStore(), None)
    try:
        if heartbeat:
            heartbeat.start()
        if begun_here:
            backend = "nccl" if device.type == "cuda" else "gloo"  # a process alone needs a group for FSDP2, too
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        cpu_group = dist.new_group(backend="gloo", timeout=patience) if size > 1 else None
        mesh = settings.shard, settings.context, settings.shares, settings.reward_ranks
        world = World(device, rank, size, *mesh, uses_fsdp, cpu_group, heartbeat)
        refuse_shared_gpus(device, world.all_gather_json)
        yield world
        if heartbeat:
            world.meet()  # nobody leaves, and takes the store away, while others still watch
            heartbeat.stop()
            dist.barrier(group=cpu_group)
        if begun_here:
            dist.destroy_process_group()
    except BaseException as error:
        explained = heartbeat.explain(error) if heartbeat else error
        if begun_here and size == 1 and dist.is_initialized():
            dist.destroy_process_group()
        if explained is error:
            raise
        raise explained from None  # and the group stays: to take it down may wait for ranks that are gone


def _claim_device() -> torch.device:
    """Return this process's GPU, made the current one, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", launcher_number("LOCAL_RANK", 0) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device

"""Bytes that are alive at a time, counted from what operations return: nothing has to be computed for it."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flashgrpo.distributed.world import local


def size_of(tensors: Iterable[Tensor]) -> int:
    """Count the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def highest(call: Callable[[], Any], outside: Iterable[Tensor], graph: bool = False) -> int:
    """Count the bytes at the highest of a call on the meta device, beside those of tensors that were there before.

    Attention is taken not to keep its matrix of scores, as no back end for long sequences does.

    Args:
        graph: with gradients enabled.
    """
    return highest_with(call, lambda result: None, outside, graph)[0]


def highest_with(
    call: Callable[[], Any], further: Callable[[Any], Any], outside: Iterable[Tensor], graph: bool
) -> tuple[int, int]:
    """Count as `highest` does, and once more with a further call on the result: its backward pass, for instance."""
    live = LiveBytes(outside)
    with _without_scores(), torch.set_grad_enabled(graph), live:
        result = call()
        before = live.peak
        further(result)
    return before, live.peak


@no_type_check  # its methods are called for each tensor of each operation, and shapes that tests check are none here
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at a time and were made inside of this context.

    Args:
        outside: tensors that were there before and are not counted.
    """

    def __init__(self, outside: Any = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        self._made: dict[Any, Any] = {}
        for tensor in outside:
            self._see(tensor, counts=False)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, or make what the same call made before, and look at it; what goes in unknown was there before."""
        given: list[Tensor] = []
        key = function, _look(args, given), _look(kwargs, given)
        for tensor in given:
            self._see(tensor, counts=False)
        if made := self._made.get(key):
            result: Any = tuple(torch.empty_strided(*look[:2], dtype=look[2], device="meta") for look in made)
            result = result[0] if len(made) == 1 else result
        else:
            result = function(*args, **(kwargs or {}))
        came: list[Tensor] = []
        look = _look(result, came)
        for tensor in came:
            self._see(tensor, counts=True)
        if not made and _makes_the_same(function, given, came, result):
            self._made[key] = (look,) if isinstance(result, Tensor) else look
        return result

    def _see(self, tensor: Tensor, counts: bool) -> None:
        storage = local(tensor).untyped_storage()  # of a sharded tensor what lies on this rank
        key = storage._cdata
        if key not in self._known:
            self._known[key] = size = storage.nbytes() if counts else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


@no_type_check
def _look(value: Any, tensors: list[Tensor]) -> Any:
    """Return all of an argument that decides what the meta device makes of it; its tensors go into the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.is_meta
    if isinstance(value, tuple | list):
        return tuple([_look(one, tensors) for one in value])
    if isinstance(value, dict):
        return tuple([(name, _look(one, tensors)) for name, one in value.items()])
    return type(value), value


@no_type_check
def _makes_the_same(function: Any, given: list[Tensor], came: list[Tensor], result: Any) -> bool:
    """Tell whether the same call on the meta device makes the same again: blocks are alike, and its kernels are slow.

    What an operation writes into, or returns a view of, is not its own.
    """
    if function._schema.is_mutable or not given or not all(tensor.is_meta for tensor in given):
        return False
    known = {tensor.untyped_storage()._cdata for tensor in given}
    own = all(type(tensor) is Tensor and tensor.untyped_storage()._cdata not in known for tensor in came)
    return own and (isinstance(result, Tensor) or (isinstance(result, tuple) and len(came) == len(result) > 1))


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

"""Bytes that are alive at a time, counted from what operations return: nothing has to be computed for it."""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

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


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at a time and were made inside of this context.

    Args:
        outside: tensors that were there before and are not counted.
    """

    def __init__(self, outside: Any = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}
        self._made: dict[Any, list[tuple[Any, ...]]] = {}
        for tensor in outside:
            self._see(tensor, counts=False)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute, and look at what came out; what goes in and is not known was there before."""
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, counts=False)
        result = self._computed(function, args, kwargs or {})
        for tensor in tree_leaves(result):
            self._see(tensor, counts=True)
        return result

    def _computed(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Compute, or make on the meta device what the same call made before: blocks are alike, its kernels slow."""
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if function._schema.is_mutable or not tensors or not all(tensor.is_meta for tensor in tensors):
            return function(*args, **kwargs)
        key = (function, structure, *map(_look, leaves))
        if looks := self._made.get(key):
            made = [torch.empty_strided(*look[:2], dtype=look[2], device="meta") for look in looks]
            return made[0] if len(made) == 1 else tuple(made)
        result = function(*args, **kwargs)
        made, given = tree_leaves(result), {tensor.untyped_storage()._cdata for tensor in tensors}
        own = all(type(tensor) is Tensor and tensor.untyped_storage()._cdata not in given for tensor in made)
        if own and (isinstance(result, Tensor) or len(made) > 1):
            self._made[key] = [_look(tensor) for tensor in made]
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


def _look(leaf: Any) -> Any:
    """Return all of an argument that decides what the meta device makes of it."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype
    return type(leaf), leaf


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

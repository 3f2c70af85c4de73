"""A stand-in for a GPU: tensors on "cuda" that have values, refuse company, and tell when the host waits.

A tensor on the device wraps one on the CPU, and everything that is computed passes through `_compute`. So

    * an operation that mixes it with a CPU tensor raises, by CUDA's rules: a 0-d CPU tensor is a number, an index may
      lie on the CPU, copies go anywhere;
    * values are real, and whole runs go through unpatched, with the branches that ask for "cuda";
    * whatever makes a GPU's host wait is counted in `waits`, with the line of the project that asked for it: `item`,
      `nonzero`, an index on the CPU, every copy to the CPU, and a copy from there that is not `non_blocking` out of
      pinned memory.

What it is not: kernels are the CPU's, nothing is asynchronous, and there are no collectives on it (NCCL, FSDP2).

`pretend()` comes before anything else imports torch, so it needs a process of its own; it needs g++, a build of torch
without CUDA, and the parts of torch that `lacking()` names.
"""

# ruff: noqa: E402  # torch comes after `pretend()`
import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
import types
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
waits: Counter[tuple[str, str]] = Counter()
"""(kind of wait, "file:function" of the project) -> how often."""


def pretend() -> None:
    """Make torch believe in a GPU, which has no kernels yet: those are `Device`'s."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    guard = Path(tempfile.mkdtemp(prefix="stand-in-")) / "guard.so"
    paths = [f"-I{root}/include", f"-L{root}/lib"]
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", *paths, "-lc10", "-ltorch_cpu"]
    subprocess.run(["g++", HERE / "guard.cpp", "-o", guard, *flags], check=True)
    for library in (root / "lib/libc10.so", root / "lib/libtorch_cpu.so", guard):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import torch

    answers = {
        **{"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0},
        **{"is_bf16_supported": True, "get_device_capability": (9, 0), "get_device_name": "stand-in"},
        **{"memory_allocated": 2**30, "max_memory_allocated": 2**31, "empty_cache": None, "set_device": None},
        **{"get_device_properties": types.SimpleNamespace(total_memory=80 * 2**30, uuid=0)},
        **{
            "reset_peak_memory_stats": None,
            "_lazy_init": None,
            "current_stream": _Stream(),
            "stream": contextlib.nullcontext(),
        },
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.synchronize = lambda *_: _note("synchronize")


class _Stream:
    def wait_stream(self, other: object) -> None:
        """Nothing is asynchronous."""

    def synchronize(self) -> None:
        """Nothing is asynchronous."""


pretend()

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten
SMALL = 2**16  # bytes that CUDA sends from ordinary memory without waiting
CUDA = torch.device("cuda", 0)
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
ASKS = {  # for a value of the device, if only to know a shape
    **{aten._local_scalar_dense.default: "item", aten.is_nonzero.default: "bool", aten.equal.default: "equal"},
    **{aten.nonzero.default: "nonzero", aten.masked_select.default: "masked_select", aten.bincount.default: "bincount"},
    **{aten._unique2.default: "unique", aten.unique_dim.default: "unique"},
    **{aten.linalg_solve.default: "solve", aten._linalg_check_errors.default: "solve"},
    aten.repeat_interleave.Tensor: "repeat_interleave",
}
_pinned: set[int] = set()


class OnDevice(Tensor):
    """A tensor on the stand-in; `raw` has its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> "OnDevice":
        """Wrap a tensor on the CPU."""
        sizes = (raw.shape, raw.stride(), raw.storage_offset())
        return Tensor._make_wrapper_subclass(cls, *sizes, dtype=raw.dtype, layout=raw.layout, device=CUDA)

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    def untyped_storage(self) -> Any:
        return self.raw.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __repr__(self) -> str:
        return f"OnDevice({self.raw!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # or a result on the CPU would be made one of these
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Inside of it tensors can be made on "cuda", in this thread; in others, operations on them serve."""

    def __enter__(self) -> "Device":
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_AcrossDevices())
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device=...) makes them on the CPU, then sends them
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _AcrossDevices(TorchFunctionMode):
    """Do what torch allows between the CPU and a GPU, but not to a subclass: `parameter.data = ...`, pinned memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__ and _on(args[0]) != _on(args[1]):
            fresh = args[1].detach()
            if isinstance(args[0], torch.nn.Parameter):
                fresh = torch.nn.Parameter(fresh, requires_grad=args[0].requires_grad)
            torch.utils.swap_tensors(args[0], fresh)
            return None
        pinned = func == Tensor.pin_memory or (kwargs or {}).pop("pin_memory", False)
        result = args[0].clone() if func == Tensor.pin_memory else func(*args, **(kwargs or {}))
        if pinned:
            _pinned.add(result.untyped_storage().data_ptr())
        return result


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute on the CPU what is asked of the device, or refuse it as CUDA does."""
    tensors: list[Tensor] = []
    inner_args = [_raw(argument, tensors) for argument in args]
    inner_kwargs = {name: _raw(argument, tensors) for name, argument in kwargs.items()}
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if asked != "cuda" and not any(map(_on, tensors)):
        return func(*args, **kwargs)
    if func is aten.copy_.default:
        later = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        _note_copy(args[1], _on(args[0]), later)
    elif func is aten._to_copy.default:
        _note_copy(args[0], asked in (None, "cuda"), kwargs.get("non_blocking", False))
    else:
        _refuse_company(func, args, tensors)
    if func in ASKS:
        _note(ASKS[func])
    if asked == "cuda":
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if func is aten.copy_.default and not _on(args[0]):
        return args[0]
    if asked not in (None, "cuda"):
        return out
    out = _wrapped(out)
    return return_and_correct_aliasing(func, args, kwargs, out) if _aliases(func) and any(map(_on, tensors)) else out


def _raw(argument: Any, tensors: list[Tensor]) -> Any:
    """The same on the CPU; notes the tensors in it."""
    if isinstance(argument, Tensor):
        tensors.append(argument)
        return argument.raw if isinstance(argument, OnDevice) else argument
    if isinstance(argument, (list, tuple)):
        return [_raw(one, tensors) for one in argument]
    return argument


def _wrapped(out: Any) -> Any:
    if isinstance(out, Tensor):
        return OnDevice(out)
    return type(out)(map(_wrapped, out)) if isinstance(out, (list, tuple)) else out


@cache
def _aliases(func: Any) -> bool:
    """Whether a result shares its memory with an input."""
    return func is not aten.detach.default and any(one.alias_info is not None for one in func._schema.returns)


def _on(tensor: Any) -> bool:
    return isinstance(tensor, OnDevice)


def _refuse_company(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise where device and CPU are mixed; an index on the CPU is a wait."""
    indices = [index for index in args[1] if index is not None] if func in INDEXED else []
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        _note("index by a mask")
    mixed = [tensor for tensor in tensors if not _on(tensor) and tensor.ndim > 0]
    if len(mixed) == len(tensors):  # nothing is on the device yet
        return
    if indices and _on(args[0]):
        strangers = [tensor for tensor in mixed if not any(tensor is index for index in indices)]
        for _ in range(len(mixed) - len(strangers)):
            _note("index on the CPU")
        mixed = strangers
    if mixed:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cpu and cuda:0! "
            f"({func}, shapes on the CPU {[tuple(tensor.shape) for tensor in mixed]})"
        )


def _note_copy(source: Tensor, into: bool, later: bool) -> None:
    if _on(source) and not into:
        _note("device to CPU")
    if not _on(source) and into and source.numel():
        pinned = source.untyped_storage().data_ptr() in _pinned
        if not later or not (pinned or source.nbytes <= SMALL):
            _note("CPU to device")


def _note(kind: str) -> None:
    """Count a wait for the innermost line of the project."""
    frame: Any = sys._getframe(1)
    while frame is not None and "/src/flashgrpo/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is not None:
        place = frame.f_code.co_filename.split("/src/flashgrpo/")[-1]
        waits[kind, f"{place}:{frame.f_code.co_name}"] += 1

"""The wire between a trainer and a reward server: videos, prompts and columns one way, numbers the other.

A request is a safetensors file of two tensors, so nothing in it is unpickled:

    request   JSON in UTF-8, one uint8 a byte: the fields of `messages.About`
    videos    pixels (B, F, 3, H, W), uint8 or float32; latents (B, C, F, H, W), float32; or the bytes of B mp4 files

The HTTP header `DIGEST` has its CRC-32. What is not exactly so is refused.
"""

import contextlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from flashgrpo.errors import printable
from flashgrpo.serving.messages import ENCODINGS, About, Encoding, Kind, read_json
from flashgrpo.serving.mp4 import is_mp4, read_mp4, to_mp4

MEDIA_TYPE = "application/x-safetensors"  # not one that a web page may post without being allowed to
DIGEST = "X-CRC32"
ABOUT_LIMIT = 4 * 2**20  # bytes of prompts and columns: parsed, they may take thirty times as much
LAYOUT_LIMIT = 4096  # bytes of the file's own header: two tensors need 200

DTYPES = {torch.uint8: "U8", torch.float32: "F32"}


@dataclass(frozen=True)
class Request:
    """B videos to score, still encoded: `videos` is a tensor of them, or the bytes of mp4 files."""

    about: About
    videos: Tensor

    @property
    def count(self) -> int:
        """The number of videos, B."""
        return len(self.about.prompts)

    def files(self) -> list[memoryview]:
        """Return the mp4 files, B views."""
        payload, sizes = self.videos.numpy().data, self.about.sizes
        return [payload[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]

    @contextlib.contextmanager
    def inputs(self, rows: slice) -> Iterator[Any]:
        """Yield what the reward is called with for these videos: a float32 tensor, or paths of files until it returns.

        Raises:
            ValueError: files that do not decode to what the request says, or values that are not finite.
        """
        if self.about.kind == "files":
            with tempfile.TemporaryDirectory(prefix="flashgrpo-reward-") as folder:
                paths = [Path(folder) / f"{number:04d}.mp4" for number in range(self.count)][rows]
                for path, file in zip(paths, self.files()[rows], strict=True):
                    path.write_bytes(file)
                yield [str(path) for path in paths]
        elif self.about.encoding == "mp4":
            files = self.files()[rows]
            videos = torch.empty(len(files), *self.about.shape)
            for video, file in zip(videos, files, strict=True):
                read_mp4(file, video)
            yield videos
        else:
            yield _as_floats(self.videos[rows])


def pack(
    id: str,
    kind: Kind,
    inputs: Tensor | Sequence[bytes],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    encoding: Encoding = "uint8",
) -> list[memoryview]:
    """Pack a request, in parts that follow each other; float32 values are not copied.

    Args:
        inputs: (B, F, 3, H, W) in [0, 1], latents (B, C, F, H, W), or the bytes of B mp4 files.
        encoding: of pixels; latents always go as float32, files as they are.

    Raises:
        ValueError: values that are not finite, a column that JSON cannot hold, or half a character.
    """
    videos, files, shape = _encoded(kind, inputs, encoding)
    about = {
        "id": id,
        "kind": kind,
        "encoding": "mp4" if files else "uint8" if videos.dtype == torch.uint8 else "float32",
        "prompts": list(prompts),
        "columns": {name: list(column) for name, column in columns.items()},
        "shape": shape,
        "sizes": [len(file) for file in files],
    }
    return _laid_out({"videos": videos, "request": torch.frombuffer(_dump(about), dtype=torch.uint8)})


def buffer() -> FileIO:
    """Open a file in memory, which has as many bytes as have been written, and is gone when it is closed."""
    return FileIO(os.memfd_create("request"), "w+")


def unpack(body: FileIO, limit: int) -> Request:
    """Read a request; the videos stay where they are in `buffer()`, which may be closed.

    Args:
        limit: bytes that the videos may have as uint8, once they are decoded.

    Raises:
        ValueError: one sentence on whatever is not as it has to be.
    """
    if int.from_bytes(os.pread(body.fileno(), 8, 0), "little") > LAYOUT_LIMIT:
        raise ValueError("this is no request: it is no safetensors file of two tensors")
    try:
        tensors = safetensors.torch.load_file(f"/proc/self/fd/{body.fileno()}")
    except (safetensors.SafetensorError, ValueError, LookupError, RuntimeError, TypeError, OSError) as error:
        raise ValueError(f"this is no request: {printable(str(error))}") from error
    if set(tensors) != {"request", "videos"} or tensors["request"].dtype != torch.uint8:
        raise ValueError("a request has the tensors request, as uint8, and videos")
    if tensors["request"].numel() > ABOUT_LIMIT:
        raise ValueError(f"prompts and columns take more than {ABOUT_LIMIT} bytes")
    request = Request(read_json(About, tensors["request"].numpy().tobytes(), "the request"), tensors["videos"])
    _check(request, limit)
    return request


def _check(request: Request, limit: int) -> None:
    """Hold the parts of a request against each other."""
    about, videos, count = request.about, request.videos, request.count
    if about.encoding not in ENCODINGS[about.kind]:
        raise ValueError(f"{about.kind} are not sent as {about.encoding}")
    if any(len(column) != count for column in about.columns.values()):
        raise ValueError(f"every column must have {count} values, one for each prompt")
    if about.encoding != "mp4":
        wanted = torch.uint8 if about.encoding == "uint8" else torch.float32
        if videos.dtype != wanted or videos.ndim != 5 or len(videos) != count or not videos.numel():
            raise ValueError(f"{count} {about.kind} must be one {about.encoding} tensor of five dimensions")
    elif (
        videos.dtype != torch.uint8 or videos.ndim != 1 or sum(about.sizes) != len(videos) or len(about.sizes) != count
    ):
        raise ValueError(f"sizes must be those of {count} files, and add up to their bytes")
    elif not all(is_mp4(file) for file in request.files()):
        raise ValueError("a file is no mp4")
    shape = about.shape if about.encoding == "mp4" else list(videos.shape[1:])
    if about.kind == "pixels" and (len(shape) != 4 or shape[1] != 3):
        raise ValueError(f"{shape} is no shape of a video, frames x 3 x height x width")
    if about.kind == "pixels" and count * math.prod(shape) > limit:
        raise ValueError(f"the videos would decode to more than {limit} bytes")


def _laid_out(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Lay out a safetensors file in parts that stay where they are; `safetensors.torch.save` copies them twice."""
    layout, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        layout[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(layout).encode()
    text += b" " * (-len(text) % 8)  # so that floats are aligned
    payloads = (tensor.numpy().data.cast("B") for tensor in tensors.values())
    return [memoryview(struct.pack("<Q", len(text)) + text), *payloads]


def _as_floats(videos: Tensor) -> Tensor:
    if videos.dtype == torch.uint8:
        return videos.float().div_(255)
    if not math.isfinite(float(videos.sum())) and not bool(torch.isfinite(videos).all()):
        raise ValueError("the videos hold values that are not finite")
    return videos


def _encoded(kind: Kind, inputs: Tensor | Sequence[bytes], encoding: Encoding) -> tuple[Tensor, list[bytes], list[int]]:
    """Return what is sent; and of files, their bytes, and where they are of pixels the shape of one video."""
    shape: list[int] = []
    if isinstance(inputs, Tensor):
        videos = _as_floats(inputs.detach().to("cpu", torch.float32).contiguous())
        if kind == "latents" or encoding == "float32":
            return videos, [], []
        if encoding == "uint8":
            rounded = torch.empty(videos.shape, dtype=torch.uint8)
            for row, video in zip(rounded, videos, strict=True):  # one by one, they stay in the processor's cache
                row.copy_(video.mul(255).round_().clamp_(0, 255))
            return rounded, [], []
        shape, inputs = list(videos.shape[1:]), [to_mp4(video) for video in videos]
    return torch.frombuffer(bytearray().join(inputs), dtype=torch.uint8), list(inputs), shape


def _dump(about: Mapping[str, Any]) -> bytearray:
    try:
        text = bytearray(json.dumps(about, allow_nan=False, ensure_ascii=False).encode())
    except UnicodeEncodeError as error:
        raise ValueError("a prompt or a column holds half a character (a lone surrogate)") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a column cannot be sent as JSON: {printable(str(error))}") from error
    if len(text) > ABOUT_LIMIT:
        raise ValueError(f"prompts and columns take more than {ABOUT_LIMIT} bytes; score fewer videos at once")
    return text

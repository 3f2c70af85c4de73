"""The wire format from a trainer to a reward server: videos, prompts and columns, without anything pickled.

A request is 12 bytes, a header in JSON and a payload:

    "FGRW"   uint32 length of the header   uint32 CRC-32 of header and payload       little-endian
    header   id, kind, encoding, shape of one video, sizes, prompts, columns; blanks up to a multiple of 64 bytes
    payload  B videos: raw in C order, or mp4 files one after the other, whose lengths are `sizes`

What is not exactly so is refused. Nothing is allocated by what a header says before its numbers were held against the
bytes that are there. `answers.py` has the way back.
"""

import json
import math
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from flashgrpo.serving.answers import FORMAT, load_json
from flashgrpo.serving.mp4 import from_mp4, is_mp4, to_mp4

Kind = Literal["pixels", "latents", "files"]
Encoding = Literal["uint8", "float32", "mp4"]

MAGIC = b"FGRW"
PREFIX = struct.Struct("<4sII")
MEDIA_TYPE = "application/x-flashgrpo"  # not one that a web page may post without being allowed to
HEADER_LIMIT = 16 * 2**20  # bytes: prompts and columns, never videos
ALIGNMENT = 64  # of the payload, so that floats can be read where they are
ENCODINGS: Mapping[str, tuple[str, ...]] = {
    "pixels": get_args(Encoding),
    "latents": ("float32",),
    "files": ("mp4",),
}
KEYS = {"id", "kind", "encoding", "shape", "sizes", "prompts", "columns"}


@dataclass(frozen=True)
class Request:
    """B videos to score, still encoded.

    Args:
        shape: of one video, (F, 3, H, W), or of one video's latents, (C, F, H, W); empty for files.
        sizes: bytes of each mp4; empty where the payload is raw.
    """

    id: str
    kind: Kind
    encoding: Encoding
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    prompts: list[str]
    columns: dict[str, list[Any]]
    payload: memoryview

    @property
    def count(self) -> int:
        """The number of videos, B."""
        return len(self.prompts)

    @property
    def alike(self) -> tuple[Any, ...]:
        """Requests for which this is equal can be scored in one call."""
        return self.kind, self.shape, tuple(sorted(self.columns))

    def files(self) -> list[memoryview]:
        """Return the mp4 files, B views into the payload."""
        ends = accumulate(self.sizes)
        return [self.payload[end - size : end] for end, size in zip(ends, self.sizes, strict=True)]

    def read_into(self, videos: Tensor, limit: int) -> None:
        """Write the B videos, or their latents, to the rows of a float32 tensor."""
        if self.encoding == "mp4":
            for row, file in zip(videos, self.files(), strict=True):
                row.copy_(from_mp4(bytes(file), self.shape, limit))
            return
        dtype = torch.uint8 if self.encoding == "uint8" else torch.float32
        received = torch.frombuffer(self.payload, dtype=dtype).view(self.count, *self.shape)
        for row, values in zip(videos, received, strict=True):  # one by one, they stay in the processor's cache
            row.copy_(values)
            if self.encoding == "uint8":
                row.div_(255)
            elif not torch.isfinite(row).all():
                raise ValueError("the videos hold values that are not finite")


def read(requests: Sequence[Request], limit: int) -> Tensor:
    """Decode videos (B, F, 3, H, W) in [0, 1], or latents (B, C, F, H, W), of requests that are `alike`, in float32.

    Args:
        limit: bytes, as uint8, that the videos of a request may have when their mp4 files are decoded.

    Raises:
        ValueError: files that do not decode to what the header says, or values that are no numbers.
    """
    for request in requests:
        if request.encoding == "mp4" and request.count * math.prod(request.shape) > limit:
            raise ValueError(f"the videos would decode to more than {limit} bytes")
    videos = torch.empty(sum(request.count for request in requests), *requests[0].shape)
    start = 0
    for request in requests:
        request.read_into(videos[start : start + request.count], limit)
        start += request.count
    return videos


def pack(
    id: str,
    kind: Kind,
    inputs: Tensor | Sequence[bytes],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    encoding: Encoding = "uint8",
) -> bytes:
    """Pack a request into bytes.

    Args:
        inputs: (B, F, 3, H, W) in [0, 1], latents (B, C, F, H, W), or the bytes of B mp4 files.
        encoding: of pixels; latents always go as float32, files as they are.

    Raises:
        ValueError: values that are not finite, or a column that JSON cannot hold.
    """
    shape: list[int] = []
    parts: list[Any]
    if not isinstance(inputs, Tensor):
        parts, encoding = list(inputs), "mp4"
    else:
        shape = list(inputs.shape[1:])
        encoding = "float32" if kind == "latents" else encoding
        values = inputs.detach().to("cpu", torch.float32)
        if not math.isfinite(float(values.sum())):
            raise ValueError("the videos hold values that are not finite")
        if encoding == "mp4":
            parts = [to_mp4(video) for video in values]
        else:
            if encoding == "uint8":
                values = _rounded(values)
            parts = [values.contiguous().numpy().data.cast("B")]
    header = {
        "id": id,
        "kind": kind,
        "encoding": encoding,
        "shape": shape,
        "sizes": [len(part) for part in parts] if encoding == "mp4" else [],
        "prompts": list(prompts),
        "columns": {name: list(column) for name, column in columns.items()},
    }
    text = _dump_header(header)
    crc = zlib.crc32(text)
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([PREFIX.pack(MAGIC, len(text), crc), text, *parts])


def unpack(body: bytearray) -> Request:
    """Read a request; its payload stays where it is in `body`.

    Raises:
        ValueError: one sentence on whatever is not as it has to be.
    """
    if len(body) < PREFIX.size:
        raise ValueError("the request is too short for its prefix")
    magic, length, crc = PREFIX.unpack_from(body)
    rest = memoryview(body)[PREFIX.size :]
    if magic != MAGIC or (PREFIX.size + length) % ALIGNMENT:
        raise ValueError(f"this is no request of format {FORMAT}")
    if length > min(HEADER_LIMIT, len(rest)):
        raise ValueError(f"a header of {length} bytes is longer than the request or than {HEADER_LIMIT} bytes")
    if zlib.crc32(rest) != crc:
        raise ValueError("the request was damaged on its way: its CRC-32 is another")
    header = load_json(bytes(rest[:length]), "the header")
    if not isinstance(header, dict) or set(header) != KEYS:
        raise ValueError(f"the header must have exactly the keys {', '.join(sorted(KEYS))}")
    return _checked(header, rest[length:])


def _checked(header: Mapping[str, Any], payload: memoryview) -> Request:
    """Hold the parts of a header against each other, and against the bytes that are there."""
    id, kind, encoding = header["id"], header["kind"], header["encoding"]
    prompts, columns = header["prompts"], header["columns"]
    shape, sizes = _numbers(header["shape"], "shape"), _numbers(header["sizes"], "sizes")
    if not isinstance(id, str) or not re.fullmatch(r"[0-9A-Za-z-]{1,64}", id):
        raise ValueError("id must be 1 to 64 letters, digits and hyphens")
    if not isinstance(kind, str) or not isinstance(encoding, str) or encoding not in ENCODINGS.get(kind, ()):
        raise ValueError("kind and encoding are none that go together in this format")
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts must be one text or more")
    if not isinstance(columns, dict) or {"videos", "prompts", "self"} & set(columns):
        raise ValueError("columns must be an object whose keys are other than videos and prompts")
    if not all(isinstance(column, list) and len(column) == len(prompts) for column in columns.values()):
        raise ValueError(f"every column must have {len(prompts)} values, one for each prompt")
    if len(shape) != (0 if kind == "files" else 4) or (kind == "pixels" and shape[1] != 3):
        raise ValueError(f"{list(shape)} is no shape of one of the {kind}")
    known = cast(Kind, kind), cast(Encoding, encoding)
    request = Request(id, *known, shape, sizes, prompts, columns, payload)
    if encoding == "mp4":
        if len(sizes) != len(prompts) or sum(sizes) != len(payload):
            raise ValueError("sizes must have one value for each prompt and add up to the payload")
        if not all(is_mp4(file) for file in request.files()):
            raise ValueError("a file is no mp4")
    elif sizes or len(prompts) * math.prod(shape) * (1 if encoding == "uint8" else 4) != len(payload):
        raise ValueError(f"the payload has {len(payload)} bytes, and the header asks for another number")
    return request


def _rounded(videos: Tensor) -> Tensor:
    rounded = torch.empty(videos.shape, dtype=torch.uint8)
    for row, video in zip(rounded, videos, strict=True):  # one by one, they stay in the processor's cache
        row.copy_(video.mul(255).round_().clamp_(0, 255))
    return rounded


def _dump_header(header: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(header, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a column cannot be sent as JSON: {' '.join(str(error).split())}") from error
    if len(text) > HEADER_LIMIT:
        raise ValueError(f"prompts and columns take more than {HEADER_LIMIT} bytes; score fewer videos at once")
    return text + b" " * (-(PREFIX.size + len(text)) % ALIGNMENT)


def _numbers(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(number) is int and 0 < number < 2**40 for number in value):
        raise ValueError(f"{name} must be a list of whole numbers above 0")
    return tuple(value)

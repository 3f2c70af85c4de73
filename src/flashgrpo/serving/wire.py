"""What a trainer and a reward server say to each other: videos or texts, prompts and columns; and numbers back.

A request is a safetensors file, so nothing in it is unpickled. Its tensors are

    request   JSON in UTF-8, one uint8 a byte: the fields of `About`
    videos    pixels (B, F, 3, H, W), uint8 or float32; or latents (B, C, F, H, W), float32
    0 to B-1  in place of `videos`, uint8: the bytes of B files, mp4 or PNG; or B texts as JSON

The HTTP header `DIGEST` has its CRC-32. Answers are JSON, which pydantic reads strictly: what is passed on has these
types, and no text holds half a character. What is not exactly so is refused.
"""

import contextlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import safetensors.torch
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from torch import Tensor

from flashgrpo.errors import printable
from flashgrpo.scoring.inputs import Input, Kind
from flashgrpo.scoring.loading import checked_values
from flashgrpo.serving import texts
from flashgrpo.serving.layout import laid_out
from flashgrpo.serving.mp4 import ending_of, read_mp4, to_mp4

FORMAT: Literal[5] = 5
MEDIA_TYPE = "application/x-safetensors"  # not one that a web page may post without being allowed to
DIGEST = "X-CRC32"
ABOUT_LIMIT = 4 * 2**20  # bytes of prompts and columns: parsed, they may take thirty times as much
LAYOUT_LIMIT = 2**20  # bytes of the file's own header: a tensor needs 75

Encoding = Literal["uint8", "float32", "mp4"]
Shown = Annotated[str, Field(max_length=300), AfterValidator(printable)]
DTYPES = {"pixels": (torch.uint8, torch.float32), "latents": (torch.float32,), "files": (), "texts": ()}
M = TypeVar("M", bound=BaseModel)


class About(BaseModel):
    """What a request says of its B videos; `shape` (F, 3, H, W) is that of one whose pixels are sent as mp4."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    id: str = Field(pattern=r"^[0-9a-z-]{1,64}$")
    kind: Kind
    prompts: list[str] = Field(min_length=1)
    columns: dict[str, list[Any]]
    shape: list[PositiveInt] | None = None


class Answer(BaseModel):
    """The numbers of request `id`, from the reward "NAME VERSION"; the one component without a name is called ""."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str
    reward: str
    components: dict[str, Any]


class Info(BaseModel):
    """What a server says of itself at /info.

    Args:
        takes: what its reward looks at.
        score_range: lowest and highest number of the reward, where it says so.
        max_bytes: that a request may have, as it is sent and as uint8.
        compares: whether a request has all samples of one prompt group.
        watches: components that are never trained on.
        patience: seconds for which clients repeat what fails, where a recipe does not say; people are slow.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[5] = FORMAT
    name: Shown
    version: Shown
    takes: Annotated[Input, Field(discriminator="kind")]
    score_range: tuple[float | None, float | None] | None = None
    max_bytes: int = Field(gt=0)
    compares: bool = False
    watches: list[str] = Field(default_factory=list, max_length=100)
    patience: float | None = Field(default=None, gt=0, lt=1e9)

    @property
    def reward(self) -> str:
        """Name and version, which tell rewards apart."""
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Request:
    """B samples to score, still encoded: `videos` is a tensor of them, or the bytes of files or texts."""

    about: About
    videos: Tensor | list[memoryview]

    @property
    def count(self) -> int:
        """The number of videos, B."""
        return len(self.about.prompts)

    @contextlib.contextmanager
    def inputs(self, rows: slice) -> Iterator[Any]:
        """Yield what the reward is called with: a float32 tensor, texts, or paths of files until it returns.

        Raises:
            ValueError: what does not decode to what the request says, or values that are not finite.
        """
        some = self.videos[rows]
        if isinstance(some, Tensor):
            yield _as_floats(some)
        elif self.about.kind == "pixels":
            videos = torch.empty(len(some), *self.about.shape or ())
            for video, file in zip(videos, some, strict=True):
                read_mp4(file, video)
            yield videos
        elif self.about.kind == "texts":
            yield [texts.from_bytes(one) for one in some]
        else:
            with tempfile.TemporaryDirectory(prefix="flashgrpo-reward-") as folder:
                paths = [Path(folder) / f"{number:04d}{ending_of(file)}" for number, file in enumerate(some)]
                for path, file in zip(paths, some, strict=True):
                    path.write_bytes(file)
                yield [str(path) for path in paths]


def pack(
    id: str,
    kind: Kind,
    inputs: Tensor | Sequence[bytes] | Sequence[str],
    prompts: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    encoding: Encoding = "uint8",
) -> tuple[list[memoryview], dict[str, str]]:
    """Pack a request.

    Args:
        inputs: (B, F, 3, H, W) in [0, 1], latents (B, C, F, H, W), the bytes of B files, or B texts.
        encoding: of pixels; latents always go as float32, files and texts as they are.

    Returns:
        Its body, in parts that follow each other, of which float32 values are not copied; and its HTTP headers.

    Raises:
        ValueError: values that are not finite, a column that JSON cannot hold, or half a character.
    """
    tensors, shape = _encoded(kind, inputs, encoding)
    columns = {name: list(column) for name, column in columns.items()}
    about = {"id": id, "kind": kind, "prompts": list(prompts), "columns": columns, "shape": shape}
    body = laid_out({**tensors, "request": torch.frombuffer(_dump(about), dtype=torch.uint8)})
    checksum = 0
    for part in body:
        checksum = zlib.crc32(part, checksum)
    return body, {"Content-Type": MEDIA_TYPE, DIGEST: f"{checksum:08x}"}


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
        raise ValueError("this is no request: it is no safetensors file of few tensors")
    try:
        tensors = safetensors.torch.load_file(f"/proc/self/fd/{body.fileno()}")
    except (safetensors.SafetensorError, ValueError, LookupError, RuntimeError, TypeError, OSError) as error:
        raise ValueError(f"this is no request: {printable(str(error))}") from error
    text = tensors.pop("request", torch.empty(0))
    if not _are_bytes([text]):
        raise ValueError("a request has a tensor request, as uint8")
    if text.numel() > ABOUT_LIMIT:
        raise ValueError(f"prompts and columns take more than {ABOUT_LIMIT} bytes")
    about = read_json(About, text.numpy().tobytes(), "the request")
    if any(len(column) != len(about.prompts) for column in about.columns.values()):
        raise ValueError(f"every column must have {len(about.prompts)} values, one for each prompt")
    return Request(about, _videos(about, tensors, limit))


def unpack_answer(body: bytes, id: str, reward: str, count: int) -> dict[str, list[float]]:
    """Return the components of the answer to request `id`, `count` numbers each, NaN for null.

    Raises:
        ValueError: one sentence on whatever is not as it has to be.
    """
    answer = read_json(Answer, body, "the answer")
    if answer.id != id:
        raise ValueError("the answer is to another request")
    if answer.reward != reward:
        raise ValueError(f"the answer is of another reward than {reward}")
    if any(name != printable(name, 100) for name in answer.components):
        raise ValueError("the answer has a component whose name is no short line of text")
    return checked_values(answer.components, count)


def read_json(model: type[M], text: bytes, what: str) -> M:
    """Read strict JSON.

    Raises:
        ValueError: it is something else; one sentence names the field.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(printable(f"{what}{', ' * bool(place)}{place}: {first['msg']}")) from error


def _videos(about: About, tensors: Mapping[str, Tensor], limit: int) -> Tensor | list[memoryview]:
    """Return the videos of a request, held against what it says of them."""
    count, kind, names = len(about.prompts), about.kind, set(tensors)
    videos: Tensor | list[memoryview]
    if names == {"videos"} and tensors["videos"].dtype in DTYPES[kind] and tensors["videos"].ndim == 5:
        videos = tensors["videos"]
        shape = list(videos.shape[1:])
    elif names == {str(row) for row in range(count)} and kind != "latents" and _are_bytes(tensors.values()):
        videos = [tensors[str(row)].numpy().data for row in range(count)]
        shape = about.shape or []
        known = {"pixels": (".mp4",), "files": (".mp4", ".png")}.get(kind)
        if known and not all(ending_of(file) in known for file in videos):
            raise ValueError("a file is no mp4" + " and no PNG" * (kind == "files"))
    else:
        raise ValueError(f"{count} {kind} must be a tensor videos of five dimensions, or bytes called 0, 1, ...")
    if len(videos) != count or 0 in shape:
        raise ValueError(f"{len(videos)} videos of shape {shape} came for {count} prompts")
    if kind == "pixels" and (len(shape) != 4 or shape[1] != 3):
        raise ValueError(f"{shape} is no shape of a video, frames x 3 x height x width")
    if kind == "pixels" and count * math.prod(shape) > limit:
        raise ValueError(f"the videos would decode to more than {limit} bytes")
    return videos


def _are_bytes(tensors: Iterable[Tensor]) -> bool:
    return all(tensor.dtype == torch.uint8 and tensor.ndim == 1 for tensor in tensors)


def _as_floats(videos: Tensor) -> Tensor:
    if videos.dtype == torch.uint8:
        return videos.float().div_(255)
    if not math.isfinite(float(videos.sum())) and not bool(torch.isfinite(videos).all()):
        raise ValueError("the videos hold values that are not finite")
    return videos


def _encoded(
    kind: Kind, inputs: Tensor | Sequence[bytes] | Sequence[str], encoding: Encoding
) -> tuple[dict[str, Tensor], list[int] | None]:
    """Return the tensors of the videos; and where these are mp4 files of pixels, the shape of one video."""
    shape = None
    if isinstance(inputs, Tensor):
        videos = _as_floats(inputs.detach().to("cpu", torch.float32).contiguous())
        if kind == "latents" or encoding == "float32":
            return {"videos": videos}, None
        if encoding == "uint8":
            rounded = torch.empty(videos.shape, dtype=torch.uint8)
            for row, video in zip(rounded, videos, strict=True):  # one by one, they stay in the processor's cache
                row.copy_(video.mul(255).round_().clamp_(0, 255))
            return {"videos": rounded}, None
        shape, inputs = list(videos.shape[1:]), [to_mp4(video) for video in videos]
    files = [texts.to_bytes(one) if isinstance(one, str) else one for one in inputs]
    return {str(row): torch.frombuffer(bytearray(file), dtype=torch.uint8) for row, file in enumerate(files)}, shape


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

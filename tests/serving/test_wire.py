"""The wire format: what comes out is what went in, and whatever else comes in is one sentence."""

import asyncio
import json
import math
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from flashgrpo.errors import printable
from flashgrpo.serving import mp4, server, wire
from flashgrpo.serving.commands import Options
from flashgrpo.serving.http import _chunks
from tests.reward_servers import INFO, brightness, unpack

ALL = slice(None)


def packed(encoding="uint8", shape=(3, 2, 3, 4, 5), **changes) -> bytes:
    videos = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    given = {"id": "abc-1", "kind": "pixels", "inputs": videos, "prompts": ["é", "", "x"], "columns": {"n": [1, 2, 3]}}
    return b"".join(wire.pack(**{**given, "encoding": encoding, **changes})[0])


def again(*args) -> torch.Tensor:
    with unpack(b"".join(wire.pack(*args)[0])).inputs(ALL) as videos:
        return videos


ABOUT = {"id": "a", "kind": "pixels", "prompts": ["x"], "columns": {}, "shape": None}
VIDEOS = torch.zeros(1, 2, 3, 4, 5, dtype=torch.uint8)
CLIP = torch.tensor(list(b"\0\0\0\x18ftypmp42"), dtype=torch.uint8)


def file(about: object = None, videos: torch.Tensor = VIDEOS, tensors: dict | None = None, **changes) -> bytes:
    """A request that says anything at all."""
    text = about if isinstance(about, bytes) else json.dumps({**ABOUT, **changes}).encode()
    tensors = {"videos": videos} if tensors is None else tensors
    return safetensors.torch.save({"request": torch.tensor(list(text), dtype=torch.uint8), **tensors})


@given(st.tuples(st.integers(1, 3), st.integers(1, 4), st.just(3), st.integers(1, 6), st.integers(1, 6)))
@settings(max_examples=20, deadline=None)
def test_pixels_come_back(shape):
    videos = torch.rand(shape)
    assert torch.equal(again("a", "pixels", videos, ["p"] * shape[0], {}, "float32"), videos)
    assert torch.equal(again("a", "pixels", videos, ["p"] * shape[0], {}), (videos * 255).round() / 255)


def test_prompts_columns_latents_and_files():
    request = unpack(packed())
    assert request.about.prompts == ["é", "", "x"]
    assert request.about.columns == {"n": [1, 2, 3]}
    assert (request.about.id, request.count) == ("abc-1", 3)
    with request.inputs(slice(1, 3)) as some, request.inputs(ALL) as every:
        assert torch.equal(some, every[1:])
    latents = torch.randn(2, 4, 3, 2, 2)
    assert torch.equal(again("a", "latents", latents.bfloat16(), ["p", "q"], {}), latents.bfloat16().float())
    files = [b"\0\0\0\x18ftypmp42" + bytes(number) for number in (3, 5)]
    request = unpack(b"".join(wire.pack("a", "files", files, ["p", "q"], {})[0]))
    with request.inputs(slice(1, 2)) as paths:
        assert [Path(path).read_bytes() for path in paths] == files[1:]
    assert not Path(paths[0]).exists()


@pytest.mark.parametrize("text", [b"", b"no JSON", b"5", b'["a"]', b"[" * 100_000, b"\xff"])
def test_a_text_that_is_none(text):
    request = unpack(file(kind="texts", tensors={"0": torch.tensor(list(text), dtype=torch.uint8)}))
    with pytest.raises(ValueError, match="no JSON string"), request.inputs(ALL):
        pass


def peak_bytes(work: Callable[[], object]) -> tuple[object, int]:
    """What is returned, and by how much this process was larger meanwhile than before; torch's memory is in it."""

    def status(key: str) -> int:
        return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    except OSError:
        pytest.skip("this kernel counts no peaks")
    before = status("VmRSS")
    return work(), status("VmHWM") - before


def sent(body: list[memoryview]) -> Request:
    """A request as it comes to the server, chunk by chunk."""
    chunks = _chunks(body)

    async def receive() -> dict:
        chunk = await anext(chunks, b"")
        return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

    return Request({"type": "http", "headers": [(wire.DIGEST.lower().encode(), b"00000000")]}, receive)


def test_each_side_copies_the_videos_once_at_most(monkeypatch):
    """64 MiB: the client sends float32 from where it lies, and the reward is called with what arrived."""
    monkeypatch.setattr(server.zlib, "crc32", lambda *_: 0)
    size = 64 * 2**20
    videos = torch.full((4, 16, 3, 256, 341), 0.5)
    assert abs(videos.nbytes - size) < 2**20
    (body, _), extra = peak_bytes(lambda: wire.pack("a", "pixels", videos, ["p"] * 4, {}, "float32"))
    assert extra < size // 4
    assert any(part.nbytes == videos.nbytes for part in body)
    length = sum(map(len, body))
    here = server.Service(brightness, wire.Info(**INFO), Options())
    arrived, extra = peak_bytes(lambda: asyncio.run(here._arrived(sent(body), length)))
    here.close()
    assert extra < size // 4  # beside the file in memory
    assert os.fstat(arrived.fileno()).st_blocks * 512 < size + 2**20
    with arrived:
        request = wire.unpack(arrived, 2**30)
    with request.inputs(ALL) as seen:
        assert seen.data_ptr() == request.videos.data_ptr()  # where it arrived
        assert torch.equal(seen, videos)


@pytest.mark.parametrize("size", [(33, 47), (200, 201)])  # enlarged by the codec, and odd
def test_mp4_comes_back_at_its_own_size(size):
    coarse = torch.rand(1, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    video = torch.nn.functional.interpolate(coarse, (5, *size), mode="trilinear")[0].transpose(0, 1)
    seen = again("a", "pixels", video[None], ["p"], {}, "mp4")
    assert seen.shape == (1, *video.shape)
    assert (seen[0] - video).abs().mean() < 0.02
    with pytest.raises(ValueError, match="decode to more than 1000 bytes"):
        unpack(b"".join(wire.pack("a", "pixels", video[None], ["p"], {}, "mp4")[0]), 1000)


def test_mp4_of_another_shape_is_no_larger_allocation():
    file = mp4.to_mp4(torch.rand(4, 3, 200, 200))
    for shape, what in (
        ((4, 3, 192, 200), "200 x 200 pixels came for one of 192 x 200"),
        ((4, 3, 64, 64), "200 x 200 pixels came for one of 64 x 64"),
        ((3, 3, 200, 200), "more than 3 frames"),
        ((9, 3, 200, 200), "4 frames in place of 9"),
    ):
        with pytest.raises(ValueError, match=what):
            mp4.read_mp4(file, torch.empty(shape))
    large = mp4.to_mp4(torch.zeros(1, 3, 600, 600))  # ffmpeg itself makes no room for it
    with pytest.raises(ValueError, match=r"cannot be decoded|600 x 600 pixels came"):
        mp4.read_mp4(large, torch.empty(1, 3, 200, 200))
    with pytest.raises(ValueError, match=r"cannot be decoded|frames in place"):
        mp4.read_mp4(file[:300], torch.empty(4, 3, 200, 200))
    with pytest.raises(ValueError, match="no mp4"):  # ffmpeg would open what a playlist names
        mp4.read_mp4(b"#EXTM3U\nfile:///etc/passwd", torch.empty(4, 3, 200, 200))


def unpacked(body: bytes) -> wire.Request | None:
    """What is read, or None where it is refused in one sentence."""
    said = ""
    try:
        return unpack(body)
    except ValueError as error:
        said = str(error)
    assert re.fullmatch(r"\w[^\n]*", said)
    return None


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_requests_give_a_sentence_or_a_request(data):
    """Whatever passes the checksum's notice is whole, or refused in a sentence."""
    body = bytearray(packed())
    if data.draw(st.booleans(), "cut"):
        body = body[: data.draw(st.integers(0, len(body) - 1), "length")]
    else:
        place = data.draw(st.integers(0, len(body) - 1), "place")
        body[place] ^= data.draw(st.integers(1, 255), "flipped")
    if request := unpacked(bytes(body)):
        with request.inputs(ALL) as videos:
            assert len(videos) == request.count == len(request.about.prompts)


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused(noise):
    for body in (noise, struct.pack("<Q", len(noise)) + noise, file(noise)):
        with pytest.raises(ValueError, match=r"^\w[^\n]*$"):
            unpack(body)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(ABOUT)), anything)
@settings(max_examples=100, deadline=None)
def test_fields_that_are_wrong(key, value):
    if request := unpacked(file(**{key: value})):  # the value happened to be a right one
        with request.inputs(ALL) as videos:
            assert videos.shape == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (file(videos=torch.zeros(2, 2, 3, 4, 5, dtype=torch.uint8)), "2 videos of shape .* came for 1 prompts"),
        (file(videos=torch.zeros(1, 2, 3, 0, 5, dtype=torch.uint8)), "1 videos of shape .* came for 1 prompts"),
        (file(prompts=["x", "y"]), "1 videos of shape .* came for 2 prompts"),
        (file(videos=torch.zeros(1, 2, 3, 4, 5, dtype=torch.int8)), "1 pixels must be a tensor videos of five dim"),
        (file(videos=VIDEOS[0]), "1 pixels must be a tensor videos of five dimensions"),
        (file(kind="latents"), "1 latents must be a tensor videos"),
        (file(kind="latents", tensors={"0": CLIP}), "1 latents must be a tensor videos"),
        (file(kind="files"), "1 files must be a tensor videos of five dimensions, or bytes called 0"),
        (file(kind="files", tensors={"0": CLIP, "1": CLIP.clone()}), "1 files must be"),
        (file(kind="files", tensors={"0": CLIP.flip(0)}), "no mp4"),
        (file(kind="files", tensors={"0": CLIP[:0]}), "no mp4"),
        (file(kind="files", tensors={"0": CLIP.bfloat16()}), "1 files must be"),
        (file(kind="texts"), "1 texts must be"),
        (file(kind="files", tensors={"0": CLIP[0]}), "1 files must be"),
        (file(tensors={"0": CLIP}), "no shape of a video"),
        (file(tensors={"0": CLIP}, shape=[2**40, 3, 9, 9]), "decode to more than"),
        (file(videos=torch.zeros(1, 2, 4, 4, 5, dtype=torch.uint8)), "no shape of a video"),
        (file(kind=["pixels"]), "kind: Input should be 'pixels'"),
        (file(prompts=[]), "prompts: List should have at least 1 item"),
        (file(columns={"n": [1, 2]}), "every column must have 1 values"),
        (file(id="../x"), "id: String should match"),
        (file(more=1), "more: Extra inputs are not permitted"),
        (file(b"[" * 100_000), "Invalid JSON"),
        (file(b'{"prompts": ["\\ud800"]}'), "Invalid JSON"),
        (file(b'{"prompts": ["\xff"]}'), "Invalid JSON"),
        (file(b" " * (wire.ABOUT_LIMIT + 1)), "take more than 4194304 bytes"),
        (safetensors.torch.save({"videos": VIDEOS}), "a request has a tensor request, as uint8"),
        (safetensors.torch.save({"request": torch.zeros(9), "videos": VIDEOS}), "a request has a tensor request"),
        (struct.pack("<Q", 2**40), "no safetensors file of few tensors"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_sentences(body, what):
    def refused() -> None:
        with pytest.raises(ValueError, match=what):
            unpack(body)

    assert peak_bytes(refused)[1] < 64 * 2**20  # nothing of what the numbers name was allocated


def test_what_cannot_be_sent():
    for column, what in (([object()] * 3, "as JSON"), ([float("nan")] * 3, "as JSON"), (["\ud83d"] * 3, "half a char")):
        with pytest.raises(ValueError, match=what):
            packed(columns={"n": column})
    with pytest.raises(ValueError, match="not finite"):
        packed(inputs=torch.full((3, 2, 3, 4, 5), torch.nan))
    request = unpack(file(videos=torch.full((1, 2, 3, 4, 5), torch.inf)))
    with pytest.raises(ValueError, match="not finite"), request.inputs(ALL):
        pass


GOOD = {"id": "a", "reward": "r 1", "components": {"x": [1, 2.5]}}


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (json.dumps(GOOD).encode()[:-1], "Invalid JSON"),
        ({**GOOD, "id": "b"}, "another request"),
        ({**GOOD, "reward": "r 2"}, "another reward"),
        ({**GOOD, "more": 1}, "more: Extra inputs"),
        ({**GOOD, "components": [1, 2]}, "components: Input should be"),
        ({**GOOD, "components": {}}, "an empty mapping"),
        ({**GOOD, "components": {"x": [1]}}, "1 numbers for 2"),
        ({**GOOD, "components": {"x": [1, 2, 3]}}, "3 numbers for 2"),
        ({**GOOD, "components": {"x": "12"}}, "must be 2 numbers"),
        ({**GOOD, "components": {"x": [1, True]}}, "not bool"),
        ({**GOOD, "components": {"x": [1, "2"]}}, "not str"),
        ({**GOOD, "components": {"x\x1b[2J": [1, 2]}}, "no short line of text"),
    ],
)
def test_wrong_answers(body, what):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ValueError, match=what):
        wire.unpack_answer(body, "a", "r 1", 2)


@pytest.mark.parametrize("written", ["null", "NaN", "1e999", "1" + "0" * 400])
def test_what_is_not_finite_is_read_as_such(written):
    """The group is dropped, however an answer writes it; `to_json` writes null."""
    text = f'{{"id": "a", "reward": "r 1", "components": {{"x": [1, {written}]}}}}'
    numbers = wire.unpack_answer(text.encode(), "a", "r 1", 2)["x"]
    assert numbers[0] == 1
    assert not math.isfinite(numbers[1])


@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=100, deadline=None)
def test_any_other_answer_is_one_sentence(body):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        wire.unpack_answer(body, "a", "r 1", 2)
    with pytest.raises(ValueError, match=r"^x[^\n]+$"):
        wire.read_json(wire.Info, body, "x")


@given(st.text())
def test_what_a_terminal_is_shown(text):
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= 300
    shown.encode()

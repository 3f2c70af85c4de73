"""The wire format: what comes out is what went in, and whatever else comes in is one sentence."""

import json
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.scoring.loading import checked_values
from flashgrpo.serving import answers, mp4, wire

LIMIT = 2**30


def packed(encoding="uint8", shape=(3, 2, 3, 4, 5), **changes) -> bytes:
    videos = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    given = {"id": "abc-1", "kind": "pixels", "inputs": videos, "prompts": ["é", "", "x"], "columns": {"n": [1, 2, 3]}}
    return wire.pack(**{**given, "encoding": encoding, **changes})


def signed(header: object, payload: bytes = b"", magic: bytes = b"FGRW") -> bytearray:
    """A body with any header at all, whose lengths and checksum are right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-(wire.PREFIX.size + len(text)) % wire.ALIGNMENT)
    return bytearray(wire.PREFIX.pack(magic, len(text), zlib.crc32(text + payload)) + text + payload)


HEADER = {
    "id": "a",
    "kind": "pixels",
    "encoding": "uint8",
    "shape": [2, 3, 4, 5],
    "sizes": [],
    "prompts": ["x"],
    "columns": {},
}
PAYLOAD = bytes(2 * 3 * 4 * 5)


@given(st.tuples(st.integers(1, 3), st.integers(1, 4), st.just(3), st.integers(1, 6), st.integers(1, 6)))
@settings(max_examples=20, deadline=None)
def test_pixels_come_back(shape):
    videos = torch.rand(shape)
    exact = wire.unpack(bytearray(wire.pack("a", "pixels", videos, ["p"] * shape[0], {}, "float32")))
    assert torch.equal(wire.read([exact], LIMIT), videos)
    rounded = wire.unpack(bytearray(wire.pack("a", "pixels", videos, ["p"] * shape[0], {})))
    assert torch.equal(wire.read([rounded], LIMIT), (videos * 255).round() / 255)


def test_prompts_columns_and_requests_that_are_alike():
    first, second = wire.unpack(bytearray(packed())), wire.unpack(bytearray(packed(id="b")))
    assert first.prompts == ["é", "", "x"]
    assert first.columns == {"n": [1, 2, 3]}
    assert first.id == "abc-1"
    assert first.alike == second.alike
    assert first.alike != wire.unpack(bytearray(packed(columns={}))).alike
    both = wire.read([first, second], LIMIT)
    assert both.shape == (6, 2, 3, 4, 5)
    assert torch.equal(both[:3], both[3:])


def test_latents_are_exact_and_files_are_as_they_are():
    latents = torch.randn(2, 4, 3, 2, 2)
    request = wire.unpack(bytearray(wire.pack("a", "latents", latents.bfloat16(), ["p", "q"], {})))
    assert torch.equal(wire.read([request], LIMIT), latents.bfloat16().float())
    files = [b"\0\0\0\x18ftypmp42" + bytes(number) for number in (3, 5)]
    request = wire.unpack(bytearray(wire.pack("a", "files", files, ["p", "q"], {})))
    assert [bytes(file) for file in request.files()] == files


@pytest.mark.parametrize("size", [(33, 47), (200, 201)])  # enlarged by the codec, and odd
def test_mp4_comes_back_at_its_own_size(size):
    coarse = torch.rand(1, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    video = torch.nn.functional.interpolate(coarse, (5, *size), mode="trilinear")[0].transpose(0, 1)
    request = wire.unpack(bytearray(wire.pack("a", "pixels", video[None], ["p"], {}, "mp4")))
    seen = wire.read([request], LIMIT)
    assert seen.shape == (1, *video.shape)
    assert (seen[0] - video).abs().mean() < 0.02
    with pytest.raises(ValueError, match="decode to more than 1000 bytes"):
        wire.read([request], 1000)


def test_mp4_of_another_shape_is_no_larger_allocation():
    file = mp4.to_mp4(torch.rand(4, 3, 200, 200))
    for shape, what in (
        ((4, 3, 64, 64), "200 x 200 pixels came for one of 64 x 64"),
        ((3, 3, 200, 200), "more than 3 frames"),
        ((9, 3, 200, 200), "4 frames in place of 9"),
    ):
        with pytest.raises(ValueError, match=what):
            mp4.from_mp4(file, shape, LIMIT)
    with pytest.raises(ValueError, match="200 x 200"):
        mp4.from_mp4(file, (4, 3, 20, 20), 1000)
    with pytest.raises(ValueError, match=r"cannot be decoded|frames in place"):
        mp4.from_mp4(file[:300], (4, 3, 200, 200), LIMIT)
    with pytest.raises(ValueError, match="no mp4"):  # ffmpeg would open what a playlist names
        mp4.from_mp4(b"#EXTM3U\nfile:///etc/passwd", (4, 3, 200, 200), LIMIT)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_requests_are_refused(data):
    body = bytearray(packed())
    if data.draw(st.booleans(), "cut"):
        body = body[: data.draw(st.integers(0, len(body) - 1), "length")]
    else:
        place = data.draw(st.integers(0, len(body) - 1), "place")
        body[place] ^= data.draw(st.integers(1, 255), "flipped")
    with pytest.raises(ValueError, match=r"\w"):
        wire.unpack(body)


@given(st.binary(max_size=300))
@settings(max_examples=50, deadline=None)
def test_noise_is_refused(noise):
    for body in (noise, wire.MAGIC + noise, bytes(signed(noise))):
        with pytest.raises(ValueError, match=r"\w"):
            wire.unpack(bytearray(body))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(HEADER)), anything)
@settings(max_examples=200, deadline=None)
def test_headers_that_are_signed_and_wrong(key, value):
    body = signed({**HEADER, key: value}, PAYLOAD)
    try:
        request = wire.unpack(body)
    except ValueError:
        return
    assert wire.read([request], LIMIT).shape == (1, 2, 3, 4, 5)  # the value happened to be a right one


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"shape": [2**39, 3, 2**39, 2**39]}, "the header asks for another number"),
        ({"shape": [2, 4, 4, 5]}, "no shape"),
        ({"shape": [2, 3, 4, 0]}, "whole numbers above 0"),
        ({"shape": [True, 3, 4, 5]}, "whole numbers above 0"),
        ({"encoding": "pickle"}, "kind and encoding"),
        ({"kind": ["pixels"]}, "kind and encoding"),
        ({"kind": "latents"}, "kind and encoding"),
        ({"sizes": [1]}, "another number"),
        ({"encoding": "mp4", "sizes": [2**39]}, "add up"),
        ({"encoding": "mp4", "sizes": [120]}, "no mp4"),
        ({"prompts": []}, "one text or more"),
        ({"prompts": ["x", "y"]}, "another number"),
        ({"columns": {"videos": [1]}}, "other than videos"),
        ({"columns": {"n": [1, 2]}}, "one for each prompt"),
        ({"id": "../x"}, "letters"),
        ({"more": 1}, "exactly the keys"),
    ],
)
def test_sentences(changes, what):
    body = signed({**HEADER, **changes}, PAYLOAD)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=what):
            wire.unpack(body)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # nothing of what the header names was allocated
    finally:
        tracemalloc.stop()


def test_deep_and_long_headers():
    with pytest.raises(ValueError, match="no JSON"):
        wire.unpack(signed(b"[" * 100_000))
    with pytest.raises(ValueError, match="no JSON"):
        wire.unpack(signed(b'{"id": NaN}'))
    with pytest.raises(ValueError, match="longer than"):
        wire.unpack(bytearray(wire.PREFIX.pack(wire.MAGIC, 2**32 - wire.PREFIX.size, 0)))


def test_what_cannot_be_sent():
    with pytest.raises(ValueError, match="cannot be sent as JSON"):
        packed(columns={"n": [object()] * 3})
    with pytest.raises(ValueError, match="cannot be sent as JSON"):
        packed(columns={"n": [float("nan")] * 3})
    with pytest.raises(ValueError, match="not finite"):
        packed(inputs=torch.full((3, 2, 3, 4, 5), torch.nan))
    header = {**HEADER, "encoding": "float32"}
    request = wire.unpack(signed(header, torch.full((120,), torch.inf).numpy().tobytes()))
    with pytest.raises(ValueError, match="not finite"):
        wire.read([request], LIMIT)


def test_an_answer_comes_back():
    values = {"": [0.1, -1e300, 3.0]}
    assert answers.unpack_answer(answers.pack_answer("a", "r 1", values), "a", "r 1", 3) == values
    assert checked_values(torch.tensor([1, 2]), 2) == {"": [1.0, 2.0]}
    assert checked_values({"x": (1, 2)}, 2) == {"x": [1.0, 2.0]}


GOOD = {"id": "a", "reward": "r 1", "components": {"x": [1, 2.5]}}


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "no JSON"),
        (b"\xff", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (json.dumps(GOOD).encode()[:-1], "no JSON"),
        ({**GOOD, "id": "b"}, "another request"),
        ({**GOOD, "reward": "r 2"}, "another reward"),
        ({**GOOD, "more": 1}, "exactly the keys"),
        ({**GOOD, "components": [1, 2]}, "must be an object"),
        ({**GOOD, "components": {}}, "an empty mapping"),
        ({**GOOD, "components": {"x": [1]}}, "1 numbers for 2"),
        ({**GOOD, "components": {"x": [1, 2, 3]}}, "3 numbers for 2"),
        ({**GOOD, "components": {"x": "12"}}, "must be 2 numbers"),
        ({**GOOD, "components": {"x": [1, True]}}, "not bool"),
        ({**GOOD, "components": {"x": [1, "2"]}}, "not str"),
        ({**GOOD, "components": {"x": [1, None]}}, "not NoneType"),
        ({**GOOD, "components": {"x": [1, 10**400]}}, "inf"),
        (json.dumps(GOOD).replace("2.5", "NaN").encode(), "no JSON"),
        (json.dumps(GOOD).replace("2.5", "1e999").encode(), "inf"),
    ],
)
def test_wrong_answers(body, what):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ValueError, match=what):
        answers.unpack_answer(body, "a", "r 1", 2)


@given(st.binary(max_size=60) | anything.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=100, deadline=None)
def test_any_other_answer_is_one_sentence(body):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        answers.unpack_answer(body, "a", "r 1", 2)

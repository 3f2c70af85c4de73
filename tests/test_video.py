"""Pictures are what their owner sees, in whatever way they are stored."""

import io
import subprocess

import numpy as np
import pytest
import torch
from imageio_ffmpeg import read_frames
from PIL import Image, ImageCms, features

from flashgrpo.errors import UserError
from flashgrpo.video import cropped, image_bytes, open_image, write_mp4

# 3 pixels wide and 2 high; red is top left, blue bottom right
SEEN = np.array(
    [[[255, 0, 0], [0, 255, 0], [90, 90, 90]], [[255, 255, 0], [0, 0, 0], [0, 0, 255]]], dtype=np.uint8
).repeat(16, axis=0).repeat(16, axis=1)  # fmt: skip
TURN = {  # how the pixels of `SEEN` lie in a file of that orientation (EXIF 2.32, tag 274)
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[:, ::-1],
}


def pixels(image) -> np.ndarray:
    picture = open_image(image)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", TURN)
def test_orientation(tmp_path, kind, orientation):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this PIL reads no AVIF")
    exif = Image.Exif()
    exif[274] = orientation
    lying = Image.fromarray(np.ascontiguousarray(TURN[orientation](SEEN)))
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind in ("JPEG", "AVIF") else {}
    lying.save(tmp_path / "a", kind, exif=exif, **options)
    middles = pixels(str(tmp_path / "a"))[8::16, 8::16].astype(int)
    assert np.abs(middles - SEEN[8::16, 8::16]).max() <= (30 if kind in ("JPEG", "AVIF") else 0)


def stored(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def palette() -> Image.Image:
    picture = Image.fromarray(np.array([[0, 1], [2, 0]], dtype=np.uint8)).convert("P")
    picture.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    return picture


WAYS = {
    "16-bit grey": (Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)), {}, [0, 1, 128, 255]),
    "grey": (Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8)), {}, [0, 128, 255]),
    "black and white": (Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1"), {}, [0, 255]),
    "palette": (palette(), {}, [[255, 0, 0], [0, 0, 255], [0, 255, 0], [255, 0, 0]]),
    "transparent colour of a palette": (
        palette(), {"transparency": 1}, [[255, 0, 0], [255] * 3, [0, 255, 0], [255, 0, 0]],
    ),
    "half transparent colours": (
        palette(), {"transparency": bytes([255, 128, 0])}, [[255, 0, 0], [127, 127, 255], [255] * 3, [255, 0, 0]],
    ),
    "transparent colour": (Image.new("RGB", (1, 1), (9, 8, 7)), {"transparency": (9, 8, 7)}, [255]),
    "transparent grey": (Image.fromarray(np.array([[10, 20]], dtype=np.uint8)), {"transparency": 10}, [255, 20]),
    "alpha": (Image.fromarray(np.array([[[255, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)), {}, [255, 204]),
    "grey and alpha": (Image.merge("LA", [Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 0)]), {}, [255]),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_store_a_picture(way):
    picture, options, seen = WAYS[way]
    expected = np.array([[level] * 3 if isinstance(level, int) else level for level in seen])
    assert np.array_equal(pixels(stored(picture, **options)).reshape(-1, 3), expected)


def test_what_other_formats_hold():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(pixels(stored(red, "JPEG"))[4, 4].astype(int) - [255, 0, 0]).max() < 8
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        moving = stored(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(moving)[4, 4].astype(int) - [255, 0, 0]).max() < 8
    deep = np.zeros((2, 2), dtype=np.int32)
    deep[0, 0] = 70_000
    for odd in (Image.fromarray(deep), Image.fromarray(deep.astype(np.float32))):
        with pytest.raises(UserError, match="whose white is not known"):
            open_image(stored(odd, "TIFF"))


def test_colours_of_a_profile_are_converted():
    picture = Image.new("RGB", (4, 4), (200, 30, 30))
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert pixels(stored(picture, icc_profile=same))[0, 0].tolist() == [200, 30, 30]
    assert pixels(stored(picture, icc_profile=b"no profile"))[0, 0].tolist() == [200, 30, 30]
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert pixels(stored(picture, icc_profile=lab))[0, 0].tolist() == [200, 30, 30]  # of no use to RGB


def test_pictures_of_the_hub(tmp_path):
    content = stored(Image.new("RGB", (3, 2), "red"))
    (tmp_path / "a.png").write_bytes(content)
    forms = [str(tmp_path / "a.png"), content, {"bytes": content, "path": None}, {"path": str(tmp_path / "a.png")}]
    for form in (*forms, {"bytes": content, "path": "gone.png"}, Image.new("RGB", (3, 2), "red")):
        assert open_image(form).size == (3, 2)
    assert len({image_bytes(form) for form in forms}) == 1


def test_what_cannot_be_read(tmp_path, monkeypatch):
    whole = stored(Image.fromarray(SEEN), "PNG")
    (tmp_path / "cut.png").write_bytes(whole[:-60])
    with pytest.raises(UserError, match=r"image .*cut.png cannot be read: image file is truncated"):
        open_image(str(tmp_path / "cut.png"))
    with pytest.raises(UserError, match="a picture in column image cannot be read"):
        open_image(stored(Image.fromarray(SEEN), "JPEG")[:300])
    with pytest.raises(UserError, match="no picture that is known"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # PIL would start Ghostscript
    for odd, sentence in (({"bytes": None}, "not NoneType"), (3.5, "not float"), ([1], "not list")):
        with pytest.raises(UserError, match=sentence):
            open_image(odd)
    for path in ("a\0b", str(tmp_path), str(tmp_path / "gone"), "n" * 5000):
        with pytest.raises(UserError, match=r"image .* cannot be read: "):
            open_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="decompression bomb"):
        open_image(stored(Image.new("1", (60, 60))))
    assert open_image(stored(Image.new("1", (40, 40)))).size == (40, 40)  # large, and no bomb


@pytest.mark.parametrize(
    ("size", "frame", "kept"),
    [
        ((90, 70), (90, 70), (90, 70)),
        ((180, 140), (90, 70), (180, 140)),  # of the same proportions: nothing is cut
        ((100, 100), (80, 40), (100, 50)),
        ((480, 832), (832, 480), (480, 277)),
        ((1, 500), (832, 480), (1, 1)),
    ],
)
def test_a_picture_is_cut_to_the_frame_around_its_middle(size, frame, kept):
    picture = Image.new("RGB", size, "white")
    picture.putpixel((size[0] // 2, size[1] // 2), (255, 0, 0))
    inner = cropped(picture, *frame)
    assert inner.size == kept
    assert size[0] == 1 or (255, 0, 0) in [color for _, color in inner.getcolors(2**20)]


def test_no_code_runs_between_fork_and_exec(tmp_path, monkeypatch):
    """A process with threads may crash or hang there; an interrupt is kept from ffmpeg all the same."""
    started = []

    class Seen(subprocess.Popen):
        def __init__(self, command, **options):
            started.append(options)
            super().__init__(command, **options)

    monkeypatch.setattr(subprocess, "Popen", Seen)
    write_mp4(tmp_path / "a.mp4", torch.rand(3, 3, 16, 16), 8.0)
    *_, last = read_frames(str(tmp_path / "a.mp4"))
    assert last
    assert all(not options.get("preexec_fn") for options in started)
    assert sum(options.get("start_new_session", False) for options in started) == 2

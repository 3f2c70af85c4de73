"""Rewards measured from pixels for the world of moving shapes: no network, no training, deterministic.

``agreement`` asks whether a clip shows what its caption says, attribute by attribute. ``persistence`` and
``background`` look at the clip alone and serve as watched-only rewards: training never sees them, so they
fall when a model finds a way to please ``agreement`` with broken videos.

A video is measured once, in four steps: the background is the median border colour; the foreground mask is
each pixel's distance from it; centroid and area per frame follow from the mask; and the mask is compared
with every shape drawn at that centroid and area. Everything is graded, so a group of samples has a spread.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashgrpo.types import PlantedPair, Prompt

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.15, 0.15),
    "yellow": (0.95, 0.85, 0.15),
    "green": (0.15, 0.75, 0.20),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.20, 0.25, 0.90),
    "purple": (0.65, 0.20, 0.80),
}
"""Colour name -> RGB in [0, 1]."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle")

DIRECTIONS: dict[str, tuple[float, float]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Direction name -> unit vector (x, y), y pointing down as pixel rows do."""

SPEEDS: dict[str, float] = {"slowly": 1.0, "quickly": 2.5}
"""Speed name -> pixels per frame in a frame that is ``REFERENCE_WIDTH`` wide; other widths scale."""

REFERENCE_WIDTH = 48

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
}
"""Prompt-file column -> its vocabulary."""

_CAPTION = re.compile(r"\s*an?\s+(\w+)\s+(\w+)\s+moving\s+(\w+)\s+(\w+)\s*\.?\s*", re.IGNORECASE)


def parse_caption(caption: str) -> dict[str, str]:
    """``"a red circle moving left slowly"`` -> ``{"color": "red", "shape": "circle", ...}``."""
    match = _CAPTION.fullmatch(caption)
    words = [word.lower() for word in match.groups()] if match else []
    if len(words) != 4 or any(word not in known for word, known in zip(words, ATTRIBUTES.values(), strict=True)):
        raise ValueError(
            f'The prompt "{caption}" is not of the form "a COLOR SHAPE moving DIRECTION SPEED"; '
            "use such captions or give the columns color, shape, direction and speed."
        )
    return dict(zip(ATTRIBUTES, words, strict=True))


def coverage(shape: str, center: Tensor, area: Tensor, height: int, width: int) -> Tensor:
    """Share of every pixel that a shape covers: ``clip(1/2 - signed distance, 0, 1)``, so edges are antialiased.

    All shapes of one ``area`` cover the same number of pixels, and ``center`` is the centre of mass.

    Args:
        center: (..., 2), x and y in pixels; the middle of the top left pixel is (0, 0).
        area: (...), in square pixels.

    Returns:
        (..., height, width) in [0, 1].
    """
    dtype = center.dtype
    x = (torch.arange(width, dtype=dtype) - center[..., 0, None])[..., None, :]  # (..., 1, W)
    y = (torch.arange(height, dtype=dtype) - center[..., 1, None])[..., :, None]  # (..., H, 1)
    if shape == "circle":
        inradius = (area / math.pi).sqrt()
        distance = (x.square() + y.square()).sqrt()
    elif shape == "square":
        inradius = area.sqrt() / 2
        distance = torch.maximum(x.abs(), y.abs())
    elif shape == "triangle":  # equilateral, pointing up; area = 3 sqrt(3) inradius^2
        inradius = (area / (3 * math.sqrt(3))).sqrt()
        distance = torch.maximum(y, math.sqrt(0.75) * x.abs() - 0.5 * y)
    else:
        raise ValueError(f'Unknown shape "{shape}"; known are {", ".join(SHAPES)}.')
    return (0.5 + inradius[..., None, None] - distance).clamp_(0, 1)


@dataclass(frozen=True)
class Measurement:
    """What can be read off a batch of videos. B clips, F frames, S shapes."""

    background: Tensor  # (B, 3), median border colour of the clip
    color: Tensor  # (B, 3), mean foreground colour
    area: Tensor  # (B, F), soft foreground pixels
    velocity: Tensor  # (B, 2), pixels per frame at the reference width
    overlap: Tensor  # (B, F, S), soft intersection over union with each shape
    visible: Tensor  # (B, F), 0..1: a single compact object stands out from the background
    outside: Tensor  # (B, F, H, W), 1 away from the visible object: its best-fitting shape and two pixels around


def measure(videos: Tensor, lap: float | None = None) -> Measurement:
    """Measure videos (B, F, 3, H, W) in the four steps that this file begins with.

    Args:
        lap: pixels, at the reference width, after which an object begins its lane again; None where it never does.
    """
    if videos.ndim != 5 or videos.shape[2] != 3:
        raise ValueError(f"videos must have shape (B, F, 3, H, W), got {tuple(videos.shape)}.")
    videos = torch.nan_to_num(videos.detach().float().cpu()).clamp(0, 1)
    clips, frames, _, height, width = videos.shape
    edges = (videos[..., :2, :], videos[..., -2:, :], videos[..., :2], videos[..., -2:])
    border = torch.cat([edge.flatten(3) for edge in edges], dim=3)  # (B, F, 3, border pixels)
    background = border.transpose(1, 2).flatten(2).median(dim=2).values
    distance = (videos - background[:, None, :, None, None]).square().sum(dim=2).sqrt()  # (B, F, H, W)

    # The contrast is what the most salient half per cent of pixels have, in the frame where it is largest.
    salient = max(1, height * width // 200)
    contrast = distance.flatten(2).topk(salient, dim=2).values.mean(dim=2).amax(dim=1)  # (B,)
    mask = (distance / contrast.clamp_min(0.05)[:, None, None, None] - 0.1).div_(0.8).clamp_(0, 1)

    area = mask.sum(dim=(2, 3))
    rows, columns = torch.arange(height).float(), torch.arange(width).float()
    x = (mask.sum(dim=2) * columns).sum(dim=2) / area.clamp_min(1e-6)
    y = (mask.sum(dim=3) * rows).sum(dim=2) / area.clamp_min(1e-6)
    center = torch.stack([x, y], dim=2)  # (B, F, 2)
    templates = torch.stack([coverage(shape, center, area, height, width) for shape in SHAPES], dim=2)
    intersection = torch.minimum(templates, mask[:, :, None]).sum(dim=(3, 4))
    overlap = intersection / (area[:, :, None] + templates.sum(dim=(3, 4)) - intersection).clamp_min(1e-6)

    share = area / (height * width)
    visible = _ramp(contrast, 0.1, 0.25)[:, None] * _ramp(share, 0.005, 0.02) * (1 - _ramp(share, 0.25, 0.4))
    visible = visible * _ramp(overlap.amax(dim=2), 0.4, 0.7)
    solid = mask.square()
    color = (videos * solid[:, :, None]).sum(dim=(1, 3, 4)) / solid.sum(dim=(1, 2, 3)).clamp_min(1e-6)[:, None]
    best = overlap.argmax(dim=2)[:, :, None, None, None].expand(-1, -1, 1, height, width)
    inside = torch.nn.functional.max_pool2d(templates.gather(2, best).flatten(0, 1), 5, stride=1, padding=2)
    seen = visible * area
    step = _slope(center, seen) if lap is None else _mean_step(center, seen, lap * width / REFERENCE_WIDTH)
    return Measurement(
        background=background,
        color=color,
        area=area,
        velocity=step * (REFERENCE_WIDTH / width),
        overlap=overlap,
        visible=visible,
        outside=1 - inside.view(clips, frames, height, width) * visible[..., None, None],
    )


def _ramp(value: Tensor, low: float, high: float) -> Tensor:
    """0 below ``low``, 1 above ``high``, linear between."""
    return ((value - low) / (high - low)).clamp(0, 1)


def _mean_step(center: Tensor, weight: Tensor, lap: float) -> Tensor:
    """Mean step (B, 2) of (B, F, 2) on a circle of length ``lap``: the angle of the sum of all steps' unit vectors.

    A frame that shows both ends of the lane, as the first of a new lap may, spoils two of the steps and not the path.
    """
    angle = center.diff(dim=1) * (2 * math.pi / lap)
    weight = (weight[:, 1:] * weight[:, :-1]).sqrt()[..., None]
    return torch.atan2((weight * angle.sin()).sum(dim=1), (weight * angle.cos()).sum(dim=1)) * lap / (2 * math.pi)


def _slope(center: Tensor, weight: Tensor) -> Tensor:
    """Weighted least-squares slope of (B, F, 2) over the frames, (B, 2); zero when fewer than two frames count."""
    weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-6)
    time = torch.arange(center.shape[1], dtype=center.dtype).expand_as(weight)
    time = time - (weight * time).sum(dim=1, keepdim=True)
    spread = (weight * time.square()).sum(dim=1, keepdim=True)
    return (weight[..., None] * time[..., None] * center).sum(dim=1) / spread.clamp_min(0.25)


def _wanted(prompts: Sequence[str], columns: dict[str, Sequence[str]], name: str) -> list[int]:
    """Index into ``ATTRIBUTES[name]`` for every prompt, from its column or else from its caption."""
    known = ATTRIBUTES[name]
    values = columns.get(name) or [parse_caption(prompt)[name] for prompt in prompts]
    if len(values) != len(prompts):
        raise ValueError(f'The column "{name}" has {len(values)} values for {len(prompts)} prompts.')
    for prompt, value in zip(prompts, values, strict=True):
        if value not in known:
            raise ValueError(f'The prompt "{prompt}" has the {name} "{value}"; known are {", ".join(known)}.')
    return [known.index(value) for value in values]


def agreement(videos: Tensor, prompts: Sequence[str], **columns: Sequence[str]) -> dict[str, Tensor]:
    """How far each clip shows what its caption says; the overall reward is the mean of the four components.

    Args:
        videos: (B, F, 3, H, W) in [0, 1].
        prompts: B captions.
        columns: lists ``color``, ``shape``, ``direction``, ``speed`` of B words; the caption gives what is absent.

    Returns:
        ``{"color", "shape", "direction", "speed"}``, each (B,) in [0, 1]:

        - color, shape: softmax over the vocabulary of similarity, so 1 minus the belief in any other word;
        - direction: cosine between motion and the wanted direction, 0 when it points away or nothing moves;
        - speed: ``exp(-ln(speed / wanted)^2 / (2 0.35^2))``; the other speed of the vocabulary gives 0.03.

        An object that is absent, or no compact object at all, gives 0.
    """
    return agreement_of(measure(videos), prompts, columns)


def agreement_of(seen: Measurement, prompts: Sequence[str], columns: dict[str, Sequence[str]]) -> dict[str, Tensor]:
    """Return the components of ``agreement`` of what was measured."""
    if len(prompts) != len(seen.area):
        raise ValueError(f"There are {len(seen.area)} videos for {len(prompts)} prompts.")
    wanted = {name: torch.tensor(_wanted(prompts, columns, name)) for name in ATTRIBUTES}
    visible = seen.visible.mean(dim=1)

    palette = torch.tensor(list(COLORS.values()))
    color = torch.softmax(-torch.cdist(seen.color, palette).square() / 0.04, dim=1)
    belief = torch.softmax(seen.overlap / 0.025, dim=2)  # shapes of one area overlap by 0.7 to 0.85
    shape = (belief * seen.visible[..., None]).mean(dim=1)

    pace = seen.velocity.norm(dim=1)
    heading = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32)[wanted["direction"]]
    cosine = (seen.velocity * heading).sum(dim=1) / pace.clamp_min(1e-6)
    target = torch.tensor(list(SPEEDS.values()))[wanted["speed"]]
    speed = torch.exp(-(pace.clamp_min(1e-3) / target).log().square() / (2 * 0.35**2))
    return {
        "color": visible * color.gather(1, wanted["color"][:, None])[:, 0],
        "shape": shape.gather(1, wanted["shape"][:, None])[:, 0],
        "direction": visible * cosine.clamp_min(0) * _ramp(pace, 0.1, 0.5),
        "speed": visible * speed,
    }


def depiction(videos: Tensor, prompts: Sequence[str], **columns: Sequence[str]) -> dict[str, Tensor]:
    """How far each image shows what its caption says: ``color`` and ``shape`` of ``agreement``, (B,) in [0, 1] each."""
    found = agreement(videos, prompts, **columns)
    return {name: found[name] for name in ("color", "shape")}


def persistence(videos: Tensor, prompts: Sequence[str], **columns: Sequence[str]) -> Tensor:
    """Score one object of stable area in every frame, (B,) in [0, 1]. ``prompts`` and ``columns`` are not looked at.

    The mean over frames of visibility times ``exp(-ln(area / median area)^2 / (2 0.25^2))``.
    """
    seen = measure(videos)
    typical = seen.area.median(dim=1, keepdim=True).values.clamp_min(1e-3)
    stable = torch.exp(-(seen.area.clamp_min(1e-3) / typical).log().square() / (2 * 0.25**2))
    return (seen.visible * stable).mean(dim=1)


def background(videos: Tensor, prompts: Sequence[str], **columns: Sequence[str]) -> Tensor:
    """Score a background uniform in space and time, (B,) in [0, 1]. ``prompts`` and ``columns`` are not looked at.

    ``exp(-e / 0.05)`` with e the mean absolute difference from the clip's one background colour, away from the object.
    """
    seen = measure(videos)
    videos = torch.nan_to_num(videos.detach().float()).clamp(0, 1)
    error = (videos - seen.background[:, None, :, None, None]).abs().mean(dim=2)
    mean_error = (error * seen.outside).sum(dim=(1, 2, 3)) / seen.outside.sum(dim=(1, 2, 3)).clamp_min(1)
    return torch.exp(-mean_error / 0.05)


def _planted_pair() -> PlantedPair:
    """Draw a red circle that moves left slowly, and a blue one that moves right."""
    words = dict(zip(ATTRIBUTES, ("red", "circle", "left", "slowly"), strict=True))
    prompt = Prompt("a red circle moving left slowly", words)

    def clip(color: str, direction: str) -> Tensor:
        path = torch.linspace(-4.0, 4.0, 9)[:, None] * torch.tensor(DIRECTIONS[direction], dtype=torch.float32)
        covered = coverage(
            "circle", REFERENCE_WIDTH / 2 + path, torch.full((9,), 169.0), REFERENCE_WIDTH, REFERENCE_WIDTH
        )
        return torch.lerp(torch.tensor(0.35), torch.tensor(COLORS[color])[:, None, None], covered[:, None])

    return PlantedPair(prompt, worse=clip("blue", "right"), better=clip("red", "left"))


agreement.planted_pair = _planted_pair  # type: ignore[attr-defined]
depiction.planted_pair = _planted_pair  # type: ignore[attr-defined]

"""The words of the project: what crosses from one file to the next, and the two open sets, models and rewards.

Shapes are written with these letters throughout:

    B  samples (videos) of a rollout          P  prompt groups of an update       G  samples per group (group size)
    T  recorded transitions                   N  denoising steps                  k  index of a denoising step
    C F H W  channels, frames, height, width (of latents, or of videos where it says so)       R  reward components
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

Latents = Float32[Tensor, "batch channels frames height width"]
IMAGE_COLUMNS = ("image", "last_image")
"""Of a prompt: the first frame of a video (or the picture that becomes another), and the last."""
LoraStyle = Literal["diffusers", "comfyui"]
Videos = Float[Tensor, "batch video_frames 3 video_height video_width"]
Waves = Float[Tensor, "batch sound_channels samples"]
"""The sound of videos, in [-1, 1]."""
Media = Videos | list[str]
"""What samples are to rewards and to people: videos in [0, 1], images as videos of one frame, or texts."""


class Failed(str):
    """What a sample is that came to nothing: an empty text, whose `reward` stands in place of any that is computed."""

    reward: float

    def __new__(cls, reward: float) -> "Failed":
        """Make one with this reward."""
        made = super().__new__(cls, "")
        made.reward = reward
        return made


def index_rows(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    """Return rows of a tensor by their numbers on the CPU, without waiting for the device that the tensor is on."""
    return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device, non_blocking=True)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the CPU to a GPU through pinned memory, so that nothing waits for it."""
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def representable(values: Tensor) -> Bool[Tensor, "..."]:
    """Tell which values are numbers that float32 holds: sums and squares of those stay finite in float64."""
    return values.abs() <= torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Prompt:
    """A line of a prompt file: the text, and the file's other columns, which reach the rewards.

    Example: `Prompt("a red circle moving left slowly", {"color": "red", "shape": "circle"})`
    """

    text: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class PromptGroup:
    """The `size` samples that one update draws for one prompt; their mean reward is each one's baseline.

    `group` numbers the groups of an update from 0. Noise and step draws are keyed by (seed, update, group, member):
    the same prompt drawn twice is two groups. An `anchored` group has one sample more, which is drawn without
    exploration, and whose reward takes the place of the mean.
    """

    update: int
    group: int
    prompt: Prompt
    size: int
    anchored: bool = False

    @property
    def samples(self) -> list["Sample"]:
        """The members, and then the anchor, where there is one."""
        return [Sample(self, member) for member in range(self.size + self.anchored)]


@dataclass(frozen=True)
class Sample:
    """One video to draw: a member of a prompt group. Its name (update, group, member) keys its noise and its step."""

    group: PromptGroup
    member: int

    @property
    def is_anchor(self) -> bool:
        """Whether it is drawn without exploration, to hold the members of its group against, and is never a term."""
        return self.member == self.group.size

    @property
    def name(self) -> tuple[int, int, int]:
        """(update, group, member)."""
        return self.group.update, self.group.group, self.member


@dataclass(frozen=True)
class Condition:
    """What a model is conditioned on, as named tensors with one row per sample: {"text": (B, L, D), ...}.

    Names that begin with `host_` stay on the CPU: numbers that decide how a network is called.
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, rows: Tensor | slice) -> "Condition":
        return Condition({name: index_rows(tensor, rows) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> "Condition":
        """Return the same on another device, without waiting for it."""
        stays = {name: tensor for name, tensor in self.tensors.items() if name.startswith("host_")}
        return Condition({name: to_device(tensor, device) for name, tensor in self.tensors.items()} | stays)

    def replaced(self, row: "Condition") -> "Condition":
        """Return the same with the tensors of `row`, which has one row, in every row."""
        new = {name: tensor.expand_as(self.tensors[name]) for name, tensor in row.tensors.items()}
        return Condition({**self.tensors, **new})

    @staticmethod
    def stack(conditions: Sequence["Condition"]) -> "Condition":
        """Join conditions along the sample axis."""
        return Condition({name: torch.cat([c.tensors[name] for c in conditions]) for name in conditions[0].tensors})


REWARD = "reward"
"""The channel of rewards that name none, and the only one of a process that judges a sample as a whole."""


WHOLE = "whole"
"""What rewards look at that do not say otherwise: all of a sample."""


@dataclass(frozen=True)
class Clip:
    """Frames `first` to `stop` - 1 of a video that a reward looks at, and the prompt by which it judges them."""

    first: int
    stop: int
    prompt: Prompt


@dataclass(frozen=True)
class PlantedPair:
    """Two videos (F, 3, H, W), or texts, of which a reward should prefer the second, with the prompt and its columns.

    A reward function may declare one, or a function that makes one, as its attribute `planted_pair`; the doctor then
    checks that the reward runs, and runs the right way round.
    """

    prompt: Prompt
    worse: Float[Tensor, "frames 3 height width"] | str
    better: Float[Tensor, "frames 3 height width"] | str


@dataclass(frozen=True)
class RewardTable:
    """The rewards of B videos by component: `values[b, r]` is component `names[r]` of video b, `weights[r]` its weight.

    A value may be NaN or infinite. What is watched has weight 0, a reward or a component: it is recorded and never
    trained on. `failures[reward]` counts the attempts that failed and were repeated. `channels[r]` is the channel of a
    process that component r is credited to.
    """

    names: tuple[str, ...]
    values: Float64[Tensor, "batch components"]
    weights: Float64[Tensor, " components"]
    failures: Mapping[str, int] = field(default_factory=dict)
    channels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.channels:
            object.__setattr__(self, "channels", (REWARD,) * len(self.names))

    @property
    def total(self) -> Float64[Tensor, " batch"]:
        """The weighted sum, (B,); what is only watched does not count, whatever it is."""
        return torch.where(self.weights != 0, self.values, 0.0) @ self.weights

    @property
    def trained(self) -> tuple[int, ...]:
        """Columns with a weight."""
        return tuple(r for r, weight in enumerate(self.weights.tolist()) if weight)

    @property
    def complete(self) -> "RewardTable":
        """The samples whose values are all numbers."""
        rows = representable(self.values).all(dim=1)
        return self if rows.all() else self[rows]

    def __getitem__(self, rows: Tensor) -> "RewardTable":
        """The rewards of some samples."""
        return replace(self, values=self.values[rows])

    def means(self, trained: bool) -> dict[str, float]:
        """Component -> mean, of the trained components or of the watched ones."""
        columns = [r for r in range(len(self.names)) if (r in self.trained) == trained]
        return {self.names[r]: float(self.values[:, r].mean()) for r in columns}


@runtime_checkable
class Reward(Protocol):
    """Any callable that scores videos, images or texts: higher is better.

    `videos` is (B, F, 3, H, W) in [0, 1], on the CPU, where F is 1 for images; a list of B texts of a model that makes
    those; or what an attribute `takes` of the reward asks for (`scoring/inputs.py`). `prompts` has B texts; each
    further column of the prompt file arrives as a keyword with B values in a list. It returns B numbers (list or
    tensor; NaN or None where it has none, which costs that prompt group its part in the update), or a mapping
    component -> B numbers, whose components share the reward's weight equally and get a curve each. It may be called
    with any part of an update's samples, and is never called twice at once.

    A class is a reward too: its constructor loads what its instances need. What either may say about itself:

        takes: Input                                frames at a stride, size or rate; latents; or files
        score_range: tuple[float | None, float | None]      the lowest and highest score there is
        planted_pair: PlantedPair                   or a function that makes one: what the doctor tries it on
        hears: bool                                 it is handed the sound too, by `audio` (B, channels, samples) in
                                                    [-1, 1] and `sample_rate`
        compares: bool                              it is called with all samples of one prompt group, or with one alone
        watches: Sequence[str]                      components that are recorded and never trained on
        failures: int                               attempts that failed and were repeated, so far
    """

    def __call__(
        self, videos: Any, prompts: list[str], **columns: list[Any]
    ) -> Sequence[float] | Tensor | Mapping[str, Sequence[float] | Tensor]: ...

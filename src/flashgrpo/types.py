"""The words of the project: what crosses from one file to the next, and the two open sets, models and rewards.

Shapes are written with these letters throughout:

    B  samples (videos) of a rollout          P  prompt groups of an update       G  samples per group (group size)
    T  recorded transitions                   N  denoising steps                  k  index of a denoising step
    C F H W  channels, frames, height, width (of latents, or of videos where it says so)       R  reward components
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Float64, Int64, Shaped
from torch import Tensor, nn

from flashgrpo.schedule import SigmaGrid

Latents = Float32[Tensor, "batch channels frames height width"]
LoraStyle = Literal["diffusers", "comfyui"]
Videos = Float[Tensor, "batch video_frames 3 video_height video_width"]


def taken(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of a tensor by their numbers on the CPU, without waiting for the device that the tensor is on."""
    return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device, non_blocking=True)]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the CPU to a GPU through pinned memory, so that nothing waits for it."""
    if device.type == "cuda" and tensor.is_cpu:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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
    the same prompt drawn twice is two groups.
    """

    update: int
    group: int
    prompt: Prompt
    size: int


@dataclass(frozen=True)
class Sample:
    """One video to draw: a member of a prompt group. Its name (update, group, member) keys its noise and its step."""

    group: PromptGroup
    member: int

    @property
    def name(self) -> tuple[int, int, int]:
        """(update, group, member)."""
        return self.group.update, self.group.group, self.member


@dataclass(frozen=True)
class Condition:
    """What a model is conditioned on, as named tensors with one row per sample: {"text": (B, L, D), ...}."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, rows: Tensor | slice) -> "Condition":
        return Condition({name: taken(tensor, rows) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> "Condition":
        """The same on another device, without waiting for it."""
        return Condition({name: sent(tensor, device) for name, tensor in self.tensors.items()})

    def replaced(self, row: "Condition") -> "Condition":
        """The same with the tensors of `row`, which has one row, in every row."""
        new = {name: tensor.expand_as(self.tensors[name]) for name, tensor in row.tensors.items()}
        return Condition({**self.tensors, **new})

    @staticmethod
    def stack(conditions: Sequence["Condition"]) -> "Condition":
        """Join conditions along the sample axis."""
        return Condition({name: torch.cat([c.tensors[name] for c in conditions]) for name in conditions[0].tensors})


@dataclass(frozen=True)
class Moment:
    """Where on the sigma grid each of B rows stands; (B,) each, on the CPU, where families choose by them.

    `timestep` is what the network is fed, `guidance_scale` that of classifier-free guidance there (1: none).
    """

    timestep: Shaped[Tensor, " batch"]
    sigma: Float64[Tensor, " batch"]
    guidance_scale: Float32[Tensor, " batch"]

    def __getitem__(self, rows: Tensor) -> "Moment":
        return Moment(self.timestep[rows], self.sigma[rows], self.guidance_scale[rows])


@dataclass(frozen=True)
class Retained:
    """Velocities (B, C, F, H, W) of some transitions, of one step, with the graph that leads to the weights."""

    rows: Int64[Tensor, " batch"]
    v: Latents


@dataclass(frozen=True)
class Transitions:
    """All that crosses from rollout to update: the stochastic steps x_k -> x_{k+1} that are trained.

    Row i belongs to sample `sample[i]` of the rollout; a sample has one row in Flash-GRPO and up to N - 1 in Flow-GRPO.
    `condition` has a row per sample, not per transition. Example with B = 4 samples in 2 groups, one step each:

        sample [0, 1, 2, 3]   k [2, 2, 0, 0]   log_prob [-0.91, -0.93, -0.87, -0.90]

    `retained` is of all rows or empty; a part of the transitions has none, and neither does a second backward pass.
    """

    sample: Int64[Tensor, " transitions"]
    k: Int64[Tensor, " transitions"]
    x: Float32[Tensor, "transitions channels frames height width"]
    x_next: Float32[Tensor, "transitions channels frames height width"]
    log_prob: Float32[Tensor, " transitions"]
    condition: Condition
    retained: Sequence[Retained] = ()

    def __len__(self) -> int:
        return len(self.k)

    def __getitem__(self, rows: Tensor) -> "Transitions":
        return replace(
            self,
            sample=self.sample[rows],
            k=self.k[rows],
            x=taken(self.x, rows),
            x_next=taken(self.x_next, rows),
            log_prob=taken(self.log_prob, rows),
            retained=(),
        )


@dataclass(frozen=True)
class PlantedPair:
    """Two videos (F, 3, H, W) of which a reward should prefer the second, for a prompt with the columns it needs.

    A reward function may declare one, or a function that makes one, as its attribute `planted_pair`; the doctor then
    checks that the reward runs, and runs the right way round.
    """

    prompt: Prompt
    worse: Float[Tensor, "frames 3 height width"]
    better: Float[Tensor, "frames 3 height width"]


@dataclass(frozen=True)
class RewardTable:
    """The rewards of B videos by component: `values[b, r]` is component `names[r]` of video b, `weights[r]` its weight.

    Components of a watched reward have weight 0: they are recorded and never trained on. `failures[reward]` counts the
    attempts that failed and were repeated.
    """

    names: tuple[str, ...]
    values: Float64[Tensor, "batch components"]
    weights: Float64[Tensor, " components"]
    failures: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> Float64[Tensor, " batch"]:
        """The weighted sum, (B,)."""
        return self.values @ self.weights

    @property
    def trained(self) -> tuple[int, ...]:
        """Columns with a weight."""
        return tuple(r for r, weight in enumerate(self.weights.tolist()) if weight)

    def means(self, trained: bool) -> dict[str, float]:
        """Component -> mean, of the trained components or of the watched ones."""
        columns = [r for r in range(len(self.names)) if (r in self.trained) == trained]
        return {self.names[r]: float(self.values[:, r].mean()) for r in columns}


@runtime_checkable
class VideoModel(Protocol):
    """A video flow model: everything that rollout, update and evaluation ask of one. See docs/adding-a-model.md."""

    @property
    def network(self) -> nn.Module:
        """The network, with all experts where there are several; its parameters with `requires_grad` are trained."""
        ...

    def expert(self, timestep: float) -> nn.Module:
        """The part of `network` that computes at a timestep: all of it, or one of several experts."""
        ...

    @property
    def identity(self) -> str:
        """Tells the base weights from others, wherever they lie."""
        ...

    @property
    def takes_image(self) -> bool:
        """Whether each prompt has to come with its video's first frame, in a column `image`."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one sample's latents."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        ...

    def grid(self, num_steps: int) -> SigmaGrid:
        """The sigma grid of `num_steps` steps, read from the checkpoint's own scheduler."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Condition of each prompt, its text and whatever else the family takes; a row each, on `device`."""
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before any are cut off."""
        ...

    def velocity(self, x: Latents, moment: Moment, condition: Condition) -> Latents:
        """v = eps - x0 as the network predicts it, with classifier-free guidance; differentiable."""
        ...

    def decode(self, latents: Latents, frames: int | None = None) -> Videos:
        """Videos (B, F, 3, H, W) in [0, 1]; with `frames` the first so many of F, at less expense where it can."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context `velocity` is the base model's, before any training."""
        ...

    def idle(self, moment: Moment) -> Tensor:
        """Make the network call of one row on nothing, for the sake of the collectives in it; differentiable."""
        ...

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write trained adapters (name -> tensor) as the family's own pipeline loads them, or as ComfyUI does.

        Returns the names of the files, one for each expert.
        """
        ...

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a whole pipeline with the trained parameters in it; the model is of no further use afterwards."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Any callable that scores videos: higher is better.

    `videos` is (B, F, 3, H, W) in [0, 1], on the CPU, or what an attribute `takes` of the reward asks for
    (`inputs.py`); `prompts` has B texts; each further column of the prompt file arrives as a keyword with a list of B
    values. It returns B numbers (list or tensor), or a mapping component -> B numbers, whose components share the
    reward's weight equally and get a curve each. It may be called with any part of an update's samples, and is never
    called twice at once.

    A class is a reward too: its constructor loads what its instances need. What either may say about itself:

        takes: Input                                frames at a stride, size or rate; latents; or files
        score_range: tuple[float | None, float | None]      the lowest and highest score there is
        planted_pair: PlantedPair                   or a function that makes one: what the doctor tries it on
        failures: int                               attempts that failed and were repeated, so far
    """

    def __call__(
        self, videos: Any, prompts: list[str], **columns: list[Any]
    ) -> Sequence[float] | Tensor | Mapping[str, Sequence[float] | Tensor]: ...

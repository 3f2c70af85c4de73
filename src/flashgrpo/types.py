"""The words of the project: what crosses from one file to the next, and the two open sets, models and rewards.

Shapes are written with these letters throughout:

    B  samples (videos) of a rollout          P  prompt groups of an update       G  samples per group (group size)
    T  recorded transitions                   N  denoising steps                  k  index of a denoising step
    C F H W  channels, frames, height, width (of latents, or of videos where it says so)       R  reward components
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor, nn

from flashgrpo.seeds import Name

Latents = Float32[Tensor, "batch channels frames height width"]
LoraStyle = Literal["diffusers", "comfyui"]
Videos = Float[Tensor, "batch video_frames 3 video_height video_width"]


def index_rows(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    """Return rows of a tensor by their numbers on the CPU, without waiting for the device that the tensor is on."""
    return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device, non_blocking=True)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; from the CPU to a GPU through pinned memory, so that nothing waits for it."""
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
        return Condition({name: index_rows(tensor, rows) for name, tensor in self.tensors.items()})

    def to(self, device: torch.device) -> "Condition":
        """The same on another device, without waiting for it."""
        return Condition({name: to_device(tensor, device) for name, tensor in self.tensors.items()})

    def replaced(self, row: "Condition") -> "Condition":
        """The same with the tensors of `row`, which has one row, in every row."""
        new = {name: tensor.expand_as(self.tensors[name]) for name, tensor in row.tensors.items()}
        return Condition({**self.tensors, **new})

    @staticmethod
    def stack(conditions: Sequence["Condition"]) -> "Condition":
        """Join conditions along the sample axis."""
        return Condition({name: torch.cat([c.tensors[name] for c in conditions]) for name in conditions[0].tensors})


REWARD = "reward"
"""The channel of rewards that name none, and the only one of a process that judges a sample as a whole."""


@runtime_checkable
class State(Protocol):
    """What replay needs of U units; nobody but the process that recorded it reads it."""

    def __getitem__(self, units: Int64[Tensor, " units"]) -> "State":
        """The same of some units."""
        ...


@dataclass(frozen=True)
class Record:
    """All that crosses from drawing to the update: U units that are replayed, and T terms that are judged.

    A **unit** is what is replayed together; its score is a sum of addends. A **term** is what one ratio judges: it
    belongs to a unit and to a sample, and is compared with the terms of its key. In the flow process a unit is a
    stochastic step and has one term, whose key is the prompt group. Example with 4 samples in 2 groups, one step each:

        slot [2, 2, 0, 0]   unit [0, 1, 2, 3]   sample [0, 1, 2, 3]   key [0, 0, 1, 1]   old [-0.91, -0.93, -0.87, -0.90]

    Args:
        slot: (U,) units of one slot may share a micro-batch. The numbers mean something to the process only.
        unit: (T,) rising.
        sample: (T,) the number of the term's sample among those that this rank has drawn.
        key: (T,) terms with one key are compared, on whatever ranks they are.
        channel: (T,) the number of the reward channel by which the term is judged, among the process's `channels`.
        weight: (T,) factor of the term in the objective.
        old: (T,) the score by the weights that drew.
        state: what replay needs.
        advantage: (T,) once the samples have been compared.
    """

    slot: Int64[Tensor, " units"]
    unit: Int64[Tensor, " terms"]
    sample: Int64[Tensor, " terms"]
    key: Int64[Tensor, " terms"]
    channel: Int64[Tensor, " terms"]
    weight: Float32[Tensor, " terms"]
    old: Float32[Tensor, " terms"]
    state: State
    advantage: Float32[Tensor, " terms"] | None = None

    def __len__(self) -> int:
        """Units."""
        return len(self.slot)

    def __getitem__(self, units: Int64[Tensor, " some"]) -> "Record":
        """The same of some units, in the order of `units`, with all of their terms."""
        place = torch.full((len(self.slot),), len(units))
        place[units] = torch.arange(len(units))
        of_term = place[self.unit]
        terms = of_term.argsort(stable=True)[: int((of_term < len(units)).sum())]
        return Record(
            self.slot[units],
            of_term[terms],
            self.sample[terms],
            self.key[terms],
            self.channel[terms],
            index_rows(self.weight, terms),
            index_rows(self.old, terms),
            self.state[units],
            None if self.advantage is None else index_rows(self.advantage, terms),
        )


@dataclass(frozen=True)
class Cost:
    """Network forwards of one update, in forwards of one sample."""

    rollout: int
    update: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.rollout + self.update


@dataclass(frozen=True)
class Finding:
    """What a check of the doctor found, in one sentence, with the numbers behind it."""

    check: str
    level: Literal["sound", "warning", "unsound"]
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)


Outputs = Any
"""What a process draws, one row for each sample on the device: latents of videos, tokens, texts."""
Media = Callable[[Outputs, int | None], Videos]
"""Makes videos of outputs; with a number the first frames of each at least."""
OnDrawn = Callable[[Tensor, Outputs], None]
"""Called with the rows (B,) and the outputs of each micro-batch as soon as it is drawn."""
Columns = Mapping[str, Tensor]
"""Numbers of terms, (T,) each, by name."""


@runtime_checkable
class Process(Protocol):
    """A way to generate samples, and to score again what was drawn; see docs/adding-a-process.md.

    All that the trainer, evaluation, the doctor and the report know of a model. `stage` and `idle` serve ranks that hold a network between them and have to call it together.
    """

    @property
    def channels(self) -> Sequence[str]:
        """What rewards may be credited to."""
        ...

    @property
    def network(self) -> nn.Module:
        """The network, with all experts where there are several; its parameters with `requires_grad` are trained."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        ...

    @property
    def identity(self) -> str:
        """Tells the base weights from others, wherever they lie."""
        ...

    @property
    def takes_image(self) -> bool:
        """Whether each prompt has to come with an image, in a column `image`."""
        ...

    @property
    def micro_batch(self) -> int:
        """Units replayed at once, at most."""
        ...

    def draw(self, samples: Sequence[Sample], seed: int, on_drawn: OnDrawn, uses: int = 1) -> tuple[Outputs, Record]:
        """Draw this rank's part of an update's samples, and record what the update is to replay.

        All ranks call this together, also those without a sample.

        Args:
            on_drawn: called with each micro-batch before the next is begun.
            uses: how often each unit of the record will be replayed. What is replayed once may be kept as it was
                computed; what is replayed more often is judged by weights that have moved on.
        """
        ...

    def micro_batches(self, record: Record) -> Sequence[Record]:
        """Cut a record of one slot into what `replay` takes at a time, each at most `micro_batch` units."""
        ...

    def replay(self, record: Record, columns: Sequence[str]) -> tuple[Float32[Tensor, " terms"], Columns]:
        """Score a micro-batch again by the weights that there are now, differentiably, and the columns asked for.

        With the weights that drew, the score is `record.old` bit for bit.
        """
        ...

    def stage(self, slot: int) -> nn.Module:
        """The part of the network that computes a slot: ranks that hold it between them call each equally often."""
        ...

    def idle(self, slot: int, columns: Sequence[str]) -> Tensor:
        """Make the network calls of one `replay` on nothing, for the sake of the collectives in them; differentiable."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """What the network is conditioned on, a row for each prompt."""
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before any are cut off."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], names: Sequence[Name], on_drawn: OnDrawn, num_steps: int | None = None
    ) -> Outputs:
        """Draw samples as evaluation does, each from the random numbers of its name: equal names, equal numbers."""
        ...

    def media(self, outputs: Outputs, frames: int | None = None) -> Videos:
        """What rewards and the report look at; with `frames` the first so many of each video at least."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context the network is the base model, before any training."""
        ...

    def cost(self, seed: int, update: int, passes: int, columns: Sequence[str]) -> Cost:
        """What an update costs that passes so often over its record and asks for these columns."""
        ...

    def checks(self, record: Record, outputs: Outputs, seed: int, thorough: bool) -> Sequence[Finding]:
        """What the doctor has to know of this process alone, of samples that `draw` has drawn."""
        ...

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write trained adapters (name -> tensor) as others load them; returns the names of the files."""
        ...

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the whole model with the trained parameters in it; it is of no further use afterwards."""
        ...


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
    attempts that failed and were repeated. `channels[r]` is the channel of a process that component r is credited to.
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
class Reward(Protocol):
    """Any callable that scores videos: higher is better.

    `videos` is (B, F, 3, H, W) in [0, 1], on the CPU, or what an attribute `takes` of the reward asks for
    (`scoring/inputs.py`); `prompts` has B texts; each further column of the prompt file arrives as a keyword with a list
    of B values. It returns B numbers (list or tensor), or a mapping component -> B numbers, whose components share the
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

"""The interface between what is drawn and what is learnt from: `Process`, and the `Record` that crosses.

A process draws samples and scores again what was drawn; the trainer compares, optimises, and knows none by name.
Shapes: U units, T terms, B samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from flashgrpo.media import Medium, Shows
from flashgrpo.seeds import Name
from flashgrpo.types import Clip, Condition, LoraStyle, Media, Prompt, Sample, Waves, index_rows

Outputs = Any
"""What a process draws, one row for each sample on the device: latents of videos, tokens."""
MakesMedia = Callable[[Outputs, int | None], Media]
"""Makes media of outputs; of videos, with a number, the first frames of each at least."""
MakesSound = Callable[[Outputs], Waves]
"""Makes the sound of outputs."""
OnDrawn = Callable[[Tensor, Outputs], None]
"""Called with the rows (B,) and the outputs of each micro-batch as soon as it is drawn."""
Columns = Mapping[str, Tensor]
"""Numbers of terms, (T,) each, by name."""


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

        slot [2, 2, 0, 0]   unit [0, 1, 2, 3]   sample [0, 1, 2, 3]   key [0, 0, 1, 1]   old [-0.9, -0.9, -0.8, -0.9]

    Args:
        slot: (U,) units of one slot may share a micro-batch. The numbers mean something to the process only.
        unit: (T,) rising.
        sample: (T,) the number of the term's sample among those that this rank has drawn.
        key: (T,) terms with one key are compared, on whatever ranks they are.
        channel: (T,) the number of the reward channel by which the term is judged, among the process's `channels`.
        weight: (T,) factor of the term in the objective.
        old: (T,) the score by the weights that drew; None where each unit is replayed once, by those very weights: then
            it is what the replay gives.
        state: what replay needs.
        advantage: (T,) once the samples have been compared.
    """

    slot: Int64[Tensor, " units"]
    unit: Int64[Tensor, " terms"]
    sample: Int64[Tensor, " terms"]
    key: Int64[Tensor, " terms"]
    channel: Int64[Tensor, " terms"]
    weight: Float32[Tensor, " terms"]
    old: Float32[Tensor, " terms"] | None
    state: State
    advantage: Float32[Tensor, " terms"] | None = None

    def __len__(self) -> int:
        """Units."""
        return len(self.slot)

    @property
    def one_key_each(self) -> bool:
        """Whether the terms of each unit have one key; those that compete have to, since optimizer steps take units."""
        return torch.stack([self.unit, self.key]).unique(dim=1).shape[1] == len(self)

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
            None if self.old is None else index_rows(self.old, terms),
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
class PipelineCall:
    """How a program draws a sample with diffusers.

    Args:
        arguments: of the pipeline's call, as it names and counts them.
        pipeline: its class.
        images: that each prompt brings, as the call and `IMAGE_COLUMNS` name them.
        attributes: what is set before, name -> value: "guider.guidance_scale", for instance.
        loads_adapters: whether the pipeline does so; else its transformer does.
        sounds: whether it returns waves beside frames, and has a vocoder that knows their rate.
    """

    arguments: Mapping[str, Any]
    pipeline: str = "DiffusionPipeline"
    images: Sequence[str] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    loads_adapters: bool = True
    sounds: bool = False


@dataclass(frozen=True)
class Finding:
    """What a check of the doctor found, in one sentence, with the numbers behind it."""

    check: str
    level: Literal["sound", "warning", "unsound"]
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Process(Shows, Protocol):
    """A way to generate samples, and to score again what was drawn; see docs/adding-a-process.md.

    All that the trainer, evaluation, the doctor and the report know of a model. `stage` and `idle`
    serve ranks that hold a network between them and have to call it together.
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

    def draw(
        self, samples: Sequence[Sample], seed: int, on_drawn: OnDrawn, uses: int = 1, columns: Sequence[str] = ()
    ) -> tuple[Outputs, Record]:
        """Draw this rank's part of an update's samples, and record what the update is to replay.

        All ranks call this together, also those without a sample.

        Args:
            on_drawn: called with each micro-batch before the next is begun.
            uses: how often each unit of the record will be replayed. What is replayed once may be kept as it was
                computed; what is replayed more often is judged by weights that have moved on.
            columns: that replays will be asked for; some compare with what was computed when the samples were drawn.
        """
        ...

    def micro_batches(self, record: Record) -> Sequence[Record]:
        """Cut a record of one slot into what `replay` takes at a time, each at most `micro_batch` units."""
        ...

    def exploring(self, explore: Any, score: Any) -> "Process":
        """Return the same model, not copied or loaded again, that draws and scores otherwise."""
        ...

    def set_average(self, weights: Callable[[], AbstractContextManager[None]]) -> None:
        """Say in which context the network has the averaged weights that an objective stays near."""
        ...

    @property
    def addends(self) -> int:
        """How many addends `replay` hands out, at most; above 1, all replays of a slot hand out equally many."""
        ...

    def replay(self, record: Record, columns: Sequence[str]) -> Iterable[tuple[Float32[Tensor, " terms"], Columns]]:
        """Score a micro-batch again by the weights that there are now, differentiably, and the columns asked for.

        Hands out addends of both, each with a graph of its own, so that one is differentiated and freed before the next
        is computed; one without a graph counts for the score alone. With the weights that drew, their sum is
        `record.old` bit for bit.
        """
        ...

    def stage(self, slot: int) -> nn.Module:
        """The part of the network that a slot trains: ranks that hold it between them call each equally often."""
        ...

    def idle(self, slot: int, columns: Sequence[str]) -> Iterable[Tensor]:
        """Make the network calls of one `replay` on nothing, to take part in their collectives.

        Hands out a tensor for each addend, differentiable where that is.
        """
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return what the network is conditioned on, a row for each prompt."""
        ...

    @property
    def views(self) -> Sequence[str]:
        """What rewards may look at: "whole" samples, and parts of videos if there are such; see `clips`."""
        ...

    def clips(self, view: str, prompt: Prompt, sample: tuple[Sample, int] | None) -> Sequence[Clip]:
        """Return the parts of a video that a reward with this view looks at, one or more.

        Args:
            view: another than "whole".
            sample: of an update, with the seed of the run; None of an evaluation.
        """
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before any are cut off."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], names: Sequence[Name], on_drawn: OnDrawn, num_steps: int | None = None
    ) -> Outputs:
        """Draw samples as evaluation does, each from the random numbers of its name: equal names, equal numbers."""
        ...

    def stream(self, prompt: Prompt, name: Name, num_steps: int | None = None) -> Iterator[Medium]:
        """Draw one sample as `sample` does and hand out its medium piece by piece, of a video some frames at a time.

        What is drawn as a whole comes in one piece. A process that draws in time keeps no more than it needs to go on.
        """
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context the network is the base model, before any training."""
        ...

    def cost(self, seed: int, update: int, passes: int, columns: Sequence[str], uses: int = 1) -> Cost:
        """What an update costs that passes so often over its record and asks for these columns; `uses` as in `draw`."""
        ...

    def checks(self, record: Record, outputs: Outputs, seed: int, thorough: bool) -> Sequence[Finding]:
        """Return what the doctor has to know of this process alone, of samples that `draw` has drawn."""
        ...

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall | None:
        """Return how a program draws as an evaluation does, of arguments `given`; None where diffusers cannot."""
        ...

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write trained adapters (name -> tensor) as others load them; returns the names of the files."""
        ...

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the whole model with the trained parameters in it; it is of no further use afterwards."""
        ...

"""What every process that draws from one model does alike, and what it asks of the model for it."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.media import Medium, with_sound
from flashgrpo.process import Columns, OnDrawn, Outputs, PipelineCall, Record
from flashgrpo.processes.calls import number_of_calls
from flashgrpo.seeds import Name
from flashgrpo.types import REWARD, WHOLE, Clip, Condition, LoraStyle, Media, Prompt, Sample, Waves, to_device


@runtime_checkable
class Model(Protocol):
    """A network with what encodes prompts for it, and what writes it to files."""

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
    def recomputes(self) -> bool:
        """Whether a backward pass computes the blocks again."""
        ...

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return what the network is conditioned on, a row for each prompt, on `device`."""
        ...

    def nothing(self) -> Condition:
        """Return the condition of an empty prompt, one row: what guidance leads away from, and for idle calls."""
        ...

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before any are cut off."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context the network is the base model, before any training."""
        ...

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write trained adapters (name -> tensor) as the family's own pipeline loads them, or as ComfyUI does.

        Returns the names of the files, one for each expert.
        """
        ...

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the whole model with the trained parameters in it; it is of no further use afterwards."""
        ...


ModelT = TypeVar("ModelT", bound=Model)
ProcessT = TypeVar("ProcessT", bound="ModelProcess[Any]")


class ModelProcess(ABC, Generic[ModelT]):
    """The part of a `Process` that is the same whatever is drawn; see there for the methods.

    Attributes:
        explore, score: how samples are drawn, and what is scored of them.
        micro_batch: units replayed at once, and rows of every call of the network whose result is judged.
        average: a context in which the network has the averaged weights of the behaviour.
    """

    channels: Sequence[str] = (REWARD,)
    views: Sequence[str] = (WHOLE,)
    explore: Any
    score: Any

    def __init__(self, model: ModelT, micro_batch: int, world: World) -> None:
        self.model, self.micro_batch, self.world = model, micro_batch, world
        self.average: Callable[[], AbstractContextManager[None]] = nullcontext

    def exploring(self: ProcessT, explore: Any, score: Any) -> ProcessT:
        """Return the same model, not copied or loaded again, that draws and scores otherwise."""
        other = copy.copy(self)
        other.explore, other.score = explore, score
        return other

    def set_average(self, weights: Callable[[], AbstractContextManager[None]]) -> None:
        """Say in which context the network has the averaged weights that an objective stays near."""
        self.average = weights

    @property
    def network(self) -> nn.Module:
        """The network, with all experts where there are several."""
        return self.model.network

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.model.device

    @property
    def identity(self) -> str:
        """Tells the base weights from others, wherever they lie."""
        return self.model.identity

    @property
    def takes_image(self) -> bool:
        """Whether each prompt has to come with an image, in a column `image`."""
        return False

    @property
    def addends(self) -> int:
        """How many addends a replay hands out."""
        return 1

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """Return what the network is conditioned on, a row for each prompt; of no prompt, a row of nothing."""
        return self.model.encode(prompts) if prompts else self.model.nothing()

    def clips(self, view: str, prompt: Prompt, sample: tuple[Sample, int] | None) -> Sequence[Clip]:
        """Return nothing: rewards look at whole samples."""
        raise AssertionError(f"no view is called {view!r}")

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text before any are cut off."""
        return self.model.token_counts(texts)

    @abstractmethod
    def sample(
        self, prompts: Sequence[Prompt], names: Sequence[Name], on_drawn: OnDrawn, num_steps: int | None = None
    ) -> Outputs:
        """Draw samples as evaluation does."""

    @abstractmethod
    def media(self, outputs: Outputs, frames: int | None = None) -> Media:
        """Return what rewards and the report look at."""

    @property
    def sample_rate(self) -> int | None:
        """Return None: media are silent."""
        return None

    def sound(self, outputs: Outputs) -> Waves:
        """Return nothing: media are silent."""
        raise AssertionError("there is no sound")

    def captions(self, outputs: Outputs) -> Sequence[str]:
        """Return nothing: media are made of prompts as they stand."""
        return []

    @torch.no_grad()
    def stream(self, prompt: Prompt, name: Name, num_steps: int | None = None) -> Iterator[Medium]:
        """Draw one sample and hand out its medium in one piece."""
        outputs = self.sample([prompt], [name], lambda rows, outputs: None, num_steps)
        yield with_sound(self.media(outputs)[0], self.sound(outputs)[0] if self.sample_rate else None, self.sample_rate)

    def micro_batches(self, record: Record) -> Sequence[Record]:
        """Cut the units of one slot into batches of `micro_batch`."""
        return [record[units] for units in torch.arange(len(record)).split(self.micro_batch) if len(units)]

    def old_scores(self, record: Record, keep: str | None = None) -> tuple[Float32[Tensor, " terms"], Tensor | None]:
        """Score what was drawn by the weights that drew, by replays; ranks make equally many calls of each slot.

        Args:
            keep: a column that is kept as well; it may have a row of any shape for each unit.
        """
        scores = torch.empty(len(record.unit), device=self.device)
        columns, kept = (keep,) if keep else (), dict[int, Tensor]()
        own = {int(slot): (record.slot == slot).nonzero().flatten() for slot in record.slot.unique()}
        for slot, most in self._most_calls(own):
            parts = own[slot].split(self.micro_batch) if slot in own else ()
            for units in parts:
                terms = torch.isin(record.unit, units).nonzero().flatten()
                with torch.enable_grad():  # attention takes other kernels without gradients
                    addends = [(score.detach(), found) for score, found in self.replay(record[units], columns)]
                total = sum((score for score, _ in addends[1:]), addends[0][0])
                scores.index_copy_(0, to_device(terms, self.device), total)
                kept |= dict(zip(units.tolist(), addends[0][1][keep].detach(), strict=True)) if keep else {}
            for _ in range(most - len(parts)):
                list(self.idle(slot, columns))
        return scores, torch.stack([kept[unit] for unit in range(len(record))]) if kept else None

    def _most_calls(self, own: Mapping[int, Tensor]) -> list[tuple[int, int]]:
        """Return the slots of all ranks, and how many calls the busiest of them makes of each."""
        most: dict[int, int] = {}
        for theirs in self.world.gather({str(k): number_of_calls(len(of), self.micro_batch) for k, of in own.items()}):
            for slot, count in theirs.items():
                most[int(slot)] = max(most.get(int(slot), 0), count)
        return sorted(most.items())

    def stage(self, slot: int) -> nn.Module:
        """Return the part of the network that computes a slot: all of it."""
        return self.model.network

    @abstractmethod
    def replay(self, record: Record, columns: Sequence[str]) -> Iterable[tuple[Float32[Tensor, " terms"], Columns]]:
        """Score a micro-batch again."""

    @abstractmethod
    def idle(self, slot: int, columns: Sequence[str]) -> Iterable[Tensor]:
        """Make the network calls of one `replay` on nothing."""

    def reference(self) -> AbstractContextManager[None]:
        """Inside this context the network is the base model."""
        return self.model.reference()

    @property
    def other_weights(self) -> dict[str, Callable[[], AbstractContextManager[None]]]:
        """The weights that divergences compare with, by the name of their column."""
        return {"kl": self.reference, "kl_average": self.average}

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall | None:
        """Return the class that finds the right one, and the arguments under the names that the settings have."""
        return PipelineCall(given)

    def save_lora(self, folder: Path, tensors: Mapping[str, Tensor], style: LoraStyle = "diffusers") -> list[str]:
        """Write trained adapters as others load them; returns the names of the files."""
        return self.model.save_lora(folder, tensors, style)

    def save_merged(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write the whole model with the trained parameters in it; it is of no further use afterwards."""
        self.model.save_merged(folder, tensors)

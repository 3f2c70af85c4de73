"""What the flow process asks of a video model, and what it records of a stochastic step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float32, Float64, Shaped
from torch import Tensor, nn

from flashgrpo.process import PipelineCall
from flashgrpo.processes.flow.choices import GuidanceKind
from flashgrpo.processes.flow.schedule import SigmaGrid
from flashgrpo.processes.of_model import Model
from flashgrpo.types import Condition, Latents, Videos, Waves


@dataclass(frozen=True)
class GridPoint:
    """Where on the sigma grid each of B rows stands; (B,) each, on the CPU, where families choose by them.

    `timestep` is what the network is fed, `guidance_scale` that of the model's kind of guidance there (1: none).
    """

    timestep: Shaped[Tensor, " batch"]
    sigma: Float64[Tensor, " batch"]
    guidance_scale: Float32[Tensor, " batch"]

    def __getitem__(self, rows: Tensor) -> "GridPoint":
        return GridPoint(self.timestep[rows], self.sigma[rows], self.guidance_scale[rows])


@runtime_checkable
class VideoModel(Model, Protocol):
    """A video flow model: everything that rollout, update and evaluation ask of one. See docs/adding-a-model.md."""

    def expert(self, timestep: float) -> nn.Module:
        """Return the part of `network` that computes at a timestep: all of it, or one of several experts."""
        ...

    @property
    def takes_image(self) -> bool:
        """Whether each prompt has to come with its video's first frame, in a column `image`."""
        ...

    @property
    def guidance(self) -> GuidanceKind:
        """What a guidance scale above 1 does."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of one sample's latents."""
        ...

    @property
    def offloads(self) -> bool:
        """Whether parts of the model leave the device while others compute."""
        ...

    def grid(self, num_steps: int) -> SigmaGrid:
        """Return the sigma grid of `num_steps` steps, read from the checkpoint's own scheduler."""
        ...

    def velocity(self, x: Latents, point: GridPoint, condition: Condition) -> Latents:
        """v = eps - x0 as the network predicts it, with classifier-free guidance; differentiable."""
        ...

    def decode(self, latents: Latents, frames: int | None = None) -> Videos:
        """Return videos (B, F, 3, H, W) in [0, 1]; with `frames` only the first of F, at less expense where it can."""
        ...

    @property
    def sample_rate(self) -> int | None:
        """Samples a second of the sound that comes with a video; None of a model that makes none."""
        ...

    def decode_sound(self, latents: Latents) -> Waves:
        """Return the sound of videos, (B, channels, samples) in [-1, 1]; only where there is a `sample_rate`."""
        ...

    def pipeline_call(self, given: Mapping[str, Any]) -> PipelineCall:
        """Return the family's own pipeline, and arguments of an evaluation as it names and counts them."""
        ...

    def idle(self, point: GridPoint) -> Tensor:
        """Make the network call of one row on nothing, for the sake of the collectives in it; differentiable."""
        ...

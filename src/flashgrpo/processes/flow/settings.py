"""Settings of the flow process: how its samples are drawn."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flashgrpo.processes.flow.reuse import FirstBlock, TaylorSeer
from flashgrpo.processes.flow.solvers import Euler, UniPC
from flashgrpo.settings import Part

Solver = Annotated[Euler | UniPC, Field(discriminator="kind")]


class RolloutConfig(Part):
    """How the samples of an update are drawn."""

    prompts: int = Field(default=8, ge=1)
    """Prompt groups per update, P."""
    group_size: int = Field(default=8, ge=2)
    """Samples per prompt, G; the baseline of a sample is the mean of its group, so one is not enough."""
    num_steps: int = Field(default=20, ge=2)
    """Denoising steps, N."""
    guidance_scale: float = Field(default=4.5, ge=1)
    """Classifier-free guidance in rollout and update; 1 turns it off."""
    guidance_scale_2: float | None = Field(default=None, ge=1)
    """Where the second of two experts computes (Wan 2.2 A14B); as the first when not given."""
    solver: Solver = Euler()
    """Of the deterministic steps."""
    deterministic_steps: int | None = Field(default=None, ge=1)
    """Points of the grid at which a deterministic walk stops at most, evenly spread, with both ends of each stochastic
    step besides; all N when not given."""
    guidance_interval: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Sigmas between which deterministic steps use guidance, none with [0, 0]; stochastic steps always do."""
    deterministic_dtype: Literal["bfloat16", "float8"] | None = None
    """In which the network computes deterministic steps (autocast); `float8` is of the frozen linear layers of the
    blocks, beside bfloat16, for GPUs that have units for it."""
    reuse: Annotated[FirstBlock | TaylorSeer, Field(discriminator="kind")] | None = None
    """Of features from one deterministic step to the next, by diffusers' hooks; not for a network that is sharded."""
    retain: bool | None = None
    """Keep the graph of a trained step from rollout to update rather than replay it; when not given, where a rollout
    serves one optimizer step and all graphs take at most a quarter of the device's memory and half of what is free."""
    micro_batch: int = Field(default=64, ge=1)
    """Samples denoised at once."""
    decode_micro_batch: int = Field(default=64, ge=1)
    """Latents decoded at once."""

    @model_validator(mode="after")
    def _possible(self) -> "RolloutConfig":
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is a pair of sigmas, low <= high, not {list(self.guidance_interval)}")
        return self


class SamplingConfig(Part):
    """How a video is drawn without noise at its steps: evaluation, and `flashgrpo sample`."""

    num_steps: int = Field(default=50, ge=2)
    guidance_scale: float | None = Field(default=None, ge=1)
    """The rollout's when not given."""
    guidance_scale_2: float | None = Field(default=None, ge=1)
    """The rollout's when neither is given."""
    solver: Solver = Euler()

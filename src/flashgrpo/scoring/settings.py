"""Settings of rewards and of held-out evaluation."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from flashgrpo.scoring.inputs import LatentVideos, Pixels, VideoFiles
from flashgrpo.settings import LARGEST, MANY, SMALLEST, Count, Part, PathText


class RewardConfig(Part):
    """A reward: any callable, or a class whose instances are."""

    call: PathText
    """`package.module:function`, `path/to/file.py:function`, or `http://host:port` of a server; several with commas."""
    channel: str | dict[str, str] = "reward"
    """What the reward is credited to, of a model that judges parts of a sample apart; most have this one only. Of a
    reward that returns a mapping, component -> channel: components of one channel share the reward's weight."""
    looks_at: Literal["whole", "chunk", "clips"] = "whole"
    """Which part of a sample: all of it, or of a streaming video the `chunk` in which branches differ (at evaluation
    its clips), or its `clips`. A part is judged under its own prompt; of several parts the mean counts."""
    weight: float = Field(default=1.0, ge=-LARGEST, le=LARGEST)
    """Negative to train against a quantity."""
    watched: bool = False
    """Scored at evaluation only and never trained on: a watch for reward hacking."""
    max_fall: float | None = Field(default=None, ge=0, le=LARGEST)
    """Of a watched reward: end the run when it has fallen by more than this, with 95 % confidence, in every component's
    own units, while the trained reward has risen."""
    input: Annotated[Pixels | LatentVideos | VideoFiles, Field(discriminator="kind")] | None = None
    """What it is handed; as the reward says itself when not given."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the callable."""

    @property
    def channels(self) -> tuple[str, ...]:
        """What any of its components is credited to."""
        return tuple(self.channel.values()) if isinstance(self.channel, dict) else (self.channel,)

    def channel_of(self, component: str) -> str | None:
        """Return what a component is credited to; None where a recipe names others."""
        return self.channel.get(component) if isinstance(self.channel, dict) else self.channel

    @model_validator(mode="after")
    def _counts(self) -> "RewardConfig":
        if self.max_fall is not None and not self.watched:
            raise ValueError("max_fall is for a reward that is watched; say watched: true, or leave it out")
        if abs(self.weight) < SMALLEST:
            raise ValueError("weight must not be 0; a reward that is only to be looked at says watched: true")
        if self.watched and self.weight != 1:
            raise ValueError("weight has no effect on a watched reward; leave it out")
        return self


def check_rewards(rewards: Mapping[str, RewardConfig]) -> None:
    """Refuse rewards of which none is trained on, with a ValueError."""
    if all(reward.watched for reward in rewards.values()):
        raise ValueError("rewards: every reward is watched only, so there is nothing to train on")


class HeldoutConfig(Part):
    """Held-out prompts on fixed noise, paired with the base model."""

    every: Count = 10
    """Updates between two evaluations; the last update is always evaluated."""
    samples_per_prompt: Count = 1
    """Samples of each held-out prompt."""
    seed: int = Field(default=1_000, ge=0, lt=2**63)
    """Of the noise that all evaluations start from."""
    videos: int = Field(default=8, ge=0, le=MANY)
    """So many samples, spread evenly over the prompts, are kept (mp4, png or txt) of the base and of each new best."""
    patience: Count | None = None
    """Stop after this number of evaluations without a new best."""

"""Reuse of features from one deterministic step to the next, through diffusers' cache hooks.

What a block computes hardly changes between neighbouring steps, so a step may take over much of what the last one has
computed. It is one more way to make the environment cheaper, beside fewer steps; with both there is little left to
reuse. The hooks are taken off the network before a stochastic step, which is always computed, and exactly.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from flashgrpo.settings import FORBID_EXTRA, check_number


@dataclass(frozen=True)
class FirstBlock:
    """Skip all blocks but the first where the first's residual has changed by less than `threshold`, relatively.

    ParaAttention's first-block cache, after TeaCache (arXiv 2411.19108). The decision is one for all rows of a call,
    and waits for the device.

    Args:
        threshold: the relative change from which on a step is computed, above 0 and at most 1.
    """

    threshold: float = 0.05
    kind: Literal["first-block"] = "first-block"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, highest=1)

    def config(self) -> Any:
        """As diffusers has it."""
        from diffusers import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=self.threshold)


@dataclass(frozen=True)
class TaylorSeer:
    """Compute every `interval`-th step, and extrapolate the network's output in between (arXiv 2503.06923).

    Args:
        interval: steps from one that is computed to the next, 2 or more.
        order: of the Taylor series in the number of the step; that many steps and one more are computed first.
    """

    interval: Annotated[int, Field(le=10_000)] = 2
    order: Annotated[int, Field(le=10)] = 1
    kind: Literal["taylorseer"] = "taylorseer"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        if self.interval < 2 or self.order < 0:
            raise ValueError(f"interval must be at least 2 and order at least 0, not {self.interval} and {self.order}")

    def config(self) -> Any:
        """As diffusers has it; of its variants the one that keeps the features of the last layer only."""
        import torch
        from diffusers import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.order + 1,
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=True,
        )


Reuse = FirstBlock | TaylorSeer

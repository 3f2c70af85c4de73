"""Logits of a token network at some places of each sample, with classifier-free guidance."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from flashgrpo.processes.tokens.model import Head, TokenModel, Tokens
from flashgrpo.types import Condition, to_device


@dataclass(frozen=True)
class GuidedLogits:
    """Calls a network for the logits of some places: u + scale (c - u), u without the prompt, where scale is not 1.

    Both branches are rows of one call. The head computes only the places that are asked for.
    """

    model: TokenModel
    scale: float = 1.0

    @property
    def branches(self) -> int:
        """Rows of the network for one of these."""
        return 1 if self.scale == 1 else 2

    def __call__(
        self, tokens: Tokens, places: Int64[Tensor, "batch places"], condition: Condition
    ) -> Float32[Tensor, "batch places vocabulary"]:
        """Compute the logits, differentiably; -inf for the mask, which is never drawn."""
        at = to_device(places, tokens.device).repeat(self.branches, 1)

        def read(hidden: Tensor, head: Head) -> Tensor:
            return head(hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1])))

        logits = self.model.call(tokens.repeat(self.branches, 1), self._both(condition), read)
        if self.scale != 1:
            own, without = logits.chunk(2)
            logits = without + self.scale * (own - without)
        mask = self.model.mask
        if mask is None or mask >= self.model.vocabulary:
            return logits
        return logits.index_fill(-1, torch.tensor([mask], device=logits.device), -torch.inf)

    def _both(self, condition: Condition) -> Condition:
        return condition if self.scale == 1 else Condition.stack([condition, condition.replaced(self.model.nothing())])

"""What is read of a call of the network: log-probabilities of tokens, and divergences from other weights."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from flashgrpo.processes.choices import divergence
from flashgrpo.processes.tokens.chunks import by_chunks
from flashgrpo.processes.tokens.model import Head, Tokens

LogProbs = Float[Tensor, "batch tokens kinds"]


def log_probs(kinds: int, hidden: Float[Tensor, "batch tokens dim"], head: Head) -> LogProbs:
    """Return the log-probabilities of all kinds."""
    return by_chunks(hidden, head, kinds, _normalised)


def scores(
    kinds: int,
    action: Tokens,
    others: Sequence[LogProbs],
    hidden: Float[Tensor, "batch tokens dim"],
    head: Head,
) -> Float[Tensor, "batch columns"]:
    """Return means over tokens: of the log-probability of `action`, and of the divergence from each of `others`.

    Example: of the logits (2, 0, -1) and (0, 1, 0) the tokens (0, 1) have the mean -0.360645.
    """
    values = by_chunks(hidden, head, kinds, partial(_of_tokens, action, others)).unbind(dim=-1)
    # each laid out alike: a sum over another layout rounds otherwise, and a score has to be the same with columns
    return torch.stack([one.contiguous().mean(dim=1) for one in values], dim=1)


def _normalised(few: slice, logits: Tensor) -> Tensor:
    return logits.log_softmax(dim=-1)


def _of_tokens(action: Tokens, others: Sequence[LogProbs], few: slice, logits: Tensor) -> Tensor:
    own = logits.log_softmax(dim=-1)
    score = own.gather(-1, action[:, few, None])[..., 0]
    return torch.stack([score, *(divergence(own, other[:, few]) for other in others)], dim=-1)

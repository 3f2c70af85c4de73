"""What a token is drawn from: a softmax over the candidates that truncation leaves, in drawing as in scoring."""

from collections.abc import Sequence

import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from flashgrpo.seeds import Name, generator

Kept = Int32[Tensor, "*places candidates"]
"""Ids of the candidates of each place, the likeliest first; -1 after the last."""


def truncated(
    logits: Float32[Tensor, "*places vocabulary"], temperature: float, top_k: int | None, top_p: float
) -> tuple[Float32[Tensor, "*places candidates"], Kept | None]:
    """Divide logits by the temperature, keep the `top_k` largest, and of those the likeliest that make up `top_p`.

    Returns the log-probabilities of K candidates, min(top_k, V), -inf of those that are left out, and their ids; None
    for ids that are all there are, in order.

    With logits (2, 1, 0, -3), temperature 0.6 and top_k 2, candidate 0 has log-probability -0.173008, and -0.202769
    without truncation.
    """
    scaled = logits.float() / temperature
    if top_p == 1 and (top_k is None or top_k >= logits.shape[-1]):
        return scaled.log_softmax(-1), None
    values, ids = scaled.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    p = values.softmax(-1)
    dropped = p.cumsum(-1) - p >= top_p
    dropped[..., 0] = False  # the likeliest stays, whatever rounding makes of its sum
    return values.masked_fill(dropped, -torch.inf).log_softmax(-1), ids.masked_fill(dropped, -1).int()


def log_probs(
    logits: Float32[Tensor, "*places vocabulary"], temperature: float, kept: Kept | None
) -> Float32[Tensor, "*places candidates"]:
    """Return the log-probabilities of kept candidates by other logits; differentiable."""
    scaled = logits.float() / temperature
    if kept is None:
        return scaled.log_softmax(-1)
    return scaled.gather(-1, kept.clamp(min=0).long()).masked_fill(kept < 0, -torch.inf).log_softmax(-1)


def place_among(kept: Kept | None, tokens: Int64[Tensor, "*places"]) -> Int64[Tensor, "*places"]:
    """Return which of its place's candidates each token is."""
    return tokens if kept is None else (kept == tokens[..., None]).int().argmax(-1)


def entropy(log_p: Float32[Tensor, "*places candidates"]) -> Float32[Tensor, "*places"]:
    """Return the entropy of each place's candidates, in nats."""
    return -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0.0)).sum(-1)


def divergence(
    log_p: Float32[Tensor, "*places candidates"], log_q: Float32[Tensor, "*places candidates"]
) -> Float32[Tensor, "*places"]:
    """Return KL(p || q) of each place's candidates, exactly; differentiable by both.

    It is at least 0 and exactly 0 for equal bits.
    """
    apart = (log_p - log_q).masked_fill(log_p.isneginf(), 0.0)
    return (log_p.exp() * apart).sum(-1)


def gumbel(shape: tuple[int, ...], names: Sequence[Name]) -> Float32[Tensor, "names *shape"]:
    """Draw standard Gumbel noise by name, on the CPU: the largest log-probability with it is a draw.

    Added to logarithms it picks tokens of any probability; a race of exponentials in probabilities overflows.
    """
    noise = [torch.rand(shape, generator=generator(*name), dtype=torch.float64) for name in names]
    u = torch.stack(noise) if noise else torch.empty(0, *shape, dtype=torch.float64)
    return -(-u.clamp(min=1e-300).log()).log().float()

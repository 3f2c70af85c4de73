"""Paths from noise to tokens, and the jumps that follow them.

With t from 0 (noise) to 1 (clean), of a clean token x1 among V kinds,

    metric     p_t(x | x1) = softmax_x( -beta(t) d(x, x1) )         beta(t) = c (t / (1 - t))^alpha
    mixture    p_t(x | x1) = t [x = x1] + (1 - t) / V

d is the squared distance of normalised code embeddings. A token z jumps to x != z with the rate

    metric     u_t(x | z, x1) = p_t(x | x1) beta'(t) relu( d(z, x1) - d(x, x1) )
    mixture    u_t(x | z, x1) = [x = x1] / (1 - t)

which solves the Kolmogorov forward equation of p_t. A step from t to s has the jumps u_t (s - t) ("derivative", which
is URSA's, where beta'(0) is taken for 0 and the first step never moves), or u_t with beta(s) - beta(t) in place of
beta'(t) (s - t), and log((1 - t) / (1 - s)) in place of (s - t) / (1 - t) ("difference"). arXiv 2604.18518; the sampler
is that of arXiv 2412.03487 (kinetic-optimal discrete flow matching).
"""

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from flashgrpo.processes.tokens.chunks import categorical
from flashgrpo.processes.tokens.uniform.settings import AnyPath, Jumps, Metric
from flashgrpo.types import to_device

Kinds = Float32[Tensor, "batch tokens kinds"]
Tokens = Int64[Tensor, "batch tokens"]
Uniform = Float64[Tensor, "batch tokens"]
LARGEST_BETA = 1e12  # stands for infinity, which times a distance of 0 would be no number


@runtime_checkable
class TokenPath(Protocol):
    """How tokens are noised."""

    @property
    def vocabulary(self) -> int:
        """Kinds of tokens, V."""
        ...

    def probs(self, t: Float64[Tensor, " batch"], x1: Tokens) -> Kinds:
        """Return p_t(x | x1) of each kind, (B, L, V), at a time for each row."""
        ...

    def jumps(self, t: float, s: float, z: Tokens, x1: Tokens, kind: Jumps) -> Kinds:
        """Return how often z is expected to jump to each kind in a step from t to s, (B, L, V); to itself never."""
        ...


class MetricPath:
    """Noise by distance.

    Args:
        codes: (V, D) embeddings of the codes; they are normalised here.
    """

    def __init__(self, codes: Float[Tensor, "kinds dim"], settings: Metric) -> None:
        self.codes = torch.nn.functional.normalize(codes.float(), dim=-1, eps=1e-5)
        self.settings = settings

    @property
    def vocabulary(self) -> int:
        """Codes."""
        return len(self.codes)

    def beta(self, t: float) -> float:
        """Return c (t / (1 - t))^alpha."""
        if t >= 1:
            return LARGEST_BETA
        return min(self.settings.c * (t / (1 - t)) ** self.settings.alpha, LARGEST_BETA)

    def beta_derivative(self, t: float) -> float:
        """Return beta'(t) = c alpha (t / (1 - t))^(alpha - 1) / (1 - t)^2, and 0 at t = 0, as URSA's sampler does."""
        if t <= 0:
            return 0.0
        c, alpha = self.settings.c, self.settings.alpha
        return c * alpha * (t / (1 - t)) ** (alpha - 1) / (1 - t) ** 2

    def distances(self, x1: Tokens) -> Kinds:
        """Return the squared distance of each kind to each token, (B, L, V)."""
        d = (2 - 2 * (self.codes[x1] @ self.codes.T)).clamp(min=0)
        return d.scatter_(-1, x1[..., None], 0.0)

    def probs(self, t: Float64[Tensor, " batch"], x1: Tokens) -> Kinds:
        """Return softmax(-beta(t) d(x, x1))."""
        beta = torch.tensor([self.beta(one) for one in t.tolist()])
        return _softmax(self.distances(x1), to_device(beta, x1.device).view(-1, 1, 1))

    def jumps(self, t: float, s: float, z: Tokens, x1: Tokens, kind: Jumps) -> Kinds:
        """Return p_t(x | x1) relu(d(z, x1) - d(x, x1)) times what beta grows by."""
        growth = self.beta(s) - self.beta(t) if kind == "difference" else self.beta_derivative(t) * (s - t)
        d = self.distances(x1)
        nearer = (d.gather(-1, z[..., None]) - d).relu()
        return _softmax(d, self.beta(t)).mul_(nearer).mul_(growth)


class MixturePath:
    """A clean token or any."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def probs(self, t: Float64[Tensor, " batch"], x1: Tokens) -> Kinds:
        """Return t where x = x1, and (1 - t) / V everywhere."""
        t = to_device(t.float(), x1.device).view(-1, 1, 1)
        any_kind = ((1 - t) / self.vocabulary).expand(*x1.shape, self.vocabulary)
        return any_kind.scatter_add(-1, x1[..., None], t.expand(*x1.shape, 1))

    def jumps(self, t: float, s: float, z: Tokens, x1: Tokens, kind: Jumps) -> Kinds:
        """Return how often a token is expected to become the clean one."""
        rate = math.log((1 - t) / (1 - s)) if kind == "difference" else (s - t) / (1 - t)
        none = torch.zeros(*x1.shape, self.vocabulary, device=x1.device)
        return none.scatter_(-1, x1[..., None], rate).scatter_(-1, z[..., None], 0.0)


def make_path(settings: AnyPath, vocabulary: int, codes: Tensor | None) -> TokenPath:
    """Return the path of its settings.

    Raises:
        ValueError: a metric path of a model without codes.
    """
    if not isinstance(settings, Metric):
        return MixturePath(vocabulary)
    if codes is None:
        raise ValueError("rollout.path: this model has no code embeddings to measure distances by; take kind=mixture")
    return MetricPath(codes, settings)


def jumped(
    path: TokenPath, t: float, s: float, z: Tokens, x1: Tokens, kind: Jumps, whether: Uniform, to: Uniform
) -> Tokens:
    """Draw the tokens at s of those at t: each jumps with probability 1 - exp(-its jumps), to a kind by its share.

    Args:
        x1: guesses of the clean tokens.
        whether, to: numbers in [0, 1) that say whether a token jumps, and where to.
    """
    jumps = path.jumps(t, s, z, x1, kind)
    leaves = whether < -torch.expm1(-jumps.sum(dim=-1, dtype=torch.float64))
    return torch.where(leaves, categorical(jumps, to), z)


def _softmax(d: Kinds, beta: Tensor | float) -> Kinds:
    return (d * -beta).softmax(dim=-1)

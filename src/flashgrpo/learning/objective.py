"""What an update makes of the scores of its terms: objectives, as pure functions of columns of numbers.

With the ratio `r = exp(score - old)` of a replayed term, its advantage A and its weight w, the clipped objective is

    L = mean_i max( -w A r, -w A clip(r, 1 - low, 1 + high) ) + kl_coef KL_i        (PPO, arXiv 1707.06347, eq. 7)

Log-probabilities of videos are means over the latent dims, about two million of them, so ratios stay extremely near 1
and the published clip range is 1e-3. A, w and the old score are constants; the gradient goes through the new score.

Objectives are settings, too, so this file is free of torch: they calculate with the tensors that they are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Float32
from pydantic import Field

from flashgrpo.settings import FORBID_EXTRA, check_number, default_kind

Rows = Float32[Any, " batch"]
ClipRange = float | tuple[float, float]
FAR = 80.0  # a log-ratio whose exp float32 still holds


@dataclass(frozen=True, kw_only=True)
class Penalized:
    """What every objective has: penalties that hold the policy near the base model, and near the average.

    Args:
        kl_coef: weight of the KL divergence to the base model; 0 computes none. Of re-noised scores it is the squared
            distance of the velocities, mean((v - v_base)^2).
        average_coef: the same to the averaged weights of `behaviour`.
    """

    kl_coef: float = 0.0
    average_coef: float = 0.0
    coupled: ClassVar[bool] = False
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        for name in ("kl_coef", "average_coef"):
            check_number(name, getattr(self, name), 0)

    @property
    def columns(self) -> Sequence[str]:
        """What a replay has to bring besides the score."""
        return (*self._own_columns, *(("kl",) if self.kl_coef else ()), *(("kl_average",) if self.average_coef else ()))

    @property
    def _own_columns(self) -> Sequence[str]:
        return ()

    @property
    def needs_reference(self) -> bool:
        """Whether a column is computed by the base model's weights."""
        return self.kl_coef > 0

    @property
    def smallest_clip(self) -> float | None:
        """How far from 1 a ratio is at least where it is clipped; None where no ratio is."""
        return None

    def penalized(self, losses: Rows, columns: Mapping[str, Rows]) -> Rows:
        """Add the penalties to the loss of each of T terms, (T,)."""
        for coefficient, name in ((self.kl_coef, "kl"), (self.average_coef, "kl_average")):
            losses = losses + coefficient * columns[name] if coefficient else losses
        return losses


@dataclass(frozen=True)
class Clipped(Penalized):
    """The clipped surrogate.

    Args:
        clip_range: c of clip(ratio, 1 - c, 1 + c), or a pair (low, high).
    """

    clip_range: ClipRange = 1e-3
    kind: Literal["clipped"] = "clipped"

    def __post_init__(self) -> None:
        super().__post_init__()
        _bounds(self.clip_range)

    @property
    def smallest_clip(self) -> float | None:
        """The smaller of both bounds."""
        return min(self.clip_range) if isinstance(self.clip_range, tuple) else self.clip_range

    def losses(self, score: Rows, old: Rows, advantage: Rows, weight: Rows, columns: Mapping[str, Rows]) -> Rows:
        """Return the loss of each of T terms, (T,)."""
        return self.penalized(policy_losses(score, old, advantage, weight, self.clip_range), columns)

    def metrics(self, score: Rows, old: Rows, advantage: Rows, columns: Mapping[str, Rows]) -> dict[str, float]:
        """Return how far the policy has moved from the one that drew: `ratio_metrics` of T terms."""
        return {name: float(value) for name, value in ratio_metrics(score, old, self.clip_range).items()}


@dataclass(frozen=True)
class KlMasked(Penalized):
    """Flow-DPPO (arXiv 2606.11025): a term that has moved far, in the direction of its advantage, has no gradient.

        L = mean_i -w A r keep,   keep = not( D >= tau and ((r > 1 and A > 0) or (r < 1 and A < 0)) )

    D, the column `kl_old`, is the divergence from the policy that drew, of the whole step and not of the one sample
    that a ratio sees. Terms that correct what has gone too far pass at any distance. At D < tau it is -w A r.

    With tau 0.02, A = 1 and r = 1.5: at D = 0.01 the loss is -1.5, at D = 0.02 it is a constant; with A = -1 it is 1.5.

    Args:
        tau: the divergence from which terms are masked; a mean over the latent dims, as log-probabilities are.
    """

    tau: float = 1e-5
    kind: Literal["kl-masked"] = "kl-masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau, 0)

    @property
    def _own_columns(self) -> Sequence[str]:
        return ("kl_old",)

    def losses(self, score: Rows, old: Rows, advantage: Rows, weight: Rows, columns: Mapping[str, Rows]) -> Rows:
        """Return the loss of each of T terms, (T,)."""
        _check_rows(score=score, old=old, advantage=advantage, weight=weight, kl_old=columns["kl_old"])
        gain, log_ratio = (weight * advantage).detach(), score - old.detach()
        masked = self._masked(log_ratio, advantage, columns["kl_old"])
        ratio = log_ratio.masked_fill(masked, 0.0).exp()
        return self.penalized(-gain * ratio, columns)

    def metrics(self, score: Rows, old: Rows, advantage: Rows, columns: Mapping[str, Rows]) -> dict[str, float]:
        """Return how far the policy has moved, and the share of terms that are masked."""
        masked = self._masked(score - old, advantage, columns["kl_old"])
        shares = {"clip_fraction": 1.0 * masked.sum() / len(masked), "kl_old": columns["kl_old"].mean()}
        return {name: float(value) for name, value in (_moved(score, old) | shares).items()}

    def _masked(self, log_ratio: Rows, advantage: Rows, kl_old: Rows) -> Any:
        return (kl_old >= self.tau) & (log_ratio * advantage > 0).detach()


@dataclass(frozen=True)
class Contrast(Penalized):
    """DiffusionNFT (arXiv 2509.16117): a good sample draws the model nearer, a bad one draws its mirror image nearer.

        v+ = beta v + (1 - beta) v_old     v- = (1 + beta) v_old - beta v     q = clamp(A / (2 scale) + 1/2, 0, 1)
        L = mean_i w (scale / beta) ( q E(v+) + (1 - q) E(v-) )

    E is the error of a re-noised score, v_old the velocity of the policy that drew. There is no ratio. At v = v_old the
    gradient is that of -w A score, whatever beta is, as long as |A| <= scale.

    With scale 5, A = 2.5 (q = 3/4), E(v+) = 1 and E(v-) = 2 the loss is 5 (3/4 + 2/4) = 6.25.

    Args:
        beta: how far v+ and v- are from v_old.
        scale: the advantage at which q is 1.
        pull_flat: also draw terms with advantage 0 towards v_old, as published; otherwise they have weight 0.
    """

    beta: float = 1.0
    scale: float = 5.0
    pull_flat: bool = False
    kind: Literal["contrast"] = "contrast"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "scale"):
            check_number(name, getattr(self, name))

    @property
    def _own_columns(self) -> Sequence[str]:
        """The errors of v+ and v- by their beta."""
        return (f"toward:{self.beta}", f"away:{self.beta}")

    def losses(self, score: Rows, old: Rows, advantage: Rows, weight: Rows, columns: Mapping[str, Rows]) -> Rows:
        """Return the loss of each of T terms, (T,)."""
        toward, away = (columns[name] for name in self._own_columns)
        _check_rows(toward=toward, away=away, advantage=advantage, weight=weight)
        q = (advantage / (2 * self.scale) + 0.5).clamp(0, 1)
        counts = weight if self.pull_flat else weight * (advantage != 0)
        return self.penalized(counts * (self.scale / self.beta) * (q * toward + (1 - q) * away), columns)

    def metrics(self, score: Rows, old: Rows, advantage: Rows, columns: Mapping[str, Rows]) -> dict[str, float]:
        """Return the mean errors of v+ and v-, and of v."""
        toward, away = (columns[name].mean() for name in self._own_columns)
        return {"error": -float(score.mean()), "error_toward": float(toward), "error_away": float(away)}


AnyObjective = Annotated[Clipped | KlMasked | Contrast, Field(discriminator="kind"), default_kind("clipped")]


def policy_losses(log_prob: Rows, old_log_prob: Rows, advantage: Rows, weight: Rows, clip_range: ClipRange) -> Rows:
    """Return the clipped loss of each of T terms, (T,); all inputs are (T,), `clip_range` is c or a pair (low, high).

    Micro-batches that add up `policy_losses(...).sum() / T` give the gradient of the whole batch, whatever their sizes.

    With c = 0.2, w = 1: A = 1 and r = 1.5 give max(-1.5, -1.2) = -1.2, constant, since the sample has been made likely
    enough; A = -1 and r = 1.5 give max(1.5, 1.2) = 1.5, and the gradient keeps making it less likely.
    """
    _check_rows(log_prob=log_prob, old_log_prob=old_log_prob, advantage=advantage, weight=weight)
    low, high = _bounds(clip_range)
    log_ratio, gain = log_prob - old_log_prob.detach(), (weight * advantage).detach()
    clipped_anyway = (gain >= 0) & (log_ratio > FAR)  # where exp would be inf, and its derivative 0 * inf
    ratio = log_ratio.masked_fill(clipped_anyway, FAR).exp()
    return (-gain * ratio).maximum(-gain * ratio.clamp(low, high))


def ratio_metrics(log_prob: Rows, old_log_prob: Rows, clip_range: ClipRange) -> dict[str, Float32[Any, ""]]:
    """Return how far the policy has moved from the one that drew, as 0-d tensors.

    - `ratio_mean`: mean of r; 1 up to sampling noise while old and new policy are close.
    - `ratio_max_dev`: largest |r - 1|. Before the first optimizer step it is 0, or else replay differs from rollout.
    - `clip_fraction`: share of ratios outside the clip range, on either side.
    - `approx_kl`: mean of (r - 1) - log r, which is never negative: an estimate of KL(old || new) from samples of old.

    Metrics of a whole update: collect the log-probabilities of its micro-batches and call this once.
    """
    _check_rows(log_prob=log_prob, old_log_prob=old_log_prob)
    low, high = _bounds(clip_range)
    ratio = (log_prob - old_log_prob).detach().exp()
    return _moved(log_prob, old_log_prob) | {"clip_fraction": ((ratio < low) | (ratio > high)).float().mean()}


def _moved(score: Rows, old: Rows) -> dict[str, Float32[Any, ""]]:
    """Return the metrics of `ratio_metrics` that know of no clip range."""
    log_ratio = (score - old).detach()
    ratio = log_ratio.exp()
    return {
        "ratio_mean": ratio.mean(),
        "ratio_max_dev": (ratio - 1).abs().max(),
        "approx_kl": (log_ratio.expm1() - log_ratio).mean(),
    }


def _bounds(clip_range: ClipRange) -> tuple[float, float]:
    low, high = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    for bound in (low, high):
        check_number("clip_range", bound)
    return 1 - low, 1 + high


def _check_rows(**rows: Any) -> None:
    """Every tensor is (T,) with one T > 0: (T, 1) beside (T,) would broadcast to (T, T) and average the wrong pairs."""
    shapes = {name: tuple(row.shape) for name, row in rows.items()}
    if len(set(shapes.values())) != 1 or len(first := next(iter(shapes.values()))) != 1 or first[0] == 0:
        raise ValueError(f"the loss takes one value per term, all of shape (T,), got {shapes}")

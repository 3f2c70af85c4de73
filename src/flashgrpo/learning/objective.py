"""What an update makes of the scores of its terms: objectives, as pure functions of columns of numbers.

With the ratio `r = exp(score - old)` of a replayed term, its advantage A and its weight w, the clipped objective is

    L = mean_i max( -w A r, -w A clip(r, 1 - low, 1 + high) ) + kl_coef KL_i        (PPO, arXiv 1707.06347, eq. 7)

Log-probabilities of videos are means over the latent dims, about two million of them, so ratios stay extremely near 1
and the published clip range is 1e-3. A, w and the old score are constants; the gradient goes through the new score.

Objectives are settings, too, so this file is free of torch: they calculate with the tensors that they are given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from flashgrpo.learning.penalized import ClipsRatios, Penalized
from flashgrpo.learning.ratio import (
    ClipRange,
    Columns,
    Rows,
    check_rows,
    finite_ratio,
    log_softmax_by_key,
    max_by_key,
    moved,
    policy_losses,
    ratio_metrics,
    sum_by_key,
)
from flashgrpo.settings import check_number, default_kind

FAR_RATIO = 1e15  # whose square float32 still holds


@dataclass(frozen=True)
class Clipped(ClipsRatios):
    """The clipped surrogate, `policy_losses`; see `ClipsRatios` for its range."""

    kind: Literal["clipped"] = "clipped"

    def losses(self, score: Rows, old: Rows, advantage: Rows, weight: Rows, columns: Columns) -> Rows:
        """Return the loss of each of T terms, (T,)."""
        return self.penalized(policy_losses(score, old, advantage, weight, self.clip_range), columns)

    def metrics(self, score: Rows, old: Rows, advantage: Rows, columns: Columns) -> dict[str, float]:
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
        tau: the divergence from which terms are masked; a mean over the latent dims, as log-probabilities are. Of
            re-noised scores D is the squared distance of the velocities, mean((v - v_old)^2), which is another scale.
    """

    tau: float = 1e-5
    kind: Literal["kl-masked"] = "kl-masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau, 0)

    @property
    def _own_columns(self) -> Sequence[str]:
        return ("kl_old",)

    def losses(self, score: Rows, old: Rows, advantage: Rows, weight: Rows, columns: Columns) -> Rows:
        """Return the loss of each of T terms, (T,)."""
        check_rows(score=score, old=old, advantage=advantage, weight=weight, kl_old=columns["kl_old"])
        gain, log_ratio = (weight * advantage).detach(), score - old.detach()
        masked = self._masked(log_ratio, advantage, columns["kl_old"])
        ratio = finite_ratio(log_ratio.masked_fill(masked, 0.0), gain)
        return self.penalized(-gain * ratio, columns)

    def metrics(self, score: Rows, old: Rows, advantage: Rows, columns: Columns) -> dict[str, float]:
        """Return how far the policy has moved, and the share of terms that are masked."""
        masked = self._masked(score - old, advantage, columns["kl_old"])
        shares = {"clip_fraction": 1.0 * masked.sum() / len(masked), "kl_old": columns["kl_old"].mean()}
        return {name: float(value) for name, value in (moved(score, old) | shares).items()}

    def _masked(self, log_ratio: Rows, advantage: Rows, kl_old: Rows) -> Any:
        return (kl_old >= self.tau) & (log_ratio * advantage > 0).detach()


@dataclass(frozen=True)
class Drpo(Penalized):
    """DRPO, the relative of Flow-DPPO for tokens: far ratios cost, the more the likelier the token was.

        L = mean_i -w A r + w |A| m (r - 1)^2 / (2 eps),    m = exp(old), the probability by the policy that drew

    A ratio of a rare token moves little probability and is left alone; that of a likely one is held back smoothly,
    where a clip would cut its gradient off. At r = 1 the gradient is that of -w A score. Of scores that are
    log-probabilities of single tokens only. Formula as in the code of Tencent-Hunyuan/UniRL at 1a7b501.

    With eps 2, A = -1, w = 1, old = log(1/2) and r = 1.5: L = 1.5 + 0.5 * 0.25 / 4 = 1.53125.

    Args:
        eps: how far ratios may go; the smaller the nearer to 1 they stay.
    """

    eps: float = 12.5
    kind: Literal["drpo"] = "drpo"
    needs_probabilities: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eps of Drpo", self.eps)

    def losses(self, score: Rows, old: Rows, advantage: Rows, weight: Rows, columns: Columns) -> Rows:
        """Return the loss of each of T terms, (T,)."""
        check_rows(score=score, old=old, advantage=advantage, weight=weight)
        gain, old = (weight * advantage).detach(), old.detach()
        ratio = finite_ratio(score - old, gain)
        away = gain.abs() * old.exp() * (ratio.clamp(max=FAR_RATIO) - 1).square() / (2 * self.eps)
        return self.penalized(away - gain * ratio, columns)

    def metrics(self, score: Rows, old: Rows, advantage: Rows, columns: Columns) -> dict[str, float]:
        """Return how far the policy has moved."""
        return {name: float(value) for name, value in moved(score, old).items()}


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

    def losses(self, score: Rows, old: Rows, advantage: Rows, weight: Rows, columns: Columns) -> Rows:
        """Return the loss of each of T terms, (T,)."""
        toward, away = (columns[name] for name in self._own_columns)
        check_rows(toward=toward, away=away, advantage=advantage, weight=weight)
        q = (advantage / (2 * self.scale) + 0.5).clamp(0, 1)
        counts = weight if self.pull_flat else weight * (advantage != 0)
        return self.penalized(counts * (self.scale / self.beta) * (q * toward + (1 - q) * away), columns)

    def metrics(self, score: Rows, old: Rows, advantage: Rows, columns: Columns) -> dict[str, float]:
        """Return the mean errors of v+ and v-, and of v."""
        toward, away = (columns[name].mean() for name in self._own_columns)
        return {"error": -float(score.mean()), "error_toward": float(toward), "error_away": float(away)}


@dataclass(frozen=True)
class Competing(ClipsRatios):
    """Terms compete (arXiv 2605.14278): those of a key share a probability of 1, and a ratio is that of a term's share.

        log pi_g = log softmax_g( s_g / tau )    over the terms of a key          r_g = pi_g / pi_old_g
        L = mean_g max( -w A r, -w A clip(r, 1 - low, 1 + high) ) + kl_coef KL(pi || pi_base)

    For scores that are no log-probabilities: of minus the energy of a branch, by which one branch is more likely
    than another, and none likely by itself. What draws one nearer pushes the others away: at ratio 1, for G terms of
    weight 1,

        dL/ds_g = -(A_g - pi_g sum_j A_j) / (G tau)

    which is the gradient of `Clipped` over tau where advantages sum to 0. A share has no derivative where its ratio is
    clipped; the score still has those of the other shares. The published code has tau 1, at which its shares hardly
    differ, and a kl_coef of 10 for that scale.

    With tau 1, s = (-0.1, -0.3, -0.2) as it was drawn and A = (1, -0.5, 0.25): pi = (0.367165, 0.300610, 0.332225) and
    dL/ds = (-0.241542, 0.241819, -0.000277).

    Args:
        tau: the temperature; differences of scores that are far below it make all shares alike.
        clean: what is drawn without exploration competes, too, with score 0, which is what an energy of it is by the
            weights that drew (not in the paper). Without it, nothing is learnt from all branches of a key being better
            than their anchor: dL/ds sums to 0 over them. With it, it sums to minus `pi_clean sum_j A_j / (G tau)`.
    """

    clip_range: ClipRange = (0.1, 0.2)
    tau: float = 0.01
    clean: bool = False
    coupled: ClassVar[bool] = True
    kind: Literal["competing"] = "competing"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau of Competing", self.tau, 1e-9)  # float32 holds no smaller difference of scores near 1

    @property
    def constants(self) -> Sequence[str]:
        """All of them: scores by other weights."""
        return self.columns

    @property
    def _penalties(self) -> Sequence[tuple[float, str]]:
        both = ((self.kl_coef, "score_base"), (self.average_coef, "score_average"))
        return [(coefficient, name) for coefficient, name in both if coefficient]

    def log_shares(self, score: Rows, key: Any) -> Rows:
        """Return log pi of each of T terms, (T,); `key` (T,) numbers the keys from 0."""
        return log_softmax_by_key(score / self.tau, key, self.clean)

    def log_ratio(self, score: Rows, old: Rows, columns: Columns) -> Rows:
        """Return the logarithm of the ratio of each term's share, (T,)."""
        return self.log_shares(score, columns["key"]) - self.log_shares(old, columns["key"])

    def losses(self, score: Rows, old: Rows, advantage: Rows, weight: Rows, columns: Columns) -> Rows:
        """Return the loss of each of T terms, (T,); that of a term has the whole penalty of its key."""
        now, then = (self.log_shares(values, columns["key"]) for values in (score, old))
        losses = policy_losses(now, then, advantage, weight, self.clip_range)
        return self.penalized(losses, {**columns, "score": score})

    def penalized(self, losses: Rows, columns: Columns) -> Rows:
        """Add the penalties to the loss of each of T terms, (T,), each the divergence of the shares of its key."""
        for coefficient, name in self._penalties:
            losses = losses + coefficient * self._kl(columns["score"], columns[name], columns["key"])
        return losses

    def metrics(self, score: Rows, old: Rows, advantage: Rows, columns: Columns) -> dict[str, float]:
        """Return how far shares have moved, their KLs, the mean score, and the mean over keys of the largest share.

        `largest_share` is 1/G where tau is too high to tell G terms apart, and 1 where one of them takes all.
        """
        key = columns["key"]
        now, then = (self.log_shares(values, key) for values in (score, old))
        found = dict(ratio_metrics(now, then, self.clip_range)) | {"score": score.mean()}
        found["largest_share"] = max_by_key(now.exp(), key).mean()
        names = {"score_base": "kl", "score_average": "kl_average"}
        found |= {names[name]: self._kl(score, columns[name], key).mean() for _, name in self._penalties}
        return {name: float(value) for name, value in found.items()}

    def _kl(self, score: Rows, other: Rows, key: Any) -> Rows:
        """Return KL(pi || pi of other scores) of each term's key, (T,)."""
        now = self.log_shares(score, key)
        then = self.log_shares(other, key)
        divergence = sum_by_key(now.exp() * (now - then), key)
        if not self.clean:
            return divergence
        now, then = now - score / self.tau, then - other / self.tau  # the logarithm of the share that has score 0
        return divergence + now.exp() * (now - then)


AnyObjective = Annotated[
    Clipped | KlMasked | Drpo | Contrast | Competing, Field(discriminator="kind"), default_kind("clipped")
]

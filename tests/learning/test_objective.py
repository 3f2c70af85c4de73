"""The clipped objective branch by branch, and its metrics."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from flashgrpo.learning.objective import Clipped, Contrast, Drpo, KlMasked
from flashgrpo.learning.ratio import policy_losses, ratio_metrics
from flashgrpo.settings import LARGEST, SMALLEST

REFUSED = (ValueError, TypeCheckError)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


def loss_and_gradient(ratio: float, advantage: float, weight: float = 1.0, clip_range=0.2) -> tuple[float, float]:
    """The loss of one term at `ratio`, and its derivative with respect to the ratio."""
    old = one(-0.9)
    log_prob = (old + math.log(ratio)).requires_grad_()
    loss = policy_losses(log_prob, old, one(advantage), one(weight), clip_range).mean()
    loss.backward()
    return loss.item(), log_prob.grad.item() / ratio  # d/d log_prob = r d/dr


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.5, 2.0, -2.4, 0.0),  # good and already likelier than 1 + c: clipped
        (0.5, 2.0, -1.0, -2.0),  # good and less likely: pushed back, unclipped
        (0.5, -2.0, 1.6, 0.0),  # bad and already rarer than 1 - c: clipped
        (1.5, -2.0, 3.0, 2.0),  # bad and likelier: pushed down, unclipped
        (1.1, 2.0, -2.2, -2.0),  # within the range the two terms are one
        (0.9, -2.0, 1.8, 2.0),
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_clip_branches_by_hand(ratio, advantage, loss, gradient):
    assert loss_and_gradient(ratio, advantage) == pytest.approx((loss, gradient), abs=1e-5)


def test_weight_scales_loss_and_gradient():
    assert loss_and_gradient(1.1, 2.0, weight=0.5) == pytest.approx((-1.1, -1.0), abs=1e-5)


def test_asymmetric_clip_range():
    """(0.1, 0.3) clips to [0.9, 1.3]: A = 1 at r = 1.25 still has a gradient, A = -1 at r = 0.85 has none."""
    assert loss_and_gradient(1.25, 1.0, clip_range=(0.1, 0.3)) == pytest.approx((-1.25, -1.0), abs=1e-5)
    assert loss_and_gradient(0.85, -1.0, clip_range=(0.1, 0.3)) == pytest.approx((0.9, 0.0), abs=1e-5)
    assert loss_and_gradient(1.5, 1.0, clip_range=(0.1, 0.3)) == pytest.approx((-1.3, 0.0), abs=1e-5)


def test_first_pass_is_the_policy_gradient():
    """At ratio exactly 1 the loss is -mean(w A), and its gradient -w A / B, with the published clip range too."""
    old = torch.tensor([-0.93, -0.87, -0.91])
    log_prob = old.clone().requires_grad_()
    advantage, weight = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.3, 1.0, 0.7])
    loss = policy_losses(log_prob, old, advantage, weight, 1e-3).mean()
    metrics = ratio_metrics(log_prob, old, 1e-3)
    loss.backward()
    assert loss.item() == pytest.approx((-1.3 + 2.0 - 0.35) / 3)
    torch.testing.assert_close(log_prob.grad, -(weight * advantage) / 3)
    assert metrics["ratio_max_dev"] == metrics["clip_fraction"] == metrics["approx_kl"] == 0
    assert metrics["ratio_mean"] == 1


def test_only_the_new_log_probability_has_a_gradient():
    inputs = [torch.tensor([0.1, 0.2]).requires_grad_() for _ in range(4)]
    policy_losses(*inputs, 0.2).mean().backward()
    assert inputs[0].grad is not None
    assert all(constant.grad is None for constant in inputs[1:])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 11), min_size=0, max_size=4, unique=True))
def test_micro_batches_add_up_to_the_batch(seed, cuts):
    generator = torch.Generator().manual_seed(seed)
    old, advantage = torch.randn(2, 12, generator=generator)
    weight = torch.rand(12, generator=generator)
    log_prob = (old + 0.2 * torch.randn(12, generator=generator)).requires_grad_()
    loss = policy_losses(log_prob, old, advantage, weight, 0.1).mean()
    (whole,) = torch.autograd.grad(loss, log_prob)
    parts = torch.zeros(12)
    for rows in torch.arange(12).tensor_split(sorted(cuts)):
        losses = policy_losses(log_prob[rows], old[rows], advantage[rows], weight[rows], 0.1)
        parts += torch.autograd.grad(losses.sum() / 12, log_prob)[0]
    torch.testing.assert_close(parts, whole, atol=1e-7, rtol=1e-6)


def test_metrics_by_hand():
    """Ratios 1, 2, 1/2 and 1.05, c = 0.1: two of four outside; KL (0 + 1 - ln 2 - 0.5 + ln 2 + 0.05 - ln 1.05) / 4."""
    log_prob = torch.tensor([1.0, 2.0, 0.5, 1.05]).log()
    metrics = ratio_metrics(log_prob, torch.zeros(4), 0.1)
    assert metrics["ratio_max_dev"].item() == pytest.approx(1.0)
    assert metrics["ratio_mean"].item() == pytest.approx(4.55 / 4)
    assert metrics["clip_fraction"].item() == 0.5
    assert metrics["approx_kl"].item() == pytest.approx((0.5 + 0.05 - math.log(1.05)) / 4)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


@settings(max_examples=30, deadline=None)
@given(ratio=st.floats(1e-7, 3e-3))
def test_approx_kl_of_tiny_moves_is_never_negative(ratio):
    """(r - 1) - log r is about x^2 / 2 with x = log r: video ratios are that close to 1."""
    kl = ratio_metrics(one(ratio), one(0.0), 0.1)["approx_kl"].item()
    assert 0 <= kl <= ratio**2


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (1,), ()])
def test_shapes_that_would_broadcast_are_refused(wrong, shape):
    inputs = [torch.zeros(3)] * 4
    inputs[wrong] = torch.zeros(shape)
    with pytest.raises(REFUSED):
        policy_losses(*inputs, 0.2)


def test_columns_and_nothing_are_refused():
    for shape in ((3, 1), (0,), ()):
        with pytest.raises(REFUSED):
            policy_losses(*[torch.zeros(shape)] * 4, 0.2)


@pytest.mark.parametrize("clip_range", [0.0, -0.1, math.nan, math.inf, (0.1, 0.0), (0.0, 0.1)])
def test_clip_ranges_without_room_are_refused(clip_range):
    with pytest.raises(ValueError, match="clip_range"):
        policy_losses(*[torch.zeros(2)] * 4, clip_range)


def test_the_kl_penalty_is_added_to_each_term():
    """Good and at r = 1.1: -2.2 + 0.5 * 0.3; its gradient by the KL is the coefficient, whatever is clipped."""
    kl = torch.tensor([0.3, 0.1]).requires_grad_()
    score = torch.tensor([1.1, 1.5]).log().requires_grad_()
    rows = torch.zeros(2), torch.tensor([2.0, 2.0]), torch.ones(2)
    losses = Clipped(clip_range=0.2, kl_coef=0.5).losses(score, *rows, {"kl": kl})
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([-2.2 + 0.15, -2.4 + 0.05])
    assert kl.grad.tolist() == [0.5, 0.5]
    assert score.grad.tolist() == pytest.approx([-2.2, 0.0])


def test_an_objective_says_what_it_needs():
    assert (Clipped().columns, Clipped().needs_reference) == ((), False)
    assert (Clipped(kl_coef=0.1).columns, Clipped(kl_coef=0.1).needs_reference) == (("kl",), True)
    rows = torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.1]), torch.ones(2), torch.ones(2)
    assert torch.equal(Clipped(0.05).losses(*rows, {}), policy_losses(*rows, 0.05))
    expected = {name: value.item() for name, value in ratio_metrics(*rows[:2], 0.05).items()}
    assert Clipped(0.05).metrics(*rows[:3], {}) == expected


@pytest.mark.parametrize("clip_range", [0.0, -0.1, math.nan, math.inf, (0.1, 0.0), (0.0, 0.1)])
def test_an_objective_is_refused_where_it_is_built(clip_range):
    with pytest.raises(ValueError, match="clip_range"):
        Clipped(clip_range)
    for kl_coef in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="kl_coef"):
            Clipped(kl_coef=kl_coef)


# ---- Flow-DPPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [0.0, 0.019, 0.02, 5.0])
@pytest.mark.parametrize(
    ("ratio", "advantage", "corrective"),
    [(1.5, 2.0, False), (0.5, 2.0, True), (0.5, -2.0, False), (1.5, -2.0, True), (1.0, 2.0, True), (1.0, -2.0, True)],
)
def test_the_mask_lets_corrective_terms_pass_at_any_distance(ratio, advantage, corrective, divergence):
    """Below tau the loss is -w A r; from tau on only terms that go back have a gradient, with all of it."""
    score = one(math.log(ratio)).requires_grad_()
    columns = {"kl_old": one(divergence)}
    rows = one(0.0), one(advantage), one(0.5)
    losses = KlMasked(tau=0.02).losses(score, *rows, columns)
    (derivative,) = torch.autograd.grad(losses.sum(), score)
    passes = corrective or divergence < 0.02
    assert derivative.item() == pytest.approx(-0.5 * advantage * ratio if passes else 0.0, abs=1e-6)
    if passes:
        assert losses.item() == pytest.approx(-0.5 * advantage * ratio)
    metrics = KlMasked(tau=0.02).metrics(score, rows[0], rows[1], columns)
    assert metrics["clip_fraction"] == float(not passes)
    assert metrics["kl_old"] == pytest.approx(divergence)
    assert metrics["ratio_max_dev"] == pytest.approx(abs(ratio - 1), abs=1e-6)


@pytest.mark.parametrize("advantage", [0.0, 2.0])
def test_a_ratio_beyond_float32_is_a_constant(advantage):
    """Of a term of a flat group, too: 0 times inf would be NaN, and cost the optimizer step."""
    for objective in (Clipped(clip_range=0.2), KlMasked(tau=0.02), KlMasked(tau=1e9)):
        score = one(120.0).requires_grad_()
        loss = objective.losses(score, one(0.0), one(advantage), one(1.0), {"kl_old": one(1.0)}).sum()
        assert loss.isfinite()
        (derivative,) = torch.autograd.grad(loss, score)
        assert derivative.item() == 0


def test_penalties_come_on_top_of_any_objective():
    columns = {"kl": one(0.3), "kl_average": one(0.2), "kl_old": one(0.0), "toward:1.0": one(1.0), "away:1.0": one(1.0)}
    rows = one(0.0), one(0.0), one(2.0), one(1.0)
    for kind in (Clipped, KlMasked, Drpo, Contrast):
        plain, penalized = kind(), kind(kl_coef=0.5, average_coef=2.0)
        assert penalized.columns == (*plain.columns, "kl", "kl_average")
        more = penalized.losses(*rows, columns) - plain.losses(*rows, columns)
        assert more.item() == pytest.approx(0.5 * 0.3 + 2.0 * 0.2, rel=1e-5)


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_settings_of_the_other_objectives_are_refused_where_they_are_built(wrong):
    for build in (
        lambda: KlMasked(tau=wrong),
        lambda: Drpo(eps=wrong),
        lambda: Contrast(beta=wrong),
        lambda: Contrast(scale=wrong),
        lambda: Clipped(average_coef=wrong),
    ):
        with pytest.raises(ValueError, match="must be"):
            build()


# ---- DRPO ------------------------------------------------------------------------------------------------------------


def test_drpo_by_hand():
    """Old probability 1/2, ratio 1.5, eps 2: -A r + |A| / 2 * (1/4) / 4; by the log-ratio r (-A + |A| / 2 * .5 / 2)."""
    for advantage, loss, slope in ((-1.0, 1.53125, 1.6875), (1.0, -1.46875, -1.3125)):
        old = torch.tensor([0.5]).log()
        score = (old + math.log(1.5)).requires_grad_()
        found = Drpo(eps=2.0).losses(score, old, torch.tensor([advantage]), one(1.0), {})
        assert found.item() == pytest.approx(loss, rel=1e-6)
        assert torch.autograd.grad(found.sum(), score)[0].item() == pytest.approx(slope, rel=1e-5)


def test_drpo_begins_as_the_policy_gradient_and_holds_likely_tokens_back():
    old = torch.tensor([0.9, 0.01]).log()
    score = old.clone().requires_grad_()
    weight = torch.tensor([2.0, 1.0])
    (first,) = torch.autograd.grad(Drpo().losses(score, old, torch.tensor([1.0, -0.5]), weight, {}).sum(), score)
    assert first.tolist() == pytest.approx([-2.0, 0.5])
    far = (old + 1.0).requires_grad_()
    (slope,) = torch.autograd.grad(Drpo(eps=1.0).losses(far, old, torch.ones(2), torch.ones(2), {}).sum(), far)
    assert slope[0] > 0 > slope[1]
    rare, certain = (old + 89.0, old - 89.0)
    for score in (rare, certain):
        assert Drpo().losses(score, old, torch.ones(2), torch.ones(2), {}).isfinite().all()
    assert Drpo().metrics(old, old, torch.ones(2), {})["ratio_mean"] == 1


# ---- DiffusionNFT ----------------------------------------------------------------------------------------------------


def contrast(advantage: list[float], toward: float = 1.0, away: float = 2.0, **settings) -> torch.Tensor:
    """The losses of terms with these advantages."""
    objective = Contrast(**settings)
    rows = [torch.zeros(len(advantage)), torch.zeros(len(advantage)), torch.tensor(advantage)]
    columns = {objective.columns[0]: rows[0] + toward, objective.columns[1]: rows[0] + away}
    return objective.losses(*rows, torch.ones(len(advantage)), columns)


def test_contrast_by_hand():
    """q of A (-7, -2.5, 2.5, 7) = 0, 1/4, 3/4, 1; 5 (q 1 + (1 - q) 2), divided by beta."""
    assert contrast([-7.0, -2.5, 2.5, 7.0]).tolist() == pytest.approx([10, 8.75, 6.25, 5])
    assert contrast([2.5], beta=0.1).tolist() == pytest.approx([62.5])
    assert contrast([0.5], scale=1.0).tolist() == pytest.approx([1.25])


def test_flat_terms_pull_only_where_they_are_told_to():
    """An advantage of 0 is q = 1/2: 5 (1/2 + 2/2) = 7.5."""
    assert contrast([0.0, 2.5]).tolist() == pytest.approx([0, 6.25])
    assert contrast([0.0, 2.5], pull_flat=True).tolist() == pytest.approx([7.5, 6.25])


def test_contrast_reports_its_errors():
    objective = Contrast(beta=0.5)
    columns = {"toward:0.5": torch.tensor([1.0, 2.0]), "away:0.5": torch.tensor([3.0, 4.0])}
    found = objective.metrics(torch.tensor([-2.0, -3.0]), torch.zeros(2), torch.ones(2), columns)
    assert found == pytest.approx({"error": 2.5, "error_toward": 1.5, "error_away": 3.5})
    assert objective.smallest_clip is None


@pytest.mark.parametrize("kind", [Clipped, KlMasked, Drpo, Contrast])
def test_the_largest_and_the_smallest_coefficients_give_finite_losses(kind):
    """Columns near 1, an advantage clipped to 5, and every pair of bounds."""
    names = [
        "average_coef",
        *{Clipped: ["clip_range"], KlMasked: ["tau"], Drpo: ["eps"], Contrast: ["beta", "scale"]}[kind],
    ]
    for values in itertools.product((SMALLEST, LARGEST), repeat=len(names)):
        objective = kind(kl_coef=LARGEST, **dict(zip(names, values, strict=True)))
        rows = {name: torch.tensor([1.5, 0.5]).requires_grad_() for name in ("score", *objective.columns)}
        advantage = torch.tensor([5.0, -5.0])
        losses = objective.losses(rows["score"], torch.ones(2), advantage, torch.ones(2), rows)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert all(row.grad is None or row.grad.isfinite().all() for row in rows.values())

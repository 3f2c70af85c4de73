"""The competing objective of KVPO: golden numbers, and what holds for any of them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.learning.objective import Clipped, Competing
from flashgrpo.learning.ratio import log_softmax_by_key
from flashgrpo.settings import LARGEST, SMALLEST

GOLDEN = torch.tensor([-0.1, -0.3, -0.2], dtype=torch.float64)
ADVANTAGE = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
ONE_KEY = torch.zeros(3, dtype=torch.int64)
numbers = st.integers(0, 1000).map(lambda seed: torch.Generator().manual_seed(seed))


def derivative(objective, score, old, advantage, key, weight=None, **columns):
    """Of the mean loss by each score."""
    leaf = score.clone().requires_grad_()
    weight = torch.ones_like(score) if weight is None else weight
    loss = objective.losses(leaf, old, advantage, weight, {"key": key, **columns}).mean()
    return torch.autograd.grad(loss, leaf)[0]


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def test_golden_shares_and_derivatives():
    """Worked in an independent program, tau 1: pi_1 = e^-.1 / (e^-.1 + e^-.3 + e^-.2) = .904837 / 2.464386."""
    objective = Competing(tau=1.0)
    close(objective.log_shares(GOLDEN, ONE_KEY).exp(), [0.367165, 0.300610, 0.332225])
    found = derivative(objective, GOLDEN, GOLDEN, ADVANTAGE, ONE_KEY)
    close(found, [-0.241542, 0.241819, -0.000277])


@settings(max_examples=30, deadline=None)
@given(source=numbers, tau=st.sampled_from([0.05, 1.0, 3.0]), count=st.integers(1, 7))
def test_at_ratio_one_the_derivative_is_known(source, tau, count):
    """-(A_g - pi_g sum A) / (G tau), which sums to 0 over a key; that of `Clipped` over tau where sum A is 0."""
    score = torch.randn(count, generator=source, dtype=torch.float64)
    advantage = torch.randn(count, generator=source, dtype=torch.float64)
    key, objective = torch.zeros(count, dtype=torch.int64), Competing(tau=tau)
    share = objective.log_shares(score, key).exp()
    expected = -(advantage - share * advantage.sum()) / (count * tau)
    found = derivative(objective, score, score, advantage, key)
    close(found, expected, atol=1e-9)
    close(found.sum(), 0.0, atol=1e-9)
    centred = advantage - advantage.mean()
    plain = derivative(Clipped(clip_range=0.2), score, score, centred, key)
    close(derivative(objective, score, score, centred, key), plain / tau, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(source=numbers, keys=st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_shares_of_a_key_sum_to_one_and_ratios_to_one_by_the_old_shares(source, keys):
    key = torch.tensor(keys).unique(return_inverse=True)[1]
    score, old = torch.randn(2, len(keys), generator=source)
    objective = Competing(tau=0.3)
    now, then = objective.log_shares(score, key), objective.log_shares(old, key)
    ratio = objective.log_ratio(score, old, {"key": key}).exp()
    for number in range(int(key.max()) + 1):
        own = key == number
        close(now[own].exp().sum(), 1.0)
        close((then.exp() * ratio)[own].sum(), 1.0, atol=1e-5)
        close(now[own], torch.log_softmax(score[own] / 0.3, 0), atol=1e-5)
    assert torch.equal(objective.log_ratio(old, old, {"key": key}), torch.zeros(len(keys)))


@settings(max_examples=20, deadline=None)
@given(source=numbers)
def test_a_key_is_judged_without_the_others(source):
    key = torch.tensor([1, 0, 1, 0, 0])
    score, old, advantage, base = torch.randn(4, 5, generator=source, dtype=torch.float64)
    objective = Competing(tau=0.5, kl_coef=0.3)
    whole = derivative(objective, score, old, advantage, key, score_base=base)
    for number in (0, 1):
        own = key == number
        alone = torch.zeros(int(own.sum()), dtype=torch.int64)
        part = derivative(objective, score[own], old[own], advantage[own], alone, score_base=base[own])
        close(whole[own], part * own.sum() / len(key), atol=1e-12)


def test_where_a_share_is_clipped_it_has_no_derivative():
    """Its advantage then counts for nothing, as long as it stays clipped; those of the others reach its score."""
    objective = Competing(tau=1.0)
    score, old = torch.tensor([1.0, 0.0, -0.1]), torch.zeros(3)
    ratio = objective.log_ratio(score, old, {"key": ONE_KEY}).exp()
    assert ratio[0] > 1.2
    assert ratio[2] < 0.9
    more = [derivative(objective, score, old, torch.tensor([a, 0.3, -b]), ONE_KEY) for a, b in ((1.0, 2.0), (7.0, 0.1))]
    assert torch.equal(*more)
    assert more[0].all()
    wrong_way = derivative(objective, score, old, torch.tensor([-1.0, 0.0, 0.0]), ONE_KEY)
    assert wrong_way.all()
    assert not derivative(objective, score, old, torch.tensor([1.0, 0.0, -1.0]), ONE_KEY).any()


def test_the_derivative_by_the_shares_themselves():
    """The loss as a function of log pi: exactly 0 where it is clipped, -A r / G elsewhere."""
    objective, old = Competing(tau=1.0), torch.zeros(4)
    score = torch.tensor([0.5, 0.4, -0.4, -0.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    key = torch.zeros(4, dtype=torch.int64)
    leaf = objective.log_shares(score, key).requires_grad_()

    class Given(Competing):
        def log_shares(self, values, key):
            return leaf if values is score else super().log_shares(values, key)

    losses = Given(tau=1.0).losses(score, old, advantage, torch.ones(4), {"key": key})
    (found,) = torch.autograd.grad(losses.mean(), leaf)
    ratio = (leaf - math.log(0.25)).exp()
    assert found[0] == found[3] == 0
    torch.testing.assert_close(found[1:3], (-advantage * ratio / 4)[1:3].detach())


def test_the_penalty_is_the_divergence_of_the_shares_by_hand():
    """Shares (3/4, 1/4) against (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2 = .130812, once for a key of two terms."""
    score, base = torch.tensor([math.log(3.0), 0.0]), torch.zeros(2)
    key = torch.zeros(2, dtype=torch.int64)
    objective = Competing(tau=1.0, kl_coef=2.0, average_coef=0.5)
    columns = {"key": key, "score_base": base, "score_average": score}
    assert (objective.columns, objective.constants) == (("score_base", "score_average"),) * 2
    losses = objective.losses(score, score, torch.zeros(2), torch.ones(2), columns)
    close(losses.mean(), 2 * 0.130812)
    metrics = objective.metrics(score, score, torch.zeros(2), columns)
    assert metrics["kl"] == pytest.approx(0.130812, abs=1e-6)
    assert metrics["kl_average"] == 0
    assert metrics["largest_share"] == pytest.approx(0.75)
    assert metrics["score"] == pytest.approx(math.log(3) / 2)
    assert (metrics["ratio_mean"], metrics["ratio_max_dev"], metrics["clip_fraction"]) == (1, 0, 0)
    assert "kl" not in Competing().metrics(score, score, torch.zeros(2), columns)


def test_a_term_alone_has_no_derivative_and_flat_keys_have_none():
    key = torch.tensor([0, 1, 1])
    score, old, advantage = torch.tensor([0.3, 0.1, 0.2]), torch.zeros(3), torch.tensor([2.0, 0.0, 0.0])
    assert not derivative(Competing(tau=0.01), score, old, advantage, key).any()


def test_scores_far_apart_stay_finite():
    score = torch.tensor([0.0, -1e6, -2e6])
    assert log_softmax_by_key(score, ONE_KEY).tolist() == [0.0, -1e6, -2e6]
    found = derivative(Competing(), score, score.flip(0), torch.tensor([1.0, -1.0, 1.0]), ONE_KEY)
    assert found.isfinite().all()


def test_weights_scale_what_a_term_adds():
    weight = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    found = derivative(Competing(tau=1.0), GOLDEN, GOLDEN, ADVANTAGE, ONE_KEY, weight)
    close(found, derivative(Competing(tau=1.0), GOLDEN, GOLDEN, ADVANTAGE * weight, ONE_KEY), atol=1e-12)


def test_the_largest_and_the_smallest_coefficients_give_finite_losses():
    score, base = torch.tensor([-1.5, -0.5, -1.0]), torch.tensor([-1.0, -1.5, -0.5])
    for tau, clip_range in itertools.product((1e-9, LARGEST), (SMALLEST, LARGEST)):
        objective = Competing(tau=tau, clip_range=clip_range, kl_coef=LARGEST, average_coef=SMALLEST)
        columns = {"score_base": base, "score_average": base}
        found = derivative(objective, score, score, torch.tensor([5.0, -5.0, 1.0]), ONE_KEY, **columns)
        assert found.isfinite().all(), (tau, clip_range)


def test_the_clean_branch_may_compete_with_score_zero():
    """By hand, tau 1: e^-.1 + e^-.3 + e^-.2 + 1 = 3.464386. Derivatives then sum to minus pi_clean sum A / G."""
    objective = Competing(tau=1.0, clean=True)
    close(objective.log_shares(GOLDEN, ONE_KEY).exp(), [0.261182, 0.213838, 0.236328])
    found = derivative(objective, GOLDEN, GOLDEN, ADVANTAGE, ONE_KEY)
    close(found, [-0.268038, 0.220126, -0.024251])
    close(found.sum(), -0.75 / 3.464386 / 3)
    everyone_better = derivative(objective, GOLDEN, GOLDEN, torch.ones_like(ADVANTAGE), ONE_KEY)
    assert bool((everyone_better < 0).all())
    # with equal scores nothing tells the terms from one that is written out
    written = torch.cat([GOLDEN, torch.zeros(1, dtype=torch.float64)])
    plain = Competing(tau=1.0).log_shares(written, torch.zeros(4, dtype=torch.int64))
    close(objective.log_shares(GOLDEN, ONE_KEY), plain[:3])
    other = GOLDEN - 0.3
    penalty = Competing(tau=1.0, clean=True, kl_coef=1.0)._kl(GOLDEN, other, ONE_KEY)
    then = Competing(tau=1.0).log_shares(torch.cat([other, written[3:]]), torch.zeros(4, dtype=torch.int64))
    close(penalty, (plain.exp() * (plain - then)).sum().expand(3))
    assert log_softmax_by_key(torch.tensor([-1e6, -2e6]), ONE_KEY[:2], zero=True).tolist() == [-1e6, -2e6]

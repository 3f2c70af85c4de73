"""Re-noised samples: golden numbers, the levels that are drawn, and what a record holds of them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashgrpo.learning.objective import Contrast
from flashgrpo.models.load import load_model
from flashgrpo.presets import AWM, DIFFUSION_NFT, V_GRPO
from flashgrpo.processes import renoise
from flashgrpo.processes.flow.choices import Renoised
from flashgrpo.processes.flow.renoised import levels
from flashgrpo.processes.flow.schedule import shifted_grid
from tests.families import KINDS
from tests.processes.flow.drawing import PROMPTS, WORLD, draw, draw_from, make_process, perturb, samples_of


def with_mean_square(mean_square: Tensor) -> tuple[Tensor, Tensor]:
    """Velocities (B, 4) with these mean squared distances from targets, and the targets."""
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=mean_square.dtype)
    return mean_square.sqrt()[:, None] * signs, torch.zeros(len(mean_square), 4, dtype=mean_square.dtype)


@pytest.mark.parametrize(
    ("kind", "errors", "slopes"),
    [
        ("uniform", [0.25, 1, 4], [1, 1, 1]),
        ("t", [0.15, 0.6, 2.4], [0.6, 0.6, 0.6]),
        ("t2", [0.09, 0.36, 1.44], [0.36, 0.36, 0.36]),
        ("huber", [0.3, 0.6, 1.2], [0.6, 0.3, 0.15]),
        ("ghuber", [2.4 * 0.70394, 2.4 * 0.99684, 2.4 * 1.41105], [1.69706, 0.6, 0.21213]),
        ("self-normalized", [0.3, 0.6, 1.2], [1.2, 0.6, 0.3]),
    ],
)
def test_errors_by_hand(kind, errors, slopes):
    """At t = 0.6 and l = 1/4, 1, 4, with the derivative by l; mean |d| is sqrt(l) here and a constant for it.

    ghuber is AWM's with p = 1/4: (t / p) (l^p - 1e-10^p), 1e-10^p = 0.00316; its derivative is t l^(p - 1).
    """
    mean_square = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64).requires_grad_()
    found = renoise.error(kind, torch.full((3,), 0.6, dtype=torch.float64), *with_mean_square(mean_square))
    (slope,) = torch.autograd.grad(found.sum(), mean_square)
    assert found.tolist() == pytest.approx(errors, abs=2e-5)
    assert slope.tolist() == pytest.approx(slopes, abs=5e-6)


def test_the_error_of_v_grpo_by_hand():
    """x0_hat (1, -1, 2) of x0 (0, 0, 1): mean square 1 over mean 1; at t = 1/2 the velocity is off by (-2, 2, -2)."""
    half = torch.tensor([0.5])
    assert renoise.error("self-normalized", half, torch.tensor([[-2.0, 2.0, -2.0]]), torch.zeros(1, 3)).item() == 1
    assert renoise.error("self-normalized", half, torch.zeros(1, 3), torch.zeros(1, 3)).item() == 0  # not 0 / 0


@pytest.mark.parametrize(
    ("beta", "losses"),
    [(1.0, [1.93410806, 4.76722282, 7.78162747]), (0.1, [19.30443265, 46.69726370, 77.98206418])],
)
def test_the_loss_of_diffusion_nft(beta, losses):
    """Its formula on seeded numbers, computed from x0_hat = x_t - t v as its code has it."""
    torch.manual_seed(0)
    x0, eps, v_old = (torch.randn(3, 5, dtype=torch.float64) for _ in range(3))
    t, advantage = torch.tensor([0.2, 0.6, 0.95]).double(), torch.tensor([1.5, -2.0, 0.7])
    toward, away = renoise.contrast("self-normalized", t, v_old + 0.1, v_old, eps - x0, beta)
    objective = Contrast(beta=beta)
    columns = dict(zip(objective.columns, (toward.float(), away.float()), strict=True))
    rows = torch.zeros(3), torch.zeros(3), advantage, torch.ones(3)
    assert objective.losses(*rows, columns).tolist() == pytest.approx(losses, rel=1e-6)


def test_the_three_methods_share_their_first_gradient(nursery):
    """2 t^2 A (v - u) / (D mean |x0_hat - x0|) by v, through process, objective and update, in float64."""
    found = nursery.run("first_gradients")
    expected = torch.tensor(found.pop("by hand"), dtype=torch.float64)
    assert float(expected.abs().min()) > 1e-4
    assert len(found) == 4
    for name, gradient in found.items():
        assert float((torch.tensor(gradient, dtype=torch.float64) - expected).abs().max()) < 1e-12, name


# ---- levels ----------------------------------------------------------------------------------------------------------


def test_levels_between_the_points_of_a_grid():
    grid = shifted_grid(2, 3.0)  # sigmas 1, 0.75, 0
    sigma, timestep = levels(grid, torch.tensor([0.0, 0.5, 1.0, 1.5], dtype=torch.float64))
    assert sigma.tolist() == [1, 0.875, 0.75, 0.375]
    assert timestep.tolist() == [1000, 875, 750, 375]


def drawn(score: Renoised, num_steps: int = 10, count: int = 200) -> list[list[float]]:
    """The positions of some samples."""
    return [score.positions(num_steps, 0, 0, 0, member) for member in range(count)]


def test_stratified_levels_lie_one_in_each_part():
    score = Renoised(times=4, window=(0.2, 1.0))
    for positions in drawn(score):
        assert [int((p - 2) // 2) for p in positions] == [0, 1, 2, 3]
    assert len({p for positions in drawn(score) for p in positions}) == 800


def test_levels_on_the_grid_are_one_of_each_part_of_it():
    """AWM on its 14 steps: points 1 to 12, two in each of six parts, and both are drawn."""
    found = drawn(AWM.score, 14)
    assert [{p[part] for p in found} for part in range(6)] == [{1, 2}, {3, 4}, {5, 6}, {7, 8}, {9, 10}, {11, 12}]


def test_shuffled_levels_are_points_without_repetition():
    """DiffusionNFT on its 10 steps: nine of the ten, any of which may be left out."""
    found = drawn(DIFFUSION_NFT.score)
    assert all(len(set(p)) == len(p) == 9 and set(p) <= set(range(10)) for p in found)
    assert {*range(10)} == {left for p in found for left in set(range(10)) - set(p)}
    assert DIFFUSION_NFT.score.count(200) == 198
    assert len(Renoised(times=3, draw="shuffled").positions(10, 0)) == 3


@pytest.mark.parametrize(
    "settings",
    [{"times": 0}, {"times": None}, {"window": (0.5, 0.5)}, {"window": (-0.1, 1.0)}, {"guidance_scale": 0.5}],
)
def test_levels_that_cannot_be_drawn_are_refused(settings):
    with pytest.raises(ValueError, match="of Renoised"):
        Renoised(**settings)
    with pytest.raises(ValueError, match="holds 3 of 10 steps, but 6"):
        Renoised(draw="grid", window=(0.0, 0.3)).count(10)


# ---- records ---------------------------------------------------------------------------------------------------------


def test_a_group_shares_levels_and_noise_where_it_is_told_to(model):
    for algorithm, same in ((V_GRPO, True), (AWM, False)):
        _, latents, record = draw(model, algorithm, steps=8)
        first, second = (record.state[(record.sample == sample).nonzero().flatten()] for sample in (0, 1))
        assert torch.equal(first.sigma, second.sigma) == same
        eps = [one.noised()[1] + one.x0[one.sample] for one in (first, second)]
        assert torch.allclose(*eps, atol=1e-5) == same
        assert not torch.equal(latents[0], latents[1])
        other = record.state[(record.sample == 2).nonzero().flatten()]  # of another group
        assert not torch.equal(first.sigma, other.sigma) or not torch.equal(first.noised()[1], other.noised()[1])


def test_names_alone_say_what_is_drawn(model):
    """Drawn again, and by another share of the samples, levels and noise are the same bits."""
    process, _, record = draw(model, AWM, steps=8)
    whole = record.state
    _, part = draw_from(process, samples_of(3, 2)[3:5])
    own = whole[torch.isin(whole.sample, torch.tensor([3, 4])).nonzero().flatten()]
    assert torch.equal(part.state.sigma, own.sigma)
    assert torch.equal(part.state.names, own.names)
    _, later = draw_from(process, samples_of(3, 2, update=1))
    assert not torch.equal(later.state.names, whole.names)
    assert not torch.equal(later.state.sigma, whole.sigma)


def test_one_use_costs_no_forward_before_the_update(model):
    """And several cost one a unit, whose velocities are kept where a column compares with them."""
    for uses, columns, more, kept in ((1, (), 0, False), (2, (), 12, False), (2, ("kl_old",), 12, True)):
        process, calls = make_process(model, V_GRPO, steps=4), []
        process.source._call = lambda state, x, calls=calls, real=process.source._call: (
            calls.append(1) or real(state, x)
        )
        _, record = draw_from(process, samples_of(2, 2), uses, columns)
        assert len(record) == 24
        assert len(calls) == more  # of two units each
        assert (record.old is None) == (uses == 1)
        assert (record.state.old_v is not None) == kept


def test_old_scores_and_velocities_are_those_of_a_replay(model):
    algorithm = replace(DIFFUSION_NFT, score=replace(DIFFUSION_NFT.score, times=3))
    columns = algorithm.objective.columns
    process, _, record = draw(model, algorithm, uses=2, columns=columns)
    perturb(model)
    moved = False
    for part in process.micro_batches(record):
        ((score, found),) = process.replay(part, columns)
        moved |= not torch.equal(score.detach(), part.old)
        assert (found["kl"] > 0).all()
        assert not torch.equal(found["toward:1.0"], found["away:1.0"])
        torch.testing.assert_close(found["toward:1.0"], -score)  # at beta 1 v+ is v
    assert moved


def test_guidance_of_the_update_is_apart_from_the_rollouts(model):
    """The rollout's does not reach the score, and the score's does not reach the rollout."""
    found = {}
    for rollout in (1.0, 3.0):
        for update in (1.0, 3.0):
            algorithm = replace(V_GRPO, score=replace(V_GRPO.score, times=1, guidance_scale=update))
            process, latents, record = draw(model, algorithm, groups=1, uses=2, guidance_scale=rollout)
            again = process.source.units_of(samples_of(1, 2), torch.zeros_like(latents), record.state.condition, 0)
            found[rollout, update] = latents, process.source.old(again, record.slot, False)[0]
    for scale in (1.0, 3.0):
        assert torch.equal(found[scale, 1.0][0], found[scale, 3.0][0])
        assert torch.equal(found[1.0, scale][1], found[3.0, scale][1])
    assert not torch.equal(found[1.0, 1.0][0], found[3.0, 1.0][0])
    assert not torch.equal(found[1.0, 1.0][1], found[1.0, 3.0][1])


def test_the_level_decides_which_expert_learns(tmp_path):
    """Wan 2.2: a replay of units above the boundary reaches the adapters of the first expert alone, and the reverse."""
    kind = KINDS["wan22-a14b"]
    kind.build().save_pretrained(tmp_path)
    model = load_model(kind.config(tmp_path), WORLD, 0, PROMPTS)
    process = make_process(model, replace(V_GRPO, score=replace(V_GRPO.score, times=6)), steps=6, exact=4)
    _, record = draw_from(process, samples_of(1, 2), 2)
    assert record.slot.unique().tolist() == [0, 1]
    for slot in (0, 1):
        part = record[(record.slot == slot).nonzero().flatten()[:4]]
        assert {float(t) < 875 for t in part.state.timestep} == {slot == 1}
        ((score, _),) = process.replay(part, ())
        score.sum().backward()
        for number, expert in enumerate(model.experts.values()):
            reached = any(p.grad is not None and bool(p.grad.any()) for p in expert.parameters())
            assert reached == (number == slot)
            expert.zero_grad()

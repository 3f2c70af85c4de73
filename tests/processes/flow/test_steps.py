"""Which steps are stochastic: shapes of the masks, and that a draw belongs to its key and to nothing else."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.errors import UserError
from flashgrpo.processes.flow.steps import AllSteps, OneStep, Window

choices = st.one_of(
    st.builds(AllSteps, st.floats(0.1, 1.0)),
    st.builds(
        Window, size=st.integers(1, 4), start=st.integers(0, 3), stride=st.integers(1, 3), every=st.integers(1, 9)
    ),
    st.builds(
        OneStep,
        per=st.sampled_from(["group", "sample"]),
        window=st.sampled_from([(0.0, 0.5), (0.0, 1.0), (0.25, 0.75)]),
        draw=st.sampled_from(["iid", "stratified"]),
        count=st.sampled_from([1, 2]),
    ),
)


def groups(number: int, size: int) -> torch.Tensor:
    return torch.arange(number).repeat_interleave(size)


def drawn(steps: OneStep, group_ids: torch.Tensor, num_steps: int = 20, seed: int = 0, update: int = 0) -> list[int]:
    """The first stochastic step of each row."""
    return steps.mask(seed, update, group_ids, num_steps).int().argmax(1).tolist()


@settings(max_examples=40, deadline=None)
@given(steps=choices, seed=st.integers(0, 2**40), update=st.integers(0, 10**6), num_steps=st.integers(8, 30))
def test_what_holds_for_every_choice(steps, seed, update, num_steps):
    ids = groups(5, 3)
    mask, trained = steps.mask(seed, update, ids, num_steps), steps.trained(seed, update, ids, num_steps)
    assert mask.shape == trained.shape == (15, num_steps)
    assert mask.dtype == trained.dtype == torch.bool
    assert not mask[:, -1].any(), "the last step leaves its noise in the video"
    assert trained.any(1).all()
    assert not (trained & ~mask).any(), "only stochastic steps can be trained"
    assert set(mask.nonzero()[:, 1].tolist()) <= set(steps.candidates(num_steps))
    assert torch.equal(mask, steps.mask(seed, update, ids, num_steps)), "a draw is a function of its key"


@settings(max_examples=40, deadline=None)
@given(steps=choices, update=st.integers(0, 1000), order=st.permutations(range(24)), ranks=st.integers(1, 5))
def test_a_draw_does_not_know_order_or_rank(steps, update, order, ranks):
    ids, members = groups(6, 4), torch.arange(4).repeat(6)
    whole = steps.mask(7, update, ids, 20, members=members)
    torch.rand(order[0])  # nor the global random state
    for rank in range(ranks):
        rows = torch.tensor(order[rank::ranks])
        assert torch.equal(steps.mask(7, update, ids[rows], 20, members=members[rows]), whole[rows])
        trained = steps.trained(7, update, ids, 20, members=members)[rows]
        assert torch.equal(steps.trained(7, update, ids[rows], 20, members=members[rows]), trained)


@pytest.mark.parametrize("draw", ["iid", "stratified"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_group_shares_its_step_and_groups_differ(draw, count):
    mask = OneStep(draw=draw, count=count).mask(0, 3, groups(24, 8), 20).reshape(24, 8, 20)
    assert (mask.sum(-1) == count).all()
    assert (mask == mask[:, :1]).all()
    first = mask[:, 0].int().argmax(-1)
    assert len(set(first.tolist())) >= 5, "several k in one update"
    if count == 2:
        assert mask[torch.arange(24), 0, first + 1].all(), "the two steps are consecutive"


def test_the_published_window_is_the_first_half():
    assert OneStep().candidates(20) == list(range(10))
    assert OneStep().candidates(5) == [0, 1, 2]  # 2 / 5 < 0.5
    assert OneStep(window=(0.1, 0.3)).candidates(30) == [3, 4, 5, 6, 7, 8]
    assert OneStep(window=(0.0, 1.0)).candidates(4) == [0, 1, 2]


@pytest.mark.parametrize("key", [{"seed": 1}, {"update": 1}])
def test_seed_and_update_change_the_draw(key):
    ids = groups(40, 1)
    assert drawn(OneStep(), ids) != drawn(OneStep(), ids, **key)


@pytest.mark.parametrize("per", ["group", "sample"])
@pytest.mark.parametrize("draw", ["iid", "stratified"])
def test_draws_are_uniform_over_the_window(per, draw):
    """4000 draws of 10 steps: 400 each, with a standard deviation of 19."""
    ids = groups(4000, 1) if per == "group" else torch.zeros(4000, dtype=torch.int64)
    counts = Counter(drawn(OneStep(per=per, draw=draw), ids))
    assert set(counts) == set(range(10))
    assert max(abs(count - 400) for count in counts.values()) < (80 if draw == "iid" else 1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), update=st.integers(0, 1000), num_steps=st.integers(4, 30))
def test_stratified_groups_use_up_the_window(seed, update, num_steps):
    steps = OneStep(draw="stratified")
    window = steps.candidates(num_steps)
    ks = drawn(steps, groups(3 * len(window), 1), num_steps, seed, update)
    for deal in range(3):
        assert sorted(ks[deal * len(window) : (deal + 1) * len(window)]) == window


def test_stratified_deals_differ_between_rounds_and_updates():
    ks = drawn(OneStep(draw="stratified"), groups(20, 1))
    assert ks[:10] != ks[10:]
    assert ks != drawn(OneStep(draw="stratified"), groups(20, 1), update=1)


def test_per_sample_members_draw_for_themselves():
    ids = groups(6, 8)
    ks = torch.tensor(drawn(OneStep(per="sample"), ids)).reshape(6, 8)
    assert all(len(set(row.tolist())) > 1 for row in ks)
    assert len({tuple(row.tolist()) for row in ks}) == 6, "groups do not repeat each other's draws"
    dealt = torch.tensor(drawn(OneStep(per="sample", draw="stratified"), ids)).reshape(6, 8)
    assert all(len(set(row.tolist())) == 8 for row in dealt), "8 members are dealt 8 of 10 steps"


def test_members_are_numbered_by_their_occurrence_unless_named():
    steps, ids = OneStep(per="sample"), torch.tensor([7, 7, 3, 7])
    named = steps.mask(0, 0, ids, 20, members=torch.tensor([0, 1, 0, 2]))
    assert torch.equal(steps.mask(0, 0, ids, 20), named)
    third = steps.mask(0, 0, torch.tensor([7]), 20, members=torch.tensor([2]))
    assert torch.equal(third[0], named[3])


def test_all_steps_are_all_but_the_last():
    ids = groups(2, 2)
    assert AllSteps().mask(0, 0, ids, 5).int().tolist() == [[1, 1, 1, 1, 0]] * 4
    assert torch.equal(AllSteps().trained(0, 0, ids, 5), AllSteps().mask(0, 0, ids, 5))


def test_a_fraction_of_all_steps_is_trained_and_changes_with_the_update():
    steps, ids = AllSteps(fraction=0.6), groups(3, 2)
    assert torch.equal(steps.mask(0, 0, ids, 20), AllSteps().mask(0, 0, ids, 20))
    rows = [steps.trained(0, update, ids, 20) for update in range(6)]
    for trained in rows:
        assert (trained.sum(1) == 11).all()  # 0.6 * 19 = 11.4
        assert (trained == trained[:1]).all()
    assert len({tuple(trained[0].tolist()) for trained in rows}) == 6
    assert AllSteps(fraction=0.01).trained(0, 0, ids, 20).sum(1).tolist() == [1] * 6


def window_at(steps: Window, update: int, num_steps: int = 11) -> list[int]:
    rows = steps.mask(0, update, groups(2, 2), num_steps)
    assert (rows == rows[:1]).all()
    return rows[0].nonzero().flatten().tolist()


def test_window_slides_and_returns():
    """10 steps that can be stochastic, size 4: stride 2 fits, stride 4 has its last window pulled back from 8 to 6."""
    steps = Window(size=4, stride=2, every=3)
    assert [window_at(steps, update)[0] for update in range(15)] == [0, 0, 0, 2, 2, 2, 4, 4, 4, 6, 6, 6, 0, 0, 0]
    assert window_at(steps, 9) == [6, 7, 8, 9]
    assert [window_at(Window(size=4, stride=4, every=1), update)[0] for update in range(4)] == [0, 4, 6, 0]


def test_window_between_start_and_stop():
    steps = Window(size=2, start=1, stop=4, stride=1, every=1)
    assert [window_at(steps, update) for update in range(3)] == [[1, 2], [2, 3], [1, 2]]
    assert steps.candidates(11) == [1, 2, 3]
    assert Window(size=2, stop=5).candidates(5) == [0, 1, 2, 3]  # the last step is never stochastic
    assert window_at(Window(size=10), 10**6) == list(range(10))


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.0, 1.1), (float("nan"), 0.5)])
def test_windows_that_are_no_part_of_a_rollout_are_refused(window):
    with pytest.raises(ValueError, match="window of OneStep"):
        OneStep(window=window)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: AllSteps(fraction=0.0), "fraction"),
        (lambda: AllSteps(fraction=1.5), "fraction"),
        (lambda: Window(size=0), "size"),
        (lambda: Window(stride=0), "stride"),
        (lambda: Window(every=0), "every"),
        (lambda: Window(start=-1), "start"),
        (lambda: Window(size=4, start=2, stop=5), "does not fit"),
        (lambda: OneStep(window=(0.0,)), "window"),
        (lambda: OneStep(per="prompt"), "per"),
        (lambda: OneStep(draw="random"), "draw"),
        (lambda: OneStep(count=3), "count"),
    ],
)
def test_settings_without_meaning_are_refused(make, named):
    with pytest.raises(Exception, match=named) as caught:  # jaxtyping's hook refuses what is no Literal before we do
        make()
    assert isinstance(caught.value, ValueError | TypeError)


@pytest.mark.parametrize(
    ("steps", "num_steps", "named"),
    [
        (OneStep(), 1, "the last never is"),
        (AllSteps(), 1, "the last never is"),
        (OneStep(window=(0.95, 1.0)), 20, "holds 0 of 20"),
        (OneStep(window=(0.0, 0.1), count=2), 10, "holds 1 of 10"),
        (Window(size=4), 4, "does not fit"),
        (Window(size=4, start=18), 20, "does not fit"),
        (Window(size=4, stop=30), 20, "stop of Window is 30"),
    ],
)
def test_steps_that_a_rollout_does_not_have_are_refused(steps, num_steps, named):
    with pytest.raises(UserError, match=named):
        steps.mask(0, 0, groups(2, 2), num_steps)


DRAWN = [
    AllSteps(0.3, "stratified"),
    AllSteps(0.3, "stratified", "early"),
    AllSteps(0.3, "independent", "early"),
    AllSteps(0.3),
]


@pytest.mark.parametrize("steps", DRAWN)
def test_a_part_of_all_steps_stands_for_all(steps):
    """The weighted mean over the trained steps, over many updates, is the mean over all 9 of 10 steps."""
    f = [1.0, 5.0, 2.0, 8.0, 3.0, 4.0, 7.0, 6.0, 9.0]
    found = []
    for update in range(400):
        factors = steps.factors(3, update, 10)
        trained = steps.trained(3, update, torch.tensor([0, 1]), 10)
        assert trained[0].nonzero().flatten().tolist() == trained[1].nonzero().flatten().tolist() == sorted(factors)
        found.append(sum(weight * f[k] for k, weight in factors.items()) / len(factors))
    spread = torch.tensor(found).std() / len(found) ** 0.5
    assert abs(sum(found) / len(found) - 5) < 4 * spread


def test_spread_steps_are_one_of_each_third():
    for update in range(20):
        drawn = sorted(AllSteps(1 / 3, "stratified").factors(0, update, 10))
        assert [k // 3 for k in drawn] == [0, 1, 2]


def test_early_steps_are_drawn_more_often_and_weigh_less():
    factors = [AllSteps(0.3, "independent", "early").factors(0, update, 10) for update in range(300)]
    drawn = torch.tensor([sum(k in one for one in factors) for k in range(9)])
    assert drawn[0] > 2 * drawn[7]
    once = next(one for one in factors if len(one) == 3)
    assert once == pytest.approx({k: 45 / (9 * (9 - k)) for k in once})


def test_chances_need_a_draw_that_can_repeat():
    with pytest.raises(ValueError, match=r"chance of AllSteps: steps that are dealt without replacement"):
        AllSteps(0.5, chance="early")

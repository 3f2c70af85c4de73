"""Samples are cut between processes in any proportion, each exactly once."""

from hypothesis import given
from hypothesis import strategies as st

from flashgrpo.distributed.shares import cut, overlap

WEIGHTS = st.lists(st.floats(0, 10), min_size=1, max_size=9).filter(lambda weights: sum(weights) > 0.01)


@given(st.integers(0, 500), WEIGHTS)
def test_every_sample_has_one_place(total, weights):
    parts = [cut(total, weights, place) for place in range(len(weights))]
    assert [number for part in parts for number in part] == list(range(total))
    for weight, part in zip(weights, parts, strict=True):
        assert abs(len(part) - total * weight / sum(weights)) <= 1 + 1e-6


@given(st.integers(0, 100), st.integers(1, 9))
def test_equal_shares_differ_by_one_at_most(total, places):
    sizes = [len(cut(total, [1.0] * places, place)) for place in range(places)]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_overlap_is_the_intersection(a, b, c, d):
    one, other = range(min(a, b), max(a, b)), range(min(c, d), max(c, d))
    assert set(overlap(one, other)) == set(one) & set(other)

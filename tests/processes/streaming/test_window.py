"""Which frames a block looks at, and the levels that it is drawn at."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashgrpo.processes.streaming.levels import shifted_levels, walk_levels
from flashgrpo.processes.streaming.window import Window


def test_the_window_of_kvpo_by_hand():
    """Sink 3 and local 9 with the block's own 3: six past frames beside the sink (arXiv 2605.14278)."""
    window = Window(sink=3, local=9, block=3)
    assert window.frames == 12
    assert window.past(0) == ()
    assert window.past(3) == (0, 1, 2)
    assert window.past(9) == (0, 1, 2, 3, 4, 5, 6, 7, 8)
    assert window.past(12) == (0, 1, 2, 6, 7, 8, 9, 10, 11)
    assert window.past(21) == (0, 1, 2, 15, 16, 17, 18, 19, 20)


def test_routed_frames_by_hand():
    """KVPO: sink, the branch's own 5, and the 4 nearest of which 3 are the block's; 12 frames as without."""
    window = Window()
    assert window.routed(21, (10, 4, 6, 8, 12), nearest=4) == (0, 1, 2, 4, 6, 8, 10, 12, 20)
    assert len(window.routed(21, (10, 4, 6, 8, 12), nearest=4)) + 3 == window.frames
    assert window.routed(12, (), nearest=3) == (0, 1, 2)


@pytest.mark.parametrize("frame", [2, 20, 21])
def test_neither_sink_nor_nearest_is_routed(frame):
    with pytest.raises(ValueError, match=f"frame {frame} cannot be routed to the block at 21: free are 3 to 19"):
        Window().routed(21, (5, frame), nearest=4)


@pytest.mark.parametrize(("sink", "local", "block"), [(3, 2, 3), (-1, 9, 3), (0, 1, 0)])
def test_a_window_that_holds_no_block(sink, local, block):
    with pytest.raises(ValueError, match=f"does not hold a block of {block} frames"):
        Window(sink, local, block)


def test_a_first_block_may_be_shorter():
    """AnyFlow-FAR: 1, 3, 3, ... (arXiv 2605.13724)."""
    window = Window(sink=1, local=9, first=1)
    assert window.starts(11) == [0, 1, 4, 7, 10]
    assert [window.size(start) for start in window.starts(8)] == [1, 3, 3, 3]
    assert [window.begun(frame) for frame in (0, 1, 2, 4, 5, 10)] == [0, 1, 2, 2, 3, 4]
    assert [window.whole(frames) for frames in (0, 1, 2, 3, 4, 6, 7)] == [0, 1, 1, 1, 4, 4, 7]
    assert [window.next_start(frame) for frame in (-3, 0, 1, 2, 4, 5)] == [0, 0, 1, 4, 4, 7]
    assert window.recent(19) == 10
    assert window.past(10) == (0, 4, 5, 6, 7, 8, 9)
    with pytest.raises(ValueError, match="a first block of 4 frames is longer than the others, which have 3"):
        Window(first=4)


@given(st.integers(0, 3), st.integers(0, 40))
def test_blocks_are_counted_as_they_are_listed(first, frames):
    window = Window(first=first)
    starts = window.starts(frames)
    assert len(starts) == window.begun(frames)
    edges = [*starts, window.next_start(frames)]
    assert all(edges[i + 1] - edges[i] == window.size(edges[i]) for i in range(len(starts)))
    assert window.whole(frames) == max(edge for edge in edges if edge <= frames)


@given(st.integers(0, 5), st.integers(1, 4), st.integers(0, 8), st.integers(0, 30))
def test_a_window_never_grows(sink, block, more, blocks):
    window = Window(sink, block + more, block)
    past = window.past(blocks * block)
    assert len(past) + block <= window.frames
    assert list(past) == sorted(set(past))
    assert all(frame < blocks * block for frame in past)


def test_the_four_levels():
    """Shift 5 of 1000, 750, 500 and 250: s(u) = 5 u / (1 + 4 u)."""
    assert shifted_levels() == pytest.approx((1.0, 0.9375, 5 / 6, 0.625))
    assert shifted_levels(1.0) == (1.0, 0.75, 0.5, 0.25)
    assert all(shifted_levels(shift)[0] == 1 for shift in (0.1, 0.3, 0.7, 3.0, 12.0))


def test_a_walk_by_hand():
    """v = 1 everywhere: x0_hat = x - sigma. Levels 1 and .5, noise 3, eps 4: 3 -> 2; .5 * 2 + .5 * 4 = 3 -> 2.5."""
    noise, eps = torch.full((1, 1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1, 1), 4.0)
    walk = list(walk_levels(lambda x, sigma: torch.ones_like(x), noise, [eps], (1.0, 0.5)))
    assert [(x.item(), x0_hat.item()) for x, x0_hat in walk] == [(3.0, 2.0), (3.0, 2.5)]


def test_a_walk_along_a_straight_line_by_hand():
    """v = 1 everywhere, without noise between levels: 3 -> 3 - .5 * 1 = 2.5, and from there 2.5 - .5 * 1 = 2."""
    noise = torch.full((1, 1, 1, 1, 1), 3.0)
    walk = list(walk_levels(lambda x, sigma: torch.ones_like(x), noise, [None], (1.0, 0.5)))
    assert [(x.item(), x0_hat.item()) for x, x0_hat in walk] == [(3.0, 2.0), (2.5, 2.0)]

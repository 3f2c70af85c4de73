"""A cache of blocks: what it gives for which frames, and what branches share."""

import pytest
import torch

from flashgrpo.processes.streaming.cache import CachedBlock, Context, KVCache

PER_FRAME = 2


def block(start: int, frames: int = 3, rows: int = 1) -> CachedBlock:
    """Keys are 10 frame + token, values their negatives; of two layers, the second's a hundred higher."""
    tokens = torch.tensor([10.0 * f + t for f in range(start, start + frames) for t in range(PER_FRAME)])
    keys = tuple((tokens + 100 * layer).view(1, -1, 1, 1).expand(rows, -1, 1, 1) for layer in range(2))
    return CachedBlock(range(start, start + frames), Context(keys, tuple(-key for key in keys)))


def cache(blocks: int) -> KVCache:
    whole = KVCache()
    for number in range(blocks):
        whole = whole.append(block(3 * number))
    return whole


def test_a_context_has_the_frames_that_are_asked_for_in_their_order():
    context = cache(3).context((1, 2, 3, 8))
    assert context.keys[0].flatten().tolist() == [10, 11, 20, 21, 30, 31, 80, 81]
    assert context.keys[1].flatten().tolist() == [110, 111, 120, 121, 130, 131, 180, 181]
    assert context.values[0].flatten().tolist() == [-10, -11, -20, -21, -30, -31, -80, -81]
    assert cache(3).context((8, 1)).keys[0].flatten().tolist() == [80, 81, 10, 11]


def test_no_frames_are_no_context():
    assert KVCache().context(()) is None
    assert KVCache().end == 0


def test_a_frame_that_is_not_there():
    with pytest.raises(KeyError):
        cache(2).context((6,))
    with pytest.raises(AssertionError, match="a block at frame 6 behind frame 3"):
        cache(1).append(block(6))


def test_branches_share_the_prefix_and_leave_it_alone():
    prefix = cache(2)
    one, two = prefix.append(block(6)), prefix.append(block(6))
    assert prefix.end == 6
    assert one.blocks[:2] == two.blocks[:2] == prefix.blocks
    assert all(a is b for a, b in zip(one.blocks[:2], prefix.blocks, strict=True))
    assert one.before(6) == prefix


def test_what_is_forgotten():
    """Sink, window and the last block stay; so a long video takes constant memory."""
    whole = cache(8)
    kept = whole.only((0, 1, 2, 15, 16, 17, 18))
    assert [held.frames.start for held in kept.blocks] == [0, 15, 18, 21]
    assert kept.end == whole.end == 24
    assert kept.nbytes * 2 == whole.nbytes


def test_a_row_for_each_branch():
    whole = cache(3)
    stacked = Context.stack([whole.context((0, 4)), whole.context((0, 5))])
    assert stacked.keys[0][:, :, 0, 0].tolist() == [[0, 1, 40, 41], [0, 1, 50, 51]]
    assert stacked.nbytes == 2 * whole.context((0, 4)).nbytes


def test_a_prefix_of_one_row_goes_before_blocks_of_many():
    branches = cache(1).append(block(3, rows=3))
    assert branches.context((0, 3)).keys[0][:, :, 0, 0].tolist() == [[0, 1, 30, 31]] * 3
    assert branches.context((0, 1)).keys[0].shape[0] == 1

"""Samples that travel to the ranks that score them: in pieces, each once, in an order that no rank can block."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashgrpo.distributed.transfer import pieces
from flashgrpo.distributed.world import World
from flashgrpo.scoring.scoring import AHEAD

CPU = torch.device("cpu")


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 4), st.integers(1, 2), st.data())
def test_every_sample_is_in_one_piece(total, size, data_ranks, context, data):
    ranks = data_ranks * context
    scorers = data.draw(st.lists(st.integers(0, ranks - 1), min_size=1, max_size=ranks, unique=True))
    world = World(CPU, 0, ranks, context=context, reward_ranks=scorers)
    found = pieces(world, total, size)
    assert sorted(number for piece in found for number in piece.numbers) == list(range(total))
    turns: Counter[int] = Counter()
    order = []
    for piece in found:
        assert 1 <= len(piece.numbers) <= size
        assert set(piece.numbers) <= set(world.share(total, piece.source))
        assert set(piece.numbers) <= set(world.scored_by(total, piece.destination))
        turns[piece.source] += 1
        order.append(turns[piece.source])
    assert order == sorted(order)  # the first piece of every rank before the second of any


@pytest.mark.parametrize(
    "parallel",
    [
        {"reward_ranks": [2], "shares": [1, 3, 0]},
        {"reward_ranks": [0, 2]},
    ],
)
def test_ranks_that_score_for_others_hold_few_pieces(nursery, parallel):
    """40 samples in twos: nowhere are all of them in memory, and no reward is called with more than two."""
    ranks = nursery.run("score_for_others", 40, 2, parallel, size=3)
    for number, rank in enumerate(ranks):
        assert max(rank["seen"], default=0) == (2 if number in parallel["reward_ranks"] else 0)
        assert rank["held"] < 2 * (AHEAD + 2.5)
    assert sum(sum(rank["seen"]) for rank in ranks) == 40


def test_texts_travel_to_the_ranks_that_score_them(nursery):
    ranks = nursery.run("score_texts_for_others", 10, 2, {"reward_ranks": [2], "shares": [1, 3, 0]}, size=3)
    assert ranks == [-5.0 if number == 3 else float(number) for number in range(10)]  # one has failed


def test_sounds_travel_with_their_videos(nursery):
    ranks = nursery.run("score_sounds_for_others", 10, 2, {"reward_ranks": [2], "shares": [1, 3, 0]}, size=3)
    assert ranks == [float(number) for number in range(10)]

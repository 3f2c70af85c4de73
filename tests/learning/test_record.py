"""Parts of a record: units in any order, each with all of its terms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.process import Record
from tests.learning.toy import Features


def ragged() -> Record:
    """Four units with 2, 0, 3 and 1 terms."""
    unit, terms = torch.tensor([0, 0, 2, 2, 2, 3]), torch.arange(6)
    state = Features(torch.arange(4), [])
    return Record(
        slot=torch.tensor([5, 7, 5, 9]),
        unit=unit,
        sample=terms + 10,
        key=terms + 20,
        channel=terms % 2,
        weight=terms + 0.25,
        old=terms + 0.5,
        state=state,
        advantage=terms + 0.75,
    )


def test_units_come_in_the_order_that_they_are_asked_for():
    """Units 3, 0, 1: the term of the one, the two of the other, and none; terms of a unit keep their order."""
    part = ragged()[torch.tensor([3, 0, 1])]
    assert len(part) == 3
    assert part.slot.tolist() == [9, 5, 7]
    assert part.unit.tolist() == [0, 1, 1]
    terms = torch.tensor([5, 0, 1])
    assert torch.equal(part.sample, terms + 10)
    assert torch.equal(part.key, terms + 20)
    assert torch.equal(part.channel, terms % 2)
    assert torch.equal(part.weight, terms + 0.25)
    assert torch.equal(part.old, terms + 0.5)
    assert torch.equal(part.advantage, terms + 0.75)
    assert part.state.number.tolist() == [3, 0, 1]


@pytest.mark.parametrize("units", [[], [1]])
def test_units_without_terms_have_none(units):
    part = ragged()[torch.tensor(units, dtype=torch.int64)]
    assert len(part) == len(units)
    assert len(part.unit) == len(part.old) == len(part.advantage) == 0


def test_advantages_are_not_invented():
    record = ragged()
    unjudged = Record(record.slot, record.unit, *(torch.arange(6),) * 3, record.weight, record.old, record.state)
    assert unjudged[torch.tensor([2])].advantage is None


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6), data=st.data())
def test_a_part_of_a_part_is_a_part(counts, data):
    """And all parts together have every term once, beside the unit that it belongs to."""
    unit = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    terms = torch.arange(len(unit))
    slot = torch.arange(len(counts)) + 100
    record = Record(slot, unit, terms, terms, terms, terms.float(), terms.float(), Features(slot - 100, []))
    order = torch.tensor(data.draw(st.permutations(range(len(counts)))))
    turned = record[order]
    assert (turned.unit.diff() >= 0).all()
    assert torch.equal(turned.slot[turned.unit] - 100, unit[turned.sample])
    assert torch.equal(turned.sample.sort().values, terms)
    size = data.draw(st.integers(1, len(counts)))
    parts = [turned[units] for units in torch.arange(len(counts)).split(size)]
    assert torch.equal(torch.cat([part.sample for part in parts]), turned.sample)
    inverse = turned[order.argsort()]
    assert torch.equal(inverse.unit, record.unit)
    assert torch.equal(inverse.old, record.old)

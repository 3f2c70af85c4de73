"""Parts that wait in the host's memory, in pieces: every value and layout stays, and little is allocated beside it."""

import pytest
import torch
from torch import nn

from flashgrpo.models.residence import ALIGNMENT, Residence, packed


def parameter(*shape, dtype=torch.float32, trained=False):
    return nn.Parameter(torch.randn(*shape).to(dtype), requires_grad=trained)


def test_values_and_layouts_stay():
    kept = [parameter(3, 5, dtype=torch.bfloat16), parameter(7), parameter(()), parameter(0), parameter(4, 3, 2, 2)]
    kept[-1].data = kept[-1].data.contiguous(memory_format=torch.channels_last)
    kept.append(nn.Parameter(torch.randn(6, 4).t(), requires_grad=False))
    kept.append(nn.Parameter(torch.randn(1, 4).expand(5, 4), requires_grad=False))
    before = [(one.clone(), torch.empty_like(one).stride()) for one in kept]
    pieces = packed(kept, pinned=False, size=64)
    for one, (values, stride) in zip(kept, before, strict=True):
        assert torch.equal(one, values)
        assert one.stride() == stride
    assert sum(len(piece.places) for piece in pieces) == len(kept)


@pytest.mark.parametrize(("size", "sizes"), [(2**20, [2 * ALIGNMENT + 400]), (ALIGNMENT + 40, [ALIGNMENT + 40, 400])])
def test_pieces(size, sizes):
    """A tensor of 40 bytes fills an alignment; one that is larger than a piece has one of its own."""
    pieces = packed([parameter(10), parameter(10), parameter(100)], pinned=False, size=size)
    assert [piece.memory.nbytes for piece in pieces] == sizes


def test_a_part_that_leaves_is_what_it_was():
    parts = {name: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False) for name in "ab"}
    parts["a"][0].weight.requires_grad_(True)
    before = {name: {key: value.clone() for key, value in part.state_dict().items()} for name, part in parts.items()}
    residence = Residence(parts, torch.device("cpu"), offload=True)
    for name in "abba":
        part = residence.bring(name)
        assert residence.present == {name}
        assert all(torch.equal(value, before[name][key]) for key, value in part.state_dict().items())
    with torch.no_grad():
        parts["a"][0].weight.add_(1)
    residence.bring("b")
    assert torch.equal(residence.bring("a")[0].weight, before["a"]["0.weight"] + 1)

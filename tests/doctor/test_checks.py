"""Checks of ratios by themselves: what a GPU's rounding may be, and what a clip range has to be."""

from types import SimpleNamespace

import pytest

from flashgrpo.assembly import Assembly
from flashgrpo.doctor.checks import clip_range, first_ratio
from flashgrpo.doctor.trial import Trial
from flashgrpo.learning.objective import Clipped


def found(check, drift: float, clip: float = 1e-3, device: str = "cpu", uses: int = 1) -> tuple[str, str]:
    parts, trial = object.__new__(Assembly), object.__new__(Trial)
    optim = SimpleNamespace(passes=uses, minibatches=1)
    world = SimpleNamespace(device=SimpleNamespace(type=device))
    vars(parts).update(objective=Clipped(clip), world=world, config=SimpleNamespace(optim=optim))
    vars(trial).update(metrics={"drift": drift})
    finding = check(parts, trial)
    return finding.level, finding.sentence


@pytest.mark.parametrize(
    ("drift", "device", "level"),
    [
        (0.0, "cpu", "sound"),
        (0.0, "cuda", "sound"),
        (1e-9, "cpu", "unsound"),  # whose kernels add up in one order
        (9e-5, "cuda", "warning"),
        (1.1e-4, "cuda", "unsound"),  # above a tenth of the clip range
    ],
)
def test_a_first_ratio(drift, device, level):
    assert found(first_ratio, drift, device=device)[0] == level


@pytest.mark.parametrize(
    ("clip", "uses", "level"),
    [
        (1e-3, 1, "sound"),
        (1e-8, 1, "sound"),  # nothing is clipped where every ratio is 1
        (1e-8, 2, "unsound"),
        (2e-7, 2, "sound"),
    ],
)
def test_a_clip_range_below_the_resolution_of_float32(clip, uses, level):
    assert found(clip_range, 0.0, clip, uses=uses)[0] == level

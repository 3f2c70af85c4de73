"""What the optimizer's settings say of a run before it begins."""

import pytest

from flashgrpo.learning.settings import EmaConfig, OptimConfig


@pytest.mark.parametrize(("steps", "moved"), [(0, 0), (7, 0), (8, 0.1), (15, 0.1), (16, 0.19), (100, 1 - 0.9**12)])
def test_how_far_the_average_has_come(steps, moved):
    assert EmaConfig(decay=0.9, every=8).moved(steps) == pytest.approx(moved)
    assert EmaConfig(decay=0, every=8).moved(steps) == float(steps >= 8)


def test_an_average_that_lags_at_the_end_is_named():
    """Two steps an update, an averaging each: 0.9^2 after one update, 0.9^8 = 0.43 after four."""
    optim = OptimConfig(minibatches=2, ema=EmaConfig(decay=0.9, every=1))
    assert optim.average_moved(1) == pytest.approx(0.19)
    assert "still the base model to 53 %; lower optim.ema.decay" in (optim.average_lags(3) or "")
    assert optim.average_lags(4) is None

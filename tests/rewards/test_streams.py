"""Agreement in long videos: a return to the lane's beginning is no motion."""

import pytest
import torch

from flashgrpo.rewards import shapes, streams
from tools.streaming.world import BLOCKS, Script, draw_scripts, first_video_frame, lap_frames, render
from tools.tiny.world import Combination, caption, heldout_combinations

SLOW = Combination("red", "circle", "left", "slowly")
QUICK = Combination("blue", "square", "down", "quickly")


def mean(components: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(components.values())).mean(dim=0)


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    torch.set_num_threads(1)
    return render([Script(SLOW, QUICK, 4), Script(QUICK, SLOW, BLOCKS)], torch.Generator().manual_seed(0))


@pytest.mark.parametrize("frames", [slice(0, 9), slice(9, 21), slice(33, 45), slice(0, 45)])
def test_what_is_rendered_agrees_with_its_caption(videos, frames):
    assert mean(streams.agreement(videos[:, frames], [caption(SLOW), caption(QUICK)])).min() > 0.99


def test_a_caption_that_changes(videos):
    after = videos[:1, first_video_frame(4) :]
    assert mean(streams.agreement(after, [caption(QUICK)])).item() > 0.99
    assert mean(streams.agreement(after, [caption(SLOW)])).item() < 0.3


def test_without_laps_it_is_the_agreement_of_short_clips(videos):
    """A slow object's first 9 frames after a switch hold no return."""
    clip, prompts = videos[1:, 33:42], [caption(QUICK)]
    begin = render([Script(QUICK, SLOW, 4)], torch.Generator().manual_seed(1))[:, 45:54]
    for name, value in shapes.agreement(begin, [caption(SLOW)]).items():
        torch.testing.assert_close(streams.agreement(begin, [caption(SLOW)])[name], value, rtol=0, atol=1e-3)
    assert shapes.agreement(clip, prompts)["speed"].item() < streams.agreement(clip, prompts)["speed"].item()


def test_the_mean_step_by_hand():
    """On a circle of 20: places 9, 1, 3 are steps of 12 and 2, that is -8 and 2; weights 0 and 1 leave the second.

    The angle of a sum of equal angles is the angle: steps of 2.5 with a return, -17.5, are 2.5.
    """
    center = torch.tensor([[[9.0, 0.0], [1.0, 0.0], [3.0, 0.0]]])
    step = shapes._mean_step(center, torch.tensor([[0.0, 1.0, 1.0]]), 20.0)
    torch.testing.assert_close(step, torch.tensor([[2.0, 0.0]]))
    center = torch.tensor([[[15.0, 0.0], [17.5, 0.0], [0.0, 0.0], [2.5, 0.0]]])
    torch.testing.assert_close(shapes._mean_step(center, torch.ones(1, 4), 20.0), torch.tensor([[2.5, 0.0]]))


def test_a_lap_is_whole_latent_frames():
    assert (lap_frames(SLOW), lap_frames(QUICK)) == (20, 8)


def test_scripts_are_balanced_and_drawn_from_their_seed():
    combinations = heldout_combinations()
    scripts = draw_scripts(combinations, 72, 0.5, [3, 4], 0)
    assert scripts == draw_scripts(combinations, 72, 0.5, [3, 4], 0) != draw_scripts(combinations, 72, 0.5, [3, 4], 1)
    assert {sum(s.first == c for s in scripts) for c in combinations} == {2}
    assert {s.switch for s in scripts} == {3, 4, BLOCKS}
    assert all(s.first != s.second for s in scripts)
    assert [first_video_frame(block) for block in range(4)] == [0, 9, 21, 33]

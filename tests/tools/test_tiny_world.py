"""The world of moving shapes and the rewards that are measured from its pixels."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch import Tensor

from flashgrpo.rewards import shapes
from flashgrpo.rewards.shapes import ATTRIBUTES, agreement, background, coverage, parse_caption, persistence
from tools.tiny import world
from tools.tiny.world import Combination, caption

ALL = world.all_combinations()
CAPTIONS = [caption(c) for c in ALL]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """One clip of each of the 144 combinations, (144, 9, 3, 48, 48)."""
    return world.render(ALL, torch.Generator().manual_seed(3))


def columns(combinations: list[Combination]) -> dict[str, list[str]]:
    return {name: [getattr(c, name) for c in combinations] for name in ATTRIBUTES}


def test_clips_of_the_world_get_full_reward(clips: Tensor) -> None:
    for name, score in agreement(clips, CAPTIONS).items():
        assert score.shape == (144,)
        assert score.min() > 0.95, f"{name}: {CAPTIONS[int(score.argmin())]} gets {score.min():.3f}"
    assert persistence(clips, CAPTIONS).min() > 0.95
    assert background(clips, CAPTIONS).min() > 0.95


@pytest.mark.parametrize("name", list(ATTRIBUTES))
def test_each_component_sees_its_own_mistake_and_no_other(clips: Tensor, name: str) -> None:
    known = ATTRIBUTES[name]
    wrong = [c._replace(**{name: known[(known.index(getattr(c, name)) + 1) % len(known)]}) for c in ALL]
    scores = agreement(clips, [caption(c) for c in wrong])
    assert scores[name].max() < 0.1
    assert all(scores[other].min() > 0.95 for other in ATTRIBUTES if other != name)


def test_reward_is_graded_between_two_answers() -> None:
    """Halfway between two colours, shapes by area, directions or speeds a component lies between 0.2 and 0.8."""
    ramp = torch.arange(9.0)

    def clip(velocity: tuple[float, float], color: tuple[float, ...]) -> Tensor:
        center = torch.stack([14 + velocity[0] * ramp, 14 + velocity[1] * ramp], dim=1)[None]
        covered = coverage("circle", center, torch.full((1, 9), 150.0), 48, 48)[:, :, None]
        return covered * torch.tensor(color)[:, None, None] + (1 - covered) * 0.3

    red, purple = shapes.COLORS["red"], shapes.COLORS["purple"]
    between = tuple((a + b) / 2 for a, b in zip(red, purple, strict=True))
    caption_ = ["a red circle moving right slowly"]
    assert 0.2 < agreement(clip((1, 0), between), caption_)["color"].item() < 0.8
    assert 0.6 < agreement(clip((1, 1), red), caption_)["direction"].item() < 0.8  # cos 45 degrees
    assert 0.2 < agreement(clip((1.6, 0), red), caption_)["speed"].item() < 0.8


def test_columns_and_parsed_captions_agree_bit_for_bit(clips: Tensor) -> None:
    parsed = agreement(clips[:16], CAPTIONS[:16])
    given = agreement(clips[:16], ["whatever"] * 16, **columns(ALL[:16]))
    again = agreement(clips[:16], CAPTIONS[:16])
    for name in ATTRIBUTES:
        assert torch.equal(parsed[name], given[name])
        assert torch.equal(parsed[name], again[name])


def test_a_clip_scores_the_same_alone_and_in_a_batch(clips: Tensor) -> None:
    batch = agreement(clips[:8], CAPTIONS[:8])
    alone = agreement(clips[5:6], CAPTIONS[5:6])
    for name in ATTRIBUTES:
        torch.testing.assert_close(batch[name][5:6], alone[name], atol=1e-5, rtol=0)


def test_other_resolutions_score_the_same() -> None:
    some = ALL[::12]
    clips = world.render(some, torch.Generator().manual_seed(4))
    large = torch.nn.functional.interpolate(clips.flatten(0, 1), scale_factor=2, mode="bilinear")
    scores = agreement(large.view(len(some), 9, 3, 96, 96), [caption(c) for c in some])
    assert all(score.min() > 0.9 for score in scores.values())


BROKEN = {
    "noise": torch.rand(2, 9, 3, 48, 48, generator=torch.Generator().manual_seed(0)),
    "blank": torch.full((2, 9, 3, 48, 48), 0.3),
    "black": torch.zeros(2, 9, 3, 48, 48),
    "nan": torch.full((2, 9, 3, 48, 48), float("nan")),
    "one frame of noise": torch.rand(2, 1, 3, 32, 64, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_clips_without_an_object_get_nothing(name: str) -> None:
    for component in agreement(BROKEN[name], CAPTIONS[:2]).values():
        assert torch.isfinite(component).all()
        assert component.max() < 0.1
    assert persistence(BROKEN[name], CAPTIONS[:2]).max() < 0.1
    assert torch.isfinite(background(BROKEN[name], CAPTIONS[:2])).all()


def test_a_static_clip_has_neither_direction_nor_speed(clips: Tensor) -> None:
    scores = agreement(clips[:, :1].expand(-1, 9, -1, -1, -1), CAPTIONS)
    assert max(scores["direction"].max(), scores["speed"].max()) < 0.05
    assert min(scores["color"].min(), scores["shape"].min()) > 0.95


def test_watched_rewards_see_what_agreement_does_not(clips: Tensor) -> None:
    vanishing = clips.clone()
    vanishing[:, 5:] = clips[:, :1, :, :1, :1]  # four of nine frames show the background only
    assert persistence(vanishing, CAPTIONS).max() < 0.65
    assert background(vanishing, CAPTIONS).min() > 0.95
    flicker = clips.clone()
    flicker[:, ::2] = (clips[:, ::2] + 0.2).clamp(0, 1)
    assert background(flicker, CAPTIONS).max() < 0.3
    doubled = clips.clone()
    doubled[..., :24] = clips[..., 24:]  # the right half twice: two objects, or halves of them
    assert persistence(doubled, CAPTIONS).mean() < 0.7


@pytest.mark.parametrize("bad", ["", "a red circle", "a pink circle moving left slowly", "red circle moving left now"])
def test_a_caption_that_cannot_be_read_is_named(clips: Tensor, bad: str) -> None:
    with pytest.raises(ValueError, match=f'The prompt "{bad}" is not of the form'):
        agreement(clips[:1], [bad])


def test_bad_columns_and_shapes_are_refused(clips: Tensor) -> None:
    with pytest.raises(ValueError, match='has the color "pink"; known are red, yellow'):
        agreement(clips[:1], CAPTIONS[:1], color=["pink"])
    with pytest.raises(ValueError, match='column "color" has 2 values for 1 prompts'):
        agreement(clips[:1], CAPTIONS[:1], color=["red", "red"])
    with pytest.raises(ValueError, match="144 videos for 1 prompts"):
        agreement(clips, CAPTIONS[:1])
    with pytest.raises(ValueError, match=r"shape \(B, F, 3, H, W\)"):
        agreement(clips[0], CAPTIONS[:1])
    with pytest.raises(ValueError, match='Unknown shape "star"'):
        coverage("star", torch.zeros(2), torch.tensor(9.0), 8, 8)


def test_captions_round_trip() -> None:
    assert caption(Combination("red", "circle", "left", "slowly")) == "a red circle moving left slowly"
    assert [Combination(**parse_caption(text)) for text in CAPTIONS] == ALL


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_coverage_has_the_area_and_centre_it_is_asked_for(shape: str) -> None:
    drawn = coverage(shape, torch.tensor([20.3, 25.6]), torch.tensor(169.0), 48, 48)
    rows, cols = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    assert drawn.sum().item() == pytest.approx(169, rel=0.02)
    assert (drawn * cols).sum().item() / drawn.sum().item() == pytest.approx(20.3, abs=0.1)
    assert (drawn * rows).sum().item() / drawn.sum().item() == pytest.approx(25.6, abs=0.1)


def test_objects_stay_inside_the_picture(clips: Tensor) -> None:
    """The border of every frame shows background only, up to one pixel of antialiasing."""
    corner = clips[:, :1, :, 0, 0]
    for edge in (clips[..., 0, :], clips[..., -1, :], clips[..., 0], clips[..., -1]):
        assert (edge - corner[..., None]).abs().max() < 0.35


def test_rendering_is_seeded(clips: Tensor) -> None:
    assert torch.equal(clips, world.render(ALL, torch.Generator().manual_seed(3)))
    assert not torch.equal(clips, world.render(ALL, torch.Generator().manual_seed(4)))


def test_a_balanced_quarter_is_held_out() -> None:
    train, heldout = world.train_combinations(), world.heldout_combinations()
    assert (len(train), len(heldout)) == (108, 36)
    assert sorted(train + heldout) == sorted(ALL)
    for name, known in ATTRIBUTES.items():
        assert Counter(getattr(c, name) for c in heldout) == {word: 36 // len(known) for word in known}
        assert {getattr(c, name) for c in train} == set(known)


def test_shipped_prompt_files_are_what_the_world_makes() -> None:
    for name, combinations in (("train", world.train_combinations()), ("heldout", world.heldout_combinations())):
        text = (world.PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8")
        assert text == world.prompt_lines(combinations)
        first = json.loads(text.splitlines()[0])
        assert first == {"prompt": caption(combinations[0]), **combinations[0]._asdict()}

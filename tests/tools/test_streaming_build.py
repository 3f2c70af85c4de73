"""The recipe of the bundled streaming model: what a frame attends to, what counts, and that a build continues."""

import itertools
from pathlib import Path

import pytest
import torch

from tools.streaming import blocks, build, data, measure
from tools.streaming.world import BLOCK, BLOCKS, FRAMES, LATENT_FRAMES, Script, draw_scripts, first_video_frame
from tools.tiny.world import heldout_combinations, train_combinations


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_noisy_block_sees_itself_and_its_window_of_clean_frames() -> None:
    """Block 5 begins at frame 15: sink 0 to 2, past 9 to 14, and its own three, clean or noisy as it is itself."""
    mask = build.block_causal_mask()
    clean, noisy = (mask[first].nonzero().flatten().tolist() for first in (15, LATENT_FRAMES + 15))
    window = [0, 1, 2, 9, 10, 11, 12, 13, 14]
    assert clean == [*window, 15, 16, 17]
    assert noisy == [*window, LATENT_FRAMES + 15, LATENT_FRAMES + 16, LATENT_FRAMES + 17]
    assert mask.sum(dim=1).max() == build.WINDOW.frames


def world(scripts: list[Script]) -> data.World:
    latents = torch.zeros(len(scripts), 16, LATENT_FRAMES, 6, 6)
    return data.World(latents, scripts, torch.arange(108.0).view(108, 1, 1).expand(108, 16, 64))


def test_what_counts_is_what_the_caption_is_about() -> None:
    """Captions are right with a share of 0; a video with a switch at block 3 is learnt before it or from it on."""
    one, two = train_combinations()[:2]
    lesson = data.Lesson("a", 1, lr=0.0, level_share=1.0, wrong_caption_share=0.0, switches=True, emphasis=3.0)
    scripts = world([Script(two, one, BLOCKS), Script(one, two, 3)])
    (batch,) = data.batches(scripts, lesson, 16, 0, 0)
    before, after = [1.0] * 3 + [0.0] * 5, [0.0] * 3 + [3.0] + [1.0] * 4
    told = batch.text[:, 0, 0].tolist()
    assert set(told) == {0.0, 1.0}
    assert [row.tolist() for row in batch.weight] == [before if number == 0 else after for number in told]
    assert set(batch.sigma.unique().tolist()) <= {torch.tensor(level).item() for level in data.LEVELS}
    (again,) = data.batches(scripts, lesson, 16, 0, 0)
    assert torch.equal(batch.eps, again.eps)


def test_the_error_by_hand() -> None:
    """Block 0 is wrong by 1 and block 1 by 2: with weights 1 and 0 the mean square is 1, with both (1 + 4) / 2."""
    v = torch.zeros(1, 1, 2 * BLOCK, 1, 1)
    v[:, :, :BLOCK], v[:, :, BLOCK:] = 1.0, 2.0
    assert build.error(v, torch.zeros_like(v), torch.tensor([[1.0, 0.0]])).item() == 1.0
    assert build.error(v, torch.zeros_like(v), torch.tensor([[1.0, 1.0]])).item() == 2.5


def test_a_build_that_was_ended_continues_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it makes is a model that streams held-out captions."""
    build.build(tmp_path / "one", tmp_path / "work-one", seed=1, recipe=data.QUICK)

    monkeypatch.setattr(build, "KEEP_SECONDS", 0)
    learn, steps = build.Stage.learn, []

    def learn_thrice(stage: build.Stage, loss: torch.Tensor, decay: float) -> None:
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(stage.step)
        learn(stage, loss, decay)

    monkeypatch.setattr(build.Stage, "learn", learn_thrice)
    with pytest.raises(KeyboardInterrupt):
        build.build(tmp_path / "two", tmp_path / "work-two", seed=1, recipe=data.QUICK)
    monkeypatch.setattr(build.Stage, "learn", learn)
    assert not (tmp_path / "two").exists()
    build.build(tmp_path / "two", tmp_path / "work-two", seed=1, recipe=data.QUICK)
    file = Path("transformer/diffusion_pytorch_model.safetensors")
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert sum(path.stat().st_size for path in (tmp_path / "one").rglob("*") if path.is_file()) <= 6e6

    model = measure.load(tmp_path / "one")
    scripts = draw_scripts(heldout_combinations(), 2, 1.0, [4], 0)
    videos = measure.draw(model, scripts, seed=0)
    assert videos.shape == (2, 93, 3, 48, 48)
    assert measure.rewards(videos, scripts).shape == (2, BLOCKS, 4)
    alone = measure.draw(model, scripts[:1], seed=0)
    torch.testing.assert_close(alone, videos[:1], rtol=0, atol=1e-3)


def test_what_is_kept_is_of_one_seed_and_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"seed": 1}', encoding="utf-8")
    with pytest.raises(SystemExit, match="holds what another seed or recipe has begun; give another --work"):
        build.build(tmp_path / "out", tmp_path, seed=0, recipe=data.QUICK)


def test_the_world_gives_at_least_eight_branches() -> None:
    """A fork at frame 12 of which the 4 nearest stay: frames 3 to 7 are free, and 2 of 5 are 10 branches."""
    pairs = itertools.combinations(range(3, 8), 2)
    assert len({build.WINDOW.routed(12, pair, nearest=4) for pair in pairs}) == 10


def test_blocks_are_judged_under_the_caption_that_holds_there(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []

    def note(clips: torch.Tensor, captions: list[str]) -> dict[str, torch.Tensor]:
        judged.append((clips.shape[1], captions))
        return {"one": torch.zeros(len(clips)), "two": torch.ones(len(clips))}

    monkeypatch.setattr(blocks, "agreement", note)
    switches = [[{"frame": first_video_frame(4), "prompt": "later"}], None]
    found = blocks.by_block(torch.zeros(2, FRAMES, 3, 8, 8), ["first", "only"], switches)
    assert list(found) == [f"block{block}" for block in range(BLOCKS)]
    assert all(values.tolist() == [0.5, 0.5] for values in found.values())
    sizes = [first_video_frame(block + 1) - first_video_frame(block) for block in range(BLOCKS)]
    assert [size for size, _ in judged] == sizes
    assert [captions for _, captions in judged] == 4 * [["first", "only"]] + 4 * [["later", "only"]]

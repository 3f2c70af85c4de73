"""What rewards are handed, and how they are computed beside each other and beside the rollout."""

import functools
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import LiveBytes
from flashgrpo.distributed.world import single_process
from flashgrpo.errors import UserError
from flashgrpo.process import Process
from flashgrpo.scoring.inputs import LatentVideos, Pixels, VideoFiles
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import AHEAD, Scoring
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.types import Prompt
from tests.videos import read_mp4

HERE = "tests.scoring.test_scoring"
PROMPTS = [Prompt(f"video {i}", {"n": i}) for i in range(6)]
LATENTS = torch.arange(6.0).view(6, 1, 1, 1, 1).expand(6, 2, 3, 4, 4)


class Model:
    """Decodes latents to grey videos of a tenth of their value, and notes how many it was given at once."""

    device = torch.device("cpu")

    def __init__(self):
        self.decoded = []
        self.frames = []

    def media(self, latents, frames=None):
        self.decoded.append(len(latents))
        self.frames.append(frames)
        return (latents[:, :1, :1, :1, :1] / 10).expand(-1, frames or 9, 3, 32, 32).clone()


for name in (name for name in dir(Process) if not name.startswith("_") and not hasattr(Model, name)):
    setattr(Model, name, lambda *_: pytest.fail("not asked for"))  # whatever else a process has is not asked for here


def mean(videos, prompts, n):
    return videos.mean(dim=(1, 2, 3, 4)) * 10


def of_latents(videos, prompts, n):
    assert videos.shape[1:] == (2, 3, 4, 4)
    return videos.mean(dim=(1, 2, 3, 4)) * 100


def of_files(videos, prompts, n):
    return [float(read_mp4(Path(path)).mean()) * 10 for path in videos]


of_latents.takes = LatentVideos()
of_files.takes = VideoFiles()


class Shape:
    """Loads something, and gives back what it was handed."""

    made = 0

    def __init__(self, stride: int = 1, size: int | None = None):
        Shape.made += 1
        self.takes = Pixels(stride=stride, size=size)
        self.failures = 3

    def __call__(self, videos, prompts, n):
        self.failures += 2
        return {"frames": [float(videos.shape[1])] * len(n), "height": [float(videos.shape[3])] * len(n)}


def test_frames_by_stride_rate_and_size():
    videos = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(1, 9, 3, 40, 60) / 9
    assert Pixels().prepare(videos, 8.0) is videos
    assert Pixels(stride=4).frames(9, 8.0).tolist() == [0, 4, 8]
    assert Pixels(fps=2.0).frames(9, 8.0).tolist() == [0, 4, 8]
    assert Pixels(fps=3.0).frames(9, 8.0).tolist() == [0, 3, 5, 8]
    assert Pixels(fps=30.0).frames(3, 8.0).tolist() == [0, 1, 2]
    for beginning, wanted in ((Pixels(stride=2, first=6), [0, 2, 4]), (Pixels(fps=3.0, first=6), [0, 3])):
        assert beginning.frames(9, 8.0).tolist() == beginning.frames(6, 8.0).tolist() == wanted
    small = Pixels(stride=3, size=20).prepare(videos, 8.0)
    assert small.shape == (1, 3, 3, 20, 30)
    torch.testing.assert_close(small[0, :, 0, 5, 5], torch.tensor([0.0, 3, 6]) / 9)
    for wrong in ({"stride": 0}, {"fps": -1.0}, {"fps": 2.0, "stride": 2}, {"size": 0}, {"first": 0}):
        with pytest.raises(ValueError, match=r"stride|fps|size|first"):
            Pixels(**wrong)


def no_clips(view, number):
    raise AssertionError("rewards look at whole samples")


def score(configs, model, batches=((0, 1), (2, 3, 4), (5,)), **settings) -> object:
    rewards = Rewards(configs, fps=8.0)
    rewards.load(single_process(computes=False))
    scoring = Scoring(
        rewards, model.media, no_clips, single_process(computes=False), PROMPTS, watched=True, micro_batch=2, **settings
    )
    for rows in batches:
        rows = torch.tensor(rows)
        scoring.add(rows, LATENTS[rows])
    return scoring.table(), scoring


def config(name: str, **settings) -> RewardConfig:
    return RewardConfig(call=f"{HERE}:{name}", **settings)


@pytest.mark.parametrize("deferred", [False, True])
def test_each_reward_is_handed_what_it_takes(deferred):
    model = Model()
    configs = {"mean": config("mean"), "latent": config("of_latents"), "file": config("of_files")}
    configs |= {"shape": config("Shape", args={"stride": 4, "size": 16}), "by": config("Shape", input=Pixels(stride=3))}
    table, scoring = score(configs, model, deferred=deferred, keep=[1, 4])
    assert table.names == (
        "mean",
        "latent",
        "file",
        *(f"{a}.{b}" for a in ("shape", "by") for b in ("frames", "height")),
    )
    torch.testing.assert_close(table.values[:, 0], torch.arange(6.0).double(), rtol=0, atol=1e-5)
    assert table.values[:, 1].tolist() == [0, 100, 200, 300, 400, 500]
    torch.testing.assert_close(table.values[:, 2], torch.arange(6.0).double(), rtol=0, atol=0.1)  # H.264 of 8 bits
    assert table.values[0, 3:].tolist() == [3, 16, 3, 32]
    assert model.decoded == [2, 2, 1, 1]
    assert sorted(scoring.kept) == [1, 4]
    assert float(scoring.kept[4].mean()) == pytest.approx(0.4)
    assert table.failures == {
        "mean": 0,
        "latent": 0,
        "file": 0,
        "shape": 2 * 3,
        "by": table.failures["by"],
    }


def test_nothing_is_decoded_for_rewards_of_latents():
    model = Model()
    assert score({"latent": config("of_latents")}, model)[0].values[5].tolist() == [500]
    assert model.decoded == []


@pytest.mark.parametrize("deferred", [False, True])
def test_no_frame_is_decoded_that_no_reward_asks_for(deferred):
    """The longest of the beginnings that they ask for; everything where one asks for everything or videos are kept."""
    first, five = config("Shape", input=Pixels(first=1)), config("Shape", input=Pixels(first=5, stride=3))
    few = {"first": first, "five": five, "latent": config("of_latents")}
    cases = [
        (few, {}, 5),
        ({"first": first}, {}, 1),
        (few | {"mean": config("mean")}, {}, None),
        (few | {"file": config("of_files")}, {}, None),
        (few, {"keep": [1]}, None),
    ]
    for configs, settings, frames in cases:
        model = Model()
        table, _ = score(configs, model, deferred=deferred, **settings)
        assert set(model.frames) == {frames}
        shown = dict(zip(table.names, table.values[0].tolist(), strict=True))
        assert [shown["first.frames"], shown.get("five.frames", 2)] == [1, 2]
    assert sorted(score(few, Model(), deferred=deferred, keep=[1])[1].kept[1].shape) == [3, 9, 32, 32]


LOG: list[tuple[str, int]] = []
BUSY = threading.Lock()


def slow(videos, prompts, n):
    assert BUSY.acquire(blocking=False), "called twice at once"
    time.sleep(0.02 * (3 - len(n)))
    LOG.append(("slow", len(n)))
    BUSY.release()
    return [float(value) for value in n]


def test_order_does_not_depend_on_timing_and_a_reward_is_never_called_twice_at_once():
    LOG.clear()
    table, _ = score({"slow": config("slow"), "mean": config("mean")}, Model())
    assert table.values[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert LOG == [("slow", 2), ("slow", 3), ("slow", 1)]


def test_scoring_goes_on_while_the_next_batch_is_drawn():
    begun = threading.Event()

    class Waiting(Model):
        def media(self, latents, frames=None):
            if self.decoded:  # the second batch is being made: the first has to be with its reward by now
                assert begun.wait(timeout=300)
            return super().media(latents, frames)

    def notes(videos, prompts, n):
        begun.set()
        return [0.0] * len(n)

    globals()["notes"] = notes
    score({"notes": config("notes")}, Waiting())


def test_a_rollout_waits_for_a_reward_that_is_far_behind():
    gate = threading.Event()

    class Counting(Model):
        def media(self, latents, frames=None):
            if len(self.decoded) == AHEAD:  # it may be made, but has to wait until the first was scored
                threading.Timer(0.3, gate.set).start()
            assert gate.is_set() == (len(self.decoded) > AHEAD)
            return super().media(latents, frames)

    def blocked(videos, prompts, n):
        assert gate.wait(timeout=300)
        return [float(value) for value in n]

    globals()["blocked"] = blocked
    table, _ = score({"blocked": config("blocked")}, Counting(), batches=[(i,) for i in range(6)])
    assert table.values[:, 0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("deferred", [False, True])
def test_a_reward_sees_one_micro_batch_and_the_host_holds_few(deferred):
    """Also where decoding begins once all is drawn: 20 samples in twos, with a reward that is slower than decoding."""
    enough = threading.Event()
    prompts = [Prompt(f"video {i}", {"n": i}) for i in range(20)]
    seen: list[int] = []

    class Ahead(Model):
        def media(self, latents, frames=None):
            if len(self.decoded) == AHEAD:
                enough.set()
            return super().media(latents, frames)

    def late(videos, prompts, n):
        assert enough.wait(timeout=300)
        seen.append(len(videos))
        return [float(value) for value in n]

    globals()["late"] = late
    world, rewards = single_process(computes=False), Rewards({"late": config("late")}, fps=8.0)
    rewards.load(world)
    scoring = Scoring(rewards, Ahead().media, no_clips, world, prompts, watched=True, micro_batch=2, deferred=deferred)
    one = 9 * 3 * 32 * 32 * 4  # bytes of a video
    with LiveBytes() as live:
        for rows in torch.arange(20).split(2):
            scoring.add(rows, torch.zeros(2, 1, 1, 1, 1))
        table = scoring.table()
    assert seen == [2] * 10
    assert table.values[:, 0].tolist() == list(range(20))
    assert (AHEAD + 1) * 2 * one <= live.peak < (AHEAD + 2.5) * 2 * one  # one more while it is copied to the host


def spoils(videos, prompts, n):
    videos += 1
    return [0.0] * len(n)


def fickle(videos, prompts, n):
    return {"a": [0.0] * len(n)} if 0 in n else {"b": [0.0] * len(n)}


def nan_at_the_end(videos, prompts, n):
    return [float("nan") if value == 5 else 0.0 for value in n]


def test_what_a_reward_may_not_do():
    with pytest.raises(UserError, match="reward spoils changed the videos in place"):
        score({"spoils": config("spoils")}, Model())
    with pytest.raises(UserError, match=r"reward fickle returned \['a'\] for some videos and others for the rest"):
        score({"fickle": config("fickle")}, Model())


def test_a_reward_without_a_number_leaves_nan():
    table, *_ = score({"nan_at_the_end": config("nan_at_the_end")}, Model())
    assert table.values.isnan().nonzero().tolist() == [[5, 0]]


TRIES: list[int] = []


def down(videos, prompts, n):
    TRIES.append(len(n))
    raise UserError("the server is away")


def test_a_reward_that_has_failed_is_not_waited_for_again():
    TRIES.clear()
    with pytest.raises(UserError, match="reward down: the server is away"):
        score({"down": config("down"), "mean": config("mean")}, Model())
    assert TRIES == [2]  # of three batches


def count(videos, prompts, n, by):
    return [float(by)] * len(n)


ten = functools.partial(count, by=10)


class Mute:
    pass


def test_any_callable_is_a_reward():
    assert score({"ten": config("ten")}, Model())[0].values.unique().tolist() == [10]
    with pytest.raises(UserError, match="instances of Mute cannot be called"):
        Rewards({"m": config("Mute")}).check_columns(Prompt("x", {}), "prompts.train")


def test_a_class_is_made_once_and_its_arguments_are_checked():
    before = Shape.made
    rewards = Rewards({"s": config("Shape", args={"stride": 2})})
    assert Shape.made == before  # not before it has to
    rewards.load(single_process(computes=False))
    rewards.load(single_process(computes=False))
    assert Shape.made == before + 1
    assert rewards.takes("s") == Pixels(stride=2)
    with pytest.raises(
        UserError, match=r"rewards.s.args: the function has no parameter 'strid'; did you mean 'stride'"
    ):
        Rewards({"s": config("Shape", args={"strid": 2})})
    with pytest.raises(UserError, match=r"rewards.a.args: missing a required argument: 'head'"):
        Rewards({"a": RewardConfig(call="flashgrpo.rewards.clip:Aesthetic")})
    with pytest.raises(UserError, match=r"cannot take the columns of prompts.train"):
        Rewards({"s": config("Shape")}).check_columns(Prompt("x", {"other": 1}), "prompts.train")


def test_settings_of_a_reward(tmp_path):
    loaded = RunConfig.load(
        "tiny", ["rewards.background.max_fall=0.1", "rewards.agreement.input={kind: pixels, fps: 2}"]
    )
    assert loaded.rewards["agreement"].input == Pixels(fps=2.0)
    assert RunConfig.parse(__import__("yaml").safe_load(loaded.to_yaml()), "again") == loaded
    with pytest.raises(UserError, match="max_fall is for a reward that is watched"):
        RunConfig.load("tiny", ["rewards.agreement.max_fall=0.1"])
    with pytest.raises(UserError, match=r"unknown key rewards.agreement.input.strid; did you mean 'stride'"):
        RunConfig.load("tiny", ["rewards.agreement.input={kind: pixels, strid: 2}"])


SEEN: list[tuple[list[int], int]] = []


class Ranks:
    """Ranks the samples of a call; notes which they were."""

    compares = True

    def __call__(self, videos, prompts, n):
        SEEN.append((list(n), len(videos)))
        values = videos.mean(dim=(1, 2, 3, 4))
        return (values[:, None] > values).sum(dim=1).double()


@pytest.mark.parametrize("deferred", [False, True])
def test_a_reward_that_compares_is_called_with_whole_groups(deferred):
    """Whatever the batches that they were drawn in, and beside rewards that take those as they come."""
    SEEN.clear()
    configs = {"rank": config("Ranks"), "mean": config("mean")}
    batches, groups = ((5, 0, 3), (4, 1), (2,)), [0, 0, 0, 1, 1, 1]
    table, _ = score(configs, Model(), batches, deferred=deferred, groups=groups)
    assert sorted(SEEN) == [([0, 1, 2], 3), ([3, 4, 5], 3)]
    assert table.values[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    torch.testing.assert_close(table.values[:, 1], torch.arange(6.0).double(), rtol=0, atol=1e-5)
    SEEN.clear()
    assert score({"rank": config("Ranks")}, Model(), batches)[0].values.flatten().tolist() == [0.0] * 6
    assert sorted(SEEN) == [([n], 1) for n in range(6)]


def test_a_reward_that_compares_needs_whole_samples_of_whole_groups():
    two = replace(single_process(computes=False), size=2)
    rewards = Rewards({"rank": config("Ranks")})
    settings = Model().media, no_clips, two, PROMPTS, True, 2
    Scoring(rewards, *settings, groups=[0, 0, 0, 1, 1, 1])
    with pytest.raises(UserError, match=r"rewards\.rank compares the samples of a group, and here groups are divided"):
        Scoring(rewards, *settings, groups=[0, 0, 1, 1, 2, 2])
    with pytest.raises(UserError, match=r"rewards\.rank\.looks_at: whole samples are what this reward compares"):
        Rewards({"rank": config("Ranks", looks_at="clips")}).load(single_process(computes=False))
    served = replace(single_process(computes=False), reward_ranks=(0,))
    with pytest.raises(
        UserError, match=r"parallel\.reward_ranks: they get parts of groups, and rewards\.rank compares"
    ):
        Rewards({"rank": config("Ranks")}).load(served)

"""Branches of streaming videos: what they share, what they are shown, and what their scores are."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError
from flashgrpo.learning.objective import Competing
from flashgrpo.processes.streaming.cache import KVCache
from flashgrpo.processes.streaming.clips import cut
from flashgrpo.processes.streaming.decoding import decode
from flashgrpo.processes.streaming.drawing import Stream as Drawn
from flashgrpo.processes.streaming.process import evaluation_name
from flashgrpo.processes.streaming.scenes import scenes_of
from flashgrpo.processes.streaming.settings import Energy, NoisedBlock, OneLevel, Routing, Transition, check_pair
from flashgrpo.processes.streaming.source import Fork
from flashgrpo.processes.streaming.window import Window
from flashgrpo.types import Condition, Prompt, PromptGroup
from tests.fakes import whole_score
from tests.streams import BLOCK, FRAMES, ROUTED, Stream

GROUPS = [PromptGroup(2, number, Prompt(text, {}), 4, anchored=True) for number, text in enumerate(("wall", "door"))]
SAMPLES = [sample for group in GROUPS for sample in group.samples]


def drawn(process, samples=SAMPLES):
    return process.draw(samples, 7, lambda rows, outputs: None, 2)


def fork_at(frame: int, level: int, update: int = 0) -> Fork:
    return Fork((0, update, 0), frame, level, KVCache(), Condition({}))


def test_branches_are_one_video_until_the_fork_and_differ_from_there():
    outputs, record = drawn(Stream(True))
    for group in range(2):
        videos, frame = outputs[5 * group : 5 * group + 5], int(record.slot[4 * group])
        assert torch.equal(videos[:, :, :frame], videos[:1, :, :frame].expand(5, -1, -1, -1, -1))
        assert len({tuple(video.tolist()) for video in videos[:, :, frame:].flatten(1)}) > 2
    assert set(record.slot.tolist()) <= set(ROUTED.forks(FRAMES, Window(1, 4, BLOCK)))


@pytest.mark.parametrize(
    ("explore", "score"), [(ROUTED, None), (OneLevel(), Transition()), (OneLevel(), NoisedBlock())]
)
def test_videos_may_end_with_the_blocks_in_which_branches_differ(explore, score):
    """What is drawn is the same, and so is its replay; latents behind the end are 0, and cost no call."""
    anchored = explore is ROUTED
    whole, short = (Stream(anchored, explore=explore, score=score, whole=whole) for whole in (True, False))
    calls = {}

    def counted(process):
        velocity, calls[process] = process.model.velocity, 0

        def call(x, *arguments):
            calls[process] += len(x)
            return velocity(x, *arguments)

        process.model.velocity = call
        samples = [sample for sample in SAMPLES if anchored or not sample.is_anchor]
        return process.draw(samples, 7, lambda rows, outputs: None)

    (outputs, record), (cut_off, of_short) = counted(whole), counted(short)
    assert torch.equal(record.state.recorded, of_short.state.recorded)
    for row in range(len(outputs)):
        fork = record.state.forks[row // (len(outputs) // 2)].frame
        end = fork + explore.blocks * BLOCK
        assert torch.equal(outputs[row, :, :end], cut_off[row, :, :end])
        assert not bool(cut_off[row, :, end:].any())
    assert calls[short] < calls[whole]
    for process in (whole, short):
        assert process.cost(7, 2, 1, ()).rollout == calls[process]


@pytest.mark.parametrize("first", [0, 1])
def test_a_branch_in_the_clean_context_has_the_score_zero_which_is_the_highest(first):
    """Exactly, of a branch that was drawn un-routed: the window's own old frame is what it is shown."""

    process = Stream(True, first=first)
    process.source.routes = lambda fork, samples: [[] for _ in samples]
    process.source.routing = replace(ROUTED, nearest=4)
    process.source.forks = lambda script: [(6 + first, 0)]
    _, record = drawn(process)
    assert torch.equal(record.old, torch.zeros(8))
    _, routed = drawn(Stream(True, first=first))
    assert bool((routed.old < 0).all())


def test_shares_of_the_policy_that_drew_add_up_to_one_with_the_ratios():
    process, objective = Stream(True, micro_batch=4), Competing(tau=0.1)
    _, record = drawn(process)
    for parameter in process.network.parameters():
        parameter.data += 0.05
    new = torch.cat([whole_score(process, record[torch.arange(4) + 4 * group]).detach() for group in range(2)])
    ratios = objective.log_ratio(new, record.old, {"key": record.key}).exp()
    assert (ratios - 1).abs().max() > 1e-3
    shares = objective.log_shares(record.old, record.key).exp()
    torch.testing.assert_close((shares * ratios).view(2, 4).sum(dim=1), torch.ones(2))


@pytest.mark.parametrize(("plan", "common", "used"), [("spread", 1.357, 14), ("independent", 1.79, None)])
def test_plans_have_the_overlap_that_is_published_for_them(plan, common, used):
    """Frames that two of eight branches have in common, on average: five of a pool of 14 (LongLive's numbers)."""
    process = Stream(group_size=8)
    process.source.routing, process.model.window = Routing(plan=plan), Window()
    samples = PromptGroup(0, 0, Prompt("", {}), 8).samples
    overlaps, seen = [], set()
    for update in range(40):
        fork = fork_at(39, 0, update)
        routes = [set(route) for route in process.source.routes(fork, samples)]
        assert all(len(route) == 5 for route in routes)
        seen = set().union(*routes)
        assert seen <= set(range(21, 35))
        overlaps += [len(one & other) for i, one in enumerate(routes) for other in routes[:i]]
        assert used is None or len(seen) == used
    assert sum(overlaps) / len(overlaps) == pytest.approx(common, abs=0.001 if used else 0.08)


def test_a_transition_is_a_gaussian_and_its_weight_divides_by_its_gradient():
    process = Stream(explore=OneLevel(), score=Transition())
    process.model.levels = (1.0, 0.9375, 0.83333, 0.625)
    weights = [process.source.weight(fork_at(0, level)) for level in range(3)]
    assert sum(weights) == pytest.approx(3)
    assert [weights[0] / weight for weight in weights] == pytest.approx(
        [1, 0.1875 / 0.0666667, 0.5 / 0.0666667], rel=1e-3
    )
    plain = Stream(explore=OneLevel(), score=Transition(rectified=False))
    assert plain.source.weight(fork_at(0, 1)) == 1
    groups = [PromptGroup(0, 0, Prompt("wall", {}), 4)]
    outputs, record = drawn(plain, groups[0].samples)
    state = record.state.recorded
    assert torch.equal(state[:, 0], state[:1, 0].expand(4, -1, -1, -1, -1))  # one input, four outputs
    assert len({tuple(one.tolist()) for one in state[:, 1].flatten(1)}) == 4
    frame, level = divmod(int(record.slot[0]), 2)
    assert torch.equal(outputs[:, :, :frame], outputs[:1, :, :frame].expand(4, -1, -1, -1, -1))
    lower, fork = plain.model.levels[level + 1], record.state.forks[0]
    context = fork.cache.context(plain.model.window.past(frame))
    condition = plain.encode([Prompt("wall", {})] * 4)
    x0 = state[:, 0] - plain.model.levels[level] * plain.model.velocity(state[:, 0], 1.0, frame, context, condition)
    normal = torch.distributions.Normal((1 - lower) * x0, lower)
    constant = normal.log_prob((1 - lower) * x0)
    expected = (normal.log_prob(state[:, 1]) - constant).flatten(1).mean(dim=1)
    torch.testing.assert_close(record.old, expected.detach())


SWITCHED = {"switches": [{"frame": 6, "prompt": "a door"}]}


def test_prompts_that_switch_are_drawn_and_scored_and_never_inside_of_a_fork():
    """Stride 1: frame 6 is latent frame 6, the fourth block's first."""
    process, prompt = Stream(True), Prompt("a wall", SWITCHED)
    plain, other = (
        process.sample([p], [(0, "x")], lambda rows, outputs: None)[0] for p in (Prompt("a wall", {}), prompt)
    )
    assert torch.equal(plain[:, :6], other[:, :6])
    assert not torch.equal(plain[:, 6:], other[:, 6:])
    for update in range(4):
        samples = PromptGroup(update, 0, prompt, 4, anchored=True).samples
        _, record = drawn(process, samples)
        assert set(record.slot.tolist()) <= {6, 8}
        (clip,) = process.clips("chunk", prompt, (samples[0], 7))
        assert (clip.first, clip.stop, clip.prompt.text) == (int(record.slot[0]), int(record.slot[0]) + 4, "a door")
        again = torch.cat([whole_score(process, part).detach() for part in process.micro_batches(record)])
        assert torch.equal(again, record.old)
    assert [clip.prompt.text for clip in process.clips("clips", prompt, None)] == ["a wall", "a door"]
    narrow = Prompt("a wall", {"switches": [{"frame": f, "prompt": "a door"} for f in (8, 10)]})
    with pytest.raises(UserError, match=r"no room between the switches .* scenes begin at latent frames \[0, 8, 10\]"):
        drawn(process, PromptGroup(0, 0, narrow, 4).samples)


@pytest.mark.parametrize(
    ("switches", "sentence"),
    [
        ([{"frame": 44, "prompt": "b"}], "not at frame 44; the nearest is 45"),
        ([{"frame": 45, "prompt": "b"}, {"frame": 45, "prompt": "c"}], "not at frame 45; the nearest is 57"),
        ([{"frame": 0, "prompt": "b"}], "not at frame 0; the nearest is 9"),
        ([{"frame": 93, "prompt": "b"}], "not at frame 93; the nearest is 81"),
        ([{"frame": "45", "prompt": "b"}], "is a list of"),
        ([{"frame": 45, "prompt": " "}], "is a list of"),
        (["b"], "is a list of"),
    ],
)
def test_a_switch_that_cannot_be_is_refused_with_the_nearest_that_can(switches, sentence):
    with pytest.raises(UserError) as error:
        scenes_of(Prompt("a", {"switches": switches}), 24, Window(), 4)
    assert sentence in str(error.value)


def test_scenes_have_the_columns_of_their_own_entry():
    switch = {"frame": 45, "prompt": "b", "color": "red"}
    first, second = scenes_of(Prompt("a", {"color": "blue", "shape": "x", "switches": [switch]}), 24, Window(), 4)
    assert (first.start, first.prompt) == (0, Prompt("a", {"color": "blue", "shape": "x"}))
    assert (second.start, second.prompt) == (12, Prompt("b", {"color": "red", "shape": "x"}))


@pytest.mark.parametrize(
    ("span", "parts"),
    [
        ((0, 45, 12), [(0, 12), (12, 24), (24, 36), (36, 45)]),
        ((0, 40, 12), [(0, 12), (12, 24), (24, 40)]),
        ((45, 93, 24), [(45, 69), (69, 93)]),
        ((0, 9, 36), [(0, 9)]),
    ],
)
def test_clips_are_about_as_long_as_asked_and_leave_nothing_out(span, parts):
    assert cut(*span) == parts


@pytest.mark.parametrize("first", [0, 1])
def test_what_videos_have_in_common_is_decoded_once(first):
    process = Stream(True, first=first)
    outputs, record = drawn(process)
    whole = torch.cat([process.model.decode(one[None])[0] for one in outputs])
    frames, usual = 0, process.model.decode

    def counted(latents, state=None):
        nonlocal frames
        frames += len(latents) * latents.shape[2]
        return usual(latents, state)

    process.model.decode = counted
    torch.testing.assert_close(decode(process.model, outputs), whole)
    forks = [int(record.slot[0]), int(record.slot[4])]
    assert frames == sum(fork + 5 * (FRAMES + first - fork) for fork in forks)
    assert decode(process.model, outputs, 3).shape[1] == 3


REFUSED = [
    (["algorithm={preset: kvpo, explore: {kind: one-level}}"], "every score is 0, and nothing is learnt"),
    (["algorithm={preset: kvpo, objective: {kind: clipped}}"], "an energy is no log-probability"),
    (["algorithm={preset: flash-stream, explore: {kind: routing}}"], "it needs algorithm.explore.kind=one-level"),
    (
        ["algorithm={preset: flash-stream, credit: {baseline: anchor}}"],
        "judges each branch by itself, without an anchor",
    ),
    (["algorithm={preset: flash-stream, objective: {kind: contrast}}"], "which a transition does not record"),
    (["algorithm={preset: stream-nft, explore: {kind: routing}}"], "renoised-block scores one block of each branch"),
    (["algorithm.explore.nearest=2"], "from 3 to 9, not 2"),
    (["model.compile=true"], "has no use for it"),
    (["rollout.num_steps=4"], "rollout.num_steps is of flow or masked"),
    (["rollout.local=2"], "does not hold a block of 3 frames"),
    (["algorithm.score={kind: recorded}"], "is flow; take a preset of one of the two"),
    (["rollout.kind=flow"], "rollout.kind: the algorithm's explore.kind routing is of streaming; leave it out"),
]


@pytest.mark.parametrize(("overrides", "sentence"), REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(overrides, sentence):
    with pytest.raises(UserError) as error:
        RunConfig.load("tiny-streaming", overrides)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_video_too_short_to_fork_is_refused():
    """When a run is put together; it can be sampled all the same."""
    short = Stream(explore=replace(ROUTED, blocks=9))
    with pytest.raises(UserError, match="forks nowhere with blocks 9"):
        short.set_average(nullcontext)
    assert sum(len(piece[0]) for piece in short.stream(Prompt("a red dot", {}), (0, "x"))) > 1
    with pytest.raises(UserError, match="no block of a video of 12 latent frames begins at 12"):
        Stream(explore=OneLevel(earliest=12), score=Transition()).set_average(nullcontext)
    check_pair(Routing(), Energy(), True, True, ())


def test_a_video_that_is_drawn_in_time_forgets_what_no_later_block_needs():
    process = Stream()
    prompt = Prompt("a red dot", {"switches": [{"frame": 6, "prompt": "a blue dot"}]})
    [whole] = process.media(process.sample([prompt], [(0, "x")], lambda rows, outputs: None))
    pieces = list(process.stream(prompt, (0, "x")))
    assert [len(piece) for piece in pieces] == [BLOCK] * (FRAMES // BLOCK)
    torch.testing.assert_close(torch.cat(pieces), whole)
    stream = Drawn.begun(process.model, process.script(prompt), 1)
    for frame in range(BLOCK, FRAMES, BLOCK):
        stream = stream.until(frame, [evaluation_name((0, "x"))]).forgetting()
        assert stream.frame == frame
        assert stream.latents.shape[2] <= process.model.window.frames

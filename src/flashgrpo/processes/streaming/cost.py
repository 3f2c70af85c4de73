"""What an update of the streaming process costs, in forwards of one block of one video.

A block is drawn in a forward for each level, and committed to the cache in one more, but for a video's last; that is
counted as one also where it writes blocks before it again. A backward
pass counts two, and one more where the blocks are computed again in it. Scores of several addends, or that compete, are
computed twice: for their derivatives first. Not counted are rows that only fill a batch up, frames that are cached anew
where a prompt switches, decoding, and rewards.
"""

from collections.abc import Sequence

from flashgrpo.process import Cost
from flashgrpo.processes.streaming.settings import Energy, Routing, StreamExplore, StreamRollout, StreamScore
from flashgrpo.seeds import keyed_bits

Place = tuple[int, int]
"""A frame, and the number of a level."""


def place_of(places: Sequence[Place], seed: int, update: int, group: int) -> Place:
    """Draw where the branches of a group part."""
    return places[keyed_bits("fork", seed, update, group) % len(places)]


def drawn_until(fork: int, explore: StreamExplore, block: int, frames: int, whole: bool) -> int:
    """Return the frame behind which a video is not drawn: its last, or that of the blocks in which branches differ."""
    return frames if whole else fork + explore.blocks * block


def update_cost(
    explore: StreamExplore,
    score: StreamScore,
    rollout: StreamRollout,
    frames: int,
    levels: int,
    anchored: bool,
    whole: bool,
    seed: int,
    update: int,
    passes: int,
    columns: Sequence[str],
    uses: int,
    recomputes: bool,
) -> Cost:
    """Return what update number `update` costs, of prompts without a switch.

    Args:
        frames: latent frames of a video.
        levels: of a block.
        anchored: whether each group has an anchor.
        whole: whether videos are drawn to their end; see `drawn_until`.
        passes: over the record.
        columns: that the objective asks a replay for.
        uses: how often each unit will be replayed.
        recomputes: whether a backward pass computes the network's blocks again.
    """
    window = rollout.window
    places = explore.places(frames, window, levels)
    size, drawn = rollout.group_size, 0
    for group in range(rollout.prompts):
        frame, level = place_of(places, seed, update, group)
        before, shared = window.begun(frame), explore.shared_levels(level)
        blocks = window.begun(drawn_until(frame, explore, window.block, frames, whole)) - before
        rest = blocks * (levels + 1) - 1
        drawn += before * (levels + 1) + shared + size * (rest - shared) + anchored * rest
    scored, graded = replay_calls(explore, score, levels)
    others = sum(name in columns for name in ("kl", "kl_average", "score_base", "score_average"))
    replays = scored * (1 + others) + (scored if isinstance(score, Energy) else 0) + graded * (2 + recomputes)
    units = rollout.prompts * size
    return Cost(drawn + (units * scored if uses > 1 else 0), units * replays * passes)


def recorded_blocks(explore: StreamExplore, levels: int) -> int:
    """Return how many blocks of latents a unit keeps from its rollout to the end of its update."""
    return explore.blocks * levels if isinstance(explore, Routing) else 3


def replay_calls(explore: StreamExplore, score: StreamScore, levels: int) -> tuple[int, int]:
    """Return the forwards of a unit's replay, and how many of them have a gradient."""
    if isinstance(score, Energy):
        assert isinstance(explore, Routing), "refused by the settings"
        return explore.blocks * (levels + 1) - 1, explore.blocks * min(score.trained_levels, levels)
    return 1, 1

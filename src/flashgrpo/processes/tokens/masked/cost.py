"""What an update of masked tokens costs, in network forwards of one sample; a backward pass counts two.

A rollout of B samples and T steps costs B T forwards, twice with guidance; the update's units are the steps that are
scored again, each one forward and its backward pass. Not counted are rows that only fill a batch up. Texts that end
early cost less: this is what they cost at most.
"""

from collections.abc import Sequence

from flashgrpo.process import Cost
from flashgrpo.processes.tokens.masked.settings import MaskedRollout, UnmaskedSteps


def update_cost(
    score: UnmaskedSteps, rollout: MaskedRollout, passes: int, columns: Sequence[str], uses: int, recomputes: bool
) -> Cost:
    """Return what any update costs.

    Args:
        passes: over a rollout.
        columns: what the objective asks of a replay: "kl" and "kl_average" take a forward by other weights.
        uses: how often `draw` was told that a unit is replayed; above 1 it scores each unit itself.
        recomputes: whether a backward pass computes the blocks again.

    Example: 4 samples of 16 steps, of which 4 are scored again, cost 64 + 48.
    """
    rows = rollout.prompts * rollout.group_size * (2 if rollout.guidance_scale > 1 else 1)
    units = rows * score.count(rollout.num_steps)
    each = 3 + recomputes + sum(name in columns for name in ("kl", "kl_average"))
    return Cost(rows * rollout.num_steps + (units if uses > 1 else 0), units * passes * each)

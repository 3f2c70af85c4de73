"""What an update of uniform tokens costs, in network forwards of one sample; a backward pass counts two.

    rollout = B T [+ units]        update = units passes (1 + 2 [+ 1] [+ 1] [+ 1])

with T steps of the sampler, and `times` units for each of B samples. The rollout scores the units where they are
replayed more than once. The additions to an update are of a network that recomputes its blocks in the backward pass, of
the base model and of the average, where a penalty needs them. Rows that only fill a batch up are not counted.
"""

from collections.abc import Sequence

from flashgrpo.process import Cost
from flashgrpo.processes.tokens.uniform.settings import TokensAtTimes, UniformRollout


def update_cost(
    score: TokensAtTimes, rollout: UniformRollout, passes: int, columns: Sequence[str], uses: int, recomputes: bool
) -> Cost:
    """Return what each update of a run costs; see the head of this file.

    Example: 4 samples of 10 steps with 3 trained times cost 40 + 36.
    """
    samples = rollout.prompts * rollout.group_size
    units = samples * score.times
    each = 3 + recomputes + sum(name in columns for name in ("kl", "kl_average"))
    return Cost(samples * rollout.num_steps + units * (uses > 1), units * passes * each)

"""Which denoising steps of a rollout are stochastic, and which of those are trained.

Three choices cover the published algorithms: all steps (Flow-GRPO, DanceGRPO), a sliding window (MixGRPO), or a single
step that the group of a prompt shares (Flash-GRPO). Each answers with masks of shape (B, N), a row per sample and a
column per step, and each is a pure function of (seed, update, group, member): never of a row's position, of the process
that computes it, or of a random state. So any share of an update's rows, in any order, on any number of ranks, agrees.
They are settings, too, so this file is free of torch.

The step onto the last sigma is never stochastic: its noise would stay in the video.

>>> OneStep(window=(0.0, 0.5)).mask(seed=0, update=1, group_ids=torch.tensor([0, 0, 1, 1]), num_steps=6).int()
tensor([[0, 0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0]], dtype=torch.int32)
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Int

from flashgrpo.errors import UserError
from flashgrpo.processes.subsets import draw_units
from flashgrpo.seeds import keyed_bits
from flashgrpo.settings import FORBID_EXTRA, MANY, check_number

GroupIds = Int[Any, " batch"]
StepMask = Bool[Any, "batch steps"]


@dataclass(frozen=True)
class AllSteps:
    """Every step but the last is stochastic; a `fraction` of them, drawn anew for every update, is trained.

    Flow-GRPO (arXiv 2505.05470) trains all of them, DanceGRPO (arXiv 2505.07818) a random 60 %. The number is rounded
    to the nearest, at least 1: 19 steps at 0.6 are 11. DanceGRPO's code draws the fraction for each sample; here the
    samples of an update share it, so that a group's advantages always weigh the same steps.

    However steps are drawn, the expected gradient is that of training all of them: what is drawn too often weighs less
    (`processes/subsets.py`).

    Args:
        fraction: of the steps but the last, those that are trained in an update.
        draw: "shuffled" deals them without replacement; "stratified" draws one in each of so many equal parts of the
            rollout, which spreads them over it; "independent" draws each by itself. The last two may draw a step twice,
            which is then trained once and weighs double.
        chance: all steps are as likely ("even"), or step k of N as likely as N - 1 - k ("early").
    """

    fraction: float = 1.0
    draw: Literal["shuffled", "stratified", "independent"] = "shuffled"
    chance: Literal["even", "early"] = "even"
    kind: Literal["all"] = "all"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        check_number("fraction of AllSteps", self.fraction, highest=1)
        if self.draw == "shuffled" and self.chance != "even":
            raise ValueError(
                "chance of AllSteps: steps that are dealt without replacement are all as likely; take draw=stratified"
            )

    def candidates(self, num_steps: int) -> list[int]:
        return _all_but_last(num_steps)

    def mask(
        self, seed: int, update: int, group_ids: GroupIds, num_steps: int, members: GroupIds | None = None
    ) -> StepMask:
        return _same_for_all(group_ids, num_steps, self.candidates(num_steps))

    def trained(
        self, seed: int, update: int, group_ids: GroupIds, num_steps: int, members: GroupIds | None = None
    ) -> StepMask:
        return _same_for_all(group_ids, num_steps, list(self.factors(seed, update, num_steps)))

    def factors(self, seed: int, update: int, num_steps: int) -> Mapping[int, float]:
        """Return the trained steps of an update, and by how much each counts more for being drawn so."""
        candidates = self.candidates(num_steps)
        count = max(1, round(self.fraction * len(candidates)))
        if self.draw == "shuffled":
            return dict.fromkeys(_shuffled(candidates, "fraction", seed, update)[:count], 1.0)
        chances = [float(num_steps - 1 - k) if self.chance == "early" else 1.0 for k in candidates]
        found: defaultdict[int, float] = defaultdict(float)
        for unit, weight in draw_units(chances, count, self.draw, "fraction", seed, update):
            found[candidates[unit]] += weight / count
        return {k: len(found) * weight for k, weight in found.items()}  # an update's loss is the mean over its units


@dataclass(frozen=True)
class Window:
    """MixGRPO's sliding window (arXiv 2507.21802): `size` consecutive steps, the same for all samples of an update.

    The window begins at step `start` and moves by `stride` after every `every` updates. When it has reached `stop` (not
    included; None is the last step, which is never stochastic) it returns to `start` and goes round again; the last
    position before that is pulled back where needed, so that the window always has its full size. With 10 steps, size 4
    and stride 2 the windows are 0-3, 2-5, 4-7, 5-8, 0-3, ...

    Args:
        size: steps in the window.
        start: the first step of its first place.
        stop: the step that it never reaches; the last one when not given.
        stride: steps that it moves by.
        every: updates between two moves.
    """

    size: int = 4
    start: int = 0
    stop: int | None = None
    stride: int = 1
    every: int = 25
    kind: Literal["window"] = "window"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        for name in ("size", "stride", "every"):
            check_number(f"{name} of Window", getattr(self, name), 1, MANY)
        check_number("start of Window", self.start, 0, MANY)
        if self.stop is not None and self.stop < self.start + self.size:
            raise ValueError(
                f"a Window of {self.size} steps does not fit between start {self.start} and stop {self.stop}"
            )

    def candidates(self, num_steps: int) -> list[int]:
        if self.stop is not None and self.stop > num_steps:
            raise UserError(f"stop of Window is {self.stop}, but there are only {num_steps} steps")
        steps = _all_but_last(num_steps)[self.start : self.stop]
        if len(steps) < self.size:
            raise UserError(
                f"a Window of {self.size} steps that starts at step {self.start} does not fit into {num_steps} steps, "
                "the last of which is never stochastic"
            )
        return steps

    def mask(
        self, seed: int, update: int, group_ids: GroupIds, num_steps: int, members: GroupIds | None = None
    ) -> StepMask:
        steps = self.candidates(num_steps)
        furthest = len(steps) - self.size
        positions = math.ceil(furthest / self.stride) + 1
        first = min(update // self.every % positions * self.stride, furthest)
        return _same_for_all(group_ids, num_steps, steps[first : first + self.size])

    def trained(
        self, seed: int, update: int, group_ids: GroupIds, num_steps: int, members: GroupIds | None = None
    ) -> StepMask:
        return self.mask(seed, update, group_ids, num_steps, members)

    def factors(self, seed: int, update: int, num_steps: int) -> Mapping[int, float]:
        """Return nothing: no step counts more than another for being drawn."""
        return {}


@dataclass(frozen=True)
class OneStep:
    """One stochastic step per sample, drawn within a window of the rollout: Flash-GRPO (arXiv 2605.15980).

    Args:
        per: "group" draws once for all samples of a prompt group, which compares like with like (iso-temporal
            grouping); "sample" draws for each member on its own, the ablation.
        window: part of the rollout, in fractions of its steps: (0, 0.5) is the first half, the published setting, and
            (0, 1) the paper's U[0, T]. Step k of N belongs to it if low <= k / N < high; the last step never does.
        draw: "iid" draws each group on its own (the published code); "stratified" deals the steps without replacement,
            so that every W groups of an update use each of the window's W steps once (the paper's introduction). With
            per="sample" it is the members of a group that are dealt different steps.
        count: consecutive stochastic steps, 1 or 2 (Flow-GRPO-Fast-2); the draw is of the first.
    """

    per: Literal["group", "sample"] = "group"
    window: tuple[float, float] = (0.0, 0.5)
    draw: Literal["iid", "stratified"] = "iid"
    count: Literal[1, 2] = 1
    kind: Literal["one"] = "one"
    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    def __post_init__(self) -> None:
        if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(
                f"window of OneStep is a pair of fractions with 0 <= low < high <= 1, got {tuple(self.window)}"
            )
        if self.per not in ("group", "sample"):
            raise ValueError(f"per of OneStep is 'group' or 'sample', got {self.per!r}")
        if self.draw not in ("iid", "stratified"):
            raise ValueError(f"draw of OneStep is 'iid' or 'stratified', got {self.draw!r}")
        if self.count not in (1, 2):
            raise ValueError(f"count of OneStep is 1 or 2, got {self.count!r}")

    def candidates(self, num_steps: int) -> list[int]:
        low, high = (math.ceil(round(edge * num_steps, 6)) for edge in self.window)  # 0.1 * 30 = 3.0000000000000004
        steps = _all_but_last(num_steps)[low:high]
        if len(steps) < self.count:
            raise UserError(
                f"the window {tuple(self.window)} of OneStep holds {len(steps)} of {num_steps} steps (never the last), "
                f"but {self.count} are to be drawn: widen the window or take more steps"
            )
        return steps

    def mask(
        self, seed: int, update: int, group_ids: GroupIds, num_steps: int, members: GroupIds | None = None
    ) -> StepMask:
        """`members` numbers the samples of each group and matters to per="sample" only.

        Without it the n-th row of a group is taken for its n-th member, which is right where the rows hold whole groups
        in order; a rank that holds a part of a group has to say which part.
        """
        starts = self.candidates(num_steps)
        starts = starts[: len(starts) - self.count + 1]
        groups = group_ids.tolist()
        if self.per == "group":
            drawn = [self._draw(starts, group, seed, update) for group in groups]
        else:
            numbers = _running_members(groups) if members is None else members.tolist()
            drawn = [
                self._draw(starts, member, seed, update, group) for group, member in zip(groups, numbers, strict=True)
            ]
        return _mask(group_ids, num_steps, [range(first, first + self.count) for first in drawn])

    def trained(
        self, seed: int, update: int, group_ids: GroupIds, num_steps: int, members: GroupIds | None = None
    ) -> StepMask:
        return self.mask(seed, update, group_ids, num_steps, members)

    def factors(self, seed: int, update: int, num_steps: int) -> Mapping[int, float]:
        """Return nothing: no step counts more than another for being drawn."""
        return {}

    def _draw(self, starts: list[int], number: int, *key: int) -> int:
        """The draw of the `number`-th drawer (a group of an update, or a member of a group) that `key` names."""
        if self.draw == "iid":
            return starts[keyed_bits("iid", *key, number) % len(starts)]
        deal, position = divmod(number, len(starts))
        return _shuffled(starts, "stratified", *key, deal)[position]


def _all_but_last(num_steps: int) -> list[int]:
    if num_steps < 2:
        raise UserError(f"a rollout of {num_steps} steps has none to train, because the last never is: take 2 or more")
    return list(range(num_steps - 1))


def _shuffled(steps: list[int], purpose: str, *key: int) -> list[int]:
    """A uniformly random order of `steps`: sorted by a hash of each."""
    return sorted(steps, key=lambda step: keyed_bits(purpose, *key, step))


def _running_members(groups: list[int]) -> list[int]:
    """How often each entry has occurred before: 7 7 3 7 -> 0 1 0 2."""
    seen: defaultdict[int, int] = defaultdict(int)
    members = []
    for group in groups:
        members.append(seen[group])
        seen[group] += 1
    return members


def _mask(group_ids: GroupIds, num_steps: int, steps_of_row: Sequence[Sequence[int]]) -> StepMask:
    mask = group_ids.new_zeros(len(group_ids), num_steps).bool()
    for row, steps in enumerate(steps_of_row):
        mask[row, list(steps)] = True
    return mask


def _same_for_all(group_ids: GroupIds, num_steps: int, steps: list[int]) -> StepMask:
    return _mask(group_ids, num_steps, [steps] * len(group_ids))

"""Group-relative advantages: how much better a sample is than the others of its prompt.

    A_i = (R_i - mean of its group) / (std + 1e-4),  clipped to +-clip

The std is over the group (GRPO, arXiv 2402.03300) or over all samples of the update ("global" in the code of Flow-GRPO
and Flash-GRPO, and what Flash-GRPO's runs used). It is the population's: divided by the number of samples, not by one
less, as numpy computes it in that code. Rows are groups, not prompts: a text drawn twice is two rows. None is dropped.
With an anchor, a sample of each group that was drawn without exploration, its reward takes the place of the mean (arXiv
2605.14278), and the std may be that of group and anchor, divided by one less. Or there is none (Dr. GRPO).

>>> group_advantages(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))               # std over the group: 1 and 0
tensor([[-0.9999,  0.9999],
        [ 0.0000,  0.0000]])
>>> group_advantages(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), std="batch")  # of 1 3 5 5: sqrt(11/4) = 1.6583
tensor([[-0.6030,  0.6030],
        [ 0.0000,  0.0000]])
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from flashgrpo.errors import UserError
from flashgrpo.learning.settings import Credit, Std, check_choice
from flashgrpo.settings import check_number
from flashgrpo.types import RewardTable, representable

EPSILON = 1e-4  # added to the std, as in the published code
ROUNDING = 1e-6  # of the largest reward of a group: below it a spread is float32 rounding, not a preference


def group_advantages(
    rewards: Float[Tensor, "groups members"],
    std: Std = "group",
    clip: float = 5.0,
    anchor: Float[Tensor, " groups"] | None = None,
) -> Float32[Tensor, "groups members"]:
    """Advantages (P, G) of the rewards (P, G) of P groups of G >= 2 samples; a group without spread gets exact zeros.

    Rewards have to be finite, and to be those of the whole update where std is "batch".

    Args:
        anchor: the reward of each group's anchor, which takes the place of the mean.
    """
    _check_clip(clip)
    return _normalized(rewards, std, anchor=anchor).clamp(-clip, clip).float()


def combine_advantages(
    rewards: Float[Tensor, "groups members components"],
    weights: Float[Tensor, " components"],
    std: Std = "group",
    clip: float = 5.0,
    combine: Literal["normalized", "raw"] = "normalized",
    anchor: Float[Tensor, "groups components"] | None = None,
) -> Float32[Tensor, "groups members"]:
    """Return advantages (P, G) of several rewards (P, G, R), weighted by (R,); clipped once, at the end.

    "normalized": `sum_r weight_r (R_r - mean) / (std_r + 1e-4)`. "raw": `group_advantages(sum_r weight_r R_r)`.
    `anchor` holds the rewards of each group's anchor, which take the place of the means.
    """
    _check_clip(clip)
    check_choice("combine", combine, ("normalized", "raw"))
    if rewards.ndim != 3 or weights.shape != rewards.shape[-1:]:
        raise ValueError(f"rewards are (P, G, R) with R weights, not {tuple(rewards.shape)} and {tuple(weights.shape)}")
    if not bool(torch.isfinite(weights).all()):
        raise UserError(f"reward weights have to be finite, got {weights.tolist()}")
    credit = Credit("mean" if anchor is None else "anchor", std, combine, clip)
    anchors = None if anchor is None else anchor.double()
    return _combined(rewards.double(), weights.double().to(rewards.device), credit, None, anchors)


def advantages_by_key(
    rewards: RewardTable,
    channels: Sequence[str],
    credit: Credit,
    key: Int64[Tensor, " pairs"],
    channel: Int64[Tensor, " pairs"],
    sample: Int64[Tensor, " pairs"],
    anchor: Int64[Tensor, " pairs"] | None = None,
) -> tuple[Float32[Tensor, " pairs"], Bool[Tensor, " pairs"]]:
    """Return the advantage of each sample under each key that it has a term of, and whether it was dropped.

    A pair says that a sample is compared with the others of a key, by the components of a channel. Each sample counts
    once for a key, however many terms it has there. A key with one sample and no anchor has nothing to compare, and
    gives 0. Where all keys have equally many samples the numbers are those of `combine_advantages`, bit for bit.

    A group with a reward that is no number that float32 holds is dropped: its advantages are 0, and those of the others
    are what they would be without it.

    Example: rewards 1, 3, 5 with keys 0, 0, 1 give -0.9999, 0.9999 and 0 with the std over the group.

    Args:
        rewards: of all samples of the update, on all ranks.
        channels: the process's, which `channel` numbers.
        sample: the number of each pair's sample in the table.
        anchor: that of the sample which it is held against; one for all pairs of a key. None: against their mean.
    """
    assert credit.anchored == (anchor is not None)
    result, dropped = torch.zeros(len(key)), torch.zeros(len(key), dtype=torch.bool)
    for number in channel.unique().tolist():
        columns = [r for r in rewards.trained if rewards.channels[r] == channels[number]]
        own = (channel == number).nonzero().flatten()
        seen = [sample[own]] if anchor is None else [sample[own], anchor[own]]
        bad = (~representable(torch.stack([rewards.values[rows][:, columns] for rows in seen]))).any(dim=2).any(dim=0)
        dropped[own] = torch.isin(key[own], key[own[bad]])
        own = own[~dropped[own]]
        order = own[(key[own] * (int(sample.max()) + 1) + sample[own]).argsort(stable=True)]
        _, sizes = key[order].unique_consecutive(return_counts=True)
        values, weights = rewards.values[sample[order]][:, columns], rewards.weights[columns]
        whole = values if len(sizes.unique()) > 1 and credit.std == "batch" else None  # equal groups are the whole
        for size in sizes.unique().tolist() if columns else ():
            rows = (sizes.repeat_interleave(sizes) == size).nonzero().flatten()
            block = values[rows].unflatten(0, (-1, size))
            anchors = None if anchor is None else rewards.values[anchor[order[rows]][::size]][:, columns]
            if size > 1 or anchor is not None:
                result[order[rows]] = _combined(block, weights, credit, whole, anchors).flatten()
    if credit.rescale == "none" or not result.any():
        return result, dropped
    return result / (credit.clip if credit.rescale == "clip" else float(result.abs().max())), dropped


def _combined(
    rewards: Float64[Tensor, "groups members components"],
    weights: Float64[Tensor, " components"],
    credit: Credit,
    whole: Float64[Tensor, "samples components"] | None,
    anchor: Float64[Tensor, "groups components"] | None,
) -> Float32[Tensor, "groups members"]:
    if credit.combine == "raw":
        total, held = (None if one is None else (one * weights).sum(-1) for one in (whole, anchor))
        advantage = _normalized((rewards * weights).sum(-1), credit.std, total, held)
    else:
        every, anchors = ([None] * len(weights) if one is None else one.unbind(-1) for one in (whole, anchor))
        each = zip(rewards.unbind(-1), every, anchors, strict=True)
        parts = [_normalized(component, credit.std, total, held) for component, total, held in each]
        advantage = (torch.stack(parts, dim=-1) * weights).sum(-1)
    clipped = _clipped(advantage, credit)
    if anchor is None or credit.unsafe_weight == 1:
        return clipped
    safe = ((rewards - anchor[:, None]) * weights > 0).flatten(1).any(dim=1)
    return torch.where(safe[:, None], clipped, credit.unsafe_weight * clipped)


def _clipped(advantage: Float64[Tensor, "groups members"], credit: Credit) -> Float32[Tensor, "groups members"]:
    """Bring advantages within +-clip: by a cut, or by `clip tanh(A / clip)`, which keeps their order."""
    if credit.bend == "soft":
        return (credit.clip * (advantage / credit.clip).tanh()).float()
    return advantage.clamp(-credit.clip, credit.clip).float()


def _normalized(
    rewards: Float[Tensor, "groups members"],
    std: str,
    whole: Float64[Tensor, " samples"] | None = None,
    anchor: Float[Tensor, " groups"] | None = None,
) -> Float64[Tensor, "groups members"]:
    """(R - mean of its group, or anchor) / (std + 1e-4); the std of the batch is that of `whole` where that is given.

    It is 0 where the group has no spread: with its anchor, unless it is divided by the std of its members alone.
    """
    check_choice("std", std, get_args(Std))
    if rewards.ndim != 2 or 0 in rewards.shape:
        raise ValueError(f"rewards are (P, G), a row per group and a column per member, not {tuple(rewards.shape)}")
    if rewards.shape[1] == 1 and anchor is None:
        raise UserError("a group of one sample has nothing to be compared with: take a group size of at least 2")
    if not bool(torch.isfinite(rewards).all()):
        group, member = (~torch.isfinite(rewards)).nonzero()[0].tolist()
        raise UserError(f"the reward of sample {member} of group {group} is {float(rewards[group, member])}")
    rewards = rewards.double()
    baseline = rewards.mean(dim=1, keepdim=True) if anchor is None else anchor.double()[:, None]
    compared = rewards if anchor is None else torch.cat([rewards, baseline], dim=1)
    difference = rewards - baseline
    if std == "group":
        compared, difference = rewards, difference / (rewards.std(dim=1, keepdim=True, correction=0) + EPSILON)
    elif std == "group-and-anchor":
        difference = difference / (compared.std(dim=1, keepdim=True, correction=1) + EPSILON)
    elif std == "batch":
        difference = difference / ((rewards if whole is None else whole).std(correction=0) + EPSILON)
    return torch.where(has_spread(compared)[:, None], difference, 0.0)


def has_spread(rewards: Float[Tensor, "groups members"]) -> Bool[Tensor, " groups"]:
    """Return whether the rewards of a group differ by more than float32 rounding; not those of which one is NaN."""
    return rewards.amax(dim=1) - rewards.amin(dim=1) > ROUNDING * rewards.abs().amax(dim=1)


def _check_clip(clip: float) -> None:
    check_number("clip of advantages", clip)

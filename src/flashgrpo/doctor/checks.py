"""The checks: each looks at a trial and says in one sentence what it found. `train` does those in QUICK and TOLD."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashgrpo.assembly import Assembly
from flashgrpo.doctor.trial import Trial
from flashgrpo.errors import printable
from flashgrpo.learning.advantage import has_spread
from flashgrpo.models.lora import left_out
from flashgrpo.models.settings import Lora
from flashgrpo.process import Finding
from flashgrpo.types import representable

ROUNDING = 1e-4  # of a reward's size: what two calls on the same video may differ by
EPS_MARGIN = 10  # the median gradient has to be this multiple of optim.eps
CLIP_MARGIN = 10  # clip_range has to be this multiple of the numeric drift, or rounding decides what is clipped
USUAL_CLIP = 1e-3  # what the drift is held against where the objective clips no ratio


def first_ratio(parts: Assembly, trial: Trial) -> Finding:
    """The ratio before the first update is exactly 1: replay sees what rollout saw.

    Kernels of a GPU may add up in another order at each call, which is no mistake as long as it is far below the clip.
    """
    drift, clip = trial.metrics["drift"], parts.objective.smallest_clip or USUAL_CLIP
    if drift and parts.world.device.type != "cpu" and CLIP_MARGIN * drift < clip:
        sentence = f"the first ratio is off by {drift:.1e}: some kernel of this GPU gives other bits at each call"
        return Finding("first ratio", "warning", sentence, {"drift": drift})
    if drift:
        sentence = f"the first ratio is off by {drift:.1e}: replay differs from rollout; it has to be exactly 1"
        return Finding("first ratio", "unsound", sentence, {"drift": drift})
    return Finding("first ratio", "sound", "the ratio before the first update is exactly 1", {"drift": drift})


def clip_range(parts: Assembly, trial: Trial) -> Finding:
    """The clip range lies safely above the drift."""
    smallest, drift = parts.objective.smallest_clip, trial.metrics["drift"]
    if smallest is None:
        return Finding("clip range", "sound", "this objective clips no ratio", {"clip_range": None, "drift": drift})
    numbers = {"clip_range": smallest, "drift": drift}
    resolution, optim = torch.finfo(torch.float32).eps, parts.config.optim
    if smallest < resolution and optim.passes * optim.minibatches > 1:
        sentence = (
            f"algorithm.clip_range {smallest:g} is below the resolution of float32, {resolution:.1e}: every ratio that "
            "has moved is clipped; take at least ten times that, or one optimizer step a rollout"
        )
        return Finding("clip range", "unsound", sentence, numbers)
    if smallest <= CLIP_MARGIN * drift:
        sound = CLIP_MARGIN * drift
        sentence = f"algorithm.clip_range {smallest:g} drowns in the drift {drift:.1e}; take at least {sound:.1e}"
        return Finding("clip range", "unsound", sentence, numbers)
    sentence = f"algorithm.clip_range {smallest:g} is safely above the drift {drift:.1g}"
    return Finding("clip range", "sound", sentence, numbers)


def trained_layers(parts: Assembly, trial: Trial) -> Finding:
    """Every targeted layer has its adapter, every trained parameter receives gradient."""
    network, train = parts.process.network, parts.config.model.train
    slots = parts.world.gather(trial.drawn.record.slot.unique().tolist())
    stages = {parts.process.stage(slot) for own in slots for slot in own}
    called = {id(parameter) for stage in stages for parameter in stage.parameters()}
    silent = [
        name
        for name, norm in trial.received.items()
        if not norm and "lora_A" not in name and id(parts.optimizer.parameters[name]) in called  # A waits for B
    ]
    attached = total = len(trial.received)
    what = "parameters"
    if isinstance(train, Lora):
        unused = left_out(network)
        modules = ((name, module) for name, module in network.named_modules() if name not in unused)
        layers = {name: module for name, module in modules if is_targeted(name, module, train)}
        total, what = len(layers), "targeted layers"
        attached = sum(any("lora_A" in child for child, _ in module.named_modules()) for module in layers.values())
    numbers = {"attached": attached, "targeted": total, "without_gradient": silent}
    if attached < total:
        sentence = f"adapters sit on {attached} of {total} targeted layers, so the rest would not learn"
        return Finding("trained layers", "unsound", sentence, numbers)
    if silent and trial.compared.advantage.any():
        sentence = f"{len(silent)} trained parameters receive no gradient, {silent[0]} among them"
        return Finding("trained layers", "unsound", sentence, numbers)
    return Finding("trained layers", "sound", f"{attached} of {total} {what} are trained and receive gradient", numbers)


def adam_eps(parts: Assembly, trial: Trial) -> Finding:
    """The median gradient is far above `optim.eps`, so that Adam's first step is `optim.lr` in almost every weight.

    It is `lr g / (|g| + eps)`. A loss of one size has a smaller gradient in each of more weights: a norm of 1e-4 over
    12 million of them is 3e-8 in each, and with an eps of 1e-8 the step is three quarters of `lr`.
    """
    size, eps = trial.gradient_size, parts.config.optim.eps
    numbers = {"median_gradient": size, "over_eps": size / eps}
    if not size:
        return Finding("optimizer eps", "warning", "no gradient was there to hold against optim.eps", numbers)
    sentence = f"the median gradient, {size:.1e}, is {size / eps:.2g} times optim.eps {eps:.1e}"
    if size < EPS_MARGIN * eps:
        share = size / (size + eps)
        sentence += (
            f": in half of the weights Adam steps by {share:.0%} of optim.lr or less, and by another share for each "
            f"size of model; an optim.eps of {size / 100:.0e} would be far below"
        )
        return Finding("optimizer eps", "warning", sentence, numbers)
    return Finding("optimizer eps", "sound", sentence, numbers)


def is_targeted(name: str, module: nn.Module, train: Lora) -> bool:
    """Whether a layer is one that `model.train.targets` names; with an adapter its linear layer lies one level down."""
    base = getattr(module, "base_layer", module)
    return isinstance(base, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in train.targets)


def rewards_repeat(parts: Assembly, trial: Trial) -> Finding:
    """The same video gets the same reward twice, but for rounding: a server may batch videos as it likes."""
    values = trial.drawn.rewards.values
    apart, rounding = (values - trial.again).abs().amax(dim=0), ROUNDING * values.abs().amax(dim=0)
    changed = {
        name: float(gap)
        for name, gap, allowed in zip(trial.drawn.rewards.names, apart, rounding, strict=True)
        if gap > allowed
    }
    if changed:
        name = max(changed, key=lambda key: changed[key])
        sentence = f"reward {name} gave the same video two values, {changed[name]:.3g} apart"
        return Finding("rewards repeat", "unsound", sentence, {"apart": changed})
    bad = (~representable(values)).sum(dim=0).tolist()
    if any(bad):
        name, count = max(zip(trial.drawn.rewards.names, bad, strict=True), key=lambda pair: pair[1])
        sentence = f"reward {name} is not finite for {count} of {len(values)} samples; their groups would be dropped"
        return Finding("rewards repeat", "unsound" if count == len(values) else "warning", sentence)
    return Finding("rewards repeat", "sound", "all rewards are finite and give the same video the same value twice")


def constant_rewards(parts: Assembly, trial: Trial) -> list[str]:
    """Return the trained rewards whose components are finite and, but for rounding, constant inside every group."""
    table, sizes = trial.drawn.members, (trial.groups, trial.group_size)
    columns = {table.names[column]: table.values[:, column].unflatten(0, sizes) for column in table.trained}
    flat = {name: bool(v.isfinite().all()) and not bool(has_spread(v).any()) for name, v in columns.items()}
    own = {name: [flat[part] for part in flat if f"{part}.".startswith(f"{name}.")] for name in parts.rewards.configs}
    return [name for name, constant in own.items() if constant and all(constant)]


def reward_spread(parts: Assembly, trial: Trial) -> Finding:
    """Rewards differ inside groups, so that there is something to learn from.

    One group may be without spread by chance, so that a single one is a warning only: `train` looks at more then.
    """
    groups = trial.drawn.members.total.unflatten(0, (trial.groups, trial.group_size))
    groups = groups[groups.isfinite().all(dim=1)]  # the others are told by `rewards_repeat`
    if not len(groups):
        return Finding("reward spread", "warning", "no group has rewards that are all finite", {"groups": trial.groups})
    inside, flat = groups.std(dim=1, correction=0), int((~has_spread(groups)).sum())
    constant, every = constant_rewards(parts, trial), len(parts.rewards.names(watched=False))
    spread = float(inside.mean())
    numbers = {"std_inside_groups": spread, "flat_groups": flat, "groups": trial.groups, "constant": constant}
    seen = f"the same for all {trial.group_size} samples " + (
        f"in each of {trial.groups} groups" if trial.groups > 1 else "of the one group that was looked at"
    )
    if len(constant) == every or flat == len(groups):
        which = f"reward {', '.join(constant)} was" if constant else "the weighted sum of the rewards was"
        sentence = f"{which} {seen}; nothing can be learnt"
        return Finding("reward spread", "unsound" if trial.groups > 1 else "warning", sentence, numbers)
    if constant:
        sentence = f"reward {', '.join(constant)} was {seen}, so only the other rewards teach anything"
        return Finding("reward spread", "warning", sentence, numbers)
    sentence = f"rewards spread by {spread:.3g} inside groups ({flat} of {trial.groups} groups are flat)"
    return Finding("reward spread", "sound", sentence, numbers)


def advantage_signs(parts: Assembly, trial: Trial) -> Finding:
    """Some samples are to become likelier and some less likely."""
    advantages = trial.compared.advantage
    share = float((advantages > 0).double().mean())
    if not advantages.any():
        sentence = "all advantages are 0: no group has rewards that differ"
        return Finding("advantages", "warning", sentence, {"positive_share": share})
    if not 0 < share < 1 and parts.config.algorithm.credit.anchored:
        which = "better" if share else "worse"
        sentence = f"all samples are {which} than their anchors, in {trial.groups} group{'s'[: trial.groups - 1]}"
        return Finding("advantages", "warning", sentence, {"positive_share": share})
    if not 0 < share < 1:
        return Finding("advantages", "unsound", "all advantages have the same sign", {"positive_share": share})
    return Finding("advantages", "sound", f"{share:.0%} of the advantages are positive", {"positive_share": share})


def planted_pairs(parts: Assembly, trial: Trial) -> Finding:
    """Rewards that declare a better and a worse sample rank them so."""
    if not parts.world.scores:  # whose rewards are not loaded, and have no business here
        return Finding("planted pair", "sound", "this process computes no rewards", {"right": []})
    wrong, right = list[str](), list[str]()
    for name, pair in parts.rewards.planted_pairs().items():
        both: Any = [pair.worse, pair.better]
        media = torch.stack(both) if isinstance(pair.worse, Tensor) else both
        table = parts.rewards.score(media, [pair.prompt, pair.prompt], watched=True, only=name)
        mean = table.values.mean(dim=1)
        (right if mean[1] > mean[0] else wrong).append(name)
    if wrong:
        sentence = f"reward {wrong[0]} prefers the worse of two samples that it declares itself; is its sign right?"
        return Finding("planted pair", "unsound", sentence, {"wrong": wrong})
    if not right:
        sentence = "no reward declares a better and a worse sample to rank, so there was nothing to check"
        return Finding("planted pair", "sound", sentence, {"right": right})
    return Finding("planted pair", "sound", f"ranked as declared: {', '.join(right)}", {"right": right})


def replicas(parts: Assembly, trial: Trial) -> Finding:
    """All copies of the network are the same after a step along the gradient."""
    if trial.replicas:
        return Finding("replicas", "unsound", trial.replicas)
    copies = parts.world.size // (parts.world.shard * parts.world.context)
    return Finding("replicas", "sound", f"{copies} copies of the network have the same checksum after a step")


def prompts(parts: Assembly, trial: Trial) -> Finding:
    """Prompts are distinct, short enough for the text encoder, and not those of the evaluation."""
    texts, heldout = [p.text for p in parts.prompts], [p.text for p in parts.heldout]
    twice = sum(count - 1 for count in Counter(texts).values())
    limit = parts.config.model.max_sequence_length
    lengths = dict(zip([*texts, *heldout], parts.process.token_counts([*texts, *heldout]), strict=True))
    cut = [text for text in (*texts, *heldout) if lengths[text] > limit]
    counts = {"train": len(texts), "heldout": len(heldout), "duplicates": twice, "in_both": parts.trained_on}
    numbers = {**counts, "cut": len(cut)}
    wrong = []
    if parts.trained_on:
        wrong.append(
            f"{parts.trained_on} held-out prompts are trained on as well, so evaluation would not be held out and is "
            "not called so; prompts.heldout names others"
        )
    if cut:
        longest = max(cut, key=lambda text: lengths[text])
        wrong.append(
            f"{len(cut)} prompts are longer than {limit} tokens (model.max_sequence_length) and lose their end, "
            f"{printable(longest, 60)!r} with {lengths[longest]} tokens among them"
        )
    told = [*wrong, f"{twice} prompts of prompts.train occur more than once"] if twice else wrong
    if told:
        return Finding("prompts", "unsound" if wrong else "warning", "; ".join(told), numbers)
    sentence = f"{len(texts)} prompts and {len(heldout)} held out, none twice, none longer than {limit} tokens"
    return Finding("prompts", "sound", sentence, numbers)


def text_embeddings(parts: Assembly, trial: Trial) -> Finding:
    """Every prompt that the run will use has an embedding, and it is finite."""
    texts = {prompt.text: prompt for prompt in parts.used}
    encode = parts.process.encode
    rows = {text: encode([prompt]).tensors.values() for text, prompt in texts.items()}
    bad = [text for text, row in rows.items() if not all(tensor.isfinite().all() for tensor in row)]
    if bad:
        sentence = f"the text encoder gives numbers that are not finite for {len(bad)} prompts, {bad[0]!r} among them"
        return Finding("text embeddings", "unsound", sentence)
    return Finding("text embeddings", "sound", f"all {len(texts)} prompts have an embedding")


Check = Callable[[Assembly, Trial], Finding]
QUICK: tuple[Check, ...] = (
    first_ratio,
    clip_range,
    trained_layers,
    rewards_repeat,
    advantage_signs,
)
TOLD: tuple[Check, ...] = (reward_spread, prompts)  # `train` says what they find, and refuses no run over it
THOROUGH: tuple[Check, ...] = (adam_eps, planted_pairs, replicas, text_embeddings)

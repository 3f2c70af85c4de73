"""The checks: each looks at a trial and says in one sentence what it found. `train` does those in QUICK."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from flashgrpo.assembly import Assembly
from flashgrpo.doctor.trial import Trial
from flashgrpo.models.settings import Lora

ROUNDING = 1e-4  # of a reward's size: what two calls on the same video may differ by
CLIP_MARGIN = 10  # clip_range has to be so many times the numeric drift, or rounding decides what is clipped


@dataclass(frozen=True)
class Finding:
    """What a check found, in one sentence, with the numbers behind it."""

    check: str
    level: Literal["sound", "warning", "unsound"]
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)


def first_ratio(parts: Assembly, trial: Trial) -> Finding:
    """The ratio before the first update is exactly 1: replay sees what rollout saw."""
    drift = trial.metrics["drift"]
    if drift:
        sentence = f"the first ratio is off by {drift:.1e}: replay differs from rollout; it has to be exactly 1"
        return Finding("first ratio", "unsound", sentence, {"drift": drift})
    return Finding("first ratio", "sound", "the ratio before the first update is exactly 1", {"drift": drift})


def clip_range(parts: Assembly, trial: Trial) -> Finding:
    """The clip range lies safely above the drift, and above the noise of the number format where it was measured."""
    clip = parts.config.algorithm.clip_range
    smallest = min(clip) if isinstance(clip, tuple) else clip
    drift = trial.metrics["drift"]
    numbers = {"clip_range": smallest, "drift": drift, "noise_floor": trial.noise_floor}
    if smallest <= CLIP_MARGIN * drift:
        sound = CLIP_MARGIN * drift
        sentence = f"algorithm.clip_range {smallest:g} drowns in the drift {drift:.1e}; take at least {sound:.1e}"
        return Finding("clip range", "unsound", sentence, numbers)
    besides = ""
    if trial.noise_floor is not None:
        dtype = parts.config.model.compute_dtype or parts.config.model.dtype
        besides = f"; if replays were cut in other batches it would be {trial.noise_floor:.1g} in {dtype}"
    return Finding(
        "clip range",
        "sound",
        f"algorithm.clip_range {smallest:g} is safely above the drift {drift:.1g}{besides}",
        numbers,
    )


def trained_layers(parts: Assembly, trial: Trial) -> Finding:
    """Every targeted layer has its adapter, every trained parameter receives gradient."""
    network, train = parts.policy.model.network, parts.config.model.train
    model, grid = parts.policy.model, parts.policy.grid
    steps = parts.world.gather(trial.drawn.transitions.k.unique().tolist())
    experts = {model.expert(float(grid.timesteps[step])) for own in steps for step in own}
    called = {id(parameter) for expert in experts for parameter in expert.parameters()}
    silent = [
        name
        for name, norm in trial.received.items()
        if not norm and "lora_A" not in name and id(parts.optimizer.parameters[name]) in called  # A waits for B
    ]
    attached = total = len(trial.received)
    what = "parameters"
    if isinstance(train, Lora):
        layers = {name: module for name, module in network.named_modules() if is_targeted(name, module, train)}
        total, what = len(layers), "targeted layers"
        attached = sum(any("lora_A" in child for child, _ in module.named_modules()) for module in layers.values())
    numbers = {"attached": attached, "targeted": total, "without_gradient": silent}
    if attached < total:
        sentence = f"adapters sit on {attached} of {total} targeted layers, so the rest would not learn"
        return Finding("trained layers", "unsound", sentence, numbers)
    if silent and trial.drawn.advantages.any():
        sentence = f"{len(silent)} trained parameters receive no gradient, {silent[0]} among them"
        return Finding("trained layers", "unsound", sentence, numbers)
    return Finding("trained layers", "sound", f"{attached} of {total} {what} are trained and receive gradient", numbers)


def is_targeted(name: str, module: nn.Module, train: Lora) -> bool:
    """Whether a layer is one that `model.train.targets` names; with an adapter its linear layer lies one level down."""
    base = getattr(module, "base_layer", module)
    return isinstance(base, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in train.targets)


def residual_noise(parts: Assembly, trial: Trial) -> Finding:
    """No noise stays in the videos: the last step is deterministic, and recorded steps lead to the final latents."""
    last = parts.policy.grid.num_steps - 1
    if last in trial.drawn.transitions.k.tolist():
        sentence = "the last step is stochastic, so its noise stays in the videos that are scored"
        return Finding("residual noise", "unsound", sentence)
    if trial.finish is None:
        return Finding("residual noise", "sound", "the last step is deterministic", {"distance": None})
    if not trial.finish < 1e-2:
        sentence = f"the videos are not what their recorded step leads to: latents differ by {trial.finish:.1%}"
        return Finding("residual noise", "unsound", sentence, {"distance": trial.finish})
    sentence = f"from the recorded step on, latents are those of a deterministic finish ({trial.finish:.1g} apart)"
    return Finding("residual noise", "sound", sentence, {"distance": trial.finish})


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
    return Finding("rewards repeat", "sound", "all rewards are finite and give the same video the same value twice")


def reward_spread(parts: Assembly, trial: Trial) -> Finding:
    """Rewards differ inside groups, so that there is something to learn from."""
    groups = trial.drawn.rewards.total.unflatten(0, (trial.groups, trial.group_size))
    inside = groups.std(dim=1, correction=0)
    flat = int((inside == 0).sum())
    numbers = {"std_inside_groups": float(inside.mean()), "flat_groups": flat, "groups": trial.groups}
    if flat == trial.groups:
        some = trial.groups >= 2
        sentence = f"the reward was the same for all samples in each of {trial.groups} groups; nothing can be learnt"
        return Finding("reward spread", "unsound" if some else "warning", sentence, numbers)
    sentence = f"rewards spread by {float(inside.mean()):.3g} inside groups ({flat} of {trial.groups} groups are flat)"
    return Finding("reward spread", "sound", sentence, numbers)


def advantage_signs(parts: Assembly, trial: Trial) -> Finding:
    """Some samples are to become likelier and some less likely."""
    advantages = trial.drawn.advantages
    share = float((advantages > 0).double().mean())
    if advantages.any() and not 0 < share < 1:
        return Finding("advantages", "unsound", "all advantages have the same sign", {"positive_share": share})
    return Finding("advantages", "sound", f"{share:.0%} of the advantages are positive", {"positive_share": share})


def evaluation_sampler(parts: Assembly, trial: Trial) -> Finding:
    """Evaluation samples without noise, on noise of its own."""
    environment, steps = parts.evaluator.environment, parts.evaluator.environment.grid.num_steps
    x = torch.ones(1, *parts.policy.model.latent_shape)
    once, again = (environment.walk(range(steps)).step(0, x, x) for _ in range(2))
    if not torch.equal(once, again):
        sentence = (
            "evaluation adds noise at its steps as training does, so its scores are not those of the model in use"
        )
        return Finding("evaluation sampler", "unsound", sentence)
    sentence = f"evaluation is deterministic, {steps} steps where training takes {parts.policy.grid.num_steps}"
    return Finding("evaluation sampler", "sound", sentence)


def planted_pairs(parts: Assembly, trial: Trial) -> Finding:
    """Rewards that declare a better and a worse video rank them so."""
    if not parts.world.scores:  # whose rewards are not loaded, and have no business here
        return Finding("planted pair", "sound", "this process computes no rewards", {"right": []})
    wrong, right = list[str](), list[str]()
    for name, pair in parts.rewards.planted_pairs().items():
        videos = torch.stack([pair.worse, pair.better])
        table = parts.rewards.score(videos, [pair.prompt, pair.prompt], watched=True, only=name)
        mean = table.values.mean(dim=1)
        (right if mean[1] > mean[0] else wrong).append(name)
    if wrong:
        sentence = f"reward {wrong[0]} prefers the worse of two videos that it declares itself; is its sign right?"
        return Finding("planted pair", "unsound", sentence, {"wrong": wrong})
    which = ", ".join(right) or "none of the rewards"
    return Finding("planted pair", "sound", f"ranked as declared: {which}", {"right": right})


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
    leaked = len(set(texts) & set(heldout))
    limit = parts.config.model.max_sequence_length
    cut = sum(length > limit for length in parts.policy.model.token_counts([*texts, *heldout]))
    numbers = {"train": len(texts), "heldout": len(heldout), "duplicates": twice, "in_both": leaked, "cut": cut}
    if leaked:
        sentence = f"{leaked} held-out prompts are trained on as well, so evaluation would not be held out"
        return Finding("prompts", "unsound", sentence, numbers)
    if cut or twice:
        sentence = f"{cut} prompts are longer than {limit} tokens and lose their end; {twice} occur more than once"
        return Finding("prompts", "unsound" if cut else "warning", sentence, numbers)
    sentence = f"{len(texts)} prompts and {len(heldout)} held out, none twice, none longer than {limit} tokens"
    return Finding("prompts", "sound", sentence, numbers)


def text_embeddings(parts: Assembly, trial: Trial) -> Finding:
    """Every prompt that the run will use has an embedding, and it is finite."""
    texts = {prompt.text: prompt for prompt in parts.used}
    encode = parts.policy.model.encode
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
    residual_noise,
    rewards_repeat,
    reward_spread,
    advantage_signs,
    evaluation_sampler,
)
THOROUGH: tuple[Check, ...] = (planted_pairs, replicas, prompts, text_embeddings)

"""One policy update from transitions and advantages: replay the stochastic steps, step the optimizer."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.learning.objective import policy_losses, ratio_metrics
from flashgrpo.learning.optim import GradientSum
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.presets import Algorithm
from flashgrpo.processes.flow.model import Transitions
from flashgrpo.processes.flow.policy import LogProb, Policy, uncompiled
from flashgrpo.types import Latents, taken


def policy_update(
    policy: Policy,
    optimizer: GradientSum,
    transitions: Transitions,
    advantages: Float[Tensor, " batch"],
    algorithm: Algorithm,
    config: OptimConfig,
    world: World,
) -> dict[str, float | dict[str, float]]:
    """`config.passes` times `config.minibatches` optimizer steps on one rollout; returns the metrics of all ranks.

    The loss of an optimizer step is the mean over its transitions of the clipped surrogate, each weighted as
    `algorithm.weighting` says (Flash-GRPO, arXiv 2605.15980), plus `kl_coef` times the KL to the base model.

    Args:
        transitions: T recorded steps of this rank's B samples; graphs that came with them serve one call.
        advantages: of the samples, (B,).

    Raises:
        UserError: a gradient is not finite.
    """
    ranks = world.gather(transitions.k.tolist())  # of the whole update, by rank
    k = torch.tensor([step for own in ranks for step in own])
    owner = torch.tensor([rank for rank, own in enumerate(ranks) for _ in own])
    mine = (owner == world.data_rank).nonzero().flatten()
    device = transitions.x.device
    candidates = algorithm.steps.candidates(policy.grid.num_steps)
    weights = algorithm.weighting.weights(policy.table, candidates, k)[mine].to(device)
    advantages = advantages.to(device)
    metrics = UpdateMetrics(algorithm)
    once = config.passes * config.minibatches == 1
    retained: dict[int, list[tuple[Tensor, Latents | None]]] = {}
    for one in transitions.retained if once else ():
        retained.setdefault(int(transitions.k[one.rows[0]]), []).append((one.rows, one.v))
    for one in transitions.retained[:1] if once else ():
        metrics.add_check(*checked(policy, transitions[one.rows]))
    old_v = None
    if algorithm.ratio.needs_old_velocity and not once:
        old_v = drawn_velocities(policy, transitions, k, owner, config.micro_batch, world)
    for _ in range(config.passes):
        for first in range(config.minibatches):
            rows = torch.arange(first, len(k), config.minibatches)  # some of every rank's
            for step, parts, idle in micro_batches(k[rows], owner[rows], world.data_rank, config.micro_batch):
                for local, v in retained.get(step) or [(rows[part] - mine[0], None) for part in parts]:
                    batch = transitions[local]
                    with uncompiled():  # the backward pass may compute blocks again
                        drawn = None if old_v is None else taken(old_v, local)
                        advantage, weight = taken(advantages, batch.sample), taken(weights, local)
                        loss = replay(policy, batch, advantage, weight, algorithm, metrics, drawn, v)
                        (loss.sum() * (world.loss_scale / len(rows))).backward()
                for _ in range(idle if world.uses_fsdp else 0):
                    idle_replay(policy, algorithm, step)
                if config.grad_norm_by_step:
                    metrics.add_gradient(step, optimizer.collect() * (len(rows) / int((k[rows] == step).sum())))
            if not config.grad_norm_by_step:
                optimizer.collect()
            metrics.add_step(optimizer.lr, optimizer.step())
    counts = k.bincount().tolist()
    by_step = {str(step): count for step, count in enumerate(counts) if count}
    return {**metrics.summary(world), "transitions_by_step": by_step}


def micro_batches(
    k: Int64[Tensor, " rows"], owner: Int64[Tensor, " rows"], rank: int, size: int
) -> Iterator[tuple[int, Sequence[Tensor], int]]:
    """Cut transitions by step, and this rank's of a step into batches of at most `size` rows.

    Yields (step, batches, idle), step rising: every step that any rank has, and how many more batches the rank with the
    most of them has than this one.

    Example for rank 0: k = [2, 0, 0, 2, 0, 1], owner = [0, 0, 0, 0, 0, 1], size 2 gives (0, [[1, 2], [4]], 0),
    (1, [], 1), (2, [[0, 3]], 0).
    """
    for step in sorted(set(k.tolist())):
        rows = (k == step).nonzero().flatten()
        most = -(-int(owner[rows].bincount().max()) // size)
        own = rows[owner[rows] == rank]
        parts = own.split(size) if len(own) else ()
        yield step, parts, most - len(parts)


@torch.no_grad()
def checked(policy: Policy, batch: Transitions) -> tuple[LogProb, LogProb]:
    """Densities of transitions whose graph was kept, computed again all the same, and as they were drawn.

    Where nothing is replayed, nothing would show that the weights are no longer those that drew.
    """
    v = policy.exact_velocity(batch.k, batch.x, batch.condition[batch.sample])
    return policy.table.log_prob(batch.k, batch.x_next, batch.x, v), batch.log_prob


@torch.no_grad()
def drawn_velocities(
    policy: Policy,
    transitions: Transitions,
    k: Int64[Tensor, " rows"],
    owner: Int64[Tensor, " rows"],
    micro_batch: int,
    world: World,
) -> Latents:
    """The velocities of this rank's T transitions, (T, C, F, H, W), by the policy that drew them: before it moves."""
    v = torch.empty_like(transitions.x)
    first = int((owner < world.data_rank).sum())
    for step, parts, idle in micro_batches(k, owner, world.data_rank, micro_batch):
        for part in parts:
            batch = transitions[part - first]
            now = policy.exact_velocity(batch.k, batch.x, batch.condition[batch.sample])
            v.index_copy_(0, (part - first).to(v.device, non_blocking=True), now)
        for _ in range(idle if world.uses_fsdp else 0):
            policy.idle(step)
    return v


def idle_replay(policy: Policy, algorithm: Algorithm, step: int) -> None:
    """Take part in the collectives of a replay of a step without a gradient of one's own."""
    v = policy.idle(step)
    if algorithm.kl_coef:
        with torch.no_grad(), policy.model.reference():
            policy.idle(step)
    (v.sum() * 0).backward()


def replay(
    policy: Policy,
    batch: Transitions,
    advantage: Float[Tensor, " transitions"],
    weight: Float[Tensor, " transitions"],
    algorithm: Algorithm,
    metrics: "UpdateMetrics",
    old_v: Latents | None = None,
    v: Latents | None = None,
) -> Float[Tensor, " transitions"]:
    """Compute the recorded steps again, with gradient; the loss of each transition.

    Args:
        v: the velocities with their graph, where the rollout has kept it: then nothing is computed again.
        old_v: velocities by the policy that drew the transitions; None where this still is that policy. They count for
            the ratio of GRPO-Guard alone (arXiv 2510.22319, eq. 8).
    """
    condition = batch.condition[batch.sample]
    if v is None:
        v = policy.exact_velocity(batch.k, batch.x, condition)
    log_prob = policy.table.log_prob(batch.k, batch.x_next, batch.x, v)
    new, old = algorithm.ratio.scores(policy.table, batch.k, log_prob, batch.log_prob, v, v if old_v is None else old_v)
    loss = policy_losses(new, old, advantage, weight, algorithm.clip_range)
    kl = None
    if algorithm.kl_coef:
        with torch.no_grad(), policy.model.reference():
            v_ref = policy.exact_velocity(batch.k, batch.x, condition)
        kl = policy.table.kl(batch.k, v, v_ref)
        loss = loss + algorithm.kl_coef * kl
    metrics.add_batch(new, old, loss, kl)
    return loss


class UpdateMetrics:
    """Collects what an update shows, without waiting for the device before its end."""

    def __init__(self, algorithm: Algorithm) -> None:
        self._algorithm = algorithm
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._grad_norms: list[float] = []
        self._lr = 0.0
        self._step_gradients: dict[int, list[Tensor]] = defaultdict(list)

    def add_batch(self, log_prob: Tensor, old_log_prob: Tensor, loss: Tensor, kl: Tensor | None) -> None:
        """Record a micro-batch, a value per transition."""
        rows = {"log_prob": log_prob, "old_log_prob": old_log_prob, "loss": loss, **({} if kl is None else {"kl": kl})}
        if not self._grad_norms:
            rows |= {"first_log_prob": log_prob, "first_old_log_prob": old_log_prob}
        for name, values in rows.items():
            self._rows[name].append(values.detach())

    def add_check(self, log_prob: LogProb, old_log_prob: LogProb) -> None:
        """Record densities by a replay that only looks, and no loss."""
        self._rows["first_log_prob"].append(log_prob)
        self._rows["first_old_log_prob"].append(old_log_prob)

    def add_gradient(self, k: int, norm: Tensor) -> None:
        """Record the norm of the mean gradient of the rows of step k."""
        self._step_gradients[k].append(norm)

    def add_step(self, lr: float, grad_norm: float) -> None:
        """Record an optimizer step."""
        self._lr = lr
        self._grad_norms.append(grad_norm)

    def summary(self, world: World) -> dict[str, float | dict[str, float]]:
        """The metrics of the update; means over the transitions of all ranks and over its optimizer steps.

        `drift` is the largest |ratio - 1| within the first optimizer step, where the policy has not changed yet: any
        deviation there is a difference between rollout and replay. Of kept graphs a micro-batch is replayed for it.
        `ratio_max_dev` is over all of them.
        `grad_norm_by_step` is the norm of the mean gradient of the transitions of a denoising step.
        """
        own = {name: torch.cat(values).tolist() for name, values in self._rows.items()}
        rows = defaultdict[str, list[float]](list)
        for theirs in world.gather(own):
            for name, values in theirs.items():
                rows[name] += values
        log_prob, old_log_prob, first, old_first = (
            torch.tensor(rows[name]) for name in ("log_prob", "old_log_prob", "first_log_prob", "first_old_log_prob")
        )
        ratios = ratio_metrics(log_prob, old_log_prob, self._algorithm.clip_range)
        drift = ratio_metrics(first, old_first, self._algorithm.clip_range)
        return {
            "loss": statistics.fmean(rows["loss"]),
            "kl": statistics.fmean(rows["kl"]) if "kl" in rows else 0.0,
            **{name: float(value) for name, value in ratios.items()},
            "lr": self._lr,
            "drift": float(drift["ratio_max_dev"]),
            "grad_norm": sum(self._grad_norms) / len(self._grad_norms),
            "grad_norm_by_step": {str(k): float(sum(n)) / len(n) for k, n in sorted(self._step_gradients.items())},
        }

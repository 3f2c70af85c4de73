"""One policy update from transitions and advantages: replay the stochastic steps, step the optimizer."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from flashgrpo.config import OptimConfig
from flashgrpo.loss import policy_losses, ratio_metrics
from flashgrpo.optim import Optimizer
from flashgrpo.policy import Policy
from flashgrpo.presets import Algorithm
from flashgrpo.types import Transitions


def policy_update(
    policy: Policy,
    optimizer: Optimizer,
    transitions: Transitions,
    advantages: Float[Tensor, " batch"],
    algorithm: Algorithm,
    config: OptimConfig,
) -> dict[str, float | dict[str, float]]:
    """`config.passes` times `config.minibatches` optimizer steps on one rollout; returns the metrics.

    The loss of an optimizer step is the mean over its transitions of the clipped surrogate, each weighted as
    `algorithm.weighting` says (Flash-GRPO, arXiv 2605.15980), plus `kl_coef` times the KL to the base model.

    Args:
        transitions: T recorded steps of B samples.
        advantages: of the samples, (B,).

    Raises:
        UserError: a gradient is not finite.
    """
    candidates = algorithm.steps.candidates(policy.grid.num_steps)
    device = transitions.x.device
    weights = algorithm.weighting.weights(policy.table, candidates, transitions.k).to(device)
    advantages = advantages.to(device)
    metrics = UpdateMetrics(optimizer, algorithm, by_step=config.grad_norm_by_step)
    for _ in range(config.passes):
        for rows in torch.arange(len(transitions)).tensor_split(config.minibatches):
            for k, parts in micro_batches(transitions.k[rows].tolist(), config.micro_batch):
                for part in parts:
                    batch = transitions[rows[part]]
                    loss = replay(policy, batch, advantages[batch.sample], weights[rows[part]], algorithm, metrics)
                    (loss.sum() / len(rows)).backward()
                metrics.add_gradient(k, share=sum(map(len, parts)) / len(rows))
            metrics.add_step(optimizer.lr, optimizer.step())
    return metrics.summary()


def micro_batches(k: Sequence[int], size: int) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Cut transitions by step, and those of a step into batches of at most `size` rows: (step, batches), step rising.

    Example: k = [2, 0, 0, 2, 0], size 2 gives (0, [[1, 2], [4]]), (2, [[0, 3]]).
    """
    rows_of = defaultdict(list)
    for row, step in enumerate(k):
        rows_of[step].append(row)
    for step in sorted(rows_of):
        yield step, torch.tensor(rows_of[step]).split(size)


def replay(
    policy: Policy,
    batch: Transitions,
    advantage: Float[Tensor, " transitions"],
    weight: Float[Tensor, " transitions"],
    algorithm: Algorithm,
    metrics: "UpdateMetrics",
) -> Float[Tensor, " transitions"]:
    """Compute the recorded steps again, with gradient; the loss of each transition."""
    condition = batch.condition[batch.sample]
    v = policy.exact_velocity(batch.k, batch.x, condition)
    log_prob = policy.table.log_prob(batch.k, batch.x_next, batch.x, v)
    loss = policy_losses(log_prob, batch.log_prob, advantage, weight, algorithm.clip_range)
    kl = None
    if algorithm.kl_coef:
        with torch.no_grad(), policy.model.reference():
            v_ref = policy.exact_velocity(batch.k, batch.x, condition)
        kl = policy.table.kl(batch.k, v, v_ref)
        loss = loss + algorithm.kl_coef * kl
    metrics.add_batch(log_prob, batch.log_prob, loss, kl)
    return loss


class UpdateMetrics:
    """Collects what an update shows, without waiting for the device before its end."""

    def __init__(self, optimizer: Optimizer, algorithm: Algorithm, by_step: bool) -> None:
        self._optimizer, self._algorithm = optimizer, algorithm
        self._rows: dict[str, list[Tensor]] = defaultdict(list)
        self._first_step_rows = 0
        self._grad_norms: list[float] = []
        self._lr = 0.0
        self._by_step = by_step
        self._gradient_before: list[Tensor] | None = None
        self._step_gradients: dict[int, list[Tensor]] = defaultdict(list)

    def add_batch(self, log_prob: Tensor, old_log_prob: Tensor, loss: Tensor, kl: Tensor | None) -> None:
        """Record a micro-batch, a value per transition."""
        rows = {"log_prob": log_prob, "old_log_prob": old_log_prob, "loss": loss, **({} if kl is None else {"kl": kl})}
        for name, values in rows.items():
            self._rows[name].append(values.detach())
        if not self._grad_norms:
            self._first_step_rows += len(loss)

    def add_gradient(self, k: int, share: float) -> None:
        """Record what the rows of step k, a `share` of the optimizer step's, have added to the gradient."""
        if not self._by_step:
            return
        now = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._optimizer.parameters.values()]
        before = self._gradient_before or [torch.zeros_like(gradient) for gradient in now]
        added = torch.stack([(new - old).square().sum() for new, old in zip(now, before, strict=True)]).sum().sqrt()
        self._step_gradients[k].append(added / share)
        self._gradient_before = now

    def add_step(self, lr: float, grad_norm: float) -> None:
        """Record an optimizer step."""
        self._lr = lr
        self._grad_norms.append(grad_norm)
        self._gradient_before = None

    def summary(self) -> dict[str, float | dict[str, float]]:
        """The metrics of the update; means over its transitions and its optimizer steps.

        `drift` is the largest |ratio - 1| within the first optimizer step, where the policy has not changed yet: any
        deviation there is a difference between rollout and replay. `ratio_max_dev` is over all of them.
        `grad_norm_by_step` is the norm of the mean gradient of the transitions of a denoising step.
        """
        rows = {name: torch.cat(values) for name, values in self._rows.items()}
        ratios = ratio_metrics(rows["log_prob"], rows["old_log_prob"], self._algorithm.clip_range)
        first = slice(self._first_step_rows)
        drift = ratio_metrics(rows["log_prob"][first], rows["old_log_prob"][first], self._algorithm.clip_range)
        return {
            "loss": float(rows["loss"].mean()),
            "kl": float(rows["kl"].mean()) if "kl" in rows else 0.0,
            **{name: float(value) for name, value in ratios.items()},
            "lr": self._lr,
            "drift": float(drift["ratio_max_dev"]),
            "grad_norm": sum(self._grad_norms) / len(self._grad_norms),
            "grad_norm_by_step": {str(k): float(sum(n)) / len(n) for k, n in sorted(self._step_gradients.items())},
        }

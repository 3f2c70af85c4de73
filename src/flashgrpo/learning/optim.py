"""The optimizer step: AdamW, linear warm-up, clipping by global norm, and a moving average of the weights."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flashgrpo.distributed.world import World, full_tensor, local
from flashgrpo.errors import SharedError
from flashgrpo.learning.settings import OptimConfig


class GradientSum(ABC):
    """The gradient of an optimizer step, collected in parts and added up over all ranks; parameters may be sharded."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World) -> None:
        self.parameters = dict(parameters)
        self.world = world
        self._gradients: list[Tensor] | None = None

    @property
    @abstractmethod
    def lr(self) -> float:
        """The learning rate of the next step."""

    def collect(self) -> Tensor:
        """Take what backward has left, added up over all ranks, into the gradient of the next step; returns its norm.

        All ranks call this together. Parameters without a gradient count as zero.
        """
        parts = [_gradient(parameter) for parameter in self.parameters.values()]
        self.world.all_reduce_(parts)
        for parameter in self.parameters.values():
            parameter.grad = None
        if self._gradients is None:
            self._gradients = parts
        else:
            torch._foreach_add_([local(g) for g in self._gradients], [local(part) for part in parts])
        return gradient_norm(parts)

    def take(self) -> list[Tensor]:
        """Return what was collected, in the order of the parameters; the next step starts from nothing."""
        assert self._gradients is not None, "collect() comes before step()"
        gradients, self._gradients = self._gradients, None
        return gradients

    @abstractmethod
    def step(self) -> float:
        """Use up what was collected; returns its norm."""


class Optimizer(GradientSum):
    """AdamW over named parameters, with an exponential moving average that is updated once per optimizer step.

    Attributes:
        ema: name -> average, float32; what evaluation and export use.
        steps: optimizer steps taken or skipped.
        skipped_in_a_row: those skipped since the last that was taken.
        whole: False only while a step is under way, and for good where one was broken off.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, world: World) -> None:
        super().__init__(parameters, world)
        self.config = config
        self.steps = self.skipped_in_a_row = 0
        self.whole = True
        self.ema = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._adamw = _adamw(list(self.parameters.values()), config)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.config.lr * min(1.0, (self.steps + 1) / (self.config.warmup + 1))

    def step(self) -> float:
        """Clip what was collected, step, average the weights; returns the norm before clipping.

        Where it is not finite, which all ranks see alike, weights and moments stay as they are.

        Raises:
            SharedError: it was not for `max_bad_steps` steps in a row.
        """
        gradients = self.take()
        norm = float(gradient_norm(gradients))
        if not math.isfinite(norm):
            self._note_skipped(norm)
        self.whole = False
        if math.isfinite(norm):
            self._take_step(gradients, norm)
            self.skipped_in_a_row = 0
        self.steps += 1
        if self.steps % self.config.ema.every == 0:
            for name, parameter in self.parameters.items():
                local(self.ema[name]).lerp_(local(parameter), 1 - self.config.ema.decay)
        self.whole = True
        return norm

    def _note_skipped(self, norm: float) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.max_bad_steps:
            raise SharedError(
                f"the gradient of optimizer step {self.steps + 1} is {norm}, number {self.skipped_in_a_row} in a row "
                "that is not finite; lower optim.lr, or raise optim.max_bad_steps, and start again to go on "
                "from the last checkpoint"
            )

    def _take_step(self, gradients: Sequence[Tensor], norm: float) -> None:
        scale = self.config.clip_factor(norm)
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        for group in self._adamw.param_groups:
            group["lr"] = self.lr
        self._adamw.step()
        self._adamw.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """Name -> current value."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next step depends on, as the very tensors in use: reading into them restores a state.

        Only the number of steps is a copy; `restored` takes it over.
        """
        moments = {
            f"{key}:{name}": value
            for name, parameter in self.parameters.items()
            for key, value in self._adamw.state[parameter].items()
        }
        return {"policy": self.weights(), "ema": self.ema, "optimizer": {**moments, "steps": torch.tensor(self.steps)}}

    def restored(self, state: Mapping[str, Mapping[str, Tensor]], skipped_in_a_row: int = 0) -> None:
        """Continue from `state`, whose tensors have been read into."""
        self.steps, self.skipped_in_a_row = int(state["optimizer"]["steps"]), skipped_in_a_row


def _adamw(parameters: list[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with its state in place at once, as a checkpoint is read into what is there."""
    settings: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    adamw = torch.optim.AdamW(parameters, lr=config.lr, foreach=True, **settings)
    for parameter in parameters:
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        adamw.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return adamw


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def gradient_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of all tensors together, of sharded ones over all shards."""
    return full_tensor(nn.utils.get_total_norm(tensors))

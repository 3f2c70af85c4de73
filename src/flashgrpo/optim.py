"""The optimizer step: AdamW, linear warm-up, clipping by global norm, and a moving average of the weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flashgrpo.config import OptimConfig
from flashgrpo.errors import UserError


class Optimizer:
    """AdamW over named parameters, with an exponential moving average that is updated once per optimizer step.

    Attributes:
        ema: name -> average, float32; what evaluation and export use.
        steps: optimizer steps taken.
        whole: False only while a step is under way, and for good where one was broken off.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.steps = 0
        self.whole = True
        self.ema = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._adamw = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            foreach=True,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self.config.lr * min(1.0, (self.steps + 1) / (self.config.warmup + 1))

    def step(self) -> float:
        """Clip the gradients, step, average the weights, clear the gradients; returns the norm before clipping.

        Raises:
            UserError: a gradient is not finite; the weights are as they were before.
        """
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm))
        if not norm < float("inf"):
            self._adamw.zero_grad()
            raise UserError(
                f"the gradient of optimizer step {self.steps + 1} is {norm}; lower optim.lr or check rewards"
            )
        for group in self._adamw.param_groups:
            group["lr"] = self.lr
        self.whole = False
        self._adamw.step()
        self._adamw.zero_grad()
        self.steps += 1
        if self.steps % self.config.ema.every == 0:
            for name, parameter in self.parameters.items():
                self.ema[name].lerp_(parameter.detach(), 1 - self.config.ema.decay)
        self.whole = True
        return norm

    def weights(self) -> dict[str, Tensor]:
        """Name -> current value."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything that the next step depends on, as tensors: weights, average, moments and step counts."""
        moments = {
            f"{key}:{name}": value
            for name, parameter in self.parameters.items()
            for key, value in self._adamw.state[parameter].items()
        }
        return {"policy": self.weights(), "ema": self.ema, "optimizer": {**moments, "steps": torch.tensor(self.steps)}}

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continue from what `state` returned; parameters keep their identity.

        Raises:
            UserError: the names or shapes are those of another network or adapter.
        """
        for name, parameter in self.parameters.items():
            saved = state["policy"].get(name)
            if saved is None or saved.shape != parameter.shape or len(state["policy"]) != len(self.parameters):
                raise UserError(f"the checkpoint is of another model or adapter: {name} is missing or of another shape")
            parameter.data.copy_(saved)
            self.ema[name].copy_(state["ema"][name])
        self.steps = int(state["optimizer"]["steps"])
        for key, value in state["optimizer"].items():
            kind, colon, name = key.partition(":")
            if colon:
                at = value if kind == "step" else value.to(self.parameters[name].device)
                self._adamw.state[self.parameters[name]][kind] = at.clone()

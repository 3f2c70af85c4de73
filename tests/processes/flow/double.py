"""A video model in float64, for gradients that are compared to 1e-12: run in processes without checks of dtypes."""

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

from flashgrpo.distributed.world import single_process
from flashgrpo.learning.objective import Clipped, Contrast
from flashgrpo.learning.optim import GradientSum
from flashgrpo.learning.settings import OptimConfig
from flashgrpo.learning.update import policy_update
from flashgrpo.processes.flow.choices import Deterministic, Renoised
from flashgrpo.processes.flow.process import FlowProcess
from flashgrpo.processes.flow.schedule import shifted_grid
from flashgrpo.processes.flow.settings import RolloutConfig, SamplingConfig
from flashgrpo.types import Condition, Prompt, PromptGroup, Sample


class Linear:
    """v = W x + t b over the latent dims: what the flow process asks of a model to score re-noised samples."""

    offloads = recomputes = False
    latent_shape, device = (1, 1, 2, 3), torch.device("cpu")

    def __init__(self) -> None:
        self.network = nn.Linear(6, 6)
        self.network.weight.data = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
        self.network.bias.data = torch.randn(6, generator=torch.Generator().manual_seed(2))

    guidance = "classifier-free"

    def expert(self, timestep):
        return self.network

    def grid(self, num_steps):
        return shifted_grid(num_steps, 3.0)

    def velocity(self, x, point, condition):
        flat = x.flatten(1) @ self.network.weight.T + point.sigma[:, None] * self.network.bias
        return flat.unflatten(1, self.latent_shape)

    def reference(self):
        return nullcontext()


class Gradients(GradientSum):
    """Keeps the gradient."""

    lr = 0.0

    def step(self):
        self.kept = self.take()
        return 0.0


def first_gradients() -> dict[str, list[float]]:
    """Return the first gradient of each method on the same samples, levels and noise, and that of the formula."""
    torch.set_default_dtype(torch.float64)
    model, world, group = Linear(), single_process(computes=False), PromptGroup(0, 0, Prompt("", {}), 5)
    samples = [Sample(group, member) for member in range(5)]
    x0 = torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    condition = Condition({"text": torch.zeros(5, 1)})
    advantage = torch.tensor([1.5, -2.0, 0.7, 4.9, -0.3]).repeat_interleave(3)

    def drawn(objective, weight):
        score = Renoised(times=3, weight=weight)
        rollout, sampling = RolloutConfig(num_steps=5, guidance_scale=1.0), SamplingConfig()
        process = FlowProcess(model, Deterministic(), score, rollout, sampling, 4, world)
        record = process.source.begin(samples, condition, 0, 2, objective.columns).record(x0)
        return process, replace(record, advantage=advantage)

    def gradient(objective, weight="self-normalized", by=None):
        process, record = drawn(objective, weight)
        record = record if by is None else replace(record, weight=by)
        optimizer = Gradients(dict(model.network.named_parameters()), world)
        metrics = policy_update(process, objective, optimizer, record, OptimConfig(), world)
        assert metrics["drift"] == 0
        return torch.cat([part.flatten() for part in optimizer.kept]).tolist()

    state = drawn(Clipped(), "uniform")[1].state
    x, u = state.noised()
    with torch.no_grad():
        d = (model.velocity(x, state, None) - u).flatten(1)
    t = state.sigma
    scale = 2 * t**2 * advantage / (t * d.abs().mean(1) * 6) / len(t)
    by_hand = scale[:, None] * d  # of v; the chain rule by W and b follows
    weight, bias = by_hand.T @ x.flatten(1), (t[:, None] * by_hand).sum(0)
    return {
        "by hand": torch.cat([weight.flatten(), bias]).tolist(),
        "v-grpo": gradient(Clipped(clip_range=0.2)),
        "diffusion-nft": gradient(Contrast()),
        "diffusion-nft, beta 0.1": gradient(Contrast(beta=0.1)),
        "awm": gradient(Clipped(clip_range=1.0), "uniform", by=t**2 / (t * d.abs().mean(1))),
    }

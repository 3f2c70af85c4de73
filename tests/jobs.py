"""What the processes of `tests/processes.py` do. Arguments and results are JSON."""

import sys
import time
import traceback
from pathlib import Path

import diffusers  # noqa: F401  (the nursery imports once what every child needs)
import torch
from safetensors.torch import save_file

import flashgrpo.models.wan
import flashgrpo.report
from flashgrpo import train as training
from flashgrpo.config import RunConfig
from flashgrpo.distributed import joined, local, whole
from flashgrpo.errors import UserError
from flashgrpo.models import load_model
from flashgrpo.models.lora import trained_parameters
from flashgrpo.optim import Optimizer
from flashgrpo.policy import Policy
from flashgrpo.prompts import TextCache, prompt_groups, read_prompts
from flashgrpo.rollout import rollout
from flashgrpo.types import Sample
from flashgrpo.update import policy_update

torch.set_num_threads(1)


def tell(error: BaseException) -> int:
    """What the command line does with an exception."""
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, UserError):
        if not error.told:
            print(f"flashgrpo: {error}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def train(recipe: str, *overrides: str) -> str:
    """A whole run."""
    return str(training(RunConfig.load(recipe, overrides)))


def slow_train(recipe: str, seconds: float, *overrides: str) -> str:
    """A run whose updates take at least so long, so that there is time to kill it in one."""
    real = policy_update

    def slow(*arguments):
        time.sleep(seconds)
        return real(*arguments)

    sys.modules["flashgrpo.train"].policy_update = slow
    return train(recipe, *overrides)


def one_update(recipe: str, out: str, *overrides: str) -> dict:
    """A rollout and its gradient, written by every rank: what each drew, and the whole gradient of the update."""
    config = RunConfig.load(recipe, overrides)
    with joined(config) as team:
        settings = config.rollout
        model = load_model(config.model, team, config.seed, keep_reference=config.algorithm.kl_coef > 0)
        perturb(model.network)
        grid = model.grid(settings.num_steps)
        table = config.algorithm.noise(grid.sigmas)
        policy = Policy(model, grid, table, settings.guidance_scale, config.optim.micro_batch)
        prompts = read_prompts(config.prompts.train, "prompts.train")
        groups = prompt_groups(prompts, config.seed, 3, settings.prompts, settings.group_size)
        samples = [Sample(group, member) for group in groups for member in range(group.size)]
        mine = samples[team.slice(len(samples))]
        condition = TextCache(model)([sample.group.prompt.text for sample in mine or samples[:1]])
        latents, transitions = rollout(
            policy, mine, condition, config.algorithm, settings.solver, config.seed, settings.micro_batch, team
        )
        optimizer = Optimizer(trained_parameters(model.network), config.optim, team)
        gradients = {}
        step = optimizer.step

        def spy() -> float:
            gradients.update(
                {
                    name: whole(gradient).clone()
                    for name, gradient in zip(optimizer.parameters, optimizer._gradients, strict=True)
                }
            )
            return step()

        optimizer.step = spy
        advantages = torch.linspace(-1, 1, len(samples))[team.slice(len(samples))]
        metrics = policy_update(policy, optimizer, transitions, advantages, config.algorithm, config.optim, team)
        weights = {f"weight/{name}": whole(weight).clone() for name, weight in optimizer.weights().items()}
        drawn = {
            "latents": latents,
            "k": transitions.k,
            "x": transitions.x,
            "x_next": transitions.x_next,
            "log_prob": transitions.log_prob,
        }
        save_file({name: tensor.contiguous() for name, tensor in drawn.items()}, f"{out}/drawn{team.rank}.safetensors")
        if team.leads:
            named = {**{f"gradient/{name}": gradient for name, gradient in gradients.items()}, **weights}
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, f"{out}/update.safetensors")
        names = [[sample.group.prompt.text, *sample.name] for sample in mine]
        return {"names": team.gather(names), "metrics": metrics, "held": held(model.network)}


def perturb(network: torch.nn.Module) -> None:
    """Move the adapters off their start, where half of the gradient vanishes; the same for every sharding."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    noise = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(network).values():
        moved = whole(parameter) + 0.02 * torch.randn(parameter.shape, generator=noise)
        if isinstance(parameter, DTensor):
            moved = distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        local(parameter).copy_(moved)


def held(network: torch.nn.Module) -> int:
    """Numbers of parameters that this process holds."""
    return sum(local(parameter).numel() for parameter in network.parameters())


def replicas_that_differ(recipe: str, *overrides: str) -> None:
    """Rank 1 starts from other weights."""
    real = flashgrpo.models.wan.prepare

    def other(network, train, seed):
        import os

        real(network, train, seed + int(os.environ["RANK"]))

    flashgrpo.models.wan.prepare = other
    train(recipe, *overrides)


def fail_on_rank_1(recipe: str, *overrides: str) -> None:
    """A bug on one rank only."""
    import os

    module, real = sys.modules["flashgrpo.train"], policy_update

    def buggy(*arguments):
        if os.environ["RANK"] == "1" and (Path(arguments[0].model.config.path) or True):
            raise KeyError("planted")
        return real(*arguments)

    module.policy_update = buggy
    train(recipe, *overrides)

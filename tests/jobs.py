"""What the processes of `tests/nursery.py` do. Arguments and results are JSON."""

import os
import sys
import time
import traceback

import diffusers  # noqa: F401  (the nursery imports once what every child needs)
import torch
from safetensors.torch import save_file

import flashgrpo.doctor
import flashgrpo.models.network
import flashgrpo.report
from flashgrpo import evaluate as evaluation
from flashgrpo import train as training
from flashgrpo.assembly import Assembly, experience
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import full_tensor, local, process_group
from flashgrpo.errors import UserError
from flashgrpo.learning.update import policy_update
from flashgrpo.models.lora import trained_parameters
from flashgrpo.prompts import prompt_groups
from flashgrpo.run.progress import Clock

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


def train_and_die(recipe: str, write: int) -> str:
    """A run that dies without a word at its so-manieth flush or rename, before that reaches the disk."""
    left = [write]

    def crashing(function):
        def call(*arguments):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return function(*arguments)

        return call

    os.fsync, os.replace = crashing(os.fsync), crashing(os.replace)
    return train(recipe)


def slow_train(recipe: str, seconds: float, *overrides: str) -> str:
    """A run whose updates take at least so long, so that there is time to kill it in one."""
    real = policy_update

    def slow(*arguments):
        time.sleep(seconds)
        return real(*arguments)

    sys.modules["flashgrpo.train"].policy_update = slow
    return train(recipe, *overrides)


def one_update(recipe: str, out: str, *overrides: str) -> dict:
    """A rollout and its gradient, written to files: what each rank drew, and the whole gradient of the update."""
    config = RunConfig.load(recipe, overrides)
    with process_group(config.parallel, config.model.compute_dtype) as world:
        parts = Assembly(config, world)
        perturb(parts.policy.model.network)
        settings, optimizer = config.rollout, parts.optimizer
        groups = prompt_groups(parts.prompts, config.seed, 3, settings.prompts, settings.group_size)
        drawn = experience(parts, groups, Clock())
        named = {}
        step = optimizer.step

        def spy() -> float:
            gradients = zip(optimizer.parameters, optimizer._gradients, strict=True)
            named.update({f"gradient/{name}": full_tensor(gradient).clone() for name, gradient in gradients})
            return step()

        optimizer.step = spy
        advantages = torch.linspace(-1, 1, settings.prompts * settings.group_size)[drawn.mine]
        metrics = policy_update(
            parts.policy, optimizer, drawn.transitions, advantages, config.algorithm, config.optim, world
        )
        named |= {f"weight/{name}": full_tensor(weight).clone() for name, weight in optimizer.weights().items()}
        tensors = {name: getattr(drawn.transitions, name) for name in ("k", "x", "x_next", "log_prob")}
        tensors |= {"latents": drawn.latents, "rewards": drawn.rewards.values}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, f"{out}/drawn{world.rank}.safetensors"
        )
        if world.is_main:
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, f"{out}/update.safetensors")
        names = [[group.prompt.text, group.group, member] for group in groups for member in range(group.size)]
        return {"names": world.gather(names[drawn.mine]), "metrics": metrics, "held": held(parts.policy.model.network)}


def perturb(network: torch.nn.Module) -> None:
    """Move the adapters off their start, where half of the gradient vanishes; the same for every sharding."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    noise = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(network).values():
        moved = full_tensor(parameter) + 0.02 * torch.randn(parameter.shape, generator=noise)
        if isinstance(parameter, DTensor):
            moved = distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        local(parameter).copy_(moved)


def held(network: torch.nn.Module) -> int:
    """Numbers of parameters that this process holds."""
    return sum(local(parameter).numel() for parameter in network.parameters())


def replicas_that_differ(recipe: str, *overrides: str) -> None:
    """Rank 1 starts from other weights."""
    real = flashgrpo.models.network.prepare

    def other(network, train, seed, prefix):

        real(network, train, seed + int(os.environ["RANK"]), prefix)

    flashgrpo.models.network.prepare = other
    train(recipe, *overrides)


def fail_on_rank_1(recipe: str, *overrides: str) -> None:
    """A bug on one rank only."""

    module, real = sys.modules["flashgrpo.train"], policy_update

    def buggy(*arguments):
        if os.environ["RANK"] == "1":
            raise KeyError("planted")
        return real(*arguments)

    module.policy_update = buggy
    train(recipe, *overrides)


def examine(recipe: str, *overrides: str) -> dict:
    """The doctor."""
    return flashgrpo.doctor.examine(recipe, overrides).as_json()


def examine_with_other_replica(recipe: str) -> dict:
    """The doctor, of a run of which rank 1 has other weights."""
    real = flashgrpo.models.network.prepare
    flashgrpo.models.network.prepare = lambda network, train, seed, prefix: real(
        network, train, seed + int(os.environ["RANK"]), prefix
    )
    return examine(recipe)


def evaluate(run: str) -> dict:
    """A run's best checkpoint against its base."""
    return evaluation(run)

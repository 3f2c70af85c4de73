"""What the processes of `tests/nursery.py` do. Arguments and results are JSON.

The nursery imports this file, and so once all that its children need.
"""

import os
import signal
import sys
import time
import traceback
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import flashgrpo.distributed.world
import flashgrpo.doctor
import flashgrpo.models.network
import flashgrpo.models.wan
import flashgrpo.report
import flashgrpo.session
from flashgrpo import evaluate as evaluation
from flashgrpo import train as training
from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import LiveBytes
from flashgrpo.distributed.settings import ParallelConfig
from flashgrpo.distributed.sharding import place
from flashgrpo.distributed.world import World, full_tensor, local, process_group
from flashgrpo.errors import UserError
from flashgrpo.learning.experience import compare, draw_and_score
from flashgrpo.learning.objective import Competing
from flashgrpo.learning.optim import Optimizer
from flashgrpo.learning.settings import Credit, OptimConfig
from flashgrpo.learning.update import Work, policy_update
from flashgrpo.models.lora import trained_parameters
from flashgrpo.process import Record
from flashgrpo.processes.calls import number_of_calls
from flashgrpo.processes.flow.rollout import calls_of
from flashgrpo.processes.tokens import chunks
from flashgrpo.prompts import prompt_groups
from flashgrpo.run.checkpoint import Progress, read_into
from flashgrpo.run.checkpoint import updates as saved_updates
from flashgrpo.run.progress import Clock
from flashgrpo.run.writer import Writer
from flashgrpo.scoring.fit import check_process
from flashgrpo.scoring.rewards import Rewards
from flashgrpo.scoring.scoring import Scoring
from flashgrpo.scoring.settings import RewardConfig
from flashgrpo.types import Failed, Prompt, PromptGroup, RewardTable, Sample
from tests.fakes import Colour
from tests.filesystem import death, failing
from tests.streams import Stream, number_of

torch.set_num_threads(1)


def tell(error: BaseException) -> int:
    """Do what the command line does with an exception; returns the exit code."""
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, UserError):
        if not error.told:
            print(f"flashgrpo: {error}", file=sys.stderr)
        return 2
    traceback.print_exception(error)
    return 1


def train(recipe: str, *overrides: str) -> str:
    """Train a whole run."""
    return str(training(RunConfig.load(recipe, overrides)))


def train_in_chunks(recipe: str, *overrides: str) -> str:
    """Train a whole run of a model of tokens, with logits of four tokens at a time where there are eight kinds."""
    chunks.AT_ONCE = 2 * 8 * 4
    return train(recipe, *overrides)


def train_and_die(recipe: str, write: int) -> str:
    """Train until the run dies without a word, in place of its change of that number in the run directory."""
    with failing(Path(RunConfig.load(recipe).out), death(after=write)):
        return train(recipe)


def train_into_folders_of_their_own(recipe: str, folder: str) -> str:
    """Train with a run directory that each rank has for itself, as on machines without a shared disk."""
    return train(recipe, f"out={folder}/of{os.environ['RANK']}/run")


def stop_at_start(recipe: str, met: bool, *overrides: str) -> str:
    """Train with rank 1 stopped (SIGSTOP) before it has met the others, or once it has."""
    real = flashgrpo.distributed.world.find_store

    def find_store(rank: int, *arguments):
        if rank and not met:
            os.kill(os.getpid(), signal.SIGSTOP)
        found = real(rank, *arguments)
        if rank and met:
            os.kill(os.getpid(), signal.SIGSTOP)
        return found

    flashgrpo.distributed.world.find_store = find_store
    return train(recipe, *overrides)


def slow_train(recipe: str, seconds: float, *overrides: str) -> str:
    """Train with updates that take at least so long, so that there is time to kill the run in one."""
    before_each_update(lambda: time.sleep(seconds))
    return train(recipe, *overrides)


def train_with_bad_steps(recipe: str, bad: list[int], last: int | None, *overrides: str) -> str:
    """Train with gradients that are no numbers at some optimizer steps, and die without a word before step `last`."""
    real = Optimizer.take

    def take(optimizer):
        gradients = real(optimizer)
        if optimizer.steps == last:
            os._exit(9)
        if optimizer.steps in bad:
            local(gradients[0]).fill_(float("nan"))
        return gradients

    Optimizer.take = take
    return train(recipe, *overrides)


def before_each_update(do) -> None:
    """Call a function between the rollout and the optimizer steps of every update; the doctor's trial is none."""
    real = Assembly.learn

    def learn(parts, record, optimizer=None):
        if optimizer is None:
            do()
        return real(parts, record, optimizer)

    Assembly.learn = learn


def one_update(recipe: str, out: str, *overrides: str) -> dict:
    """Write a rollout and its gradient to files: what each rank drew, and the whole gradient of the update."""
    config = RunConfig.load(recipe, overrides)
    with process_group(config.parallel, config.model.compute_dtype) as world:
        parts = Assembly(config, world)
        perturb(parts.process.network)
        settings, optimizer = config.rollout, parts.optimizer
        groups = prompt_groups(parts.prompts, config.seed, 3, settings.prompts, settings.group_size)
        drawn = parts.draw_and_score(groups, Clock())
        named = {}
        step = optimizer.step

        def spy() -> float:
            gradients = zip(optimizer.parameters, optimizer._gradients, strict=True)
            named.update({f"gradient/{name}": full_tensor(gradient).clone() for name, gradient in gradients})
            return step()

        optimizer.step = spy
        mine = slice(drawn.first, drawn.first + len(drawn.outputs))
        advantages = torch.linspace(-1, 1, settings.prompts * settings.group_size)[mine]
        metrics = parts.learn(replace(drawn.record, advantage=advantages[drawn.record.sample]))
        named |= {f"weight/{name}": full_tensor(weight).clone() for name, weight in optimizer.weights().items()}
        tensors = {name: getattr(drawn.record.state, name) for name in ("k", "x", "x_next", "log_prob")}
        tensors |= {"latents": drawn.outputs, "rewards": drawn.rewards.values}
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, f"{out}/drawn{world.rank}.safetensors"
        )
        if world.is_main:
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, f"{out}/update.safetensors")
        names = [[group.prompt.text, group.group, member] for group in groups for member in range(group.size)]
        return {"names": world.gather(names[mine]), "metrics": metrics, "held": held(parts.process.network)}


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
    """Count the numbers of parameters that this process holds."""
    return sum(local(parameter).numel() for parameter in network.parameters())


def replicas_that_differ(recipe: str, *overrides: str) -> None:
    """Train from other weights on rank 1."""
    real = flashgrpo.models.network.prepare

    def other(network, train, seed, *more):
        real(network, train, seed + int(os.environ["RANK"]), *more)

    flashgrpo.models.network.prepare = other
    train(recipe, *overrides)


def fail_on_rank_1(recipe: str, *overrides: str) -> None:
    """Train with a bug on one rank only."""

    def fail() -> None:
        if os.environ["RANK"] == "1":
            raise KeyError("planted")

    before_each_update(fail)
    train(recipe, *overrides)


def examine(recipe: str, *overrides: str) -> dict:
    """Let the doctor examine a run."""
    return flashgrpo.doctor.examine(recipe, overrides).as_json()


def examine_with_other_replica(recipe: str) -> dict:
    """Let the doctor examine a run of which rank 1 has other weights."""
    real = flashgrpo.models.network.prepare
    flashgrpo.models.network.prepare = lambda network, train, seed, *more: real(
        network, train, seed + int(os.environ["RANK"]), *more
    )
    return examine(recipe)


def evaluate(run: str) -> dict:
    """Evaluate a run's best checkpoint against its base."""
    return evaluation(run)


def network_calls(recipe: str, *overrides: str) -> dict:
    """Count each rank's calls of each expert in a rollout, an update and an evaluation, beside what each has to do."""
    config = RunConfig.load(recipe, overrides)
    with process_group(config.parallel, config.model.compute_dtype) as world:
        parts = Assembly(config, world)
        calls = Calls(parts.process.model.experts)
        groups = parts.prompt_groups(0)
        drawn = parts.draw_and_score(groups, Clock())
        made = {"rollout": calls.taken()}
        metrics = parts.learn(parts.compare(drawn).record)
        made["update"] = calls.taken()
        parts.evaluator()
        made["evaluation"] = calls.taken()
        needed = {
            "rollout": [needed_to_draw(parts, groups)],
            "update": needed_to_learn(parts, drawn.record, world),
            "evaluation": [needed_to_evaluate(parts)],
        }
        parts.rewards.close()
        everyone = world.all_gather_json({"made": made, "needed": needed})
        return {"ranks": everyone, "metrics": metrics}


def save_and_resume(folder: str, shard: int) -> list[dict]:
    """Save a state of a few layers and read it back; what each rank copied, wrote, opened and was told meanwhile."""
    opened: list[str] = []
    sys.addaudithook(lambda event, found: event == "open" and opened.append(str(found[0])))

    def opens() -> int:
        made = sum(path.startswith(folder) for path in opened)
        opened.clear()
        return made

    with process_group(ParallelConfig(shard=shard)) as world:
        network = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(8)])
        place(network, world, None)
        optimizer = Optimizer(trained_parameters(network), OptimConfig(), world)
        state, counted = optimizer.state(), {}
        opens()
        writer = Writer(Path(folder), 2, world)
        with LiveBytes() as live:
            writer.save(state, Progress(1))
        writer.wait()
        counted |= {"copied": live.peak, "opened to save": opens()}
        read_into(Path(folder), 1, state, world)
        counted["opened to resume"] = opens()
        with LiveBytes() as live:
            assert len(world.on_main(lambda: "x" * 2**20)) == 2**20
        counted["told"] = live.peak
        counted["state"] = sum(full_tensor(t).nbytes for named in state.values() for t in named.values())
        return world.all_gather_json(counted)


def learn_from_branches(folder: str, parallel: dict, updates: int, dies: bool) -> dict:
    """Learn from branches that compete, saving each update; ranks share groups of three and an anchor.

    Args:
        dies: by SIGKILL on the last rank in the last update, between its two passes.
    """
    config, objective = OptimConfig(lr=0.05, weight_decay=0.0, passes=2), Competing(tau=0.2, kl_coef=0.1)
    with process_group(ParallelConfig(**parallel)) as world:
        process = Stream(True, micro_batch=3, prompts=3, group_size=3)
        # it draws: calls of the network in its drawing are not those of others
        whole = Stream(True, micro_batch=3, prompts=3, group_size=3)
        place(process.network, world, None)
        process.model.base = {name: weight.detach().clone() for name, weight in process.network.named_parameters()}
        optimizer = Optimizer(trained_parameters(process.network), config, world)
        state, done = optimizer.state(), max(saved_updates(Path(folder)), default=0)
        if done:
            read_into(Path(folder), done, state, world)
            optimizer.restored(state)
        for update in range(done, updates):
            for name, weight in whole.network.named_parameters():
                weight.data.copy_(full_tensor(optimizer.weights()[name]))
            record = compared_branches(whole, update, world)
            if dies and update == updates - 1 and world.rank == world.size - 1:
                process.replay = dies_with_a_gradient(process.replay)
            metrics = policy_update(process, objective, optimizer, record, config, world)
            writer = Writer(Path(folder), 2, world)
            writer.save(optimizer.state(), Progress(update + 1))
            writer.wait()
        weights = {name: full_tensor(weight).tolist() for name, weight in optimizer.weights().items()}
        return {"weights": weights, "metrics": metrics, "began": done}


def dies_with_a_gradient(replay):
    """Replay until one is to be differentiated."""

    def replay_or_die(record, columns):
        if torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGKILL)
        return replay(record, columns)

    return replay_or_die


class Redness:
    """The rewards of branches, told to all ranks: the more red, the better."""

    def __init__(self, world: World) -> None:
        self.world, self.own = world, {}

    def add(self, rows: torch.Tensor, outputs: torch.Tensor) -> None:
        self.own |= dict(zip(rows.tolist(), number_of(outputs).tolist(), strict=True))

    def table(self) -> RewardTable:
        told = self.world.gather([self.own[row] for row in sorted(self.own)])
        values = torch.tensor([value for rank in told for value in rank]).double()
        return RewardTable(("red",), values, torch.ones(1, dtype=torch.float64))


def compared_branches(process: Stream, update: int, world: World) -> Record:
    """Draw this rank's part of three groups of three branches and an anchor, and compare them with it."""
    texts, credit = ("wall", "door", "rose"), Credit(baseline="anchor", std="group-and-anchor")
    groups = [PromptGroup(update, number, Prompt(text, {}), 3, anchored=True) for number, text in enumerate(texts)]
    drawn = draw_and_score(process, Redness(world), groups, 0, world, lambda phase: nullcontext(), 2)
    return compare(drawn, process.channels, credit, world).record


def no_clips(view, number):
    raise AssertionError("rewards look at whole samples")


def score_texts_for_others(total: int, micro_batch: int, parallel: dict) -> list[float]:
    """Score samples that are texts, each worth the number that it names."""
    with process_group(ParallelConfig(**parallel)) as world:
        rewards = Rewards({"value": RewardConfig(call="tests.jobs:named")})
        rewards.load(world)
        scoring = Scoring(
            rewards, numbered, no_clips, world, [Prompt("a", {})] * total, watched=True, micro_batch=micro_batch
        )
        own = world.share(total)
        scoring.add(torch.arange(len(own)), torch.arange(own.start, own.stop).view(-1, 1))
        table = scoring.table()
        rewards.close()
        return table.values[:, 0].tolist()


class Ringing(Colour):
    """Videos whose sound is the number that they were drawn as, a wave of 8 samples in two channels."""

    sample_rate = 8

    def sound(self, outputs):
        return outputs[:, :1, None].expand(-1, 2, 8).contiguous()


def heard(latents: object, prompts: list[str], audio: torch.Tensor, sample_rate: int, **columns: list) -> torch.Tensor:
    assert audio.shape[1:] == (2, sample_rate)
    return audio[:, 0, 0]


heard.hears = True


def score_sounds_for_others(total: int, micro_batch: int, parallel: dict) -> list[float]:
    """Score samples by their sound, each worth its number."""
    with process_group(ParallelConfig(**parallel)) as world:
        rewards, process = Rewards({"value": RewardConfig(call="tests.jobs:heard")}), Ringing()
        check_process(rewards, process)
        rewards.load(world)
        parts = rewards, process.media, no_clips, world, [Prompt("a", {})] * total, False
        scoring = Scoring(*parts, micro_batch, sound=process.sound)
        own = world.share(total)
        scoring.add(torch.arange(len(own)), torch.arange(own.start, own.stop).float().view(-1, 1).expand(-1, 3))
        table = scoring.table()
        rewards.close()
        return table.values[:, 0].tolist()


def numbered(tokens: torch.Tensor, frames: int | None = None) -> list[str]:
    texts = ["é" * number + f" {number}" for number in tokens[:, 0].tolist()]
    return [Failed(-5.0) if text.endswith(" 3") else text for text in texts]


def named(texts: list[str], prompts: list[str], **columns: list) -> list[float]:
    numbers = [int(text.split()[-1]) if text else 0 for text in texts]
    assert [text.count("é") for text in texts] == numbers
    return [float(number) for number in numbers]


def score_for_others(total: int, micro_batch: int, parallel: dict) -> list[dict]:
    """Score samples of which each is worth its number; what each rank's reward saw in its calls, and what it held."""
    with process_group(ParallelConfig(**parallel)) as world:
        rewards = Rewards({"value": RewardConfig(call="tests.jobs:value", args={"seen": (seen := [])})})
        rewards.load(world)
        prompts = [Prompt(f"video {number}", {}) for number in range(total)]
        scoring = Scoring(rewards, grey, no_clips, world, prompts, watched=True, micro_batch=micro_batch)
        own = world.share(total)
        with LiveBytes() as live:
            for rows in torch.arange(len(own)).flip(0).split(micro_batch):  # in any order
                scoring.add(rows, (rows + own.start).float().view(-1, 1, 1, 1, 1))
            table = scoring.table()
        rewards.close()
        assert table.values[:, 0].tolist() == list(range(total))
        return world.all_gather_json({"seen": seen, "held": live.peak / VIDEO.numel() / 4})


VIDEO = torch.ones(4, 3, 64, 64)


def grey(latents: torch.Tensor, frames: int | None = None) -> torch.Tensor:
    return latents * VIDEO


def value(videos: torch.Tensor, prompts: list[str], seen: list[int], **columns: list) -> torch.Tensor:
    seen.append(len(videos))
    return videos[:, 0, 0, 0, 0]


class Calls:
    """Counts the calls of each expert by forward hooks."""

    def __init__(self, experts: dict[str, torch.nn.Module]) -> None:
        self._made: Counter[str] = Counter()
        for name, expert in experts.items():
            expert.register_forward_hook(lambda *_, name=name: self._made.update([name]))

    def taken(self) -> dict[str, int]:
        """Return the calls since the last time."""
        made, self._made = dict(self._made), Counter()
        return made


def by_expert(parts: Assembly, counts: Counter) -> dict[str, int]:
    """Return calls by the names of the experts, given by their modules."""
    return {name: counts[expert] for name, expert in parts.process.model.experts.items()}


def needed_to_draw(parts: Assembly, groups: list) -> dict[str, int]:
    """Count the calls that this rank's own samples of an update need."""
    process, samples = parts.process, [Sample(group, member) for group in groups for member in range(group.size)]
    counts: Counter = Counter()
    for batch in process.source.plan(samples[parts.world.slice(len(samples))], parts.config.seed):
        counts.update(calls_of(batch, process.stage, process.micro_batch))
    return by_expert(parts, counts)


def needed_to_learn(parts: Assembly, record: Record, world: World) -> list[dict[str, int]]:
    """Count the calls that this rank's own units need each time that ranks meet: at a step, or at a slot of it."""
    process, optim, needed = parts.process, parts.config.optim, []
    passes = 1 + len(parts.objective.columns)  # a forward of the base model for the KL
    for batch in Work.of(process, record, world).optimizer_steps(optim):
        slots = sorted(set(batch.slot.tolist()))
        for met in [[slot] for slot in slots] if optim.grad_norm_by_step else [slots]:
            counts: Counter = Counter()
            for slot in met:
                counts[process.stage(slot)] += passes * len(list(batch.micro_batches(record, [slot])))
            needed.append(by_expert(parts, counts))
    return needed


def needed_to_evaluate(parts: Assembly) -> dict[str, int]:
    """Count the calls that this rank's own held-out samples need."""
    process, settings = parts.process, parts.config.evaluation
    own = len(parts.world.share(len(parts.heldout) * settings.samples_per_prompt))
    timesteps = process.model.grid(settings.num_steps).timesteps.tolist()
    steps = Counter(process.model.expert(timestep) for timestep in timesteps)
    batches = number_of_calls(own, parts.config.rollout.micro_batch)
    return by_expert(parts, Counter({expert: batches * count for expert, count in steps.items()}))


def first_gradients() -> dict:
    """See `tests/processes/flow/double.py`."""
    from tests.processes.flow import double

    return double.first_gradients()

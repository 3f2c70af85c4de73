"""Programs of a language model: `processes/programs`."""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import highest
from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.kinds import flow
from flashgrpo.models.load import META, Say
from flashgrpo.process import Cost, Process
from flashgrpo.processes.programs.outputs import HEAD, LONGEST
from flashgrpo.processes.programs.phases import Cut
from flashgrpo.processes.programs.process import ProgramProcess, most
from flashgrpo.processes.programs.settings import CallTokens, ProgramRollout, ProgramRuns, ProgramSampling
from flashgrpo.scoring.loading import load_function, told
from flashgrpo.seeds import Name
from flashgrpo.types import Media, Prompt


class Shown:
    """The environment of a program that writes prompts: another recipe's model, which shows what they lead to."""

    def __init__(self, process: Process, num_steps: int | None) -> None:
        self.process, self.num_steps = process, num_steps
        process.network.requires_grad_(False)

    @torch.no_grad()
    def show(self, texts: Sequence[str], names: Sequence[Name], frames: int | None) -> Media:
        """Return videos or images of texts, each drawn by the random numbers of its name."""
        prompts = [Prompt(text, {}) for text in texts]
        outputs = self.process.sample(prompts, names, lambda rows, drawn: None, self.num_steps)
        return self.process.media(outputs, frames)


def make_process(config: RunConfig, world: World, prompts: Sequence[Prompt], say: Say | None = None) -> ProgramProcess:
    """Load the model of a run, with the program that calls it; see `Kind`."""
    from flashgrpo.models.causal_lm import CausalLm  # loads transformers' models: seconds

    rollout = _rollout(config)
    program = load_function(rollout.program, "rollout.program")
    cut = _explained(load_function(rollout.cut, "rollout.cut"), "rollout.cut") if rollout.cut else None
    environment = _environment(rollout, config, world, say) if rollout.environment else None
    keep_reference = config.algorithm.objective.needs_reference
    model = CausalLm(config.model, world, config.seed, keep_reference, rollout.adapter_names)
    return _process(config, model, world, program, environment, cut)


def _explained(function: Cut, key: str) -> Cut:
    """Return the same function; what it raises is one sentence."""

    def call(text: str) -> Sequence[int]:
        with told(key):
            return function(text)

    return call


def _environments_config(rollout: ProgramRollout) -> RunConfig:
    """Return the recipe of the environment, with the guidance that it is to have."""
    other = RunConfig.load(str(rollout.environment))
    if other.rollout.kind != "flow":
        raise UserError(
            f"rollout.environment: {rollout.environment} is a recipe of {other.rollout.kind}; name one of a flow model"
        )
    if rollout.environment_guidance is None:
        return other
    guidance = {"guidance_scale": rollout.environment_guidance, "guidance_scale_2": None}
    return other.model_copy(update={"evaluation": other.evaluation.model_copy(update=guidance)})


def _environment(rollout: ProgramRollout, config: RunConfig, world: World, say: Say | None) -> Shown:
    """Load the model of another recipe, each process its own copy; its weights stay as they are."""
    other = _environments_config(rollout)
    model = other.model.model_copy(update={"condition_cache": config.model.condition_cache})
    process = flow.make_process(other.model_copy(update={"model": model}), World(world.device), [], say)
    return Shown(process, rollout.environment_steps)


def _process(
    config: RunConfig,
    model: Any,
    world: World,
    program: Any,
    environment: Shown | None = None,
    cut: Cut | None = None,
) -> ProgramProcess:
    rollout, sampling = _rollout(config), config.evaluation
    assert isinstance(sampling, ProgramSampling)
    explain = partial(told, "rollout.program")
    size, chosen = config.optim.micro_batch, _chosen(config)
    try:
        return ProgramProcess(model, program, *chosen, rollout, sampling, size, world, explain, environment, cut)
    except ValueError as error:
        raise UserError(str(error)) from error


def planned_cost(config: RunConfig, update: int) -> Cost:
    """Return what an update costs at most: as many calls as a run may make, each as long as it may be."""
    forwards, units = most(_rollout(config), config.model.length or 1)
    columns = config.algorithm.objective.columns
    each = 3 + config.model.gradient_checkpointing + sum(name in columns for name in ("kl", "kl_average"))
    return Cost(forwards + (units if config.uses > 1 else 0), units * config.optim.passes * each)


class ProgramMemory:
    """What the model of a program takes, counted on its full size without weights; see `Memory`."""

    def __init__(self, config: RunConfig) -> None:
        from flashgrpo.models.causal_lm import CausalLm

        self._config, self._rollout = config, _rollout(config)
        self._explore = _chosen(config)[0]
        whole = config.model.plain().model_copy(update={"random_init": True})
        self._model = CausalLm(whole, World(META), 0, adapters=self._rollout.adapter_names)
        self.network: nn.Module = self._model.network
        self.networks: Sequence[nn.Module] = [self.network]
        self.decoder: nn.Module = nn.Module()
        self._replay = cache(self._count_replay)
        other = _environments_config(self._rollout) if self._rollout.environment else None
        self._environment = None if other is None else flow.FlowMemory(other)

    @property
    def further_weights(self) -> int:
        """Bytes of an environment's model, which stays beside the language model."""
        parts = [*self._environment.networks, self._environment.decoder] if self._environment else []
        return sum(tensor.nbytes for part in parts for tensor in part.parameters())

    @property
    def sample(self) -> float:
        """Bytes of what a run comes to."""
        return float(HEAD + LONGEST)

    def kept(self, samples: int) -> Mapping[str, int]:
        """Count the calls that runs may make: ids, phases, the decoder's numbers, and candidates."""
        model, explore = self._model, self._explore
        vocabulary = model.vocabulary
        candidates = min(explore.top_k or vocabulary, vocabulary)
        truncates = explore.top_p < 1 or candidates < vocabulary
        call = 8 * (model.width + model.length) + 12 * model.length + 4 * model.length * candidates * truncates
        if "kl_old" in self._config.algorithm.objective.columns and self._config.uses > 1:
            call += 4 * model.length * candidates
        return {"samples": round(samples * (self.sample + self._rollout.max_calls * call))}

    def drawing(self, samples: int) -> int:
        """Count a batch of calls: the prompts' forward, and the cache of keys and values beside a token's."""
        judged = self._config.uses > 1 and self._replay(self._config.optim.micro_batch, False)
        return max(self._batch(), int(judged))

    def update(self, samples: int) -> int:
        """Count a replay of a micro-batch, filled up, with its backward pass."""
        return self._replay(self._config.optim.micro_batch, True)

    def sampling(self, samples: int) -> int:
        """Count a batch of calls of an evaluation."""
        return self._batch()

    def decoding(self, samples: int) -> int:
        """Count what an environment takes to draw and decode a micro-batch; texts are what they are."""
        rows = min(samples, self._rollout.decode_micro_batch)
        return max(self._environment.sampling(rows), self._environment.decoding(rows)) if self._environment else 0

    def _batch(self) -> int:
        model, rows = self._model, self._rollout.micro_batch
        ids = torch.zeros(rows, model.width, dtype=torch.int64, device=META)
        count = torch.ones(rows, dtype=torch.int64, device=META)
        settings: Any = self.network.config
        heads = getattr(settings, "num_key_value_heads", None) or settings.num_attention_heads
        size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        each = 2 * settings.num_hidden_layers * heads * size * torch.finfo(self._model.dtype).bits // 8
        noise = 3 * 8 * rows * model.vocabulary
        begun = highest(lambda: self._begin(ids, count), [*self.network.parameters(), ids, count], False)
        return int(begun + rows * (model.width + model.length) * each + noise)

    @torch.no_grad()
    def _begin(self, ids: Tensor, count: Tensor) -> None:
        self._model.begin(ids, count)

    def _count_replay(self, rows: int, backward: bool) -> int:
        model = self._model
        ids = torch.zeros(rows, model.width + model.length, dtype=torch.int64, device=META)
        count = torch.ones(rows, dtype=torch.int64, device=META)

        def call() -> None:
            log_p = (model.logits(ids, count) / self._explore.temperature).log_softmax(-1)
            if backward:
                log_p[..., 0].sum().backward()

        return highest(call, [*self.network.parameters(), *self.network.buffers(), ids, count], True)


memory = ProgramMemory


def _rollout(config: RunConfig) -> ProgramRollout:
    assert isinstance(config.rollout, ProgramRollout)
    return config.rollout


def _chosen(config: RunConfig) -> tuple[ProgramRuns, CallTokens]:
    explore, score = config.algorithm.explore, config.algorithm.score
    assert isinstance(explore, ProgramRuns)
    assert isinstance(score, CallTokens)
    return explore, score

"""Models that fill masks: `processes/tokens/masked`."""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import nn

from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import highest, size_of
from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.models.load import META, Say
from flashgrpo.models.load_tokens import load_token_model, weightless_token_model
from flashgrpo.models.token_network import TokenNetwork
from flashgrpo.process import Cost
from flashgrpo.processes.choices import entropy, log_probs
from flashgrpo.processes.tokens.guided import GuidedLogits
from flashgrpo.processes.tokens.masked.cost import update_cost
from flashgrpo.processes.tokens.masked.process import MaskedProcess
from flashgrpo.processes.tokens.masked.settings import (
    MaskedRollout,
    MaskedSampling,
    UnmaskedSteps,
    Unmasking,
)
from flashgrpo.processes.tokens.masked.unmasking import Unmasking as Drawing
from flashgrpo.types import Condition, Prompt


def make_process(config: RunConfig, world: World, prompts: Sequence[Prompt], say: Say | None = None) -> MaskedProcess:
    """Load the model of a run, with the process that draws from it; see `Kind`."""
    reference = config.algorithm.objective.needs_reference
    return _process(config, load_token_model(config.model, world, config.seed, prompts, reference, say), world)


def _process(config: RunConfig, model: TokenNetwork, world: World) -> MaskedProcess:
    rollout, sampling = config.rollout, config.evaluation
    assert isinstance(rollout, MaskedRollout)
    assert isinstance(sampling, MaskedSampling)
    try:
        return MaskedProcess(model, *_chosen(config), rollout, sampling, config.optim.micro_batch, world)
    except ValueError as error:
        raise UserError(str(error)) from error


def planned_cost(config: RunConfig, update: int) -> Cost:
    """Return what an update will cost at most; texts that end early cost less."""
    assert isinstance(config.rollout, MaskedRollout)
    recomputes, columns = config.model.gradient_checkpointing, config.algorithm.objective.columns
    return update_cost(_chosen(config)[1], config.rollout, config.optim.passes, columns, config.uses, recomputes)


class MaskedMemory:
    """What a model that fills masks takes, counted on its full size without weights; see `Memory`."""

    further_weights = 0

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.rollout, MaskedRollout)
        self._config, self._rollout = config, config.rollout
        self._explore, self._score = _chosen(config)
        self._model = weightless_token_model(config.model)
        self.network: nn.Module = self._model.network
        self.networks: Sequence[nn.Module] = [self.network]
        self.decoder: nn.Module = self._model.decoder
        self._process = _process(config, self._model, World(META))
        vocabulary, explore = self._model.vocabulary, self._explore
        self._truncates = explore.top_p < 1 or (explore.top_k or vocabulary) < vocabulary
        self._call = cache(self._count_call)

    @property
    def sample(self) -> float:
        """Bytes of a sample that has been drawn: its tokens and its condition."""
        return 8.0 * self._model.length + size_of(self._model.nothing().tensors.values())

    def kept(self, samples: int) -> Mapping[str, int]:
        """Count tokens and candidates of samples, and the log-probabilities that a column compares with."""
        candidates = min(self._explore.top_k or self._model.vocabulary, self._model.vocabulary)
        bytes_ = self.sample + 4 * self._model.length * candidates * self._truncates
        if "kl_old" in self._config.algorithm.objective.columns and self._config.uses > 1:
            bytes_ += 4 * self._score.count(self._rollout.num_steps) * self._process.plan.widest * candidates
        return {"samples": round(samples * bytes_)}

    def drawing(self, samples: int) -> int:
        """Count a call of the rollout on a micro-batch of these, which is always filled up."""
        own = self._process.unmasking
        drawn = self._call(self._rollout.micro_batch, own, self._process.logits)
        judged = self._config.uses > 1 and self._call(self._config.optim.micro_batch, None, self._process.logits, 1)
        return max(drawn, judged)

    def update(self, samples: int) -> int:
        """Count a replay of a micro-batch, filled up, with its backward pass."""
        return self._call(self._config.optim.micro_batch, None, self._process.logits, 2)

    def sampling(self, samples: int) -> int:
        """Count a call of an evaluation on a micro-batch, filled up."""
        return self._call(self._rollout.micro_batch, *self._process.sampler())

    def decoding(self, samples: int) -> int:
        """Count decoding a micro-batch."""
        rows = min(samples, self._rollout.decode_micro_batch)
        return self._model.decoding_bytes(rows)

    def _count_call(self, rows: int, draws: Drawing | None, logits: GuidedLogits, graph: int = 0) -> int:
        """Count the logits of places of each row, and what is drawn from or scored.

        Args:
            draws: how a block is drawn; None where the places of a step are scored.
            graph: 1 with gradients enabled, 2 with the backward pass.
        """
        model, explore = self._model, self._explore
        condition = Condition(
            {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in model.nothing().tensors.items()}
        )
        tokens = torch.zeros(rows, model.length, dtype=torch.int64, device=META)
        places = self._process.plan.widest if draws is None else draws.plan.block
        at = torch.zeros(rows, places, dtype=torch.int64, device=META)
        candidates = min(explore.top_k or model.vocabulary, model.vocabulary)
        kept = torch.zeros(rows, places, candidates, dtype=torch.int32, device=META) if self._truncates else None

        def call() -> None:
            found = logits(tokens, at, condition)
            if draws is not None:
                log_p, _ = draws.candidates(found)
                if draws.measures or draws.order == "entropy":
                    entropy(log_p)
                if draws.temperature:
                    log_p + torch.zeros_like(log_p)
                return
            log_p = log_probs(found, explore.temperature, kept)
            if graph > 1:
                log_p.sum().backward()

        outside = [*self.network.parameters(), *self.network.buffers(), tokens, at, *condition.tensors.values()]
        return highest(call, outside if kept is None else [*outside, kept], graph > 0)


memory = MaskedMemory


def _chosen(config: RunConfig) -> tuple[Unmasking, UnmaskedSteps]:
    explore, score = config.algorithm.explore, config.algorithm.score
    assert isinstance(explore, Unmasking)
    assert isinstance(score, UnmaskedSteps)
    return explore, score

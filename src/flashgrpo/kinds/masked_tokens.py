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
from flashgrpo.process import Cost
from flashgrpo.processes.tokens.choices import log_probs, truncated
from flashgrpo.processes.tokens.guided import GuidedLogits
from flashgrpo.processes.tokens.masked.cost import update_cost
from flashgrpo.processes.tokens.masked.process import MaskedProcess
from flashgrpo.processes.tokens.masked.settings import (
    MaskedRollout,
    MaskedSampling,
    UnmaskedSteps,
    Unmasking,
)
from flashgrpo.types import Condition, Prompt


def make_process(config: RunConfig, world: World, prompts: Sequence[Prompt], say: Say | None = None) -> MaskedProcess:
    """Load the model of a run, with the process that draws from it; see `Kind`."""
    rollout, sampling = config.rollout, config.evaluation
    assert isinstance(rollout, MaskedRollout)
    assert isinstance(sampling, MaskedSampling)
    reference = config.algorithm.objective.needs_reference
    model = load_token_model(config.model, world, config.seed, prompts, reference, say)
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
        try:
            self._plan = self._rollout.plan(self._model.length)
        except ValueError as error:
            raise UserError(str(error)) from error
        self._call = cache(self._count_call)

    @property
    def sample(self) -> float:
        """Bytes of a sample that has been drawn: its tokens and its condition."""
        return 8.0 * self._model.length + size_of(self._model.nothing().tensors.values())

    def kept(self, samples: int) -> Mapping[str, int]:
        """Count tokens and candidates of samples, and the log-probabilities that a column compares with."""
        candidates = min(self._explore.top_k or self._model.vocabulary, self._model.vocabulary)
        truncates = self._explore.top_p < 1 or candidates < self._model.vocabulary
        bytes_ = self.sample + 4 * self._model.length * candidates * truncates
        if "kl_old" in self._config.algorithm.objective.columns and self._config.uses > 1:
            bytes_ += 4 * self._score.count(self._rollout.num_steps) * self._plan.widest * candidates
        return {"samples": round(samples * bytes_)}

    def drawing(self, samples: int) -> int:
        """Count a call of the rollout on a micro-batch of these."""
        judged = self._config.uses > 1 and self._call(self._of_update(samples), self._plan.widest, graph=True)
        return max(self.sampling(samples), judged)

    def update(self, samples: int) -> int:
        """Count a replay of a micro-batch with its backward pass."""
        return self._call(self._of_update(samples), self._plan.widest, graph=True, backward=True)

    def sampling(self, samples: int) -> int:
        """Count a call without gradients on a micro-batch, which is always filled up."""
        return self._call(self._rollout.micro_batch, self._plan.block)

    def decoding(self, samples: int) -> int:
        """Count decoding a micro-batch."""
        rows = min(samples, self._rollout.decode_micro_batch)
        return self._model.decoding_bytes(rows)

    def _of_update(self, samples: int) -> int:
        return self._config.optim.micro_batch  # filled up, however few there are

    def _count_call(self, rows: int, places: int, graph: bool = False, backward: bool = False) -> int:
        """Count the logits of so many places of each row, and what is drawn from or differentiated."""
        model, explore = self._model, self._explore
        condition = Condition(
            {name: tensor.expand(rows, *tensor.shape[1:]) for name, tensor in model.nothing().tensors.items()}
        )
        tokens = torch.zeros(rows, model.length, dtype=torch.int64, device=META)
        at = torch.zeros(rows, places, dtype=torch.int64, device=META)

        def call() -> None:
            logits = GuidedLogits(model, self._rollout.guidance_scale)(tokens, at, condition)
            log_p, kept = truncated(logits.detach(), explore.temperature, explore.top_k, explore.top_p)
            if graph:
                log_p = log_probs(logits, explore.temperature, kept)
            if backward:
                log_p.sum().backward()

        outside = [*self.network.parameters(), tokens, at, *condition.tensors.values()]
        return highest(call, outside, graph)


memory = MaskedMemory


def _chosen(config: RunConfig) -> tuple[Unmasking, UnmaskedSteps]:
    explore, score = config.algorithm.explore, config.algorithm.score
    assert isinstance(explore, Unmasking)
    assert isinstance(score, UnmaskedSteps)
    return explore, score

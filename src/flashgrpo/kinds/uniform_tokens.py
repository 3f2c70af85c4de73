"""Models of uniform discrete diffusion: `processes/tokens/uniform`."""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from flashgrpo.config import RunConfig
from flashgrpo.distributed.live import highest, size_of
from flashgrpo.distributed.world import World
from flashgrpo.errors import UserError
from flashgrpo.models.load import META, Say
from flashgrpo.models.load_tokens import load_token_model, weightless_token_model
from flashgrpo.models.token_network import TokenNetwork
from flashgrpo.process import Cost
from flashgrpo.processes.tokens.uniform.cost import update_cost
from flashgrpo.processes.tokens.uniform.model import UniformModel
from flashgrpo.processes.tokens.uniform.process import UniformTokensProcess
from flashgrpo.processes.tokens.uniform.settings import TokensAtTimes, UniformRollout, UniformSampling, UniformTokens
from flashgrpo.processes.tokens.uniform.state import TokensState
from flashgrpo.types import Condition, Prompt


def make_process(
    config: RunConfig, world: World, prompts: Sequence[Prompt], say: Say | None = None
) -> UniformTokensProcess:
    """Load the model of a run, with the process that draws from it; see `Kind`."""
    reference = config.algorithm.objective.needs_reference
    return _process(config, load_token_model(config.model, world, config.seed, prompts, reference, say), world)


def planned_cost(config: RunConfig, update: int) -> Cost:
    """Return what an update will cost."""
    rollout, score = config.rollout, config.algorithm.score
    assert isinstance(rollout, UniformRollout)
    assert isinstance(score, TokensAtTimes)
    columns, recomputes = config.algorithm.objective.columns, config.model.gradient_checkpointing
    return update_cost(score, rollout, config.optim.passes, columns, config.uses, recomputes)


class UniformMemory:
    """What a model of uniform tokens takes, counted on its full size without weights; see `Memory`."""

    further_weights = 0

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.rollout, UniformRollout)
        self._config, self._rollout = config, config.rollout
        self._model = weightless_token_model(config.model, config.algorithm.objective.needs_reference)
        self._process = _process(config, self._model, World(META))
        self.network: nn.Module = self._model.network
        self.networks: Sequence[nn.Module] = [self.network]
        self.decoder: nn.Module = self._model.decoder
        self._draws, self._replays = cache(self._count_draw), cache(self._count_replay)

    @property
    def sample(self) -> float:
        """Bytes of a sample that has been drawn: its tokens and its condition."""
        return 8.0 * self._model.length + size_of(self._model.nothing().tensors.values())

    def kept(self, samples: int) -> Mapping[str, int]:
        """Count samples, and the tokens that are shown and scored at each trained time."""
        units = self._process.score.times
        return {"samples": round(samples * (self.sample + 2 * units * 8 * self._model.length))}

    def drawing(self, samples: int) -> int:
        """Count a step of the rollout on a micro-batch, or a score by the weights that draw."""
        return max(self.sampling(samples), self._replays(backward=False) if self._config.uses > 1 else 0)

    def update(self, samples: int) -> int:
        """Count a replay of a micro-batch, which is always filled up, with its backward pass."""
        return self._replays(backward=True)

    def sampling(self, samples: int) -> int:
        """Count a step of the sampler on a micro-batch, which is always filled up."""
        return self._draws()

    def decoding(self, samples: int) -> int:
        """Count decoding a micro-batch."""
        return self._model.decoding_bytes(min(samples, self._rollout.decode_micro_batch))

    def _rows(self, count: int) -> tuple[Tensor, Condition]:
        row = self._model.nothing().tensors
        condition = Condition({name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in row.items()})
        return torch.zeros(count, self._model.length, dtype=torch.int64, device=META), condition

    def _count_draw(self) -> int:
        """Count a guess, and the jumps towards one."""
        x, condition = self._rows(self._rollout.micro_batch)
        uniform, sampler = x.double(), self._process.sampler
        outside = [*self.network.parameters(), x, uniform, *condition.tensors.values()]
        guess = highest(lambda: sampler.guess(x, condition, uniform), outside)
        return max(guess, highest(lambda: sampler.jump(x, x, 0.1, 0.2, "difference", uniform, uniform), outside))

    def _count_replay(self, backward: bool) -> int:
        x, condition = self._rows(self._config.optim.micro_batch)
        every = torch.arange(len(x))
        state = TokensState(every, torch.zeros_like(every), x, x, condition)
        columns = self._config.algorithm.objective.columns if backward else ()

        def call() -> None:
            score, others = self._process.scored(state, columns)
            if backward:
                sum([score, *others.values()]).sum().backward()  # type: ignore[union-attr]

        return highest(call, [*self.network.parameters(), x, *condition.tensors.values()], graph=True)


memory = UniformMemory


def _process(config: RunConfig, model: TokenNetwork, world: World) -> UniformTokensProcess:
    algorithm, rollout, sampling = config.algorithm, config.rollout, config.evaluation
    assert isinstance(algorithm.explore, UniformTokens)
    assert isinstance(algorithm.score, TokensAtTimes)
    assert isinstance(rollout, UniformRollout)
    assert isinstance(sampling, UniformSampling)
    if not isinstance(model, UniformModel):
        raise UserError(
            f"model.path: {config.model.path} was not trained on uniform noise, which algorithm.explore.kind "
            "uniform-tokens draws from; URSA's checkpoints were"
        )
    chosen = algorithm.explore, algorithm.score, rollout, sampling
    try:
        return UniformTokensProcess(model, *chosen, config.optim.micro_batch, world)
    except ValueError as error:
        raise UserError(str(error)) from error

"""The process of uniform tokens: random tokens that jump towards the network's guesses, scored at some times."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.process import Columns, Cost, Finding, OnDrawn, Outputs, Record
from flashgrpo.processes.calls import by_other_weights, fixed_batches
from flashgrpo.processes.of_model import ModelProcess
from flashgrpo.processes.tokens.model import Tokens
from flashgrpo.processes.tokens.uniform.checks import uniform_checks
from flashgrpo.processes.tokens.uniform.cost import update_cost
from flashgrpo.processes.tokens.uniform.model import UniformModel
from flashgrpo.processes.tokens.uniform.path import make_path
from flashgrpo.processes.tokens.uniform.sampler import Sampler, Step
from flashgrpo.processes.tokens.uniform.scores import log_probs, scores
from flashgrpo.processes.tokens.uniform.settings import (
    TokensAtTimes,
    UniformRollout,
    UniformSampling,
    UniformTokens,
    grid,
)
from flashgrpo.processes.tokens.uniform.state import TokensState
from flashgrpo.seeds import Name
from flashgrpo.types import Condition, Media, Prompt, Sample, index_rows


class UniformTokensProcess(ModelProcess[UniformModel]):
    """A network of uniform discrete diffusion as a `Process`.

    Attributes:
        path: how tokens are noised.
        times: of the rollout's steps, and their end.
        micro_batch: units replayed at once, and rows of every call of the network whose result is judged.
    """

    def __init__(
        self,
        model: UniformModel,
        explore: UniformTokens,
        score: TokensAtTimes,
        rollout: UniformRollout,
        sampling: UniformSampling,
        micro_batch: int,
        world: World,
    ) -> None:
        super().__init__(model, micro_batch, world)
        self.explore, self.score = explore, score
        self.rollout, self.sampling = rollout, sampling
        self.path = make_path(rollout.path or model.path, model.vocabulary, model.codes)
        self.sampler = Sampler(model, self.path, rollout.micro_batch, world)
        self.times = self._grid(rollout.num_steps)

    def _grid(self, num_steps: int) -> list[float]:
        return grid(num_steps, self.model.shift if self.rollout.shift is None else self.rollout.shift)

    # Drawing

    @torch.no_grad()
    def draw(
        self, samples: Sequence[Sample], seed: int, on_drawn: OnDrawn, uses: int = 1, columns: Sequence[str] = ()
    ) -> tuple[Outputs, Record]:
        """Draw samples, and record what is scored of them: each at the trained times of its group; see `Process`."""
        names = [(seed, *sample.name) for sample in samples]
        condition = self.encode([sample.group.prompt for sample in samples])
        steps: list[Step] = []
        keep = steps.append if self.score.follows_sampler else None
        tokens = self.sampler.walk(condition, names, self.times, self.rollout.jumps, on_drawn, keep)
        state = self._units(samples, seed, tokens, condition, steps)
        group = torch.tensor([sample.group.group for sample in samples], dtype=torch.int64)
        unit, weight = torch.arange(len(state)), torch.ones(len(state), device=self.device)
        record = Record(state.k, unit, state.sample, group[state.sample], 0 * unit, weight, None, state)
        return tokens, replace(record, old=self.old_scores(record)[0]) if uses > 1 else record

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], names: Sequence[Name], on_drawn: OnDrawn, num_steps: int | None = None
    ) -> Outputs:
        """Draw on the grid of `sampling`, or of `num_steps` steps, by the numbers of each name; see `Process`."""
        times = self._grid(num_steps or self.sampling.num_steps)
        jumps = self.sampling.jumps or self.rollout.jumps
        return self.sampler.walk(self.encode(prompts), names, times, jumps, on_drawn)

    def _units(
        self,
        samples: Sequence[Sample],
        seed: int,
        tokens: Tokens,
        condition: Condition,
        steps: Sequence[Step],
    ) -> TokensState:
        """Return what is scored of the samples, by sample, then by time."""
        trained = [self.score.steps(seed, *sample.name[:2]) for sample in samples]
        sample = torch.tensor([row for row, of in enumerate(trained) for _ in of], dtype=torch.int64)
        k = torch.tensor([step for of in trained for step in of], dtype=torch.int64)
        action = x = index_rows(tokens, sample)
        if self.score.action == "guess":
            action = _at_steps([one.guess for one in steps], steps, k, sample, action)
        if self.score.state == "sampler":
            x = _at_steps([one.x for one in steps], steps, k, sample, x)
        else:
            t = torch.tensor(self.times, dtype=torch.float64)[k]
            names = [(seed, *samples[row].name, step) for row, step in zip(sample.tolist(), k.tolist(), strict=True)]
            x = self.sampler.noised(t, x, names)
        return TokensState(sample, k, x, action, condition)

    def media(self, outputs: Outputs, frames: int | None = None) -> Media:
        """Return what rewards and the report look at."""
        return self.model.decode(outputs, frames)

    # Scoring again

    def replay(self, record: Record, columns: Sequence[str]) -> list[tuple[Float32[Tensor, " terms"], Columns]]:
        """Return the mean over tokens of the log-probability of each unit's action, and the columns asked for.

        "kl" and "kl_average" are the divergences of the categorical distributions from those of the base model and of
        the average, sums over all kinds and means over tokens.
        """
        return [self.scored(record.state, columns)]  # type: ignore[arg-type]

    def scored(self, state: TokensState, columns: Sequence[str]) -> tuple[Tensor, Columns]:
        """Score at most `micro_batch` units, filled up to so many, so that equal units have equal bits."""
        ((rows, new),) = fixed_batches(len(state), self.micro_batch)
        x, action, condition = index_rows(state.x, rows), index_rows(state.action, rows), state.conditions[rows]
        kinds = self.model.vocabulary
        others = self._by_other_weights(columns, lambda: self.model.call(x, condition, partial(log_probs, kinds)))
        read = partial(scores, kinds, action, list(others.values()))
        found = self.model.call(x, condition, read)[:new].unbind(dim=1)
        return found[0], dict(zip(others, found[1:], strict=True))

    def _by_other_weights(self, columns: Sequence[str], call: Callable[[], Tensor]) -> dict[str, Tensor]:
        return by_other_weights(columns, self.other_weights, call)

    def unfilled(self, state: TokensState) -> Float32[Tensor, " terms"]:
        """Return the scores by one call of exactly these units: what rounds otherwise in another batch."""
        read = partial(scores, self.model.vocabulary, state.action, ())
        return self.model.call(state.x, state.conditions, read)[:, 0]

    def idle(self, slot: int, columns: Sequence[str]) -> list[Tensor]:
        """Take part in the collectives of a replay, without a gradient of one's own."""
        self._by_other_weights(columns, self._call_on_nothing)
        return [self._call_on_nothing()]

    def _call_on_nothing(self) -> Tensor:
        x = torch.zeros(1, self.model.length, dtype=torch.int64, device=self.device)
        return self.model.call(x, self.model.nothing(), partial(scores, self.model.vocabulary, x, ()))

    # What it costs, whether it is sound, getting the result out

    def cost(self, seed: int, update: int, passes: int, columns: Sequence[str], uses: int = 1) -> Cost:
        """Forwards of an update; see `cost.py`."""
        return update_cost(self.score, self.rollout, passes, columns, uses, self.model.recomputes)

    def checks(self, record: Record, outputs: Outputs, seed: int, thorough: bool) -> Sequence[Finding]:
        """Whether the first step moves, what is left of a sample at its trained times, and what rounding would do."""
        return uniform_checks(self, record, thorough)


def _at_steps(tokens: Sequence[Tensor], steps: Sequence[Step], k: Tensor, sample: Tensor, none: Tensor) -> Tensor:
    """Return what samples had at steps, (U, L), of the tokens of each step of each micro-batch; `none` of no sample."""
    by_step: dict[int, list[Tensor]] = {}
    for step, of in zip(steps, tokens, strict=True):
        by_step.setdefault(step.k, []).append(of)
    whole = {step: torch.cat(parts) for step, parts in by_step.items()}
    pairs = zip(k.tolist(), sample.tolist(), strict=True)
    return torch.stack([whole[step][row] for step, row in pairs]) if steps else none

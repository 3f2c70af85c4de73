"""Masked tokens as a process: samples are unmasked step by step, and some of the steps are scored again (AGRPO)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor

from flashgrpo.distributed.world import World
from flashgrpo.process import Columns, Cost, Finding, OnDrawn, Outputs, Record
from flashgrpo.processes.calls import by_other_weights, fixed_batches, missing_calls, number_of_calls
from flashgrpo.processes.choices import divergence
from flashgrpo.processes.of_model import ModelProcess
from flashgrpo.processes.subsets import draw_units
from flashgrpo.processes.tokens.guided import GuidedLogits
from flashgrpo.processes.tokens.masked import settings
from flashgrpo.processes.tokens.masked.cost import update_cost
from flashgrpo.processes.tokens.masked.scores import StepScores, of_drawn, of_terms, state_of
from flashgrpo.processes.tokens.masked.settings import MaskedRollout, MaskedSampling, Plan, UnmaskedSteps
from flashgrpo.processes.tokens.masked.state import MaskedState
from flashgrpo.processes.tokens.masked.unmasking import Unmasked, Unmasking
from flashgrpo.processes.tokens.model import TokenModel
from flashgrpo.seeds import Name
from flashgrpo.types import Condition, Media, Prompt, Sample, to_device

LOG_P = "log_p"
"""A column for this process alone, with a row for each unit: the log-probabilities of all candidates of its places."""


class MaskedProcess(ModelProcess[TokenModel]):
    """A network that fills masks, as a `Process`: a unit is a step of a sample, a term a token that the step drew.

    The score of a token is its log-probability among the candidates that drawing had left, at the temperature of the
    drawing, given what its step saw.

    Raises:
        ValueError: blocks and steps do not fit the samples, or the network has no mask.
    """

    def __init__(
        self,
        model: TokenModel,
        explore: settings.Unmasking,
        score: UnmaskedSteps,
        rollout: MaskedRollout,
        sampling: MaskedSampling,
        micro_batch: int,
        world: World,
    ) -> None:
        super().__init__(model, micro_batch, world)
        self.explore, self.score = explore, score
        self.rollout, self.sampling = rollout, sampling
        self.logits = GuidedLogits(model, rollout.guidance_scale)
        self.plan = rollout.plan(model.length)
        self.sampler()  # refuses what cannot be drawn

    def _unmasking(self, plan: Plan, order: settings.Order, temperature: float) -> Unmasking:
        if self.model.mask is None:
            raise ValueError("this network has no mask token; masked tokens need one that was trained to fill masks")
        choice = self.explore.top_k, self.explore.top_p
        return Unmasking(plan, order, temperature, *choice, self.model.mask, self.model.end)

    def sampler(self, num_steps: int | None = None) -> tuple[Unmasking, GuidedLogits]:
        """Return how evaluations draw: as the rollout does, where `sampling` says nothing else."""
        own, rollout = self.sampling, self.rollout
        steps, block = num_steps or own.num_steps or rollout.num_steps, own.block or rollout.block
        plan = Plan.of(self.model.length, steps, block, rollout.schedule)
        temperature = self.explore.temperature if own.temperature is None else own.temperature
        guided = GuidedLogits(self.model, own.guidance_scale or rollout.guidance_scale)
        return self._unmasking(plan, own.order or self.explore.order, temperature), guided

    @property
    def unmasking(self) -> Unmasking:
        """How the samples of an update are drawn."""
        drawn = self._unmasking(self.plan, self.explore.order, self.explore.temperature)
        return replace(drawn, measures=self.score.chance == "entropy")

    @property
    def scores(self) -> StepScores:
        """What scores steps as they were drawn."""
        return StepScores(self.logits, self.explore.temperature, self.micro_batch, self.score.state == "mean-field")

    # Drawing

    @torch.no_grad()
    def draw(
        self, samples: Sequence[Sample], seed: int, on_drawn: OnDrawn, uses: int = 1, columns: Sequence[str] = ()
    ) -> tuple[Outputs, Record]:
        """Unmask samples, and draw which of their steps are scored again; see `Process`."""
        condition = self.encode([sample.group.prompt for sample in samples])
        names = [(seed, "unmask", *sample.name) for sample in samples]
        unmasked = self._unmask(self.unmasking, self.logits, names, condition, on_drawn)
        record = self._record(samples, seed, unmasked, condition)
        return unmasked.tokens, self._with_old(record, "kl_old" in columns) if uses > 1 else record

    def _unmask(
        self,
        unmasking: Unmasking,
        logits: GuidedLogits,
        names: Sequence[Name],
        condition: Condition,
        on_drawn: OnDrawn,
    ) -> Unmasked:
        """Draw all samples, `rollout.micro_batch` at a time; ranks that hold a network between them call together."""
        size, together = self.rollout.micro_batch, self.world.uses_fsdp and self.world.size > 1
        missing = missing_calls(self.world, number_of_calls(len(names), size))
        parts = []
        for rows, new in fixed_batches(len(names), size):
            part = unmasking.draw(
                partial(logits, condition=condition[rows]),
                [names[row] for row in rows.tolist()],
                self.model.length,
                self.device,
                every_step=together,
            )[:new]
            on_drawn(rows[:new], part.tokens)
            parts.append(part)
        for _ in range(missing * unmasking.plan.num_steps):
            self._on_nothing(logits)
        return Unmasked.stack(parts, self.model.length, unmasking.plan.num_steps, self.device)

    def _record(self, samples: Sequence[Sample], seed: int, unmasked: Unmasked, condition: Condition) -> Record:
        """Draw steps of each sample by its name: by sample, then by step, then by place."""
        units: list[tuple[int, int]] = []
        factors: list[float] = []
        for row, (sample, last) in enumerate(zip(samples, unmasked.steps.tolist(), strict=True)):
            chances = unmasked.entropy[row, :last].tolist() if self.score.chance == "entropy" else [1.0] * last
            for step, weight in draw_units(
                chances, self.score.steps, self.score.draw, seed, "unmasked step", *sample.name
            ):
                units.append((row, step))
                factors.append(weight)
        row, at = torch.tensor(units, dtype=torch.int64).view(-1, 2).T
        state = MaskedState.of(row, at, self.plan.widest, unmasked, condition)
        unit = torch.arange(len(units)).repeat_interleave(state.count)
        group = torch.tensor([sample.group.group for sample in samples], dtype=torch.int64)
        weights = to_device(torch.tensor(factors)[unit], self.device)
        nought = torch.zeros_like(unit)
        return Record(torch.zeros_like(at), unit, row[unit], group[row[unit]], nought, weights, None, state)

    def _with_old(self, record: Record, keep: bool) -> Record:
        """Score what was drawn by the weights that drew; `keep` also the log-probabilities of all candidates."""
        old, log_p = self.old_scores(record, LOG_P if keep else None)
        return replace(record, old=old, state=replace(state_of(record), old_log_p=log_p))

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], names: Sequence[Name], on_drawn: OnDrawn, num_steps: int | None = None
    ) -> Outputs:
        """Draw samples as evaluation does, each from the random numbers of its name."""
        unmasking, logits = self.sampler(num_steps)
        return self._unmask(unmasking, logits, names, self.encode(prompts), on_drawn).tokens

    def media(self, outputs: Outputs, frames: int | None = None) -> Media:
        """Return what rewards and the report look at."""
        return self.model.decode(outputs, frames)

    # Scoring again

    def replay(self, record: Record, columns: Sequence[str]) -> list[tuple[Float32[Tensor, " terms"], Columns]]:
        """Return the log-probability of each token, and the columns asked for.

        "kl", "kl_average" and "kl_old" are exact divergences of its place's candidates: to the base model, to the
        average and to the policy that drew. Without recorded ones the policy is the old one, too.
        """
        state = state_of(record)
        log_p = self.scores.log_p(state)
        others = by_other_weights(columns, self.other_weights, lambda: self.scores.log_p(state))
        if "kl_old" in columns:
            others["kl_old"] = log_p.detach() if state.old_log_p is None else state.old_log_p
        found = {name: of_terms(divergence(log_p, other), state) for name, other in others.items()}
        found |= {LOG_P: log_p.detach()} if LOG_P in columns else {}
        return [(of_terms(of_drawn(log_p, state), state), found)]

    def idle(self, slot: int, columns: Sequence[str]) -> list[Tensor]:
        """Take part in the collectives of a replay, without a gradient of one's own."""
        found = self._on_nothing(self.logits)
        by_other_weights(columns, self.other_weights, lambda: self._on_nothing(self.logits))
        return [found]

    def _on_nothing(self, logits: GuidedLogits) -> Tensor:
        mask = self.model.mask
        assert mask is not None
        tokens = torch.full((1, self.model.length), mask, device=self.device)
        return logits(tokens, torch.zeros(1, 1, dtype=torch.int64), self.model.nothing()).amax(-1)

    # What it costs, whether it is sound, getting the result out

    def cost(self, seed: int, update: int, passes: int, columns: Sequence[str], uses: int = 1) -> Cost:
        """Count the forwards of an update; see `cost.py`."""
        return update_cost(self.score, self.rollout, passes, columns, uses, self.model.recomputes)

    def checks(self, record: Record, outputs: Outputs, seed: int, thorough: bool) -> Sequence[Finding]:
        """Say what an order of places that depends on the policy means for the estimate."""
        if self.explore.order == "random":
            return ()
        return (
            Finding(
                "order",
                "warning",
                f"order {self.explore.order} lets the policy choose which places a step draws, and that choice is not "
                "scored: the estimate is biased; explore.order=random has no such bias",
            ),
        )

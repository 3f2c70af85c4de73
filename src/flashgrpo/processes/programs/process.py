"""Programs as a process: ordinary Python calls a language model, and what it wrote is scored again (mmGRPO, F-GRPO)."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from flashgrpo.distributed.world import World
from flashgrpo.errors import SharedError
from flashgrpo.process import Columns, Cost, Finding, OnDrawn, Outputs, Record
from flashgrpo.processes.calls import by_other_weights, fixed_batches, number_of_calls
from flashgrpo.processes.choices import divergence
from flashgrpo.processes.of_model import ModelProcess
from flashgrpo.processes.programs.checks import findings
from flashgrpo.processes.programs.model import LanguageModel
from flashgrpo.processes.programs.outputs import names_of, stacked, texts_of, to_row
from flashgrpo.processes.programs.phases import Cut, begins_of, checked
from flashgrpo.processes.programs.recording import Calls, Made, record_of
from flashgrpo.processes.programs.runs import Answer, Program, Question, Run, Stopped
from flashgrpo.processes.programs.settings import CallTokens, ProgramRollout, ProgramRuns, ProgramSampling
from flashgrpo.processes.programs.slots import Slots
from flashgrpo.processes.programs.state import ProgramState
from flashgrpo.processes.programs.writing import CompletionSampler
from flashgrpo.seeds import Name
from flashgrpo.types import REWARD, Failed, Media, Prompt, Sample, to_device

LOG_P = "log_p"  # a column that `draw` keeps for those that compare with it


@runtime_checkable
class Environment(Protocol):
    """What makes something to look at of the text that a program returns, and is not trained."""

    def show(self, texts: Sequence[str], names: Sequence[Name], frames: int | None) -> Media:
        """Return media of texts, each by the random numbers of its name."""
        ...


class ProgramProcess(ModelProcess[LanguageModel]):
    """A program and its language model, as a `Process`: a unit is a call, a term a token that it drew, or a phase.

    Terms are compared inside of (prompt group, module, k-th call of the module in its run). Groups are ragged: runs
    that call less often have no term there.

    Args:
        program: see `ProgramRollout.program`.
        explain: a context that turns what the program's code raises into one sentence.
        cut: see `ProgramRollout.cut`.

    Raises:
        ValueError: completions cannot hold the texts that phases begin with.
    """

    def __init__(
        self,
        model: LanguageModel,
        program: Program,
        explore: ProgramRuns,
        score: CallTokens,
        rollout: ProgramRollout,
        sampling: ProgramSampling,
        micro_batch: int,
        world: World,
        explain: Callable[[], AbstractContextManager[None]] = nullcontext,
        environment: Environment | None = None,
        cut: Cut | None = None,
    ) -> None:
        super().__init__(model, micro_batch, world)
        self.program, self.explain, self.environment = program, explain, environment
        self.explore, self.score, self.rollout, self.sampling = explore, score, rollout, sampling
        self.channels = tuple(rollout.phases) or (REWARD,)
        self.slots = Slots(tuple(model.adapters), rollout.adapters, model.width)
        self._made: tuple[int, int, int] | None = None
        tags = [*rollout.tags.values()]
        self.cut = checked(cut, len(self.channels)) if cut else partial(begins_of, tags=tags)
        for tag in tags[1:]:
            if not model.writes(tag):
                raise ValueError(f"rollout.phases: this model's tokenizer cannot write {tag!r:.80}; take another text")

    @property
    def together(self) -> bool:
        """Whether ranks hold the network between them, and so call it together."""
        return self.world.uses_fsdp and self.world.size > 1

    # Drawing

    @torch.no_grad()
    def draw(
        self, samples: Sequence[Sample], seed: int, on_drawn: OnDrawn, uses: int = 1, columns: Sequence[str] = ()
    ) -> tuple[Outputs, Record]:
        """Run the program for each sample, and record its calls; see `Process`."""
        writer = self._writer(self.explore.temperature)
        names = [(seed, "program", *sample.name) for sample in samples]
        shown = [(seed, "environment", *sample.name[:2]) for sample in samples]  # a group differs by its texts alone
        outputs, made = self._run_all([sample.group.prompt for sample in samples], names, shown, writer, on_drawn)
        groups = [sample.group.group for sample in samples]
        calls = Calls(made, len(self.channels), self.cut, self.score)
        record = record_of(calls, groups, self.model, self.world)
        tokens = sum(len(call.written.ids) for call in made)
        everyone = self.world.gather([tokens, len(made), len(samples)])
        forwards, units, ran = (sum(of) for of in zip(*everyone, strict=True))
        if ran and not units:
            raise SharedError(
                "rollout.program: no run of the update has called the model, so there is nothing to learn"
            )
        self._made = (samples[0].group.update if samples else -1, forwards, units)
        if uses == 1:
            return outputs, record
        old, log_p = self.old_scores(record, LOG_P if "kl_old" in columns else None)
        return outputs, replace(record, old=old, state=replace(state_of(record), old_log_p=log_p))

    def _writer(self, temperature: float) -> CompletionSampler:
        how = temperature, self.explore.top_k, self.explore.top_p
        return CompletionSampler(self.model, self.slots, *how, self.rollout.micro_batch, self.together)

    def _run_all(
        self,
        prompts: Sequence[Prompt],
        names: Sequence[Name],
        shown: Sequence[Name],
        writer: CompletionSampler,
        on_drawn: OnDrawn,
    ) -> tuple[Outputs, list[Made]]:
        """Run all programs side by side; in each round, whatever is asked for is written together."""
        limits = self.explain, self.rollout.max_calls, self.rollout.patience
        runs = [Run(self.program, prompt.text, prompt.columns, *limits) for prompt in prompts]
        rows: dict[int, Tensor] = {}
        made: list[Made] = []
        try:
            found = {row: run.resume() for row, run in enumerate(runs)}
            while self._any(found):
                ended = {row: to_row(one, shown[row]) for row, one in found.items() if isinstance(one, Answer)}
                if ended:
                    on_drawn(torch.tensor(list(ended)), stacked([*ended.values()], self.device))
                rows |= ended
                asked = {row: one for row, one in found.items() if isinstance(one, Question)}
                found = self._round(runs, asked, names, writer, made)
        finally:
            for run in runs:
                run.close()
        made.sort(key=lambda call: call.sample)
        return stacked([rows[row] for row in range(len(prompts))], self.device), made

    def _any(self, found: Mapping[int, object]) -> bool:
        return bool(self.world.max_over_ranks(torch.tensor(len(found)))) if self.together else bool(found)

    def _round(
        self,
        runs: Sequence[Run],
        asked: Mapping[int, Question],
        names: Sequence[Name],
        writer: CompletionSampler,
        made: list[Made],
    ) -> dict[int, Question | Answer]:
        """Write what runs ask for, and resume them with it; a run whose text is too long fails there."""
        ids = {row: self.model.prompt_ids(question.text) for row, question in asked.items()}
        fits = [row for row in asked if len(ids[row]) <= self.model.width]
        name_of = {row: (*names[row], asked[row].module, asked[row].number) for row in fits}
        slot_of = {row: self.slots.of(asked[row].module, len(ids[row])) for row in fits}
        self._keep_up(writer, [*slot_of.values()])
        drawn = writer.write([ids[row] for row in fits], [*name_of.values()], [*slot_of.values()])
        written = dict(zip(fits, drawn, strict=True))
        found: dict[int, Question | Answer] = {}
        for row, question in asked.items():
            if row in written:
                made.append(Made(row, question.module, question.number, slot_of[row], ids[row], written[row]))
                found[row] = runs[row].resume(self.model.text(written[row].ids))
            else:
                limit = (
                    f"a text of {len(ids[row])} tokens, of which model.max_sequence_length allows {self.model.width}"
                )
                found[row] = runs[row].resume(Stopped(limit))
        return found

    def _keep_up(self, writer: CompletionSampler, slots: Sequence[int]) -> None:
        """Make as many calls as the rank with most, where ranks call together."""
        if not self.together:
            return
        own = sum(number_of_calls(len(some), writer.size) for some in writer.batches(slots).values())
        for _ in range(int(self.world.max_over_ranks(torch.tensor(own))) - own):
            writer.on_nothing()

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], names: Sequence[Name], on_drawn: OnDrawn, num_steps: int | None = None
    ) -> Outputs:
        """Run the program as evaluation does, each run by the random numbers of its name."""
        own = self.sampling.temperature
        writer = self._writer(self.explore.temperature if own is None else own)
        return self._run_all(prompts, names, [(*name, "environment") for name in names], writer, on_drawn)[0]

    def media(self, outputs: Outputs, frames: int | None = None) -> Media:
        """Return the texts that programs came to, or what an environment makes of them."""
        texts = texts_of(outputs)
        if self.environment is None:
            return [Failed(self.rollout.failure_reward) if text is None else text for text in texts]
        return self.environment.show(self.captions(outputs), [(n, "environment") for n in names_of(outputs)], frames)

    def captions(self, outputs: Outputs) -> Sequence[str]:
        """Return what an environment is given; without one, the texts are what is shown."""
        return [text or "" for text in texts_of(outputs)] if self.environment else []

    # Scoring again

    def replay(self, record: Record, columns: Sequence[str]) -> list[tuple[Float32[Tensor, " terms"], Columns]]:
        """Return the score of each term, and the columns asked for.

        "kl", "kl_average" and "kl_old" are exact divergences of a token's candidates: to the base model, to the average
        and to the policy that drew. Without recorded ones the policy is the old one, too.
        """
        state, (adapters, places) = state_of(record), self.slots.split(int(record.slot[0]))
        self.model.use(adapters)
        log_p = self._log_p(state, places)
        others = by_other_weights(columns, self.other_weights, lambda: self._log_p(state, places))
        if "kl_old" in columns:
            others["kl_old"] = log_p.detach() if state.old_log_p is None else state.old_log_p
        found = {name: self._by_term(divergence(log_p, other), state) for name, other in others.items()}
        found |= {LOG_P: log_p.detach()} if LOG_P in columns else {}
        return [(self._by_term(state.of_drawn(log_p), state), found)]

    def stage(self, slot: int) -> nn.Module:
        """Return what calls of a slot train: ranks that hold the network between them differentiate the same part."""
        return self.model.trained_by(self.slots.split(slot)[0])

    def _by_term(self, values: Tensor, state: ProgramState) -> Tensor:
        return state.by_term(values, self.score, len(self.channels))

    def _log_p(self, state: ProgramState, places: int) -> Float32[Tensor, "units length candidates"]:
        """Compute log-probabilities by one call, filled up, so that equal units have equal bits."""
        ((rows, new),) = fixed_batches(len(state), self.micro_batch)
        filled = state[rows]
        ids = filled.ids[:, filled.ids.shape[1] - filled.length - places :]
        logits = self.model.logits(to_device(ids, self.device), to_device(filled.count, self.device))
        return filled.log_p(logits, self.explore.temperature)[:new]

    def idle(self, slot: int, columns: Sequence[str]) -> list[Tensor]:
        """Take part in the collectives of a replay, without a gradient of one's own."""
        self.model.use(self.slots.split(slot)[0])
        found = self._on_nothing()
        by_other_weights(columns, self.other_weights, self._on_nothing)
        return [found]

    def _on_nothing(self) -> Tensor:
        ids = torch.zeros(1, self.slots.first + self.model.length, dtype=torch.int64, device=self.device)
        return self.model.logits(ids, torch.ones(1, dtype=torch.int64, device=self.device)).amax(-1)

    # What it costs, whether it is sound

    def cost(self, seed: int, update: int, passes: int, columns: Sequence[str], uses: int = 1) -> Cost:
        """Count the forwards of an update: exactly, of the one that was drawn last; of another, what it is at most."""
        made = self._made
        forwards, units = made[1:] if made and made[0] in (update, -1) else most(self.rollout, self.model.length)
        each = 3 + self.model.recomputes + sum(name in columns for name in ("kl", "kl_average"))
        return Cost(forwards + (units if uses > 1 else 0), units * passes * each)

    def _unused(self, record: Record) -> list[str]:
        """Return the adapters that no call of a record, on all ranks, was computed by."""
        slots = self.world.gather(record.slot.unique().tolist())
        used = {self.slots.split(slot)[0] for own in slots for slot in own}
        return [name for name in self.slots.names if name not in used]

    def checks(self, record: Record, outputs: Outputs, seed: int, thorough: bool) -> Sequence[Finding]:
        """Say how many runs have failed, and how far the decoder is from what is scored."""
        return findings(texts_of(outputs), state_of(record), record, self.score, self._unused(record))


def most(rollout: ProgramRollout, length: int) -> tuple[int, int]:
    """Return the forwards and the calls that an update takes at most."""
    calls = rollout.prompts * rollout.group_size * rollout.max_calls
    return calls * length, calls


def state_of(record: Record) -> ProgramState:
    """Return the state of a record of programs."""
    assert isinstance(record.state, ProgramState)
    return record.state

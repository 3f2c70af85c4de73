"""Scores of the tokens that steps have drawn: log-probabilities among their candidates, given what each step saw."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from flashgrpo.process import Record
from flashgrpo.processes.calls import fixed_batches
from flashgrpo.processes.choices import log_probs, place_among
from flashgrpo.processes.tokens.guided import GuidedLogits
from flashgrpo.processes.tokens.masked.state import MaskedState
from flashgrpo.processes.tokens.model import Tokens
from flashgrpo.types import index_rows, to_device


@dataclass(frozen=True)
class StepScores:
    """Scores steps as they were drawn, `size` units a call of the network.

    Args:
        temperature: of the drawing.
        mean_field: whether every token is masked, whichever step is scored.
    """

    logits: GuidedLogits
    temperature: float
    size: int
    mean_field: bool

    def log_p(self, state: MaskedState) -> Float32[Tensor, "units widest candidates"]:
        """Compute the log-probabilities of all candidates by one call, filled up, so that equal units have equal bits.

        Args:
            state: of at most `size` units.
        """
        ((rows, new),) = fixed_batches(len(state), self.size)
        filled = state[rows]
        logits = self.logits(self.seen(filled), filled.places, filled.condition[filled.sample])
        return log_probs(logits, self.temperature, filled.kept)[:new]

    def seen(self, state: MaskedState) -> Tokens:
        """Return the tokens of each unit as its step saw them, or all masks."""
        tokens, mask = index_rows(state.unmasked.tokens, state.sample), self.logits.model.mask
        assert mask is not None
        if self.mean_field:
            return torch.full_like(tokens, mask)
        return tokens.masked_fill(to_device(state.hidden, tokens.device), mask)


def state_of(record: Record) -> MaskedState:
    """Return the state of a record of masked tokens."""
    assert isinstance(record.state, MaskedState)
    return record.state


def of_drawn(log_p: Float32[Tensor, "units widest candidates"], state: MaskedState) -> Float32[Tensor, "units widest"]:
    """Return the log-probability of the token that was drawn at each place."""
    return log_p.gather(-1, place_among(state.kept, state.drawn)[..., None])[..., 0]


def of_terms(values: Float32[Tensor, "units widest"], state: MaskedState) -> Float32[Tensor, " terms"]:
    """Return the values of terms, by unit, then by place."""
    return index_rows(values.flatten(), state.is_term.flatten().nonzero().flatten())

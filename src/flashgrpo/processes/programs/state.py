"""What an update needs of a program's calls, to score them again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from flashgrpo.processes.choices import Kept, log_probs, place_among
from flashgrpo.processes.programs.settings import CallTokens
from flashgrpo.processes.programs.writing import Written, placed
from flashgrpo.types import index_rows, to_device


@dataclass(frozen=True)
class ProgramState:
    """U units, each a call of a run; prompts stand on the right of P places, completions on the left of L behind them.

    Args:
        ids: (U, P + L) on the CPU.
        count, drawn: (U,) tokens of the prompt and of the completion.
        phase: (U, L) of each token of the completion.
        decoded: (U, L) log-probabilities as the decoder had them, beside which the scores are laid.
        kept: (U, L, K) candidates of each token, None where all are.
        old_log_p: (U, L, K) of these by the weights that drew, where a column compares with them.
    """

    ids: Int64[Tensor, "units places"]
    count: Int64[Tensor, " units"]
    drawn: Int64[Tensor, " units"]
    phase: Int64[Tensor, "units length"]
    decoded: Float32[Tensor, "units length"]
    kept: Kept | None
    old_log_p: Float32[Tensor, "units length candidates"] | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        written: Sequence[Written],
        phases: Sequence[Sequence[int]],
        places: int,
        length: int,
    ) -> "ProgramState":
        """Lay out calls."""
        ids, count = placed(prompts, places)
        drawn = torch.tensor([len(one.ids) for one in written], dtype=torch.int64)
        completion, phase = (
            torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], dtype=torch.int64).view(-1, length)
            for rows in ([one.ids for one in written], phases)
        )
        decoded = torch.tensor([[*one.log_p, *[0.0] * (length - len(one.log_p))] for one in written]).view(-1, length)
        candidates = [one.kept for one in written if one.kept is not None]
        kept = None
        if candidates:
            kept = torch.full((len(written), length, candidates[0].shape[-1]), -1, dtype=torch.int32)
            kept[:, :, 0] = 0  # one candidate of places that hold no token
            for row, own in enumerate(candidates):
                kept[row, : len(own)] = own
        return cls(torch.cat([ids, completion], dim=1), count, drawn, phase, decoded, kept)

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, units: Int64[Tensor, " some"]) -> "ProgramState":
        """Return the state of some units."""
        kept, old = (None if one is None else index_rows(one, units) for one in (self.kept, self.old_log_p))
        ids, count, drawn, phase, decoded = (
            one[units] for one in (self.ids, self.count, self.drawn, self.phase, self.decoded)
        )
        return ProgramState(ids, count, drawn, phase, decoded, kept, old)

    @property
    def length(self) -> int:
        """Places of a completion, L."""
        return self.phase.shape[1]

    @property
    def is_drawn(self) -> Tensor:
        """(U, L) which places hold a token that was drawn."""
        return torch.arange(self.length) < self.drawn[:, None]

    def tokens_of(self, phases: int) -> Tensor:
        """(U, phases) tokens of each phase."""
        return torch.stack([((self.phase == p) & self.is_drawn).sum(1) for p in range(phases)], dim=1)

    def log_p(self, logits: Float32[Tensor, "units length vocabulary"], temperature: float) -> Tensor:
        """Return the log-probabilities of all candidates, (U, L, K), differentiably."""
        return log_probs(logits, temperature, None if self.kept is None else to_device(self.kept, logits.device))

    def of_drawn(self, log_p: Float32[Tensor, "units length candidates"]) -> Float32[Tensor, "units length"]:
        """Return the log-probability of the token at each place."""
        place = place_among(self.kept, self.ids[:, -self.length :])
        return log_p.gather(-1, to_device(place, log_p.device)[..., None])[..., 0]

    def by_term(self, values: Float32[Tensor, "units length"], score: CallTokens, phases: int) -> Tensor:
        """Return the values of terms: of tokens as they are, or of phases as `score.length` adds them up."""
        device = values.device
        if score.term == "token":
            return index_rows(values.flatten(), self.is_drawn.flatten().nonzero().flatten())
        tokens = self.tokens_of(phases)
        own = [to_device((self.phase == p) & self.is_drawn, device) for p in range(phases)]
        sums = torch.stack([torch.where(one, values, 0.0).sum(1) for one in own], dim=1)
        if score.length == "sequence":
            sums = sums / to_device(tokens.clamp(min=1), device)
        elif score.length == "maximum":
            sums = sums / self.length
        return index_rows(sums.flatten(), tokens.flatten().nonzero().flatten())

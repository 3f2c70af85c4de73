"""What the doctor has to know of programs: how many runs fail, and how far the decoder is from what is scored."""

from collections.abc import Sequence
from typing import Literal

from flashgrpo.process import Finding, Record
from flashgrpo.processes.programs.settings import CallTokens
from flashgrpo.processes.programs.state import ProgramState


def findings(
    texts: Sequence[str | None], state: ProgramState, record: Record, score: CallTokens, unused: Sequence[str]
) -> Sequence[Finding]:
    """Tell of runs that have failed, of adapters `unused`, and of the decoder's ratio to scores of tokens."""
    failed = sum(text is None for text in texts)
    share = failed / max(1, len(texts))
    level: Literal["sound", "warning"] = "sound" if share < 0.5 else "warning"
    sentence = f"{failed} of {len(texts)} runs of the program have failed"
    found = [Finding("failures", level, sentence, {"failed": failed, "runs": len(texts)})]
    if unused:
        told = (
            f"no call was of a module with the adapters {', '.join(unused)}, which then learn nothing; look at "
            "rollout.adapters, and rollout.other_modules=refuse leaves out those of modules that are not named"
        )
        found.append(Finding("adapters", "warning", told, {"unused": [*unused]}))
    if score.term != "token" or record.old is None or not len(record.old):
        return found
    decoded = state.decoded.flatten()[state.is_drawn.flatten()]
    apart = float(((decoded - record.old.detach().cpu()).exp() - 1).abs().max())
    told = f"the decoder's probability of a token is at most {apart:.2g} times off what is scored, and is not used"
    return [*found, Finding("decoder", "sound", told, {"mismatch": apart})]

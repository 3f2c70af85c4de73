"""Preflight: measure what a run would do before it costs anything, explain in one line each, refuse what is unsound.

`flashgrpo doctor RECIPE` runs every check on a trial of a few prompt groups; `train` runs the quick ones before its
first update, on one group where its rewards differ. Each check is a function from what was measured to a `Finding`.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from flashgrpo.assembly import Assembly
from flashgrpo.config import RunConfig
from flashgrpo.distributed.world import process_group
from flashgrpo.doctor.checks import QUICK, THOROUGH, TOLD, Check, constant_rewards
from flashgrpo.doctor.costs import COSTS
from flashgrpo.doctor.trial import Trial, try_out
from flashgrpo.errors import UserError
from flashgrpo.jsontext import to_json
from flashgrpo.process import Finding
from flashgrpo.terminal import cell


@dataclass(frozen=True)
class Diagnosis:
    """All findings of one examination."""

    findings: Sequence[Finding]

    @property
    def sound(self) -> bool:
        """Whether a run may start."""
        return all(finding.level != "unsound" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return the findings as plain data, for machines."""
        return {"sound": self.sound, "checks": [asdict(finding) for finding in self.findings]}

    def print(self, as_json: bool) -> None:
        """Print a line for each finding, and what they come to."""
        if as_json:
            print(to_json(self.as_json()))
            return
        table = Table("", "check", "finding", show_header=False, box=None)
        colors = {"sound": "green", "warning": "yellow", "unsound": "red"}
        for finding in self.findings:
            table.add_row(cell(finding.level, colors[finding.level]), cell(finding.check), cell(finding.sentence))
        Console().print(table)
        print("a run would be sound" if self.sound else "a run would not be sound")


def examine(recipe: str, overrides: Sequence[str] = ()) -> Diagnosis:
    """Run every check on four prompt groups (or as many as an update has).

    Raises:
        UserError: the recipe is bad, or a reward or the model refuses its input.
    """
    config = RunConfig.load(recipe, overrides)
    with process_group(config.parallel, config.model.compute_dtype) as world, contextlib.ExitStack() as stack:
        parts = Assembly(config, world)
        stack.callback(parts.rewards.close)
        trial = try_out(parts, min(4, config.rollout.prompts), config.rollout.group_size, thorough=True)
        return Diagnosis(_shared(parts, _findings(parts, trial, (*QUICK, *TOLD, *THOROUGH, *COSTS))))


def refuse_unsound(parts: Assembly, warn: Callable[[str], None]) -> None:
    """Run the quick checks on one prompt group, and on more where a reward is the same for all samples of it.

    What is found of the spread of rewards and of the prompts is told and refuses nothing.

    Raises:
        UserError: a run would be unsound; `tracking.preflight` says whether that only warns.
    """
    if parts.config.tracking.preflight == "skip":
        return
    trial = _tried_until_rewards_differ(parts)
    findings = _shared(parts, _findings(parts, trial, QUICK))
    told = _shared(parts, [check(parts, trial) for check in TOLD])
    unsound = [finding for finding in findings if finding.level == "unsound"]
    if unsound and parts.config.tracking.preflight == "refuse":
        raise UserError(
            f"this run would be unsound: {unsound[0].sentence}; `flashgrpo doctor` tells more, and "
            "tracking.preflight=warn trains in spite of it"
        )
    for sentence in dict.fromkeys(finding.sentence for finding in (*told, *findings) if finding.level != "sound"):
        warn(sentence)


def _tried_until_rewards_differ(parts: Assembly) -> Trial:
    """Try out one group, then four, then those of a whole update, as long as some reward is constant in all of them."""
    rollout = parts.config.rollout
    for groups in sorted({1, 4, max(4, rollout.prompts)}):
        trial = try_out(parts, groups, rollout.group_size, thorough=False)
        if not constant_rewards(parts, trial):
            break
    return trial


def _findings(parts: Assembly, trial: Trial, checks: Sequence[Check]) -> list[Finding]:
    """Run the checks, and add what the process itself found."""
    first, *others = [check(parts, trial) for check in checks]
    return [first, *trial.of_process, *others]


def _shared(parts: Assembly, findings: Sequence[Finding]) -> list[Finding]:
    """Keep, for each check, the worst that any rank has found."""
    order = ("sound", "warning", "unsound")
    everyone = parts.world.gather([asdict(finding) for finding in findings])
    return [
        Finding(**max(of_all_ranks, key=lambda finding: order.index(finding["level"])))
        for of_all_ranks in zip(*everyone, strict=True)
    ]

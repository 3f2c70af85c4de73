"""The folder of a comparison: where its runs lie, whose it is, and whether it may be resumed."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from flashgrpo.compare.plan import FORMAT, Plan, settings_today
from flashgrpo.config.recipe import differences
from flashgrpo.errors import UserError
from flashgrpo.files import explain_os_errors, lock, read_object, write_json
from flashgrpo.jsontext import finite
from flashgrpo.run.lines import Entries, Forwards, mistake
from flashgrpo.settings import MANY


class _Evaluation(Entries):
    samples_per_prompt: int = Field(ge=1)
    patience: int | None


class _Train(Entries):
    kind: str


class _Model(Entries):
    train: _Train


class _Settings(Entries):
    evaluation: _Evaluation
    model: _Model


class _Algorithm(Entries):
    updates: int = Field(ge=1, le=MANY)
    compute_per_update: Forwards
    settings: _Settings


class _Plan(Entries):
    """What is read of plan.json."""

    budget: int = Field(ge=1)
    seeds: list[Annotated[int, Field(ge=0)]]
    recipe: str
    algorithms: dict[str, _Algorithm]


@dataclass(frozen=True)
class RunFiles:
    """One run of a comparison: `OUT/ALGORITHM/seed-S`, an ordinary run directory, and what lies beside it."""

    algorithm: str
    seed: int
    path: Path

    @property
    def recipe(self) -> Path:
        """The settings that it is started with."""
        return self.path.with_name(f"{self.path.name}.yaml")

    @property
    def log(self) -> Path:
        """What its process writes to standard output and error."""
        return self.path.with_name(f"{self.path.name}.log")

    @property
    def failure(self) -> Path:
        """Why its process ended, where it failed; a later start tries again."""
        return self.path.with_name(f"{self.path.name}.failed")

    @property
    def record(self) -> Path:
        """What a comparison reads of it, written once it has ended: the run directory may go, this is enough."""
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def busy(self) -> bool:
        """Whether some process trains it, for instance one that outlived the comparison that started it."""
        path = self.path / ".lock"
        if not path.exists():
            return False
        with explain_os_errors(path), path.open("w", encoding="utf-8") as file:
            return not lock(file)


class ComparisonFolder:
    """The files of a comparison. Construction reads nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.plan_file = self.path / "plan.json"
        self.results = self.path / "comparison.json"
        self.table = self.path / "comparison.md"
        self.diagnosis = self.path / "diagnosis.json"
        self.figures = self.path / "figures"

    def runs(self, plan: Mapping[str, Any]) -> list[RunFiles]:
        """Return all runs of a plan.json, seed by seed, so that what is interrupted has come equally far everywhere."""
        return [
            RunFiles(name, seed, self.path / name / f"seed-{seed}")
            for seed in plan["seeds"]
            for name in plan["algorithms"]
        ]

    def plan(self) -> dict[str, Any]:
        """Read plan.json.

        Raises:
            UserError: there is none, or one that this version cannot read.
        """
        if not self.plan_file.is_file():
            raise UserError(f"{self.path} is no comparison, for it has no plan.json")
        plan = read_object(self.plan_file)
        if isinstance(plan.get("format"), int) and plan["format"] != FORMAT:
            raise UserError(f"{self.plan_file} was written by another version of flashgrpo")
        if wrong := mistake(_Plan, plan):
            raise UserError(f"{self.plan_file} is damaged ({wrong}); put it back")
        return plan

    @contextmanager
    def claimed(self, plan: Plan) -> Iterator[None]:
        """Inside of it no other process compares into the folder, and plan.json is this plan.

        A comparison may grow by seeds and by algorithms; what is in it stays.

        Raises:
            UserError: the folder holds something else, another comparison, or is in use.
        """
        with explain_os_errors(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            foreign = [entry.name for entry in self.path.glob("[!.]*")] if not self.plan_file.is_file() else []
            if foreign:
                raise UserError(f"--out: {self.path} holds {foreign[0]!r} and is no comparison; choose another folder")
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w", encoding="utf-8")
        with file:
            if not lock(file):
                raise UserError(f"--out: another process is comparing into {self.path}")
            if self.plan_file.is_file():
                self._check(finite(plan.as_json()))
            write_json(self.plan_file, plan.as_json(), indent=1)
            yield

    def _check(self, now: Mapping[str, Any]) -> None:
        before = self.plan()
        gone = [name for name in before["algorithms"] if name not in now["algorithms"]]
        gone += [f"seed {seed}" for seed in before["seeds"] if seed not in now["seeds"]]
        if gone:
            raise UserError(f"--out: {self.path} is a comparison that also has {gone[0]}; choose another folder")
        names = before["algorithms"]
        stored = {n: {**a, "settings": settings_today(a["settings"], str(self.plan_file))} for n, a in names.items()}
        old = {"budget": before["budget"], **stored}
        new = {"budget": now["budget"], **{n: now["algorithms"][n] for n in names}}
        if changed := differences(old, new):
            key = changed[0].replace(".settings.", ": ")
            raise UserError(f"--out: {self.path} is a comparison with another {key}; choose another folder")

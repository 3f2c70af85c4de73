"""Runs the cases: in this process, each in a folder of its own."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashgrpo.cli import main
from flashgrpo.config import RunConfig
from flashgrpo.train import train
from tests.bad_inputs.cases import Case
from tests.conftest import small_run


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, what it printed, what it complained about)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashgrpo", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        assert isinstance(code, int | None)
        return code or 0, out, " ".join(err.replace("│", " ").split())

    return run


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> RunConfig:
    """The smallest run: one update, and an evaluation after it."""
    return small_run(tmp_path_factory.mktemp("trained") / "run", "updates=1", "evaluation.every=1")


@pytest.fixture(scope="session")
def trained(settings) -> Path:
    """That run once it is complete, not to be written into."""
    return train(settings)


@pytest.fixture
def refuse(tmp_path, settings, monkeypatch, command, request) -> Callable[[Case], None]:
    """Run a case, and check that it is refused as it says."""

    def check(case: Case) -> None:
        recipe = settings.model_copy(update={"out": str(tmp_path / "run")}).to_yaml()
        (tmp_path / "recipe.yaml").write_text(recipe, "utf-8")
        if "RUN" in str(case.command):
            shutil.copytree(request.getfixturevalue("trained"), tmp_path / "run")
        case.write_files(tmp_path)
        before = (tmp_path / "run").exists()
        for name, value in case.env.items():
            monkeypatch.setenv(name, value)
        code, _, complaint = command(*case.arguments(tmp_path))
        assert case.sentence in complaint
        assert code == case.code
        assert "Traceback" not in complaint
        assert complaint.count("flashgrpo: ") == 1 or complaint.startswith("Usage: ")
        assert not list(tmp_path.rglob(".partial-*"))
        assert case.begun or before or not (tmp_path / "run").exists()

    return check

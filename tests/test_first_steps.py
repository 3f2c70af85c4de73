"""What a newcomer types first: what there is, a recipe of one's own, and a run that is only rehearsed."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashgrpo.cli import app
from flashgrpo.config import RunConfig
from flashgrpo.config.recipe import shipped_recipes
from flashgrpo.doctor.estimate import MemoryEstimate
from flashgrpo.errors import UserError, this_command
from flashgrpo.listing import PARTS, listing
from flashgrpo.presets import PRESETS
from flashgrpo.scoring.loading import load_reward
from tests.conftest import small_run


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate that takes no seconds: 2 GiB."""
    phases = {"rollout": {"weights": 2**31}}
    found = MemoryEstimate({"network": 1}, phases, {"decoded": 0}, processes=1)
    monkeypatch.setattr("flashgrpo.doctor.verdict.estimate", lambda config, processes: found)


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


# ---- list ------------------------------------------------------------------------------------------------------------


def test_everything_is_listed_with_a_line():
    parts = listing()
    assert tuple(parts) == PARTS
    assert set(parts["recipes"]) == set(shipped_recipes())
    assert set(parts["presets"]) == set(PRESETS)
    assert set(parts["processes"]) == {"flow", "streaming", "masked-tokens", "uniform-tokens", "programs"}
    assert all(line and "\n" not in line for lines in parts.values() for line in lines.values())


def test_presets_are_told_apart():
    lines = listing()["presets"]
    flow = [line for name, line in lines.items() if line.startswith("flow: flash-grpo with")]
    assert len(set(flow)) == len(flow) > 5


def test_every_reward_that_is_listed_can_be_named_in_a_recipe():
    rewards = listing()["rewards"]
    assert "flashgrpo.rewards.shapes:agreement" in rewards
    for name in rewards:
        assert callable(load_reward(name, "rewards.it")), name


def test_list_prints_one_part_or_all():
    assert set(json.loads(invoke("list", "presets", "--json").stdout)) == {"presets"}
    assert "tiny-sudoku" in invoke("list", "recipes").stdout
    models = CliRunner(env={"COLUMNS": "40"}).invoke(app, ["list", "models"]).stdout
    assert all(name in models for name in listing()["models"])  # whole, to be copied
    assert len(models.splitlines()) == 1 + len(listing()["models"])
    with pytest.raises(UserError, match="list: there is no part 'recipe'; did you mean 'recipes'"):
        app(["list", "recipe"], standalone_mode=False)


def test_the_next_command_is_one_that_the_shell_finds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    called = tmp_path / "a folder/flashgrpo"
    monkeypatch.setattr("sys.argv", [str(called), "init"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert shlex.split(this_command()) == [str(called)]
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert this_command() == "flashgrpo"
    monkeypatch.setattr("sys.argv", [str(called), "init"])
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert this_command() == "flashgrpo"


# ---- init ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("counted")
def test_init_writes_a_commented_recipe_that_can_be_read(tmp_path: Path):
    out = tmp_path / "mine.yaml"
    given = ["--reward", "motion:amount", "--prompts", "my prompts.txt", "--card", "24"]
    result = invoke("init", str(out), "--model", "tiny", *given)
    assert result.exit_code == 0, result.output
    assert "fits a card of 24 GiB" in result.output
    assert re.search(r"before it trains: .*my prompts\.txt", result.output)
    config, shipped = RunConfig.load(out), RunConfig.load("tiny")
    assert config.rewards["amount"].call == "flashgrpo.rewards.motion:amount"
    assert (config.prompts.train, config.prompts.heldout) == ("my prompts.txt", shipped.prompts.heldout)
    assert config.out == "runs/mine"
    same = ("model", "algorithm", "rollout", "optim", "evaluation", "parallel")
    assert all(getattr(config, part) == getattr(shipped, part) for part in same)
    written = out.read_text("utf-8")
    assert "# Flash-GRPO with two changes" in written
    assert written.splitlines()[1].startswith("# Begun from the recipe tiny by `flashgrpo init`")


@pytest.mark.usefixtures("counted")
def test_init_says_when_it_does_not_fit(tmp_path: Path):
    assert invoke("init", str(tmp_path / "a.yaml"), "--model", "tiny", "--card", "1").exit_code == 1


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_init_begins_with_any_recipe(name: str):
    from flashgrpo.config.reading import read_yaml
    from flashgrpo.init import Answers, recipe_text

    answers = Answers(name, "my/weights", "http://127.0.0.1:1", "a.txt", 'b "quoted".txt')
    config = RunConfig.parse(read_yaml(recipe_text(Path("x.yaml"), answers)), "x.yaml")
    assert config.model.path == "my/weights"
    assert list(config.rewards) == ["served"]
    assert (config.prompts.train, config.prompts.heldout) == ("a.txt", 'b "quoted".txt')


ANSWERED = {
    ("tinny", "wan21-1.3b", "motion:amount", "", "", "-1", "nan", "80", "0", "many", "8"): (
        ("wan21-1.3b", None, "motion:amount", "", "", 8, 80.0),
        [
            "no recipe 'tinny'; did you mean 'tiny'",
            "'-1' is no number of GiB",
            "'nan' is no",
            "'0' is no number of GPUs",
        ],
    ),
    ("", "", "", "", "24.5", ""): (("tiny", None, "", "", "", 1, 24.5), []),
    ("", "", "", "", ""): (("tiny", None, "", "", "", None, 0.0), []),
}


@pytest.mark.parametrize("said", ANSWERED)
def test_init_asks_in_a_terminal_until_it_can_read_the_answer(
    said: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from flashgrpo.init import Answers, ask

    answers, told = ANSWERED[said]
    terminal = io.StringIO("".join(f"{line}\n" for line in said))
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert ask(Answers()) == Answers(*answers)
    shown = capsys.readouterr().out
    assert all(sentence in shown for sentence in told)
    assert ("Error" in shown) == bool(told)


def test_init_refuses_in_a_sentence_and_writes_nothing(tmp_path: Path):
    out = tmp_path / "mine.yaml"

    def refused(*arguments: str) -> str:
        with pytest.raises(UserError) as error:
            app(["init", str(out), *arguments], standalone_mode=False)
        return str(error.value)

    assert "--model: name a recipe to begin with, one of: " in refused()
    assert "--model: there is no recipe 'tinny'; did you mean 'tiny'" in refused("--model", "tinny")
    assert not out.exists()
    out.write_text("mine", "utf-8")
    assert "exists; name another file, or remove it" in refused("--model", "tiny")
    assert out.read_text("utf-8") == "mine"


# ---- train --dry-run -------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_stands_against_a_run_and_writes_none(tmp_path: Path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(small_run(out).to_yaml(), "utf-8")
    before = sorted(tmp_path.rglob("*"))
    result = invoke("train", str(recipe), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "nothing stands against this run" in result.output
    assert "counted for 1 process" in result.output
    assert sorted(tmp_path.rglob("*")) == before
    out.mkdir()
    (out / "photo.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="is no run; choose a new or empty folder"):
        app(["train", str(recipe), "--dry-run"], standalone_mode=False)
    constant = ["rewards.agreement=null", "rewards.constant={call: 'builtins:nothing'}"]
    with pytest.raises(UserError):
        app(["train", str(recipe), *constant, f"out={tmp_path / 'other'}", "--dry-run"], standalone_mode=False)

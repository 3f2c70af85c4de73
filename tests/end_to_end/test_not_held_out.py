"""Where an evaluation has prompts that are trained on, nothing calls its numbers held-out."""

import json
import re

import pytest
from typer.testing import CliRunner

from flashgrpo.cli import app
from flashgrpo.export import export
from flashgrpo.report import write_report
from flashgrpo.run.directory import read_lines
from flashgrpo.train import train
from tests.conftest import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leak")
    prompts = "a red square moving left slowly\nA Cyan  circle moving right quickly\na green circle moving up slowly\n"
    (folder / "train.txt").write_text(prompts, "utf-8")
    return train(small_run(folder / "run", f"prompts.train={folder}/train.txt", "updates=1", "evaluation.every=1"))


def without_settings(page: str) -> str:
    """A page's text without the recipe that it shows."""
    return re.sub(r"<pre.*?</pre>", "", page, flags=re.S)


def test_pages_and_cards_and_lines_do_not_call_it_held_out(run):
    assert [line["trained_on"] for line in read_lines(run / "evaluations.jsonl")] == [2, 2]
    page = without_settings(write_report(run).read_text())
    assert "2 of its prompts are trained on" in page
    assert "held-out" not in page.lower()
    card = (export(run) / "README.md").read_text()
    assert "Evaluation reward" in card
    assert "2 of its prompts are trained on" in card
    assert "held-out" not in card.lower()


def test_evaluate_says_so(run, tmp_path):
    said = CliRunner().invoke(app, ["evaluate", str(run)]).stdout
    assert "2 of its prompts are trained on" in " ".join(said.split())
    assert "held-out" not in said
    other = tmp_path / "other.txt"
    other.write_text("a blue square moving left slowly\n", "utf-8")
    arguments = ["evaluate", str(run), f"prompts.heldout={other}", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert "trained_on" not in json.loads(result.stdout), result.exception


def test_a_run_directory_resumes_and_its_last_words_name_the_best(run):
    """stdout is the directory; stderr ends with what came of it and the command that shows it."""
    code = CliRunner().invoke(app, ["train", str(run), "updates=2", "tracking.progress=true"])
    assert code.exit_code == 0
    assert code.stdout == f"{run}\n"
    assert [line["update"] for line in read_lines(run / "evaluations.jsonl")] == [0, 1, 2]
    *_, found, page = code.stderr.strip().splitlines()
    assert re.match(
        r"best update \d: evaluation reward|no evaluated update was above the base model; the last, 2", found
    )
    assert page == f"for its page: flashgrpo report {run}"


def test_the_prompts_that_a_run_noted_count_where_their_file_is_gone(run):
    (run.parent / "train.txt").unlink()
    assert json.loads(CliRunner().invoke(app, ["evaluate", str(run), "--json"]).stdout)["trained_on"] == 2


def test_a_recipe_shows_its_base_model_once(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small_run(tmp_path / "run").to_yaml(), "utf-8")
    said = CliRunner().invoke(app, ["evaluate", str(recipe)]).stdout
    assert "update" not in said
    assert len(re.findall(r"agreement.color +\W +\d\.\d{3} +\W*$", said, flags=re.M)) == 1
    assert re.search(r"held-out reward \d\.\d+$", said.strip())

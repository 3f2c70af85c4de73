"""The bundled runs of token models: an update of each, and what it leaves behind."""

import pytest

from flashgrpo import demo
from flashgrpo.config import RunConfig
from flashgrpo.errors import UserError
from flashgrpo.report import write_report
from flashgrpo.run.lines import read_lines
from flashgrpo.run.progress import Reporter
from flashgrpo.sample import sample
from flashgrpo.train import train
from flashgrpo.types import Prompt

SMALL = [
    "updates=1",
    "rollout.prompts=2",
    "rollout.group_size=3",
    "evaluation.samples_per_prompt=1",
    "evaluation.videos=2",
]
PUZZLE = "1 _ _ 4 / _ 4 1 _ / _ 1 _ _ / 4 _ _ 1"


@pytest.mark.parametrize(
    ("recipe", "prompt", "ending", "shown"),
    [
        ("tiny-uniform-tokens", "three red cells, the rest blue", "png", '<img src="data:image/png'),
        ("tiny-masked-tokens", "three red cells, the rest blue", "txt", '<pre class="text"'),
        ("tiny-sudoku", PUZZLE, "txt", '<pre class="text"'),
    ],
)
def test_an_update_of_each(recipe, prompt, ending, shown, tmp_path):
    lines = [f'{{"prompt": "{prompt}"}}']
    (tmp_path / "heldout.jsonl").write_text("\n".join(lines * 2) + "\n")
    overrides = [f"out={tmp_path}/run", f"prompts.heldout={tmp_path}/heldout.jsonl", "rollout.micro_batch=8"]
    run = train(RunConfig.load(recipe, [*SMALL, *overrides, "optim.micro_batch=8", "tracking.progress=false"]))
    [line] = read_lines(run / "metrics.jsonl")
    assert line["drift"] == 0
    assert line["grad_norm"] > 0
    files = [one["video"] for one in read_lines(run / "evaluations.jsonl")[-1]["samples"]]
    assert all((run / file).is_file() and file.endswith(ending) for file in files)
    assert write_report(run).read_text().count(shown) >= 2 * len(files)
    assert sample(run, [Prompt(prompt, {})], tmp_path / "shown").name == f"shown.{ending}"


def test_a_demo_of_an_unknown_process_is_refused():
    with pytest.raises(UserError, match="no bundled run of 'masked'; did you mean 'masked-tokens'"):
        demo.demo(None, 0, Reporter(quiet=True), "masked")


def test_each_demo_is_of_the_process_that_it_names():
    assert {RunConfig.load(recipe).rollout.kind for recipe in demo.RECIPES.values()} == set(demo.RECIPES)

"""What a comparison reads of runs whose evaluations left prompts out, or were changed by something else."""

import json

import numpy as np
import pytest

from flashgrpo.compare.folder import ComparisonFolder
from flashgrpo.compare.record import read_run
from flashgrpo.compare.results import collect
from flashgrpo.errors import UserError
from flashgrpo.scoring.intervals import mean_interval
from tests.compare.test_compare import plan, write_run


def test_a_prompt_that_a_run_left_out_is_left_out_of_its_pairs_too(tmp_path):
    """Its samples have no reward; the final difference of seed 0 is over the 19 other prompts, in both algorithms."""
    made = plan("updates=4")
    folder = ComparisonFolder(tmp_path / "c")
    with folder.claimed(made):
        pass
    runs = [run for run in folder.runs(made.as_json()) if run.seed == 0]
    for files, gain in zip(runs, (0.1, 0.3), strict=True):
        write_run(files, made.algorithms[files.algorithm], gain)
    file = runs[1].path / "evaluations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[-1]["samples"][5]["reward"] = None
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = [read_run(files, folder.plan()["algorithms"][files.algorithm])["points"][-1]["prompts"] for files in runs]
    assert points[1][2] is None
    rises = np.array([[rise for row, rise in enumerate(rises) if row != 2] for rises in points])
    second = collect(folder)["summary"][1]
    assert second["over_first"]["difference"] == pytest.approx((rises[1] - rises[0]).mean())
    assert second["over_first"]["interval"] == pytest.approx(mean_interval(rises[1] - rises[0]))
    assert second["final"]["interval"] == pytest.approx(mean_interval(rises[1]))


def test_samples_that_are_no_whole_prompts_are_told(tmp_path):
    made = plan("updates=4")
    files = ComparisonFolder(tmp_path / "c").runs(made.as_json())[0]
    write_run(files, made.algorithms[files.algorithm], 0.1)
    file = files.path / "evaluations.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    del lines[1]["samples"][-1]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = made.as_json()["algorithms"][files.algorithm]
    entry["settings"]["evaluation"]["samples_per_prompt"] = 2
    with pytest.raises(UserError, match="a prompt has fewer samples than 2; something else changed it"):
        read_run(files, entry)

"""The bundled streaming run in small: an update, its resume, and what it leaves behind."""

import json

import pytest

from flashgrpo.config import RunConfig
from flashgrpo.export import export
from flashgrpo.report import write_report
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.lines import OF_THE_MACHINE, read_lines
from flashgrpo.sample import sample
from flashgrpo.train import train
from flashgrpo.types import Prompt
from tests.families import any_flow
from tests.videos import read_mp4

SMALL = [
    "model.num_frames=69",
    "model.height=32",
    "model.width=32",
    "rollout.prompts=2",
    "rollout.group_size=3",
    "rollout.micro_batch=3",
    "optim.micro_batch=3",
    "evaluation.videos=1",
    "evaluation.samples_per_prompt=1",
    "evaluation.every=100",
    "tracking.progress=false",
    "tracking.preflight=skip",
]
PRESETS = {
    "kvpo": ["algorithm.explore={blocks: 1, routed: 1, nearest: 3, earliest: 6}"],
    "flash-stream": ["algorithm=flash-stream"],
    "stream-nft": ["algorithm=stream-nft"],
}


@pytest.fixture
def recipe(tmp_path):
    switch = {"frame": 45, "prompt": "a blue square moving up slowly"}
    first, second = "a red circle moving left slowly", "a red square moving up slowly"
    lines = [{"prompt": first, "switches": [switch]}, {"prompt": second}]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [*SMALL, f"prompts.heldout={tmp_path}/heldout.jsonl"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_goes_on_where_it_was_left_bit_for_bit(preset, recipe, tmp_path):
    def run(name, updates):
        overrides = [*recipe, *PRESETS[preset], f"out={tmp_path}/{name}", f"updates={updates}"]
        return train(RunConfig.load("tiny-streaming", overrides))

    whole, parted = run("whole", 2), run("parted", 1)
    run("parted", 2)
    for one, other in zip(read_lines(whole / "metrics.jsonl"), read_lines(parted / "metrics.jsonl"), strict=True):
        assert {**one, **dict.fromkeys(OF_THE_MACHINE)} == {**other, **dict.fromkeys(OF_THE_MACHINE)}
    assert any(line["grad_norm"] > 0 for line in read_lines(whole / "metrics.jsonl"))
    assert RunDirectory(whole).result()["difference"] == RunDirectory(parted).result()["difference"]
    if preset != "kvpo":
        return  # what a run leaves behind does not depend on how it learnt
    assert "Diffusers has no pipeline that draws as this model was" in (export(whole) / "README.md").read_text()
    page = write_report(whole).read_text()
    assert "<video" in page
    assert "from frame 45" in page
    assert sample(whole, [Prompt("a red circle moving left slowly", {})], tmp_path / "shown").name == "shown.mp4"


ANY_FLOW_RUN = [
    *SMALL,
    *("model.width=64", "model.num_frames=61", "model.max_sequence_length=12"),
    "algorithm.explore={blocks: 1, routed: 1, nearest: 9, reach: 18, earliest: 12}",
    *("rollout.first_block=1", "rollout.sink=1", "rollout.local=16"),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_any_flow_trains_goes_on_and_is_exported_to_its_own_pipeline(tmp_path, monkeypatch):
    any_flow().save_pretrained(folder := tmp_path / "model")
    for name, colour in (("train", "blue"), ("heldout", "red")):
        (tmp_path / f"{name}.txt").write_text(
            f"a {colour} circle moving left slowly\na {colour} square moving up slowly\n"
        )
    prompts = [f"prompts.{name}={tmp_path}/{name}.txt" for name in ("train", "heldout")]
    recipe = [*ANY_FLOW_RUN, *prompts, f"model.path={folder}"]

    def run(name, updates):
        return train(RunConfig.load("tiny-streaming", [*recipe, f"out={tmp_path}/{name}", f"updates={updates}"]))

    whole, parted = run("whole", 2), run("parted", 1)
    run("parted", 2)
    for one, other in zip(read_lines(whole / "metrics.jsonl"), read_lines(parted / "metrics.jsonl"), strict=True):
        assert {**one, **dict.fromkeys(OF_THE_MACHINE)} == {**other, **dict.fromkeys(OF_THE_MACHINE)}
        assert one["drift"] == 0
    assert sample(whole, [Prompt("a red circle", {})], tmp_path / "shown", size=(32, 64, 73)).name == "shown.mp4"
    card = (export(whole, out=tmp_path / "export") / "README.md").read_text()
    assert "chunk_partition=[1, 3, 3, 3, 3, 3]," in card
    monkeypatch.chdir(tmp_path / "export")
    (tmp_path / "export/model").symlink_to(folder)
    exec(compile(card.split("```python\n")[1].split("```")[0], "README.md", "exec"), {})
    assert read_mp4(tmp_path / "export/video.mp4").shape == (61, 3, 32, 64)

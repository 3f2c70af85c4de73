"""Text is text: whatever is typed for a setting stays that, through override, settings, YAML and a run directory."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.config import RunConfig
from flashgrpo.config.reading import read_yaml, write_yaml
from flashgrpo.errors import UserError
from flashgrpo.run.directory import RunDirectory

EXAMPLES = [
    *(
        "text #1, logo",
        "no",
        "2",
        "",
        "%d",
        "@user",
        "${price}",
        "${oc.env:HOME}",
        "!env FLASHGRPO_X",
        "'",
        '"',
        "{a: b}",
    ),
    *(
        "a\nb",
        " a ",
        "\u2028",
        "\x85",
        "\U0001f600",
        "\u202e\u05d0",
        "1e-4",
        "null",
        "~",
        "*a",
        "- a",
        "a: b",
        "\t",
        "[/b]",
        "0x1",
    ),
]
few = settings(max_examples=30, deadline=None)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(EXAMPLES)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0~"), min_size=1, max_size=40)


@few
@given(texts, names)
def test_what_was_typed_is_what_a_run_directory_gives_back(tmp_path_factory, text, name):
    typed = [f"model.negative_prompt={text}", f"prompts.train={name}", f"out=runs/{name}"]
    config = RunConfig.load("tiny", typed)
    assert (config.model.negative_prompt, config.prompts.train, config.out) == (text, name, f"runs/{name}")
    folder = tmp_path_factory.getbasetemp() / "texts"
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(), "utf-8")
    _, stored = RunDirectory.existing(folder)
    assert stored == config.model_copy(update={"out": str(folder)})


@given(
    st.recursive(texts | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False), st.lists, max_leaves=5)
)
def test_yaml_gives_back_what_it_was_given(value):
    assert read_yaml(write_yaml({"a": value})) == {"a": value}


@few
@given(st.text(max_size=5), st.sampled_from(["\ud800", "\udcff"]), st.text(max_size=5))
def test_half_a_character_is_refused(before, half, after):
    with pytest.raises(UserError, match="is no text that UTF-8 can hold"):
        RunConfig.load("tiny", [f"model.negative_prompt={before}{half}{after}"])


def test_a_variable_is_read_by_its_tag_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "FLASHGRPO_DATA", "no: #1")
    file = tmp_path / "recipe.yaml"
    text = RunConfig.load("tiny").to_yaml().replace("train: flashgrpo:", "train: !env FLASHGRPO_DATA/")
    file.write_text(text, "utf-8")
    assert RunConfig.load(file).prompts.train.startswith("no: #1/")
    assert RunConfig.load("tiny", ["prompts.train=!env FLASHGRPO_DATA"]).prompts.train == "!env FLASHGRPO_DATA"

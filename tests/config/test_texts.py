"""Text is text: what is typed for a setting stays that, from the override to the model card of the resumed run."""

import ast
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashgrpo.card import code, model_card
from flashgrpo.config import RunConfig
from flashgrpo.config.reading import read_yaml, write_yaml
from flashgrpo.errors import UserError
from flashgrpo.export import export
from flashgrpo.report import write_report
from flashgrpo.run.directory import RunDirectory
from flashgrpo.run.lines import read_lines
from flashgrpo.train import settings_of, train
from tests.conftest import small_run

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
FACTS = ["- Base", "- Trained", "- Videos", "- Prompts", "- Reward", "- Guidance", "- Seed"]
KEY = "a `b`: c"
few = settings(max_examples=30, deadline=None)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(EXAMPLES)
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0~"), min_size=1, max_size=40)


@few
@given(texts, names)
def test_what_was_typed_is_what_a_run_directory_gives_back(tmp_path_factory, text, name):
    typed = [f"model.negative_prompt={text}", f"prompts.train={name}", f"out=runs/{name}"]
    config = RunConfig.load("tiny", typed)
    assert (config.model.negative_prompt, config.prompts.train, config.out) == (text, name, f"runs/{name}")
    folder = tmp_path_factory.getbasetemp() / "texts" / f"run {name}"
    (folder / "checkpoints/000001").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(), "utf-8")
    directory, stored = RunDirectory.existing(folder)
    assert stored == config.model_copy(update={"out": str(folder)})
    resumed = settings_of(str(folder), [])
    assert resumed == stored
    directory.check(resumed)  # refuses a run whose settings have changed


@settings(max_examples=10, deadline=None)
@given(names)
def test_a_model_card_names_what_was_typed(tmp_path_factory, name):
    typed = [f"model.path={name}", f"prompts.train={name}", f"rewards={{agreement: null, '{KEY}': {{call: a.b:c}}}}"]
    config = RunConfig.load("tiny", typed)
    card = model_card(config, "diffusers", ["a.safetensors"], 3, None, False)
    _, head, body = card.split("---\n", 2)
    assert read_yaml(head)["base_model"] == name
    before, _, recipe = body.rpartition("\n```yaml\n")
    (file := tmp_path_factory.getbasetemp() / "recipe.yaml").write_text(recipe.partition("```")[0], "utf-8")
    assert RunConfig.load(file, ["out=unused"]).algorithm == config.algorithm
    _, _, program = before.partition("\n```python\n")
    loads = [node for node in ast.walk(ast.parse(program.partition("\n```")[0])) if isinstance(node, ast.Call)]
    [path] = [node.args[0] for node in loads if ast.unparse(node.func).endswith("from_pretrained")]
    assert ast.literal_eval(path) == name
    facts = [line for line in before.split("\n") if line.startswith("- ")]
    assert [fact.split(":")[0] for fact in facts] == FACTS
    assert facts[0] == f"- Base: {code(name)}"


@given(texts)
def test_a_text_in_a_model_card_is_one_line_that_can_be_read_back(text):
    shown = code(text)
    assert shown.isprintable()
    assert shown.count("`") == 2
    assert text == shown[1:-1] or text == ast.literal_eval(shown[1:-1])


def test_a_run_of_odd_texts_trains_resumes_is_exported_and_shown(tmp_path):
    odd = "text #1, ${HOME} '\"` \u2028\x85\U0001f600 [b] 100%"
    settings = (f"model.negative_prompt={odd}", f"model.condition_cache={tmp_path}/{odd}", "evaluation.videos=0")
    config = small_run(tmp_path / odd, *settings, "updates=1")
    train(config)
    run = train(settings_of(str(tmp_path / odd), ["updates=2"]))
    assert RunDirectory.existing(run)[1].model.negative_prompt == odd
    assert [line["update"] for line in read_lines(run / "metrics.jsonl")] == [1, 2]
    assert (export(run, out=tmp_path / f"{odd}-out") / "README.md").is_file()
    assert odd.replace("'", "&#39;").replace('"', "&#34;").split("\u2028")[0] in write_report(run).read_text("utf-8")


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

"""What the house rules say that a linter does not; the layers are import-linter's (`make layers`)."""

import ast
import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest

import flashgrpo
from flashgrpo.learning.penalized import Penalized
from flashgrpo.learning.settings import Averaged, Credit, Current, Frozen
from flashgrpo.presets import PRESETS, AnyExplore, AnyScore

ROOT = Path(flashgrpo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
LOOP = [name for name in NAMES if name in ("train.py", "session.py") or name.startswith("learning/")]
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = ast.For | ast.AsyncFor | ast.While | ast.If | ast.With | ast.AsyncWith | ast.Try


def test_no_drawer_for_odds_and_ends():
    assert not {"utils.py", "common.py", "base.py", "helpers.py", "misc.py"} & {file.name for file in FILES}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_fits_in_a_head(name):
    assert (ROOT / name).read_text().count("\n") <= 300


@pytest.mark.parametrize("name", NAMES)
def test_a_function_fits_on_a_screen(name):
    """At most 50 lines without its decorators, and at most three blocks inside of each other."""
    functions = [node for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, FUNCTIONS)]
    assert not [(f.name, lines) for f in functions if (lines := f.end_lineno - f.lineno + 1) > 50]
    assert not [(f.name, deep) for f in functions if (deep := depth(f)) > 3]


def depth(node: ast.AST) -> int:
    """Count the blocks that lie inside of each other below a node; an `elif` stands beside its `if`."""
    below = 0
    for child in ast.iter_child_nodes(node):
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        below = max(below, depth(child) + (isinstance(child, BLOCKS) and not is_elif))
    return below


def test_depth():
    code = "def f():\n for x in y:\n  if a:\n   pass\n  elif b:\n   with c:\n    [d for d in e if d]\n  else:\n   pass"
    assert depth(ast.parse(code)) == 3
    assert depth(ast.parse("if a:\n pass\nelse:\n if b:\n  pass\n x = 1")) == 2
    assert depth(ast.parse("def f():\n def g():\n  while a:\n   try:\n    pass\n   finally:\n    pass")) == 2


@pytest.mark.parametrize("name", LOOP)
def test_the_loop_knows_no_algorithm_process_or_model_by_name(name):
    text = (ROOT / name).read_text().split('"""', 2)[2]
    presets = [key for key, value in vars(flashgrpo.presets).items() if isinstance(value, flashgrpo.presets.Algorithm)]
    words = {*PRESETS, *presets, *classes_in("processes"), *classes_in("models")} - {"Lora"}  # which any process has
    assert not [word for word in words if re.search(rf"\b{re.escape(word)}\b", text)]
    assert "flashgrpo.processes" not in text


def classes_in(package: str) -> set[str]:
    files = [file for name, file in zip(NAMES, FILES, strict=True) if name.startswith(f"{package}/")]
    return {node.name for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)}


def test_devices_are_named_in_one_place():
    for name, file in zip(NAMES, FILES, strict=True):
        text = file.read_text().replace('device.type == "cuda"', "")  # asking is not choosing
        assert name == "distributed/world.py" or not re.search(r"""["']cuda["']|\.cuda\(""", text), name


def test_files_of_json_have_one_writer():
    """`files.write_json` and `to_json`, which know no NaN and no Infinity."""
    for name, file in zip(NAMES, FILES, strict=True):
        found = re.search(r"(write|write_text|append_line)\([^\n]*json\.dumps", file.read_text())
        assert name == "files.py" or not found, name


def test_nothing_is_unpickled():
    """But for the index of a checkpoint, which `_IndexUnpickler` reads, and tensors alone (`weights_only`)."""
    unsafe = r"\bpickle\.\w+|torch\.load\((?![^)]*weights_only=True\))|all_gather_object|broadcast_object"
    for name, file in zip(NAMES, FILES, strict=True):
        found = set(re.findall(unsafe, file.read_text()))
        assert found <= ({"pickle.Unpickler", "pickle.UnpicklingError"} if name == "run/index.py" else set()), name


def test_texts_are_utf8_whatever_the_locale():
    """Every file that is opened as text says its encoding."""
    for name, file in zip(NAMES, FILES, strict=True):
        calls = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
        assert not [(name, call.lineno) for call in calls if takes_the_locale(call)]


OTHER_OPENS = ("os.open", "Image.open")


def takes_the_locale(call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the locale has."""
    is_method = isinstance(call.func, ast.Attribute)
    called = call.func.attr if is_method else getattr(call.func, "id", "")
    words = {keyword.arg: keyword.value for keyword in call.keywords}
    if called in ("run", "Popen", "check_output"):
        return any(key in words for key in ("text", "universal_newlines")) and "encoding" not in words
    if called in ("read_text", "write_text"):
        own = not is_method  # files.write_text, which has one
        return not own and "encoding" not in words and len(call.args) <= (called == "write_text")
    if called not in ("open", "fdopen") or ast.unparse(call.func) in OTHER_OPENS:
        return False
    place = 0 if is_method and called == "open" else 1
    mode = words.get("mode", call.args[place] if len(call.args) > place else ast.Constant("r"))
    return "encoding" not in words and "b" not in ast.literal_eval(mode)


@pytest.mark.parametrize(
    ("code", "takes"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(text)", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("write_text(path, text)", False),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("path.open('w')", True),
        ("path.open('ab')", False),
        ("path.open(encoding='utf-8')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("subprocess.run(words, text=True)", True),
        ("subprocess.run(words)", False),
    ],
)
def test_what_takes_the_locale(code, takes):
    assert takes_the_locale(ast.parse(code).body[0].value) == takes


def test_what_others_import():
    assert set(flashgrpo.__all__) >= {"RunConfig", "train", "evaluate", "presets"}
    assert callable(flashgrpo.train)
    assert callable(flashgrpo.evaluate)
    for name in ("FLASH_GRPO", "FLOW_GRPO", "FLOW_GRPO_FAST", "MIX_GRPO", "DANCE_GRPO"):
        assert isinstance(getattr(flashgrpo.presets, name), flashgrpo.presets.Algorithm)
    parts = {
        "explore": get_args(get_args(AnyExplore)[0]),
        "score": get_args(get_args(AnyScore)[0]),
        "credit": Credit,
        "objective": Penalized,
        "behaviour": (Current, Averaged, Frozen),
    }
    assert [field.name for field in dataclasses.fields(flashgrpo.presets.Algorithm)] == list(parts)
    for algorithm in PRESETS.values():
        assert all(isinstance(getattr(algorithm, name), kind) for name, kind in parts.items())

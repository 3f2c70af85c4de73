"""Every code block of the README and of docs/ runs, or says why not.

A page's blocks run in their order, in a folder of the page's own. What a block is, its source shows:

- ```python runs. What it prints has to be the ```text block behind it, where there is one.
- ```bash runs line by line: `flashgrpo` in this process, `> FILE` included.
- ```yaml is part of a recipe: merged over `tiny`, it has to be valid, and the rewards that it names have to be there.
- A block whose first line is a comment with a file's name (`# brightness.py`) is that file.
- `<!-- not run: REASON -->` right above a block says why it is not run.
- An indented block is a listing: commands have to exist with their options, settings have to be valid. Those of the
  README run as well.

Commands and programs run as they stand. They are fast since the folder holds a recipe file called `tiny`, which goes
before the one that ships: the same, with the numbers of SMALL.
"""

import contextlib
import doctest
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
import yaml
from markdown_it import MarkdownIt
from typer.testing import CliRunner

import flashgrpo
from flashgrpo.cli import app
from flashgrpo.config import RunConfig
from flashgrpo.config.algorithm import read_tree
from flashgrpo.config.processes import process_of
from flashgrpo.config.recipe import find_recipe, merge_choices
from flashgrpo.files import resolve_path
from flashgrpo.scoring.rewards import Rewards

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SMALL = {
    "updates": 2,
    "rollout": {"prompts": 1, "group_size": 2, "num_steps": 4},
    "optim": {"micro_batch": 2},
    "prompts": {"heldout": "heldout.jsonl"},
    "evaluation": {"every": 20, "num_steps": 2, "samples_per_prompt": 1, "videos": 1},
    "checkpoint": {"every": 20},
    "tracking": {"progress": False},
}
# Lines of the README that are looked at and not run, by what they begin with.
README_NOT_RUN = {
    "make ": "installs packages, or runs for minutes; the target has to exist",
    "torchrun ": "tests/distributed/test_launch.py does",
    "flashgrpo train wan21-1.3b-24gb": "needs a GPU and the checkpoint",
    "flashgrpo watch ": "runs until it is told to end; tests/report/test_live.py does",
    "flashgrpo reward ": "runs until it is told to end; tests/serving does",
    "flashgrpo compare": "runs for minutes; tests/compare/test_compare.py does",
}
TREE = yaml.safe_load(find_recipe("tiny").read_text())
TREE_OF = process_of(TREE["algorithm"])
HELDOUT = Path(resolve_path(TREE["prompts"]["heldout"])).read_text("utf-8").splitlines(keepends=True)[:2]


@dataclass(frozen=True)
class Block:
    """A code block: its language ("" where it is indented), its text, and why it is not run, where it is not."""

    where: str
    language: str
    text: str
    reason: str | None

    @property
    def file(self) -> str | None:
        """The file that it is, by its first line."""
        named = re.match(r"# ([\w./-]+\.(?:py|yaml))\n", self.text)
        return named[1] if named else None


def blocks(page: Path) -> list[Block]:
    found, reason = [], None
    for token in MarkdownIt().enable("table").parse(page.read_text("utf-8")):
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else ""
            parts = [token.content] if language else re.split(r"\n\n+(?=flashgrpo )", token.content)
            where = f"{page.name}:{token.map[0] + 1}"
            found += [Block(where, language, f"{part.rstrip()}\n", reason) for part in parts]
        comment = re.fullmatch(r"<!-- not run: (.+) -->\s*", token.content) if token.type == "html_block" else None
        reason = comment[1] if comment else None
    return found


def commands(text: str) -> Iterator[str]:
    """The commands of a block: continued lines joined, without comments and what stands for any settings.

    `flashgrpo reward serve | env NAME` is two.
    """
    begun = ""
    for row in re.sub(r"\\\n\s*", "", text).splitlines():
        line = begun + re.split(r"\s{2,}#?", row.strip())[0]
        if line.startswith("flashgrpo ") and line.count("'") % 2:  # a quotation goes on in the next row
            begun = f"{line} "
            continue
        begun = ""
        line = line.replace("[key=value ...]", "").replace(" [--json]", "")
        either = re.fullmatch(r"(flashgrpo reward) (\w+) \| (\w+) (.*)", line)
        if either:
            yield from (f"{either[1]} {name} {either[4]}" for name in (either[2], either[3]))
        elif line and not line.startswith("#"):
            yield line


# ---- commands --------------------------------------------------------------------------------------------------------


def check_command(line: str) -> None:
    """The command exists with these options, and the settings of a recipe that ships are valid."""
    words = shlex.split(line.partition(" > ")[0])
    words = words[words.index("flashgrpo") + 1 :]
    command = typer.main.get_command(app)
    path = []
    while hasattr(command, "commands"):
        path.append(words.pop(0))
        assert path[-1] in command.commands, line
        command = command.commands[path[-1]]
    context = command.make_context(" ".join(path), words)
    recipe = context.params.get("recipe", "")
    if (ROOT / "recipes" / f"{recipe}.yaml").exists() and path != ["compare"]:
        RunConfig.load(recipe, context.params["overrides"] or [])


def check_other(line: str) -> None:
    """What a line of a listing names is in the repository; a formula names nothing."""
    words = line.split()
    if "make" in words[:2]:
        assert re.search(rf"^{words[words.index('make') + 1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[0] in ("python", "sbatch") and not words[1].startswith("-"):
        assert (ROOT / words[1]).is_file(), line


def run_command(line: str) -> None:
    line, _, target = (part.strip() for part in line.partition(" > "))
    words = shlex.split(line)
    if words[0] == "flashgrpo":
        result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        output = result.stdout
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        output = done.stdout
    if target:
        Path(target).write_text(output, "utf-8")


# ---- pages -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reader's folder: the small `tiny`, and nothing else but what its recipe names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "heldout.jsonl").write_text("".join(HELDOUT), "utf-8")
    (tmp_path / "tiny").write_text(yaml.safe_dump(merge_choices(TREE, SMALL)), "utf-8")
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(f"{tmp_path}/"):
            del sys.modules[name]


def check_settings(text: str, where: str) -> RunConfig | None:
    """Part of a recipe is valid; None where the text is none."""
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    if not isinstance(settings, dict):
        return None
    if "preset" in settings:
        settings = {"algorithm": settings}
    if not settings.keys() <= RunConfig.model_fields.keys():
        return None
    whole = merge_choices(read_tree(TREE, "tiny"), read_tree(settings, where))
    if process_of(whole["algorithm"]) != TREE_OF:
        whole |= {part: settings.get(part, {}) for part in ("rollout", "evaluation")}
    return RunConfig.parse(whole, where)


def is_python(page: Path, block: Block) -> bool:
    return block.language == "python" or (page.name == "README.md" and block.text.startswith("from "))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page, folder):
    names: dict[str, object] = {"__name__": "__main__"}
    printed = None
    for block in blocks(page):
        before, printed = printed, None
        if block.reason:
            continue
        if block.file:
            Path(block.file).write_text(block.text, "utf-8")
            if block.file.endswith(".py"):
                compile(block.text, block.where, "exec")
        elif is_python(page, block):
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block.text, block.where, "exec"), names)
            printed = output.getvalue()
        elif block.language == "text":
            assert before in (None, block.text), block.where
        elif block.language == "yaml":
            config = check_settings(block.text, block.where)
            assert config is not None, f"{block.where} is no part of a recipe"
            if page.name != "papers.md":
                Rewards(config.rewards)
        elif block.language == "bash":
            for line in commands(block.text):
                run_command(line)
        else:
            assert block.language == "", f"{block.where}: what is to be done with {block.language}?"
            if page.name == "README.md" and not check_settings(block.text, block.where):
                run_listing(block)


def run_listing(block: Block) -> None:
    for line in commands(block.text):
        if "flashgrpo " not in line or any(line.startswith(start) for start in README_NOT_RUN):
            continue
        if "RECIPE.yaml" in line and not Path("RECIPE.yaml").exists():
            small = yaml.safe_load(Path("tiny").read_text())
            Path("RECIPE.yaml").write_text(yaml.safe_dump({**small, "out": "RUN"}), "utf-8")
        run_command(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_listing_is_valid(page, folder):
    """A listing is a part of a recipe, or its commands, options, settings and files exist."""
    for block in blocks(page):
        if block.reason or block.file or block.language or is_python(page, block):
            continue
        if check_settings(block.text, block.where):
            continue
        for line in commands(block.text):
            check = check_command if "flashgrpo " in line else check_other
            check(line)


@pytest.mark.parametrize(
    "name",
    ["learning.advantage", "processes.flow.noise", "processes.flow.schedule", "processes.flow.steps"],
)
def test_examples_in_docstrings(name):
    """Which the API pages show."""
    module = importlib.import_module(f"flashgrpo.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_what_is_not_run_says_why():
    for page in PAGES:
        marked = page.read_text("utf-8").count("<!-- not run")
        assert marked == sum(block.reason is not None for block in blocks(page)), f"{page.name}: a marker marks nothing"
        for block in blocks(page):
            assert block.reason is None or len(block.reason.split()) >= 3, block.where


# ---- what the pages name ---------------------------------------------------------------------------------------------


def test_links_lead_somewhere():
    """In the repository's view; `mkdocs build --strict` sees to the site's, and to anchors."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if re.match(r"https?://|#", link):
                continue
            target = (page.parent / link.partition("#")[0]).resolve()
            assert target.is_file(), f"{page.name}: {link}"
            outside = page.is_relative_to(DOCS) and not target.is_relative_to(DOCS)
            assert not outside, f"{page.name}: {link} is not part of the site; name the file without a link"


def test_videos_that_are_shown_exist_and_are_small():
    shown = {
        DOCS / name
        for page in DOCS.glob("*.md")
        for name in re.findall(r'<video src="([^"]+)"', page.read_text("utf-8"))
    }
    assert shown == set((DOCS / "videos").iterdir())
    assert sum(file.stat().st_size for file in shown) < 400_000


def test_tests_that_are_named_exist():
    """A path from the top, or a test's name behind the name of its file."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text("utf-8")
        for file in re.findall(r"tests/[\w/]+\.(?:py|txt)", text):
            assert (ROOT / file).is_file(), f"{page.name}: {file}"
        for file, name in re.findall(r"(test_\w+\.py)::(\w+)", text):
            found = [path.read_text("utf-8") for path in (ROOT / "tests").rglob(file)]
            assert any(f"\ndef {name}(" in tests for tests in found), f"{page.name}: {file}::{name}"


def test_readme_lists_every_package_and_every_file_at_the_top():
    text = (ROOT / "README.md").read_text("utf-8")
    [tree] = re.findall(r"^    src/flashgrpo/\n(.*?)^    src/", text, re.MULTILINE | re.DOTALL)
    package = ROOT / "src" / "flashgrpo"
    packages = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    there = packages | {path.name for path in package.glob("*.py")}
    listed = re.findall(r"^      ((?:[a-z]+(?:/|\.py) ?)+)", tree, re.MULTILINE)
    assert sorted(" ".join(listed).split()) == sorted(there - {"__init__.py", "__main__.py"})


def test_settings_page_has_every_key_and_every_number():
    text = (DOCS / "settings.md").read_text("utf-8")
    rows = " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    [numbers] = [block.text for block in blocks(DOCS / "settings.md") if block.language == "text"]
    for name in [*RunConfig.model_fields, *numbers.strip().split(", ")]:
        assert f"`{name}`" in rows or name in ("update", "samples"), name


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == flashgrpo.__version__
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2605.15980"

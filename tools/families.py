"""Write the table of docs/families.md: what holds each family, and how closely it is its pipeline.

    pytest tests/models/test_conformance.py -k sampling -o junit_family=xunit1 --junitxml=parity.xml
    python -m tools.families parity.xml

Without a file the errors stay as the page has them; the other columns are read from the code, the recipes and
docs/hardware.md.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import yaml

from flashgrpo.models.families import FAMILIES
from flashgrpo.models.known import KNOWN
from tests.families import KINDS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/families.md"
COLUMNS = ("family", "lines of code", "latents", "pixels", "exports checked", "recipes, GiB a process")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


def code_lines(file: Path) -> int:
    """Count the lines of a file but for empty ones, comments and first lines of docstrings."""
    lines = map(str.strip, file.read_text("utf-8").splitlines())
    return len([line for line in lines if line and not line.startswith(("#", '"""'))])


def table(errors: Mapping[str, tuple[str, str]]) -> str:
    """Return the table; `errors` are the largest of latents and pixels, by pipeline."""
    exported: dict[str, bool] = {}
    for kind in KINDS.values():
        name = type(kind.build()).__name__
        exported[name] = exported.get(name, True) and kind.comfyui
    return HEAD + "\n".join(_row(pipeline, exported[pipeline], errors) for pipeline in FAMILIES) + "\n"


def _row(pipeline: str, comfyui: bool, errors: Mapping[str, tuple[str, str]]) -> str:
    family = FAMILIES[pipeline]
    lines = code_lines(ROOT / f"src/flashgrpo/models/{family.module}.py")
    latents, pixels = errors[pipeline]
    exports = f"diffusers, {'ComfyUI, ' if comfyui else ''}merged"
    recipes = "; ".join(_recipes(pipeline)) or "none"
    return f"| {family.name} | `{family.module}.py`, {lines} | {latents} | {pixels} | {exports} | {recipes} |"


def _recipes(pipeline: str) -> Iterator[str]:
    counted = (ROOT / "docs/hardware.md").read_text("utf-8")
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        path = yaml.safe_load(file.read_text("utf-8"))["model"]["path"]
        rows = re.findall(rf"^\| {re.escape(file.stem)} \| (\d+) \|.*?M \| (.*) \|$", counted, re.MULTILINE)
        if path in KNOWN and KNOWN[path].family == pipeline and rows:
            processes, sizes = rows[0]
            yield f"`{file.stem}` {max(map(float, sizes.split(' | ')))} of {processes}"


def measured(reports: Sequence[Path]) -> dict[str, tuple[str, str]]:
    """Read the largest errors of each pipeline, of all its kinds and both solvers, from reports of pytest."""
    found: dict[str, dict[str, float]] = {}
    cases = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
    for case in cases:
        if case.find("failure") is not None:
            continue
        name = re.search(r"\[(.*)-(euler|unipc)\]$", str(case.get("name")))
        for one in case.iter("property") if name else ():
            errors = found.setdefault(type(KINDS[name[1]].build()).__name__, {})
            errors[one.get("name", "")] = max(errors.get(one.get("name", ""), 0.0), float(one.get("value", "")))
    return {pipeline: (_short(each["latents"]), _short(each["pixels"])) for pipeline, each in found.items()}


def _short(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def written(page: str) -> dict[str, tuple[str, str]]:
    """Read the errors that the page has."""
    rows = {
        row[0]: row for line in page.splitlines() if len(row := [cell.strip() for cell in line.split("|")[1:-1]]) == 6
    }
    return {pipeline: (rows[family.name][2], rows[family.name][3]) for pipeline, family in FAMILIES.items()}


def main() -> None:
    """Replace the page's table."""
    page = PAGE.read_text("utf-8")
    errors = measured([Path(file) for file in sys.argv[1:]]) if len(sys.argv) > 1 else written(page)
    PAGE.write_text(re.sub(r"\| family \|.*?\n\n", lambda _: table(errors) + "\n", page, flags=re.DOTALL), "utf-8")


if __name__ == "__main__":
    main()

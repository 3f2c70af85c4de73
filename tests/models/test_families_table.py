"""The families are listed in one place; whatever else lists them says the same."""

from pathlib import Path

import diffusers
import pytest

from flashgrpo.models.families import FAMILIES, STREAMING, table
from flashgrpo.models.known import KNOWN
from tests.families import KINDS
from tools.families import PAGE, written
from tools.families import table as table_of_evidence

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/adding-a-model.md"])
def test_a_page_has_the_table(page):
    assert table() in (ROOT / page).read_text("utf-8")


def test_every_family_is_tested_and_its_sizes_are_known():
    built = {type(kind.build()).__name__ for kind in KINDS.values()}
    assert built == set(FAMILIES)
    assert {architecture.family for architecture in KNOWN.values()} == {*FAMILIES, *STREAMING}
    assert all(hasattr(diffusers, pipeline) for pipeline in (*FAMILIES, *STREAMING))


@pytest.mark.parametrize("file", sorted({family.module for family in FAMILIES.values()} - {"wan"}))
def test_a_family_is_a_short_file(file):
    """120 lines of code; Wan's five kinds of checkpoints take more."""
    lines = (ROOT / f"src/flashgrpo/models/{file}.py").read_text("utf-8").splitlines()
    assert len([line for line in lines if line.strip() and not line.strip().startswith(("#", '"""'))]) <= 120


def test_the_page_of_what_holds_them_is_true():
    """But for the errors, which `python -m tools.families REPORT` writes."""
    page = PAGE.read_text("utf-8")
    assert table_of_evidence(written(page)) in page

"""docs/compatibility.md says what these families do; ``make compatibility`` runs them all, and every check."""

import pytest

pytest.importorskip("transformers")

from tests.compatibility.families import FAMILIES
from tests.compatibility.table import CHECKS, PAGE, Row

FAST = ["save and load", "generate", "Trainer"]


def documented() -> dict[str, dict[str, str]]:
    """``{family: {column: cell}}`` of the page."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@pytest.mark.parametrize("name", ["Swin", "T5", "Mixtral"])
def test_row_is_as_documented(name: str) -> None:
    row = Row(name, FAMILIES[name], FAST)
    assert row.cells == {check: documented()[name][check] for check in FAST}, row.words


def test_every_family_and_check_is_documented() -> None:
    assert list(documented()) == list(FAMILIES)
    assert all(set(CHECKS) <= set(row) for row in documented().values())

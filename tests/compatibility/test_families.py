"""docs/compatibility.md says what these families do; ``make compatibility`` runs them all, and every check."""

import pytest

pytest.importorskip("transformers")

from tests.compatibility.families import FAMILIES
from tests.compatibility.table import CHECKS, PAGE, Row

CELLS = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
DOCUMENTED = {line[0].removeprefix("| "): line for line in CELLS[1:]}
FAST = ["save and load to the bit", "generate", "compile", "Trainer"]


@pytest.mark.parametrize("name", ["Swin", "T5", "Mixtral"])
def test_row_is_as_documented(name: str) -> None:
    row = Row(name, FAMILIES[name], FAST)
    columns = CELLS[0]
    documented = {check: DOCUMENTED[name][columns.index(check)].strip() for check in FAST}
    assert row.cells == documented, row.words


def test_every_family_is_documented() -> None:
    assert set(DOCUMENTED) == set(FAMILIES)
    assert set(CHECKS) <= {cell.removesuffix(" |") for cell in CELLS[0]}

"""The tables of docs/reliability.md are those of figures.json, not edited by hand."""

from __future__ import annotations

from tests.reliability.figures import MARK, PAGE, page


def test_the_tables_are_the_figures() -> None:
    text = PAGE.read_text()
    assert len(MARK.findall(text)) == 7
    assert page(text) == text, "run python -m tests.reliability.figures"

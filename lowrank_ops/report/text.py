"""Columns of text and empty figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def notes(unreached: Sequence[str], skipped: Mapping[str, str]) -> list[str]:
    """What was passed over and why, a line each."""
    found = [f"not reached by any batch: {fqn}" for fqn in unreached]
    return found + [f"left as it is: {fqn or '(the model)'}: {reason}" for fqn, reason in skipped.items()]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A matplotlib figure with one axes, drawn without a display.

    Raises:
        ImportError: matplotlib is missing; the message says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'lowrank_ops[plots]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots()

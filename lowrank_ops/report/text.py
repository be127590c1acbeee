"""Plain-text tables and notes, and an empty matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def notes(unreached: Sequence[str], skipped: Mapping[str, str]) -> list[str]:
    """One line per layer that was left out, with the reason."""
    lines = [f"not reached by any batch: {fqn}" for fqn in unreached]
    return lines + [f"skipped: {fqn or '(the model)'}: {reason}" for fqn, reason in skipped.items()]


def percent(share: float | None) -> str:
    """A share in percent; None reads "unknown"."""
    return "unknown" if share is None else f"{share:.3%}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    )


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure and its axes (an array of them with several columns), which needs no display.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'lowrank_ops[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure, figure.subplots(1, columns)


def layer_bars(axes: Any, names: Sequence[str], values: Sequence[float], mean: float, label: str) -> None:
    """Draw a bar per layer and a dashed line at ``mean``."""
    axes.bar(range(len(names)), values)
    axes.axhline(mean, color="black", linewidth=1, linestyle="--", label=label)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_ylim(0, 1)
    axes.legend()

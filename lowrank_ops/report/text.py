"""Plain-text tables and notes, and an empty matplotlib figure."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole


def notes(unreached: Sequence[str], skipped: Mapping[str, str]) -> list[str]:
    """One line per layer that was left out, with the reason."""
    lines = [f"not reached by any batch: {fqn}" for fqn in unreached]
    return lines + [f"skipped: {fqn or '(the model)'}: {reason}" for fqn, reason in skipped.items()]


def few_rows(layers: Iterable[Any]) -> list[str]:
    """The layers with fewer calibration rows than min(in_features, out_features), with both numbers."""
    sizes = ((layer, min(layer.in_features, layer.out_features)) for layer in layers)
    return [f"{layer.fqn} ({layer.rows:,} of {size:,})" for layer, size in sizes if layer.rows < size]


def few_rows_note(found: Sequence[str]) -> list[str]:
    """One line: which predicted errors hold for the calibration rows only; empty if all layers had enough rows."""
    line = "predicted errors hold for the calibration rows only; fewer rows than min(in_features, out_features)"
    return [f"{line}: {', '.join(found)}"] if found else []


def rows_note(layers: Iterable[Any], errors: bool) -> list[str]:
    """One line: the uncertainty of estimates from this number of rows; empty where :func:`few_rows` applies.

    For independent Gaussian rows, a variance has a relative standard error of sqrt(2 / rows). Errors predicted from the
    rows that the factors were fitted to are also low, by about 2 rank / rows.
    """
    layers = [layer for layer in layers if layer.rows]
    if not layers or few_rows(layers):
        return []
    sampling = max(2 * (2 / layer.rows) ** 0.5 for layer in layers)
    fitted = max(2 * (2 / layer.rows) ** 0.5 + 2 * _fitted(layer) / layer.rows for layer in layers)
    rows = min(layer.rows for layer in layers)
    predicted = f", predicted errors within {fitted:.1%}" if errors else ""
    return [
        f"from at least {rows:,} rows per layer: variances are within {sampling:.1%}{predicted} (two standard errors, "
        "if rows are independent)"
    ]


def _fitted(layer: Any) -> int:
    return layer.rank or getattr(layer, "channels", None) or 0


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


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure whole or not at all, in the format of the file's suffix; without one, PNG."""
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".png")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:])
    write_whole(path, content.getvalue())


def layer_bars(axes: Any, names: Sequence[str], values: Sequence[float], mean: float, label: str) -> None:
    """Draw a bar per layer and a dashed line at ``mean``."""
    axes.bar(range(len(names)), values)
    axes.axhline(mean, color="black", linewidth=1, linestyle="--", label=label)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_ylim(0, 1)
    axes.legend()

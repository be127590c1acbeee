"""The demo's picture: accuracy over size, and the utilization of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report import UtilizationReport, new_figure
from .comparison import Row


def draw(path: Path, rows: Sequence[Row], utilization: UtilizationReport) -> None:
    """Write the picture; the suffix of ``path`` decides the format.

    Args:
        path: file to write.
        rows: the dense model, followed by the compressed ones.
        utilization: of the dense model.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    figure, (left, right) = new_figure(width=13, height=4.8, columns=2)
    dense, compressed = rows[0], rows[1:]
    left.axhline(dense.accuracy, color="black", linewidth=1, linestyle="--", label=f"dense, {dense.accuracy:.2f}%")
    budgets = [row for row in compressed if row.budget is not None]
    for method in dict.fromkeys(row.method for row in budgets):
        points = sorted((row.layer_share, row.accuracy) for row in budgets if row.method == method)
        left.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"{method}, budgets")
    for row in compressed:
        if row.budget is None:
            left.plot(row.layer_share, row.accuracy, "k*", markersize=11, label=f"{row.method}, {row.ranks}")
    left.set_xlabel("layer parameters, % of the dense model's")
    left.set_ylabel("accuracy on the test images, %")
    left.set_title("Compressed without fine-tuning")
    left.grid(alpha=0.3)
    left.legend()
    utilization.draw(right)
    figure.savefig(path)

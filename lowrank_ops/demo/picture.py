"""The demo's picture: accuracy against size, and how much of its space each layer uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_ops.report import UtilizationReport

from .comparison import Row


def draw(path: Path, rows: Sequence[Row], utilization: UtilizationReport) -> None:
    """Write the picture; the ending of ``path`` names the format.

    Args:
        path: file to write.
        rows: the dense model first, then its compressions.
        utilization: of the dense model.

    Raises:
        ImportError: matplotlib is missing; the message says how to get it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib is missing; pip install 'lowrank_ops[plots]' brings it") from error
    figure = Figure(figsize=(13, 4.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)

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

    layers, mean = utilization.layers, utilization.mean_layer_utilization
    right.bar(range(len(layers)), [100 * layer.utilization for layer in layers])
    right.axhline(100 * mean, color="black", linewidth=1, linestyle="--", label=f"mean (MLU), {mean:.1%}")
    right.set_xticks(range(len(layers)), [layer.fqn for layer in layers], rotation=90, fontsize=7)
    right.set_ylim(0, 100)
    right.set_ylabel("utilization, %")
    right.set_title(f"Utilization at explained variance {utilization.explained_variance:g}")
    right.legend()
    figure.savefig(path)

"""Accuracy, size and latency of the dense model and the compressed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import lowrank_ops as lro

from ..models.running import ProgressBar
from ..report import CompressionReport
from .evaluation import latencies, percent_equal, predict

METHODS = {"output": "output", "utilized": "utilized", "weight": "weight SVD"}  # {projection: name in the table}
LATENCY_BATCH = 100


@dataclass(frozen=True)
class Row:
    """One model of the comparison."""

    method: str
    ranks: str  # the policy that chose them
    budget: float | None  # % of the layer parameters; None: another policy
    layer_parameters: int  # of the considered layers
    layer_share: float  # layer_parameters in % of the dense model's
    parameters: int  # of the whole model
    accuracy: float  # %
    agreement: float  # % of the images with the dense model's prediction
    latency_ms: float
    compression: dict[str, Any] | None  # the compression report; None: the dense model


def compare(
    dense: nn.Module,
    compressed: Sequence[tuple[nn.Module, CompressionReport]],
    images: Tensor,
    labels: Tensor,
    rounds: int,
) -> list[Row]:
    """Evaluate and time models.

    Args:
        dense: the original, the first row.
        compressed: the compressed models with their reports.
        images: (n, 1, 28, 28).
        labels: (n,).
        rounds: timed calls of each model.
    """
    models = [dense, *(model for model, _ in compressed)]
    with ProgressBar(total=len(models) * len(images), desc="evaluating", unit=" images") as bar:
        predictions = [predict(model, images, bar) for model in models]
    with ProgressBar(total=len(models) * (rounds + 1), desc="timing", unit=" calls") as bar:
        times = latencies(models, images[:LATENCY_BATCH], rounds, bar)

    layer_parameters = compressed[0][1].layer_parameters_before
    rows = []
    for model, report, predicted, milliseconds in zip(
        models, [None, *(report for _, report in compressed)], predictions, times, strict=True
    ):
        method, ranks, budget = ("dense", "-", None) if report is None else _described(report.config)
        kept = layer_parameters if report is None else report.layer_parameters
        rows.append(
            Row(
                method=method,
                ranks=ranks,
                budget=budget,
                layer_parameters=kept,
                layer_share=100 * kept / layer_parameters,
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                accuracy=percent_equal(predicted, labels),
                agreement=percent_equal(predicted, predictions[0]),
                latency_ms=round(milliseconds, 3),
                compression=None if report is None else report.to_dict(),
            )
        )
    return rows


def _described(config: lro.CompressionConfig) -> tuple[str, str, float | None]:
    method = METHODS[str(config.projection)]
    if isinstance(config.rank, lro.ParameterBudget):
        percent = round(100 * config.rank.fraction, 6)
        return method, f"budget {percent:g}%", percent
    assert isinstance(config.rank, lro.ExplainedVariance)
    return method, f"explained variance {config.rank.threshold:g}", None


def table(rows: Sequence[Row]) -> str:
    """A Markdown table, aligned for terminals too."""
    header = ["method", "ranks by", "layer parameters", "parameters", "accuracy", "agreement", "ms / batch"]
    lines = [
        [
            row.method,
            row.ranks,
            f"{row.layer_share:.1f}%",
            f"{row.parameters:,}",
            f"{row.accuracy:.2f}%",
            f"{row.agreement:.2f}%",
            f"{row.latency_ms:.1f}",
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    texts = 2  # the leading columns that hold text, aligned to the left
    rule = ["-" * width if column < texts else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    padded = [
        [f"{cell:<{width}}" if column < texts else f"{cell:>{width}}" for column, (cell, width) in cells]
        for cells in (enumerate(zip(line, widths, strict=True)) for line in (header, rule, *lines))
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)

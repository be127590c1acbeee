"""What was measured and what was done: Mean Layer Utilization and compression, as tables, JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from .config import CompressionConfig, check_share
from .costs import dense_parameters, stored_rank
from .covariances import Covariances
from .dense_layers import FilterFn, find_layers
from .factors import Factors
from .subspaces import LayerSubspaces, layer_subspaces


@dataclass(frozen=True)
class LayerUtilization:
    """One layer's spaces at the report's explained variance."""

    fqn: str
    in_features: int
    out_features: int
    groups: int
    rows: int  # calibration rows seen
    input_rank: int | None  # k_S; None: not measured, the output was streamed
    output_rank: int  # k_T
    rank: int  # utilized rank min(k_S, k_T)
    utilization: float  # rank / min(in_features, out_features)


@dataclass(frozen=True)
class UtilizationReport:
    """How much of their space a model's layers use (Garg et al. 2024)."""

    explained_variance: float
    centered: bool
    layers: tuple[LayerUtilization, ...]
    unreached: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def mean_layer_utilization(self) -> float:
        """MLU: the mean of the layers' utilizations, in [0, 1]."""
        return sum(layer.utilization for layer in self.layers) / len(self.layers)

    def table(self) -> str:
        """One line per layer and the MLU, for a terminal."""
        rows = [
            [
                layer.fqn,
                str(layer.in_features),
                str(layer.out_features),
                "not measured" if layer.input_rank is None else str(layer.input_rank),
                str(layer.output_rank),
                str(layer.rank),
                f"{layer.utilization:.1%}",
            ]
            for layer in self.layers
        ]
        lines = [format_table(["layer", "in", "out", "k_S", "k_T", "rank", "utilization"], rows)]
        mean = f"Mean Layer Utilization {self.mean_layer_utilization:.1%}"
        lines.append(f"{mean} at explained variance {self.explained_variance:g}")
        return "\n".join(lines + _notes(self.unreached, self.skipped))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {**asdict(self), "mean_layer_utilization": self.mean_layer_utilization}

    def to_json(self) -> str:
        """The report as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def plot(self, path: str | Path) -> None:
        """Write a bar chart of the layers' utilizations; the ending of ``path`` names the format.

        Raises:
            ImportError: matplotlib is missing; it comes with the extra ``plots``.
        """
        figure, axes = new_figure(width=max(6.0, 0.25 * len(self.layers)), height=4)
        positions = range(len(self.layers))
        axes.bar(positions, [layer.utilization for layer in self.layers])
        axes.axhline(self.mean_layer_utilization, color="black", linewidth=1, linestyle="--", label="mean (MLU)")
        axes.set_xticks(positions, [layer.fqn for layer in self.layers], rotation=90, fontsize=7)
        axes.set_ylim(0, 1)
        axes.set_ylabel("utilization")
        axes.set_title(f"explained variance {self.explained_variance:g}")
        axes.legend()
        figure.savefig(path)


def utilization(
    model: nn.Module,
    covariances: Covariances,
    explained_variance: float = 0.99,
    *,
    centered: bool = True,
    filter_fn: FilterFn | None = None,
    subspaces: Mapping[str, LayerSubspaces] | None = None,
    progress: bool = False,
) -> UtilizationReport:
    """Measure the utilized rank of every calibrated layer.

    Args:
        model: the model that was calibrated.
        covariances: from :func:`lowrank_ops.calibrate`.
        explained_variance: share of the variance in (0, 1] that the kept directions hold.
        centered: measure about the mean; False takes the second moment, as if zero were the mean.
        filter_fn: ``filter_fn(module, fqn) -> bool`` chooses layers; None takes all.
        subspaces: from :func:`lowrank_ops.layer_subspaces`; made here by default.
        progress: show a progress bar.

    Raises:
        ValueError: ``explained_variance`` out of range, or no layer with a covariance.
    """
    check_share("explained_variance", explained_variance)
    layers, _ = find_layers(model, filter_fn)
    if subspaces is None or any(space.centered != centered for space in subspaces.values()):
        subspaces = layer_subspaces(layers, covariances, centered=centered)
    subspaces = {fqn: space for fqn, space in subspaces.items() if fqn in layers}
    bar = tqdm(subspaces.items(), desc="decomposing", unit="layer", disable=not progress)
    rows = tuple(_layer_utilization(fqn, space, explained_variance) for fqn, space in bar)
    if not rows:
        raise ValueError("covariances hold none of the model's layers that filter_fn keeps; calibrate them first.")
    return UtilizationReport(explained_variance, centered, rows, covariances.unreached, covariances.skipped)


def _layer_utilization(fqn: str, space: LayerSubspaces, explained_variance: float) -> LayerUtilization:
    groups, in_features, out_features = space.dimensions
    rank = space.utilized_rank(explained_variance)
    space.release()
    return LayerUtilization(
        fqn,
        in_features,
        out_features,
        groups,
        space.covariance.count,
        None if space.input is None else space.input.rank_at(explained_variance),
        space.output.rank_at(explained_variance),
        rank,
        rank / min(in_features, out_features),
    )


@dataclass(frozen=True)
class LayerCompression:
    """What became of one layer."""

    fqn: str
    in_features: int
    out_features: int
    rank: int | None  # None: left dense
    stored_rank: int | None
    dense_parameters: int
    parameters: int
    predicted_error: float | None  # E|y - y'|^2 over the calibration rows; None: not known
    output_variance: float
    rows: int  # calibration rows seen
    projection: str | None = None  # how the factors were made; None: left dense
    predicted_loss: float | None = None  # increase of one sample's loss, to second order; None: not known
    excess_error: float | None = None  # bound on predicted_error above the least possible; None: not known
    refitted: bool = False  # the predicted error is then against the dense model's output, from the compressed input


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`lowrank_ops.compress_` chose."""

    config: CompressionConfig
    layers: tuple[LayerCompression, ...]
    model_parameters_before: int
    model_parameters: int
    skipped: Mapping[str, str]

    @classmethod
    def build(
        cls,
        model: nn.Module,
        config: CompressionConfig,
        subspaces: Mapping[str, LayerSubspaces],
        factors: Mapping[str, Factors],
        skipped: Mapping[str, str],
    ) -> CompressionReport:
        """Put a report together before the model is changed."""
        layers = tuple(_layer_compression(fqn, space, factors.get(fqn)) for fqn, space in subspaces.items())
        before = sum(parameter.numel() for parameter in model.parameters())
        saved = sum(layer.dense_parameters - layer.parameters for layer in layers)
        return cls(config, layers, before, before - saved, dict(skipped))

    @property
    def layer_parameters_before(self) -> int:
        """Parameters of the considered layers before."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def layer_parameters(self) -> int:
        """Parameters of the considered layers now."""
        return sum(layer.parameters for layer in self.layers)

    def table(self) -> str:
        """One line per layer and the totals, for a terminal."""
        rows = [
            [
                layer.fqn,
                f"{layer.out_features} x {layer.in_features}",
                "dense" if layer.rank is None else str(layer.rank),
                "-" if layer.stored_rank is None else str(layer.stored_rank),
                f"{layer.parameters / layer.dense_parameters:.1%}",
                _relative_error(layer),
                "not known" if layer.predicted_loss is None else f"{layer.predicted_loss:.3g}",
            ]
            for layer in self.layers
        ]
        header = ["layer", "weight", "rank", "stored", "parameters", "output error", "loss increase"]
        if all(layer.predicted_loss is None or layer.rank is None for layer in self.layers):  # no sensitivity
            header, rows = header[:-1], [row[:-1] for row in rows]
        lines = [format_table(header, rows)]
        known = [layer.predicted_loss for layer in self.layers if layer.predicted_loss is not None]
        if len(header) == 7:
            lines.append(f"predicted increase of the loss of a sample, summed over the layers: {sum(known):.3g}")
        lines.append(
            f"layer parameters {self.layer_parameters_before:,} -> {self.layer_parameters:,} "
            f"({self.layer_parameters / self.layer_parameters_before:.1%}), "
            f"model {self.model_parameters_before:,} -> {self.model_parameters:,} "
            f"({self.model_parameters / self.model_parameters_before:.1%})"
        )
        return "\n".join([*lines, *self._fallbacks(), *_notes((), self.skipped)])

    def _fallbacks(self) -> list[str]:
        return [
            f"{layer.fqn}: factors by projection={layer.projection!r}, as no sensitivity was streamed for it"
            for layer in self.layers
            if layer.projection not in (None, self.config.projection)
        ] + [
            f"{layer.fqn}: not refitted"
            for layer in self.layers
            if self.config.refit is not None and layer.rank is not None and not layer.refitted
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "config": self.config.to_dict(),
            "layers": [asdict(layer) for layer in self.layers],
            "layer_parameters_before": self.layer_parameters_before,
            "layer_parameters": self.layer_parameters,
            "model_parameters_before": self.model_parameters_before,
            "model_parameters": self.model_parameters,
            "skipped": dict(self.skipped),
        }

    def to_json(self) -> str:
        """The report as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def _layer_compression(fqn: str, space: LayerSubspaces, factors: Factors | None) -> LayerCompression:
    groups, in_features, out_features = space.dimensions
    dense = dense_parameters(space)
    kept = dense
    if factors is not None:
        kept = groups * stored_rank(factors.rank) * (in_features + out_features)
        kept += 0 if factors.bias is None else factors.bias.numel()
    output_variance = float(space.output.total.sum()) if factors is None else factors.output_variance
    space.release()
    return LayerCompression(
        fqn,
        in_features,
        out_features,
        None if factors is None else factors.rank,
        None if factors is None else stored_rank(factors.rank),
        dense,
        kept,
        0.0 if factors is None else factors.predicted_error,
        output_variance,
        space.covariance.count,
        None if factors is None else factors.projection,
        0.0 if factors is None else factors.predicted_loss,
        0.0 if factors is None else factors.excess_error,
        factors is not None and factors.refitted,
    )


def _relative_error(layer: LayerCompression) -> str:
    if layer.predicted_error is None:
        return "not known"
    if layer.output_variance == 0:
        return "0.000%"
    return f"{max(0.0, layer.predicted_error) / layer.output_variance:.3%}"


def _notes(unreached: Sequence[str], skipped: Mapping[str, str]) -> list[str]:
    notes = [f"not reached by any batch: {fqn}" for fqn in unreached]
    return notes + [f"left as it is: {fqn or '(the model)'}: {reason}" for fqn, reason in skipped.items()]


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

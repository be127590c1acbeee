"""What compression did to each layer, and what that is expected and measured to cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import CompressionConfig, LatencyBudget, LayerLatencies
from ..factors.projections import Factors
from ..ranks.costs import dense_macs, dense_parameters, lowrank_macs, stored_rank
from ..subspaces.layer import LayerSubspaces
from .kinds import kind_of
from .spectra import spectrum_of
from .text import format_table, new_figure, notes


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
    kind: str = "other"  # one of KINDS
    spectrum: tuple[float, ...] | None = None  # see spectrum_of
    dense_multiplications: int = 0  # over the calibration rows
    multiplications: int = 0
    dense_seconds: float | None = None  # of all calls in one forward, as a LatencyBudget had them measured
    seconds: float | None = None
    # as relative_error, on other data; see with_measured. What is infinite is null in JSON.
    measured_error: float | None = None
    reconstructed: bool = False  # predicted_error is then against the dense model's output, from the compressed input

    @property
    def relative_error(self) -> float | None:
        """The predicted error as a share of the output's variance; None: not known."""
        if self.predicted_error is None:
            return None
        return max(0.0, self.predicted_error) / self.output_variance if self.output_variance else 0.0


class Prediction(NamedTuple):
    """Measured relative output errors against predicted ones."""

    correlation: float | None  # of their logarithms; None where either does not vary
    median_ratio: float  # measured / predicted
    worst_layer: str  # whose ratio is farthest from 1
    worst_ratio: float
    layers: int


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
        policy = config.rank
        latencies = policy.latencies if isinstance(policy, LatencyBudget) else None
        layers = tuple(
            _layer_compression(fqn, model.get_submodule(fqn), space, factors.get(fqn), latencies)
            for fqn, space in subspaces.items()
        )
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

    def with_measured(self, errors: Mapping[str, float]) -> CompressionReport:
        """The report with the relative errors that :func:`lowrank_ops.measure_errors` found beside the predicted.

        Raises:
            ValueError: a name that is none of the report's layers.
        """
        unknown = set(errors) - {layer.fqn for layer in self.layers}
        if unknown:
            raise ValueError(f"errors name layers that the report does not have: {', '.join(sorted(unknown))}.")
        layers = (replace(layer, measured_error=errors.get(layer.fqn, layer.measured_error)) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def compared(self) -> list[tuple[LayerCompression, float, float]]:
        """Replaced layers with their predicted and measured relative errors, where both are positive and finite.

        Refitted layers are left out: their predicted error is from other inputs than the measured one.
        """
        return [
            (layer, layer.relative_error, layer.measured_error)
            for layer in self.layers
            if layer.rank is not None
            and not layer.reconstructed
            and layer.relative_error
            and layer.measured_error
            and math.isfinite(layer.measured_error)
        ]

    def prediction(self) -> Prediction | None:
        """How predicted output errors compare with measured ones; None with less than two layers to compare."""
        pairs = self.compared()
        if len(pairs) < 2:
            return None
        logs = torch.tensor([(predicted, measured) for _, predicted, measured in pairs], dtype=torch.float64).log()
        centered = logs - logs.mean(0)
        norms = centered.norm(dim=0)
        correlation = (
            float(centered[:, 0] @ centered[:, 1] / (norms[0] * norms[1])) if bool((norms > 0).all()) else None
        )
        ratios = (logs[:, 1] - logs[:, 0]).exp()
        worst = int(logs.diff(dim=1).abs().argmax())
        return Prediction(correlation, float(ratios.median()), pairs[worst][0].fqn, float(ratios[worst]), len(pairs))

    def table(self) -> str:
        """One line per layer and the totals, for a terminal."""
        rows = [
            [
                layer.fqn,
                f"{layer.out_features} x {layer.in_features}",
                "dense" if layer.rank is None else str(layer.rank),
                "-" if layer.stored_rank is None else str(layer.stored_rank),
                f"{layer.parameters / layer.dense_parameters:.1%}",
                percent(layer.relative_error),
                "not known" if layer.predicted_loss is None else f"{layer.predicted_loss:.3g}",
            ]
            for layer in self.layers
        ]
        header = ["layer", "weight", "rank", "stored", "parameters", "output error", "loss increase"]
        by_loss = any(layer.predicted_loss is not None and layer.rank is not None for layer in self.layers)
        if not by_loss:  # no sensitivity
            header, rows = header[:-1], [row[:-1] for row in rows]
        if any(layer.measured_error is not None for layer in self.layers):
            header = [*header, "measured error"]
            rows = [[*row, _measured(layer)] for row, layer in zip(rows, self.layers, strict=True)]
        lines = [format_table(header, rows)]
        known = [layer.predicted_loss for layer in self.layers if layer.predicted_loss is not None]
        if by_loss:
            lines.append(f"predicted increase of the loss of a sample, summed over the layers: {sum(known):.3g}")
        lines.append(
            f"layer parameters {self.layer_parameters_before:,} -> {self.layer_parameters:,} "
            f"({self.layer_parameters / self.layer_parameters_before:.1%}), "
            f"model {self.model_parameters_before:,} -> {self.model_parameters:,} "
            f"({self.model_parameters / self.model_parameters_before:.1%})"
        )
        return "\n".join([*lines, *self.fallbacks(), *notes((), self.skipped)])

    def to_html(self, path: str | Path) -> None:
        """Write one page with pictures and tables that needs no other file."""
        from .html import compression_page

        Path(path).write_text(compression_page(self), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Write a bar chart of what is left of every layer; the ending of ``path`` names the format.

        Raises:
            ImportError: matplotlib is missing; it comes with the extra ``plots``.
        """
        figure, axes = new_figure(width=max(6.0, 0.25 * len(self.layers)), height=4)
        names = [layer.fqn for layer in self.layers]
        share = self.layer_parameters / self.layer_parameters_before
        axes.bar(range(len(names)), [layer.parameters / layer.dense_parameters for layer in self.layers])
        axes.axhline(share, color="black", linewidth=1, linestyle="--", label=f"all layers, {share:.1%}")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_ylim(0, 1)
        axes.set_ylabel("parameters, of dense")
        axes.legend()
        figure.savefig(path)

    def fallbacks(self) -> list[str]:
        """What was asked for and could not be done, a line each."""
        return [
            f"{layer.fqn}: factors by projection={layer.projection!r}, as no sensitivity was streamed for it"
            for layer in self.layers
            if layer.projection not in (None, self.config.projection)
        ] + [
            f"{layer.fqn}: not reconstructed"
            for layer in self.layers
            if self.config.reconstruction is not None and layer.rank is not None and not layer.reconstructed
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "config": self.config.to_dict(),
            "layers": [_plain(layer) for layer in self.layers],
            "layer_parameters_before": self.layer_parameters_before,
            "layer_parameters": self.layer_parameters,
            "model_parameters_before": self.model_parameters_before,
            "model_parameters": self.model_parameters,
            "skipped": dict(self.skipped),
            "prediction": None if (prediction := self.prediction()) is None else prediction._asdict(),
        }

    def to_json(self) -> str:
        """The report as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def _layer_compression(
    fqn: str, layer: nn.Module, space: LayerSubspaces, factors: Factors | None, latencies: LayerLatencies | None
) -> LayerCompression:
    groups, in_features, out_features = space.dimensions
    dense = dense_parameters(space)
    kept = dense
    if factors is not None:
        kept = groups * stored_rank(factors.rank) * (in_features + out_features)
        kept += 0 if factors.bias is None else factors.bias.numel()
    output_variance = float(space.output.total.sum()) if factors is None else factors.output_variance
    stored = None if factors is None else stored_rank(factors.rank)
    multiplications = dense_macs(space)
    spectrum = spectrum_of(space)
    space.release()
    return LayerCompression(
        fqn,
        in_features,
        out_features,
        None if factors is None else factors.rank,
        stored,
        dense,
        kept,
        0.0 if factors is None else factors.predicted_error,
        output_variance,
        space.rows,
        None if factors is None else factors.projection,
        0.0 if factors is None else factors.predicted_loss,
        kind_of(fqn, layer),
        spectrum,
        multiplications,
        multiplications if factors is None else lowrank_macs(space, factors.rank),
        None if latencies is None else latencies.seconds(fqn, None),
        None if latencies is None else latencies.seconds(fqn, stored),
        reconstructed=factors is not None and factors.reconstructed,
    )


def _plain(layer: LayerCompression) -> dict[str, Any]:
    values = asdict(layer)
    if layer.measured_error is not None and not math.isfinite(layer.measured_error):
        values["measured_error"] = None  # JSON has no infinity
    return values


def _measured(layer: LayerCompression) -> str:
    return "not measured" if layer.measured_error is None else percent(layer.measured_error)


def percent(share: float | None) -> str:
    """A share as people read it."""
    return "not known" if share is None else f"{share:.3%}"

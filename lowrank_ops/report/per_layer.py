"""The rows of the reports, one per layer, as plain data, and the columns of their tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..ranks.costs import PLAIN, Formats
from .text import percent


@dataclass(frozen=True)
class LayerUtilization:
    """The subspaces that one layer uses at the report's explained variance."""

    fqn: str
    in_features: int
    out_features: int
    groups: int
    rows: int  # calibration rows seen
    input_rank: int | None  # k_S; None: not measured, calibration recorded the output
    output_rank: int  # k_T
    rank: int  # utilized rank min(k_S, k_T)
    utilization: float  # rank / min(in_features, out_features)
    kind: str = "other"  # one of KINDS
    spectrum: tuple[float, ...] | None = None  # see spectrum_of

    @property
    def kept_share(self) -> float:
        """The same as ``utilization``."""
        return self.utilization


@dataclass(frozen=True)
class LayerCompression:
    """How one layer was compressed."""

    fqn: str
    in_features: int
    out_features: int
    rank: int | None  # None: left dense
    stored_rank: int | None
    dense_parameters: int
    parameters: int
    predicted_error: float | None  # E|y - y'|^2 over the calibration rows; None: unknown
    output_variance: float
    rows: int  # calibration rows seen
    projection: str | None = None  # that made the factors; None: left dense
    predicted_loss: float | None = None  # increase of the loss per sample, to second order; None: unknown
    kind: str = "other"  # one of KINDS
    spectrum: tuple[float, ...] | None = None  # see spectrum_of
    dense_macs: int = 0  # over the calibration rows
    macs: int = 0
    dense_seconds: float | None = None  # of all calls in one forward pass, as measured for a LatencyBudget
    seconds: float | None = None
    measured_error: float | None = None  # relative, on other data; see with_measured. Infinity is null in JSON.
    reconstructed: bool = False  # predicted_error then compares with the dense model, at the compressed model's input
    dense_bytes: int = 0
    bytes: int = 0  # with the scales of 8-bit factors and weights
    formats: Formats = PLAIN  # of both factors, or of a dense weight: "int8" or "fp8"; None: the layer's dtype
    channels: int | None = None  # kept by its MLP, whose errors are those of its consumer

    @property
    def is_replaced(self) -> bool:
        """Whether the layer has factors, fewer channels or an 8-bit weight."""
        return self.is_fitted or self.formats != PLAIN

    @property
    def is_fitted(self) -> bool:
        """Whether the layer has factors or fewer channels."""
        return self.rank is not None or self.channels is not None

    @property
    def size(self) -> str:
        """Such as ``"rank 8"``, ``"64 channels"`` or ``"dense"``."""
        if self.channels is not None:
            return f"{self.channels} channels"
        return "dense" if self.rank is None else f"rank {self.rank}"

    @property
    def format(self) -> str:
        """Of the factors or the weight: such as ``"int8"``, ``"down int8, up as dense"`` or ``"as dense"``."""
        names = [form or "as dense" for form in self.formats]
        return names[0] if len(set(names)) == 1 else ", ".join(map(" ".join, zip(("down", "up"), names, strict=True)))

    @property
    def kept_share(self) -> float | None:
        """The rank relative to the largest, or a consumer's channels relative to all of them; None: left dense."""
        if self.channels is not None:
            return self.channels / self.in_features
        return None if self.rank is None else self.rank / min(self.in_features, self.out_features)

    @property
    def share(self) -> float:
        """Parameters relative to the dense layer."""
        return self.parameters / self.dense_parameters

    @property
    def relative_error(self) -> float | None:
        """The predicted error relative to the output's variance; None: unknown."""
        if self.predicted_error is None:
            return None
        return max(0.0, self.predicted_error) / self.output_variance if self.output_variance else 0.0


class Prediction(NamedTuple):
    """How measured relative output errors compare with predicted ones."""

    correlation: float | None  # of their logarithms; None where either is constant
    median_ratio: float  # measured / predicted
    worst_layer: str  # whose ratio is farthest from 1
    worst_ratio: float
    layers: int


UtilizationColumns = dict[str, Callable[[LayerUtilization], str]]
CompressionColumns = dict[str, Callable[[LayerCompression], str]]


def utilization_columns() -> UtilizationColumns:
    """The columns of a table of utilizations: name and content."""
    return {
        "layer": lambda layer: layer.fqn,
        "kind": lambda layer: layer.kind,
        "in": lambda layer: str(layer.in_features),
        "out": lambda layer: str(layer.out_features),
        "groups": lambda layer: str(layer.groups),
        "rows": lambda layer: f"{layer.rows:,}",
        "k_S": lambda layer: "not measured" if layer.input_rank is None else str(layer.input_rank),
        "k_T": lambda layer: str(layer.output_rank),
        "rank": lambda layer: str(layer.rank),
        "utilization": lambda layer: f"{layer.utilization:.1%}",
    }


def compression_columns(layers: Sequence[LayerCompression]) -> CompressionColumns:
    """The columns of a table of compressed layers: name and content. Columns without any content are left out."""
    columns: CompressionColumns = {
        "layer": lambda layer: layer.fqn,
        "kind": lambda layer: layer.kind,
        "weight": lambda layer: f"{layer.out_features} x {layer.in_features}",
        "rank": lambda layer: layer.size.removeprefix("rank "),
        "stored": lambda layer: "-" if layer.stored_rank is None else str(layer.stored_rank),
        "projection": lambda layer: layer.projection or "-",
        "parameters": lambda layer: f"{layer.share:.1%}",
        "MACs": lambda layer: f"{layer.macs / layer.dense_macs:.1%}" if layer.dense_macs else "-",
        "predicted error": lambda layer: percent(layer.relative_error),
    }
    if any(layer.predicted_loss is not None and layer.is_replaced for layer in layers):
        columns["loss increase"] = lambda layer: (
            "unknown" if layer.predicted_loss is None else f"{layer.predicted_loss:.3g}"
        )
    if any(layer.measured_error is not None for layer in layers):
        columns["measured error"] = lambda layer: "-" if layer.measured_error is None else percent(layer.measured_error)
    if any(layer.formats != PLAIN for layer in layers):
        columns["format"] = lambda layer: layer.format if layer.is_replaced else "-"
        columns["bytes"] = lambda layer: f"{layer.bytes / layer.dense_bytes:.1%}"
    if all(layer.seconds is not None for layer in layers):
        columns["dense ms"] = lambda layer: f"{1e3 * (layer.dense_seconds or 0):.3f}"
        columns["ms"] = lambda layer: f"{1e3 * (layer.seconds or 0):.3f}"
    return columns

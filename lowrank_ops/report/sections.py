"""The sections of the HTML pages: charts and tables of per-layer data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .kinds import KINDS
from .page import Bar, Curve, bars, curves, key, scatter, section, table
from .per_layer import LayerCompression, LayerUtilization, Prediction, compression_columns, utilization_columns

MAX_BARS = 120  # with more layers, only the table shows each of them

Layers = Sequence[LayerUtilization | LayerCompression]


def kinds_of(layers: Layers) -> list[str]:
    """The kinds of layers that occur, in the order of ``KINDS``."""
    return [kind for kind in KINDS if any(layer.kind == kind for layer in layers)]


# --- utilization ------------------------------------------------------------------------------------------------


def utilization_by_kind(
    layers: Sequence[LayerUtilization], means: Mapping[str, float], explained_variance: float
) -> str:
    counts = {kind: sum(layer.kind == kind for layer in layers) for kind in means}
    lines = [Bar(f"{kind} ({counts[kind]})", mean, kind, f"{mean:.1%}") for kind, mean in means.items()]
    remark = (
        f"The utilized rank explains {explained_variance:g} of the variance of a layer's input and output. Utilization "
        "is this rank relative to the largest possible one. The bars show the mean over the layers of each kind."
    )
    return section("By kind", remark, bars("Mean utilization by kind of layer", lines))


def utilization_by_layer(layers: Sequence[LayerUtilization]) -> str:
    return _bar_per_layer(
        "By layer", "In the model's order.", "Utilization of every layer", layers,
        [(layer.utilization, f"{layer.utilization:.1%}, rank {layer.rank}") for layer in layers],
    )  # fmt: skip


def utilization_table(layers: Sequence[LayerUtilization]) -> str:
    columns = utilization_columns()
    rows = [[show(layer) for show in columns.values()] for layer in layers]
    remark = "k_S and k_T: directions of the input and of the output that hold the explained variance."
    return section("All layers", remark, table(f"{len(rows)} layers", list(columns), rows, texts=2))


# --- compression ------------------------------------------------------------------------------------------------

Quantity = Callable[[LayerCompression], float]


def compression_by_kind(layers: Sequence[LayerCompression]) -> str:
    quantities: list[tuple[str, Quantity, Quantity]] = [
        ("parameters", lambda layer: layer.dense_parameters, lambda layer: layer.parameters),
        ("MACs", lambda layer: layer.dense_macs, lambda layer: layer.macs),
    ]
    if all(layer.seconds is not None for layer in layers):
        quantities.append(("time", lambda layer: layer.dense_seconds or 0, lambda layer: layer.seconds or 0))
    remark = "What is left of each kind of layer. To the right: its share of the dense total, before → after."
    charts = (_left_by_kind(layers, *quantity) for quantity in quantities)
    return section("By kind", remark, *charts)


def _left_by_kind(layers: Sequence[LayerCompression], name: str, before: Quantity, now: Quantity) -> str:
    total = sum(map(before, layers)) or 1
    lines = []
    for kind in kinds_of(layers):
        own = [layer for layer in layers if layer.kind == kind]
        dense, left = sum(map(before, own)), sum(map(now, own))
        text = f"{dense / total:.1%} → {left / total:.1%}"
        lines.append(Bar(f"{kind} ({len(own)})", left / dense if dense else 0.0, kind, text))
    heading = "Time, as measured layer by layer" if name == "time" else name[0].upper() + name[1:]
    return f"<p>{heading}</p>" + bars(f"Share of {name} left by kind of layer", lines)


def compression_by_layer(layers: Sequence[LayerCompression]) -> str:
    return _bar_per_layer(
        "Chosen ranks", "Parameters of each layer relative to dense.", "Parameters left in every layer", layers,
        [
            (layer.share, f"{layer.share:.1%}, {layer.size}" if layer.is_fitted else "dense")
            for layer in layers
        ],
    )  # fmt: skip


def predicted_and_measured(
    pairs: Sequence[tuple[LayerCompression, float, float]], prediction: Prediction | None, kinds: Sequence[str]
) -> str:
    """Empty without a ``prediction``."""
    if prediction is None:
        return ""
    correlation = "undefined" if prediction.correlation is None else f"{prediction.correlation:.3f}"
    remark = (
        "Output error of every replaced layer, relative to the variance of its output: predicted from the calibration "
        f"data, and measured on other data. Correlation of the logarithms: {correlation}. Farthest from the diagonal: "
        f"{prediction.worst_layer}, whose measured error is {prediction.worst_ratio:.2f} times the predicted one."
    )
    points = [(layer.fqn, layer.kind, predicted, measured) for layer, predicted, measured in pairs]
    chart = scatter("Measured against predicted output error", points, "predicted error", "measured error")
    return section("Predicted and measured errors", remark, key(kinds), chart)


def compression_table(layers: Sequence[LayerCompression]) -> str:
    columns = compression_columns(layers)
    rows = [[show(layer) for show in columns.values()] for layer in layers]
    remark = "Errors are relative to the variance of the layer's output. Ranks are stored padded to a multiple of 8."
    return section("All layers", remark, table(f"{len(rows)} layers", list(columns), rows, texts=2))


# --- both -------------------------------------------------------------------------------------------------------


def spectra(layers: Layers, point: str) -> str:
    """The spectra of the layers that have one; empty without any. ``point`` says what the points mark."""
    lines = [
        Curve(
            layer.fqn,
            layer.kind,
            layer.spectrum,
            layer.kept_share,
        )
        for layer in layers
        if layer.spectrum is not None
    ]
    if not lines:
        return ""
    remark = f"A line per layer: the share of its output's variance outside the leading directions. {point}"
    x_label = "directions, relative to the largest rank"
    chart = curves("Spectra of the layers' outputs", lines, x_label, "residual variance")
    return section("Spectra", remark, key(kinds_of(layers)), chart)


def remarks(lines: Sequence[str]) -> str:
    """Skipped layers and fallbacks; empty without any."""
    if not lines:
        return ""
    return section("Notes", "", table("Skipped layers and fallbacks", ["note"], [[line] for line in lines]))


def _bar_per_layer(
    title: str, remark: str, description: str, layers: Layers, values: Sequence[tuple[float, str]]
) -> str:
    if len(layers) > MAX_BARS:
        return ""
    lines = [Bar(layer.fqn, value, layer.kind, text) for layer, (value, text) in zip(layers, values, strict=True)]
    return section(title, remark, key(kinds_of(layers)), bars(description, lines))

"""The reports as pages: what a reader should see first, then pictures, then every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .compression import CompressionReport, LayerCompression, percent
from .kinds import KINDS
from .page import Bar, Curve, bars, curves, key, page, scatter, section, table
from .text import notes
from .utilization import UtilizationReport

MOST_BARS = 120  # beyond, the table of all layers has to do


def utilization_page(report: UtilizationReport) -> str:
    """The HTML of a utilization report."""
    kinds = list(report.by_kind())
    layers = report.layers
    lines = [
        Bar(layer.fqn, layer.utilization, layer.kind, f"{layer.utilization:.1%}, rank {layer.rank}") for layer in layers
    ]
    sections = [
        section(
            "By kind",
            "The mean utilization of the layers of each kind: of a layer's largest possible rank, how much holds "
            f"{report.explained_variance:g} of the variance of its input and output.",
            bars("Mean utilization by kind of layer", _kind_bars(report)),
        )
    ]
    if len(lines) <= MOST_BARS:
        sections.append(
            section("By layer", "In the model's order.", key(kinds), bars("Utilization of every layer", lines))
        )
    spectra = [
        Curve(layer.fqn, layer.kind, layer.spectrum, layer.rank / min(layer.in_features, layer.out_features))
        for layer in layers
        if layer.spectrum is not None
    ]
    sections += _spectra(spectra, kinds, "The point is the utilized rank.")
    sections.append(
        section(
            "All layers",
            "k_S and k_T count the directions of the input and of the output that hold the explained variance.",
            table(
                f"{len(layers)} layers",
                ["layer", "kind", "in", "out", "groups", "rows", "k_S", "k_T", "rank", "utilization"],
                [
                    [
                        layer.fqn, layer.kind, str(layer.in_features), str(layer.out_features), str(layer.groups),
                        f"{layer.rows:,}", "not measured" if layer.input_rank is None else str(layer.input_rank),
                        str(layer.output_rank), str(layer.rank), f"{layer.utilization:.1%}",
                    ]
                    for layer in layers
                ],
                texts=2,
            ),
        )
    )  # fmt: skip
    sections += _notes(notes(report.unreached, report.skipped))
    least, most = (extreme(layers, key=lambda layer: layer.utilization) for extreme in (min, max))
    return page(
        "Layer utilization",
        f"At explained variance {report.explained_variance:g}, about {'the mean' if report.centered else 'zero'}, "
        f"over {max(layer.rows for layer in layers):,} rows of calibration data at most.",
        [
            ("Mean Layer Utilization", f"{report.mean_layer_utilization:.1%}", f"of {len(layers)} layers"),
            ("Least utilized", f"{least.utilization:.1%}", least.fqn),
            ("Most utilized", f"{most.utilization:.1%}", most.fqn),
        ],
        sections,
    )


def compression_page(report: CompressionReport) -> str:
    """The HTML of a compression report."""
    layers = report.layers
    kinds = [kind for kind in KINDS if any(layer.kind == kind for layer in layers)]
    by_kind = {kind: [layer for layer in layers if layer.kind == kind] for kind in kinds}
    sections = [
        section(
            "Where it went",
            "What is left of each kind of layer, of what it was dense.",
            *(_shares(by_kind, name, then, now) for name, then, now in _quantities(layers)),
        )
    ]
    if len(layers) <= MOST_BARS:
        lines = [
            Bar(
                layer.fqn,
                layer.parameters / layer.dense_parameters,
                layer.kind,
                "dense"
                if layer.rank is None
                else f"{layer.parameters / layer.dense_parameters:.1%}, rank {layer.rank}",
            )
            for layer in layers
        ]
        sections.append(
            section(
                "Chosen ranks", "Parameters of every layer, of dense.", key(kinds), bars("Share of each layer", lines)
            )
        )
    spectra = [
        Curve(
            layer.fqn,
            layer.kind,
            layer.spectrum,
            None if layer.rank is None else layer.rank / min(layer.in_features, layer.out_features),
        )
        for layer in layers
        if layer.spectrum is not None
    ]
    sections += _spectra(spectra, kinds, "The point is the chosen rank; lines without one are of layers left dense.")
    sections += _prediction(report, kinds)
    sections.append(_all_layers(report))
    sections += _notes([*report.fallbacks(), *notes((), report.skipped)])
    return page("Compression report", _settings(report), _cards(report), sections)


def _kept(layer: LayerCompression) -> str:
    return f"{layer.parameters / layer.dense_parameters:.1%}"


def _cards(report: CompressionReport) -> list[tuple[str, str, str]]:
    layers = report.layers
    cards = [
        (
            "Layer parameters",
            f"{report.layer_parameters / report.layer_parameters_before:.1%}",
            f"{report.layer_parameters_before:,} → {report.layer_parameters:,}",
        ),
        (
            "Model parameters",
            f"{report.model_parameters / report.model_parameters_before:.1%}",
            f"{report.model_parameters_before:,} → {report.model_parameters:,}",
        ),
        (
            "Layers replaced",
            str(sum(layer.rank is not None for layer in layers)),
            f"of {len(layers)} considered",
        ),
    ]
    losses = [layer.predicted_loss for layer in layers if layer.predicted_loss is not None and layer.rank is not None]
    if losses:
        cards.append(("Predicted loss increase", f"{sum(losses):.3g}", "of a sample, summed over the layers"))
    prediction = report.prediction()
    if prediction is not None:
        cards.append(
            ("Measured / predicted error", f"{prediction.median_ratio:.2f}", f"median of {prediction.layers} layers")
        )
    return cards


def _settings(report: CompressionReport) -> str:
    policy = report.config.rank
    values = {name: getattr(policy, name) for name in ("fraction", "threshold", "allocation") if hasattr(policy, name)}
    inside = ", ".join(f"{name}={value!r}" for name, value in values.items())
    return f"Ranks by {type(policy).__name__}({inside}), projection={report.config.projection!r}."


Amount = Callable[[LayerCompression], float]


def _quantities(layers: Sequence[LayerCompression]) -> list[tuple[str, Amount, Amount]]:
    """What there is to show: its name, how much of it a layer took dense, and how much it takes now."""
    found: list[tuple[str, Amount, Amount]] = [
        ("parameters", lambda layer: layer.dense_parameters, lambda layer: layer.parameters),
        ("multiplications", lambda layer: layer.dense_multiplications, lambda layer: layer.multiplications),
    ]
    if all(layer.seconds is not None for layer in layers):
        found.append(("time as timed layer by layer", lambda layer: layer.dense_seconds or 0, lambda x: x.seconds or 0))
    return found


def _shares(by_kind: Mapping[str, Sequence[LayerCompression]], name: str, then: Amount, now: Amount) -> str:
    total = sum(then(layer) for layers in by_kind.values() for layer in layers) or 1
    lines = []
    for kind, layers in by_kind.items():
        before, after = sum(map(then, layers)), sum(map(now, layers))
        text = f"{before / total:.1%} → {after / total:.1%}"
        lines.append(Bar(f"{kind} ({len(layers)})", after / before if before else 0.0, kind, text))
    note = f"<p>{name.capitalize()}; beside the bars the share of all layers' dense {name}, before → now.</p>"
    return note + bars(f"Share of {name} left by kind of layer", lines)


def _kind_bars(report: UtilizationReport) -> list[Bar]:
    counts = {kind: sum(layer.kind == kind for layer in report.layers) for kind in KINDS}
    return [Bar(f"{kind} ({counts[kind]})", share, kind, f"{share:.1%}") for kind, share in report.by_kind().items()]


def _spectra(lines: Sequence[Curve], kinds: Sequence[str], point: str) -> list[str]:
    if not lines:
        return []
    remark = f"The share of a layer's output variance that its first directions leave out, a line per layer. {point}"
    picture = curves("Spectra of the layers' outputs", lines, "directions, of the largest rank", "variance left out")
    return [section("Spectra", remark, key(kinds), picture)]


def _prediction(report: CompressionReport, kinds: Sequence[str]) -> list[str]:
    points = [
        (layer.fqn, layer.kind, layer.relative_error, layer.measured_error)
        for layer in report.layers
        if layer.rank is not None and layer.relative_error and layer.measured_error
    ]
    prediction = report.prediction()
    if prediction is None:
        return []
    correlation = "not defined" if prediction.correlation is None else f"{prediction.correlation:.3f}"
    remark = (
        "Output error of every replaced layer, of its output's variance: predicted from the calibration rows, and "
        f"measured on other data. Correlation of the logarithms {correlation}; farthest from the diagonal "
        f"{prediction.worst_layer}, measured {prediction.worst_ratio:.2f} times the prediction."
    )
    picture = scatter("Measured against predicted output error", points, "predicted error", "measured error")
    return [section("Predicted and measured", remark, key(kinds), picture)]


def _all_layers(report: CompressionReport) -> str:
    header = ["layer", "kind", "weight", "rank", "stored", "parameters", "multiplications", "predicted error"]
    columns: list[tuple[str, Callable[[LayerCompression], str]]] = []
    if any(layer.measured_error is not None for layer in report.layers):
        columns.append(
            ("measured error", lambda layer: "-" if layer.measured_error is None else percent(layer.measured_error))
        )
    if any(layer.predicted_loss for layer in report.layers):
        columns.append(
            ("loss", lambda layer: "not known" if layer.predicted_loss is None else f"{layer.predicted_loss:.3g}")
        )
    if all(layer.seconds is not None for layer in report.layers):
        columns.append(("dense ms", lambda layer: f"{1e3 * (layer.dense_seconds or 0):.3f}"))
        columns.append(("ms", lambda layer: f"{1e3 * (layer.seconds or 0):.3f}"))
    rows = [
        [
            layer.fqn,
            layer.kind,
            f"{layer.out_features} x {layer.in_features}",
            "dense" if layer.rank is None else str(layer.rank),
            "-" if layer.stored_rank is None else str(layer.stored_rank),
            _kept(layer),
            f"{layer.multiplications / layer.dense_multiplications:.1%}" if layer.dense_multiplications else "-",
            percent(layer.relative_error),
            *(show(layer) for _, show in columns),
        ]
        for layer in report.layers
    ]
    remark = "Errors are shares of the variance of the layer's output."
    return section(
        "All layers", remark, table(f"{len(rows)} layers", [*header, *(name for name, _ in columns)], rows, texts=2)
    )


def _notes(lines: Sequence[str]) -> list[str]:
    rows = [[line] for line in lines]
    return [section("Left out", "", table("What was not done, and why", ["note"], rows))] if lines else []

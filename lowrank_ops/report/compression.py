"""How each layer was compressed, and the predicted and measured error."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..arguments import checked
from ..config import CompressionConfig
from ..factors.projections import Factors
from ..files import write_whole
from ..latencies import LayerLatencies
from ..models.layers import unsupported_weights
from ..policies import LatencyBudget, Ranks
from ..ranks.costs import (
    PLAIN,
    dense_macs,
    dense_parameters,
    factor_parameters,
    lowrank_macs,
    stored_rank,
    stored_rank_of,
)
from ..ranks.eight_bit import factor_bytes, weight_bytes
from ..subspaces.layer import LayerSubspaces
from .kinds import kind_of
from .page import framed, page
from .per_layer import LayerCompression, Prediction, compression_columns
from .sections import (
    compression_by_kind,
    compression_by_layer,
    compression_table,
    kinds_of,
    predicted_and_measured,
    remarks,
    spectra,
)
from .spectra import spectrum_of
from .text import few_rows, few_rows_note, format_table, layer_bars, new_figure, notes, rows_note, save_figure


@dataclass(frozen=True)
class CompressionReport:
    """What :func:`lowrank_ops.compress_` did.

    Attributes:
        config: the configuration, with the choices that were left open filled in.
        layers: the considered layers, in the model's order.
        model_parameters_before, model_parameters: of the whole model.
        skipped: ``{fqn: reason}`` of the layers that were not considered, and of modules of other kinds that hold
            matrices, with their share of the model's parameters.
        groups: names of the layers that compute their outputs together, per group.
    """

    config: CompressionConfig
    layers: tuple[LayerCompression, ...]
    model_parameters_before: int
    model_parameters: int
    skipped: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def build(
        cls,
        model: nn.Module,
        config: CompressionConfig,
        subspaces: Mapping[str, LayerSubspaces],
        factors: Mapping[str, Factors],
        skipped: Mapping[str, str],
        groups: tuple[tuple[str, ...], ...] = (),
    ) -> CompressionReport:
        """Build the report, before the model is changed; ``config`` has its defaults filled in."""
        policy = config.rank
        latencies = policy.latencies if isinstance(policy, LatencyBudget) else None
        layers = tuple(
            _layer_compression(fqn, model.get_submodule(fqn), space, factors.get(fqn), latencies, config.pivoted)
            for fqn, space in subspaces.items()
        )
        before = sum(parameter.numel() for parameter in model.parameters())
        saved = sum(layer.dense_parameters - layer.parameters for layer in layers)
        others = unsupported_weights(model, {*subspaces, *skipped})
        return cls(config, layers, before, before - saved, {**skipped, **others}, groups)

    @property
    def allocation(self) -> str | None:
        """How the budget was shared among the layers; None without a budget."""
        return getattr(self.config.rank, "allocation", None)

    @property
    def layer_parameters_before(self) -> int:
        """Parameters of the considered layers before compression."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def layer_parameters(self) -> int:
        """Parameters of the considered layers after compression."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def layer_bytes_before(self) -> int:
        """Bytes of the considered layers before compression."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the considered layers after compression, with the scales of 8-bit factors and weights."""
        return sum(layer.bytes for layer in self.layers)

    @checked()
    def with_measured(self, errors: Mapping[str, float]) -> CompressionReport:
        """A copy of the report that also holds the relative errors from :func:`lowrank_ops.measure_errors`.

        Raises:
            TypeError: no mapping of numbers.
            ValueError: a name that the report does not have, or an error below 0.
        """
        unknown = set(errors) - {layer.fqn for layer in self.layers}
        if unknown:
            raise ValueError(
                f"errors has layers that the report does not have: {', '.join(sorted(unknown))}. Pass those of "
                "measure_errors for the model that this report describes."
            )
        for fqn, error in errors.items():
            if not error >= 0:
                raise ValueError(f"errors[{fqn!r}] must be a relative error of at least 0; got {error!r}.")
        layers = (replace(layer, measured_error=errors.get(layer.fqn, layer.measured_error)) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def compared(self) -> list[tuple[LayerCompression, float, float]]:
        """Replaced layers with their predicted and measured relative errors, where both are positive and finite.

        Reconstructed layers are excluded: their predicted and measured errors refer to different inputs.
        """
        return [
            (layer, layer.relative_error, layer.measured_error)
            for layer in self.layers
            if layer.is_replaced
            and not layer.reconstructed
            and layer.relative_error
            and layer.measured_error
            and math.isfinite(layer.measured_error)
        ]

    def prediction(self) -> Prediction | None:
        """How measured errors compare with predicted ones; None with fewer than two layers to compare."""
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
        columns = compression_columns(self.layers)
        names = [name for name in columns if name not in {"kind", "MACs", "dense ms", "ms"}]
        rows = [[columns[name](layer) for name in names] for layer in self.layers]
        lines, increase = [format_table(names, rows), self.method()], self.predicted_loss
        if increase is not None:
            lines.append(f"predicted increase of the loss per sample, summed over the layers: {increase:.3g}")
        lines.append(
            f"layer parameters {self.layer_parameters_before:,} -> {self.layer_parameters:,} "
            f"({self.layer_parameters / self.layer_parameters_before:.1%}), "
            f"model {self.model_parameters_before:,} -> {self.model_parameters:,} "
            f"({self.model_parameters / self.model_parameters_before:.1%})"
        )
        if any(layer.formats != PLAIN for layer in self.layers):
            share = self.layer_bytes / self.layer_bytes_before
            lines.append(f"layer bytes {self.layer_bytes_before:,} -> {self.layer_bytes:,} ({share:.1%})")
        few = few_rows_note(self.few_rows()) + self._rows_note()
        return "\n".join(
            [*lines, *self._groups_note(), *self.fallbacks(), *few, *notes((), self.skipped), self.considered()]
        )

    def considered(self) -> str:
        """The share of the whole model's parameters that compression considered, in one line."""
        share = self.layer_parameters_before / self.model_parameters_before
        return (
            f"considered {self.layer_parameters_before:,} of the model's {self.model_parameters_before:,} parameters "
            f"({share:.1%})"
        )

    def method(self) -> str:
        """How ranks and factors were chosen, in one line."""
        policy = self.config.rank
        values = [f"{name}={getattr(policy, name)!r}" for name in ("fraction", "threshold") if hasattr(policy, name)]
        ranks = "by layer name" if isinstance(policy, Ranks) else f"by {type(policy).__name__}({', '.join(values)})"
        allocation = "" if self.allocation is None else f", allocation {self.allocation}"
        used = Counter(layer.projection for layer in self.layers if layer.projection is not None)
        projections = " and ".join(
            projection if len(used) == 1 else f"{projection} ({count} of {used.total()} layers)"
            for projection, count in used.items()
        )
        return f"ranks {ranks}{allocation}; projection {projections or '-'}"

    @checked()
    def to_html(self, path: str | Path) -> None:
        """Write a self-contained HTML page with charts and tables."""
        write_whole(path, self._page().encode())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return framed(self._page())

    def _page(self) -> str:
        kept = self.layer_parameters / self.layer_parameters_before
        model_kept = self.model_parameters / self.model_parameters_before
        cards = [
            ("Layer parameters", f"{kept:.1%}", f"{self.layer_parameters_before:,} → {self.layer_parameters:,}"),
            ("Model parameters", f"{model_kept:.1%}", f"{self.model_parameters_before:,} → {self.model_parameters:,}"),
            (
                "Layers replaced",
                str(sum(layer.is_replaced for layer in self.layers)),
                f"of {len(self.layers)} considered",
            ),
        ]
        increase, prediction = self.predicted_loss, self.prediction()
        if increase is not None:
            cards.append(("Predicted loss increase", f"{increase:.3g}", "per sample, summed over the layers"))
        if prediction is not None:
            remark = f"median of {prediction.layers} layers"
            cards.append(("Measured / predicted error", f"{prediction.median_ratio:.2f}", remark))
        method = self.method()
        sections = [
            compression_by_kind(self.layers),
            compression_by_layer(self.layers),
            spectra(self.layers, "The point is the chosen rank; layers left dense have none."),
            predicted_and_measured(self.compared(), prediction, kinds_of(self.layers)),
            compression_table(self.layers),
            remarks(
                [
                    *self._groups_note(),
                    *self.fallbacks(),
                    *few_rows_note(self.few_rows()),
                    *self._rows_note(),
                    *notes((), self.skipped),
                    self.considered(),
                ]
            ),
        ]
        return page("Compression report", f"{method[0].upper()}{method[1:]}.", cards, sections)

    @checked()
    def plot(self, path: str | Path) -> None:
        """Write a bar chart of the parameters left in each layer; the suffix of ``path`` decides the format.

        Raises:
            ImportError: matplotlib is missing; the extra ``plots`` installs it.
        """
        figure, axes = new_figure(width=max(6.0, 0.25 * len(self.layers)), height=4)
        kept = self.layer_parameters / self.layer_parameters_before
        names, shares = [layer.fqn for layer in self.layers], [layer.share for layer in self.layers]
        layer_bars(axes, names, shares, kept, f"all layers, {kept:.1%}")
        axes.set_ylabel("parameters, relative to dense")
        save_figure(figure, path)

    @property
    def predicted_loss(self) -> float | None:
        """The predicted increase of the loss per sample, summed over the layers; None: unknown for all that changed."""
        known = [layer for layer in self.layers if layer.predicted_loss is not None]
        if not any(layer.is_replaced for layer in known):
            return None
        return sum(layer.predicted_loss or 0.0 for layer in known)

    def few_rows(self) -> list[str]:
        """The replaced layers with fewer calibration rows than min(in_features, out_features), with both numbers."""
        return few_rows(layer for layer in self.layers if layer.is_fitted)  # rounding a weight needs few

    def _rows_note(self) -> list[str]:
        return rows_note([layer for layer in self.layers if layer.is_fitted], errors=True)

    def _groups_note(self) -> list[str]:
        """How many groups there are, and one of them."""
        if not self.groups:
            return ["no layers share an input, so there are no groups"] if self.config.group else []
        return [f"groups of layers with one input: {len(self.groups)}, such as {', '.join(self.groups[0])}"]

    def fallbacks(self) -> list[str]:
        """One line per layer that was not compressed as requested."""
        replaced = [layer for layer in self.layers if layer.is_fitted]
        return [
            f"{layer.fqn}: projection {layer.projection!r}, because calibration recorded no output gradients for it"
            for layer in replaced
            if layer.projection != self.config.projection
        ] + [
            f"{layer.fqn}: not reconstructed"
            for layer in replaced
            if self.config.reconstruction is not None and not layer.reconstructed
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {
            "config": self.config.to_dict(),
            "layers": [_plain(layer) for layer in self.layers],
            "layer_parameters_before": self.layer_parameters_before,
            "layer_parameters": self.layer_parameters,
            "layer_bytes_before": self.layer_bytes_before,
            "layer_bytes": self.layer_bytes,
            "model_parameters_before": self.model_parameters_before,
            "model_parameters": self.model_parameters,
            "skipped": dict(self.skipped),
            "groups": [list(group) for group in self.groups],
            "few_rows": self.few_rows(),
            "allocation": self.allocation,
            "prediction": None if (prediction := self.prediction()) is None else prediction._asdict(),
        }

    def to_json(self) -> str:
        """The report as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def _layer_compression(
    fqn: str,
    layer: nn.Module,
    space: LayerSubspaces,
    factors: Factors | None,
    latencies: LayerLatencies | None,
    pivoted: bool,
) -> LayerCompression:
    _, in_features, out_features = space.dimensions
    dense, macs = dense_parameters(space), dense_macs(space)
    narrow = factors is not None and factors.kept is not None
    spectrum = spectrum_of(space.channels if narrow and space.channels is not None else space)
    output_variance = space.output_variance if factors is None else factors.output_variance
    space.release(directions=False)  # compress_ bounds what is held
    shared: dict[str, Any] = {
        "fqn": fqn,
        "in_features": in_features,
        "out_features": out_features,
        "dense_parameters": dense,
        "output_variance": output_variance,
        "rows": space.rows,
        "kind": kind_of(fqn, layer),
        "spectrum": spectrum,
        "dense_macs": macs,
        "dense_bytes": dense * space.dtype.itemsize,
        "dense_seconds": None if latencies is None else latencies.seconds(fqn, None),
    }
    if factors is None:
        return LayerCompression(
            **shared,
            rank=None,
            stored_rank=None,
            parameters=dense,
            bytes=shared["dense_bytes"],
            macs=macs,
            seconds=shared["dense_seconds"],
            predicted_error=0.0,
            predicted_loss=0.0,
        )
    biases = 0 if factors.bias is None else factors.bias.numel()
    if factors.is_dense:
        weights = factors.down.numel()
        return LayerCompression(
            **shared,
            rank=None,
            stored_rank=None,
            parameters=weights + biases,
            bytes=(weights * space.dtype.itemsize if narrow else weight_bytes(space)) + biases * space.dtype.itemsize,
            formats=PLAIN if narrow else factors.formats,
            channels=factors.rank if narrow else None,
            macs=macs * weights // (in_features * out_features),
            seconds=None,
            predicted_error=factors.predicted_error,
            predicted_loss=factors.predicted_loss,
            projection=factors.projection if narrow else None,
            reconstructed=factors.reconstructed,
        )
    parameters = factor_parameters(space, factors.rank, pivoted=pivoted)
    stored = factor_bytes(space, factors.rank, factors.formats, pivoted=pivoted) + biases * space.dtype.itemsize
    return LayerCompression(
        **shared,
        rank=factors.rank,
        stored_rank=stored_rank_of(space, factors.rank, pivoted=pivoted),
        parameters=parameters + biases,
        bytes=stored,
        formats=factors.formats,
        macs=lowrank_macs(space, factors.rank, pivoted=pivoted),
        seconds=None if latencies is None else latencies.seconds(fqn, stored_rank(factors.rank)),
        predicted_error=factors.predicted_error,
        predicted_loss=factors.predicted_loss,
        projection=factors.projection,
        reconstructed=factors.reconstructed,
    )


def _plain(layer: LayerCompression) -> dict[str, Any]:
    values = asdict(layer)
    if layer.measured_error is not None and not math.isfinite(layer.measured_error):
        values["measured_error"] = None  # JSON has no infinity
    return values

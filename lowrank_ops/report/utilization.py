"""Utilization: the ranks that the layers of a model use, relative to their size (Garg et al. 2024)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import check_share, checked
from ..calibration.covariances import Covariances
from ..files import write_whole
from ..models.experts import on_listed_experts
from ..models.layers import FilterFn, find_layers, with_values
from ..models.running import ProgressBar, in_layer, warn_of_few_rows
from ..subspaces.layer import LayerSubspaces, layer_subspaces
from .kinds import kind_of
from .page import framed, page
from .per_layer import LayerUtilization, utilization_columns
from .sections import kinds_of, remarks, spectra, utilization_by_kind, utilization_by_layer, utilization_table
from .spectra import spectrum_of
from .text import few_rows, few_rows_note, format_table, layer_bars, new_figure, notes, rows_note, save_figure


@dataclass(frozen=True)
class UtilizationReport:
    """The utilized ranks of a model's layers (Garg et al. 2024).

    Attributes:
        explained_variance: share of the variance that the utilized directions hold.
        centered: whether the variance is about the mean; otherwise about zero.
        layers: the calibrated layers, in the model's order.
        unreached: layers that no calibration batch reached.
        skipped: ``{fqn: reason}`` of layers that calibration could not record.
    """

    explained_variance: float
    centered: bool
    layers: tuple[LayerUtilization, ...]
    unreached: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def mean_layer_utilization(self) -> float:
        """MLU: the mean of the layers' utilizations, in [0, 1]."""
        return sum(layer.utilization for layer in self.layers) / len(self.layers)

    def by_kind(self) -> dict[str, float]:
        """The mean utilization of the layers of each kind that occurs, in the order of ``KINDS``."""
        found = {
            kind: [layer.utilization for layer in self.layers if layer.kind == kind] for kind in kinds_of(self.layers)
        }
        return {kind: sum(values) / len(values) for kind, values in found.items()}

    def table(self) -> str:
        """One line per layer and the MLU, for a terminal."""
        columns = utilization_columns()
        names = [name for name in columns if name not in {"kind", "groups", "rows"}]
        lines = [format_table(names, [[columns[name](layer) for name in names] for layer in self.layers])]
        mean = f"Mean Layer Utilization {self.mean_layer_utilization:.1%}"
        lines.append(f"{mean} at explained variance {self.explained_variance:g}")
        if len(self.by_kind()) > 1:
            lines.append("by kind: " + ", ".join(f"{kind} {share:.1%}" for kind, share in self.by_kind().items()))
        return "\n".join(
            lines
            + few_rows_note(few_rows(self.layers))
            + rows_note(self.layers, errors=False)
            + notes(self.unreached, self.skipped)
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {**asdict(self), "mean_layer_utilization": self.mean_layer_utilization, "by_kind": self.by_kind()}

    def to_json(self) -> str:
        """The report as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @checked()
    def to_html(self, path: str | Path) -> None:
        """Write a self-contained HTML page with charts and tables."""
        write_whole(path, self._page().encode())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return framed(self._page())

    def _page(self) -> str:
        lowest, highest = (extreme(self.layers, key=lambda layer: layer.utilization) for extreme in (min, max))
        return page(
            "Layer utilization",
            f"At explained variance {self.explained_variance:g}, about {'the mean' if self.centered else 'zero'}, "
            f"from up to {max(layer.rows for layer in self.layers):,} calibration rows per layer.",
            [
                ("Mean Layer Utilization", f"{self.mean_layer_utilization:.1%}", f"of {len(self.layers)} layers"),
                ("Lowest", f"{lowest.utilization:.1%}", lowest.fqn),
                ("Highest", f"{highest.utilization:.1%}", highest.fqn),
            ],
            [
                utilization_by_kind(self.layers, self.by_kind(), self.explained_variance),
                utilization_by_layer(self.layers),
                spectra(self.layers, "The point is the utilized rank."),
                utilization_table(self.layers),
                remarks(
                    few_rows_note(few_rows(self.layers))
                    + rows_note(self.layers, errors=False)
                    + notes(self.unreached, self.skipped)
                ),
            ],
        )

    @checked()
    def plot(self, path: str | Path) -> None:
        """Write a bar chart of the layers' utilization; the suffix of ``path`` decides the format.

        Raises:
            ImportError: matplotlib is missing; the extra ``plots`` installs it.
        """
        figure, axes = new_figure(width=max(6.0, 0.25 * len(self.layers)), height=4)
        self.draw(axes)
        save_figure(figure, path)

    def draw(self, axes: Any) -> None:
        """Draw the bar chart of :meth:`plot` into matplotlib axes."""
        mean = self.mean_layer_utilization
        names, values = [layer.fqn for layer in self.layers], [layer.utilization for layer in self.layers]
        layer_bars(axes, names, values, mean, f"mean (MLU), {mean:.1%}")
        axes.set_ylabel("utilization")
        axes.set_title(f"Utilization at explained variance {self.explained_variance:g}")


@checked()
@on_listed_experts
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
        explained_variance: share of the variance in (0, 1] that the utilized directions hold.
        centered: variance about the mean; False: about zero, from the second moment.
        filter_fn: ``filter_fn(module, fqn) -> bool`` selects layers; None selects all.
        subspaces: from :func:`lowrank_ops.subspaces.layer_subspaces`; computed by default.
        progress: show a progress bar.

    Raises:
        ValueError: ``explained_variance`` is out of range, or no selected layer was calibrated.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> covariances = lro.calibrate(model, [torch.randn(256, 4) @ torch.randn(4, 32)])
        >>> lro.utilization(model, covariances, explained_variance=0.999).layers[0].rank <= 4
        True
    """
    check_share("explained_variance", explained_variance)
    layers, skipped = find_layers(model, filter_fn)
    if subspaces is None or any(space.centered != centered for space in subspaces.values()):
        held, without = with_values(layers)
        skipped |= without
        subspaces = layer_subspaces(held, covariances, centered=centered)
    subspaces = {fqn: space for fqn, space in subspaces.items() if fqn in layers}
    bar = ProgressBar(subspaces.items(), desc="decomposing", unit="layer", disable=not progress)
    rows = tuple(_layer_utilization(fqn, layers[fqn], space, explained_variance) for fqn, space in bar)
    if not rows:
        reasons = "".join(f"\n  {fqn or '(the model)'}: {reason}" for fqn, reason in skipped.items())
        raise ValueError(
            f"covariances has none of the model's layers that filter_fn selects; calibrate them first.{reasons}"
        )
    warn_of_few_rows(few_rows(rows))
    return UtilizationReport(explained_variance, centered, rows, covariances.unreached, covariances.skipped)


def _layer_utilization(
    fqn: str, layer: nn.Module, space: LayerSubspaces, explained_variance: float
) -> LayerUtilization:
    groups, in_features, out_features = space.dimensions
    with in_layer(fqn):
        rank = space.utilized_rank(explained_variance)
    space.release()
    return LayerUtilization(
        fqn,
        in_features,
        out_features,
        groups,
        space.rows,
        None if space.input is None else space.input.rank_at(explained_variance),
        space.output.rank_at(explained_variance),
        rank,
        rank / min(in_features, out_features),
        kind_of(fqn, layer),
        spectrum_of(space),
    )

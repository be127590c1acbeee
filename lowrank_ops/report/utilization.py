"""How much of their space the layers of a model use (Garg et al. 2024)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from ..calibration.statistics import Covariances
from ..config import check_share
from ..models.layers import FilterFn, find_layers
from ..subspaces.layer import LayerSubspaces, layer_subspaces
from .kinds import KINDS, kind_of
from .spectra import spectrum_of
from .text import format_table, new_figure, notes


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
    kind: str = "other"  # one of KINDS
    spectrum: tuple[float, ...] | None = None  # see spectrum_of


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

    def by_kind(self) -> dict[str, float]:
        """The mean utilization of the layers of each kind that there is, in the order of ``KINDS``."""
        found = {kind: [layer.utilization for layer in self.layers if layer.kind == kind] for kind in KINDS}
        return {kind: sum(values) / len(values) for kind, values in found.items() if values}

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
        if len(self.by_kind()) > 1:
            lines.append("by kind: " + ", ".join(f"{kind} {share:.1%}" for kind, share in self.by_kind().items()))
        return "\n".join(lines + notes(self.unreached, self.skipped))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types."""
        return {**asdict(self), "mean_layer_utilization": self.mean_layer_utilization, "by_kind": self.by_kind()}

    def to_json(self) -> str:
        """The report as a JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self, path: str | Path) -> None:
        """Write one page with pictures and tables that needs no other file."""
        from .html import utilization_page

        Path(path).write_text(utilization_page(self), encoding="utf-8")

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

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> covariances = lro.calibrate(model, [torch.randn(256, 4) @ torch.randn(4, 32)])
        >>> lro.utilization(model, covariances, explained_variance=0.999).layers[0].rank <= 4
        True
    """
    check_share("explained_variance", explained_variance)
    layers, _ = find_layers(model, filter_fn)
    if subspaces is None or any(space.centered != centered for space in subspaces.values()):
        subspaces = layer_subspaces(layers, covariances, centered=centered)
    subspaces = {fqn: space for fqn, space in subspaces.items() if fqn in layers}
    bar = tqdm(subspaces.items(), desc="decomposing", unit="layer", disable=not progress)
    rows = tuple(_layer_utilization(fqn, layers[fqn], space, explained_variance) for fqn, space in bar)
    if not rows:
        raise ValueError("covariances hold none of the model's layers that filter_fn keeps; calibrate them first.")
    return UtilizationReport(explained_variance, centered, rows, covariances.unreached, covariances.skipped)


def _layer_utilization(
    fqn: str, layer: nn.Module, space: LayerSubspaces, explained_variance: float
) -> LayerUtilization:
    groups, in_features, out_features = space.dimensions
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

"""The layers of a model that are calibrated, and which side of each is streamed: its input or its output."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..arguments import check_positive
from ..models.experts import ListedExperts, Pool, experts_listed, list_experts
from ..models.layers import (
    FilterFn,
    check_finite,
    check_no_adapters,
    compiled_or_scripted,
    dimensions,
    find_layers,
    tied_layers,
    with_values,
)
from ..models.memory import size
from ..models.running import warn_caller
from .experts import pools_of, twin_name

# ``side="auto"`` streams the output, whose moment is (ratio)^2 smaller, where in_features / out_features exceeds the
# ratio, unless the input's moment is small anyway.
OUTPUT_SIDE_RATIO = 16
SMALL_STATE_BYTES = 64 << 20


@dataclass(frozen=True)
class SelectedLayers:
    """The layers of a calibration.

    Attributes:
        layers: ``{fqn: layer}``.
        twins: the same of experts, for their extra rows, by :func:`twin_name`.
        sides: of layers and twins, ``"input"`` or ``"output"``.
        skipped: ``{fqn: reason}`` of layers that are left out.
        listed: the modules of experts whose layers are listed during the calibration.
        pools: of the experts with twins.
    """

    layers: Mapping[str, nn.Module]
    twins: Mapping[str, nn.Module]
    sides: Mapping[str, str]
    skipped: Mapping[str, str]
    listed: Mapping[nn.Module, ListedExperts]
    pools: Mapping[ListedExperts, Pool]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Layers and twins."""
        return {**self.layers, **self.twins}

    def only(self, names: Collection[str]) -> SelectedLayers:
        """Some of the layers, for one of several passes."""
        layers = {fqn: layer for fqn, layer in self.layers.items() if fqn in names}
        twins = {name: self.twins[name] for name in map(twin_name, layers) if name in self.twins}
        return replace(self, layers=layers, twins=twins, sides={fqn: self.sides[fqn] for fqn in (*layers, *twins)})


def select_layers(
    model: nn.Module,
    *,
    output_gradients: bool,
    filter_fn: FilterFn | None,
    side: str,
    dtype: torch.dtype,
    max_state_bytes: int,
    needs_values: bool = True,
) -> SelectedLayers:
    """The layers that ``filter_fn`` keeps and that can be calibrated; a warning names the others.

    Args:
        needs_values: False takes layers on the meta device, too.

    Raises:
        ValueError: an invalid argument, a model that cannot be calibrated, or no layer.
    """
    if side not in ("auto", "input", "output", "smaller"):
        raise ValueError(f"side must be 'auto', 'input', 'output' or 'smaller'; got {side!r}.")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, the dtype of the sums; got {dtype}.")
    check_positive(max_state_bytes=max_state_bytes)
    if (reason := compiled_or_scripted(model)) is not None:
        raise ValueError(f"model cannot be calibrated: {reason}.")
    check_no_adapters(model)
    listed = list_experts(model)
    with experts_listed(model, listed=listed):
        layers, skipped = find_layers(model, filter_fn, dispatched=True)
        pools, twins = pools_of(model, layers)
    if needs_values:
        layers, without = with_values(layers)
        skipped |= without
    tied_or_large = {}
    if output_gradients:
        tied_or_large = _without_output_gradients(model, layers, dtype, max_state_bytes, filter_fn)
        layers = {fqn: layer for fqn, layer in layers.items() if fqn not in tied_or_large}
    if not layers:
        reasons = "".join(f"\n  {fqn or '(the model)'}: {why}" for fqn, why in (skipped | tied_or_large).items())
        raise ValueError(f"model has no supported Linear, Conv1d, Conv2d or Conv1D that filter_fn keeps.{reasons}")
    if needs_values:
        check_finite(layers)
    if skipped and filter_fn is None:
        reasons = "".join(f"\n  {fqn}: {reason}" for fqn, reason in skipped.items())
        warn_caller(f"calibration skips unsupported modules:{reasons}")
    sides = {fqn: side_of(layer, side, dtype, max_state_bytes) for fqn, layer in {**layers, **twins}.items()}
    return SelectedLayers(layers, twins, sides, skipped | tied_or_large, listed, pools)


def _without_output_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    dtype: torch.dtype,
    max_state_bytes: int,
    filter_fn: FilterFn | None,
) -> dict[str, str]:
    """``{fqn: reason}`` of layers that are not streamed with output gradients: tied ones and vocabulary-sized heads."""
    tied = tied_layers(model) if filter_fn is None else {}
    found = {}
    for fqn, layer in layers.items():
        groups, _, out_features = dimensions(layer)
        state_bytes = groups * out_features**2 * dtype.itemsize
        if fqn in tied:
            found[fqn] = f"its weight is tied to {tied[fqn]!r}"
        elif state_bytes > max_state_bytes:
            found[fqn] = (
                f"the second moment of its output gradients would take {size(state_bytes)}, more than max_state_bytes "
                f"({size(max_state_bytes)})"
            )
    return found


def side_of(layer: nn.Module, side: str, dtype: torch.dtype, max_state_bytes: int) -> str:
    """The side of a layer that is streamed, for a ``side`` of :func:`lowrank_ops.calibrate`."""
    if side in ("input", "output"):
        return side
    groups, in_features, out_features = dimensions(layer)
    state_bytes = groups * in_features**2 * dtype.itemsize
    if out_features >= in_features or side == "smaller":
        return "input" if out_features >= in_features else "output"
    much_wider = in_features > OUTPUT_SIDE_RATIO * out_features and state_bytes > SMALL_STATE_BYTES
    return "output" if much_wider or state_bytes > max_state_bytes else "input"

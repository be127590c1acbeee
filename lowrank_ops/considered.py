"""Which layers of a model may be replaced, and their subspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .calibration.covariances import Covariances
from .config import CompressionConfig
from .layers import EightBitLinear, LowRankLayer, NarrowLinear
from .models.layers import FilterFn, check_not_wrapped, find_layers, tied_layers, with_values
from .models.running import shortened
from .subspaces.layer import LayerSubspaces, layer_subspaces


def considered_layers(
    model: nn.Module,
    covariances: Covariances,
    filter_fn: FilterFn | None,
    subspaces: Mapping[str, LayerSubspaces] | None,
    *,
    centered: bool,
    device: torch.device | None = None,
    load: Callable[[str], nn.Module] | None = None,
) -> tuple[dict[str, LayerSubspaces], dict[str, str]]:
    """The subspaces of the layers that may be replaced, and ``{fqn: reason}`` of those that may not.

    Args:
        model, covariances, filter_fn, subspaces: as for :func:`compress_`.
        centered, device, load: as for :func:`layer_subspaces`. With ``load`` the model may be on the meta device.

    Raises:
        ValueError: as for :func:`compress_`.
    """
    check_not_wrapped(model)
    layers, skipped = find_layers(model, filter_fn)
    if load is None:
        layers, without = with_values(layers)
        skipped |= without
    if filter_fn is None:
        tied = {fqn: f"its weight is tied to {other!r}" for fqn, other in tied_layers(model).items() if fqn in layers}
        layers = {fqn: layer for fqn, layer in layers.items() if fqn not in tied}
        skipped = {**skipped, **tied}
    if "" in layers:
        raise ValueError(
            "model is itself a layer; use LowRankLinear.from_linear, or LowRankConv2d.from_conv2d for a convolution."
        )
    missing = [fqn for fqn in covariances if fqn not in dict(model.named_modules())]
    if missing:
        raise ValueError(
            f"covariances name layers that model does not have: {shortened(missing)}; pass the model that was "
            "calibrated."
        )
    unknown = {
        fqn: "no calibration batch reached it" if fqn in covariances.unreached else "it was not calibrated"
        for fqn in layers
        if fqn not in covariances
    }
    skipped |= unknown | {fqn: covariances.skipped[fqn] for fqn in unknown if fqn in covariances.skipped}
    for fqn, module in model.named_modules():
        if isinstance(module, NarrowLinear):
            layers.pop(fqn, None)
            skipped[fqn] = "it has fewer channels already"
        if isinstance(module, LowRankLayer):
            skipped[fqn] = f"it is {'8-bit' if isinstance(module, EightBitLinear) else 'low-rank'} already"
    given = _checked_subspaces(subspaces, layers, covariances)
    if any(space.centered != centered or device not in (None, space.device) for space in given.values()):
        if any(space.loss is not None and space.loss.corrected is not None for space in given.values()):
            raise ValueError(
                f"these subspaces hold corrected predictions for other settings than centered={centered}, "
                f"device={device}; pass centered={centered} to correct_predictions, and no device to compress_."
            )
        given = {}
    others = {fqn: layer for fqn, layer in layers.items() if fqn not in given}
    new = layer_subspaces(others, covariances, centered=centered, device=device, load=load)
    subspaces = {fqn: given.get(fqn) or new[fqn] for fqn in layers if fqn in given or fqn in new}
    if not subspaces:
        reasons = "".join(f"\n  {fqn or '(the model)'}: {reason}" for fqn, reason in skipped.items())
        raise ValueError(
            "covariances hold none of the layers that can be replaced and that filter_fn keeps; calibrate those layers "
            f"first.{reasons}"
        )
    return subspaces, skipped


def _checked_subspaces(
    subspaces: Mapping[str, LayerSubspaces] | None, layers: Mapping[str, nn.Module], covariances: Covariances
) -> dict[str, LayerSubspaces]:
    """The given subspaces of ``layers``, after a check that they are of these weights and ``covariances``."""
    if subspaces is None:
        return {}
    for fqn, space in subspaces.items():
        if fqn in covariances and space.statistics is not covariances[fqn]:
            raise ValueError(
                f"subspaces[{fqn!r}] was computed from other covariances than those given; pass "
                "subspaces=layer_subspaces(layers, covariances) of the same calibration."
            )
        if fqn in layers and not space.is_of(layers[fqn]):
            raise ValueError(
                f"subspaces[{fqn!r}] was computed from another weight, bias, dtype or device than the layer's; pass "
                "subspaces=layer_subspaces(layers, covariances) of this model or of a copy of it."
            )
    return {fqn: space for fqn, space in subspaces.items() if fqn in layers and fqn in covariances}


def resolved(config: CompressionConfig, subspaces: Mapping[str, LayerSubspaces]) -> CompressionConfig:
    """``config`` with its open choices filled in, by which of these layers have output gradients."""
    gradients = [space.statistics.output_gradients is not None for space in subspaces.values()]
    if config.projection == "loss" and not any(gradients):
        raise ValueError(
            "projection='loss' needs output gradients, which covariances lack; use calibrate(..., sensitivity=...), or "
            "projection='output'."
        )
    return config.resolved(some_gradients=any(gradients), all_gradients=all(gradients))

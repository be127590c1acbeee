"""Factors -> replaced model: every layer, or none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.nn.functional as F
from torch import nn

from ..factors.factorize import Factors
from ..models.layers import find_layers
from .lowrank import LowRankConv2d, LowRankLinear

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def replace_(model: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """Put factorised layers in the place of dense ones, in place.

    All new layers are made before the first is put in, so that an error leaves the model untouched. A module that
    is used at several places is replaced at all of them by one layer.

    Args:
        model: holds a layer at every name.
        factors: ``{fqn: Factors}``.

    Returns:
        ``model``; where the model itself is the layer, its replacement.

    Raises:
        ValueError: a name that is no compressible layer, a weight tied to another module, or hooks on a layer
            that a replacement would drop.
    """
    layers, skipped = find_layers(model)
    unknown = [fqn for fqn in factors if fqn not in layers]
    if unknown:
        reasons = "; ".join(f"{fqn!r}: {skipped.get(fqn, 'no such layer')}" for fqn in unknown)
        raise ValueError(f"factors names layers that cannot be replaced: {reasons}.")
    tied = tied_layers(model)
    for fqn in factors:
        if fqn in tied:
            raise ValueError(
                f"layer {fqn!r} cannot be replaced: its weight is tied to {tied[fqn]!r}. "
                "Untie the two or leave the layer out with filter_fn."
            )
        if any(getattr(layers[fqn], kind) for kind in _HOOKS):
            raise ValueError(f"layer {fqn!r} has hooks, which its replacement would drop; remove them first.")

    replacements = {layers[fqn]: _replacement(layers[fqn], part) for fqn, part in factors.items()}
    swap_(model, replacements)
    return replacements.get(model, model)


@contextmanager
def replaced(model: nn.Module, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Compress ``model`` inside the ``with`` block only; arguments and errors as for :func:`replace_`."""
    dense = dict(model.named_modules())
    replace_(model, factors)
    compressed = dict(model.named_modules())
    try:
        yield
    finally:
        swap_(model, {compressed[fqn]: dense[fqn] for fqn in factors})


def swap_(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in every place of the old one, or, on an error or an interrupt, in none.

    ``nn.TransformerEncoderLayer`` has a fast path that reads its Linears' weights and calls none of them. It would
    multiply factors out in every call, so it is switched off while the layer holds one.
    """
    try:
        _put(model, replacements)
    except BaseException:
        _put(model, {new: old for old, new in replacements.items()})
        raise


def _put(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        places = [name for name, child in parent._modules.items() if child is not None and child in replacements]
        for name in places:
            setattr(parent, name, replacements[parent.get_submodule(name)])
        if places and isinstance(parent, nn.TransformerEncoderLayer):
            _allow_fast_path(parent, not any(isinstance(child, LowRankLinear) for child in parent.children()))


def _allow_fast_path(layer: nn.TransformerEncoderLayer, allowed: bool) -> None:
    """The layer takes its fast path where this number names its activation, 1 for relu and 2 for gelu."""
    kind = 0
    if allowed and (layer.activation is F.relu or isinstance(layer.activation, nn.ReLU)):
        kind = 1
    elif allowed and (layer.activation is F.gelu or isinstance(layer.activation, nn.GELU)):
        kind = 2
    layer.activation_relu_or_gelu = kind


def tied_layers(model: nn.Module) -> dict[str, str]:
    """``{fqn of a module: fqn of another module}`` for modules that hold one and the same parameter."""
    owners: dict[int, list[str]] = {}
    for fqn, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(fqn)
    return {
        fqn: next(other for other in holders if other != fqn)
        for holders in owners.values()
        if len(set(holders)) > 1
        for fqn in holders
    }


def _replacement(layer: nn.Module, factors: Factors) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return LowRankConv2d.from_factors(layer, factors)
    return LowRankLinear.from_factors(layer, factors)

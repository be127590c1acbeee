"""Copies of a compressed model with torch's own layers only, which load and run without lowrank_ops."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from ..arguments import checked
from ..models.layers import check_no_adapters
from ._base import LowRankLayer
from .conv import GEOMETRY, LowRankConv
from .pivoted import PivotedLinear
from .replace import has_hooks, swap_


@checked()
def to_dense_layers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose low-rank layers are dense ones with the product as their weight.

    Args:
        model: any module; not changed.

    Returns:
        The copy, with the layer kinds, state dict keys and size of the model before compression.

    Raises:
        ValueError: a low-rank layer has hooks, which would be lost, parametrized factors, or a PEFT adapter.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(lro.LowRankLinear(64, 32, rank=8), torch.nn.ReLU())
        >>> lro.layers.to_dense_layers(model)
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=True)
          (1): ReLU()
        )
    """
    return _converted(model, lambda layer: layer.to_dense())


@checked()
def to_plain_layers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose low-rank layers are ``nn.Sequential`` of two Linears or two convolutions.

    The copy has only torch's own layers, and as many parameters as ``model``, plus rank^2 for each pivoted layer. So it
    can be pickled and loaded without lowrank_ops, scripted, quantized, and exported by tools that support no custom
    ops. Code that reads ``layer.weight`` of such a layer, as transformers' T5 does, fails: use :func:`to_dense_layers`
    there.

    Args:
        model: any module; not changed.

    Returns:
        The copy. State dict keys ``down`` and ``up`` become ``0.weight`` and ``1.weight``, ``bias`` becomes ``1.bias``.

    Raises:
        ValueError: a low-rank layer has hooks, which would be lost, parametrized factors, or a PEFT adapter.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(lro.LowRankLinear(64, 32, rank=8))
        >>> lro.layers.to_plain_layers(model)
        Sequential(
          (0): Sequential(
            (0): Linear(in_features=64, out_features=8, bias=False)
            (1): Linear(in_features=8, out_features=32, bias=True)
          )
        )
    """
    return _converted(model, _two_layers)


def _converted(model: nn.Module, convert: Callable[[LowRankLayer], nn.Module]) -> nn.Module:
    check_no_adapters(model)
    for fqn, module in model.named_modules():
        if isinstance(module, LowRankLayer) and has_hooks(module):
            raise ValueError(f"layer {fqn!r} has hooks, which its replacement would drop; remove them first.")
        if isinstance(module, LowRankLayer) and not {"down", "up", "bias"} <= module._parameters.keys():
            raise ValueError(
                f"layer {fqn!r} has parametrized factors; "
                "call torch.nn.utils.parametrize.remove_parametrizations first."
            )
    converted = copy.deepcopy(model)
    replacements = {layer: convert(layer) for layer in converted.modules() if isinstance(layer, LowRankLayer)}
    swap_(converted, replacements)  # type: ignore[arg-type]
    return replacements.get(converted, converted)  # type: ignore[call-overload, no-any-return]


def _two_layers(layer: LowRankLayer) -> nn.Sequential:
    """Two layers that hold the parameters of ``layer`` itself, or the factors of a pivoted one."""
    if isinstance(layer, PivotedLinear):
        layer = layer.to_lowrank()
    has_bias, middle = layer.bias is not None, len(layer.down)
    first: nn.Module
    second: nn.Module
    if isinstance(layer, LowRankConv):
        geometry = {name: getattr(layer, name) for name in GEOMETRY} | {"out_channels": middle}
        first = layer.dense_type(**geometry, bias=False, device="meta")
        second = layer.dense_type(middle, layer.out_channels, 1, groups=layer.groups, bias=has_bias, device="meta")
    else:
        first = nn.Linear(layer.down.shape[1], middle, bias=False, device="meta")
        second = nn.Linear(middle, len(layer.up), bias=has_bias, device="meta")
    first.weight, second.weight, second.bias = layer.down, layer.up, layer.bias
    return nn.Sequential(first, second).train(layer.training)

"""Copies of a compressed model without low-rank layers, for tools that only support torch's own layers."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn

from ..arguments import checked
from ..models.experts import ExpertLinear, ListedExperts
from ..models.layers import check_no_adapters, check_not_dispatched, has_hooks
from ._base import LowRankLayer
from .conv import GEOMETRY, LowRankConv
from .eight_bit import EightBitLinear
from .linear import LowRankLinear
from .narrow import NarrowLinear
from .pivoted import PivotedLinear
from .replace import swap_

CONVERTED = "_converted_by_lowrank_ops"  # set on such a copy: what saves it must know that it may have other layers


@checked()
def to_dense_layers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose low-rank layers are dense ones with the product as their weight.

    Layers with fewer channels are padded with zeros to the sizes before compression.

    Args:
        model: any module; not changed.

    Returns:
        The copy, with the layer kinds and the size of the model before compression; the experts of a mixture are fused
        again. Its state dict has the same keys, except for biases: centered factors add one to a layer that had none.
        To avoid that, compress with ``CompressionConfig(..., centered=False)``.

    Raises:
        ValueError: a low-rank layer has hooks, which would be lost, parametrized factors, or a PEFT adapter; accelerate
            moves weights on each call; or fused experts have no place for the biases of their low-rank projections.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(lro.LowRankLinear(64, 32, rank=8), torch.nn.ReLU())
        >>> lro.layers.to_dense_layers(model)
        Sequential(
          (0): Linear(in_features=64, out_features=32, bias=True)
          (1): ReLU()
        )
    """
    converted = _converted(model, _dense_layer, NarrowLinear.to_dense)
    fused: dict[nn.Module, nn.Module] = {}
    for fqn, module in converted.named_modules():
        if isinstance(module, ListedExperts):
            try:
                fused[module] = module.to_fused()
            except ValueError as error:
                raise ValueError(f"{fqn or 'model'}: {error}") from None
    swap_(converted, fused)
    return fused.get(converted, converted)


@checked()
def to_plain_layers(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose low-rank layers are ``nn.Sequential`` of two Linears or two convolutions.

    The copy has only torch's own layers, and as many parameters as ``model``, plus rank^2 for each pivoted layer. So it
    can be pickled and loaded without lowrank_ops, scripted, quantized by torchao, and exported by tools that support no
    custom ops; 8-bit factors get the layer's dtype, and a dense layer with an 8-bit weight or fewer channels becomes
    an ``nn.Linear``. A pair of layers has the sizes of the dense layer as attributes, such as ``stride``, but no
    ``weight``.

    The experts of a mixture and the projections of converted attention become such layers too, and can be quantized.
    The module that calls the experts becomes a ``torch.fx.GraphModule``. Those of :func:`convert_attention_` are this
    package's, which must be installed where the copy is loaded, but not for a program of ``torch.export`` or ONNX.

    Args:
        model: any module; not changed.

    Returns:
        The copy. State dict keys ``down`` and ``up`` become ``0.weight`` and ``1.weight``, ``bias`` becomes ``1.bias``.

    Raises:
        ValueError: a low-rank layer has hooks, which would be lost, parametrized factors, or a PEFT adapter; accelerate
            moves weights on each call; or the forward of a module around it reads its ``weight``, as in transformers'
            T5 and ViT.

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
    _check_reads(model)
    converted = _converted(model, _two_layers, NarrowLinear.to_plain)
    graphs: dict[nn.Module, nn.Module] = {
        module: _as_graph(module) for module in converted.modules() if isinstance(module, ListedExperts)
    }
    swap_(converted, graphs)
    return graphs.get(converted, converted)


def _check_reads(model: nn.Module) -> None:
    """Refuse low-rank layers whose weight a module around them reads in its forward: two layers have none."""
    forwards: dict[type, str] = {}
    layers = [fqn for fqn, module in model.named_modules() if isinstance(module, LowRankLayer)]
    for fqn in layers:
        if isinstance(model.get_submodule(fqn), EightBitLinear):  # which becomes an nn.Linear
            continue
        names = fqn.split(".")
        for depth in range(len(names)):
            kind = type(model.get_submodule(".".join(names[:depth])))
            if kind not in forwards:
                forwards[kind] = ""
                with suppress(OSError, TypeError):  # no source
                    if not kind.__module__.startswith("torch."):  # which reads weights on its fast path only
                        forwards[kind] = inspect.getsource(kind.forward)
            if re.search(rf"\bself\.{re.escape('.'.join(names[depth:]))}\.weight\b", forwards[kind]):
                raise ValueError(
                    f"layer {fqn!r}: {kind.__name__} reads its weight, and two plain layers have none. Use "
                    "to_dense_layers, or leave the layer out of the compression with filter_fn."
                )


def _as_graph(experts: ListedExperts) -> fx.GraphModule:
    """The same module, with the same state dict, as generated code: it is pickled without this package."""
    for layer in experts.modules():
        if isinstance(layer, ExpertLinear):
            layer.__class__ = nn.Linear  # type: ignore[assignment]  # the subclass only marks what is still dense
    tracer: Any = fx.Tracer()  # not a subclass, which would be pickled
    tracer.traced_func_name = ListedExperts.run_slices.__name__
    tracer.is_leaf_module = lambda module, name: module is not experts
    graph = tracer.trace(experts)
    for node in graph.nodes:
        node.type = None  # the annotations here are strings, which are not pickled
    return fx.GraphModule(experts, graph).train(experts.training)


def _converted(
    model: nn.Module, convert: Callable[[LowRankLayer], nn.Module], of_narrow: Callable[[NarrowLinear], nn.Module]
) -> nn.Module:
    check_no_adapters(model)
    check_not_dispatched(model)
    for fqn, module in model.named_modules():
        if isinstance(module, LowRankLayer) and not module._parameters.keys() >= {*module.matrices, "bias"}:
            raise ValueError(
                f"layer {fqn!r} has parametrized factors; "
                "call torch.nn.utils.parametrize.remove_parametrizations first."
            )
        if isinstance(module, (LowRankLayer, NarrowLinear)) and has_hooks(module):
            raise ValueError(f"layer {fqn!r} has hooks, which its replacement would drop; remove them first.")
    converted = copy.deepcopy(model)
    replacements: dict[nn.Module, nn.Module] = {
        layer: convert(layer) if isinstance(layer, LowRankLayer) else of_narrow(layer)
        for layer in converted.modules()
        if isinstance(layer, (LowRankLayer, NarrowLinear))
    }
    swap_(converted, replacements)
    converted = replacements.get(converted, converted)
    if replacements:
        setattr(converted, CONVERTED, True)
    return converted


def _dense_layer(layer: LowRankLayer) -> nn.Module:
    """``layer.to_dense()``, or transformers' Conv1D where the layer took the place of one."""
    dense = layer.to_dense()
    kind = layer.replaced_conv1d if isinstance(layer, LowRankLinear) else None
    if kind is None or not isinstance(dense, nn.Linear):
        return dense
    with torch.device("meta"):
        conv1d = kind(dense.out_features, dense.in_features)
    weight = dense.weight
    conv1d.weight = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
    conv1d.bias = nn.Parameter(weight.new_zeros(dense.out_features)) if dense.bias is None else dense.bias
    return conv1d.train(dense.training)


def _two_layers(layer: LowRankLayer) -> nn.Module:
    """Two layers that hold the parameters of ``layer`` itself, or the factors of a pivoted one; of 8-bit dense, one."""
    if isinstance(layer, EightBitLinear):
        return layer.to_dense()
    if isinstance(layer, PivotedLinear):
        layer = layer.to_lowrank()
    if isinstance(layer, LowRankLinear):
        layer.dequantize_()  # of the copy
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
    pair = nn.Sequential(first, second).train(layer.training)
    for name in GEOMETRY if isinstance(layer, LowRankConv) else ("in_features", "out_features"):
        setattr(pair, name, getattr(layer, name))
    return pair

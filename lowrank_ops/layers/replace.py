"""Replace layers of a model in place: all of them, or on an error none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch.nn.functional as F
from torch import nn

from ..factors.projections import Factors
from ..models.experts import experts_listed
from ..models.layers import check_not_wrapped, dimensions, find_layers, has_hooks, tied_layers
from ..models.old_optimizers import note_replaced
from ..ranks.costs import pivoting_saves
from ._base import LowRankLayer
from .conv import LowRankConv1d, LowRankConv2d
from .eight_bit import EightBitLinear
from .linear import LowRankLinear
from .narrow import NarrowLinear
from .pivoted import PivotedLinear


def replace_(model: nn.Module, factors: Mapping[str, Factors], *, pivoted: bool = False) -> nn.Module:
    """Replace dense layers of ``model`` by low-rank layers, in place.

    All new layers are created before the first one is put in, and an error leaves the model unchanged. A module that
    is used at several places is replaced at all of them by one layer. New layers take dtype, device, training and
    gradient flags from the layers that they replace.

    Args:
        model: any module.
        factors: ``{fqn: Factors}``, from :func:`lowrank_ops.factors.factorize` for example; those of
            :meth:`Factors.of_weight` make a dense layer, with an 8-bit weight or fewer channels.
        pivoted: store linear layers as :class:`lowrank_ops.layers.PivotedLinear`, where that takes fewer parameters.

    Returns:
        ``model``, or the new layer where ``model`` is itself the layer to replace.

    Raises:
        ValueError: a name that is not a compressible layer, a layer whose weight is tied to another module, or a layer
            with hooks, which the new layer would lose.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> from lowrank_ops.factors import factorize
        >>> from lowrank_ops.subspaces.layer import layer_subspaces
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
        >>> covariances = lro.calibrate(model, [torch.randn(256, 64)])
        >>> subspaces = layer_subspaces({"0": model[0]}, covariances)
        >>> lro.layers.replace_(model, {"0": factorize(subspaces["0"], rank=8)})
        Sequential(
          (0): LowRankLinear(in_features=64, out_features=32, rank=8, bias=True)
          (1): ReLU()
        )
    """
    with experts_listed(model, names=factors):
        return _replace(model, factors, pivoted)


def _replace(model: nn.Module, factors: Mapping[str, Factors], pivoted: bool) -> nn.Module:
    layers = replaceable(model, factors)
    replacements = {layers[fqn]: replacement(layers[fqn], part, pivoted) for fqn, part in factors.items()}
    swap_(model, replacements)
    return replacements.get(model, model)


def replaceable(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """``{fqn: layer}`` for these names; errors as for :func:`replace_`."""
    check_not_wrapped(model)
    names = list(names)
    layers, skipped = find_layers(model)
    unknown = [fqn for fqn in names if fqn not in layers]
    if unknown:
        reasons = "; ".join(f"{fqn!r}: {skipped.get(fqn, 'no such layer')}" for fqn in unknown)
        raise ValueError(f"factors names layers that cannot be replaced: {reasons}.")
    tied = tied_layers(model)
    for fqn in names:
        if fqn in tied:
            raise ValueError(
                f"layer {fqn!r} cannot be replaced: its weight is tied to {tied[fqn]!r}. "
                "Untie the two or leave the layer out with filter_fn."
            )
        if isinstance(layers[fqn], NarrowLinear):
            raise ValueError(f"layer {fqn!r} cannot be replaced: it has fewer channels already.")
        if has_hooks(layers[fqn]):
            raise ValueError(f"layer {fqn!r} has hooks, which its replacement would drop; remove them first.")
    return {fqn: layers[fqn] for fqn in names}


def replacement(dense: nn.Module, factors: Factors, pivoted: bool = False) -> LowRankLayer | NarrowLinear:
    """The layer with ``factors`` that replaces ``dense``."""
    if factors.kept is not None:
        return NarrowLinear.from_factors(dense, factors)
    kind = EightBitLinear if factors.is_dense else lowrank_type(dense, factors.rank if pivoted else None)
    return kind.from_factors(dense, factors)


def swap_(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in every place of its old one; on an error or an interrupt, in none.

    The fast path of ``nn.TransformerEncoderLayer`` reads the weights of its Linears and does not call them. With
    low-rank layers it would multiply the factors out in every forward, so it is disabled unless both are nn.Linear.
    """
    try:
        _set_children(model, replacements)
    except BaseException:
        _set_children(model, {new: old for old, new in replacements.items()})
        raise
    note_replaced(
        [parameter for old in replacements for parameter in old.parameters()],
        [parameter for new in replacements.values() for parameter in new.parameters()],
    )


def lowrank_type(dense: nn.Module, pivoted_rank: int | None = None) -> type[LowRankLayer]:
    """The class that replaces a dense layer; one of pivoted factors if given a rank at which they are smaller."""
    kinds = (LowRankConv1d, LowRankConv2d)
    found = next((kind for kind in kinds if isinstance(dense, kind.dense_type)), LowRankLinear)
    smaller = pivoted_rank is not None and pivoting_saves(pivoted_rank, dimensions(dense).out_features)
    return PivotedLinear if smaller and found is LowRankLinear else found


def _set_children(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        names = [name for name, child in parent._modules.items() if child is not None and child in replacements]
        for name in names:
            setattr(parent, name, replacements[parent.get_submodule(name)])
        if names and isinstance(parent, nn.TransformerEncoderLayer):
            _allow_fast_path(parent, all(isinstance(layer, nn.Linear) for layer in (parent.linear1, parent.linear2)))


def _allow_fast_path(layer: nn.TransformerEncoderLayer, allowed: bool) -> None:
    """Set the activation code that the layer checks: 1 (relu) and 2 (gelu) allow its fast path, 0 does not."""
    code = 0
    if allowed and (layer.activation is F.relu or isinstance(layer.activation, nn.ReLU)):
        code = 1
    elif allowed and (layer.activation is F.gelu or isinstance(layer.activation, nn.GELU)):
        code = 2
    layer.activation_relu_or_gelu = code

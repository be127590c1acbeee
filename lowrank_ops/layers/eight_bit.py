"""quantize_: 8-bit factors for the low-rank layers of a model."""

from __future__ import annotations

from torch import nn

from ..arguments import checked
from ..config import EIGHT_BIT, check_choice
from ..models.layers import FilterFn, check_no_adapters, check_not_dispatched
from ._base import LowRankLayer
from .linear import LowRankLinear
from .pivoted import PivotedLinear


@checked()
def quantize_(model: nn.Module, form: str = "int8", filter_fn: FilterFn | None = None) -> nn.Module:
    """Round the factors of a model's low-rank layers to 8 bits, in place; on an error the model is unchanged.

    Layers that are not low-rank stay as they are: for those, and for other formats, convert the model with
    :func:`to_plain_layers` and use torchao's function of the same name.

    Args:
        model: any module.
        form: ``"int8"`` or ``"fp8"``, as for :meth:`lowrank_ops.LowRankLinear.quantize_`.
        filter_fn: ``filter_fn(module, fqn) -> bool`` selects among the low-rank layers. None selects those that can be
            8-bit and are not yet: no convolutions and no pivoted layers.

    Returns:
        ``model``.

    Raises:
        ValueError: no layer is selected, or a selected layer cannot be 8-bit, is 8-bit already, has PEFT adapters or
            has weights that accelerate moves on each call; the message names it.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(lro.LowRankLinear(64, 32, rank=8), torch.nn.ReLU())
        >>> lro.layers.quantize_(model, "int8")
        Sequential(
          (0): LowRankLinear(in_features=64, out_features=32, rank=8, bias=True, down=int8, up=int8)
          (1): ReLU()
        )
    """
    check_choice("form", form, tuple(EIGHT_BIT))
    check_no_adapters(model)
    check_not_dispatched(model)
    layers = {fqn: layer for fqn, layer in model.named_modules() if isinstance(layer, LowRankLayer)}
    if filter_fn is None:
        chosen = {fqn: layer for fqn, layer in layers.items() if _can_be_eight_bit(layer)}
    else:
        chosen = {fqn: layer for fqn, layer in layers.items() if filter_fn(layer, fqn)}
    if not chosen:
        raise ValueError(
            "model has no low-rank layer that filter_fn selects and that can be 8-bit; call compress_ first."
        )
    found = {}
    for fqn, layer in chosen.items():
        try:
            if not isinstance(layer, LowRankLinear) or isinstance(layer, PivotedLinear):
                layer.quantize_(form)  # refuses
            else:
                found[layer] = layer._quantized(form)
        except ValueError as error:
            raise ValueError(f"layer {fqn!r}: {error}") from None
    for lowrank, parts in found.items():
        lowrank._set_quantized(parts)
    return model


def _can_be_eight_bit(layer: LowRankLayer) -> bool:
    kind = isinstance(layer, LowRankLinear) and not isinstance(layer, PivotedLinear)
    return kind and layer.formats == (None, None)  # type: ignore[attr-defined]

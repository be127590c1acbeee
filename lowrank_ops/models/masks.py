"""Which rows of an activation are real tokens and which are padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

Mask = str | Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]


def read_mask(source: Mask | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The bool mask (batch, positions) of one forward pass, from the arguments of the model's call.

    Raises:
        ValueError: the keyword argument is missing, or the mask does not have two dimensions.
    """
    if source is None:
        return None
    if callable(source):
        mask = source(args, dict(kwargs))
    elif source in kwargs:
        mask = kwargs[source]
    else:
        given = ", ".join(kwargs) or "none"
        raise ValueError(
            f"mask={source!r} is not among the keyword arguments of the model's forward ({given}); pass batches as "
            "mappings, or a callable mask(args, kwargs)."
        )
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"mask must have shape (batch, positions); got {tuple(mask.shape)}.")
    return None if mask is None else mask.bool()


def mask_of_rows(layer: Module, mask: Tensor | None) -> Tensor | None:
    """The mask of the rows that ``layer`` is being called with, which for an expert are some of the tokens.

    Raises:
        ValueError: the mask is not one of these tokens.
    """
    routed = getattr(layer, "routed", None)
    if mask is None or routed is None:
        return mask
    if mask.numel() != routed.total:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit the {routed.total} tokens that the router of an expert "
            "has seen. Leave the experts out with filter_fn."
        )
    return mask.flatten()[routed.tokens.to(mask.device)].unsqueeze(1)  # (rows, 1): samples of one position


def real_rows(fqn: str, x: Tensor, mask: Tensor | None, known: bool = True) -> Tensor:
    """The rows of ``x`` (..., features) that are not padding: where ``mask`` (batch, positions) is true.

    Args:
        fqn: name of the layer, for messages.
        x: its input or output; one row per sequence (batch, features) is returned whole.
        mask: None keeps all rows.
        known: whether the layer was called inside the model's own forward, where the mask is known.

    Raises:
        ValueError: the mask is not ``known``, or does not fit the activation.
    """
    if not known:
        raise ValueError(
            f"layer {fqn!r} was called outside the model's own forward, where mask is not known. "
            "Pass the module whose forward is called, or leave mask out."
        )
    if x.is_nested:
        return torch.cat(x.unbind())  # nn.TransformerEncoder has removed the padding
    if mask is None:
        return x
    leading = x.shape[:-1]
    if leading == mask.shape or leading == (mask.numel(),):
        return x[mask.reshape(leading).to(x.device)]
    if leading == mask.shape[:1]:
        return x  # pooled: one row per sequence
    raise ValueError(
        f"mask of shape {tuple(mask.shape)} does not fit the activation {tuple(x.shape)} of layer {fqn!r}, whose "
        "leading shape must be (batch, positions), (batch * positions,) or (batch,). "
        "Leave the layer out with filter_fn."
    )

"""Which rows of an activation are real tokens and which are padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Mask = str | Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None]


def read_mask(source: Mask | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The mask (batch, positions), bool, of one forward of the model, from its arguments.

    Raises:
        ValueError: the keyword argument is missing, or the mask is not a matrix.
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


def real_rows(fqn: str, x: Tensor, mask: Tensor | None, known: bool = True) -> Tensor:
    """The rows of ``x`` (..., features) at which ``mask`` (batch, positions) is true.

    Raises:
        ValueError: the mask is not ``known`` where the layer ``fqn`` was called, or does not fit its activation.
    """
    if not known:
        raise ValueError(
            f"layer {fqn!r} was called beside the model's own forward, where mask is not known. "
            "Pass the module whose forward is called, or do without mask."
        )
    if x.is_nested:
        return torch.cat(x.unbind())  # nn.TransformerEncoder has taken the padding out
    if mask is None:
        return x
    leading = x.shape[:-1]
    if leading == mask.shape or leading == (mask.numel(),):
        return x[mask.reshape(leading).to(x.device)]
    if leading == mask.shape[:1]:
        return x  # pooled: one row for each sequence
    raise ValueError(
        f"mask of shape {tuple(mask.shape)} does not fit the activation {tuple(x.shape)} of layer {fqn!r}, whose "
        "leading shape must be (batch, positions), (batch * positions,) or (batch,). "
        "Leave the layer out with filter_fn."
    )

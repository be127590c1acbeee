"""Optimizers that hold parameters which layers had before warn in their next step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .running import warn_caller

_replaced: dict[int, weakref.ref[nn.Parameter]] = {}  # parameters that modules had before; freed ones are removed
_warned: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def note_replaced(old: Iterable[nn.Parameter], new: Iterable[nn.Parameter] = ()) -> None:
    """Optimizers that hold parameters of ``old`` warn in their next step, unless these are among ``new``."""
    for parameter in old:
        key = id(parameter)
        _replaced[key] = weakref.ref(parameter, lambda _, key=key: _replaced.pop(key, None))  # type: ignore[misc]
    for parameter in new:
        _replaced.pop(id(parameter), None)


def _warn_of_replaced(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Before every step of every optimizer."""
    if not _replaced or optimizer in _warned:
        return
    held = sum(id(parameter) in _replaced for group in optimizer.param_groups for parameter in group["params"])
    if held:
        _warned.add(optimizer)
        warn_caller(
            f"this {type(optimizer).__name__} holds {held} parameters of layers that have been replaced, and does not "
            "train the layers in their place; create the optimizer after compress_, load_pretrained or conversions."
        )


register_optimizer_step_pre_hook(_warn_of_replaced)

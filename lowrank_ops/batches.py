"""Batches as users have them: tensors, tuples, lists and mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call_model(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: mappings are keyword arguments, tuples and lists positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def move(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch, nested in mappings, tuples and lists."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [move(value, device) for value in batch]
    return batch


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))

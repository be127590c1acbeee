"""Call a model on a batch, read its output, and restore training flags and random states afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def training_flags_kept(*models: nn.Module) -> Iterator[None]:
    """Every module gets its own training flag back after the block."""
    training = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; every module gets its own training flag back."""
    with training_flags_kept(*models):
        for model in models:
            model.eval()
        yield


@contextmanager
def random_state_kept(model: nn.Module) -> Iterator[list[torch.Generator]]:
    """Restore the random state after the block; yields the generators of the CPU and of the model's GPUs."""
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    with torch.random.fork_rng(devices=devices):
        yield [torch.default_generator, *(torch.cuda.default_generators[device] for device in devices)]


@contextmanager
def without_fast_path(wanted: bool = True) -> Iterator[None]:
    """Disable the fast path of nn.TransformerEncoder inside the block, if ``wanted``.

    The fast path of a frozen encoder removes padding by nested tensors, which its layers do not support with gradients.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before and not wanted)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Call the model: a mapping as keyword arguments, a tuple or list as positional ones, the rest as one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):  # a named tuple is one argument
        return model(*batch)
    return model(batch)


def move(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch, nested in mappings, tuples and lists."""
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and not isinstance(batch, nn.utils.rnn.PackedSequence):
        moved = [move(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    movable = isinstance(batch, (Tensor, nn.utils.rnn.PackedSequence))
    return batch.to(device=device) if movable else batch


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def output_tensor(output: Any, fields: Sequence[str]) -> Tensor | None:
    """The float tensor in a model's output: itself, the first of ``fields`` that it has, or the first of a sequence.

    None if that is not a float tensor with at least one dimension.
    """
    found = output
    if not isinstance(output, Tensor):
        get = output.get if isinstance(output, Mapping) else lambda name: getattr(output, name, None)
        found = next((value for value in map(get, fields) if isinstance(value, Tensor)), None)
        if found is None and isinstance(output, (tuple, list)) and output:
            found = output[0]
    return found if isinstance(found, Tensor) and found.is_floating_point() and found.dim() else None

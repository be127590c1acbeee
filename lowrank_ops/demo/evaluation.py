"""Predictions, accuracy, agreement and latency of a classifier."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 250


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, bar: Any = None) -> Tensor:
    """The predicted class of every image.

    Args:
        model: images (n, ...) -> logits (n, classes); set to eval mode.
        images: (n, ...).
        bar: a progress bar to advance by the number of images.

    Returns:
        (n,), int64.
    """
    model.eval()
    predictions = []
    for part in images.split(BATCH):
        predictions.append(model(part).argmax(-1))
        if bar is not None:
            bar.update(len(part))
    return torch.cat(predictions)


def percent_equal(predictions: Tensor, reference: Tensor) -> float:
    """Percentage of equal entries: the accuracy if ``reference`` holds the labels, the agreement if predictions."""
    return 100 * int((predictions == reference).sum()) / len(reference)


@torch.inference_mode()
def latencies(models: Sequence[nn.Module], batch: Tensor, rounds: int, bar: Any = None) -> list[float]:
    """Median milliseconds per call of each model.

    Every round calls each model once, so that a slow period of the machine affects all of them.

    Args:
        models: in eval mode.
        batch: the input of every call.
        rounds: timed calls of each model, after one untimed call.
        bar: a progress bar to advance by one per call, untimed calls included.
    """
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, taken in zip(models, times, strict=True):
            started = time.perf_counter()
            model(batch)
            taken.append(1000 * (time.perf_counter() - started))
            if bar is not None:
                bar.update()
    return [statistics.median(taken[1:]) for taken in times]

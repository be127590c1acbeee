"""How good and how fast a classifier is: predictions, accuracy, agreement, latency."""

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
        model: images (n, ...) -> logits (n, classes); put into eval mode.
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
    """Share of equal entries in percent: the accuracy where ``reference`` is the truth, else the agreement."""
    return 100 * int((predictions == reference).sum()) / len(reference)


@torch.inference_mode()
def latencies(models: Sequence[nn.Module], batch: Tensor, rounds: int, bar: Any = None) -> list[float]:
    """Median milliseconds that each model takes for ``batch``.

    The models take turns in every round, so that a slow moment of the machine falls on all of them alike.

    Args:
        models: in eval mode.
        batch: what each is called with.
        rounds: timed calls of each, after one that is not timed.
        bar: a progress bar to advance by one for each call, the first ones included.
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

"""Token weights call by call, for a reconstruction: one forward and backward pass of the dense model per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layers import find_layers
from ..models.mask_sources import Mask
from ..models.masks import Masks
from ..models.running import ProgressBar, device_of, differentiable, move
from .objectives import Sensitivity
from .recorder import Recorder
from .statistics import NonFiniteActivationError
from .token_weights import token_weights

SEED = 0  # of random labels and signs, so that a reconstruction resumed from a checkpoint uses the same weights


class CallWeights:
    """Token weights of the rows of some layers, by batch and call.

    Attributes:
        missing: layers for which some call had no matching weights.
    """

    def __init__(self, layers: Iterable[str] = (), batches: int = 0) -> None:
        self._weights: dict[str, list[list[Tensor]]] = {fqn: [[] for _ in range(batches)] for fqn in layers}
        self.missing: dict[str, None] = {}

    def __contains__(self, fqn: str) -> bool:
        return fqn in self._weights

    def add_call(self, fqn: str, batch: int, weights: Tensor) -> None:
        """Append the weights (rows,) of a layer's next call in a batch."""
        self._weights[fqn][batch].append(weights)

    def of_call(self, fqn: str, batch: int, call: int, calls: int, rows: int) -> Tensor | None:
        """The weights of one of ``calls``; ones if none match its rows; None for layers without weights."""
        if fqn not in self._weights:
            return None
        of_batch = self._weights[fqn][batch]
        if len(of_batch) == calls and len(of_batch[call]) == rows:
            return of_batch[call]
        self.missing[fqn] = None
        return torch.ones(rows)


def call_weights(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    sensitivity: Sensitivity,
    *,
    mask: Mask | None,
    forward: Callable[[nn.Module, Any], Any],
    progress: bool,
    unmasked_rows: str = "count",
) -> CallWeights:
    """The token weights that :func:`lowrank_ops.calibrate` would use, for each call of each layer.

    Args:
        model: the dense model; run in eval mode and returned to its previous state.
        layers: ``{fqn: layer}``, Linear, Conv1D, or Conv1d or Conv2d without groups.
        batches, sensitivity, mask, forward, progress, unmasked_rows: as for :func:`lowrank_ops.calibrate`.

    Returns:
        The weights of the real rows, on the CPU, without those of calls that the loss does not depend on.

    Raises:
        NonFiniteActivationError: NaN or inf in a gradient.
        ValueError: the loss of a batch depends on no layer of the model.
    """
    device, found = device_of(model), CallWeights(layers, len(batches))
    # All layers of the model, as in a calibration: a batch may reach others than the given ones.
    recorder = Recorder(find_layers(model)[0], Masks(model, mask, unmasked_rows), share=False)
    with ExitStack() as stack:
        stack.enter_context(differentiable(model, SEED))
        stack.callback(recorder.detach)
        recorder.attach(model, {}, torch.float64)
        recorder.attach_gradient_reader()
        for index, batch in enumerate(ProgressBar(batches, desc="token weights", unit="batch", disable=not progress)):
            moved = move(batch, device)
            # The output is not bound to a name, which would keep this batch's graph during the next forward.
            for fqn, values, real, _ in recorder.gradients_of(sensitivity, forward(model, moved), moved)[0]:
                if fqn not in layers:
                    continue
                weights = token_weights(layers[fqn], values, real).cpu()
                if not weights.isfinite().all():
                    raise NonFiniteActivationError(
                        f"layer {fqn!r}: its output gradient holds NaN or inf in batch {index} (counted from 0). "
                        "Check that batch, or run the model in a wider dtype."
                    )
                found.add_call(fqn, index, weights)
    return found

"""How much the loss feels of each row that a refit fits: one forward and backward pass of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models.layers import find_layers
from ..models.masks import Mask, read_mask
from ..models.running import device_of, evaluating, move, random_state_kept, without_fast_path
from .objectives import GradientTaps, Sensitivity, objective
from .statistics import NonFiniteActivationError
from .token_weights import weights_of

SEED = 0  # of random labels and signs: a refit that goes on from a checkpoint weighs rows as it did before


class FeltRows:
    """Weights of the rows that some layers are given, by batch and call.

    Attributes:
        missing: layers some of whose rows turned out to have none.
    """

    def __init__(self, layers: Iterable[str] = (), batches: int = 0) -> None:
        self._weights: dict[str, list[list[Tensor]]] = {fqn: [[] for _ in range(batches)] for fqn in layers}
        self.missing: dict[str, None] = {}

    def __contains__(self, fqn: str) -> bool:
        return fqn in self._weights

    def add_call(self, fqn: str, batch: int, weights: Tensor) -> None:
        """Keep the weights (rows,) of a layer's next call in a batch."""
        self._weights[fqn][batch].append(weights)

    def of_call(self, fqn: str, batch: int, call: int, calls: int, rows: int) -> Tensor | None:
        """The weights of one of ``calls``, ones where none correspond to its rows; None for layers not asked for."""
        if fqn not in self._weights:
            return None
        of_batch = self._weights[fqn][batch]
        if len(of_batch) == calls and len(of_batch[call]) == rows:
            return of_batch[call]
        self.missing[fqn] = None
        return torch.ones(rows)


def felt_rows(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Any],
    sensitivity: Sensitivity,
    *,
    mask: Mask | None,
    forward: Callable[[nn.Module, Any], Any],
    progress: bool,
) -> FeltRows:
    """Weights of the rows that each layer is given, as :func:`lowrank_ops.calibrate` weighs them.

    Args:
        model: the dense model; evaluated in eval mode and handed back as it was.
        layers: ``{fqn: layer}``, Linear, Conv1D, or Conv2d without groups.
        batches, sensitivity, mask, forward, progress: as for :func:`lowrank_ops.calibrate`.

    Returns:
        The weights of the real rows, on the CPU, without those of calls that the loss does not depend on.

    Raises:
        NonFiniteActivationError: NaN or inf in a gradient.
        ValueError: the loss of a batch depends on no layer of the model.
    """
    device, taps = device_of(model), GradientTaps()
    found = FeltRows(layers, len(batches))
    masks: list[Tensor | None] = [None]  # of the last forward

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks[0] = read_mask(mask, args, kwargs)

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for generator in stack.enter_context(random_state_kept(model)):
            generator.manual_seed(SEED)  # torch.manual_seed would seed the other GPUs as well
        stack.enter_context(evaluating(model))
        stack.enter_context(without_fast_path())
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        # All layers, as in a calibration: a batch may well reach others than those that are asked for.
        for fqn, layer in find_layers(model)[0].items():
            hook = layer.register_forward_hook(
                lambda module, args, y, fqn=fqn: taps.tap(fqn, y, masks[0], None), prepend=True
            )
            stack.callback(hook.remove)
        for index, batch in enumerate(tqdm(batches, desc="weighing rows", unit="batch", disable=not progress)):
            moved = move(batch, device)
            # No name for the loss, which would keep this batch's graph through the next one's forward.
            for fqn, values, real, _ in taps.gradients(
                objective(sensitivity, forward(model, moved), moved, masks[0]).loss
            ):
                if fqn not in layers:
                    continue
                weights = weights_of(layers[fqn], values, real).cpu()
                if not weights.isfinite().all():
                    raise NonFiniteActivationError(
                        f"layer {fqn!r}: its gradient holds NaN or inf in batch {index} (counted from 0). "
                        "Check that batch, or run the model in a wider dtype."
                    )
                found.add_call(fqn, index, weights)
    return found

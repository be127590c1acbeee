"""Measure the output error of each replaced layer on data, compared with the dense layer at the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..calibration.statistics import NonFiniteActivationError
from ..layers import LowRankLayer, NarrowLinear
from ..models.experts import experts_listed
from ..models.layers import bias_vector, input_of, is_conv, output_rows
from ..models.mask_sources import Mask
from ..models.masks import Masks, real_rows
from ..models.mlps import find_mlps
from ..models.running import (
    EMPTY,
    ProgressBar,
    call_model,
    device_of,
    evaluating,
    float64_device,
    hooks,
    in_batch,
    move,
    warn_caller,
)


class _Sums:
    """Sums over one layer's outputs (rows, features) and errors, in float64: on the CPU if the device has none."""

    def __init__(self, features: int, device: torch.device) -> None:
        self._device = device = float64_device(device)
        self.rows = 0
        self.error = torch.zeros((), dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(features, dtype=torch.float64, device=device)

    def add(self, y: Tensor, error: Tensor) -> None:
        y, error = (part.to(self._device).double() for part in (y, error))
        self.rows += len(y)
        self.error += error.square().sum()
        self.squares += y.square().sum()
        self.total += y.sum(0)

    def relative(self, centered: bool) -> float:
        variance = self.squares - (self.total.square().sum() / self.rows if centered else 0.0)
        return float(self.error / variance) if bool(variance > 0) else (0.0 if bool(self.error == 0) else float("inf"))


@checked(unmasked_rows="mask")
def measure_errors(
    dense: nn.Module,
    compressed: nn.Module,
    batches: Iterable[Any],
    *,
    mask: Mask | None = None,
    unmasked_rows: str = "count",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    centered: bool = True,
    progress: bool = False,
) -> dict[str, float]:
    """The relative output error of every replaced layer at the inputs of the dense layer.

    The error is E|y - y'|^2 / E|y - E y|^2 over the rows of ``batches``. ``LayerCompression.relative_error`` predicts
    it from the calibration rows. Pass batches that calibration has not seen, and add the result to the report with
    ``report.with_measured(errors)``. Only ``dense`` is run, so errors do not accumulate from layer to layer. An MLP
    with fewer channels has its error at its consumer, the layer that reads the channels; it is not measured if the
    other layers of the MLP were trained, as by ``finetune_`` and ``BlockReconstruction``.

    Args:
        dense: a copy of the model from before compression. It runs in eval mode; its training flags are restored.
        compressed: the same model after :func:`lowrank_ops.compress_`, on the same device and in the same dtype.
        batches, mask, unmasked_rows, forward: as for :func:`lowrank_ops.calibrate`.
        centered: True takes the outputs' variance about their mean; False takes it about zero and without the bias, as
            ``CompressionConfig(centered=False)`` does.
        progress: show a progress bar.

    Returns:
        ``{fqn: relative error}`` of the replaced layers that were called; inf where the dense output is constant and
        the error is not zero.

    Raises:
        NonFiniteActivationError: NaN or inf in an output.
        TypeError: an argument of another type.
        ValueError: ``compressed`` has no replaced layer, or one that ``dense`` does not have; ``batches`` has no rows;
            the mask fits no layer, or is unknown and ``unmasked_rows="error"``.

    Example:
        >>> import copy, torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> dense = copy.deepcopy(model)
        >>> report = lro.compress_(model, lro.calibrate(model, [torch.randn(512, 64)]))
        >>> sorted(lro.measure_errors(dense, model, [torch.randn(128, 64)]))
        ['0', '2']
    """
    kinds = (LowRankLayer, NarrowLinear)
    layers = {fqn: layer for fqn, layer in compressed.named_modules() if isinstance(layer, kinds)}
    if not layers:
        raise ValueError("compressed has no replaced layer to compare; pass the model that compress_ changed.")
    with experts_listed(dense, names=layers):
        originals = dict(dense.named_modules())
        for fqn in layers:
            if fqn not in originals or isinstance(originals[fqn], kinds):
                raise ValueError(
                    f"dense has no dense layer {fqn!r}; pass a copy (copy.deepcopy) of the model from before compress_."
                )
        narrow = {fqn: layer for fqn, layer in layers.items() if isinstance(layer, NarrowLinear)}
        replaced = {fqn: layer for fqn, layer in layers.items() if fqn not in narrow} | _consumers(dense, narrow)
        if not replaced:
            raise ValueError(
                "compressed has only MLPs with fewer channels whose weights were trained; their errors cannot be "
                "measured. Pass the model from before finetune_, or one compressed without BlockReconstruction."
            )
        return _measured(dense, compressed, replaced, batches, mask, unmasked_rows, forward, centered, progress)


def _consumers(dense: nn.Module, narrow: Mapping[str, NarrowLinear]) -> dict[str, Callable[[Tensor], Tensor]]:
    """By consumer, its output from all channels of the dense MLP, of which it takes those that are left."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    for mlp in find_mlps(dense, {fqn: dense.get_submodule(fqn) for fqn in narrow}):
        wide, left = (_rows([of(fqn) for fqn in mlp.producers]) for of in (dense.get_submodule, narrow.__getitem__))
        if (kept := _places(left, wide)) is not None:
            found[mlp.consumer] = lambda x, layer=narrow[mlp.consumer], kept=kept: layer(x[..., kept])  # type: ignore[misc]
    return found


def _places(rows: Tensor, of: Tensor) -> list[int] | None:
    """Where ``rows`` are among those ``of`` another tensor, in the same order; None if some are not."""
    found, others = [], enumerate(of)
    for row in rows:
        place = next((index for index, other in others if torch.equal(row, other)), None)
        if place is None:
            return None
        found.append(place)
    return found


def _rows(layers: Sequence[nn.Module]) -> Tensor:
    """What each channel is computed from: (channels, features and biases of all producers)."""
    parts = [[layer.get_parameter("weight"), bias_vector(layer)] for layer in layers]
    return torch.cat([part.reshape(len(part), -1) for pair in parts for part in pair if part is not None], 1).detach()


def _measured(
    dense: nn.Module,
    compressed: nn.Module,
    replaced: Mapping[str, Callable[[Tensor], Tensor]],
    batches: Iterable[Any],
    mask: Mask | None,
    unmasked_rows: str,
    forward: Callable[[nn.Module, Any], Any] | None,
    centered: bool,
    progress: bool,
) -> dict[str, float]:
    sums: dict[str, _Sums] = {}
    masks = Masks(dense, mask, unmasked_rows)

    def record(fqn: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        other = replaced[fqn](x)
        if other.shape != y.shape:
            raise ValueError(
                f"layer {fqn!r} returns {tuple(y.shape)} in dense and {tuple(other.shape)} in compressed; pass a copy "
                "of the model from before compress_."
            )
        error = y - other
        bias = None if centered else bias_vector(layer)
        if is_conv(layer):
            y, error = (output_rows(layer, part) for part in (y, error))
        else:
            real = masks.of(fqn, layer, x)
            y, error = (real_rows(part, real) for part in (y, error))
        y, error = (part.reshape(-1, part.shape[-1]) for part in (y, error))
        if fqn not in sums:
            sums[fqn] = _Sums(y.shape[-1], y.device)
        sums[fqn].add(y if bias is None else y - bias, error)

    count = 0
    with hooks() as handles, evaluating(dense, compressed), torch.no_grad():
        masks.attach(handles)
        for fqn in replaced:
            handle = dense.get_submodule(fqn).register_forward_hook(
                lambda module, args, kwargs, y, fqn=fqn: record(fqn, module, input_of(args, kwargs), y),
                with_kwargs=True,
                prepend=True,
            )
            handles.append(handle)
        for batch in ProgressBar(batches, desc="measuring errors", unit="batch", disable=not progress):
            with in_batch(count):
                (forward or call_model)(dense, move(batch, device_of(dense)))
            count += 1
    if not count:
        raise ValueError(EMPTY)
    if (warning := masks.finish()) is not None:
        warn_caller(warning)
    for fqn, part in sums.items():
        if not bool((part.error + part.squares).isfinite()):
            raise NonFiniteActivationError(
                f"layer {fqn!r}: its output holds NaN or inf, in the dense or in the compressed model. Check the "
                "batches, or run the models in a wider dtype."
            )
    errors = {fqn: sums[fqn].relative(centered) for fqn in replaced if fqn in sums and sums[fqn].rows}
    if not errors:
        raise ValueError("no row reached a replaced layer: the batches are empty, or the mask excludes all positions.")
    return errors

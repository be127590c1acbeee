"""Midpoint gradients: output gradients streamed again, with weights at the mean of the dense and the compressed ones.

Output gradients of the dense model predict the effect of a first small change. Compression makes large changes in all
layers at once; gradients at the midpoint predict those better.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .arguments import check_arguments, checked
from .calibration.calibrator import calibrate
from .calibration.covariances import Covariances
from .calibration.statistics import LayerStatistics
from .compress import compress_
from .config import CompressionConfig
from .layers import LowRankLayer
from .layers.replace import swap_
from .models.copies import filter_of_original, shared_copy
from .models.experts import list_experts_
from .models.layers import bias_vector, find_layers, weight_matrix
from .models.running import random_state_kept
from .policies import RankPolicy


@checked()
def recalibrate(
    model: nn.Module,
    covariances: Covariances,
    batches: Iterable[Any],
    config: CompressionConfig | RankPolicy | int | None = None,
    **options: Any,
) -> Covariances:
    """Add midpoint gradients to covariances: output gradients with weights between the dense and the compressed ones.

    Runs ``batches`` once more, forward and backward. During this run each layer's weight is the mean of its dense and
    its compressed weight under ``config``. Output gradients and token-weighted moments are summed over both runs;
    activation moments stay those of the dense model. For loss-aware ranks and factors, one-shot or with a
    reconstruction. Costs as much as the calibration with the same batches, and one decomposition of every layer.

    Args:
        model: the model that was calibrated. It is not changed, and other threads may run it meanwhile: the batches run
            through a copy of its structure, which has its own buffers.
        covariances: from :func:`lowrank_ops.calibrate` with a sensitivity; not changed.
        batches: as for :func:`lowrank_ops.calibrate`, ideally the same.
        config: how the model is to be compressed, as for :func:`lowrank_ops.compress_`, without a reconstruction;
            layers that will stay dense are named in its overrides.
        options: the keyword arguments that were given to :func:`lowrank_ops.calibrate`; ``sensitivity`` is required.
            ``forward`` is called with the copy, and has to run it.

    Returns:
        New covariances, which share the activation moments with ``covariances``. Two kinds of moments are those of the
        dense model alone: token-weighted moments of layers that stream their output, because the midpoint's outputs
        are not outputs of the dense layer, and all moments of a layer that no batch reaches at the midpoint, such as
        an expert.

    Raises:
        RuntimeError: another thread calibrates or compresses the model when this begins.
        ValueError: covariances without output gradients, no ``sensitivity`` among the options, options other than those
            of the first calibration, a model that cannot be copied, or as for :func:`lowrank_ops.calibrate` and
            :func:`lowrank_ops.compress_`.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> batches = [torch.randn(64, 64)]
        >>> covariances = lro.calibrate(model, batches, sensitivity="fisher")
        >>> covariances = lro.recalibrate(model, covariances, batches, lro.ParameterBudget(0.5), sensitivity="fisher")
        >>> report = lro.compress_(model, covariances, lro.ParameterBudget(0.5))
    """
    if not covariances.has_output_gradients:
        raise ValueError("covariances hold no output gradients to add to; use calibrate(..., sensitivity=...) first.")
    if options.get("sensitivity") is None:
        raise ValueError(
            "sensitivity must be that of the first calibrate: 'fisher', 'output', 'pooled' or a loss; got None."
        )
    weighted = covariances.has_token_weights
    if options.setdefault("token_weights", weighted) != weighted:
        raise ValueError(
            f"token_weights must be {weighted}, as in the first calibrate; got {options['token_weights']!r}."
        )
    accepted = inspect.signature(calibrate).parameters.keys() - {"model", "batches"}
    if unknown := [name for name in options if name not in accepted]:  # before the long work
        raise TypeError(f"options: calibrate has no keyword argument {', '.join(map(repr, unknown))}.")
    check_arguments(calibrate, options)
    filter_fn = filter_of_original(model, options.pop("filter_fn", None))
    middle = shared_copy(model)
    list_experts_(middle)
    layers, skipped = find_layers(middle, filter_fn)  # while they are dense: the filter may go by their type
    if missing := [fqn for fqn in covariances if fqn not in layers]:
        reasons = "".join(f"\n  {fqn}: {skipped[fqn]}" for fqn in missing if fqn in skipped)
        raise ValueError(
            f"covariances hold layers that model does not have or filter_fn does not keep: {', '.join(missing)}. "
            f"Pass the model and the filter_fn of the first calibrate.{reasons}"
        )
    config = replace(CompressionConfig.of(config), reconstruction=None)
    if config.channels_of:
        raise ValueError(
            "recalibrate has no midpoint of an MLP with all of its channels and one with fewer; leave channels out of "
            "its config, so that the MLPs have factors at the midpoint."
        )
    samples = _samples(covariances)  # grows with each run, so that a third run draws other labels as well
    with torch.inference_mode(False):  # weights made in inference mode would have no gradients
        compress_(middle, covariances, config, progress=options.get("progress", False))
        _to_midpoint_(middle, layers)
        with random_state_kept(middle) as generators:
            for generator in generators:  # the same labels and signs would double the noise of the first draw
                generator.manual_seed((generator.initial_seed() + samples) % 2**63)
            found = calibrate(middle, batches, filter_fn=lambda module, fqn: fqn in covariances, **options)
        return _with_gradients_of(covariances, found)


def _samples(covariances: Covariances) -> int:
    return next(layer.output_gradients.count for layer in covariances.values() if layer.output_gradients is not None)


def _to_midpoint_(model: nn.Module, dense: Mapping[str, nn.Module]) -> None:
    """Replace the low-rank layers by dense ones with midpoint weights."""
    compressed = {module: fqn for fqn, module in model.named_modules() if isinstance(module, LowRankLayer)}
    swap_(model, {module: _between(module, dense[fqn]) for module, fqn in compressed.items() if fqn in dense})


@torch.no_grad()
def _between(module: LowRankLayer, dense: nn.Module) -> nn.Module:
    middle = module.to_dense()
    weight = middle.get_parameter("weight")
    weight.lerp_(weight_matrix(dense).reshape(weight.shape), 0.5)
    if module.bias is not None:
        middle_bias, bias = middle.get_parameter("bias"), bias_vector(dense)
        middle_bias.lerp_(torch.zeros_like(middle_bias) if bias is None else bias, 0.5)
    return middle


def _with_gradients_of(covariances: Covariances, found: Covariances) -> Covariances:
    """The activation moments of one, the output gradients of both."""
    if differ := [fqn for fqn in covariances if fqn in found and found[fqn].side != covariances[fqn].side]:
        raise ValueError(
            f"side must stream what the first calibrate did; it differs at {', '.join(differ)}. Pass the same side and "
            "max_state_bytes."
        )
    samples = _samples(found)
    layers = {fqn: _with_gradients(layer, found.get(fqn), samples) for fqn, layer in covariances.items()}
    return Covariances(layers, covariances.unreached, covariances.skipped)


def _with_gradients(layer: LayerStatistics, found: LayerStatistics | None, samples: int) -> LayerStatistics:
    gradients, weighted = layer.output_gradients, layer.token_weighted
    if gradients is None:
        return layer
    if found is None or found.output_gradients is None:
        more = gradients.with_count(gradients.count + samples)  # its gradients were zero in this run's samples
    else:
        more = gradients.plus(found.output_gradients)
    if weighted is not None and found is not None and found.token_weighted is not None and layer.side == "input":
        weighted = weighted.plus(found.token_weighted)
    return replace(layer, output_gradients=more, token_weighted=weighted)

"""What the loss feels halfway to a compressed model: gradients taken a second time, with the weights in between.

Gradients of the dense model tell the harm of a first small change. Compression makes large ones, in all layers at once;
what they meet on the way is told better by gradients from its middle.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .calibration.calibrate import calibrate
from .calibration.statistics import Covariances
from .compress import compress_
from .config import AccuracyGuided, CompressionConfig, ParameterBudget
from .layers import LowRankConv2d, LowRankLinear
from .layers.replace import swap_
from .models.layers import bias_vector, find_layers, weight_matrix
from .models.running import random_state_kept


def recalibrate(
    model: nn.Module,
    covariances: Covariances,
    batches: Iterable[Any],
    config: CompressionConfig | None = None,
    **options: Any,
) -> Covariances:
    """Add sensitivities of the model halfway between dense and compressed to those of the dense model.

    Runs ``batches`` once more, forward and backward, with the mean of each layer's dense weight and of the weight that
    ``config`` makes of it. Means and second moments stay those of the dense model; sensitivities, with their weighted
    rows, become those over the samples of both. For ``allocation="loss"`` and ``projection="loss"``, one-shot or with a
    refit. For the same batches it costs what the calibration did, and a decomposition of all layers::

        covariances = lro.calibrate(model, batches, sensitivity="fisher")
        covariances = lro.recalibrate(model, covariances, batches, config, sensitivity="fisher")
        lro.compress_(model, covariances, config)

    Args:
        model: the model that was calibrated; handed back as it was.
        covariances: from :func:`lowrank_ops.calibrate` with a sensitivity; not changed.
        batches: as for :func:`lowrank_ops.calibrate`, at best the same.
        config: how the model is to be compressed, a refit left out; layers that will stay dense are named in its
            overrides. By default half of the layers' parameters, ranks and factors by loss. ``AccuracyGuided`` searches
            here as well, without its journal: trials with these covariances are none of those to come.
        options: keyword arguments of :func:`lowrank_ops.calibrate` as they were given to it, the sensitivity above all.

    Returns:
        New covariances, which share the moments with ``covariances``. Weighted rows of layers that stream their output
        are the dense model's alone: outputs of other weights are no outputs of that layer. So are all sums of a layer
        that no batch reaches halfway, as an expert that is routed to by the inputs.

    Raises:
        ValueError: covariances without sensitivities, no ``sensitivity`` among the options, options other than those of
            the first calibration, or what :func:`lowrank_ops.calibrate` and :func:`lowrank_ops.compress_` raise.
    """
    if not isinstance(covariances, Covariances):
        raise TypeError(f"covariances must come from calibrate(model, batches); got {type(covariances).__name__}.")
    if not covariances.sensitivities:
        raise ValueError("covariances hold no sensitivities to add to; use calibrate(..., sensitivity=...) first.")
    if options.get("sensitivity") is None:
        raise ValueError(
            "sensitivity must be given as to the first calibrate: 'fisher', 'output', 'pooled' or a loss; got None."
        )
    weighted = any(gradient.weighted is not None for gradient in covariances.sensitivities.values())
    if options.setdefault("weigh_rows", weighted) != weighted:
        raise ValueError(f"weigh_rows must be {weighted}, as of the first calibrate; got {options['weigh_rows']!r}.")
    accepted = inspect.signature(calibrate).parameters
    if unknown := [name for name in options if name not in accepted]:  # before the long work
        raise TypeError(f"options must be keyword arguments of calibrate; it has no {', '.join(unknown)}.")
    # Asked of the dense layers: a filter may know them by their type, or be a set of them.
    layers, _ = find_layers(model, options.pop("filter_fn", None))
    if missing := [fqn for fqn in covariances if fqn not in layers]:
        raise ValueError(
            f"covariances hold layers that model does not have or filter_fn does not keep: {', '.join(missing)}. "
            "Pass the model and the filter_fn of the first calibrate."
        )
    config = CompressionConfig(ParameterBudget(0.5, "loss"), projection="loss") if config is None else config
    samples = next(iter(covariances.sensitivities.values())).count  # grows, so that a third run draws anew as well
    with torch.inference_mode(False):  # weights made in inference mode would have no gradients
        with (
            _halfway(model, covariances, config, options.get("progress", False)),
            random_state_kept(model) as generators,
        ):
            for generator in generators:  # labels and signs drawn once more would double the noise of the first draw
                generator.manual_seed((generator.initial_seed() + samples) % 2**63)
            found = calibrate(model, batches, filter_fn=lambda module, fqn: fqn in covariances, **options)
        return _with_sensitivities_of(covariances, found)


@contextmanager
def _halfway(model: nn.Module, covariances: Covariances, config: CompressionConfig, progress: bool) -> Iterator[None]:
    """Dense layers with weights in the middle of the way, inside the ``with`` block only."""
    if isinstance(config, CompressionConfig):
        policy = replace(config.rank, journal=None) if isinstance(config.rank, AccuracyGuided) else config.rank
        config = replace(config, rank=policy, refit=None)
    dense = dict(model.named_modules(remove_duplicate=False))

    def changed() -> list[tuple[nn.Module, nn.Module]]:
        """What stands in the model, with what stood there; asked anew, as an interrupt may come at any step."""
        now = model.named_modules(remove_duplicate=False)
        return [(module, dense[fqn]) for fqn, module in now if module is not dense.get(fqn, module)]

    try:
        compress_(model, covariances, config, progress=progress)
        swap_(model, {module: _between(module, original) for module, original in dict(changed()).items()})
        yield
    finally:
        swap_(model, dict(changed()))


@torch.no_grad()
def _between(module: nn.Module, dense: nn.Module) -> nn.Module:
    assert isinstance(module, (LowRankLinear, LowRankConv2d))
    middle = module.to_dense()
    middle.weight.lerp_(weight_matrix(dense).reshape(middle.weight.shape), 0.5)
    if middle.bias is not None:
        bias = bias_vector(dense)
        middle.bias.lerp_(torch.zeros_like(middle.bias) if bias is None else bias, 0.5)
    return middle


def _with_sensitivities_of(covariances: Covariances, found: Covariances) -> Covariances:
    """The moments of one, the sensitivities of both."""
    if differ := [fqn for fqn in covariances if fqn in found and found[fqn].side != covariances[fqn].side]:
        raise ValueError(
            f"side must stream what the first calibrate did; it differs at {', '.join(differ)}. Give side and "
            "max_state_bytes as they were then."
        )
    result = Covariances()
    for covariance in covariances.statistics():
        result._add(covariance)
    samples = next(gradient.count for gradient in found.sensitivities.values())
    for fqn, gradient in covariances.sensitivities.items():
        if fqn not in covariances:  # called with no rows
            continue
        more, weighted = found.sensitivities.get(fqn), gradient.weighted
        unfelt = replace(gradient, count=gradient.count + samples, weighted=None)  # by the samples of this run
        result._add(unfelt if more is None else gradient.plus(more))
        if weighted is not None:
            also = more.weighted if more is not None and covariances[fqn].side == "input" else None
            result._add(weighted if also is None else weighted.plus(also))
    result._sort(covariances)
    result.unreached, result.skipped = covariances.unreached, dict(covariances.skipped)
    return result

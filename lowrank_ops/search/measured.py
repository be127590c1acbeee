"""measured_ranks: a parameter budget, allocated by predicted losses that gradients of the compressed model correct."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_positive, checked
from ..calibration.call_weights import SEED
from ..calibration.covariances import Covariances
from ..calibration.objectives import Sensitivity, check_sensitivity, distance
from ..calibration.recorder import NO_ROWS
from ..config import CompressionConfig
from ..considered import considered_layers, resolved
from ..factors.channels import widened
from ..factors.layer_by_layer import decompose, factorize_layers
from ..layers.replace import replace_
from ..models.copies import filter_of_original, shared_copy
from ..models.experts import list_experts_
from ..models.layers import FilterFn
from ..models.mask_sources import Mask
from ..models.masks import Masks
from ..models.running import (
    EMPTY,
    ProgressBar,
    call_model,
    device_of,
    differentiable,
    evaluating,
    hooks,
    in_batch,
    move,
    warn_caller,
)
from ..policies import ParameterBudget, Ranks
from ..ranks.choose import ChosenRanks, as_policy, limits_of
from ..ranks.groups import choose_grouped_sizes
from ..subspaces.channels import check_apart, with_channels
from ..subspaces.layer import LayerSubspaces

_INDEPENDENT = (
    "the loss does not depend on the compressed layers: forward and sensitivity must not detach outputs, and forward "
    "has to run the copy that it is called with."
)
MAX_CORRECTION = 10.0  # of a predicted loss, relative to all layers, in either direction


@checked()
def measured_ranks(
    model: nn.Module,
    covariances: Covariances,
    batches: Iterable[Any],
    fraction: float,
    *,
    sensitivity: Sensitivity = "fisher",
    rounds: int = 2,
    config: CompressionConfig | None = None,
    filter_fn: FilterFn | None = None,
    mask: Mask | None = None,
    unmasked_rows: str = "count",
    forward: Callable[[nn.Module, Any], Any] | None = None,
    subspaces: Mapping[str, LayerSubspaces] | None = None,
    progress: bool = False,
) -> Ranks:
    """Ranks for a parameter budget, allocated by predicted losses that gradients of the compressed model correct.

    The predicted loss of a layer ignores the errors of other layers. Each round compresses a copy of the model. The
    error of a layer, its output minus that of the dense layer, is multiplied by a scale of 1, and the copy's loss is
    differentiated with respect to that scale. If layers did not interact, the derivative would be twice the predicted
    loss. The ratio of the two corrects the predictions of the layer, and the budget is allocated again. The ranks with
    the lowest loss are returned.

    Costs ``rounds`` + 1 factorizations and forward passes and ``rounds`` backward passes over the batches. In the
    backward passes all low-rank layers also run dense; with a distance as the loss, the dense model runs as well.

    Args:
        model: the model that was calibrated. It is not changed, and other threads may run it meanwhile: the batches run
            through copies of its structure, which share its parameters and have their own buffers.
        covariances: with output gradients, from :func:`lowrank_ops.calibrate`.
        batches: as for :func:`lowrank_ops.calibrate`; a few thousand tokens or a few hundred images.
        fraction: of the layers' parameters, as in :class:`lowrank_ops.ParameterBudget`.
        sensitivity: the loss. A function ``loss(output, batch)``, as for :func:`lowrank_ops.calibrate`; or the distance
            from the dense model's output: ``"fisher"``: the Kullback-Leibler divergence of the distributions;
            ``"output"``: half the squared difference; ``"pooled"``: of rows and of their mean, weighted as in
            calibration.
        rounds: corrections, each at the ranks of the one before.
        config: projection, centering, overrides, bounds, pivoting, groups and channels; its rank policy and its
            reconstruction are not used.
        filter_fn, subspaces: as for :func:`lowrank_ops.compress_`.
        mask, unmasked_rows, forward: as for :func:`lowrank_ops.calibrate`. ``forward`` has to run the copy that it is
            called with.
        progress: show a progress bar.

    Returns:
        The ranks, a policy for :func:`lowrank_ops.compress_`; layers that stay dense are not named. The prediction of a
        layer that no batch reaches, such as an expert, is not corrected.

    Raises:
        RuntimeError: another thread calibrates or compresses the model when this begins.
        ValueError: an invalid argument, a budget that cannot be met, statistics without output gradients, batches
            without rows that count, a loss that is not finite or does not depend on the compressed layers, channels
            that are read outside their MLP, a model that cannot be copied, or as for
            :func:`lowrank_ops.compress_`.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> batches = [torch.randn(256, 64)]
        >>> covariances = lro.calibrate(model, batches, sensitivity="fisher")
        >>> ranks = lro.measured_ranks(model, covariances, batches, 0.5)
        >>> report = lro.compress_(model, covariances, ranks)
    """
    check_sensitivity(sensitivity)
    check_positive(rounds=rounds)
    config = replace(CompressionConfig.of(config), rank=ParameterBudget(fraction, "loss"))
    batches = list(batches)
    if not batches:
        raise ValueError(EMPTY)
    dense, filter_fn = shared_copy(model).requires_grad_(False), filter_of_original(model, filter_fn)
    list_experts_(dense)
    subspaces, _ = considered_layers(dense, covariances, filter_fn, subspaces, centered=config.centered)
    config = resolved(config, subspaces)
    subspaces = with_channels(dense, subspaces, config.channels)
    run, device = forward or call_model, device_of(dense)
    with in_batch(0):
        check_apart(dense, subspaces, lambda: run(dense, move(batches[0], device)))
    decompose(config.rank, subspaces, progress)
    fixed = limits_of(subspaces, config.overrides, config.bounds).fixed
    measured: dict[str, float] = {}  # by layer, summed over the rounds
    predicted: dict[str, float] = {}
    best: tuple[float, ChosenRanks] | None = None
    total = (rounds + 1) * len(batches)
    with (
        torch.inference_mode(False),
        ProgressBar(total=total, desc="measuring", unit="batch", disable=not progress) as bar,
    ):
        for step in range(rounds + 1):
            ranks, *_ = choose_grouped_sizes(config, subspaces, _corrections(measured, predicted))
            trial = shared_copy(dense)
            factors = dict(factorize_layers(subspaces, ranks, str(config.projection), keep_directions=True))
            for fqn, rank in ranks.items():  # trial MLPs keep all channels, for their gates run the dense consumer
                if rank is not None and factors[fqn].kept is not None:
                    factors[fqn] = widened(factors[fqn], subspaces[fqn].max_rank)
            replace_(trial, {fqn: part for fqn, part in factors.items() if fqn in ranks})
            gated = [fqn for fqn, rank in ranks.items() if rank is not None and fqn not in fixed]
            masks = Masks(trial, mask, unmasked_rows)
            loss, found = _differentiated(
                dense, trial, gated if step < rounds else [], batches, sensitivity, masks, run, bar
            )
            bar.set_postfix(loss=f"{loss:.4g}")
            if best is None or loss < best[0]:
                best = loss, ranks
            for fqn, value in found.items():
                measured[fqn] = measured.get(fqn, 0.0) + value
                predicted[fqn] = predicted.get(fqn, 0.0) + _dropped(subspaces[fqn], ranks[fqn])
    if (warning := masks.finish()) is not None:  # the same in all rounds
        warn_caller(warning)
    if sum(measured.values()) <= 0 < sum(predicted.values()):
        warn_caller(
            "predicted losses are not corrected: over these batches the loss does not rise with the layers' errors. "
            "Pass more batches."
        )
    assert best is not None
    return as_policy(best[1], subspaces)


def _differentiated(
    dense: nn.Module,
    trial: nn.Module,
    gated: Sequence[str],
    batches: Sequence[Any],
    sensitivity: Sensitivity,
    masks: Masks,
    forward: Callable[[nn.Module, Any], Any],
    bar: ProgressBar,
) -> tuple[float, dict[str, float]]:
    """The loss of a trial, summed over the batches, and its derivatives by the scales of the layers' errors, at 1.

    Args:
        gated: the low-rank layers whose errors are scaled. Those that no batch calls are not in the result.
    """
    device = device_of(trial)
    gates = {fqn: torch.zeros((), device=device, requires_grad=True) for fqn in gated}
    total, derivatives = 0.0, dict[str, float]()
    reached, counted = set[nn.Module](), False  # layers that any row reached; whether the masks leave any row
    with differentiable(trial, SEED), evaluating(dense), hooks() as handles, torch.set_grad_enabled(bool(gates)):
        masks.attach(handles)
        for fqn, gate in gates.items():
            hook = _without_error(dense.get_submodule(fqn), gate, reached)
            handles.append(trial.get_submodule(fqn).register_forward_hook(hook, with_kwargs=True))
        for index, batch in enumerate(batches):
            with in_batch(index):
                moved = move(batch, device)
                output = forward(trial, moved)
                with torch.no_grad():
                    target = None if callable(sensitivity) else forward(dense, moved)
                mask = masks.of_output()
                loss = distance(sensitivity, output, target, moved, mask)
            counted |= mask is None or bool(mask.any())
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss of the compressed model is {value} in batch {index} (counted from 0). Check the batch "
                    "and the loss, or run the model in a wider dtype."
                )
            if gates and not loss.requires_grad:
                raise ValueError(_INDEPENDENT)
            total += value
            if gates:
                gradients = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
                for fqn, gradient in zip(gates, gradients, strict=True):
                    if gradient is not None and not bool(gradient.isfinite()):
                        raise ValueError(
                            f"layer {fqn!r}: the gradient of the loss by its error is {float(gradient)} in batch "
                            f"{index} (counted from 0). Check the loss, or run the model in a wider dtype."
                        )
                    if gradient is not None:
                        derivatives[fqn] = derivatives.get(fqn, 0.0) - float(gradient)
            bar.update()
    if gates and not derivatives:
        raise ValueError(_INDEPENDENT)
    if gates and not (reached and counted):
        raise ValueError(NO_ROWS)
    return total, derivatives


def _without_error(dense: nn.Module, gate: Tensor, reached: set[nn.Module]) -> Callable[..., Tensor]:
    """A forward hook that scales the layer's error by 1 - ``gate``, and adds layers with rows to ``reached``."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if output.numel():
            reached.add(dense)
        return output + gate * (dense(*args, **kwargs) - output)

    return hook


def _dropped(space: LayerSubspaces, rank: int | None) -> float:
    """Twice the predicted loss of a layer at a rank."""
    assert space.loss is not None
    spectrum = space.loss.spectrum
    return 0.0 if rank is None else float(spectrum[..., rank:].sum())


def _corrections(measured: Mapping[str, float], predicted: Mapping[str, float]) -> dict[str, float]:
    """By layer, the ratio of its measured to its predicted loss, relative to that of all layers.

    Bounded: on few tokens, the measured loss of a layer may be zero or negative, but the layer must not lose all rank.
    """
    total = sum(predicted.values())
    scale = sum(measured.values()) / total if total else 0.0
    if scale <= 0:
        return {}
    ratios = {fqn: value / (predicted[fqn] * scale) for fqn, value in measured.items() if predicted[fqn]}
    return {fqn: min(max(ratio, 1 / MAX_CORRECTION), MAX_CORRECTION) for fqn, ratio in ratios.items()}

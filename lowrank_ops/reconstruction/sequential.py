"""Sequential reconstruction: each layer's factors fitted to the dense model's output from the compressed model's input.

One-shot factors ignore the errors of earlier layers. Here the layers are fitted in the order of their calls, and each
corrects earlier errors as far as its input allows, as GPTQ does for quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_arguments, check_positive
from ..calibration.call_weights import CallWeights, call_weights
from ..calibration.objectives import Sensitivity, check_sensitivity
from ..calibration.statistics import LayerStatistics, Moments, NonFiniteActivationError
from ..factors.projections import Factors
from ..files import digest
from ..layers.replace import replaceable, replacement
from ..models.experts import ExpertLinear, on_listed_experts
from ..models.layers import compiled_or_scripted, dimensions, find_layers, input_rows
from ..models.mask_sources import Mask
from ..models.masks import Masks, real_rows
from ..models.memory import size
from ..models.running import EMPTY, ProgressBar, call_model, in_layer, warn_caller, warn_of_few_rows
from .checkpoint import resume_checkpoint, run_identity, save_checkpoint
from .paired_runs import Group, PairedRuns, find_chains
from .regression import PairedSums, reconstruct_layers

TOO_FEW = "too few rows reached it"
_MEMORY = "Pass a smaller max_state_bytes, or leave the layer out with filter_fn."


@dataclass(frozen=True)
class SequentialReconstruction:
    """Settings of a sequential reconstruction, for ``compress_(..., reconstruction=...)``.

    Args:
        batches: as for :func:`lowrank_ops.calibrate`, preferably the same; held in memory, because each is run many
            times.
        sensitivity: as for :func:`lowrank_ops.calibrate`, preferably the same. One more forward and backward pass of
            the dense model gives token weights for layers with ``projection="loss"``. They apply to the regression,
            to the means that biases preserve and to ``predicted_error``. Rows of calls that the loss does not depend
            on get weight 1, and a warning names their layers. Takes 4 bytes per row and layer, 8 in a float64 model.
            None: unweighted.
        ridge: added to the variance of every input direction, relative to the mean variance. 0 is plain least squares;
            infinity keeps the dense weight and uses only the new input's subspace. None chooses a value for each layer
            by cross-validation between the even and the odd batches (between two halves if there is one batch).
        mask, unmasked_rows, forward: as for :func:`lowrank_ops.calibrate`.
        blocks: names of the containers whose children are the blocks, such as ``"encoder.layer"``; None finds them.
        checkpoint: file written after every block. If it exists, the run resumes from it and gives the same factors,
            provided that weights, batches and settings are the same, which is checked.
        max_state_bytes: bound on the sums of one group of layers that share their input: twice (2 in_features)^2
            float64 numbers, or less if the outputs are narrower. With token weights every layer has sums of its own.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> batches = [torch.randn(256, 64), torch.randn(256, 64)]
        >>> covariances = lro.calibrate(model, batches)
        >>> report = lro.compress_(model, covariances, reconstruction=lro.SequentialReconstruction(batches))
        >>> report.layers[0].reconstructed
        True
    """

    batches: Iterable[Any]
    sensitivity: Sensitivity | None = None
    ridge: float | None = None
    mask: Mask | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    blocks: str | Sequence[str] | None = None
    checkpoint: str | Path | None = None
    max_state_bytes: int = 4 << 30
    unmasked_rows: str = "count"

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        check_positive(max_state_bytes=self.max_state_bytes)
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"ridge must be None or a non-negative number; got {self.ridge!r}.")
        if self.sensitivity is not None:
            check_sensitivity(self.sensitivity)


@on_listed_experts
def reconstruct_factors(
    model: nn.Module,
    factors: Mapping[str, Factors],
    settings: SequentialReconstruction,
    *,
    statistics: Mapping[str, LayerStatistics] | None = None,
    centered: bool = True,
    progress: bool = False,
) -> dict[str, Factors]:
    """Fit factors to the outputs of the dense model, layer by layer in the order of the calls.

    The dense model and the one with the factors reconstructed so far run side by side. Layers that receive the same
    tensor (q, k, v) are fitted together, from one pass of each model through one block; the outputs of the blocks
    before it are kept in main memory, for each model those of one block. Layers outside of blocks, and models without
    any, are run from the start up to the layer in question, which gives the same result and takes longer.

    Layers keep their factors, and a warning says so, if they are convolutions with groups, are not reached by the first
    batch, receive rows in the two models that do not correspond (experts chosen by a router), or would exceed
    ``max_state_bytes``. Layers without factors stay dense.

    Args:
        model: the dense model; run in eval mode and returned to its previous state.
        factors: ``{fqn: Factors}`` from :func:`lowrank_ops.factors.factorize`; they give each layer's rank and
            projection.
        settings: batches and options.
        statistics: of a calibration with a sensitivity, for factors with ``projection="loss"``.
        centered: fit about the means and fold them into the biases, as the factors were made.
        progress: show a progress bar.

    Returns:
        ``{fqn: Factors}`` in the order of ``factors``; new ones are in the layer's dtype, with ``reconstructed`` true.

    Raises:
        NonFiniteActivationError: NaN or inf in the input of a layer, or in a gradient.
        ValueError: an invalid setting, too few rows for all layers, layers that cannot be replaced, a checkpoint of
            another run, a batch whose loss depends on no layer.
    """
    sensitivity, mask, checkpoint = settings.sensitivity, settings.mask, settings.checkpoint
    gradients = {
        fqn: layer.output_gradients for fqn, layer in (statistics or {}).items() if layer.output_gradients is not None
    }
    batches = checked_batches(model, factors, settings.batches)
    missing = [fqn for fqn, part in factors.items() if part.projection == "loss" and fqn not in gradients]
    if missing:
        raise ValueError(
            f"factors of projection='loss' need output gradients, which {', '.join(missing)} lack; pass the "
            "covariances of a calibration with a sensitivity as statistics=."
        )
    replaceable(model, factors)  # raises now for layers that could not be replaced in the end
    found, _ = find_layers(model)
    layers = {fqn: found[fqn] for fqn in factors}
    chains = find_chains(model, layers) if settings.blocks is None else chains_named(model, settings.blocks)
    identity: dict[str, Any] = {}
    done: dict[str, Factors] = {}
    if checkpoint is not None:
        own = {"centered": centered, "ridge": settings.ridge, "statistics": _digest(statistics or {}, layers)}
        identity = run_identity(layers, factors, batches, settings, **own)
        done = resume_checkpoint(Path(checkpoint), identity, layers)
    new, kept = dict(factors), dict.fromkeys(layers, "the first batch did not reach it")
    by_loss = {
        fqn: layer
        for fqn, layer in layers.items()
        if factors[fqn].projection == "loss" and fqn not in done and getattr(layer, "groups", 1) == 1
    }
    run = settings.forward or call_model
    few: list[str] = []  # layers with fewer rows than features
    weights = CallWeights()
    if sensitivity is not None and by_loss:
        weights = call_weights(
            model,
            by_loss,
            batches,
            sensitivity,
            mask=mask,
            unmasked_rows=settings.unmasked_rows,
            forward=run,
            progress=progress,
        )

    masks = Masks(model, mask, settings.unmasked_rows)
    with (
        PairedRuns(model, layers, batches, run, masks, chains, strict=settings.blocks is not None) as runs,
        ProgressBar(total=len(layers), desc="reconstructing", unit="layer", disable=not progress) as bar,
    ):
        called_once = {fqn for group in runs.groups if group.calls == 1 for fqn in group.layers}
        for fqn in layers.keys() - called_once:  # later calls depend on the outputs of earlier ones
            runs.replace(fqn, replacement(layers[fqn], new[fqn]))
        ready: dict[str, Factors] = {}
        for group, following in zip(runs.groups, [*runs.groups[1:], None], strict=False):
            runs.advance(group.position)
            if all(fqn in done for fqn in group.layers):
                result: dict[str, Factors] | str = {fqn: done[fqn] for fqn in group.layers}
            else:
                result = _reconstructed(runs, group, factors, settings, weights, gradients, centered, few)
            for fqn in group.layers:
                if isinstance(result, str):
                    kept[fqn] = result
                else:
                    new[fqn] = result[fqn]
                    del kept[fqn]
                ready[fqn] = new[fqn]
                runs.replace(fqn, replacement(layers[fqn], new[fqn]))
            bar.update(len(group.layers))
            if checkpoint is not None and (following is None or following.position != group.position):
                save_checkpoint(Path(checkpoint), identity, ready)
    if (warning := masks.finish()) is not None:
        warn_caller(warning)
    warn_of_few_rows(few, "rows in the batches of the reconstruction", "pass it")
    if layers and all(kept.get(fqn) == TOO_FEW for fqn in layers):
        raise ValueError("no layer received enough rows: the batches are empty, or the mask excludes all positions.")
    _warn_of(kept, weights.missing)
    return new


def _reconstructed(
    runs: PairedRuns,
    group: Group,
    factors: Mapping[str, Factors],
    settings: SequentialReconstruction,
    weights: CallWeights,
    gradients: Mapping[str, Moments],
    centered: bool,
    few: list[str],
) -> dict[str, Factors] | str:
    """New factors of a group, or the reason why it keeps its own; layers with few rows are added to ``few``."""
    members = {fqn: runs.layers[fqn] for fqn in group.layers}
    folds = 2 if settings.ridge is None else 1
    if any(getattr(layer, "groups", 1) > 1 for layer in members.values()):
        return "it is a convolution with groups"
    if any(isinstance(layer, ExpertLinear) for layer in members.values()):
        return "a router chooses its rows, and may choose others in the compressed model than in the dense one"
    # Layers without token weights share one sum; each layer with token weights has its own.
    unweighted = {fqn: layer for fqn, layer in members.items() if fqn not in weights}
    parts = [*([unweighted] if unweighted else []), *({fqn: members[fqn]} for fqn in members if fqn in weights)]
    if (needed := sum(PairedSums.state_bytes(part, folds) for part in parts)) > settings.max_state_bytes:
        return f"its sums would take {size(needed)}, more than max_state_bytes"
    with in_layer(group.layers[0], _MEMORY):
        sums = [PairedSums(part, folds) for part in parts]
    reason = _stream(runs, group, sums, weights)
    if reason is not None:
        return reason
    fitted: dict[str, Factors] = {}
    for pairs in sums:
        rows = sum(fold.count for fold in pairs.folds)
        sizes = {fqn: min(pairs.in_features, dimensions(layer).out_features) for fqn, layer in pairs.layers.items()}
        few.extend(f"{fqn} ({rows:,} of {features:,})" for fqn, features in sizes.items() if rows < features)
        old = {fqn: factors[fqn] for fqn in pairs.layers}
        with in_layer(next(iter(old)), _MEMORY):
            fitted |= reconstruct_layers(pairs, old, gradients, centered=centered, ridge=settings.ridge)
    return fitted


def _warn_of(kept: Mapping[str, str], unweighted: Collection[str]) -> None:
    """Warn of layers that keep their factors, by reason, and of those whose rows have no token weights."""
    if kept:
        reasons = "".join(f"\n  {fqn}: {reason}" for fqn, reason in kept.items())
        warn_caller(f"these layers are not reconstructed:{reasons}")
    if unweighted := [fqn for fqn in unweighted if fqn not in kept]:
        warn_caller(
            "output gradients do not correspond row by row to the inputs of these layers, so some or all of their rows "
            f"are unweighted: {', '.join(unweighted)}"
        )


def _stream(runs: PairedRuns, group: Group, sums: Sequence[PairedSums], call_weights: CallWeights) -> str | None:
    """Fill the sums with all batches; a reason if the rows of the two models do not correspond."""
    leader = group.layers[0]
    layer = runs.layers[leader]
    folds = sums[0].folds
    last = len(folds) - 1
    for batch, dense, compressed, masks in runs.pairs(group):
        if [x.shape for x in dense] != [z.shape for z in compressed]:
            return "its inputs in the dense and in the compressed model do not correspond row by row"
        for call, (x, z, mask) in enumerate(zip(dense, compressed, masks, strict=True)):
            x, z = (input_rows(layer, real_rows(part, mask)) for part in (x, z))
            halves = last > 0 and len(runs.batches) == 1
            for pairs in sums:
                weights = call_weights.of_call(next(iter(pairs.layers)), batch, call, len(dense), len(x))
                if halves:
                    half = len(x) // 2
                    for fold, part in enumerate((slice(half), slice(half, None))):
                        pairs.update(fold, x[part], z[part], None if weights is None else _of_mean_one(weights[part]))
                else:
                    pairs.update(batch % 2 if last else 0, x, z, weights)
    if not all(fold.count for fold in folds):
        return TOO_FEW
    for pairs in sums:
        pairs.finish()
    if not all(pairs.is_finite() for pairs in sums):
        raise NonFiniteActivationError(
            f"layer {leader!r}: its input holds NaN or inf, in the dense or in the compressed model. Check the "
            "batches, or run the model in a wider dtype."
        )
    return None


def _digest(statistics: Mapping[str, LayerStatistics], layers: Iterable[str]) -> str:
    """Of the sums and sums of squares of the layers."""
    moments = {fqn: statistics[fqn].moments() for fqn in layers if fqn in statistics}
    return digest(
        [
            (fqn, name, part.count, part.total, part.second_moment.diagonal(dim1=-2, dim2=-1))
            for fqn, found in moments.items()
            for name, part in found.items()
        ]
    )


def _of_mean_one(weights: Tensor) -> Tensor:
    """Weights rescaled to a mean of 1, because sums are divided by rows."""
    return weights / weights.mean() if bool(weights.any()) else torch.ones_like(weights)


def checked_batches(model: nn.Module, factors: Mapping[str, Factors], batches: Iterable[Any]) -> list[Any]:
    """The batches as a list.

    Raises:
        ValueError: no batches, or a model that cannot be run layer by layer.
    """
    if (reason := compiled_or_scripted(model)) is not None:
        raise ValueError(f"model cannot be reconstructed: {reason}.")
    if "" in factors:
        raise ValueError(
            "model is itself the layer to reconstruct, and has no layer before it; leave the reconstruction out."
        )
    held = list(batches)
    if not held:
        raise ValueError(EMPTY)
    return held


def chains_named(model: nn.Module, blocks: str | Sequence[str]) -> list[str]:
    """The names in ``blocks``; ValueError for one that is not a container."""
    names = [blocks] if isinstance(blocks, str) else list(blocks)
    modules = dict(model.named_modules())
    for name in names:
        if not isinstance(modules.get(name), (nn.ModuleList, nn.Sequential)):
            what = f"is a {type(modules[name]).__name__}" if name in modules else "is not there"
            known = [name for name, module in modules.items() if isinstance(module, (nn.ModuleList, nn.Sequential))]
            raise ValueError(
                f"blocks must name ModuleLists or Sequentials of the model; {name!r} {what}. "
                f"There are: {', '.join(map(repr, known)) or 'none'}."
            )
    return names

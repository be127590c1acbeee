"""The whole way from covariances to a smaller model: subspaces, ranks, factors, replacement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .calibration.objectives import Sensitivity
from .calibration.statistics import Covariances
from .config import AccuracyGuided, CompressionConfig, ExplainedVariance, RankPolicy, Ranks
from .factors.factorize import Factors, factorize
from .layers.replace import replace_, replaced, tied_layers
from .models.layers import FilterFn, find_layers
from .models.masks import Mask
from .ranks.choose import ChosenRanks, Measure, choose_ranks
from .reconstruction.sequential import refit_factors
from .report import CompressionReport
from .search.trial_cache import Journal, digest
from .subspaces.layer import LayerSubspaces, layer_subspaces


def compress_(
    model: nn.Module,
    covariances: Covariances,
    config: CompressionConfig | None = None,
    filter_fn: FilterFn | None = None,
    *,
    subspaces: Mapping[str, LayerSubspaces] | None = None,
    batches: Iterable[Any] | None = None,
    mask: Mask | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    sensitivity: Sensitivity | None = None,
    blocks: str | Sequence[str] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> CompressionReport:
    """Replace layers of ``model`` by factorised ones, in place; on an error the model is untouched.

    Args:
        model: the model that was calibrated.
        covariances: from :func:`lowrank_ops.calibrate`.
        config: ranks, projection and overrides; by default the utilized rank at 99% explained variance. After
            ``AccuracyGuided`` the report's config holds the ranks that it found.
        filter_fn: ``filter_fn(module, fqn) -> bool`` keeps a layer among those considered. None keeps all but
            layers whose weight is tied to another module, which the report lists; a filter that keeps one of
            those is an error.
        subspaces: from :func:`lowrank_ops.layer_subspaces`, to try several configurations without decomposing
            again; by default they are made here.
        batches: for ``refit="sequential"``, at best those of the calibration; ``AccuracyGuided`` tries without refit.
        mask, forward, blocks, checkpoint: of the refit, as for :func:`lowrank_ops.refit_factors`.
        sensitivity: of the refit as well: the calibration's, by which its rows then count with ``projection="loss"``.
        progress: show a progress bar.

    Returns:
        What was chosen per layer, with the predicted output error.

    Raises:
        ValueError: covariances of another model, a budget or override that cannot be met, a layer that cannot
            be replaced; the message names it.
    """
    config = config or CompressionConfig()
    if not isinstance(config, CompressionConfig):
        raise TypeError(
            f"config must be a CompressionConfig; got {type(config).__name__}. "
            "Wrap a policy: CompressionConfig(rank=ParameterBudget(0.5))."
        )
    if not isinstance(covariances, Covariances):
        raise TypeError(f"covariances must come from calibrate(model, batches); got {type(covariances).__name__}.")
    if (config.refit is None) != (batches is None):
        raise ValueError(
            "batches are for config.refit='sequential', which is None; leave them out or set it."
            if config.refit is None
            else "config.refit='sequential' runs the model: pass compress_(..., batches=...)."
        )
    layers, skipped = find_layers(model, filter_fn)
    if filter_fn is None:
        tied = {fqn: f"its weight is tied to {other!r}" for fqn, other in tied_layers(model).items() if fqn in layers}
        layers = {fqn: layer for fqn, layer in layers.items() if fqn not in tied}
        skipped = {**skipped, **tied}
    if "" in layers:
        raise ValueError("model is itself the layer to replace; use LowRankLinear.from_linear or its like.")
    missing = [fqn for fqn in covariances if fqn not in dict(model.named_modules())]
    if missing:
        raise ValueError(f"covariances name layers that model does not have: {', '.join(missing)}.")
    skipped |= {fqn: "no calibration batch reached it" for fqn in layers if fqn not in covariances}

    for fqn, space in (subspaces or {}).items():
        own = (covariances.get(fqn), covariances.sensitivities.get(fqn))
        if fqn in covariances and (space.covariance is not own[0] or space.sensitivity is not own[1]):
            raise ValueError(
                f"subspaces[{fqn!r}] was made from other covariances than those given; pass "
                "subspaces=layer_subspaces(layers, covariances) of the same calibration."
            )
    if subspaces is None or any(space.centered != config.centered for space in subspaces.values()):
        subspaces = layer_subspaces(layers, covariances, centered=config.centered)
    subspaces = {fqn: subspaces[fqn] for fqn in layers if fqn in subspaces}
    if not subspaces:
        reasons = "".join(f"\n  {fqn or '(the model)'}: {reason}" for fqn, reason in skipped.items())
        raise ValueError(
            "covariances hold none of the layers that can be replaced and that filter_fn keeps; calibrate those layers "
            f"first.{reasons}"
        )

    policy = config.rank
    measure: Measure | None = None
    if isinstance(policy, AccuracyGuided):
        evaluate, projection = policy.evaluate, config.projection

        def accuracy_at(ranks: ChosenRanks) -> float:
            training = [(module, module.training) for module in model.modules()]
            factors = _factorize(ranks, subspaces, projection, progress=False, keep_directions=True)
            with replaced(model, factors), torch.no_grad():
                try:
                    accuracy = evaluate(model)
                finally:
                    for module, flag in training:
                        module.training = flag
            try:
                accuracy = float(accuracy)
            except (TypeError, ValueError):
                accuracy = math.nan
            if not math.isfinite(accuracy):
                raise ValueError("evaluate must return the model's accuracy as a finite number, the larger the better.")
            return accuracy

        measure = accuracy_at
        if policy.journal is not None:
            measure = Journal(policy.journal, _what_trials_depend_on(model, subspaces, config)).remembering(measure)

    _decompose(policy, subspaces, progress)
    ranks = choose_ranks(policy, subspaces, config.overrides, bounds=config.bounds, measure=measure, progress=progress)
    if isinstance(policy, AccuracyGuided):  # what was found can be written to a file and used again
        config = replace(config, rank=Ranks({fqn: rank for fqn, rank in ranks.items() if rank is not None}))
    with torch.inference_mode(False):  # parameters made in inference mode could not be trained
        factors = _factorize(ranks, subspaces, config.projection, progress)
        if batches is not None:
            factors = refit_factors(
                model,
                factors,
                batches,
                sensitivities=covariances.sensitivities,
                sensitivity=sensitivity,
                centered=config.centered,
                mask=mask,
                forward=forward,
                blocks=blocks,
                checkpoint=checkpoint,
                progress=progress,
            )
    report = CompressionReport.build(model, config, subspaces, factors, skipped)
    with torch.inference_mode(False):
        replace_(model, factors)
    return report


def _what_trials_depend_on(
    model: nn.Module, subspaces: Mapping[str, LayerSubspaces], config: CompressionConfig
) -> dict[str, str]:
    """Digests of what decides the accuracy at given ranks; the user's evaluate cannot be among it."""
    statistics = {fqn: space.covariance for fqn, space in subspaces.items()}
    if config.projection == "loss":
        sensitivities = {f"gradient of {fqn}": space.sensitivity for fqn, space in subspaces.items()}
        statistics |= {name: found for name, found in sensitivities.items() if found is not None}
        weighted = {f"{name}, weighted": found.weighted for name, found in statistics.items()}
        statistics |= {name: found for name, found in weighted.items() if found is not None}
    sums = {f"{name} total": found.total for name, found in statistics.items()}
    sums |= {f"{name} squares": found.second_moment.diagonal(dim1=-2, dim2=-1) for name, found in statistics.items()}
    return {
        "model": digest({**dict(model.named_parameters()), **dict(model.named_buffers())}),
        "covariances": digest(sums),
        "projection": config.projection,
        "centered": str(config.centered),
    }


def _decompose(policy: RankPolicy, subspaces: Mapping[str, LayerSubspaces], progress: bool) -> None:
    """Find the spectra that the policy will ask for, one layer in memory at a time."""
    by_layer = isinstance(policy, AccuracyGuided) and policy.search == "layers"  # which tries ranks, without spectra
    allocation = None if by_layer else getattr(policy, "allocation", None)
    for space in tqdm(subspaces.values(), desc="decomposing", unit="layer", disable=not progress):
        if isinstance(policy, ExplainedVariance):
            space.utilized_rank(policy.threshold)
        elif allocation == "energy":
            _ = space.output.spectrum
        elif allocation == "loss" and space.loss is not None:
            _ = space.loss.subspace.spectrum
        space.release()


def _factorize(
    ranks: ChosenRanks,
    subspaces: Mapping[str, LayerSubspaces],
    projection: str,
    progress: bool,
    keep_directions: bool = False,
) -> dict[str, Factors]:
    factors = {}
    for fqn, rank in tqdm(ranks.items(), desc="factorising", unit="layer", disable=not progress):
        if rank is not None:
            space = subspaces[fqn]
            try:
                factors[fqn] = factorize(space, rank, projection).to(space.dtype)
            except ValueError as error:
                raise ValueError(f"layer {fqn!r}: {error}") from None
            space.release(directions=not keep_directions)
    return factors

"""The whole way from covariances to a smaller model: subspaces, ranks, factors, replacement."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from tqdm import tqdm

from .config import CompressionConfig
from .covariances import Covariances
from .dense_layers import FilterFn, find_layers
from .factors import factorize
from .ranks import choose_ranks
from .replacement import replace_, tied_layers
from .report import CompressionReport
from .subspaces import LayerSubspaces, layer_subspaces


def compress_(
    model: nn.Module,
    covariances: Covariances,
    config: CompressionConfig | None = None,
    filter_fn: FilterFn | None = None,
    *,
    subspaces: Mapping[str, LayerSubspaces] | None = None,
    progress: bool = False,
) -> CompressionReport:
    """Replace layers of ``model`` by factorised ones, in place; on an error the model is untouched.

    Args:
        model: the model that was calibrated.
        covariances: from :func:`lowrank_ops.calibrate`.
        config: ranks, projection and overrides; by default the utilized rank at 99% explained variance.
        filter_fn: ``filter_fn(module, fqn) -> bool`` keeps a layer among those considered. None keeps all but
            layers whose weight is tied to another module, which the report lists; a filter that keeps one of
            those is an error.
        subspaces: from :func:`lowrank_ops.layer_subspaces`, to try several configurations without decomposing
            again; by default they are made here.
        progress: show a progress bar.

    Returns:
        What was chosen per layer, with the predicted output error.

    Raises:
        ValueError: covariances of another model, a budget or override that cannot be met, a layer that cannot
            be replaced; the message names it.
    """
    config = config or CompressionConfig()
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

    if subspaces is None or any(space.centered != config.centered for space in subspaces.values()):
        subspaces = layer_subspaces(layers, covariances, centered=config.centered)
    subspaces = {fqn: subspaces[fqn] for fqn in layers if fqn in subspaces}
    if not subspaces:
        raise ValueError("covariances hold none of the layers that filter_fn keeps; calibrate those layers first.")

    ranks = choose_ranks(config.rank, subspaces, config.overrides)
    factors = {}
    for fqn, rank in tqdm(ranks.items(), desc="factorising", unit="layer", disable=not progress):
        if rank is not None:
            try:
                factors[fqn] = factorize(subspaces[fqn], rank, config.projection)
            except ValueError as error:
                raise ValueError(f"layer {fqn!r}: {error}") from None
    report = CompressionReport.build(model, config, subspaces, factors, skipped)
    replace_(model, factors)
    return report

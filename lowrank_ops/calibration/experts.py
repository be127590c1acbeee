"""Extra calibration rows for experts that receive few rows from the router."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident

from torch import nn

from ..models.experts import MIN_ROWS, ListedExperts, Pool
from ..models.running import shortened, warn_caller
from .covariances import Covariances
from .statistics import LayerStatistics


def pools_of(model: nn.Module, layers: Collection[str]) -> tuple[dict[ListedExperts, Pool], dict[str, nn.Module]]:
    """A pool for each experts module that holds some of ``layers``, and ``{name: twin}`` of those layers."""
    pools: dict[ListedExperts, Pool] = {}
    twins: dict[str, nn.Module] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, ListedExperts):
            pool = Pool(module)
            prefix = f"{fqn}." if fqn else ""
            found = {
                twin_name(name): twin
                for expert, projections in enumerate(pool.twins)
                for projection, twin in projections.items()
                if (name := f"{prefix}{expert}.{projection}") in layers
            }
            if found:
                pools[module] = pool
                twins |= found
    return pools, twins


@contextmanager
def pooling(pools: Mapping[ListedExperts, Pool]) -> Iterator[None]:
    """Inside the block, experts with few rows also run on rows of other experts."""
    for experts, pool in pools.items():
        pool.thread = get_ident()
        experts.pool = pool
    try:
        yield
    finally:
        for experts in pools:
            experts.pool = None


def with_pooled_rows(covariances: Covariances, layers: Collection[str]) -> Covariances:
    """The statistics of ``layers``; for those with fewer than ``MIN_ROWS`` rows, their twins' statistics are added."""
    found: dict[str, LayerStatistics] = {}
    filled: list[str] = []
    for fqn in layers:
        own, pooled = covariances.get(fqn), covariances.get(twin_name(fqn))
        if pooled is not None and (own is None or own.activations.count < MIN_ROWS):
            filled.append(f"{fqn} ({0 if own is None else own.activations.count})")
            own = pooled if own is None else _sum(own, pooled)
        if own is not None:
            found[fqn] = own
    if filled:
        warn_caller(
            f"the router sent fewer than {MIN_ROWS} rows to some experts, which are also calibrated on rows of other "
            f"tokens: {shortened(filled)}. Calibrate with more batches."
        )
    return Covariances(found, tuple(fqn for fqn in layers if fqn not in found), covariances.skipped)


def twin_name(fqn: str) -> str:
    """The name under which the extra rows of a layer are summed."""
    return f"{fqn} (rows of other experts)"


def _sum(own: LayerStatistics, pooled: LayerStatistics) -> LayerStatistics:
    parts = own.moments()
    for name, moments in pooled.moments().items():
        parts[name] = parts[name].plus(moments) if name in parts else moments
    counts = [part.output_gradients.count for part in (own, pooled) if part.output_gradients is not None]
    if counts:  # of the same samples
        parts["output_gradients"] = parts["output_gradients"].with_count(max(counts))
    return LayerStatistics(own.side, **parts)

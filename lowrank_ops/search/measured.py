"""measured_ranks: a budget allocated by predicted losses that trial compressions correct."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..arguments import check_positive, checked
from ..calibration.covariances import Covariances
from ..compress import considered_layers, decompose, resolved
from ..config import CompressionConfig, ParameterBudget, Ranks
from ..models.copies import filter_of_original, shared_copy
from ..models.experts import list_experts_
from ..models.layers import FilterFn
from ..models.running import ProgressBar
from ..ranks.choose import ChosenRanks, limits_of
from ..subspaces.layer import LayerSubspaces
from .search import accuracy_of

MAX_CORRECTION = 10.0  # of a predicted loss in one round, in either direction


@checked()
def measured_ranks(
    model: nn.Module,
    covariances: Covariances,
    evaluate: Callable[[nn.Module], float],
    fraction: float,
    *,
    num_evaluations: int = 40,
    rounds: int = 2,
    config: CompressionConfig | None = None,
    filter_fn: FilterFn | None = None,
    subspaces: Mapping[str, LayerSubspaces] | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Ranks:
    """Ranks for a parameter budget, allocated by loss as trial compressions measure it.

    The predicted loss of a layer ignores how other layers change its error. Layers are grouped by kind (their name
    without numbers) and depth. Each round evaluates the model at the current ranks, and once per group with that group
    left dense. The ratio of a group's measured to its predicted increase of the loss corrects the predictions of its
    layers. The ranks with the best evaluation are returned, so by ``evaluate`` they are never worse than the ranks by
    predicted loss.

    Args:
        model: as for :func:`lowrank_ops.search_ranks`, not changed.
        covariances: with output gradients, from :func:`lowrank_ops.calibrate`.
        evaluate: ``evaluate(trial) -> float`` of a copy of the model, higher is better, such as the negative loss on a
            few thousand tokens.
        fraction: of the layers' parameters, as in :class:`lowrank_ops.ParameterBudget`.
        num_evaluations: at most this many trials in all; they set the number of groups. At least 2 * ``rounds`` + 3.
        rounds: corrections, each at the ranks of the one before.
        config, filter_fn, subspaces, cache, progress: as for :func:`lowrank_ops.search_ranks`.

    Returns:
        The ranks, a policy for :func:`lowrank_ops.compress_`; layers that stay dense are not named.

    Raises:
        RuntimeError, TypeError: as for :func:`lowrank_ops.search_ranks`.
        ValueError: as for :func:`lowrank_ops.search_ranks`, a budget that cannot be met, statistics without output
            gradients.

    Example:
        >>> import torch, lowrank_ops as lro
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
        >>> x = torch.randn(256, 64)
        >>> y = model(x).detach()
        >>> covariances = lro.calibrate(model, [x], sensitivity="output")
        >>> def accuracy(m):
        ...     return -float((m(x) - y).square().mean())
        >>> ranks = lro.measured_ranks(model, covariances, accuracy, 0.5, num_evaluations=8)
        >>> report = lro.compress_(model, covariances, ranks)
    """
    check_positive(rounds=rounds)
    if num_evaluations < 2 * rounds + 3:
        raise ValueError(f"num_evaluations must be an integer of at least {2 * rounds + 3}; got {num_evaluations!r}.")
    config = replace(CompressionConfig.of(config), rank=ParameterBudget(fraction, "loss"))
    dense, filter_fn = shared_copy(model), filter_of_original(model, filter_fn)
    list_experts_(dense)
    subspaces, _ = considered_layers(dense, covariances, filter_fn, subspaces, centered=config.centered)
    config = resolved(config, subspaces)
    decompose(config.rank, subspaces, progress)
    measure = accuracy_of(dense, model, evaluate, subspaces, config, cache)
    limits = limits_of(subspaces, config.overrides, config.bounds, pivoted=config.pivoted)
    groups = _groups([fqn for fqn in subspaces if fqn not in limits.fixed], (num_evaluations - 2) // rounds - 1)
    weights = dict.fromkeys(subspaces, 1.0)
    best: tuple[float, ChosenRanks] | None = None
    with ProgressBar(total=1 + rounds * (1 + len(groups)), desc="measuring", unit="trial", disable=not progress) as bar:

        def trial(ranks: ChosenRanks) -> float:
            accuracy = measure(ranks)
            bar.set_postfix(accuracy=f"{accuracy:.4g}")
            bar.update()
            return accuracy

        for last in [*([False] * rounds), True]:
            ranks = limits.allocate(fraction, "loss", subspaces, weights)
            accuracy = trial(ranks)
            if best is None or accuracy > best[0]:
                best = accuracy, ranks
            if not last:
                caused = [trial({**ranks, **dict.fromkeys(members)}) - accuracy for members in groups]
                predicted = [sum(_dropped(subspaces[fqn], ranks[fqn]) for fqn in members) for members in groups]
                for members, correction in zip(groups, _corrections(caused, predicted), strict=True):
                    if correction is not None:
                        weights |= dict.fromkeys(members, correction)
    assert best is not None
    return Ranks({fqn: rank for fqn, rank in best[1].items() if rank is not None})


def _groups(layers: Iterable[str], limit: int) -> list[list[str]]:
    """At most ``limit`` groups of layers of one kind and of neighboring depth."""
    kinds: dict[str, list[str]] = {}
    for fqn in layers:
        kinds.setdefault(re.sub(r"\d+", "", fqn), []).append(fqn)
    if len(kinds) > limit:  # too many kinds: all layers by depth
        kinds = {"": [fqn for members in kinds.values() for fqn in members]}
    bands = Counter(dict.fromkeys(kinds, 1))
    while bands.total() < limit:
        kind = max(kinds, key=lambda kind: len(kinds[kind]) / bands[kind])
        if len(kinds[kind]) == bands[kind]:
            break
        bands[kind] += 1
    found = []
    for kind, members in kinds.items():
        size, rest = divmod(len(members), bands[kind])
        start = 0
        for band in range(bands[kind]):
            stop = start + size + (band < rest)
            found.append(members[start:stop])
            start = stop
    return found


def _dropped(space: LayerSubspaces, rank: int | None) -> float:
    """The predicted increase of the loss at a rank."""
    assert space.loss is not None
    spectrum = space.loss.spectrum
    return 0.0 if rank is None else float(spectrum[..., rank:].sum())


def _corrections(caused: Sequence[float], predicted: Sequence[float]) -> list[float | None]:
    """By group, its measured over its predicted increase, relative to all groups; None if the group is dense.

    Bounded: few tokens may show no increase for a group, which must not lose all its rank.
    """
    scale = sum(max(value, 0.0) for value in caused) / sum(predicted) if any(predicted) else 0.0
    if not scale:
        return [None] * len(caused)
    ratios = [value / (of * scale) if of else None for value, of in zip(caused, predicted, strict=True)]
    return [None if ratio is None else min(max(ratio, 1 / MAX_CORRECTION), MAX_CORRECTION) for ratio in ratios]

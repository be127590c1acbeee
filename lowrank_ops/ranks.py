"""Policies that turn subspaces into ranks. A rank of None keeps a layer dense.

A policy is a frozen dataclass of ``config`` and one function here, registered by its type.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import NamedTuple

from tqdm import tqdm

from .config import AccuracyGuided, ExplainedVariance, FlopBudget, ParameterBudget, RankPolicy, Ranks
from .subspaces import LayerSubspaces

RANK_ALIGNMENT = 8  # stored ranks are multiples of this, so that every layer can take the fast kernels

Spaces = Mapping[str, LayerSubspaces]
ChosenRanks = dict[str, int | None]
Measure = Callable[[ChosenRanks], float]


def stored_rank(rank: int) -> int:
    """The rank rounded up to what is stored; never 0, so that no kernel and no convolution meets an empty factor."""
    return max(1, -(-rank // RANK_ALIGNMENT)) * RANK_ALIGNMENT


def dense_parameters(spaces: LayerSubspaces) -> int:
    """Parameters of the layer as it is."""
    groups, in_features, out_features = spaces.dimensions
    return groups * (in_features * out_features + (out_features if spaces.bias is not None else 0))


def lowrank_parameters(spaces: LayerSubspaces, rank: int) -> int:
    """Parameters of the layer's replacement; centring gives a bias to a layer that has none."""
    groups, in_features, out_features = spaces.dimensions
    bias = out_features if spaces.bias is not None or spaces.centered else 0
    return groups * (stored_rank(rank) * (in_features + out_features) + bias)


def dense_multiplications(spaces: LayerSubspaces) -> int:
    """Multiplications of the layer as it is, over the calibration rows."""
    groups, in_features, out_features = spaces.dimensions
    return spaces.covariance.count * groups * in_features * out_features


def lowrank_multiplications(spaces: LayerSubspaces, rank: int) -> int:
    """Multiplications of the layer's replacement, over the calibration rows."""
    groups, in_features, out_features = spaces.dimensions
    return spaces.covariance.count * groups * stored_rank(rank) * (in_features + out_features)


def choose_ranks(
    policy: RankPolicy,
    spaces: Spaces,
    overrides: Mapping[str, int | None] | None = None,
    *,
    measure: Measure | None = None,
    progress: bool = False,
) -> ChosenRanks:
    """A rank for every layer, or None where it stays dense.

    Args:
        policy: one of ``config``'s.
        spaces: the layers considered.
        overrides: ``{fqn or "re:pattern": rank or None}``, which wins over the policy. An exact name wins over
            a pattern, a later pattern over an earlier one.
        measure: ``measure(ranks) -> float``, the accuracy of the model compressed to these ranks, for policies that
            try; :func:`lowrank_ops.compress_` brings its own.
        progress: show a progress bar over the trials.

    Raises:
        ValueError: a name that matches no layer, a rank that is out of range, a budget that cannot be met, an
            allocation by loss without sensitivities, a policy that tries without ``measure``.
    """
    fixed = _by_hand(overrides or {}, spaces, "overrides")
    chosen = {**_choose(policy, spaces, fixed, _Trials(measure, progress)), **fixed}
    return {fqn: chosen[fqn] for fqn in spaces}


class _Trials(NamedTuple):
    measure: Measure | None
    progress: bool


@singledispatch
def _choose(policy: object, spaces: Spaces, fixed: ChosenRanks, trials: _Trials) -> ChosenRanks:
    raise TypeError(f"rank policy {type(policy).__name__} is not known.")


@_choose.register
def _(policy: ExplainedVariance, spaces: Spaces, fixed: ChosenRanks, trials: _Trials) -> ChosenRanks:
    chosen: ChosenRanks = {}
    for fqn, space in spaces.items():
        if fqn not in fixed:
            rank = space.utilized_rank(policy.threshold)
            saves = lowrank_parameters(space, rank) < dense_parameters(space)
            chosen[fqn] = rank if saves else None
    return chosen


@_choose.register
def _(policy: Ranks, spaces: Spaces, fixed: ChosenRanks, trials: _Trials) -> ChosenRanks:
    return {**dict.fromkeys(spaces), **_by_hand(policy.ranks, spaces, "ranks")}


@_choose.register
def _(policy: ParameterBudget, spaces: Spaces, fixed: ChosenRanks, trials: _Trials) -> ChosenRanks:
    return _within(policy.fraction, policy.allocation, _PARAMETERS, spaces, fixed)


@_choose.register
def _(policy: FlopBudget, spaces: Spaces, fixed: ChosenRanks, trials: _Trials) -> ChosenRanks:
    return _within(policy.fraction, policy.allocation, _MULTIPLICATIONS, spaces, fixed)


@_choose.register
def _(policy: AccuracyGuided, spaces: Spaces, fixed: ChosenRanks, trials: _Trials) -> ChosenRanks:
    if trials.measure is None:
        raise ValueError(
            "AccuracyGuided tries compressed models; use it in compress_, or pass measure to choose_ranks."
        )
    free = {fqn: _options(space, _PARAMETERS) for fqn, space in spaces.items() if fqn not in fixed}
    most = (
        policy.evaluations
        if policy.search == "budget"
        else 1 + sum(len(options).bit_length() for options in free.values())
    )
    with tqdm(total=most, desc="searching ranks", unit="trial", disable=not trials.progress) as bar:

        def measure(ranks: ChosenRanks) -> float:
            assert trials.measure is not None
            accuracy = trials.measure({fqn: {**ranks, **fixed}[fqn] for fqn in spaces})
            bar.set_postfix(accuracy=f"{accuracy:.4g}")
            bar.update()
            return accuracy

        accepted = measure(dict.fromkeys(spaces))
        if policy.search == "budget":
            return _bisect_budget(policy, spaces, fixed, accepted - policy.max_drop, measure)
        return _bisect_layers(policy.max_drop, free, accepted, measure)


def _bisect_budget(
    policy: AccuracyGuided, spaces: Spaces, fixed: ChosenRanks, least_accuracy: float, measure: Measure
) -> ChosenRanks:
    """The smallest parameter budget found, in halves of what is left, whose ranks are accurate enough."""
    least = sum(
        _PARAMETERS.of(space, fixed[fqn]) if fqn in fixed else _options(space, _PARAMETERS)[0].cost
        for fqn, space in spaces.items()
    )
    low, high = min(1.0, least / sum(map(dense_parameters, spaces.values()))), 1.0
    best: ChosenRanks = {fqn: None for fqn in spaces if fqn not in fixed}
    for _ in range(policy.evaluations - 1):
        middle = (low + high) / 2
        ranks = _within(middle, policy.allocation, _PARAMETERS, spaces, fixed)
        if ranks == best or measure(ranks) >= least_accuracy:
            best, high = ranks, middle
        else:
            low = middle
    return best


def _bisect_layers(
    max_drop: float, free: Mapping[str, list[_Option]], dense_accuracy: float, measure: Measure
) -> ChosenRanks:
    """The smallest rank of one layer after another, with a part of the tolerance by its part of the parameters."""
    chosen: ChosenRanks = dict.fromkeys(free)
    by_size = sorted(free, key=lambda fqn: -free[fqn][-1].cost)
    seen, total = 0, sum(options[-1].cost for options in free.values())
    for fqn in by_size:
        seen += free[fqn][-1].cost
        least_accuracy = dense_accuracy - max_drop * seen / total
        low, high = 0, len(free[fqn]) - 1  # dense: what the layers before it were accepted with
        while low < high:
            middle = (low + high) // 2
            if measure({**chosen, fqn: free[fqn][middle].rank}) >= least_accuracy:
                high = middle
            else:
                low = middle + 1
        chosen[fqn] = free[fqn][high].rank
    return chosen


class _Price(NamedTuple):
    """What a budget counts."""

    unit: str
    dense: Callable[[LayerSubspaces], int]
    lowrank: Callable[[LayerSubspaces, int], int]

    def of(self, space: LayerSubspaces, rank: int | None) -> int:
        return self.dense(space) if rank is None else self.lowrank(space, rank)


_PARAMETERS = _Price("parameters", dense_parameters, lowrank_parameters)
_MULTIPLICATIONS = _Price("multiplications", dense_multiplications, lowrank_multiplications)


class _Option(NamedTuple):
    """A layer at one size."""

    rank: int | None
    cost: int


def _options(space: LayerSubspaces, price: _Price) -> list[_Option]:
    """Aligned ranks up to break-even, then dense."""
    dense = _Option(None, price.dense(space))
    options = []
    for rank in range(RANK_ALIGNMENT, min(space.dimensions[1:]) + 1, RANK_ALIGNMENT):
        option = _Option(rank, price.lowrank(space, rank))
        if option.cost >= dense.cost:
            break
        options.append(option)
    return [*options, dense]


def _within(fraction: float, allocation: str, price: _Price, spaces: Spaces, fixed: ChosenRanks) -> ChosenRanks:
    """Ranks that cost at most ``fraction`` of the dense layers."""
    budget = math.floor(fraction * sum(map(price.dense, spaces.values())))
    budget -= sum(price.of(spaces[fqn], rank) for fqn, rank in fixed.items())
    options = {fqn: _options(space, price) for fqn, space in spaces.items() if fqn not in fixed}
    least = sum(choices[0].cost for choices in options.values())
    if least > budget:
        raise ValueError(
            f"fraction={fraction} cannot be met: the smallest ranks take {least} {price.unit}, {budget} are left. "
            "Use a larger fraction, or leave layers out with filter_fn."
        )
    every = {fqn: list(range(len(choices))) for fqn, choices in options.items()}
    if allocation == "uniform":
        taken = _by_share(options, budget)
        # prefer the layer that keeps the least share of itself
        _spend(taken, every, options, budget, lambda fqn, now, then: -options[fqn][now].cost / options[fqn][-1].cost)
    else:
        worth = {fqn: _worth(fqn, spaces[fqn], choices, allocation) for fqn, choices in options.items()}

        def gain(fqn: str, now: int, then: int) -> float:
            return (worth[fqn][then] - worth[fqn][now]) / (options[fqn][then].cost - options[fqn][now].cost)

        taken = dict.fromkeys(options, 0)
        if allocation == "loss":
            _spend(
                taken,
                {fqn: _efficient(fqn, len(choices), gain) for fqn, choices in options.items()},
                options,
                budget,
                gain,
            )
        _spend(taken, every, options, budget, gain)
    return {fqn: options[fqn][index].rank for fqn, index in taken.items()}


def _worth(fqn: str, space: LayerSubspaces, options: list[_Option], allocation: str) -> list[float]:
    """What each option keeps: a share of the layer's output variance, or loss of one sample."""
    if allocation == "energy":
        return [1.0 if option.rank is None else float(space.output.explained(option.rank).mean()) for option in options]
    if space.loss is None:
        raise ValueError(
            f"allocation='loss' needs a sensitivity for every layer, and {fqn!r} has none; calibrate with "
            "sensitivity='fisher', 'output' or a loss, leave the layer out with filter_fn, or fix it in overrides."
        )
    spectrum = space.loss.subspace.spectrum
    kept = spectrum.reshape(-1, spectrum.shape[-1]).sum(0).cumsum(0).tolist()
    return [kept[-1] if option.rank is None else kept[option.rank - 1] for option in options]


def _efficient(fqn: str, options: int, gain: Callable[[str, int, int], float]) -> list[int]:
    """The options that no mixture of two others beats: from each, the next is the one with the largest gain.

    The step to dense is a large gain at a small price once the rank is near break-even; single steps would miss it.
    """
    path = [0]
    while path[-1] < options - 1:
        path.append(max(range(path[-1] + 1, options), key=lambda then: (gain(fqn, path[-1], then), then)))
    return path


def _total(taken: Mapping[str, int], options: Mapping[str, list[_Option]]) -> int:
    return sum(options[fqn][index].cost for fqn, index in taken.items())


def _by_share(options: Mapping[str, list[_Option]], budget: int) -> dict[str, int]:
    """The largest common share of its own cost for every layer that fits the budget, by bisection."""

    def at(share: float) -> dict[str, int]:
        return {
            fqn: max(0, sum(option.cost <= share * choices[-1].cost for option in choices) - 1)
            for fqn, choices in options.items()
        }

    low, high = 0.0, 1.0
    if _total(at(high), options) <= budget:
        return at(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(at(middle), options) <= budget else (low, middle)
    return at(low)


def _spend(
    taken: dict[str, int],
    stops: Mapping[str, list[int]],
    options: Mapping[str, list[_Option]],
    budget: int,
    gain: Callable[[str, int, int], float],
) -> None:
    """Raise layers from one of their stops to the next, the largest gain first, as long as it fits the budget."""

    def push(fqn: str) -> None:
        now = taken[fqn]
        then = next((stop for stop in stops[fqn] if stop > now), None)
        if then is not None:
            heapq.heappush(heap, (-gain(fqn, now, then), order[fqn], fqn, then))

    left = budget - _total(taken, options)
    heap: list[tuple[float, int, str, int]] = []
    order = {fqn: position for position, fqn in enumerate(options)}
    for fqn in options:
        push(fqn)
    while heap:
        _, _, fqn, then = heapq.heappop(heap)
        price = options[fqn][then].cost - options[fqn][taken[fqn]].cost
        if price <= left:
            left -= price
            taken[fqn] = then
            push(fqn)


def _matches(key: str, spaces: Spaces, argument: str) -> list[str]:
    if not key.startswith("re:"):
        return [key] if key in spaces else []
    try:
        return [fqn for fqn in spaces if re.fullmatch(key[3:], fqn)]
    except re.error as error:
        raise ValueError(f"{argument}: {key!r} is not a regular expression: {error}.") from None


def _by_hand(ranks: Mapping[str, int | None], spaces: Spaces, argument: str) -> ChosenRanks:
    chosen: ChosenRanks = {}
    for key, rank in sorted(ranks.items(), key=lambda item: not item[0].startswith("re:")):
        matches = _matches(key, spaces, argument)
        if not matches:
            raise ValueError(f"{argument}: {key!r} matches none of the layers considered: {', '.join(spaces)}.")
        for fqn in matches:
            largest = min(spaces[fqn].dimensions[1:])
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= largest):
                raise ValueError(f"{argument}[{key!r}] must be None or an integer in [0, {largest}]; got {rank!r}.")
            chosen[fqn] = rank
    return chosen

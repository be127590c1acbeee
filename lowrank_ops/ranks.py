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

from .config import ExplainedVariance, ParameterBudget, RankPolicy, Ranks
from .subspaces import LayerSubspaces

RANK_ALIGNMENT = 8  # stored ranks are multiples of this, so that every layer can take the fast kernels

Spaces = Mapping[str, LayerSubspaces]
ChosenRanks = dict[str, int | None]


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


def choose_ranks(policy: RankPolicy, spaces: Spaces, overrides: Mapping[str, int | None] | None = None) -> ChosenRanks:
    """A rank for every layer, or None where it stays dense.

    Args:
        policy: one of ``config``'s.
        spaces: the layers considered.
        overrides: ``{fqn or "re:pattern": rank or None}``, which wins over the policy. An exact name wins over
            a pattern, a later pattern over an earlier one.

    Raises:
        ValueError: a name that matches no layer, a rank that is out of range, a budget that cannot be met.
    """
    fixed = _by_hand(overrides or {}, spaces, "overrides")
    chosen = {**_choose(policy, spaces, fixed), **fixed}
    return {fqn: chosen[fqn] for fqn in spaces}


@singledispatch
def _choose(policy: object, spaces: Spaces, fixed: ChosenRanks) -> ChosenRanks:
    raise TypeError(f"rank policy {type(policy).__name__} is not known.")


@_choose.register
def _(policy: ExplainedVariance, spaces: Spaces, fixed: ChosenRanks) -> ChosenRanks:
    chosen: ChosenRanks = {}
    for fqn, space in spaces.items():
        if fqn not in fixed:
            rank = space.utilized_rank(policy.threshold)
            saves = lowrank_parameters(space, rank) < dense_parameters(space)
            chosen[fqn] = rank if saves else None
    return chosen


@_choose.register
def _(policy: Ranks, spaces: Spaces, fixed: ChosenRanks) -> ChosenRanks:
    return {**dict.fromkeys(spaces), **_by_hand(policy.ranks, spaces, "ranks")}


@_choose.register
def _(policy: ParameterBudget, spaces: Spaces, fixed: ChosenRanks) -> ChosenRanks:
    budget = math.floor(policy.fraction * sum(map(dense_parameters, spaces.values())))
    budget -= sum(_cost(spaces[fqn], rank) for fqn, rank in fixed.items())
    options = {fqn: _options(space) for fqn, space in spaces.items() if fqn not in fixed}
    least = sum(choices[0].parameters for choices in options.values())
    if least > budget:
        raise ValueError(
            f"fraction={policy.fraction} cannot be met: the smallest ranks take {least} parameters, {budget} are left. "
            "Use a larger fraction, or leave layers out with filter_fn."
        )
    taken = _by_share(options, budget) if policy.allocation == "uniform" else dict.fromkeys(options, 0)
    gain = _share_gain if policy.allocation == "uniform" else _energy_gain
    _spend(taken, options, spaces, budget - _total(taken, options), gain)
    return {fqn: options[fqn][index].rank for fqn, index in taken.items()}


class _Option(NamedTuple):
    """A layer at one size."""

    rank: int | None
    parameters: int


def _options(space: LayerSubspaces) -> list[_Option]:
    """Aligned ranks up to break-even, then dense."""
    dense = _Option(None, dense_parameters(space))
    options = []
    for rank in range(RANK_ALIGNMENT, min(space.dimensions[1:]) + 1, RANK_ALIGNMENT):
        option = _Option(rank, lowrank_parameters(space, rank))
        if option.parameters >= dense.parameters:
            break
        options.append(option)
    return [*options, dense]


def _cost(space: LayerSubspaces, rank: int | None) -> int:
    return dense_parameters(space) if rank is None else lowrank_parameters(space, rank)


def _total(taken: Mapping[str, int], options: Mapping[str, list[_Option]]) -> int:
    return sum(options[fqn][index].parameters for fqn, index in taken.items())


def _by_share(options: Mapping[str, list[_Option]], budget: int) -> dict[str, int]:
    """The largest common share of its own parameters for every layer that fits the budget, by bisection."""

    def at(share: float) -> dict[str, int]:
        return {
            fqn: max(0, sum(option.parameters <= share * choices[-1].parameters for option in choices) - 1)
            for fqn, choices in options.items()
        }

    low, high = 0.0, 1.0
    if _total(at(high), options) <= budget:
        return at(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(at(middle), options) <= budget else (low, middle)
    return at(low)


def _share_gain(space: LayerSubspaces, now: _Option, then: _Option) -> float:
    """Prefer the layer that keeps the least share of itself."""
    return -now.parameters / dense_parameters(space)


def _energy_gain(space: LayerSubspaces, now: _Option, then: _Option) -> float:
    """Share of the layer's output variance gained per parameter."""
    explained = [
        1.0 if option.rank is None else float(space.output.explained(option.rank).mean()) for option in (now, then)
    ]
    return (explained[1] - explained[0]) / (then.parameters - now.parameters)


def _spend(
    taken: dict[str, int],
    options: Mapping[str, list[_Option]],
    spaces: Spaces,
    budget: int,
    gain: Callable[[LayerSubspaces, _Option, _Option], float],
) -> None:
    """Raise layers one option at a time, the largest gain first, as long as an option fits."""

    def push(fqn: str) -> None:
        index = taken[fqn]
        if index + 1 < len(options[fqn]):
            now, then = options[fqn][index], options[fqn][index + 1]
            heapq.heappush(heap, (-gain(spaces[fqn], now, then), order[fqn], fqn, then.parameters - now.parameters))

    heap: list[tuple[float, int, str, int]] = []
    order = {fqn: position for position, fqn in enumerate(options)}
    for fqn in options:
        push(fqn)
    while heap:
        _, _, fqn, price = heapq.heappop(heap)
        if price <= budget:
            budget -= price
            taken[fqn] += 1
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

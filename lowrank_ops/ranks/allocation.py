"""Allocate a budget to layers: by a common share, by the largest gain per unit of cost, or by a knapsack."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..subspaces.layer import LayerSubspaces
from .costs import UNBOUNDED, Bounds, Option, Price, options_of, worth_of_ranks
from .eight_bit import Rounding, byte_options, can_be_eight_bit, dense_bytes, lowrank_bytes, rounding_of

MIN_STEPS = 2000  # of the knapsack's budget
STEPS_PER_LAYER = 50


def allocate(
    fraction: float,
    allocation: str,
    price: Price,
    spaces: Mapping[str, LayerSubspaces],
    fixed: Mapping[str, int | None],
    bounds: Mapping[str, Bounds],
    *,
    exactly: bool = False,
    weights: Mapping[str, float] | None = None,
) -> dict[str, int | None]:
    """Ranks that cost at most ``fraction`` of the dense layers.

    Args:
        fraction: of the cost of all ``spaces`` left dense.
        allocation: ``"uniform"``, ``"variance"`` or ``"loss"``, as in :class:`lowrank_ops.ParameterBudget`.
        price: the unit of cost.
        spaces: the layers considered.
        fixed: ranks of layers that are not chosen here; they count in the budget.
        bounds: of the ranks of single layers.
        exactly: solve a multiple-choice knapsack instead of taking the largest gains first.
        weights: factors of the layers' gains, for allocations by gain; by default 1.

    Raises:
        ValueError: the cheapest choice exceeds the budget, or an allocation by loss without output gradients.
    """
    options = {
        fqn: options_of(fqn, space, price, bounds.get(fqn, UNBOUNDED))
        for fqn, space in spaces.items()
        if fqn not in fixed
    }
    budget = _budget(fraction, price, spaces, fixed, options)
    worth = None
    if allocation != "uniform":
        worth = {
            fqn: [(weights or {}).get(fqn, 1.0) * value for value in _worth(fqn, spaces[fqn], choices, allocation)]
            for fqn, choices in options.items()
        }
    taken = _taken(options, worth, budget, hull=allocation == "loss", exactly=exactly)
    return {fqn: options[fqn][index].rank for fqn, index in taken.items()}


def allocate_bytes(
    fraction: float,
    allocation: str,
    form: str,
    spaces: Mapping[str, LayerSubspaces],
    fixed: Mapping[str, int | None],
    bounds: Mapping[str, Bounds],
    *,
    pivoted: bool = False,
) -> dict[str, tuple[Option, Rounding | None]]:
    """Ranks and formats that take at most ``fraction`` of the dense layers' bytes, and what rounding costs.

    Args:
        form: of 8-bit factors and weights, ``"int8"`` or ``"fp8"``. Layers in ``fixed``, convolutions and layers whose
            output was streamed keep their dtype.
        fraction, allocation, spaces, fixed, bounds: as for :func:`allocate`.
        pivoted: linear layers are pivoted where that is smaller.

    Raises:
        ValueError: as for :func:`allocate`.
    """
    price = Price(
        "bytes",
        lambda fqn, space: dense_bytes(space),
        lambda fqn, space, rank: lowrank_bytes(space, rank, pivoted=pivoted),
        pivoted,
    )
    options: dict[str, list[Option]] = {}
    worth: dict[str, list[float]] = {}
    roundings: dict[str, Rounding | None] = {}
    for fqn, space in spaces.items():
        if fqn in fixed:
            continue
        if allocation == "loss":
            _check_gradients(fqn, space)
        known = can_be_eight_bit(space)
        held = space.held_bytes() > 0
        roundings[fqn] = rounding_of(space, form, by_loss=allocation == "loss", pivoted=pivoted) if known else None
        pairs = byte_options(space, form, bounds.get(fqn, UNBOUNDED), roundings[fqn], allocation, pivoted=pivoted)
        space.release(directions=not held)  # compress_ bounds what is held
        if not pairs:
            raise ValueError(f"bounds leave no rank for {fqn!r} that saves bytes; widen them.")
        options[fqn], worth[fqn] = [option for option, _ in pairs], [value for _, value in pairs]
    budget = _budget(fraction, price, spaces, fixed, options)
    taken = _taken(options, None if allocation == "uniform" else worth, budget, hull=True)
    return {fqn: (options[fqn][index], roundings[fqn]) for fqn, index in taken.items()}


def _budget(
    fraction: float,
    price: Price,
    spaces: Mapping[str, LayerSubspaces],
    fixed: Mapping[str, int | None],
    options: Mapping[str, list[Option]],
) -> int:
    """What the layers that are not fixed may cost."""
    total = math.floor(fraction * sum(price.dense(fqn, space) for fqn, space in spaces.items()))
    by_hand = sum(price.of(fqn, spaces[fqn], rank) for fqn, rank in fixed.items())
    budget = total - by_hand
    minimum = sum(choices[0].cost for choices in options.values())
    if minimum > budget:
        raise ValueError(
            f"fraction={fraction} cannot be met: the smallest ranks take {minimum} {price.unit}, but only {budget} are "
            f"available{f' (overrides take {by_hand} of {total})' if fixed else ''}. "
            "Use a larger fraction, lower the bounds if there are any, or leave layers out with filter_fn."
        )
    return budget


def _taken(
    options: Mapping[str, list[Option]],
    worth: Mapping[str, list[float]] | None,
    budget: int,
    *,
    hull: bool,
    exactly: bool = False,
) -> dict[str, int]:
    """The index of each layer's option; without ``worth`` all layers keep about the same share of their cost."""
    every = {fqn: list(range(len(choices))) for fqn, choices in options.items()}
    if worth is None:
        taken = _by_share(options, budget)
        # the layer that keeps the smallest share of itself first
        _spend(taken, every, options, budget, lambda fqn, now, then: -options[fqn][now].cost / options[fqn][-1].cost)
    else:

        def gain(fqn: str, now: int, then: int) -> float:
            return (worth[fqn][then] - worth[fqn][now]) / (options[fqn][then].cost - options[fqn][now].cost)

        taken = dict.fromkeys(options, 0)
        if exactly:
            costs = [[option.cost for option in choices] for choices in options.values()]
            taken = dict(zip(options, knapsack(costs, list(worth.values()), budget), strict=True))
        elif hull:
            _spend(
                taken,
                {fqn: _upper_hull(fqn, len(choices), gain) for fqn, choices in options.items()},
                options,
                budget,
                gain,
            )
        _spend(taken, every, options, budget, gain)
    return taken


def _worth(fqn: str, space: LayerSubspaces, options: list[Option], allocation: str) -> list[float]:
    """The value of each option: the share of the layer's output variance that it keeps, or the loss that it saves."""
    if allocation == "loss":
        _check_gradients(fqn, space)
    kept = worth_of_ranks(space, allocation)
    return [kept[-1 if option.rank is None else option.rank] for option in options]


def _check_gradients(fqn: str, space: LayerSubspaces) -> None:
    if space.loss is None:
        raise ValueError(
            f"allocation='loss' needs output gradients for every layer, and {fqn!r} has none; calibrate with "
            "sensitivity='fisher', 'output' or a loss, leave the layer out with filter_fn, or set it in overrides."
        )


def _upper_hull(fqn: str, options: int, gain: Callable[[str, int, int], float]) -> list[int]:
    """The upper convex hull of the options: from each, the next is the one with the largest gain per cost.

    The step to dense is a large gain at a small cost once the rank is near break-even; single steps would miss it.
    """
    path = [0]
    while path[-1] < options - 1:
        path.append(max(range(path[-1] + 1, options), key=lambda then: (gain(fqn, path[-1], then), then)))
    return path


def _total(taken: Mapping[str, int], options: Mapping[str, list[Option]]) -> int:
    return sum(options[fqn][index].cost for fqn, index in taken.items())


def _by_share(options: Mapping[str, list[Option]], budget: int) -> dict[str, int]:
    """The largest common share of its own cost for every layer that fits the budget, by bisection."""

    costs = {fqn: sorted(option.cost for option in choices) for fqn, choices in options.items()}

    def at(share: float) -> dict[str, int]:
        return {fqn: max(0, bisect_right(costs[fqn], share * choices[-1].cost) - 1) for fqn, choices in options.items()}

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
    options: Mapping[str, list[Option]],
    budget: int,
    gain: Callable[[str, int, int], float],
) -> None:
    """Raise layers from one of their stops to the next, the largest gain first, while the budget allows it."""

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
        cost = options[fqn][then].cost - options[fqn][taken[fqn]].cost
        if cost <= left:
            left -= cost
            taken[fqn] = then
            push(fqn)


def knapsack(costs: Sequence[Sequence[int]], worths: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One option of every layer, with the largest sum of worths whose costs are within ``budget``.

    Dynamic programming over the budget in n equal steps, each layer's cost above its minimum rounded up to whole
    steps: the budget is never exceeded, and no choice that costs n_layers steps less is worth more. n is at least
    2,000 and at least 50 per layer.

    Args:
        costs: of each layer's options, the first being the minimum.
        worths: of the same options.
        budget: at least the sum of the minimum costs.

    Returns:
        The index of the option taken for each layer.
    """
    slack = budget - sum(options[0] for options in costs)
    steps = max(MIN_STEPS, STEPS_PER_LAYER * len(costs))
    step = max(1, -(-slack // steps))
    capacity = slack // step
    best = np.zeros(capacity + 1)  # of the layers so far, by the steps they may use
    taken = np.zeros((len(costs), capacity + 1), dtype=np.int32)
    for layer, (options, values) in enumerate(zip(costs, worths, strict=True)):
        found = np.full(capacity + 1, -np.inf)
        for index, (cost, value) in enumerate(zip(options, values, strict=True)):
            start = -(-(cost - options[0]) // step)
            if start > capacity:
                continue
            candidate = best[: capacity + 1 - start] + value
            better = candidate > found[start:]
            found[start:][better] = candidate[better]
            taken[layer, start:][better] = index
        best = found
    chosen = [0] * len(costs)
    left = capacity
    for layer in reversed(range(len(costs))):
        index = int(taken[layer, left])
        chosen[layer] = index
        left -= -(-(costs[layer][index] - costs[layer][0]) // step)
    return chosen

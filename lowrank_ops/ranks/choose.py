"""Policies that turn subspaces into ranks. A rank of None keeps a layer dense.

A policy is a frozen dataclass of ``config`` and one function here, registered by its type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import NamedTuple

from tqdm import tqdm

from ..config import (
    AccuracyGuided,
    ExplainedVariance,
    FlopBudget,
    LatencyBudget,
    ParameterBudget,
    RankPolicy,
    Ranks,
    check_bound,
)
from ..subspaces.layer import LayerSubspaces
from .allocation import within
from .costs import (
    MULTIPLICATIONS,
    PARAMETERS,
    UNBOUNDED,
    Bounds,
    Option,
    dense_parameters,
    lowrank_parameters,
    nanoseconds,
    options_of,
)

Spaces = Mapping[str, LayerSubspaces]
ChosenRanks = dict[str, int | None]
Measure = Callable[[ChosenRanks], float]


def choose_ranks(
    policy: RankPolicy,
    spaces: Spaces,
    overrides: Mapping[str, int | None] | None = None,
    *,
    bounds: Mapping[str, tuple[int, int | None]] | None = None,
    measure: Measure | None = None,
    progress: bool = False,
) -> ChosenRanks:
    """A rank for every layer, or None where it stays dense.

    Args:
        policy: one of ``config``'s.
        spaces: the layers considered.
        overrides: ``{fqn or "re:pattern": rank or None}``, which wins over the policy. An exact name wins over
            a pattern, a later pattern over an earlier one.
        bounds: ``{fqn or "re:pattern": (least, most)}``, as in :class:`lowrank_ops.CompressionConfig`.
        measure: ``measure(ranks) -> float``, the accuracy of the model compressed to these ranks, for policies that
            try; :func:`lowrank_ops.compress_` brings its own.
        progress: show a progress bar over the trials.

    Raises:
        ValueError: a name that matches no layer, a rank that is out of range, bounds that leave a layer no rank, a
            budget that cannot be met, an allocation by loss without sensitivities, a policy that tries without
            ``measure``.
    """
    limits = _Limits(_by_hand(overrides or {}, spaces, "overrides"), _bounds(bounds or {}, spaces))
    chosen = {**_choose(policy, spaces, limits, _Trials(measure, progress)), **limits.fixed}
    return {fqn: chosen[fqn] for fqn in spaces}


class _Limits(NamedTuple):
    """What a policy has no say in."""

    fixed: ChosenRanks
    bounds: Mapping[str, Bounds]

    def options(self, fqn: str, space: LayerSubspaces) -> list[Option]:
        """What a layer may be, by rising numbers of parameters."""
        return options_of(fqn, space, PARAMETERS, self.bounds.get(fqn, UNBOUNDED))


class _Trials(NamedTuple):
    measure: Measure | None
    progress: bool


@singledispatch
def _choose(policy: object, spaces: Spaces, limits: _Limits, trials: _Trials) -> ChosenRanks:
    raise TypeError(f"rank policy {type(policy).__name__} is not known.")


@_choose.register
def _(policy: ExplainedVariance, spaces: Spaces, limits: _Limits, trials: _Trials) -> ChosenRanks:
    chosen: ChosenRanks = {}
    for fqn, space in spaces.items():
        if fqn in limits.fixed:
            continue
        least, most = limits.bounds.get(fqn, UNBOUNDED)
        rank = max(space.utilized_rank(policy.threshold), least)
        rank = rank if most is None else min(rank, most)
        saves = lowrank_parameters(space, rank) < dense_parameters(space)
        chosen[fqn] = rank if saves else limits.options(fqn, space)[-1].rank
    return chosen


@_choose.register
def _(policy: Ranks, spaces: Spaces, limits: _Limits, trials: _Trials) -> ChosenRanks:
    return {**dict.fromkeys(spaces), **_by_hand(policy.ranks, spaces, "ranks")}


@_choose.register
def _(policy: ParameterBudget, spaces: Spaces, limits: _Limits, trials: _Trials) -> ChosenRanks:
    return within(policy.fraction, policy.allocation, PARAMETERS, spaces, *limits)


@_choose.register
def _(policy: FlopBudget, spaces: Spaces, limits: _Limits, trials: _Trials) -> ChosenRanks:
    return within(policy.fraction, policy.allocation, MULTIPLICATIONS, spaces, *limits)


@_choose.register
def _(policy: LatencyBudget, spaces: Spaces, limits: _Limits, trials: _Trials) -> ChosenRanks:
    return within(policy.fraction, policy.allocation, nanoseconds(policy.latencies), spaces, *limits, exactly=True)


@_choose.register
def _(policy: AccuracyGuided, spaces: Spaces, limits: _Limits, trials: _Trials) -> ChosenRanks:
    if trials.measure is None:
        raise ValueError(
            "AccuracyGuided tries compressed models; use it in compress_, or pass measure to choose_ranks."
        )
    free = {fqn: limits.options(fqn, space) for fqn, space in spaces.items() if fqn not in limits.fixed}
    most = (
        policy.evaluations
        if policy.search == "budget"
        else 1 + sum(len(options).bit_length() for options in free.values())
    )
    with tqdm(total=most, desc="searching ranks", unit="trial", disable=not trials.progress) as bar:
        known: dict[tuple[int | None, ...], float] = {}  # two budgets may come to the same ranks

        def measure(ranks: ChosenRanks) -> float:
            assert trials.measure is not None
            whole = {fqn: {**ranks, **limits.fixed}[fqn] for fqn in spaces}
            key = tuple(whole.values())
            accuracy = known[key] = known[key] if key in known else trials.measure(whole)
            bar.set_postfix(accuracy=f"{accuracy:.4g}")
            bar.update()
            return accuracy

        accepted = measure(dict.fromkeys(spaces))
        if policy.search == "budget":
            return _bisect_budget(policy, spaces, limits, free, accepted - policy.max_drop, measure)
        return _bisect_layers(policy.max_drop, free, accepted, measure)


def _bisect_budget(
    policy: AccuracyGuided,
    spaces: Spaces,
    limits: _Limits,
    free: Mapping[str, list[Option]],
    least_accuracy: float,
    measure: Measure,
) -> ChosenRanks:
    """The smallest parameter budget found, in halves of what is left, whose ranks are accurate enough."""
    least = sum(
        free[fqn][0].cost if fqn in free else PARAMETERS.of(fqn, space, limits.fixed[fqn])
        for fqn, space in spaces.items()
    )
    low, high = min(1.0, least / sum(map(dense_parameters, spaces.values()))), 1.0
    best: ChosenRanks = {fqn: options[-1].rank for fqn, options in free.items()}
    for _ in range(policy.evaluations - 1):
        middle = (low + high) / 2
        ranks = within(middle, policy.allocation, PARAMETERS, spaces, *limits)
        if ranks == best or measure(ranks) >= least_accuracy:
            best, high = ranks, middle
        else:
            low = middle
    return best


def _bisect_layers(
    max_drop: float, free: Mapping[str, list[Option]], dense_accuracy: float, measure: Measure
) -> ChosenRanks:
    """The smallest rank of one layer after another, with a part of the tolerance by its part of the parameters."""
    chosen: ChosenRanks = {fqn: options[-1].rank for fqn, options in free.items()}
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


def _bounds(bounds: Mapping[str, tuple[int, int | None]], spaces: Spaces) -> dict[str, Bounds]:
    """By layer; an exact name wins over a pattern, a later pattern over an earlier one."""
    found: dict[str, Bounds] = {}
    for key, pair in sorted(bounds.items(), key=lambda item: not item[0].startswith("re:")):
        found |= dict.fromkeys(_named(key, spaces, "bounds"), Bounds(*check_bound(key, pair)))
    return found


def _named(key: str, spaces: Spaces, argument: str) -> list[str]:
    matches = _matches(key, spaces, argument)
    if not matches:
        raise ValueError(f"{argument}: {key!r} matches none of the layers considered: {', '.join(spaces)}.")
    return matches


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
        for fqn in _named(key, spaces, argument):
            largest = min(spaces[fqn].dimensions[1:])
            if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= largest):
                raise ValueError(f"{argument}[{key!r}] must be None or an integer in [0, {largest}]; got {rank!r}.")
            chosen[fqn] = rank
    return chosen

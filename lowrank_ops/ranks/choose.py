"""Rank policies: from subspaces to a rank for every layer. A rank of None keeps a layer dense.

A policy is a frozen dataclass of ``policies`` and one function here, registered by its type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import NamedTuple

from ..config import check_bound
from ..models.running import shortened
from ..policies import (
    ByteBudget,
    ExplainedVariance,
    FlopBudget,
    LatencyBudget,
    ParameterBudget,
    RankPolicy,
    Ranks,
    UniformRank,
)
from ..subspaces.channels import ChannelSubspaces
from ..subspaces.layer import LayerSubspaces
from .allocation import allocate, allocate_bytes
from .costs import (
    PLAIN,
    UNBOUNDED,
    Bounds,
    Formats,
    Option,
    dense_parameters,
    in_macs,
    in_parameters,
    lowrank_parameters,
    nanoseconds,
    options_of,
)

Spaces = Mapping[str, LayerSubspaces]
ChosenRanks = dict[str, int | None]


class Rounded(NamedTuple):
    """The formats of a layer's factors or dense weight, and the predicted increases of loss and output error."""

    formats: Formats = PLAIN
    loss: float = 0.0
    error: float = 0.0


def choose_ranks(
    policy: RankPolicy,
    spaces: Spaces,
    overrides: Mapping[str, int | None] | None = None,
    *,
    bounds: Mapping[str, tuple[int, int | None]] | None = None,
    pivoted: bool = False,
) -> ChosenRanks:
    """A rank for every layer, or None if it stays dense.

    Args:
        policy: a rank policy, with its allocation set.
        spaces: the layers considered.
        overrides: ``{fqn or "re:pattern": rank or None}``, which takes precedence over the policy. An exact name takes
            precedence over a pattern, a later pattern over an earlier one.
        bounds: ``{fqn or "re:pattern": (min, max)}``, as in :class:`lowrank_ops.CompressionConfig`.
        pivoted: count parameters and MACs of pivoted layers, as in :class:`lowrank_ops.CompressionConfig`.

    Raises:
        ValueError: a name that matches no layer, a rank out of range, bounds that leave a layer no rank, a budget that
            cannot be met, an allocation by loss without output gradients.
    """
    return choose_sizes(policy, spaces, overrides, bounds=bounds, pivoted=pivoted)[0]


def choose_sizes(
    policy: RankPolicy,
    spaces: Spaces,
    overrides: Mapping[str, int | None] | None = None,
    *,
    bounds: Mapping[str, tuple[int, int | None]] | None = None,
    pivoted: bool = False,
    weights: Mapping[str, float] | None = None,
) -> tuple[ChosenRanks, dict[str, Rounded]]:
    """The ranks of :func:`choose_ranks`, and the formats of the layers with 8-bit factors or weights.

    ``weights`` are factors of the layers' gains, for a :class:`ParameterBudget`; by default 1.
    """
    limits = limits_of(spaces, overrides, bounds, pivoted=pivoted)._replace(weights=weights)
    rounded: dict[str, Rounded] = {}
    if isinstance(policy, ByteBudget):
        taken = allocate_bytes(
            policy.fraction,
            _set(policy.allocation),
            policy.form,
            spaces,
            limits.fixed,
            limits.bounds,
            pivoted=pivoted,
        )
        chosen: ChosenRanks = {fqn: option.rank for fqn, (option, _) in taken.items()}
        for fqn, (option, rounding) in taken.items():
            if rounding is not None and option.formats != PLAIN:
                size = option.rank, option.formats
                rounded[fqn] = Rounded(option.formats, rounding.loss(*size), rounding.error(*size))
    else:
        chosen = _choose(policy, spaces, limits)
    chosen = {**chosen, **limits.fixed}
    return {fqn: chosen[fqn] for fqn in spaces}, rounded


class Limits(NamedTuple):
    """Fixed ranks, bounds on the ranks that a policy chooses, whether layers are pivoted, and weights."""

    fixed: ChosenRanks
    bounds: Mapping[str, Bounds]
    pivoted: bool = False
    weights: Mapping[str, float] | None = None  # of the gains in a parameter budget

    def options(self, fqn: str, space: LayerSubspaces) -> list[Option]:
        """The sizes that a layer may have, in ascending order of parameters."""
        return options_of(fqn, space, in_parameters(self.pivoted), self.bounds.get(fqn, UNBOUNDED))

    def allocate(self, fraction: float, allocation: str, spaces: Spaces) -> ChosenRanks:
        """A rank for every layer, within a share of the layers' parameters."""
        price = in_parameters(self.pivoted)
        found = allocate(fraction, allocation, price, spaces, self.fixed, self.bounds, weights=self.weights)
        return {fqn: {**found, **self.fixed}[fqn] for fqn in spaces}


def limits_of(
    spaces: Spaces,
    overrides: Mapping[str, int | None] | None,
    bounds: Mapping[str, tuple[int, int | None]] | None,
    *,
    pivoted: bool = False,
) -> Limits:
    """Overrides and bounds by layer; arguments and errors as for :func:`choose_ranks`."""
    return Limits(_by_hand(overrides or {}, spaces, "overrides"), _bounds(bounds or {}, spaces), pivoted)


@singledispatch
def _choose(policy: object, spaces: Spaces, limits: Limits) -> ChosenRanks:
    raise TypeError(f"rank policy {type(policy).__name__} is not known.")


@_choose.register
def _(policy: ExplainedVariance, spaces: Spaces, limits: Limits) -> ChosenRanks:
    return _layer_by_layer(lambda space: space.utilized_rank(policy.threshold), spaces, limits)


@_choose.register
def _(policy: UniformRank, spaces: Spaces, limits: Limits) -> ChosenRanks:
    return _layer_by_layer(lambda space: policy.rank, spaces, limits)


def _layer_by_layer(rank_of: Callable[[LayerSubspaces], int], spaces: Spaces, limits: Limits) -> ChosenRanks:
    """The rank of each layer within its bounds; where it saves no parameters, the largest size allowed."""
    chosen: ChosenRanks = {}
    for fqn, space in spaces.items():
        if fqn in limits.fixed:
            continue
        low, high = limits.bounds.get(fqn, UNBOUNDED)
        rank = max(rank_of(space), low)
        rank = rank if high is None else min(rank, high)
        fits = rank <= space.max_rank
        saves = fits and lowrank_parameters(space, rank, pivoted=limits.pivoted) < dense_parameters(space)
        chosen[fqn] = rank if saves else limits.options(fqn, space)[-1].rank
    return chosen


@_choose.register
def _(policy: Ranks, spaces: Spaces, limits: Limits) -> ChosenRanks:
    mlps = {fqn: space for fqn, space in spaces.items() if isinstance(space, ChannelSubspaces)}
    others = {fqn: space for fqn, space in spaces.items() if fqn not in mlps}
    by_hand = {**_by_hand(policy.ranks, others, "ranks"), **_by_hand(policy.channels, mlps, "channels")}
    return {**dict.fromkeys(spaces), **by_hand}


def as_policy(ranks: Mapping[str, int | None], spaces: Spaces) -> Ranks:
    """The policy that chooses these ranks and numbers of channels."""
    kept = {fqn: rank for fqn, rank in ranks.items() if rank is not None}
    channels = {fqn: kept.pop(fqn) for fqn in list(kept) if isinstance(spaces[fqn], ChannelSubspaces)}
    return Ranks(kept, channels)


@_choose.register
def _(policy: ParameterBudget, spaces: Spaces, limits: Limits) -> ChosenRanks:
    return limits.allocate(policy.fraction, _set(policy.allocation), spaces)


@_choose.register
def _(policy: FlopBudget, spaces: Spaces, limits: Limits) -> ChosenRanks:
    price = in_macs(limits.pivoted)
    return allocate(policy.fraction, _set(policy.allocation), price, spaces, limits.fixed, limits.bounds)


@_choose.register
def _(policy: LatencyBudget, spaces: Spaces, limits: Limits) -> ChosenRanks:
    price = nanoseconds(policy.latencies)
    allocation = _set(policy.allocation)
    return allocate(policy.fraction, allocation, price, spaces, limits.fixed, limits.bounds, exactly=True)


def _set(allocation: str | None) -> str:
    if allocation is None:
        raise ValueError(
            "allocation must be set for choose_ranks: 'uniform', 'variance' or 'loss'; compress_ fills in the default."
        )
    return allocation


def _bounds(bounds: Mapping[str, tuple[int, int | None]], spaces: Spaces) -> dict[str, Bounds]:
    """By layer; an exact name takes precedence over a pattern, a later pattern over an earlier one."""
    found: dict[str, Bounds] = {}
    for key, pair in sorted(bounds.items(), key=lambda item: not item[0].startswith("re:")):
        found |= dict.fromkeys(_named(key, spaces, "bounds"), Bounds(*check_bound(key, pair)))
    return found


def _named(key: str, spaces: Spaces, argument: str) -> list[str]:
    matches = _matches(key, spaces, argument)
    if not matches:
        for fqn, space in spaces.items():
            if isinstance(space, ChannelSubspaces) and _matches(key, space.producers, argument):
                raise ValueError(
                    f"{argument}: {key!r} names a layer of an MLP whose channels are dropped; name {fqn!r} and a "
                    "number of channels."
                )
        raise ValueError(f"{argument}: {key!r} matches none of the layers considered: {shortened(list(spaces))}.")
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
            least, largest = int(isinstance(spaces[fqn], ChannelSubspaces)), spaces[fqn].max_rank
            whole = isinstance(rank, int) and not isinstance(rank, bool)
            if rank is not None and not (whole and least <= rank <= largest):
                raise ValueError(
                    f"{argument}[{key!r}] must be None or an integer in [{least}, {largest}]; got {rank!r}."
                )
            chosen[fqn] = rank
    return chosen

"""Groups of layers that receive the same tensor, such as q, k and v, and ranks with which whole groups are low-rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..config import CompressionConfig
from ..ops.grouped import MAX_MEMBERS
from ..policies import Ranks
from .choose import ChosenRanks, Rounded, Spaces, choose_sizes, limits_of
from .costs import UNBOUNDED

Groups = tuple[tuple[str, ...], ...]


def groups_of(spaces: Spaces, names: Sequence[str]) -> Groups:
    """The linear layers of one parent module that share their input statistics, in groups of two or three.

    Args:
        spaces: of the layers considered.
        names: of those that may be in a group.
    """
    found: dict[tuple[object, ...], list[str]] = {}
    for fqn in names:
        space = spaces[fqn]
        if space.is_linear and space.statistics.side == "input":
            parent = fqn.rpartition(".")[0]
            key = parent, id(space.statistics.activations), space.dtype, space.layer_device
            found.setdefault(key, []).append(fqn)
    parts = (
        tuple(members[first : first + MAX_MEMBERS])
        for members in found.values()
        for first in range(0, len(members), MAX_MEMBERS)
    )
    return tuple(part for part in parts if len(part) > 1)


def choose_grouped_sizes(
    config: CompressionConfig, spaces: Spaces, weights: Mapping[str, float] | None = None
) -> tuple[ChosenRanks, dict[str, Rounded], Groups]:
    """Sizes by the policy of ``config``, and the groups that are low-rank as a whole; none unless ``config.group``.

    A policy may leave some members of a group dense and not the others: it then chooses again with those bounded to
    ranks that save parameters. Layers that are dense by hand, or at every rank, are in no group. ``weights`` as for
    :func:`choose_sizes`.

    Raises:
        ValueError: as for :func:`choose_sizes`.
    """
    bounds = dict(config.bounds)
    limits = limits_of(spaces, config.overrides, config.bounds, pivoted=config.pivoted)
    by_hand = isinstance(config.rank, Ranks)
    able = {
        fqn: fqn not in limits.fixed and not by_hand and limits.options(fqn, space)[0].rank is not None
        for fqn, space in spaces.items()
        if config.group
    }
    while True:
        ranks, rounded = choose_sizes(
            config.rank, spaces, config.overrides, bounds=bounds, pivoted=config.pivoted, weights=weights
        )
        if not config.group:
            return ranks, rounded, ()
        groups = groups_of(spaces, [fqn for fqn in spaces if able[fqn] or ranks[fqn] is not None])
        mixed = [
            fqn
            for group in groups
            if any(ranks[fqn] is not None for fqn in group)
            for fqn in group
            if ranks[fqn] is None
        ]
        if not mixed:
            return ranks, rounded, tuple(group for group in groups if ranks[group[0]] is not None)
        for fqn in mixed:
            bounds[fqn] = limits.bounds.get(fqn, UNBOUNDED).min, spaces[fqn].max_rank

"""What a layer costs at a rank: parameters, multiplications, time; and the sizes that a budget chooses from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..config import LayerLatencies
from ..subspaces.layer import LayerSubspaces

RANK_ALIGNMENT = 8  # stored ranks are multiples of this, so that every layer can take the fast kernels


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


class Price(NamedTuple):
    """What a budget counts, in whole units."""

    unit: str
    dense: Callable[[str, LayerSubspaces], int]  # takes the layer's name and spaces
    lowrank: Callable[[str, LayerSubspaces, int], int]

    def of(self, fqn: str, space: LayerSubspaces, rank: int | None) -> int:
        """The price of a layer at a rank, or dense."""
        return self.dense(fqn, space) if rank is None else self.lowrank(fqn, space, rank)


PARAMETERS = Price(
    "parameters",
    lambda fqn, space: dense_parameters(space),
    lambda fqn, space, rank: lowrank_parameters(space, rank),
)
MULTIPLICATIONS = Price(
    "multiplications",
    lambda fqn, space: dense_multiplications(space),
    lambda fqn, space, rank: lowrank_multiplications(space, rank),
)


def nanoseconds(latencies: LayerLatencies) -> Price:
    """The price in time, as measured."""

    def at(fqn: str, rank: int | None) -> int:
        if fqn not in latencies.layers:
            raise ValueError(
                f"latencies: {fqn!r} was not timed; call measure_latency with this model and a batch that reaches the "
                "layer, or leave it out with filter_fn."
            )
        return round(latencies.seconds(fqn, rank) * 1e9)

    return Price("nanoseconds", lambda fqn, space: at(fqn, None), lambda fqn, space, rank: at(fqn, stored_rank(rank)))


class Bounds(NamedTuple):
    """The ranks that a layer may have."""

    least: int = 0
    most: int | None = None  # None: no bound, and the layer may stay dense


UNBOUNDED = Bounds()


class Option(NamedTuple):
    """A layer at one size."""

    rank: int | None
    cost: int


def options_of(fqn: str, space: LayerSubspaces, price: Price, bounds: Bounds = UNBOUNDED) -> list[Option]:
    """Aligned ranks that save parameters, and dense, by rising cost: a rank no cheaper than a larger one is out.

    Raises:
        ValueError: the bounds leave nothing.
    """
    kept = [Option(None, price.dense(fqn, space))] if bounds.most is None else []
    largest = min(space.dimensions[1:] if bounds.most is None else (*space.dimensions[1:], bounds.most))
    for rank in range(largest // RANK_ALIGNMENT * RANK_ALIGNMENT, max(bounds.least - 1, 0), -RANK_ALIGNMENT):
        if lowrank_parameters(space, rank) < dense_parameters(space):
            option = Option(rank, price.lowrank(fqn, space, rank))
            if not kept or option.cost < kept[-1].cost:
                kept.append(option)
    if not kept:
        raise ValueError(
            f"bounds leave {fqn!r} no choice: no multiple of {RANK_ALIGNMENT} in [{bounds.least}, {bounds.most}] saves "
            "parameters. Widen them; None for the largest rank lets the layer stay dense."
        )
    return kept[::-1]

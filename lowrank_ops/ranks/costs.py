"""What a layer costs at a rank, in parameters, MACs or time, what the rank is worth, and the sizes to choose from."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..latencies import LayerLatencies
from ..subspaces.channels import ChannelSubspaces
from ..subspaces.layer import LayerSubspaces

RANK_ALIGNMENT = 8  # stored ranks, and channels that budgets choose, are multiples of this: fast kernels need it


def stored_rank(rank: int) -> int:
    """The rank rounded up to a multiple of 8, at least 8, so that no kernel or convolution gets an empty factor."""
    return max(1, -(-rank // RANK_ALIGNMENT)) * RANK_ALIGNMENT


def stored_rank_of(spaces: LayerSubspaces, rank: int, *, pivoted: bool = False) -> int:
    """The rank as stored: a pivoted layer has no padding."""
    return rank if is_pivoted(spaces, rank, pivoted) else stored_rank(rank)


def dense_parameters(spaces: LayerSubspaces) -> int:
    """Parameters of the dense layer, or of the layers of an MLP."""
    if isinstance(spaces, ChannelSubspaces):
        return sum(map(dense_parameters, spaces.layers))
    groups, in_features, out_features = spaces.dimensions
    return groups * (in_features * out_features + (out_features if spaces.bias is not None else 0))


def pivoting_saves(rank: int, out_features: int) -> bool:
    """Whether a pivoted layer is smaller than two factors: by rank^2, less the order of the outputs."""
    return rank**2 > out_features


def is_pivoted(spaces: LayerSubspaces, rank: int, pivoted: bool) -> bool:
    """Whether the layer is pivoted at this rank, given whether it may be."""
    return pivoted and spaces.is_linear and pivoting_saves(rank, spaces.dimensions.out_features)


def factor_parameters(spaces: LayerSubspaces, rank: int, *, pivoted: bool = False) -> int:
    """Parameters of the two factors; of pivoted ones, the order of the outputs counts as one each."""
    groups, in_features, out_features = spaces.dimensions
    if is_pivoted(spaces, rank, pivoted):
        return rank * (in_features + out_features - rank) + out_features
    return groups * stored_rank(rank) * (in_features + out_features)


def lowrank_parameters(spaces: LayerSubspaces, rank: int, *, pivoted: bool = False) -> int:
    """Parameters of the low-rank layer; centering adds a bias to a layer without one.

    For an MLP, those of its layers with ``rank`` channels.
    """
    groups, _, out_features = spaces.dimensions
    bias = groups * out_features if spaces.bias is not None or spaces.centered else 0
    if isinstance(spaces, ChannelSubspaces):
        biases = sum(space.bias is not None for space in spaces.producers.values())
        return rank * (_widths(spaces) + biases) + bias
    return factor_parameters(spaces, rank, pivoted=pivoted) + bias


def _widths(spaces: ChannelSubspaces) -> int:
    """Weight elements of an MLP per channel."""
    return spaces.dimensions.out_features + sum(space.dimensions.in_features for space in spaces.producers.values())


def dense_macs(spaces: LayerSubspaces) -> int:
    """MACs of the dense layer, or of the layers of an MLP, over the calibration rows."""
    if isinstance(spaces, ChannelSubspaces):
        return sum(map(dense_macs, spaces.layers))
    groups, in_features, out_features = spaces.dimensions
    return spaces.rows * groups * in_features * out_features


def lowrank_macs(spaces: LayerSubspaces, rank: int, *, pivoted: bool = False) -> int:
    """MACs of the low-rank layer, or of an MLP with ``rank`` channels, over the calibration rows."""
    if isinstance(spaces, ChannelSubspaces):
        return spaces.rows * rank * _widths(spaces)
    groups, in_features, out_features = spaces.dimensions
    if is_pivoted(spaces, rank, pivoted):
        return spaces.rows * rank * (in_features + out_features - rank)
    return spaces.rows * groups * stored_rank(rank) * (in_features + out_features)


def worth_of_ranks(space: LayerSubspaces, allocation: str) -> list[float]:
    """What an allocation maximizes, by rank from 0 to all directions, or by number of channels.

    The loss that is saved, doubled; the share of the output variance that is kept; or, if uniform, the rank itself.
    """
    if allocation == "uniform":
        return [float(rank) for rank in range(space.max_rank + 1)]
    if allocation == "variance":
        return space.output.mean_shares()
    assert space.loss is not None
    spectrum = space.loss.spectrum
    return [0.0, *spectrum.reshape(-1, spectrum.shape[-1]).sum(0).cumsum(0).tolist()]


class Price(NamedTuple):
    """A unit of cost, in whole numbers."""

    unit: str
    dense: Callable[[str, LayerSubspaces], int]  # takes the layer's name and spaces
    lowrank: Callable[[str, LayerSubspaces, int], int]
    pivoted: bool = False  # the layers that these are costs of

    def of(self, fqn: str, space: LayerSubspaces, rank: int | None) -> int:
        """The cost of a layer at a rank, or dense."""
        return self.dense(fqn, space) if rank is None else self.lowrank(fqn, space, rank)


def _counted(unit: str, dense: Callable[..., int], lowrank: Callable[..., int], pivoted: bool) -> Price:
    return Price(
        unit,
        lambda fqn, space: dense(space),
        lambda fqn, space, rank: lowrank(space, rank, pivoted=pivoted),
        pivoted,
    )


def in_parameters(pivoted: bool = False) -> Price:
    """Cost in parameters."""
    return _counted("parameters", dense_parameters, lowrank_parameters, pivoted)


def in_macs(pivoted: bool = False) -> Price:
    """Cost in MACs."""
    return _counted("MACs", dense_macs, lowrank_macs, pivoted)


def nanoseconds(latencies: LayerLatencies) -> Price:
    """Cost in time, as measured."""

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

    min: int = 0
    max: int | None = None  # None: no bound, and the layer may stay dense


UNBOUNDED = Bounds()


# Of down and up, or one of the whole weight of a dense layer: "int8" or "fp8"; None: the dtype of the layer.
Formats = tuple[str | None, ...]
PLAIN: Formats = (None, None)


class Option(NamedTuple):
    """A layer at one size."""

    rank: int | None
    cost: int
    formats: Formats = PLAIN


def options_of(fqn: str, space: LayerSubspaces, price: Price, bounds: Bounds = UNBOUNDED) -> list[Option]:
    """Aligned ranks, or numbers of channels, that save parameters, and dense, in ascending order of cost.

    Ranks that cost as much as a larger rank are left out.

    Raises:
        ValueError: the bounds leave nothing.
    """
    kept = [Option(None, price.dense(fqn, space))] if bounds.max is None else []
    largest = space.max_rank if bounds.max is None else min(space.max_rank, bounds.max)
    for rank in range(largest // RANK_ALIGNMENT * RANK_ALIGNMENT, max(bounds.min - 1, 0), -RANK_ALIGNMENT):
        if lowrank_parameters(space, rank, pivoted=price.pivoted) < dense_parameters(space):
            option = Option(rank, price.lowrank(fqn, space, rank))
            if not kept or option.cost < kept[-1].cost:
                kept.append(option)
    if not kept:
        raise ValueError(
            f"bounds leave no rank for {fqn!r}: no multiple of {RANK_ALIGNMENT} in [{bounds.min}, {bounds.max}] saves "
            "parameters. Widen them; None for the largest rank lets the layer stay dense."
        )
    return kept[::-1]

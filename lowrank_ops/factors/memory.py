"""Estimates of the memory that compression uses in addition to the model and its covariances."""

from __future__ import annotations

from collections.abc import Mapping

from ..config import CompressionConfig
from ..models.memory import size
from ..policies import ByteBudget, ExplainedVariance
from ..ranks.choose import ChosenRanks, Rounded
from ..ranks.eight_bit import eight_bit_bytes, lowrank_bytes
from ..subspaces.layer import LayerSubspaces

# Peak number of float64 elements, in multiples of features^2 of the streamed side, of out_features^2 and of
# in_features * out_features: without output gradients, and with them. Chosen to cover the peaks of torch's allocator at
# full rank, for regular and rank-deficient moments; on average they are 1.5 times those peaks.
_ELEMENTS = {
    "output": ((4.0, 0.0, 5.5), (5.5, 5.0, 2.25)),
    "loss": ((4.0, 0.0, 5.5), (4.25, 5.25, 4.0)),
    "utilized": ((5.0, 0.5, 6.0), (7.0, 6.0, 4.0)),
    "other": ((5.0, 0.25, 9.0), (7.0, 6.0, 4.0)),
}
_OF_ALLOCATION = {"variance": "output", "loss": "loss"}


def working_bytes(space: LayerSubspaces, config: CompressionConfig) -> int:
    """Peak bytes of one layer's matrices, from its moments to its new layer."""
    allocation = getattr(config.rank, "allocation", None)
    steps = [str(config.projection), *([_OF_ALLOCATION[allocation]] if allocation in _OF_ALLOCATION else [])]
    others = config.channels_of or isinstance(config.rank, ByteBudget | ExplainedVariance)
    if config.projection not in _ELEMENTS or others:
        steps = ["other"]
    groups, in_features, out_features = space.dimensions
    streamed = in_features if space.statistics.side == "input" else out_features
    sizes = streamed**2, out_features**2, in_features * out_features
    gradients = space.statistics.output_gradients is not None
    most = max(sum(n * m for n, m in zip(_ELEMENTS[step][gradients], sizes, strict=True)) for step in steps)
    return int(8 * groups * most)


def bytes_to_spare(subspaces: Mapping[str, LayerSubspaces], config: CompressionConfig, max_memory: int) -> int:
    """The bytes of ``max_memory`` that are left beside the layer that needs most, spectra and shared inputs.

    Raises:
        ValueError: ``max_memory`` is too small; the message names the layer.
    """
    needed = {fqn: working_bytes(space, config) for fqn, space in subspaces.items()}
    kept = _kept_bytes(subspaces)
    fqn = max(needed, key=needed.__getitem__)
    spare = max_memory - kept - needed[fqn]
    if spare < 0:
        space = subspaces[fqn]
        _, in_features, out_features = space.dimensions
        smaller = ""
        may_stream_output = config.projection in ("output", "loss") and not config.channels_of
        if space.statistics.side == "input" and out_features < in_features and may_stream_output:
            smaller = ", calibrate with side='smaller'"
        raise ValueError(
            f"layer {fqn!r} ({in_features} -> {out_features}) needs {size(needed[fqn])} besides the model, and spectra "
            f"and shared inputs take {size(kept)}; max_memory is {size(max_memory)}. Pass a larger "
            f"max_memory{smaller}, or leave the layer out with filter_fn."
        )
    return spare


def _kept_bytes(subspaces: Mapping[str, LayerSubspaces]) -> int:
    """Bytes of all spectra, and of input spaces that are kept until a later layer with the same input."""
    spectra = 0
    apart: dict[int, int] = {}
    last: dict[int, int] = {}  # by input, the index of the last layer that had it
    for number, space in enumerate(subspaces.values()):
        groups, in_features, out_features = space.dimensions
        spectra += 6 * 8 * groups * max(in_features, out_features)
        key = id(space.input)
        if space.input is not None and last.get(key, number - 1) < number - 1:
            apart[key] = 2 * 8 * groups * in_features**2
        last[key] = number
    return spectra + sum(apart.values())


def new_bytes(
    subspaces: Mapping[str, LayerSubspaces], ranks: ChosenRanks, eight_bit: Mapping[str, Rounded], pivoted: bool
) -> int:
    """Bytes of the new layers."""
    plain = Rounded()
    sizes = {
        fqn: lowrank_bytes(subspaces[fqn], rank, eight_bit.get(fqn, plain).formats, pivoted=pivoted)
        for fqn, rank in ranks.items()
        if rank is not None
    }
    return sum(sizes.values()) + sum(eight_bit_bytes(subspaces[fqn]) for fqn in eight_bit if fqn not in sizes)

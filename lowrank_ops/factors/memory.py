"""The memory that compressing a layer takes, beside the model and its covariances."""

from __future__ import annotations

from collections.abc import Mapping

from ..calibration.plan import size
from ..config import ByteBudget, CompressionConfig, ExplainedVariance
from ..subspaces.layer import LayerSubspaces

# The most float64 elements that exist at one time, in multiples of features^2 of the streamed side, of out_features^2
# and of in_features * out_features: without output gradients, and with them. These cover what torch's allocator
# measured at full rank, of regular and of rank-deficient moments, and are half more than that on average.
_ELEMENTS = {
    "output": ((4.0, 0.0, 5.5), (5.5, 5.0, 2.25)),
    "loss": ((4.0, 0.0, 5.5), (4.25, 4.25, 4.0)),
    "other": ((5.0, 0.25, 9.0), (7.0, 6.0, 4.0)),
}
_OF_ALLOCATION = {"variance": "output", "loss": "loss"}


def working_bytes(space: LayerSubspaces, config: CompressionConfig) -> int:
    """The most bytes that one layer's matrices take at one time, from its moments to its new layer."""
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
    """What the layer that needs most leaves of ``max_memory``.

    Raises:
        ValueError: a layer needs more than that; the message names it.
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
            f"layer {fqn!r} ({in_features} -> {out_features}) needs {size(needed[fqn])} beside the model, and spectra "
            f"and shared inputs take {size(kept)}; max_memory is {size(max_memory)}. Pass a larger "
            f"max_memory{smaller}, or leave the layer out with filter_fn."
        )
    return spare


def _kept_bytes(subspaces: Mapping[str, LayerSubspaces]) -> int:
    """Bytes of all spectra, and of the input spaces that are kept while layers with other inputs are worked on."""
    spectra = 0
    apart: dict[int, int] = {}
    last: dict[int, int] = {}  # by input, the number of the layer that had it last
    for number, space in enumerate(subspaces.values()):
        groups, in_features, out_features = space.dimensions
        spectra += 6 * 8 * groups * max(in_features, out_features)
        key = id(space.input)
        if space.input is not None and last.get(key, number - 1) < number - 1:
            apart[key] = 2 * 8 * groups * in_features**2
        last[key] = number
    return spectra + sum(apart.values())

"""Decompose and factorize the layers of a model one after another, in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..config import CompressionConfig
from ..models.running import ProgressBar, in_layer
from ..policies import ExplainedVariance, RankPolicy
from ..ranks.choose import ChosenRanks, Rounded
from ..ranks.costs import is_pivoted
from ..subspaces.channels import ChannelSubspaces
from ..subspaces.layer import LayerSubspaces
from .channels import narrowed
from .projections import Factors, eight_bit_weight, factorize, rounded, stored_as

# Decompositions held between choosing ranks and factorizing, and for the next call; beyond this they are recomputed.
MAX_HELD_BYTES = 2 << 30


def decompose(
    policy: RankPolicy,
    subspaces: Mapping[str, LayerSubspaces],
    progress: bool,
    max_held_bytes: int | None = None,
) -> None:
    """Compute the spectra that ``policy`` will use, with a progress bar and in bounded memory."""
    allocation = getattr(policy, "allocation", None)
    max_held_bytes = MAX_HELD_BYTES if max_held_bytes is None else max_held_bytes
    held = 0
    left = Counter(id(space.input) for space in subspaces.values())
    for fqn, space in ProgressBar(subspaces.items(), desc="decomposing", unit="layer", disable=not progress):
        with in_layer(fqn):
            if isinstance(policy, ExplainedVariance):
                space.utilized_rank(policy.threshold)
            elif allocation == "variance":
                _ = space.output.spectrum
            elif allocation == "loss" and space.loss is not None:
                _ = space.loss.subspace.spectrum
        held += space.held_bytes()
        left[id(space.input)] -= 1
        space.release(directions=held > max_held_bytes, shared=not left[id(space.input)])


def factorize_layers(
    subspaces: Mapping[str, LayerSubspaces],
    ranks: ChosenRanks,
    projection: str,
    *,
    keep_directions: bool = False,
    max_held_bytes: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[str, Factors]]:
    """Names and factors of the layers that have a rank, one by one, in the dtype and on the device of their weights.

    Args:
        subspaces: of the layers; those of an MLP yield the factors of each of its layers.
        ranks: ``{fqn: rank or None}``.
        projection: as for :func:`lowrank_ops.factors.factorize`.
        keep_directions: keep the decompositions for other ranks of the same layers.
        max_held_bytes: bound on the decompositions that are kept; by default ``MAX_HELD_BYTES``.
        progress: show a progress bar.
    """
    max_held_bytes = MAX_HELD_BYTES if max_held_bytes is None else max_held_bytes
    left = Counter(id(subspaces[fqn].input) for fqn, rank in ranks.items() if rank is not None)
    for fqn, rank in ProgressBar(ranks.items(), desc="factorizing", unit="layer", disable=not progress):
        if rank is not None:
            space = subspaces[fqn]
            try:
                with in_layer(fqn):
                    if isinstance(space, ChannelSubspaces):
                        found = narrowed(fqn, space, rank, projection)
                    else:
                        exact = factorize(space, rank, projection)
                        found = {fqn: rounded(exact, space, space.dtype, space.layer_device)}
                        del exact  # twice as large
            except ValueError as error:
                raise ValueError(f"layer {fqn!r}: {error}") from None
            left[id(space.input)] -= 1
            held = sum(other.held_bytes() for other in subspaces.values()) if keep_directions else 0
            drop = not keep_directions or held > max_held_bytes
            space.release(directions=drop, shared=not left[id(space.input)])
            yield from found.items()


def as_stored(
    factors: Factors | None, space: LayerSubspaces, config: CompressionConfig, chosen: Rounded | None = None
) -> Factors:
    """``factors``, or the weight of a layer that stays dense, as a layer of 8 bits or pivot rows stores them."""
    if factors is None:
        return eight_bit_weight(space, str(config.projection), *(chosen or Rounded()))
    pivoted = factors.kept is None and is_pivoted(space, factors.rank, config.pivoted)
    return stored_as(factors, space, *(chosen or Rounded()), pivoted=pivoted) if chosen or pivoted else factors

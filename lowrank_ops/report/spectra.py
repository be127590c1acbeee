"""Spectra at a few points, as reports keep them."""

from __future__ import annotations

from ..subspaces.layer import LayerSubspaces

POINTS = 33


def spectrum_of(space: LayerSubspaces) -> tuple[float, ...]:
    """The share of the output's variance in the first 0, 1/32, ... 32/32 of the most directions that it can have.

    The mean over groups.
    """
    most = min(space.dimensions[1:])
    ranks = [round(most * point / (POINTS - 1)) for point in range(POINTS)]
    shares = [float(space.output.explained(rank).mean()) if rank else 0.0 for rank in ranks]
    return tuple(round(share, 6) for share in shares)

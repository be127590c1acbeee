"""Spectra at a few ranks, as the reports store them."""

from __future__ import annotations

from ..subspaces.layer import LayerSubspaces

POINTS = 33


def spectrum_of(space: LayerSubspaces) -> tuple[float, ...] | None:
    """The explained variance of the output at 33 ranks, evenly spaced from 0 to the largest possible one.

    The mean over groups. In the metric of the loss if only that space was decomposed; None if neither was, because a
    report does not justify the cost.
    """
    found = space.decomposed_output()
    if found is None:
        return None
    largest = space.max_rank
    ranks = [round(largest * point / (POINTS - 1)) for point in range(POINTS)]
    shares = found.mean_shares()
    return tuple(round(shares[rank], 6) if rank else 0.0 for rank in ranks)

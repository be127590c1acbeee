"""Random subsets of the rows of a layer's calls, each row with the same probability."""

from __future__ import annotations

import torch
from torch import Tensor

from ..files import digest


class Sampler:
    """Chooses rows of one layer, call by call.

    Args:
        share: fraction of the rows; 1 takes all.
        key: seed and kind of the rows. Equal keys give equal choices, so layers that share an input have the same rows,
            also in different passes.

    Attributes:
        calls: number of draws so far; each draw depends on it.
        seen: number of rows seen so far.
    """

    def __init__(self, share: float, key: str) -> None:
        self.share, self._key = share, key
        self.calls = self.seen = 0

    def choose(self, rows: int) -> Tensor | None:
        """The indices of the chosen rows on the CPU, in order; None: all of them."""
        self.seen += rows
        if self.share >= 1:
            return None
        self.calls += 1
        generator = torch.Generator().manual_seed(int(digest([self._key, self.calls])[:15], 16))
        chosen = int(rows * self.share + float(torch.rand((), generator=generator)))  # of the right size on average
        return torch.randperm(rows, generator=generator)[:chosen].sort().values

    def of(self, rows: Tensor) -> Tensor:
        """The chosen rows of (rows, ...)."""
        chosen = self.choose(len(rows))
        return rows if chosen is None else rows[chosen.to(rows.device)]

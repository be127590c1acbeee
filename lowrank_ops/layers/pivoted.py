"""PivotedLinear: a low-rank layer whose first factor is rows of its weight, which saves rank^2 parameters.

All rows of a matrix (m, n) of rank r are combinations of r of them, the pivots. The layer stores the pivots and the
coefficients of the other rows: r (m + n - r) numbers, where two factors take r (m + n). The function is the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..arguments import checked
from ..factors.pivoted import all_coefficients, pivots_of
from ..factors.projections import Factors
from ._base import copy_flags
from .linear import LowRankLinear


class PivotedLinear(LowRankLinear):
    """A :class:`LowRankLinear` with rank^2 fewer parameters: pivot rows of its weight, and coefficients of the others.

    A drop-in for ``torch.nn.Linear`` (pivoting factorization, Zhao et al. 2025, arXiv 2501.19090). The parameters are
    ``down`` (rank, in_features), the pivot rows, ``up`` (out_features - rank, rank), the coefficients of the other
    rows, and ``bias`` (out_features,) or None. The buffer ``order`` (out_features,), int32, has the index of each
    output in the concatenation of pivots and other rows; a moving average of models must copy it, as
    ``AveragedModel(use_buffers=False)`` does, because averages of integers are rounded. Nothing is padded, and training
    keeps the rank. On every device it runs as two torch matrix products; 8-bit factors are dequantized first.

    Arguments and errors are those of :class:`LowRankLinear`.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> layer = lro.layers.PivotedLinear(64, 32, rank=16)
        >>> tuple(layer.down.shape), tuple(layer.up.shape)
        ((16, 64), (16, 16))
        >>> layer(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 32])
    """

    pivoted = True
    order: Tensor

    @property
    def stored_rank(self) -> int:
        """``rank``, because nothing is padded."""
        return self.rank

    def _factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.rank, self.in_features), (self.out_features - self.rank, self.rank)

    def _create_parameters(self, *sizes: Any, **factory: Any) -> None:
        super()._create_parameters(*sizes, **factory)
        self.register_buffer("order", torch.empty(self.out_features, dtype=torch.int32, device=self.down.device))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random pivot rows and coefficients; all entries of the weight have the variance of ``nn.Linear``'s."""
        self._refuse_eight_bit("reset_parameters")
        bound = max(self.in_features, 1) ** -0.5
        self.down.uniform_(-bound, bound)
        self.up.uniform_(-1, 1).mul_((3 / max(self.rank, 1)) ** 0.5)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        self.order.copy_(torch.arange(self.out_features, device=self.order.device))

    @torch.no_grad()
    def filled_with(self, factors: Factors) -> PivotedLinear:
        """The same layer, with the product of ``factors`` as its weight, in their formats."""
        self._refuse_eight_bit("filled_with")
        for name, values in (factors.pivots or pivots_of(factors.down, factors.up))._asdict().items():
            getattr(self, name).copy_(values)
        self._set_quantized(self._quantized(factors.formats))
        if self.bias is not None and factors.bias is not None:
            self.bias.copy_(factors.bias)
        return self

    @classmethod
    @checked()
    def from_lowrank(cls, layer: LowRankLinear) -> PivotedLinear:
        """The same function as ``layer``, which is not changed, with its dtype, device and flags.

        Example:
            >>> import torch
            >>> import lowrank_ops as lro
            >>> layer = lro.LowRankLinear(64, 32, rank=16)
            >>> pivoted, x = lro.layers.PivotedLinear.from_lowrank(layer), torch.randn(5, 64)
            >>> torch.testing.assert_close(pivoted(x), layer(x), atol=1e-5, rtol=1e-4)
        """
        if isinstance(layer, PivotedLinear):
            layer = layer.to_lowrank()
        down, up = (factor.detach() for factor in layer.float_factors())
        down, up = down[: layer.rank], up[:, : layer.rank]
        bias = None if layer.bias is None else layer.bias.detach()
        pivoted = cls.from_factors(layer.to_dense(), Factors(down, up, bias, layer.rank, "", None, 0.0))
        pivoted.replaced_conv1d = layer.replaced_conv1d
        return pivoted

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        down, up = (self.down, self.up) if self._dtype is None else self.float_factors()
        pivots = F.linear(x, down)
        if x.is_nested is True:  # not a bool in torch.fx; nested tensors have no index_select
            return F.linear(pivots, all_coefficients(up, self.order), self.bias)
        y = torch.cat([pivots, F.linear(pivots, up)], -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # which autocast may have narrowed

    def factors(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Down, up with the coefficients of the pivots, and bias, while compiling; else None: a call costs less."""
        plain = type(self) is PivotedLinear and {"down", "up", "bias"} <= self._parameters.keys()
        if not plain or not is_compiling():
            return None
        down, up = self.float_factors()
        return down, all_coefficients(up, self.order), self.bias

    def product(self) -> Tensor:
        """The weight (out_features, in_features), computed in every call."""
        down, up = self.float_factors()
        return torch.cat([down, up @ down]).index_select(0, self.order)

    def to_lowrank(self) -> LowRankLinear:
        """A :class:`LowRankLinear` of the same function, with rank^2 parameters more, dtype, device and flags."""
        layer = nn.utils.skip_init(
            LowRankLinear,
            self.in_features,
            self.out_features,
            self.rank,
            bias=self.bias is not None,
            device=self.down.device,
            dtype=self.dtype,
        )
        with torch.no_grad():
            down, up = self.float_factors()
            padding = layer.stored_rank - self.rank
            layer.down.copy_(F.pad(down, (0, 0, 0, padding)))
            layer.up.copy_(F.pad(all_coefficients(up, self.order), (0, padding)))
            if layer.bias is not None and self.bias is not None:
                layer.bias.copy_(self.bias)
        layer.replaced_conv1d = self.replaced_conv1d
        return copy_flags(layer, self)

    def _weight_shape(self, *parts: Tensor) -> tuple[int, ...]:
        return self.out_features, self.in_features


def is_order(values: Tensor) -> bool:
    """Whether ``values`` can be the ``order`` of a layer: a permutation."""
    return torch.equal(values.cpu().long().sort().values, torch.arange(len(values), device="cpu"))

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
from ..factors.projections import Factors
from ..models.running import float64_device
from ._base import copy_flags
from .linear import LowRankLinear

MAX_COEFFICIENT = 1.05  # in magnitude; it scales a pivot row's rounding error in the other rows
EXCHANGES = 4  # at most, times the rank


class PivotedLinear(LowRankLinear):
    """A :class:`LowRankLinear` with rank^2 fewer parameters: pivot rows of its weight, and coefficients of the others.

    A drop-in for ``torch.nn.Linear`` (pivoting factorization, Zhao et al. 2025, arXiv 2501.19090). The parameters are
    ``down`` (rank, in_features), the pivot rows, ``up`` (out_features - rank, rank), the coefficients of the other
    rows, and ``bias`` (out_features,) or None. The buffer ``order`` (out_features,), int32, has the index of each
    output in the concatenation of pivots and other rows; a moving average of models must copy it, as
    ``AveragedModel(use_buffers=False)`` does, because averages of integers are rounded. Nothing is padded, and training
    keeps the rank. On every device it runs as two torch matrix products.

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

    def quantize_(self, form: str = "int8", *, down: bool = True, up: bool = True) -> PivotedLinear:
        """Not supported: errors of the pivot rows reach all others.

        Raises:
            ValueError: always.
        """
        raise ValueError("a pivoted layer has no 8-bit factors; replace it by layer.to_lowrank() first.")

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random pivot rows and coefficients; all entries of the weight have the variance of ``nn.Linear``'s."""
        bound = max(self.in_features, 1) ** -0.5
        self.down.uniform_(-bound, bound)
        self.up.uniform_(-1, 1).mul_((3 / max(self.rank, 1)) ** 0.5)
        if self.bias is not None:
            self.bias.uniform_(-bound, bound)
        self.order.copy_(torch.arange(self.out_features, device=self.order.device))

    @torch.no_grad()
    def filled_with(self, factors: Factors) -> PivotedLinear:
        """The same layer, with the product of ``factors`` as its weight."""
        down, up = (part.to(float64_device(part.device), torch.float64) for part in (factors.down, factors.up))
        pivots, others, coefficients = pivoted_rows(up)
        self.down.copy_(up[pivots] @ down)
        self.up.copy_(coefficients)
        self.order.copy_(torch.cat([pivots, others]).argsort())
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
        pivots = F.linear(x, self.down)
        if x.is_nested is True:  # of torch.fx it is not a bool; nested tensors have no index_select
            return F.linear(pivots, self._all_coefficients(), self.bias)
        y = torch.cat([pivots, F.linear(pivots, self.up)], -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # which autocast may have narrowed

    def factors(self) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Down, up with the coefficients of the pivots, and bias, while compiling; else None, a call costs less."""
        plain = type(self) is PivotedLinear and {"down", "up", "bias"} <= self._parameters.keys()
        return (self.down, self._all_coefficients(), self.bias) if plain and is_compiling() else None

    def product(self) -> Tensor:
        """The weight (out_features, in_features), computed in every call."""
        return torch.cat([self.down, self.up @ self.down]).index_select(0, self.order)

    def to_lowrank(self) -> LowRankLinear:
        """A :class:`LowRankLinear` of the same function, with rank^2 parameters more, dtype, device and flags."""
        layer = nn.utils.skip_init(
            LowRankLinear,
            self.in_features,
            self.out_features,
            self.rank,
            bias=self.bias is not None,
            device=self.down.device,
            dtype=self.down.dtype,
        )
        with torch.no_grad():
            padding = layer.stored_rank - self.rank
            layer.down.copy_(F.pad(self.down, (0, 0, 0, padding)))
            layer.up.copy_(F.pad(self._all_coefficients(), (0, padding)))
            if layer.bias is not None and self.bias is not None:
                layer.bias.copy_(self.bias)
        layer.replaced_conv1d = self.replaced_conv1d
        return copy_flags(layer, self)

    def _all_coefficients(self) -> Tensor:
        """Those of the pivots too, (out_features, rank): the second of two factors."""
        eye = torch.eye(self.rank, dtype=self.up.dtype, device=self.up.device)
        return torch.cat([eye, self.up]).index_select(0, self.order)

    def _weight_shape(self, *parts: Tensor) -> tuple[int, ...]:
        return self.out_features, self.in_features


def is_order(values: Tensor) -> bool:
    """Whether ``values`` can be the ``order`` of a layer: each index once."""
    return torch.equal(values.cpu().long().sort().values, torch.arange(len(values), device="cpu"))


def pivoted_rows(up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pivot rows of a matrix, the other rows, and the coefficients that express the others in the pivots.

    Rows of large volume: by LU decomposition with partial pivoting, then exchanging a pivot and another row while a
    coefficient exceeds ``MAX_COEFFICIENT`` (Goreinov et al. 2010, How to find a good submatrix).

    Args:
        up: (rows, rank), float64, of which every row of a product ``up @ down`` is a combination.

    Returns:
        pivots (rank,), others (rows - rank,), coefficients (rows - rank, rank): ``up[others] = coefficients @
        up[pivots]``.
    """
    rows, rank = up.shape
    basis = torch.linalg.qr(up).Q  # of full rank, also where up is not
    order = list(range(rows))
    if rank:
        for place, other in enumerate(torch.linalg.lu_factor(basis).pivots.tolist()):
            order[place], order[other - 1] = order[other - 1], order[place]
    pivots, others = torch.tensor(order, dtype=torch.int64, device=up.device).split([rank, rows - rank])
    if not rank or rank == rows:
        return pivots, others, basis[others]

    def solved() -> Tensor:
        return torch.linalg.solve(basis[pivots], basis[others], left=False)

    coefficients = solved()
    for _ in range(EXCHANGES * rank):
        i, j = divmod(int(coefficients.abs().argmax()), rank)  # the other row i becomes a pivot instead of pivot j
        largest = coefficients[i, j].clone()
        if largest.abs() <= MAX_COEFFICIENT:
            break
        row, column = -coefficients[i] / largest, coefficients[:, j].clone()
        row[j] = 1 / largest
        change = row.clone()
        change[j] -= 1
        coefficients.addr_(column, change)
        coefficients[i] = row
        pivots[j], others[i] = others[i].clone(), pivots[j].clone()
    return pivots, others, solved()

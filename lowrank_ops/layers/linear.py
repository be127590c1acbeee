"""LowRankLinear: a drop-in for torch.nn.Linear whose weight is a product of two low-rank factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..calibration.statistics import LayerStatistics
from ..models.layers import dimensions, has_transposed_weight
from ..ops import lowrank_linear
from ._base import LowRankLayer, check_rank, copy_flags, factorize_layer, initialize


class LowRankLinear(LowRankLayer):
    """``y = (x down^T) up^T + bias``, a drop-in for ``torch.nn.Linear``.

    The parameters are ``down`` (stored_rank, in_features), ``up`` (out_features, stored_rank) and ``bias``
    (out_features,) or None. ``stored_rank`` is ``rank`` rounded up to a multiple of 8, so that every kernel can run
    the layer. The padding is zero and receives zero gradients, so training keeps the rank.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: true rank, in [0, min(in_features, out_features)].
        bias: whether to learn a bias.
        device, dtype: of the parameters.

    Raises:
        ValueError: ``rank`` is out of range.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> layer = lro.LowRankLinear(64, 32, rank=12)
        >>> layer
        LowRankLinear(in_features=64, out_features=32, rank=12, bias=True)
        >>> tuple(layer.down.shape), tuple(layer.up.shape)
        ((16, 64), (32, 16))
        >>> layer(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 32])
    """

    replaced_conv1d: type[nn.Module] | None = None  # transformers' class, where the layer took the place of one

    @checked()
    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self._create_parameters(*self._factor_shapes(), out_features if bias else None, device=device, dtype=dtype)
        self.reset_parameters()

    def _factor_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.stored_rank, self.in_features), (self.out_features, self.stored_rank)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random factors; the entries of their product have the variance of a new ``nn.Linear``'s weight."""
        initialize(self.down, self.up, self.bias, self.rank, self.in_features)

    @classmethod
    @checked()
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        statistics: LayerStatistics | None = None,
        *,
        projection: str | None = None,
        centered: bool = True,
    ) -> LowRankLinear:
        """Factorize one ``nn.Linear`` or transformers' ``Conv1D``.

        With statistics, ``projection="output"`` minimizes the mean squared output error over the calibration inputs
        by principal components of the output (Zhang et al. 2015, arXiv 1505.06798). Without, the factors are the
        truncated SVD of the weight. Factors are computed in float64 and stored in the dtype of ``linear``.

        Args:
            linear: the layer, of any float dtype and on any device; not changed.
            rank: in [0, min(in_features, out_features)].
            statistics: of the layer, such as ``covariances["name"]`` from :func:`lowrank_ops.calibrate`; None for the
                truncated SVD.
            projection, centered: as in :class:`lowrank_ops.CompressionConfig`.

        Returns:
            A layer with the dtype, device, training and gradient flags of ``linear``.

        Raises:
            TypeError: ``linear`` is not a linear layer, or ``statistics`` is not the statistics of one layer.
            ValueError: ``rank`` is out of range, ``projection`` is unknown, or the statistics are of another layer.

        Example:
            >>> import torch
            >>> import lowrank_ops as lro
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU())
            >>> x = torch.randn(256, 4) @ torch.randn(4, 64)  # inputs in a subspace of 4 dimensions
            >>> covariances = lro.calibrate(model, [x])
            >>> layer = lro.LowRankLinear.from_linear(model[0], 4, covariances["0"])
            >>> torch.testing.assert_close(layer(x), model[0](x), atol=1e-4, rtol=1e-4)
        """
        if not isinstance(linear, nn.Linear) and not has_transposed_weight(linear):
            raise TypeError(f"linear must be a torch.nn.Linear; got {type(linear).__name__}.")
        return cls.from_factors(linear, factorize_layer(linear, rank, statistics, projection, centered))

    @classmethod
    def empty_like(cls, dense: nn.Module, rank: int, bias: bool) -> LowRankLinear:
        _, in_features, out_features = dimensions(dense)
        weight = dense.get_parameter("weight")
        layer = nn.utils.skip_init(
            cls, in_features, out_features, rank, bias=bias, device=weight.device, dtype=weight.dtype
        )
        if has_transposed_weight(dense):
            layer.replaced_conv1d = type(dense)
        return copy_flags(layer, dense)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        # nn.Module.__getattr__ is slow; read _parameters directly.
        parameters = self._parameters
        if "down" in parameters and "up" in parameters and "bias" in parameters:
            return lowrank_linear(x, parameters["down"], parameters["up"], parameters["bias"])  # type: ignore[arg-type]
        return lowrank_linear(x, self.down, self.up, self.bias)  # parametrized, pruned or sharded

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Down, up and bias, if a call of this layer computes only their product; None of a subclass."""
        plain = type(self) is LowRankLinear and {"down", "up", "bias"} <= self._parameters.keys()
        return (self.down, self.up, self.bias) if plain else None

    def product(self) -> Tensor:
        """The product (out_features, in_features), computed in every call."""
        return self.up @ self.down

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the product as its weight and the same dtype, device and flags.

        Example:
            >>> import torch
            >>> import lowrank_ops as lro
            >>> layer = lro.LowRankLinear(64, 32, rank=12)
            >>> layer.to_dense()
            Linear(in_features=64, out_features=32, bias=True)
            >>> x = torch.randn(5, 64)
            >>> torch.testing.assert_close(layer.to_dense()(x), layer(x))
        """
        return self._fill_dense(
            nn.utils.skip_init(
                nn.Linear,
                self.in_features,
                self.out_features,
                bias=self.bias is not None,
                device=self.down.device,
                dtype=self.down.dtype,
            )
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )

"""LowRankConv2d: a drop-in for torch.nn.Conv2d, a spatial convolution to few channels and a 1 x 1 convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import checked
from ..calibration.statistics import LayerStatistics
from ..models.layers import dimensions, pad_input
from ._base import LowRankLayer, check_rank, copy_flags, factorize_layer, initialize

GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class LowRankConv2d(LowRankLayer):
    """A convolution to ``rank`` channels per group and a 1 x 1 convolution, a drop-in for ``torch.nn.Conv2d``.

    The scheme is that of Zhang et al. 2015 (arXiv 1505.06798). The parameters are ``down``
    (groups * stored_rank, in_channels / groups, *kernel_size), ``up`` (out_channels, stored_rank, 1, 1) and ``bias``
    (out_channels,) or None. ``stored_rank`` is ``rank`` rounded up to a multiple of 8; the padding is zero and
    receives zero gradients.

    Args:
        rank: true rank of one group, at most
            min(in_channels / groups * kernel height * kernel width, out_channels / groups).
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as for ``torch.nn.Conv2d``.

    Raises:
        ValueError: ``rank`` is out of range, or an argument that ``torch.nn.Conv2d`` rejects.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> layer = lro.LowRankConv2d(4, 16, kernel_size=3, rank=6, padding=1)
        >>> tuple(layer.down.shape), tuple(layer.up.shape)
        ((8, 4, 3, 3), (16, 8, 1, 1))
        >>> layer(torch.randn(2, 4, 10, 10)).shape
        torch.Size([2, 16, 10, 10])
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

    @checked()
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        rank: int,
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # nn.Conv2d validates and expands the arguments; on the meta device it allocates nothing.
        geometry: dict[str, Any] = {
            "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": padding_mode,
        }  # fmt: skip
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, **geometry, device="meta")
        _, in_features, out_features = dimensions(conv)
        check_rank(rank, in_features, out_features)
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        for name, value in _geometry(conv).items():
            setattr(self, name, value)
        down = (groups * self.stored_rank, in_channels // groups, *conv.kernel_size)
        self._create_parameters(down, (out_channels, self.stored_rank, 1, 1), bias, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random factors; the entries of their product have the variance of a new ``nn.Conv2d``'s weight."""
        fan_in = self.down[0].numel() if len(self.down) else 1
        down = self.down.view(self.groups, self.stored_rank, fan_in)
        initialize(down, self.up.flatten(1), self.bias, self.rank, fan_in)

    @classmethod
    @checked()
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        rank: int,
        statistics: LayerStatistics | None = None,
        *,
        projection: str | None = None,
        centered: bool = True,
    ) -> LowRankConv2d:
        """Factorize one ``nn.Conv2d``, each group as a matrix (out_channels / groups, patch size).

        Args:
            conv: the layer, of any float dtype and on any device; not changed.
            rank: of one group, in [0, min(patch size, out_channels / groups)], where the patch size is
                in_channels / groups * kernel height * kernel width.
            statistics, projection, centered: as for :meth:`LowRankLinear.from_linear`.

        Returns:
            A layer with the dtype, device, training and gradient flags of ``conv``.

        Raises:
            TypeError: ``conv`` is not an ``nn.Conv2d``, or ``statistics`` is not the statistics of one layer.
            ValueError: ``rank`` is out of range, ``projection`` is unknown, or the statistics are of another layer.

        Example:
            >>> import torch
            >>> import lowrank_ops as lro
            >>> conv = torch.nn.Conv2d(4, 16, 3, padding=1)
            >>> lro.LowRankConv2d.from_conv2d(conv, 6).rank
            6
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be a torch.nn.Conv2d; got {type(conv).__name__}.")
        return cls.from_factors(conv, factorize_layer(conv, rank, statistics, projection, centered))

    @classmethod
    def empty_like(cls, dense: nn.Module, rank: int, bias: bool) -> LowRankConv2d:
        weight = dense.get_parameter("weight")
        layer = nn.utils.skip_init(
            cls, **_geometry(dense), rank=rank, bias=bias, device=weight.device, dtype=weight.dtype
        )
        return copy_flags(layer, dense)

    def forward(self, x: Tensor) -> Tensor:  # (batch, in_channels, height, width) -> (batch, out_channels, ...)
        x, padding = pad_input(self, x)  # type: ignore[arg-type]
        reduced = F.conv2d(x, self.down, None, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(reduced, self.up, self.bias, groups=self.groups)

    def product(self) -> Tensor:
        """The product in the shape of a Conv2d's weight, computed in every call."""
        down = self.down.reshape(self.groups, self.stored_rank, -1)
        up = self.up.reshape(self.groups, -1, self.stored_rank)
        return (up @ down).reshape(self.out_channels, *self.down.shape[1:])

    def to_dense(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with the product as its weight and the same dtype, device and flags.

        Example:
            >>> import torch
            >>> import lowrank_ops as lro
            >>> layer = lro.LowRankConv2d(4, 16, kernel_size=3, rank=6)
            >>> layer.to_dense()
            Conv2d(4, 16, kernel_size=(3, 3), stride=(1, 1))
            >>> x = torch.randn(1, 4, 8, 8)
            >>> torch.testing.assert_close(layer.to_dense()(x), layer(x), atol=1e-5, rtol=1e-4)
        """
        return self._fill_dense(
            nn.utils.skip_init(
                nn.Conv2d,
                **_geometry(self),
                bias=self.bias is not None,
                device=self.down.device,
                dtype=self.down.dtype,
            )
        )

    def extra_repr(self) -> str:
        shown = (f"{name}={getattr(self, name)}" for name in ("stride", "padding", "dilation", "groups"))
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
            f"{', '.join(shown)}, bias={self.bias is not None}"
        )


def _geometry(conv: nn.Module) -> dict[str, Any]:
    return {name: getattr(conv, name) for name in GEOMETRY}

"""LowRankConv1d and LowRankConv2d: drop-ins for torch's, a convolution to few channels and one of kernel size 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import checked
from ..calibration.statistics import LayerStatistics
from ..models.layers import dimensions, pad_input
from ._base import LowRankLayer, check_rank, copy_flags, factorize_layer, initialize

GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")

AnyConv = TypeVar("AnyConv", bound="LowRankConv")


class LowRankConv(LowRankLayer):
    """What both kinds share: a convolution to ``rank`` channels per group, and one of kernel size 1.

    The scheme is that of Zhang et al. 2015 (arXiv 1505.06798). The parameters are ``down``
    (groups * stored_rank, in_channels / groups, *kernel_size), ``up`` (out_channels, stored_rank, 1, ...) and ``bias``
    (out_channels,) or None.
    """

    dense_type: ClassVar[type[nn.Conv1d] | type[nn.Conv2d]]
    convolve: ClassVar[Callable[..., Tensor]]

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    @checked()
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # torch's own layer validates and expands the arguments; on the meta device it allocates nothing.
        geometry: dict[str, Any] = {
            "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": padding_mode,
        }  # fmt: skip
        conv = self.dense_type(in_channels, out_channels, kernel_size, **geometry, device="meta")  # type: ignore[arg-type]
        _, in_features, out_features = dimensions(conv)
        check_rank(rank, in_features, out_features)
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        for name, value in _geometry(conv).items():
            setattr(self, name, value)
        down = (groups * self.stored_rank, in_channels // groups, *conv.kernel_size)
        up = (out_channels, self.stored_rank, *(1 for _ in conv.kernel_size))
        self._create_parameters(down, up, out_channels if bias else None, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random factors; the entries of their product have the variance of a new dense layer's weight."""
        fan_in = self.down[0].numel() if len(self.down) else 1
        down = self.down.view(self.groups, self.stored_rank, fan_in)
        initialize(down, self.up.flatten(1), self.bias, self.rank, fan_in)

    @classmethod
    def _of(
        cls: type[AnyConv], conv: nn.Module, rank: int, statistics: LayerStatistics | None, projection: str | None,
        centered: bool,
    ) -> AnyConv:  # fmt: skip
        if not isinstance(conv, cls.dense_type):
            raise TypeError(f"conv must be a torch.nn.{cls.dense_type.__name__}; got {type(conv).__name__}.")
        return cls.from_factors(conv, factorize_layer(conv, rank, statistics, projection, centered))

    @classmethod
    def empty_like(cls: type[AnyConv], dense: nn.Module, rank: int, bias: bool) -> AnyConv:
        weight = dense.get_parameter("weight")
        layer = nn.utils.skip_init(
            cls, **_geometry(dense), rank=rank, bias=bias, device=weight.device, dtype=weight.dtype
        )
        return copy_flags(layer, dense)

    def forward(self, x: Tensor) -> Tensor:  # (batch, in_channels, ...positions) -> (batch, out_channels, ...)
        x, padding = pad_input(self, x)  # type: ignore[arg-type]
        reduced = self.convolve(x, self.down, None, self.stride, padding, self.dilation, self.groups)
        return self.convolve(reduced, self.up, self.bias, groups=self.groups)

    def product(self) -> Tensor:
        """The product in the shape of the dense layer's weight, computed in every call."""
        down = self.down.reshape(self.groups, self.stored_rank, -1)
        up = self.up.reshape(self.groups, -1, self.stored_rank)
        return (up @ down).reshape(self.out_channels, *self.down.shape[1:])

    def _dense(self) -> nn.Module:
        return self._fill_dense(
            nn.utils.skip_init(
                self.dense_type,
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


class LowRankConv1d(LowRankConv):
    """A convolution to ``rank`` channels per group and one of kernel size 1, a drop-in for ``torch.nn.Conv1d``.

    The parameters are ``down`` (groups * stored_rank, in_channels / groups, kernel_size), ``up``
    (out_channels, stored_rank, 1) and ``bias`` (out_channels,) or None, else as in :class:`LowRankConv2d`.

    Args:
        rank: true rank of one group, at most min(in_channels / groups * kernel size, out_channels / groups).
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as for ``torch.nn.Conv1d``.

    Raises:
        ValueError: ``rank`` is out of range, or an argument that ``torch.nn.Conv1d`` rejects.

    Example:
        >>> import torch
        >>> from lowrank_ops.layers import LowRankConv1d
        >>> layer = LowRankConv1d(4, 16, kernel_size=3, rank=6, padding=1)
        >>> tuple(layer.down.shape), tuple(layer.up.shape)
        ((8, 4, 3), (16, 8, 1))
        >>> layer(torch.randn(2, 4, 10)).shape
        torch.Size([2, 16, 10])
    """

    dense_type = nn.Conv1d
    convolve = staticmethod(F.conv1d)

    @classmethod
    @checked()
    def from_conv1d(
        cls,
        conv: nn.Conv1d,
        rank: int,
        statistics: LayerStatistics | None = None,
        *,
        projection: str | None = None,
        centered: bool = True,
    ) -> LowRankConv1d:
        """Factorize one ``nn.Conv1d``; arguments and errors as for :meth:`LowRankConv2d.from_conv2d`.

        Example:
            >>> import torch
            >>> from lowrank_ops.layers import LowRankConv1d
            >>> LowRankConv1d.from_conv1d(torch.nn.Conv1d(4, 16, 3), 6).rank
            6
        """
        return cls._of(conv, rank, statistics, projection, centered)

    def to_dense(self) -> nn.Conv1d:
        """An ``nn.Conv1d`` with the product as its weight and the same dtype, device and flags.

        Example:
            >>> from lowrank_ops.layers import LowRankConv1d
            >>> LowRankConv1d(4, 16, kernel_size=3, rank=6).to_dense()
            Conv1d(4, 16, kernel_size=(3,), stride=(1,))
        """
        return self._dense()  # type: ignore[return-value]


class LowRankConv2d(LowRankConv):
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

    dense_type = nn.Conv2d
    convolve = staticmethod(F.conv2d)

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
        return cls._of(conv, rank, statistics, projection, centered)

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
        return self._dense()  # type: ignore[return-value]


def _geometry(conv: nn.Module) -> dict[str, Any]:
    return {name: getattr(conv, name) for name in GEOMETRY}

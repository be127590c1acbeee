"""The factorised layers: drop-in replacements for Linear and Conv2d."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.statistics import LayerStatistics, Moments
from ..config import PROJECTIONS, check_choice
from ..factors.factorize import Factors, factorize
from ..models.layers import dimensions, is_conv1d, pad_input, weight_matrix
from ..ops import lowrank_linear
from ..ranks.costs import stored_rank
from ..subspaces.layer import LayerSubspaces


class _LowRank(nn.Module):
    """What both layers share: thin factors, padded to a stored rank, and their dense product."""

    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None
    rank: int

    @property
    def stored_rank(self) -> int:
        """The rank as stored: ``rank`` rounded up to a positive multiple of 8 with zero directions."""
        return stored_rank(self.rank)

    @torch.no_grad()
    def _fill(self, factors: Factors) -> None:
        """Write factors into the parameters, zero beyond their rank."""
        padding = self.stored_rank - factors.rank
        self.down.copy_(F.pad(factors.down, (0, 0, 0, padding)).reshape(self.down.shape))
        self.up.copy_(F.pad(factors.up, (0, padding)).reshape(self.up.shape))
        if self.bias is not None and factors.bias is not None:
            self.bias.copy_(factors.bias)


class LowRankLinear(_LowRank):
    """``y = (x down^T) up^T + bias``, a drop-in for ``torch.nn.Linear``.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        rank: true rank; ``down`` (stored_rank, in_features) and ``up`` (out_features, stored_rank) are padded with
            zeros to a multiple of 8, which also receive zero gradients.
        bias: whether to learn a bias (out_features,).
        device, dtype: of the parameters.
    """

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
        _check_rank(rank, in_features, out_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Parameter(torch.empty(self.stored_rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, self.stored_rank, device=device, dtype=dtype))
        values = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", values)  # among the parameters also where it is None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random factors whose product has the scale of a freshly made Linear."""
        _reset(self.down, self.up, self.bias, self.rank, self.in_features)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        statistics: LayerStatistics | None = None,
        *,
        projection: str = "output",
        centered: bool = True,
    ) -> LowRankLinear:
        """Factorise one Linear (or transformers' Conv1D).

        Args:
            linear: the layer; not changed.
            rank: at most min(in_features, out_features).
            statistics: of the layer, such as ``covariances["name"]``; None takes the truncated SVD of the weight.
            projection, centered: as in :class:`lowrank_ops.CompressionConfig`.

        Raises:
            TypeError: ``linear`` is not a linear layer.
            ValueError: the rank is out of range, or the statistics belong to another layer.
        """
        if not isinstance(linear, nn.Linear) and not is_conv1d(linear):
            raise TypeError(f"linear must be a torch.nn.Linear; got {type(linear).__name__}.")
        return cls.from_factors(linear, _factorize(linear, rank, statistics, projection, centered))

    @classmethod
    def from_factors(cls, linear: nn.Module, factors: Factors) -> LowRankLinear:
        """A layer like ``linear`` (dtype, device, training and gradient flags) that holds ``factors``."""
        layer = cls.empty_like(linear, factors.rank, bias=factors.bias is not None)
        layer._fill(factors)
        return layer

    @classmethod
    def empty_like(cls, linear: nn.Module, rank: int, bias: bool) -> LowRankLinear:
        """A layer like ``linear`` (sizes, dtype, device, training and gradient flags) with factors yet to be set."""
        _, in_features, out_features = dimensions(linear)
        weight: Tensor = linear.weight  # type: ignore[assignment]
        layer = nn.utils.skip_init(
            cls, in_features, out_features, rank, bias=bias, device=weight.device, dtype=weight.dtype
        )
        return _like(layer, linear)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        # A module finds its parameters last of all, which takes as long as what the op does before its products.
        own = self._parameters
        if "down" in own and "up" in own and "bias" in own:
            return lowrank_linear(x, own["down"], own["up"], own["bias"])  # type: ignore[arg-type]
        return lowrank_linear(x, self.down, self.up, self.bias)  # parametrized, pruned or sharded

    @property
    def weight(self) -> Tensor:
        """The dense product (out_features, in_features), for code that reads a Linear's weight; made anew each time."""
        return self.up @ self.down

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """A Linear that computes the same."""
        linear = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.down.device,
            dtype=self.down.dtype,
        )
        linear.weight.copy_(self.weight)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return _like(linear, self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class LowRankConv2d(_LowRank):
    """A k x k convolution to ``rank`` channels and a 1 x 1 convolution, a drop-in for ``torch.nn.Conv2d``.

    ``down`` is (groups * stored_rank, in_channels / groups, *kernel_size) and ``up`` (out_channels, stored_rank, 1, 1);
    ``rank`` is that of one group. Arguments are those of ``torch.nn.Conv2d``, and ``rank``.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str

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
        # A Conv2d on the meta device checks the arguments and expands them, and costs nothing.
        geometry: dict[str, Any] = {
            "kernel_size": kernel_size,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "padding_mode": padding_mode,
        }
        conv = nn.Conv2d(in_channels, out_channels, **geometry, device="meta")
        _, in_features, out_features = dimensions(conv)
        _check_rank(rank, in_features, out_features)
        self.in_channels, self.out_channels, self.rank = in_channels, out_channels, rank
        for name in geometry:
            setattr(self, name, getattr(conv, name))
        shape = (groups * self.stored_rank, in_channels // groups, *conv.kernel_size)
        self.down = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_channels, self.stored_rank, 1, 1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random factors whose product has the scale of a freshly made Conv2d."""
        fan_in = self.down[0].numel() if len(self.down) else 1
        _reset(self.down.view(self.groups, self.stored_rank, fan_in), self.up.flatten(1), self.bias, self.rank, fan_in)

    @classmethod
    def from_conv2d(
        cls,
        conv: nn.Conv2d,
        rank: int,
        statistics: LayerStatistics | None = None,
        *,
        projection: str = "output",
        centered: bool = True,
    ) -> LowRankConv2d:
        """Factorise one Conv2d; arguments and errors as for :meth:`LowRankLinear.from_linear`."""
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv must be a torch.nn.Conv2d; got {type(conv).__name__}.")
        return cls.from_factors(conv, _factorize(conv, rank, statistics, projection, centered))

    @classmethod
    def from_factors(cls, conv: nn.Conv2d, factors: Factors) -> LowRankConv2d:
        """A layer like ``conv`` that holds ``factors``."""
        layer = cls.empty_like(conv, factors.rank, bias=factors.bias is not None)
        layer._fill(factors)
        return layer

    @classmethod
    def empty_like(cls, conv: nn.Conv2d, rank: int, bias: bool) -> LowRankConv2d:
        """A layer like ``conv`` with factors yet to be set."""
        layer = nn.utils.skip_init(
            cls, **_geometry(conv), rank=rank, bias=bias, device=conv.weight.device, dtype=conv.weight.dtype
        )
        return _like(layer, conv)

    def forward(self, x: Tensor) -> Tensor:  # (batch, in_channels, height, width), as Conv2d
        x, padding = pad_input(self, x)  # type: ignore[arg-type]
        thin = F.conv2d(x, self.down, None, self.stride, padding, self.dilation, self.groups)
        return F.conv2d(thin, self.up, self.bias, groups=self.groups)

    @property
    def weight(self) -> Tensor:
        """The dense product, shaped as a Conv2d's weight; made anew each time."""
        down = self.down.reshape(self.groups, self.stored_rank, -1)
        up = self.up.reshape(self.groups, -1, self.stored_rank)
        return (up @ down).reshape(self.out_channels, *self.down.shape[1:])

    @torch.no_grad()
    def to_dense(self) -> nn.Conv2d:
        """A Conv2d that computes the same."""
        conv = nn.utils.skip_init(
            nn.Conv2d, **_geometry(self), bias=self.bias is not None, device=self.down.device, dtype=self.down.dtype
        )
        conv.weight.copy_(self.weight)
        if self.bias is not None:
            conv.bias.copy_(self.bias)
        return _like(conv, self)

    def extra_repr(self) -> str:
        shown = (f"{name}={getattr(self, name)}" for name in ("stride", "padding", "dilation", "groups"))
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, rank={self.rank}, "
            f"{', '.join(shown)}, bias={self.bias is not None}"
        )


def _geometry(conv: nn.Module) -> dict[str, Any]:
    names = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )  # fmt: skip
    return {name: getattr(conv, name) for name in names}


def _factorize(
    layer: nn.Module, rank: int, statistics: LayerStatistics | None, projection: str, centered: bool
) -> Factors:
    _, in_features, out_features = dimensions(layer)
    _check_rank(rank, in_features, out_features)
    check_choice("projection", projection, PROJECTIONS)
    if statistics is not None and not isinstance(statistics, LayerStatistics):
        raise TypeError(
            f"statistics must be the LayerStatistics of this layer, such as covariances['name']; got "
            f"{type(statistics).__name__}."
        )
    if statistics is None:
        weight = weight_matrix(layer)
        statistics = LayerStatistics(
            "input", Moments.zeros((*weight.shape[:-2], in_features), torch.float64, weight.device)
        )
        projection, centered = "weight", False
    return factorize(LayerSubspaces.of_layer(layer, statistics, centered=centered), rank, projection)


def _check_rank(rank: int, in_features: int, out_features: int) -> None:
    largest = min(in_features, out_features)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= largest:
        raise ValueError(
            f"rank must be an integer in [0, {largest}] for {in_features} -> {out_features} features; got {rank!r}."
        )


def _reset(down: Tensor, up: Tensor, bias: Tensor | None, rank: int, fan_in: int) -> None:
    """Uniform factors; the variance of a product of entries matches 1 / (3 fan_in), that of ``nn.Linear``."""
    bound = (9 / max(rank, 1) / (3 * fan_in)) ** 0.25
    for factor in (down, up):
        factor.uniform_(-bound, bound)
    down[..., rank:, :] = 0
    up[..., rank:] = 0
    if bias is not None:
        bias.uniform_(-(fan_in**-0.5), fan_in**-0.5)


def _like(layer: Any, original: nn.Module) -> Any:
    """Training and gradient flags as in ``original``: the factors follow its weight, the bias its bias."""
    flags = {name: parameter.requires_grad for name, parameter in original.named_parameters(recurse=False)}
    weight = any(flag for name, flag in flags.items() if name != "bias")
    for name, parameter in layer.named_parameters(recurse=False):
        parameter.requires_grad_(flags.get("bias", weight) if name == "bias" else weight)
    return layer.train(original.training)

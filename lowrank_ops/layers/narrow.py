"""NarrowLinear: a dense layer of an MLP whose channels were dropped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..arguments import checked
from ..factors.projections import Factors
from ..models.layers import dimensions
from ._base import copy_flags


class NarrowLinear(nn.Linear):
    """A ``torch.nn.Linear`` that replaces a larger one and stores the larger sizes, for checkpoints.

    :func:`lowrank_ops.compress_` puts it into MLPs whose channels it drops. It computes what its base class does, and
    tools that support ``torch.nn.Linear`` support it.

    Args:
        in_features, out_features: of this layer.
        dense_features: (in_features, out_features) of the replaced layer.
        bias: whether the layer has a bias.
        device, dtype: of the parameters.

    Raises:
        ValueError: more features than the replaced layer, or fewer than 1.

    Example:
        >>> import torch
        >>> import lowrank_ops as lro
        >>> layer = lro.layers.NarrowLinear(48, 32, dense_features=(64, 32))
        >>> layer
        NarrowLinear(in_features=48, out_features=32, bias=True, dense_features=(64, 32))
        >>> layer(torch.randn(5, 48)).shape
        torch.Size([5, 32])
    """

    @checked()
    def __init__(
        self,
        in_features: int,
        out_features: int,
        dense_features: tuple[int, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, size, dense in zip(
            ("in_features", "out_features"), (in_features, out_features), dense_features, strict=True
        ):
            if not 1 <= size <= dense:
                raise ValueError(f"{name} must be in [1, {dense}], by dense_features; got {size}.")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.dense_features = dense_features

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dense_features={self.dense_features}"

    @classmethod
    def empty_like(cls, dense: nn.Module, in_features: int, out_features: int, bias: bool) -> NarrowLinear:
        """A layer with uninitialized parameters, and dtype, device, training and gradient flags of ``dense``."""
        weight = dense.get_parameter("weight")
        layer = nn.utils.skip_init(
            cls, in_features, out_features, tuple(dimensions(dense)[1:]), bias=bias, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        return copy_flags(layer, dense)

    @classmethod
    @torch.no_grad()
    def from_factors(cls, dense: nn.Module, factors: Factors) -> NarrowLinear:
        """A layer with the weight and bias of ``factors``, and the flags of ``dense``."""
        out_features, in_features = factors.down.shape
        layer = cls.empty_like(dense, in_features, out_features, factors.bias is not None)
        layer.weight.copy_(factors.down)
        if factors.bias is not None:
            layer.bias.copy_(factors.bias)
        return layer

    def to_plain(self) -> nn.Linear:
        """An ``nn.Linear`` with the parameters of this layer."""
        return self._linear(self._parameters["weight"], self.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with the sizes of the replaced layer, padded with zeros at the end."""
        in_features, out_features = self.dense_features
        added = in_features - self.in_features, out_features - self.out_features
        weight = nn.Parameter(F.pad(self.weight, (0, added[0], 0, added[1])), self.weight.requires_grad)
        bias = None if self.bias is None else nn.Parameter(F.pad(self.bias, (0, added[1])), self.bias.requires_grad)
        return self._linear(weight, bias)

    def _linear(self, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
        out_features, in_features = weight.shape
        layer = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
        return layer.train(self.training)
